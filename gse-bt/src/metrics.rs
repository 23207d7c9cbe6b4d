//! What an engine counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Counters of one engine; register them where the process has its own.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// Peers that are connected.
    pub connections: Gauge,
    /// Swarms that run.
    pub swarms: Gauge,
    /// Bytes of content sent to peers.
    pub sent: Counter,
    /// Bytes of content received from peers.
    pub received: Counter,
    /// Connections refused: unknown swarm, no proof, too many.
    pub refused: Counter,
    /// Pieces that were not what the manifest says.
    pub bad_pieces: Counter,
    /// Peers banned for bad pieces.
    pub banned: Counter,
    /// Files of content that are open, for a [`crate::FilePool`].
    pub open_files: Gauge,
}

impl Metrics {
    /// Makes them known under `gse_bt_`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("gse_bt");
        registry.register("connections", "Peers that are connected", self.connections.clone());
        registry.register("swarms", "Swarms that run", self.swarms.clone());
        registry.register("sent_bytes", "Bytes of content sent to peers", self.sent.clone());
        registry.register(
            "received_bytes",
            "Bytes of content received from peers",
            self.received.clone(),
        );
        registry.register(
            "refused",
            "Connections of peers that were refused",
            self.refused.clone(),
        );
        registry.register(
            "bad_pieces",
            "Pieces that were not what the manifest says",
            self.bad_pieces.clone(),
        );
        registry.register("banned", "Peers banned for bad pieces", self.banned.clone());
        registry.register("open_files", "Files of content that are open", self.open_files.clone());
    }
}
