//! Last known states of processes in the store: written by gse_task as agents report them and by gse_procmgr from answers of agents, read by
//! gse_procmgr.
//!
//! One hash for each agent, in the slot of its shard; one index for each namespace, in the order in which processes were first seen. What
//! states and registrations mean is gse_procmgr's business.

use bytes::Bytes;
use gse_proto::keys;
use gse_proto::proc::{Key, Process};
use gse_proto::procstore::StoredProcess;
use gse_proto::prost::Message;
use redis::Cmd;

use crate::random::HashMap;
use crate::store::{Batch, command};

/// Writes about processes, gathered so that thousands of agents make few commands.
#[derive(Debug, Default)]
pub struct Writes {
    hashes: HashMap<String, Cmd>,
    removals: HashMap<String, Cmd>,
    /// By namespace: what is in its index, what is back there, what has gone.
    indexed: HashMap<String, (Cmd, Cmd)>,
    gone: HashMap<String, Cmd>,
    namespaces: Option<Cmd>,
    check: Option<Cmd>,
    now_ms: u64,
}

impl Writes {
    /// Nothing yet; `now_ms` is when it is written (unix ms).
    #[must_use]
    pub fn new(now_ms: u64) -> Self {
        Self {
            now_ms,
            ..Self::default()
        }
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty() && self.removals.is_empty() && self.gone.is_empty() && self.check.is_none()
    }

    /// A field of an agent's hash.
    pub fn field(&mut self, agent: &str, field: &str, value: &[u8]) {
        let key = keys::proc_agent(agent);
        let cmd = self.hashes.entry(key).or_insert_with_key(|key| command("HSET", key));
        cmd.arg(field).arg(value);
    }

    /// The state of a process; `snapshot`: of which it is part, 0 if it is a change.
    pub fn state(&mut self, agent: &str, process: &Process, snapshot: u64) {
        let Some(key) = &process.key else { return };
        let stored = StoredProcess {
            process: process.encode_to_vec().into(),
            snapshot,
        };
        let field = keys::proc_state_field(&key.namespace, &key.name);
        self.field(agent, &field, &stored.encode_to_vec());
        self.index(agent, key);
    }

    /// A process has a place in its namespace's index.
    pub fn index(&mut self, agent: &str, key: &Key) {
        let member = keys::proc_member(agent, &key.name);
        if !self.indexed.contains_key(&key.namespace) {
            let mut add = command("ZADD", keys::proc_index(&key.namespace));
            add.arg("NX");
            let back = command("ZREM", keys::proc_gone(&key.namespace));
            self.indexed.insert(key.namespace.clone(), (add, back));
            self.namespaces
                .get_or_insert_with(|| command("SADD", keys::proc_namespaces()))
                .arg(&key.namespace);
        }
        if let Some((add, back)) = self.indexed.get_mut(&key.namespace) {
            add.arg(self.now_ms).arg(&member);
            back.arg(&member);
        }
    }

    /// Takes fields out of an agent's hash.
    pub fn remove(&mut self, agent: &str, field: &str) {
        let key = keys::proc_agent(agent);
        let cmd = self.removals.entry(key).or_insert_with_key(|key| command("HDEL", key));
        cmd.arg(field);
    }

    /// A process leaves its namespace's index in a while.
    pub fn unindex(&mut self, agent: &str, key: &Key) {
        let now_ms = self.now_ms;
        let cmd = self
            .gone
            .entry(key.namespace.clone())
            .or_insert_with_key(|namespace| command("ZADD", keys::proc_gone(namespace)));
        cmd.arg(now_ms).arg(keys::proc_member(agent, &key.name));
    }

    /// Registrations of an agent are to be compared.
    pub fn check(&mut self, agent: &str) {
        self.check
            .get_or_insert_with(|| command("SADD", keys::proc_check()))
            .arg(agent);
    }

    /// All of it. Where it is written in parts, indexes come after what they lead to, and agents are compared last.
    #[must_use]
    pub fn batch(self) -> Batch {
        let mut batch = Batch::new();
        for (key, cmd) in self.removals.into_iter().chain(self.hashes) {
            batch.push(&key, cmd);
        }
        for (namespace, cmd) in self.gone {
            batch.push(keys::proc_gone(&namespace), cmd);
        }
        for (namespace, (add, back)) in self.indexed {
            batch.push(keys::proc_index(&namespace), add);
            batch.push(keys::proc_gone(&namespace), back);
        }
        if let Some(cmd) = self.namespaces {
            batch.push(keys::proc_namespaces(), cmd);
        }
        if let Some(cmd) = self.check {
            batch.push(keys::proc_check(), cmd);
        }
        batch
    }
}

/// A stored state; `None` when it is damaged, as if it were not there.
#[must_use]
pub fn read_state(bytes: Bytes) -> Option<(Process, u64)> {
    let stored = StoredProcess::decode(bytes).ok()?;
    Some((Process::decode(stored.process).ok()?, stored.snapshot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_commands_for_many_agents_and_values_read_back() {
        let mut writes = Writes::new(7);
        assert!(writes.is_empty());
        let mut process = Process {
            pid: 12,
            known: true,
            ..Process::default()
        };
        for n in 0..100 {
            process.key = Some(Key {
                namespace: format!("n{}", n % 2),
                name: "p".into(),
            });
            writes.state(&format!("agent{}", n / 2), &process, 3);
            writes.check("agent0");
        }
        // A hash for each agent, two for each index, the namespaces, what is to be compared.
        assert_eq!(writes.batch().len(), 50 + 4 + 1 + 1);
        let stored = StoredProcess {
            process: process.encode_to_vec().into(),
            snapshot: 9,
        };
        assert_eq!(read_state(stored.encode_to_vec().into()), Some((process, 9)));
        assert_eq!(read_state(Bytes::from_static(b"\xff")), None);
    }
}
