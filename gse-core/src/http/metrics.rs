//! What the HTTP listeners count.

use std::sync::Arc;
use std::time::Duration;

use gse_proto::codes::Code;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    listener: &'static str,
    route: &'static str,
    class: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    listener: &'static str,
    route: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ListenerLabels {
    listener: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    listener: &'static str,
    reason: &'static str,
}

const BUCKETS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 30.0,
];

/// Counters of all HTTP listeners of a process. Labels come from fixed sets only: a caller cannot make new ones.
#[derive(Debug)]
pub struct HttpMetrics {
    requests: Family<CallLabels, Counter>,
    seconds: Family<RouteLabels, Histogram, fn() -> Histogram>,
    inflight: Family<ListenerLabels, Gauge>,
    connections: Family<ListenerLabels, Gauge>,
    refused_bodies: Family<RefusalLabels, Counter>,
}

impl HttpMetrics {
    /// Makes the counters and registers them.
    pub fn new(registry: &mut Registry) -> Arc<Self> {
        let metrics = HttpMetrics {
            requests: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            inflight: Family::default(),
            connections: Family::default(),
            refused_bodies: Family::default(),
        };
        registry.register(
            "gse_http_requests",
            "Answers by call and class of code",
            metrics.requests.clone(),
        );
        registry.register(
            "gse_http_request_seconds",
            "From the request head to the answer's head",
            metrics.seconds.clone(),
        );
        registry.register(
            "gse_http_inflight",
            "Requests being worked on",
            metrics.inflight.clone(),
        );
        registry.register("gse_http_connections", "Open connections", metrics.connections.clone());
        registry.register(
            "gse_http_bodies_refused",
            "Request bodies not taken, by reason",
            metrics.refused_bodies.clone(),
        );
        Arc::new(metrics)
    }

    pub(super) fn answered(&self, listener: &'static str, route: &'static str, class: &'static str, took: Duration) {
        self.requests
            .get_or_create(&CallLabels { listener, route, class })
            .inc();
        self.seconds
            .get_or_create(&RouteLabels { listener, route })
            .observe(took.as_secs_f64());
    }

    pub(super) fn inflight(&self, listener: &'static str) -> Held {
        Held::new(self.inflight.get_or_create_owned(&ListenerLabels { listener }))
    }

    pub(super) fn connection(&self, listener: &'static str) -> Held {
        Held::new(self.connections.get_or_create_owned(&ListenerLabels { listener }))
    }

    pub(super) fn refused_body(&self, listener: &'static str, reason: &'static str) {
        self.refused_bodies
            .get_or_create(&RefusalLabels { listener, reason })
            .inc();
    }
}

/// Counts one while it lives.
#[derive(Debug)]
pub(super) struct Held(Gauge);

impl Held {
    fn new(gauge: Gauge) -> Self {
        gauge.inc();
        Held(gauge)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The few classes that codes are counted in.
pub(super) fn class(code: i64) -> &'static str {
    let known = Code::ALL.iter().find(|known| known.code() == code);
    match known {
        Some(Code::Ok) => "ok",
        Some(Code::Unauthenticated | Code::Forbidden) => "refused",
        Some(Code::Limit | Code::Draining) => "busy",
        Some(Code::System | Code::Timeout | Code::StoreUnavailable | Code::ServiceUnavailable) => "failed",
        _ => "caller",
    }
}
