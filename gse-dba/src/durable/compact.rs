//! Compaction: when the log has outgrown the data, a new snapshot takes its place. A helper thread builds it from the closed files alone, as recovery would, so the engine never
//! stalls for it; the price is a second copy of the data in memory while it runs.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::log::Journal;
use super::{Settings, list, log_path, recover, snapshot, snapshot_path, sync_dir};
use crate::metrics::Metrics;

const RETRY_FIRST: Duration = Duration::from_secs(5);
const RETRY_LAST: Duration = Duration::from_secs(300);

struct Running {
    result: Receiver<io::Result<u64>>,
    thread: JoinHandle<()>,
    started: Instant,
}

pub(crate) struct Compaction {
    settings: Arc<Settings>,
    running: Option<Running>,
    /// Not before, after a failure.
    not_before: Option<Instant>,
    retry: Duration,
    /// A rotated log whose compaction has failed is compacted again without another rotation.
    pending: Option<u64>,
}

impl Compaction {
    pub(crate) fn new(settings: Arc<Settings>) -> Self {
        Self {
            settings,
            running: None,
            not_before: None,
            retry: RETRY_FIRST,
            pending: None,
        }
    }

    /// Begins a compaction when the log is large enough for one, or when `wanted` anyway.
    pub(crate) fn start_if_useful(&mut self, journal: &mut Journal, wanted: bool) {
        let log = journal.total().saturating_sub(journal.snapshot);
        // In need of room (or of a file that can be trusted) much less is worth it, but not nothing.
        let useful = journal.is_tainted() || log > (journal.snapshot / 4).max(64 << 10);
        let large = log
            > self
                .settings
                .compact_min
                .max(journal.snapshot.saturating_mul(self.settings.compact_factor));
        // With a bound on the disk there is no use in waiting until it is reached.
        let tight = self.settings.max_disk > 0 && log > self.settings.max_disk / 2 && log > journal.snapshot;
        if self.running.is_some()
            || !(large || (wanted && useful) || tight)
            || self.not_before.is_some_and(|t| Instant::now() < t)
        {
            return;
        }
        let upto = match self.pending {
            Some(generation) if !journal.is_tainted() && journal.len < self.settings.compact_min => Ok(generation),
            _ => journal.rotate(),
        };
        let started = upto.and_then(|upto| {
            self.pending = Some(upto);
            let (send, result) = sync_channel(1);
            let settings = Arc::clone(&self.settings);
            let thread = std::thread::Builder::new()
                .name("gse_dba-compact".into())
                .spawn(move || {
                    // The engine that asked may be gone by now; then nobody wants to know.
                    let _ = send.send(compact(&settings, upto));
                })?;
            Ok(Running {
                result,
                thread,
                started: Instant::now(),
            })
        });
        match started {
            Ok(running) => self.running = Some(running),
            Err(e) => self.failed(&e),
        }
    }

    fn failed(&mut self, e: &io::Error) {
        tracing::warn!(error = %e, retry_in = ?self.retry, "the log could not be compacted; it goes on growing until it can");
        self.not_before = Some(Instant::now() + self.retry);
        self.retry = (self.retry * 2).min(RETRY_LAST);
    }

    /// Takes note of a compaction that has ended.
    pub(crate) fn poll(&mut self, journal: &mut Journal, metrics: &Metrics) {
        let Some(running) = &self.running else { return };
        let result = match running.result.try_recv() {
            Err(TryRecvError::Empty) => return,
            Err(TryRecvError::Disconnected) => Err(io::Error::other("the compaction thread died")),
            Ok(result) => result,
        };
        let took = running.started.elapsed();
        self.running = None;
        match result {
            Ok(bytes) => {
                tracing::info!(
                    snapshot_bytes = bytes,
                    generation = journal.generation,
                    ?took,
                    "the log was compacted"
                );
                journal.compacted(bytes);
                metrics.compacted();
                self.pending = None;
                self.not_before = None;
                self.retry = RETRY_FIRST;
            }
            Err(e) => self.failed(&e),
        }
    }

    /// Waits for a compaction that runs.
    pub(crate) fn wait(self) {
        if let Some(running) = self.running
            && running.thread.join().is_err()
        {
            tracing::warn!("the compaction thread panicked; the next start compacts again");
        }
    }
}

/// Builds the snapshot of generation `upto` from everything before it, then removes that.
fn compact(settings: &Settings, upto: u64) -> io::Result<u64> {
    let db = recover::load_below(settings, upto)?;
    let bytes = snapshot::write(&settings.dir, upto, &db)?;
    drop(db);
    remove_below(settings, upto)?;
    Ok(bytes)
}

/// Removes what the snapshot of this generation has replaced.
pub(crate) fn remove_below(settings: &Settings, generation: u64) -> io::Result<()> {
    let listing = list(&settings.dir)?;
    for g in listing.snapshots.into_iter().filter(|g| *g < generation) {
        std::fs::remove_file(snapshot_path(&settings.dir, g))?;
    }
    for g in listing.logs.into_iter().filter(|g| *g < generation) {
        std::fs::remove_file(log_path(&settings.dir, g))?;
    }
    sync_dir(&settings.dir)
}
