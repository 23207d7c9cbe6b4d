//! Configuration of gse_alarm: every bound and deadline has a key here, with the default of the contract.

use gse_core::config::{Config as CoreConfig, LogConfig, OpsConfig, Problems, RuntimeConfig};
use gse_core::store::StoreConfig;
use gse_core::tls::TlsFiles;
use serde::{Deserialize, Serialize};

/// Everything that can be set.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of this instance; unique among the instances that share a store. One of them is active, the others wait.
    pub node_id: String,
    /// How often agents are heard. As `session.heartbeat_interval_ms` of gse_task.
    pub heartbeat_interval_ms: u64,
    /// A host is overdue when so many heartbeats in a row are missing.
    pub missed_heartbeats: u64,
    /// Between two alarms about a host.
    pub repeat_ms: u64,
    /// Alarms about a host end so long after it was last heard.
    pub give_up_s: u64,
    /// An agent that was stopped on purpose is overdue when it has not come back after so long. One that was uninstalled never is.
    pub stop_grace_s: u64,
    /// Between two looks at all agents, about; looks that take long are made less often.
    pub look_ms: u64,
    /// An active instance that says nothing for so long is replaced.
    pub lease_ms: u64,
    /// When alarms are held back, because the fault may be ours.
    pub hold: HoldConfig,
    /// Where alarms go.
    pub data: DataConfig,
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
            heartbeat_interval_ms: 30_000,
            missed_heartbeats: 3,
            repeat_ms: 60_000,
            give_up_s: 86_400,
            stop_grace_s: 600,
            look_ms: 1_000,
            lease_ms: 5_000,
            hold: HoldConfig::default(),
            data: DataConfig::default(),
            store: StoreConfig::default(),
            runtime: RuntimeConfig::default(),
            log: LogConfig::default(),
            ops: OpsConfig {
                listen: "127.0.0.1:29408".into(),
            },
        }
    }
}

/// When alarms are held back.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HoldConfig {
    /// A host is held back for so long at most, whatever happens.
    pub most_ms: u64,
    /// A node of gse_task, the store or gse_alarm itself that was away for longer than this has been away: agents may have been heard
    /// without anybody noting it, so that new alarms wait until every agent had time to be heard again.
    pub stall_ms: u64,
    /// If so many hosts ...
    pub mass_hosts: u64,
    /// ... and this part of the fleet (in percent) ...
    pub mass_percent: u64,
    /// ... go silent within this time, the fault is taken for ours.
    pub mass_window_ms: u64,
}

impl Default for HoldConfig {
    fn default() -> Self {
        Self {
            most_ms: 300_000,
            stall_ms: 10_000,
            mass_hosts: 20,
            mass_percent: 50,
            mass_window_ms: 60_000,
        }
    }
}

/// Where alarms go.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// `host:port` of gse_data (`rpc.listen` there); one is used at a time, the next when that does not answer.
    pub servers: Vec<String>,
    /// This server's certificate.
    pub tls: Option<TlsFiles>,
    /// Data id of the records.
    pub data_id: u32,
    /// What the records name as their sender (`server`); may be empty.
    pub server: String,
    /// Hosts in one record at most.
    pub hosts_per_record: usize,
    /// Records in one call at most.
    pub records_per_call: usize,
    /// How long connecting may take.
    pub connect_timeout_ms: u64,
    /// How long a call may take.
    pub call_timeout_ms: u64,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            servers: vec![],
            tls: None,
            data_id: 1000,
            server: String::new(),
            hosts_per_record: 500,
            records_per_call: 20,
            connect_timeout_ms: 2_000,
            call_timeout_ms: 10_000,
        }
    }
}

impl Config {
    /// How old a last sign of life is when its host is overdue, milliseconds.
    #[must_use]
    pub fn overdue_ms(&self) -> u64 {
        self.heartbeat_interval_ms.saturating_mul(self.missed_heartbeats)
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
        let data = &self.data;
        if data.servers.is_empty() {
            problems.push(
                "data.servers",
                "is empty; alarms go to instances of gse_data, such as [\"10.0.0.1:48332\"] (their rpc.listen)",
            );
        }
        for server in &data.servers {
            let port = server.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            if port.is_none_or(|port| port == 0) {
                problems.push("data.servers", format!("has {server:?}, which is not host:port"));
            }
        }
        if data.tls.is_none() {
            problems.push(
                "data.tls",
                "missing: set ca, cert and key of this server (gse certs makes them)",
            );
        }
        if data.server.len() > 64 {
            problems.push("data.server", "is longer than an address");
        }
        self.store.validate("store", problems);
        let (interval, hold) = (self.heartbeat_interval_ms, &self.hold);
        for (key, value, least, most) in [
            ("heartbeat_interval_ms", interval, 100, 600_000),
            ("missed_heartbeats", self.missed_heartbeats, 2, 100),
            ("repeat_ms", self.repeat_ms, 1_000, 3_600_000),
            ("give_up_s", self.give_up_s, 60, 7 * 86_400),
            ("stop_grace_s", self.stop_grace_s, 0, 7 * 86_400),
            ("look_ms", self.look_ms, 50, 60_000),
            ("lease_ms", self.lease_ms, 1_000, 8_000),
            ("hold.most_ms", hold.most_ms, 0, 300_000),
            ("hold.mass_hosts", hold.mass_hosts, 2, 1 << 24),
            ("hold.mass_percent", hold.mass_percent, 1, 100),
            ("hold.mass_window_ms", hold.mass_window_ms, 1_000, 600_000),
            ("data.data_id", data.data_id.into(), 1, i32::MAX as u64),
            ("data.hosts_per_record", data.hosts_per_record as u64, 1, 10_000),
            ("data.records_per_call", data.records_per_call as u64, 1, 100),
            ("data.connect_timeout_ms", data.connect_timeout_ms, 100, 60_000),
            ("data.call_timeout_ms", data.call_timeout_ms, 100, 60_000),
        ] {
            problems.check_range(key, value, least, most);
        }
        // A fault that is not noticed as one must be too short to make a living agent overdue.
        let most = self.overdue_ms().saturating_sub(interval).max(501) - 1;
        problems.check_range("hold.stall_ms", hold.stall_ms, 500, most);
    }
}
