//! gse_alarm: finds agents that are not heard any more, and hands alarms about them to gse_data.
//!
//! * [`watch`]: who is lost, who is held back and why, when the next alarm is due;
//! * [`nodes`]: the clocks of the nodes of gse_task, by which that is decided;
//! * [`record`]: the form of an alarm;
//! * [`round`]: the active instance at work;
//! * [`state`]: what is read from the store and kept in it;
//! * [`sender`]: the way to gse_data.
//!
//! Any number of instances run; a lease in the store makes one of them active. Signs of life are gse_task's; where alarms go is decided by
//! the routes of gse_data.

pub mod config;
pub mod metrics;
pub mod nodes;
pub mod record;
pub mod round;
pub mod sender;
pub mod state;
pub mod watch;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Context;
use gse_core::clock::Clock;
use gse_core::lease::Lease;
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::{self, Health};
use gse_core::random::Random;
use gse_core::store::Store;
use gse_proto::keys;
use prometheus_client::registry::Registry;

pub use config::Config;

use crate::metrics::Metrics;
use crate::sender::Sender;
use crate::state::State;

/// Everything a running instance consists of.
pub struct Node {
    /// As configured.
    pub config: Config,
    /// Figures.
    pub metrics: Metrics,
    /// What stands in alarms. Nothing is decided by it.
    pub clock: Clock,
    /// The store.
    pub state: State,
    /// Who is active.
    pub lease: Lease,
    /// The store has refused since this instance looked last.
    pub store_failed: AtomicBool,
    /// The way to gse_data.
    pub sender: tokio::sync::Mutex<Sender>,
}

/// Runs an instance until `life` drains.
///
/// # Errors
/// When a listener can't be bound, or a file of the configuration can't be used.
pub async fn run(config: Config, life: Lifecycle) -> anyhow::Result<()> {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let store = Store::connect(&config.store).await.context("store")?;
    store.metrics().register(&mut registry);
    let health = Health::new();
    store.report(&health, &life);
    let files = config.data.tls.clone().context("data.tls is not set")?;
    let (name, data) = (config.node_id.clone(), config.data.clone());
    let runtime = tokio::runtime::Handle::current();
    let sender = tokio::task::spawn_blocking(move || {
        let _inside = runtime.enter();
        Sender::new(&name, &data, &files)
    });
    let sender = sender.await.context("reading certificates")??;
    ops::serve(&config.ops, Arc::new(registry), health, &life).await?;

    let token = format!("{}/{:016x}", config.node_id, Random::system().u64());
    let lease = Lease::new(
        store.clone(),
        keys::alarm_lease(),
        token,
        Duration::from_millis(config.lease_ms),
    );
    let node = Arc::new(Node {
        state: State::new(store),
        store_failed: AtomicBool::new(false),
        sender: tokio::sync::Mutex::new(sender),
        clock: Clock::system(),
        lease: lease.clone(),
        metrics,
        config,
    });
    let owner = life.clone();
    life.spawn("alarms", async move {
        lease.lead(&owner, || round::lead(Arc::clone(&node))).await;
    });
    life.ready();
    life.draining().await;
    Ok(())
}
