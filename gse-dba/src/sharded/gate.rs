//! The gate before a group: what is on its way to the primary is counted, and while the gate is shut nothing new sets out. A planned change of the primary
//! shuts it, waits until all is back, and opens it again: what clients have sent meanwhile is late, and nothing of it is in doubt.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// Open, or shut until a moment. It opens by itself then: whoever has shut it may have died.
#[derive(Debug)]
pub(crate) struct Gate {
    shut: watch::Sender<Option<Instant>>,
    /// The gate's state, where looking costs nothing.
    is_shut: AtomicUsize,
    under_way: AtomicUsize,
    back: Notify,
}

/// One thing that is on its way.
#[derive(Debug)]
pub(crate) struct Flight(Arc<Gate>);

impl Drop for Flight {
    fn drop(&mut self) {
        if self.0.under_way.fetch_sub(1, Ordering::SeqCst) == 1 && self.0.is_shut.load(Ordering::SeqCst) != 0 {
            self.0.back.notify_waiters();
        }
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            shut: watch::Sender::new(None),
            is_shut: AtomicUsize::new(0),
            under_way: AtomicUsize::new(0),
            back: Notify::new(),
        }
    }
}

impl Gate {
    fn try_depart(self: &Arc<Self>) -> Option<Flight> {
        // Counted before looking: who shuts the gate and counts afterwards sees one or the other.
        self.under_way.fetch_add(1, Ordering::SeqCst);
        let flight = Flight(Arc::clone(self));
        (self.is_shut.load(Ordering::SeqCst) == 0).then_some(flight)
    }

    /// Waits until the gate is open and passes it.
    pub(crate) async fn depart(self: &Arc<Self>) -> Flight {
        loop {
            if let Some(flight) = self.try_depart() {
                return flight;
            }
            let mut shut = self.shut.subscribe();
            let until = *shut.borrow_and_update();
            let Some(until) = until else { continue };
            tokio::select! {
                _ = shut.changed() => {}
                () = tokio::time::sleep_until(until) => self.open_if_over(),
            }
        }
    }

    /// Shuts the gate, for no longer than `limit`.
    pub(crate) fn shut(&self, limit: Duration) {
        self.shut.send_modify(|s| {
            *s = Some(Instant::now() + limit);
            self.is_shut.store(1, Ordering::SeqCst);
        });
    }

    pub(crate) fn open(&self) {
        self.shut.send_modify(|s| {
            *s = None;
            self.is_shut.store(0, Ordering::SeqCst);
        });
    }

    fn open_if_over(&self) {
        self.shut.send_if_modified(|s| {
            let over = s.is_some_and(|until| until <= Instant::now());
            if over {
                *s = None;
                self.is_shut.store(0, Ordering::SeqCst);
            }
            over
        });
    }

    /// Waits until nothing is under way; false when that takes longer than `limit`.
    pub(crate) async fn quiet(&self, limit: Duration) -> bool {
        let all_back = async {
            loop {
                let back = self.back.notified();
                tokio::pin!(back);
                back.as_mut().enable();
                if self.under_way.load(Ordering::SeqCst) == 0 {
                    return;
                }
                back.await;
            }
        };
        tokio::time::timeout(limit, all_back).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_sets_out_while_the_gate_is_shut() {
        let gate = Arc::new(Gate::default());
        let first = gate.depart().await;
        gate.shut(Duration::from_secs(60));
        assert!(!gate.quiet(Duration::from_millis(10)).await, "one is under way");
        let second = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { drop(gate.depart().await) }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!second.is_finished());
        drop(first);
        assert!(gate.quiet(Duration::from_secs(5)).await);
        gate.open();
        second.await.unwrap();
    }

    #[tokio::test]
    async fn a_gate_that_nobody_opens_opens_by_itself() {
        let gate = Arc::new(Gate::default());
        gate.shut(Duration::from_millis(30));
        let before = Instant::now();
        drop(gate.depart().await);
        assert!(before.elapsed() >= Duration::from_millis(30));
    }
}
