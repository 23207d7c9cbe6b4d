//! This instance among the others: it says where it is reached, and finds the one that controls a task by the task's id.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use gse_core::store::{Batch, Store, StoreError, as_array, as_bytes, as_string};
use gse_proto::ids::TaskId;
use gse_proto::keys;
use gse_proto::state::NodeInfo;
use prost::Message;
use tokio::time::Instant;

use crate::Node;

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
}

impl Others {
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

async fn read(store: &Store) -> Result<BTreeMap<String, NodeInfo>, StoreError> {
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
    let mut known = BTreeMap::new();
    for (name, reply) in names.into_iter().zip(store.run(batch).await?) {
        if let Some(info) = as_bytes(reply)?.and_then(|bytes| NodeInfo::decode(bytes).ok()) {
            known.insert(TaskId::instance_tag(&name), info);
        }
    }
    Ok(known)
}

/// Says that this instance is there until its tasks have ended; then takes that back.
pub async fn keep(node: Arc<Node>) {
    let lease = Duration::from_millis(node.config.internal.lease_ms);
    let mut drained = false;
    loop {
        if let Err(error) = renew(&node).await {
            tracing::debug!(%error, "this instance can't say that it is there");
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

async fn renew(node: &Node) -> Result<(), StoreError> {
    let id = &node.config.node_id;
    let info = NodeInfo {
        node_id: id.clone(),
        life: node.life_id,
        calls: node.calls_address(),
        agents: node.link_addresses(),
        draining: node.life.is_draining(),
        version: env!("CARGO_PKG_VERSION").into(),
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

/// The secret that keys of swarms are made from: the first instance makes it, all others read it.
///
/// # Errors
/// When the store does not answer.
pub async fn secret(store: &Store, proposal: [u8; 32]) -> Result<Vec<u8>, StoreError> {
    let key = keys::file_secret();
    let mut set = cmd("SET", key);
    set.arg(&proposal[..]).arg("NX");
    let mut batch = Batch::new();
    batch.push(key, set);
    batch.push(key, cmd("GET", key));
    let reply = store.run(batch).await?.into_iter().nth(1);
    let found = reply.map_or(Ok(None), as_bytes)?;
    Ok(found
        .filter(|bytes| bytes.len() >= 32)
        .map_or_else(|| proposal.to_vec(), |bytes| bytes.to_vec()))
}
