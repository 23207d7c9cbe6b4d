//! Which servers of a service there are: what they say of themselves in the store, read again and again.
//!
//! While the store is away the last list that was read stands. Which node a call goes to is [`super::upstream`]'s.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use gse_core::store::{Batch, Store, StoreError, as_array, as_bytes, as_string};
use gse_proto::keys;
use gse_proto::state::NodeInfo;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::metrics::NodeMetrics;
use super::upstream::{Pool, ServerId};

/// Nodes that are looked at; those renewed last come first.
const MOST_NODES: i64 = 255;
/// Two looks are at least this far apart, however many calls wait for one.
const CLOSEST: Duration = Duration::from_millis(100);

/// A service whose servers are found through the store.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    /// Its name in figures.
    service: &'static str,
    /// What the server is called, and the part of `/readyz`.
    name: &'static str,
    /// Whether there has to be one for gse_api to be ready.
    required: bool,
    /// Key of the sorted set of all of them.
    list: fn() -> &'static str,
    /// Key of what one says of itself.
    info: fn(&str) -> String,
}

/// gse_task.
pub(super) const TASK: Kind = Kind {
    service: "task",
    name: "gse_task",
    required: true,
    list: keys::nodes,
    info: keys::node_info,
};

/// gse_btsvr, which a site may do without.
pub(super) const FILE: Kind = Kind {
    service: "file",
    name: "gse_btsvr",
    required: false,
    list: keys::file_nodes,
    info: keys::file_info,
};

/// gse_procmgr, likewise.
pub(super) const PROC: Kind = Kind {
    service: "proc",
    name: "gse_procmgr",
    required: false,
    list: keys::proc_nodes,
    info: keys::proc_info,
};

/// Keeps the list of servers of a service.
pub(super) struct Nodes {
    kind: Kind,
    pool: Arc<Pool>,
    metrics: NodeMetrics,
    every: Duration,
    wanted: Notify,
    looks: watch::Sender<u64>,
    said: Mutex<Said>,
}

/// What was seen at the last look.
#[derive(Default)]
struct Said {
    /// Why it failed, if it did.
    failure: Option<String>,
    /// Whether any look ever succeeded.
    known: bool,
    /// All names that were there, of dead and stopping nodes too.
    names: BTreeSet<String>,
}

/// What the store says.
struct Seen {
    names: BTreeSet<String>,
    fit: Vec<ServerId>,
}

impl Nodes {
    pub(super) fn new(kind: Kind, pool: Arc<Pool>, metrics: NodeMetrics, every: Duration) -> Self {
        Self {
            kind,
            pool,
            metrics,
            every,
            wanted: Notify::new(),
            looks: watch::Sender::new(0),
            said: Mutex::default(),
        }
    }

    /// Looks for the first time, and from then on until the process drains.
    pub(super) async fn watch(self: Arc<Self>, store: Store, health: Health, life: &Lifecycle) {
        self.look(&store, &health).await;
        let drain = life.drain_token();
        life.spawn("nodes of a service", async move {
            let keep_looking = async {
                loop {
                    tokio::time::sleep(CLOSEST.min(self.every)).await;
                    // One that is wanted has been wanted since the last look began, or later.
                    let pause = self.every.saturating_sub(CLOSEST);
                    if tokio::time::timeout(pause, self.wanted.notified()).await.is_ok() {
                        tracing::debug!(service = self.kind.name, "looking for its nodes before it is time");
                    }
                    self.look(&store, &health).await;
                }
            };
            // None: the process drains.
            let _: Option<()> = drain.run_until_cancelled(keep_looking).await;
        });
    }

    /// Asks for a look soon and waits for its end, at most until `deadline`.
    pub(super) async fn look_soon(&self, deadline: Instant) {
        let mut looks = self.looks.subscribe();
        self.wanted.notify_one();
        // The deadline, or a watcher that has ended: the caller looks at the time itself.
        if !matches!(tokio::time::timeout_at(deadline, looks.changed()).await, Ok(Ok(()))) {
            tokio::time::sleep_until(deadline).await;
        }
    }

    /// A look is wanted, but nobody waits for it.
    pub(super) fn nudge(&self) {
        self.wanted.notify_one();
    }

    /// Whether a call that finds nobody should wait for somebody: not for a service that was never there.
    pub(super) fn may_come(&self) -> bool {
        !self.is_absent(&self.said.lock())
    }

    fn is_absent(&self, said: &Said) -> bool {
        !self.kind.required && said.known && said.names.is_empty()
    }

    /// Why there is nobody to ask, for the caller; the second is whether the store is to blame.
    pub(super) fn nobody(&self) -> (String, bool) {
        let said = self.said.lock();
        let name = self.kind.name;
        match &said.failure {
            Some(_) if !said.known => {
                let text = "as the state store cannot be reached; nothing was done, try again later";
                (format!("the nodes of {name} are not known, {text}"), true)
            }
            None if self.is_absent(&said) => {
                let text = "is not installed here (start it, or set upstreams";
                (format!("{name} {text}.{}); nothing was done", self.kind.service), false)
            }
            _ => {
                let text = "node is alive; start one, or wait until one is back; nothing was done";
                (format!("no {name} {text}"), false)
            }
        }
    }

    async fn look(&self, store: &Store, health: &Health) {
        let name = self.kind.name;
        match read(store, self.kind).await {
            Ok(seen) => self.take(seen, health),
            Err(error) => {
                let mut said = self.said.lock();
                if said.failure.is_none() {
                    tracing::warn!("the nodes of {name} cannot be read, those known stay: {error}");
                }
                if !said.known && self.kind.required {
                    health.set(name, Err(format!("the nodes of {name} are not known: {error}")));
                }
                said.failure = Some(error.to_string());
            }
        }
        self.looks.send_modify(|looks| *looks += 1);
    }

    fn take(&self, seen: Seen, health: &Health) {
        let before = self.pool.ids();
        let Kind { service, name, .. } = self.kind;
        for gone in before.iter().filter(|id| !seen.fit.contains(id)) {
            tracing::info!(
                node = gone.node,
                server = gone.address,
                service,
                "this node gets no more calls"
            );
            self.metrics.of(service, &gone.node).set_up(false);
        }
        for new in seen.fit.iter().filter(|id| !before.contains(id)) {
            tracing::info!(node = new.node, server = new.address, service, "this node gets calls");
        }
        let state = if seen.fit.is_empty() {
            Err(format!("no {name} node is alive, or none has an internal listener"))
        } else {
            Ok(())
        };
        if self.kind.required {
            health.set(name, state);
        }
        self.pool.set(seen.fit, |id| self.metrics.of(service, &id.node));
        let mut said = self.said.lock();
        for name in said.names.difference(&seen.names) {
            self.metrics.forget(service, name);
        }
        *said = Said {
            failure: None,
            known: true,
            names: seen.names,
        };
    }
}

/// Two batches, however many nodes there are.
async fn read(store: &Store, kind: Kind) -> Result<Seen, StoreError> {
    let mut batch = Batch::new();
    let mut cmd = redis::cmd("ZREVRANGE");
    let list = (kind.list)();
    cmd.arg(list).arg(0).arg(MOST_NODES);
    batch.push(list, cmd);
    let listed = store.run(batch).await?.into_iter().next().unwrap_or(redis::Value::Nil);
    let mut names = BTreeSet::new();
    for name in as_array(listed)? {
        if let Some(name) = as_string(name)?
            && (1..=64).contains(&name.len())
            && !name.contains(['{', '}'])
        {
            names.insert(name);
        }
    }
    let mut batch = Batch::new();
    for name in &names {
        let key = (kind.info)(name);
        batch.push(&key, redis::cmd("GET").arg(&key).to_owned());
    }
    let mut fit = Vec::new();
    for (name, info) in names.iter().zip(store.run(batch).await?) {
        if let Some(bytes) = as_bytes(info)?
            && let Some(id) = fit_for_calls(name, bytes)
        {
            fit.push(id);
        }
    }
    Ok(Seen { names, fit })
}

/// The server of a node that takes calls.
fn fit_for_calls(name: &str, info: impl bytes::Buf) -> Option<ServerId> {
    let info = match NodeInfo::decode(info) {
        Ok(info) => info,
        Err(error) => {
            tracing::warn!(node = name, "what a node says of itself does not decode: {error}");
            return None;
        }
    };
    if info.draining || info.calls.is_empty() {
        return None;
    }
    if info.calls.parse::<http::uri::Authority>().is_err() || !info.calls.contains(':') {
        tracing::warn!(node = name, address = ?info.calls, "a node gives an address that is none");
        return None;
    }
    Some(ServerId {
        node: name.to_owned(),
        life: info.life,
        address: info.calls,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_nodes_that_take_calls_at_an_address_are_fit() {
        let info = |calls: &str, draining: bool| {
            let info = NodeInfo {
                node_id: "n".into(),
                life: 7,
                calls: calls.into(),
                draining,
                ..NodeInfo::default()
            };
            fit_for_calls("n", bytes::Bytes::from(info.encode_to_vec()))
        };
        let found = info("10.0.0.1:48329", false).unwrap();
        assert_eq!(
            (found.node.as_str(), found.life, found.address.as_str()),
            ("n", 7, "10.0.0.1:48329")
        );
        assert!(info("[::1]:48329", false).is_some());
        assert!(info("10.0.0.1:48329", true).is_none());
        for bad in ["", "a b:1", "host", "x/y:1"] {
            assert!(info(bad, false).is_none(), "{bad}");
        }
        assert!(fit_for_calls("n", &b"\xff\xff\xff"[..]).is_none());
    }
}
