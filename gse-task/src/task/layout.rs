//! Values of a task in the store and in the caches: the header, packed, and a bucket whose targets can be looked up.

use std::sync::Arc;

use bytes::Bytes;
use gse_proto::state::{TargetBucket, TaskHeader};
use prost::Message;

/// A bucket with an order in which its targets can be looked up.
#[derive(Debug)]
pub struct IndexedBucket {
    /// The targets.
    pub bucket: Arc<TargetBucket>,
    /// Places, sorted by what is there: four bytes a target instead of a map with copies of the ids.
    order: Vec<u32>,
}

impl IndexedBucket {
    pub(super) fn new(bucket: TargetBucket) -> Self {
        let mut order: Vec<u32> = (0..).take(bucket.targets.len()).collect();
        order.sort_unstable_by_key(|n| {
            let target = bucket.targets.get(*n as usize);
            target.map(|target| (target.agent_id.as_str(), target.container_id.as_str()))
        });
        Self {
            bucket: Arc::new(bucket),
            order,
        }
    }

    /// Place of an endpoint; `container` is empty for the host.
    #[must_use]
    pub fn place(&self, agent: &str, container: &str) -> Option<u32> {
        let found = self.order.binary_search_by_key(&Some((agent, container)), |n| {
            let target = self.bucket.targets.get(*n as usize);
            target.map(|target| (target.agent_id.as_str(), target.container_id.as_str()))
        });
        self.order.get(found.ok()?).copied()
    }

    /// About what it takes in memory.
    pub(super) fn weight(&self) -> u32 {
        let bytes = self.bucket.encoded_len() + TARGET_BYTES * self.order.len();
        u32::try_from(bytes).unwrap_or(u32::MAX)
    }
}

/// What a target takes in memory beside its texts.
const TARGET_BYTES: usize = 200;

/// Longest header once unpacked: what a submit may carry, and more.
const MAX_HEADER: usize = 128 << 20;
const RAW: u8 = 0;
const ZSTD: u8 = 1;

/// A header as it is stored: a tag, the length of the message, and the message, compressed when that is shorter (scripts are text).
pub(super) fn pack_header(header: &TaskHeader) -> Vec<u8> {
    let plain = header.encode_to_vec();
    let plain_len = plain.len();
    let (tag, body) = match zstd::bulk::compress(&plain, 1) {
        Ok(packed) if packed.len() < plain.len() => (ZSTD, packed),
        _ => (RAW, plain),
    };
    let mut out = Vec::with_capacity(body.len() + 5);
    out.push(tag);
    out.extend_from_slice(&u32::try_from(plain_len).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(&body);
    out
}

/// Reads a stored header; `None` when it is damaged.
pub(super) fn unpack_header(bytes: Bytes) -> Option<TaskHeader> {
    let len = u32::from_be_bytes(bytes.get(1..5)?.try_into().ok()?) as usize;
    match *bytes.first()? {
        RAW => TaskHeader::decode(bytes.slice(5..)).ok(),
        // A damaged length must not make us allocate.
        ZSTD if len <= MAX_HEADER => {
            let plain = zstd::bulk::decompress(&bytes[5..], len).ok()?;
            TaskHeader::decode(Bytes::from(plain)).ok()
        }
        _ => None,
    }
}

/// What polls and sweeps need of a header; the scripts of a running task are in its dispatch and nowhere else in memory. Commands go
/// with them: their arguments may hold secrets, and results need none of it.
#[must_use]
pub fn without_scripts(mut header: TaskHeader) -> TaskHeader {
    for script in &mut header.scripts {
        script.content = Bytes::new();
    }
    for atomic in &mut header.atomics {
        atomic.command = String::new();
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_read_back() {
        for content in [
            Bytes::from_static(b"echo hi"),
            Bytes::from("line of a script\n".repeat(10_000)),
        ] {
            let header = TaskHeader {
                task_id: "T".into(),
                scripts: vec![gse_proto::state::StoredScript {
                    name: "a.sh".into(),
                    content,
                    ..Default::default()
                }],
                atomics: vec![gse_proto::state::StoredAtomic {
                    command: "/tmp/a.sh secret".into(),
                    ..Default::default()
                }],
                ..Default::default()
            };
            let packed = Bytes::from(pack_header(&header));
            assert!(packed.len() < 2_000);
            assert!(unpack_header(packed).is_some_and(|read| read == header));
            let kept = without_scripts(header);
            assert_eq!(
                (kept.scripts[0].name.as_str(), kept.scripts[0].content.len()),
                ("a.sh", 0)
            );
            assert!(kept.atomics[0].command.is_empty());
        }
        for damaged in [
            &b""[..],
            b"\x07\0\0\0\x03abc",
            b"\x01\0\0\0\x03abc",
            b"\x01\xff\xff\xff\xffabc",
            b"\0\0\0\0\x02\xff\xff",
        ] {
            assert_eq!(unpack_header(Bytes::copy_from_slice(damaged)), None);
        }
    }

    #[test]
    fn targets_are_found() {
        let target = |agent: &str, container: &str| gse_proto::state::StoredTarget {
            agent_id: agent.into(),
            container_id: container.into(),
            ..Default::default()
        };
        let targets = vec![
            target("b", ""),
            target("a", "x"),
            target("a", ""),
            target("0:10.0.0.1", ""),
        ];
        let bucket = IndexedBucket::new(TargetBucket {
            targets: targets.clone(),
        });
        for (n, target) in (0..).zip(&targets) {
            assert_eq!(bucket.place(&target.agent_id, &target.container_id), Some(n));
        }
        assert_eq!(
            (bucket.place("b", "x"), bucket.place("c", ""), bucket.place("", "")),
            (None, None, None)
        );
    }
}
