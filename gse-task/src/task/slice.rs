//! Output as it is stored (chunks) and as it is read (a slice of text from an offset).
//!
//! Offsets count bytes of the UTF-8 text that is returned. A slice never splits a character and never has a hole: what is missing
//! ends it, and the next poll goes on from there.

use bytes::{BufMut, Bytes, BytesMut};
use gse_proto::keys::output_score;

/// Longest chunk.
pub const MAX_CHUNK: usize = 64 * 1024;
/// Chunks shorter than this are stored as they are.
const COMPRESS_FROM: usize = 256;
const RAW: u8 = 0;
const ZSTD: u8 = 1;

/// A member of the output set: its score, the length of the text, and the text, compressed when that is shorter.
/// The score is part of it because two chunks with the same text must be two members.
#[must_use]
pub fn encode_chunk(index: u32, atomic: u32, offset: u64, text: &[u8]) -> Bytes {
    let packed = (text.len() >= COMPRESS_FROM)
        .then(|| zstd::bulk::compress(text, 1).ok())
        .flatten()
        .filter(|packed| packed.len() < text.len());
    let (tag, data) = match &packed {
        Some(packed) => (ZSTD, &packed[..]),
        None => (RAW, text),
    };
    let mut out = BytesMut::with_capacity(13 + data.len());
    out.put_u64(output_score(index, atomic, offset));
    out.put_u32(text.len() as u32);
    out.put_u8(tag);
    out.put_slice(data);
    out.freeze()
}

/// A chunk read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Offset of its first byte in the output.
    pub offset: u64,
    /// Its text.
    pub text: Bytes,
}

/// Reads a member of the output set; `None` when it is damaged.
#[must_use]
pub fn decode_chunk(member: &Bytes) -> Option<Chunk> {
    let score = u64::from_be_bytes(member.get(..8)?.try_into().ok()?);
    let len = u32::from_be_bytes(member.get(8..12)?.try_into().ok()?) as usize;
    let offset = score & 0xff_ffff;
    let data = member.get(13..)?;
    // A chunk is never longer than it was let in: a damaged length must not make us allocate.
    if len > MAX_CHUNK {
        return None;
    }
    let text = match *member.get(12)? {
        RAW => member.slice(13..),
        ZSTD => zstd::bulk::decompress(data, len).ok()?.into(),
        _ => return None,
    };
    (text.len() == len).then_some(Chunk { offset, text })
}

/// Chunks without what lies at or behind `end`: output that came after its row was closed is of no use to anybody.
#[must_use]
pub fn before(chunks: Vec<Chunk>, end: u64) -> Vec<Chunk> {
    chunks
        .into_iter()
        .filter(|chunk| chunk.offset < end)
        .map(|mut chunk| {
            let len = usize::try_from(end - chunk.offset).unwrap_or(usize::MAX);
            chunk.text.truncate(len);
            chunk
        })
        .collect()
}

/// The text from `offset`, at most `limit` bytes (0: no limit; less than a character is taken as one), out of `chunks`, which may
/// overlap and be in any order; and the offset behind it. A caller's offset inside a character moves to the next one.
#[must_use]
pub fn assemble(mut chunks: Vec<Chunk>, offset: u64, limit: usize) -> (String, u64) {
    chunks.sort_by_key(|chunk| (chunk.offset, std::cmp::Reverse(chunk.text.len())));
    let most = if limit == 0 { usize::MAX } else { limit.max(4) };
    // The rest of a character that the offset falls into does not count.
    let read_most = most.saturating_add(3);
    let mut out: Vec<u8> = Vec::new();
    let mut at = offset;
    for chunk in chunks {
        let end = chunk.offset + chunk.text.len() as u64;
        if end <= at {
            continue;
        }
        if chunk.offset > at || out.len() >= read_most {
            break;
        }
        let fresh = &chunk.text[(at - chunk.offset) as usize..];
        let fresh = &fresh[..fresh.len().min(read_most - out.len())];
        out.extend_from_slice(fresh);
        at += fresh.len() as u64;
    }
    let start = out.iter().take_while(|byte| **byte & 0xc0 == 0x80).count().min(3);
    out.truncate(start.saturating_add(most));
    let end = match std::str::from_utf8(&out[start..]) {
        Ok(_) => out.len(),
        Err(error) => start + error.valid_up_to(),
    };
    let text = String::from_utf8_lossy(&out[start..end]).into_owned();
    (text, offset + end as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunks(text: &str, cuts: &[usize]) -> Vec<Chunk> {
        let mut bounds: Vec<usize> = cuts.iter().map(|cut| text.floor_char_boundary(*cut)).collect();
        bounds.extend([0, text.len()]);
        bounds.sort_unstable();
        bounds.dedup();
        bounds
            .windows(2)
            .map(|w| Chunk {
                offset: w[0] as u64,
                text: Bytes::copy_from_slice(&text.as_bytes()[w[0]..w[1]]),
            })
            .collect()
    }

    #[test]
    fn chunks_survive_storage() {
        for text in ["", "short", &"long line of output\n".repeat(500)] {
            let member = encode_chunk(3, 1, 77, text.as_bytes());
            assert_eq!(
                decode_chunk(&member),
                Some(Chunk {
                    offset: 77,
                    text: Bytes::copy_from_slice(text.as_bytes())
                })
            );
        }
        assert!(encode_chunk(0, 0, 0, &[b'a'; 60_000]).len() < 1_000);
        for bad in [&b""[..], b"12345678", b"\0\0\0\0\0\0\0\0\xff\xff\xff\xff\x01xx"] {
            assert_eq!(decode_chunk(&Bytes::copy_from_slice(bad)), None);
        }
    }

    #[test]
    fn nothing_behind_the_end_of_a_closed_row_is_read() {
        let pieces = chunks("abcdefghij", &[3, 6]);
        for (end, expect) in [
            (0, ""),
            (3, "abc"),
            (5, "abcde"),
            (10, "abcdefghij"),
            (99, "abcdefghij"),
        ] {
            assert_eq!(assemble(before(pieces.clone(), end), 0, 0).0, expect);
        }
    }

    #[test]
    fn past_the_end_is_empty_and_a_hole_ends_the_slice() {
        // contract: v2-http-task#20
        let mut pieces = chunks("abcdefghij", &[3, 6]);
        assert_eq!(assemble(pieces.clone(), 10, 0), (String::new(), 10));
        assert_eq!(assemble(pieces.clone(), 99, 0), (String::new(), 99));
        pieces.remove(1);
        assert_eq!(assemble(pieces, 1, 0), ("bc".into(), 3));
    }

    #[test]
    fn a_limit_below_a_character_still_moves_on() {
        assert_eq!(assemble(chunks("€€", &[]), 0, 1), ("€".into(), 3));
        assert_eq!(assemble(chunks("€€", &[]), 1, 0), ("€".into(), 6));
        assert_eq!(assemble(chunks("€😀x", &[]), 1, 1), ("😀".into(), 7));
    }

    proptest! {
        /// Reading slice by slice gives the text, whatever the chunks, repeats and limits are.
        // contract: v2-http-task#20, v2-http-task#21
        #[test]
        fn slices_join_to_the_text(text in "[a-zé€😀\n]{0,200}", cuts in proptest::collection::vec(0usize..800, 0..8),
                                   limit in 4usize..50, repeat in any::<bool>()) {
            let mut pieces = chunks(&text, &cuts);
            if repeat {
                pieces.extend(chunks(&text, &[]));
            }
            pieces.reverse();
            let mut read = String::new();
            loop {
                let (slice, end) = assemble(pieces.clone(), read.len() as u64, limit);
                prop_assert_eq!(end, (read.len() + slice.len()) as u64);
                prop_assert!(slice.len() <= limit);
                if slice.is_empty() {
                    break;
                }
                read.push_str(&slice);
            }
            prop_assert_eq!(&read, &text);
            prop_assert_eq!(assemble(pieces, 0, 0).0, text);
        }
    }
}
