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

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct CommandLabels {
    class: Class,
    result: Outcome,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct GroupLabels {
    group: String,
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
    commands: Family<CommandLabels, Count>,
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
    copies: Family<GroupLabels, Gauge>,
    outage: Mutex<Option<String>>,
}

/// A handle on the store's metrics.
#[derive(Clone)]
pub(crate) struct Metrics(Arc<Inner>);

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let inner = Inner {
            commands: Family::default(),
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
            copies: Family::default(),
            outage: Mutex::new(None),
        };
        let r = registry.sub_registry_with_prefix("dba");
        r.register(
            "commands",
            "Commands by class, and whether the server passed them on or refused them",
            inner.commands.clone(),
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
        ] {
            r.register(name, help, counter.clone());
        }
        r.register(
            "group_copies",
            "Copies that follow the primary of a group",
            inner.copies.clone(),
        );
        Self(Arc::new(inner))
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
        let result = if refused { Outcome::Refused } else { Outcome::Passed };
        self.0
            .commands
            .get_or_create(&CommandLabels { class, result })
            .inc_by(n);
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
