//! What can be set of the operator's side: who may use `DBA`, what is kept about slow commands and hot keys.

use gse_core::config::Problems;
use serde::{Deserialize, Serialize};

/// The operator's side.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// Whether `DBA` is answered on TCP; without it on the Unix socket alone.
    pub tcp: bool,
    /// Microseconds from which a batch of commands is kept in the slow log; negative is never, 0 keeps all.
    pub slowlog_slower_than_us: i64,
    /// Entries of the slow log.
    pub slowlog_max_len: usize,
    /// Bytes of the slow log.
    pub slowlog_max_bytes: usize,
    /// One batch of so many is looked at for hot keys; 0 is none.
    pub hotkeys_sample: u32,
    /// Seconds of one window of hot keys.
    pub hotkeys_window_s: u64,
    /// Keys counted at a time. A key with more than one part of so many is always among them.
    pub hotkeys_capacity: usize,
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            tcp: true,
            slowlog_slower_than_us: 10_000,
            slowlog_max_len: 128,
            slowlog_max_bytes: 1 << 20,
            hotkeys_sample: 64,
            hotkeys_window_s: 60,
            hotkeys_capacity: 256,
        }
    }
}

impl Admin {
    pub(super) fn validate(&self, problems: &mut Problems) {
        problems.check_range("admin.slowlog_max_len", self.slowlog_max_len as u64, 0, 100_000);
        problems.check_range(
            "admin.slowlog_max_bytes",
            self.slowlog_max_bytes as u64,
            64 << 10,
            1 << 30,
        );
        problems.check_range("admin.hotkeys_window_s", self.hotkeys_window_s, 1, 86_400);
        problems.check_range("admin.hotkeys_capacity", self.hotkeys_capacity as u64, 16, 4096);
    }
}
