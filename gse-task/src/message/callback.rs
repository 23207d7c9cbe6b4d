//! What plugins say is posted to the platform that has registered them: from a bounded queue for each slot, so that one platform that
//! does not answer holds nobody else's messages up. It may be posted twice when an answer is lost, and is given up after some tries.

use std::sync::Arc;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use gse_core::http::HttpClient;
use gse_core::lifecycle::Lifecycle;
use gse_proto::http::PluginSaid;
use gse_proto::session::PluginMessage;
use http::HeaderMap;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};

use super::config::{MessagesConfig, Slot};
use super::metrics::Metrics;

/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// When the node stops, what waits is tried once for so long.
const LAST_TRIES: Duration = Duration::from_secs(3);

/// What waits to be posted, and the right to wait.
type Waiting = (Bytes, OwnedSemaphorePermit);

/// The way to one platform.
#[derive(Debug)]
struct Way {
    plugin: String,
    queue: mpsc::Sender<Waiting>,
}

/// The ways to all platforms.
#[derive(Debug)]
pub(super) struct Callbacks {
    ways: Vec<Way>,
    /// KiB of everything that waits.
    room: Arc<Semaphore>,
    metrics: Metrics,
}

impl Callbacks {
    /// Starts what posts, for as long as the node runs.
    pub(super) fn start(config: &MessagesConfig, client: &HttpClient, metrics: Metrics, life: &Lifecycle) -> Self {
        let mut ways = Vec::new();
        for slot in config.slots.iter().filter(|slot| !slot.callback.is_empty()) {
            let (queue, waiting) = mpsc::channel(config.callback_queue);
            let waiting = Arc::new(Mutex::new(waiting));
            for _ in 0..config.callback_at_once {
                let poster = Poster {
                    slot: slot.clone(),
                    client: client.clone(),
                    timeout: Duration::from_millis(config.callback_timeout_ms),
                    tries: config.callback_tries,
                    pause: Duration::from_millis(config.callback_retry_ms),
                    metrics: metrics.clone(),
                    life: life.clone(),
                };
                life.spawn("call-backs of plugins", poster.run(Arc::clone(&waiting)));
            }
            ways.push(Way {
                plugin: slot.plugin.clone(),
                queue,
            });
        }
        Self {
            ways,
            room: Arc::new(Semaphore::new(config.callback_queue_bytes / 1024)),
            metrics,
        }
    }

    /// Queues what a plugin says for everybody who has registered it.
    pub(super) fn said(&self, agent: &str, message: &PluginMessage) {
        let mut ways = self.ways.iter().filter(|way| way.plugin == message.plugin).peekable();
        if ways.peek().is_none() {
            self.metrics.dropped("no_slot");
            tracing::debug!(
                agent,
                plugin = message.plugin,
                "nobody has registered the plugin that says something"
            );
            return;
        }
        let said = PluginSaid {
            message_id: message.message_id.clone(),
            bk_agent_id: agent.to_owned(),
            content: String::from_utf8_lossy(&message.content).into_owned(),
        };
        let body = match serde_json::to_vec(&said) {
            Ok(body) => Bytes::from(body),
            Err(error) => {
                self.metrics.dropped("undecodable");
                tracing::warn!(agent, plugin = message.plugin, %error, "what a plugin says does not encode");
                return;
            }
        };
        let kib = u32::try_from(body.len().div_ceil(1024)).unwrap_or(u32::MAX);
        for way in ways {
            let queued = Arc::clone(&self.room)
                .try_acquire_many_owned(kib)
                .is_ok_and(|room| way.queue.try_send((body.clone(), room)).is_ok());
            if !queued {
                self.metrics.dropped("no_room");
            }
        }
    }
}

/// Posts what waits for one slot, one after the other.
struct Poster {
    slot: Slot,
    client: HttpClient,
    timeout: Duration,
    tries: usize,
    pause: Duration,
    metrics: Metrics,
    life: Lifecycle,
}

impl Poster {
    async fn run(self, waiting: Arc<Mutex<mpsc::Receiver<Waiting>>>) {
        loop {
            let next = async { waiting.lock().await.recv().await };
            let next = tokio::select! {
                biased;
                () = self.life.draining() => break,
                next = next => next,
            };
            let Some((body, _room)) = next else { return };
            self.post(body).await;
        }
        loop {
            let next = waiting.lock().await.try_recv();
            let Ok((body, _room)) = next else { return };
            if self.life.draining_for() > LAST_TRIES {
                self.metrics.dropped("stopping");
            } else {
                self.post(body).await;
            }
        }
    }

    async fn post(&self, body: Bytes) {
        let backoff = ExponentialBuilder::default()
            .with_min_delay(self.pause)
            .with_max_delay(LONGEST_PAUSE)
            .with_max_times(self.tries.saturating_sub(1))
            .with_jitter();
        let once = || self.once(body.clone());
        let outcome = once
            .retry(backoff)
            .when(|failed| failed.again && !self.life.is_draining())
            .notify(|_, _| self.metrics.retried())
            .await;
        match outcome {
            Ok(()) => self.metrics.posted(),
            Err(failed) => {
                self.metrics.dropped("callback_failed");
                tracing::warn!(
                    slot = self.slot.slot_id,
                    plugin = self.slot.plugin,
                    "what a plugin said was not taken by its platform and is lost: {}",
                    failed.why
                );
            }
        }
    }

    async fn once(&self, body: Bytes) -> Result<(), Failed> {
        match self
            .client
            .post_json(&self.slot.callback, HeaderMap::new(), body, self.timeout)
            .await
        {
            Ok(reply) if reply.status.is_success() => Ok(()),
            Ok(reply) => Err(Failed {
                // What the platform refuses it will refuse again; that it has too much to do passes.
                again: reply.status.is_server_error() || matches!(reply.status.as_u16(), 408 | 425 | 429),
                why: format!("{} answered {}", self.slot.callback, reply.status),
            }),
            Err(error) => Err(Failed {
                again: true,
                why: error.to_string(),
            }),
        }
    }
}

/// Why a try failed, and whether another one makes sense.
struct Failed {
    again: bool,
    why: String,
}
