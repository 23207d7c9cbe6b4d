//! The back end that is one Redis by URL. Commands of all clients go over a few shared connections, one write per socket read; replies pass through byte for byte, counted and not
//! decoded. What needs a connection of its own (transactions, blocking commands, subscriptions) gets one for as long as it lasts.

pub(crate) mod dial;
pub(crate) mod probe;
pub(crate) mod session;
mod upstream;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::{Bytes, BytesMut};
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::client::Turn;
use crate::config::Config;
use crate::copy::Reply;
use crate::metrics::Metrics;
use crate::workers::Workers;
use dial::{Private, Target};
use probe::Capabilities;
use upstream::Upstream;

/// Idle private connections kept for the next transaction.
const IDLE: usize = 16;

const IN_A_CLUSTER: &str =
    "is a node of a cluster and serves only a part of the data: set backend = \"cluster\" and name it in cluster.seeds";

const CLIENT_ID: &[u8] = b"*2\r\n$6\r\nCLIENT\r\n$2\r\nID\r\n";

/// Whether a reply says that there is nothing.
pub(crate) fn is_null(reply: &[u8]) -> bool {
    [&b"*-1\r\n"[..], b"$-1\r\n", b"_\r\n"].contains(&reply)
}

/// What became of commands that were passed on.
#[derive(Default)]
pub(crate) struct Passed {
    /// Whole replies, in order.
    pub(crate) replies: BytesMut,
    /// How many.
    pub(crate) count: usize,
    /// Why there are no more.
    pub(crate) lost: Option<Lost>,
}

/// Why commands got no reply.
#[derive(Clone, Debug)]
pub(crate) struct Lost {
    /// Whether they may have reached the store.
    pub(crate) sent: bool,
    pub(crate) reason: String,
    /// The replies were there, and too large.
    pub(crate) too_large: bool,
}

struct Inner {
    target: Target,
    shared: [Vec<Upstream>; 2],
    idle: [Mutex<Vec<Private>>; 2],
    private: Arc<Semaphore>,
    up: AtomicUsize,
    reply_timeout: Duration,
    max_reply: usize,
    /// None until it could be asked.
    capabilities: ArcSwapOption<Capabilities>,
}

/// A handle on the Redis behind.
#[derive(Clone)]
pub(crate) struct Single(Arc<Inner>);

impl Single {
    /// Starts connecting. It waits for the store for one connect timeout at most: that may come later.
    pub(crate) async fn start(
        config: &Config,
        workers: &Workers,
        metrics: Metrics,
        life: &Lifecycle,
        health: &Health,
    ) -> anyhow::Result<Self> {
        let c = config.single.clone();
        let password = tokio::task::spawn_blocking(move || c.resolve_password()).await??;
        let target = Target::parse(&config.single, password)?;
        let limit = Duration::from_millis(config.single.connect_timeout_ms);
        let found = match probe::probe(&target, limit, config.limits.output_buffer_bytes).await {
            Ok(found) => {
                anyhow::ensure!(!found.cluster, "{} {IN_A_CLUSTER}", target.name);
                tracing::info!(store = %target.name, engine = found.engine, resp3 = found.resp3, wait = found.wait, "what stands behind");
                Some(Arc::new(found))
            }
            Err(e) => {
                tracing::debug!(error = %format!("{e:#}"), "the store can't say yet what it can do");
                None
            }
        };
        // Connections in a protocol that it does not speak would be tried for ever.
        let both = found.as_ref().is_none_or(|f| f.resp3);
        let start = |resp3: bool| {
            let n = if resp3 && !both {
                0
            } else {
                workers.share(config.single.connections)
            };
            (0..n)
                .map(|i| {
                    let _on = workers.enter(i);
                    Upstream::start(target.clone(), resp3, config, metrics.clone(), life)
                })
                .collect::<Vec<_>>()
        };
        let inner = Inner {
            shared: [start(false), start(true)],
            target,
            idle: Default::default(),
            private: Arc::new(Semaphore::new(config.single.max_private)),
            up: AtomicUsize::new(0),
            reply_timeout: Duration::from_millis(config.single.reply_timeout_ms),
            max_reply: config.limits.output_buffer_bytes,
            capabilities: ArcSwapOption::from(found),
        };
        let single = Self(Arc::new(inner));
        let (watched, health) = (single.clone(), health.clone());
        health.set("store", Err("not connected yet".into()));
        life.spawn_until_closed("dba-health", async move {
            let mut every = tokio::time::interval(Duration::from_millis(200));
            let mut was_up = watched.0.capabilities.load().is_some();
            loop {
                every.tick().await;
                let up = watched.0.shared[0].iter().filter(|u| u.is_up()).count();
                watched.0.up.store(up, Ordering::Relaxed);
                // What comes back may be another server.
                if up > 0 && !std::mem::replace(&mut was_up, up > 0) {
                    let asked = probe::probe(&watched.0.target, watched.0.reply_timeout, watched.0.max_reply);
                    match asked.await {
                        Ok(found) => watched.0.capabilities.store(Some(Arc::new(found))),
                        Err(e) => {
                            tracing::warn!(error = %format!("{e:#}"), "the store does not say what it can do");
                            was_up = false;
                        }
                    }
                } else {
                    was_up = up > 0;
                }
                health.set(
                    "store",
                    if let Some(why) = watched.unfit() {
                        Err(why)
                    } else if up > 0 {
                        Ok(())
                    } else {
                        Err(format!("no connection to {}", watched.0.target.name))
                    },
                );
            }
        });
        // A store that is there is connected to before clients are taken; one that is not is not waited for any longer.
        let connected = async {
            while !single.0.shared.iter().flatten().all(Upstream::is_up) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(Duration::from_millis(config.single.connect_timeout_ms), connected)
            .await
            .is_err()
        {
            tracing::warn!(store = %single.0.target.name, "the store is not reachable yet; clients are told so until it is");
        }
        Ok(single)
    }

    /// What the server behind can do, once it has said so.
    pub(crate) fn capabilities(&self) -> Option<Arc<Capabilities>> {
        self.0.capabilities.load_full()
    }

    /// Why nothing may be sent to it, if so.
    fn unfit(&self) -> Option<String> {
        let is_cluster = self.0.capabilities.load().as_ref().is_some_and(|c| c.cluster);
        is_cluster.then(|| format!("{} {IN_A_CLUSTER}", self.0.target.name))
    }

    /// Passes commands on over the shared connection that this client always uses, so that they stay in order. It is one of the client's own worker: there
    /// are as many of each.
    pub(crate) async fn pass(&self, client: u64, resp3: bool, bytes: Bytes, count: usize) -> Passed {
        if let Some(reason) = self.unfit() {
            return Passed {
                lost: Some(Lost {
                    sent: false,
                    reason,
                    too_large: false,
                }),
                ..Passed::default()
            };
        }
        let pool = &self.0.shared[usize::from(resp3)];
        match pool.get((client % pool.len().max(1) as u64) as usize) {
            Some(upstream) => upstream.pass(bytes, count).await,
            None => Passed {
                lost: Some(Lost {
                    sent: false,
                    reason: "no connections are configured".into(),
                    too_large: false,
                }),
                ..Passed::default()
            },
        }
    }

    /// A connection of one's own.
    pub(crate) async fn private(&self, resp3: bool) -> Result<Private, String> {
        if let Some(why) = self.unfit() {
            return Err(why);
        }
        while let Some(private) = self.0.idle[usize::from(resp3)].lock().pop() {
            if private.is_usable() {
                return Ok(private);
            }
        }
        let place = Arc::clone(&self.0.private).try_acquire_owned().map_err(|_| {
            "too many transactions, blocking commands and subscriptions at once (single.max_private)".to_owned()
        })?;
        let stream = self.0.target.connect(resp3).await.map_err(|e| format!("{e:#}"))?;
        Ok(Private::new(
            stream,
            resp3,
            place,
            self.0.reply_timeout,
            self.0.max_reply,
        ))
    }

    /// Sends a command that waits. When its turn is over before there is a result, it is woken, and there is no reply.
    pub(crate) async fn wait(&self, private: &mut Private, bytes: Bytes, turn: &Turn) -> Passed {
        if private.id.is_none() {
            let mut asked = private.pass(Bytes::from_static(CLIENT_ID), 1, false).await;
            if asked.lost.is_some() {
                asked.replies.clear();
                asked.count = 0;
                return asked;
            }
            let id = crate::copy::reply::decode(&asked.replies.freeze()).ok();
            private.id = id.and_then(|r| r.first().and_then(Reply::int));
        }
        let id = private.id;
        let going = private.pass(bytes, 1, true);
        tokio::pin!(going);
        tokio::select! {
            biased;
            passed = &mut going => return passed,
            () = turn.over(), if id.is_some() => {}
        }
        // It is told to give up: what it has got by then it has got, and otherwise it gets nothing.
        let name = id.unwrap_or_default().to_string();
        if let Err(why) = self.ask(&[b"CLIENT", b"UNBLOCK", name.as_bytes()]).await {
            tracing::debug!(why, "a command that waits could not be woken");
        }
        let mut passed = going.await;
        if passed.lost.is_none() && is_null(&passed.replies) {
            passed.replies.clear();
            turn.disturb();
        }
        passed
    }

    /// Asks the server itself something, beside the clients' commands.
    pub(crate) async fn ask(&self, words: &[&[u8]]) -> Result<Reply, String> {
        let mut private = self.private(false).await?;
        let mut bytes = Vec::new();
        session::push_command(&mut bytes, words.iter().copied());
        let passed = private.pass(bytes.into(), 1, false).await;
        if let Some(lost) = passed.lost {
            return Err(lost.reason);
        }
        self.give_back(private);
        let mut replies = crate::copy::reply::decode(&passed.replies.freeze())?;
        replies.pop().ok_or_else(|| "there was no reply".to_owned())
    }

    /// Takes back a private connection that holds no transaction, watch or subscription.
    pub(crate) fn give_back(&self, private: Private) {
        let mut idle = self.0.idle[usize::from(private.resp3)].lock();
        if idle.len() < IDLE && private.is_usable() {
            idle.push(private);
        }
    }
}
