//! The store client's figures.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::StoreError;

/// What is counted about batches. Cheap to clone; every clone is the same.
#[derive(Debug, Clone)]
pub struct StoreMetrics {
    batches: Counter,
    commands: Counter,
    seconds: Histogram,
    errors: Family<ErrorLabels, Counter>,
    inflight: Gauge,
    up: Gauge,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    kind: String,
}

impl Default for StoreMetrics {
    fn default() -> Self {
        Self {
            batches: Counter::default(),
            commands: Counter::default(),
            // 0.25 ms to 8 s.
            seconds: Histogram::new(exponential_buckets(0.000_25, 2.0, 16)),
            errors: Family::default(),
            inflight: Gauge::default(),
            up: Gauge::default(),
        }
    }
}

impl StoreMetrics {
    /// Makes the figures known to `registry`, which should give them a prefix of the service (`gse_task`).
    pub fn register(&self, registry: &mut Registry) {
        registry.register("store_batches", "Batches sent to the store", self.batches.clone());
        registry.register(
            "store_commands",
            "Commands in the batches sent to the store",
            self.commands.clone(),
        );
        registry.register(
            "store_batch_seconds",
            "Time from asking the store to its answer",
            self.seconds.clone(),
        );
        registry.register(
            "store_errors",
            "Batches without replies, by kind of error",
            self.errors.clone(),
        );
        registry.register(
            "store_inflight_batches",
            "Batches on their way now",
            self.inflight.clone(),
        );
        registry.register(
            "store_up",
            "Whether there is a connection to the store",
            self.up.clone(),
        );
    }

    pub(super) fn observe(&self, commands: usize, took: Duration, error: Option<&StoreError>) {
        self.batches.inc();
        self.commands.inc_by(commands as u64);
        self.seconds.observe(took.as_secs_f64());
        if let Some(error) = error {
            self.errors
                .get_or_create(&ErrorLabels {
                    kind: error.kind().to_owned(),
                })
                .inc();
        }
    }

    pub(super) fn enter(&self) -> Inflight {
        self.inflight.inc();
        Inflight(self.inflight.clone())
    }

    pub(super) fn set_up(&self, up: bool) {
        self.up.set(i64::from(up));
    }
}

/// Counts one batch as on its way for as long as this lives.
pub(super) struct Inflight(Gauge);

impl Drop for Inflight {
    fn drop(&mut self) {
        self.0.dec();
    }
}
