//! One task under way: what [`super::run`] knows of it, behind a lock, with what is shared by all of its dispatches.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use gse_proto::ids::AgentId;
use gse_proto::peer as p;
use gse_proto::peer::open_target::Phase as Told;
use gse_proto::session as s;
use gse_proto::state::TaskHeader;
use parking_lot::Mutex;
use prost::Message;

use super::run::{Phase, Run, Target};
use super::store::RowPlace;
use crate::clock::unix_ms;

/// A task under way.
#[derive(Debug)]
pub struct RunCell {
    /// Its id.
    pub task: Arc<str>,
    /// What was submitted, without the content of the scripts.
    pub header: Arc<TaskHeader>,
    pub(super) run: Mutex<Run>,
    /// The part of its dispatches that is the same for all targets, encoded once.
    pub(super) shared: Bytes,
    /// When (unix ms) something is due; see [`Tasks::sweep`].
    pub(super) due_ms: AtomicU64,
    pub(super) finishing: AtomicBool,
    /// When (unix ms) this node began to own it.
    pub(super) taken_ms: u64,
    /// Another node owns it now: nothing is decided about it here any more.
    pub(super) handed: AtomicBool,
    /// When (unix ms) it is next compared with the store and with where its agents are; see [`super::remote`].
    pub(super) check_ms: AtomicU64,
    /// How long to wait after that.
    pub(super) check_wait_ms: AtomicU64,
}

/// The first comparison with the store comes after so long; later ones are rarer.
const FIRST_CHECK_MS: u64 = 15_000;

/// How a row of a task stands with regard to an agent that tells of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is its own, and open.
    Open,
    /// It is its own, and terminal.
    Closed,
    /// Nobody knows yet which agent its target is; it is about to be found out.
    Unresolved,
    /// It is another agent's, or there is no such row.
    Stranger,
}

/// A target of a task under way.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) run: Arc<RunCell>,
    pub(super) bucket: u32,
    pub(super) index: u32,
}

impl RunCell {
    pub(super) fn new(run: Run, shared: Bytes) -> Self {
        let header = Arc::clone(&run.header);
        Self {
            task: header.task_id.as_str().into(),
            due_ms: AtomicU64::new(header.deadline_ms),
            shared,
            header,
            run: Mutex::new(run),
            finishing: AtomicBool::new(false),
            taken_ms: unix_ms(),
            handed: AtomicBool::new(false),
            check_ms: AtomicU64::new(unix_ms() + FIRST_CHECK_MS),
            check_wait_ms: AtomicU64::new(FIRST_CHECK_MS),
        }
    }

    /// Whether every row is terminal.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.run.lock().open_rows == 0
    }

    /// How far each open target has got, for the node that is to own the task.
    #[must_use]
    pub fn open_targets(&self) -> Vec<p::OpenTarget> {
        let run = self.run.lock();
        let all = run.all_done();
        let mut open = Vec::new();
        for (bucket, states) in (0..).zip(&run.targets) {
            for (index, state) in (0..).zip(states).filter(|(_, state)| state.done != all) {
                let place = Some(p::Place { bucket, index });
                let (phase, journal_epoch, session_id) = match &state.phase {
                    Phase::Waiting => (Told::Waiting, Bytes::new(), 0),
                    Phase::Sent(epoch, session) => (Told::Sent, epoch.clone(), *session),
                    Phase::MaybeSent | Phase::Asked(_) => (Told::MaybeSent, Bytes::new(), 0),
                    Phase::Held(epoch) => (Told::Held, epoch.clone(), 0),
                };
                open.push(p::OpenTarget {
                    place,
                    phase: phase.into(),
                    journal_epoch,
                    session_id,
                });
            }
        }
        open
    }

    /// Begins to hand the task over: nothing is decided about it here until that has failed. False if it is handed over already.
    #[must_use]
    pub fn begin_hand_over(&self) -> bool {
        !self.handed.swap(true, Ordering::AcqRel)
    }

    /// Nobody has taken it. What happened meanwhile is found by comparing it with the store.
    pub fn keep_after_all(&self) {
        self.handed.store(false, Ordering::Release);
        self.check_ms.store(0, Ordering::Relaxed);
    }

    /// Has the task compared with the store, and with where its agents are, within the next seconds.
    pub fn check_soon(&self) {
        self.check_wait_ms.store(FIRST_CHECK_MS, Ordering::Relaxed);
        self.check_ms.fetch_min(unix_ms() + 1_000, Ordering::Relaxed);
    }

    /// Whether another node owns the task now.
    #[must_use]
    pub fn is_handed(&self) -> bool {
        self.handed.load(Ordering::Acquire)
    }

    /// Whether a row is terminal.
    #[must_use]
    pub fn is_done(&self, place: RowPlace) -> bool {
        let mut run = self.run.lock();
        run.target(place.bucket, place.index)
            .is_none_or(|target| target.done & 1_u64.checked_shl(place.atomic).unwrap_or(0) != 0)
    }

    /// How a row stands with regard to this agent.
    #[must_use]
    pub fn standing(&self, place: RowPlace, agent: &AgentId) -> Standing {
        if place.atomic as usize >= self.header.atomics.len() {
            return Standing::Stranger;
        }
        match self.run.lock().target(place.bucket, place.index) {
            Some(Target { agent: None, .. }) => Standing::Unresolved,
            Some(target) if target.agent.as_ref() == Some(agent) => {
                if target.done & 1_u64.checked_shl(place.atomic).unwrap_or(0) == 0 {
                    Standing::Open
                } else {
                    Standing::Closed
                }
            }
            _ => Standing::Stranger,
        }
    }

    /// The agent has reported the target, so its journal has it.
    pub fn held(&self, bucket: u32, index: u32, epoch: &Bytes) {
        if let Some(target) = self.run.lock().target(bucket, index) {
            target.phase = Phase::Held(epoch.clone());
        }
    }

    pub(super) fn due_by(&self, at_ms: u64) {
        self.due_ms.fetch_min(at_ms, Ordering::Relaxed);
    }
}

/// What keys outlive a deadline by, so that the rows closed at the deadline find them there; results have their own TTL then.
const EXTRA_TTL_S: u64 = 2 * 3600;

/// How long keys of a task that are written now have to live.
#[must_use]
pub fn ttl_s(header: &TaskHeader, now_ms: u64) -> u64 {
    header.deadline_ms.saturating_sub(now_ms) / 1000 + EXTRA_TTL_S
}

/// The part of a task's dispatches that is the same for all targets, encoded once. `header` is the whole one, with scripts.
#[must_use]
pub fn shared_dispatch(header: &TaskHeader) -> Bytes {
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
    shared.encode_to_vec().into()
}
