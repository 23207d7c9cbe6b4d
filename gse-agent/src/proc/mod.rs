//! The supervisor of processes (contract procmgr-agent-lifecycle, 1.2 to 1.5 and 1.11): carries out what gse_procmgr asks for, keeps alive
//! what is hosted while every server may be down and across the agent's own restarts, and tells how things are.
//!
//! Processes are nobody's children to lose: they are found again by pid file, executable and start time (`find`). A process's own state is
//! a pure type (`machine`); one look at all of them every so often feeds it (`watch`). Operations on one process wait for each other,
//! those on different ones do not (`operate`). Tasks, results and last known states are gse_procmgr's and gse_task's business.

mod config;
mod events;
mod find;
mod hosting;
mod journal;
mod keeper;
mod limits;
mod machine;
mod operate;
mod registry;
mod report;
mod respawn;
mod service;
mod stat;
mod status;
mod steps;
mod watch;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use bytes::Bytes;
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use gse_proto::proc::{AUTO_RESIDENT, Label, Policy, ProcReport, Process, Spec, spec_digest};
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::{Notify, OwnedMutexGuard, Semaphore};

pub use self::config::ProcConfig;
use self::events::Source;
use self::find::{Claimed, Ident, Look};
use self::journal::Ops;
use self::keeper::Keeper;
use self::limits::Meter;
use self::machine::{Machine, Rules};
use self::registry::{Files, Key, Registration};
use self::report::Reporter;
use self::stat::{Names, Stat, Units};
use crate::data::Intake;
use crate::exec::ExecConfig;
use crate::exec::command::Leaving;

pub use gse_proto::proc::SERVICE;

/// Commands that tell a version, at once.
const VERSIONS_AT_ONCE: usize = 4;
/// Looks at single processes, at once.
const FINDS_AT_ONCE: usize = 8;

/// Who the host is in events.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The agent's id.
    pub agent_id: String,
    /// The host's first address.
    pub ip: String,
    /// Its area.
    pub cloud_id: i32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

/// What is counted about processes.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    known: Gauge,
    hosted: Gauge,
    running: Gauge,
    operations: Family<Kind, Counter>,
    refused: Counter,
    events: Family<Kind, Counter>,
    write_failures: Counter,
}

impl Metrics {
    /// Registers them under the prefix `gse_agent_processes`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("gse_agent_processes");
        registry.register("known", "Processes that are known", self.known.clone());
        registry.register("hosted", "Processes that are kept alive", self.hosted.clone());
        registry.register("running", "Known processes that run", self.running.clone());
        registry.register("operations", "Operations carried out, by kind", self.operations.clone());
        registry.register(
            "refused",
            "Operations refused because too many are kept",
            self.refused.clone(),
        );
        registry.register("events", "Events about processes, by name", self.events.clone());
        registry.register(
            "write_failures",
            "Writes of the registrations that failed",
            self.write_failures.clone(),
        );
    }
}

/// Unix milliseconds by this host's clock.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// One known process.
#[derive(Debug)]
struct Entry {
    kept: Registration,
    digest: u64,
    machine: Machine,
    meter: Meter,
    /// At the last look; nothing when it did not run.
    stat: Option<Stat>,
    version: String,
    /// Of which process and which spec that is.
    version_of: Option<(i32, u64, u64)>,
    /// Of which it was asked for last.
    version_asked: Option<(i32, u64, u64)>,
}

/// What all parts share.
#[derive(Debug)]
struct Shared {
    config: ProcConfig,
    accounts: ExecConfig,
    source: Source,
    intake: Intake,
    metrics: Metrics,
    life: Lifecycle,
    units: Units,
    boot: String,
    began: Instant,
    entries: Mutex<BTreeMap<Arc<Key>, Entry>>,
    keeper: Keeper,
    ops: Ops,
    reporter: Reporter,
    /// Control commands at once.
    slots: Semaphore,
    /// Commands that tell a version, at once.
    versions: Semaphore,
    /// Looks at single processes, at once.
    finds: Semaphore,
    names: Names,
    turns: Mutex<HashMap<Arc<Key>, Turn>>,
    /// The servers' clock: what it said, and when.
    server_clock: Mutex<Option<(u64, Instant)>>,
    /// There may be something to look at.
    look: Notify,
}

type Turn = Arc<tokio::sync::Mutex<()>>;
/// While this is held the process is somebody's.
type Held = OwnedMutexGuard<()>;

/// The supervisor. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Procs {
    shared: Arc<Shared>,
}

impl Procs {
    /// Takes up what is registered on this host and what was under way, and supervises until the process drains.
    ///
    /// # Errors
    /// When the registrations can't be read, or the directory of operations can't be made.
    pub async fn start(
        config: ProcConfig,
        accounts: ExecConfig,
        identity: Identity,
        intake: Intake,
        (metrics, health): (Metrics, &Health),
        life: &Lifecycle,
    ) -> anyhow::Result<Self> {
        let files = Files {
            info: config.info_file(),
            known: config.data_dir.join("procknown.json"),
        };
        let ops = Ops::new(
            config.data_dir.join("ops"),
            config.max_operations,
            Duration::from_secs(config.results_kept_s),
        );
        let loading = {
            let files = files.clone();
            tokio::task::spawn_blocking(move || {
                let found = files.load().context("cannot read the registrations of processes")?;
                let open = ops.load().context("cannot read the operations on processes")?;
                anyhow::Ok((found, ops, open, Units::read(), crate::exec::boot_id()))
            })
        };
        let (found, ops, open, units, boot) = loading.await.context("reading the registrations of processes")??;
        let rebuilt = found.lost.is_some();
        if let Some(Some(trouble)) = &found.lost {
            tracing::error!("{trouble}");
            health.set("processes", Err(trouble.clone()));
        }
        let source = Source {
            data_id: config.event_data_id,
            ip: identity.ip,
            cloud_id: identity.cloud_id,
            agent_id: identity.agent_id,
        };
        let shared = Arc::new(Shared {
            accounts,
            source,
            intake,
            metrics,
            life: life.clone(),
            units,
            boot,
            began: Instant::now(),
            entries: Mutex::new(BTreeMap::new()),
            keeper: Keeper::new(),
            ops,
            reporter: Reporter::new(&config, rebuilt),
            slots: Semaphore::new(config.concurrency),
            versions: Semaphore::new(VERSIONS_AT_ONCE),
            finds: Semaphore::new(FINDS_AT_ONCE),
            names: Names::default(),
            turns: Mutex::new(HashMap::new()),
            server_clock: Mutex::new(None),
            look: Notify::new(),
            config,
        });
        let count = found.all.len();
        {
            let mut entries = shared.entries.lock();
            for (key, kept) in found.all {
                let entry = shared.entry(kept);
                entries.insert(Arc::new(key), entry);
            }
        }
        if count > 0 {
            tracing::info!(count, "processes are known");
        }
        life.spawn(
            "process registrations",
            keeper::run(Arc::clone(&shared), files, health.clone()),
        );
        // Before anything is looked at: what was under way has its process to itself.
        operate::resume(&shared, open);
        life.spawn("process supervisor", watch::run(Arc::clone(&shared)));
        life.spawn("dead processes", watch::collect(Arc::clone(&shared)));
        Ok(Self { shared })
    }

    /// Carries out a call of the service [`SERVICE`].
    pub async fn call(&self, payload: Bytes) -> Bytes {
        service::call(&self.shared, payload).await
    }

    /// The next report for the servers. Dropped half-way, it loses nothing.
    pub async fn report(&self) -> ProcReport {
        let shared = &self.shared;
        let all = || shared.entries.lock().keys().cloned().collect();
        let of = |keys: &[Arc<Key>]| {
            let entries = shared.entries.lock();
            let found = keys.iter().filter_map(|key| Some((key, entries.get(key.as_ref())?)));
            found.map(|(key, entry)| shared.process(key, entry)).collect()
        };
        shared.reporter.next(all, of).await
    }

    /// The store has a report.
    pub fn reported(&self, sequence: u64) {
        if self.shared.reporter.acknowledged(sequence) {
            // From here on there is a file, and so a memory.
            self.shared.keeper.ask();
        }
    }

    /// A session has begun; `server_time_ms` is what the server's clock says.
    pub fn attach(&self, server_time_ms: u64) {
        *self.shared.server_clock.lock() = Some((server_time_ms, Instant::now()));
        let any = !self.shared.entries.lock().is_empty();
        self.shared.reporter.attach(any);
    }
}

impl Shared {
    /// Milliseconds by a clock that only goes forward.
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The servers' clock, once it is known.
    fn server_now(&self) -> Option<u64> {
        let (said, at) = (*self.server_clock.lock())?;
        Some(said + u64::try_from(at.elapsed().as_millis()).unwrap_or(0))
    }

    fn entry(&self, kept: Registration) -> Entry {
        Entry {
            digest: spec_digest(&kept.spec),
            machine: Machine::new(self.rules(&kept.spec), kept.hosted, kept.seen),
            meter: Meter::new(self.config.limit_window_ms),
            stat: None,
            version: String::new(),
            version_of: None,
            version_asked: None,
            kept,
        }
    }

    fn rules(&self, spec: &Spec) -> Rules {
        let policy = Policy::of(spec);
        Rules {
            respawn: policy.auto_type == AUTO_RESIDENT && !spec.start_cmd.is_empty(),
            retries: policy.start_retries,
            interval_ms: u64::from(policy.start_interval) * 1000,
            settled_ms: self.config.settled_ms.max(2000 * u64::from(policy.start_check_secs)),
        }
    }

    /// Copies of all registrations, for the disk.
    fn registrations(&self) -> Vec<(Arc<Key>, Registration)> {
        let entries = self.entries.lock();
        entries
            .iter()
            .map(|(key, entry)| (Arc::clone(key), entry.kept.clone()))
            .collect()
    }

    /// The process is this caller's alone until the result is dropped. Whoever asks first gets it first.
    async fn turn(&self, key: &Key) -> Result<Held, Leaving> {
        let turn = self.turn_of(key);
        tokio::select! {
            held = turn.lock_owned() => Ok(held),
            () = self.life.draining() => Err(Leaving),
        }
    }

    fn turn_of(&self, key: &Key) -> Turn {
        let mut turns = self.turns.lock();
        if turns.len() > 2 * self.config.max_processes {
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        }
        match turns.get(key) {
            Some(turn) => Arc::clone(turn),
            None => Arc::clone(turns.entry(Arc::new(key.clone())).or_default()),
        }
    }

    /// As [`Shared::turn`], if nobody has it.
    fn try_turn(&self, key: &Key) -> Option<Held> {
        self.turn_of(key).try_lock_owned().ok()
    }

    /// Looks for a process, off the runtime.
    async fn find(
        self: &Arc<Self>,
        spec: &Arc<Spec>,
        last: Option<Ident>,
        since: Option<u64>,
        by_name: bool,
    ) -> Option<(Stat, Ident)> {
        // A semaphore that nobody closes.
        let _place = self.finds.acquire().await.ok()?;
        let (shared, spec) = (Arc::clone(self), Arc::clone(spec));
        let task = tokio::task::spawn_blocking(move || {
            let claim = || shared.claimed();
            let look = Look::new(&shared.boot, shared.units, &shared.names, &claim);
            let stat = look.find(&spec, last.as_ref(), since, by_name)?;
            let ident = look.ident(&stat);
            Some((stat, ident))
        });
        task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "a process could not be looked for");
            None
        })
    }

    /// Processes that are known to be of a registration.
    fn claimed(&self) -> Vec<Claimed> {
        let entries = self.entries.lock();
        let known = entries
            .values()
            .filter_map(|entry| Some((entry.kept.ident.as_ref()?, &entry.kept.spec)));
        let claim = |(ident, spec): (&Ident, &Arc<Spec>)| Claimed {
            pid: ident.pid,
            started: ident.started,
            spec: Arc::clone(spec),
        };
        known.map(claim).collect()
    }

    /// What there is to say about a process.
    fn process(&self, key: &Key, entry: &Entry) -> Process {
        let kept = &entry.kept;
        let usage = entry.meter.usage(self.units);
        let label = |(key, value): (&String, &String)| Label {
            key: key.clone(),
            value: value.clone(),
        };
        Process {
            key: Some(key.to_wire()),
            labels: kept.labels.iter().map(label).collect(),
            known: true,
            hosted: kept.hosted,
            pid: entry.stat.as_ref().map_or(-1, |stat| stat.pid),
            version: entry.version.clone(),
            register_time: kept.register_time,
            last_start_time: kept.last_start_time,
            report_time: unix_ms() / 1000,
            cpu_usage: if entry.stat.is_some() { usage.cpu } else { 0.0 },
            mem_usage: if entry.stat.is_some() { usage.mem } else { 0.0 },
            revision: kept.revision,
            spec_digest: entry.digest,
            proc_name: kept.spec.proc_name.clone(),
            setup_path: kept.spec.setup_path.clone(),
            trouble: kept.trouble.clone(),
        }
    }

    /// Changes what is known of a process under the lock, and sees to it that the change is told and gets to disk. Nothing when it is not
    /// known.
    fn change<T>(&self, key: &Key, change: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let mut entries = self.entries.lock();
        let entry = entries.get_mut(key)?;
        let result = change(entry);
        entry.kept.serial += 1;
        entry.kept.seen = entry.machine.seen();
        entry.kept.hosted = entry.machine.hosted();
        let name = entries.get_key_value(key).map(|(name, _)| Arc::clone(name));
        drop(entries);
        if let Some(name) = name {
            self.reporter.changed(&name);
        }
        self.keeper.ask();
        self.look.notify_one();
        Some(result)
    }

    /// Notes which process it is now, or that none runs.
    fn seen_as(&self, entry: &mut Entry, found: Option<(Stat, Ident)>) {
        match found {
            Some((stat, ident)) => {
                entry.meter.push(self.now(), &stat);
                entry.stat = Some(stat);
                entry.kept.ident = Some(ident);
            }
            None => {
                entry.meter.clear();
                entry.stat = None;
                entry.kept.ident = None;
            }
        }
    }

    fn tell(&self, name: &'static str, key: &Key, content: &str) {
        self.metrics.events.get_or_create(&Kind { kind: name }).inc();
        self.source.send(&self.intake, name, key, content, unix_ms());
    }
}
