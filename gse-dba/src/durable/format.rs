//! The bytes of log and snapshot files. All numbers little endian.
//!
//! Header, 28 bytes: `gse-dba\0`, format u16, schema u16, kind u8, three zero bytes, generation u64, crc32c of all that.
//! Record: length of the payload u32, crc32c u32 over what follows it in the record, epoch u32 (one more at every start of the store), sequence u64 (from 0 in each file), payload.
//! Payload: effects, each a count of arguments u32 and the arguments, each a length u32 and its bytes.

use std::io::{self, Read};

/// How bytes are laid out.
pub(crate) const FORMAT: u16 = 1;
/// What the effects mean: commands and their arguments as this version writes them. A store of a later schema is refused; an earlier one is read.
pub(crate) const SCHEMA: u16 = 1;

pub(crate) const HEADER: usize = 28;
pub(crate) const RECORD: usize = 20;
/// Nothing longer is written; nothing longer is believed.
pub(crate) const MAX_PAYLOAD: u32 = 1 << 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Log = 1,
    Snapshot = 2,
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(b) = bytes.get(at..at + N) {
        out.copy_from_slice(b);
    }
    out
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(crate) fn header(kind: Kind, generation: u64) -> [u8; HEADER] {
    let mut h = [0; HEADER];
    h[..8].copy_from_slice(b"gse-dba\0");
    h[8..10].copy_from_slice(&FORMAT.to_le_bytes());
    h[10..12].copy_from_slice(&SCHEMA.to_le_bytes());
    h[12] = kind as u8;
    h[16..24].copy_from_slice(&generation.to_le_bytes());
    let crc = crc32c::crc32c(&h[..24]);
    h[24..].copy_from_slice(&crc.to_le_bytes());
    h
}

/// Why a file cannot be read as what its name says.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("its header is damaged")]
    Damaged,
    #[error(
        "it was written by a later version (format {0}, schema {1}; this version reads up to {FORMAT} and {SCHEMA}): start that version, or restore an older copy of the directory"
    )]
    Later(u16, u16),
}

pub(crate) fn check_header(h: &[u8], kind: Kind, generation: u64) -> Result<(), HeaderError> {
    if h.len() < HEADER || &h[..8] != b"gse-dba\0" || u32_at(h, 24) != crc32c::crc32c(&h[..24]) {
        return Err(HeaderError::Damaged);
    }
    let (format, schema) = (u16::from_le_bytes(array(h, 8)), u16::from_le_bytes(array(h, 10)));
    if format > FORMAT || schema > SCHEMA {
        return Err(HeaderError::Later(format, schema));
    }
    if h[12] != kind as u8 || u64::from_le_bytes(array(h, 16)) != generation {
        return Err(HeaderError::Damaged);
    }
    Ok(())
}

/// Appends a record to a buffer.
pub(crate) fn push_record(out: &mut Vec<u8>, epoch: u32, seq: u64, payload: &[u8]) {
    let start = out.len();
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&epoch.to_le_bytes());
    out.extend_from_slice(&seq.to_le_bytes());
    out.extend_from_slice(payload);
    let crc = crc32c::crc32c(&out[start + 8..]);
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

/// One record as it was read.
pub(crate) enum Read1 {
    Record {
        epoch: u32,
    },
    /// The file ends here, cleanly.
    End,
    /// What stands here is not the record that should.
    Bad,
}

/// Reads the record of this sequence number into `payload`. `left` is what the file still holds.
pub(crate) fn read_record(from: &mut impl Read, left: u64, seq: u64, payload: &mut Vec<u8>) -> io::Result<Read1> {
    if left == 0 {
        return Ok(Read1::End);
    }
    if left < RECORD as u64 {
        return Ok(Read1::Bad);
    }
    let mut head = [0; RECORD];
    from.read_exact(&mut head)?;
    let len = u32_at(&head, 0);
    if len > MAX_PAYLOAD || u64::from(len) > left - RECORD as u64 || u64::from_le_bytes(array(&head, 12)) != seq {
        return Ok(Read1::Bad);
    }
    payload.resize(len as usize, 0);
    from.read_exact(payload)?;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&head[8..]), payload);
    if crc != u32_at(&head, 4) {
        return Ok(Read1::Bad);
    }
    Ok(Read1::Record {
        epoch: u32_at(&head, 8),
    })
}

/// Whether any whole record later than `seq` stands somewhere in these bytes: then what is before it was damaged, not merely cut short.
pub(crate) fn holds_later_record(bytes: &[u8], seq: u64) -> bool {
    (0..bytes.len().saturating_sub(RECORD)).any(|i| {
        let found = u64::from_le_bytes(array(bytes, i + 12));
        let len = u32_at(bytes, i) as usize;
        // Records are at least their header long, so a later one cannot be of a much higher number than what fits.
        found > seq
            && found - seq <= bytes.len() as u64 / RECORD as u64 + 1
            && bytes
                .get(i + 8..i + RECORD + len)
                .is_some_and(|body| crc32c::crc32c(body) == u32_at(bytes, i + 4))
    })
}
