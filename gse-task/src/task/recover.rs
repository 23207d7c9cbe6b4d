//! Taking up the unfinished tasks of this node's last life, before agents are let in.
//!
//! What was sent then is not known any more; [`super::run::Phase::MaybeSent`] stands for that, and agents say in their hello what
//! they have.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::store::StoreError;

use super::cell::shared_dispatch;
use super::layout::without_scripts;
use super::run::{Phase, Run};

use crate::Node;
use crate::peers::takeover;

/// Reads until it succeeds: without the store nothing can be done anyway. False when the node drains first.
pub async fn recover(node: &Arc<Node>) -> bool {
    let mut wait = Duration::from_millis(100);
    loop {
        match take_up(node).await {
            Ok(None) => {}
            Ok(Some(count)) => {
                if count > 0 {
                    tracing::info!(tasks = count, "unfinished tasks taken up");
                }
                node.tasks.set_recovered();
                return true;
            }
            Err(error) => tracing::warn!(%error, "unfinished tasks can't be read yet; agents are let in after that"),
        }
        tokio::select! {
            () = node.life.draining() => return false,
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(Duration::from_secs(2));
    }
}

/// `None` while another node is at it.
async fn take_up(node: &Arc<Node>) -> Result<Option<usize>, StoreError> {
    let id = &node.config.node_id;
    if !takeover::claim(node, id).await? {
        // Another node is just taking them over; what it has taken is off the list after that.
        tracing::info!("another node is taking this node's tasks over; waiting for it");
        return Ok(None);
    }
    let mut count = 0;
    for task in node.task_store.unfinished(&node.config.node_id).await? {
        if node.tasks.run(&task).is_some() {
            continue;
        }
        match load(node, &task).await? {
            Some((run, shared)) => {
                node.tasks.resume(run, shared).await;
                count += 1;
            }
            // Never committed, or expired.
            None => node.task_store.forget_unfinished(&node.config.node_id, &task).await?,
        }
    }
    takeover::unclaim(node, id).await?;
    Ok(Some(count))
}

/// Reads an unfinished task, every open target as one that may have been sent; `None` when there is none (any more).
///
/// # Errors
/// When the store does not answer.
pub async fn load(node: &Node, task: &str) -> Result<Option<(Run, Bytes)>, StoreError> {
    let store = &node.task_store;
    let Some(header) = store.whole_header(task).await? else {
        return Ok(None);
    };
    let shared = shared_dispatch(&header);
    let header = Arc::new(without_scripts(header));
    let mut buckets = Vec::with_capacity(header.buckets as usize);
    for n in 0..header.buckets {
        match store.targets(task, n).await? {
            Some(bucket) => buckets.push(Arc::new(bucket)),
            None => {
                tracing::error!(
                    task,
                    bucket = n,
                    "targets of an unfinished task are gone from the store; it is given up"
                );
                return Ok(None);
            }
        }
    }
    let mut run = Run::new(Arc::clone(&header), buckets);
    for n in 0..header.buckets {
        for target in run.targets.get_mut(n as usize).into_iter().flatten() {
            target.phase = Phase::MaybeSent;
        }
        for (place, row) in store.all_rows(task, n..n + 1).await? {
            if row.terminal.is_some() {
                run.mark(place.bucket, place.index, place.atomic);
            }
        }
        for index in store.stopped(task, n).await? {
            if let Some(target) = run.target(n, index) {
                target.stop = true;
            }
        }
    }
    Ok(Some((run, shared)))
}
