//! Settings of the executor, the `[exec]` table of the agent's configuration.

use std::ffi::OsString;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What scripts may use and how patient the agent is with them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExecConfig {
    /// Where the journal and the output are kept; one agent per directory. Set by the agent, not by its configuration.
    #[serde(skip)]
    pub data_dir: PathBuf,
    /// Program and leading arguments that run [`super::runner_main`] in this executable. Set by the agent.
    #[serde(skip)]
    pub self_exec: Vec<OsString>,
    /// Identity of the host, so that a journal copied from another one is noticed. Empty: the host's machine id.
    #[serde(skip)]
    pub machine_id: String,
    /// Targets that run at once.
    pub concurrency: u32,
    /// Targets that wait for their turn.
    pub queue: u32,
    /// Longest wait for a turn.
    pub queue_wait_ms: u64,
    /// Most output kept of one atomic task, in bytes, whatever is asked for.
    pub max_output: u32,
    /// Longest time limit of one atomic task, whatever is asked for.
    pub max_timeout_ms: u64,
    /// Each script gets a control group (version 2) of its own where the host allows that.
    pub control_groups: bool,
    /// From asking a script's processes to end to killing them.
    pub kill_grace_ms: u64,
    /// The output has to be quiet for so long after the main process has ended.
    pub quiet_after_exit_ms: u64,
    /// And is not waited for longer than this.
    pub max_chatter_after_exit_ms: u64,
    /// A runner that has not ended so long after everything that it waits for was over is ended by the agent.
    pub runner_margin_ms: u64,
    /// Runners that may stay when their script is over, to read what its daemons write to its output. The oldest beyond it leave;
    /// then writing there ends such a daemon, unless it ignores SIGPIPE.
    pub max_lingering: usize,
    /// Most atomic tasks of one target.
    pub max_atomic_tasks: u32,
    /// Names of script files that are cleaned up begin with this.
    pub script_prefix: String,
    /// And are so old.
    pub script_expire_hours: u64,
    /// Files removed in one go.
    pub script_clean_batch: usize,
    /// Between two looks for old script files.
    pub script_clean_interval_ms: u64,
    /// Script directories remembered for cleaning; the oldest is dropped for a new one.
    pub script_dirs_remembered: usize,
    /// Accounts that scripts may run as; `*` is every account.
    pub allowed_accounts: Vec<String>,
    /// Script files are written only to these directories and to what is below them, once every link on the way has been followed.
    /// Absolute paths without links; `/` is everywhere.
    pub allowed_script_dirs: Vec<String>,
    /// Bytes that the script files of one target may have together.
    pub max_script_bytes: usize,
    /// Bytes that script files (those that begin with `script_prefix`) may take together in one directory. 0: no limit.
    pub max_script_dir_bytes: u64,
    /// A script file is not written when less than this would stay free on its file system.
    pub min_free_disk_bytes: u64,
    /// Bytes that journal and output may take together before new targets are refused.
    pub max_spool_bytes: u64,
    /// Targets that may be kept, those that wait for the server's acknowledgement included.
    pub max_spool_entries: usize,
    /// Refusals remembered until they are acknowledged.
    pub max_refusals: usize,
    /// What is not acknowledged for so long is sent again.
    pub resend_ms: u64,
    /// Output waits so long for more of it before it is sent.
    pub flush_ms: u64,
    /// The same for scripts that go on writing.
    pub max_flush_ms: u64,
    /// A script that has ended before this is never reported as running.
    pub report_running_after_ms: u64,
    /// Between two looks at scripts that an earlier agent process started.
    pub adopted_poll_ms: u64,
    /// Reports waiting for the session.
    pub report_queue: usize,
}

impl Default for ExecConfig {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::new(),
            self_exec: Vec::new(),
            machine_id: String::new(),
            concurrency: 100,
            queue: 4096,
            queue_wait_ms: 10_000,
            max_output: 5 * 1024 * 1024,
            max_timeout_ms: 259_200_000,
            control_groups: true,
            kill_grace_ms: 2000,
            quiet_after_exit_ms: 1000,
            max_chatter_after_exit_ms: 5000,
            runner_margin_ms: 30_000,
            max_lingering: 64,
            max_atomic_tasks: 256,
            script_prefix: "bk_gse_script_".to_owned(),
            script_expire_hours: 72,
            script_clean_batch: 100,
            script_clean_interval_ms: 3_600_000,
            script_dirs_remembered: 256,
            allowed_accounts: vec!["*".to_owned()],
            allowed_script_dirs: vec!["/".to_owned()],
            max_script_bytes: 32 * 1024 * 1024,
            max_script_dir_bytes: 1024 * 1024 * 1024,
            min_free_disk_bytes: 1024 * 1024,
            max_spool_bytes: 4 * 1024 * 1024 * 1024,
            max_spool_entries: 20_000,
            max_refusals: 20_000,
            resend_ms: 5000,
            flush_ms: 100,
            max_flush_ms: 1000,
            report_running_after_ms: 100,
            adopted_poll_ms: 200,
            report_queue: 64,
        }
    }
}

impl ExecConfig {
    /// Whether scripts may run as this account at all.
    pub fn allows(&self, account: &str) -> bool {
        self.allowed_accounts
            .iter()
            .any(|allowed| allowed == "*" || allowed == account)
    }

    /// Every value that cannot work, as a sentence that begins with the setting's name.
    pub fn problems(&self) -> Vec<String> {
        let positive = [
            ("concurrency", u64::from(self.concurrency)),
            ("max_output", u64::from(self.max_output)),
            ("max_timeout_ms", self.max_timeout_ms),
            ("max_atomic_tasks", u64::from(self.max_atomic_tasks)),
            ("script_clean_interval_ms", self.script_clean_interval_ms),
            ("script_clean_batch", self.script_clean_batch as u64),
            ("max_script_bytes", self.max_script_bytes as u64),
            ("max_spool_bytes", self.max_spool_bytes),
            ("max_spool_entries", self.max_spool_entries as u64),
            ("resend_ms", self.resend_ms),
            ("flush_ms", self.flush_ms),
            ("adopted_poll_ms", self.adopted_poll_ms),
            ("report_queue", self.report_queue as u64),
        ];
        let mut problems: Vec<String> = positive
            .iter()
            .filter(|(_, value)| *value == 0)
            .map(|(name, _)| format!("{name} must not be 0"))
            .collect();
        if self.script_prefix.is_empty() {
            problems.push("script_prefix must not be empty: every old file would be removed".to_owned());
        }
        if self.allowed_accounts.is_empty() {
            problems.push("allowed_accounts must name an account, or \"*\" for all of them".to_owned());
        }
        if self.allowed_script_dirs.is_empty() {
            problems.push("allowed_script_dirs must name a directory, or \"/\" for all of them".to_owned());
        }
        for dir in &self.allowed_script_dirs {
            if !dir.starts_with('/') || dir.contains('\0') || dir.split('/').any(|part| part == "..") {
                problems.push(format!(
                    "allowed_script_dirs must be absolute paths without \"..\", not {dir:?}"
                ));
            }
        }
        problems
    }
}
