//! The settings of the front door: where it listens, whom it lets in, where the store and the other services are.

use std::path::PathBuf;

use gse_core::audit::AuditConfig;
use gse_core::authz::AuthzConfig;
use gse_core::config::{LogConfig, OpsConfig, Problems, RuntimeConfig};
use gse_core::http::HttpConfig;
use gse_core::store::StoreConfig;
use gse_core::tls::TlsFiles;
use gse_proto::http::Owner;
use serde::{Deserialize, Serialize};

/// Configuration of `gse_api`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The listener that platforms call.
    pub http: HttpConfig,
    /// Who may call what.
    pub authz: AuthzConfig,
    /// The trail of what was refused.
    pub audit: AuditConfig,
    /// Where the agents' records are.
    pub store: StoreConfig,
    /// The other services.
    pub upstreams: Upstreams,
    /// Own certificate of the role `server`, to connect to the other services; needed if there is any.
    pub tls: TlsFiles,
    /// Bounds of single calls.
    pub limits: Limits,
    /// Heartbeat interval of the agents, in seconds; has to be that of gse_task.
    pub heartbeat_interval_s: u32,
    /// The process.
    pub runtime: RuntimeConfig,
    /// Its log.
    pub log: LogConfig,
    /// Health and metrics.
    pub ops: OpsConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http: HttpConfig {
                listen: "127.0.0.1:28808".to_owned(),
                ..HttpConfig::default()
            },
            authz: AuthzConfig::default(),
            audit: AuditConfig::default(),
            store: StoreConfig::default(),
            upstreams: Upstreams::default(),
            tls: TlsFiles {
                ca: PathBuf::new(),
                cert: PathBuf::new(),
                key: PathBuf::new(),
            },
            limits: Limits::default(),
            heartbeat_interval_s: 30,
            runtime: RuntimeConfig::default(),
            log: LogConfig::default(),
            ops: OpsConfig::default(),
        }
    }
}

/// The internal listeners (`host:port`) of the services; one without any is not installed, except gse_task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Upstreams {
    /// gse_task; empty: its nodes are found through the store (if `tls` is set).
    pub task: Vec<String>,
    /// gse_btsvr; empty: as gse_task.
    pub file: Vec<String>,
    /// gse_procmgr; empty: as gse_task.
    pub proc: Vec<String>,
    /// gse_data.
    pub data: Vec<String>,
    /// gse_syncdata.
    pub sync: Vec<String>,
    /// How often the nodes are looked for, in milliseconds.
    pub discover_ms: u64,
    /// How long a call waits for a node when none is to be reached, in milliseconds. A node that was started again may not be known
    /// yet when the last of the others stops.
    pub wait_ms: u64,
}

impl Default for Upstreams {
    fn default() -> Self {
        Self {
            task: vec![],
            file: vec![],
            proc: vec![],
            data: vec![],
            sync: vec![],
            discover_ms: 2_000,
            wait_ms: 1_500,
        }
    }
}

impl Upstreams {
    /// The addresses of a service, with the name of its key. None for gse_api's own calls.
    pub(crate) fn of(&self, owner: Owner) -> Option<(&'static str, &[String])> {
        match owner {
            Owner::Api => None,
            Owner::Task => Some(("task", &self.task)),
            Owner::File => Some(("file", &self.file)),
            Owner::Proc => Some(("proc", &self.proc)),
            Owner::Data => Some(("data", &self.data)),
            Owner::Sync => Some(("sync", &self.sync)),
        }
    }

    fn all(&self) -> [(&'static str, &[String]); 5] {
        [
            ("upstreams.task", &self.task),
            ("upstreams.file", &self.file),
            ("upstreams.proc", &self.proc),
            ("upstreams.data", &self.data),
            ("upstreams.sync", &self.sync),
        ]
    }
}

/// Bounds of single calls.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Most ids (or hosts) of one call.
    pub max_ids: usize,
    /// Most agents of one page of the operators' list.
    pub max_page: usize,
    /// For the store to answer what one call needs, in milliseconds.
    pub lookup_timeout_ms: u64,
    /// For a connection to another service, in milliseconds.
    pub connect_timeout_ms: u64,
    /// For the answer of another service once it has the whole body, in milliseconds. Longer than that service's own limit, so that
    /// its answer, which knows more, comes first.
    pub upstream_timeout_ms: u64,
    /// For the next piece of such an answer, in milliseconds.
    pub upstream_idle_timeout_ms: u64,
    /// For the answer to a call that may be made again (a read, or asking for an end) before it is made at another server, in
    /// milliseconds.
    pub read_timeout_ms: u64,
    /// Of a caller's body, bytes that are kept until there is an answer, to be sent to another server if the first one turns out to be
    /// stopping.
    pub replay_bytes: usize,
    /// The same of all bodies at once.
    pub replay_total_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_ids: 50_000,
            max_page: 5_000,
            lookup_timeout_ms: 1_800,
            connect_timeout_ms: 3_000,
            upstream_timeout_ms: 35_000,
            upstream_idle_timeout_ms: 30_000,
            read_timeout_ms: 10_000,
            replay_bytes: 2 * 1024 * 1024,
            replay_total_bytes: 128 * 1024 * 1024,
        }
    }
}

impl Config {
    /// Whether the nodes of a service are found through the store: none is `named`, and there is a certificate to call them with.
    pub(crate) fn finds_nodes(&self, named: &[String]) -> bool {
        named.is_empty() && !self.tls.cert.as_os_str().is_empty()
    }
}

impl gse_core::config::Config for Config {
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
        for problem in self.http.problems() {
            let (key, rest) = problem.split_once(' ').unwrap_or(("listen", &problem));
            problems.push(format!("http.{key}"), rest);
        }
        problems.check_listen("http.listen", &self.http.listen);
        self.store.validate("store", problems);
        let mut any = self.finds_nodes(&self.upstreams.task);
        for (key, addresses) in self.upstreams.all() {
            for address in addresses {
                any = true;
                problems.check_listen(key, address);
            }
        }
        if any {
            for (key, path) in [
                ("tls.ca", &self.tls.ca),
                ("tls.cert", &self.tls.cert),
                ("tls.key", &self.tls.key),
            ] {
                if path.as_os_str().is_empty() {
                    problems.push(key, "is not set; services are reached over mutual TLS, so it must name a PEM file (`gse certs` makes them)");
                }
            }
        }
        let limits = &self.limits;
        problems.check_range("limits.max_ids", limits.max_ids as u64, 1, 1_000_000);
        problems.check_range("limits.max_page", limits.max_page as u64, 1, 100_000);
        for (key, value) in [
            ("limits.lookup_timeout_ms", limits.lookup_timeout_ms),
            ("limits.connect_timeout_ms", limits.connect_timeout_ms),
            ("limits.upstream_timeout_ms", limits.upstream_timeout_ms),
            ("limits.upstream_idle_timeout_ms", limits.upstream_idle_timeout_ms),
            ("limits.read_timeout_ms", limits.read_timeout_ms),
        ] {
            problems.check_range(key, value, 1, 3_600_000);
        }
        problems.check_range("limits.replay_bytes", limits.replay_bytes as u64, 0, 1 << 30);
        problems.check_range(
            "limits.replay_total_bytes",
            limits.replay_total_bytes as u64,
            0,
            1 << 40,
        );
        problems.check_range("upstreams.discover_ms", self.upstreams.discover_ms, 50, 600_000);
        problems.check_range("upstreams.wait_ms", self.upstreams.wait_ms, 0, 60_000);
        problems.check_range("heartbeat_interval_s", self.heartbeat_interval_s.into(), 1, 86_400);
    }
}
