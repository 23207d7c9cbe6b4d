//! Limits on bytes per second that hold over any few seconds. Whoever wants to send or receive waits in line; the line is served in
//! turn, so that connections which ask for equal parts get equal shares. A wait can be given up at any time: the place in the line
//! is then free and nothing was spent. A change counts for those who are waiting, too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

/// What may be spent at once after a pause, in time at the full rate.
const BURST: Duration = Duration::from_millis(50);

#[derive(Debug)]
struct Bucket {
    /// What may be spent; below zero: spent ahead.
    bytes: f64,
    at: Instant,
}

#[derive(Debug)]
struct Inner {
    /// Bytes per second; 0: no limit.
    rate: AtomicU64,
    /// The head of the line.
    turn: Semaphore,
    bucket: Mutex<Bucket>,
    changed: Notify,
}

/// A limit. Cheap to clone; every clone is the same.
#[derive(Debug, Clone)]
pub(crate) struct Limit(Arc<Inner>);

impl Limit {
    /// `rate` bytes per second; 0: no limit.
    #[must_use]
    pub(crate) fn new(rate: u64) -> Self {
        Self(Arc::new(Inner {
            rate: AtomicU64::new(rate),
            turn: Semaphore::new(1),
            bucket: Mutex::new(Bucket {
                bytes: 0.0,
                at: Instant::now(),
            }),
            changed: Notify::new(),
        }))
    }

    /// Bytes per second; 0: no limit.
    #[must_use]
    pub(crate) fn rate(&self) -> u64 {
        self.0.rate.load(Ordering::Relaxed)
    }

    /// Changes it, at once.
    pub(crate) fn set(&self, rate: u64) {
        if self.0.rate.swap(rate, Ordering::Relaxed) != rate {
            self.0.changed.notify_waiters();
        }
    }

    /// Waits until `bytes` may be moved.
    pub(crate) async fn take(&self, bytes: usize) {
        if self.rate() == 0 {
            return;
        }
        // Fair: first come, first served. It is never closed.
        let Ok(_turn) = self.0.turn.acquire().await else { return };
        loop {
            let changed = self.0.changed.notified();
            let rate = self.rate();
            if rate == 0 {
                return;
            }
            let wait = {
                let mut bucket = self.0.bucket.lock();
                let now = Instant::now();
                let rate = rate as f64;
                let more = now.duration_since(bucket.at).as_secs_f64() * rate;
                bucket.bytes = (bucket.bytes + more).min(BURST.as_secs_f64() * rate);
                bucket.at = now;
                // A part larger than the burst is let through when nothing is owed, and is owed then.
                if bucket.bytes >= 0.0 {
                    bucket.bytes -= bytes as f64;
                    return;
                }
                -bucket.bytes / rate
            };
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs_f64(wait.min(3600.0))) => {}
                () = changed => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_holds_over_any_five_seconds_and_shares_are_equal() {
        // contract: p2p#23
        let limit = Limit::new(5_000_000);
        let log = Arc::new(Mutex::new(Vec::new()));
        let began = Instant::now();
        let mut tasks = tokio::task::JoinSet::new();
        for who in 0..8u32 {
            let (limit, log) = (limit.clone(), Arc::clone(&log));
            tasks.spawn(async move {
                while began.elapsed() < Duration::from_secs(20) {
                    limit.take(65_536).await;
                    log.lock().push((began.elapsed().as_secs_f64(), who));
                }
            });
        }
        tasks.join_all().await;
        let log = log.lock().clone();
        for from in 0..15 {
            let inside = log
                .iter()
                .filter(|(at, _)| (f64::from(from)..f64::from(from + 5)).contains(at));
            let rate = inside.count() as f64 * 65_536.0 / 5.0;
            assert!((4_750_000.0..5_250_000.0).contains(&rate), "{rate} from second {from}");
        }
        for who in 0..8 {
            let share = log.iter().filter(|entry| entry.1 == who).count();
            assert!(share.abs_diff(log.len() / 8) <= 2, "{who} got {share} of {}", log.len());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn waits_can_be_given_up_and_changes_count_at_once() {
        let limit = Limit::new(1000);
        limit.take(100_000).await;
        let given_up = tokio::time::timeout(Duration::from_secs(1), limit.take(1)).await;
        assert!(given_up.is_err());
        let began = Instant::now();
        let waiting = {
            let limit = limit.clone();
            tokio::spawn(async move { limit.take(1).await })
        };
        tokio::time::sleep(Duration::from_secs(1)).await;
        limit.set(0);
        waiting.await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(2));
    }
}
