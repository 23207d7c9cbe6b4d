//! Configuration of gse_procmgr: every bound and deadline has a key here, with a default that suits a small site.

use gse_core::audit::AuditConfig;
use gse_core::authz::AuthzConfig;
use gse_core::config::{Config as CoreConfig, LogConfig, OpsConfig, Problems, RuntimeConfig};
use gse_core::fleet::FleetConfig;
use gse_core::http::HttpConfig;
use gse_core::rpc::RpcConfig;
use gse_core::store::StoreConfig;
use gse_core::tls::TlsFiles;
use serde::{Deserialize, Serialize};

/// Everything that can be set.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of this instance; unique among the instances that share a store, and the same after a restart.
    pub node_id: String,
    /// Where platforms call; an empty `listen` leaves that to gse_api.
    pub http: HttpConfig,
    /// Where our own servers call, over mutual TLS.
    pub internal: InternalConfig,
    /// How gse_task is called, to reach agents; of the listener's settings none is used.
    pub rpc: RpcConfig,
    /// How agents are found and waited for.
    pub fleet: FleetConfig,
    /// Who may do what.
    pub authz: AuthzConfig,
    /// Where it is written down.
    pub audit: AuditConfig,
    /// The state store.
    pub store: StoreConfig,
    /// Limits of tasks.
    pub task: TaskConfig,
    /// Limits of queries.
    pub query: QueryConfig,
    /// How registrations of store and hosts are brought together.
    pub reconcile: ReconcileConfig,
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
            http: HttpConfig {
                listen: "127.0.0.1:52030".into(),
                ..HttpConfig::default()
            },
            internal: InternalConfig::default(),
            rpc: RpcConfig::default(),
            fleet: FleetConfig {
                reconnect_grace_ms: 8_000,
                ..FleetConfig::default()
            },
            authz: AuthzConfig::default(),
            audit: AuditConfig::default(),
            store: StoreConfig::default(),
            task: TaskConfig::default(),
            query: QueryConfig::default(),
            reconcile: ReconcileConfig::default(),
            runtime: RuntimeConfig::default(),
            log: LogConfig::default(),
            ops: OpsConfig {
                listen: "127.0.0.1:29406".into(),
            },
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
    /// This server's certificate.
    pub tls: Option<TlsFiles>,
    /// How long this instance counts as alive when it says nothing.
    pub lease_ms: u64,
}

impl Default for InternalConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:52031".into(),
            advertise: String::new(),
            tls: None,
            lease_ms: 10_000,
        }
    }
}

/// Limits of tasks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TaskConfig {
    /// Elements of one multi submit at most.
    pub max_elements: usize,
    /// Rows of one submit at most: elements times their hosts.
    pub max_rows: usize,
    /// Tasks under way on this instance at most.
    pub max_running: usize,
    /// How long a submit waits for the store to take it.
    pub submit_wait_ms: u64,
    /// How long results stay readable after the last row.
    pub result_ttl_s: u64,
    /// An agent that has not answered for so long gets its rows: 117.
    pub give_up_ms: u64,
    /// How long one call waits for an operation to end; then it is asked again how it stands.
    pub wait_ms: u64,
    /// Longest time from a submit to its last row.
    pub max_time_s: u64,
    /// Operations in one call to one agent at most.
    pub max_operations: usize,
    /// Calls to agents under way at once, those of all tasks together.
    pub calls_at_once: usize,
    /// How long the calls about registrations wait for agents.
    pub sync_wait_ms: u64,
    /// Headers of tasks kept in memory for polls.
    pub cache_bytes: u64,
}

impl Default for TaskConfig {
    fn default() -> Self {
        Self {
            max_elements: 20_000,
            max_rows: 100_000,
            max_running: 2_000,
            submit_wait_ms: 5_000,
            result_ttl_s: 7_200,
            give_up_ms: 9_000,
            wait_ms: 4_000,
            max_time_s: 3_600,
            max_operations: 200,
            calls_at_once: 50_000,
            sync_wait_ms: 20_000,
            cache_bytes: 64 << 20,
        }
    }
}

/// Limits of queries.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QueryConfig {
    /// Hosts of one status query at most.
    pub max_ids: usize,
    /// Entries of one page at most.
    pub max_page: usize,
    /// A process that is gone keeps its place in the pages for so long, so that they do not shift under a reader.
    pub gone_ms: u64,
}

impl Default for QueryConfig {
    fn default() -> Self {
        Self {
            max_ids: 20_000,
            max_page: 1_000,
            gone_ms: 600_000,
        }
    }
}

/// How registrations of store and hosts are brought together.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReconcileConfig {
    /// Between two looks for agents that have told everything they know.
    pub look_ms: u64,
    /// Agents compared at a time.
    pub agents: usize,
    /// How long agents are waited for.
    pub wait_ms: u64,
}

impl Default for ReconcileConfig {
    fn default() -> Self {
        Self {
            look_ms: 500,
            agents: 500,
            wait_ms: 10_000,
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
                "must be 1 to 64 characters without blanks and braces, unique among the instances of a site",
            );
        }
        if self.internal.tls.is_none() {
            problems.push(
                "internal.tls",
                "missing: set ca, cert and key of this server (gse certs makes them)",
            );
        }
        if !self.internal.listen.is_empty() {
            problems.check_listen("internal.listen", &self.internal.listen);
        }
        for problem in self.http.problems() {
            // An empty address means: none.
            if !self.http.listen.is_empty() {
                let (key, rest) = problem.split_once(' ').unwrap_or(("listen", &problem));
                problems.push(format!("http.{key}"), rest);
            }
        }
        self.store.validate("store", problems);
        self.rpc.validate("rpc", problems);
        self.fleet.validate("fleet", problems);
        let (task, query, reconcile) = (&self.task, &self.query, &self.reconcile);
        for (key, value, least, most) in [
            ("internal.lease_ms", self.internal.lease_ms, 1_000, 120_000),
            ("task.max_elements", task.max_elements as u64, 1, 1 << 20),
            ("task.max_rows", task.max_rows as u64, 1, 1 << 22),
            ("task.max_running", task.max_running as u64, 1, 1 << 20),
            ("task.submit_wait_ms", task.submit_wait_ms, 100, 30_000),
            ("task.result_ttl_s", task.result_ttl_s, 60, 30 * 86_400),
            ("task.give_up_ms", task.give_up_ms, 500, 600_000),
            ("task.wait_ms", task.wait_ms, 100, 60_000),
            ("task.max_time_s", task.max_time_s, 10, 86_400),
            ("task.max_operations", task.max_operations as u64, 1, 2_000),
            ("task.calls_at_once", task.calls_at_once as u64, 1_000, 1 << 24),
            ("task.sync_wait_ms", task.sync_wait_ms, 500, 300_000),
            ("query.max_ids", query.max_ids as u64, 1, 1 << 20),
            ("query.max_page", query.max_page as u64, 1, 100_000),
            ("query.gone_ms", query.gone_ms, 0, 86_400_000),
            ("reconcile.look_ms", reconcile.look_ms, 50, 600_000),
            ("reconcile.agents", reconcile.agents as u64, 1, 10_000),
            ("reconcile.wait_ms", reconcile.wait_ms, 500, 600_000),
        ] {
            problems.check_range(key, value, least, most);
        }
    }
}
