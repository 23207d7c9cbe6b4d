//! One task from its first call to an agent to its last row. One task of the runtime for each.
//!
//! All operations of a task on one agent go in one call. An agent answers when they are done, or after a while with how they stand; then it
//! is asked again by the same ids, which it never carries out twice. An agent that does not answer gets its rows soon (117) unless it has
//! said that it is at it: then it is asked until the task's deadline.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::SelectAll;
use futures::{Stream, StreamExt};
use gse_core::fleet::find;
use gse_core::fleet::{Answer, Question, Silence};
use gse_core::random::HashMap;
use gse_proto::ids::AgentId;
use gse_proto::proc::{self as p, OpType, code};
use gse_proto::procstore::StoredResult;
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;

use super::content::Frame;
use super::engine::Cell;
use super::layout::{labels, op_id};
use super::unstored::{Told, Unstored, Writing, write, written};
use crate::Node;

/// Rows wait so long for others, to be stored with them.
const GATHER: Duration = Duration::from_millis(25);
/// Longest time between two looks at the clock.
const LOOK: Duration = Duration::from_secs(1);
/// Where calls find no place, they wait so long for one.
const NO_PLACE: Duration = Duration::from_millis(100);
/// Rows stored in one go.
const STORE_ROWS: usize = 2_000;
/// Answers of agents that wait to be taken.
const ANSWERS: usize = 1_024;
/// Beside the wait that an agent is asked for, its answer may take so long.
const ON_THE_WAY: Duration = Duration::from_secs(3);
/// Between two questions to an agent that does not answer any more.
const AGAIN: Duration = Duration::from_secs(1);
/// Pause after the store has not taken something, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

/// Answers of one round, each with its place among the targets.
type Round = Pin<Box<dyn Stream<Item = (usize, Result<Bytes, Silence>)> + Send>>;

/// Operations on one agent.
struct Target {
    agent: AgentId,
    /// Those that are not over.
    rows: Vec<u32>,
    /// It has said that it is at it.
    accepted: bool,
    /// When it is asked again.
    again: Option<Instant>,
}

struct Work {
    node: Arc<Node>,
    cell: Arc<Cell>,
    specs: Vec<p::Spec>,
    /// Addresses of hosts that are not named by them.
    ips: HashMap<String, String>,
    targets: Vec<Target>,
    open: usize,
    begun: Instant,
    /// Not later than when the first of the targets is to be asked.
    due: Option<Instant>,
    unstored: Vec<(u32, StoredResult)>,
    told: Vec<Told>,
    rounds: SelectAll<Round>,
}

/// Sees a task through to its end, or until the instance drains: then another one goes on with it, or its next life. `over`: rows that are
/// stored already.
pub async fn drive(node: Arc<Node>, cell: Arc<Cell>, over: Vec<u32>) {
    let mut work = tokio::select! {
        () = node.life.draining() => return,
        work = Work::new(&node, &cell, &over) => work,
    };
    let mut pause = PAUSE.0;
    // When rows are stored: with some others, or, after a failure, when the store may have come back.
    let mut store_at: Option<Instant> = None;
    let mut writing: Option<Writing> = None;
    loop {
        if writing.is_none() && !work.unstored.is_empty() {
            let at = *store_at.get_or_insert_with(|| Instant::now() + GATHER);
            let enough = (work.unstored.len() >= STORE_ROWS || work.open == 0) && pause == PAUSE.0;
            if enough || at <= Instant::now() {
                store_at = None;
                let rows = work.unstored.len().min(STORE_ROWS);
                let some = Unstored {
                    told: std::mem::take(&mut work.told),
                    rows: work.unstored.drain(..rows).collect(),
                };
                writing = Some(Box::pin(write(Arc::clone(&node), Arc::clone(&cell), some)));
            }
        }
        if work.open == 0 && work.unstored.is_empty() && writing.is_none() {
            let ttl_s = node.config.task.result_ttl_s;
            match node.store.finish(&node.config.node_id, &cell.known, ttl_s).await {
                Ok(()) => break,
                Err(error) => {
                    tracing::warn!(task = cell.task(), %error, "the end of a process task can't be stored yet")
                }
            }
        }
        work.ask_due();
        let look = Instant::now() + LOOK;
        let stored = store_at.filter(|_| writing.is_none() && !work.unstored.is_empty());
        let wake = [stored, work.due].into_iter().flatten().fold(look, Instant::min);
        // Answers are taken while the store is written to, and while it is away: what an agent has said in time was said in time.
        tokio::select! {
            () = node.life.draining() => return,
            (some, outcome) = written(&mut writing) => {
                writing = None;
                match outcome {
                    Ok(()) => pause = PAUSE.0,
                    Err(error) => {
                        tracing::warn!(task = cell.task(), %error, "rows of a process task can't be stored yet");
                        work.told.splice(..0, some.told);
                        work.unstored.splice(..0, some.rows);
                        pause = (pause * 2).min(PAUSE.1);
                        store_at = Some(Instant::now() + pause);
                    }
                }
            }
            Some((target, answer)) = work.rounds.next(), if !work.rounds.is_empty() => work.answer(target, answer),
            () = tokio::time::sleep_until(wake) => {}
        }
    }
    node.tasks.remove(cell.task());
    cell.finished.send_replace(true);
    node.metrics.tasks_finished.inc();
    let header = &cell.known.header;
    if node.quotas.counts_running(&header.app) {
        node.quotas.ended(&header.app, cell.task()).await;
    }
    tracing::info!(
        task = cell.task(),
        rows = cell.known.layout.rows(),
        "process task finished"
    );
}

impl Work {
    async fn new(node: &Arc<Node>, cell: &Arc<Cell>, over: &[u32]) -> Self {
        let header = &cell.known.header;
        // What was encoded by a submit decodes; a damaged header is not read back at all.
        let specs = header
            .specs
            .iter()
            .map(|spec| p::Spec::decode(spec.clone()).unwrap_or_default())
            .collect();
        let mut work = Self {
            node: Arc::clone(node),
            cell: Arc::clone(cell),
            specs,
            ips: HashMap::default(),
            targets: Vec::new(),
            open: cell.known.layout.rows() as usize,
            begun: Instant::now(),
            due: None,
            unstored: Vec::new(),
            told: Vec::new(),
            rounds: SelectAll::new(),
        };
        work.look_up().await;
        work.due = Some(work.begun);
        let done: gse_core::random::HashSet<u32> = over.iter().copied().collect();
        work.open -= done.len();
        let mut places: HashMap<&str, usize> = HashMap::default();
        let most = node.config.task.max_operations;
        for (row, subject) in cell.known.layout.subjects(header) {
            if done.contains(&row) {
                continue;
            }
            if OpType::from_number(subject.group.op_type).is_none() {
                let text = format!(
                    "there is no op_type {}; 0 start, 1 stop, 2 status, 3 register, 4 unregister, 7 restart, 8 reload, 9 kill",
                    subject.group.op_type
                );
                work.close(row, code::ILLEGAL_OP, &text);
                continue;
            }
            let agent = match AgentId::parse(subject.id) {
                Ok(agent) => agent,
                Err(error) => {
                    work.close(row, code::NO_AGENT, &format!("no agent can have this id: {error}"));
                    continue;
                }
            };
            match places.get(subject.id) {
                Some(place) if work.targets[*place].rows.len() < most => work.targets[*place].rows.push(row),
                _ => {
                    places.insert(subject.id, work.targets.len());
                    work.targets.push(Target {
                        agent,
                        rows: vec![row],
                        accepted: false,
                        again: Some(work.begun),
                    });
                }
            }
        }
        work
    }

    /// Addresses of hosts that are asked for their status by other names. Not worth waiting for a store that is away.
    async fn look_up(&mut self) {
        let header = &self.cell.known.header;
        let groups = header
            .groups
            .iter()
            .filter(|group| group.op_type == OpType::Status as i32);
        let mut ids: Vec<AgentId> = groups
            .flat_map(|group| &group.ids)
            .filter_map(|id| AgentId::parse(id).ok())
            .filter(|id| id.cloud_ip().is_none())
            .collect();
        ids.sort_unstable();
        ids.dedup();
        match find::records(self.node.store.raw(), &ids).await {
            Ok(records) => {
                for (id, record) in ids.iter().zip(records) {
                    if let Some(ip) = record.and_then(|record| record.addresses.into_iter().next()) {
                        self.ips.insert(id.as_str().to_owned(), ip);
                    }
                }
            }
            Err(error) => tracing::debug!(%error, "addresses of hosts can't be looked up; rows go without"),
        }
    }

    fn frame<R>(&self, row: u32, make: impl FnOnce(&Frame<'_>) -> R) -> Option<R> {
        let known = &self.cell.known;
        let subject = known.layout.subject(&known.header, row)?;
        let ip = gse_proto::ids::split_cloud_ip(subject.id).map(|(_, ip)| ip.to_string());
        let ip = ip.as_deref().or_else(|| self.ips.get(subject.id).map(String::as_str));
        Some(make(&Frame {
            subject,
            spec: self.specs.get((subject.group.spec as usize).wrapping_sub(1)),
            ip: ip.unwrap_or_default(),
        }))
    }

    /// A row is over without its agent.
    fn close(&mut self, row: u32, code: i32, why: &str) {
        if let Some(result) = self.frame(row, |frame| frame.failed(code, why)) {
            self.unstored.push((row, result));
        }
        self.open = self.open.saturating_sub(1);
    }

    /// What is due by time: agents that are asked (again), and the deadline.
    fn ask_due(&mut self) {
        let now_ms = self.node.clock.unix_ms();
        if now_ms >= self.cell.known.header.deadline_ms && self.open > 0 {
            for at in 0..self.targets.len() {
                for row in std::mem::take(&mut self.targets[at].rows) {
                    self.close(
                        row,
                        code::NO_AGENT,
                        "the agent has not said in time how the operation ended; whether it was carried out is not known",
                    );
                }
            }
            self.rounds.clear();
            return;
        }
        let now = Instant::now();
        if self.due.is_none_or(|due| due > now) {
            return;
        }
        let mut due: Vec<usize> = (0..self.targets.len())
            .filter(|at| self.targets[*at].again.is_some_and(|again| again <= now))
            .collect();
        // Places of all tasks together: what finds none waits for its next turn.
        let wanted = u32::try_from(due.len().min(self.node.config.task.calls_at_once)).unwrap_or(u32::MAX);
        let places = Arc::clone(&self.node.calls).try_acquire_many_owned(wanted);
        let Ok(mut places) = places else {
            self.due = Some(now + NO_PLACE);
            return;
        };
        due.truncate(wanted as usize);
        for at in &due {
            self.targets[*at].again = None;
        }
        self.due = self.targets.iter().filter_map(|target| target.again).min();
        let (accepted, fresh): (Vec<usize>, Vec<usize>) = due.into_iter().partition(|at| self.targets[*at].accepted);
        for (targets, accepted) in [(fresh, false), (accepted, true)] {
            if let Some(some) = places.split(targets.len()).filter(|_| !targets.is_empty()) {
                let round = self.ask(targets, accepted, some);
                self.rounds.push(round);
            }
        }
    }

    /// Asks agents. Those that have not said that they are at it are given up soon.
    fn ask(&self, targets: Vec<usize>, accepted: bool, mut places: OwnedSemaphorePermit) -> Round {
        let limits = &self.node.config.task;
        let wait = Duration::from_millis(limits.wait_ms);
        let give_up = Duration::from_millis(limits.give_up_ms);
        let now = Instant::now();
        let deadline = if accepted {
            now + wait + give_up
        } else {
            (self.begun + give_up).max(now + Duration::from_millis(500))
        };
        let wait = wait.min(deadline.saturating_duration_since(now).mul_f64(0.75));
        let question = Question {
            service: p::SERVICE,
            caller: format!("gse_procmgr {}", self.node.config.node_id),
            shared: Bytes::new(),
            agents: targets
                .iter()
                .map(|at| {
                    let target = &self.targets[*at];
                    (target.agent.clone(), self.call(target, wait))
                })
                .collect(),
            patience: wait + ON_THE_WAY,
            deadline,
        };
        self.node.metrics.calls.inc_by(targets.len() as u64);
        let node = Arc::clone(&self.node);
        let (sender, receiver) = mpsc::channel::<Answer>(ANSWERS);
        let asking = async move { node.fleet.ask(question, &sender).await };
        let answers = futures::stream::unfold(receiver, |mut receiver| async move {
            Some((receiver.recv().await?, receiver))
        });
        let taken = answers.filter_map(move |(n, answer)| {
            drop(places.split(1));
            futures::future::ready(targets.get(n).map(|at| (*at, answer)))
        });
        // The question is driven by whoever polls its answers.
        let driven = futures::stream::once(asking).filter_map(|()| async { None });
        Box::pin(futures::stream::select(driven, taken))
    }

    fn call(&self, target: &Target, wait: Duration) -> Bytes {
        let known = &self.cell.known;
        let header = &known.header;
        let operations = target.rows.iter().filter_map(|row| {
            let op_id = op_id(header, *row);
            if target.accepted {
                return Some(p::Operation {
                    op_id,
                    only_ask: true,
                    ..p::Operation::default()
                });
            }
            let group = known.layout.subject(header, *row)?.group;
            Some(p::Operation {
                op_id,
                op_type: group.op_type,
                key: Some(p::Key {
                    namespace: group.namespace.clone(),
                    name: group.name.clone(),
                }),
                labels: labels(group),
                spec: self.specs.get((group.spec as usize).wrapping_sub(1)).cloned(),
                revision: header.revision,
                not_after_ms: header.not_after_ms,
                only_ask: false,
                only_new: group.only_new,
            })
        });
        let operate = p::Operate {
            operations: operations.collect(),
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
        };
        let call = p::ProcCall {
            call: Some(p::proc_call::Call::Operate(operate)),
        };
        call.encode_to_vec().into()
    }

    fn answer(&mut self, at: usize, answer: Result<Bytes, Silence>) {
        if self.targets.get(at).is_none_or(|target| target.rows.is_empty()) {
            return;
        }
        let answer = answer.map(p::ProcAnswer::decode);
        let outcomes = match answer {
            Ok(Ok(p::ProcAnswer {
                answer: Some(p::proc_answer::Answer::Operated(operated)),
            })) => operated.outcomes,
            Ok(Ok(p::ProcAnswer {
                answer: Some(p::proc_answer::Answer::Refused(why)),
            })) => return self.close_all(at, code::COMMAND_FAILED, &format!("the agent refuses: {why}")),
            Ok(Ok(_)) => {
                return self.close_all(
                    at,
                    code::NO_AGENT,
                    "the agent's answer is not one to this question; upgrade it",
                );
            }
            Ok(Err(error)) => {
                return self.close_all(
                    at,
                    code::NO_AGENT,
                    &format!("the agent's answer does not decode: {error}"),
                );
            }
            Err(silence) => return self.silent(at, &silence),
        };
        let header = Arc::clone(&self.cell.known.header);
        let rows = std::mem::take(&mut self.targets[at].rows);
        let by_id: HashMap<&Bytes, &p::Outcome> = outcomes.iter().map(|outcome| (&outcome.op_id, outcome)).collect();
        let mut running = Vec::new();
        for row in rows {
            match by_id.get(&op_id(&header, row)) {
                Some(outcome) if outcome.running => running.push(row),
                Some(outcome) if outcome.unknown => self.close(
                    row,
                    code::COMMAND_FAILED,
                    "the agent does not know the operation any more; whether it was carried out is not known",
                ),
                Some(outcome) => self.take(at, row, outcome),
                // Nothing was said of it.
                None => running.push(row),
            }
        }
        if !running.is_empty() {
            let target = &mut self.targets[at];
            target.rows = running;
            target.accepted = true;
            target.again = Some(Instant::now());
            self.due_by(Instant::now());
        }
    }

    fn due_by(&mut self, at: Instant) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    fn take(&mut self, at: usize, row: u32, outcome: &p::Outcome) {
        if let Some(result) = self.frame(row, |frame| frame.over(outcome)) {
            self.unstored.push((row, result));
        }
        self.open = self.open.saturating_sub(1);
        let known = &self.cell.known;
        let Some(subject) = known.layout.subject(&known.header, row) else {
            return;
        };
        // A status changes nothing; what else changes, the agent reports.
        if subject.group.op_type == OpType::Status as i32 {
            return;
        }
        if let Some(process) = outcome.process.as_ref().filter(|process| process.known) {
            let spec = self.specs.get((subject.group.spec as usize).wrapping_sub(1));
            self.told.push(Told {
                agent: self.targets[at].agent.clone(),
                process: process.clone(),
                spec: spec.map(|spec| (spec.clone(), labels(subject.group))),
            });
        }
    }

    fn silent(&mut self, at: usize, silence: &Silence) {
        self.node.metrics.unanswered.inc();
        let target = &mut self.targets[at];
        let many = target.rows.len() > 1;
        match silence {
            Silence::TooLong if many => {
                // One by one: an answer to one operation is never too long.
                let (agent, accepted) = (target.agent.clone(), target.accepted);
                for row in std::mem::take(&mut target.rows) {
                    self.targets.push(Target {
                        agent: agent.clone(),
                        rows: vec![row],
                        accepted,
                        again: Some(Instant::now()),
                    });
                }
            }
            Silence::Offline(_) | Silence::TimedOut(_) if target.accepted => {
                target.again = Some(Instant::now() + AGAIN)
            }
            Silence::TimedOut(why) => {
                let why = format!("{why}; whether the operation was carried out is not known");
                self.close_all(at, code::NO_AGENT, &why);
            }
            other => self.close_all(at, code::NO_AGENT, &other.to_string()),
        }
    }

    fn close_all(&mut self, at: usize, code: i32, why: &str) {
        for row in std::mem::take(&mut self.targets[at].rows) {
            self.close(row, code, why);
        }
    }
}
