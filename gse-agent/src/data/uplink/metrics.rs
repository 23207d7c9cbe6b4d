//! Figures of the uplink. The counters of records are read from the flow in one go, so that each scrape adds up.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;

use crate::data::counts::Reason;
use crate::data::intake::Intake;

/// What is counted about the uplink.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    pub(super) links: Gauge,
    pub(super) link_failures: Counter,
    pub(super) sent: Counter,
    pub(super) sent_bytes: Counter,
    pub(super) spooled: Counter,
    pub(super) spool_failures: Counter,
}

impl Metrics {
    /// Registers them, and the counters of `intake`, under the prefix `gse_agent_data`.
    pub fn register(&self, intake: &Intake, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("gse_agent_data");
        registry.register("links", "Open links to gse_data", self.links.clone());
        registry.register(
            "link_failures",
            "Links that failed or did not come about",
            self.link_failures.clone(),
        );
        registry.register("sent_batches", "Batches sent, again included", self.sent.clone());
        registry.register(
            "sent_bytes",
            "Bytes of batches sent, after compression",
            self.sent_bytes.clone(),
        );
        registry.register("spooled_batches", "Batches written to the spool", self.spooled.clone());
        registry.register(
            "spool_failures",
            "Writes to the spool that failed",
            self.spool_failures.clone(),
        );
        registry.register_collector(Box::new(Figures(intake.clone())));
    }
}

#[derive(Debug)]
struct Figures(Intake);

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let snapshot = self.0.snapshot();
        let counts = snapshot.counts;
        for (name, help, value) in [
            ("records", "Records handed over, refused ones included", counts.taken),
            ("record_bytes", "Bytes of their payloads", counts.taken_bytes),
            (
                "acknowledged",
                "Records that a server has acknowledged",
                counts.acknowledged,
            ),
        ] {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        for (name, help, value) in [
            ("in_memory", "Records in memory", snapshot.in_memory),
            ("on_disk", "Records in the spool", snapshot.on_disk),
            ("memory_bytes", "Bytes of records in memory", snapshot.memory_bytes),
        ] {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let kind = ConstCounter::new(0u64).metric_type();
        let mut family = encoder.encode_descriptor("dropped", "Records dropped, by reason", None, kind)?;
        for reason in Reason::ALL {
            let counter = ConstCounter::new(counts.dropped(reason));
            counter.encode(family.encode_family(&[("reason", reason.name())])?)?;
        }
        Ok(())
    }
}
