//! Configuration of gse_btsvr: every bound and deadline has a key here, with a default that suits a small site.

use gse_core::audit::AuditConfig;
use gse_core::authz::AuthzConfig;
use gse_core::config::{Config as CoreConfig, LogConfig, OpsConfig, Problems, RuntimeConfig};
use gse_core::fleet::FleetConfig;
use gse_core::http::HttpConfig;
use gse_core::rpc::RpcConfig;
use gse_core::store::StoreConfig;
use gse_core::tls::TlsFiles;
use serde::{Deserialize, Serialize};

pub use crate::front::FrontConfig;
pub use crate::zone::ZoneConfig;

/// Everything that can be set.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of this instance; unique among the instances that share a store, and the same after a restart.
    pub node_id: String,
    /// Where agents that move files hold their link.
    pub link: LinkConfig,
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
    /// How content finds its way.
    pub path: PathConfig,
    /// This instance as a member of swarms.
    pub peer: PeerConfig,
    /// Content that it keeps.
    pub cache: CacheConfig,
    /// The zone that it serves.
    pub zone: ZoneConfig,
    /// Foreign clients.
    pub front: FrontConfig,
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
            link: LinkConfig::default(),
            http: HttpConfig {
                listen: "127.0.0.1:28864".into(),
                ..HttpConfig::default()
            },
            internal: InternalConfig::default(),
            rpc: RpcConfig::default(),
            fleet: FleetConfig::default(),
            authz: AuthzConfig::default(),
            audit: AuditConfig::default(),
            store: StoreConfig::default(),
            task: TaskConfig::default(),
            path: PathConfig::default(),
            peer: PeerConfig::default(),
            cache: CacheConfig::default(),
            zone: ZoneConfig::default(),
            front: FrontConfig::default(),
            runtime: RuntimeConfig::default(),
            log: LogConfig::default(),
            ops: OpsConfig {
                listen: "127.0.0.1:29404".into(),
            },
        }
    }
}

/// Listener for the links of agents.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkConfig {
    /// Address and port.
    pub listen: String,
    /// `host:port` that agents are told to use; empty: the address that is listened on.
    pub advertise: Vec<String>,
    /// This server's certificate.
    pub tls: Option<TlsFiles>,
    /// Whether the one certificate shared by a whole fleet is good for any agent id.
    pub allow_shared_certificate: bool,
    /// Links at once at most.
    pub max_links: usize,
    /// TLS handshake and hello together.
    pub hello_timeout_ms: u64,
    /// A link that says nothing for so long is ended.
    pub silence_ms: u64,
    /// A write that makes no progress for so long ends the link.
    pub write_stall_ms: u64,
    /// Frames waiting for one agent at most; one that does not keep up loses its link and takes it up again.
    pub queue: usize,
    /// Memory for manifests that come in parts, all links together; as much again keeps those of late.
    pub incoming_bytes: usize,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:28925".into(),
            advertise: vec![],
            tls: None,
            allow_shared_certificate: false,
            max_links: 18_000,
            hello_timeout_ms: 10_000,
            silence_ms: 35_000,
            write_stall_ms: 10_000,
            queue: 1_024,
            incoming_bytes: 512 << 20,
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
            listen: "127.0.0.1:48330".into(),
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
    /// Longest time for a task, and what 0 stands for.
    pub max_timeout_s: u64,
    /// Rows of one task at most: files times targets, and sources.
    pub max_rows: usize,
    /// Entries of `tasks` in a submit at most.
    pub max_files: usize,
    /// Targets of one file at most.
    pub max_targets: usize,
    /// Content of one upload at most.
    pub max_bytes: u64,
    /// Files and directories of one upload at most.
    pub max_entries: usize,
    /// Content of one pushed file at most.
    pub max_push_bytes: usize,
    /// Content of all pushed files of a submit at most.
    pub max_push_total_bytes: usize,
    /// Tasks under way on this instance at most.
    pub max_running: usize,
    /// How long a submit waits for the store to take it.
    pub submit_wait_ms: u64,
    /// How long results stay readable after the last row.
    pub result_ttl_s: u64,
    /// How long one call to an agent may take.
    pub call_timeout_ms: u64,
    /// How often a call that was not answered is made again.
    pub call_tries: u32,
    /// How long an agent that has begun and is away is waited for.
    pub lost_grace_ms: u64,
    /// How long an agent has to confirm that it has stopped something.
    pub stop_grace_ms: u64,
    /// Orders to agents that wait for their answers at once, those of all tasks together.
    pub orders_at_once: usize,
    /// Headers of tasks kept in memory for polls.
    pub cache_bytes: u64,
}

impl Default for TaskConfig {
    fn default() -> Self {
        Self {
            max_timeout_s: 259_200,
            max_rows: 250_000,
            max_files: 20_000,
            max_targets: 50_000,
            max_bytes: 1 << 40,
            max_entries: 200_000,
            max_push_bytes: 102_400,
            max_push_total_bytes: 32 << 20,
            max_running: 2_000,
            submit_wait_ms: 5_000,
            result_ttl_s: 7_200,
            call_timeout_ms: 15_000,
            call_tries: 4,
            lost_grace_ms: 60_000,
            stop_grace_ms: 5_000,
            orders_at_once: 100_000,
            cache_bytes: 64 << 20,
        }
    }
}

/// How content finds its way: predictions, not thresholds; see [`crate::path`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PathConfig {
    /// What a host sends in a second, bytes.
    pub host_rate: u64,
    /// What this server sends in a second, bytes.
    pub server_rate: u64,
    /// Between the first order of a swarm and its first byte, milliseconds.
    pub swarm_start_ms: u64,
    /// Content beyond this never goes in messages.
    pub max_inline_bytes: u64,
    /// Peers that one member of a swarm is told of at most.
    pub max_peers: usize,
}

impl Default for PathConfig {
    fn default() -> Self {
        Self {
            host_rate: 25 << 20,
            server_rate: 100 << 20,
            swarm_start_ms: 300,
            max_inline_bytes: 2 << 20,
            max_peers: 40,
        }
    }
}

/// This instance as a member of swarms, with the certificate of `link`. It is one only if there is a cache.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PeerConfig {
    /// Address and port for peers.
    pub listen: String,
    /// `host:port` that agents are told to use; empty: the address that is listened on.
    pub advertise: Vec<String>,
    /// Connections of all swarms at most.
    pub max_connections: usize,
    /// Connections of one swarm at most.
    pub max_peers: usize,
    /// Sent to peers at most, bytes per second; 0: no limit.
    pub upload_bytes_per_s: u64,
    /// Received from peers at most, bytes per second; 0: no limit.
    pub download_bytes_per_s: u64,
}

impl Default for PeerConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:10020".into(),
            advertise: vec![],
            max_connections: 2_000,
            max_peers: 64,
            upload_bytes_per_s: 0,
            download_bytes_per_s: 0,
        }
    }
}

/// When this instance takes a copy of what a swarm moves. What it has it always offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Take {
    /// Only content of calls, which has no other source.
    Push,
    /// Also what is moved a second time within the expiry: it will be moved again.
    Again,
    /// Everything.
    Always,
}

/// Content that this instance keeps on its disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// Directory; empty: no cache, and this instance takes part in no swarm.
    pub dir: String,
    /// Bytes of content at most.
    pub quota_bytes: u64,
    /// What was not used for so long is removed.
    pub expire_s: u64,
    /// What is taken.
    pub take: Take,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            dir: String::new(),
            quota_bytes: 10 << 30,
            expire_s: 7_200,
            take: Take::Again,
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
        problems.check_listen("link.listen", &self.link.listen);
        let everywhere = |listen: &str| listen.starts_with("0.0.0.0:") || listen.starts_with("[::]:");
        if everywhere(&self.link.listen) && self.link.advertise.is_empty() {
            problems.push(
                "link.advertise",
                "missing: link.listen is all addresses of the host, so say which one agents are to use",
            );
        }
        for (key, tls) in [("link.tls", &self.link.tls), ("internal.tls", &self.internal.tls)] {
            if tls.is_none() {
                problems.push(
                    key,
                    "missing: set ca, cert and key of this server (gse certs makes them)",
                );
            }
        }
        if !self.internal.listen.is_empty() {
            problems.check_listen("internal.listen", &self.internal.listen);
        }
        if !self.cache.dir.is_empty() {
            problems.check_listen("peer.listen", &self.peer.listen);
            if everywhere(&self.peer.listen) && self.peer.advertise.is_empty() {
                problems.push(
                    "peer.advertise",
                    "missing: peer.listen is all addresses of the host, so say which one agents are to use",
                );
            }
        }
        for problem in self.http.problems() {
            // An empty address means: none.
            if !self.http.listen.is_empty() {
                let (key, rest) = problem.split_once(' ').unwrap_or(("listen", &problem));
                problems.push(format!("http.{key}"), rest);
            }
        }
        self.zone.validate(!self.cache.dir.is_empty(), problems);
        self.front.validate(!self.cache.dir.is_empty(), problems);
        self.store.validate("store", problems);
        self.rpc.validate("rpc", problems);
        self.fleet.validate("fleet", problems);
        let (link, task, path) = (&self.link, &self.task, &self.path);
        for (key, value, least, most) in [
            ("link.max_links", link.max_links as u64, 1, 1 << 20),
            ("link.hello_timeout_ms", link.hello_timeout_ms, 100, 60_000),
            ("link.silence_ms", link.silence_ms, 1_000, 600_000),
            ("link.write_stall_ms", link.write_stall_ms, 100, 300_000),
            ("link.queue", link.queue as u64, 16, 1 << 16),
            ("link.incoming_bytes", link.incoming_bytes as u64, 16 << 20, 1 << 40),
            ("internal.lease_ms", self.internal.lease_ms, 1_000, 120_000),
            ("task.max_timeout_s", task.max_timeout_s, 1, 30 * 86_400),
            ("task.max_rows", task.max_rows as u64, 1, 4_000_000),
            ("task.max_files", task.max_files as u64, 1, 1_000_000),
            ("task.max_targets", task.max_targets as u64, 1, 1_000_000),
            ("task.max_push_bytes", task.max_push_bytes as u64, 1, 512 << 10),
            (
                "task.max_push_total_bytes",
                task.max_push_total_bytes as u64,
                1,
                256 << 20,
            ),
            ("task.max_running", task.max_running as u64, 1, 1 << 20),
            ("task.submit_wait_ms", task.submit_wait_ms, 100, 30_000),
            ("task.call_timeout_ms", task.call_timeout_ms, 500, 600_000),
            ("task.call_tries", task.call_tries.into(), 1, 1_000),
            ("task.stop_grace_ms", task.stop_grace_ms, 100, 60_000),
            ("task.orders_at_once", task.orders_at_once as u64, 1_000, 1 << 28),
            ("path.host_rate", path.host_rate, 1, 1 << 40),
            ("path.server_rate", path.server_rate, 1, 1 << 40),
            ("path.max_inline_bytes", path.max_inline_bytes, 0, 4 << 20),
            ("path.max_peers", path.max_peers as u64, 2, 1_000),
            ("peer.max_connections", self.peer.max_connections as u64, 1, 1 << 20),
            ("peer.max_peers", self.peer.max_peers as u64, 1, 10_000),
            ("cache.quota_bytes", self.cache.quota_bytes, 1 << 20, 1 << 50),
            ("cache.expire_s", self.cache.expire_s, 1, 30 * 86_400),
        ] {
            problems.check_range(key, value, least, most);
        }
    }
}
