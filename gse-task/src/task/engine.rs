//! Tasks under way on this node: fan-out, agents that come back, terminations, deadlines, the end.
//!
//! There is no timer per target or task: one pass a second looks at what is due. A target is in the index of its agent before
//! anybody looks whether the agent is connected, and is only sent under the lock of its task, so that it is sent exactly once to
//! each session that should have it. What may be sent at all is decided by [`super::run`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use dashmap::DashMap;
use gse_core::store::{Batch, StoreError, as_bytes, as_float};
use gse_proto::codes::Inner;
use gse_proto::frame::Frame;
use gse_proto::ids::AgentId;
use gse_proto::keys;
use gse_proto::session as s;
use gse_proto::state::{StoredRow, TaskHeader};
use parking_lot::Mutex;
use prost::Message;

use super::run::{AgentView, Decision, Phase, Run};
use super::store::RowPlace;
use crate::Node;
use crate::clock::unix_ms;
use crate::session::outbox::Refused;
use crate::session::registry::Session;

/// Targets handled before other tasks of the runtime get their turn.
const YIELD_EVERY: usize = 256;

/// A task under way.
#[derive(Debug)]
pub struct RunCell {
    /// Its id.
    pub task: Arc<str>,
    /// What was submitted.
    pub header: Arc<TaskHeader>,
    run: Mutex<Run>,
    /// The part of its dispatches that is the same for all targets, encoded once.
    shared: Bytes,
    /// When (unix ms) something is due; see [`Tasks::sweep`].
    due_ms: AtomicU64,
    finishing: AtomicBool,
}

/// A target of a task under way.
#[derive(Debug, Clone)]
struct Place {
    run: Arc<RunCell>,
    bucket: u32,
    index: u32,
}

impl RunCell {
    fn new(run: Run) -> Self {
        let header = Arc::clone(&run.header);
        let shared = s::Dispatch {
            not_after_ms: header.not_after_ms,
            output_limit: header.output_limit,
            scripts: header
                .scripts
                .iter()
                .map(|script| s::Script {
                    name: script.name.clone(),
                    store_dir: script.store_dir.clone(),
                    content: script.content.clone(),
                })
                .collect(),
            atomic_tasks: header
                .atomics
                .iter()
                .map(|atomic| s::AtomicTask {
                    id: atomic.id,
                    command: atomic.command.clone(),
                    timeout_ms: atomic.timeout_ms,
                    after: atomic.after.clone(),
                })
                .collect(),
            ..Default::default()
        };
        Self {
            task: header.task_id.as_str().into(),
            due_ms: AtomicU64::new(header.deadline_ms),
            shared: shared.encode_to_vec().into(),
            header,
            run: Mutex::new(run),
            finishing: AtomicBool::new(false),
        }
    }

    /// Whether a row is terminal.
    #[must_use]
    pub fn is_done(&self, place: RowPlace) -> bool {
        let mut run = self.run.lock();
        run.target(place.bucket, place.index)
            .is_none_or(|target| target.done & 1_u64.checked_shl(place.atomic).unwrap_or(0) != 0)
    }

    /// Whether a row exists and is of this agent.
    #[must_use]
    pub fn belongs(&self, place: RowPlace, agent: &AgentId) -> bool {
        (place.atomic as usize) < self.header.atomics.len()
            && self
                .run
                .lock()
                .target(place.bucket, place.index)
                .is_some_and(|target| target.agent.as_ref() == Some(agent))
    }

    /// The agent has reported the target, so its journal has it.
    pub fn held(&self, bucket: u32, index: u32, epoch: &Bytes) {
        if let Some(target) = self.run.lock().target(bucket, index) {
            target.phase = Phase::Held(epoch.clone());
        }
    }

    /// How long keys that are written now have to live.
    #[must_use]
    pub fn ttl_s(&self, now_ms: u64) -> u64 {
        self.header.deadline_ms.saturating_sub(now_ms) / 1000 + EXTRA_TTL_S
    }

    fn due_by(&self, at_ms: u64) {
        self.due_ms.fetch_min(at_ms, Ordering::Relaxed);
    }
}

/// What keys outlive a deadline by, so that the rows closed at the deadline find them there; results have their own TTL then.
const EXTRA_TTL_S: u64 = 2 * 3600;

/// The tasks under way.
#[derive(Debug, Default)]
pub struct Tasks {
    runs: DashMap<Arc<str>, Arc<RunCell>>,
    by_agent: DashMap<AgentId, Vec<Place>>,
    node: std::sync::OnceLock<std::sync::Weak<Node>>,
    recovered: AtomicBool,
}

impl Tasks {
    /// Ties the tasks to their node; to be called once, before anything else.
    pub fn attach(&self, node: &Arc<Node>) {
        self.node.get_or_init(|| Arc::downgrade(node));
    }

    fn node(&self) -> Option<Arc<Node>> {
        self.node.get().and_then(std::sync::Weak::upgrade)
    }

    /// How many are under way.
    #[must_use]
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether none is under way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// A task under way.
    #[must_use]
    pub fn run(&self, task: &str) -> Option<Arc<RunCell>> {
        self.runs.get(task).map(|entry| Arc::clone(entry.value()))
    }

    /// Whether the unfinished tasks of this node's last life have been taken up.
    #[must_use]
    pub fn recovered(&self) -> bool {
        self.recovered.load(Ordering::Acquire)
    }

    /// See [`Tasks::recovered`].
    pub fn set_recovered(&self) {
        self.recovered.store(true, Ordering::Release);
    }

    /// Takes up a new task that is in the store and starts its fan-out.
    pub fn start(&self, run: Run) {
        let Some(node) = self.node() else { return };
        let cell = Arc::new(RunCell::new(run));
        self.runs.insert(Arc::clone(&cell.task), Arc::clone(&cell));
        node.metrics.tasks_started.inc();
        let now = unix_ms();
        let life = node.life.clone();
        life.spawn("task fan-out", async move { fan_out(&node, &cell, now).await });
    }

    /// Takes up an unfinished task of this node's last life. Returns when every target of it is tied to its agent, so that agents
    /// that connect afterwards find it.
    pub async fn resume(&self, run: Run) {
        let Some(node) = self.node() else { return };
        let cell = Arc::new(RunCell::new(run));
        self.runs.insert(Arc::clone(&cell.task), Arc::clone(&cell));
        if cell.run.lock().open_rows == 0 {
            cell.due_by(0);
        }
        // Who was away when the task was submitted was never sent anything; so that is what counts, not who is away now.
        let at = cell.header.created_at_ms;
        fan_out(&node, &cell, at).await;
    }

    fn index(&self, agent: &AgentId, place: Place) {
        self.by_agent.entry(agent.clone()).or_default().push(place);
    }

    fn unindex(&self, agent: &AgentId, cell: &Arc<RunCell>, bucket: u32, index: u32) {
        if let Some(mut places) = self.by_agent.get_mut(agent) {
            places.retain(|p| !(Arc::ptr_eq(&p.run, cell) && p.bucket == bucket && p.index == index));
        }
        self.by_agent.remove_if(agent, |_, places| places.is_empty());
    }

    /// An agent is connected; `held`: what its journal has.
    pub async fn session_opened(&self, session: &Arc<Session>, held: Vec<s::TargetRef>) {
        let Some(node) = self.node() else { return };
        let held: HashSet<(String, u32, u32)> = held.into_iter().map(|t| (t.task_id, t.bucket, t.index)).collect();
        let places = self
            .by_agent
            .get(&session.agent)
            .map(|entry| entry.value().clone())
            .unwrap_or_default();
        for place in places {
            let is_held = held.contains(&(place.run.header.task_id.clone(), place.bucket, place.index));
            let decision = decide(&node, &place, session, is_held);
            carry_out(&node, &place, session, decision).await;
        }
    }

    /// A session has ended. What was sent on it is decided about when the agent is back, or at the deadline.
    pub fn session_closed(&self, session: &Session) {
        let waiting = self.by_agent.get(&session.agent).map_or(0, |places| places.len());
        if waiting > 0 {
            tracing::info!(agent = %session.agent, targets = waiting, "agent is away with targets under way; they are kept for its return");
        }
    }

    /// A terminal row is stored.
    pub fn mark(&self, cell: &Arc<RunCell>, place: RowPlace) {
        let (finished_target, open) = {
            let mut run = cell.run.lock();
            let last = run.mark(place.bucket, place.index, place.atomic);
            let agent = run
                .target(place.bucket, place.index)
                .filter(|_| last)
                .and_then(|target| target.agent.clone());
            (agent, run.open_rows)
        };
        if let Some(agent) = finished_target {
            self.unindex(&agent, cell, place.bucket, place.index);
        }
        if open == 0 {
            cell.due_by(0);
            let Some(node) = self.node() else { return };
            if !cell.finishing.swap(true, Ordering::AcqRel) {
                node.life.spawn("task end", finish(Arc::clone(&node), Arc::clone(cell)));
            }
        }
    }

    /// The end of targets is asked for (none given: all). The caller has noted it in the store.
    pub async fn terminate(&self, task: &str, places: &[(u32, u32)]) {
        let (Some(node), Some(cell)) = (self.node(), self.run(task)) else {
            return;
        };
        for (bucket, index) in places {
            let (decision, session) = {
                let mut run = cell.run.lock();
                let all = run.all_done();
                let Some(target) = run.target(*bucket, *index) else {
                    continue;
                };
                if target.done == all {
                    continue;
                }
                let session = target.agent.as_ref().and_then(|agent| node.registry.get(agent));
                (target.on_terminate(session.is_some()), session)
            };
            match (decision, session) {
                (Decision::CloseStopped, _) => {
                    close(
                        &node,
                        &cell,
                        *bucket,
                        *index,
                        Inner::Terminated,
                        "ended on request before it was started",
                    )
                    .await;
                }
                (Decision::Terminate, Some(session)) => send_terminate(&cell, *bucket, *index, &session),
                _ => {}
            }
        }
        // Whoever is away then is not waited for any longer.
        cell.due_by(unix_ms() + node.config.task.reconnect_grace_ms);
    }

    /// Looks, once a second, at what is due.
    pub async fn sweep(node: Arc<Node>) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = node.life.draining() => return,
                _ = tick.tick() => {}
            }
            let now = unix_ms();
            node.metrics
                .tasks_running
                .set(i64::try_from(node.tasks.len()).unwrap_or(i64::MAX));
            let due: Vec<Arc<RunCell>> = node
                .tasks
                .runs
                .iter()
                .filter(|entry| entry.due_ms.load(Ordering::Relaxed) <= now)
                .map(|entry| Arc::clone(entry.value()))
                .collect();
            for cell in due {
                look_at(&node, &cell, now).await;
            }
        }
    }
}

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
async fn fan_out(node: &Arc<Node>, cell: &Arc<RunCell>, at: u64) {
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

fn decide(node: &Node, place: &Place, session: &Session, held: bool) -> Decision {
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

async fn carry_out(node: &Arc<Node>, place: &Place, session: &Arc<Session>, decision: Decision) {
    let Place {
        run: cell,
        bucket,
        index,
    } = place;
    match decision {
        Decision::Leave => {}
        Decision::Dispatch => dispatch(node, place, session).await,
        Decision::Terminate => send_terminate(cell, *bucket, *index, session),
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
    match session.outbox.work(Frame::DISPATCH, &own, cell.shared.clone()) {
        Ok(()) => {
            node.metrics.dispatched.inc();
        }
        // It counts as sent: the agent's next hello says that it does not have it, and it is sent again if there is time.
        Err(Refused::Closed) => {}
        Err(Refused::Full) => {
            let text = "too much is waiting to be sent to this agent; try again later";
            close(node, cell, place.bucket, place.index, Inner::Limit, text).await;
        }
    }
}

fn send_terminate(cell: &RunCell, bucket: u32, index: u32, session: &Session) {
    let frame = s::Terminate {
        target: Some(s::TargetRef {
            task_id: cell.header.task_id.clone(),
            bucket,
            index,
        }),
    };
    if session.outbox.control(&frame.into()).is_err() {
        tracing::debug!(task = cell.header.task_id, agent = %session.agent, "session ended before a termination; it is sent again on return");
    }
}

async fn close(node: &Arc<Node>, cell: &Arc<RunCell>, bucket: u32, index: u32, code: Inner, text: &str) {
    close_with(node, cell, bucket, index, code.code(), text).await;
}

/// Gives a target's open rows their end.
async fn close_with(node: &Arc<Node>, cell: &Arc<RunCell>, bucket: u32, index: u32, code: i32, text: &str) {
    let atomics = cell.run.lock().open_atomics(bucket, index);
    let now = unix_ms();
    let (status, exit_code) = if code == Inner::Terminated.code() {
        (s::RowStatus::Stopped, 143)
    } else if code == Inner::Unknown.code() {
        (s::RowStatus::Restarted, 255)
    } else {
        (s::RowStatus::Failed, 255)
    };
    for atomic in atomics {
        let row = StoredRow {
            status: status.into(),
            error_code: code,
            error_msg: text.to_owned(),
            exit_code,
            start_ms: now,
            end_ms: now,
            tag: String::new(),
            output_len: 0,
        };
        node.ingest.own(cell, RowPlace { bucket, index, atomic }, row).await;
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

/// Something of a task is due: targets that were waited for long enough, or its deadline.
async fn look_at(node: &Arc<Node>, cell: &Arc<RunCell>, now: u64) {
    let header = &cell.header;
    if cell.run.lock().open_rows == 0 {
        if !cell.finishing.swap(true, Ordering::AcqRel) {
            node.life.spawn("task end", finish(Arc::clone(node), Arc::clone(cell)));
        }
        return;
    }
    let grace_ms = node.config.task.reconnect_grace_ms;
    let at_deadline = now >= header.deadline_ms;
    let mut closing: Vec<(u32, u32, Inner, String)> = Vec::new();
    {
        let run = cell.run.lock();
        let all = run.all_done();
        for (b, states) in (0..).zip(&run.targets) {
            for (i, state) in (0..).zip(states) {
                if state.done == all {
                    continue;
                }
                let here = state
                    .agent
                    .as_ref()
                    .is_some_and(|agent| node.registry.get(agent).is_some());
                let waited = now >= header.created_at_ms + grace_ms;
                if at_deadline {
                    let text = "the agent did not report an end in time; whether and how the script ended is not known";
                    closing.push((b, i, Inner::AgentOffline, text.into()));
                } else if state.phase == Phase::Waiting && state.agent.is_some() && waited && !here {
                    let text = format!(
                        "the agent was there a moment ago but did not come back within {} s",
                        grace_ms / 1000
                    );
                    closing.push((b, i, Inner::AgentOffline, text));
                } else if state.stop && !here && state.phase != Phase::Waiting {
                    let text = "its end was asked for, but the agent is away: it is told to end the script when it is back, and whether the script ran is not known";
                    closing.push((b, i, Inner::AgentOffline, text.into()));
                }
            }
        }
    }
    cell.due_ms.store(
        if at_deadline { now + 5_000 } else { header.deadline_ms },
        Ordering::Relaxed,
    );
    for (bucket, index, code, text) in closing {
        close(node, cell, bucket, index, code, &text).await;
    }
}

/// Every row is terminal: results get their TTL and the task leaves the memory of this node.
async fn finish(node: Arc<Node>, cell: Arc<RunCell>) {
    let outcome = node
        .task_store
        .finish(
            &node.config.node_id,
            &cell.header,
            unix_ms(),
            node.config.task.result_ttl_s,
        )
        .await;
    match outcome {
        Ok(()) => {
            node.tasks.runs.remove(&cell.task);
            node.metrics.tasks_finished.inc();
            tracing::info!(
                task = cell.header.task_id,
                targets = cell.header.targets,
                "task finished"
            );
        }
        Err(error) => {
            tracing::warn!(task = cell.header.task_id, %error, "the end of a task can't be stored yet");
            cell.due_ms.store(unix_ms() + 2_000, Ordering::Relaxed);
            cell.finishing.store(false, Ordering::Release);
        }
    }
}
