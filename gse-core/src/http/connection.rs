//! What a connection is doing, so that one that does nothing, or never gets anywhere, can be ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::HttpConfig;

/// Shared by everything that happens on one connection.
#[derive(Debug)]
pub(super) struct Clock {
    start: Instant,
    /// Milliseconds from `start` to the last sign of progress.
    last: AtomicU64,
    active: AtomicUsize,
    requests: AtomicU64,
}

/// Something under way on a connection: a request being read or worked on, an answer being sent. The connection is idle when none is left.
#[derive(Debug)]
pub(super) struct Activity(Arc<Clock>);

/// What should become of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Keep,
    /// It has been idle for long: end it politely.
    Retire,
    /// It gets nowhere: end it.
    Drop,
}

impl Clock {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Clock {
            start: Instant::now(),
            last: AtomicU64::new(0),
            active: AtomicUsize::new(0),
            requests: AtomicU64::new(0),
        })
    }

    /// A request head has arrived.
    pub(super) fn request(self: &Arc<Self>) -> Activity {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.active.fetch_add(1, Ordering::Relaxed);
        self.touch();
        Activity(Arc::clone(self))
    }

    /// Whether any request head has arrived.
    pub(super) fn is_used(&self) -> bool {
        self.requests.load(Ordering::Relaxed) > 0
    }

    fn touch(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.fetch_max(now, Ordering::Relaxed);
    }

    pub(super) fn verdict(&self, limits: &Limits) -> Verdict {
        let still = self
            .start
            .elapsed()
            .saturating_sub(Duration::from_millis(self.last.load(Ordering::Relaxed)));
        if self.requests.load(Ordering::Relaxed) == 0 {
            return if still > limits.head {
                Verdict::Drop
            } else {
                Verdict::Keep
            };
        }
        if self.active.load(Ordering::Relaxed) > 0 {
            return if still > limits.stalled {
                Verdict::Drop
            } else {
                Verdict::Keep
            };
        }
        if still > limits.idle + limits.head {
            Verdict::Drop
        } else if still > limits.idle {
            Verdict::Retire
        } else {
            Verdict::Keep
        }
    }
}

impl Activity {
    /// Something has moved.
    pub(super) fn touch(&self) {
        self.0.touch();
    }
}

impl Clone for Activity {
    fn clone(&self) -> Self {
        self.0.active.fetch_add(1, Ordering::Relaxed);
        Activity(Arc::clone(&self.0))
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        self.0.touch();
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How long a connection may be in each state.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) head: Duration,
    pub(super) idle: Duration,
    pub(super) stalled: Duration,
}

impl Limits {
    pub(super) fn of(config: &HttpConfig) -> Self {
        let longest = config.body_timeout_ms.max(config.request_timeout_ms);
        Limits {
            head: Duration::from_millis(config.header_timeout_ms),
            idle: Duration::from_millis(config.idle_timeout_ms),
            // The waits of a request end by themselves, with an answer; this is for answers that nobody reads.
            stalled: Duration::from_millis(longest.saturating_add(5_000)),
        }
    }

    /// How often to look.
    pub(super) fn every(&self) -> Duration {
        (self.head.min(self.idle) / 4).clamp(Duration::from_millis(20), Duration::from_secs(1))
    }
}
