//! Which groups there are and which of them serves which slot, as one value that is replaced as a whole. Whoever plans a batch holds one table until the batch is
//! answered; who changes the table is not decided here.

use std::sync::Arc;

use super::Group;
use super::slots::SlotMap;

/// One state of the topology.
pub(crate) struct Table {
    /// Goes up with every change.
    pub(crate) epoch: u64,
    pub(crate) map: SlotMap,
    /// A group keeps its place for as long as the process runs: tables only ever append.
    pub(crate) groups: Vec<Arc<Group>>,
}

impl Table {
    pub(crate) fn group(&self, i: usize) -> Option<&Arc<Group>> {
        self.groups.get(i)
    }
}
