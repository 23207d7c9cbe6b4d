//! One connection to a peer, over any stream of bytes: who it is ([`handshake`], [`proof`]), and what is read and written once that is
//! known ([`link`]). Which piece is asked for or shown is decided by the swarm, which sends [`Command`]s and is sent [`Event`]s; a
//! link answers by itself what needs no decision: requests for what was shown.

pub(crate) mod assembly;
pub(crate) mod handshake;
pub(crate) mod link;
pub(crate) mod proof;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use gse_core::net::BoxDuplex;
pub use proof::ticket;

use crate::Bitmap;

/// Bytes of a block that one of ours is asked for.
pub(crate) const OWN_BLOCK: u32 = 32 * 1024;
/// Requests that we take from a peer before we have answered, and say so.
pub(crate) const QUEUE: usize = 2000;
/// Requests that a foreign peer is sent at most before it has answered; fewer if it says so.
pub(crate) const ASK_FOREIGN: usize = 250;

/// Deadlines and bounds of connections.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// A connection has to be made, and both sides have to say who they are, within this time.
    pub handshake: Duration,
    /// A peer that owes us data and sends nothing for this time is left.
    pub silence: Duration,
    /// A peer that says nothing at all for this time is left.
    pub idle: Duration,
    /// Something is said to a peer at least this often.
    pub keep_alive: Duration,
    /// Unsent bytes that may wait in the kernel, over all connections. What waits there delays whatever is said to a peer, and can no
    /// longer be taken back when the peer has got it elsewhere. What is on its way is not counted, so that distance costs no speed.
    pub unsent: usize,
    /// Pieces that have come are reported to a peer at once if nothing was said to it for this time, else together with others.
    pub gather: Duration,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            silence: Duration::from_secs(60),
            idle: Duration::from_secs(150),
            keep_alive: Duration::from_secs(60),
            unsent: 1 << 20,
            gather: Duration::from_millis(25),
        }
    }
}

/// Where a peer is, as far as zones go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Place {
    /// Where we are.
    #[default]
    Here,
    /// Across the border, and we carry what it has into our zone.
    Upstream,
    /// It carries what we have into its zone.
    Relay,
}

/// Who is at the other end.
#[derive(Debug, Clone)]
pub(crate) struct Who {
    /// Of ours: the id that it has proven to be a member with.
    pub(crate) id: Option<String>,
    pub(crate) peer_id: [u8; 20],
    pub(crate) address: SocketAddr,
    /// Whether we have dialled.
    pub(crate) dialled: bool,
    pub(crate) place: Place,
    /// The fast extension is spoken.
    pub(crate) fast: bool,
    /// The extension protocol is spoken.
    pub(crate) extended: bool,
    /// Most requests it takes at a time.
    pub(crate) queue: usize,
}

impl Who {
    /// Whether it is one of ours.
    pub(crate) fn is_own(&self) -> bool {
        self.id.is_some()
    }

    pub(crate) fn name(&self) -> String {
        match &self.id {
            Some(id) => format!("{id} ({})", self.address),
            None => self.address.to_string(),
        }
    }
}

/// A connection whose other end is known.
pub(crate) struct Established {
    pub(crate) stream: BoxDuplex,
    pub(crate) who: Who,
    /// What was read beyond the handshake.
    pub(crate) rest: bytes::BytesMut,
    /// The socket below the stream.
    pub(crate) socket: std::os::fd::OwnedFd,
    /// Its place among the connections of the engine.
    pub(crate) permit: tokio::sync::OwnedSemaphorePermit,
}

/// What a swarm has a link do.
#[derive(Debug)]
pub(crate) enum Command {
    /// First of all: say what is here; with `None`, say that nothing is, whatever is.
    Begin {
        have: Option<Bitmap>,
        interested: bool,
    },
    /// Say, before long, that this one is here.
    Have(u32),
    /// Offer these, at once.
    Show(Vec<u32>),
    Request(u32),
    Cancel(u32),
    NotInterested,
}

/// What a link tells its swarm.
#[derive(Debug)]
pub(crate) enum Event {
    Bitfield(Bitmap),
    Have(u32),
    Choking(bool),
    /// The first bytes of a piece.
    Started(u32),
    /// All of a piece, in order.
    Piece {
        piece: u32,
        parts: Vec<Bytes>,
    },
    Refused(u32),
    /// It has asked for a part of a piece.
    Asked(u32),
    Sent {
        piece: u32,
        bytes: u64,
    },
    /// What is here cannot be read as the manifest says.
    Unreadable(crate::storage::StorageError),
}
