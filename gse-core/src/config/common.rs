//! The tables every configuration has: `[runtime]` and `[ops]` (`[log]` is in [`crate::log`]), and what makes their values valid.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Config, Problems};

/// The `[runtime]` table: the process itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RuntimeConfig {
    /// Holds the process id while the process lives, and keeps a second instance away. None: no such file, and no `--quit`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid_file: Option<PathBuf>,
    /// Receives `{"listener": "address"}` as JSON once every listener is bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub addresses_file: Option<PathBuf>,
    /// Threads that run tasks; one per core when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker_threads: Option<usize>,
    /// How long a stopping process may take to finish what it holds, in milliseconds.
    pub drain_timeout_ms: u64,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            pid_file: None,
            addresses_file: None,
            worker_threads: None,
            drain_timeout_ms: 30_000,
        }
    }
}

/// The `[ops]` table: the listener of `/healthz`, `/readyz` and `/metrics`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OpsConfig {
    /// Where to listen, as `address:port`; port 0 takes a free one, an empty text means no such listener.
    pub listen: String,
}

const MAX_WORKER_THREADS: usize = 1024;
const MAX_DRAIN_MS: u64 = 24 * 3600 * 1000;

/// Checks the tables that every configuration has.
pub(super) fn validate<C: Config>(config: &C, problems: &mut Problems) {
    let runtime = config.runtime();
    if let Some(threads) = runtime.worker_threads
        && !(1..=MAX_WORKER_THREADS).contains(&threads)
    {
        problems.push(
            "runtime.worker_threads",
            format!("is {threads}; it must be between 1 and {MAX_WORKER_THREADS}"),
        );
    }
    if !(1..=MAX_DRAIN_MS).contains(&runtime.drain_timeout_ms) {
        problems.push(
            "runtime.drain_timeout_ms",
            format!(
                "is {}; it must be between 1 and {MAX_DRAIN_MS} milliseconds",
                runtime.drain_timeout_ms
            ),
        );
    }
    if let Err(message) = crate::log::parse_level(&config.log().level) {
        problems.push("log.level", message);
    }
    let listen = &config.ops().listen;
    if !listen.is_empty() {
        problems.check_listen("ops.listen", listen);
    }
}
