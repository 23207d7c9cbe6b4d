//! Settings of the supervisor, the `[proc]` table.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Processes that this host keeps alive for the platforms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProcConfig {
    /// Where the supervisor keeps operations under way; made from the agent's data directory.
    #[serde(skip)]
    pub data_dir: PathBuf,
    /// How the processes that carry commands out are started.
    #[serde(skip)]
    pub self_exec: Vec<OsString>,
    /// The file of hosted processes. Empty: `procinfo.json` in `data_dir`.
    pub info_path: PathBuf,
    /// Between two looks at the processes.
    pub check_interval_ms: u64,
    /// Between two looks through the table of all processes for those without a pid file.
    pub name_scan_ms: u64,
    /// Over how long a process must take more than it may, on average, before it is killed.
    pub limit_window_ms: u64,
    /// A process that ran for so long has started well: failures are counted anew.
    pub settled_ms: u64,
    /// Control commands that run at once.
    pub concurrency: usize,
    /// Processes that are known at most.
    pub max_processes: usize,
    /// Operations that are under way or whose results are kept at most.
    pub max_operations: usize,
    /// How long results are kept.
    pub results_kept_s: u64,
    /// Bytes of a control command's output kept.
    pub max_output: u64,
    /// Longest time that a control command may be given.
    pub max_op_timeout_s: u64,
    /// Longest time for commands that tell a version or health.
    pub status_timeout_ms: u64,
    /// Longest time that one call waits for its operations.
    pub max_wait_ms: u64,
    /// What has changed is reported together after so long.
    pub report_changes_ms: u64,
    /// Everything is reported about so often.
    pub report_all_s: u64,
    /// A report that is not acknowledged for so long is sent again.
    pub report_again_ms: u64,
    /// Data id of events.
    pub event_data_id: u32,
    /// All processes of one namespace together may take this much of the machine's processors, per cent; 0 is no limit. More than that is
    /// told as an event and nothing else is done.
    pub group_cpu_limit: f64,
    /// The same of its memory.
    pub group_mem_limit: f64,
}

impl Default for ProcConfig {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::new(),
            self_exec: Vec::new(),
            info_path: PathBuf::new(),
            check_interval_ms: 2_000,
            name_scan_ms: 10_000,
            limit_window_ms: 30_000,
            settled_ms: 60_000,
            concurrency: 32,
            max_processes: 5_000,
            max_operations: 10_000,
            results_kept_s: 3_600,
            max_output: 64 << 10,
            max_op_timeout_s: 3_600,
            status_timeout_ms: 5_000,
            max_wait_ms: 60_000,
            report_changes_ms: 1_000,
            report_all_s: 300,
            report_again_ms: 30_000,
            event_data_id: 1_100_008,
            group_cpu_limit: 0.0,
            group_mem_limit: 0.0,
        }
    }
}

impl ProcConfig {
    /// Every value that cannot work, as a sentence that begins with the setting's name.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        const DAY_MS: u64 = 86_400_000;
        let ranges = [
            ("check_interval_ms", self.check_interval_ms, 50, 60_000),
            ("name_scan_ms", self.name_scan_ms, 50, DAY_MS),
            ("limit_window_ms", self.limit_window_ms, 100, DAY_MS),
            ("settled_ms", self.settled_ms, 1, DAY_MS),
            ("concurrency", self.concurrency as u64, 1, 1_000),
            ("max_processes", self.max_processes as u64, 1, 100_000),
            ("max_operations", self.max_operations as u64, 16, 1_000_000),
            ("results_kept_s", self.results_kept_s, 1, 7 * 86_400),
            ("max_output", self.max_output, 256, 16 << 20),
            ("max_op_timeout_s", self.max_op_timeout_s, 1, 86_400),
            ("status_timeout_ms", self.status_timeout_ms, 1, 3_600_000),
            ("max_wait_ms", self.max_wait_ms, 1, 3_600_000),
            ("report_changes_ms", self.report_changes_ms, 1, DAY_MS),
            ("report_all_s", self.report_all_s, 1, 7 * 86_400),
            ("report_again_ms", self.report_again_ms, 1, DAY_MS),
        ];
        let mut problems: Vec<String> = ranges
            .iter()
            .filter(|(_, value, low, high)| value < low || value > high)
            .map(|(name, value, low, high)| format!("{name} is {value}; it must lie between {low} and {high}"))
            .collect();
        for (name, limit) in [
            ("group_cpu_limit", self.group_cpu_limit),
            ("group_mem_limit", self.group_mem_limit),
        ] {
            if !(0.0..=100.0).contains(&limit) {
                problems.push(format!("{name} must lie between 0 (no limit) and 100"));
            }
        }
        if !self.info_path.as_os_str().is_empty() && !self.info_path.is_absolute() {
            problems.push("info_path must be an absolute path".to_owned());
        }
        problems
    }

    pub(super) fn check_interval(&self) -> Duration {
        Duration::from_millis(self.check_interval_ms)
    }

    pub(super) fn info_file(&self) -> PathBuf {
        if self.info_path.as_os_str().is_empty() {
            self.data_dir.join("procinfo.json")
        } else {
            self.info_path.clone()
        }
    }
}
