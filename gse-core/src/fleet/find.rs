//! What the store says about agents and nodes.

use bytes::Bytes;
use gse_proto::ids::AgentId;
use gse_proto::keys;
use gse_proto::prost::Message;
use gse_proto::state::{AgentRecord, NodeInfo};

use crate::random::HashMap;
use crate::store::{Batch, Store, StoreError, as_array, as_bytes, as_float};

/// Ids looked up in one go.
const LOOK_UP: usize = 5_000;

/// A field of each id from the hashes of its shard, one command a shard.
///
/// # Errors
/// When the store does not answer.
pub async fn fields(
    store: &Store,
    ids: &[&AgentId],
    key_of: impl Fn(u16) -> String,
) -> Result<Vec<Option<Bytes>>, StoreError> {
    let mut shards: HashMap<u16, Vec<usize>> = HashMap::default();
    for (n, id) in ids.iter().enumerate() {
        shards.entry(keys::agent_shard(id.as_str())).or_default().push(n);
    }
    let shards: Vec<(u16, Vec<usize>)> = shards.into_iter().collect();
    let mut batch = Batch::new();
    for (shard, members) in &shards {
        let key = key_of(*shard);
        let mut cmd = redis::cmd("HMGET");
        cmd.arg(&key);
        for n in members {
            cmd.arg(ids[*n].as_str());
        }
        batch.push(&key, cmd);
    }
    let mut values = vec![None; ids.len()];
    if shards.is_empty() {
        return Ok(values);
    }
    for ((_, members), reply) in shards.iter().zip(store.run(batch).await?) {
        for (n, value) in members.iter().zip(as_array(reply)?) {
            values[*n] = as_bytes(value)?;
        }
    }
    Ok(values)
}

/// Which agents are meant by `asked`: the holders of `cloud:ip` names, all others as they are.
///
/// # Errors
/// When the store does not answer.
pub async fn resolve(store: &Store, asked: &[AgentId]) -> Result<Vec<AgentId>, StoreError> {
    let names: Vec<&AgentId> = asked.iter().filter(|id| id.cloud_ip().is_some()).collect();
    let mut aliases: HashMap<&AgentId, AgentId> = HashMap::default();
    for (name, value) in names.iter().zip(fields(store, &names, keys::agent_alias).await?) {
        if let Some(id) = value.and_then(|bytes| AgentId::parse(std::str::from_utf8(&bytes).ok()?).ok()) {
            aliases.insert(*name, id);
        }
    }
    Ok(asked.iter().map(|id| aliases.get(id).unwrap_or(id).clone()).collect())
}

/// The records of agents; `None` of those that have never connected.
///
/// # Errors
/// When the store does not answer.
pub async fn records(store: &Store, agents: &[AgentId]) -> Result<Vec<Option<AgentRecord>>, StoreError> {
    let refs: Vec<&AgentId> = agents.iter().collect();
    let records = fields(store, &refs, keys::agent_info).await?;
    let decoded = records.into_iter().map(|record| AgentRecord::decode(record?).ok());
    Ok(decoded.collect())
}

/// When (unix ms) agents were last heard; `None` of those that never were.
///
/// # Errors
/// When the store does not answer.
pub async fn last_seen(store: &Store, agents: &[&AgentId]) -> Result<Vec<Option<u64>>, StoreError> {
    if agents.is_empty() {
        return Ok(vec![]);
    }
    let mut batch = Batch::new();
    for agent in agents {
        let key = keys::agent_seen(keys::agent_shard(agent.as_str()));
        let mut cmd = redis::cmd("ZSCORE");
        cmd.arg(&key).arg(agent.as_str());
        batch.push(&key, cmd);
    }
    let scores = store.run(batch).await?.into_iter();
    scores
        .map(|score| match score {
            redis::Value::Nil => Ok(None),
            score => Ok(Some(as_float(score)? as u64)),
        })
        .collect()
}

/// What living nodes say of themselves; those whose lease is over are left out.
async fn nodes(store: &Store, ids: &[&str]) -> Result<HashMap<String, NodeInfo>, StoreError> {
    let mut found = HashMap::default();
    if ids.is_empty() {
        return Ok(found);
    }
    let mut batch = Batch::new();
    for id in ids {
        for key in [keys::node_lease(id), keys::node_info(id)] {
            let mut cmd = redis::cmd("GET");
            cmd.arg(&key);
            batch.push(&key, cmd);
        }
    }
    let mut replies = store.run(batch).await?.into_iter();
    for id in ids {
        let lease = replies.next().map_or(Ok(None), as_bytes)?;
        let info = replies.next().map_or(Ok(None), as_bytes)?;
        if let (Some(_), Some(info)) = (lease, info.and_then(|info| NodeInfo::decode(info).ok())) {
            found.insert((*id).to_owned(), info);
        }
    }
    Ok(found)
}

/// Where an agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whereabouts {
    /// A living node has its session.
    At {
        /// The agent that was meant.
        agent: AgentId,
        /// Where the node takes calls (`host:port`).
        address: String,
        /// The node's id.
        node: String,
    },
    /// It is connected, but its node takes no calls.
    NoCalls {
        /// The node's id.
        node: String,
    },
    /// It was connected to a node that is gone, and is looking for another one.
    Between,
    /// Not connected; when (unix ms) it was last heard.
    Away {
        /// See above.
        seen_ms: u64,
        /// It said that it was being stopped.
        stopped: bool,
    },
    /// Nobody has ever heard of it.
    Unknown,
}

/// Looks agents up by asked id.
///
/// # Errors
/// When the store does not answer.
pub async fn whereabouts(store: &Store, asked: &[AgentId]) -> Result<Vec<Whereabouts>, StoreError> {
    let mut all = Vec::with_capacity(asked.len());
    for some in asked.chunks(LOOK_UP) {
        let agents = resolve(store, some).await?;
        let records = records(store, &agents).await?;
        let mut ids: Vec<&str> = records.iter().flatten().map(|record| record.node_id.as_str()).collect();
        ids.sort_unstable();
        ids.dedup();
        let nodes = nodes(store, &ids).await?;
        let mut away = Vec::new();
        for (agent, record) in agents.iter().zip(&records) {
            let place = match record {
                None => Whereabouts::Unknown,
                Some(record) if record.disconnected_at_ms != 0 => {
                    away.push((all.len(), agent));
                    Whereabouts::Away {
                        seen_ms: record.disconnected_at_ms,
                        stopped: record.stopped,
                    }
                }
                Some(record) => match nodes.get(&record.node_id) {
                    Some(info) if info.life == record.node_life && !info.rpc.is_empty() => Whereabouts::At {
                        agent: agent.clone(),
                        address: info.rpc.clone(),
                        node: record.node_id.clone(),
                    },
                    Some(info) if info.life == record.node_life => Whereabouts::NoCalls {
                        node: record.node_id.clone(),
                    },
                    _ => {
                        away.push((all.len(), agent));
                        Whereabouts::Between
                    }
                },
            };
            all.push(place);
        }
        let agents: Vec<&AgentId> = away.iter().map(|(_, agent)| *agent).collect();
        for ((at, _), seen) in away.iter().zip(last_seen(store, &agents).await?) {
            match (&mut all[*at], seen) {
                (Whereabouts::Away { seen_ms, .. }, Some(seen)) => *seen_ms = seen,
                // Its node has been gone for so long that the record is all there is of it.
                (place @ Whereabouts::Between, None) => *place = Whereabouts::Unknown,
                _ => {}
            }
        }
    }
    Ok(all)
}
