//! Ending scripts whose rows are closed: an agent that was away when its script was to be ended, or was given up, may still run it.
//!
//! The row can't change any more; what can still be done is to tell the agent, at once if it is there or else when it is back. Ending
//! what is under way is in [`super::engine`].

use std::sync::Arc;
use std::time::Duration;

use gse_core::random::{HashMap, HashSet};
use gse_core::store::StoreError;
use gse_proto::codes::Inner;
use gse_proto::ids::AgentId;
use gse_proto::peer as p;
use gse_proto::state::TaskHeader;

use super::cell::RunCell;
use super::fan_out::send_terminate;
use super::remote::{Missing, whereabouts};
use super::store::RowState;
use crate::Node;
use crate::session::registry::Session;

/// How long a peer is asked again to pass terminations on.
const INSIST: Duration = Duration::from_secs(300);

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
pub async fn stop_given_up(node: &Arc<Node>, header: &TaskHeader, places: &[(u32, u32)]) -> Result<(), StoreError> {
    let task = &header.task_id;
    let mut by_bucket: HashMap<u32, HashSet<u32>> = HashMap::default();
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
        let mut elsewhere = Vec::new();
        for index in given_up {
            let asked = indexed.agent_id(index);
            let Some(agent) = asked.and_then(|asked| AgentId::parse(asked).ok()) else {
                continue;
            };
            match node.registry.find(&agent) {
                Some(session) => send_terminate(task, bucket, index, &session),
                None => elsewhere.push((bucket, index, agent)),
            }
        }
        if !node.peers.is_empty() {
            tell_there(node, task, elsewhere).await;
        }
    }
    Ok(())
}

/// Tells the node that owns a task that the end of targets was asked for. It is noted in the store: whoever takes the task over meanwhile
/// finds it there.
pub async fn stop_at_owner(node: &Arc<Node>, header: &TaskHeader, places: &[(u32, u32)]) {
    let request = p::StopRequest {
        node_id: node.config.node_id.clone(),
        task_id: header.task_id.clone(),
        places: places
            .iter()
            .map(|(bucket, index)| p::Place {
                bucket: *bucket,
                index: *index,
            })
            .collect(),
    };
    let calls = node.peers.all().into_iter().map(|peer| {
        let request = request.clone();
        async move {
            if let Err(error) = peer.stop(request).await {
                tracing::warn!(task = header.task_id, peer = peer.node_id, error = %error.message(), "a peer could not be told of a termination");
            }
        }
    });
    futures::future::join_all(calls).await;
}

/// Tells agents on other nodes to end targets of a task under way here.
pub(super) async fn stop_there(node: &Arc<Node>, cell: &Arc<RunCell>, targets: Vec<Missing>) {
    tell_there(node, &cell.header.task_id, targets).await;
}

/// Passes terminations on to the nodes that hold the agents' sessions. A node that does not answer is asked again; one that goes away
/// is made up for when the agents are back: their end is noted in the store.
async fn tell_there(node: &Arc<Node>, task: &str, targets: Vec<Missing>) {
    let agents: Vec<AgentId> = targets.iter().map(|(_, _, agent)| agent.clone()).collect();
    let known = match whereabouts(node, &agents).await {
        Ok(known) => known,
        Err(error) => {
            tracing::warn!(task, %error, "where agents are can't be read; they are told to end the script when they are back");
            return;
        }
    };
    let mut by_node: HashMap<String, Vec<p::Delivery>> = HashMap::default();
    for (bucket, index, agent) in targets {
        if let Some(there) = known.get(&agent).and_then(|known| known.there.as_ref()) {
            by_node.entry(there.node.clone()).or_default().push(p::Delivery {
                agent_id: there.agent.as_str().to_owned(),
                session_id: 0,
                place: Some(p::Place { bucket, index }),
                dispatch: bytes::Bytes::new(),
            });
        }
    }
    let calls = by_node.into_iter().filter_map(|(to, deliveries)| {
        let peer = node.peers.get(&to)?;
        let request = p::DeliverRequest {
            node_id: node.config.node_id.clone(),
            task_id: task.to_owned(),
            shared: bytes::Bytes::new(),
            deliveries,
        };
        Some(async move {
            if let Err(error) = peer.deliver(request.clone()).await {
                tracing::warn!(task, peer = to, error = %error.message(), "a peer has not passed terminations on; it is asked again");
                node.life.spawn("terminations", insist(Arc::clone(node), to, request));
            }
        })
    });
    futures::future::join_all(calls).await;
}

/// Repeats terminations, which may be had twice, until the peer has passed them on, is gone, or too much time is over.
async fn insist(node: Arc<Node>, to: String, request: p::DeliverRequest) {
    let end = tokio::time::Instant::now() + INSIST;
    let mut wait = Duration::from_millis(100);
    while tokio::time::Instant::now() < end {
        tokio::select! {
            () = node.life.draining() => return,
            () = tokio::time::sleep(node.random.jittered(wait)) => {}
        }
        wait = (wait * 2).min(Duration::from_secs(2));
        let Some(peer) = node.peers.get(&to) else { return };
        match peer.deliver(request.clone()).await {
            Ok(_) => return,
            Err(error) => {
                node.metrics.peer_failures.inc();
                tracing::debug!(task = request.task_id, peer = to, error = %error.message(), "a peer has not passed terminations on yet");
            }
        }
    }
    tracing::warn!(
        task = request.task_id,
        peer = to,
        "a peer has not passed terminations on; its agents are told when they are back"
    );
}

/// Those of `targets` whose agents are connected nowhere. All of them are taken for connected while the store does not answer.
pub(super) async fn away(node: &Node, targets: Vec<Missing>) -> Vec<Missing> {
    if targets.is_empty() || node.peers.is_empty() {
        return targets;
    }
    let agents: Vec<AgentId> = targets.iter().map(|(_, _, agent)| agent.clone()).collect();
    match whereabouts(node, &agents).await {
        Ok(known) => {
            let connected = |agent: &AgentId| known.get(agent).is_some_and(|known| known.there.is_some());
            targets.into_iter().filter(|(_, _, agent)| !connected(agent)).collect()
        }
        Err(error) => {
            tracing::debug!(%error, "where agents are can't be read");
            vec![]
        }
    }
}

/// An agent is back with targets whose rows are closed: what was asked to end is ended.
pub async fn stop_returned(node: &Arc<Node>, session: &Session, held: HashSet<(String, u32, u32)>) {
    let mut by_bucket: HashMap<(String, u32), Vec<u32>> = HashMap::default();
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
