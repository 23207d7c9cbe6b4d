//! Tasks under way on this node: agents that come back, terminations, deadlines, the end.
//!
//! There is no timer per target or task: one pass a second looks at what is due. How a task gets to its agents is in
//! `fan_out`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use dashmap::DashMap;
use gse_core::random::{HashMap, HashSet, Hashing};
use gse_proto::codes::Inner;
use gse_proto::ids::AgentId;
use gse_proto::session as s;

use super::cell::{Place, RunCell};
use super::fan_out::{Reach, carry_out, close, decide, fan_out, send_terminate};
use super::lately::Lately;
use super::remote::{Outgoing, There, deliver_and_chase, reconcile};
use super::run::{Decision, Has, Phase, Run};
use super::stop;
use super::store::RowPlace;
use crate::Node;
use crate::clock::unix_ms;
use crate::session::registry::Session;

/// The tasks under way.
#[derive(Debug, Default)]
pub struct Tasks {
    runs: DashMap<Arc<str>, Arc<RunCell>, Hashing>,
    by_agent: DashMap<AgentId, Vec<Place>, Hashing>,
    pub(super) lately: Lately,
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

    /// Takes up a new task that is in the store and starts its fan-out; `shared` is what all its dispatches have in common.
    pub fn start(&self, run: Run, shared: Bytes) {
        let Some(node) = self.node() else { return };
        let cell = Arc::new(RunCell::new(run, shared));
        self.runs.insert(Arc::clone(&cell.task), Arc::clone(&cell));
        node.metrics.tasks_started.inc();
        let now = unix_ms();
        let life = node.life.clone();
        life.spawn("task fan-out", async move {
            fan_out(&node, &cell, now).await;
            if node.handed_over.is_cancelled() {
                // It came in at the last moment.
                crate::peers::takeover::hand_over(&node).await;
            }
        });
    }

    /// Takes up an unfinished task of this node's last life, or of another node. Returns when every target of it is tied to its agent,
    /// so that agents that connect afterwards find it.
    pub async fn resume(&self, run: Run, shared: Bytes) {
        let Some(node) = self.node() else { return };
        let cell = Arc::new(RunCell::new(run, shared));
        self.runs.insert(Arc::clone(&cell.task), Arc::clone(&cell));
        if cell.run.lock().open_rows == 0 {
            cell.due_by(0);
        }
        // Who was away when the task was submitted was never sent anything; so that is what counts, not who is away now.
        let at = cell.header.created_at_ms;
        fan_out(&node, &cell, at).await;
    }

    pub(super) fn index(&self, agent: &AgentId, place: Place) {
        self.by_agent.entry(agent.clone()).or_default().push(place);
    }

    fn unindex(&self, agent: &AgentId, cell: &Arc<RunCell>, bucket: u32, index: u32) {
        if let Some(mut places) = self.by_agent.get_mut(agent) {
            places.retain(|p| !(Arc::ptr_eq(&p.run, cell) && p.bucket == bucket && p.index == index));
        }
        self.by_agent.remove_if(agent, |_, places| places.is_empty());
    }

    /// The tasks under way.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<RunCell>> {
        self.runs.iter().map(|entry| Arc::clone(entry.value())).collect()
    }

    /// Whether anything is under way for an agent.
    #[must_use]
    pub fn concerns(&self, agent: &AgentId) -> bool {
        self.by_agent.contains_key(agent)
    }

    /// Leaves a task to another node.
    pub fn let_go(&self, cell: &Arc<RunCell>) {
        cell.handed.store(true, Ordering::Release);
        self.runs.remove_if(&cell.task, |_, there| Arc::ptr_eq(there, cell));
        let open: Vec<(AgentId, u32, u32)> = {
            let run = cell.run.lock();
            let targets = (0..).zip(&run.targets).flat_map(|(b, states)| {
                (0..)
                    .zip(states)
                    .filter_map(move |(i, state)| Some((state.agent.clone()?, b, i)))
            });
            targets.collect()
        };
        for (agent, bucket, index) in open {
            self.unindex(&agent, cell, bucket, index);
        }
    }

    /// Agents have opened sessions on another node; what its journal has is known of each.
    pub async fn opened_there(&self, sessions: Vec<(There, Vec<s::TargetRef>)>) {
        let Some(node) = self.node() else { return };
        let mut out: HashMap<Arc<str>, (Arc<RunCell>, Outgoing)> = HashMap::default();
        for (there, held) in sessions {
            // First this, then the index: who indexes a target looks here afterwards.
            self.lately.note(&there);
            let Some(places) = self.by_agent.get(&there.agent).map(|entry| entry.value().clone()) else {
                continue;
            };
            let held: HashSet<(String, u32, u32)> = held.into_iter().map(|t| (t.task_id, t.bucket, t.index)).collect();
            for place in places {
                let is_held = held.contains(&(place.run.header.task_id.clone(), place.bucket, place.index));
                let (_, out) = out
                    .entry(Arc::clone(&place.run.task))
                    .or_insert_with(|| (Arc::clone(&place.run), Outgoing::new(&place.run)));
                let reach = Reach::There(&there);
                let (decision, before) = decide(&node, &place, &reach, if is_held { Has::Yes } else { Has::No });
                carry_out(&node, &place, &reach, decision, before, out).await;
            }
        }
        for (cell, out) in out.into_values().filter(|(_, out)| !out.is_empty()) {
            node.life
                .spawn("task delivery", deliver_and_chase(Arc::clone(&node), cell, out, vec![]));
        }
    }

    /// Which nodes there are has changed: every task is compared soon.
    pub fn check_soon(&self) {
        for entry in &self.runs {
            entry.check_soon();
        }
    }

    /// An agent is connected; `held`: what its journal has.
    pub async fn session_opened(&self, session: &Arc<Session>, held: Vec<s::TargetRef>) {
        let Some(node) = self.node() else { return };
        node.peers.opened(&node, session, &held);
        let mut held: HashSet<(String, u32, u32)> = held.into_iter().map(|t| (t.task_id, t.bucket, t.index)).collect();
        let places = self
            .by_agent
            .get(&session.agent)
            .map(|entry| entry.value().clone())
            .unwrap_or_default();
        for place in places {
            let is_held = held.remove(&(place.run.header.task_id.clone(), place.bucket, place.index));
            let reach = Reach::Here(session);
            let (decision, before) = decide(&node, &place, &reach, if is_held { Has::Yes } else { Has::No });
            let mut out = Outgoing::new(&place.run);
            carry_out(&node, &place, &reach, decision, before, &mut out).await;
        }
        // The rest has its rows already; what was asked to end while its agent was away is ended now.
        stop::stop_returned(&node, session, held).await;
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
        let mut elsewhere = Vec::new();
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
                let decision = target.on_terminate(session.is_some());
                if let (Decision::Leave, Some(agent)) = (decision, &target.agent) {
                    elsewhere.push((*bucket, *index, agent.clone()));
                }
                (decision, session)
            };
            match (decision, session) {
                (Decision::CloseStopped, _) => {
                    let text = "ended on request before it was started";
                    close(&node, &cell, *bucket, *index, Inner::Terminated, text).await;
                }
                (Decision::Terminate, Some(session)) => send_terminate(task, *bucket, *index, &session),
                _ => {}
            }
        }
        if !elsewhere.is_empty() && !node.peers.is_empty() {
            stop::stop_there(&node, &cell, elsewhere).await;
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
            node.task_store.tidy();
            node.tasks.lately.tidy();
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
            if !node.peers.is_empty() {
                for cell in node
                    .tasks
                    .all()
                    .into_iter()
                    .filter(|cell| cell.check_ms.load(Ordering::Relaxed) <= now)
                {
                    // Not again before it has ended, however long that takes.
                    cell.check_ms.store(u64::MAX, Ordering::Relaxed);
                    node.life.spawn("task check", reconcile(Arc::clone(&node), cell));
                }
            }
        }
    }
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
    if cell.is_handed() {
        return;
    }
    let grace_ms = node.config.task.reconnect_grace_ms;
    let at_deadline = now >= header.deadline_ms;
    let mut closing: Vec<(u32, u32, Inner, String)> = Vec::new();
    let mut stopping: Vec<(u32, u32, AgentId)> = Vec::new();
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
                let waited = now >= header.created_at_ms.max(cell.taken_ms) + grace_ms;
                if at_deadline {
                    let text = "the agent did not report an end in time; whether and how the script ended is not known";
                    closing.push((b, i, Inner::AgentOffline, text.into()));
                } else if state.phase == Phase::Waiting && state.agent.is_some() && waited && !here {
                    let text = format!(
                        "the agent was there a moment ago but did not come back within {} s",
                        grace_ms / 1000
                    );
                    closing.push((b, i, Inner::AgentOffline, text));
                } else if let (true, false, Some(agent)) =
                    (state.stop && state.phase != Phase::Waiting, here, &state.agent)
                {
                    stopping.push((b, i, agent.clone()));
                }
            }
        }
    }
    cell.due_ms.store(
        if at_deadline { now + 5_000 } else { header.deadline_ms },
        Ordering::Relaxed,
    );
    if !stopping.is_empty() && !node.peers.is_empty() {
        cell.due_by(now + grace_ms);
    }
    // Those that are connected elsewhere have been told, and answer for themselves.
    for (bucket, index, _) in stop::away(node, stopping).await {
        let text = "its end was asked for, but the agent is away: it is told to end the script when it is back, and whether the script ran is not known";
        closing.push((bucket, index, Inner::AgentOffline, text.into()));
    }
    for (bucket, index, code, text) in closing {
        close(node, cell, bucket, index, code, &text).await;
    }
}

/// Every row is terminal: results get their TTL and the task leaves the memory of this node.
async fn finish(node: Arc<Node>, cell: Arc<RunCell>) {
    if cell.is_handed() {
        return;
    }
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
            if node.quotas.counts_running(&cell.header.app) {
                let (owner, ended) = (Arc::clone(&node), Arc::clone(&cell));
                node.life.spawn("quota", async move {
                    owner.quotas.ended(&ended.header.app, &ended.header.task_id).await;
                });
            }
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
