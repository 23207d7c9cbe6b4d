//! Tasks under way, and those of the last life of this instance or of instances that are gone.
//!
//! A task that two instances should ever carry on at the same time does no harm: an agent carries an operation out once, by its id, and
//! rows are set only if absent.

use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use gse_core::random::HashMap;
use gse_core::store::StoreError;
use gse_proto::procstore::{ProcHeader, StoredResult};
use tokio::sync::watch;

use super::drive;
use super::store::Known;
use crate::Node;

/// A task under way.
#[derive(Debug)]
pub struct Cell {
    /// What polls need of it.
    pub known: Known,
    /// Every row is stored.
    pub finished: watch::Sender<bool>,
}

impl Cell {
    /// Id of the task.
    #[must_use]
    pub fn task(&self) -> &str {
        &self.known.header.task_id
    }

    /// Waits until every row is stored, at most so long.
    pub async fn finished_within(&self, limit: Duration) {
        let mut finished = self.finished.subscribe();
        // In time or not: what is stored is what counts.
        drop(tokio::time::timeout(limit, finished.wait_for(|finished| *finished)).await);
    }
}

/// All tasks under way.
#[derive(Debug, Default)]
pub struct Tasks {
    cells: DashMap<String, Arc<Cell>>,
}

impl Tasks {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// A task under way.
    #[must_use]
    pub fn get(&self, task: &str) -> Option<Arc<Cell>> {
        self.cells.get(task).map(|cell| Arc::clone(&cell))
    }

    /// One is finished.
    pub fn remove(&self, task: &str) {
        self.cells.remove(task);
    }

    /// Takes a task up; `results`: rows that are over already.
    pub fn start(node: &Arc<Node>, header: ProcHeader, results: &HashMap<u32, StoredResult>) -> Arc<Cell> {
        let cell = Arc::new(Cell {
            known: Known::new(header),
            finished: watch::Sender::new(false),
        });
        node.tasks.cells.insert(cell.task().to_owned(), Arc::clone(&cell));
        node.metrics.tasks_started.inc();
        let over: Vec<u32> = results.keys().copied().collect();
        node.life
            .spawn("process task", drive::drive(Arc::clone(node), Arc::clone(&cell), over));
        cell
    }
}

/// Takes up the unfinished tasks of this instance's last life. False when the instance drains before that.
pub async fn recover(node: &Arc<Node>) -> bool {
    let mut wait = Duration::from_millis(100);
    loop {
        match take_up(node, &node.config.node_id).await {
            Ok(count) => {
                if count > 0 {
                    tracing::info!(tasks = count, "unfinished process tasks taken up");
                }
                return true;
            }
            Err(error) => tracing::warn!(%error, "unfinished process tasks can't be read yet"),
        }
        tokio::select! {
            () = node.life.draining() => return false,
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(Duration::from_secs(2));
    }
}

/// Takes up the unfinished tasks of an instance, this one or one that is gone; returns how many.
///
/// # Errors
/// When the store does not answer; to be tried again.
pub async fn take_up(node: &Arc<Node>, of: &str) -> Result<usize, StoreError> {
    let own = &node.config.node_id;
    let limit = Duration::from_millis(node.config.task.submit_wait_ms);
    let mut count = 0;
    for task in node.store.unfinished(of).await? {
        if node.life.is_draining() {
            break;
        }
        if node.tasks.get(&task).is_none() {
            let Some(header) = node.store.header(&task).await? else {
                // Never committed, or expired.
                node.store.forget(of, &task).await?;
                continue;
            };
            if of != own {
                node.store.note(own, &task, limit).await?;
            }
            let known = Known::new(header.clone());
            let results = node.store.results(&task, &known.layout).await?;
            Tasks::start(node, header, &results);
            count += 1;
        }
        if of != own {
            node.store.forget(of, &task).await?;
        }
    }
    Ok(count)
}
