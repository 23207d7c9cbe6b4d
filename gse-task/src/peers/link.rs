//! What is told to one peer, in batches: sessions that were opened here, rows that were stored here.
//!
//! Each queue is bounded and repeated until the peer has answered or is gone. Notices make things quick; nothing depends on one.

use std::sync::Arc;
use std::time::Duration;

use gse_core::random::HashMap;
use gse_proto::peer as p;
use gse_proto::peer::task_peer_client::TaskPeerClient;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::Node;
use crate::task::store::RowPlace;

/// Sessions waiting to be told at most.
pub(super) const OPENED_QUEUE: usize = 16_384;
/// Rows waiting to be told at most.
pub(super) const STORED_QUEUE: usize = 65_536;
/// In one call at most.
const OPENED_CALL: usize = 2_048;
const STORED_CALL: usize = 16_384;
/// More may come within this time and go with it.
const GATHER: Duration = Duration::from_millis(5);

/// A terminal row that was stored here.
#[derive(Debug, Clone)]
pub(super) struct StoredRow {
    pub(super) task: Arc<str>,
    pub(super) place: RowPlace,
    /// The node that was told first did not own the task: not passed on again.
    pub(super) again: bool,
}

async fn pause(node: &Node, gone: &CancellationToken, wait: &mut Duration) -> bool {
    let time = node.random.jittered(*wait);
    *wait = (*wait * 2).min(Duration::from_secs(2));
    gone.run_until_cancelled(tokio::time::sleep(time)).await.is_some()
}

/// Tells of opened sessions until the peer is gone.
pub(super) async fn tell_opened(
    node: Arc<Node>,
    mut client: TaskPeerClient<Channel>,
    mut queue: mpsc::Receiver<(p::OpenedSession, Instant)>,
    gone: CancellationToken,
) {
    let mut sessions = Vec::new();
    loop {
        match gone
            .run_until_cancelled(queue.recv_many(&mut sessions, OPENED_CALL))
            .await
        {
            None | Some(0) => return,
            Some(_) => {}
        }
        tokio::time::sleep(GATHER).await;
        while sessions.len() < OPENED_CALL
            && let Ok(next) = queue.try_recv()
        {
            sessions.push(next);
        }
        let mut wait = Duration::from_millis(50);
        loop {
            let request = p::OpenedRequest {
                node_id: node.config.node_id.clone(),
                sessions: sessions
                    .iter()
                    .map(|(session, at): &(p::OpenedSession, Instant)| p::OpenedSession {
                        age_ms: u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX),
                        ..session.clone()
                    })
                    .collect(),
            };
            let Err(error) = client.opened(request).await else {
                break;
            };
            node.metrics.peer_failures.inc();
            tracing::debug!(error = %error.message(), "a peer could not be told of agents that connected");
            if !pause(&node, &gone, &mut wait).await {
                return;
            }
        }
        sessions.clear();
    }
}

/// Tells of stored rows until the peer is gone.
pub(super) async fn tell_stored(
    node: Arc<Node>,
    peer: String,
    mut client: TaskPeerClient<Channel>,
    mut queue: mpsc::Receiver<StoredRow>,
    gone: CancellationToken,
) {
    let mut rows = Vec::new();
    loop {
        match gone.run_until_cancelled(queue.recv_many(&mut rows, STORED_CALL)).await {
            None | Some(0) => return,
            Some(_) => {}
        }
        tokio::time::sleep(GATHER).await;
        while rows.len() < STORED_CALL
            && let Ok(next) = queue.try_recv()
        {
            rows.push(next);
        }
        let mut tasks: HashMap<Arc<str>, Vec<p::Row>> = HashMap::default();
        for StoredRow { task, place, .. } in &rows {
            tasks.entry(Arc::clone(task)).or_default().push(p::Row {
                place: Some(p::Place {
                    bucket: place.bucket,
                    index: place.index,
                }),
                atomic: place.atomic,
            });
        }
        let tasks = tasks.into_iter().map(|(task, rows)| p::StoredTask {
            task_id: task.as_ref().to_owned(),
            rows,
        });
        let request = p::StoredRequest {
            node_id: node.config.node_id.clone(),
            tasks: tasks.collect(),
        };
        let mut wait = Duration::from_millis(50);
        let unknown = loop {
            match client.stored(request.clone()).await {
                Ok(reply) => break reply.into_inner().unknown,
                Err(error) => {
                    node.metrics.peer_failures.inc();
                    tracing::debug!(peer, error = %error.message(), "a peer could not be told of rows");
                    if !pause(&node, &gone, &mut wait).await {
                        return;
                    }
                }
            }
        };
        for task in &unknown {
            node.peers.not_owner(task);
        }
        for row in rows
            .drain(..)
            .filter(|row| !row.again && unknown.iter().any(|task| **task == *row.task))
        {
            node.peers.stored_anywhere(&node, &row, Some(&peer));
        }
    }
}
