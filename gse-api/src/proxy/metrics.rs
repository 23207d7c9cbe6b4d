//! Figures of calls to other services: by outcome, and of each server.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    service: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Node {
    service: &'static str,
    node: String,
}

/// All of them.
#[derive(Debug, Clone, Default)]
pub(super) struct NodeMetrics {
    outcomes: Family<Outcome, Counter>,
    up: Family<Node, Gauge>,
    calls: Family<Node, Counter>,
    failures: Family<Node, Counter>,
}

impl NodeMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "gse_api_upstream_calls",
            "Calls passed to other services, by how they went",
            self.outcomes.clone(),
        );
        registry.register(
            "gse_api_node_up",
            "Whether calls are passed to a server",
            self.up.clone(),
        );
        registry.register(
            "gse_api_node_calls",
            "Calls that were given to a server",
            self.calls.clone(),
        );
        registry.register(
            "gse_api_node_failures",
            "Calls that could not be given to a server, or were lost there",
            self.failures.clone(),
        );
    }

    /// A call was answered, or not.
    pub(super) fn outcome(&self, service: &'static str, outcome: &'static str) {
        self.outcomes.get_or_create(&Outcome { service, outcome }).inc();
    }

    /// Those of one server.
    pub(super) fn of(&self, service: &'static str, node: &str) -> NodeFigures {
        let label = Node {
            service,
            node: node.to_owned(),
        };
        NodeFigures {
            up: self.up.get_or_create(&label).clone(),
            calls: self.calls.get_or_create(&label).clone(),
            failures: self.failures.get_or_create(&label).clone(),
        }
    }

    /// Forgets a server that is not there any more.
    pub(super) fn forget(&self, service: &'static str, node: &str) {
        let label = Node {
            service,
            node: node.to_owned(),
        };
        self.up.remove(&label);
        self.calls.remove(&label);
        self.failures.remove(&label);
    }
}

/// Figures of one server.
#[derive(Debug, Clone)]
pub(super) struct NodeFigures {
    up: Gauge,
    calls: Counter,
    failures: Counter,
}

impl NodeFigures {
    pub(super) fn set_up(&self, up: bool) {
        self.up.set(up.into());
    }

    pub(super) fn called(&self) {
        self.calls.inc();
    }

    pub(super) fn failed(&self) {
        self.failures.inc();
    }
}
