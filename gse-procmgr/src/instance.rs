//! This instance among the others: it says that it is there, and takes the tasks of those that are gone.
//!
//! An instance counts as gone when it was missing in several looks that the store has answered: a store that was away makes everybody's
//! say lapse.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use gse_core::store::{Batch, StoreError, as_array, as_bytes, as_string, command};
use gse_proto::keys;
use gse_proto::state::NodeInfo;
use prost::Message;

use crate::Node;
use crate::task::engine;

/// Instances that are looked at; those that were there last come first.
const MOST: i64 = 255;
/// So many looks in a row it has to be missing.
const MISSED: u32 = 3;
/// How long a claim to the tasks of an instance lasts if it is not given up.
const CLAIM_MS: u64 = 30_000;

/// Says that this instance is there, and looks after the others, until it drains; then takes that back.
pub async fn keep(node: Arc<Node>) {
    let lease = Duration::from_millis(node.config.internal.lease_ms);
    let mut missed: BTreeMap<String, u32> = BTreeMap::new();
    loop {
        match renew(&node).await {
            Ok(()) => {
                if let Err(error) = look(&node, &mut missed).await {
                    missed.clear();
                    tracing::debug!(%error, "other instances can't be looked at");
                }
            }
            Err(error) => {
                missed.clear();
                tracing::debug!(%error, "this instance can't say that it is there");
            }
        }
        node.metrics
            .tasks_running
            .set(i64::try_from(node.tasks.len()).unwrap_or(i64::MAX));
        tokio::select! {
            () = node.life.draining() => break,
            () = tokio::time::sleep(lease / 4) => {}
        }
    }
    let mut batch = Batch::new();
    let key = keys::proc_info(&node.config.node_id);
    batch.push(&key, command("DEL", &key));
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
        draining: node.life.is_draining(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..NodeInfo::default()
    };
    let mut batch = Batch::new();
    let key = keys::proc_info(id);
    let mut set = command("SET", &key);
    set.arg(info.encode_to_vec())
        .arg("PX")
        .arg(node.config.internal.lease_ms);
    batch.push(&key, set);
    let mut add = command("ZADD", keys::proc_nodes());
    add.arg(node.clock.unix_ms()).arg(id);
    batch.push(keys::proc_nodes(), add);
    node.store.raw().run(batch).await.map(|_| ())
}

/// Takes the tasks of those that have been missing for long enough.
async fn look(node: &Arc<Node>, missed: &mut BTreeMap<String, u32>) -> Result<(), StoreError> {
    let mut list = command("ZREVRANGE", keys::proc_nodes());
    list.arg(0).arg(MOST);
    let mut batch = Batch::new();
    batch.push(keys::proc_nodes(), list);
    let listed = node.store.raw().run(batch).await?.into_iter().next();
    let mut names = Vec::new();
    for name in listed.map_or(Ok(vec![]), as_array)? {
        names.extend(as_string(name)?.filter(|name| *name != node.config.node_id));
    }
    let mut batch = Batch::new();
    for name in &names {
        let key = keys::proc_info(name);
        batch.push(&key, command("GET", &key));
    }
    let replies = node.store.raw().run(batch).await?;
    missed.retain(|name, _| names.contains(name));
    for (name, reply) in names.into_iter().zip(replies) {
        if as_bytes(reply)?.is_some() {
            missed.remove(&name);
            continue;
        }
        let count = missed.entry(name.clone()).or_insert(0);
        *count += 1;
        if *count >= MISSED {
            take_over(node, &name).await?;
        }
    }
    Ok(())
}

async fn take_over(node: &Arc<Node>, gone: &str) -> Result<(), StoreError> {
    if node.life.is_draining() {
        return Ok(());
    }
    if node.store.unfinished(gone).await?.is_empty() {
        // Nothing of it is left: it is not looked at any more until it is back.
        let mut remove = command("ZREM", keys::proc_nodes());
        remove.arg(gone);
        let mut batch = Batch::new();
        batch.push(keys::proc_nodes(), remove);
        return node.store.raw().run(batch).await.map(|_| ());
    }
    let key = keys::proc_claim(gone);
    let mut set = command("SET", &key);
    set.arg(&node.config.node_id).arg("NX").arg("PX").arg(CLAIM_MS);
    let mut batch = Batch::new();
    batch.push(&key, set);
    batch.push(&key, command("GET", &key));
    let holder = node.store.raw().run(batch).await?.into_iter().nth(1);
    let holder = holder.map_or(Ok(None), as_string)?;
    if holder.as_deref() != Some(node.config.node_id.as_str()) {
        return Ok(());
    }
    let count = engine::take_up(node, gone).await?;
    if count > 0 {
        node.metrics.tasks_taken_over.inc_by(count as u64);
        tracing::info!(
            tasks = count,
            instance = gone,
            "tasks of an instance that is gone are taken over"
        );
    }
    let mut batch = Batch::new();
    batch.push(&key, command("DEL", &key));
    node.store.raw().run(batch).await.map(|_| ())
}
