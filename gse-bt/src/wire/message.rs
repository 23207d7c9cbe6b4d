//! Messages after the handshake.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::WireError;
use crate::geometry::{Block, MAX_BLOCK};

/// Bytes of a message behind its length field, at most: a block of 128 KiB and the nine bytes before it.
pub const MAX_MESSAGE: usize = MAX_BLOCK as usize + 9;
/// Bytes of a `Piece` message before its block.
pub const PIECE_HEAD: usize = 13;

/// A message between peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Nothing; says that the connection lives.
    KeepAlive,
    /// Requests will not be answered.
    Choke,
    /// Requests will be answered.
    Unchoke,
    /// The sender wants something that the receiver has.
    Interested,
    /// The sender wants nothing that the receiver has.
    NotInterested,
    /// The sender has a piece.
    Have(u32),
    /// Which pieces the sender has; [`crate::Bitmap::from_wire`] reads and checks it.
    Bitfield(Bytes),
    /// A block is wanted.
    Request(Block),
    /// A block.
    Piece {
        /// Index of the piece.
        piece: u32,
        /// Offset within it.
        begin: u32,
        /// The block.
        data: Bytes,
    },
    /// A block is not wanted any more.
    Cancel(Block),
    /// Where the sender's DHT node listens; of no use here, and never sent.
    Port(u16),
    /// Fast extension: a piece that would be good to ask for.
    Suggest(u32),
    /// Fast extension: the sender has everything.
    HaveAll,
    /// Fast extension: the sender has nothing.
    HaveNone,
    /// Fast extension: a request will not be answered.
    Reject(Block),
    /// Fast extension: a piece that may be asked for while choked.
    AllowedFast(u32),
    /// A message of the extension protocol.
    Extended {
        /// 0 is the extension handshake ([`super::ExtHandshake`]); others are what the receiver has said they are.
        id: u8,
        /// What follows.
        payload: Bytes,
    },
    /// Of a kind that is not known; to be ignored.
    Unknown(u8),
}

mod kind {
    pub(super) const CHOKE: u8 = 0;
    pub(super) const UNCHOKE: u8 = 1;
    pub(super) const INTERESTED: u8 = 2;
    pub(super) const NOT_INTERESTED: u8 = 3;
    pub(super) const HAVE: u8 = 4;
    pub(super) const BITFIELD: u8 = 5;
    pub(super) const REQUEST: u8 = 6;
    pub(super) const PIECE: u8 = 7;
    pub(super) const CANCEL: u8 = 8;
    pub(super) const PORT: u8 = 9;
    pub(super) const SUGGEST: u8 = 13;
    pub(super) const HAVE_ALL: u8 = 14;
    pub(super) const HAVE_NONE: u8 = 15;
    pub(super) const REJECT: u8 = 16;
    pub(super) const ALLOWED_FAST: u8 = 17;
    pub(super) const EXTENDED: u8 = 20;
}

impl Message {
    /// Takes a message off the buffer; `None` while it is not whole, with room made for the rest of it.
    ///
    /// A block, bitfield or extension payload shares the buffer's memory.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, WireError> {
        let Some(head) = buffer.first_chunk::<4>() else {
            buffer.reserve(4);
            return Ok(None);
        };
        let stated = u32::from_be_bytes(*head);
        let len = stated as usize;
        if len > MAX_MESSAGE {
            return Err(WireError::TooLong(stated));
        }
        if len == 0 {
            buffer.advance(4);
            return Ok(Some(Message::KeepAlive));
        }
        // A wrong length for its kind is seen before the rest has come.
        if let Some(&kind) = buffer.get(4) {
            check_len(kind, len - 1)?;
        }
        if buffer.len() < 4 + len {
            buffer.reserve(4 + len - buffer.len());
            return Ok(None);
        }
        buffer.advance(4);
        let mut body = buffer.split_to(len).freeze();
        let kind = body.get_u8();
        Ok(Some(Self::from_body(kind, body)))
    }

    /// `body` has a length that `kind` can have.
    fn from_body(kind: u8, mut body: Bytes) -> Self {
        fn block(mut body: Bytes) -> Block {
            Block {
                piece: body.get_u32(),
                begin: body.get_u32(),
                len: body.get_u32(),
            }
        }
        match kind {
            kind::CHOKE => Message::Choke,
            kind::UNCHOKE => Message::Unchoke,
            kind::INTERESTED => Message::Interested,
            kind::NOT_INTERESTED => Message::NotInterested,
            kind::HAVE => Message::Have(body.get_u32()),
            kind::BITFIELD => Message::Bitfield(body),
            kind::REQUEST => Message::Request(block(body)),
            kind::PIECE => Message::Piece {
                piece: body.get_u32(),
                begin: body.get_u32(),
                data: body,
            },
            kind::CANCEL => Message::Cancel(block(body)),
            kind::PORT => Message::Port(body.get_u16()),
            kind::SUGGEST => Message::Suggest(body.get_u32()),
            kind::HAVE_ALL => Message::HaveAll,
            kind::HAVE_NONE => Message::HaveNone,
            kind::REJECT => Message::Reject(block(body)),
            kind::ALLOWED_FAST => Message::AllowedFast(body.get_u32()),
            kind::EXTENDED => Message::Extended {
                id: body.get_u8(),
                payload: body,
            },
            other => Message::Unknown(other),
        }
    }

    /// Puts the message behind what is in the buffer. For blocks see also [`piece_head`], which needs no copy of them.
    pub fn encode(&self, buffer: &mut BytesMut) {
        let out = &mut Out(buffer);
        match self {
            Message::KeepAlive => out.0.put_u32(0),
            Message::Choke => out.bytes(kind::CHOKE, &[]),
            Message::Unchoke => out.bytes(kind::UNCHOKE, &[]),
            Message::Interested => out.bytes(kind::INTERESTED, &[]),
            Message::NotInterested => out.bytes(kind::NOT_INTERESTED, &[]),
            Message::Have(piece) => out.bytes(kind::HAVE, &piece.to_be_bytes()),
            Message::Bitfield(bits) => out.bytes(kind::BITFIELD, bits),
            Message::Request(block) => out.block(kind::REQUEST, *block),
            Message::Piece { piece, begin, data } => {
                out.0.reserve(PIECE_HEAD + data.len());
                out.0.put_slice(&piece_head(*piece, *begin, data.len()));
                out.0.put_slice(data);
            }
            Message::Cancel(block) => out.block(kind::CANCEL, *block),
            Message::Port(port) => out.bytes(kind::PORT, &port.to_be_bytes()),
            Message::Suggest(piece) => out.bytes(kind::SUGGEST, &piece.to_be_bytes()),
            Message::HaveAll => out.bytes(kind::HAVE_ALL, &[]),
            Message::HaveNone => out.bytes(kind::HAVE_NONE, &[]),
            Message::Reject(block) => out.block(kind::REJECT, *block),
            Message::AllowedFast(piece) => out.bytes(kind::ALLOWED_FAST, &piece.to_be_bytes()),
            Message::Extended { id, payload } => {
                out.head(kind::EXTENDED, payload.len() + 1);
                out.0.put_u8(*id);
                out.0.put_slice(payload);
            }
            Message::Unknown(kind) => out.bytes(*kind, &[]),
        }
    }
}

struct Out<'b>(&'b mut BytesMut);

impl Out<'_> {
    fn head(&mut self, kind: u8, len: usize) {
        self.0.reserve(5 + len);
        // No message comes near the end of 32 bits: the longest are a block, and a bitfield of a million pieces.
        self.0.put_u32(len as u32 + 1);
        self.0.put_u8(kind);
    }

    fn bytes(&mut self, kind: u8, payload: &[u8]) {
        self.head(kind, payload.len());
        self.0.put_slice(payload);
    }

    fn block(&mut self, kind: u8, block: Block) {
        self.head(kind, 12);
        self.0.put_u32(block.piece);
        self.0.put_u32(block.begin);
        self.0.put_u32(block.len);
    }
}

/// What goes before a block of `len` bytes on the wire, for writers that send the block from where it lies.
#[must_use]
pub fn piece_head(piece: u32, begin: u32, len: usize) -> [u8; PIECE_HEAD] {
    let mut head = [0; PIECE_HEAD];
    head[..4].copy_from_slice(&(len as u32 + 9).to_be_bytes());
    head[4] = kind::PIECE;
    head[5..9].copy_from_slice(&piece.to_be_bytes());
    head[9..].copy_from_slice(&begin.to_be_bytes());
    head
}

/// Whether a message of this kind can have `len` bytes behind its number.
fn check_len(kind: u8, len: usize) -> Result<(), WireError> {
    let good = match kind {
        kind::CHOKE | kind::UNCHOKE | kind::INTERESTED | kind::NOT_INTERESTED => len == 0,
        kind::HAVE_ALL | kind::HAVE_NONE => len == 0,
        kind::HAVE | kind::SUGGEST | kind::ALLOWED_FAST => len == 4,
        kind::REQUEST | kind::CANCEL | kind::REJECT => len == 12,
        kind::PIECE => len > 8,
        kind::PORT => len == 2,
        kind::EXTENDED => len >= 1,
        _ => true,
    };
    match good {
        true => Ok(()),
        false => Err(WireError::BadLength { kind, len }),
    }
}
