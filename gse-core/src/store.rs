//! The client every service keeps its state with: any Redis by URL, be it gse_dba, one Redis or a Redis Cluster.
//!
//! A [`Batch`] of commands goes out as one pipelined round trip and comes back as one reply per command. The connection is made and
//! made again by this module for as long as the [`Store`] lives, so that nothing needs a restart when the store goes and comes
//! back; a caller meanwhile gets [`StoreError::Unavailable`] and decides itself whether to try again. Which keys there are, and what
//! is in them, belongs to the services.
//!
//! ```text
//! redis://[user:password@]host[:port][/db]            one Redis, or gse_dba
//! rediss://…                                          the same over TLS; tls_ca names whom to trust
//! redis+unix:///path/to/socket                        a Unix socket
//! redis+cluster://[user:password@]host:port,host:port a Redis Cluster, by some of its nodes; rediss+cluster:// over TLS
//! ```

mod batch;
mod config;
mod error;
mod link;
mod metrics;
mod silence;
mod target;
mod value;

use std::sync::Arc;
use std::time::Duration;

use redis::Value;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout_at};

use crate::lifecycle::Lifecycle;
use crate::net::Dialer;
use crate::ops::Health;
use crate::random::Random;

pub use batch::{Batch, command, slot};
pub use config::StoreConfig;
pub use error::StoreError;
pub use metrics::StoreMetrics;
pub use value::{as_array, as_bytes, as_float, as_int, as_pairs, as_string};

use link::{Conn, Link, State};
use silence::Heard;

/// A connection to the store that heals by itself. Cheap to clone; every clone is the same.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    /// The store's address without its password, for errors.
    shown: String,
    link: Link,
    /// One place per batch on its way.
    places: Semaphore,
    max_inflight: usize,
    command_timeout: Duration,
    /// When the store was last heard, so that one that hangs is noticed before a command has taken as long as it may.
    heard: Heard,
    metrics: StoreMetrics,
}

impl Store {
    /// Takes up the connection that `cfg` describes. The store need not be there yet: the connection is made in the background,
    /// and what is asked before waits for the first attempt. Must be called within a Tokio runtime.
    ///
    /// # Errors
    /// [`StoreError::Config`] when the address is malformed or a file it names cannot be read.
    pub async fn connect(cfg: &StoreConfig) -> Result<Self, StoreError> {
        Self::start(cfg, target::Target::from_config(cfg)?, Random::system()).await
    }

    /// As [`Store::connect`], to one server without TLS, over streams that `dialer` makes. It is given `host:port` of the URL.
    ///
    /// # Errors
    /// [`StoreError::Config`], as there, and when the URL means a cluster.
    pub async fn connect_over(cfg: &StoreConfig, dialer: Dialer, random: Random) -> Result<Self, StoreError> {
        Self::start(cfg, target::Target::from_config(cfg)?.over(dialer)?, random).await
    }

    async fn start(cfg: &StoreConfig, target: target::Target, random: Random) -> Result<Self, StoreError> {
        target.check().await?;
        if cfg.url.ends_with("#insecure") {
            tracing::warn!(
                store = target.shown(),
                "the store's certificate is not verified (#insecure)"
            );
        }
        let command_timeout = Duration::from_millis(cfg.command_timeout_ms);
        let metrics = StoreMetrics::default();
        let shown = target.shown().to_owned();
        let link = Link::start(target, metrics.clone(), random);
        let inner = Inner {
            shown,
            link,
            places: Semaphore::new(cfg.max_inflight_batches),
            max_inflight: cfg.max_inflight_batches,
            command_timeout,
            heard: Heard::new(Duration::from_millis(cfg.silence_timeout_ms)),
            metrics,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Sends the commands of `batch` and returns their replies in the order they were pushed.
    ///
    /// On one Redis they are executed in that order, on one connection; a large batch goes out in several pipelines one after the
    /// other. On a cluster only the commands of one hash slot keep their order among each other. Nothing here makes a batch
    /// atomic: other clients' commands may fall in between.
    ///
    /// A batch is never sent again here once its connection has failed. A cluster's redirections are followed, though, so that a
    /// command may be executed twice while its slot moves: what is sent must bear that.
    ///
    /// # Errors
    /// - [`StoreError::Unavailable`]: not connected, or the connection broke; what had been sent may or may not have been executed.
    /// - [`StoreError::Timeout`]: not answered within the command timeout, waiting for a free place included; likewise.
    /// - [`StoreError::Reply`]: the store refused a command, the first one in push order; the others were executed.
    pub async fn run(&self, batch: Batch) -> Result<Vec<Value>, StoreError> {
        self.send(&batch).await
    }

    /// As [`Store::run`], for a caller that can't wait as long as the command timeout.
    ///
    /// # Errors
    /// As [`Store::run`].
    pub async fn run_within(&self, batch: Batch, limit: Duration) -> Result<Vec<Value>, StoreError> {
        self.send_within(&batch, limit).await
    }

    /// As [`Store::run`], for a batch that may have to be sent again.
    ///
    /// # Errors
    /// As [`Store::run`].
    pub async fn send(&self, batch: &Batch) -> Result<Vec<Value>, StoreError> {
        self.send_within(batch, self.inner.command_timeout).await
    }

    async fn send_within(&self, batch: &Batch, limit: Duration) -> Result<Vec<Value>, StoreError> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let metrics = &self.inner.metrics;
        let commands = batch.len();
        let started = Instant::now();
        let limit = limit.min(self.inner.command_timeout);
        let outcome = match self
            .inner
            .heard
            .unless_silent(self.run_until(batch, started, limit))
            .await
        {
            Some(outcome) => outcome,
            None => Err(self.silent(started.elapsed())),
        };
        metrics.observe(commands, started.elapsed(), outcome.as_ref().err());
        outcome
    }

    async fn run_until(&self, batch: &Batch, started: Instant, limit: Duration) -> Result<Vec<Value>, StoreError> {
        let deadline = started + limit;
        // A store that is known to be gone refuses at once, whoever waits for a place.
        self.inner.link.refuse_if_down()?;
        let place = timeout_at(deadline, self.inner.places.acquire()).await;
        let Ok(Ok(_place)) = place else {
            let why = format!(
                "{} other batches were before it (max_inflight_batches)",
                self.inner.max_inflight
            );
            return Err(self.timeout(limit, why));
        };
        let _inflight = self.inner.metrics.enter();
        let (conn, generation) = self.inner.link.conn(deadline).await?;
        match timeout_at(deadline, batch.run_on(conn, &self.inner.heard)).await {
            Ok(Ok(replies)) => Batch::refuse_errors(replies),
            Ok(Err(error)) => {
                let error = error::of_redis(&self.inner.shown, &error);
                if matches!(error, StoreError::Unavailable { .. }) {
                    self.inner.link.suspect(generation);
                }
                Err(error)
            }
            Err(_) => {
                self.inner.link.suspect(generation);
                Err(self.timeout(limit, "it has not answered".to_owned()))
            }
        }
    }

    /// Whether the store is there and answers; on a cluster, whether all its slots are served.
    ///
    /// # Errors
    /// Why not, as [`Store::run`].
    pub async fn ping(&self) -> Result<(), StoreError> {
        let deadline = Instant::now() + self.inner.command_timeout;
        let (conn, generation) = self.inner.link.conn(deadline).await?;
        match timeout_at(deadline, conn.ping()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                self.inner.link.suspect(generation);
                Err(error::of_redis(&self.inner.shown, &error))
            }
            Err(_) => {
                self.inner.link.suspect(generation);
                Err(self.timeout(self.inner.command_timeout, "it has not answered".to_owned()))
            }
        }
    }

    /// The store's figures, to be registered once.
    pub fn metrics(&self) -> &StoreMetrics {
        &self.inner.metrics
    }

    /// Keeps the "store" part of `health` true for as long as the server lives.
    pub fn report(&self, health: &Health, life: &Lifecycle) {
        let (mut states, health, owner) = (self.inner.link.states(), health.clone(), life.clone());
        life.spawn_until_closed("store health", async move {
            tokio::select! {
                () = follow(&mut states, &health) => {}
                () = owner.closing() => {}
            }
        });
    }

    /// Nothing came for too long. What had been sent may or may not have been executed.
    fn silent(&self, after: Duration) -> StoreError {
        if let Some(generation) = self.inner.link.generation() {
            self.inner.link.suspect(generation);
        }
        self.timeout(after, "nothing has come from it meanwhile".to_owned())
    }

    fn timeout(&self, after: Duration, why: String) -> StoreError {
        StoreError::Timeout {
            store: self.inner.shown.clone(),
            after_ms: after.as_millis() as u64,
            why,
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("address", &self.inner.shown)
            .finish_non_exhaustive()
    }
}

async fn follow(states: &mut watch::Receiver<State>, health: &Health) {
    loop {
        let state = match &*states.borrow_and_update() {
            State::Up { .. } => Some(Ok(())),
            State::Down { reason } => Some(Err(reason.to_string())),
            // Neither yet: what was said before stands, and nothing said is not ready.
            State::Connecting => None,
        };
        match state {
            Some(state) => health.set("store", state),
            None => health.set_if_absent("store", Err("connecting".to_owned())),
        }
        if states.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
