//! What others may know of agents: who is connected, when they were last heard, how loaded they are. Kept in the store for gse_api.
//!
//! Signs of life are gathered in memory and written at most once a second, in one batch, whatever their number: a heartbeat costs
//! no round trip of its own. While the store is away the newest state of each agent is kept and written when it is back. Sessions
//! themselves are in [`crate::session`]; nothing here decides about them.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::random::HashMap;
use gse_core::store::{Batch, Store, StoreError, as_bytes, as_pairs, command};
use gse_proto::ids::AgentId;
use gse_proto::keys;
use gse_proto::session::{Heartbeat, Hello};
use gse_proto::state::{AgentLoad, AgentRecord};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::Notify;

use crate::Node;
use crate::clock::unix_ms;
use crate::session::outbox::CloseReason;
use crate::session::registry::Session;

/// How long an agent that is never heard again is remembered.
const FORGET_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);
/// TTL of the shard keys, renewed while the node lives.
const SHARD_TTL_S: u64 = 8 * 24 * 3600;
/// More sessions may be opened within this time, and are written together.
const NEWS_GATHER: Duration = Duration::from_millis(50);
/// A session is looked at again so long after it was opened.
const RECHECK_AFTER: Duration = Duration::from_secs(4);
/// So many at a time.
const RECHECKS: usize = 5_000;
/// How often old agents are looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(600);

#[derive(Debug, Default)]
struct Dirty {
    records: HashMap<AgentId, Bytes>,
    /// Records of sessions that have ended, with the session: written unless the agent is connected elsewhere by now.
    closes: HashMap<AgentId, (u64, Bytes)>,
    seen: HashMap<AgentId, u64>,
    loads: HashMap<AgentId, AgentLoad>,
    aliases: HashMap<Box<str>, AgentId>,
}

impl Dirty {
    fn is_empty(&self) -> bool {
        self.records.is_empty()
            && self.closes.is_empty()
            && self.seen.is_empty()
            && self.loads.is_empty()
            && self.aliases.is_empty()
    }

    /// Takes back what could not be written; newer values stay.
    fn merge_older(&mut self, older: Dirty) {
        for (id, value) in older.records {
            self.records.entry(id).or_insert(value);
        }
        for (id, value) in older.closes {
            if !self.records.contains_key(&id) {
                self.closes.entry(id).or_insert(value);
            }
        }
        for (id, value) in older.seen {
            self.seen.entry(id).or_insert(value);
        }
        for (id, value) in older.loads {
            self.loads.entry(id).or_insert(value);
        }
        for (alias, id) in older.aliases {
            self.aliases.entry(alias).or_insert(id);
        }
    }

    /// At most four commands a shard, each with all its members.
    fn batch(&self) -> Batch {
        let mut infos: HashMap<u16, redis::Cmd> = HashMap::default();
        let mut seen: HashMap<u16, redis::Cmd> = HashMap::default();
        let mut loads: HashMap<u16, redis::Cmd> = HashMap::default();
        let mut aliases: HashMap<u16, redis::Cmd> = HashMap::default();
        let ended = self.closes.iter().map(|(id, (_, record))| (id, record));
        for (id, record) in self.records.iter().chain(ended) {
            let shard = keys::agent_shard(id.as_str());
            let cmd = infos
                .entry(shard)
                .or_insert_with(|| command("HSET", keys::agent_info(shard)));
            cmd.arg(id.as_str()).arg(&record[..]);
        }
        for (id, at) in &self.seen {
            let shard = keys::agent_shard(id.as_str());
            let cmd = seen
                .entry(shard)
                .or_insert_with(|| command("ZADD", keys::agent_seen(shard)));
            cmd.arg(*at).arg(id.as_str());
        }
        for (id, load) in &self.loads {
            let shard = keys::agent_shard(id.as_str());
            let cmd = loads
                .entry(shard)
                .or_insert_with(|| command("HSET", keys::agent_load(shard)));
            cmd.arg(id.as_str()).arg(load.encode_to_vec());
        }
        for (alias, id) in &self.aliases {
            let shard = keys::agent_shard(alias);
            let cmd = aliases
                .entry(shard)
                .or_insert_with(|| command("HSET", keys::agent_alias(shard)));
            cmd.arg(&**alias).arg(id.as_str());
        }
        let mut batch = Batch::new();
        for (shard, cmd) in infos {
            batch.push(keys::agent_info(shard), cmd);
        }
        for (shard, cmd) in seen {
            batch.push(keys::agent_seen(shard), cmd);
        }
        for (shard, cmd) in loads {
            batch.push(keys::agent_load(shard), cmd);
        }
        for (shard, cmd) in aliases {
            batch.push(keys::agent_alias(shard), cmd);
        }
        batch
    }
}

/// The gatherer.
pub struct Presence {
    store: Store,
    dirty: Mutex<Dirty>,
    /// There is something that other nodes wait for.
    news: Notify,
    /// Sessions that were opened lately, to see that another node's last word about the agent has not come after ours.
    fresh: Mutex<VecDeque<(tokio::time::Instant, AgentId, u64)>>,
    /// Records of the connected agents as they are stored, to amend them without reading the store.
    records: dashmap::DashMap<AgentId, Bytes>,
}

impl Presence {
    /// A gatherer that writes to `store`.
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self {
            store,
            dirty: Mutex::default(),
            news: Notify::new(),
            fresh: Mutex::default(),
            records: dashmap::DashMap::new(),
        }
    }

    /// A session was opened. Reads what was known of the agent before, to know how long its journal has been the same.
    pub async fn opened(&self, node: &Node, session: &Session, hello: &Hello) {
        let now = unix_ms();
        let before = match self.stored(&session.agent).await {
            Ok(before) => before.unwrap_or_default(),
            Err(error) => {
                tracing::warn!(agent = %session.agent, %error, "what was known of the agent can't be read; its journal counts as new");
                AgentRecord::default()
            }
        };
        let same_journal = before.journal_epoch == hello.journal_epoch && !hello.journal_epoch.is_empty();
        let record = AgentRecord {
            agent_id: session.agent.as_str().to_owned(),
            cloud_id: hello.cloud_id,
            addresses: addresses(hello),
            hostname: hello.hostname.chars().take(255).collect(),
            version: clean_version(&hello.version),
            os: hello.os.chars().take(32).collect(),
            arch: hello.arch.chars().take(32).collect(),
            run_mode: u32::try_from(hello.run_mode).unwrap_or(1),
            machine_id: hello.machine_id.chars().take(64).collect(),
            boot_id: hello.boot_id.chars().take(64).collect(),
            node_id: node.config.node_id.clone(),
            session_id: session.id,
            connected_at_ms: now,
            disconnected_at_ms: 0,
            disconnect_reason: String::new(),
            stopped: false,
            purpose: 0,
            started_at_ms: hello.started_at_ms,
            cpu_num: hello.cpu_num,
            mem_size_mb: hello.mem_size_mb,
            journal_epoch: Bytes::copy_from_slice(&hello.journal_epoch),
            epoch_since_ms: if same_journal { before.epoch_since_ms } else { now },
            clone_of: before.clone_of,
            clone_at_ms: before.clone_at_ms,
            peer: session.peer.to_string(),
            node_life: node.life_id,
            server: node.advertised().into_iter().next().unwrap_or_default(),
        };
        session.journal_known_since(record.epoch_since_ms);
        let mut dirty = self.dirty.lock();
        dirty.seen.insert(session.agent.clone(), now);
        for alias in &session.aliases {
            if node.registry.alias_holder(alias).as_ref() == Some(&session.agent) {
                dirty.aliases.insert(alias.clone(), session.agent.clone());
            }
        }
        let record = Bytes::from(record.encode_to_vec());
        dirty.records.insert(session.agent.clone(), record.clone());
        dirty.closes.remove(&session.agent);
        drop(dirty);
        self.records.insert(session.agent.clone(), record);
        if node.peers.is_on() {
            // Others look for it in the store.
            self.news.notify_one();
            let due = tokio::time::Instant::now() + RECHECK_AFTER;
            self.fresh.lock().push_back((due, session.agent.clone(), session.id));
        }
    }

    /// Since when (unix ms) the journal of a connected agent has been the one it has; `None`: that has not been read yet.
    #[must_use]
    pub fn epoch_since(&self, session: &Session) -> Option<u64> {
        session.epoch_since()
    }

    /// The agent is another node's now, which says so itself.
    pub fn forget(&self, agent: &AgentId) {
        self.records.remove(agent);
        let mut dirty = self.dirty.lock();
        dirty.records.remove(agent);
        dirty.seen.remove(agent);
        dirty.loads.remove(agent);
    }

    /// A sign of life with load figures.
    pub fn beat(&self, session: &Session, beat: &Heartbeat) {
        let now = unix_ms();
        let load = AgentLoad {
            at_ms: now,
            cpu_permille: beat.cpu_permille.min(1000),
            mem_permille: beat.mem_permille.min(1000),
            running: beat.running,
            queued: beat.queued,
        };
        let mut dirty = self.dirty.lock();
        dirty.seen.insert(session.agent.clone(), now);
        dirty.loads.insert(session.agent.clone(), load);
    }

    /// The last session of an agent has ended.
    pub fn closed(&self, session: &Session, reason: &CloseReason) {
        let now = unix_ms();
        let record = self.records.remove(&session.agent);
        if let Some(mut record) = record.and_then(|(_, record)| decode(&record)) {
            record.disconnected_at_ms = now;
            record.disconnect_reason = reason.to_string();
            let purpose = match reason {
                CloseReason::Goodbye(purpose) => *purpose,
                _ => None,
            };
            record.stopped = purpose.is_some();
            record.purpose = purpose.unwrap_or_default().into();
            let mut dirty = self.dirty.lock();
            dirty.records.remove(&session.agent);
            let kept = (session.id, record.encode_to_vec().into());
            dirty.closes.insert(session.agent.clone(), kept);
        }
    }

    /// Another host has claimed the id of a connected agent.
    pub fn clone_seen(&self, agent: &AgentId, who: String) {
        if let Some(mut kept) = self.records.get_mut(agent)
            && let Some(mut record) = decode(&kept)
        {
            record.clone_of = who;
            record.clone_at_ms = unix_ms();
            *kept = record.encode_to_vec().into();
            self.dirty.lock().records.insert(agent.clone(), kept.clone());
        }
    }

    /// What the store says of an agent.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn stored(&self, agent: &AgentId) -> Result<Option<AgentRecord>, StoreError> {
        let key = keys::agent_info(keys::agent_shard(agent.as_str()));
        let mut cmd = command("HGET", &key);
        cmd.arg(agent.as_str());
        let mut batch = Batch::new();
        batch.push(&key, cmd);
        let replies = self.store.run(batch).await?;
        let Some(value) = replies.into_iter().next() else {
            return Ok(None);
        };
        // An unreadable record is as good as none: it is about to be written anew.
        Ok(as_bytes(value)?.and_then(|bytes| AgentRecord::decode(bytes).ok()))
    }

    /// `alone`: no other node can have written about the same agents.
    async fn flush(&self, alone: bool) -> Result<(), StoreError> {
        let mut work = std::mem::take(&mut *self.dirty.lock());
        if work.is_empty() {
            return Ok(());
        }
        if !alone && !work.closes.is_empty() {
            let ended: Vec<AgentId> = work.closes.keys().cloned().collect();
            match self.holders(&ended).await {
                Ok(holders) => work
                    .closes
                    .retain(|id, (session, _)| holders.get(id).is_none_or(|holder| holder == session)),
                Err(error) => {
                    self.dirty.lock().merge_older(work);
                    return Err(error);
                }
            }
        }
        match self.store.run(work.batch()).await {
            Ok(_) => Ok(()),
            Err(error) => {
                self.dirty.lock().merge_older(work);
                Err(error)
            }
        }
    }

    /// Which session the store has for each of these agents.
    async fn holders(&self, agents: &[AgentId]) -> Result<HashMap<AgentId, u64>, StoreError> {
        let mut batch = Batch::new();
        for agent in agents {
            let key = keys::agent_info(keys::agent_shard(agent.as_str()));
            let mut cmd = command("HGET", &key);
            cmd.arg(agent.as_str());
            batch.push(&key, cmd);
        }
        let mut holders = HashMap::default();
        for (agent, value) in agents.iter().zip(self.store.run(batch).await?) {
            if let Some(record) = as_bytes(value)?.and_then(|bytes| AgentRecord::decode(bytes).ok()) {
                holders.insert(agent.clone(), record.session_id);
            }
        }
        Ok(holders)
    }

    /// Looks whether the store still has the sessions that were opened a moment ago: a node that lost an agent to this one may have
    /// written so after this one had.
    async fn recheck(&self) -> Result<(), StoreError> {
        let now = tokio::time::Instant::now();
        let due: Vec<(AgentId, u64)> = {
            let mut fresh = self.fresh.lock();
            let count = fresh.iter().take_while(|(due, ..)| *due <= now).count().min(RECHECKS);
            fresh
                .drain(..count)
                .map(|(_, agent, session)| (agent, session))
                .collect()
        };
        if due.is_empty() {
            return Ok(());
        }
        let agents: Vec<AgentId> = due.iter().map(|(agent, _)| agent.clone()).collect();
        let holders = self.holders(&agents).await?;
        for (agent, session) in due {
            let ours = self.records.get(&agent).map(|record| record.clone());
            let ours = ours.filter(|record| decode(record).is_some_and(|record| record.session_id == session));
            if let Some(record) = ours
                && holders.get(&agent) != Some(&session)
            {
                self.dirty.lock().records.insert(agent, record);
            }
        }
        Ok(())
    }

    /// Forgets agents that have not been heard for long and renews the TTL of the shards.
    async fn housekeeping(&self) -> Result<(), StoreError> {
        let horizon = unix_ms().saturating_sub(FORGET_AFTER.as_millis() as u64);
        for shard in 0..keys::AGENT_SHARDS {
            let seen = keys::agent_seen(shard);
            let mut cmd = command("ZRANGEBYSCORE", &seen);
            cmd.arg("-inf").arg(horizon).arg("LIMIT").arg(0).arg(1000);
            let mut batch = Batch::new();
            batch.push(&seen, cmd);
            let replies = self.store.run(batch).await?;
            let mut batch = Batch::new();
            for id in replies.into_iter().flat_map(gse_core::store::as_array).flatten() {
                let Some(id) = as_bytes(id)? else { continue };
                for (key, name) in [
                    (keys::agent_info(shard), "HDEL"),
                    (keys::agent_load(shard), "HDEL"),
                    (seen.clone(), "ZREM"),
                ] {
                    let mut cmd = command(name, &key);
                    cmd.arg(&id[..]);
                    batch.push(&key, cmd);
                }
            }
            for key in [
                keys::agent_info(shard),
                seen.clone(),
                keys::agent_load(shard),
                keys::agent_alias(shard),
            ] {
                let mut cmd = command("EXPIRE", &key);
                cmd.arg(SHARD_TTL_S);
                batch.push(&key, cmd);
            }
            self.store.run(batch).await?;
            self.forget_aliases(shard).await?;
        }
        Ok(())
    }

    /// Forgets names of agents that are forgotten.
    async fn forget_aliases(&self, shard: u16) -> Result<(), StoreError> {
        let key = keys::agent_alias(shard);
        let mut batch = Batch::new();
        batch.push(&key, command("HGETALL", &key));
        let reply = self.store.run(batch).await?.into_iter().next();
        let aliases = reply.map_or(Ok(vec![]), as_pairs)?;
        let mut batch = Batch::new();
        for (_, id) in &aliases {
            let seen = keys::agent_seen(keys::agent_shard(&String::from_utf8_lossy(id)));
            let mut cmd = command("ZSCORE", &seen);
            cmd.arg(&id[..]);
            batch.push(&seen, cmd);
        }
        let scores = self.store.run(batch).await?;
        let mut remove = command("HDEL", &key);
        let mut gone = 0;
        for ((alias, _), score) in aliases.iter().zip(scores) {
            if matches!(score, redis::Value::Nil) {
                remove.arg(&alias[..]);
                gone += 1;
            }
        }
        if gone > 0 {
            let mut batch = Batch::new();
            batch.push(&key, remove);
            self.store.run(batch).await?;
        }
        Ok(())
    }

    /// Writes once a second until the node drains, and a last time after its sessions have ended.
    pub async fn write(node: Arc<Node>) {
        let mut tick = tokio::time::interval(Duration::from_millis(node.config.session.presence_flush_ms));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut next_housekeeping = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            tokio::select! {
                () = node.sessions_gone() => break,
                _ = tick.tick() => {}
                () = node.presence.news.notified() => tokio::time::sleep(NEWS_GATHER).await,
            }
            let outcome = node.presence.flush(node.peers.is_empty()).await;
            if let Err(error) = &outcome {
                tracing::debug!(%error, "the state of agents is kept until the store is back");
            }
            if outcome.is_ok()
                && let Err(error) = node.presence.recheck().await
            {
                tracing::debug!(%error, "sessions that were opened lately could not be looked at again");
            }
            if outcome.is_ok() && tokio::time::Instant::now() >= next_housekeeping {
                if let Err(error) = node.presence.housekeeping().await {
                    tracing::warn!(%error, "old agents could not be looked for");
                }
                next_housekeeping = tokio::time::Instant::now() + HOUSEKEEPING;
            }
        }
        if let Err(error) = node.presence.flush(node.peers.is_empty()).await {
            tracing::warn!(%error, "the last state of the agents could not be written");
        }
    }
}

/// A record that was encoded here; always whole.
fn decode(record: &Bytes) -> Option<AgentRecord> {
    AgentRecord::decode(record.clone()).ok()
}

/// What of an agent's addresses are addresses.
fn addresses(hello: &Hello) -> Vec<String> {
    let parsed = hello.addresses.iter().filter_map(|text| text.parse::<IpAddr>().ok());
    parsed.take(16).map(|ip| ip.to_string()).collect()
}

/// Only what the contract allows in a version (v2-http-task#49).
fn clean_version(text: &str) -> String {
    text.chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-'))
        .take(64)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_what_clients_can_parse() {
        // contract: v2-http-task#49
        assert_eq!(clean_version("v2.1.6-beta.43"), "v2.1.6-beta.43");
        assert_eq!(clean_version("0.1.0 (debug)\n"), "0.1.0debug");
    }

    #[test]
    fn one_command_a_shard_and_newer_values_win() {
        let mut older = Dirty::default();
        let mut newer = Dirty::default();
        for n in 0..1000 {
            let id = AgentId::parse(&format!("agent-{n}")).unwrap();
            older.seen.insert(id.clone(), 1);
            newer.seen.insert(id, 2);
        }
        assert!(older.batch().len() <= usize::from(keys::AGENT_SHARDS));
        newer.merge_older(older);
        assert!(newer.seen.values().all(|at| *at == 2));
    }
}
