//! From a task's targets to its agents: who is meant, who is there, what is sent, and the rows of those who get nothing.
//!
//! A target is in the index of its agent before anybody looks whether the agent is connected, and is only sent under the lock of its
//! task, so that it is sent exactly once to each session that should have it. What may be sent at all is decided by [`super::run`].

use std::sync::Arc;

use bytes::Bytes;
use gse_proto::codes::Inner;
use gse_proto::frame::Frame;
use gse_proto::ids::AgentId;
use gse_proto::session as s;
use gse_proto::state::StoredRow;
use prost::Message;

use super::cell::{Place, RunCell};
use super::remote::{Known, Outgoing, There, deliver_and_chase, whereabouts};
use super::run::{AgentView, Decision, Has, Phase};
use super::store::RowPlace;
use crate::Node;
use crate::clock::unix_ms;
use crate::session::outbox::Refused;
use crate::session::registry::Session;

/// Targets handled before other tasks of the runtime get their turn.
const YIELD_EVERY: usize = 256;

/// Targets with open rows: place, asked id, and code and text of a refusal.
fn open_targets(cell: &RunCell) -> Vec<(u32, u32, String, i32, String)> {
    let run = cell.run.lock();
    let all = run.all_done();
    let mut open = Vec::new();
    for (b, (bucket, states)) in (0..).zip(run.buckets.iter().zip(&run.targets)) {
        for (i, (target, state)) in (0..).zip(bucket.targets.iter().zip(states)) {
            if state.done != all {
                open.push((
                    b,
                    i,
                    target.agent_id.clone(),
                    target.refused_code,
                    target.refused_msg.clone(),
                ));
            }
        }
    }
    open
}

/// Where an agent is connected.
#[derive(Debug)]
pub(super) enum Reach<'a> {
    /// To this node.
    Here(&'a Arc<Session>),
    /// To another one.
    There(&'a There),
}

/// Resolves the targets of a task and sends what can be sent. Agents without a session are waited for if they were heard shortly
/// before `at` (unix ms). When it returns, every target with an agent is tied to it; what goes through other nodes is still under way.
pub(super) async fn fan_out(node: &Arc<Node>, cell: &Arc<RunCell>, at: u64) {
    fail::fail_point!("fan-out");
    let started = std::time::Instant::now();
    let targets = open_targets(cell);
    let mut elsewhere = Vec::new();
    let mut out = Outgoing::new(cell);
    let mut missing = Vec::new();
    for (n, (bucket, index, asked, refused_code, refused_msg)) in targets.into_iter().enumerate() {
        if n % YIELD_EVERY == YIELD_EVERY - 1 {
            tokio::task::yield_now().await;
        }
        if refused_code != 0 {
            close_with(node, cell, bucket, index, refused_code, &refused_msg).await;
            continue;
        }
        // Ids that do not parse were refused above.
        let Ok(asked) = AgentId::parse(&asked) else { continue };
        match node.registry.find(&asked) {
            Some(session) => {
                let agent = session.agent.clone();
                let place = Place {
                    run: Arc::clone(cell),
                    bucket,
                    index,
                };
                if !try_agent(node, &place, agent.clone(), None, &mut out).await {
                    missing.push((bucket, index, agent));
                }
            }
            None => elsewhere.push((bucket, index, asked)),
        }
    }
    if !elsewhere.is_empty() {
        for (bucket, index, found) in absent(node, elsewhere, at).await {
            match found {
                Found::Somewhere(agent, there) => {
                    let place = Place {
                        run: Arc::clone(cell),
                        bucket,
                        index,
                    };
                    let nowhere = there.is_none();
                    if nowhere {
                        cell.due_by(cell.header.created_at_ms.max(cell.taken_ms) + node.config.task.reconnect_grace_ms);
                    }
                    try_agent(node, &place, agent.clone(), there.as_ref(), &mut out).await;
                    if nowhere {
                        missing.push((bucket, index, agent));
                    }
                }
                Found::Nowhere(why) => close(node, cell, bucket, index, Inner::AgentOffline, &why).await,
            }
        }
    }
    node.metrics.fan_out_seconds.observe(started.elapsed().as_secs_f64());
    if !out.is_empty() || (!missing.is_empty() && node.peers.is_on()) {
        let going = deliver_and_chase(Arc::clone(node), Arc::clone(cell), out, missing);
        node.life.spawn("task delivery", going);
    }
}

/// Ties a target to its agent and, if that is connected here or there, sends it. False when it is connected nowhere.
async fn try_agent(node: &Arc<Node>, place: &Place, agent: AgentId, there: Option<&There>, out: &mut Outgoing) -> bool {
    {
        let mut run = place.run.run.lock();
        let Some(target) = run.target(place.bucket, place.index) else {
            return true;
        };
        target.agent = Some(agent.clone());
    }
    node.tasks.index(&agent, place.clone());
    // Only now: an agent that connects from here on finds the target in the index.
    let session = node.registry.get(&agent);
    let lately = node.tasks.lately.get(&agent);
    let reach = match (&session, lately.as_ref().or(there)) {
        (Some(session), _) => Reach::Here(session),
        (None, Some(there)) => Reach::There(there),
        (None, None) => return false,
    };
    let (decision, before) = decide(node, place, &reach, Has::Unsaid);
    carry_out(node, place, &reach, decision, before, out).await;
    true
}

/// Decides about a target whose agent is connected; also returns how far it had got before.
pub(super) fn decide(node: &Node, place: &Place, reach: &Reach<'_>, has: Has) -> (Decision, Phase) {
    let cell = &place.run;
    let nothing = (Decision::Leave, Phase::Waiting);
    if cell.is_handed() {
        return nothing;
    }
    let view = match reach {
        Reach::Here(session) => AgentView {
            session: session.id,
            epoch: &session.epoch,
            epoch_since_ms: node.presence.epoch_since(session),
            has,
        },
        Reach::There(there) => AgentView {
            session: there.session,
            epoch: &there.epoch,
            epoch_since_ms: there.since_ms,
            has,
        },
    };
    let mut run = cell.run.lock();
    let all = run.all_done();
    let Some(target) = run.target(place.bucket, place.index) else {
        return nothing;
    };
    let not_read_yet = matches!(reach, Reach::Here(_)) && view.epoch_since_ms.is_none();
    if not_read_yet && matches!(target.phase, Phase::MaybeSent | Phase::Asked(_)) {
        // How long its journal has been the same is being read, and decides whether it may be sent: once it is read, the opening of the session is told here.
        return nothing;
    }
    if target.done == all {
        return nothing;
    }
    let before = target.phase.clone();
    let header = &cell.header;
    let decision = target.on_agent(view, header.created_at_ms, header.not_after_ms, unix_ms());
    (decision, before)
}

pub(super) async fn carry_out(
    node: &Arc<Node>,
    place: &Place,
    reach: &Reach<'_>,
    decision: Decision,
    before: Phase,
    out: &mut Outgoing,
) {
    let Place {
        run: cell,
        bucket,
        index,
    } = place;
    let at = (*bucket, *index);
    match decision {
        Decision::Leave => {}
        Decision::Dispatch | Decision::Ask => {
            // No journal has an empty epoch: whoever does not know the target refuses it.
            let epoch = match reach {
                _ if decision == Decision::Ask => Bytes::new(),
                Reach::Here(session) => session.epoch.clone(),
                Reach::There(there) => there.epoch.clone(),
            };
            let Some((own, stop)) = own_part(place, epoch) else {
                return;
            };
            match reach {
                Reach::Here(session) => dispatch(node, place, session, &own).await,
                Reach::There(there) => out.dispatch(there, at, own, before),
            }
            if decision == Decision::Ask && stop {
                terminate_at(&cell.header.task_id, at, reach, out);
            }
        }
        Decision::Terminate => terminate_at(&cell.header.task_id, at, reach, out),
        Decision::CloseStopped => {
            let text = "ended on request before it was started";
            close(node, cell, *bucket, *index, Inner::Terminated, text).await;
        }
        Decision::CloseLate => {
            let text = "the agent came too late: the time in which the script may be started is over; it was not run";
            close(node, cell, *bucket, *index, Inner::AgentOffline, text).await;
        }
        Decision::CloseUnknown => {
            let text = "the agent has lost its journal; whether the script ran can't be known, and it is not run again";
            close(node, cell, *bucket, *index, Inner::Unknown, text).await;
        }
    }
}

fn terminate_at(task: &str, at: (u32, u32), reach: &Reach<'_>, out: &mut Outgoing) {
    match reach {
        Reach::Here(session) => send_terminate(task, at.0, at.1, session),
        Reach::There(there) => out.terminate(there, at),
    }
}

/// The part of a dispatch that is the target's own, encoded, and whether its end was asked for.
fn own_part(place: &Place, epoch: Bytes) -> Option<(Vec<u8>, bool)> {
    let mut run = place.run.run.lock();
    let stop = run.target(place.bucket, place.index)?.stop;
    let target = run
        .buckets
        .get(place.bucket as usize)?
        .targets
        .get(place.index as usize)?;
    let own = s::Dispatch {
        target: Some(s::TargetRef {
            task_id: place.run.header.task_id.clone(),
            bucket: place.bucket,
            index: place.index,
        }),
        epoch,
        user: target.user.clone(),
        asked_id: target.agent_id.clone(),
        ..Default::default()
    };
    Some((own.encode_to_vec(), stop))
}

async fn dispatch(node: &Arc<Node>, place: &Place, session: &Arc<Session>, own: &[u8]) {
    let cell = &place.run;
    fail::fail_point!("dispatch-before");
    match session.outbox.work(Frame::DISPATCH, own, cell.shared.clone()) {
        Ok(()) => {
            node.metrics.dispatched.inc();
            fail::fail_point!("dispatch-after");
        }
        // It counts as sent: the agent's next hello says that it does not have it, and it is sent again if there is time.
        Err(Refused::Closed) => {}
        Err(Refused::Full) => {
            let text = "too much is waiting to be sent to this agent; try again later";
            close(node, cell, place.bucket, place.index, Inner::Limit, text).await;
        }
    }
}

/// Tells an agent to end a target. Idempotent; one that it does not have is nothing to it.
pub(super) fn send_terminate(task: &str, bucket: u32, index: u32, session: &Session) {
    let frame = s::Terminate {
        target: Some(s::TargetRef {
            task_id: task.to_owned(),
            bucket,
            index,
        }),
    };
    if session.outbox.control(&frame.into()).is_err() {
        tracing::debug!(task, agent = %session.agent, "session ended before a termination; it is sent again on return");
    }
}

pub(super) async fn close(node: &Arc<Node>, cell: &Arc<RunCell>, bucket: u32, index: u32, code: Inner, text: &str) {
    close_with(node, cell, bucket, index, code.code(), text).await;
}

/// Gives a target's open rows their end.
async fn close_with(node: &Arc<Node>, cell: &Arc<RunCell>, bucket: u32, index: u32, code: i32, text: &str) {
    let (atomics, touched) = {
        let mut run = cell.run.lock();
        let touched = run
            .target(bucket, index)
            .is_some_and(|target| target.phase != Phase::Waiting);
        (run.open_atomics(bucket, index), touched)
    };
    let now = unix_ms();
    let (status, exit_code) = if code == Inner::Terminated.code() {
        (s::RowStatus::Stopped, 143)
    } else if code == Inner::Unknown.code() {
        (s::RowStatus::Restarted, 255)
    } else {
        (s::RowStatus::Failed, 255)
    };
    for atomic in atomics {
        let place = RowPlace { bucket, index, atomic };
        // What the agent has told already stays: when it started, and its output.
        let (start_ms, output_len) = if touched {
            match node.task_store.progress(&cell.header.task_id, place).await {
                Ok(known) => (known.start_ms, known.output_len),
                Err(error) => {
                    tracing::warn!(task = cell.header.task_id, %error, "a row is closed without what its agent had told");
                    (0, 0)
                }
            }
        } else {
            (0, 0)
        };
        let row = StoredRow {
            status: status.into(),
            error_code: code,
            error_msg: text.to_owned(),
            exit_code,
            start_ms: if start_ms == 0 { now } else { start_ms },
            end_ms: now.max(start_ms),
            tag: String::new(),
            output_len,
        };
        node.ingest.own(cell, place, row).await;
    }
}

/// What is known of a target whose agent is not connected here.
enum Found {
    /// Its agent, and its session on another node if it has one; without one it was there a moment ago.
    Somewhere(AgentId, Option<There>),
    /// There is none, and why.
    Nowhere(String),
}

/// For targets without a session here: where else the agent is, or was a moment before `at`.
async fn absent(node: &Arc<Node>, targets: Vec<(u32, u32, AgentId)>, at: u64) -> Vec<(u32, u32, Found)> {
    let asked: Vec<AgentId> = targets.iter().map(|(_, _, asked)| asked.clone()).collect();
    let known = match whereabouts(node, &asked).await {
        Ok(known) => known,
        Err(error) => {
            // The store is away: everybody gets the grace that a recently seen agent has.
            tracing::warn!(%error, "whether absent agents were there lately can't be read; they are waited for");
            return targets
                .into_iter()
                .map(|(b, i, asked)| (b, i, Found::Somewhere(asked, None)))
                .collect();
        }
    };
    let now = unix_ms();
    let recently = node.config.session.heartbeat_interval_ms + node.config.session.heartbeat_interval_ms / 5;
    let mut found = Vec::with_capacity(targets.len());
    for (bucket, index, asked) in targets {
        let what = match known.get(&asked).cloned() {
            Some(Known {
                agent,
                there: Some(there),
                ..
            }) => Found::Somewhere(agent, Some(there)),
            Some(Known {
                agent,
                seen_ms,
                between,
                ..
            }) if at.saturating_sub(seen_ms) <= recently + if between { node.config.peers.lease_ms } else { 0 } => {
                Found::Somewhere(agent, None)
            }
            Some(Known { seen_ms, .. }) => {
                let away = now.saturating_sub(seen_ms) / 1000;
                Found::Nowhere(format!("agent {asked} is offline, last heard {away} s ago"))
            }
            None => Found::Nowhere(format!("no agent is known as {asked}")),
        };
        found.push((bucket, index, what));
    }
    found
}
