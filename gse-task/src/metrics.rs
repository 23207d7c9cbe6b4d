//! Figures of gse_task for Prometheus.

use gse_proto::calls::Failure;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// Why something happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    reason: &'static str,
}

impl Reason {
    /// A reason by its name.
    #[must_use]
    pub const fn new(reason: &'static str) -> Self {
        Self { reason }
    }
}

/// All figures.
#[derive(Debug)]
pub struct Metrics {
    /// Agents connected.
    pub sessions: Gauge,
    /// Sessions opened.
    pub sessions_opened: Counter,
    sessions_closed: Family<Reason, Counter>,
    connections_refused: Family<Reason, Counter>,
    /// Newcomers fenced because another host has their id.
    pub clones: Counter,
    /// Frames from agents.
    pub frames_in: Counter,
    /// Reports of processes that the store has.
    pub proc_reports: Counter,
    /// Reports of processes that are left to their agents for want of room or of the store.
    pub proc_reports_dropped: Counter,
    /// Dispatches sent.
    pub dispatched: Counter,
    /// Tasks taken up.
    pub tasks_started: Counter,
    /// Tasks with every row terminal.
    pub tasks_finished: Counter,
    /// Tasks under way.
    pub tasks_running: Gauge,
    /// Submit to last dispatch queued.
    pub fan_out_seconds: Histogram,
    /// Rows and pieces of output stored.
    pub rows_stored: Counter,
    /// Frames dropped because there was no room; their agents send them again.
    pub ingest_dropped: Counter,
    /// Writes that had to be repeated.
    pub ingest_retries: Counter,
    /// Compressed output written by all nodes within one lifetime of results.
    pub output_stored: Gauge,
    /// Outputs cut because a budget was used up.
    pub outputs_cut: Counter,
    /// Other nodes known.
    pub peers: Gauge,
    /// Calls to other nodes that failed.
    pub peer_failures: Counter,
    /// Notices to other nodes for which there was no room.
    pub peer_notices_dropped: Counter,
    /// Tasks of other nodes taken over.
    pub tasks_taken_over: Counter,
    /// Agents asked to go to another node.
    pub moves_asked: Counter,
    /// Submits refused because their application has as much as it may, by quota.
    pub quota_refused: gse_core::quota::Refused,
    agent_calls: Family<Reason, Counter>,
}

impl Metrics {
    /// Makes and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            sessions: Gauge::default(),
            sessions_opened: Counter::default(),
            sessions_closed: Family::default(),
            connections_refused: Family::default(),
            clones: Counter::default(),
            frames_in: Counter::default(),
            proc_reports: Counter::default(),
            proc_reports_dropped: Counter::default(),
            dispatched: Counter::default(),
            tasks_started: Counter::default(),
            tasks_finished: Counter::default(),
            tasks_running: Gauge::default(),
            fan_out_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
            rows_stored: Counter::default(),
            ingest_dropped: Counter::default(),
            ingest_retries: Counter::default(),
            output_stored: Gauge::default(),
            outputs_cut: Counter::default(),
            peers: Gauge::default(),
            peer_failures: Counter::default(),
            peer_notices_dropped: Counter::default(),
            tasks_taken_over: Counter::default(),
            moves_asked: Counter::default(),
            quota_refused: gse_core::quota::Refused::default(),
            agent_calls: Family::default(),
        };
        let sub = registry.sub_registry_with_prefix("gse_task");
        sub.register("sessions", "Agents connected", metrics.sessions.clone());
        sub.register("sessions_opened", "Sessions opened", metrics.sessions_opened.clone());
        sub.register(
            "sessions_closed",
            "Sessions ended, by reason",
            metrics.sessions_closed.clone(),
        );
        sub.register(
            "connections_refused",
            "Connections that did not become sessions, by reason",
            metrics.connections_refused.clone(),
        );
        sub.register(
            "clones_fenced",
            "Hosts turned away because another connected host has their agent id",
            metrics.clones.clone(),
        );
        sub.register(
            "proc_reports",
            "Reports of processes written to the store",
            metrics.proc_reports.clone(),
        );
        sub.register(
            "proc_reports_dropped",
            "Reports of processes not written for want of room or of the store; agents repeat them",
            metrics.proc_reports_dropped.clone(),
        );
        sub.register("frames_in", "Frames from agents", metrics.frames_in.clone());
        sub.register("dispatched", "Dispatches queued to agents", metrics.dispatched.clone());
        sub.register("tasks_started", "Script tasks taken up", metrics.tasks_started.clone());
        sub.register(
            "tasks_finished",
            "Script tasks finished",
            metrics.tasks_finished.clone(),
        );
        sub.register("tasks_running", "Script tasks under way", metrics.tasks_running.clone());
        sub.register(
            "fan_out_seconds",
            "From taking a task up to its last dispatch being queued",
            metrics.fan_out_seconds.clone(),
        );
        sub.register(
            "rows_stored",
            "Rows and pieces of output stored",
            metrics.rows_stored.clone(),
        );
        sub.register(
            "ingest_dropped",
            "Result frames dropped for want of room; their agents send them again",
            metrics.ingest_dropped.clone(),
        );
        sub.register(
            "ingest_retries",
            "Writes of results that had to be repeated",
            metrics.ingest_retries.clone(),
        );
        sub.register(
            "output_stored_bytes",
            "Output (compressed) written by all nodes within one lifetime of results",
            metrics.output_stored.clone(),
        );
        sub.register(
            "outputs_cut",
            "Outputs cut because the budget of their task or of the store was used up",
            metrics.outputs_cut.clone(),
        );
        sub.register("peers", "Other living nodes", metrics.peers.clone());
        sub.register(
            "peer_failures",
            "Calls to other nodes that failed; they are repeated",
            metrics.peer_failures.clone(),
        );
        sub.register(
            "peer_notices_dropped",
            "Notices to other nodes dropped for want of room; they find out by themselves, later",
            metrics.peer_notices_dropped.clone(),
        );
        sub.register(
            "tasks_taken_over",
            "Tasks of other nodes taken over",
            metrics.tasks_taken_over.clone(),
        );
        sub.register(
            "moves_asked",
            "Agents asked to go to another node",
            metrics.moves_asked.clone(),
        );
        sub.register(
            "quota_refused",
            "Submits refused because their application has as much as it may, by quota",
            metrics.quota_refused.clone(),
        );
        sub.register(
            "agent_calls",
            "Calls of other services to agents, by what became of them",
            metrics.agent_calls.clone(),
        );
        metrics
    }

    /// A call to an agent was answered, or was not.
    pub fn call_answered(&self, failure: Failure) {
        let reason = match failure {
            Failure::None => "answered",
            Failure::NotHere => "not_here",
            Failure::Busy => "busy",
            Failure::Lost => "lost",
            Failure::Timeout => "timeout",
            Failure::Unsupported => "unsupported",
            Failure::TooLong => "too_long",
        };
        self.agent_calls.get_or_create(&Reason { reason }).inc();
    }

    /// A connection did not become a session.
    pub fn refused(&self, reason: &'static str) {
        self.connections_refused.get_or_create(&Reason { reason }).inc();
    }

    /// A session ended.
    pub fn session_closed(&self, reason: &'static str) {
        self.sessions_closed.get_or_create(&Reason { reason }).inc();
    }
}
