//! Connections of agents that move files: who has one, and what is sent over it.
//!
//! An agent holds a link for as long as it has orders or seeds something. Nothing depends on a frame that is sent here: what an agent
//! must know it is told again when it reports, or is asked.

mod accept;
mod conn;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use gse_proto::ids::AgentId;
use gse_proto::link::LinkFrame;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use accept::{Listener, bind};

/// One connection.
#[derive(Debug)]
struct Link {
    number: u64,
    frames: mpsc::Sender<LinkFrame>,
    /// Where others reach the agent's peer listener.
    peers: Vec<String>,
    /// Ends the connection.
    over: CancellationToken,
}

/// All connections, by agent.
#[derive(Debug, Default)]
pub struct Links {
    table: DashMap<String, Arc<Link>>,
    next: AtomicU64,
}

impl Links {
    /// Whether an agent holds a link.
    #[must_use]
    pub fn has(&self, agent: &AgentId) -> bool {
        self.table.contains_key(agent.as_str())
    }

    /// Where other agents reach this one; `None` when it has no link.
    #[must_use]
    pub fn peer_addresses(&self, agent: &str) -> Option<Vec<String>> {
        let link = self.table.get(agent)?;
        (!link.peers.is_empty()).then(|| link.peers.clone())
    }

    /// Sends a frame, if there is a link. One whose agent does not keep up is ended: it comes again and says where it stands.
    pub fn send(&self, agent: &AgentId, frame: LinkFrame) -> bool {
        let Some(link) = self.table.get(agent.as_str()).map(|link| Arc::clone(&link)) else {
            return false;
        };
        let sent = link.frames.try_send(frame).is_ok();
        if !sent {
            tracing::info!(%agent, "an agent does not take what is sent over its link; the link is ended");
            link.over.cancel();
        }
        sent
    }

    /// Puts a new link in the place of an agent's old one.
    fn open(
        &self,
        agent: &AgentId,
        frames: mpsc::Sender<LinkFrame>,
        peers: Vec<String>,
        over: CancellationToken,
    ) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let link = Link {
            number,
            frames,
            peers,
            over,
        };
        if let Some(old) = self.table.insert(agent.as_str().to_owned(), Arc::new(link)) {
            old.over.cancel();
        }
        number
    }

    /// A link has ended, if it is still the agent's.
    fn close(&self, agent: &AgentId, number: u64) {
        if let Entry::Occupied(entry) = self.table.entry(agent.as_str().to_owned())
            && entry.get().number == number
        {
            entry.remove();
        }
    }
}
