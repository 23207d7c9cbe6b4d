//! The embedded store's engine: one thread that owns the data. Connections hand it one message per socket read; it executes what has come in, writes the effects of the whole
//! group to the log with one write, and only then lets the replies go. How records look on the disk is `durable`'s, how the wire looks is `resp`'s.

pub(crate) mod db;
pub(crate) mod glob;
pub(crate) mod hash;
pub(crate) mod keys;
pub(crate) mod list;
pub(crate) mod misc;
pub(crate) mod numbers;
pub(crate) mod ranked;
pub(crate) mod set;
pub(crate) mod string;
pub(crate) mod tx;
pub(crate) mod value;
pub(crate) mod zrange;
pub(crate) mod zset;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gse_core::clock::Clock;
use tokio::sync::{mpsc, oneshot};

use crate::commands::{self, GROWS, Run, Spec, WRITE};
use crate::durable::compact::Compaction;
use crate::durable::log::Journal;
use crate::durable::{self, Settings};
use crate::metrics::Metrics;
use crate::resp::parse::Requests;
use crate::resp::write::Writer;
use db::{Db, Effects, Exec, Refusal};
use tx::Session;

/// One command of a batch: found in the table, or refused before it came here.
pub(crate) type Op = Result<&'static Spec, Refusal>;

/// The commands of one socket read.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) requests: Requests,
    /// One per request that this batch is to execute, with the request's index.
    pub(crate) ops: Vec<(u32, Op)>,
}

/// A batch on its way to the engine.
pub(crate) struct Job {
    pub(crate) session: u64,
    pub(crate) batch: Batch,
    /// The first op to execute.
    pub(crate) from: usize,
    pub(crate) out: Writer,
    /// Bytes of replies after which the rest of the batch is left for the next round.
    pub(crate) soft_limit: usize,
    pub(crate) reply: oneshot::Sender<Done>,
}

/// A batch on its way back.
pub(crate) struct Done {
    pub(crate) batch: Batch,
    /// The first op not executed yet.
    pub(crate) next: usize,
    pub(crate) out: Writer,
}

pub(crate) enum Message {
    Job(Box<Job>),
    /// A connection is gone: what it watched and queued is forgotten.
    Gone(u64),
    /// Time passes.
    Tick,
}

/// Jobs taken together into one log record at most.
const GROUP_JOBS: usize = 256;
/// Bytes of effects after which a group is closed, so that a record stays of bounded size.
const GROUP_BYTES: usize = 4 << 20;
const EXPIRE_PER_TICK: usize = 2000;
const PROBE_FIRST: Duration = Duration::from_millis(250);
const PROBE_LAST: Duration = Duration::from_secs(5);

/// Why writes are refused for now.
struct Outage {
    reason: String,
    next_probe: Instant,
    wait: Duration,
}

pub(crate) struct Engine {
    db: Db,
    effects: Effects,
    sessions: HashMap<u64, Session>,
    journal: Journal,
    compaction: Compaction,
    settings: Arc<Settings>,
    /// Bytes; 0 is no bound.
    max_memory: usize,
    metrics: Metrics,
    outage: Option<Outage>,
    /// Says what has expired. Not the wall clock: a step of that must not make all keys expire at once.
    clock: Clock,
}

impl Engine {
    /// Opens the directory and loads what is in it. Blocking.
    pub(crate) fn open(settings: Settings, max_memory: usize, metrics: Metrics, clock: Clock) -> anyhow::Result<Self> {
        let settings = Arc::new(settings);
        let (db, journal) = durable::recover::open(&settings)?;
        metrics.loaded(&db);
        Ok(Self {
            db,
            effects: Effects::default(),
            sessions: HashMap::new(),
            compaction: Compaction::new(Arc::clone(&settings)),
            journal,
            settings,
            max_memory,
            metrics,
            outage: None,
            clock,
        })
    }

    /// Runs until every sender is gone. Blocking: it wants a thread of its own.
    pub(crate) fn run(mut self, mut inbox: mpsc::Receiver<Message>) -> anyhow::Result<()> {
        let mut jobs: Vec<Job> = Vec::with_capacity(GROUP_JOBS);
        let mut held: Option<Message> = None;
        while let Some(first) = held.take().or_else(|| inbox.blocking_recv()) {
            held = self.gather(first, &mut jobs, &mut inbox)?;
        }
        self.journal.sync()?;
        self.compaction.wait();
        Ok(())
    }

    /// As [`Engine::run`], as a task among others: for a simulation, in which everything shares one thread.
    pub(crate) async fn run_here(mut self, mut inbox: mpsc::Receiver<Message>) -> anyhow::Result<()> {
        let mut jobs: Vec<Job> = Vec::with_capacity(GROUP_JOBS);
        let mut held: Option<Message> = None;
        loop {
            let first = match held.take() {
                Some(held) => Some(held),
                None => inbox.recv().await,
            };
            let Some(first) = first else { return Ok(()) };
            held = self.gather(first, &mut jobs, &mut inbox)?;
        }
    }

    /// Takes what else has come in after `first` and does it all; gives back what has to wait for the next round.
    fn gather(
        &mut self,
        first: Message,
        jobs: &mut Vec<Job>,
        inbox: &mut mpsc::Receiver<Message>,
    ) -> anyhow::Result<Option<Message>> {
        let mut next = Some(first);
        let mut held = None;
        let mut tick = false;
        while let Some(message) = next {
            match message {
                Message::Job(job) => jobs.push(*job),
                Message::Tick => tick = true,
                // What was sent before must be done before: it may be the same connection's.
                gone @ Message::Gone(_) if !jobs.is_empty() => {
                    held = Some(gone);
                    break;
                }
                Message::Gone(session) => self.forget(session),
            }
            next = if jobs.len() < GROUP_JOBS {
                inbox.try_recv().ok()
            } else {
                None
            };
        }
        self.round(jobs, tick)?;
        Ok(held)
    }

    fn now_ms(&self) -> i64 {
        i64::try_from(self.clock.unix_ms()).unwrap_or(i64::MAX)
    }

    /// Executes what came, group by group.
    fn round(&mut self, jobs: &mut Vec<Job>, tick: bool) -> anyhow::Result<()> {
        let mut jobs = jobs.drain(..);
        if tick {
            self.tick()?;
        }
        loop {
            let mut group: Vec<Job> = Vec::new();
            let mut marks = Vec::new();
            let mut undo = Vec::new();
            let now = self.now_ms();
            for mut job in jobs.by_ref() {
                if let Some(s) = self.sessions.get(&job.session) {
                    undo.push((job.session, Some(s.clone())));
                } else {
                    undo.push((job.session, None));
                }
                marks.push((job.out.buf.len(), job.from));
                job.from = self.execute(&mut job, now);
                group.push(job);
                if self.effects.buf.len() > GROUP_BYTES {
                    break;
                }
            }
            if group.is_empty() {
                return Ok(());
            }
            if !self.commit()? {
                // Nothing of this group reached the disk, so nothing of it happened: the state is what the disk says, and the group is asked again, its writes refused.
                for (session, old) in undo.into_iter().rev() {
                    match old {
                        Some(s) => self.sessions.insert(session, s),
                        None => self.sessions.remove(&session),
                    };
                }
                self.reload()?;
                let now = self.now_ms();
                for (job, (len, from)) in group.iter_mut().zip(marks) {
                    job.out.buf.truncate(len);
                    job.from = from;
                    job.from = self.execute(job, now);
                }
            }
            // Before the replies: whoever has one may ask for the numbers.
            self.metrics.state(&self.db, &self.journal);
            for job in group {
                let Job {
                    batch,
                    from,
                    out,
                    reply,
                    ..
                } = job;
                // A connection that has gone away does not want its replies.
                let _ = reply.send(Done { batch, next: from, out });
            }
        }
    }

    /// Writes the group's effects. False when the disk refused them.
    fn commit(&mut self) -> anyhow::Result<bool> {
        if self.outage.is_some() {
            // Only expirations can be in here; they wait for the log with the keys they belong to.
            return Ok(true);
        }
        if self.effects.buf.is_empty() {
            return Ok(true);
        }
        match self.journal.append(&self.effects.buf, &self.metrics) {
            Ok(()) => {
                self.effects.clear();
                Ok(true)
            }
            Err(e) => {
                tracing::error!(error = %e, dir = %self.settings.dir.display(), "the store cannot write its log: writes are refused until it can; free space or repair the disk");
                self.effects.clear();
                self.outage = Some(Outage {
                    reason: e.to_string(),
                    next_probe: Instant::now() + PROBE_FIRST,
                    wait: PROBE_FIRST,
                });
                self.metrics.outage(Some(&e.to_string()));
                Ok(false)
            }
        }
    }

    fn reload(&mut self) -> anyhow::Result<()> {
        let dirty = std::mem::take(&mut self.db.dirty);
        self.db = durable::recover::reload(&self.settings, &self.journal)?;
        self.db.dirty = dirty;
        for (id, session) in &self.sessions {
            session.watched.iter().for_each(|k| self.db.watch(k, *id));
        }
        Ok(())
    }

    fn tick(&mut self) -> anyhow::Result<()> {
        let now = self.now_ms();
        if let Some(outage) = &mut self.outage
            && Instant::now() >= outage.next_probe
        {
            match self.journal.probe(&self.effects.buf, &self.metrics) {
                Ok(()) => {
                    tracing::warn!("the store can write its log again: writes are taken");
                    self.effects.clear();
                    self.outage = None;
                    self.metrics.outage(None);
                }
                Err(e) => {
                    outage.reason = e.to_string();
                    outage.wait = (outage.wait * 2).min(PROBE_LAST);
                    outage.next_probe = Instant::now() + outage.wait;
                    // Compaction may be what frees the space, or what replaces a file that can no longer be trusted.
                    self.compaction.start_if_useful(&mut self.journal, true);
                }
            }
        }
        if self.outage.is_none() {
            let mut x = Exec {
                db: &mut self.db,
                log: &mut self.effects,
                now,
            };
            db::expire_due(&mut x, EXPIRE_PER_TICK);
            if !self.commit()? {
                self.reload()?;
            }
        }
        self.compaction.poll(&mut self.journal, &self.metrics);
        self.compaction.start_if_useful(&mut self.journal, false);
        self.metrics.state(&self.db, &self.journal);
        Ok(())
    }

    fn forget(&mut self, session: u64) {
        if let Some(s) = self.sessions.remove(&session) {
            s.watched.iter().for_each(|k| self.db.unwatch(k, session));
        }
        self.db.dirty.remove(&session);
    }

    /// Executes a job's commands from `job.from`; returns the first one left.
    fn execute(&mut self, job: &mut Job, now: i64) -> usize {
        let Job {
            session,
            batch,
            from,
            out,
            soft_limit,
            ..
        } = job;
        let mut i = *from;
        let start = out.buf.len();
        while let Some((at, op)) = batch.ops.get(i) {
            let args = batch.requests.args(*at as usize);
            match op {
                Ok(spec) => self.command(*session, spec, args, out, now),
                Err(refusal) => self.refuse(*session, refusal, out),
            }
            i += 1;
            if out.buf.len() - start > *soft_limit || self.effects.buf.len() > GROUP_BYTES {
                break;
            }
        }
        i
    }

    fn refuse(&mut self, session: u64, refusal: &Refusal, out: &mut Writer) {
        if let Some(s) = self.sessions.get_mut(&session) {
            s.failed = true;
        }
        out.error(refusal.0.as_bytes());
    }

    fn command(&mut self, session: u64, spec: &'static Spec, args: crate::args::Args<'_>, out: &mut Writer, now: i64) {
        if let Run::Tx(kind) = spec.run {
            return self.transaction(session, kind, spec, args, out, now);
        }
        let queueing = !self.sessions.is_empty() && self.sessions.get(&session).is_some_and(|s| s.queue.is_some());
        if let Err(refusal) = self.admit(spec.flags) {
            return self.refuse(session, &refusal, out);
        }
        if queueing {
            self.queue(session, spec, args, out)
        } else {
            self.run_one(session, spec, args, out, now)
        }
    }

    /// Whether commands with these flags may run now.
    fn admit(&self, flags: u8) -> Result<(), Refusal> {
        if flags & WRITE != 0
            && let Some(outage) = &self.outage
        {
            self.metrics.refused_write();
            return Err(format!(
                "MISCONF the store cannot write its log ({}): writes are refused until it can, reads go on",
                outage.reason
            )
            .into());
        }
        if flags & GROWS != 0 && self.max_memory > 0 && self.db.memory > self.max_memory {
            self.metrics.refused_write();
            return Err("OOM command not allowed when used memory > 'maxmemory'.".into());
        }
        Ok(())
    }

    fn run_one(&mut self, session: u64, spec: &'static Spec, args: crate::args::Args<'_>, out: &mut Writer, now: i64) {
        match spec.run {
            Run::Engine(handler) => {
                let mark = out.buf.len();
                let mut x = Exec {
                    db: &mut self.db,
                    log: &mut self.effects,
                    now,
                };
                if let Err(refusal) = handler(&mut x, args, out) {
                    out.buf.truncate(mark);
                    out.error(refusal.0.as_bytes());
                }
            }
            Run::Tx(tx::Tx::Unwatch) => {
                self.unwatch(session);
                out.ok();
            }
            Run::Tx(_) | Run::Local(_) | Run::Admin | Run::Elsewhere | Run::Refused => {
                out.error(commands::not_embedded(spec).0.as_bytes())
            }
        }
    }
}
