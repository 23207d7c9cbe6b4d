//! The one connection behind a [`super::Store`]: making it, watching it, making it again.
//!
//! A task of its own holds the state; those who send only read it, and say when they suspect the connection. It is asked once a
//! second whether it still answers, so that a loss is known before somebody needs it, and a server that hangs is one that is gone.

use std::sync::Arc;
use std::time::Duration;

use redis::RedisError;
use redis::aio::MultiplexedConnection;
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{MultipleNodeRoutingInfo, ResponsePolicy, RoutingInfo, SingleNodeRoutingInfo};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::target::Target;
use super::{StoreError, StoreMetrics};
use crate::random::Random;

/// How often an idle connection is asked whether it answers.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// Waits between attempts: the first, doubling, up to the last; each by chance between half of it and all of it.
const WAIT_FIRST: Duration = Duration::from_millis(50);
const WAIT_LAST: Duration = Duration::from_secs(2);

/// A connection that can be used.
#[derive(Clone)]
pub(super) enum Conn {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Conn {
    /// Whether the server, or any server of the cluster, answers.
    async fn probe(&self) -> Result<(), RedisError> {
        let cmd = redis::cmd("PING");
        let reply = match self.clone() {
            Self::Single(mut conn) => conn.send_packed_command(&cmd).await?,
            Self::Cluster(mut conn) => {
                conn.route_command(cmd, RoutingInfo::SingleNode(SingleNodeRoutingInfo::Random))
                    .await?
            }
        };
        reply.extract_error().map(drop)
    }

    /// Whether every primary that this connection knows answers.
    async fn probe_primaries(&self) -> Result<(), RedisError> {
        match self.clone() {
            Self::Single(_) => Ok(()),
            Self::Cluster(mut conn) => {
                let everywhere = (MultipleNodeRoutingInfo::AllMasters, Some(ResponsePolicy::AllSucceeded));
                let reply = conn
                    .route_command(redis::cmd("PING"), RoutingInfo::MultiNode(everywhere))
                    .await?;
                reply.extract_error().map(drop)
            }
        }
    }

    /// Whether commands can be expected to be served.
    pub(super) async fn ping(&self) -> Result<(), RedisError> {
        match self.clone() {
            Self::Single(_) => self.probe().await,
            Self::Cluster(mut conn) => {
                let mut cmd = redis::cmd("CLUSTER");
                cmd.arg("INFO");
                let reply = conn
                    .route_command(cmd, RoutingInfo::SingleNode(SingleNodeRoutingInfo::Random))
                    .await?;
                let text: String = redis::from_redis_value(reply.extract_error()?)?;
                if text.lines().any(|line| line.trim() == "cluster_state:ok") {
                    Ok(())
                } else {
                    Err((redis::ErrorKind::Io, "the cluster does not serve all its slots").into())
                }
            }
        }
    }
}

/// What is known of the connection.
#[derive(Clone)]
pub(super) enum State {
    /// An attempt whose outcome is worth waiting for: the first ever, or the first after a loss.
    Connecting,
    /// There is a connection.
    Up {
        conn: Conn,
        /// Counts connections, so that a suspicion is held against the right one.
        generation: u64,
    },
    /// There is none, and attempts go on.
    Down { reason: Arc<str> },
}

/// The readers' end.
pub(super) struct Link {
    shown: String,
    states: watch::Receiver<State>,
    /// Wakes those who wait for a connection, in the order in which they came: of a watch they would be woken in any order, which a
    /// simulation could not repeat.
    changed: Arc<Notify>,
    suspicions: mpsc::Sender<u64>,
    task: AbortHandle,
}

impl Link {
    /// Starts the task that keeps the connection; it ends with the link.
    pub(super) fn start(target: Target, metrics: StoreMetrics, random: Random) -> Self {
        let (states_in, states) = watch::channel(State::Connecting);
        // One suspicion waiting is as good as many.
        let (suspicions, suspected) = mpsc::channel(1);
        let shown = target.shown().to_owned();
        let changed = Arc::new(Notify::new());
        let keeper = Keeper {
            target,
            states: states_in,
            changed: Arc::clone(&changed),
            suspected,
            metrics,
            random,
        };
        let task = tokio::spawn(keeper.run()).abort_handle();
        Self {
            shown,
            states,
            changed,
            suspicions,
            task,
        }
    }

    pub(super) fn states(&self) -> watch::Receiver<State> {
        self.states.clone()
    }

    /// An error when there is known to be no connection.
    pub(super) fn refuse_if_down(&self) -> Result<(), StoreError> {
        match &*self.states.borrow() {
            State::Down { reason } => Err(self.unavailable(reason)),
            State::Connecting | State::Up { .. } => Ok(()),
        }
    }

    /// The connection and its generation, waited for while its first attempt is under way.
    pub(super) async fn conn(&self, deadline: Instant) -> Result<(Conn, u64), StoreError> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            match &*self.states.borrow() {
                State::Up { conn, generation } => return Ok((conn.clone(), *generation)),
                State::Down { reason } => return Err(self.unavailable(reason)),
                State::Connecting => {}
            }
            if self.states.has_changed().is_err() {
                return Err(self.unavailable("its connection is no longer kept"));
            }
            if timeout_at(deadline, changed).await.is_err() {
                return Err(self.unavailable("still connecting"));
            }
        }
    }

    /// Which connection is in use.
    pub(super) fn generation(&self) -> Option<u64> {
        match &*self.states.borrow() {
            State::Up { generation, .. } => Some(*generation),
            State::Connecting | State::Down { .. } => None,
        }
    }

    /// Says that the connection of `generation` did not do its work.
    pub(super) fn suspect(&self, generation: u64) {
        // Full means that a suspicion is there already; closed that the task has ended, which conn() reports.
        let _ = self.suspicions.try_send(generation);
    }

    fn unavailable(&self, reason: &str) -> StoreError {
        StoreError::Unavailable {
            store: self.shown.clone(),
            reason: reason.to_owned(),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The writer's end.
struct Keeper {
    target: Target,
    states: watch::Sender<State>,
    changed: Arc<Notify>,
    suspected: mpsc::Receiver<u64>,
    metrics: StoreMetrics,
    random: Random,
}

/// What became of a connection.
enum End {
    /// It is of no use any more.
    Lost(String),
    /// A better one has been made while it was still in use.
    Replaced(Conn),
}

impl Keeper {
    fn set(&self, state: State) {
        self.states.send_replace(state);
        self.changed.notify_waiters();
    }

    async fn run(mut self) {
        let mut generation = 0;
        let mut replacement = None;
        loop {
            generation += 1;
            let conn = match replacement.take() {
                Some(conn) => conn,
                None => {
                    let conn = self.connected().await;
                    self.metrics.set_up(true);
                    tracing::info!(store = self.target.shown(), "the store is there");
                    conn
                }
            };
            self.set(State::Up {
                conn: conn.clone(),
                generation,
            });
            match self.end_of(&conn, generation).await {
                End::Replaced(conn) => {
                    tracing::info!(store = self.target.shown(), "connected to the cluster anew");
                    replacement = Some(conn);
                }
                End::Lost(reason) => {
                    self.metrics.set_up(false);
                    tracing::warn!(store = self.target.shown(), "the store is lost: {reason}");
                    self.set(State::Connecting);
                }
            }
        }
    }

    /// A connection, however long it takes.
    async fn connected(&self) -> Conn {
        let mut wait = WAIT_FIRST;
        let mut said = String::new();
        loop {
            let reason = match self.attempt().await {
                Ok(conn) => return conn,
                Err(reason) => reason,
            };
            // The same reason again and again is said once.
            if reason != said {
                tracing::warn!(
                    store = self.target.shown(),
                    "the store cannot be reached, trying on: {reason}"
                );
                said.clone_from(&reason);
            }
            self.set(State::Down { reason: reason.into() });
            let jittered = self.random.jittered(wait);
            tokio::time::sleep(jittered).await;
            wait = (wait * 2).min(WAIT_LAST);
        }
    }

    async fn attempt(&self) -> Result<Conn, String> {
        let limit = self.target.connect_timeout();
        match timeout(limit, self.target.open()).await {
            Ok(opened) => opened,
            Err(_) => Err(format!("no connection within {} ms", limit.as_millis())),
        }
    }

    /// Resolves when the connection no longer answers, or has been replaced.
    async fn end_of(&mut self, conn: &Conn, generation: u64) -> End {
        let limit = self.target.command_timeout();
        loop {
            let suspicion = async {
                while let Some(suspect) = self.suspected.recv().await {
                    if suspect == generation {
                        return;
                    }
                }
                // Nobody is left to suspect; the task is about to be dropped.
                std::future::pending().await
            };
            let suspected = timeout(PROBE_EVERY, suspicion).await.is_ok();
            let failed = match timeout(limit, conn.probe()).await {
                Ok(Ok(())) => None,
                Ok(Err(error)) if passes(&error) => None,
                Ok(Err(error)) => Some(super::error::reason(&error)),
                Err(_) => Some(format!("it has not answered for {} ms", limit.as_millis())),
            };
            match (conn, failed) {
                (Conn::Single(_), None) => {}
                (Conn::Single(_), Some(reason)) => return End::Lost(reason),
                (Conn::Cluster(_), failed) => {
                    if failed.is_none() && !(suspected && self.a_primary_hangs(conn).await) {
                        continue;
                    }
                    // A node that hangs may have been replaced by its replica, which a connection that waits for it never hears
                    // of: a new one does. The old one serves the other nodes' slots until then.
                    match (self.attempt().await, failed) {
                        (Ok(conn), _) => return End::Replaced(conn),
                        (Err(reason), Some(_)) => return End::Lost(reason),
                        (Err(_), None) => {}
                    }
                }
            }
        }
    }

    /// Whether a primary of the cluster that `conn` knows does not answer.
    async fn a_primary_hangs(&self, conn: &Conn) -> bool {
        !matches!(
            timeout(self.target.command_timeout(), conn.probe_primaries()).await,
            Ok(Ok(()))
        )
    }
}

/// Whether an answer to a probe says "not now" rather than that this connection is of no use: a server that loads its data is one
/// that is there.
fn passes(error: &RedisError) -> bool {
    matches!(error.kind(), redis::ErrorKind::Server(_)) && !matches!(error.code(), Some("NOAUTH"))
}
