//! Ending scripts whose rows are closed: an agent that was away when its script was to be ended, or was given up, may still run it.
//!
//! The row can't change any more; what can still be done is to tell the agent, at once if it is there or else when it is back. Ending
//! what is under way is in [`super::engine`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use gse_core::store::StoreError;
use gse_proto::codes::Inner;
use gse_proto::ids::AgentId;
use gse_proto::state::TaskHeader;

use super::fan_out::send_terminate;
use super::store::RowState;
use crate::Node;
use crate::session::registry::Session;

/// Whether a script may still run although its row is closed.
fn may_still_run(row: &RowState) -> bool {
    row.terminal
        .as_ref()
        .is_some_and(|row| row.error_code == Inner::AgentOffline.code() || row.error_code == Inner::Unknown.code())
}

/// The end of targets is asked for: of those that were given up, agents that are there are told, and it is noted for the others.
///
/// # Errors
/// When the store does not answer.
pub async fn stop_given_up(node: &Node, header: &TaskHeader, places: &[(u32, u32)]) -> Result<(), StoreError> {
    let task = &header.task_id;
    let mut by_bucket: HashMap<u32, HashSet<u32>> = HashMap::new();
    for (bucket, index) in places {
        by_bucket.entry(*bucket).or_default().insert(*index);
    }
    for (bucket, wanted) in by_bucket {
        let rows = node.task_store.all_rows(task, bucket..bucket + 1).await?;
        let given_up: HashSet<u32> = rows
            .iter()
            .filter(|(place, row)| wanted.contains(&place.index) && may_still_run(row))
            .map(|(place, _)| place.index)
            .collect();
        if given_up.is_empty() {
            continue;
        }
        let noted: Vec<(u32, u32)> = given_up.iter().map(|index| (bucket, *index)).collect();
        let ttl_s = node.tasks.run(task).is_none().then_some(node.config.task.result_ttl_s);
        node.task_store.mark_stopped(task, &noted, ttl_s).await?;
        let Some(indexed) = node.task_store.bucket(task, bucket).await? else {
            continue;
        };
        for index in given_up {
            let asked = indexed.bucket.targets.get(index as usize).map(|t| t.agent_id.as_str());
            let agent = asked.and_then(|asked| AgentId::parse(asked).ok());
            if let Some(session) = agent.and_then(|agent| node.registry.find(&agent)) {
                send_terminate(task, bucket, index, &session);
            }
        }
    }
    Ok(())
}

/// An agent is back with targets whose rows are closed: what was asked to end is ended.
pub async fn stop_returned(node: &Arc<Node>, session: &Session, held: HashSet<(String, u32, u32)>) {
    let mut by_bucket: HashMap<(String, u32), Vec<u32>> = HashMap::new();
    for (task, bucket, index) in held {
        by_bucket.entry((task, bucket)).or_default().push(index);
    }
    for ((task, bucket), indexes) in by_bucket {
        match node.task_store.stopped(&task, bucket).await {
            Ok(stopped) => {
                for index in indexes.into_iter().filter(|index| stopped.contains(index)) {
                    send_terminate(&task, bucket, index, session);
                }
            }
            Err(error) => {
                tracing::warn!(task, agent = %session.agent, %error,
                    "whether a script of an agent that is back was to be ended can't be read; it runs to its own end");
            }
        }
    }
}

/// Withdraws a task that the store has not confirmed, however long the store is away.
pub async fn withdraw(node: Arc<Node>, task: String, buckets: u32) {
    let mut wait = Duration::from_millis(200);
    loop {
        match node.task_store.withdraw(&node.config.node_id, &task, buckets).await {
            Ok(()) => return,
            Err(error) => tracing::warn!(task, %error, "an unconfirmed task can't be withdrawn yet"),
        }
        tokio::select! {
            () = node.sessions_gone() => return,
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(Duration::from_secs(2));
    }
}
