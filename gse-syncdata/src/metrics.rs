//! Figures of gse_syncdata for Prometheus.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::ledger::Counts;

/// What, or why.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    kind: &'static str,
}

/// A call, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Call {
    call: &'static str,
    outcome: &'static str,
}

/// All figures.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// 1 on the active instance.
    pub active: Gauge,
    hosts: Gauge,
    waiting: Gauge,
    failed: Gauge,
    open: Gauge,
    pushes: Family<Kind, Counter>,
    calls: Family<Call, Counter>,
    /// Events that CMDB has told of.
    pub events: Counter,
    passes: Family<Kind, Counter>,
    /// Cursors that CMDB did not know any more.
    pub cursors_lost: Counter,
    skipped: Family<Kind, Counter>,
    /// When the last full pass ended, unix seconds.
    pub full_pass: Gauge,
}

impl Metrics {
    /// Makes and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let sub = registry.sub_registry_with_prefix("gse_syncdata");
        sub.register("active", "1 on the active instance", metrics.active.clone());
        sub.register("hosts", "Hosts that the source knows", metrics.hosts.clone());
        sub.register(
            "hosts_waiting",
            "Hosts whose agent is not connected and whose file is not the newest",
            metrics.waiting.clone(),
        );
        sub.register(
            "hosts_failed",
            "Hosts on which the file could not be written last time",
            metrics.failed.clone(),
        );
        sub.register(
            "hosts_open",
            "Hosts that are being pushed to or are due",
            metrics.open.clone(),
        );
        sub.register(
            "pushes",
            "Tries by their end: placed, failed, away, unsure",
            metrics.pushes.clone(),
        );
        sub.register("cmdb_calls", "Calls of CMDB by their outcome", metrics.calls.clone());
        sub.register("events", "Events that CMDB has told of", metrics.events.clone());
        sub.register(
            "full_passes",
            "Full passes over all hosts, by their end: whole, failed",
            metrics.passes.clone(),
        );
        sub.register(
            "cursors_lost",
            "Cursors of the watch that CMDB did not know any more",
            metrics.cursors_lost.clone(),
        );
        sub.register(
            "skipped",
            "Identities that were left out: malformed, no_agent, too_large, too_many",
            metrics.skipped.clone(),
        );
        sub.register(
            "full_pass_ended",
            "When the last full pass ended, unix seconds",
            metrics.full_pass.clone(),
        );
        metrics
    }

    /// How many hosts are how far.
    pub fn counts(&self, counts: Counts) {
        for (gauge, count) in [
            (&self.hosts, counts.hosts),
            (&self.waiting, counts.waiting),
            (&self.failed, counts.failed),
            (&self.open, counts.open),
        ] {
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// A try has ended.
    pub fn push(&self, kind: &'static str) {
        self.pushes.get_or_create(&Kind { kind }).inc();
    }

    /// A call of CMDB has ended.
    pub fn call(&self, call: &'static str, outcome: &'static str) {
        self.calls.get_or_create(&Call { call, outcome }).inc();
    }

    /// A full pass has ended.
    pub fn pass(&self, kind: &'static str) {
        self.passes.get_or_create(&Kind { kind }).inc();
    }

    /// An identity was left out.
    pub fn skipped(&self, kind: &'static str) {
        self.skipped.get_or_create(&Kind { kind }).inc();
    }
}
