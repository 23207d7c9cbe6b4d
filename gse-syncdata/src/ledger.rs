//! Which host is how far: what is to be on it, what was put there, and what is to be done about the difference. A pure type: no store, no
//! socket, no clock.
//!
//! A host is in step, or due at some time, or waits for its agent, or is being asked. A try whose end nobody knows is repeated as the same
//! order, which the agent carries out once; a try that failed is followed by another order after a pause that doubles.

mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use crate::identity::{Hash, Identity, Os};
use bytes::Bytes;
use gse_core::random::HashMap;
use gse_proto::ids::AgentId;
use gse_proto::sync::HostState;

use self::types::task_id;
pub use self::types::{Counts, End, Gone, Job, Pauses, Wanted};

/// Full passes one after the other in which a host has to be missing before it is forgotten: pages of a pass shift while hosts are
/// added and removed.
const MISSED: u8 = 2;

/// What was put on a host.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pushed {
    digest: Hash,
    ms: u64,
    to: String,
    epoch: Bytes,
    path: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    InStep,
    /// Its content is on its way to the store.
    Unwritten,
    Due(u64),
    Waiting,
    Asked,
}

#[derive(Debug, Clone)]
struct Host {
    agents: Vec<AgentId>,
    os: Os,
    host_id: u64,
    digest: Hash,
    size: u32,
    changed_ms: u64,
    pushed: Option<Pushed>,
    tried_ms: u64,
    code: i32,
    message: String,
    tries: u32,
    /// Tries without a known end since the last one with.
    unsure: u32,
    phase: Phase,
    /// Its content is not in the store yet.
    unwritten: bool,
    /// The last pass that has found it, and how many have not since.
    pass: u64,
    missed: u8,
    /// When it was told last.
    seq: u64,
}

/// All hosts.
#[derive(Debug)]
pub struct Ledger {
    hosts: BTreeMap<Arc<str>, Host>,
    by_id: HashMap<u64, Arc<str>>,
    due: BTreeSet<(u64, Arc<str>)>,
    waiting: BTreeSet<Arc<str>>,
    asked: usize,
    failed: usize,
    /// Hosts that were removed while a pass was under way.
    gone: HashMap<Arc<str>, u64>,
    seq: u64,
    /// The pass that is under way.
    pass: Option<u64>,
    passes: u64,
    pauses: Pauses,
    max_hosts: usize,
}

fn digest_of(bytes: &Bytes) -> Option<Hash> {
    bytes.as_ref().try_into().ok()
}

impl Ledger {
    /// One without hosts.
    #[must_use]
    pub fn new(pauses: Pauses, max_hosts: usize) -> Self {
        Self {
            hosts: BTreeMap::new(),
            by_id: HashMap::default(),
            due: BTreeSet::new(),
            waiting: BTreeSet::new(),
            asked: 0,
            failed: 0,
            gone: HashMap::default(),
            seq: 0,
            pass: None,
            passes: 0,
            pauses,
            max_hosts,
        }
    }

    /// Takes a host up as it was stored; false if that is of no use.
    pub fn load(&mut self, key: &str, state: HostState, now_ms: u64) -> bool {
        let agents: Vec<AgentId> = state.agents.iter().filter_map(|id| AgentId::parse(id).ok()).collect();
        let Some(digest) = digest_of(&state.digest) else {
            return false;
        };
        if agents.first().is_none_or(|first| first.as_str() != key) {
            return false;
        }
        let pushed = digest_of(&state.pushed_digest).map(|digest| Pushed {
            digest,
            ms: state.pushed_ms,
            to: state.pushed_to,
            epoch: state.pushed_epoch,
            path: state.path,
        });
        let key: Arc<str> = key.into();
        let phase = if pushed.as_ref().is_some_and(|pushed| pushed.digest == digest) {
            Phase::InStep
        } else if state.code == 0 {
            Phase::Due(now_ms)
        } else {
            Phase::Due(state.tried_ms.saturating_add(self.pauses.after(state.tries)))
        };
        let host = Host {
            agents,
            os: Os::parse(&state.os),
            host_id: state.host_id,
            digest,
            size: state.size,
            changed_ms: state.changed_ms,
            pushed,
            tried_ms: state.tried_ms,
            code: state.code,
            message: state.message,
            tries: state.tries,
            unsure: 0,
            phase,
            unwritten: false,
            pass: 0,
            missed: 0,
            seq: 0,
        };
        if host.host_id != 0 {
            self.by_id.insert(host.host_id, Arc::clone(&key));
        }
        self.failed += usize::from(host.code != 0);
        if let Phase::Due(at) = phase {
            self.due.insert((at, Arc::clone(&key)));
        }
        self.hosts.insert(key, host);
        true
    }

    /// What a page says that is asked for now is older than what comes from now on.
    pub fn ask(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }

    /// Takes what the source says of a host; `asked`: it was asked for at that time, otherwise it is news.
    pub fn want(&mut self, identity: &Identity, asked: Option<u64>, now_ms: u64) -> Wanted {
        self.seq += 1;
        let (news, pass) = (self.seq, self.pass.unwrap_or_default());
        let seq = asked.unwrap_or(news);
        let key: Arc<str> = identity.key().into();
        if self.gone.get(&key).is_some_and(|gone| *gone > seq) {
            return Wanted::Stale;
        }
        let before = match self.by_id.get(&identity.host_id) {
            Some(known) if identity.host_id != 0 && *known != key => Some(Arc::clone(known)),
            _ => None,
        };
        let newer = |key: &Arc<str>| self.hosts.get(key).is_some_and(|host| host.seq > seq);
        if before.as_ref().is_some_and(newer) {
            return Wanted::Stale;
        }
        if let Some(host) = self.hosts.get_mut(&key) {
            let other = host.host_id != identity.host_id && host.host_id != 0;
            if other && asked.is_some() && host.pass == pass {
                return Wanted::Stale;
            }
            (host.pass, host.missed) = (pass, 0);
            if host.seq > seq {
                return Wanted::Stale;
            }
            host.seq = seq;
            let same = host.digest == identity.digest
                && host.agents == identity.agents
                && host.os == identity.os
                && host.host_id == identity.host_id;
            if same && before.is_none() {
                return Wanted::Same;
            }
            let (changed, old_id) = (host.digest != identity.digest, host.host_id);
            host.agents.clone_from(&identity.agents);
            host.os = identity.os;
            host.host_id = identity.host_id;
            host.digest = identity.digest;
            host.size = u32::try_from(identity.content.len()).unwrap_or(u32::MAX);
            if changed {
                host.changed_ms = now_ms.max(host.changed_ms + 1);
            }
            if old_id != identity.host_id && self.by_id.get(&old_id) == Some(&key) {
                self.by_id.remove(&old_id);
            }
            if changed {
                host.unwritten = true;
                self.start_anew(&key, now_ms);
            }
        } else {
            if self.hosts.len() >= self.max_hosts {
                return Wanted::Full;
            }
            let host = Host {
                agents: identity.agents.clone(),
                os: identity.os,
                host_id: identity.host_id,
                digest: identity.digest,
                size: u32::try_from(identity.content.len()).unwrap_or(u32::MAX),
                changed_ms: now_ms,
                pushed: None,
                tried_ms: 0,
                code: 0,
                message: String::new(),
                tries: 0,
                unsure: 0,
                phase: Phase::Unwritten,
                unwritten: true,
                pass,
                missed: 0,
                seq,
            };
            self.hosts.insert(Arc::clone(&key), host);
        }
        if identity.host_id != 0 {
            self.by_id.insert(identity.host_id, Arc::clone(&key));
        }
        Wanted::New {
            before: before.and_then(|before| self.drop_host(&before)),
        }
    }

    /// A try of now, whatever was before; a host that is being asked is due when that has ended.
    fn start_anew(&mut self, key: &Arc<str>, now_ms: u64) {
        if let Some(host) = self.hosts.get_mut(key) {
            self.failed -= usize::from(host.code != 0);
            (host.tries, host.unsure, host.code) = (0, 0, 0);
            host.message = String::new();
        }
        // Its agent is away: that does not change with the content.
        if !self.is_in(key, Phase::Waiting) && !self.is_in(key, Phase::Asked) {
            self.enter(key, Phase::Due(now_ms));
        }
    }

    /// The content of a host is in the store: it may be pushed.
    pub fn written(&mut self, key: &str, now_ms: u64) {
        let Some((key, _)) = self.hosts.get_key_value(key) else {
            return;
        };
        let key = Arc::clone(key);
        if let Some(host) = self.hosts.get_mut(&key) {
            host.unwritten = false;
        }
        if self.is_in(&key, Phase::Unwritten) {
            self.enter(&key, Phase::Due(now_ms));
        }
    }

    fn is_in(&self, key: &str, phase: Phase) -> bool {
        self.hosts.get(key).is_some_and(|host| host.phase == phase)
    }

    fn enter(&mut self, key: &Arc<str>, phase: Phase) {
        let Some(host) = self.hosts.get_mut(key) else { return };
        let phase = match phase {
            Phase::Due(_) if host.unwritten => Phase::Unwritten,
            phase => phase,
        };
        match std::mem::replace(&mut host.phase, phase) {
            Phase::Due(at) => {
                self.due.remove(&(at, Arc::clone(key)));
            }
            Phase::Waiting => {
                self.waiting.remove(key);
            }
            Phase::Asked => self.asked -= 1,
            Phase::InStep | Phase::Unwritten => {}
        }
        match phase {
            Phase::Due(at) => {
                self.due.insert((at, Arc::clone(key)));
            }
            Phase::Waiting => {
                self.waiting.insert(Arc::clone(key));
            }
            Phase::Asked => self.asked += 1,
            Phase::InStep | Phase::Unwritten => {}
        }
    }

    /// Pushes what is known again; false if the host is not known.
    pub fn again(&mut self, key: &str, now_ms: u64) -> bool {
        let Some((key, _)) = self.hosts.get_key_value(key) else {
            return false;
        };
        let key = Arc::clone(key);
        if let Some(host) = self.hosts.get_mut(&key) {
            // Another order than the last one, which the agent may still know.
            host.changed_ms = now_ms.max(host.changed_ms + 1);
            host.pushed = None;
        }
        self.start_anew(&key, now_ms);
        true
    }

    fn drop_host(&mut self, key: &Arc<str>) -> Option<Gone> {
        self.enter(key, Phase::InStep);
        let host = self.hosts.remove(key)?;
        self.failed -= usize::from(host.code != 0);
        if self.by_id.get(&host.host_id) == Some(key) {
            self.by_id.remove(&host.host_id);
        }
        if self.pass.is_some() {
            self.gone.insert(Arc::clone(key), self.seq);
        }
        let others = host.agents.iter().skip(1);
        Some(Gone {
            key: key.to_string(),
            others: others.map(|name| name.as_str().to_owned()).collect(),
        })
    }

    /// The source has no such host any more; what it was known by.
    pub fn forget(&mut self, host_id: u64, keys: &[&str]) -> Vec<Gone> {
        self.seq += 1;
        let by_id = (host_id != 0).then(|| self.by_id.get(&host_id).cloned()).flatten();
        let known = keys
            .iter()
            .filter_map(|key| self.hosts.get_key_value(*key).map(|(key, _)| Arc::clone(key)));
        let found: BTreeSet<Arc<str>> = by_id.into_iter().chain(known).collect();
        found.iter().filter_map(|key| self.drop_host(key)).collect()
    }

    /// A full pass begins.
    pub fn begin_pass(&mut self) {
        self.passes += 1;
        self.pass = Some(self.passes);
        self.gone.clear();
    }

    /// It has ended; if it has found everything, those that were missing are counted, and those that are gone are dropped; what they were known by.
    /// `at_once`: once is enough.
    pub fn end_pass(&mut self, whole: bool, at_once: bool) -> Vec<Gone> {
        let Some(pass) = self.pass else { return vec![] };
        let mut gone = Vec::new();
        if whole {
            for (key, host) in &mut self.hosts {
                if host.pass != pass {
                    host.missed = host.missed.saturating_add(1);
                    if at_once || host.missed >= MISSED {
                        gone.push(Arc::clone(key));
                    }
                }
            }
        }
        let gone = gone.iter().filter_map(|key| self.drop_host(key)).collect();
        self.pass = None;
        self.gone.clear();
        gone
    }

    /// Takes what is due: at most so many, with at most so many bytes, but one in any case.
    pub fn take_due(&mut self, now_ms: u64, most: usize, most_bytes: usize) -> Vec<Job> {
        let (mut jobs, mut bytes) = (Vec::new(), 0);
        while jobs.len() < most {
            let Some((at, key)) = self.due.first().cloned() else {
                break;
            };
            if at > now_ms {
                break;
            }
            let Some(host) = self.hosts.get(&key) else {
                self.due.pop_first();
                continue;
            };
            bytes += host.size as usize;
            if bytes > most_bytes && !jobs.is_empty() {
                break;
            }
            jobs.push(Job {
                agents: host.agents.clone(),
                os: host.os,
                digest: host.digest,
                size: host.size,
                task_id: task_id(&key, &host.digest, host.changed_ms),
                order: host.tries,
                key: Arc::clone(&key),
            });
            self.enter(&key, Phase::Asked);
        }
        jobs
    }

    /// When something is due next.
    #[must_use]
    pub fn next_due(&self) -> Option<u64> {
        self.due.first().map(|(at, _)| *at)
    }

    /// A try has ended; `spread` (0 to 1) keeps those that fail together from being tried together.
    pub fn end(&mut self, job: &Job, end: End, now_ms: u64, spread: f64) {
        let pauses = self.pauses;
        let Some(host) = self.hosts.get_mut(&job.key) else {
            return;
        };
        if host.phase != Phase::Asked {
            return;
        }
        let current = job.task_id == task_id(&job.key, &host.digest, host.changed_ms);
        host.tried_ms = now_ms;
        let was_failed = host.code != 0;
        let pause = |tries| {
            let pause = pauses.after(tries);
            now_ms + pause - (pause as f64 * 0.3 * spread) as u64
        };
        let phase = match end {
            End::Placed { to, epoch, path } => {
                host.pushed = Some(Pushed {
                    digest: job.digest,
                    ms: now_ms,
                    to,
                    epoch,
                    path,
                });
                (host.tries, host.unsure, host.code) = (0, 0, 0);
                host.message = String::new();
                Phase::InStep
            }
            End::Failed { code, message } => {
                (host.code, host.message, host.unsure) = (code, message, 0);
                let at = pause(host.tries);
                host.tries = host.tries.saturating_add(1);
                Phase::Due(at)
            }
            End::Unsure(message) => {
                host.message = message;
                let at = pause(host.unsure);
                host.unsure = host.unsure.saturating_add(1);
                Phase::Due(at)
            }
            End::Away => Phase::Waiting,
        };
        if !current {
            // What is to be there has changed meanwhile.
            (host.tries, host.unsure, host.code) = (0, 0, 0);
        }
        self.failed = self.failed + usize::from(host.code != 0) - usize::from(was_failed);
        let phase = match phase {
            Phase::Waiting => Phase::Waiting,
            _ if !current => Phase::Due(now_ms),
            phase => phase,
        };
        self.enter(&Arc::clone(&job.key), phase);
    }

    /// An agent of the host is connected; it is due if it has waited for that, or if this is not the agent that has the file.
    pub fn seen(&mut self, key: &str, agent: &str, epoch: &[u8], now_ms: u64) -> bool {
        let Some((key, host)) = self.hosts.get_key_value(key) else {
            return false;
        };
        let wanted = match host.phase {
            Phase::Waiting => true,
            Phase::InStep => host.pushed.as_ref().is_some_and(|pushed| {
                pushed.to != agent || (!epoch.is_empty() && !pushed.epoch.is_empty() && pushed.epoch != epoch)
            }),
            Phase::Due(_) | Phase::Asked | Phase::Unwritten => false,
        };
        if wanted {
            let key = Arc::clone(key);
            self.enter(&key, Phase::Due(now_ms));
        }
        wanted
    }

    /// Some of those that wait for their agents, after `after`.
    #[must_use]
    pub fn waiting_after(&self, after: &str, most: usize) -> Vec<(Arc<str>, Vec<AgentId>)> {
        let range = (Bound::Excluded(after), Bound::Unbounded);
        let some = self.waiting.range::<str, _>(range).take(most);
        some.filter_map(|key| Some((Arc::clone(key), self.hosts.get(key)?.agents.clone())))
            .collect()
    }

    /// Some hosts after `after`.
    #[must_use]
    pub fn hosts_after(&self, after: &str, most: usize) -> Vec<(Arc<str>, Vec<AgentId>)> {
        let range = (Bound::Excluded(after), Bound::Unbounded);
        let some = self.hosts.range::<str, _>(range).take(most);
        some.map(|(key, host)| (Arc::clone(key), host.agents.clone())).collect()
    }

    /// How many hosts are how far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            hosts: self.hosts.len(),
            waiting: self.waiting.len(),
            failed: self.failed,
            open: self.due.len() + self.asked,
        }
    }

    /// A host as it is stored.
    #[must_use]
    pub fn state(&self, key: &str) -> Option<HostState> {
        let host = self.hosts.get(key)?;
        let pushed = host.pushed.as_ref();
        Some(HostState {
            agents: host.agents.iter().map(|id| id.as_str().to_owned()).collect(),
            os: host.os.name().to_owned(),
            host_id: host.host_id,
            digest: Bytes::copy_from_slice(&host.digest),
            size: host.size,
            changed_ms: host.changed_ms,
            pushed_digest: pushed.map_or_else(Bytes::new, |pushed| Bytes::copy_from_slice(&pushed.digest)),
            pushed_ms: pushed.map_or(0, |pushed| pushed.ms),
            pushed_to: pushed.map_or_else(String::new, |pushed| pushed.to.clone()),
            pushed_epoch: pushed.map_or_else(Bytes::new, |pushed| pushed.epoch.clone()),
            path: pushed.map_or_else(String::new, |pushed| pushed.path.clone()),
            tried_ms: host.tried_ms,
            code: host.code,
            message: host.message.clone(),
            tries: host.tries,
        })
    }
}

#[cfg(test)]
mod tests;
