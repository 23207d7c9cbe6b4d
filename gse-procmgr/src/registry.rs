//! What the store knows of processes: registrations and last known states, by agent and by namespace.
//!
//! How states get there is in `gse_core::fleet::processes`; how registrations are brought in line with hosts in [`crate::reconcile`].

use std::collections::BTreeMap;

use bytes::Bytes;
use gse_core::fleet::processes::{Writes, read_state};
use gse_core::random::HashMap;
use gse_core::store::{Batch, Store, StoreError, as_array, as_bytes, as_int, as_pairs, as_string, command};
use gse_proto::ids::AgentId;
use gse_proto::keys;
use gse_proto::proc::{Key, Label, Process, Registration, Spec, spec_digest};
use prost::Message;

/// What is known of one process.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Entry {
    /// As last told.
    pub state: Option<Process>,
    /// Snapshot that the state was part of; 0: told as a change.
    pub snapshot: u64,
    /// As it is to be.
    pub registration: Option<Registration>,
}

impl Entry {
    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state.is_none() && self.registration.is_none()
    }
}

/// Everything known of one agent.
#[derive(Debug, Clone, Default)]
pub struct Host {
    /// By namespace and name.
    pub entries: BTreeMap<(String, String), Entry>,
    /// The last whole snapshot.
    pub snapshot: u64,
}

fn registration(bytes: Bytes) -> Option<Registration> {
    let read = Registration::decode(bytes).ok();
    if read.is_none() {
        tracing::error!("a registration in the store is damaged; it counts as not there");
    }
    read
}

/// Processes by agent, namespace and name.
///
/// # Errors
/// When the store does not answer.
pub async fn entries(store: &Store, asked: &[(&str, &str, &str)]) -> Result<Vec<Entry>, StoreError> {
    let mut batch = Batch::new();
    for (agent, namespace, name) in asked {
        let key = keys::proc_agent(agent);
        let mut get = command("HMGET", &key);
        get.arg(keys::proc_state_field(namespace, name))
            .arg(keys::proc_registration_field(namespace, name));
        batch.push(&key, get);
    }
    let replies = store.run(batch).await?;
    let mut found = Vec::with_capacity(asked.len());
    for reply in replies {
        let mut values = as_array(reply)?.into_iter();
        let mut next = || values.next().map_or(Ok(None), as_bytes);
        let state = next()?.and_then(read_state);
        let registration = next()?.and_then(registration);
        let (state, snapshot) = state.unzip();
        found.push(Entry {
            state,
            snapshot: snapshot.unwrap_or(0),
            registration,
        });
    }
    Ok(found)
}

/// Everything known of agents.
///
/// # Errors
/// When the store does not answer.
pub async fn hosts(store: &Store, agents: &[&str]) -> Result<Vec<Host>, StoreError> {
    let mut batch = Batch::new();
    for agent in agents {
        let key = keys::proc_agent(agent);
        batch.push(&key, command("HGETALL", &key));
    }
    let mut hosts = Vec::with_capacity(agents.len());
    for reply in store.run(batch).await? {
        let mut host = Host::default();
        for (field, value) in as_pairs(reply)? {
            let Ok(field) = std::str::from_utf8(&field) else {
                continue;
            };
            if field == keys::PROC_SNAPSHOT_FIELD {
                host.snapshot = std::str::from_utf8(&value)
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .unwrap_or(0);
                continue;
            }
            let (kind, rest) = field.split_at_checked(1).unwrap_or_default();
            let Some((namespace, name)) = rest.split_once('\0') else {
                continue;
            };
            let entry = host.entries.entry((namespace.to_owned(), name.to_owned())).or_default();
            match kind {
                "s" => {
                    if let Some((state, snapshot)) = read_state(value) {
                        (entry.state, entry.snapshot) = (Some(state), snapshot);
                    }
                }
                "r" => entry.registration = registration(value),
                _ => {}
            }
        }
        host.entries.retain(|_, entry| !entry.is_empty());
        hosts.push(host);
    }
    Ok(hosts)
}

/// Which of the told states are not older than what the store has.
///
/// # Errors
/// When the store does not answer.
pub async fn newest<'a>(
    store: &Store,
    told: &[(&'a AgentId, &'a Process)],
) -> Result<Vec<(AgentId, bool)>, StoreError> {
    // Reports come under the agent's own name, whatever it was called by.
    let asked: Vec<AgentId> = told.iter().map(|(agent, _)| (*agent).clone()).collect();
    let agents = gse_core::fleet::find::resolve(store, &asked).await?;
    let names: Vec<(&str, &str, &str)> = agents
        .iter()
        .zip(told)
        .map(|(agent, (_, process))| {
            let key = process.key.as_ref();
            let part = |part: fn(&Key) -> &str| key.map_or("", part);
            (
                agent.as_str(),
                part(|key| key.namespace.as_str()),
                part(|key| key.name.as_str()),
            )
        })
        .collect();
    let known = entries(store, &names).await?;
    let newest: Vec<bool> = known
        .iter()
        .zip(told)
        .map(|(known, (_, process))| {
            known
                .state
                .as_ref()
                .is_none_or(|state| (process.revision, process.report_time) >= (state.revision, state.report_time))
        })
        .collect();
    Ok(agents.into_iter().zip(newest).collect())
}

/// The registration that a told state stands for is written, if the spec is at hand; or else it is compared later.
pub fn told(writes: &mut Writes, agent: &str, process: &Process, spec: Option<&(Spec, Vec<Label>)>) {
    match spec {
        Some((spec, labels)) if process.revision > 0 && spec_digest(spec) == process.spec_digest => {
            let registration = Registration {
                key: process.key.clone(),
                labels: labels.clone(),
                spec: Some(spec.clone()),
                hosted: process.hosted,
                revision: process.revision,
                register_time: process.register_time,
                was_running: process.pid > 0,
            };
            put(writes, agent, &registration);
        }
        _ => writes.check(agent),
    }
}

/// Writes a registration.
pub fn put(writes: &mut Writes, agent: &str, registration: &Registration) {
    let Some(key) = &registration.key else { return };
    let field = keys::proc_registration_field(&key.namespace, &key.name);
    writes.field(agent, &field, &registration.encode_to_vec());
    writes.index(agent, key);
}

/// Forgets a process of an agent.
pub fn forget(writes: &mut Writes, agent: &str, key: &Key) {
    writes.remove(agent, &keys::proc_registration_field(&key.namespace, &key.name));
    writes.remove(agent, &keys::proc_state_field(&key.namespace, &key.name));
    writes.unindex(agent, key);
}

/// A part of a namespace's index: how many there are, and `agent`, `name` of those from `start` on.
///
/// # Errors
/// When the store does not answer.
pub async fn page(
    store: &Store,
    namespace: &str,
    start: u64,
    limit: usize,
) -> Result<(u64, Vec<(String, String)>), StoreError> {
    let key = keys::proc_index(namespace);
    let mut batch = Batch::new();
    batch.push(&key, command("ZCARD", &key));
    let mut range = command("ZRANGE", &key);
    let last = start.saturating_add(limit as u64).saturating_sub(1);
    range.arg(start.min(i64::MAX as u64)).arg(last.min(i64::MAX as u64));
    if limit > 0 {
        batch.push(&key, range);
    }
    let mut replies = store.run(batch).await?.into_iter();
    let count = replies.next().map_or(Ok(0), as_int)?;
    let mut members = Vec::new();
    for member in replies.next().map_or(Ok(vec![]), as_array)? {
        let member = as_string(member)?.unwrap_or_default();
        if let Some((agent, name)) = member.split_once('\0') {
            members.push((agent.to_owned(), name.to_owned()));
        }
    }
    Ok((u64::try_from(count).unwrap_or(0), members))
}

/// All namespaces that there ever was a process of, in no order.
///
/// # Errors
/// When the store does not answer.
pub async fn namespaces(store: &Store) -> Result<Vec<String>, StoreError> {
    let mut batch = Batch::new();
    batch.push(keys::proc_namespaces(), command("SMEMBERS", keys::proc_namespaces()));
    let reply = store.run(batch).await?.into_iter().next();
    let mut namespaces = Vec::new();
    for namespace in reply.map_or(Ok(vec![]), as_array)? {
        namespaces.extend(as_string(namespace)?);
    }
    Ok(namespaces)
}

/// Takes what has been gone since before `before_ms` (unix ms) off the indexes.
///
/// # Errors
/// When the store does not answer.
pub async fn sweep(store: &Store, before_ms: u64) -> Result<usize, StoreError> {
    let namespaces = namespaces(store).await?;
    let mut batch = Batch::new();
    for namespace in &namespaces {
        let key = keys::proc_gone(namespace);
        let mut range = command("ZRANGEBYSCORE", &key);
        range.arg("-inf").arg(before_ms).arg("LIMIT").arg(0).arg(10_000);
        batch.push(&key, range);
    }
    let mut removals = Batch::new();
    let mut count = 0;
    for (namespace, reply) in namespaces.iter().zip(store.run(batch).await?) {
        let gone = as_array(reply)?;
        if gone.is_empty() {
            continue;
        }
        let (index, list) = (keys::proc_index(namespace), keys::proc_gone(namespace));
        let (mut from_index, mut from_list) = (command("ZREM", &index), command("ZREM", &list));
        for member in gone {
            let member = as_bytes(member)?.unwrap_or_default();
            from_index.arg(&member[..]);
            from_list.arg(&member[..]);
            count += 1;
        }
        removals.push(&index, from_index);
        removals.push(&list, from_list);
    }
    store.run(removals).await?;
    Ok(count)
}

/// Moves everything that is known under one id to another one.
///
/// # Errors
/// When the store does not answer; what was moved is moved, and doing it again does the rest.
pub async fn rename(store: &Store, from: &str, to: &str, now_ms: u64) -> Result<usize, StoreError> {
    let old = keys::proc_agent(from);
    let host = hosts(store, &[from]).await?.pop().unwrap_or_default();
    if host.entries.is_empty() {
        return Ok(0);
    }
    let new = keys::proc_agent(to);
    let mut batch = Batch::new();
    let mut writes = Writes::new(now_ms);
    let mut set = |field: String, value: Vec<u8>| {
        // What the agent has told under its new id is newer.
        let mut cmd = command("HSETNX", &new);
        cmd.arg(field).arg(value);
        batch.push(&new, cmd);
    };
    for ((namespace, name), entry) in &host.entries {
        let key = Key {
            namespace: namespace.clone(),
            name: name.clone(),
        };
        if let Some(registration) = &entry.registration {
            set(
                keys::proc_registration_field(namespace, name),
                registration.encode_to_vec(),
            );
        }
        if let Some(state) = &entry.state {
            let stored = gse_proto::procstore::StoredProcess {
                process: state.encode_to_vec().into(),
                snapshot: 0,
            };
            set(keys::proc_state_field(namespace, name), stored.encode_to_vec());
        }
        writes.index(to, &key);
    }
    writes.check(to);
    store.run(batch).await?;
    store.run(writes.batch()).await?;
    // Only now: whoever dies in between leaves both.
    let mut leaving: HashMap<&str, redis::Cmd> = HashMap::default();
    for (namespace, name) in host.entries.keys() {
        leaving
            .entry(namespace)
            .or_insert_with(|| command("ZREM", keys::proc_index(namespace)))
            .arg(keys::proc_member(from, name));
    }
    let mut batch = Batch::new();
    for (namespace, cmd) in leaving {
        batch.push(keys::proc_index(namespace), cmd);
    }
    batch.push(&old, command("DEL", &old));
    store.run(batch).await?;
    Ok(host.entries.len())
}
