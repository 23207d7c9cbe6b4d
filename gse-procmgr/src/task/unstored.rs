//! What a task has learnt and the store does not have yet, and how it gets there.

use std::pin::Pin;
use std::sync::Arc;

use gse_core::fleet::processes::Writes;
use gse_core::store::StoreError;
use gse_proto::ids::AgentId;
use gse_proto::proc as p;
use gse_proto::procstore::StoredResult;

use super::engine::Cell;
use crate::Node;
use crate::registry;

/// A state that an agent told with an answer.
pub(super) struct Told {
    /// The agent, as it was called.
    pub(super) agent: AgentId,
    /// The process.
    pub(super) process: p::Process,
    /// The spec of the operation, and its labels.
    pub(super) spec: Option<(p::Spec, Vec<p::Label>)>,
}

/// What the store does not have yet.
pub(super) struct Unstored {
    /// States, written before any row.
    pub(super) told: Vec<Told>,
    /// Rows that are over.
    pub(super) rows: Vec<(u32, StoredResult)>,
}

/// A write under way.
pub(super) type Writing = Pin<Box<dyn Future<Output = (Unstored, Result<(), StoreError>)> + Send>>;

/// Waits for the end of a write, if there is one.
pub(super) async fn written(writing: &mut Option<Writing>) -> (Unstored, Result<(), StoreError>) {
    match writing {
        Some(writing) => writing.await,
        None => std::future::pending().await,
    }
}

/// Stores rows that are over, and before them what came with them: who has seen a row sees its state. Gives back what it was given.
pub(super) async fn write(node: Arc<Node>, cell: Arc<Cell>, some: Unstored) -> (Unstored, Result<(), StoreError>) {
    let outcome = put(&node, &cell, &some).await;
    (some, outcome)
}

async fn put(node: &Node, cell: &Cell, some: &Unstored) -> Result<(), StoreError> {
    let now_ms = node.clock.unix_ms();
    if !some.told.is_empty() {
        let mut writes = Writes::new(now_ms);
        let told: Vec<(&AgentId, &p::Process)> = some.told.iter().map(|told| (&told.agent, &told.process)).collect();
        let newest = registry::newest(node.store.raw(), &told).await?;
        for (told, (agent, newest)) in some.told.iter().zip(newest) {
            if !newest {
                continue;
            }
            writes.state(agent.as_str(), &told.process, 0);
            registry::told(&mut writes, agent.as_str(), &told.process, told.spec.as_ref());
        }
        node.store.raw().run(writes.batch()).await?;
    }
    let left_s = cell.known.header.deadline_ms.saturating_sub(now_ms) / 1000;
    let ttl_s = left_s + node.config.task.result_ttl_s;
    node.store.put_results(cell.task(), &some.rows, ttl_s).await?;
    node.metrics.rows_stored.inc_by(some.rows.len() as u64);
    Ok(())
}
