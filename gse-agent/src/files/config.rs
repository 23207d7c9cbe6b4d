//! Settings of file transfers, the `[files]` table of the agent's configuration.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What transfers may use, and how patient the agent is with them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FilesConfig {
    /// Where the journal of orders is kept. Set by the agent, not by its configuration.
    #[serde(skip)]
    pub data_dir: PathBuf,
    /// Program and leading arguments that run `worker_main` in this executable. Set by the agent.
    #[serde(skip)]
    pub self_exec: Vec<OsString>,
    /// Accounts that files may be read and written as; `*` is every account.
    pub allowed_accounts: Vec<String>,
    /// Files are read only in these directories and below them, once every link on the way has been followed; `/` is everywhere.
    pub source_dirs: Vec<String>,
    /// Files are written only to these directories and below them, likewise.
    pub target_dirs: Vec<String>,
    /// Content of one transfer at most.
    pub max_bytes: u64,
    /// Files and directories of one transfer at most.
    pub max_entries: u64,
    /// Content that comes inside an order at most.
    pub max_inline_bytes: usize,
    /// So many bytes have to stay free on a file system that is written to.
    pub min_free_disk_bytes: u64,
    /// Transfers that read or write at once; the others wait.
    pub transfers: usize,
    /// Orders remembered at once, those that are over included.
    pub max_orders: usize,
    /// An order that is over so soon is answered with its end.
    pub answer_ms: u64,
    /// Between two reports of progress.
    pub report_ms: u64,
    /// A final report that is not acknowledged is sent again.
    pub resend_ms: u64,
    /// What nobody has acknowledged is remembered for so long after its end.
    pub keep_ms: u64,
    /// A link that is not needed stays open for so long.
    pub link_idle_ms: u64,
    /// For a link to come about.
    pub link_connect_ms: u64,
    /// Longest pause before the next try.
    pub link_retry_ms: u64,
    /// Where other agents connect to fetch content; an address of all interfaces is told to others as those of this host.
    pub peer_address: IpAddr,
    /// The first port of these that is free is taken; 0: any.
    pub peer_port_first: u16,
    /// See above.
    pub peer_port_last: u16,
    /// Connections with other agents at most.
    pub peer_connections: usize,
    /// Swarms in which content is fetched at once; the others wait.
    pub swarms: usize,
    /// Content of one swarm at most that other agents were asked for and that is not yet written: what a swarm takes of memory.
    pub swarm_bytes: u64,
    /// Files of swarms that are open at most, of all transfers together; a few more while they are read or written.
    pub open_files: usize,
    /// Content is offered to others for so long after it was fetched, if the server does not end it before.
    pub seed_ms: u64,
    /// Sent to other agents at most; 0: no limit.
    pub upload_bytes_per_s: u64,
    /// Received from other agents at most; 0: no limit.
    pub download_bytes_per_s: u64,
}

impl Default for FilesConfig {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::new(),
            self_exec: Vec::new(),
            allowed_accounts: vec!["*".to_owned()],
            source_dirs: vec!["/".to_owned()],
            target_dirs: vec!["/".to_owned()],
            max_bytes: 1 << 40,
            max_entries: 200_000,
            max_inline_bytes: 8 << 20,
            min_free_disk_bytes: 1 << 20,
            transfers: 8,
            max_orders: 20_000,
            answer_ms: 1_500,
            report_ms: 1_000,
            resend_ms: 5_000,
            keep_ms: 3_600_000,
            link_idle_ms: 10_000,
            link_connect_ms: 10_000,
            link_retry_ms: 10_000,
            peer_address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            peer_port_first: 60_020,
            peer_port_last: 60_030,
            peer_connections: 64,
            swarms: 8,
            swarm_bytes: 4 << 20,
            open_files: 256,
            seed_ms: 300_000,
            upload_bytes_per_s: 0,
            download_bytes_per_s: 0,
        }
    }
}

impl FilesConfig {
    /// Whether files may be touched as this account at all.
    pub(super) fn allows(&self, account: &str) -> bool {
        self.allowed_accounts
            .iter()
            .any(|allowed| allowed == "*" || allowed == account)
    }

    pub(super) fn answer(&self) -> Duration {
        Duration::from_millis(self.answer_ms)
    }

    /// Every value that cannot work, as a sentence that begins with the setting's name.
    pub fn problems(&self) -> Vec<String> {
        let positive = [
            ("max_bytes", self.max_bytes),
            ("max_entries", self.max_entries),
            ("max_inline_bytes", self.max_inline_bytes as u64),
            ("transfers", self.transfers as u64),
            ("max_orders", self.max_orders as u64),
            ("report_ms", self.report_ms),
            ("resend_ms", self.resend_ms),
            ("link_connect_ms", self.link_connect_ms),
            ("link_retry_ms", self.link_retry_ms),
            ("peer_connections", self.peer_connections as u64),
            ("swarms", self.swarms as u64),
            ("swarm_bytes", self.swarm_bytes),
            ("open_files", self.open_files as u64),
        ];
        let mut problems: Vec<String> = positive
            .iter()
            .filter(|(_, value)| *value == 0)
            .map(|(name, _)| format!("{name} must not be 0"))
            .collect();
        for (name, list) in [
            ("allowed_accounts", &self.allowed_accounts),
            ("source_dirs", &self.source_dirs),
            ("target_dirs", &self.target_dirs),
        ] {
            if list.is_empty() {
                problems.push(format!("{name} must not be empty: nothing would be allowed"));
            }
        }
        if self.peer_port_first > self.peer_port_last {
            problems.push("peer_port_first must not be after peer_port_last".to_owned());
        }
        for (name, dirs) in [("source_dirs", &self.source_dirs), ("target_dirs", &self.target_dirs)] {
            for dir in dirs {
                if !dir.starts_with('/') || dir.contains('\0') || dir.split('/').any(|part| part == "..") {
                    problems.push(format!("{name} must be absolute paths without \"..\", not {dir:?}"));
                }
            }
        }
        problems
    }
}
