//! What is counted about messages to and from plugins.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::metrics::Reason;

/// Counters of messages.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    delivered: Counter,
    failed: Counter,
    said: Counter,
    posted: Counter,
    retried: Counter,
    dropped: Family<Reason, Counter>,
}

impl Metrics {
    /// Registers them under the prefix `gse_task_messages`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("gse_task_messages");
        registry.register("delivered", "Messages that plugins have got", self.delivered.clone());
        registry.register("failed", "Messages that plugins have not got", self.failed.clone());
        registry.register("said", "Messages of plugins", self.said.clone());
        registry.register(
            "posted",
            "Messages of plugins that their platforms have taken",
            self.posted.clone(),
        );
        registry.register("retried", "Call-backs tried again", self.retried.clone());
        registry.register(
            "dropped",
            "Messages of plugins that were lost, by reason",
            self.dropped.clone(),
        );
    }

    pub(super) fn sent(&self, delivered: usize, failed: usize) {
        self.delivered.inc_by(delivered as u64);
        self.failed.inc_by(failed as u64);
    }

    pub(super) fn said(&self) {
        self.said.inc();
    }

    pub(super) fn posted(&self) {
        self.posted.inc();
    }

    pub(super) fn retried(&self) {
        self.retried.inc();
    }

    pub(super) fn dropped(&self, reason: &'static str) {
        self.dropped.get_or_create(&Reason::new(reason)).inc();
    }
}
