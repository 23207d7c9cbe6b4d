//! What is counted about plugins' connections. What becomes of records is counted where they go.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Why a connection was closed by the agent, or a record refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Counters of the data socket.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    pub(super) connections: Gauge,
    pub(super) taken: Counter,
    closed: Family<Reason, Counter>,
    refused: Family<Reason, Counter>,
    pub(super) questions: Counter,
    pub(super) unanswered: Counter,
    pub(super) cut: Counter,
    pub(super) sent_again: Counter,
    pub(super) bytes: Counter,
}

impl Metrics {
    /// Registers them under the prefix `gse_agent_data_socket`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("gse_agent_data_socket");
        registry.register("connections", "Plugins that are connected", self.connections.clone());
        registry.register("taken", "Connections taken", self.taken.clone());
        registry.register(
            "closed",
            "Connections closed by the agent, by reason",
            self.closed.clone(),
        );
        registry.register(
            "refused",
            "Records that were not passed on, by reason",
            self.refused.clone(),
        );
        registry.register(
            "questions",
            "Questions of plugins who the agent is",
            self.questions.clone(),
        );
        registry.register(
            "unanswered",
            "Questions whose answer found no room: the plugin reads nothing",
            self.unanswered.clone(),
        );
        registry.register(
            "cut",
            "Frames whose sender went before they were whole",
            self.cut.clone(),
        );
        registry.register(
            "sent_again",
            "Parts of frames that were dropped because the whole frame came again behind them",
            self.sent_again.clone(),
        );
        registry.register("bytes", "Bytes read", self.bytes.clone());
    }

    pub(super) fn closed(&self, reason: &'static str) {
        self.closed.get_or_create(&Reason { reason }).inc();
    }

    pub(super) fn refused(&self, reason: crate::data::Reason) {
        self.refused.get_or_create(&Reason { reason: reason.name() }).inc();
    }

    /// A connection that is counted for as long as this lives.
    pub(super) fn enter(&self) -> Inside {
        self.taken.inc();
        self.connections.inc();
        Inside(self.connections.clone())
    }
}

/// See [`Metrics::enter`].
pub(super) struct Inside(Gauge);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.dec();
    }
}
