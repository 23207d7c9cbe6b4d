//! gse_procmgr: which processes are registered on which host, operations on them, their last known states.
//!
//! * [`http`]: the calls;
//! * [`task`]: operations from submit to last row;
//! * [`registry`]: what the store knows of processes;
//! * [`reconcile`]: registrations of store and hosts are brought in line;
//! * [`instance`]: other instances of this server.
//!
//! What keeps a process alive is the agent's supervisor, which does so while all of this is down. Agents are reached through gse_task, which
//! holds their sessions and writes what they report to the store.

pub mod config;
pub mod http;
pub mod instance;
pub mod metrics;
pub mod reconcile;
pub mod registry;
pub mod task;

use std::sync::Arc;

use anyhow::Context;
use gse_core::audit::Audit;
use gse_core::authz::Authenticator;
use gse_core::clock::Clock;
use gse_core::fleet::Fleet;
use gse_core::http::{Front, HttpConfig, HttpMetrics, InternalTls};
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::{self, Health};
use gse_core::quota::Quotas;
use gse_core::random::Random;
use gse_core::rpc::Dialler;
use gse_core::store::Store;
use gse_core::tls::Role;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::sync::Semaphore;

pub use config::Config;

use crate::metrics::Metrics;
use crate::task::engine::{self, Tasks};
use crate::task::store::TaskStore;

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
    /// Ids and choices.
    pub random: Random,
    /// Tasks in the store.
    pub store: TaskStore,
    /// The way to the agents.
    pub fleet: Fleet,
    /// How much each application may ask for.
    pub quotas: Quotas,
    /// Tasks under way.
    pub tasks: Tasks,
    /// Places for calls to agents that wait for their answers.
    pub calls: Arc<Semaphore>,
    /// What the HTTP listeners share.
    pub front: Front,
    /// Drawn at each start.
    pub life_id: u64,
    internal: Mutex<String>,
}

impl Node {
    /// Address under which other servers call this one; empty if they can't.
    #[must_use]
    pub fn calls_address(&self) -> String {
        if self.config.internal.advertise.is_empty() {
            self.internal.lock().clone()
        } else {
            self.config.internal.advertise.clone()
        }
    }
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
    let (rpc, own) = (config.rpc.clone(), files.clone());
    let made = tokio::task::spawn_blocking(move || Dialler::new(&rpc, rpc.tls.as_ref().unwrap_or(&own)));
    let dialler = made.await.context("reading certificates")?.context("internal.tls")?;
    ops::serve(&config.ops, Arc::new(registry), health, &life).await?;

    let random = Random::system();
    let node = Arc::new(Node {
        quotas: Quotas::new(store.clone(), policy.clone(), metrics.quota_refused.clone()),
        store: TaskStore::new(store.clone(), config.task.cache_bytes),
        fleet: Fleet::new(store, dialler, config.fleet.clone()),
        tasks: Tasks::default(),
        calls: Arc::new(Semaphore::new(config.task.calls_at_once)),
        life_id: random.u64() >> 16,
        internal: Mutex::default(),
        clock: Clock::system(),
        front: front.clone(),
        life: life.clone(),
        metrics,
        random,
        config,
    });
    if !engine::recover(&node).await {
        return Ok(());
    }

    let service = Arc::new(http::ProcService {
        node: Arc::clone(&node),
        policy,
    });
    let config = &node.config;
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
        let bound = gse_core::http::serve(&internal, "internal", Some(tls), service, &front, &life).await?;
        *node.internal.lock() = bound.to_string();
    }
    life.spawn("instance", instance::keep(Arc::clone(&node)));
    life.spawn("registrations", reconcile::run(Arc::clone(&node)));
    life.ready();
    life.draining().await;
    Ok(())
}
