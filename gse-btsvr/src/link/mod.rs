//! Connections of agents that move files, and of relays: who has one, and what is sent over it.
//!
//! An agent holds a link for as long as it has orders or seeds something. Nothing depends on a frame that is sent here: what an agent
//! must know it is told again when it reports, or is asked.

mod accept;
mod conn;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use gse_proto::ids::AgentId;
use gse_proto::link::LinkFrame;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::zone::{Reach, Zone, Zones};

pub use accept::{Listener, bind};

/// One connection.
#[derive(Debug)]
struct Link {
    number: u64,
    frames: mpsc::Sender<LinkFrame>,
    /// Where others reach the peer listener at the other end.
    at: At,
    /// Ends the connection.
    over: CancellationToken,
}

/// Where the other end of a link is.
#[derive(Debug, Clone)]
enum At {
    /// An agent: its cloud area, and where others of its zone reach it.
    Agent(i32, Vec<String>),
    /// An instance that relays.
    Relay(Reach),
}

/// All connections, by agent, or by the name of a relay as a member of swarms.
#[derive(Debug, Default)]
pub struct Links {
    table: DashMap<String, Arc<Link>>,
    /// Relays among them.
    relays: Mutex<BTreeMap<String, Zone>>,
    next: AtomicU64,
}

impl Links {
    /// Whether an agent holds a link.
    #[must_use]
    pub fn has(&self, agent: &AgentId) -> bool {
        self.table.contains_key(agent.as_str())
    }

    /// Where a member is, and how others reach it; `None` when it has no link.
    #[must_use]
    pub fn reach(&self, name: &str, zones: &Zones) -> Option<Reach> {
        let at = self.table.get(name)?.at.clone();
        let reach = match at {
            At::Agent(area, inner) => Reach {
                zone: zones.of_area(area),
                inner,
                outer: vec![],
            },
            At::Relay(reach) => reach,
        };
        (!reach.inner.is_empty()).then_some(reach)
    }

    /// Relays that hold a link, and their zones.
    #[must_use]
    pub fn relays(&self) -> Vec<(String, Zone)> {
        let relays = self.relays.lock();
        relays
            .iter()
            .map(|(name, zone)| (name.clone(), Zone::clone(zone)))
            .collect()
    }

    /// Sends a frame, if there is a link. One whose agent does not keep up is ended: it comes again and says where it stands.
    pub fn send(&self, agent: &AgentId, frame: LinkFrame) -> bool {
        self.send_to(agent.as_str(), frame)
    }

    /// The same by name, which may be a relay's.
    pub fn send_to(&self, name: &str, frame: LinkFrame) -> bool {
        let Some(link) = self.table.get(name).map(|link| Arc::clone(&link)) else {
            return false;
        };
        let sent = link.frames.try_send(frame).is_ok();
        if !sent {
            tracing::info!(
                agent = name,
                "an agent does not take what is sent over its link; the link is ended"
            );
            link.over.cancel();
        }
        sent
    }

    /// Puts a new link in the place of an old one.
    fn open(&self, name: &str, frames: mpsc::Sender<LinkFrame>, at: At, over: CancellationToken) -> u64 {
        // The table is never waited for while this is held.
        if let At::Relay(reach) = &at {
            self.relays.lock().insert(name.to_owned(), Zone::clone(&reach.zone));
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let link = Link {
            number,
            frames,
            at,
            over,
        };
        if let Some(old) = self.table.insert(name.to_owned(), Arc::new(link)) {
            old.over.cancel();
        }
        number
    }

    /// A link has ended; false if another one has taken its place.
    fn close(&self, name: &str, number: u64) -> bool {
        let Entry::Occupied(entry) = self.table.entry(name.to_owned()) else {
            return false;
        };
        if entry.get().number != number {
            return false;
        }
        entry.remove();
        self.relays.lock().remove(name);
        true
    }
}
