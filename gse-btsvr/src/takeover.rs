//! Tasks of instances that are gone: another one goes on with them.
//!
//! An unfinished task is on the list of its instance and names that in its header. Taking it over means: on the own list first, then
//! the header, then it is read from the store and gone on with as after a restart, then off the other list. Agents are given their
//! open orders again and report to whoever has asked last. If two instances should ever have a task for a while (one was paused and
//! comes back), nothing goes wrong but work: an order is taken once, and rows that are over never change.
//!
//! An instance is taken for dead when it was missing in several looks in a row that the store has answered while the looking one's own
//! lease was in order. A store that was away makes everybody's lapse, and nobody is taken for dead because of that.

use std::sync::Arc;
use std::time::Duration;

use gse_core::random::HashMap;
use gse_core::store::{Batch, StoreError, as_bytes, as_float};
use gse_proto::keys;
use tokio::time::Instant;

use crate::Node;
use crate::instance;
use crate::task::engine;

/// How long a claim to an instance's tasks lasts if it is not given up.
const CLAIM: Duration = Duration::from_secs(30);
/// Looks in which an instance has to be missing.
const MISSING: u32 = 3;
/// An instance that has been gone for so long, without tasks, is taken off the list.
const FORGET: Duration = Duration::from_secs(3600);

fn command(name: &str, key: &str) -> redis::Cmd {
    let mut command = redis::cmd(name);
    command.arg(key);
    command
}

/// Claims the tasks of an instance; false while another one has them.
///
/// # Errors
/// When the store does not answer.
pub async fn claim(node: &Node, of: &str) -> Result<bool, StoreError> {
    let key = keys::file_claim(of);
    let mut set = command("SET", &key);
    set.arg(format!("{}/{}", node.config.node_id, node.life_id))
        .arg("NX")
        .arg("PX")
        .arg(u64::try_from(CLAIM.as_millis()).unwrap_or(u64::MAX));
    let mut batch = Batch::new();
    batch.push(&key, set);
    batch.push(&key, command("GET", &key));
    let holder = node.store.raw().run(batch).await?.into_iter().nth(1);
    // An earlier life of this instance that died with the claim does not need it any more.
    let ours = format!("{}/", node.config.node_id);
    Ok(holder
        .map_or(Ok(None), as_bytes)?
        .is_some_and(|holder| holder.starts_with(ours.as_bytes())))
}

/// Gives a claim up, only after [`claim`]: whose it is is not looked at again. If the store does not take it, it lapses by itself.
pub async fn unclaim(node: &Node, of: &str) {
    let key = keys::file_claim(of);
    let mut batch = Batch::new();
    batch.push(&key, command("DEL", &key));
    if let Err(error) = node.store.raw().run(batch).await {
        tracing::debug!(%error, "a claim is not given up; it lapses by itself");
    }
}

/// Looks for instances that are gone until this one drains.
pub async fn watch(node: Arc<Node>) {
    let lease = Duration::from_millis(node.config.internal.lease_ms);
    let mut missing: HashMap<String, u32> = HashMap::default();
    loop {
        tokio::select! {
            () = node.life.draining() => return,
            () = tokio::time::sleep(lease / 4) => {}
        }
        if !node.others.holds_lease(lease) {
            missing.clear();
            continue;
        }
        if node.others.take_gap() {
            missing.clear();
            after_gap(&node).await;
        }
        if let Err(error) = look(&node, &mut missing).await {
            tracing::debug!(%error, "whether other instances are there can't be seen");
            missing.clear();
        }
    }
}

async fn look(node: &Arc<Node>, missing: &mut HashMap<String, u32>) -> Result<(), StoreError> {
    let seen = instance::look(node.store.raw()).await?;
    let gone: Vec<String> = seen
        .into_iter()
        .filter(|(name, alive)| !*alive && *name != node.config.node_id)
        .map(|(name, _)| name)
        .collect();
    missing.retain(|name, _| gone.contains(name));
    for name in gone {
        let looks = missing.entry(name.clone()).or_default();
        *looks = looks.saturating_add(1);
        if *looks < MISSING {
            continue;
        }
        let count = take_all(node, &name).await?;
        if count > 0 {
            tracing::warn!(
                instance = name,
                tasks = count,
                "tasks of an instance that is gone are gone on with here"
            );
        }
    }
    Ok(())
}

/// Takes over everything of an instance that is gone; how many tasks that were.
async fn take_all(node: &Arc<Node>, dead: &str) -> Result<usize, StoreError> {
    let tasks = node.store.unfinished(dead).await?;
    if tasks.is_empty() {
        return forget_long_gone(node, dead).await.map(|()| 0);
    }
    if !claim(node, dead).await? {
        return Ok(0);
    }
    // It may have come back since it was looked for; while it does so it has the claim itself.
    if instance::is_there(node.store.raw(), dead).await? {
        unclaim(node, dead).await;
        return Ok(0);
    }
    let begun = Instant::now();
    let mut count = 0;
    for task in tasks {
        // The rest is claimed anew in the next look.
        if begun.elapsed() > CLAIM / 2 || node.life.is_draining() {
            break;
        }
        count += usize::from(engine::take_over(node, dead, &task).await?);
    }
    unclaim(node, dead).await;
    Ok(count)
}

async fn forget_long_gone(node: &Node, dead: &str) -> Result<(), StoreError> {
    let list = keys::file_nodes();
    let horizon = node.clock.unix_ms().saturating_sub(FORGET.as_millis() as u64);
    let mut score = command("ZSCORE", list);
    score.arg(dead);
    let mut batch = Batch::new();
    batch.push(list, score);
    let reply = node.store.raw().run(batch).await?.into_iter().next();
    let Some(reply) = reply.filter(|reply| !matches!(reply, redis::Value::Nil)) else {
        return Ok(());
    };
    if as_float(reply)? as u64 >= horizon {
        return Ok(());
    }
    let mut remove = command("ZREM", list);
    remove.arg(dead);
    let mut batch = Batch::new();
    batch.push(list, remove);
    node.store.raw().run(batch).await.map(|_| ())
}

/// This instance's lease had lapsed and is in order again: tasks that others have taken meanwhile are theirs.
async fn after_gap(node: &Arc<Node>) {
    // Those that come in from here on are on the list anyway.
    let before = node.transfers.all();
    match node.store.unfinished(&node.config.node_id).await {
        Ok(ours) => {
            for cell in before
                .iter()
                .filter(|cell| !ours.iter().any(|task| task == cell.task()))
            {
                tracing::warn!(
                    task = cell.task(),
                    "another instance has taken this task over while this one was away"
                );
                engine::let_go(node, cell);
            }
        }
        Err(error) => tracing::warn!(%error, "whether tasks were taken over can't be read; they are gone on with"),
    }
}
