//! Noticing that the store hangs: nothing at all comes from it although somebody waits.
//!
//! A batch may take long because it is large, or because many are before it; then replies keep coming. Only silence tells a store that
//! hangs from one that is busy, and it tells it early.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// When the store was last heard.
pub(super) struct Heard {
    base: Instant,
    /// Milliseconds after `base`.
    last_ms: AtomicU64,
    limit: Duration,
}

impl Heard {
    /// Silence of `limit` is too much.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            base: Instant::now(),
            last_ms: AtomicU64::new(0),
            limit,
        }
    }

    /// A reply has come.
    pub(super) fn note(&self) {
        let ms = u64::try_from(self.base.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.fetch_max(ms, Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.base + Duration::from_millis(self.last_ms.load(Ordering::Relaxed))
    }

    /// What `work` gives; `None` when nothing has come from the store, for anybody, for too long since it was begun.
    pub(super) async fn unless_silent<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            done = work => Some(done),
            () = self.silence() => None,
        }
    }

    async fn silence(&self) {
        let mut since = Instant::now();
        loop {
            let end = since.max(self.last()) + self.limit;
            sleep_until(end).await;
            let now = Instant::now();
            if now > end + self.limit / 4 {
                // It was this process that stood still; what came meanwhile has yet to be read.
                since = now;
            } else if self.last() + self.limit <= now {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_ends_a_wait_and_signs_of_life_do_not() {
        let heard = Heard::new(Duration::from_millis(1_500));
        let begun = Instant::now();
        assert_eq!(heard.unless_silent(std::future::pending::<()>()).await, None);
        assert_eq!(begun.elapsed().as_millis(), 1_500);
        // Something else is answered now and then: this one is just slow.
        let begun = Instant::now();
        let others = async {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_millis(1_000)).await;
                heard.note();
            }
            std::future::pending::<()>().await;
        };
        let slow = heard.unless_silent(tokio::time::sleep(Duration::from_millis(4_000)));
        tokio::select! {
            done = slow => assert_eq!(done, Some(())),
            () = others => {}
        }
        assert_eq!(begun.elapsed().as_millis(), 4_000);
    }
}
