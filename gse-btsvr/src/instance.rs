//! This instance among the others: it says where it is reached, and finds the one that controls a task by the task's id.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use gse_core::store::{Batch, Store, StoreError, as_array, as_bytes, as_string};
use gse_proto::ids::TaskId;
use gse_proto::keys;
use gse_proto::state::NodeInfo;
use parking_lot::Mutex;
use prost::Message;
use tokio::time::Instant;

use crate::Node;
use crate::takeover;

/// Instances that are looked at; those that were there last come first.
const MOST: i64 = 255;
/// What is known of the others is read again after so long.
const FRESH: Duration = Duration::from_secs(2);

/// Living instances by their tags.
type Table = Arc<BTreeMap<String, NodeInfo>>;

/// The other instances.
#[derive(Debug, Default)]
pub struct Others {
    seen: tokio::sync::Mutex<Option<(Instant, Table)>>,
    lease: Mutex<Lease>,
}

/// How this instance's own word that it is there stands.
#[derive(Debug, Default)]
struct Lease {
    renewed: Option<Instant>,
    /// It had lapsed before it was renewed, and nobody has looked at what that means.
    gap: bool,
}

impl Others {
    /// Whether the others take this instance for alive.
    #[must_use]
    pub fn holds_lease(&self, lease: Duration) -> bool {
        self.lease
            .lock()
            .renewed
            .is_some_and(|renewed| renewed.elapsed() < lease)
    }

    /// Whether the lease had lapsed since this was last asked.
    #[must_use]
    pub fn take_gap(&self) -> bool {
        std::mem::take(&mut self.lease.lock().gap)
    }

    /// Notes that the lease was renewed; true for the first time.
    fn renewed(&self, lease: Duration) -> bool {
        let mut own = self.lease.lock();
        let before = own.renewed.replace(Instant::now());
        own.gap |= before.is_some_and(|renewed| renewed.elapsed() >= lease);
        before.is_none()
    }

    /// What is known is read anew the next time.
    pub async fn forget(&self) {
        *self.seen.lock().await = None;
    }

    /// All living instances by their tags.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn all(&self, store: &Store) -> Result<Table, StoreError> {
        let mut seen = self.seen.lock().await;
        if let Some((at, known)) = seen.as_ref()
            && at.elapsed() < FRESH
        {
            return Ok(Arc::clone(known));
        }
        let known = Arc::new(read(store).await?);
        *seen = Some((Instant::now(), Arc::clone(&known)));
        Ok(known)
    }
}

fn cmd(name: &str, key: &str) -> redis::Cmd {
    let mut cmd = redis::cmd(name);
    cmd.arg(key);
    cmd
}

/// All instances, also those that are gone, and whether they say that they are there.
///
/// # Errors
/// When the store does not answer.
pub async fn look(store: &Store) -> Result<Vec<(String, bool)>, StoreError> {
    let found = infos(store).await?.into_iter();
    Ok(found.map(|(name, info)| (name, info.is_some())).collect())
}

/// Whether an instance says that it is there.
///
/// # Errors
/// When the store does not answer.
pub async fn is_there(store: &Store, name: &str) -> Result<bool, StoreError> {
    let key = keys::file_info(name);
    let mut batch = Batch::new();
    batch.push(&key, cmd("GET", &key));
    let reply = store.run(batch).await?.into_iter().next();
    Ok(reply.map_or(Ok(None), as_bytes)?.is_some())
}

async fn read(store: &Store) -> Result<BTreeMap<String, NodeInfo>, StoreError> {
    let found = infos(store).await?.into_iter();
    let alive = found.filter_map(|(name, info)| Some((TaskId::instance_tag(&name), info?)));
    Ok(alive.collect())
}

async fn infos(store: &Store) -> Result<Vec<(String, Option<NodeInfo>)>, StoreError> {
    let mut list = cmd("ZREVRANGE", keys::file_nodes());
    list.arg(0).arg(MOST);
    let mut batch = Batch::new();
    batch.push(keys::file_nodes(), list);
    let listed = store.run(batch).await?.into_iter().next();
    let mut names = Vec::new();
    for name in listed.map_or(Ok(vec![]), as_array)? {
        names.extend(as_string(name)?);
    }
    let mut batch = Batch::new();
    for name in &names {
        let key = keys::file_info(name);
        batch.push(&key, cmd("GET", &key));
    }
    let mut found = Vec::new();
    for (name, reply) in names.into_iter().zip(store.run(batch).await?) {
        found.push((name, as_bytes(reply)?.and_then(|bytes| NodeInfo::decode(bytes).ok())));
    }
    Ok(found)
}

/// Says that this instance is there until its tasks have ended; then takes that back.
pub async fn keep(node: Arc<Node>) {
    let lease = Duration::from_millis(node.config.internal.lease_ms);
    let mut drained = false;
    loop {
        match renew(&node).await {
            Ok(()) => {
                if node.others.renewed(lease) {
                    takeover::unclaim(&node, &node.config.node_id).await;
                }
            }
            Err(error) => tracing::debug!(%error, "this instance can't say that it is there"),
        }
        tokio::select! {
            () = node.life.draining() => {
                if drained {
                    break;
                }
                // Said at once, so that no new call comes here.
                drained = true;
            }
            () = tokio::time::sleep(lease / 4) => {}
        }
    }
    let mut batch = Batch::new();
    let key = keys::file_info(&node.config.node_id);
    batch.push(&key, cmd("DEL", &key));
    if let Err(error) = node.store.raw().run(batch).await {
        tracing::debug!(%error, "this instance can't say that it is gone; that shows by itself");
    }
}

/// Says that this instance is there.
///
/// # Errors
/// When the store does not take it.
pub async fn renew(node: &Node) -> Result<(), StoreError> {
    let id = &node.config.node_id;
    let info = NodeInfo {
        node_id: id.clone(),
        life: node.life_id,
        calls: node.calls_address(),
        agents: node.link_addresses(),
        draining: node.life.is_draining(),
        version: env!("CARGO_PKG_VERSION").into(),
        zone: node.config.zone.name.clone(),
        cloud_areas: node.config.zone.cloud_areas.clone(),
        relay: node.config.zone.relay,
        ..NodeInfo::default()
    };
    let mut batch = Batch::new();
    let key = keys::file_info(id);
    let mut set = cmd("SET", &key);
    set.arg(info.encode_to_vec())
        .arg("PX")
        .arg(node.config.internal.lease_ms);
    batch.push(&key, set);
    let mut add = cmd("ZADD", keys::file_nodes());
    add.arg(node.clock.unix_ms()).arg(id);
    batch.push(keys::file_nodes(), add);
    node.store.raw().run(batch).await.map(|_| ())
}
