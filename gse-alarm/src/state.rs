//! What is read from the store, and what is kept in it. Keys are in `proto/src/keys.rs`.

use bytes::Bytes;
use gse_core::store::{Batch, Store, StoreError, as_array, as_bytes, as_int, as_pairs, command};
use gse_proto::alarm::{LostHost, WatchState};
use gse_proto::keys;
use gse_proto::prost::Message;
use gse_proto::state::AgentRecord;

use crate::watch::{Look, Span};

/// Shards read in one go, so that not all overdue hosts are in memory twice.
const SHARDS_AT_ONCE: u16 = 8;
/// Fields of a hash in one go.
const FIELDS: usize = 2_000;
/// What is kept outlives an outage of a day.
const KEEP_S: u64 = 2 * 86_400;

/// The way to the store.
#[derive(Debug, Clone)]
pub struct State {
    store: Store,
}

/// What an instance begins with.
#[derive(Debug, Default)]
pub struct Left {
    /// The store's clock, unix milliseconds.
    pub store_ms: u64,
    /// Where the instance before this one was.
    pub state: Option<WatchState>,
    /// Hosts about which alarms are sent.
    pub lost: Vec<(Box<str>, LostHost)>,
}

/// How many hosts are heard, went silent lately, and are silent of each mass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// See above.
    pub heard: u64,
    /// See above.
    pub recent: u64,
    /// See above.
    pub masses: Vec<u64>,
}

fn text(id: &[u8]) -> Option<Box<str>> {
    std::str::from_utf8(id).ok().map(Into::into)
}

fn score(value: &Bytes) -> u64 {
    let text = std::str::from_utf8(value).unwrap_or_default();
    // Written as a whole number; a store may show it as another kind of number.
    text.parse::<f64>().map_or(0, |score| score as u64)
}

fn time_command() -> redis::Cmd {
    redis::cmd("TIME")
}

fn time_of(reply: Option<redis::Value>) -> Result<u64, StoreError> {
    let mut parts = reply.map_or(Ok(vec![]), as_array)?.into_iter();
    let seconds = parts.next().map_or(Ok(0), as_int)?;
    let micros = parts.next().map_or(Ok(0), as_int)?;
    Ok(seconds.unsigned_abs() * 1_000 + micros.unsigned_abs() / 1_000)
}

impl State {
    /// Over `store`.
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// What was left by the instance before.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn left(&self) -> Result<Left, StoreError> {
        let mut batch = Batch::new();
        batch.push(keys::alarm_state(), time_command());
        batch.push(keys::alarm_state(), command("GET", keys::alarm_state()));
        let mut replies = self.store.run(batch).await?.into_iter();
        let store_ms = time_of(replies.next())?;
        let state = replies.next().map_or(Ok(None), as_bytes)?;
        // One that can't be read is as good as none: alarms then wait a while.
        let state = state.and_then(|bytes| WatchState::decode(bytes).ok());
        let mut lost = Vec::new();
        let mut cursor = "0".to_owned();
        loop {
            let mut scan = command("HSCAN", keys::alarm_lost());
            scan.arg(&cursor).arg("COUNT").arg(FIELDS);
            let mut batch = Batch::new();
            batch.push(keys::alarm_lost(), scan);
            let reply = self.store.run(batch).await?.into_iter().next();
            let mut parts = reply.map_or(Ok(vec![]), as_array)?.into_iter();
            let next = parts.next().map_or(Ok(None), as_bytes)?;
            for (id, host) in parts.next().map_or(Ok(vec![]), as_pairs)? {
                if let (Some(id), Ok(host)) = (text(&id), LostHost::decode(host)) {
                    lost.push((id, host));
                }
            }
            cursor = next
                .and_then(|next| text(&next))
                .map_or_else(|| "0".into(), String::from);
            if cursor == "0" {
                break;
            }
        }
        Ok(Left { store_ms, state, lost })
    }

    /// The last stamps of the nodes of gse_task, and the store's clock.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn nodes(&self) -> Result<(u64, Vec<(String, u64)>), StoreError> {
        let mut list = command("ZRANGE", keys::nodes());
        list.arg(0).arg(-1).arg("WITHSCORES");
        let mut batch = Batch::new();
        batch.push(keys::nodes(), list);
        batch.push(keys::alarm_state(), time_command());
        let mut replies = self.store.run(batch).await?.into_iter();
        let mut nodes = Vec::new();
        for (id, stamp) in replies.next().map_or(Ok(vec![]), as_pairs)? {
            if let Some(id) = text(&id) {
                nodes.push((id.into(), score(&stamp)));
            }
        }
        Ok((time_of(replies.next())?, nodes))
    }

    /// Counts, in all shards.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn counts(&self, look: &Look) -> Result<Counts, StoreError> {
        let mut spans = vec![(format!("({}", look.recent.to), "+inf".to_owned())];
        let all = std::iter::once(&look.recent).chain(&look.masses);
        spans.extend(all.map(|span| (span.from.to_string(), span.to.to_string())));
        let mut batch = Batch::new();
        for shard in 0..keys::AGENT_SHARDS {
            let key = keys::agent_seen(shard);
            for (from, to) in &spans {
                let mut count = command("ZCOUNT", &key);
                count.arg(from).arg(to);
                batch.push(&key, count);
            }
        }
        let mut sums = vec![0_u64; spans.len()];
        for (n, reply) in self.store.run(batch).await?.into_iter().enumerate() {
            sums[n % spans.len()] += as_int(reply)?.unsigned_abs();
        }
        let masses = sums.split_off(2);
        Ok(Counts {
            heard: sums[0],
            recent: sums[1],
            masses,
        })
    }

    /// Hosts with stamps in `span`, some shards at a time; `take` gets each shard once.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn seen(&self, span: Span, mut take: impl FnMut(u16, Vec<(Box<str>, u64)>)) -> Result<(), StoreError> {
        let mut first = 0;
        while first < keys::AGENT_SHARDS {
            let some = first..(first + SHARDS_AT_ONCE).min(keys::AGENT_SHARDS);
            let mut batch = Batch::new();
            for shard in some.clone() {
                let key = keys::agent_seen(shard);
                let mut range = command("ZRANGEBYSCORE", &key);
                range.arg(span.from).arg(span.to).arg("WITHSCORES");
                batch.push(&key, range);
            }
            for (shard, reply) in some.zip(self.store.run(batch).await?) {
                let pairs = as_pairs(reply)?.into_iter();
                let found = pairs.filter_map(|(id, stamp)| Some((text(&id)?, score(&stamp))));
                take(shard, found.collect());
            }
            first += SHARDS_AT_ONCE;
        }
        Ok(())
    }

    /// Records of agents, in the order asked.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn records(&self, ids: &[Box<str>]) -> Result<Vec<Option<AgentRecord>>, StoreError> {
        let mut shards: std::collections::BTreeMap<u16, Vec<usize>> = std::collections::BTreeMap::new();
        for (n, id) in ids.iter().enumerate() {
            shards.entry(keys::agent_shard(id)).or_default().push(n);
        }
        let mut batch = Batch::new();
        for (shard, members) in &shards {
            let key = keys::agent_info(*shard);
            let mut get = command("HMGET", &key);
            for n in members {
                get.arg(&*ids[*n]);
            }
            batch.push(&key, get);
        }
        let mut records: Vec<Option<AgentRecord>> = ids.iter().map(|_| None).collect();
        if batch.is_empty() {
            return Ok(records);
        }
        for (members, reply) in shards.values().zip(self.store.run(batch).await?) {
            for (n, value) in members.iter().zip(as_array(reply)?) {
                records[*n] = as_bytes(value)?.and_then(|bytes| AgentRecord::decode(bytes).ok());
            }
        }
        Ok(records)
    }

    /// Keeps what was sent.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn keep(&self, hosts: &[(Box<str>, LostHost)]) -> Result<(), StoreError> {
        let key = keys::alarm_lost();
        let mut batch = Batch::new();
        for some in hosts.chunks(FIELDS) {
            let mut set = command("HSET", key);
            for (id, host) in some {
                set.arg(&**id).arg(host.encode_to_vec());
            }
            batch.push(key, set);
        }
        if batch.is_empty() {
            return Ok(());
        }
        let mut expire = command("EXPIRE", key);
        expire.arg(KEEP_S);
        batch.push(key, expire);
        self.store.run(batch).await.map(|_| ())
    }

    /// Keeps where this instance is, and removes hosts that are lost no more.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn close(&self, state: &WatchState, gone: &[Box<str>]) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        for some in gone.chunks(FIELDS) {
            let mut remove = command("HDEL", keys::alarm_lost());
            for id in some {
                remove.arg(&**id);
            }
            batch.push(keys::alarm_lost(), remove);
        }
        let mut set = command("SET", keys::alarm_state());
        set.arg(state.encode_to_vec()).arg("EX").arg(KEEP_S);
        batch.push(keys::alarm_state(), set);
        self.store.run(batch).await.map(|_| ())
    }

    /// When (unix ms) some agents were last heard; for [`Counts`] that have to be looked into.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn stamps(&self, span: Span) -> Result<Vec<u64>, StoreError> {
        let mut stamps = Vec::new();
        self.seen(span, |_, found| stamps.extend(found.into_iter().map(|(_, at)| at)))
            .await?;
        Ok(stamps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_and_times_in_every_shape() {
        assert_eq!(score(&Bytes::from_static(b"1700000000123")), 1_700_000_000_123);
        assert_eq!(score(&Bytes::from_static(b"1.700000000123e12")), 1_700_000_000_123);
        let reply = redis::Value::Array(vec![
            redis::Value::BulkString(b"1700000000".to_vec()),
            redis::Value::BulkString(b"123999".to_vec()),
        ]);
        assert_eq!(time_of(Some(reply)).unwrap(), 1_700_000_000_123);
    }
}
