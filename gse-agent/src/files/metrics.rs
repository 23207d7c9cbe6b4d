//! Figures of file transfers.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: i32,
}

/// What is counted about file transfers.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    pub(super) taken: Counter,
    ended: Family<Code, Counter>,
    pub(super) bytes_in: Counter,
    pub(super) links: Gauge,
    pub(super) peers: gse_bt::Metrics,
}

impl Metrics {
    /// Registers them under the prefix `gse_agent_files`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("gse_agent_files");
        registry.register("orders_taken", "Orders taken", self.taken.clone());
        registry.register("orders_ended", "Orders that ended, by code", self.ended.clone());
        registry.register("written_bytes", "Bytes put in their place", self.bytes_in.clone());
        registry.register("links", "Open links to gse_btsvr", self.links.clone());
        self.peers.register(registry);
    }

    pub(super) fn ended(&self, code: i32) {
        self.ended.get_or_create(&Code { code }).inc();
    }
}
