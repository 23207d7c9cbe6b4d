//! A simulated host: a disk that survives, and an executor that obeys the same rules as the real one. The intent is on the disk before
//! anything is started; what is known is never started again; traces stay until the start window is over; a dispatch for another epoch
//! of the journal is refused; everything is reported until it is acknowledged.
//!
//! Scripts outlive the agent, as the real runners do; a reboot ends them without a trace of how.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_agent::session::{Link, Report, Work};
use gse_core::lifecycle::Lifecycle;
use gse_core::random::Random;
use gse_proto::codes::Inner;
use gse_proto::session::{Dispatch, Output, Row, RowStatus, Stored, TargetRef};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};

use super::log::Log;
use super::script::{Key, Script, key, output};
use super::world::{EPOCH_MS, now_ms};

const CHUNK: u64 = 64 * 1024;
const RESEND_MS: u64 = 5_000;
const LOOK: Duration = Duration::from_millis(100);

/// How an atomic task stands. All times are simulated milliseconds.
#[derive(Debug, Clone, Default)]
struct Atomic {
    started: Option<u64>,
    /// Told to end.
    stopped: Option<u64>,
    /// The host went down at this time, or the agent before the start.
    lost: Option<u64>,
    acked: u64,
    stored: bool,
}

#[derive(Debug, Clone)]
struct Target {
    dispatch: Dispatch,
    atomics: Vec<Atomic>,
    /// Everything is acknowledged.
    done: bool,
    /// Not on the disk: the reason, for a row.
    refused: Option<(Inner, &'static str)>,
}

/// How an atomic task ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) status: RowStatus,
    pub(crate) code: Inner,
    pub(crate) exit: i32,
    pub(crate) start_ms: u64,
    pub(crate) end_ms: u64,
    pub(crate) output_len: u64,
    pub(crate) text: &'static str,
}

enum View {
    Queued,
    Running(u64, u64),
    Ended(Ended),
}

/// What survives.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    epoch: u64,
    targets: BTreeMap<Key, Target>,
    /// Every start there ever was, whatever else is lost.
    pub(crate) starts: BTreeMap<(Key, u32), Vec<u64>>,
    /// Every end that was reported.
    pub(crate) ends: BTreeMap<(Key, u32), Ended>,
    /// By how much the host's wall clock is wrong.
    pub(crate) skew_ms: i64,
}

/// A disk that can be handed to the agent's next life.
pub(crate) type SharedDisk = Arc<Mutex<Disk>>;

impl Disk {
    /// The host went down: whatever ran is gone.
    pub(crate) fn reboot(&mut self, now: u64) {
        for target in self.targets.values_mut() {
            for n in 0..target.atomics.len() {
                if !matches!(target.view(n, now), View::Ended(_)) {
                    target.atomics[n].lost.get_or_insert(now);
                }
            }
        }
    }

    /// The journal is lost, and with it everything that is known of the past.
    pub(crate) fn lose_journal(&mut self) {
        self.epoch += 1;
        self.targets.clear();
    }

    /// What is known of a task, for messages.
    pub(crate) fn told(&self, task: &str) -> Vec<String> {
        let ends = self.ends.iter().filter(|((key, _), _)| key.0 == task);
        let held = self.targets.iter().filter(|(key, _)| key.0 == task);
        ends.map(|end| format!("{end:?}"))
            .chain(held.map(|(key, target)| format!("{key:?} done: {}, {:?}", target.done, target.atomics)))
            .collect()
    }

    fn epoch(&self) -> Bytes {
        Bytes::copy_from_slice(&self.epoch.to_be_bytes())
    }
}

impl Target {
    fn script(&self, n: usize) -> Script {
        Script::parse(&self.dispatch.atomic_tasks[n].command)
    }

    fn view(&self, n: usize, now: u64) -> View {
        let end = |status, code, exit, start_ms, end_ms, output_len, text| {
            View::Ended(Ended {
                status,
                code,
                exit,
                start_ms,
                end_ms,
                output_len,
                text,
            })
        };
        let atomic = &self.atomics[n];
        if let Some((code, text)) = self.refused {
            let status = if code == Inner::Unknown {
                RowStatus::Restarted
            } else {
                RowStatus::Failed
            };
            return end(status, code, 255, 0, 0, 0, text);
        }
        let script = self.script(n);
        let Some(started) = atomic.started else {
            if let Some(lost) = atomic.lost {
                return end(
                    RowStatus::Restarted,
                    Inner::Unknown,
                    255,
                    lost,
                    lost,
                    0,
                    "whether it ran is not known",
                );
            }
            return match atomic.stopped {
                Some(at) => end(
                    RowStatus::Stopped,
                    Inner::Terminated,
                    143,
                    at,
                    at,
                    0,
                    "ended before it was run",
                ),
                None => View::Queued,
            };
        };
        let over = started + script.runs_ms;
        let time_up = started + self.dispatch.atomic_tasks[n].timeout_ms;
        let stopped = atomic.stopped.unwrap_or(u64::MAX);
        let lost = atomic.lost.unwrap_or(u64::MAX);
        let first = over.min(time_up).min(stopped).min(lost);
        if now < first {
            return View::Running(started, script.printed(now - started));
        }
        let printed = script.printed(first - started);
        if first == over {
            let (status, code) = if script.exit == 0 {
                (RowStatus::Succeeded, Inner::Ok)
            } else {
                (RowStatus::Failed, Inner::Ok)
            };
            return end(status, code, script.exit, started, first, printed, "");
        }
        if first == lost {
            return end(
                RowStatus::Restarted,
                Inner::Unknown,
                255,
                started,
                first,
                printed,
                "the host went down",
            );
        }
        if first == stopped {
            return end(
                RowStatus::Stopped,
                Inner::Terminated,
                143,
                started,
                first,
                printed,
                "ended on request",
            );
        }
        end(
            RowStatus::TimedOut,
            Inner::Timeout,
            137,
            started,
            first,
            printed,
            "its time was up",
        )
    }
}

/// What one session knows of an atomic task.
#[derive(Debug, Clone, Copy, Default)]
struct Sent {
    upto: u64,
    progress: u64,
    running: bool,
    row: Option<u64>,
}

#[derive(Default)]
struct Session {
    generation: u64,
    window: u64,
    session_window: u64,
    sent: BTreeMap<(Key, usize), Sent>,
    /// The server's clock less ours.
    server: Option<i64>,
}

struct Shared {
    name: String,
    disk: SharedDisk,
    session: Mutex<Session>,
    wake: Notify,
    random: Random,
    log: Log,
    life: Lifecycle,
}

/// The executor of one life of an agent.
#[derive(Clone)]
pub(crate) struct SimWork(Arc<Shared>);

impl SimWork {
    /// Takes up what the disk has.
    pub(crate) fn start(name: &str, disk: SharedDisk, random: Random, log: Log, life: &Lifecycle) -> Self {
        let now = now_ms();
        {
            let mut disk = disk.lock();
            for target in disk.targets.values_mut() {
                for atomic in &mut target.atomics {
                    // There was an intent; whether the predecessor got any further is not known.
                    if atomic.started.is_none() && atomic.stopped.is_none() {
                        atomic.lost.get_or_insert(now);
                    }
                }
            }
            disk.targets.retain(|_, target| target.refused.is_none());
        }
        let work = Self(Arc::new(Shared {
            name: name.to_owned(),
            disk,
            session: Mutex::default(),
            wake: Notify::new(),
            random,
            log,
            life: life.clone(),
        }));
        life.spawn("scripts", next_atomics(Arc::clone(&work.0)));
        work
    }

    fn refuse(&self, key: Key, order: Dispatch, code: Inner, text: &'static str) {
        self.0
            .log
            .add(now_ms(), format!("{} refuses {key:?}: {text}", self.0.name));
        let atomics = vec![Atomic::default(); order.atomic_tasks.len()];
        let target = Target {
            dispatch: order,
            atomics,
            done: false,
            refused: Some((code, text)),
        };
        self.0.disk.lock().targets.insert(key, target);
        self.0.wake.notify_waiters();
    }

    fn server_now(&self) -> Option<u64> {
        let off = self.0.session.lock().server?;
        Some(now_ms().saturating_add_signed(off))
    }
}

impl Shared {
    /// Starts an atomic task: the one place where something is run.
    fn start(&self, key: &Key, n: usize) {
        let now = now_ms();
        let mut disk = self.disk.lock();
        let Some(target) = disk.targets.get_mut(key) else {
            return;
        };
        target.atomics[n].started = Some(now);
        disk.starts.entry((key.clone(), n as u32)).or_default().push(now);
        drop(disk);
        self.log.add(now, format!("{} starts {key:?} {n}", self.name));
        self.wake.notify_waiters();
    }
}

/// Starts each atomic task when the one before it is over, and drops old traces.
async fn next_atomics(shared: Arc<Shared>) {
    loop {
        sleep(LOOK).await;
        let now = now_ms();
        let mut due = Vec::new();
        for (key, target) in &shared.disk.lock().targets {
            for n in 1..target.atomics.len() {
                if matches!(target.view(n - 1, now), View::Ended(_)) && matches!(target.view(n, now), View::Queued) {
                    due.push((key.clone(), n));
                }
            }
        }
        for (key, n) in due {
            shared.start(&key, n);
        }
        let off = shared.session.lock().server;
        if let Some(off) = off {
            let server = now.saturating_add_signed(off);
            shared
                .disk
                .lock()
                .targets
                .retain(|_, target| !(target.done && target.dispatch.not_after_ms < server));
        }
    }
}

impl Work for SimWork {
    fn epoch(&self) -> Bytes {
        self.0.disk.lock().epoch()
    }

    fn held(&self) -> Vec<TargetRef> {
        let disk = self.0.disk.lock();
        let held = disk.targets.values().filter(|target| !target.done);
        held.filter_map(|target| target.dispatch.target.clone()).collect()
    }

    fn counts(&self) -> (u32, u32) {
        (0, 0)
    }

    async fn dispatch(&self, order: Dispatch) {
        let Some(target) = &order.target else { return };
        let key = key(target);
        let now = now_ms();
        self.0.log.add(now, format!("{} gets {key:?}", self.0.name));
        if let Some(known) = self.0.disk.lock().targets.get_mut(&key) {
            for atomic in &mut known.atomics {
                atomic.stored = false;
            }
            known.done = false;
            let mut session = self.0.session.lock();
            for n in 0..known.atomics.len() {
                if let Some(sent) = session.sent.get_mut(&(key.clone(), n)) {
                    sent.running = false;
                    sent.row = None;
                }
            }
            self.0.wake.notify_waiters();
            return;
        }
        if order.epoch != self.epoch() {
            return self.refuse(key, order, Inner::Unknown, "meant for another journal");
        }
        if self.server_now().is_some_and(|now| now > order.not_after_ms) {
            return self.refuse(key, order, Inner::Timeout, "not run: too late");
        }
        // Writing takes a moment, in which the agent may die: before the intent is on the disk, or after.
        sleep(self.0.random.up_to(Duration::from_millis(30))).await;
        let atomics = vec![Atomic::default(); order.atomic_tasks.len()];
        let intent = Target {
            dispatch: order,
            atomics,
            done: false,
            refused: None,
        };
        self.0.disk.lock().targets.insert(key.clone(), intent);
        sleep(self.0.random.up_to(Duration::from_millis(30))).await;
        let stopped = self
            .0
            .disk
            .lock()
            .targets
            .get(&key)
            .is_none_or(|target| target.atomics[0].stopped.is_some());
        if !stopped {
            self.0.start(&key, 0);
        }
    }

    async fn terminate(&self, target: TargetRef) {
        let now = now_ms();
        let key = key(&target);
        let mut disk = self.0.disk.lock();
        let Some(target) = disk.targets.get_mut(&key) else {
            return;
        };
        for n in 0..target.atomics.len() {
            if !matches!(target.view(n, now), View::Ended(_)) {
                target.atomics[n].stopped.get_or_insert(now);
            }
        }
        drop(disk);
        self.0.log.add(now, format!("{} ends {key:?}", self.0.name));
        self.0.wake.notify_waiters();
    }

    fn stored(&self, stored: Stored) {
        let Some(target) = &stored.target else { return };
        let key = key(target);
        let now = now_ms();
        let mut disk = self.0.disk.lock();
        let Some(target) = disk.targets.get_mut(&key) else {
            return;
        };
        let n = stored.atomic as usize;
        if n >= target.atomics.len() {
            return;
        }
        let ended = matches!(target.view(n, now), View::Ended(_));
        let atomic = &mut target.atomics[n];
        if stored.offset > atomic.acked {
            atomic.acked = stored.offset;
            if let Some(sent) = self.0.session.lock().sent.get_mut(&(key.clone(), n)) {
                sent.upto = sent.upto.max(stored.offset);
                sent.progress = now;
            }
        }
        if stored.terminal && ended {
            atomic.stored = true;
        }
        if target.atomics.iter().all(|atomic| atomic.stored) {
            if target.refused.is_some() {
                disk.targets.remove(&key);
            } else {
                target.done = true;
            }
        }
        drop(disk);
        self.0.wake.notify_waiters();
    }

    fn attach(&self, link: Link) -> mpsc::Receiver<Report> {
        let (reports, receiver) = mpsc::channel(64);
        let generation = {
            let mut session = self.0.session.lock();
            session.generation += 1;
            session.window = u64::from(link.stream_window).max(CHUNK);
            session.session_window = u64::from(link.session_window).max(2 * CHUNK);
            session.sent.clear();
            let server = i64::try_from(link.server_time_ms).unwrap_or(i64::MAX);
            session.server = Some(server - i64::try_from(now_ms()).unwrap_or(0));
            session.generation
        };
        let shared = Arc::clone(&self.0);
        self.0
            .life
            .spawn_contained("reports", pump(shared, generation, reports));
        receiver
    }
}

/// Sends one session what it does not know yet.
async fn pump(shared: Arc<Shared>, generation: u64, reports: mpsc::Sender<Report>) {
    loop {
        let Some(due) = due(&shared, generation) else { return };
        let idle = due.is_empty();
        for report in due {
            if reports.send(report).await.is_err() {
                return;
            }
        }
        if reports.is_closed() {
            return;
        }
        if idle {
            let busy = shared.disk.lock().targets.values().any(|target| !target.done);
            let wait = if busy { LOOK } else { LOOK * 10 };
            // Woken or not, it is time to look again.
            let _ = timeout(wait, shared.wake.notified()).await;
        }
    }
}

/// What can be sent now; `None` when another session has taken over.
fn due(shared: &Shared, generation: u64) -> Option<Vec<Report>> {
    let now = now_ms();
    let mut disk = shared.disk.lock();
    let Disk {
        targets, ends, skew_ms, ..
    } = &mut *disk;
    let mut session = shared.session.lock();
    if session.generation != generation {
        return None;
    }
    let wall = |ms: u64| (EPOCH_MS + ms).saturating_add_signed(*skew_ms);
    let mut out = Vec::new();
    let mut in_flight: u64 = 0;
    for (key, target) in targets.iter().filter(|(_, target)| !target.done) {
        for (n, atomic) in target.atomics.iter().enumerate() {
            let sent = session.sent.get(&(key.clone(), n));
            in_flight += sent.map_or(0, |sent| sent.upto.saturating_sub(atomic.acked));
        }
    }
    let (window, most) = (session.window, session.session_window);
    for (key, target) in targets.iter().filter(|(_, target)| !target.done) {
        for (n, atomic) in target.atomics.iter().enumerate().filter(|(_, atomic)| !atomic.stored) {
            let sent = session.sent.entry((key.clone(), n)).or_insert(Sent {
                upto: atomic.acked,
                progress: now,
                ..Sent::default()
            });
            let head = || Row {
                target: target.dispatch.target.clone(),
                atomic: n as u32,
                ..Row::default()
            };
            if sent.upto > atomic.acked && now >= sent.progress + RESEND_MS {
                sent.upto = atomic.acked;
                sent.progress = now;
            }
            let (printed, ended) = match target.view(n, now) {
                View::Queued => continue,
                View::Running(start, printed) => {
                    if !sent.running && now >= start + 300 {
                        sent.running = true;
                        out.push(Report::Row(Row {
                            status: RowStatus::Running.into(),
                            error_code: Inner::Running.code(),
                            start_ms: wall(start),
                            ..head()
                        }));
                    }
                    (printed, None)
                }
                View::Ended(ended) => (ended.output_len, Some(ended)),
            };
            if let Some(ended) = ended
                && printed - atomic.acked.min(printed) <= CHUNK
            {
                if sent.row.is_none_or(|at| now >= at + RESEND_MS) {
                    sent.row = Some(now);
                    sent.upto = printed;
                    out.push(Report::Row(Row {
                        status: ended.status.into(),
                        error_code: ended.code.code(),
                        error_msg: ended.text.to_owned(),
                        exit_code: ended.exit,
                        start_ms: if ended.start_ms == 0 { 0 } else { wall(ended.start_ms) },
                        end_ms: if ended.end_ms == 0 { 0 } else { wall(ended.end_ms) },
                        output_len: printed,
                        tail_offset: atomic.acked,
                        tail: output(key, n as u32, atomic.acked, printed).into(),
                        ..head()
                    }));
                    ends.insert((key.clone(), n as u32), ended);
                }
                continue;
            }
            while sent.upto < printed && sent.upto - atomic.acked < window && in_flight < most {
                let to = printed.min(sent.upto + CHUNK).min(atomic.acked + window);
                if sent.upto == atomic.acked {
                    sent.progress = now;
                }
                out.push(Report::Output(Output {
                    target: target.dispatch.target.clone(),
                    atomic: n as u32,
                    offset: sent.upto,
                    data: output(key, n as u32, sent.upto, to).into(),
                }));
                in_flight += to - sent.upto;
                sent.upto = to;
            }
        }
    }
    Some(out)
}
