//! How entries stand in a segment.
//!
//! ```text
//! segment:  magic 8 | first index 8 | zero 4 | crc 4          then entries
//! entry:    length 4 | records 4 | index 8 | flags 4 | crc of the body 4 | crc of this header 4 | body
//! ```
//! All numbers big-endian, all checksums CRC32C. A header has a checksum of its own, so that a length is believed, or not, before it is
//! used. The only flag says that the body is damaged and was counted as such.

use super::Put;

/// Bytes in front of the entries.
pub(super) const SEGMENT_HEADER: usize = 24;
/// Bytes in front of a body.
pub(super) const ENTRY_HEADER: usize = 28;

const MAGIC: &[u8; 8] = b"GSESPOL1";
const SUFFIX: &str = ".spool";
const DAMAGED: u32 = 1;

/// Name of the segment that begins with this index.
pub(super) fn name(first: u64) -> String {
    format!("{first:020}{SUFFIX}")
}

/// The first index that a name speaks of, if it is that of a segment.
pub(super) fn first_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(SUFFIX)?;
    (digits.len() == 20).then(|| digits.parse().ok()).flatten()
}

pub(super) fn segment_header(first: u64) -> [u8; SEGMENT_HEADER] {
    let mut header = [0; SEGMENT_HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..16].copy_from_slice(&first.to_be_bytes());
    let crc = crc32c::crc32c(&header[..20]);
    header[20..].copy_from_slice(&crc.to_be_bytes());
    header
}

/// Whether these bytes begin the segment `first`.
pub(super) fn is_segment_header(bytes: &[u8], first: u64) -> bool {
    bytes == segment_header(first)
}

/// Header of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EntryHeader {
    pub(super) len: u32,
    pub(super) records: u32,
    pub(super) index: u64,
    flags: u32,
    body_crc: u32,
}

impl EntryHeader {
    pub(super) fn of(put: &Put<'_>) -> Self {
        Self {
            len: u32::try_from(put.body.len()).unwrap_or(u32::MAX),
            records: put.records,
            index: put.index,
            flags: 0,
            body_crc: crc32c::crc32c(put.body),
        }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let begin = out.len();
        for number in [self.len, self.records] {
            out.extend_from_slice(&number.to_be_bytes());
        }
        out.extend_from_slice(&self.index.to_be_bytes());
        for number in [self.flags, self.body_crc] {
            out.extend_from_slice(&number.to_be_bytes());
        }
        let crc = crc32c::crc32c(&out[begin..]);
        out.extend_from_slice(&crc.to_be_bytes());
    }

    /// The header at the beginning of `bytes`, if that is one.
    pub(super) fn decode(bytes: &[u8], longest: usize) -> Option<Self> {
        let bytes = bytes.get(..ENTRY_HEADER)?;
        let number = |at: usize| Some(u32::from_be_bytes(bytes[at..at + 4].try_into().ok()?));
        let header = Self {
            len: number(0)?,
            records: number(4)?,
            index: u64::from_be_bytes(bytes[8..16].try_into().ok()?),
            flags: number(16)?,
            body_crc: number(20)?,
        };
        let good = number(24)? == crc32c::crc32c(&bytes[..24]) && header.len as usize <= longest && header.index > 0;
        good.then_some(header)
    }

    /// Bytes of the whole entry.
    pub(super) fn bytes(&self) -> u64 {
        ENTRY_HEADER as u64 + u64::from(self.len)
    }

    pub(super) fn is_whole(&self, body: &[u8]) -> bool {
        crc32c::crc32c(body) == self.body_crc
    }

    /// Whether the entry was found damaged before.
    pub(super) fn is_damaged(&self) -> bool {
        self.flags & DAMAGED != 0
    }

    /// The header that says so from now on.
    pub(super) fn damaged(mut self) -> Self {
        self.flags |= DAMAGED;
        self
    }
}
