//! The executor: takes dispatches, terminates and acknowledgements from the session, and owns everything that runs because of them.
//! What may be started and what is refused is decided here; running is left to [`super::drive`], reporting to [`super::pump`], what an
//! earlier process left to [`super::restore`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use gse_core::lifecycle::Lifecycle;
use gse_proto::session::{Dispatch, Stored, TargetRef};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::clean::Cleaner;
use super::config::ExecConfig;
use super::job::{Ended, Outcome, code};
use super::journal::{Found, Journal, Key, LOCK_WAIT};
use super::linger::Lingering;
use super::names::Names;
use super::order::run_order;
use super::pump::{Report, pump};
use super::restore::done_stream;
use super::state::{Kind, Session, State, StreamKey, Target};
use super::window::{CHUNK, Phase, Stream, Timing};
use super::{clean, drive, scripts, sweep};

/// What a session tells the executor at its beginning.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    /// Bytes of output that one stream may have unacknowledged; 0 is taken as 256 KiB.
    pub stream_window: u32,
    /// The same for all streams together; 0 is taken as 4 MiB.
    pub session_window: u32,
    /// The server's clock now, Unix milliseconds.
    pub server_time_ms: u64,
}

/// What all tasks of the executor share.
pub(super) struct Shared {
    pub(super) cfg: ExecConfig,
    pub(super) journal: Journal,
    pub(super) state: Mutex<State>,
    /// Something has been put on the agenda.
    pub(super) wake: Notify,
    /// A target has come.
    pub(super) work: Notify,
    pub(super) slots: Arc<Semaphore>,
    pub(super) names: Arc<Names>,
    /// The server's clock at a moment of ours.
    pub(super) clock: watch::Sender<Option<(u64, Instant)>>,
    pub(super) timing: Timing,
    pub(super) life: Lifecycle,
    pub(super) cleaner: Mutex<Cleaner>,
    pub(super) lingering: Lingering,
}

impl Shared {
    /// The server's clock, once a session has told it.
    pub(super) fn server_now(&self) -> Option<u64> {
        let (at, seen) = (*self.clock.borrow())?;
        Some(at.saturating_add(u64::try_from(seen.elapsed().as_millis()).unwrap_or(u64::MAX)))
    }
}

/// Runs scripts on this host. Cheap to clone; every clone is the same executor.
#[derive(Clone)]
pub struct Executor {
    pub(super) shared: Arc<Shared>,
}

/// The host's identity for the journal.
fn machine_id() -> String {
    for file in ["/etc/machine-id", "/var/lib/dbus/machine-id"] {
        if let Ok(id) = std::fs::read_to_string(file)
            && !id.trim().is_empty()
        {
            return id.trim().to_owned();
        }
    }
    // A host without an identity cannot be told from its copies.
    "unknown".to_owned()
}

async fn open(cfg: &ExecConfig) -> anyhow::Result<(Journal, Vec<Found>, Vec<String>)> {
    let began = Instant::now();
    loop {
        let (dir, configured) = (cfg.data_dir.clone(), cfg.machine_id.clone());
        let opened = tokio::task::spawn_blocking(move || {
            let machine = if configured.is_empty() {
                machine_id()
            } else {
                configured
            };
            let journal = Journal::open(&dir, &machine)?;
            let found = journal.load()?;
            let dirs = journal.script_dirs();
            anyhow::Ok((journal, found, dirs))
        });
        match opened.await.context("opening the journal failed inside")? {
            Ok(opened) => return Ok(opened),
            // A predecessor that is just ending still has the lock.
            Err(error) if began.elapsed() >= LOCK_WAIT => return Err(error),
            Err(error) if !error.is::<super::journal::InUse>() => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

impl Executor {
    /// Opens the journal, takes over what still runs, and begins to clean up. Owned by `life`: when it drains, nothing new is started,
    /// and what runs is left to its runners and the next process.
    ///
    /// # Errors
    /// When the data directory cannot be used, another agent uses it, or a setting cannot work.
    pub async fn start(cfg: ExecConfig, life: &Lifecycle) -> anyhow::Result<Self> {
        let problems = cfg.problems();
        anyhow::ensure!(
            problems.is_empty(),
            "the settings for running scripts cannot work: {}",
            problems.join("; ")
        );
        anyhow::ensure!(!cfg.self_exec.is_empty(), "the agent does not know its own program");
        nix::sys::prctl::set_child_subreaper(true).context("the agent cannot become the parent of orphans")?;
        let (journal, found, dirs) = open(&cfg).await?;
        let millis = Duration::from_millis;
        let timing = Timing {
            resend: millis(cfg.resend_ms),
            flush: millis(cfg.flush_ms),
            max_flush: millis(cfg.max_flush_ms),
            running_after: millis(cfg.report_running_after_ms),
        };
        let shared = Arc::new(Shared {
            slots: Arc::new(Semaphore::new(cfg.concurrency as usize)),
            names: Arc::default(),
            state: Mutex::default(),
            wake: Notify::new(),
            work: Notify::new(),
            clock: watch::Sender::new(None),
            timing,
            life: life.clone(),
            cleaner: Mutex::new(Cleaner::new(dirs, cfg.script_dirs_remembered)),
            lingering: Lingering::default(),
            journal,
            cfg,
        });
        let executor = Self { shared };
        for entry in found {
            executor.restore(entry).await;
        }
        let shared = Arc::clone(&executor.shared);
        life.spawn_contained("executor sweep", sweep::run(shared));
        let shared = Arc::clone(&executor.shared);
        life.spawn_contained("script cleaner", clean::run(shared));
        Ok(executor)
    }

    /// Identifies the journal.
    pub fn epoch(&self) -> Bytes {
        self.shared.journal.epoch()
    }

    /// Everything that is queued, running or not yet acknowledged.
    pub fn held(&self) -> Vec<TargetRef> {
        let state = self.shared.state.lock();
        state
            .targets
            .iter()
            .filter(|(_, t)| t.kind != Kind::Done)
            .map(|(key, _)| key.to_ref())
            .collect()
    }

    /// Targets that run and that wait for their turn.
    pub fn counts(&self) -> (u32, u32) {
        let state = self.shared.state.lock();
        (state.running, state.queued)
    }

    /// Takes a target. One that is known is never started again: what is known of it is reported again.
    pub async fn dispatch(&self, dispatch: Dispatch) {
        let Some(target) = &dispatch.target else {
            tracing::warn!("a dispatch without a target was ignored");
            return;
        };
        let key = Arc::new(Key::from(target));
        if self.known(&key) {
            return;
        }
        if let Some(outcome) = self.refusal(&dispatch) {
            return self.refuse(key, &dispatch, &outcome);
        }
        let dispatch = Arc::new(dispatch);
        let stop = match self.reserve(&key, &dispatch) {
            Ok(Some(stop)) => stop,
            Ok(None) => return,
            Err(outcome) => return self.refuse(key, &dispatch, &outcome),
        };
        let taken = {
            let (shared, key, dispatch) = (Arc::clone(&self.shared), Arc::clone(&key), Arc::clone(&dispatch));
            tokio::task::spawn_blocking(move || shared.journal.take(&key, &dispatch)).await
        };
        let taken = taken.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        let bytes = match taken {
            Ok(bytes) => bytes,
            Err(error) => {
                self.shared.state.lock().remove(&key);
                let text = format!(
                    "not run: it cannot be recorded in the agent's journal: {error}; make room in the agent's data directory"
                );
                return self.refuse(key, &dispatch, &Outcome::not_run(code::FAILED, text));
            }
        };
        {
            let mut state = self.shared.state.lock();
            if let Some(target) = state.targets.get_mut(&key) {
                target.intent_bytes = bytes;
                state.spool_bytes += bytes;
            }
        }
        clean::remember(&self.shared, &dispatch).await;
        let shared = Arc::clone(&self.shared);
        self.shared
            .life
            .spawn_contained("target", drive::fresh(shared, key, dispatch, stop));
    }

    /// Reports a known target again.
    fn known(&self, key: &Arc<Key>) -> bool {
        let now = Instant::now();
        let mut state = self.shared.state.lock();
        let Some(target) = state.targets.get(key) else {
            return false;
        };
        for atomic in 0..target.streams.len() {
            let stream: StreamKey = (Arc::clone(key), u32::try_from(atomic).unwrap_or(u32::MAX));
            state.with(&stream, |s| {
                s.running_sent = false;
                s.row_sent = None;
                s.stored = false;
            });
        }
        state.schedule_all(key, now);
        drop(state);
        self.shared.wake.notify_one();
        true
    }

    /// Why this dispatch is not even queued.
    fn refusal(&self, dispatch: &Dispatch) -> Option<Outcome> {
        let cfg = &self.shared.cfg;
        let failed = |text: String| Some(Outcome::not_run(code::FAILED, text));
        if dispatch.epoch != self.shared.journal.epoch() {
            return Some(Outcome::unknown(
                "it is unknown whether it ran: it was meant for this host before the agent's journal was lost or replaced",
            ));
        }
        let count = dispatch.atomic_tasks.len();
        if count > cfg.max_atomic_tasks as usize {
            return failed(format!(
                "not run: {count} atomic tasks are more than the {} that this agent takes",
                cfg.max_atomic_tasks
            ));
        }
        let after: Vec<&[u32]> = dispatch.atomic_tasks.iter().map(|a| a.after.as_slice()).collect();
        if let Err(error) = run_order(&after) {
            return failed(format!("not run: {error}"));
        }
        if dispatch.atomic_tasks.iter().any(|a| a.command.contains('\0')) {
            return failed("not run: a command holds a NUL character".to_owned());
        }
        if !cfg.allows(&dispatch.user) {
            return failed(format!(
                "not run: this agent's settings (exec.allowed_accounts) do not allow scripts to run as {:?}",
                dispatch.user
            ));
        }
        let bytes: usize = dispatch.scripts.iter().map(|script| script.content.len()).sum();
        if bytes > cfg.max_script_bytes {
            return Some(Outcome::not_run(
                code::SCRIPT_FILE,
                format!(
                    "not run: the script files have {bytes} bytes, more than the {} that this agent's settings (exec.max_script_bytes) allow",
                    cfg.max_script_bytes
                ),
            ));
        }
        for script in &dispatch.scripts {
            let name = scripts::check_name(&script.name);
            let absolute = script.store_dir.starts_with('/') && !script.store_dir.contains('\0');
            if let Some(text) = name.err().or_else(|| {
                (!absolute).then(|| format!("the script directory {:?} is not an absolute path", script.store_dir))
            }) {
                return Some(Outcome::not_run(code::SCRIPT_FILE, text));
            }
        }
        None
    }

    /// Keeps the place of a target while its intent is being written. `None` when somebody else was quicker.
    fn reserve(&self, key: &Arc<Key>, dispatch: &Arc<Dispatch>) -> Result<Option<CancellationToken>, Outcome> {
        let cfg = &self.shared.cfg;
        let now = Instant::now();
        let mut state = self.shared.state.lock();
        if state.targets.contains_key(key) {
            return Ok(None);
        }
        let busy = |text: String| Err(Outcome::not_run(code::BUSY, text));
        if state.queued >= cfg.queue && state.running >= cfg.concurrency {
            return busy(format!(
                "the agent is busy: {} scripts run and {} wait; try again later",
                state.running, state.queued
            ));
        }
        if state.spool_bytes >= cfg.max_spool_bytes || state.targets.len() - state.refused >= cfg.max_spool_entries {
            return busy(format!(
                "the agent keeps results of {} targets ({} bytes) that the server has not taken yet, and takes no more; try again later",
                state.targets.len(),
                state.spool_bytes
            ));
        }
        let streams = dispatch
            .atomic_tasks
            .iter()
            .map(|_| Stream::new(Phase::Queued, 0, now))
            .collect();
        let target = Target::new(Kind::Live, Some(dispatch), streams);
        let stop = target.stop.clone();
        state.insert(Arc::clone(key), target);
        self.shared.work.notify_one();
        Ok(Some(stop))
    }

    /// Gives every atomic task of a dispatch the same terminal row, without the journal: nothing was started, and the same dispatch
    /// would be judged anew.
    fn refuse(&self, key: Arc<Key>, dispatch: &Dispatch, outcome: &Outcome) {
        tracing::info!(target = %key, asked_id = dispatch.asked_id, code = outcome.error_code, reason = outcome.message, "not run");
        let now = Instant::now();
        let ended = || Phase::Ended(Box::new(Ended::without_run(outcome.clone())));
        let streams = dispatch
            .atomic_tasks
            .iter()
            .map(|_| Stream::new(ended(), 0, now))
            .collect();
        let mut state = self.shared.state.lock();
        if state.refused >= self.shared.cfg.max_refusals {
            tracing::warn!(target = %key, "too many refusals wait for the server; this one is dropped and will be made again when asked again");
            return;
        }
        state.insert(Arc::clone(&key), Target::new(Kind::Refused, None, streams));
        state.schedule_all(&key, now);
        drop(state);
        self.shared.wake.notify_one();
    }

    /// Ends a target. Idempotent; a target that is over or not known stays as it is.
    #[expect(clippy::unused_async, reason = "the session awaits every order alike")]
    pub async fn terminate(&self, target: TargetRef) {
        let state = self.shared.state.lock();
        if let Some(target) = state.targets.get(&Key::from(&target)) {
            target.stop.cancel();
        }
    }

    /// The server has stored something.
    pub fn stored(&self, stored: Stored) {
        let Some(target) = &stored.target else { return };
        let key = Arc::new(Key::from(target));
        let stream: StreamKey = (Arc::clone(&key), stored.atomic);
        let now = Instant::now();
        let mut state = self.shared.state.lock();
        state.with(&stream, |s| {
            s.acknowledged(stored.offset, now);
            if stored.terminal && matches!(s.phase, Phase::Ended(_)) {
                s.stored = true;
                s.acked = s.spooled;
                s.sent = s.spooled;
            }
        });
        state.schedule(&stream, now);
        state.unblock(now);
        let over = state
            .targets
            .get_mut(&key)
            .filter(|t| !t.closing && t.kind != Kind::Done && t.streams.iter().all(|s| s.stored));
        if let Some(target) = over {
            target.closing = true;
            if target.kind == Kind::Refused {
                state.remove(&key);
            } else {
                let shared = Arc::clone(&self.shared);
                self.shared.life.spawn_contained("forget target", forget(shared, key));
            }
        }
        drop(state);
        self.shared.wake.notify_one();
    }

    /// Begins a session: everything that is not acknowledged is reported to it, from the acknowledged offsets on. The receiver of an
    /// earlier session ends.
    pub fn attach(&self, link: Link) -> mpsc::Receiver<Report> {
        let (reports, receiver) = mpsc::channel(self.shared.cfg.report_queue);
        let now = Instant::now();
        let window = |asked: u32, default: u64| if asked == 0 { default } else { u64::from(asked) };
        let generation = {
            let mut state = self.shared.state.lock();
            let generation = state.session.as_ref().map_or(0, |old| {
                old.cancel.cancel();
                old.generation + 1
            });
            let session = Session {
                generation,
                stream_window: window(link.stream_window, 4 * CHUNK),
                session_window: window(link.session_window, 64 * CHUNK),
                cancel: CancellationToken::new(),
            };
            state.begin(session, now);
            generation
        };
        self.shared.clock.send_replace(Some((link.server_time_ms, now)));
        self.shared
            .life
            .spawn_contained("reports", pump(Arc::clone(&self.shared), generation, reports));
        receiver
    }
}

/// Everything of a target is stored by the server: keeps only what prevents a second run.
async fn forget(shared: Arc<Shared>, key: Arc<Key>) {
    let Some((ends, not_after_ms)) = shared
        .state
        .lock()
        .targets
        .get(&key)
        .map(|t| (t.ends(), t.not_after_ms))
    else {
        return;
    };
    let task = {
        let (shared, key, ends) = (Arc::clone(&shared), Arc::clone(&key), ends.clone());
        tokio::task::spawn_blocking(move || shared.journal.forget(&key, not_after_ms, &ends))
    };
    if let Err(error) = task.await.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
        // It stays in the journal and is reported again after a restart, which does no harm.
        tracing::error!(target = %key, %error, "the journal entry of a finished task cannot be removed");
    }
    let now = Instant::now();
    let mut state = shared.state.lock();
    state.remove(&key);
    let mut target = Target::new(
        Kind::Done,
        None,
        ends.into_iter().map(|end| done_stream(end, now)).collect(),
    );
    target.not_after_ms = not_after_ms;
    state.insert(key, target);
}
