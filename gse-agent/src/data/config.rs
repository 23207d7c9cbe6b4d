//! Settings of the data that plugins hand over, the `[data]` table of the agent's configuration.

use std::path::PathBuf;
use std::time::Duration;

use gse_proto::datalink::{MAX_PAYLOAD, RECORD_HEADER};
use serde::{Deserialize, Serialize};

use super::socket::SocketConfig;

/// What records may use on their way, and how patient the agent is with the servers that take them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Where the spool is kept. Set by the agent, not by its configuration.
    #[serde(skip)]
    pub data_dir: PathBuf,
    /// Servers that take data, `host:port`; the contract's `access.data_endpoints`. Empty: records are taken from plugins, dropped and
    /// counted.
    pub servers: Vec<String>,
    /// Batches are compressed when the server can undo it.
    pub enable_compression: bool,
    /// A record waits so long for others that travel with it.
    pub linger_ms: u64,
    /// A batch is sent when it has so many bytes.
    pub batch_bytes: usize,
    /// Bytes of records in memory at most, the one that is being taken not counted. Records longer than a batch are counted by themselves
    /// and have as much.
    pub memory_bytes: usize,
    /// What is not acknowledged after so long is written to the spool.
    pub spool_after_ms: u64,
    /// The spool takes so many bytes on disk; past that the oldest records are dropped.
    pub spool_bytes: u64,
    /// Bytes of one file of the spool.
    pub spool_segment_bytes: u64,
    /// Counters that changed are kept on disk so often.
    pub keep_counts_ms: u64,
    /// For a link to come about, hello and answer included.
    pub connect_timeout_ms: u64,
    /// A server that says nothing for so long is given up; it is asked three times in it.
    pub idle_timeout_ms: u64,
    /// A write that makes no headway for so long ends the link.
    pub write_timeout_ms: u64,
    /// After all servers have failed once, the pause lies between 0 and this; it doubles with every round.
    pub retry_min_ms: u64,
    /// The pause never grows beyond this.
    pub retry_max_ms: u64,
    /// When the agent ends, servers get so long to acknowledge what is on its way; the rest goes to the spool.
    pub leave_ms: u64,
    /// Where plugins hand records over.
    pub socket: SocketConfig,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::new(),
            servers: Vec::new(),
            enable_compression: false,
            linger_ms: 5,
            batch_bytes: 512 << 10,
            memory_bytes: 6 << 20,
            spool_after_ms: 200,
            spool_bytes: 1 << 30,
            spool_segment_bytes: 8 << 20,
            keep_counts_ms: 200,
            connect_timeout_ms: 10_000,
            idle_timeout_ms: 30_000,
            write_timeout_ms: 30_000,
            retry_min_ms: 200,
            retry_max_ms: 15_000,
            leave_ms: 500,
            socket: SocketConfig::default(),
        }
    }
}

impl DataConfig {
    /// What is wrong with the values, each beginning with the key.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        const HOUR: u64 = 3_600_000;
        let mut problems = Vec::new();
        for server in &self.servers {
            let port = server.rsplit_once(':').and_then(|(host, port)| {
                let port = port.parse::<u16>().ok()?;
                (!host.is_empty()).then_some(port)
            });
            if port.is_none_or(|port| port == 0) {
                problems.push(format!("servers has \"{server}\", which is not host:port"));
            }
        }
        let record = (MAX_PAYLOAD + RECORD_HEADER) as u64;
        for (key, value, least, most) in [
            ("linger_ms", self.linger_ms, 0, 10_000),
            ("batch_bytes", self.batch_bytes as u64, 4 << 10, 4 << 20),
            ("memory_bytes", self.memory_bytes as u64, 64 << 10, 1 << 30),
            ("spool_after_ms", self.spool_after_ms, 1, HOUR),
            ("spool_segment_bytes", self.spool_segment_bytes, 64 << 10, 1 << 30),
            ("spool_bytes", self.spool_bytes, 2 * record, 1 << 44),
            ("keep_counts_ms", self.keep_counts_ms, 10, HOUR),
            ("connect_timeout_ms", self.connect_timeout_ms, 1, HOUR),
            ("idle_timeout_ms", self.idle_timeout_ms, 10, HOUR),
            ("write_timeout_ms", self.write_timeout_ms, 1, HOUR),
            ("retry_min_ms", self.retry_min_ms, 1, HOUR),
            ("retry_max_ms", self.retry_max_ms, self.retry_min_ms.min(HOUR), HOUR),
            ("leave_ms", self.leave_ms, 0, HOUR),
        ] {
            if value < least || value > most {
                problems.push(format!("{key} is {value}; it must be between {least} and {most}"));
            }
        }
        if self.spool_segment_bytes.saturating_mul(2) > self.spool_bytes {
            problems.push(format!(
                "spool_segment_bytes is {}; two segments must fit into spool_bytes ({})",
                self.spool_segment_bytes, self.spool_bytes
            ));
        }
        problems.extend(
            self.socket
                .problems()
                .into_iter()
                .map(|problem| format!("socket.{problem}")),
        );
        problems
    }

    /// See `linger_ms`.
    pub(super) fn linger(&self) -> Duration {
        Duration::from_millis(self.linger_ms)
    }

    /// See `spool_after_ms`.
    pub(super) fn spool_after(&self) -> Duration {
        Duration::from_millis(self.spool_after_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_allowed_and_nonsense_is_not() {
        assert_eq!(DataConfig::default().problems(), Vec::<String>::new());
        let wrong = DataConfig {
            servers: vec!["nowhere".to_owned(), "host:0".to_owned(), "10.0.0.1:28625".to_owned()],
            batch_bytes: 1,
            spool_segment_bytes: 1 << 30,
            ..DataConfig::default()
        };
        let problems = wrong.problems();
        assert_eq!(problems.len(), 4, "{problems:?}");
    }
}
