//! What goes in and out of the ledger: tries, their ends, and what an order is called.

use std::sync::Arc;

use bytes::Bytes;
use gse_proto::ids::AgentId;
use sha2::{Digest, Sha256};

use crate::identity::{Hash, Os};

/// Pauses between tries, milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Pauses {
    /// The first.
    pub min_ms: u64,
    /// The longest.
    pub max_ms: u64,
}

impl Pauses {
    pub(super) fn after(self, tries: u32) -> u64 {
        self.min_ms.saturating_mul(1 << tries.min(30)).min(self.max_ms)
    }
}

/// What became of an identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// It is what was known.
    Same,
    /// Something newer is known, or another host has the name.
    Stale,
    /// It has to be stored, and pushed if its content is new. The host may have had another key.
    New {
        /// That key.
        before: Option<Gone>,
    },
    /// There are as many hosts as there may be.
    Full,
}

/// A host that is not known any more, or not by this key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gone {
    /// The key.
    pub key: String,
    /// Other names of its agent.
    pub others: Vec<String>,
}

/// A try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Whose.
    pub key: Arc<str>,
    /// Names of its agent.
    pub agents: Vec<AgentId>,
    /// See [`crate::identity::Identity::os`].
    pub os: Os,
    /// What is to be there.
    pub digest: Hash,
    /// Bytes of it.
    pub size: u32,
    /// Names the order, with `order`.
    pub task_id: String,
    /// See above.
    pub order: u32,
}

/// How a try ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It is there.
    Placed {
        /// Which agent has done it.
        to: String,
        /// Epoch of that agent's journal.
        epoch: Bytes,
        /// Where.
        path: String,
    },
    /// It is not.
    Failed {
        /// Inner code.
        code: i32,
        /// Why.
        message: String,
    },
    /// No agent is connected.
    Away,
    /// It may be there.
    Unsure(String),
}

/// How many hosts are how far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// All.
    pub hosts: usize,
    /// Those that wait for their agents.
    pub waiting: usize,
    /// Those whose last try failed.
    pub failed: usize,
    /// Those that are due now or later, or being asked.
    pub open: usize,
}

/// The same for every try of the same content, also by the next active instance, so that an agent that has the order does not carry it
/// out twice.
pub(super) fn task_id(key: &str, digest: &Hash, changed_ms: u64) -> String {
    let mut hash = Sha256::new();
    hash.update(key.as_bytes());
    hash.update([0]);
    hash.update(digest);
    hash.update(changed_ms.to_be_bytes());
    let hash: Hash = hash.finalize().into();
    format!("GSETASK:H:{}", hex::encode(&hash[..16]))
}
