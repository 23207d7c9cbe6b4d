//! One of several instances is active: a lease in the store says which.
//!
//! The holder renews its lease several times within its time; the store ends a lease that is not renewed, and whoever asks next has it.
//! No two clocks are compared. A holder counts its own time from before it asked, and less of it than the store does, so that it stops
//! before another one begins, also when it was paused or the store is away. What the active instance does is its own business.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use crate::lifecycle::Lifecycle;
use crate::store::{Batch, Store, StoreError, as_bytes, as_int, command};

/// Between two tries of those that wait.
const LOOK: Duration = Duration::from_millis(1_000);

/// A lease that this instance has, or waits for.
#[derive(Debug, Clone)]
pub struct Lease {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    key: String,
    /// Names this instance, and this life of it.
    token: String,
    time: Duration,
    held: watch::Sender<bool>,
    /// Until when it is certain that nobody else has it.
    until: Mutex<Option<Instant>>,
}

impl Lease {
    /// The lease at `key`, taken by `token` (unique for each life of each instance) for `time` at once.
    #[must_use]
    pub fn new(store: Store, key: impl Into<String>, token: impl Into<String>, time: Duration) -> Self {
        let inner = Inner {
            store,
            key: key.into(),
            token: token.into(),
            time,
            held: watch::Sender::new(false),
            until: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Whether this instance is the active one at this moment.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.inner.until.lock().is_some_and(|until| Instant::now() < until)
    }

    /// Whether it is held, as it changes.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<bool> {
        self.inner.held.subscribe()
    }

    /// Runs `work` whenever this instance is the active one, and drops it where it waits when it is so no longer; ends with the drain of
    /// `life`, when `work` has been dropped and the lease given back. Work that ends by itself is begun again after a second.
    pub async fn lead<F, Fut>(&self, life: &Lifecycle, mut work: F)
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = ()>,
    {
        let keeping = self.inner.keep();
        let leading = async {
            let mut held = self.changes();
            loop {
                // Only fails when the sender is gone, which `self` holds.
                if held.wait_for(|held| *held).await.is_err() {
                    return;
                }
                tracing::info!(lease = self.inner.key, "this instance is the active one");
                tokio::select! {
                    _ = held.wait_for(|held| !*held) => {
                        tracing::warn!(lease = self.inner.key, "this instance is no longer the active one");
                    }
                    () = async {
                        work().await;
                        sleep(LOOK).await;
                    } => {}
                }
            }
        };
        tokio::select! {
            () = life.draining() => {}
            () = keeping => {}
            () = leading => {}
        }
        self.inner.give_back().await;
    }
}

impl Inner {
    async fn keep(&self) {
        loop {
            // Less than the store grants, so that there is time to stop in.
            let mine = self.time - self.time / 5;
            let asked = Instant::now();
            let outcome = self.ask().await;
            let now = Instant::now();
            let until = {
                let mut until = self.until.lock();
                match outcome {
                    Ok(true) => *until = Some(asked + mine).filter(|until| *until > now),
                    Ok(false) => *until = None,
                    Err(error) => {
                        tracing::debug!(lease = self.key, %error, "the store can't be asked for a lease");
                        until.take_if(|until| *until <= now);
                    }
                }
                *until
            };
            self.held.send_if_modified(|held| {
                let changed = *held != until.is_some();
                *held = until.is_some();
                changed
            });
            let pause = self.time / 5;
            match until {
                // Its end is noticed in time, also when the store does not answer.
                Some(until) => sleep_until((now + pause).min(until)).await,
                None => sleep(pause.min(LOOK)).await,
            }
        }
    }

    /// Takes it, or renews it; false if another instance has it.
    async fn ask(&self) -> Result<bool, StoreError> {
        if self.until.lock().is_none() {
            let mut take = command("SET", &self.key);
            take.arg(&self.token).arg("NX").arg("PX").arg(millis(self.time));
            let mut batch = Batch::new();
            batch.push(&self.key, take);
            batch.push(&self.key, command("GET", &self.key));
            let limit = self.time / 5;
            let replies = self.store.run_within(batch, limit).await?;
            if !self.is_mine(replies.into_iter().nth(1))? {
                return Ok(false);
            }
        }
        // Where it was lost in between, this only lengthens the next holder's time.
        let mut renew = command("PEXPIRE", &self.key);
        renew.arg(millis(self.time));
        let mut batch = Batch::new();
        batch.push(&self.key, renew);
        batch.push(&self.key, command("GET", &self.key));
        let mut replies = self.store.run_within(batch, self.time / 5).await?.into_iter();
        let renewed = replies.next().map_or(Ok(0), as_int)? == 1;
        Ok(self.is_mine(replies.next())? && renewed)
    }

    fn is_mine(&self, reply: Option<redis::Value>) -> Result<bool, StoreError> {
        let found = reply.map_or(Ok(None), as_bytes)?;
        Ok(found.is_some_and(|found| found == self.token.as_bytes()))
    }

    async fn give_back(&self) {
        let held = self.until.lock().take().is_some_and(|until| Instant::now() < until);
        self.held.send_replace(false);
        if !held {
            return;
        }
        let mut batch = Batch::new();
        batch.push(&self.key, command("DEL", &self.key));
        if let Err(error) = self.store.run_within(batch, self.time / 5).await {
            tracing::debug!(lease = self.key, %error, "the lease can't be given back; it ends by itself");
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
