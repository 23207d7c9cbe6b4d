//! Figures of gse_data for Prometheus. Those by data id are in [`crate::stats`].

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Why, or which way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    kind: &'static str,
}

/// A sink, by the number of its stream or its kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SinkName {
    /// As in the log.
    pub sink: String,
}

/// A sink, and why.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SinkReason {
    sink: String,
    reason: &'static str,
}

/// All figures. Cheap to clone; every clone is the same.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// Links of senders.
    pub links: Gauge,
    links_refused: Family<Kind, Counter>,
    /// Batches taken in.
    pub batches: Counter,
    /// Records in them.
    pub records: Counter,
    /// Bytes of their payloads.
    pub bytes: Counter,
    /// Batches that came again after they were taken.
    pub repeated: Counter,
    /// Records whose data id nobody has routed.
    pub unrouted: Counter,
    /// Records that a sink has taken.
    pub delivered: Family<SinkName, Counter>,
    /// Records written to a sink's spool.
    pub spooled: Family<SinkName, Counter>,
    dropped: Family<SinkReason, Counter>,
    /// Attempts of a sink that failed.
    pub failures: Family<SinkName, Counter>,
    /// Records in a sink's spool.
    pub backlog: Family<SinkName, Gauge>,
    /// Links to other gse_data, of a proxy.
    pub upstream_links: Gauge,
    /// Chunks in memory for a sink.
    pub queued: Family<SinkName, Gauge>,
    /// Live tails.
    pub tails: Gauge,
    /// Records that a tail's reader was too slow for.
    pub tail_lost: Counter,
}

impl Metrics {
    /// Makes and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let m = Self::default();
        let sub = registry.sub_registry_with_prefix("gse_data");
        sub.register("links", "Links of agents and proxies", m.links.clone());
        sub.register(
            "links_refused",
            "Connections that did not become links, by reason",
            m.links_refused.clone(),
        );
        sub.register("batches", "Batches taken in", m.batches.clone());
        sub.register("records", "Records taken in", m.records.clone());
        sub.register("payload_bytes", "Bytes of records taken in", m.bytes.clone());
        sub.register(
            "batches_repeated",
            "Batches that came again after they were taken",
            m.repeated.clone(),
        );
        sub.register(
            "unrouted",
            "Records whose data id nobody has routed",
            m.unrouted.clone(),
        );
        sub.register("delivered", "Records that a sink has taken", m.delivered.clone());
        sub.register("spooled", "Records written to a sink's spool", m.spooled.clone());
        sub.register("dropped", "Records dropped, by sink and reason", m.dropped.clone());
        sub.register("sink_failures", "Failed attempts of a sink", m.failures.clone());
        sub.register("sink_backlog", "Records in a sink's spool", m.backlog.clone());
        sub.register(
            "upstream_links",
            "Open links of a proxy to other gse_data",
            m.upstream_links.clone(),
        );
        sub.register("sink_queued", "Chunks in memory for a sink", m.queued.clone());
        sub.register("tails", "Live tails of data ids", m.tails.clone());
        sub.register(
            "tail_lost",
            "Records that a live tail has not shown because its reader was too slow",
            m.tail_lost.clone(),
        );
        m
    }

    /// A connection did not become a link.
    pub fn link_refused(&self, kind: &'static str) {
        self.links_refused.get_or_create(&Kind { kind }).inc();
    }

    /// Records were dropped.
    pub fn dropped(&self, sink: &str, reason: &'static str, records: u64) {
        let sink = sink.to_owned();
        self.dropped.get_or_create(&SinkReason { sink, reason }).inc_by(records);
    }
}
