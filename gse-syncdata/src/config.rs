//! Configuration of gse_syncdata: every bound and deadline has a key here, with a default that suits a small site.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

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
    /// How long an active instance that says nothing stays the active one. Another one takes over soon after.
    pub lease_ms: u64,
    /// Where identities come from: `cmdb`, `directory`, or `push` (by calls to this service).
    pub source: SourceKind,
    /// CMDB's open API.
    pub cmdb: CmdbConfig,
    /// A directory of identities.
    pub directory: DirectoryConfig,
    /// Identities by calls.
    pub inbox: InboxConfig,
    /// Where the file is on a host.
    pub file: FileConfig,
    /// How it is brought there.
    pub push: PushConfig,
    /// How agents are watched that come, or come back.
    pub agents: AgentsConfig,
    /// Where platforms and operators call; an empty `listen` leaves that to gse_api.
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
            lease_ms: 5_000,
            source: SourceKind::Push,
            cmdb: CmdbConfig::default(),
            directory: DirectoryConfig::default(),
            inbox: InboxConfig::default(),
            file: FileConfig::default(),
            push: PushConfig::default(),
            agents: AgentsConfig::default(),
            http: HttpConfig {
                listen: String::new(),
                ..HttpConfig::default()
            },
            internal: InternalConfig::default(),
            rpc: RpcConfig::default(),
            fleet: FleetConfig::default(),
            authz: AuthzConfig::default(),
            audit: AuditConfig::default(),
            store: StoreConfig::default(),
            runtime: RuntimeConfig::default(),
            log: LogConfig::default(),
            ops: OpsConfig {
                listen: "127.0.0.1:29407".into(),
            },
        }
    }
}

/// Where identities come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// CMDB's open API.
    Cmdb,
    /// Files in a directory.
    Directory,
    /// Calls to this service.
    Push,
}

/// CMDB's open API.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CmdbConfig {
    /// Its address: what stands before `/api/v3`, such as that of its gateway.
    pub url: String,
    /// Path of the search for identities, where a gateway has another one.
    pub search_path: String,
    /// Path of the watch, likewise.
    pub watch_path: String,
    /// `bk_app_code` of the gateway's header; empty: the header is not sent.
    pub app: String,
    /// `bk_app_secret` of it.
    pub secret: String,
    /// Holds the secret, instead of `secret`.
    pub secret_file: Option<PathBuf>,
    /// `bk_username` of it.
    pub user: String,
    /// `X-Bk-Tenant-Id`; empty: the header is not sent.
    pub tenant: String,
    /// More headers, for a CMDB that is called without a gateway.
    pub headers: BTreeMap<String, String>,
    /// `bk_supplier_account` of the calls.
    pub supplier: String,
    /// Authorities that an https address is checked against, PEM.
    pub ca: Option<PathBuf>,
    /// Calls a second at most, all together.
    pub calls_per_second: u32,
    /// So many calls may come at once.
    pub burst: u32,
    /// Hosts of one page of a full pass; CMDB gives 500 at most.
    pub page: u32,
    /// Pages under way at once.
    pub pages_at_once: usize,
    /// How long one page may take.
    pub page_timeout_ms: u64,
    /// Tries of one page, before a full pass is given up.
    pub page_tries: usize,
    /// How long one watch may take; CMDB holds it for 20 s when nothing happens.
    pub watch_timeout_ms: u64,
    /// Failures of the watch one after the other, from which on the cursor is taken for lost.
    pub watch_tries: u32,
    /// First pause after a failure; it doubles.
    pub retry_min_ms: u64,
    /// Longest pause.
    pub retry_max_ms: u64,
    /// Between the beginnings of two full passes.
    pub full_interval_s: u64,
    /// Longest answer.
    pub max_answer_bytes: usize,
}

impl Default for CmdbConfig {
    fn default() -> Self {
        Self {
            url: String::new(),
            search_path: "/api/v3/identifier/host/search".into(),
            watch_path: "/api/v3/event/watch/resource/host_identifier".into(),
            app: String::new(),
            secret: String::new(),
            secret_file: None,
            user: "admin".into(),
            tenant: String::new(),
            headers: BTreeMap::new(),
            supplier: "0".into(),
            ca: None,
            calls_per_second: 200,
            burst: 200,
            page: 200,
            pages_at_once: 4,
            page_timeout_ms: 30_000,
            page_tries: 8,
            watch_timeout_ms: 40_000,
            watch_tries: 5,
            retry_min_ms: 500,
            retry_max_ms: 30_000,
            full_interval_s: 21_600,
            max_answer_bytes: 64 << 20,
        }
    }
}

// The secret belongs in no log.
impl fmt::Debug for CmdbConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CmdbConfig")
            .field("url", &self.url)
            .field("app", &self.app)
            .field("tenant", &self.tenant)
            .finish_non_exhaustive()
    }
}

/// A directory of identities: one file for each host, called by its agent's id or `cloud:ip`; an ending `.json` does not count.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DirectoryConfig {
    /// The directory.
    pub path: PathBuf,
    /// Between two looks.
    pub look_ms: u64,
}

impl Default for DirectoryConfig {
    fn default() -> Self {
        Self {
            path: "/var/lib/gse/hostid.d".into(),
            look_ms: 2_000,
        }
    }
}

/// What was handed over by calls, until the active instance has taken it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InboxConfig {
    /// Hosts of one call at most.
    pub max_hosts: usize,
    /// Hosts that wait at most; a call that does not fit is refused.
    pub max_waiting: usize,
    /// Between two looks.
    pub look_ms: u64,
}

impl Default for InboxConfig {
    fn default() -> Self {
        Self {
            max_hosts: 1_000,
            max_waiting: 10_000,
            look_ms: 300,
        }
    }
}

/// Where the file is on a host.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FileConfig {
    /// On Linux, and everything else that is not Windows.
    pub linux: PlaceConfig,
    /// On Windows.
    pub windows: PlaceConfig,
}

impl Default for FileConfig {
    fn default() -> Self {
        Self {
            linux: PlaceConfig::default(),
            windows: PlaceConfig {
                dir: "c:/gse/data/host".into(),
                account: String::new(),
                owner: "SYSTEM".into(),
                ..PlaceConfig::default()
            },
        }
    }
}

/// One place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PlaceConfig {
    /// Directory; it is made if it is not there.
    pub dir: String,
    /// Name of the file.
    pub name: String,
    /// Account that writes it; empty: root.
    pub account: String,
    /// Whom it belongs to then; empty: the account that writes it.
    pub owner: String,
    /// Permissions, as decimal digits that are read as octal ones: 644 is rw-r--r--.
    pub mode: u32,
}

impl Default for PlaceConfig {
    fn default() -> Self {
        Self {
            dir: "/var/lib/gse/host".into(),
            name: "hostid".into(),
            account: String::new(),
            owner: "root".into(),
            mode: 644,
        }
    }
}

impl PlaceConfig {
    /// Permission bits; `None` if the digits are not octal.
    #[must_use]
    pub fn bits(&self) -> Option<u32> {
        u32::from_str_radix(&self.mode.to_string(), 8)
            .ok()
            .filter(|bits| *bits <= 0o7777)
    }
}

/// How identities are brought to hosts.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PushConfig {
    /// Largest content; a larger one is refused and counted.
    pub max_content_bytes: usize,
    /// Hosts asked together at most.
    pub batch: usize,
    /// Content of hosts that are asked at a time, all together.
    pub memory_bytes: usize,
    /// How long an agent may take for one answer.
    pub answer_timeout_ms: u64,
    /// After so long an agent that has the order but has not begun gives it up.
    pub order_ms: u64,
    /// First pause after a failure of a host; it doubles.
    pub retry_min_ms: u64,
    /// Longest pause.
    pub retry_max_ms: u64,
    /// How many hosts there may be.
    pub max_hosts: usize,
}

impl Default for PushConfig {
    fn default() -> Self {
        Self {
            max_content_bytes: 102_400,
            batch: 1_000,
            memory_bytes: 32 << 20,
            answer_timeout_ms: 10_000,
            order_ms: 60_000,
            retry_min_ms: 2_000,
            retry_max_ms: 1_800_000,
            max_hosts: 1_000_000,
        }
    }
}

/// How agents are watched.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentsConfig {
    /// Between two looks for agents of hosts that wait for them.
    pub look_ms: u64,
    /// In this time every host is looked at once: whether its agent was installed anew.
    pub round_ms: u64,
    /// Hosts looked at together at most.
    pub batch: usize,
}

impl Default for AgentsConfig {
    fn default() -> Self {
        Self {
            look_ms: 2_000,
            round_ms: 60_000,
            batch: 5_000,
        }
    }
}

/// Listener for our own servers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InternalConfig {
    /// Address and port; empty: none.
    pub listen: String,
    /// This server's certificate; gse_task is called with it, too.
    pub tls: Option<TlsFiles>,
}

impl Default for InternalConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:48333".into(),
            tls: None,
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
        self.check_source(problems);
        for (key, place) in [("file.linux", &self.file.linux), ("file.windows", &self.file.windows)] {
            if place.bits().is_none() {
                problems.push(format!("{key}.mode"), "must be octal digits, such as 644");
            }
            if place.dir.is_empty() {
                problems.push(format!("{key}.dir"), "must be a directory");
            }
            if place.name.is_empty() || place.name.contains(['/', '\\']) {
                problems.push(format!("{key}.name"), "must be a file name");
            }
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
        if !self.http.listen.is_empty() {
            for problem in self.http.problems() {
                let (key, rest) = problem.split_once(' ').unwrap_or(("listen", &problem));
                problems.push(format!("http.{key}"), rest);
            }
        }
        self.store.validate("store", problems);
        self.rpc.validate("rpc", problems);
        self.fleet.validate("fleet", problems);
        let (cmdb, push, inbox, agents) = (&self.cmdb, &self.push, &self.inbox, &self.agents);
        for (key, value, least, most) in [
            ("lease_ms", self.lease_ms, 1_000, 120_000),
            ("cmdb.calls_per_second", cmdb.calls_per_second.into(), 1, 100_000),
            ("cmdb.burst", cmdb.burst.into(), 1, 100_000),
            ("cmdb.page", cmdb.page.into(), 1, 500),
            ("cmdb.pages_at_once", cmdb.pages_at_once as u64, 1, 64),
            ("cmdb.page_timeout_ms", cmdb.page_timeout_ms, 100, 600_000),
            ("cmdb.page_tries", cmdb.page_tries as u64, 1, 100),
            ("cmdb.watch_timeout_ms", cmdb.watch_timeout_ms, 1_000, 600_000),
            ("cmdb.watch_tries", cmdb.watch_tries.into(), 1, 1_000),
            ("cmdb.retry_min_ms", cmdb.retry_min_ms, 1, 600_000),
            ("cmdb.retry_max_ms", cmdb.retry_max_ms, cmdb.retry_min_ms, 3_600_000),
            ("cmdb.full_interval_s", cmdb.full_interval_s, 1, 30 * 86_400),
            ("cmdb.max_answer_bytes", cmdb.max_answer_bytes as u64, 1 << 10, 1 << 30),
            ("directory.look_ms", self.directory.look_ms, 50, 3_600_000),
            ("inbox.max_hosts", inbox.max_hosts as u64, 1, 100_000),
            ("inbox.max_waiting", inbox.max_waiting as u64, 1, 10_000_000),
            ("inbox.look_ms", inbox.look_ms, 10, 60_000),
            ("push.max_content_bytes", push.max_content_bytes as u64, 1, 4 << 20),
            ("push.batch", push.batch as u64, 1, 20_000),
            ("push.memory_bytes", push.memory_bytes as u64, 8 << 20, 1 << 40),
            ("push.answer_timeout_ms", push.answer_timeout_ms, 500, 120_000),
            ("push.order_ms", push.order_ms, 1_000, 3_600_000),
            ("push.retry_min_ms", push.retry_min_ms, 1, 3_600_000),
            ("push.retry_max_ms", push.retry_max_ms, push.retry_min_ms, 86_400_000),
            ("push.max_hosts", push.max_hosts as u64, 1, 10_000_000),
            ("agents.look_ms", agents.look_ms, 50, 600_000),
            ("agents.round_ms", agents.round_ms, agents.look_ms, 86_400_000),
            ("agents.batch", agents.batch as u64, 1, 100_000),
        ] {
            problems.check_range(key, value, least, most);
        }
    }
}

impl Config {
    fn check_source(&self, problems: &mut Problems) {
        if self.source != SourceKind::Cmdb {
            return;
        }
        let cmdb = &self.cmdb;
        let url = cmdb.url.parse::<http::Uri>().ok();
        let good = url.as_ref().is_some_and(|url| {
            matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some() && url.query().is_none()
        });
        if !good {
            problems.push(
                "cmdb.url",
                "must be what stands before /api/v3 of CMDB's open API, such as http://bkapi.example.com/api/bk-cmdb/prod",
            );
        } else if url.is_some_and(|url| url.scheme_str() == Some("https")) && cmdb.ca.is_none() {
            problems.push(
                "cmdb.ca",
                "missing: an https address is checked against these authorities",
            );
        }
        for (key, path) in [
            ("cmdb.search_path", &cmdb.search_path),
            ("cmdb.watch_path", &cmdb.watch_path),
        ] {
            if !path.starts_with('/') {
                problems.push(key, "must begin with /");
            }
        }
        if !cmdb.secret.is_empty() && cmdb.secret_file.is_some() {
            problems.push("cmdb.secret_file", "is set beside cmdb.secret; leave one of them out");
        }
        for (name, value) in &cmdb.headers {
            if name.parse::<http::HeaderName>().is_err() || value.parse::<http::HeaderValue>().is_err() {
                problems.push("cmdb.headers", format!("{name:?} is not a header with its value"));
            }
        }
    }
}

#[cfg(test)]
mod tests;
