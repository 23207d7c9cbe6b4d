//! The active instance's work: the [`Ledger`] in memory, and the same in the store, for whoever is active next.
//!
//! Everything that is written goes through one place, one thing after the other, so that what was known later is also written later. A
//! content is in the store before it is pushed. Writing is repeated until the store has it: what follows would be of no use without it, and
//! an instance that can't write loses its lease.

use std::sync::Arc;
use std::time::Duration;

use gse_core::store::StoreError;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::Node;
use crate::identity::Identity;
use crate::ledger::{Counts, End, Gone, Job, Ledger, Pauses, Wanted};
use crate::store::Change;

/// Hosts written in one go.
const WRITE: usize = 500;
/// Pause after the store has not taken something, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

/// All that the active instance knows.
pub struct Desk {
    /// The instance.
    pub node: Arc<Node>,
    ledger: Mutex<Ledger>,
    /// Something may be due.
    pub wake: Notify,
    writing: tokio::sync::Mutex<()>,
}

/// Pauses that double.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    first: Duration,
    most: Duration,
}

impl Backoff {
    /// From `first` to `most`.
    #[must_use]
    pub fn new(first: Duration, most: Duration) -> Self {
        Self {
            next: first,
            first,
            most,
        }
    }

    /// In milliseconds.
    #[must_use]
    pub fn of_ms(first: u64, most: u64) -> Self {
        Self::new(Duration::from_millis(first), Duration::from_millis(most))
    }

    /// Waits; the next pause is longer.
    pub async fn wait(&mut self, node: &Node) {
        let pause = self.next.mul_f64(0.7 + 0.3 * node.random.unit());
        self.next = (self.next * 2).min(self.most);
        tokio::time::sleep(pause).await;
    }

    /// All is well again.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

impl Desk {
    /// Reads all hosts.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn load(node: Arc<Node>) -> Result<Self, StoreError> {
        let push = &node.config.push;
        let pauses = Pauses {
            min_ms: push.retry_min_ms,
            max_ms: push.retry_max_ms,
        };
        let mut ledger = Ledger::new(pauses, push.max_hosts);
        let now = node.clock.unix_ms();
        let mut odd = 0_u64;
        node.store
            .hosts(|key, state| odd += u64::from(!ledger.load(&key, state, now)))
            .await?;
        if odd > 0 {
            tracing::warn!(
                hosts = odd,
                "stored hosts can't be understood; the source tells of them again"
            );
        }
        let counts = ledger.counts();
        tracing::info!(hosts = counts.hosts, due = counts.open, "hosts read from the store");
        Ok(Self {
            node,
            ledger: Mutex::new(ledger),
            wake: Notify::new(),
            writing: tokio::sync::Mutex::default(),
        })
    }

    fn now_ms(&self) -> u64 {
        self.node.clock.unix_ms()
    }

    /// See [`Ledger::ask`].
    pub fn ask(&self) -> u64 {
        self.ledger.lock().ask()
    }

    /// Takes what the source says, returns when it is in the store; `asked` as in [`Ledger::want`].
    pub async fn put(&self, identities: &[Identity], asked: Option<u64>) {
        for some in identities.chunks(WRITE) {
            self.put_some(some, asked).await;
        }
    }

    async fn put_some(&self, identities: &[Identity], asked: Option<u64>) {
        let writing = self.writing.lock().await;
        let now = self.now_ms();
        let (mut changed, mut gone) = (Vec::new(), Vec::new());
        let mut full = 0_u64;
        {
            let mut ledger = self.ledger.lock();
            for identity in identities {
                if identity.content.len() > self.node.config.push.max_content_bytes {
                    self.node.metrics.skipped("too_large");
                    tracing::warn!(
                        host = identity.key(),
                        bytes = identity.content.len(),
                        "an identity is larger than push.max_content_bytes; it is left out"
                    );
                    continue;
                }
                match ledger.want(identity, asked, now) {
                    Wanted::Same | Wanted::Stale => {}
                    Wanted::Full => full += 1,
                    Wanted::New { before } => {
                        changed.push(identity);
                        gone.extend(before);
                    }
                }
            }
        }
        if full > 0 {
            self.node.metrics.skipped("too_many");
            tracing::error!(
                hosts = full,
                "there are more hosts than push.max_hosts; these are left out"
            );
        }
        let changes = || {
            let ledger = self.ledger.lock();
            let of = |identity: &&Identity| {
                Some(Change {
                    key: identity.key().to_owned(),
                    state: ledger.state(identity.key())?,
                    content: Some(identity.content.clone()),
                })
            };
            changed.iter().filter_map(of).collect::<Vec<_>>()
        };
        if !changed.is_empty() {
            self.certainly("hosts", || self.write(changes())).await;
            let mut ledger = self.ledger.lock();
            for identity in &changed {
                ledger.written(identity.key(), now);
            }
        }
        if !gone.is_empty() {
            self.certainly("hosts that have another name", || self.node.store.remove(&gone))
                .await;
        }
        drop(writing);
        self.wake.notify_one();
        self.node.metrics.counts(self.counts());
    }

    async fn write(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        self.node.store.write(&changes).await
    }

    /// Repeats until the store has taken it.
    async fn certainly<F, Fut>(&self, what: &str, mut work: F)
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<(), StoreError>>,
    {
        let mut backoff = Backoff::new(PAUSE.0, PAUSE.1);
        while let Err(error) = work().await {
            tracing::warn!(%error, "{what} can't be stored yet");
            backoff.wait(&self.node).await;
        }
    }

    /// Writes how far these hosts are.
    pub async fn flush(&self, keys: &[Arc<str>]) {
        for some in keys.chunks(WRITE) {
            let _writing = self.writing.lock().await;
            let changes = || {
                let ledger = self.ledger.lock();
                let of = |key: &Arc<str>| {
                    Some(Change {
                        key: key.to_string(),
                        state: ledger.state(key)?,
                        content: None,
                    })
                };
                some.iter().filter_map(of).collect::<Vec<_>>()
            };
            self.certainly("ends of pushes", || self.write(changes())).await;
        }
        self.node.metrics.counts(self.counts());
    }

    /// The source has no such hosts any more.
    pub async fn forget(&self, host_id: u64, keys: &[&str]) {
        let _writing = self.writing.lock().await;
        let gone = self.ledger.lock().forget(host_id, keys);
        self.remove(gone).await;
    }

    async fn remove(&self, gone: Vec<Gone>) {
        if gone.is_empty() {
            return;
        }
        tracing::info!(
            hosts = gone.len(),
            first = gone[0].key,
            "hosts that the source has no more are forgotten"
        );
        for some in gone.chunks(WRITE) {
            self.certainly("removed hosts", || self.node.store.remove(some)).await;
        }
        self.node.metrics.counts(self.counts());
    }

    /// A full pass begins.
    pub fn begin_pass(&self) {
        self.ledger.lock().begin_pass();
    }

    /// It has ended; see [`Ledger::end_pass`].
    pub async fn end_pass(&self, whole: bool, at_once: bool) {
        let _writing = self.writing.lock().await;
        let gone = self.ledger.lock().end_pass(whole, at_once);
        self.remove(gone).await;
    }

    /// Pushes what is known of a host again; false if it is not known.
    pub async fn again(&self, key: &str) -> bool {
        let known = self.ledger.lock().again(key, self.now_ms());
        if known {
            self.flush(&[key.into()]).await;
            self.wake.notify_one();
        }
        known
    }

    /// Takes what is due; how long until something is, if nothing.
    pub fn take_due(&self) -> Result<Vec<Job>, Option<Duration>> {
        let push = &self.node.config.push;
        let now = self.now_ms();
        let mut ledger = self.ledger.lock();
        let jobs = ledger.take_due(now, push.batch, push.memory_bytes / 4);
        if jobs.is_empty() {
            let next = ledger.next_due();
            return Err(next.map(|at| Duration::from_millis(at.saturating_sub(now).max(1))));
        }
        Ok(jobs)
    }

    /// A try has ended.
    pub fn end(&self, job: &Job, end: End) {
        let (now, spread) = (self.now_ms(), self.node.random.unit());
        self.ledger.lock().end(job, end, now, spread);
    }

    /// An agent is connected; see [`Ledger::seen`].
    pub fn seen(&self, key: &str, agent: &str, epoch: &[u8]) -> bool {
        let now = self.now_ms();
        self.ledger.lock().seen(key, agent, epoch, now)
    }

    /// See [`Ledger::waiting_after`].
    pub fn waiting_after(&self, after: &str, most: usize) -> Vec<crate::agents::Named> {
        self.ledger.lock().waiting_after(after, most)
    }

    /// See [`Ledger::hosts_after`].
    pub fn hosts_after(&self, after: &str, most: usize) -> Vec<crate::agents::Named> {
        self.ledger.lock().hosts_after(after, most)
    }

    /// How many hosts are how far.
    pub fn counts(&self) -> Counts {
        self.ledger.lock().counts()
    }
}
