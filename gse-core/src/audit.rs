//! The audit trail: who asked for what on which hosts, and what was decided, before it is done.
//!
//! One JSON object a line, appended to a file that only one process writes. Every line carries `prev`, the hash of the line before it,
//! and `hash`, the SHA-256 of itself up to that point, so that a line changed, taken out or put in breaks the chain ([`verify`]).
//! [`Audit::record`] returns when the line is written; by default a call whose line cannot be written is refused. Lines never hold
//! secrets, passwords or script text (its digest will do); what goes in is up to the caller, as [`Entry`] has no place for them.
//! Cutting lines off the end of the newest file cannot be seen from the file alone; ship the lines elsewhere if that matters.

mod chain;
mod read;
mod writer;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

pub use chain::{Report, VerifyError, verify, verify_all};
pub use read::{BadLine, Reader, Record, find};

/// Settings of the audit trail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditConfig {
    /// The file; without one nothing is written, which `required` does not allow.
    pub file: Option<PathBuf>,
    /// Refuse what cannot be written down.
    pub required: bool,
    /// Wait until a line is on the disk (fsync), not only written.
    pub sync: bool,
    /// Lines waiting to be written; more are refused.
    pub queue: usize,
    /// How long a line may wait, milliseconds.
    pub write_timeout_ms: u64,
    /// Size at which a file is put aside and the next one begun, bytes.
    pub max_file_bytes: u64,
    /// Files put aside that are kept; the oldest is removed. 0: all.
    pub keep_files: usize,
    /// Lines a second about callers that are not authenticated; more are only counted, so that a stranger cannot fill the disk.
    pub unauthenticated_per_second: u32,
}

impl Default for AuditConfig {
    fn default() -> Self {
        AuditConfig {
            file: None,
            required: true,
            sync: false,
            queue: 4096,
            write_timeout_ms: 5_000,
            max_file_bytes: 256 * 1024 * 1024,
            keep_files: 16,
            unauthenticated_per_second: 20,
        }
    }
}

/// What was decided.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// It is done next.
    #[default]
    Allowed,
    /// A known caller may not.
    Refused,
    /// Nobody knows who the caller is.
    Unauthenticated,
}

/// One line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Names the request in the logs.
    pub request_id: String,
    /// The application; for an unauthenticated caller the one it claimed.
    pub app: String,
    /// The user the application named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// How the caller is known.
    pub via: String,
    /// Address of the peer.
    pub peer: String,
    /// Name of the operation.
    pub operation: String,
    /// The task, if it concerns one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_id: Option<String>,
    /// How many targets.
    #[serde(default)]
    pub targets: u64,
    /// The first few of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub first_targets: Vec<String>,
    /// OS accounts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub accounts: Vec<String>,
    /// SHA-256 of the script, hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// What was decided.
    pub decision: Decision,
    /// Why, for a refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

const FIRST_TARGETS: usize = 8;
const FIRST_ACCOUNTS: usize = 16;
const MAX_TEXT: usize = 256;

impl Entry {
    /// Notes the targets: the number of all, the ids of the first few.
    pub fn with_targets<'a>(mut self, targets: impl Iterator<Item = &'a str>) -> Self {
        for target in targets {
            self.targets += 1;
            if self.first_targets.len() < FIRST_TARGETS {
                self.first_targets.push(target.to_owned());
            }
        }
        self
    }

    /// Notes the accounts, each once, the first sixteen.
    pub fn with_accounts<'a>(mut self, accounts: impl Iterator<Item = &'a str>) -> Self {
        for account in accounts {
            if self.accounts.len() == FIRST_ACCOUNTS {
                break;
            }
            if !self.accounts.iter().any(|known| known == account) {
                self.accounts.push(account.to_owned());
            }
        }
        self
    }

    /// The same as a refusal.
    pub fn refused(mut self, reason: impl Into<String>) -> Self {
        self.decision = Decision::Refused;
        self.reason = Some(reason.into());
        self
    }

    /// Cuts texts that come from outside to a size that a line can bear.
    fn bounded(mut self) -> Self {
        let texts = [
            &mut self.request_id,
            &mut self.app,
            &mut self.via,
            &mut self.peer,
            &mut self.operation,
        ];
        let optional = [
            &mut self.username,
            &mut self.task_id,
            &mut self.digest,
            &mut self.reason,
        ];
        let lists = self.first_targets.iter_mut().chain(&mut self.accounts);
        for text in texts.into_iter().chain(optional.into_iter().flatten()).chain(lists) {
            if text.len() > MAX_TEXT {
                let end = (0..=MAX_TEXT)
                    .rev()
                    .find(|end| text.is_char_boundary(*end))
                    .unwrap_or(0);
                text.truncate(end);
                text.push('…');
            }
        }
        self
    }
}

/// Why a line is not written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuditError {
    /// The settings do not go together.
    #[error("audit: {0}")]
    Config(String),
    /// The file cannot be used.
    #[error("audit file {file}: {reason}")]
    File {
        /// Which.
        file: String,
        /// Why.
        reason: String,
    },
    /// Too many lines are waiting.
    #[error("the audit trail cannot keep up")]
    Full,
    /// It takes too long.
    #[error("the audit trail is not written in time")]
    Timeout,
    /// The writer has ended.
    #[error("the audit trail is closed")]
    Closed,
}

type Written = oneshot::Sender<Result<(), AuditError>>;

/// The audit trail of this process. Cheap to clone; the last clone's end closes the file.
#[derive(Clone)]
pub struct Audit {
    inner: Arc<Inner>,
}

struct Inner {
    queue: Option<mpsc::Sender<(Entry, Written)>>,
    required: bool,
    timeout: Duration,
    strangers: Mutex<Strangers>,
    strangers_per_second: u32,
    failures: AtomicU64,
}

/// The current second's allowance for lines about unauthenticated callers.
struct Strangers {
    second: Instant,
    written: u32,
    left_out: u64,
}

impl std::fmt::Debug for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Audit")
            .field("required", &self.inner.required)
            .finish_non_exhaustive()
    }
}

impl Audit {
    /// Opens the file and goes on where its chain ends (blocking, small). A line that was being written when the process died is
    /// removed, and a line says so; a file whose last line is broken otherwise is refused.
    pub fn open(config: &AuditConfig) -> Result<Self, AuditError> {
        let Some(path) = &config.file else {
            if config.required {
                return Err(AuditError::Config(
                    "audit.file is not set; set it, or audit.required = false to run without a trail".into(),
                ));
            }
            tracing::warn!("no audit trail is written (audit.file is not set)");
            return Ok(Audit::with(None, config));
        };
        if config.queue == 0 || config.max_file_bytes == 0 {
            return Err(AuditError::Config(
                "audit.queue and audit.max_file_bytes have to be positive".into(),
            ));
        }
        let trail = writer::Trail::open(path, config)?;
        let (queue, lines) = mpsc::channel(config.queue);
        std::thread::Builder::new()
            .name("gse-audit".into())
            .spawn(move || trail.run(lines))
            .map_err(|error| AuditError::Config(format!("cannot start the writer: {error}")))?;
        Ok(Audit::with(Some(queue), config))
    }

    /// A trail that goes nowhere, for tests and for processes that decide nothing.
    pub fn disabled() -> Self {
        Audit::with(
            None,
            &AuditConfig {
                required: false,
                ..AuditConfig::default()
            },
        )
    }

    fn with(queue: Option<mpsc::Sender<(Entry, Written)>>, config: &AuditConfig) -> Self {
        Audit {
            inner: Arc::new(Inner {
                queue,
                required: config.required,
                timeout: Duration::from_millis(config.write_timeout_ms.max(1)),
                strangers: Mutex::new(Strangers {
                    second: Instant::now(),
                    written: 0,
                    left_out: 0,
                }),
                strangers_per_second: config.unauthenticated_per_second,
                failures: AtomicU64::new(0),
            }),
        }
    }

    /// Writes a line and returns when it is written (and synced, if so configured). On an error the call has to be refused; when the
    /// trail is not required, failures are logged and counted, and `Ok` is returned.
    pub async fn record(&self, entry: Entry) -> Result<(), AuditError> {
        let Some(queue) = &self.inner.queue else { return Ok(()) };
        let entry = match entry.decision {
            Decision::Unauthenticated => match self.ration(entry) {
                Some(entry) => entry,
                None => return Ok(()),
            },
            Decision::Allowed | Decision::Refused => entry,
        };
        let write = async {
            let (written, done) = oneshot::channel();
            queue
                .try_send((entry.bounded(), written))
                .map_err(|error| match error {
                    mpsc::error::TrySendError::Full(_) => AuditError::Full,
                    mpsc::error::TrySendError::Closed(_) => AuditError::Closed,
                })?;
            match tokio::time::timeout(self.inner.timeout, done).await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_)) => Err(AuditError::Closed),
                Err(_) => Err(AuditError::Timeout),
            }
        };
        match write.await {
            Err(error) => {
                let failures = self.inner.failures.fetch_add(1, Ordering::Relaxed) + 1;
                tracing::error!(%error, failures, required = self.inner.required, "audit line not written");
                if self.inner.required { Err(error) } else { Ok(()) }
            }
            Ok(()) => Ok(()),
        }
    }

    /// Lines that could not be written since the start.
    pub fn failures(&self) -> u64 {
        self.inner.failures.load(Ordering::Relaxed)
    }

    /// Lets through so many lines about strangers a second; the first of the next second says how many were left out.
    fn ration(&self, mut entry: Entry) -> Option<Entry> {
        let mut strangers = self.inner.strangers.lock();
        if strangers.second.elapsed() >= Duration::from_secs(1) {
            strangers.second = Instant::now();
            strangers.written = 0;
        }
        if strangers.written >= self.inner.strangers_per_second {
            strangers.left_out += 1;
            return None;
        }
        strangers.written += 1;
        let left_out = std::mem::take(&mut strangers.left_out);
        if left_out > 0 {
            let reason = entry.reason.take().unwrap_or_default();
            entry.reason = Some(format!("{reason} ({left_out} lines like this left out before)"));
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests;
