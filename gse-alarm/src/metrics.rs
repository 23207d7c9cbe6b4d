//! Figures of gse_alarm for Prometheus.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Why.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Why {
    /// One word.
    pub why: &'static str,
}

/// All figures. Cheap to clone; every clone is the same.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// 1 while this instance is the active one.
    pub active: Gauge,
    /// Hosts that are overdue now, those that are held back included.
    pub overdue: Gauge,
    /// Hosts that are held back now, by reason.
    pub held: Family<Why, Gauge>,
    /// Hosts that were held back, by reason.
    pub held_total: Family<Why, Counter>,
    /// Alarms sent: one for each host each time.
    pub sent: Counter,
    /// Records they were in.
    pub records: Counter,
    /// Calls to gse_data that failed.
    pub failures: Counter,
    /// Hosts that came back after an alarm.
    pub returned: Counter,
    /// Hosts given up, because they were not heard for so long.
    pub given_up: Counter,
    /// Looks at all agents.
    pub looks: Counter,
    /// Looks that failed, because the store did not answer.
    pub looks_failed: Counter,
    /// How long the last look took.
    pub look_seconds: Gauge<f64, AtomicU64>,
    /// Nodes of gse_task that are there.
    pub nodes: Gauge,
    /// By how much their clocks differ.
    pub clock_spread_ms: Gauge,
}

impl Metrics {
    /// Makes and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let m = Self::default();
        let sub = registry.sub_registry_with_prefix("gse_alarm");
        sub.register(
            "active",
            "1 while this instance is the active one of its site",
            m.active.clone(),
        );
        sub.register("overdue", "Hosts that are overdue now", m.overdue.clone());
        sub.register("held", "Hosts held back now, by reason", m.held.clone());
        sub.register(
            "held_back",
            "Hosts that were held back, by reason",
            m.held_total.clone(),
        );
        sub.register(
            "alarms_sent",
            "Alarms sent, one for each host each time",
            m.sent.clone(),
        );
        sub.register("records_sent", "Records with alarms", m.records.clone());
        sub.register("send_failures", "Calls to gse_data that failed", m.failures.clone());
        sub.register("returned", "Hosts that came back after an alarm", m.returned.clone());
        sub.register(
            "given_up",
            "Hosts about which alarms ended because they were away for too long",
            m.given_up.clone(),
        );
        sub.register("looks", "Looks at all agents", m.looks.clone());
        sub.register(
            "looks_failed",
            "Looks that failed because the store did not answer",
            m.looks_failed.clone(),
        );
        sub.register("look_seconds", "How long the last look took", m.look_seconds.clone());
        sub.register("task_nodes", "Nodes of gse_task that are there", m.nodes.clone());
        sub.register(
            "clock_spread_milliseconds",
            "By how much the clocks of the nodes of gse_task differ",
            m.clock_spread_ms.clone(),
        );
        m
    }
}
