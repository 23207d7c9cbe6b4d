//! The message socket: plugins of this host and the platforms they belong to talk to each other through it (contract data-plane, 1.9).
//!
//! A plugin says its name with every keepalive; the servers address a message by that name. What a plugin says goes to the servers with the
//! session ([`Messages::next`]), from a bounded queue while there is none. Slots, tokens and call-backs are the servers' business.

mod config;
mod connection;
mod frame;
mod table;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use bytes::Bytes;
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use gse_proto::codes::Inner;
use gse_proto::message::{Deliver, Delivered};
use gse_proto::session::PluginMessage;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use prost::Message;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};

use self::config::Accounts;
pub use self::config::{MessageConfig, NAME};
use self::table::Table;
use crate::local::{Gate, Listener, Status};

pub use gse_proto::message::SERVICE;

/// Who the agent is to its plugins.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its id.
    pub agent_id: String,
    /// Its version.
    pub version: &'static str,
    /// The area its host is in.
    pub cloud_id: i32,
    /// 0 proxy, 1 agent.
    pub run_mode: i32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// What is counted about messages.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    connections: Gauge,
    delivered: Counter,
    said: Counter,
    dropped: Family<Reason, Counter>,
}

impl Metrics {
    /// Registers them under the prefix `gse_agent_messages`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("gse_agent_messages");
        registry.register("connections", "Plugins that are connected", self.connections.clone());
        registry.register("delivered", "Messages given to plugins", self.delivered.clone());
        registry.register("said", "Messages of plugins", self.said.clone());
        registry.register(
            "dropped",
            "Messages and answers dropped, by reason",
            self.dropped.clone(),
        );
    }

    fn dropped(&self, reason: &'static str) {
        self.dropped.get_or_create(&Reason { reason }).inc();
    }
}

/// What all connections have in common.
#[derive(Debug)]
struct Shared {
    config: MessageConfig,
    identity: Identity,
    table: Table,
    said: mpsc::Sender<(PluginMessage, OwnedSemaphorePermit)>,
    /// KiB of messages that wait for a server.
    room: Arc<Semaphore>,
    numbers: AtomicU64,
    metrics: Metrics,
    life: Lifecycle,
}

impl Shared {
    /// Queues what a plugin says. What finds no room is dropped and counted: plugins ask again.
    fn say(&self, message: PluginMessage) {
        self.metrics.said.inc();
        let kib = u32::try_from((message.content.len() + 512).div_ceil(1024)).unwrap_or(u32::MAX);
        let queued = Arc::clone(&self.room)
            .try_acquire_many_owned(kib)
            .is_ok_and(|room| self.said.try_send((message, room)).is_ok());
        if !queued {
            self.metrics.dropped("no_room");
            tracing::debug!("a plugin's message was dropped: too many wait for a server");
        }
    }
}

/// The plugins of this host. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Messages {
    shared: Arc<Shared>,
    said: Arc<Mutex<mpsc::Receiver<(PluginMessage, OwnedSemaphorePermit)>>>,
}

impl Messages {
    /// Listens to plugins until the process drains. Places that are not to be had are tried again; when this returns every place was tried
    /// once.
    ///
    /// # Errors
    /// When accounts can't be looked up.
    pub async fn start(
        config: &MessageConfig,
        data_dir: &Path,
        identity: Identity,
        metrics: Metrics,
        health: &Health,
        life: &Lifecycle,
    ) -> anyhow::Result<Self> {
        let (said, waiting) = mpsc::channel(config.queue);
        let shared = Arc::new(Shared {
            config: config.clone(),
            identity,
            table: Table::default(),
            said,
            room: Arc::new(Semaphore::new(config.queue_bytes / 1024)),
            numbers: AtomicU64::new(1),
            metrics,
            life: life.clone(),
        });
        let messages = Self {
            shared: Arc::clone(&shared),
            said: Arc::new(Mutex::new(waiting)),
        };
        if !config.enabled {
            return Ok(messages);
        }
        let names = config.accounts.clone();
        let accounts = tokio::task::spawn_blocking(move || Accounts::resolve(&names))
            .await
            .context("looking up the accounts of messages.accounts")?;
        let accounts = Arc::new(accounts);
        let gate = Gate::new(config.max_connections, config.max_connections);
        let status = Status::new("message socket", health.clone());
        for place in config.places(data_dir) {
            let listener =
                Listener::start((place, true), config.file.clone(), gate.clone(), status.clone(), life).await;
            let (shared, refusing, accounts) = (Arc::clone(&shared), Arc::clone(&shared), Arc::clone(&accounts));
            life.spawn("message socket", async move {
                let take = |stream, peer: crate::local::Peer, pass| {
                    if !accounts.may(peer) {
                        shared.metrics.dropped("not_allowed");
                        tracing::info!(uid = ?peer.uid, pid = ?peer.pid, "a program of this account may be no plugin (messages.accounts)");
                        return;
                    }
                    let number = shared.numbers.fetch_add(1, Ordering::Relaxed);
                    let serving = connection::serve(Arc::clone(&shared), number, stream, peer, pass);
                    shared.life.spawn_contained("plugin", serving);
                };
                listener.run(take, || refusing.metrics.dropped("no_connection")).await;
            });
        }
        Ok(messages)
    }

    /// The next thing that a plugin says, for the session that takes it to a server.
    pub async fn next(&self) -> PluginMessage {
        match self.said.lock().await.recv().await {
            Some((message, _room)) => message,
            // Never: the sender lives as long as this.
            None => std::future::pending().await,
        }
    }

    /// Carries out a call of the service [`SERVICE`].
    pub fn call(&self, payload: Bytes) -> Bytes {
        let (code, text) = match self.deliver(payload) {
            Ok(()) => {
                self.shared.metrics.delivered.inc();
                (Inner::Ok, String::new())
            }
            Err((code, text)) => (code, text),
        };
        Delivered {
            code: code.code(),
            text,
        }
        .encode_to_vec()
        .into()
    }

    fn deliver(&self, payload: Bytes) -> table::Outcome {
        let order = Deliver::decode(payload)
            .map_err(|error| (Inner::Arguments, format!("the order does not decode: {error}")))?;
        let sequence = self.shared.numbers.fetch_add(1, Ordering::Relaxed);
        let frame = connection::dispatch(sequence, &order.message_id, &[order.front, order.own, order.back])
            .map_err(|error| (Inner::System, format!("the message does not encode: {error}")))?;
        self.shared.table.deliver(&order.delivery_id, &order.plugin, frame)
    }

    /// How many names are connected.
    #[must_use]
    pub fn plugins(&self) -> usize {
        self.shared.table.len()
    }
}
