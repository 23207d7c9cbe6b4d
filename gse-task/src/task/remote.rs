//! Targets whose agents are connected to other nodes: where they are, and what is passed on through those nodes.
//!
//! The owner of a task decides about each of its targets, wherever the agent is; the node that holds the session only passes frames on.
//! A delivery is repeated until the other node has answered: an agent takes a target once, however often it is given. Notices between
//! nodes may be lost; so each task is compared, now and then, with the rows in the store and with where its agents are.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use gse_core::fleet::find;
use gse_core::random::{HashMap, HashSet};
use gse_core::store::StoreError;
use gse_proto::codes::Inner;
use gse_proto::ids::AgentId;
use gse_proto::peer as p;
use gse_proto::state::AgentRecord;

use super::cell::{Place, RunCell};
use super::fan_out::{Reach, carry_out, close, decide};
use super::run::{Has, Phase};
use super::store::RowPlace;
use crate::Node;
use crate::clock::unix_ms;

/// Deliveries in one call at most.
const CALL_DELIVERIES: usize = 20_000;
/// Targets looked up in one go.
const LOOK_UP: usize = 5_000;
/// Rarest comparison of a task with the store.
const LONGEST_CHECK_MS: u64 = 300_000;
/// How often agents that were there a moment ago are looked for.
const CHASE: Duration = Duration::from_secs(1);

/// A session on another node.
#[derive(Debug, Clone)]
pub struct There {
    /// Whose.
    pub agent: AgentId,
    /// The node.
    pub node: String,
    /// The session.
    pub session: u64,
    /// The agent's journal.
    pub epoch: Bytes,
    /// Since when (unix ms) it is known to be that one.
    pub since_ms: Option<u64>,
}

/// What the store says about an agent.
#[derive(Debug, Clone)]
pub struct Known {
    /// The agent that was meant.
    pub agent: AgentId,
    /// When (unix ms) it was last heard.
    pub seen_ms: u64,
    /// Its session, if a living peer has it.
    pub there: Option<There>,
    /// The last word about it is that it is connected, but the node that said so is gone: it is looking for another one.
    pub between: bool,
}

/// Looks agents up in the store, by asked id; those that nobody has heard of are left out.
///
/// # Errors
/// When the store does not answer.
pub async fn whereabouts(node: &Node, asked: &[AgentId]) -> Result<HashMap<AgentId, Known>, StoreError> {
    let mut known = HashMap::with_capacity_and_hasher(asked.len(), Default::default());
    for some in asked.chunks(LOOK_UP) {
        look_up(node, some, &mut known).await?;
    }
    Ok(known)
}

async fn look_up(node: &Node, asked: &[AgentId], known: &mut HashMap<AgentId, Known>) -> Result<(), StoreError> {
    let store = node.task_store.raw();
    let agents = find::resolve(store, asked).await?;
    let records = find::records(store, &agents).await?;
    let mut absent: Vec<(&AgentId, AgentId, bool)> = Vec::new();
    for ((asked, agent), record) in asked.iter().zip(agents).zip(records) {
        let between = record.as_ref().is_some_and(|record| record.disconnected_at_ms == 0);
        match record.and_then(|record| there(node, &agent, record)) {
            Some(there) => {
                let seen_ms = unix_ms();
                known.insert(
                    asked.clone(),
                    Known {
                        agent,
                        seen_ms,
                        there: Some(there),
                        between: false,
                    },
                );
            }
            None => absent.push((asked, agent, between)),
        }
    }
    let away: Vec<&AgentId> = absent.iter().map(|(_, agent, _)| agent).collect();
    let seen = find::last_seen(store, &away).await?;
    for ((asked, agent, between), seen) in absent.into_iter().zip(seen) {
        if let Some(seen_ms) = seen {
            known.insert(
                asked.clone(),
                Known {
                    agent,
                    seen_ms,
                    there: None,
                    between,
                },
            );
        }
    }
    Ok(())
}

/// The session that a record tells of, if a living peer has it.
fn there(node: &Node, agent: &AgentId, record: AgentRecord) -> Option<There> {
    let peer = node.peers.get(&record.node_id)?;
    (record.disconnected_at_ms == 0 && peer.life == record.node_life).then(|| There {
        agent: agent.clone(),
        node: record.node_id,
        session: record.session_id,
        epoch: record.journal_epoch,
        since_ms: Some(record.epoch_since_ms).filter(|at| *at != 0),
    })
}

/// What is to be passed on for one task.
#[derive(Debug)]
pub(super) struct Outgoing {
    cell: Arc<RunCell>,
    by_node: HashMap<String, Vec<Pending>>,
}

#[derive(Debug, Clone)]
struct Pending {
    bucket: u32,
    index: u32,
    agent: AgentId,
    session: u64,
    /// Empty: a termination.
    dispatch: Bytes,
    /// How far the target had got before.
    before: Phase,
}

/// A target that nobody has been found for.
pub(super) type Missing = (u32, u32, AgentId);

impl Outgoing {
    pub(super) fn new(cell: &Arc<RunCell>) -> Self {
        Self {
            cell: Arc::clone(cell),
            by_node: HashMap::default(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_node.is_empty()
    }

    pub(super) fn dispatch(&mut self, there: &There, place: (u32, u32), own: Vec<u8>, before: Phase) {
        self.push(there, place, own.into(), before);
    }

    pub(super) fn terminate(&mut self, there: &There, place: (u32, u32)) {
        self.push(there, place, Bytes::new(), Phase::Waiting);
    }

    fn push(&mut self, there: &There, (bucket, index): (u32, u32), dispatch: Bytes, before: Phase) {
        let (agent, session) = (there.agent.clone(), there.session);
        let pending = Pending {
            bucket,
            index,
            agent,
            session,
            dispatch,
            before,
        };
        self.by_node.entry(there.node.clone()).or_default().push(pending);
    }

    /// Hands everything over, one call a node (more for very many), all nodes at once. Returns the dispatches whose session was not
    /// there any more.
    pub(super) async fn send(self, node: &Arc<Node>) -> Vec<Missing> {
        let calls = self.by_node.into_iter().flat_map(|(to, pending)| {
            let chunks: Vec<Vec<Pending>> = pending.chunks(CALL_DELIVERIES).map(<[Pending]>::to_vec).collect();
            chunks.into_iter().map(move |chunk| (to.clone(), chunk))
        });
        let calls = calls.map(|(to, chunk)| deliver(node, &self.cell, to, chunk));
        futures::future::join_all(calls).await.into_iter().flatten().collect()
    }
}

/// Calls one node until it has answered, it is gone, or it is too late.
async fn deliver(node: &Arc<Node>, cell: &Arc<RunCell>, to: String, pending: Vec<Pending>) -> Vec<Missing> {
    let request = p::DeliverRequest {
        node_id: node.config.node_id.clone(),
        task_id: cell.header.task_id.clone(),
        shared: if pending.iter().any(|one| !one.dispatch.is_empty()) {
            cell.shared.clone()
        } else {
            Bytes::new()
        },
        deliveries: pending
            .iter()
            .map(|one| p::Delivery {
                agent_id: one.agent.as_str().to_owned(),
                session_id: one.session,
                place: Some(p::Place {
                    bucket: one.bucket,
                    index: one.index,
                }),
                dispatch: one.dispatch.clone(),
            })
            .collect(),
    };
    let mut wait = Duration::from_millis(100);
    let reply = loop {
        let Some(peer) = node.peers.get(&to) else {
            // The node is gone: its agents are looked for elsewhere. What it may have sent is safe to send again; see `Phase::Sent`.
            let lost = pending.into_iter().filter(|one| !one.dispatch.is_empty());
            return lost.map(|one| (one.bucket, one.index, one.agent)).collect();
        };
        match peer.deliver(request.clone()).await {
            Ok(reply) => break reply,
            Err(error) => {
                node.metrics.peer_failures.inc();
                tracing::warn!(task = cell.header.task_id, peer = to, error = %error.message(), "a peer has not taken dispatches yet");
            }
        }
        tokio::select! {
            () = node.sessions_gone() => return vec![],
            () = tokio::time::sleep(node.random.jittered(wait)) => {}
        }
        wait = (wait * 2).min(Duration::from_secs(2));
        if unix_ms() > cell.header.not_after_ms || cell.is_handed() {
            return vec![];
        }
    };
    node.metrics
        .dispatched
        .inc_by((pending.len() - reply.gone.len().min(pending.len())) as u64);
    let mut missing = Vec::new();
    {
        let mut run = cell.run.lock();
        for n in reply.gone {
            let Some(one) = pending.get(n as usize).filter(|one| !one.dispatch.is_empty()) else {
                continue;
            };
            let Some(target) = run.target(one.bucket, one.index) else {
                continue;
            };
            let ours = match &target.phase {
                Phase::Sent(_, session) | Phase::Asked(session) => *session == one.session,
                _ => false,
            };
            if ours {
                target.phase = one.before.clone();
                missing.push((one.bucket, one.index, one.agent.clone()));
            }
        }
    }
    for n in reply.full {
        if let Some(one) = pending.get(n as usize).filter(|one| !one.dispatch.is_empty()) {
            let text = "too much is waiting to be sent to this agent; try again later";
            close(node, cell, one.bucket, one.index, Inner::Limit, text).await;
        }
    }
    missing
}

/// Passes on what waits, then looks for the agents that were not where they were thought to be, until the grace is over.
pub(super) async fn deliver_and_chase(node: Arc<Node>, cell: Arc<RunCell>, out: Outgoing, mut missing: Vec<Missing>) {
    missing.extend(out.send(&node).await);
    let until = cell.header.created_at_ms.max(cell.taken_ms) + node.config.task.reconnect_grace_ms;
    while !missing.is_empty() && unix_ms() < until && !cell.is_handed() {
        tokio::select! {
            () = node.life.draining() => return,
            () = tokio::time::sleep(CHASE) => {}
        }
        missing = place_again(&node, &cell, missing).await;
    }
}

/// Tries to find the agents of targets again; returns those that are still nowhere.
async fn place_again(node: &Arc<Node>, cell: &Arc<RunCell>, missing: Vec<Missing>) -> Vec<Missing> {
    let open: Vec<Missing> = {
        let mut run = cell.run.lock();
        let all = run.all_done();
        let mut open = missing;
        open.retain(|(bucket, index, _)| {
            run.target(*bucket, *index)
                .is_some_and(|t| t.done != all && !matches!(t.phase, Phase::Held(_)))
        });
        open
    };
    let agents: Vec<AgentId> = open.iter().map(|(_, _, agent)| agent.clone()).collect();
    let known = match whereabouts(node, &agents).await {
        Ok(known) => known,
        Err(error) => {
            tracing::debug!(%error, "where agents are can't be read");
            return open;
        }
    };
    let mut out = Outgoing::new(cell);
    let mut still = Vec::new();
    for (bucket, index, agent) in open {
        let place = Place {
            run: Arc::clone(cell),
            bucket,
            index,
        };
        let here = node.registry.get(&agent);
        match (here, known.get(&agent).and_then(|known| known.there.as_ref())) {
            (Some(session), _) => try_reach(node, &place, &Reach::Here(&session), &mut out).await,
            (None, Some(there)) => try_reach(node, &place, &Reach::There(there), &mut out).await,
            (None, None) => still.push((bucket, index, agent)),
        }
    }
    still.extend(out.send(node).await);
    still
}

async fn try_reach(node: &Arc<Node>, place: &Place, reach: &Reach<'_>, out: &mut Outgoing) {
    let (decision, before) = decide(node, place, reach, Has::Unsaid);
    carry_out(node, place, reach, decision, before, out).await;
}

/// Compares a task with what the store and other nodes know: rows whose notice was lost are noted, agents that moved without a notice
/// are given what they should have.
pub(super) async fn reconcile(node: Arc<Node>, cell: Arc<RunCell>) {
    match reconcile_once(&node, &cell).await {
        Ok(found) => {
            // As long as something is found out this way it is worth looking again soon.
            let wait = cell.check_wait_ms.load(Ordering::Relaxed);
            let wait = if found { 5_000 } else { (wait * 2).min(LONGEST_CHECK_MS) };
            cell.check_wait_ms.store(wait, Ordering::Relaxed);
            cell.check_ms.store(unix_ms() + wait, Ordering::Relaxed);
        }
        Err(error) => {
            tracing::debug!(task = cell.header.task_id, %error, "a task can't be compared with the store now");
            cell.check_ms.store(unix_ms() + 3_000, Ordering::Relaxed);
        }
    }
}

async fn reconcile_once(node: &Arc<Node>, cell: &Arc<RunCell>) -> Result<bool, StoreError> {
    let open: Vec<(Missing, Vec<RowPlace>)> = {
        let run = cell.run.lock();
        let all = run.all_done();
        let mut open = Vec::new();
        for (bucket, states) in (0..).zip(&run.targets) {
            for (index, state) in (0..).zip(states) {
                let Some(agent) = state.agent.as_ref().filter(|_| state.done != all) else {
                    continue;
                };
                let rows = run.open_atomics(bucket, index).into_iter();
                let rows = rows.map(|atomic| RowPlace { bucket, index, atomic }).collect();
                open.push(((bucket, index, agent.clone()), rows));
            }
        }
        open
    };
    let mut found = false;
    for some in open.chunks(LOOK_UP) {
        let places: Vec<RowPlace> = some.iter().flat_map(|(_, rows)| rows.iter().copied()).collect();
        let rows = node.task_store.rows(&cell.header.task_id, &places).await?;
        let mut reported = HashSet::default();
        for (place, row) in places.iter().zip(rows) {
            if row.terminal.is_some() {
                found = true;
                node.tasks.mark(cell, *place);
            }
            if row.terminal.is_some() || row.running.is_some() {
                reported.insert((place.bucket, place.index));
            }
        }
        let agents: Vec<AgentId> = some.iter().map(|((_, _, agent), _)| agent.clone()).collect();
        let known = whereabouts(node, &agents).await?;
        let mut out = Outgoing::new(cell);
        for ((bucket, index, agent), _) in some {
            if !reported.contains(&(*bucket, *index))
                && let Some(target) = cell.run.lock().target(*bucket, *index)
            {
                target.send_again();
            }
            if let Some(session) = node.registry.get(agent) {
                let place = Place {
                    run: Arc::clone(cell),
                    bucket: *bucket,
                    index: *index,
                };
                try_reach(node, &place, &Reach::Here(&session), &mut out).await;
            } else if let Some(there) = known.get(agent).and_then(|known| known.there.as_ref()) {
                let place = Place {
                    run: Arc::clone(cell),
                    bucket: *bucket,
                    index: *index,
                };
                try_reach(node, &place, &Reach::There(there), &mut out).await;
            }
        }
        if !out.is_empty() {
            found = true;
            out.send(node).await;
        }
        if cell.is_handed() {
            break;
        }
    }
    Ok(found)
}
