//! How much output may be kept: of one task, and of all tasks in the store. The bound of one atomic task on one target is the agent's
//! to keep (`task.output_limit_bytes`).
//!
//! Past a budget output is cut with a marker; rows are never refused. What was used is counted in the store, so that all nodes count
//! together: exactly for a task (but for the batch that is just being written), and for the store as what was written within the last
//! lifetime of results, compressed, which is about what is still there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use gse_core::store::{Batch, StoreError, as_array, as_bytes};
use gse_proto::keys;
use moka::sync::Cache;

use crate::Node;
use crate::clock::unix_ms;
use crate::config::TaskConfig;

/// Tasks whose use is remembered; of the others it is read again.
const TASKS: u64 = 20_000;
/// How often what this node has written is added to what all have.
const FLUSH: Duration = Duration::from_secs(1);
/// Time that is counted together.
const SLOT_MS: u64 = 10 * 60 * 1000;

/// What a task has used.
#[derive(Debug, Default)]
pub struct TaskUse {
    bytes: AtomicU64,
}

impl TaskUse {
    /// Notes bytes that are about to be written.
    pub fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Notes what all nodes together have written.
    pub fn at_least(&self, bytes: u64) {
        self.bytes.fetch_max(bytes, Ordering::Relaxed);
    }
}

/// The budgets of a node.
#[derive(Debug)]
pub struct Budget {
    task_bytes: u64,
    store_bytes: u64,
    slots: u64,
    tasks: Cache<Arc<str>, Arc<TaskUse>>,
    /// Written by this node since the last flush, compressed.
    pending: AtomicU64,
    /// Written by all nodes within the last lifetime of results, as of the last flush.
    stored: AtomicU64,
}

impl Budget {
    /// As configured.
    #[must_use]
    pub fn new(config: &TaskConfig) -> Self {
        Self {
            task_bytes: config.task_output_bytes,
            store_bytes: config.store_output_bytes,
            slots: (config.result_ttl_s * 1000).div_ceil(SLOT_MS) + 1,
            tasks: Cache::builder()
                .max_capacity(TASKS)
                .time_to_idle(Duration::from_secs(3600))
                .build(),
            pending: AtomicU64::new(0),
            stored: AtomicU64::new(0),
        }
    }

    /// What a task has used so far, over all nodes. While the store does not say, what this node knows counts.
    pub async fn of(&self, node: &Node, task: &Arc<str>) -> Arc<TaskUse> {
        if let Some(known) = self.tasks.get(task) {
            return known;
        }
        let key = keys::task_output_bytes(task);
        let mut cmd = redis::cmd("GET");
        cmd.arg(&key);
        let mut batch = Batch::new();
        batch.push(&key, cmd);
        let used = match node.task_store.raw().run(batch).await {
            Ok(replies) => replies
                .into_iter()
                .next()
                .and_then(|reply| number(reply).ok())
                .unwrap_or(0),
            Err(error) => {
                tracing::debug!(task = &**task, %error, "what a task has used of its output budget can't be read");
                0
            }
        };
        let fresh = Arc::new(TaskUse {
            bytes: AtomicU64::new(used),
        });
        self.tasks.get_with(Arc::clone(task), || fresh)
    }

    /// The text that takes the place of further output, once a budget is used up.
    #[must_use]
    pub fn cut(&self, used: &TaskUse) -> Option<String> {
        let used = used.bytes.load(Ordering::Relaxed);
        if self.task_bytes > 0 && used >= self.task_bytes {
            return Some(format!(
                "\n[output is cut here: the {} bytes that one task may have in all are used up]\n",
                self.task_bytes
            ));
        }
        let stored = self.stored.load(Ordering::Relaxed) + self.pending.load(Ordering::Relaxed);
        if self.store_bytes > 0 && stored >= self.store_bytes {
            return Some("\n[output is cut here: the servers have no room for more at the moment]\n".into());
        }
        None
    }

    /// Notes compressed bytes that are about to be written.
    pub fn wrote(&self, bytes: u64) {
        self.pending.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts together with the other nodes until the node's sessions have ended.
    pub async fn keep(node: Arc<Node>) {
        let budget = &node.budget;
        if budget.store_bytes == 0 {
            return;
        }
        let mut tick = tokio::time::interval(FLUSH);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = node.sessions_gone() => return,
                _ = tick.tick() => {}
            }
            if let Err(error) = budget.flush(&node).await {
                tracing::debug!(%error, "how much output the store holds can't be counted now");
            }
            node.metrics
                .output_stored
                .set(i64::try_from(budget.stored.load(Ordering::Relaxed)).unwrap_or(i64::MAX));
        }
    }

    async fn flush(&self, node: &Node) -> Result<(), StoreError> {
        let slot = unix_ms() / SLOT_MS;
        let written = self.pending.swap(0, Ordering::Relaxed);
        let mut batch = Batch::new();
        if written > 0 {
            let key = keys::output_slot(slot);
            let mut add = redis::cmd("INCRBY");
            add.arg(&key).arg(written);
            batch.push(&key, add);
            let mut expire = redis::cmd("EXPIRE");
            expire.arg(&key).arg((self.slots + 1) * SLOT_MS / 1000);
            batch.push(&key, expire);
        }
        let added = batch.len();
        let mut get = redis::cmd("MGET");
        for n in 0..self.slots {
            get.arg(keys::output_slot(slot.saturating_sub(n)));
        }
        batch.push(keys::output_slot(slot), get);
        match node.task_store.raw().run(batch).await {
            Ok(replies) => {
                let mut sum = 0;
                for reply in replies.into_iter().nth(added).map_or(Ok(vec![]), as_array)? {
                    sum += number(reply)?;
                }
                self.stored.store(sum, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => {
                // Counted twice if the store had taken it: on the safe side.
                self.pending.fetch_add(written, Ordering::Relaxed);
                Err(error)
            }
        }
    }
}

/// A counter as GET and MGET give it; one that is not there is 0.
fn number(reply: redis::Value) -> Result<u64, StoreError> {
    let text = as_bytes(reply)?;
    Ok(text
        .and_then(|text| std::str::from_utf8(&text).ok()?.parse().ok())
        .unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_cuts_when_it_is_used_up_and_not_before() {
        let config = TaskConfig {
            task_output_bytes: 100,
            store_output_bytes: 1000,
            ..TaskConfig::default()
        };
        let budget = Budget::new(&config);
        let used = TaskUse::default();
        used.add(99);
        assert_eq!(budget.cut(&used), None);
        used.add(1);
        assert!(budget.cut(&used).unwrap().contains("100 bytes"));
        let other = TaskUse::default();
        budget.wrote(1000);
        assert!(budget.cut(&other).unwrap().contains("no room"));
        let unbounded = Budget::new(&TaskConfig {
            task_output_bytes: 0,
            store_output_bytes: 0,
            ..TaskConfig::default()
        });
        unbounded.wrote(u64::MAX / 2);
        used.at_least(u64::MAX / 2);
        assert_eq!(unbounded.cut(&used), None);
    }
}
