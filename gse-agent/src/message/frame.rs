//! Frames of the message socket as a pure type: 28 bytes and a body, big-endian (contract data-plane, 1.9).
//!
//! ```text
//! 0        4       6          8          16       20          24          28
//! | magic  | type  | version  | sequence | length | reserved0 | reserved1 | body ...
//! ```
//! `length` counts the header too. In messages `reserved0` and `reserved1` are the lengths of the two parts of the body, a JSON object
//! about the message and its content.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes in front of every body.
pub(super) const HEADER: usize = 28;
const MAGIC: u32 = 0xdead_beef;
const VERSION: u16 = 6;
/// A length beyond this is not meant.
const ABSURD: usize = 64 << 20;

/// Numbers of messages.
pub(super) mod kind {
    /// A plugin says that it is there.
    pub(in crate::message) const KEEPALIVE: u16 = 0x9006;
    /// The answer to that.
    pub(in crate::message) const KEEPALIVE_ANSWER: u16 = 0x9007;
    /// A message for a plugin.
    pub(in crate::message) const DISPATCH: u16 = 0x9008;
    /// A message of a plugin.
    pub(in crate::message) const RESPOND: u16 = 0x900a;
}

/// Why a stream can't be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Implausible {
    /// Another protocol, or out of step.
    #[error("a frame that begins with {0:#010x}")]
    Magic(u32),
    /// A length that nobody means.
    #[error("a frame of type {kind:#x} with a length of {length} and parts of {info} and {content} bytes")]
    Length {
        /// The frame's type.
        kind: u16,
        /// Length as in the header.
        length: u32,
        /// Bytes of the first part.
        info: u32,
        /// Bytes of the second part.
        content: u32,
    },
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    /// What it is.
    pub(super) kind: u16,
    /// As its sender numbers.
    pub(super) sequence: u64,
    /// First part of the body; the whole body where there are no parts.
    pub(super) info: Bytes,
    /// Second part of the body.
    pub(super) content: Bytes,
}

/// What was found at the front.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// Not whole.
    Nothing,
    /// A frame.
    Frame(Frame),
    /// A frame that is longer than is taken; it is passed over.
    TooLong {
        /// Bytes of its body.
        length: usize,
    },
}

/// Finds frames in a stream; one for each connection.
#[derive(Debug)]
pub(super) struct Parser {
    longest: usize,
    pass_over: usize,
}

impl Parser {
    /// One that takes bodies of `longest` bytes at most.
    #[must_use]
    pub(super) fn new(longest: usize) -> Self {
        Self { longest, pass_over: 0 }
    }

    /// Takes the next frame from the front.
    ///
    /// # Errors
    /// The stream is of no use after one.
    pub(super) fn take(&mut self, buffer: &mut BytesMut) -> Result<Taken, Implausible> {
        let passed = self.pass_over.min(buffer.len());
        buffer.advance(passed);
        self.pass_over -= passed;
        if buffer.len() >= 4 && self.pass_over == 0 {
            let magic = (&buffer[..4]).get_u32();
            if magic != MAGIC {
                return Err(Implausible::Magic(magic));
            }
        }
        if buffer.len() < HEADER {
            return Ok(Taken::Nothing);
        }
        let mut head = &buffer[4..HEADER];
        let (kind, _version, sequence) = (head.get_u16(), head.get_u16(), head.get_u64());
        let (length, info, content) = (head.get_u32(), head.get_u32(), head.get_u32());
        let implausible = Implausible::Length {
            kind,
            length,
            info,
            content,
        };
        let counted = (length as usize).checked_sub(HEADER).ok_or(implausible)?;
        let parts = if kind == kind::RESPOND {
            info as usize + content as usize
        } else {
            0
        };
        // Some clients leave the first part out of the length.
        let body = counted.max(parts);
        if body > ABSURD || (parts > 0 && parts < counted) {
            return Err(implausible);
        }
        if body > self.longest {
            buffer.advance(HEADER);
            self.pass_over = body;
            return Ok(Taken::TooLong { length: body });
        }
        if buffer.len() < HEADER + body {
            return Ok(Taken::Nothing);
        }
        buffer.advance(HEADER);
        // Copied, or a short message would hold all of what was read with it for as long as it waits.
        let mut body = Bytes::copy_from_slice(&buffer.split_to(body));
        let first = if parts > 0 { info as usize } else { body.len() };
        let info = body.split_to(first);
        Ok(Taken::Frame(Frame {
            kind,
            sequence,
            info,
            content: body,
        }))
    }
}

/// Header and body of a frame; `content`: the parts of its content, and that it has such parts is said in the header.
#[must_use]
pub(super) fn encode(kind: u16, sequence: u64, info: &[u8], content: Option<&[Bytes]>) -> Bytes {
    let long: usize = content.unwrap_or_default().iter().map(Bytes::len).sum();
    let mut out = BytesMut::with_capacity(HEADER + info.len() + long);
    out.put_u32(MAGIC);
    out.put_u16(kind);
    out.put_u16(VERSION);
    out.put_u64(sequence);
    out.put_u32((HEADER + info.len() + long) as u32);
    let parts = if content.is_some() { (info.len(), long) } else { (0, 0) };
    out.put_u32(parts.0 as u32);
    out.put_u32(parts.1 as u32);
    out.put_slice(info);
    for part in content.unwrap_or_default() {
        out.put_slice(part);
    }
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(wire: &[u8]) -> Taken {
        Parser::new(1000).take(&mut BytesMut::from(wire)).unwrap()
    }

    #[test]
    fn both_lengths_of_a_response() {
        let content = [Bytes::from_static(b"con"), Bytes::from_static(b"tent")];
        let whole = encode(kind::RESPOND, 7, b"{}", Some(&content));
        let frame = Frame {
            kind: kind::RESPOND,
            sequence: 7,
            info: Bytes::from_static(b"{}"),
            content: Bytes::from_static(b"content"),
        };
        assert_eq!(one(&whole), Taken::Frame(frame.clone()));
        // As older clients count: without the first part.
        let mut older = BytesMut::from(&whole[..]);
        older[16..20].copy_from_slice(&35_u32.to_be_bytes());
        assert_eq!(one(&older), Taken::Frame(frame));
    }

    #[test]
    fn a_dispatch_is_what_its_client_checks() {
        // contract: data-plane#47
        let wire = encode(kind::DISPATCH, 1, b"{\"a\":1}", Some(&[Bytes::from_static(b"xyz")]));
        assert_eq!(wire[..8], [0xde, 0xad, 0xbe, 0xef, 0x90, 0x08, 0, 6]);
        assert_eq!(wire[16..28], [0, 0, 0, 38, 0, 0, 0, 7, 0, 0, 0, 3]);
        assert_eq!(&wire[28..], b"{\"a\":1}xyz");
    }

    #[test]
    fn nonsense_is_said_and_long_ones_are_passed_over() {
        let mut parser = Parser::new(10);
        let mut wire = BytesMut::from(&encode(kind::KEEPALIVE, 1, &[b'x'; 11], None)[..]);
        wire.extend_from_slice(&encode(kind::KEEPALIVE, 2, b"{}", None));
        assert_eq!(parser.take(&mut wire).unwrap(), Taken::TooLong { length: 11 });
        assert!(matches!(
            parser.take(&mut wire).unwrap(),
            Taken::Frame(Frame { sequence: 2, .. })
        ));
        assert!(wire.is_empty());
        wire.extend_from_slice(b"GET /");
        assert_eq!(parser.take(&mut wire), Err(Implausible::Magic(0x4745_5420)));
        let mut short = BytesMut::from(&encode(kind::KEEPALIVE, 1, b"", None)[..]);
        short[19] = 27;
        assert!(Parser::new(10).take(&mut short).is_err());
        let mut absurd = BytesMut::from(&encode(kind::RESPOND, 1, b"", None)[..]);
        absurd[20..28].fill(0xff);
        assert!(Parser::new(10).take(&mut absurd).is_err());
    }

    proptest! {
        #[test]
        fn however_the_bytes_are_cut(bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..1200), 1..8), step in 1usize..300) {
            let mut wire = Vec::new();
            for body in &bodies {
                wire.extend_from_slice(&encode(kind::KEEPALIVE, 0, body, None));
            }
            let (mut parser, mut buffer, mut seen) = (Parser::new(1000), BytesMut::new(), Vec::new());
            for some in wire.chunks(step) {
                buffer.extend_from_slice(some);
                loop {
                    match parser.take(&mut buffer).unwrap() {
                        Taken::Nothing => break,
                        Taken::Frame(frame) => seen.push(frame.info.to_vec()),
                        Taken::TooLong { .. } => {}
                    }
                }
            }
            let expected: Vec<Vec<u8>> = bodies.into_iter().filter(|body| body.len() <= 1000).collect();
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), magic in any::<bool>()) {
            let mut buffer = BytesMut::from(&bytes[..]);
            if magic && buffer.len() >= 4 {
                buffer[..4].copy_from_slice(&MAGIC.to_be_bytes());
            }
            let mut parser = Parser::new(100);
            while let Ok(Taken::Frame(_) | Taken::TooLong { .. }) = parser.take(&mut buffer) {}
        }
    }
}
