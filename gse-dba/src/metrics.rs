//! What the store tells about itself: counters for Prometheus and the same numbers for INFO.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::commands::Class;
use crate::durable::log::Journal;
use crate::engine::db::Db;
use crate::sharded::control::Lag;
use crate::timing::Timing;
use crate::watch::CLASSES;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct CommandLabels {
    class: Class,
    result: Outcome,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct GroupLabels {
    group: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ClassLabels {
    class: Class,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CopyLabels {
    group: String,
    copy: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Outcome {
    Passed,
    Refused,
}

impl EncodeLabelValue for Class {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        let name = match self {
            Class::Read => "read",
            Class::Write => "write",
            Class::Transaction => "transaction",
            Class::Connection => "connection",
            Class::Unknown => "unknown",
        };
        EncodeLabelValue::encode(&name, encoder)
    }
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        let name = match self {
            Outcome::Passed => "passed",
            Outcome::Refused => "refused",
        };
        EncodeLabelValue::encode(&name, encoder)
    }
}

type Count = Counter<u64, AtomicU64>;

struct Inner {
    /// By class, then passed and refused: the members of one family, so that none has to be looked up for a command.
    commands: [[Count; 2]; 5],
    commands_total: Count,
    clients: Gauge,
    clients_total: Count,
    clients_refused: Count,
    bytes_in: Count,
    bytes_out: Count,
    log_bytes: Count,
    log_records: Count,
    fsync: Histogram,
    compactions: Count,
    disk: Gauge,
    memory: Gauge,
    keys: Gauge,
    volatile: Gauge,
    expired: Count,
    refused_writes: Count,
    reconnects: Count,
    upstream_up: Gauge,
    noreplicas: Count,
    uncertain: Count,
    redirected: Count,
    crossslot: Count,
    switches: Count,
    slow_subscribers: Count,
    blocked: Gauge,
    copies: Family<GroupLabels, Gauge>,
    /// By class, in the order of `Class`.
    requests: [Timing; 5],
    requests_by: Family<ClassLabels, Timing>,
    inflight: Gauge,
    backends: Family<GroupLabels, Timing>,
    lag: Family<CopyLabels, Gauge>,
    behind: Family<CopyLabels, Gauge>,
    evictions: Family<ReasonLabels, Count>,
    slow: Count,
    epoch: Gauge,
    moving: Gauge,
    moved_keys: Count,
    moved_bytes: Count,
    outage: Mutex<Option<String>>,
}

impl Inner {
    fn register_times(&self, r: &mut Registry) {
        r.register_with_unit(
            "request",
            "Time from the arrival of commands to their last reply, by class; commands of one batch share it",
            Unit::Seconds,
            self.requests_by.clone(),
        );
        r.register_with_unit(
            "backend",
            "Time from a batch's writing to a group to its last reply, waiting for copies included",
            Unit::Seconds,
            self.backends.clone(),
        );
        r.register("inflight", "Commands that are being served now", self.inflight.clone());
    }

    fn register_operations(&self, r: &mut Registry) {
        r.register_with_unit(
            "copy_lag",
            "Seconds since a copy was last heard of by its primary",
            Unit::Seconds,
            self.lag.clone(),
        );
        r.register_with_unit(
            "copy_behind",
            "Bytes of writes that a copy has not confirmed yet",
            Unit::Bytes,
            self.behind.clone(),
        );
        r.register(
            "client_evictions",
            "Clients disconnected by the server, by reason",
            self.evictions.clone(),
        );
        r.register(
            "slow_batches",
            "Batches that were slow enough for the slow log",
            self.slow.clone(),
        );
        r.register("epoch", "Epoch of the topology that is served", self.epoch.clone());
        r.register(
            "move_slots_left",
            "Slots that are still to be moved",
            self.moving.clone(),
        );
        r.register(
            "moved_keys",
            "Keys copied by moves and migrations",
            self.moved_keys.clone(),
        );
        r.register_with_unit(
            "moved",
            "Bytes copied by moves and migrations",
            Unit::Bytes,
            self.moved_bytes.clone(),
        );
    }
}

/// A handle on the store's metrics.
#[derive(Clone)]
pub(crate) struct Metrics(Arc<Inner>);

/// A client in a blocking command.
pub(crate) struct Blocked(Metrics);

impl Drop for Blocked {
    fn drop(&mut self) {
        self.0.0.blocked.dec();
    }
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let requests_by = Family::<ClassLabels, Timing>::default();
        let commands = Family::<CommandLabels, Count>::default();
        let of = |class, result| commands.get_or_create_owned(&CommandLabels { class, result });
        let inner = Inner {
            requests: CLASSES.map(|class| requests_by.get_or_create_owned(&ClassLabels { class })),
            requests_by,
            commands: CLASSES.map(|c| [of(c, Outcome::Passed), of(c, Outcome::Refused)]),
            commands_total: Counter::default(),
            clients: Gauge::default(),
            clients_total: Counter::default(),
            clients_refused: Counter::default(),
            bytes_in: Counter::default(),
            bytes_out: Counter::default(),
            log_bytes: Counter::default(),
            log_records: Counter::default(),
            fsync: Histogram::new([0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]),
            compactions: Counter::default(),
            disk: Gauge::default(),
            memory: Gauge::default(),
            keys: Gauge::default(),
            volatile: Gauge::default(),
            expired: Counter::default(),
            refused_writes: Counter::default(),
            reconnects: Counter::default(),
            upstream_up: Gauge::default(),
            noreplicas: Counter::default(),
            uncertain: Counter::default(),
            redirected: Counter::default(),
            crossslot: Counter::default(),
            switches: Counter::default(),
            slow_subscribers: Counter::default(),
            blocked: Gauge::default(),
            copies: Family::default(),
            inflight: Gauge::default(),
            backends: Family::default(),
            lag: Family::default(),
            behind: Family::default(),
            evictions: Family::default(),
            slow: Counter::default(),
            epoch: Gauge::default(),
            moving: Gauge::default(),
            moved_keys: Counter::default(),
            moved_bytes: Counter::default(),
            outage: Mutex::new(None),
        };
        let r = registry.sub_registry_with_prefix("dba");
        r.register(
            "commands",
            "Commands by class, and whether the server passed them on or refused them",
            commands,
        );
        r.register("clients", "Connections open now", inner.clients.clone());
        r.register("clients_accepted", "Connections accepted", inner.clients_total.clone());
        r.register(
            "clients_refused",
            "Connections refused because there were too many",
            inner.clients_refused.clone(),
        );
        r.register_with_unit(
            "received",
            "Bytes received from clients",
            Unit::Bytes,
            inner.bytes_in.clone(),
        );
        r.register_with_unit("sent", "Bytes sent to clients", Unit::Bytes, inner.bytes_out.clone());
        r.register_with_unit("log", "Bytes written to the log", Unit::Bytes, inner.log_bytes.clone());
        r.register("log_records", "Records written to the log", inner.log_records.clone());
        r.register_with_unit(
            "log_fsync",
            "Time of one sync of the log",
            Unit::Seconds,
            inner.fsync.clone(),
        );
        r.register(
            "compactions",
            "Snapshots that replaced the log",
            inner.compactions.clone(),
        );
        r.register_with_unit(
            "disk",
            "Bytes of snapshot and logs on the disk",
            Unit::Bytes,
            inner.disk.clone(),
        );
        r.register_with_unit(
            "memory",
            "Bytes the data is reckoned to take in memory",
            Unit::Bytes,
            inner.memory.clone(),
        );
        r.register("keys", "Keys held", inner.keys.clone());
        r.register("volatile_keys", "Keys that have an expiry", inner.volatile.clone());
        r.register("expired_keys", "Keys that expired", inner.expired.clone());
        r.register(
            "refused_writes",
            "Writes refused because memory or disk was full",
            inner.refused_writes.clone(),
        );
        r.register(
            "upstream_reconnects",
            "Connections made again to the Redis behind",
            inner.reconnects.clone(),
        );
        r.register(
            "upstream_connections",
            "Shared connections to the Redis behind that are up",
            inner.upstream_up.clone(),
        );
        for (name, help, counter) in [
            (
                "noreplicas",
                "Commands refused because too few copies were reachable",
                &inner.noreplicas,
            ),
            (
                "uncertain",
                "Commands that may or may not have taken effect",
                &inner.uncertain,
            ),
            (
                "redirected",
                "Commands that a node of the cluster has sent elsewhere or put off",
                &inner.redirected,
            ),
            (
                "crossslot",
                "Commands refused because their keys are in several slots",
                &inner.crossslot,
            ),
            (
                "primary_switches",
                "Times that a group's primary was lost or became another",
                &inner.switches,
            ),
            (
                "subscribers_dropped",
                "Subscribers disconnected because they did not take their messages",
                &inner.slow_subscribers,
            ),
        ] {
            r.register(name, help, counter.clone());
        }
        r.register(
            "blocked_clients",
            "Clients that wait in a blocking command",
            inner.blocked.clone(),
        );
        r.register(
            "group_copies",
            "Copies that follow the primary of a group",
            inner.copies.clone(),
        );
        inner.register_times(r);
        inner.register_operations(r);
        Self(Arc::new(inner))
    }

    /// Takes in that a batch of commands has come, or (negative) has been answered.
    pub(crate) fn inflight(&self, n: i64) {
        self.0.inflight.inc_by(n);
    }

    /// Takes in how long commands of a class took.
    pub(crate) fn took(&self, class: Class, took: Duration, n: u64) {
        if let Some(timing) = self.0.requests.get(class as usize) {
            timing.observe(took, n);
        }
    }

    /// The times of batches to a group; kept by who measures them.
    pub(crate) fn backend(&self, group: &str) -> Timing {
        let labels = GroupLabels {
            group: group.to_owned(),
        };
        self.0.backends.get_or_create(&labels).clone()
    }

    /// Takes in how far a group's copies are behind its primary: seconds since each was heard of, and bytes. Copies that are not named are gone.
    pub(crate) fn copies_behind<'a>(&self, group: &str, now: &[Lag], gone: impl Iterator<Item = &'a str>) {
        let labels = |copy: &str| CopyLabels {
            group: group.to_owned(),
            copy: copy.to_owned(),
        };
        for copy in gone {
            self.0.lag.remove(&labels(copy));
            self.0.behind.remove(&labels(copy));
        }
        for lag in now {
            let capped = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
            let labels = labels(&lag.address);
            self.0.lag.get_or_create(&labels).set(capped(lag.seconds));
            self.0.behind.get_or_create(&labels).set(capped(lag.bytes));
        }
    }

    /// A client was disconnected by us.
    pub(crate) fn evicted(&self, reason: &'static str) {
        self.0.evictions.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// A batch was slow enough for the slow log.
    pub(crate) fn slow(&self) {
        self.0.slow.inc();
    }

    /// The epoch of the topology that is served.
    pub(crate) fn epoch(&self, epoch: u64) {
        self.0.epoch.set(i64::try_from(epoch).unwrap_or(i64::MAX));
    }

    /// How many slots are still to be moved; 0 when none is moving.
    pub(crate) fn moving(&self, slots: usize) {
        self.0.moving.set(slots as i64);
    }

    /// Keys and bytes that a move or a migration has copied.
    pub(crate) fn moved(&self, keys: u64, bytes: u64) {
        self.0.moved_keys.inc_by(keys);
        self.0.moved_bytes.inc_by(bytes);
    }

    /// What went wrong since the start: commands refused for want of copies, uncertain ones, crossed slots, switches of primaries.
    pub(crate) fn troubles(&self) -> [u64; 4] {
        let i = &self.0;
        [
            i.noreplicas.get(),
            i.uncertain.get(),
            i.crossslot.get(),
            i.switches.get(),
        ]
    }

    /// Connections refused since the start.
    pub(crate) fn refused_clients(&self) -> u64 {
        self.0.clients_refused.get()
    }

    pub(crate) fn noreplicas(&self) {
        self.0.noreplicas.inc();
    }

    pub(crate) fn uncertain(&self) {
        self.0.uncertain.inc();
    }

    pub(crate) fn redirected(&self) {
        self.0.redirected.inc();
    }

    pub(crate) fn crossslot(&self) {
        self.0.crossslot.inc();
    }

    pub(crate) fn subscriber_dropped(&self) {
        self.0.slow_subscribers.inc();
    }

    /// A client waits in a blocking command for as long as what is returned lives.
    pub(crate) fn blocked(&self) -> Blocked {
        self.0.blocked.inc();
        Blocked(self.clone())
    }

    pub(crate) fn blocked_clients(&self) -> i64 {
        self.0.blocked.get()
    }

    pub(crate) fn switched(&self) {
        self.0.switches.inc();
    }

    pub(crate) fn group_copies(&self, group: &str, copies: usize) {
        let labels = GroupLabels {
            group: group.to_owned(),
        };
        self.0.copies.get_or_create(&labels).set(copies as i64);
    }

    pub(crate) fn commands(&self, class: Class, refused: bool, n: u64) {
        let [passed, denied] = &self.0.commands[class as usize];
        if refused { denied } else { passed }.inc_by(n);
        self.0.commands_total.inc_by(n);
    }

    pub(crate) fn client_opened(&self) {
        self.0.clients.inc();
        self.0.clients_total.inc();
    }

    pub(crate) fn client_closed(&self) {
        self.0.clients.dec();
    }

    pub(crate) fn client_refused(&self) {
        self.0.clients_refused.inc();
    }

    pub(crate) fn received(&self, bytes: usize) {
        self.0.bytes_in.inc_by(bytes as u64);
    }

    pub(crate) fn sent(&self, bytes: usize) {
        self.0.bytes_out.inc_by(bytes as u64);
    }

    pub(crate) fn logged(&self, bytes: u64) {
        self.0.log_bytes.inc_by(bytes);
        self.0.log_records.inc();
    }

    pub(crate) fn fsync(&self, took: Duration) {
        self.0.fsync.observe(took.as_secs_f64());
    }

    pub(crate) fn compacted(&self) {
        self.0.compactions.inc();
    }

    pub(crate) fn refused_write(&self) {
        self.0.refused_writes.inc();
    }

    pub(crate) fn reconnected(&self) {
        self.0.reconnects.inc();
    }

    pub(crate) fn upstream(&self, up: bool) {
        if up {
            self.0.upstream_up.inc()
        } else {
            self.0.upstream_up.dec()
        };
    }

    pub(crate) fn outage(&self, reason: Option<&str>) {
        *self.0.outage.lock() = reason.map(str::to_owned);
    }

    /// Why writes are refused now, if they are.
    pub(crate) fn outage_reason(&self) -> Option<String> {
        self.0.outage.lock().clone()
    }

    pub(crate) fn loaded(&self, db: &Db) {
        self.0.keys.set(db.map.len() as i64);
        self.0.memory.set(db.memory as i64);
        self.0.volatile.set(db.expires.len() as i64);
    }

    pub(crate) fn state(&self, db: &Db, journal: &Journal) {
        self.loaded(db);
        self.0.disk.set(journal.total() as i64);
        self.0.expired.inc_by(db.expired.saturating_sub(self.0.expired.get()));
    }

    pub(crate) fn upstream_connections(&self) -> i64 {
        self.0.upstream_up.get()
    }

    /// Numbers for INFO: clients, memory, keys, keys with expiry, expired keys, commands, connections.
    pub(crate) fn info(&self) -> [u64; 7] {
        let i = &self.0;
        let g = |g: &Gauge| g.get().max(0) as u64;
        [
            g(&i.clients),
            g(&i.memory),
            g(&i.keys),
            g(&i.volatile),
            i.expired.get(),
            i.commands_total.get(),
            i.clients_total.get(),
        ]
    }
}
