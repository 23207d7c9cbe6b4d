//! What a running server is to its owner: the stop and reload signals it listens to, the tasks it owns and the addresses it is
//! bound to.
//!
//! There is one [`Lifecycle`] per server, no global one, so that `gse up` can run several servers in one process and a test can start
//! any of them on port 0. Turning Unix signals into these calls is left to [`crate::process`]; what draining means for sessions,
//! requests or tasks is left to each server, which is told by [`Lifecycle::draining`].
//!
//! Order of a stop: `drain` is asked for, owned tasks finish ([`Lifecycle::finished`]), then the tasks that must outlive them (the
//! operations listener) are told by [`Lifecycle::closing`], and what is left after its grace is dropped.

use std::any::Any;
use std::collections::BTreeMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures::FutureExt;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long tasks that outlive the others (see [`Lifecycle::spawn_until_closed`]) get to end by themselves, and how long a task
/// that is being dropped may take to unwind.
const CLOSING_GRACE: Duration = Duration::from_millis(1000);

/// The handle on one running server. Cheap to clone; every clone is the same server.
#[derive(Clone)]
pub struct Lifecycle {
    inner: Arc<Inner>,
}

struct Inner {
    name: &'static str,
    drain: CancellationToken,
    drained_at: OnceLock<Instant>,
    abort: CancellationToken,
    closing: CancellationToken,
    kill: CancellationToken,
    ready: CancellationToken,
    owned: TaskTracker,
    late: TaskTracker,
    /// Names of the tasks that are running, to say in the log which of them did not end in time.
    running: Mutex<BTreeMap<&'static str, usize>>,
    failure: Mutex<Option<String>>,
    addresses: Mutex<BTreeMap<String, String>>,
    reloads: watch::Sender<u64>,
}

/// What the end of a task means for the server.
#[derive(Clone, Copy, PartialEq)]
enum OnPanic {
    Drain,
    LogOnly,
}

impl Lifecycle {
    /// A lifecycle for the server called `name`, which prefixes its log lines.
    pub fn new(name: &'static str) -> Self {
        Self {
            inner: Arc::new(Inner {
                name,
                drain: CancellationToken::new(),
                drained_at: OnceLock::new(),
                abort: CancellationToken::new(),
                closing: CancellationToken::new(),
                kill: CancellationToken::new(),
                ready: CancellationToken::new(),
                owned: TaskTracker::new(),
                late: TaskTracker::new(),
                running: Mutex::new(BTreeMap::new()),
                failure: Mutex::new(None),
                addresses: Mutex::new(BTreeMap::new()),
                reloads: watch::Sender::new(0),
            }),
        }
    }

    /// The name the server was given.
    pub fn name(&self) -> &'static str {
        self.inner.name
    }

    /// Asks the server to take no new work and to finish what it holds. Asking again changes nothing.
    pub fn drain(&self) {
        if !self.inner.drain.is_cancelled() {
            tracing::info!(server = self.inner.name, "draining");
        }
        self.cancel_drain();
    }

    fn cancel_drain(&self) {
        self.inner.drained_at.get_or_init(Instant::now);
        self.inner.drain.cancel();
    }

    /// How long ago the drain was asked for; zero when it was not.
    pub fn draining_for(&self) -> Duration {
        self.inner.drained_at.get().map_or(Duration::ZERO, Instant::elapsed)
    }

    /// Whether a drain was asked for.
    pub fn is_draining(&self) -> bool {
        self.inner.drain.is_cancelled()
    }

    /// Resolves when a drain was asked for.
    pub async fn draining(&self) {
        self.inner.drain.cancelled().await;
    }

    /// A token that is cancelled when a drain is asked for, for code that wants one (child tokens, `run_until_cancelled`).
    pub fn drain_token(&self) -> CancellationToken {
        self.inner.drain.clone()
    }

    /// Asks the server to leave at once, whatever it holds. Implies [`Lifecycle::drain`].
    pub fn abort(&self) {
        self.cancel_drain();
        self.inner.abort.cancel();
    }

    /// Whether the server was asked to leave at once.
    pub fn is_aborted(&self) -> bool {
        self.inner.abort.is_cancelled()
    }

    /// Resolves when the server was asked to leave at once.
    pub async fn aborted(&self) {
        self.inner.abort.cancelled().await;
    }

    /// Resolves when the owned tasks have ended and only the tasks of [`Lifecycle::spawn_until_closed`] are left.
    pub async fn closing(&self) {
        self.inner.closing.cancelled().await;
    }

    /// Starts a task that belongs to the server. A panic in it is logged, kept as the server's failure, and drains the server.
    ///
    /// Must be called within a Tokio runtime, as [`tokio::spawn`].
    pub fn spawn(&self, name: &'static str, fut: impl Future<Output = ()> + Send + 'static) {
        let fut = async move {
            fut.await;
            Ok(())
        };
        self.start(&self.inner.owned, name, OnPanic::Drain, fut);
    }

    /// Starts a task whose panic must not stop the server: one per connection or per request, where the cause may be what a peer
    /// has sent. The panic is logged and only this task ends.
    pub fn spawn_contained(&self, name: &'static str, fut: impl Future<Output = ()> + Send + 'static) {
        // There are many of these, and each layer that a future is passed through by value would keep room for it once more.
        let fut = Box::pin(fut);
        let fut = async move {
            fut.await;
            Ok(())
        };
        self.start(&self.inner.owned, name, OnPanic::LogOnly, fut);
    }

    /// Starts a task the server cannot live without: an error or a panic drains the server and is kept, see [`Lifecycle::failure`].
    pub fn spawn_critical(&self, name: &'static str, fut: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        self.start(&self.inner.owned, name, OnPanic::Drain, fut);
    }

    /// Starts a task that goes on while the others drain, and is told to end by [`Lifecycle::closing`] after them.
    pub fn spawn_until_closed(&self, name: &'static str, fut: impl Future<Output = ()> + Send + 'static) {
        let fut = async move {
            fut.await;
            Ok(())
        };
        self.start(&self.inner.late, name, OnPanic::LogOnly, fut);
    }

    fn start(
        &self,
        tracker: &TaskTracker,
        name: &'static str,
        on_panic: OnPanic,
        fut: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        *self.inner.running.lock().entry(name).or_default() += 1;
        let life = self.clone();
        tracker.spawn(async move {
            let outcome = tokio::select! {
                outcome = AssertUnwindSafe(fut).catch_unwind() => Some(outcome),
                () = life.inner.kill.cancelled() => None,
            };
            life.forget(name);
            match outcome {
                None | Some(Ok(Ok(()))) => {}
                Some(Ok(Err(error))) => life.fail(format!("{name} failed: {error:#}")),
                Some(Err(payload)) => {
                    let message = format!("{name} panicked: {}", panic_text(payload.as_ref()));
                    match on_panic {
                        OnPanic::Drain => life.fail(message),
                        OnPanic::LogOnly => tracing::error!(server = life.inner.name, "{message}"),
                    }
                }
            }
        });
    }

    fn forget(&self, name: &'static str) {
        let mut running = self.inner.running.lock();
        if let Some(count) = running.get_mut(name) {
            *count -= 1;
            if *count == 0 {
                running.remove(name);
            }
        }
    }

    /// Records why the server cannot go on (the first reason is kept), logs it, and drains.
    pub fn fail(&self, reason: String) {
        tracing::error!(server = self.inner.name, "{reason}");
        self.inner.failure.lock().get_or_insert(reason);
        self.drain();
    }

    /// Why the server stopped by itself, if it did.
    pub fn failure(&self) -> Option<String> {
        self.inner.failure.lock().clone()
    }

    /// Names of the owned tasks that run now, with how many there are of each.
    pub fn running(&self) -> BTreeMap<&'static str, usize> {
        self.inner.running.lock().clone()
    }

    /// Waits for a drain, then for the owned tasks to end, at most `grace`; after that, or when [`Lifecycle::abort`] is called,
    /// the rest is dropped where it stands. False if something had to be dropped.
    pub async fn finished(&self, grace: Duration) -> bool {
        let inner = &self.inner;
        inner.drain.cancelled().await;
        inner.owned.close();
        inner.late.close();
        let in_time = tokio::select! {
            ended = tokio::time::timeout(grace, inner.owned.wait()) => ended.is_ok(),
            () = inner.abort.cancelled() => inner.owned.is_empty(),
        };
        if !in_time {
            let left: Vec<String> = self
                .running()
                .iter()
                .map(|(name, count)| format!("{name} x{count}"))
                .collect();
            tracing::warn!(
                server = inner.name,
                "not finished in time and dropped: {}",
                left.join(", ")
            );
        }
        inner.closing.cancel();
        if in_time && !inner.abort.is_cancelled() {
            // Nothing to say when these are late: they hold no work of their own.
            tokio::select! {
                _ = tokio::time::timeout(CLOSING_GRACE, inner.late.wait()) => {}
                () = inner.abort.cancelled() => {}
            }
        }
        inner.kill.cancel();
        let unwound = async {
            inner.owned.wait().await;
            inner.late.wait().await;
        };
        if tokio::time::timeout(CLOSING_GRACE, unwound).await.is_err() {
            tracing::warn!(server = inner.name, "tasks that do not yield are left behind");
        }
        in_time
    }

    /// Counts the reloads asked for; a change means "read again what may have changed on disk" (certificates, log file, policy).
    pub fn reloads(&self) -> watch::Receiver<u64> {
        self.inner.reloads.subscribe()
    }

    /// Asks for a reload: SIGHUP and signal 36.
    pub fn reload(&self) {
        tracing::info!(server = self.inner.name, "reload asked for");
        self.inner.reloads.send_modify(|count| *count += 1);
    }

    /// Makes known where `listener` is bound ("http" at "127.0.0.1:28863"), and logs it.
    pub fn announce(&self, listener: &'static str, addr: String) {
        tracing::info!(server = self.inner.name, listener, %addr, "listening");
        self.inner.addresses.lock().insert(listener.to_owned(), addr);
    }

    /// Says that every listener is bound.
    pub fn ready(&self) {
        self.inner.ready.cancel();
    }

    /// Whether [`Lifecycle::ready`] was said.
    pub fn is_ready(&self) -> bool {
        self.inner.ready.is_cancelled()
    }

    /// Resolves with the announced addresses when all listeners are bound; with what there is when the server drains before that.
    pub async fn wait_ready(&self) -> BTreeMap<String, String> {
        tokio::select! {
            biased;
            () = self.inner.ready.cancelled() => {}
            () = self.inner.drain.cancelled() => {}
        }
        self.inner.addresses.lock().clone()
    }
}

impl std::fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lifecycle")
            .field("name", &self.inner.name)
            .field("draining", &self.is_draining())
            .finish_non_exhaustive()
    }
}

/// The text of a panic, for the log and for [`Lifecycle::failure`].
pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&'static str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
}

#[cfg(test)]
mod tests;
