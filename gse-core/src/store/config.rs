//! The `[store]` table.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::target::Target;
use crate::config::{Problems, mask_url};

/// How to reach the store.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// `redis://`, `rediss://`, `redis+unix://`, `redis+cluster://` or `rediss+cluster://`; see [`crate::store`].
    pub url: String,
    /// Holds the password, instead of the URL. Read at every connection, so that it can be changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// For a connection to be made, log-in included, in milliseconds.
    pub connect_timeout_ms: u64,
    /// For a batch to be answered, waiting for a free place included, in milliseconds.
    pub command_timeout_ms: u64,
    /// A batch is given up earlier when nothing at all comes from the store for so long, in milliseconds: what hangs is said to
    /// hang while a caller still listens.
    pub silence_timeout_ms: u64,
    /// Batches on their way at a time; more wait.
    pub max_inflight_batches: usize,
    /// Certificates (PEM) to trust over TLS, instead of the system's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_ca: Option<PathBuf>,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            url: "redis://127.0.0.1:6379/0".to_owned(),
            password_file: None,
            connect_timeout_ms: 2_000,
            command_timeout_ms: 5_000,
            silence_timeout_ms: 1_500,
            max_inflight_batches: 256,
            tls_ca: None,
        }
    }
}

impl StoreConfig {
    /// Says what is wrong with the values; `prefix` is the table's key, `store` as a rule.
    pub fn validate(&self, prefix: &str, problems: &mut Problems) {
        problems.check_range(
            &format!("{prefix}.connect_timeout_ms"),
            self.connect_timeout_ms,
            1,
            600_000,
        );
        problems.check_range(
            &format!("{prefix}.command_timeout_ms"),
            self.command_timeout_ms,
            1,
            600_000,
        );
        problems.check_range(
            &format!("{prefix}.silence_timeout_ms"),
            self.silence_timeout_ms,
            100,
            600_000,
        );
        problems.check_range(
            &format!("{prefix}.max_inflight_batches"),
            self.max_inflight_batches as u64,
            1,
            1_000_000,
        );
        if let Err(error) = Target::from_config(self) {
            problems.push(format!("{prefix}.url"), format!("is wrong: {error}"));
        }
    }
}

impl fmt::Debug for StoreConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreConfig")
            .field("url", &mask_url(&self.url))
            .finish_non_exhaustive()
    }
}
