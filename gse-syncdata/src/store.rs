//! Hosts, contents, the source's place and the inbox in the state store.

use bytes::{BufMut, Bytes, BytesMut};
use gse_core::random::HashMap;
use gse_core::store::{Batch, Store, StoreError, as_array, as_bytes, as_int, as_pairs, command};
use gse_proto::ids::AgentId;
use gse_proto::keys;
use gse_proto::sync::{HostState, InboxItem};
use prost::Message;

use crate::ledger::Gone;

const RAW: u8 = 0;
const ZSTD: u8 = 1;
/// Smaller contents are not worth being compressed.
const COMPRESS_FROM: usize = 256;
/// Longest content once unpacked, whatever its header says.
const MAX_CONTENT: usize = 8 << 20;
/// Items of the inbox in one command.
const POSTED: usize = 32;
/// Hosts read in one step of a scan.
const SCAN: usize = 500;

/// The place of everything.
#[derive(Debug, Clone)]
pub struct SyncStore {
    store: Store,
}

/// Where the source is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourcePlace {
    /// Which source it was; a cursor of another one is of no use.
    pub scope: String,
    /// As the source gave it; empty: none.
    pub cursor: String,
    /// When the last full pass ended, unix ms; 0: there was none.
    pub full_ms: u64,
}

/// A change of one host.
#[derive(Debug)]
pub struct Change {
    /// The host.
    pub key: String,
    /// What there is to say about it.
    pub state: HostState,
    /// Its content, if that is new.
    pub content: Option<Bytes>,
}

impl SyncStore {
    /// In this store.
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// The store itself.
    #[must_use]
    pub fn raw(&self) -> &Store {
        &self.store
    }

    /// All hosts, handed to `take`.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn hosts(&self, mut take: impl FnMut(String, HostState)) -> Result<(), StoreError> {
        for shard in 0..keys::AGENT_SHARDS {
            let key = keys::sync_hosts(shard);
            let mut cursor = Bytes::from_static(b"0");
            loop {
                let mut scan = command("HSCAN", &key);
                scan.arg(&cursor[..]).arg("COUNT").arg(SCAN);
                let mut batch = Batch::new();
                batch.push(&key, scan);
                let reply = self.store.run(batch).await?.into_iter().next();
                let mut parts = reply.map_or(Ok(vec![]), as_array)?.into_iter();
                cursor = parts.next().map_or(Ok(None), as_bytes)?.unwrap_or_default();
                for (name, value) in parts.next().map_or(Ok(vec![]), as_pairs)? {
                    match (String::from_utf8(name.to_vec()), HostState::decode(value)) {
                        (Ok(name), Ok(state)) => take(name, state),
                        (name, _) => tracing::warn!(?name, "a stored host can't be read; the next full pass finds it"),
                    }
                }
                if cursor.is_empty() || &cursor[..] == b"0" {
                    break;
                }
            }
        }
        Ok(())
    }

    /// One host with its content.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn host(&self, key: &str) -> Result<Option<(HostState, Option<Bytes>)>, StoreError> {
        let shard = keys::agent_shard(key);
        let mut batch = Batch::new();
        for hash in [keys::sync_hosts(shard), keys::sync_content(shard)] {
            let mut get = command("HGET", &hash);
            get.arg(key);
            batch.push(&hash, get);
        }
        let mut replies = self.store.run(batch).await?.into_iter();
        let state = replies.next().map_or(Ok(None), as_bytes)?;
        let content = replies.next().map_or(Ok(None), as_bytes)?;
        let state = state.and_then(|bytes| HostState::decode(bytes).ok());
        Ok(state.map(|state| (state, content.and_then(unpack))))
    }

    /// Keys of hosts whose agent has one of these names beside others.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn keys_of(&self, names: &[AgentId]) -> Result<Vec<AgentId>, StoreError> {
        let mut batch = Batch::new();
        for name in names {
            let hash = keys::sync_names(keys::agent_shard(name.as_str()));
            let mut get = command("HGET", &hash);
            get.arg(name.as_str());
            batch.push(&hash, get);
        }
        let mut found = Vec::new();
        for reply in self.store.run(batch).await? {
            let key = as_bytes(reply)?.and_then(|bytes| AgentId::parse(std::str::from_utf8(&bytes).ok()?).ok());
            found.extend(key);
        }
        Ok(found)
    }

    /// Contents of hosts, in the order of `keys`.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn contents(&self, keys: &[&str]) -> Result<Vec<Option<Bytes>>, StoreError> {
        let mut shards: HashMap<u16, Vec<usize>> = HashMap::default();
        for (n, key) in keys.iter().enumerate() {
            shards.entry(keys::agent_shard(key)).or_default().push(n);
        }
        let shards: Vec<(u16, Vec<usize>)> = shards.into_iter().collect();
        let mut batch = Batch::new();
        for (shard, members) in &shards {
            let hash = keys::sync_content(*shard);
            let mut get = command("HMGET", &hash);
            for n in members {
                get.arg(keys[*n]);
            }
            batch.push(&hash, get);
        }
        let mut contents = vec![None; keys.len()];
        for ((_, members), reply) in shards.iter().zip(self.store.run(batch).await?) {
            for (n, value) in members.iter().zip(as_array(reply)?) {
                contents[*n] = as_bytes(value)?.and_then(unpack);
            }
        }
        Ok(contents)
    }

    /// Writes hosts, their contents first: a state never speaks of a content that is not there.
    ///
    /// # Errors
    /// When the store has not confirmed it; some of it may be written, and may be written again.
    pub async fn write(&self, changes: &[Change]) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        let shard_of = |change: &Change| keys::agent_shard(&change.key);
        for change in changes {
            if let Some(content) = &change.content {
                let hash = keys::sync_content(shard_of(change));
                let mut set = command("HSET", &hash);
                set.arg(&change.key).arg(&pack(content)[..]);
                batch.push(&hash, set);
                for name in change.state.agents.iter().skip(1) {
                    let hash = keys::sync_names(keys::agent_shard(name));
                    let mut set = command("HSET", &hash);
                    set.arg(name).arg(&change.key);
                    batch.push(&hash, set);
                }
            }
        }
        for change in changes {
            let hash = keys::sync_hosts(shard_of(change));
            let mut set = command("HSET", &hash);
            set.arg(&change.key).arg(change.state.encode_to_vec());
            batch.push(&hash, set);
        }
        self.store.run(batch).await.map(|_| ())
    }

    /// Removes hosts.
    ///
    /// # Errors
    /// As [`SyncStore::write`].
    pub async fn remove(&self, gone: &[Gone]) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        let mut del = |hash: String, field: &str| {
            let mut del = command("HDEL", &hash);
            del.arg(field);
            batch.push(&hash, del);
        };
        for host in gone {
            let shard = keys::agent_shard(&host.key);
            del(keys::sync_hosts(shard), &host.key);
            del(keys::sync_content(shard), &host.key);
            for name in &host.others {
                del(keys::sync_names(keys::agent_shard(name)), name);
            }
        }
        self.store.run(batch).await.map(|_| ())
    }

    /// Where the source is.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn place(&self) -> Result<SourcePlace, StoreError> {
        let mut batch = Batch::new();
        let mut get = command("HMGET", keys::SYNC_SOURCE);
        get.arg("scope").arg("cursor").arg("full_ms");
        batch.push(keys::SYNC_SOURCE, get);
        let reply = self.store.run(batch).await?.into_iter().next();
        let mut texts = Vec::new();
        for value in reply.map_or(Ok(vec![]), as_array)? {
            let bytes = as_bytes(value)?.unwrap_or_default();
            texts.push(String::from_utf8_lossy(&bytes).into_owned());
        }
        let mut texts = texts.into_iter();
        Ok(SourcePlace {
            scope: texts.next().unwrap_or_default(),
            cursor: texts.next().unwrap_or_default(),
            full_ms: texts.next().and_then(|text| text.parse().ok()).unwrap_or_default(),
        })
    }

    /// Notes where the source is: the cursor.
    ///
    /// # Errors
    /// When the store has not confirmed it.
    pub async fn set_cursor(&self, scope: &str, cursor: &str) -> Result<(), StoreError> {
        self.set(&[("scope", scope), ("cursor", cursor)]).await
    }

    /// Notes that a full pass has ended.
    ///
    /// # Errors
    /// When the store has not confirmed it.
    pub async fn set_full(&self, scope: &str, full_ms: u64) -> Result<(), StoreError> {
        self.set(&[("scope", scope), ("full_ms", &full_ms.to_string())]).await
    }

    async fn set(&self, fields: &[(&str, &str)]) -> Result<(), StoreError> {
        let mut set = command("HSET", keys::SYNC_SOURCE);
        for (name, value) in fields {
            set.arg(*name).arg(*value);
        }
        let mut batch = Batch::new();
        batch.push(keys::SYNC_SOURCE, set);
        self.store.run(batch).await.map(|_| ())
    }

    /// How many items are in the inbox.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn waiting(&self) -> Result<usize, StoreError> {
        let mut batch = Batch::new();
        batch.push(keys::SYNC_INBOX, command("LLEN", keys::SYNC_INBOX));
        let reply = self.store.run(batch).await?.into_iter().next();
        let count = reply.map_or(Ok(0), as_int)?;
        Ok(usize::try_from(count).unwrap_or_default())
    }

    /// Puts items into the inbox.
    ///
    /// # Errors
    /// When the store has not confirmed it; they may be there.
    pub async fn post(&self, items: &[InboxItem]) -> Result<(), StoreError> {
        // In order, and in commands that do not hold up others.
        let mut batch = Batch::new();
        for some in items.chunks(POSTED) {
            let mut push = command("RPUSH", keys::SYNC_INBOX);
            for item in some {
                push.arg(item.encode_to_vec());
            }
            batch.push(keys::SYNC_INBOX, push);
        }
        self.store.run(batch).await.map(|_| ())
    }

    /// The oldest items of the inbox, and how many there are of them; those that can't be read are left out.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn oldest(&self, most: usize) -> Result<(Vec<InboxItem>, usize), StoreError> {
        let mut range = command("LRANGE", keys::SYNC_INBOX);
        range.arg(0).arg(most.saturating_sub(1));
        let mut batch = Batch::new();
        batch.push(keys::SYNC_INBOX, range);
        let reply = self.store.run(batch).await?.into_iter().next();
        let values = reply.map_or(Ok(vec![]), as_array)?;
        let count = values.len();
        let mut items = Vec::with_capacity(count);
        for value in values {
            match InboxItem::decode(as_bytes(value)?.unwrap_or_default()) {
                Ok(item) => items.push(item),
                Err(error) => tracing::warn!(%error, "an item of the inbox can't be read; it is dropped"),
            }
        }
        Ok((items, count))
    }

    /// Removes the oldest items.
    ///
    /// # Errors
    /// When the store has not confirmed it; then they come again.
    pub async fn taken(&self, count: usize) -> Result<(), StoreError> {
        let mut trim = command("LTRIM", keys::SYNC_INBOX);
        trim.arg(count).arg(-1);
        let mut batch = Batch::new();
        batch.push(keys::SYNC_INBOX, trim);
        self.store.run(batch).await.map(|_| ())
    }
}

/// A content as it is stored: a tag, its length, itself, compressed when that is shorter.
fn pack(content: &Bytes) -> Bytes {
    let packed = match content.len() {
        0..COMPRESS_FROM => None,
        _ => zstd::bulk::compress(content, 1).ok(),
    };
    let (tag, body) = match &packed {
        Some(packed) if packed.len() < content.len() => (ZSTD, &packed[..]),
        _ => (RAW, &content[..]),
    };
    let mut out = BytesMut::with_capacity(body.len() + 5);
    out.put_u8(tag);
    out.put_u32(u32::try_from(content.len()).unwrap_or(u32::MAX));
    out.extend_from_slice(body);
    out.freeze()
}

/// A stored content; `None` when it is damaged.
fn unpack(bytes: Bytes) -> Option<Bytes> {
    let len = u32::from_be_bytes(bytes.get(1..5)?.try_into().ok()?) as usize;
    match *bytes.first()? {
        RAW if bytes.len() == len + 5 => Some(bytes.slice(5..)),
        // A damaged length must not make us allocate.
        ZSTD if len <= MAX_CONTENT => zstd::bulk::decompress(&bytes[5..], len)
            .ok()
            .filter(|plain| plain.len() == len)
            .map(Bytes::from),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_read_back() {
        for content in [
            Bytes::new(),
            Bytes::from_static(b"{}"),
            Bytes::from(r#"{"bk_host_id":1,"process":[]}"#.repeat(200)),
            Bytes::from_static(&[0xff, 0, 0xfe]),
        ] {
            assert_eq!(unpack(pack(&content)), Some(content));
        }
        let long = Bytes::from("x".repeat(10_000));
        assert!(pack(&long).len() < 200);
        for damaged in [&b""[..], b"\0\0\0\0\x02x", b"\x01\xff\xff\xff\xffx", b"\x07\0\0\0\0"] {
            assert_eq!(unpack(Bytes::copy_from_slice(damaged)), None);
        }
    }
}
