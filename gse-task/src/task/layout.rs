//! Values of a task in the store and in the caches: the header, packed, and a bucket whose targets can be looked up.

use bytes::Bytes;
use gse_proto::state::{TargetBucket, TaskHeader};
use prost::Message;

/// The targets of a bucket as polls need them: the ids alone, in one text, so that a cached target costs some 10 bytes beside its id.
#[derive(Debug)]
pub struct IndexedBucket {
    /// Agent and container id of each target, one after the other.
    texts: Box<str>,
    /// Where in `texts` the two ids of each place end.
    ends: Box<[(u32, u32)]>,
    /// Places, sorted by what is there. Two bytes are enough: [`MAX_BUCKET_TARGETS`](gse_proto::keys::MAX_BUCKET_TARGETS).
    order: Box<[u16]>,
}

impl IndexedBucket {
    pub(super) fn new(bucket: &TargetBucket) -> Self {
        let bytes = bucket
            .targets
            .iter()
            .map(|t| t.agent_id.len() + t.container_id.len())
            .sum();
        let mut texts = String::with_capacity(bytes);
        let end = |texts: &String| u32::try_from(texts.len()).unwrap_or(u32::MAX);
        let ends = bucket
            .targets
            .iter()
            .map(|target| {
                texts.push_str(&target.agent_id);
                let agent = end(&texts);
                texts.push_str(&target.container_id);
                (agent, end(&texts))
            })
            .collect();
        let mut indexed = Self {
            texts: texts.into(),
            ends,
            order: Box::default(),
        };
        let mut order: Vec<u16> = (0..=u16::MAX).take(bucket.targets.len()).collect();
        order.sort_unstable_by_key(|n| indexed.at((*n).into()));
        indexed.order = order.into();
        indexed
    }

    /// Agent and container id at a place.
    fn at(&self, place: usize) -> Option<(&str, &str)> {
        let (agent, end) = *self.ends.get(place)?;
        let start = match place.checked_sub(1) {
            Some(before) => self.ends.get(before)?.1,
            None => 0,
        };
        let text = |from: u32, to: u32| self.texts.get(from as usize..to as usize);
        Some((text(start, agent)?, text(agent, end)?))
    }

    /// The id by which the target at a place was asked for.
    #[must_use]
    pub fn agent_id(&self, place: u32) -> Option<&str> {
        self.at(place as usize).map(|(agent, _)| agent)
    }

    /// How many targets there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Place of an endpoint; `container` is empty for the host.
    #[must_use]
    pub fn place(&self, agent: &str, container: &str) -> Option<u32> {
        let asked = Some((agent, container));
        let found = self.order.binary_search_by_key(&asked, |n| self.at((*n).into()));
        self.order.get(found.ok()?).copied().map(u32::from)
    }

    /// About what it takes in memory.
    pub(super) fn weight(&self) -> u32 {
        let places = self.ends.len() * size_of::<(u32, u32)>() + self.order.len() * size_of::<u16>();
        u32::try_from(size_of::<Self>() + ENTRY_BYTES + self.texts.len() + places).unwrap_or(u32::MAX)
    }
}

/// What an entry of the cache takes beside what is in it.
const ENTRY_BYTES: usize = 256;

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
        let bucket = IndexedBucket::new(&TargetBucket {
            targets: targets.clone(),
        });
        for (n, target) in (0..).zip(&targets) {
            assert_eq!(bucket.place(&target.agent_id, &target.container_id), Some(n));
            assert_eq!(bucket.agent_id(n), Some(target.agent_id.as_str()));
        }
        assert_eq!(bucket.agent_id(4), None);
        assert_eq!(
            (bucket.place("b", "x"), bucket.place("c", ""), bucket.place("", "")),
            (None, None, None)
        );
    }
}
