//! The first 68 bytes of a connection.

use bytes::{Buf as _, BufMut as _, BytesMut};

use super::WireError;

/// Bytes of a handshake.
pub const HANDSHAKE_LEN: usize = 68;

const PROTOCOL: &[u8; 20] = b"\x13BitTorrent protocol";
const EXTENDED: (usize, u8) = (5, 0x10);
const FAST: (usize, u8) = (7, 0x04);

/// What both sides say first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handshake {
    /// The swarm that the connection is for.
    pub swarm_id: [u8; 20],
    /// Who speaks; not to be trusted.
    pub peer_id: [u8; 20],
    /// The fast extension is spoken.
    pub fast: bool,
    /// The extension protocol is spoken.
    pub extended: bool,
}

impl Handshake {
    /// Ours: with both extensions.
    #[must_use]
    pub fn new(swarm_id: [u8; 20], peer_id: [u8; 20]) -> Self {
        Self {
            swarm_id,
            peer_id,
            fast: true,
            extended: true,
        }
    }

    /// Takes a handshake off the buffer; `None` while there are not enough bytes. What begins differently is refused at its first
    /// byte that does.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, WireError> {
        let seen = buffer.len().min(PROTOCOL.len());
        if buffer[..seen] != PROTOCOL[..seen] {
            return Err(WireError::NotBitTorrent);
        }
        if buffer.len() < HANDSHAKE_LEN {
            buffer.reserve(HANDSHAKE_LEN - buffer.len());
            return Ok(None);
        }
        buffer.advance(PROTOCOL.len());
        let mut reserved = [0; 8];
        let mut handshake = Self::new([0; 20], [0; 20]);
        buffer.copy_to_slice(&mut reserved);
        buffer.copy_to_slice(&mut handshake.swarm_id);
        buffer.copy_to_slice(&mut handshake.peer_id);
        handshake.extended = reserved[EXTENDED.0] & EXTENDED.1 != 0;
        handshake.fast = reserved[FAST.0] & FAST.1 != 0;
        Ok(Some(handshake))
    }

    /// The bytes for the wire.
    pub fn encode(&self, buffer: &mut BytesMut) {
        let mut reserved = [0; 8];
        if self.extended {
            reserved[EXTENDED.0] |= EXTENDED.1;
        }
        if self.fast {
            reserved[FAST.0] |= FAST.1;
        }
        buffer.reserve(HANDSHAKE_LEN);
        buffer.put_slice(PROTOCOL);
        buffer.put_slice(&reserved);
        buffer.put_slice(&self.swarm_id);
        buffer.put_slice(&self.peer_id);
    }
}
