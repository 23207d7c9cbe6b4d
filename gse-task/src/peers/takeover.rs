//! Who owns a task when its owner is gone, leaves, or comes back from a long pause.
//!
//! An unfinished task is on the list of its owner. Taking it over means: on the own list first, read it from the store, go on with it,
//! then off the other list. If two nodes should ever own a task for a while (one was paused and comes back), nothing is run twice, because
//! agents take a target once, and no row changes, because terminal rows are set only if absent.

use std::sync::Arc;
use std::time::Duration;

use gse_core::store::{Batch, StoreError, as_bytes, command};
use gse_proto::keys;
use gse_proto::peer as p;
use gse_proto::peer::open_target::Phase as Told;

use crate::Node;
use crate::clock::unix_ms;
use crate::task::cell::RunCell;
use crate::task::recover::load;
use crate::task::run::{Phase, Run};

/// How long a claim to a dead node's tasks lasts if it is not given up.
const CLAIM: Duration = Duration::from_secs(30);
/// A node that has been gone for so long, without tasks, is taken off the list.
const FORGET_NODE: Duration = Duration::from_secs(3600);
/// Tasks handed over in one call.
const HAND_OVER: usize = 64;
/// How long a stopping node tries to hand its tasks over.
const HAND_OVER_TIME: Duration = Duration::from_secs(5);

/// Claims the tasks of a node for this one; false while somebody else has them.
///
/// # Errors
/// When the store does not answer.
pub async fn claim(node: &Node, of: &str) -> Result<bool, StoreError> {
    let key = keys::node_claim(of);
    let me = format!("{}/{}", node.config.node_id, node.life_id);
    let mut set = command("SET", &key);
    set.arg(&me)
        .arg("NX")
        .arg("PX")
        .arg(u64::try_from(CLAIM.as_millis()).unwrap_or(u64::MAX));
    let mut batch = Batch::new();
    batch.push(&key, set);
    batch.push(&key, command("GET", &key));
    let replies = node.task_store.raw().run(batch).await?;
    let holder = replies.into_iter().nth(1).map_or(Ok(None), as_bytes)?;
    // An earlier life of this node that died with the claim does not need it any more.
    let ours = format!("{}/", node.config.node_id);
    Ok(holder.is_some_and(|holder| holder.starts_with(ours.as_bytes())))
}

/// Gives a claim up. (Only after [`claim`]: it is not checked again whose it is.)
///
/// # Errors
/// When the store does not answer; it lapses by itself then.
pub async fn unclaim(node: &Node, of: &str) -> Result<(), StoreError> {
    let key = keys::node_claim(of);
    let mut batch = Batch::new();
    batch.push(&key, command("DEL", &key));
    node.task_store.raw().run(batch).await.map(|_| ())
}

/// Goes on with an unfinished task of another node. `open`: how far its open targets have got, if the other node has said so.
/// False when there is no such task any more.
///
/// # Errors
/// When the store does not answer.
pub async fn take(
    node: &Arc<Node>,
    from: &str,
    task: &str,
    open: Option<&[p::OpenTarget]>,
) -> Result<bool, StoreError> {
    let store = &node.task_store;
    if node.tasks.run(task).is_some() {
        store.forget_unfinished(from, task).await?;
        return Ok(true);
    }
    store.note_unfinished(&node.config.node_id, task).await?;
    let Some((mut run, shared)) = load(node, task).await? else {
        // Never committed, finished, or expired.
        store.forget_unfinished(&node.config.node_id, task).await?;
        store.forget_unfinished(from, task).await?;
        return Ok(false);
    };
    for target in open.unwrap_or_default() {
        tell_phase(&mut run, target);
    }
    node.tasks.resume(run, shared).await;
    node.metrics.tasks_taken_over.inc();
    store.forget_unfinished(from, task).await?;
    Ok(true)
}

fn tell_phase(run: &mut Run, told: &p::OpenTarget) {
    let place = told.place.unwrap_or_default();
    if let Some(target) = run.target(place.bucket, place.index) {
        target.phase = match told.phase() {
            Told::Waiting => Phase::Waiting,
            Told::Sent => Phase::Sent(told.journal_epoch.clone(), told.session_id),
            Told::MaybeSent => Phase::MaybeSent,
            Told::Held => Phase::Held(told.journal_epoch.clone()),
        };
    }
}

/// Takes over everything of a dead node; returns how many tasks.
///
/// # Errors
/// When the store does not answer; to be tried again.
pub async fn take_all(node: &Arc<Node>, dead: &str) -> Result<usize, StoreError> {
    let tasks = node.task_store.unfinished(dead).await?;
    if tasks.is_empty() {
        return forget_long_gone(node, dead).await.map(|()| 0);
    }
    if !claim(node, dead).await? {
        return Ok(0);
    }
    let began = tokio::time::Instant::now();
    let mut count = 0;
    for task in tasks {
        // The rest is claimed anew in the next look.
        if began.elapsed() > CLAIM / 2 || node.life.is_draining() {
            break;
        }
        if take(node, dead, &task, None).await? {
            count += 1;
        }
    }
    unclaim(node, dead).await?;
    Ok(count)
}

async fn forget_long_gone(node: &Node, dead: &str) -> Result<(), StoreError> {
    let horizon = unix_ms().saturating_sub(FORGET_NODE.as_millis() as u64);
    let mut score = command("ZSCORE", keys::nodes());
    score.arg(dead);
    let mut batch = Batch::new();
    batch.push(keys::nodes(), score);
    let reply = node.task_store.raw().run(batch).await?.into_iter().next();
    let Some(reply) = reply.filter(|reply| !matches!(reply, redis::Value::Nil)) else {
        return Ok(());
    };
    if gse_core::store::as_float(reply)? as u64 >= horizon {
        return Ok(());
    }
    let mut remove = command("ZREM", keys::nodes());
    remove.arg(dead);
    let mut batch = Batch::new();
    batch.push(keys::nodes(), remove);
    node.task_store.raw().run(batch).await.map(|_| ())
}

/// This node's lease had lapsed and is in order again: tasks that others have taken meanwhile are theirs.
pub async fn after_gap(node: &Arc<Node>) {
    // Those that come in from here on are on the list anyway.
    let before = node.tasks.all();
    match node.task_store.unfinished(&node.config.node_id).await {
        Ok(ours) => {
            for cell in before
                .iter()
                .filter(|cell| !ours.iter().any(|task| *task == cell.header.task_id))
            {
                tracing::warn!(
                    task = cell.header.task_id,
                    "another node has taken this task over while this one was away"
                );
                node.tasks.let_go(cell);
            }
        }
        Err(error) => tracing::warn!(%error, "whether tasks were taken over can't be read; they are gone on with"),
    }
}

/// Waits for the node to drain, then sees to its tasks.
pub async fn on_drain(node: Arc<Node>) {
    // However this ends, nobody waits for a hand-over that does not come.
    let _done = node.handed_over.clone().drop_guard();
    node.life.draining().await;
    if !node.peers.is_empty() {
        hand_over(&node).await;
    }
}

/// Hands every task over to other nodes; this one is stopping. What nobody takes stays on its list, for its next life or for whoever
/// finds it dead.
pub async fn hand_over(node: &Arc<Node>) {
    let deadline = tokio::time::Instant::now() + HAND_OVER_TIME;
    let mut turn = 0;
    loop {
        let peers = node.peers.open();
        let mut cells = node.tasks.all();
        cells.retain(|cell| !cell.is_over());
        if peers.is_empty() || cells.is_empty() {
            break;
        }
        for some in cells.chunks(HAND_OVER) {
            turn += 1;
            hand_to(node, &peers[turn % peers.len()], some).await;
        }
        if tokio::time::Instant::now() >= deadline {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let left = node.tasks.len();
    if left > 0 {
        tracing::info!(tasks = left, "unfinished tasks stay on this node's list");
    }
}

async fn hand_to(node: &Arc<Node>, peer: &super::Peer, cells: &[Arc<RunCell>]) {
    let cells: Vec<_> = cells.iter().filter(|cell| cell.begin_hand_over()).collect();
    if cells.is_empty() {
        return;
    }
    let tasks = cells.iter().map(|cell| p::AdoptTask {
        task_id: cell.header.task_id.clone(),
        open: cell.open_targets(),
    });
    let request = p::AdoptRequest {
        node_id: node.config.node_id.clone(),
        tasks: tasks.collect(),
    };
    let taken = match peer.adopt(request).await {
        Ok(taken) => taken,
        Err(error) => {
            tracing::warn!(peer = peer.node_id, error = %error.message(), "a peer has not taken tasks over");
            vec![]
        }
    };
    for cell in cells {
        if taken.contains(&cell.header.task_id) {
            node.peers.set_owner(&cell.header.task_id, &peer.node_id);
            node.tasks.let_go(cell);
            tracing::info!(task = cell.header.task_id, to = peer.node_id, "task handed over");
        } else {
            cell.keep_after_all();
        }
    }
}
