//! Figures of gse_btsvr for Prometheus.

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

/// All figures.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// Tasks taken up.
    pub tasks_started: Counter,
    /// Tasks of instances that were gone.
    pub tasks_taken_over: Counter,
    /// Tasks with every row over and stored.
    pub tasks_finished: Counter,
    /// Tasks under way.
    pub tasks_running: Gauge,
    /// Rows stored as over.
    pub rows_stored: Counter,
    /// Orders given to agents.
    pub orders: Counter,
    /// Orders that were not answered.
    pub orders_unanswered: Counter,
    /// Links of agents.
    pub links: Gauge,
    links_refused: Family<Kind, Counter>,
    paths: Family<Kind, Counter>,
    /// Swarms.
    pub swarms: Gauge,
    /// Bytes that the cache has set aside.
    pub cache_bytes: Gauge,
    /// Entries of the cache.
    pub cache_entries: Gauge,
    /// Swarms that this instance takes part in itself.
    pub copies: Gauge,
    copies_begun: Family<Kind, Counter>,
    /// Content that this instance has carried into its zone, in bytes.
    pub border_bytes: Counter,
    /// Other instances that this one offers itself to as a relay.
    pub uplinks: Gauge,
    /// Submits refused because their application has as much as it may, by quota.
    pub quota_refused: gse_core::quota::Refused,
}

impl Metrics {
    /// Makes and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let sub = registry.sub_registry_with_prefix("gse_btsvr");
        sub.register("tasks_started", "File tasks taken up", metrics.tasks_started.clone());
        sub.register(
            "tasks_taken_over",
            "File tasks of other instances that are gone on with here",
            metrics.tasks_taken_over.clone(),
        );
        sub.register("tasks_finished", "File tasks finished", metrics.tasks_finished.clone());
        sub.register("tasks_running", "File tasks under way", metrics.tasks_running.clone());
        sub.register("rows_stored", "Rows stored as over", metrics.rows_stored.clone());
        sub.register("orders", "Orders given to agents", metrics.orders.clone());
        sub.register(
            "orders_unanswered",
            "Orders that an agent did not answer",
            metrics.orders_unanswered.clone(),
        );
        sub.register("links", "Agents that hold a link", metrics.links.clone());
        sub.register(
            "links_refused",
            "Connections that did not become links, by reason",
            metrics.links_refused.clone(),
        );
        sub.register(
            "paths",
            "Uploads and pushes by the way their content went: inline, swarm, push_swarm",
            metrics.paths.clone(),
        );
        sub.register("swarms", "Swarms under way", metrics.swarms.clone());
        sub.register(
            "cache_bytes",
            "Bytes that the cache has set aside",
            metrics.cache_bytes.clone(),
        );
        sub.register(
            "border_bytes",
            "Content that this instance has carried into its zone, in bytes",
            metrics.border_bytes.clone(),
        );
        sub.register(
            "uplinks",
            "Other instances that this one offers itself to as a relay",
            metrics.uplinks.clone(),
        );
        sub.register("cache_entries", "Entries of the cache", metrics.cache_entries.clone());
        sub.register(
            "copies",
            "Swarms that this instance takes part in itself",
            metrics.copies.clone(),
        );
        sub.register(
            "copies_begun",
            "Parts taken in swarms, by what was there: push, cached, fetched, refused",
            metrics.copies_begun.clone(),
        );
        sub.register(
            "quota_refused",
            "Submits refused because their application has as much as it may, by quota",
            metrics.quota_refused.clone(),
        );
        metrics
    }

    /// This instance takes part in a swarm, or can't.
    pub fn copy(&self, kind: &'static str) {
        self.copies_begun.get_or_create(&Kind { kind }).inc();
    }

    /// A connection did not become a link.
    pub fn link_refused(&self, kind: &'static str) {
        self.links_refused.get_or_create(&Kind { kind }).inc();
    }

    /// The way of an upload was chosen.
    pub fn path(&self, kind: &'static str) {
        self.paths.get_or_create(&Kind { kind }).inc();
    }
}
