//! Configuration of gse_task: every bound and deadline has a key here, with a default that suits a small site.

use gse_core::audit::AuditConfig;
use gse_core::authz::AuthzConfig;
use gse_core::config::{Config as CoreConfig, LogConfig, OpsConfig, Problems, RuntimeConfig};
use gse_core::http::HttpConfig;
use gse_core::rpc::RpcConfig;
use gse_core::store::StoreConfig;
use gse_core::tls::TlsFiles;
use serde::{Deserialize, Serialize};

use crate::message::MessagesConfig;

/// Everything that can be set.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of this node; unique among the nodes that share a store, and the same after a restart.
    pub node_id: String,
    /// Where agents connect.
    pub agents: AgentsConfig,
    /// Where platforms call; an empty `listen` leaves that to gse_api.
    pub http: HttpConfig,
    /// Where our own servers call, over mutual TLS.
    pub internal: InternalConfig,
    /// Where other nodes of gse_task call, over mutual TLS; an empty `listen` makes this the only node.
    pub rpc: RpcConfig,
    /// How nodes watch each other.
    pub peers: PeersConfig,
    /// Calls of other services to agents.
    pub calls: CallsConfig,
    /// Messages to and from plugins.
    pub messages: MessagesConfig,
    /// Who may do what.
    pub authz: AuthzConfig,
    /// Where it is written down.
    pub audit: AuditConfig,
    /// The state store.
    pub store: StoreConfig,
    /// Limits of sessions.
    pub session: SessionConfig,
    /// Limits of tasks.
    pub task: TaskConfig,
    /// Process.
    pub runtime: RuntimeConfig,
    /// Logging.
    pub log: LogConfig,
    /// Health and metrics.
    pub ops: OpsConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node_id: "local".into(),
            agents: AgentsConfig::default(),
            http: HttpConfig {
                listen: "127.0.0.1:28863".into(),
                ..HttpConfig::default()
            },
            internal: InternalConfig::default(),
            rpc: RpcConfig::default(),
            peers: PeersConfig::default(),
            calls: CallsConfig::default(),
            messages: MessagesConfig::default(),
            authz: AuthzConfig::default(),
            audit: AuditConfig::default(),
            store: StoreConfig::default(),
            session: SessionConfig::default(),
            task: TaskConfig::default(),
            runtime: RuntimeConfig::default(),
            log: LogConfig::default(),
            ops: OpsConfig {
                listen: "127.0.0.1:29403".into(),
            },
        }
    }
}

/// Listener for agents.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentsConfig {
    /// Address and port.
    pub listen: String,
    /// `host:port` that agents are told to use; empty: the address that is listened on.
    pub advertise: Vec<String>,
    /// This node's server certificate.
    pub tls: Option<TlsFiles>,
    /// Whether the one certificate shared by a whole fleet is good for any agent id.
    pub allow_shared_certificate: bool,
}

impl Default for AgentsConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:28668".into(),
            advertise: vec![],
            tls: None,
            allow_shared_certificate: false,
        }
    }
}

/// Listener for our own servers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InternalConfig {
    /// Address and port; empty: none.
    pub listen: String,
    /// `host:port` that other servers are told to use; empty: the address that is listened on.
    pub advertise: String,
    /// This node's server certificate.
    pub tls: Option<TlsFiles>,
}

impl Default for InternalConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:48329".into(),
            advertise: String::new(),
            tls: None,
        }
    }
}

/// How nodes of gse_task watch each other and share agents.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PeersConfig {
    /// How long a node that says nothing counts as alive.
    pub lease_ms: u64,
    /// Agents asked to move in a second at most, when this node has clearly more than the others; 0: none ever.
    pub moves_per_s: usize,
    /// How much more than the average (in percent) is clearly more.
    pub slack_percent: usize,
}

impl Default for PeersConfig {
    fn default() -> Self {
        Self {
            lease_ms: 10_000,
            moves_per_s: 20,
            slack_percent: 10,
        }
    }
}

/// Limits of the calls that other services make to agents.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CallsConfig {
    /// Calls that agents have not answered yet, all together, at most.
    pub max_pending: usize,
    /// Calls in one request at most.
    pub max_per_request: usize,
    /// Bytes of one call at most.
    pub max_call_bytes: usize,
    /// Bytes of one answer at most.
    pub max_reply_bytes: usize,
    /// An answer is waited for as long as the caller asks, at most so long.
    pub max_timeout_ms: u64,
}

impl Default for CallsConfig {
    fn default() -> Self {
        Self {
            max_pending: 100_000,
            max_per_request: 20_000,
            max_call_bytes: 8 << 20,
            max_reply_bytes: 256 << 10,
            max_timeout_ms: 120_000,
        }
    }
}

/// Limits of sessions.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SessionConfig {
    /// How often agents are to be heard.
    pub heartbeat_interval_ms: u64,
    /// Intervals without a sign of life after which a session is ended.
    pub missed_heartbeats: u32,
    /// TLS handshake and hello together.
    pub hello_timeout_ms: u64,
    /// A write that makes no progress for so long ends the session.
    pub write_stall_ms: u64,
    /// How long the holder of an id has to answer when another host claims it.
    pub probe_ms: u64,
    /// When a fenced clone may ask again.
    pub fence_retry_ms: u64,
    /// Connected agents at most.
    pub max_sessions: usize,
    /// Connections without a hello at most; the next ones wait to be accepted.
    pub max_pending: usize,
    /// The same from one address (of IPv6: from one /64), beyond which they are dropped; 0: any number.
    pub max_pending_per_address: usize,
    /// Longest frame from an agent.
    pub max_frame_bytes: usize,
    /// Frames of one lane waiting for one agent at most.
    pub outbox_frames: usize,
    /// Bytes waiting for one agent at most.
    pub outbox_bytes: usize,
    /// Output bytes that one atomic task on one agent may have unacknowledged.
    pub stream_window: u32,
    /// The same for one agent altogether.
    pub session_window: u32,
    /// How often the state of agents is written to the store.
    pub presence_flush_ms: u64,
    /// How long the acknowledgement of a finished script may wait for something else to tell its agent; 0: not at all. The agent
    /// keeps the result meanwhile; it sends it again after five seconds.
    pub ack_patience_ms: u64,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            heartbeat_interval_ms: 30_000,
            missed_heartbeats: 3,
            hello_timeout_ms: 10_000,
            write_stall_ms: 10_000,
            probe_ms: 2_000,
            fence_retry_ms: 60_000,
            max_sessions: 18_000,
            max_pending: 2_048,
            max_pending_per_address: 512,
            max_frame_bytes: 1 << 20,
            outbox_frames: 8_192,
            outbox_bytes: 64 << 20,
            stream_window: 256 << 10,
            session_window: 2 << 20,
            presence_flush_ms: 1_000,
            ack_patience_ms: 1_000,
        }
    }
}

/// Limits of tasks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TaskConfig {
    /// Longest time for one atomic task, and what 0 stands for.
    pub max_timeout_s: u64,
    /// Targets in a submit at most.
    pub max_targets: usize,
    /// How long a submit waits for the store to take it, and a fiftieth of a second more for each 512 targets.
    pub submit_wait_ms: u64,
    /// Atomic tasks in a submit at most (64 is the layout's own bound).
    pub max_atomics: usize,
    /// Script files in a submit at most.
    pub max_scripts: usize,
    /// Content of all scripts of a submit at most.
    pub max_script_bytes: usize,
    /// Tasks under way on this node at most.
    pub max_running: usize,
    /// Output kept of one atomic task on one target.
    pub output_limit_bytes: u32,
    /// Output kept of one task, all targets together; 0: no bound. Past it output is cut with a marker.
    pub task_output_bytes: u64,
    /// Output (compressed) written by all nodes within one lifetime of results; 0: no bound. Past it output is cut with a marker.
    pub store_output_bytes: u64,
    /// How long results stay readable after the last row.
    pub result_ttl_s: u64,
    /// How long a target that was there a moment ago is waited for.
    pub reconnect_grace_ms: u64,
    /// Nothing is started on a host later than this after the submit.
    pub start_window_ms: u64,
    /// How long after its time is up an agent that went away is waited for before its rows are closed.
    pub return_grace_ms: u64,
    /// Rows in one answer at most.
    pub max_rows: usize,
    /// Output in one answer at most; rows beyond it stay unfinished until the next poll.
    pub answer_bytes: usize,
    /// Memory for all answers with output at once; one that finds no room is answered without output.
    pub answers_total_bytes: usize,
    /// Results waiting to be stored, of each of the writers, at most; what does not fit is sent again by its agent.
    pub ingest_queue: usize,
    /// Writers of results.
    pub ingest_writers: usize,
    /// Targets and headers of tasks kept in memory for polls.
    pub cache_bytes: u64,
    /// How long after the last poll. A platform that waits for a task asks more often; after its end nobody asks.
    pub cache_idle_ms: u64,
}

impl Default for TaskConfig {
    fn default() -> Self {
        Self {
            max_timeout_s: 259_200,
            max_targets: 50_000,
            submit_wait_ms: 1_700,
            max_atomics: 64,
            max_scripts: 64,
            max_script_bytes: 32 << 20,
            max_running: 2_000,
            output_limit_bytes: 5 << 20,
            task_output_bytes: 4 << 30,
            store_output_bytes: 4 << 30,
            result_ttl_s: 3_600,
            reconnect_grace_ms: 15_000,
            start_window_ms: 60_000,
            return_grace_ms: 210_000,
            max_rows: 20_000,
            answer_bytes: 64 << 20,
            answers_total_bytes: 512 << 20,
            ingest_queue: 4_096,
            ingest_writers: 4,
            cache_bytes: 128 << 20,
            cache_idle_ms: 5_000,
        }
    }
}

impl CoreConfig for Config {
    fn runtime(&self) -> &RuntimeConfig {
        &self.runtime
    }

    fn log(&self) -> &LogConfig {
        &self.log
    }

    fn ops(&self) -> &OpsConfig {
        &self.ops
    }

    fn validate(&self, problems: &mut Problems) {
        if self.node_id.is_empty() || self.node_id.len() > 64 || self.node_id.contains(['{', '}', ' ']) {
            problems.push(
                "node_id",
                "must be 1 to 64 characters without blanks and braces, unique among the nodes of a site",
            );
        }
        problems.check_listen("agents.listen", &self.agents.listen);
        if self.agents.tls.is_none() {
            problems.push(
                "agents.tls",
                "missing: set ca, cert and key of this server (gse certs makes them)",
            );
        }
        if !self.internal.listen.is_empty() {
            problems.check_listen("internal.listen", &self.internal.listen);
            if self.internal.tls.is_none() {
                problems.push(
                    "internal.tls",
                    "missing: set ca, cert and key of this server, or internal.listen = \"\"",
                );
            }
        }
        self.rpc.validate("rpc", problems);
        let everywhere = |listen: &str| listen.starts_with("0.0.0.0:") || listen.starts_with("[::]:");
        if everywhere(&self.rpc.listen) && self.rpc.advertise.is_empty() {
            problems.push(
                "rpc.advertise",
                "missing: rpc.listen is all addresses of the host, so say which one other nodes are to use",
            );
        }
        problems.check_range("peers.lease_ms", self.peers.lease_ms, 1_000, 120_000);
        problems.check_range("peers.slack_percent", self.peers.slack_percent as u64, 1, 1_000);
        let calls = &self.calls;
        problems.check_range("calls.max_pending", calls.max_pending as u64, 1, 1 << 24);
        problems.check_range("calls.max_per_request", calls.max_per_request as u64, 1, 1 << 20);
        problems.check_range("calls.max_call_bytes", calls.max_call_bytes as u64, 1 << 10, 32 << 20);
        problems.check_range("calls.max_reply_bytes", calls.max_reply_bytes as u64, 1 << 10, 8 << 20);
        problems.check_range("calls.max_timeout_ms", calls.max_timeout_ms, 100, 3_600_000);
        self.messages.validate(problems);
        let session = &self.session;
        problems.check_range(
            "session.heartbeat_interval_ms",
            session.heartbeat_interval_ms,
            100,
            600_000,
        );
        problems.check_range("session.missed_heartbeats", session.missed_heartbeats.into(), 2, 100);
        problems.check_range("session.hello_timeout_ms", session.hello_timeout_ms, 100, 60_000);
        problems.check_range("session.write_stall_ms", session.write_stall_ms, 100, 300_000);
        problems.check_range("session.probe_ms", session.probe_ms, 10, 10_000);
        problems.check_range(
            "session.max_frame_bytes",
            session.max_frame_bytes as u64,
            256 << 10,
            64 << 20,
        );
        problems.check_range("session.outbox_frames", session.outbox_frames as u64, 64, 1 << 20);
        problems.check_range(
            "session.stream_window",
            session.stream_window.into(),
            64 << 10,
            64 << 20,
        );
        problems.check_range("session.ack_patience_ms", session.ack_patience_ms, 0, 3_000);
        problems.check_range("session.presence_flush_ms", session.presence_flush_ms, 10, 60_000);
        let task = &self.task;
        problems.check_range("task.max_timeout_s", task.max_timeout_s, 1, 30 * 86_400);
        problems.check_range("task.submit_wait_ms", task.submit_wait_ms, 100, 30_000);
        problems.check_range("task.max_targets", task.max_targets as u64, 1, 1_000_000);
        problems.check_range("task.max_atomics", task.max_atomics as u64, 1, 64);
        problems.check_range(
            "task.output_limit_bytes",
            task.output_limit_bytes.into(),
            1024,
            (1 << 24) - 1,
        );
        problems.check_range(
            "task.answers_total_bytes",
            task.answers_total_bytes as u64,
            16 << 20,
            1 << 40,
        );
        problems.check_range("task.answer_bytes", task.answer_bytes as u64, 1 << 20, 1 << 30);
        problems.check_range("task.start_window_ms", task.start_window_ms, 1_000, 3_600_000);
        problems.check_range("task.ingest_writers", task.ingest_writers as u64, 1, 64);
        problems.check_range("task.cache_idle_ms", task.cache_idle_ms, 100, 86_400_000);
        problems.check_range("task.ingest_queue", task.ingest_queue as u64, 16, 1 << 20);
    }
}
