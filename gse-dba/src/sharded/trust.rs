//! For how long a primary may be taken for one without asking again. Sentinel replaces a primary only after it has been silent for
//! `down-after-milliseconds`: what most Sentinels say holds for that long, counted from when they were asked, and not a moment longer. A gse_dba that is cut
//! off from the Sentinels together with a primary stops believing in it before another can be made.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Nobody replaces the primary behind our back.
const ALWAYS: u64 = u64::MAX;

pub(crate) struct Trust {
    start: Instant,
    /// Milliseconds since `start`.
    until: AtomicU64,
}

impl Default for Trust {
    /// Of what no Sentinel watches.
    fn default() -> Self {
        Self {
            start: Instant::now(),
            until: AtomicU64::new(ALWAYS),
        }
    }
}

impl Trust {
    fn since_start(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.start).as_millis()).unwrap_or(ALWAYS - 1)
    }

    pub(crate) fn holds(&self) -> bool {
        let until = self.until.load(Ordering::Relaxed);
        until == ALWAYS || self.since_start(Instant::now()) < until
    }

    /// There are Sentinels, and nothing was heard of them yet.
    pub(super) fn begin(&self) {
        self.until.store(0, Ordering::Relaxed);
    }

    /// Most Sentinels, asked at `asked`, have nothing against the primary.
    pub(super) fn extend(&self, asked: Instant, by: Duration) {
        self.until.store(self.since_start(asked + by), Ordering::Relaxed);
    }

    /// They have.
    pub(super) fn end(&self) {
        let now = self.since_start(Instant::now());
        self.until.fetch_min(now, Ordering::Relaxed);
    }

    /// When it ended.
    pub(super) fn ended(&self) -> Option<Instant> {
        let until = self.until.load(Ordering::Relaxed);
        (until != ALWAYS).then(|| self.start + Duration::from_millis(until))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_holds_from_the_question_on_and_no_longer() {
        let t = Trust::default();
        assert!(t.holds() && t.ended().is_none());
        t.begin();
        assert!(!t.holds());
        let asked = Instant::now();
        tokio::time::advance(Duration::from_millis(300)).await;
        t.extend(asked, Duration::from_millis(1000));
        assert!(t.holds());
        tokio::time::advance(Duration::from_millis(699)).await;
        assert!(t.holds());
        tokio::time::advance(Duration::from_millis(2)).await;
        assert!(!t.holds());
        t.extend(Instant::now(), Duration::from_millis(1000));
        t.end();
        assert!(!t.holds());
    }
}
