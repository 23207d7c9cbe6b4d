//! gse_syncdata: keeps the file with a host's identity on every agent in step with what CMDB, a directory or calls say.
//!
//! * [`source`]: where identities come from; [`identity`]: what one is, and whose;
//! * [`ledger`]: which host is how far, as a pure type; [`desk`]: the same with the store behind it;
//! * [`push`]: brings what is due to the hosts; [`agents`]: looks for agents that come, or come back;
//! * [`store`]: what is kept; [`http`]: calls.
//!
//! Any number of instances share a store. One of them is active, by a lease; all of them answer calls.

pub mod agents;
pub mod config;
pub mod desk;
pub mod http;
pub mod identity;
pub mod ledger;
pub mod metrics;
pub mod push;
pub mod source;
pub mod store;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use gse_core::audit::Audit;
use gse_core::authz::Authenticator;
use gse_core::clock::Clock;
use gse_core::fleet::Fleet;
use gse_core::http::{Front, HttpConfig, HttpMetrics, InternalTls};
use gse_core::lease::Lease;
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::{self, Health};
use gse_core::random::Random;
use gse_core::rpc::Dialler;
use gse_core::store::Store;
use gse_core::tls::Role;
use gse_proto::keys;
use prometheus_client::registry::Registry;

pub use config::Config;

use crate::desk::{Backoff, Desk};
use crate::metrics::Metrics;
use crate::source::{Configured, Source};
use crate::store::SyncStore;

/// Everything a running instance consists of.
pub struct Node {
    /// As configured.
    pub config: Config,
    /// Stop signals and owned tasks.
    pub life: Lifecycle,
    /// Figures.
    pub metrics: Metrics,
    /// What is decided by time is decided on this clock.
    pub clock: Clock,
    /// Ids and pauses.
    pub random: Random,
    /// What is kept.
    pub store: SyncStore,
    /// The way to the agents.
    pub fleet: Fleet,
    /// What the HTTP listeners share.
    pub front: Front,
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
    let authenticator = Authenticator::new(&config.authz).context("authz")?;
    authenticator.follow_reloads(&life);
    let policy = authenticator.policy();
    let front = Front {
        authenticator,
        audit: Audit::open(&config.audit).context("audit")?,
        metrics: HttpMetrics::new(&mut registry),
    };
    let files = config.internal.tls.clone().context("internal.tls is not set")?;
    let (rpc, client_files) = (config.rpc.clone(), files.clone());
    let made = tokio::task::spawn_blocking(move || Dialler::new(&rpc, rpc.tls.as_ref().unwrap_or(&client_files)));
    let dialler = made.await.context("reading certificates")?.context("internal.tls")?;
    ops::serve(&config.ops, Arc::new(registry), health, &life).await?;

    let random = Random::system();
    let node = Arc::new(Node {
        store: SyncStore::new(store.clone()),
        fleet: Fleet::new(store.clone(), dialler, config.fleet.clone()),
        clock: Clock::system(),
        front: front.clone(),
        life: life.clone(),
        metrics,
        random,
        config,
    });
    let source = Arc::new(Configured::new(&node).await?);
    let config = &node.config;
    let service = Arc::new(http::HostIdService {
        node: Arc::clone(&node),
        policy,
    });
    if !config.http.listen.is_empty() {
        gse_core::http::serve(&config.http, "http", None, Arc::clone(&service), &front, &life).await?;
    }
    if !config.internal.listen.is_empty() {
        let tls = InternalTls {
            files,
            accept: vec![Role::Server, Role::Operator, Role::ApiClient],
        };
        let internal = HttpConfig {
            listen: config.internal.listen.clone(),
            cert: None,
            key: None,
            ..config.http.clone()
        };
        gse_core::http::serve(&internal, "internal", Some(tls), service, &front, &life).await?;
    }
    let token = format!("{} {:016x}", config.node_id, node.random.u64());
    let lease = Lease::new(store, keys::SYNC_LEASE, token, Duration::from_millis(config.lease_ms));
    let working = Arc::clone(&node);
    life.spawn("active", async move {
        let life = working.life.clone();
        lease
            .lead(&life, || Box::pin(active(Arc::clone(&working), Arc::clone(&source))))
            .await;
        working.metrics.active.set(0);
    });
    life.ready();
    life.draining().await;
    Ok(())
}

/// Says that this instance is active for as long as it is.
struct Active(Metrics);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.set(0);
    }
}

/// What the active instance does, until it is dropped.
async fn active(node: Arc<Node>, source: Arc<Configured>) {
    node.metrics.active.set(1);
    let _active = Active(node.metrics.clone());
    let mut backoff = Backoff::of_ms(200, 2_000);
    let desk = loop {
        match Desk::load(Arc::clone(&node)).await {
            Ok(desk) => break Arc::new(desk),
            Err(error) => tracing::warn!(%error, "hosts can't be read yet"),
        }
        backoff.wait(&node).await;
    };
    node.metrics.counts(desk.counts());
    tokio::join!(
        source.follow(&desk),
        source::inbox::follow(&desk),
        push::run(&desk),
        agents::watch(&desk),
    );
}
