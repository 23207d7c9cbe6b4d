//! The embedded store for a host program that has streams of its own, and no thread to spare: a simulation. Same engine, same protocol,
//! same log on the disk; listeners, TLS and metrics are left out.

use anyhow::Context as _;
use gse_core::clock::Clock;
use gse_core::lifecycle::Lifecycle;
use prometheus_client::registry::Registry;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::config::{Backend, Config};
use crate::engine::{Engine, Message};
use crate::metrics::Metrics;
use crate::migrate::Office;
use crate::server::{self, Shared, Store, TICK};
use crate::workers::Workers;

/// An embedded store that serves the streams it is given.
pub struct Embed {
    shared: Arc<Shared>,
}

impl Embed {
    /// Opens the store. Its engine is a task of `life`; what has expired, `clock` says. Blocking.
    ///
    /// # Errors
    /// When the configuration is for another back end or has no password, or the directory can't be used.
    pub fn open(config: Config, clock: Clock, life: &Lifecycle) -> anyhow::Result<Self> {
        anyhow::ensure!(
            config.backend == Backend::Embedded,
            "only the embedded store can be served so"
        );
        let users = config.resolve_users()?;
        let metrics = Metrics::new(&mut Registry::default());
        let (settings, max_memory) = server::settings(&config);
        let engine = Engine::open(settings, max_memory, metrics.clone(), clock).context("the embedded store")?;
        let (inbox, outbox) = mpsc::channel(config.limits.engine_queue);
        let ticks = inbox.downgrade();
        life.spawn_critical("engine", engine.run_here(outbox));
        life.spawn_until_closed("ticks", async move {
            let mut every = tokio::time::interval(TICK);
            loop {
                every.tick().await;
                let Some(inbox) = ticks.upgrade() else { return };
                // A full queue is work enough: the tick may be left out.
                let _ = inbox.try_send(Message::Tick);
            }
        });
        let office = Office::of(&config, Store::Embedded(inbox), metrics.clone(), life);
        let shared = Shared::new(config, users, office, metrics, life.clone(), Workers::default());
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Serves a client; `peer` is what it is called.
    pub fn serve(&self, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, peer: String) {
        server::admit(&self.shared, stream, peer, "embedded".to_owned());
    }
}
