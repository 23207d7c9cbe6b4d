//! What peers say to each other: the handshake and messages of BEP 3, those of the fast extension (BEP 6), and the extension handshake
//! (BEP 10) with a dictionary of our own under `gse`.
//!
//! Everything is decoded from a growing buffer and encoded into one; blocks of content are handed on as they lie in the buffer, without
//! being copied. A length is checked before anything is kept for it: no message is longer than a block of 128 KiB with its head. Whether
//! a piece or block exists is for the one who knows the swarm ([`crate::Geometry`]); sockets, deadlines and what follows from a message
//! are left to the connections.

mod extended;
mod handshake;
mod message;

pub use extended::{EXT_HANDSHAKE, ExtHandshake};
pub use handshake::{HANDSHAKE_LEN, Handshake};
pub use message::{MAX_MESSAGE, Message, PIECE_HEAD, piece_head};

use crate::bencode;

/// Why a peer can't be understood. A connection on which this comes up is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Something else than BitTorrent.
    #[error("the peer does not speak BitTorrent")]
    NotBitTorrent,
    /// A message longer than any.
    #[error("a message of {0} bytes; at most {MAX_MESSAGE} are possible")]
    TooLong(u32),
    /// A message of a length that its kind can't have.
    #[error("a message of kind {kind} with {len} bytes")]
    BadLength {
        /// The kind's number.
        kind: u8,
        /// Bytes behind it.
        len: usize,
    },
    /// An extension handshake that can't be read.
    #[error("extension handshake: {0}")]
    Extended(#[from] bencode::Error),
    /// An extension handshake that is something else than a dictionary, or one of whose values is not what it must be.
    #[error("extension handshake: `{0}` is not what it must be")]
    ExtendedKey(&'static str),
}

#[cfg(test)]
mod tests;
