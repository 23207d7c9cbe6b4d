//! Who is connected to this node: sessions by agent id, and the `cloud:ip` names that lead to them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use bytes::Bytes;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use gse_core::random::Hashing;
use gse_proto::ids::{AgentId, CloudId};
use gse_proto::session::Hello;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::outbox::{CloseReason, Outbox};

/// Coarse monotonic seconds, for stamps that a sweep compares.
#[derive(Debug, Clone, Copy)]
pub struct Ticks(Instant);

impl Ticks {
    /// Starts counting.
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Whole seconds since the start.
    #[must_use]
    pub fn now(self) -> u32 {
        u32::try_from(self.0.elapsed().as_secs()).unwrap_or(u32::MAX)
    }
}

/// One connected agent. Kept small: there is one for every host of the fleet.
#[derive(Debug)]
pub struct Session {
    /// Unique on this node.
    pub id: u64,
    /// Whose it is.
    pub agent: AgentId,
    /// From the hello.
    pub cloud: CloudId,
    /// The host, to tell its return from a clone of it.
    pub host: HostIdentity,
    /// The agent's journal.
    pub epoch: Bytes,
    /// `cloud:ip` names that this session may be called by.
    pub aliases: Box<[Box<str>]>,
    /// As the server sees it.
    pub peer: SocketAddr,
    /// What waits to be written.
    pub outbox: Outbox,
    opened: Instant,
    epoch_since_ms: AtomicU64,
    last_seen: AtomicU32,
    last_pong: AtomicU64,
    ponged: Notify,
}

/// Machine and boot id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostIdentity {
    /// `/etc/machine-id`.
    pub machine: Box<str>,
    /// Changes at each boot.
    pub boot: Box<str>,
}

impl Session {
    /// Makes the session of an accepted hello.
    #[must_use]
    pub fn new(id: u64, agent: AgentId, hello: &Hello, peer: SocketAddr, outbox: Outbox, now: u32) -> Self {
        let cloud = CloudId(hello.cloud_id);
        let aliases = hello
            .addresses
            .iter()
            .filter_map(|text| text.parse().ok())
            .map(|ip| AgentId::from_cloud_ip(cloud, ip))
            .filter(|alias| *alias != agent)
            .map(|alias| alias.as_str().into())
            .collect();
        Self {
            id,
            cloud,
            host: HostIdentity {
                machine: hello.machine_id.as_str().into(),
                boot: hello.boot_id.as_str().into(),
            },
            // Detached from the read buffer that the hello came in.
            epoch: Bytes::copy_from_slice(&hello.journal_epoch),
            aliases,
            peer,
            outbox,
            opened: Instant::now(),
            epoch_since_ms: AtomicU64::new(u64::MAX),
            last_seen: AtomicU32::new(now),
            last_pong: AtomicU64::new(0),
            ponged: Notify::new(),
            agent,
        }
    }

    /// Notes since when (unix ms) the agent's journal has been the one it has.
    pub fn journal_known_since(&self, unix_ms: u64) {
        self.epoch_since_ms.store(unix_ms, Ordering::Release);
    }

    /// Since when (unix ms) the agent's journal has been the one it has; `None`: that has not been read yet.
    #[must_use]
    pub fn epoch_since(&self) -> Option<u64> {
        let since = self.epoch_since_ms.load(Ordering::Acquire);
        (since != u64::MAX).then_some(since)
    }

    /// How long it has been open.
    #[must_use]
    pub fn age(&self) -> std::time::Duration {
        self.opened.elapsed()
    }

    /// Stamps a sign of life.
    pub fn touch(&self, now: u32) {
        self.last_seen.store(now, Ordering::Relaxed);
    }

    /// Second of the last sign of life.
    #[must_use]
    pub fn last_seen(&self) -> u32 {
        self.last_seen.load(Ordering::Relaxed)
    }

    /// Notes the answer to a probe.
    pub fn pong(&self, nonce: u64) {
        self.last_pong.store(nonce, Ordering::Release);
        self.ponged.notify_waiters();
    }

    /// Waits until the probe `nonce` is answered; the caller sets the deadline.
    pub async fn answered(&self, nonce: u64) {
        loop {
            let ponged = self.ponged.notified();
            tokio::pin!(ponged);
            ponged.as_mut().enable();
            if self.last_pong.load(Ordering::Acquire) == nonce {
                return;
            }
            ponged.await;
        }
    }
}

/// The sessions of this node.
#[derive(Debug, Default)]
pub struct Registry {
    sessions: DashMap<AgentId, Arc<Session>, Hashing>,
    aliases: DashMap<Box<str>, AgentId, Hashing>,
}

impl Registry {
    /// The session of an agent id.
    #[must_use]
    pub fn get(&self, agent: &AgentId) -> Option<Arc<Session>> {
        self.sessions.get(agent).map(|entry| Arc::clone(entry.value()))
    }

    /// The session that a caller means by `asked`: an agent id, or `cloud:ip` of a host.
    #[must_use]
    pub fn find(&self, asked: &AgentId) -> Option<Arc<Session>> {
        if let Some(session) = self.get(asked) {
            return Some(session);
        }
        asked.cloud_ip()?;
        let agent = self.aliases.get(asked.as_str()).map(|entry| entry.value().clone())?;
        self.get(&agent)
    }

    /// Puts a session in the place of `expected` (the session seen before, or none). `Err` hands back what is there instead:
    /// somebody was faster.
    ///
    /// # Errors
    /// The session that holds the id now, or `None` when the expected one has gone.
    pub fn replace(&self, session: &Arc<Session>, expected: Option<&Arc<Session>>) -> Result<(), Option<Arc<Session>>> {
        match self.sessions.entry(session.agent.clone()) {
            Entry::Occupied(mut entry) => match expected {
                Some(old) if Arc::ptr_eq(entry.get(), old) => {
                    old.outbox.close(CloseReason::Replaced);
                    entry.insert(Arc::clone(session));
                }
                _ => return Err(Some(Arc::clone(entry.get()))),
            },
            Entry::Vacant(entry) => {
                if expected.is_some() {
                    return Err(None);
                }
                entry.insert(Arc::clone(session));
            }
        }
        for alias in &session.aliases {
            self.claim(alias, &session.agent);
        }
        Ok(())
    }

    /// Gives a `cloud:ip` name to an agent, unless another connected agent has it: addresses are only claimed by agents, ids are
    /// proven by certificates, so a claim never takes a name away from a live holder.
    fn claim(&self, alias: &str, agent: &AgentId) {
        match self.aliases.entry(alias.into()) {
            Entry::Vacant(entry) => {
                entry.insert(agent.clone());
            }
            Entry::Occupied(mut entry) => {
                if entry.get() == agent {
                    return;
                }
                if self.sessions.contains_key(entry.get()) {
                    tracing::warn!(%agent, alias, holder = %entry.get(), "address is claimed by two connected agents; the first one keeps the name");
                } else {
                    entry.insert(agent.clone());
                }
            }
        }
    }

    /// Which agent a connected `cloud:ip` name leads to.
    #[must_use]
    pub fn alias_holder(&self, alias: &str) -> Option<AgentId> {
        self.aliases.get(alias).map(|entry| entry.value().clone())
    }

    /// Takes a session out, if it is still the one of its agent. True when it was.
    pub fn remove(&self, session: &Arc<Session>) -> bool {
        let removed = self
            .sessions
            .remove_if(&session.agent, |_, there| Arc::ptr_eq(there, session))
            .is_some();
        if removed {
            for alias in &session.aliases {
                self.aliases.remove_if(alias, |_, holder| *holder == session.agent);
            }
        }
        removed
    }

    /// How many agents are connected.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether nobody is connected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Calls `f` for every session; `f` must not touch the registry.
    pub fn each(&self, mut f: impl FnMut(&Arc<Session>)) {
        for entry in &self.sessions {
            f(entry.value());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(id: u64, agent: &str, addresses: &[&str]) -> Arc<Session> {
        let hello = Hello {
            addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
            ..Default::default()
        };
        let agent = AgentId::parse(agent).unwrap();
        Arc::new(Session::new(
            id,
            agent,
            &hello,
            "127.0.0.1:1".parse().unwrap(),
            Outbox::new(8, 1 << 16),
            0,
        ))
    }

    #[test]
    fn found_by_id_and_by_address() {
        // contract: v2-http-task#10
        let registry = Registry::default();
        let one = session(1, "agent-one", &["10.0.0.1", "fe80::1", "not an address"]);
        registry.replace(&one, None).unwrap();
        for name in ["agent-one", "0:10.0.0.1", "0:fe80::1"] {
            assert_eq!(
                registry.find(&AgentId::parse(name).unwrap()).map(|s| s.id),
                Some(1),
                "{name}"
            );
        }
        assert!(registry.find(&AgentId::parse("1:10.0.0.1").unwrap()).is_none());
        assert!(registry.remove(&one));
        assert!(registry.find(&AgentId::parse("0:10.0.0.1").unwrap()).is_none());
    }

    #[test]
    fn a_live_holder_keeps_its_address() {
        let registry = Registry::default();
        let one = session(1, "agent-one", &["10.0.0.1"]);
        let thief = session(2, "agent-two", &["10.0.0.1"]);
        registry.replace(&one, None).unwrap();
        registry.replace(&thief, None).unwrap();
        let name = AgentId::parse("0:10.0.0.1").unwrap();
        assert_eq!(registry.find(&name).map(|s| s.id), Some(1));
        assert!(registry.remove(&thief));
        assert_eq!(registry.find(&name).map(|s| s.id), Some(1));
    }

    #[test]
    fn only_the_session_that_was_looked_at_is_replaced() {
        let registry = Registry::default();
        let (one, two, three) = (session(1, "a", &[]), session(2, "a", &[]), session(3, "a", &[]));
        registry.replace(&one, None).unwrap();
        assert_eq!(registry.replace(&two, None).unwrap_err().map(|s| s.id), Some(1));
        registry.replace(&two, Some(&one)).unwrap();
        assert_eq!(one.outbox.closed(), Some(CloseReason::Replaced));
        assert_eq!(registry.replace(&three, Some(&one)).unwrap_err().map(|s| s.id), Some(2));
        assert!(
            !registry.remove(&one),
            "a session that was replaced must not take its successor away"
        );
        assert_eq!(registry.len(), 1);
    }
}
