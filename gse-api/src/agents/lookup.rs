//! Finding agents in the store: all ids of a call in one batch, in a second one the leases of the nodes that hold them, and likewise
//! for agents that were asked for by their other name, `cloud:ip`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use gse_core::store::{Batch, Store, StoreError, as_array, as_bytes, as_float, as_string};
use gse_proto::ids::AgentId;
use gse_proto::keys::{agent_alias, agent_info, agent_load, agent_seen, agent_shard, node_lease};
use gse_proto::state::{AgentLoad, AgentRecord};
use prost::Message;
use redis::Value;

/// What the store knows of one agent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Known {
    /// Who it is.
    pub record: AgentRecord,
    /// Unix milliseconds of the last sign of life; none was ever noted.
    pub seen_ms: Option<u64>,
    /// Last load figures.
    pub load: AgentLoad,
    /// Whether the life of the node that holds the session has ended: then there is no session, whatever the record says.
    pub node_gone: bool,
}

/// Reads agents' records. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Agents {
    pub(super) store: Store,
    deadline: Duration,
}

/// Ids by the shard that they fall on.
type Shards<'a> = BTreeMap<u16, Vec<&'a str>>;

impl Agents {
    /// Reads from `store`; whatever one call needs has to be there within `deadline`.
    pub fn new(store: Store, deadline: Duration) -> Self {
        Self { store, deadline }
    }

    /// The agents behind `ids`, under the ids asked for, with their load figures if these are wanted. Ids of no agent are left out.
    ///
    /// # Errors
    /// The store does not answer, or not in time.
    pub async fn find<'a>(
        &self,
        ids: impl IntoIterator<Item = &'a str>,
        loads: bool,
    ) -> Result<HashMap<&'a str, Known>, StoreError> {
        // What is no id at all is not worth a question, and could not be one: keys are made of ids.
        let asked: HashSet<&str> = ids.into_iter().filter(|id| AgentId::parse(id).is_ok()).collect();
        self.within(async {
            let aliases: Vec<(&str, String)> = asked
                .iter()
                .filter_map(|id| {
                    let (cloud, ip) = gse_proto::ids::split_cloud_ip(id)?;
                    Some((*id, AgentId::from_cloud_ip(cloud, ip).to_string()))
                })
                .collect();
            let (mut found, named) = self.fetch(&asked, &aliases, loads).await?;
            let others: HashMap<&str, String> = named
                .into_iter()
                .filter(|(asked, _)| !found.contains_key(asked))
                .collect();
            if !others.is_empty() {
                let targets: HashSet<&str> = others.values().map(String::as_str).collect();
                let (by_id, _) = self.fetch(&targets, &[], loads).await?;
                for (asked, id) in &others {
                    if let Some(known) = by_id.get(id.as_str()) {
                        found.insert(asked, known.clone());
                    }
                }
            }
            Ok(found)
        })
        .await
    }

    /// Finds out which of the nodes that hold sessions are alive: one small batch, a command a node.
    async fn look_at_nodes(&self, known: impl Iterator<Item = &mut Known>) -> Result<(), StoreError> {
        let mut by_node: BTreeMap<String, Vec<&mut Known>> = BTreeMap::new();
        for known in known.filter(|known| known.record.disconnected_at_ms == 0) {
            by_node.entry(known.record.node_id.clone()).or_default().push(known);
        }
        let mut batch = Batch::new();
        for node in by_node.keys() {
            let key = node_lease(node);
            batch.push(&key, redis::cmd("GET").arg(&key).to_owned());
        }
        for (held, lease) in by_node.into_values().zip(self.store.run(batch).await?) {
            let life = as_string(lease)?.and_then(|text| text.parse::<u64>().ok());
            for known in held {
                known.node_gone = life != Some(known.record.node_life);
            }
        }
        Ok(())
    }

    /// Runs `question` within the deadline of one call.
    pub(super) async fn within<T>(
        &self,
        question: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        tokio::time::timeout(self.deadline, question).await.unwrap_or_else(|_| {
            Err(StoreError::Timeout {
                store: String::new(),
                after_ms: u64::try_from(self.deadline.as_millis()).unwrap_or(u64::MAX),
                why: "a call may not wait longer (limits.lookup_timeout_ms)".to_owned(),
            })
        })
    }

    /// One batch: records, signs of life and (if `loads`) load of `ids`, and the ids behind `aliases` (as asked, as stored).
    pub(super) async fn fetch<'a, 'b>(
        &self,
        ids: &HashSet<&'a str>,
        aliases: &[(&'b str, String)],
        loads: bool,
    ) -> Result<(HashMap<&'a str, Known>, HashMap<&'b str, String>), StoreError> {
        let mut shards = Shards::new();
        for id in ids {
            shards.entry(agent_shard(id)).or_default().push(id);
        }
        let mut alias_shards: BTreeMap<u16, Vec<(&'b str, &str)>> = BTreeMap::new();
        for (asked, stored) in aliases {
            alias_shards
                .entry(agent_shard(stored))
                .or_default()
                .push((asked, stored));
        }
        let mut batch = Batch::new();
        for (shard, ids) in &shards {
            batch_push(&mut batch, "HMGET", agent_info(*shard), ids);
            batch_push(&mut batch, "ZMSCORE", agent_seen(*shard), ids);
            if loads {
                batch_push(&mut batch, "HMGET", agent_load(*shard), ids);
            }
        }
        for (shard, names) in &alias_shards {
            let stored: Vec<&str> = names.iter().map(|(_, stored)| *stored).collect();
            batch_push(&mut batch, "HMGET", agent_alias(*shard), &stored);
        }
        let mut replies = self.store.run(batch).await?.into_iter();
        let mut next = |wanted: usize| -> Result<Vec<Value>, StoreError> {
            let values = as_array(replies.next().unwrap_or(Value::Nil))?;
            if values.len() == wanted {
                Ok(values)
            } else {
                Err(StoreError::Unexpected {
                    wanted: "one value for each id",
                    found: "another number of them",
                })
            }
        };
        let mut found = HashMap::new();
        for (shard, ids) in &shards {
            let (infos, seens) = (next(ids.len())?, next(ids.len())?);
            let mut loads = if loads { next(ids.len())? } else { Vec::new() }.into_iter();
            for ((id, info), seen) in ids.iter().zip(infos).zip(seens) {
                let load = loads.next().unwrap_or(Value::Nil);
                if let Some(known) = known(*shard, id, info, seen, load)? {
                    found.insert(*id, known);
                }
            }
        }
        self.look_at_nodes(found.values_mut()).await?;
        let mut named = HashMap::new();
        for names in alias_shards.values() {
            for ((asked, _), id) in names.iter().zip(next(names.len())?) {
                if let Some(id) = as_string(id)? {
                    named.insert(*asked, id);
                }
            }
        }
        Ok((found, named))
    }
}

fn batch_push(batch: &mut Batch, command: &str, key: String, members: &[&str]) {
    let mut cmd = redis::cmd(command);
    cmd.arg(&key).arg(members);
    batch.push(key, cmd);
}

fn known(shard: u16, id: &str, info: Value, seen: Value, load: Value) -> Result<Option<Known>, StoreError> {
    let Some(bytes) = as_bytes(info)? else { return Ok(None) };
    let Ok(record) = AgentRecord::decode(bytes) else {
        // One damaged record must not spoil the answer for the others.
        tracing::error!(
            agent_id = id,
            key = agent_info(shard),
            "the record of an agent does not decode; the agent counts as unknown"
        );
        return Ok(None);
    };
    let seen_ms = match seen {
        Value::Nil => None,
        score => Some(as_float(score)?.max(0.0) as u64),
    };
    let load = match as_bytes(load)? {
        Some(bytes) => AgentLoad::decode(bytes).unwrap_or_default(),
        None => AgentLoad::default(),
    };
    Ok(Some(Known {
        record,
        seen_ms,
        load,
        node_gone: false,
    }))
}
