//! How foreign clients find the peers of a swarm that is open to them: a tracker over HTTP (BEP 3, compact lists of BEP 23 and BEP 7,
//! scrape of BEP 48) and over UDP (BEP 15).
//!
//! * [`http`], [`udp`]: what is on the wire, both ways, without sockets;
//! * [`ids`]: connection ids of BEP 15 that need no memory;
//! * [`Tracker`]: swarms and their peers, bounded and expiring;
//! * [`serve`] answers on sockets.
//!
//! A swarm is known only once it was allowed; every other is refused in one way, whether there is such a transfer or not. The address
//! of a peer is the one it asks from, whatever it says; only its port is its own to tell. Our own agents do not come here: they are
//! told of peers by gse_btsvr.

mod front;
pub mod http;
pub mod ids;
mod peers;
mod state;
pub mod udp;

pub use front::{FrontConfig, Listening, Torrents, serve, serve_with};
pub use state::{Access, Check, Tracker, TrackerConfig, TrackerMetrics};

use std::net::{SocketAddrV4, SocketAddrV6};

/// What a peer says to the tracker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announce {
    /// The swarm, by its info-hash.
    pub swarm: [u8; 20],
    /// What the peer calls itself.
    pub peer_id: [u8; 20],
    /// Where it listens.
    pub port: u16,
    /// Bytes that it lacks; with none it is a seed.
    pub left: u64,
    /// Why it announces itself.
    pub event: Event,
    /// Peers that it wants to be told.
    pub wanted: Option<u32>,
}

/// Why a peer announces itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Event {
    /// It is time to.
    #[default]
    None,
    /// It begins.
    Started,
    /// It leaves.
    Stopped,
    /// It has got everything.
    Completed,
}

/// The answer to an announce.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peers {
    /// Seconds to the next announce.
    pub interval: u32,
    /// Seconds to it at least.
    pub min_interval: u32,
    /// Peers that have everything.
    pub seeds: u32,
    /// Peers that don't.
    pub leechers: u32,
    /// Some of them, reached over IPv4.
    pub v4: Vec<SocketAddrV4>,
    /// Some of them, reached over IPv6.
    pub v6: Vec<SocketAddrV6>,
}

/// Figures of a swarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Scrape {
    /// Peers that have everything.
    pub seeds: u32,
    /// How often a peer got everything.
    pub completed: u32,
    /// Peers that lack something.
    pub leechers: u32,
}

/// Why an announce is refused; said to the peer in these words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not allowed here. Says nothing of whether there is such a swarm.
    #[error("unknown swarm")]
    UnknownSwarm,
    /// Nobody can listen there.
    #[error("port 0")]
    Port,
}

#[cfg(test)]
mod tests;
