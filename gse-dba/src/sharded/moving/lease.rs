//! For how long a gse_dba may send to a group without having read the topology there again. Whoever moves slots away from a group waits until every other gse_dba
//! has taken the new topology or can't have a lease any more; so a lease that has run out must stop commands, and unmask answers that came too late.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

const FOR_EVER: u64 = u64::MAX;

/// Times are microseconds since `base`.
pub(crate) struct Lease {
    base: Instant,
    /// Since when it has held without a gap.
    since: AtomicU64,
    until: AtomicU64,
    /// The topology that was seen when it was renewed last.
    epoch: AtomicU64,
    renewed: Notify,
}

impl Lease {
    /// One that holds for ever: nobody else is to be agreed with.
    pub(crate) fn unbounded() -> Self {
        Self {
            base: Instant::now(),
            since: AtomicU64::new(0),
            until: AtomicU64::new(FOR_EVER),
            epoch: AtomicU64::new(0),
            renewed: Notify::new(),
        }
    }

    fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.base).as_micros()).unwrap_or(FOR_EVER)
    }

    /// From now on it has to be renewed.
    pub(crate) fn bound(&self) {
        self.until.store(0, Ordering::SeqCst);
    }

    /// Renews it, by what was asked at this time: the group has a topology of this epoch.
    pub(crate) fn renew(&self, asked: Instant, length: Duration, epoch: u64) {
        let now = self.micros(Instant::now());
        let until = self.micros(asked + length);
        let same = self.epoch.swap(epoch, Ordering::SeqCst) == epoch;
        if self.until.load(Ordering::SeqCst) < now && !same {
            // There was a gap, and in it something may have begun to move: what was sent before is not covered by what holds from now on.
            self.since.store(now, Ordering::SeqCst);
        }
        self.until.fetch_max(until, Ordering::SeqCst);
        self.renewed.notify_waiters();
    }

    pub(crate) fn holds(&self) -> bool {
        let until = self.until.load(Ordering::SeqCst);
        until == FOR_EVER || self.micros(Instant::now()) < until
    }

    /// Whether it has held all the time from then until now.
    pub(crate) fn covers(&self, sent: Instant) -> bool {
        self.holds() && self.since.load(Ordering::SeqCst) <= self.micros(sent)
    }

    /// Waits until it holds, for a while.
    pub(crate) async fn wait(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        loop {
            let renewed = self.renewed.notified();
            if self.holds() {
                return true;
            }
            if tokio::time::timeout_at(until, renewed).await.is_err() {
                return self.holds();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_was_sent_before_a_gap_is_not_covered_after_it() {
        let lease = Lease::unbounded();
        assert!(lease.covers(Instant::now()));
        lease.bound();
        assert!(!lease.holds());
        let second = Duration::from_secs(1);
        tokio::time::sleep(second).await;
        lease.renew(Instant::now(), second, 1);
        let sent = Instant::now();
        tokio::time::sleep(second / 2).await;
        assert!(lease.covers(sent));
        lease.renew(Instant::now(), second, 1);
        tokio::time::sleep(second * 3 / 4).await;
        assert!(lease.covers(sent), "renewed in time: no gap");
        tokio::time::sleep(second).await;
        assert!(!lease.covers(sent));
        assert!(!lease.wait(second).await);
        lease.renew(Instant::now(), second, 1);
        assert!(lease.covers(sent), "nothing has begun to move in the gap");
        tokio::time::sleep(second * 2).await;
        lease.renew(Instant::now(), second, 2);
        assert!(lease.holds() && !lease.covers(sent), "a gap lies between");
        assert!(lease.covers(Instant::now()));
    }
}
