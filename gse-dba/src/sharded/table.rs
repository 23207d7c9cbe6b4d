//! Which groups there are and which of them serves which slot, as one value that is replaced as a whole. Whoever plans a batch holds one table until the batch is
//! answered; who changes the table is not decided here.

use std::sync::Arc;

use super::Group;
use super::moving::topology::Topology;
use super::slots::{MOVING, SlotMap, slot};

/// One state of the topology.
pub(crate) struct Table {
    /// Goes up with every change.
    pub(crate) epoch: u64,
    pub(crate) map: SlotMap,
    /// A group keeps its place for as long as the process runs: tables only ever append.
    pub(crate) groups: Vec<Arc<Group>>,
    /// Groups without any part in the data: nothing is asked of them. Shorter than `groups`: the rest has.
    pub(crate) idle: Box<[bool]>,
    /// Where commands for slots on their way go.
    pub(crate) moving: Option<Arc<Group>>,
    /// What this is made of; none before it could be read, and in front of a cluster, which has its own.
    pub(crate) topology: Option<Arc<Topology>>,
    /// As the topology has it, whatever is on its way. None: like `map`.
    pub(crate) owners: Option<SlotMap>,
}

impl Table {
    pub(crate) fn group(&self, i: usize) -> Option<&Arc<Group>> {
        if i == MOVING {
            self.moving.as_ref()
        } else {
            self.groups.get(i)
        }
    }

    /// A table as it is, with nothing on its way.
    pub(crate) fn of(epoch: u64, map: SlotMap, groups: Vec<Arc<Group>>, idle: Box<[bool]>) -> Self {
        Self {
            epoch,
            map,
            groups,
            idle,
            moving: None,
            topology: None,
            owners: None,
        }
    }

    /// Which group serves each slot, whatever is on its way.
    pub(crate) fn owners(&self) -> &SlotMap {
        self.owners.as_ref().unwrap_or(&self.map)
    }

    /// Whether a key that a group shows is its own: what is copied to it or left in it is not.
    pub(crate) fn shows(&self, group: usize, key: &[u8]) -> bool {
        self.topology.is_none() || self.owners().group(slot(key)) == group
    }

    /// Whether slots are on their way, or something is left of such: then keys can be in two groups.
    pub(crate) fn is_moving(&self) -> bool {
        self.topology.as_ref().is_some_and(|t| !t.legs.is_empty())
    }

    /// How often slots have changed their group, as far as a cursor can carry it.
    pub(crate) fn generation(&self) -> u64 {
        self.topology.as_ref().map_or(0, |t| t.switches % 16)
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
