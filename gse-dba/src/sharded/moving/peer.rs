//! Another gse_dba, through which commands for slots on their way go: to it we are an ordinary client. It confirms by the same rule as we would, so its replies are
//! passed on as they are.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use gse_core::lifecycle::Lifecycle;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::sharded::{Answer, Fate, Pinned, Sharded, control};
use crate::single::Passed;
use crate::single::dial::{Private, Target};
use crate::single::upstream::Upstream;

/// Between attempts while it is not reachable.
const AGAIN: Duration = Duration::from_millis(20);

pub(crate) struct Peer {
    sharded: Sharded,
    /// The epoch of the table that this belongs to.
    epoch: u64,
    pools: [Vec<Upstream>; 2],
    target: Target,
    places: Arc<Semaphore>,
    hold: Duration,
    reply_timeout: Duration,
    max_reply: usize,
}

impl Peer {
    pub(crate) fn start(
        sharded: &Sharded,
        epoch: u64,
        address: &str,
        config: &Config,
        password: String,
        metrics: &Metrics,
        life: &Lifecycle,
    ) -> anyhow::Result<Arc<Self>> {
        let c = &config.sharded;
        let place = control::place(address)?;
        let limit = Duration::from_millis(c.connect_timeout_ms);
        let target = Target::at(place, "default", Some(password).filter(|p| !p.is_empty()), limit);
        // It may hold commands back itself, for as long as we may.
        let reply_timeout_ms = c.reply_timeout_ms.saturating_add(c.hold_ms);
        let mut settings = config.clone();
        settings.single.max_inflight = c.max_inflight;
        settings.single.reply_timeout_ms = reply_timeout_ms;
        settings.single.reconnect_max_ms = c.reconnect_max_ms;
        let pool = |resp3: bool| {
            (0..c.connections)
                .map(|_| Upstream::start(target.clone(), resp3, &settings, metrics.clone(), life))
                .collect::<Vec<_>>()
        };
        Ok(Arc::new(Self {
            sharded: sharded.clone(),
            epoch,
            pools: [pool(false), pool(true)],
            places: Arc::new(Semaphore::new(c.max_private)),
            hold: c.hold(),
            reply_timeout: Duration::from_millis(reply_timeout_ms),
            max_reply: config.limits.output_buffer_bytes,
            target,
        }))
    }

    /// Passes commands on. What could not be sent is tried again for a while, by the newest topology: another may move the slots by then.
    pub(crate) fn send(
        self: &Arc<Self>,
        client: u64,
        resp3: bool,
        bytes: Bytes,
        count: usize,
        writes: bool,
    ) -> BoxFuture<'static, Answer> {
        let peer = Arc::clone(self);
        async move {
            let until = Instant::now() + peer.hold;
            loop {
                let pool = &peer.pools[usize::from(resp3)];
                let Some(upstream) = pool.get((client % pool.len().max(1) as u64) as usize) else {
                    return Answer::lost(false, "no connections are configured");
                };
                let answer = answer(upstream.pass(bytes.clone(), count).await);
                if !matches!(answer.fate, Fate::Lost { sent: false, .. }) || Instant::now() >= until {
                    return answer;
                }
                tokio::time::sleep(AGAIN).await;
                let table = peer.sharded.table();
                if table.epoch > peer.epoch
                    && let Some(group) = super::group_of(&table, &bytes)
                {
                    // The table is held until the answer is there: this is like a batch planned anew.
                    let waiting = group.send(client, resp3, bytes, count, writes).await;
                    let answer = waiting
                        .await
                        .unwrap_or_else(|_| Answer::lost(true, "this server is stopping"));
                    drop(table);
                    return answer;
                }
            }
        }
        .boxed()
    }

    /// A connection of one's own.
    pub(crate) async fn private(&self, resp3: bool) -> Result<Pinned, String> {
        let place = Arc::clone(&self.places)
            .try_acquire_owned()
            .map_err(|_| "too many transactions and blocking commands at once (sharded.max_private)".to_owned())?;
        let until = Instant::now() + self.hold;
        let stream = loop {
            match self.target.connect(resp3).await {
                Ok(stream) => break stream,
                Err(e) if Instant::now() >= until => return Err(format!("{e:#}")),
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        };
        Ok(Pinned::new(
            Private::new(stream, resp3, place, self.reply_timeout, self.max_reply),
            0,
        ))
    }

    pub(crate) async fn exchange(&self, pinned: &mut Pinned, bytes: &[u8], count: usize, blocking: bool) -> Answer {
        let bytes = Bytes::copy_from_slice(bytes);
        answer(pinned.private.pass(bytes, count, blocking).await)
    }
}

fn answer(passed: Passed) -> Answer {
    match passed.lost {
        None => Answer {
            replies: passed.replies,
            fate: Fate::Sealed,
        },
        Some(lost) if lost.too_large => Answer::without(Fate::TooLarge),
        Some(lost) => Answer::lost(lost.sent, lost.reason),
    }
}
