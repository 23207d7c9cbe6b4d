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
    /// Where commands for slots on their way go.
    pub(crate) moving: Option<Arc<Group>>,
    /// What this is made of; none before it could be read.
    pub(crate) topology: Option<Arc<Topology>>,
    /// As the topology has it, whatever is on its way.
    pub(crate) owners: SlotMap,
    /// Who answers what belongs to no key when that was a group's that is drained.
    pub(crate) stand_in: Option<usize>,
}

impl Table {
    pub(crate) fn group(&self, i: usize) -> Option<&Arc<Group>> {
        match self.stand_in {
            _ if i == MOVING => self.moving.as_ref(),
            Some(other) if !self.is_used(i) => self.groups.get(other),
            _ => self.groups.get(i),
        }
    }

    /// Whether a key that a group shows is its own: what is copied to it or left in it is not.
    pub(crate) fn shows(&self, group: usize, key: &[u8]) -> bool {
        self.owners.group(slot(key)) == group
    }

    /// Whether a group has, or has had, a part in the data.
    pub(crate) fn is_used(&self, group: usize) -> bool {
        self.topology
            .as_ref()
            .and_then(|t| t.groups.get(group))
            .is_none_or(|m| !(m.drained && m.slots.is_empty()))
    }

    /// Whether slots are on their way, or something is left of such: then keys can be in two groups.
    pub(crate) fn is_moving(&self) -> bool {
        self.topology.as_ref().is_some_and(|t| !t.legs.is_empty())
    }

    /// How often slots have changed their group, as far as a cursor can carry it.
    pub(crate) fn generation(&self) -> u64 {
        self.topology.as_ref().map_or(0, |t| t.switches % 16)
    }
}
