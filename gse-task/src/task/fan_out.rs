//! From a task's targets to its agents: who is meant, who is there, what is sent, and the rows of those who get nothing.
//!
//! A target is in the index of its agent before anybody looks whether the agent is connected, and is only sent under the lock of its
//! task, so that it is sent exactly once to each session that should have it. What may be sent at all is decided by [`super::run`].

use std::collections::HashMap;
use std::sync::Arc;

use gse_core::store::{Batch, StoreError, as_bytes, as_float};
use gse_proto::codes::Inner;
use gse_proto::frame::Frame;
use gse_proto::ids::AgentId;
use gse_proto::keys;
use gse_proto::session as s;
use gse_proto::state::StoredRow;
use prost::Message;

use super::cell::{Place, RunCell};
use super::run::{AgentView, Decision, Phase};
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

/// Resolves the targets of a task and sends what can be sent. Agents without a session are waited for if they were heard shortly
/// before `at` (unix ms).
pub(super) async fn fan_out(node: &Arc<Node>, cell: &Arc<RunCell>, at: u64) {
    fail::fail_point!("fan-out");
    let started = std::time::Instant::now();
    let targets = open_targets(cell);
    let mut unknown = Vec::new();
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
                try_agent(node, &place, agent).await;
            }
            None => unknown.push((bucket, index, asked)),
        }
    }
    if !unknown.is_empty() {
        let absent = absent(node, unknown, at).await;
        for (bucket, index, agent, why) in absent {
            match agent {
                Some(agent) => {
                    let place = Place {
                        run: Arc::clone(cell),
                        bucket,
                        index,
                    };
                    cell.due_by(cell.header.created_at_ms + node.config.task.reconnect_grace_ms);
                    try_agent(node, &place, agent).await;
                }
                None => close(node, cell, bucket, index, Inner::AgentOffline, &why).await,
            }
        }
    }
    node.metrics.fan_out_seconds.observe(started.elapsed().as_secs_f64());
}

/// Ties a target to its agent and, if that is connected, sends it.
async fn try_agent(node: &Arc<Node>, place: &Place, agent: AgentId) {
    {
        let mut run = place.run.run.lock();
        let Some(target) = run.target(place.bucket, place.index) else {
            return;
        };
        target.agent = Some(agent.clone());
    }
    node.tasks.index(&agent, place.clone());
    // Only now: an agent that connects from here on finds the target in the index.
    if let Some(session) = node.registry.get(&agent) {
        let decision = decide(node, place, &session, false);
        carry_out(node, place, &session, decision).await;
    }
}

pub(super) fn decide(node: &Node, place: &Place, session: &Session, held: bool) -> Decision {
    let header = &place.run.header;
    let mut run = place.run.run.lock();
    let all = run.all_done();
    let Some(target) = run.target(place.bucket, place.index) else {
        return Decision::Leave;
    };
    if target.done == all {
        return Decision::Leave;
    }
    let view = AgentView {
        session: session.id,
        epoch: &session.epoch,
        epoch_since_ms: node.presence.epoch_since(&session.agent),
        held,
    };
    target.on_agent(view, header.created_at_ms, header.not_after_ms, unix_ms())
}

pub(super) async fn carry_out(node: &Arc<Node>, place: &Place, session: &Arc<Session>, decision: Decision) {
    let Place {
        run: cell,
        bucket,
        index,
    } = place;
    match decision {
        Decision::Leave => {}
        Decision::Dispatch => dispatch(node, place, session).await,
        Decision::Terminate => send_terminate(&cell.header.task_id, *bucket, *index, session),
        Decision::CloseStopped => {
            close(
                node,
                cell,
                *bucket,
                *index,
                Inner::Terminated,
                "ended on request before it was started",
            )
            .await;
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

async fn dispatch(node: &Arc<Node>, place: &Place, session: &Arc<Session>) {
    let cell = &place.run;
    let own = {
        let run = cell.run.lock();
        let Some(target) = run
            .buckets
            .get(place.bucket as usize)
            .and_then(|bucket| bucket.targets.get(place.index as usize))
        else {
            return;
        };
        s::Dispatch {
            target: Some(s::TargetRef {
                task_id: cell.header.task_id.clone(),
                bucket: place.bucket,
                index: place.index,
            }),
            epoch: session.epoch.clone(),
            user: target.user.clone(),
            asked_id: target.agent_id.clone(),
            ..Default::default()
        }
        .encode_to_vec()
    };
    fail::fail_point!("dispatch-before");
    match session.outbox.work(Frame::DISPATCH, &own, cell.shared.clone()) {
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
                Ok(known) => known,
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

/// For targets without a session here: the agent to wait for, or why there is none.
async fn absent(
    node: &Arc<Node>,
    targets: Vec<(u32, u32, AgentId)>,
    at: u64,
) -> Vec<(u32, u32, Option<AgentId>, String)> {
    let known = match last_seen(node, &targets).await {
        Ok(known) => known,
        Err(error) => {
            // The store is away: everybody gets the grace that a recently seen agent has.
            tracing::warn!(%error, "whether absent agents were there lately can't be read; they are waited for");
            return targets
                .into_iter()
                .map(|(b, i, asked)| (b, i, Some(asked), String::new()))
                .collect();
        }
    };
    let now = unix_ms();
    let recently = node.config.session.heartbeat_interval_ms + node.config.session.heartbeat_interval_ms / 5;
    targets
        .into_iter()
        .map(|(bucket, index, asked)| match known.get(asked.as_str()) {
            Some((agent, seen)) if at.saturating_sub(*seen) <= recently => {
                (bucket, index, Some(agent.clone()), String::new())
            }
            Some((_, seen)) => {
                let away = now.saturating_sub(*seen) / 1000;
                (
                    bucket,
                    index,
                    None,
                    format!("agent {asked} is offline, last heard {away} s ago"),
                )
            }
            None => (bucket, index, None, format!("no agent is known as {asked}")),
        })
        .collect()
}

/// By asked id: the agent's own id and when (unix ms) it was last heard.
async fn last_seen(
    node: &Arc<Node>,
    targets: &[(u32, u32, AgentId)],
) -> Result<HashMap<String, (AgentId, u64)>, StoreError> {
    let store = node.task_store.raw();
    let mut resolved: Vec<(&AgentId, AgentId)> = Vec::with_capacity(targets.len());
    let mut batch = Batch::new();
    for (_, _, asked) in targets {
        let key = keys::agent_alias(keys::agent_shard(asked.as_str()));
        let mut cmd = redis::cmd("HGET");
        cmd.arg(&key).arg(asked.as_str());
        batch.push(&key, cmd);
    }
    for ((_, _, asked), alias) in targets.iter().zip(store.run(batch).await?) {
        let alias = as_bytes(alias)?.and_then(|bytes| AgentId::parse(std::str::from_utf8(&bytes).ok()?).ok());
        resolved.push((asked, alias.unwrap_or_else(|| asked.clone())));
    }
    let mut batch = Batch::new();
    for (_, agent) in &resolved {
        let key = keys::agent_seen(keys::agent_shard(agent.as_str()));
        let mut cmd = redis::cmd("ZSCORE");
        cmd.arg(&key).arg(agent.as_str());
        batch.push(&key, cmd);
    }
    let mut known = HashMap::new();
    for ((asked, agent), seen) in resolved.into_iter().zip(store.run(batch).await?) {
        if !matches!(seen, redis::Value::Nil) {
            known.insert(asked.as_str().to_owned(), (agent, as_float(seen)? as u64));
        }
    }
    Ok(known)
}
