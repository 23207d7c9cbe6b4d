//! Frames of the agent session: a 16-byte header and a protobuf message.
//!
//! ```text
//! 0        4      6      8               16
//! | length | kind | zero | correlation id | message ... |
//! ```
//! All numbers big-endian; `length` counts the message only. Decoding takes the message out of the read buffer without
//! copying it, and prost's `Bytes` fields point into the same memory. A frame of an unknown kind is returned as such, so that
//! the receiver can say [`crate::session::Unsupported`] and go on; only a length over the limit or a non-zero reserved field
//! ends the connection, because after that nothing on it can be trusted.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use crate::proc as p;
use crate::session as s;

/// Bytes of a frame header.
pub const HEADER_LEN: usize = 16;

/// Longest message in a frame unless a link says otherwise: scripts travel in one frame.
pub const DEFAULT_MAX_MESSAGE: usize = 64 * 1024 * 1024;

/// Longest message before the Hello is accepted: an unknown peer gets no more memory than this.
pub const HELLO_MAX_MESSAGE: usize = 1024 * 1024;

/// Why a byte stream is not a sequence of frames.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Length beyond the limit of this link.
    #[error("a frame of {length} bytes, at most {limit} are allowed")]
    TooLong {
        /// What the header says.
        length: usize,
        /// What the link allows.
        limit: usize,
    },
    /// The two reserved bytes are not zero: not our protocol, or out of step.
    #[error("reserved header field is {0:#06x}, not a frame of this protocol")]
    Reserved(u16),
    /// The message does not decode.
    #[error("message of kind {kind} does not decode")]
    Message {
        /// Kind as in the header.
        kind: u16,
        /// What prost says.
        #[source]
        source: prost::DecodeError,
    },
}

/// A frame taken from the wire, not yet decoded.
#[derive(Debug, Clone)]
pub struct RawFrame {
    /// Which message; see [`Frame`].
    pub kind: u16,
    /// Ties an answer to a question; 0 when there is none.
    pub correlation: u64,
    /// The encoded message.
    pub message: Bytes,
}

/// Takes the next whole frame from `buffer`; `None` when more bytes are needed.
///
/// # Errors
/// [`FrameError::TooLong`] and [`FrameError::Reserved`]; the connection is of no use after either.
pub fn take_raw(buffer: &mut BytesMut, max_message: usize) -> Result<Option<RawFrame>, FrameError> {
    if buffer.len() < HEADER_LEN {
        return Ok(None);
    }
    let mut header = &buffer[..HEADER_LEN];
    let length = header.get_u32() as usize;
    let kind = header.get_u16();
    let reserved = header.get_u16();
    let correlation = header.get_u64();
    if reserved != 0 {
        return Err(FrameError::Reserved(reserved));
    }
    if length > max_message {
        return Err(FrameError::TooLong {
            length,
            limit: max_message,
        });
    }
    if buffer.len() < HEADER_LEN + length {
        return Ok(None);
    }
    buffer.advance(HEADER_LEN);
    Ok(Some(RawFrame {
        kind,
        correlation,
        message: buffer.split_to(length).freeze(),
    }))
}

/// How many bytes in total the frame at the head of `buffer` will have; `None` while its header is incomplete.
/// A reader uses it to reserve once instead of growing step by step.
#[must_use]
pub fn announced_len(buffer: &BytesMut) -> Option<usize> {
    let mut head = buffer.get(..4)?;
    Some(HEADER_LEN + head.get_u32() as usize)
}

/// Writes a frame header.
pub fn put_header(out: &mut BytesMut, kind: u16, correlation: u64, message_len: usize) {
    debug_assert!(u32::try_from(message_len).is_ok());
    out.put_u32(message_len as u32);
    out.put_u16(kind);
    out.put_u16(0);
    out.put_u64(correlation);
}

/// Makes the enum of a link's messages, by kind.
macro_rules! frames {
    ($(#[$doc:meta])* $frame:ident { $($kind:literal => $name:ident: $message:ty;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs, clippy::large_enum_variant)]
        pub enum $frame {
            $($name($message),)*
            /// A kind that this build does not know.
            Unknown { kind: u16, message: Bytes },
        }

        impl $frame {
            /// The number in the header.
            #[must_use]
            pub fn kind(&self) -> u16 {
                match self {
                    $(Self::$name(_) => $kind,)*
                    Self::Unknown { kind, .. } => *kind,
                }
            }

            /// Bytes of the encoded message, header not counted.
            #[must_use]
            pub fn message_len(&self) -> usize {
                match self {
                    $(Self::$name(m) => m.encoded_len(),)*
                    Self::Unknown { message, .. } => message.len(),
                }
            }

            /// Appends header and message.
            pub fn encode(&self, correlation: u64, out: &mut BytesMut) {
                let len = self.message_len();
                out.reserve(HEADER_LEN + len);
                put_header(out, self.kind(), correlation, len);
                match self {
                    $(Self::$name(m) => m.encode_raw(out),)*
                    Self::Unknown { message, .. } => out.put_slice(message),
                }
            }

            /// Decodes a raw frame; an unknown kind is not an error.
            ///
            /// # Errors
            /// [`FrameError::Message`] when the message does not decode.
            pub fn decode(raw: RawFrame) -> Result<Self, FrameError> {
                let kind = raw.kind;
                let fail = |source| FrameError::Message { kind, source };
                Ok(match kind {
                    $($kind => Self::$name(<$message>::decode(raw.message).map_err(fail)?),)*
                    _ => Self::Unknown { kind, message: raw.message },
                })
            }

            /// Takes and decodes the next frame; `None` when more bytes are needed.
            ///
            /// # Errors
            /// As [`take_raw`] and [`Self::decode`].
            pub fn take(buffer: &mut BytesMut, max_message: usize) -> Result<Option<Self>, FrameError> {
                take_raw(buffer, max_message)?.map(Self::decode).transpose()
            }

            /// Header and message as one buffer.
            #[must_use]
            pub fn to_bytes(&self) -> Bytes {
                let mut out = BytesMut::with_capacity(HEADER_LEN + self.message_len());
                self.encode(0, &mut out);
                out.freeze()
            }
        }

        $(impl From<$message> for $frame {
            fn from(m: $message) -> Self { Self::$name(m) }
        })*

        #[cfg(test)]
        const KINDS: &[(u16, &str)] = &[$(($kind, stringify!($name)),)*];
    };
}
pub(crate) use frames;

frames! {
    /// A message of the session, by kind. Kinds are only added; a number is never used again.
    Frame {
        1 => Hello: s::Hello;
        2 => Welcome: s::Welcome;
        3 => Refuse: s::Refuse;
        4 => Heartbeat: s::Heartbeat;
        5 => Ping: s::Ping;
        6 => Pong: s::Pong;
        7 => Goodbye: s::Goodbye;
        8 => Move: s::Move;
        9 => Unsupported: s::Unsupported;
        10 => Servers: s::Servers;
        16 => Dispatch: s::Dispatch;
        17 => Terminate: s::Terminate;
        18 => Row: s::Row;
        19 => Output: s::Output;
        20 => Stored: s::Stored;
        24 => Call: s::Call;
        25 => CallReply: s::CallReply;
        26 => PluginMessage: s::PluginMessage;
        27 => ProcReport: p::ProcReport;
        28 => ProcReported: p::ProcReported;
    }
}

impl Frame {
    /// Header number of [`Frame::Dispatch`], for senders that put the message together from encoded parts.
    pub const DISPATCH: u16 = 16;
    /// Header number of [`Frame::Call`], likewise.
    pub const CALL: u16 = 24;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dispatch() -> s::Dispatch {
        s::Dispatch {
            target: Some(s::TargetRef {
                task_id: "GSETASK:S:20261122233412:00000000000000FF".into(),
                bucket: 1,
                index: 2,
            }),
            epoch: Bytes::from_static(b"epoch"),
            user: "root".into(),
            not_after_ms: 1_700_000_000_000,
            output_limit: 5 << 20,
            scripts: vec![s::Script {
                name: "a.sh".into(),
                store_dir: "/tmp/bkjob/root".into(),
                content: Bytes::from_static(b"echo hi"),
            }],
            atomic_tasks: vec![s::AtomicTask {
                id: 0,
                command: "/tmp/bkjob/root/a.sh".into(),
                timeout_ms: 60_000,
                after: vec![],
            }],
            asked_id: "0:127.0.0.1".into(),
        }
    }

    #[test]
    fn golden_bytes() {
        // A change here is a change of the wire: it needs a new protocol version and a reason.
        let mut out = BytesMut::new();
        Frame::from(s::Ping { nonce: 0x0102 }).encode(7, &mut out);
        assert_eq!(
            &out[..],
            [0, 0, 0, 3, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0x08, 0x82, 0x02]
        );
        let golden = include_bytes!("../golden/dispatch.v1.bin");
        assert_eq!(&Frame::from(dispatch()).to_bytes()[..], &golden[..]);
        let mut kinds = String::new();
        for (kind, name) in KINDS {
            kinds.push_str(&format!("{kind} {name}\n"));
        }
        assert_eq!(kinds, include_str!("../golden/kinds.v1.txt"));
    }

    #[test]
    fn two_encodings_one_message() {
        let whole = dispatch();
        let own = s::Dispatch {
            scripts: vec![],
            atomic_tasks: vec![],
            not_after_ms: 0,
            output_limit: 0,
            ..whole.clone()
        };
        let shared = s::Dispatch {
            target: None,
            epoch: Bytes::new(),
            user: String::new(),
            asked_id: String::new(),
            ..whole.clone()
        };
        let mut joined = BytesMut::new();
        joined.put_slice(&own.encode_to_vec());
        joined.put_slice(&shared.encode_to_vec());
        assert_eq!(s::Dispatch::decode(joined.freeze()).unwrap(), whole);
    }

    #[test]
    fn payloads_are_not_copied() {
        let data = Bytes::from(vec![b'x'; 4096]);
        let wire = Frame::from(s::Output {
            data,
            ..Default::default()
        })
        .to_bytes();
        let mut buffer = BytesMut::from(&wire[..]);
        let range = buffer.as_ptr_range();
        let Some(Frame::Output(out)) = Frame::take(&mut buffer, 1 << 20).unwrap() else {
            panic!("not an Output")
        };
        assert!(
            range.contains(&out.data.as_ptr()),
            "the payload must point into the read buffer"
        );
    }

    #[test]
    fn unknown_kinds_and_fields_are_tolerated() {
        let mut wire = BytesMut::new();
        put_header(&mut wire, 999, 0, 3);
        wire.put_slice(b"abc");
        // Field 100, varint: unknown to every message here.
        let message = [0x08, 0x05, 0xa0, 0x06, 0x01];
        put_header(&mut wire, 5, 0, message.len());
        wire.put_slice(&message);
        assert!(matches!(
            Frame::take(&mut wire, 100).unwrap(),
            Some(Frame::Unknown { kind: 999, .. })
        ));
        assert_eq!(
            Frame::take(&mut wire, 100).unwrap(),
            Some(Frame::Ping(s::Ping { nonce: 5 }))
        );
    }

    #[test]
    fn limits_and_nonsense() {
        let mut wire = BytesMut::new();
        put_header(&mut wire, 5, 0, 101);
        assert!(matches!(
            take_raw(&mut wire, 100),
            Err(FrameError::TooLong {
                length: 101,
                limit: 100
            })
        ));
        let mut http = BytesMut::from(&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..]);
        assert!(take_raw(&mut http, DEFAULT_MAX_MESSAGE).is_err());
        let mut bad = BytesMut::new();
        put_header(&mut bad, 1, 0, 2);
        bad.put_slice(&[0xff, 0xff]);
        assert!(matches!(
            Frame::take(&mut bad, 100),
            Err(FrameError::Message { kind: 1, .. })
        ));
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_frames(nonces in proptest::collection::vec(any::<u64>(), 1..20), step in 1usize..40) {
            let mut wire = BytesMut::new();
            for nonce in &nonces {
                Frame::from(s::Ping { nonce: *nonce }).encode(0, &mut wire);
            }
            let mut buffer = BytesMut::new();
            let mut seen = Vec::new();
            for chunk in wire.chunks(step) {
                buffer.extend_from_slice(chunk);
                while let Some(frame) = Frame::take(&mut buffer, 1024).unwrap() {
                    let Frame::Ping(ping) = frame else { panic!("not a Ping") };
                    seen.push(ping.nonce);
                }
            }
            prop_assert_eq!(seen, nonces);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = Frame::take(&mut buffer, 4096) {}
        }
    }
}
