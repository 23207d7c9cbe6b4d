//! Configuration of gse_data: every bound and deadline has a key here, with a default that suits a small site.

use std::path::PathBuf;

use gse_core::audit::AuditConfig;
use gse_core::authz::AuthzConfig;
use gse_core::config::{Adopted, Config as CoreConfig, LogConfig, OpsConfig, Problems, RuntimeConfig};
use gse_core::http::HttpConfig;
use gse_core::rpc::RpcConfig;
use gse_core::store::StoreConfig;
use gse_core::tls::TlsFiles;
use gse_proto::datalink::{MAX_BODY, MAX_PAYLOAD};
use serde::{Deserialize, Serialize};

use crate::routes::RoutesConfig;

/// Everything that can be set.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of this instance; unique among the instances that share a store, and the same after a restart.
    pub node_id: String,
    /// Whether it routes records, or is a proxy that passes all of them on to `upstream`. A proxy needs no store and takes no calls: of
    /// `store`, `routes`, `http`, `internal`, `rpc`, `authz`, `audit`, `default_sink` and `file` nothing is used.
    pub run_mode: RunMode,
    /// Servers that a proxy passes records on to.
    pub upstream: UpstreamConfig,
    /// Where records wait for sinks that are slow or gone, and where files go for which no directory is named.
    pub data_dir: PathBuf,
    /// Where records go whose data id nobody has routed: `drop` (they are counted), `discard` (they are counted as delivered), or
    /// `file:<directory>`, a file for each id.
    pub default_sink: String,
    /// Where agents, and proxies, deliver records.
    pub link: LinkConfig,
    /// Where routes are administered; an empty `listen` leaves that to gse_api.
    pub http: HttpConfig,
    /// Where our own servers call, over mutual TLS.
    pub internal: InternalConfig,
    /// Where our own servers hand records over (gRPC over mutual TLS); an empty `listen`: nowhere.
    pub rpc: RpcConfig,
    /// Routes that a site keeps itself.
    pub routes: RoutesConfig,
    /// Who may do what.
    pub authz: AuthzConfig,
    /// Where it is written down.
    pub audit: AuditConfig,
    /// The state store.
    pub store: StoreConfig,
    /// What all sinks have in common.
    pub sinks: SinksConfig,
    /// Files as sinks.
    pub file: FileConfig,
    /// Live tails for operators.
    pub tail: TailConfig,
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
            run_mode: RunMode::Server,
            upstream: UpstreamConfig::default(),
            data_dir: "/var/lib/gse/data".into(),
            default_sink: "drop".into(),
            link: LinkConfig::default(),
            http: HttpConfig {
                listen: "127.0.0.1:59702".into(),
                ..HttpConfig::default()
            },
            internal: InternalConfig::default(),
            rpc: RpcConfig::default(),
            routes: RoutesConfig::default(),
            authz: AuthzConfig::default(),
            audit: AuditConfig::default(),
            store: StoreConfig::default(),
            sinks: SinksConfig::default(),
            file: FileConfig::default(),
            tail: TailConfig::default(),
            runtime: RuntimeConfig::default(),
            log: LogConfig::default(),
            ops: OpsConfig {
                listen: "127.0.0.1:29402".into(),
            },
        }
    }
}

/// What this instance does with records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunMode {
    /// Hands them to sinks, by their routes.
    #[default]
    Server,
    /// Passes them on.
    Proxy,
}

/// Links of a proxy to the servers behind it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UpstreamConfig {
    /// `host:port` of each; one is used at a time, the next when that is gone.
    pub servers: Vec<String>,
    /// This proxy's certificate, one of a server.
    pub tls: Option<TlsFiles>,
    /// Whether batches are compressed (zstd), if the server takes it.
    pub compress: bool,
    /// Connection, TLS handshake and hello together.
    pub connect_timeout_ms: u64,
    /// A server that says nothing for so long is given up.
    pub idle_timeout_ms: u64,
    /// A write that makes no progress for so long ends the link.
    pub write_timeout_ms: u64,
    /// Pause after a failed attempt to connect while nothing waits, about; it doubles up to `retry_max_ms`. While records wait, those of
    /// `sinks` hold.
    pub retry_min_ms: u64,
    /// Longest pause, about.
    pub retry_max_ms: u64,
}

impl Default for UpstreamConfig {
    fn default() -> Self {
        Self {
            servers: vec![],
            tls: None,
            compress: true,
            connect_timeout_ms: 10_000,
            idle_timeout_ms: 30_000,
            write_timeout_ms: 30_000,
            retry_min_ms: 200,
            retry_max_ms: 15_000,
        }
    }
}

/// Listener for records.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkConfig {
    /// Address and port.
    pub listen: String,
    /// A second address, for hosts that were set up for the port of old (58625); empty: none.
    pub listen_v1: String,
    /// `host:port` of all instances that agents are told to use; empty: they use what they were set up with.
    pub advertise: Vec<String>,
    /// This server's certificate.
    pub tls: Option<TlsFiles>,
    /// Whether the one certificate shared by a whole fleet is good for any agent id.
    pub allow_shared_certificate: bool,
    /// Connections that may wait to be accepted.
    pub backlog: u32,
    /// Links at once at most.
    pub max_links: usize,
    /// TLS handshake and hello together.
    pub hello_timeout_ms: u64,
    /// A link that says nothing for so long is ended.
    pub silence_ms: u64,
    /// A write that makes no progress for so long ends the link.
    pub write_stall_ms: u64,
    /// Batches of one sender that may be unacknowledged.
    pub window_batches: u32,
    /// The same in bytes before compression; what one link holds in memory at most.
    pub window_bytes: usize,
    /// Memory for batches of all links together; when it is used up, no more is read until something is delivered.
    pub memory_bytes: usize,
    /// Whether senders are asked to compress.
    pub compress: bool,
    /// Senders of which the last acknowledged batch is remembered.
    pub remember: usize,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:28625".into(),
            listen_v1: String::new(),
            advertise: vec![],
            tls: None,
            allow_shared_certificate: false,
            backlog: 1024,
            max_links: 20_000,
            hello_timeout_ms: 10_000,
            silence_ms: 35_000,
            write_stall_ms: 10_000,
            window_batches: 64,
            window_bytes: 24 << 20,
            memory_bytes: 1 << 30,
            compress: true,
            remember: 200_000,
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
}

impl Default for InternalConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:48331".into(),
            advertise: String::new(),
            tls: None,
        }
    }
}

/// What all sinks have in common.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SinksConfig {
    /// Chunks (the part of one batch that goes to one sink) that wait in memory for one sink.
    pub queue: usize,
    /// Bytes that are handed to a sink in one go, about.
    pub group_bytes: usize,
    /// What a sink has not taken after so long is written to its spool, and acknowledged.
    pub spool_after_ms: u64,
    /// A sink whose queue has been full for so long writes to its spool: it is slower than what comes, and must not hold the others up.
    pub full_after_ms: u64,
    /// One attempt to hand something over may take so long.
    pub attempt_timeout_ms: u64,
    /// Pause after a failed attempt; it doubles up to `retry_max_ms`.
    pub retry_min_ms: u64,
    /// Longest pause.
    pub retry_max_ms: u64,
    /// Bytes on disk for one sink at most.
    pub spool_max_bytes: u64,
    /// A sink whose spool is full holds its senders up for so long without any progress; then what comes for it is dropped and counted.
    pub hold_ms: u64,
    /// Data ids that are counted one by one; all others are counted together.
    pub max_ids: usize,
}

impl Default for SinksConfig {
    fn default() -> Self {
        Self {
            queue: 256,
            group_bytes: 4 << 20,
            spool_after_ms: 200,
            full_after_ms: 50,
            attempt_timeout_ms: 30_000,
            retry_min_ms: 100,
            retry_max_ms: 5_000,
            spool_max_bytes: 8 << 30,
            hold_ms: 5_000,
            max_ids: 20_000,
        }
    }
}

/// How records stand in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Framing {
    /// The record as it is, then a newline. A record may hold newlines itself: use this where records are JSON or lines.
    #[default]
    Line,
    /// Its length as four bytes, big-endian, then the record: any bytes come out as they went in.
    Length,
}

/// Files as sinks: one for each data id (or name of a route), rotated.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FileConfig {
    /// Directories in which streams (`data_log_path`) may write; `data_dir/files` is always one.
    pub allowed_dirs: Vec<PathBuf>,
    /// How records are told apart.
    pub framing: Framing,
    /// A file is put aside when it has so many bytes ...
    pub rotate_bytes: u64,
    /// ... or was begun so long ago.
    pub rotate_s: u64,
    /// Files put aside that are kept, for each name.
    pub keep: usize,
    /// Files open at a time.
    pub max_open: usize,
}

impl Default for FileConfig {
    fn default() -> Self {
        Self {
            allowed_dirs: vec![],
            framing: Framing::Line,
            rotate_bytes: 128 << 20,
            rotate_s: 86_400,
            keep: 5,
            max_open: 256,
        }
    }
}

/// Live tails: records of one data id shown to an operator as they come in.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TailConfig {
    /// Tails at a time; 0: none.
    pub max: usize,
    /// Records that wait for one tail's reader; more are counted and not shown.
    pub queue_records: usize,
    /// The same in bytes.
    pub queue_bytes: usize,
    /// A tail ends after so long, so that its reader has to be allowed anew.
    pub max_s: u64,
}

impl Default for TailConfig {
    fn default() -> Self {
        Self {
            max: 16,
            queue_records: 10_000,
            queue_bytes: 12 << 20,
            max_s: 3_600,
        }
    }
}

/// What becomes of records of ids that nobody has routed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DefaultSink {
    /// Counted as dropped.
    Drop,
    /// Counted as delivered.
    Discard,
    /// To files in this directory.
    File(PathBuf),
}

impl Config {
    /// `default_sink`, read.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn unrouted(&self) -> Result<DefaultSink, String> {
        match self.default_sink.as_str() {
            "drop" => Ok(DefaultSink::Drop),
            "discard" => Ok(DefaultSink::Discard),
            other => match other.strip_prefix("file:") {
                Some(dir) if !dir.is_empty() => Ok(DefaultSink::File(dir.into())),
                _ => Err(format!(
                    "is \"{other}\"; it must be drop, discard, or file: and a directory"
                )),
            },
        }
    }
}

impl UpstreamConfig {
    fn validate(&self, problems: &mut Problems) {
        if self.servers.is_empty() {
            problems.push(
                "upstream.servers",
                "is empty; a proxy passes records on to servers such as [\"10.0.0.1:28625\"]",
            );
        }
        for server in &self.servers {
            let port = server.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            if port.is_none_or(|port| port == 0) {
                problems.push("upstream.servers", format!("has {server:?}, which is not host:port"));
            }
        }
        if self.tls.is_none() {
            problems.push(
                "upstream.tls",
                "missing: set ca, cert and key of this proxy, a server's certificate",
            );
        }
        for (key, value, most) in [
            ("upstream.connect_timeout_ms", self.connect_timeout_ms, 300_000),
            ("upstream.idle_timeout_ms", self.idle_timeout_ms, 600_000),
            ("upstream.write_timeout_ms", self.write_timeout_ms, 300_000),
        ] {
            problems.check_range(key, value, 100, most);
        }
        problems.check_range("upstream.retry_min_ms", self.retry_min_ms, 1, 60_000);
        problems.check_range("upstream.retry_max_ms", self.retry_max_ms, self.retry_min_ms, 600_000);
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

    fn adopt(text: &str) -> Option<Result<Adopted, String>> {
        crate::conf::adopt(text)
    }

    fn validate(&self, problems: &mut Problems) {
        if self.node_id.is_empty() || self.node_id.len() > 64 || self.node_id.contains(['{', '}', ' ']) {
            problems.push(
                "node_id",
                "must be 1 to 64 characters without blanks and braces, unique among the instances of a site",
            );
        }
        if let Err(message) = self.unrouted() {
            problems.push("default_sink", message);
        }
        problems.check_listen("link.listen", &self.link.listen);
        if !self.link.listen_v1.is_empty() {
            problems.check_listen("link.listen_v1", &self.link.listen_v1);
        }
        if self.link.tls.is_none() {
            problems.push(
                "link.tls",
                "missing: set ca, cert and key of this server (gse certs makes them)",
            );
        }
        let proxy = self.run_mode == RunMode::Proxy;
        if proxy {
            self.upstream.validate(problems);
        }
        if !proxy && !self.internal.listen.is_empty() {
            problems.check_listen("internal.listen", &self.internal.listen);
            if self.internal.tls.is_none() {
                problems.push(
                    "internal.tls",
                    "missing: set ca, cert and key of this server (gse certs makes them), or leave internal.listen empty",
                );
            }
        }
        self.rpc.validate("rpc", problems);
        if !proxy && !self.rpc.listen.is_empty() && self.rpc.tls.is_none() && self.internal.tls.is_none() {
            problems.push(
                "rpc.tls",
                "missing: set ca, cert and key of this server (gse certs makes them), here or for internal",
            );
        }
        for problem in self.http.problems() {
            // An empty address means: none.
            if !self.http.listen.is_empty() {
                let (key, rest) = problem.split_once(' ').unwrap_or(("listen", &problem));
                problems.push(format!("http.{key}"), rest);
            }
        }
        if !proxy {
            self.store.validate("store", problems);
        }
        let (link, sinks, file, tail) = (&self.link, &self.sinks, &self.file, &self.tail);
        let body = MAX_BODY as u64;
        for (key, value, least, most) in [
            ("link.backlog", link.backlog.into(), 1, 1 << 16),
            ("link.max_links", link.max_links as u64, 1, 1 << 20),
            ("link.hello_timeout_ms", link.hello_timeout_ms, 100, 60_000),
            ("link.silence_ms", link.silence_ms, 1_000, 600_000),
            ("link.write_stall_ms", link.write_stall_ms, 100, 300_000),
            ("link.window_batches", link.window_batches.into(), 1, 1 << 16),
            ("link.window_bytes", link.window_bytes as u64, body, 1 << 30),
            ("link.memory_bytes", link.memory_bytes as u64, 2 * body, 1 << 40),
            ("link.remember", link.remember as u64, 16, 1 << 24),
            ("sinks.queue", sinks.queue as u64, 1, 1 << 16),
            ("sinks.group_bytes", sinks.group_bytes as u64, 64 << 10, 256 << 20),
            ("sinks.spool_after_ms", sinks.spool_after_ms, 1, 60_000),
            ("sinks.full_after_ms", sinks.full_after_ms, 1, 60_000),
            ("sinks.attempt_timeout_ms", sinks.attempt_timeout_ms, 100, 600_000),
            ("sinks.retry_min_ms", sinks.retry_min_ms, 1, 60_000),
            ("sinks.retry_max_ms", sinks.retry_max_ms, sinks.retry_min_ms, 600_000),
            ("sinks.spool_max_bytes", sinks.spool_max_bytes, 4 * body, 1 << 50),
            ("sinks.hold_ms", sinks.hold_ms, 0, 3_600_000),
            ("sinks.max_ids", sinks.max_ids as u64, 1, 1 << 24),
            ("file.rotate_bytes", file.rotate_bytes, 4_096, 1 << 50),
            ("file.rotate_s", file.rotate_s, 1, 366 * 86_400),
            ("file.keep", file.keep as u64, 0, 100_000),
            ("file.max_open", file.max_open as u64, 1, 1 << 20),
            ("tail.max", tail.max as u64, 0, 1_000),
            ("tail.queue_records", tail.queue_records as u64, 1, 1 << 24),
            // The longest record has to fit.
            ("tail.queue_bytes", tail.queue_bytes as u64, MAX_PAYLOAD as u64, 1 << 30),
            ("tail.max_s", tail.max_s, 1, 7 * 86_400),
        ] {
            problems.check_range(key, value, least, most);
        }
    }
}
