//! The agent's settings: who it is, which servers it goes to and how patiently, how much it may queue for them. What a script may
//! use is the executor's own table, `[exec]`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use gse_core::config::{Adopted, LogConfig, OpsConfig, Problems, RuntimeConfig};
use gse_core::tls::TlsFiles;
use gse_proto::ids::AgentId;
use serde::{Deserialize, Serialize};

use crate::data::DataConfig;
use crate::exec::ExecConfig;
use crate::files::FilesConfig;
use crate::message::MessageConfig;
use crate::proc::ProcConfig;

/// Configuration of `gse_agent`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The agent's id. Empty: the id in the certificate if it has one, else `cloud_id:first address`.
    pub agent_id: String,
    /// Cloud area of the host; 0 is the directly reachable one.
    pub cloud_id: i32,
    /// Servers that take agents, `host:port`. The servers tell of more; these are never given up.
    pub servers: Vec<String>,
    /// Which of the servers is tried first.
    pub first_server: FirstServer,
    /// Own certificate and key, and the authority.
    pub tls: TlsFiles,
    /// Everything the agent keeps; one agent per directory.
    pub data_dir: PathBuf,
    /// The host's addresses, the most useful one first. Empty: those of its interfaces.
    pub addresses: Vec<IpAddr>,
    /// Whether this is an agent or a proxy.
    pub run_mode: RunMode,
    /// How soon to try again.
    pub reconnect: ReconnectConfig,
    /// Limits of a session.
    pub session: SessionConfig,
    /// Running scripts.
    pub exec: ExecConfig,
    /// File transfers.
    pub files: FilesConfig,
    /// Data of plugins.
    pub data: DataConfig,
    /// Messages between plugins and the platforms they belong to.
    pub messages: MessageConfig,
    /// Processes that are kept alive.
    pub proc: ProcConfig,
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
            agent_id: String::new(),
            cloud_id: 0,
            servers: Vec::new(),
            first_server: FirstServer::default(),
            tls: TlsFiles {
                ca: PathBuf::new(),
                cert: PathBuf::new(),
                key: PathBuf::new(),
            },
            data_dir: PathBuf::from("/var/lib/gse-agent"),
            addresses: Vec::new(),
            run_mode: RunMode::default(),
            reconnect: ReconnectConfig::default(),
            session: SessionConfig::default(),
            exec: ExecConfig::default(),
            files: FilesConfig::default(),
            data: DataConfig::default(),
            messages: MessageConfig::default(),
            proc: ProcConfig::default(),
            // There is little to do, and each further thread costs every host memory.
            runtime: RuntimeConfig {
                worker_threads: Some(1),
                ..RuntimeConfig::default()
            },
            log: LogConfig::default(),
            ops: OpsConfig::default(),
        }
    }
}

/// Which server is tried first after a start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FirstServer {
    /// Any of them, so that a fleet with one configuration spreads itself.
    #[default]
    Random,
    /// The first of the list.
    Listed,
}

/// What the host is to the servers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunMode {
    /// An ordinary agent.
    #[default]
    Agent,
    /// A proxy of a cloud area.
    Proxy,
}

/// The `[reconnect]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReconnectConfig {
    /// After every address has failed once, the wait lies between 0 and this many milliseconds; it doubles with every round.
    pub min_ms: u64,
    /// The wait never grows beyond this.
    pub max_ms: u64,
    /// After the loss of a session the first try comes within this many milliseconds, so that the agents of a server that went away
    /// do not arrive at the next one all at once.
    pub spread_ms: u64,
    /// A session that lasted this long ends a series of failures.
    pub settled_ms: u64,
}

impl Default for ReconnectConfig {
    fn default() -> Self {
        Self {
            min_ms: 500,
            max_ms: 30_000,
            spread_ms: 3_000,
            settled_ms: 60_000,
        }
    }
}

/// The `[session]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SessionConfig {
    /// For a TCP connection to come about (and the name to be resolved).
    pub connect_timeout_ms: u64,
    /// For the TLS handshake and the server's answer to the hello, together.
    pub handshake_timeout_ms: u64,
    /// After so long without a byte from the server it is asked for one; a heartbeat interval later the session is given up.
    /// 0: three heartbeat intervals.
    pub read_idle_timeout_ms: u64,
    /// For one batch of frames to be taken by the network.
    pub write_timeout_ms: u64,
    /// For the last words when the agent leaves.
    pub leave_timeout_ms: u64,
    /// Frames of control that may wait for the network.
    pub control_queue: usize,
    /// Rows that may wait for the network.
    pub results_queue: usize,
    /// Pieces of output (64 KiB at most each) that may wait for the network.
    pub bulk_queue: usize,
    /// Orders from the server that may wait for the executor.
    pub inbox_queue: usize,
    /// Bytes of such orders.
    pub inbox_bytes: usize,
    /// Longest message taken from the server, in bytes.
    pub max_message: usize,
    /// Calls of other services that are answered at once.
    pub max_calls: usize,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            connect_timeout_ms: 5_000,
            handshake_timeout_ms: 10_000,
            read_idle_timeout_ms: 0,
            write_timeout_ms: 30_000,
            leave_timeout_ms: 2_000,
            control_queue: 64,
            results_queue: 1_024,
            bulk_queue: 256,
            inbox_queue: 1_024,
            inbox_bytes: 128 << 20,
            max_message: gse_proto::frame::DEFAULT_MAX_MESSAGE,
            max_calls: 64,
        }
    }
}

impl SessionConfig {
    /// See `connect_timeout_ms`.
    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    /// See `handshake_timeout_ms`.
    pub(crate) fn handshake_timeout(&self) -> Duration {
        Duration::from_millis(self.handshake_timeout_ms)
    }

    /// See `write_timeout_ms`.
    pub(crate) fn write_timeout(&self) -> Duration {
        Duration::from_millis(self.write_timeout_ms)
    }

    /// See `leave_timeout_ms`.
    pub(crate) fn leave_timeout(&self) -> Duration {
        Duration::from_millis(self.leave_timeout_ms)
    }
}

const HOUR_MS: u64 = 3_600_000;

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

    fn adopt(text: &str) -> Option<Result<Adopted, String>> {
        crate::conf::adopt(text)
    }

    fn validate(&self, problems: &mut Problems) {
        if !self.agent_id.is_empty()
            && let Err(error) = AgentId::parse(&self.agent_id)
        {
            problems.push("agent_id", format!("is not an agent id: {error}"));
        }
        if self.servers.is_empty() {
            problems.push(
                "servers",
                "is empty; name at least one server, such as [\"10.0.0.1:28668\"]",
            );
        }
        for server in &self.servers {
            problems.check_listen("servers", server);
        }
        for (key, path) in [
            ("tls.ca", &self.tls.ca),
            ("tls.cert", &self.tls.cert),
            ("tls.key", &self.tls.key),
        ] {
            if path.as_os_str().is_empty() {
                problems.push(key, "is not set; it must name a PEM file (`gse certs` makes them)");
            }
        }
        if self.data_dir.as_os_str().is_empty() {
            problems.push("data_dir", "is empty; it must name a directory");
        }
        let reconnect = &self.reconnect;
        problems.check_range("reconnect.min_ms", reconnect.min_ms, 1, HOUR_MS);
        problems.check_range(
            "reconnect.max_ms",
            reconnect.max_ms,
            reconnect.min_ms.min(HOUR_MS),
            HOUR_MS,
        );
        problems.check_range("reconnect.spread_ms", reconnect.spread_ms, 0, HOUR_MS);
        problems.check_range("reconnect.settled_ms", reconnect.settled_ms, 0, HOUR_MS);
        let session = &self.session;
        for (key, value) in [
            ("session.connect_timeout_ms", session.connect_timeout_ms),
            ("session.handshake_timeout_ms", session.handshake_timeout_ms),
            ("session.write_timeout_ms", session.write_timeout_ms),
            ("session.leave_timeout_ms", session.leave_timeout_ms),
        ] {
            problems.check_range(key, value, 1, HOUR_MS);
        }
        problems.check_range(
            "session.read_idle_timeout_ms",
            session.read_idle_timeout_ms,
            0,
            24 * HOUR_MS,
        );
        for (key, value) in [
            ("session.control_queue", session.control_queue),
            ("session.results_queue", session.results_queue),
            ("session.bulk_queue", session.bulk_queue),
            ("session.inbox_queue", session.inbox_queue),
            ("session.max_calls", session.max_calls),
        ] {
            problems.check_range(key, value as u64, 4, 1 << 20);
        }
        let smallest = gse_proto::frame::HELLO_MAX_MESSAGE as u64;
        problems.check_range("session.max_message", session.max_message as u64, smallest, 1 << 30);
        problems.check_range(
            "session.inbox_bytes",
            session.inbox_bytes as u64,
            smallest,
            u64::from(u32::MAX >> 3),
        );
        for problem in self.exec.problems() {
            let (name, rest) = problem.split_once(' ').unwrap_or(("", &problem));
            problems.push(format!("exec.{name}"), rest);
        }
        for problem in self.files.problems() {
            let (name, rest) = problem.split_once(' ').unwrap_or(("", &problem));
            problems.push(format!("files.{name}"), rest);
        }
        for problem in self.data.problems() {
            let (name, rest) = problem.split_once(' ').unwrap_or(("", &problem));
            problems.push(format!("data.{name}"), rest);
        }
        for problem in self.messages.problems() {
            let (name, rest) = problem.split_once(' ').unwrap_or(("", &problem));
            problems.push(format!("messages.{name}"), rest);
        }
        for problem in self.proc.problems() {
            let (name, rest) = problem.split_once(' ').unwrap_or(("", &problem));
            problems.push(format!("proc.{name}"), rest);
        }
    }
}
