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
    /// Groups without any part in the data: nothing is asked of them. Shorter than `groups`: the rest has.
    pub(crate) idle: Box<[bool]>,
}

impl Table {
    pub(crate) fn group(&self, i: usize) -> Option<&Arc<Group>> {
        self.groups.get(i)
    }

    /// Whether a group has a part in the data.
    pub(crate) fn is_used(&self, i: usize) -> bool {
        !self.idle.get(i).copied().unwrap_or(false)
    }

    /// The next group that has a part in the data.
    pub(crate) fn after(&self, group: usize) -> Option<usize> {
        (group + 1..self.groups.len()).find(|i| self.is_used(*i))
    }

    /// Where what belongs to no key is: channels, scripts without keys.
    pub(crate) fn home(&self) -> usize {
        (0..self.groups.len()).find(|i| self.is_used(*i)).unwrap_or(0)
    }
}
