//! The configuration of gse_dba.

pub mod admin;
pub mod cluster;
mod migrate;
pub mod sharded;

use std::path::PathBuf;

use gse_core::config::{Config as ConfigTrait, LogConfig, OpsConfig, Problems, RuntimeConfig};
use serde::{Deserialize, Serialize};

pub use admin::Admin;
pub use cluster::Cluster;
pub use migrate::Migrate;
pub use sharded::Sharded;

/// Everything that can be set.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address of the RESP listener; port 0 takes any free port, "" has none.
    pub listen: String,
    /// A Unix socket beside it.
    pub unix_socket: Option<PathBuf>,
    /// What clients must show. The store never runs without one.
    pub password: Option<String>,
    /// A file that holds the password (its first line), instead of `password`.
    pub password_file: Option<PathBuf>,
    /// A file of users besides `default`: who they are, what they may do. In the form of Redis's ACL files.
    pub users_file: Option<PathBuf>,
    /// TLS on the RESP listener.
    pub tls: Option<Tls>,
    /// Where the data is.
    pub backend: Backend,
    pub embedded: Embedded,
    #[serde(alias = "endpoint")]
    pub single: Single,
    pub sharded: Sharded,
    pub cluster: Cluster,
    pub limits: Limits,
    pub migrate: Migrate,
    pub admin: Admin,
    /// Threads that serve clients when the data is in Redis; 0: one for every two processors, at most eight.
    pub workers: usize,
    pub runtime: RuntimeConfig,
    pub log: LogConfig,
    pub ops: OpsConfig,
}

/// Where the data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// In this process, durable in a directory.
    Embedded,
    /// In one Redis, or another server that speaks like one.
    #[serde(alias = "endpoint")]
    Single,
    /// In several groups of Redis, each a primary and its copies.
    Sharded,
    /// In a Redis Cluster or a Valkey Cluster.
    Cluster,
}

impl Backend {
    /// As it is written in a configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Single => "single",
            Self::Sharded => "sharded",
            Self::Cluster => "cluster",
        }
    }
}

/// TLS files of the RESP listener.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    pub cert: PathBuf,
    pub key: PathBuf,
    /// When set, clients must show a certificate of this authority as well as the password.
    #[serde(default)]
    pub ca: Option<PathBuf>,
}

/// When an acknowledged write is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Written to the operating system before the reply: survives the death of the process.
    Write,
    /// Synced to the disk before the reply, one sync for all that came together: survives a power cut.
    Always,
}

/// What to do at start with a file that is damaged in the middle. A log that is merely cut short at its end is always cut there and reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnCorruption {
    /// Do not start; say what is damaged.
    Refuse,
    /// Keep what is before the damage, set the damaged file aside, start.
    Salvage,
}

/// The embedded store.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Embedded {
    /// The directory that belongs to this store alone.
    pub dir: PathBuf,
    pub durability: Durability,
    /// MiB of data, as reckoned, past which writes that grow are refused; 0 is no bound. Compaction and recovery from a full disk take the same again for a while.
    pub max_memory_mb: u64,
    /// MiB that snapshot and log may take on the disk, past which writes are refused; 0 is no bound.
    pub max_disk_mb: u64,
    /// KiB of log below which there is no compaction.
    pub compact_min_kb: u64,
    /// Compact when the log is this many times as large as the last snapshot.
    pub compact_factor: u64,
    pub on_corruption: OnCorruption,
}

/// One Redis behind.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Single {
    /// `redis://[[user]:password@]host:port` or `redis+unix:///path`.
    pub url: String,
    /// Its password, instead of one in the URL.
    pub password: Option<String>,
    /// A file that holds its password.
    pub password_file: Option<PathBuf>,
    /// Shared connections for each of RESP2 and RESP3; rounded up to a multiple of the workers.
    pub connections: usize,
    /// Private connections (transactions, blocking commands, subscriptions) at once.
    pub max_private: usize,
    /// Batches of commands waiting for one shared connection.
    pub max_inflight: usize,
    pub connect_timeout_ms: u64,
    /// A reply that takes longer counts as a dead connection.
    pub reply_timeout_ms: u64,
    /// Longest wait between attempts to connect again; the wait is random up to a bound that doubles.
    pub reconnect_max_ms: u64,
}

/// What clients may do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    pub max_clients: usize,
    /// Arguments of one command.
    pub max_args: usize,
    /// Bytes of one argument.
    pub max_bulk_bytes: usize,
    /// Bytes of one command.
    pub query_buffer_bytes: usize,
    /// Commands taken from one read.
    pub max_batch: usize,
    /// Bytes of replies after which a batch is sent in parts.
    pub output_soft_bytes: usize,
    /// Bytes of one reply past which the client is disconnected.
    pub output_buffer_bytes: usize,
    /// Bytes of replies that clients have not taken yet, all together: past it the client with the most is disconnected.
    pub all_output_bytes: usize,
    /// Milliseconds a client may stay silent between commands; 0 is for ever.
    pub idle_timeout_ms: u64,
    /// Milliseconds until a new connection must have shown its password (and finished its TLS handshake), and until a begun command must be whole; a long
    /// command has a second more for each 64 KiB of it that have come.
    pub handshake_timeout_ms: u64,
    /// Seconds of silence after which the system asks whether a TCP client is still there; 0 is never.
    pub keepalive_s: u64,
    /// Milliseconds that a client may take to accept replies.
    pub write_timeout_ms: u64,
    /// Batches waiting for the embedded engine.
    pub engine_queue: usize,
    /// Channels and patterns that one client may be subscribed to.
    pub max_subscriptions: usize,
    /// Messages waiting for one subscriber, past which it is disconnected.
    pub subscriber_messages: usize,
    /// Bytes of messages waiting for one subscriber, past which it is disconnected.
    pub subscriber_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:58817".into(),
            unix_socket: None,
            password: None,
            password_file: None,
            users_file: None,
            tls: None,
            backend: Backend::Embedded,
            embedded: Embedded::default(),
            single: Single::default(),
            sharded: Sharded::default(),
            cluster: Cluster::default(),
            limits: Limits::default(),
            migrate: Migrate::default(),
            admin: Admin::default(),
            workers: 0,
            runtime: RuntimeConfig::default(),
            log: LogConfig::default(),
            ops: OpsConfig::default(),
        }
    }
}

impl Default for Embedded {
    fn default() -> Self {
        Self {
            dir: "/var/lib/gse/dba".into(),
            durability: Durability::Write,
            max_memory_mb: 4096,
            max_disk_mb: 0,
            compact_min_kb: 64 << 10,
            compact_factor: 2,
            on_corruption: OnCorruption::Refuse,
        }
    }
}

impl Default for Single {
    fn default() -> Self {
        Self {
            url: "redis://127.0.0.1:6379".into(),
            password: None,
            password_file: None,
            connections: 4,
            max_private: 1000,
            max_inflight: 4096,
            connect_timeout_ms: 2000,
            reply_timeout_ms: 10_000,
            reconnect_max_ms: 2000,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_clients: 10_000,
            max_args: 1 << 20,
            max_bulk_bytes: 512 << 20,
            query_buffer_bytes: 1 << 30,
            max_batch: 4096,
            output_soft_bytes: 4 << 20,
            output_buffer_bytes: 1 << 30,
            all_output_bytes: 4 << 30,
            idle_timeout_ms: 0,
            handshake_timeout_ms: 10_000,
            keepalive_s: 300,
            write_timeout_ms: 60_000,
            engine_queue: 1024,
            max_subscriptions: 100_000,
            subscriber_messages: 8192,
            subscriber_bytes: 32 << 20,
        }
    }
}

fn first_line(path: &std::path::Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| anyhow::anyhow!("cannot read the password file {}: {e}", path.display()))?;
    let line = text.lines().next().unwrap_or_default().trim();
    anyhow::ensure!(!line.is_empty(), "the password file {} is empty", path.display());
    Ok(line.to_owned())
}

impl Config {
    /// The password that clients must show. Blocking: it may read a file.
    ///
    /// # Errors
    /// When there is none, or its file cannot be read.
    pub fn resolve_password(&self) -> anyhow::Result<String> {
        match (&self.password, &self.password_file) {
            (Some(p), None) if !p.is_empty() => Ok(p.clone()),
            (None, Some(file)) => first_line(file),
            (Some(_), Some(_)) => anyhow::bail!("both password and password_file are set; keep one"),
            _ => anyhow::bail!(
                "no password is configured, and the store never runs without one: set password_file (or password)"
            ),
        }
    }
}

impl Config {
    /// Who may connect. Blocking: it may read files.
    ///
    /// # Errors
    /// When there is no password, or a file cannot be read or understood, or anybody on the network could come in without a password.
    pub(crate) fn resolve_users(&self) -> anyhow::Result<crate::users::Users> {
        let mut users = crate::users::Users::of_password(&self.resolve_password()?);
        if let Some(file) = &self.users_file {
            users.read(file)?;
        }
        let local = self.listen.is_empty()
            || ["127.", "[::1]:", "localhost:"]
                .iter()
                .any(|p| self.listen.starts_with(p));
        anyhow::ensure!(
            local || users.open().is_none(),
            "the user default is nopass in users_file, and listen is {}: without a password only a loopback address can be served",
            self.listen
        );
        Ok(users)
    }
}

impl Single {
    pub(crate) fn resolve_password(&self) -> anyhow::Result<Option<String>> {
        match (&self.password, &self.password_file) {
            (Some(p), None) => Ok(Some(p.clone())),
            (None, Some(file)) => first_line(file).map(Some),
            (Some(_), Some(_)) => anyhow::bail!("both single.password and single.password_file are set; keep one"),
            (None, None) => Ok(None),
        }
    }
}

impl ConfigTrait for Config {
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
        if self.listen.is_empty() {
            if self.unix_socket.is_none() {
                problems.push(
                    "listen",
                    "is empty and there is no unix_socket either: nobody could connect",
                );
            }
        } else {
            problems.check_listen("listen", &self.listen);
        }
        match (&self.password, &self.password_file) {
            (None, None) => problems.push(
                "password_file",
                "is not set and neither is password: the store never runs without one",
            ),
            (Some(_), Some(_)) => problems.push("password", "and password_file are both set; keep one"),
            (Some(p), None) if p.is_empty() => problems.push("password", "is empty: the store never runs without one"),
            _ => {}
        }
        let l = &self.limits;
        problems.check_range("limits.max_clients", l.max_clients as u64, 1, 1_000_000);
        problems.check_range("limits.max_args", l.max_args as u64, 16, 16 << 20);
        problems.check_range("limits.max_bulk_bytes", l.max_bulk_bytes as u64, 64 << 10, 512 << 20);
        problems.check_range(
            "limits.query_buffer_bytes",
            l.query_buffer_bytes as u64,
            64 << 10,
            1 << 30,
        );
        problems.check_range("limits.max_batch", l.max_batch as u64, 1, 1 << 20);
        problems.check_range("limits.output_soft_bytes", l.output_soft_bytes as u64, 4096, 1 << 30);
        problems.check_range(
            "limits.output_buffer_bytes",
            l.output_buffer_bytes as u64,
            64 << 10,
            4 << 30,
        );
        problems.check_range(
            "limits.all_output_bytes",
            l.all_output_bytes as u64,
            l.output_buffer_bytes as u64,
            1 << 40,
        );
        problems.check_range("limits.keepalive_s", l.keepalive_s, 0, 32_000);
        problems.check_range("limits.handshake_timeout_ms", l.handshake_timeout_ms, 10, 3_600_000);
        problems.check_range("limits.write_timeout_ms", l.write_timeout_ms, 10, 3_600_000);
        problems.check_range("limits.engine_queue", l.engine_queue as u64, 1, 1 << 20);
        self.migrate.validate(problems);
        problems.check_range("limits.max_subscriptions", l.max_subscriptions as u64, 1, 10_000_000);
        problems.check_range("limits.subscriber_messages", l.subscriber_messages as u64, 16, 1 << 20);
        problems.check_range("limits.subscriber_bytes", l.subscriber_bytes as u64, 64 << 10, 4 << 30);
        self.admin.validate(problems);
        problems.check_range("workers", self.workers as u64, 0, 256);
        match self.backend {
            Backend::Embedded => {
                if self.embedded.dir.as_os_str().is_empty() {
                    problems.push("embedded.dir", "is empty: the store needs a directory of its own");
                }
                problems.check_range("embedded.compact_factor", self.embedded.compact_factor, 1, 1000);
            }
            Backend::Single => {
                if let Err(e) = crate::single::dial::Target::parse(&self.single, None) {
                    problems.push("single.url", format!("{e:#}"));
                }
                problems.check_range("single.connections", self.single.connections as u64, 1, 256);
                problems.check_range("single.max_private", self.single.max_private as u64, 1, 100_000);
                problems.check_range("single.max_inflight", self.single.max_inflight as u64, 1, 1 << 20);
                problems.check_range("single.connect_timeout_ms", self.single.connect_timeout_ms, 10, 600_000);
                problems.check_range("single.reply_timeout_ms", self.single.reply_timeout_ms, 10, 3_600_000);
                problems.check_range("single.reconnect_max_ms", self.single.reconnect_max_ms, 20, 600_000);
            }
            Backend::Sharded => self.sharded.validate(problems),
            Backend::Cluster => self.cluster.validate(problems),
        }
    }
}
