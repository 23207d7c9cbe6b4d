//! How rows of a task are numbered, their keys and the ids of their operations, and how a header is stored.

use bytes::Bytes;
use gse_proto::proc::{Label, OP_ID};
use gse_proto::procstore::{ProcGroup, ProcHeader};
use prost::Message;
use sha2::{Digest, Sha256};

/// First byte of a stored header.
const RAW: u8 = 0;
const ZSTD: u8 = 1;
/// Shorter headers are not compressed.
const SMALL: usize = 2_048;
/// Longest header that is read back.
const MAX_HEADER: usize = 256 << 20;

/// Numbers of rows: those of the first group, then those of the second, and so on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// First row of each group, and behind them the number of all rows.
    starts: Vec<u32>,
}

/// What a row is about.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// Its group.
    pub group: &'a ProcGroup,
    /// The host, as the caller wrote it.
    pub id: &'a str,
}

impl Layout {
    /// That of a header.
    #[must_use]
    pub fn new(header: &ProcHeader) -> Self {
        let mut starts = Vec::with_capacity(header.groups.len() + 1);
        let mut next = 0_u32;
        for group in &header.groups {
            starts.push(next);
            next = next.saturating_add(u32::try_from(group.ids.len()).unwrap_or(u32::MAX));
        }
        starts.push(next);
        Self { starts }
    }

    /// How many rows there are.
    #[must_use]
    pub fn rows(&self) -> u32 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// What a row is about.
    #[must_use]
    pub fn subject<'a>(&self, header: &'a ProcHeader, row: u32) -> Option<Subject<'a>> {
        let at = self.starts.partition_point(|start| *start <= row).checked_sub(1)?;
        let group = header.groups.get(at)?;
        let id = group.ids.get((row - self.starts[at]) as usize)?;
        Some(Subject { group, id })
    }

    /// All rows in order.
    pub fn subjects<'a>(&self, header: &'a ProcHeader) -> impl Iterator<Item = (u32, Subject<'a>)> {
        let all = header
            .groups
            .iter()
            .flat_map(|group| group.ids.iter().map(move |id| Subject { group, id }));
        (0..).zip(all)
    }
}

impl Subject<'_> {
    /// Key of its row: what the caller wrote, byte for byte (contract procmgr-agent-lifecycle#3).
    #[must_use]
    pub fn key(&self) -> String {
        format!("{}:{}:{}", self.id, self.group.namespace, self.group.name)
    }

    /// The same with five parts, for hosts that are named `cloud:ip` (contract procmgr-agent-lifecycle#55).
    #[must_use]
    pub fn old_key(&self) -> String {
        match gse_proto::ids::split_cloud_ip(self.id) {
            Some((cloud, ip)) => format!("{cloud}:0:{ip}:{}:{}", self.group.namespace, self.group.name),
            None => self.key(),
        }
    }
}

/// Labels of a group.
#[must_use]
pub fn labels(group: &ProcGroup) -> Vec<Label> {
    let pairs = group.labels.chunks_exact(2);
    pairs
        .map(|pair| Label {
            key: pair[0].clone(),
            value: pair[1].clone(),
        })
        .collect()
}

/// Id of the operation of a row: the same whoever carries the task on.
#[must_use]
pub fn op_id(header: &ProcHeader, row: u32) -> Bytes {
    let mut sum = Sha256::new();
    sum.update(&header.seed);
    sum.update(row.to_be_bytes());
    Bytes::copy_from_slice(&sum.finalize()[..OP_ID])
}

/// A header as it is stored.
#[must_use]
pub fn pack(header: &ProcHeader) -> Vec<u8> {
    let plain = header.encode_to_vec();
    let plain_len = u32::try_from(plain.len()).unwrap_or(u32::MAX);
    let packed = if plain.len() < SMALL {
        None
    } else {
        zstd::bulk::compress(&plain, 1).ok()
    };
    let (kind, body) = packed.map_or((RAW, plain), |packed| (ZSTD, packed));
    let mut out = Vec::with_capacity(body.len() + 5);
    out.push(kind);
    out.extend_from_slice(&plain_len.to_be_bytes());
    out.extend_from_slice(&body);
    out
}

/// Reads a stored header; `None` when it is damaged.
#[must_use]
pub fn unpack(bytes: Bytes) -> Option<ProcHeader> {
    let len = u32::from_be_bytes(bytes.get(1..5)?.try_into().ok()?) as usize;
    match *bytes.first()? {
        RAW => ProcHeader::decode(bytes.slice(5..)).ok(),
        // A damaged length must not make us allocate.
        ZSTD if len <= MAX_HEADER => {
            let plain = zstd::bulk::decompress(&bytes[5..], len).ok()?;
            ProcHeader::decode(Bytes::from(plain)).ok()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> ProcHeader {
        let group = |name: &str, ids: &[&str]| ProcGroup {
            namespace: "n".into(),
            name: name.into(),
            ids: ids.iter().map(|id| (*id).to_owned()).collect(),
            ..ProcGroup::default()
        };
        ProcHeader {
            task_id: "T".into(),
            seed: Bytes::from_static(b"0123456789abcdef"),
            groups: vec![group("a", &["x", "0:10.0.0.1"]), group("b", &[]), group("c", &["x"])],
            ..ProcHeader::default()
        }
    }

    #[test]
    fn every_row_has_its_key() {
        // contract: procmgr-agent-lifecycle#3, procmgr-agent-lifecycle#55
        let header = header();
        let layout = Layout::new(&header);
        assert_eq!(layout.rows(), 3);
        let keys: Vec<String> = (0..4)
            .filter_map(|row| Some(layout.subject(&header, row)?.key()))
            .collect();
        assert_eq!(keys, ["x:n:a", "0:10.0.0.1:n:a", "x:n:c"]);
        let walked: Vec<String> = layout.subjects(&header).map(|(_, subject)| subject.key()).collect();
        assert_eq!(walked, keys);
        let old: Vec<String> = layout.subjects(&header).map(|(_, subject)| subject.old_key()).collect();
        assert_eq!(old, ["x:n:a", "0:0:10.0.0.1:n:a", "x:n:c"]);
    }

    #[test]
    fn headers_read_back_and_ids_stay() {
        let mut header = header();
        header.groups[0].ids = (0..5_000)
            .map(|n| format!("0200000000000000000000000000{n:08}"))
            .collect();
        let packed = Bytes::from(pack(&header));
        assert!(packed.len() < 60_000);
        assert_eq!(unpack(packed), Some(header.clone()));
        for damaged in [
            &b""[..],
            b"\x07\0\0\0\x03abc",
            b"\x01\xff\xff\xff\xffabc",
            b"\0\0\0\0\x02\xff\xff",
        ] {
            assert_eq!(unpack(Bytes::copy_from_slice(damaged)), None);
        }
        assert_eq!(op_id(&header, 7), op_id(&header, 7));
        assert_ne!(op_id(&header, 7), op_id(&header, 8));
        assert_eq!(op_id(&header, 7).len(), OP_ID);
    }
}
