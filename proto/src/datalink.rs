//! Frames of the link that records travel on, and the layout of a record in a batch.
//!
//! The sender dials over TLS and expects a server; a DataHello is answered with a DataWelcome, then batches go one way and
//! acknowledgements the other, many batches in one acknowledgement. The header is the session's (see [`crate::frame`]), the kinds
//! are this link's own. In a batch, before compression, records stand one after the other:
//!
//! ```text
//! 0         4         8       10       12       16
//! | data id | utctime | type  | zero   | length | payload ... |
//! ```
//! All numbers big-endian. `type` is the message type of the plugin's frame, `utctime` what the plugin wrote there; neither is used
//! to order or refuse a record (contract data-plane, 1.3).

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use crate::data as d;
use crate::frame::{FrameError, HEADER_LEN, RawFrame, frames, put_header, take_raw};
use crate::session as s;

/// Version of the link's protocol.
pub const PROTOCOL: u32 = 1;
/// Longest payload of a record (contract data-plane, section 6).
pub const MAX_PAYLOAD: usize = 10_485_760;
/// Bytes in front of a payload in a batch.
pub const RECORD_HEADER: usize = 16;
/// Longest body of a batch before compression: one record of the longest kind always fits.
pub const MAX_BODY: usize = 12 << 20;
/// Longest message on the link.
pub const MAX_MESSAGE: usize = MAX_BODY + (64 << 10);
/// Between two pings of the sender.
pub const PING_MS: u64 = 10_000;

frames! {
    /// A message of the link, by kind. Kinds are only added; a number is never used again.
    DataFrame {
        1 => Hello: d::DataHello;
        2 => Welcome: d::DataWelcome;
        3 => Ping: s::Ping;
        4 => Pong: s::Pong;
        5 => Goodbye: s::Goodbye;
        6 => Unsupported: s::Unsupported;
        // Sender to server.
        16 => Batch: d::Batch;
        // Server to sender.
        24 => Ack: d::BatchAck;
    }
}

/// One record of a plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What it is routed by.
    pub data_id: u32,
    /// As the plugin wrote it.
    pub utctime: u32,
    /// Message type of the plugin's frame.
    pub kind: u16,
    /// Passed on unchanged.
    pub payload: Bytes,
}

/// Why the body of a batch is not a sequence of records.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It ends inside a record.
    #[error("a batch ends inside a record")]
    Short,
    /// Reserved bytes are set, or a length is beyond the bound.
    #[error("a record of {length} bytes with reserved field {reserved:#06x}, not this layout or beyond the bound")]
    Layout {
        /// Length as it stands there.
        length: u32,
        /// The two bytes that are zero.
        reserved: u16,
    },
}

/// Appends a record to the body of a batch.
pub fn put_record(out: &mut BytesMut, data_id: u32, utctime: u32, kind: u16, payload: &[u8]) {
    debug_assert!(payload.len() <= MAX_PAYLOAD);
    out.reserve(RECORD_HEADER + payload.len());
    out.put_u32(data_id);
    out.put_u32(utctime);
    out.put_u16(kind);
    out.put_u16(0);
    out.put_u32(payload.len() as u32);
    out.put_slice(payload);
}

/// Takes the next record off the front of a body without copying it; `None` at its end.
///
/// # Errors
/// See [`RecordError`]; nothing behind the fault can be trusted.
pub fn take_record(body: &mut Bytes) -> Result<Option<Record>, RecordError> {
    if body.is_empty() {
        return Ok(None);
    }
    if body.len() < RECORD_HEADER {
        return Err(RecordError::Short);
    }
    let mut head = &body[..RECORD_HEADER];
    let (data_id, utctime) = (head.get_u32(), head.get_u32());
    let (kind, reserved, length) = (head.get_u16(), head.get_u16(), head.get_u32());
    if reserved != 0 || length as usize > MAX_PAYLOAD {
        return Err(RecordError::Layout { length, reserved });
    }
    if body.len() - RECORD_HEADER < length as usize {
        return Err(RecordError::Short);
    }
    body.advance(RECORD_HEADER);
    Ok(Some(Record {
        data_id,
        utctime,
        kind,
        payload: body.split_to(length as usize),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_never_change() {
        let mut kinds = String::new();
        for (kind, name) in KINDS {
            kinds.push_str(&format!("{kind} {name}\n"));
        }
        assert_eq!(kinds, include_str!("../golden/data_kinds.v1.txt"));
    }

    #[test]
    fn records_come_out_as_they_went_in() {
        let mut body = BytesMut::new();
        put_record(&mut body, 1001, 7, 0xC01, b"\xff\x00one");
        put_record(&mut body, u32::MAX, 0, 9, b"");
        assert_eq!(
            body[..RECORD_HEADER],
            [0, 0, 3, 0xe9, 0, 0, 0, 7, 0x0c, 0x01, 0, 0, 0, 0, 0, 5]
        );
        let mut body = body.freeze();
        let first = take_record(&mut body).unwrap().unwrap();
        assert_eq!((first.data_id, first.utctime, first.kind), (1001, 7, 0xC01));
        assert_eq!(&first.payload[..], b"\xff\x00one");
        assert_eq!(take_record(&mut body).unwrap().unwrap().payload.len(), 0);
        assert_eq!(take_record(&mut body), Ok(None));
    }

    #[test]
    fn a_cut_or_foreign_body_is_refused() {
        let mut whole = BytesMut::new();
        put_record(&mut whole, 5, 0, 9, b"payload");
        for cut in 1..whole.len() {
            assert_eq!(
                take_record(&mut Bytes::copy_from_slice(&whole[..cut])),
                Err(RecordError::Short)
            );
        }
        let mut foreign = whole.clone();
        foreign[11] = 1;
        assert!(matches!(
            take_record(&mut foreign.freeze()),
            Err(RecordError::Layout { .. })
        ));
        whole[12] = 0xff;
        assert!(matches!(
            take_record(&mut whole.freeze()),
            Err(RecordError::Layout { .. })
        ));
    }
}
