//! Figures of gse_procmgr for Prometheus.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// All figures.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// Tasks taken up.
    pub tasks_started: Counter,
    /// Tasks with every row over and stored.
    pub tasks_finished: Counter,
    /// Tasks of other instances taken over.
    pub tasks_taken_over: Counter,
    /// Tasks under way.
    pub tasks_running: Gauge,
    /// Rows stored as over.
    pub rows_stored: Counter,
    /// Calls to agents.
    pub calls: Counter,
    /// Calls that were not answered.
    pub unanswered: Counter,
    /// Agents whose registrations were compared.
    pub compared: Counter,
    /// Registrations put back on hosts.
    pub put_back: Counter,
    /// Registrations of hosts that the store did not have.
    pub taken_up: Counter,
    /// Submits refused because their application has as much as it may, by quota.
    pub quota_refused: gse_core::quota::Refused,
}

impl Metrics {
    /// Makes and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let sub = registry.sub_registry_with_prefix("gse_procmgr");
        for (name, help, counter) in [
            ("tasks_started", "Process tasks taken up", &metrics.tasks_started),
            ("tasks_finished", "Process tasks finished", &metrics.tasks_finished),
            (
                "tasks_taken_over",
                "Process tasks of other instances taken over",
                &metrics.tasks_taken_over,
            ),
            ("rows_stored", "Rows stored as over", &metrics.rows_stored),
            ("calls", "Calls to agents", &metrics.calls),
            (
                "calls_unanswered",
                "Calls that an agent did not answer",
                &metrics.unanswered,
            ),
            (
                "agents_compared",
                "Agents whose registrations were compared with the store's",
                &metrics.compared,
            ),
            (
                "registrations_put_back",
                "Registrations that hosts had lost, or had older ones of",
                &metrics.put_back,
            ),
            (
                "registrations_taken_up",
                "Registrations of hosts that the store did not have, or had older ones of",
                &metrics.taken_up,
            ),
        ] {
            sub.register(name, help, counter.clone());
        }
        sub.register(
            "tasks_running",
            "Process tasks under way",
            metrics.tasks_running.clone(),
        );
        sub.register(
            "quota_refused",
            "Submits refused because their application has as much as it may, by quota",
            metrics.quota_refused.clone(),
        );
        metrics
    }
}
