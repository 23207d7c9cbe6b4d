//! gse_btsvr: files from content in a call, or from any agent, to any number of agents.
//!
//! * [`http`]: the calls;
//! * [`task`]: file tasks from submit to last row;
//! * [`path`](mod@path): which way content goes;
//! * [`swarm`]: who takes part in moving it;
//! * [`secret`]: what its members know each other by;
//! * [`zone`]: who is where, and [`relay`]: how content gets from one zone into another;
//! * [`peer`]: this instance as a member of swarms;
//! * [`cache`]: content that it keeps;
//! * [`front`]: foreign BitTorrent clients, for tasks that are opened to them;
//! * [`link`]: connections of agents that move files;
//! * [`instance`]: other instances of this server;
//! * [`takeover`]: tasks of those that are gone.
//!
//! Agents are reached through gse_task, which holds their sessions; how content moves between peers is gse-bt's.

pub mod cache;
pub mod config;
pub mod front;
pub mod http;
pub mod instance;
pub mod link;
pub mod metrics;
pub mod path;
pub mod peer;
pub mod relay;
pub mod secret;
pub mod swarm;
pub mod takeover;
pub mod task;
pub mod zone;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use gse_core::audit::Audit;
use gse_core::authz::Authenticator;
use gse_core::clock::Clock;
use gse_core::fleet::Fleet;
use gse_core::http::{ClientConfig, Front, HttpClient, HttpConfig, HttpMetrics, InternalTls};
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::{self, Health};
use gse_core::quota::Quotas;
use gse_core::random::Random;
use gse_core::rpc::Dialler;
use gse_core::store::Store;
use gse_core::tls::Role;
use gse_proto::ids::AgentId;
use moka::sync::Cache;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::sync::Semaphore;

pub use config::Config;

use crate::instance::Others;
use crate::link::Links;
use crate::metrics::Metrics;
use crate::swarm::{ManifestId, Swarms};
use crate::task::engine::{self, Transfers};
use crate::task::store::XferStore;
use crate::zone::{Reach, Zones};

/// Manifests of sources are kept so long beside the tasks that use them.
const MANIFEST_IDLE: Duration = Duration::from_secs(600);
/// Between two looks at members of swarms that have few peers.
const REFRESH: Duration = Duration::from_secs(3);

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
    pub store: XferStore,
    /// The way to the agents.
    pub fleet: Fleet,
    /// Agents that hold a link.
    pub links: Links,
    /// Who moves what with whom.
    pub swarms: Swarms,
    /// This instance as a member of swarms, if it has a cache.
    pub peer: Option<peer::Peer>,
    /// What foreign clients see of it, if there are to be any.
    pub foreign: Option<front::Front>,
    /// Manifests by id.
    pub manifests: Cache<ManifestId, Bytes>,
    /// Room (KiB) for manifests that are on their way in.
    pub incoming: Arc<Semaphore>,
    /// How much each application may ask for.
    pub quotas: Quotas,
    /// Tasks under way.
    pub transfers: Transfers,
    /// Places for orders that wait for their answers.
    pub orders: Semaphore,
    /// What the HTTP listeners share.
    pub front: Front,
    /// Other instances.
    pub others: Others,
    zones: Mutex<Arc<Zones>>,
    /// Relays that work for this instance, and those that this one works for.
    pub relays: relay::Relays,
    /// Calls to them.
    pub client: HttpClient,
    /// Drawn at each start.
    pub life_id: u64,
    bound: Mutex<BTreeMap<&'static str, String>>,
}

impl Node {
    /// Address under which other servers call this one; empty if they can't.
    #[must_use]
    pub fn calls_address(&self) -> String {
        if self.config.internal.advertise.is_empty() {
            self.bound.lock().get("internal").cloned().unwrap_or_default()
        } else {
            self.config.internal.advertise.clone()
        }
    }

    /// Addresses under which agents reach this server.
    #[must_use]
    pub fn link_addresses(&self) -> Vec<String> {
        if self.config.link.advertise.is_empty() {
            self.bound.lock().get("link").cloned().into_iter().collect()
        } else {
            self.config.link.advertise.clone()
        }
    }

    /// Which zones there are.
    #[must_use]
    pub fn zones(&self) -> Arc<Zones> {
        Arc::clone(&self.zones.lock())
    }

    /// Where a member of swarms is, and how it is reached, if it is there.
    #[must_use]
    pub fn reach(&self, name: &str, zones: &Zones) -> Option<Reach> {
        match &self.peer {
            Some(peer) if peer.name() == name => Some(Reach {
                zone: self.config.zone.name.as_str().into(),
                inner: peer.addresses().to_vec(),
                outer: self.config.zone.advertise.clone(),
            }),
            _ => self.links.reach(name, zones),
        }
    }

    /// Whether this instance is taking part in a swarm.
    #[must_use]
    pub fn has_copy(&self, id: &ManifestId) -> bool {
        self.peer.as_ref().is_some_and(|peer| peer.has_copy(id))
    }

    /// Tells a member of a swarm whom it can talk to, if it has a link.
    pub fn tell_peers(&self, id: &ManifestId, agent: &AgentId) {
        if !self.links.has(agent) {
            return;
        }
        let zones = self.zones();
        let reach = |name: &str| self.reach(name, &zones);
        if let Some(told) = self.swarms.deal(id, agent.as_str(), &zones, reach) {
            self.links.send(agent, told.into());
        }
        if zones.is_divided() && self.swarms.is_unsettled(id) {
            // Where it is was news.
            relay::changed(self);
        }
    }
}

/// Sees to it that nobody in a swarm stays alone.
async fn refresh(node: Arc<Node>) {
    loop {
        tokio::select! {
            () = node.life.draining() => return,
            () = tokio::time::sleep(REFRESH) => {}
        }
        node.metrics
            .tasks_running
            .set(i64::try_from(node.transfers.len()).unwrap_or(i64::MAX));
        node.metrics
            .swarms
            .set(i64::try_from(node.swarms.len()).unwrap_or(i64::MAX));
        let zones = node.zones();
        let is_there = |name: &str| node.reach(name, &zones).is_some();
        for (id, name) in node.swarms.lonely(&zones, is_there) {
            match AgentId::parse(&name) {
                Ok(agent) => node.tell_peers(&id, &agent),
                Err(_) => relay::tell(&node, &id, &name),
            }
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
    let peers = gse_bt::Metrics::default();
    peers.register(&mut registry);
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
    let made = tokio::task::spawn_blocking(move || {
        let dialler = Dialler::new(&rpc, rpc.tls.as_ref().unwrap_or(&client_files))?;
        let client = HttpClient::new(&ClientConfig {
            tls: Some(client_files),
            ..ClientConfig::default()
        })?;
        Ok::<_, gse_core::tls::TlsError>((dialler, client))
    });
    let (dialler, client) = made.await.context("reading certificates")?.context("internal.tls")?;
    let random = Random::system();
    let foreign = front::start(&config.front, &mut registry, &random, &life).await?;
    ops::serve(&config.ops, Arc::new(registry), health, &life).await?;

    let peer = peer::start(&config, &metrics, peers).await?;
    if let Some(address) = peer.as_ref().and_then(|peer| peer.listening()) {
        life.announce("peer", address.to_string());
    }
    let node = Arc::new(Node {
        peer,
        foreign,
        quotas: Quotas::new(store.clone(), policy.clone(), metrics.quota_refused.clone()),
        store: XferStore::new(store.clone(), config.task.cache_bytes),
        fleet: Fleet::new(store, dialler, config.fleet.clone()),
        links: Links::default(),
        swarms: Swarms::new(config.path.max_peers, random.clone()),
        manifests: Cache::builder()
            .max_capacity(config.link.incoming_bytes as u64)
            .weigher(|_, manifest: &Bytes| u32::try_from(manifest.len()).unwrap_or(u32::MAX))
            .time_to_idle(MANIFEST_IDLE)
            .build(),
        incoming: Arc::new(Semaphore::new(config.link.incoming_bytes / 1024)),
        transfers: Transfers::default(),
        orders: Semaphore::new(config.task.orders_at_once),
        others: Others::default(),
        zones: Mutex::default(),
        relays: relay::Relays::default(),
        life_id: random.u64() >> 16,
        bound: Mutex::default(),
        clock: Clock::system(),
        front: front.clone(),
        life: life.clone(),
        metrics,
        client,
        random,
        config,
    });

    // Bound first, because orders name it; agents are let in when what they may report on is known again.
    let listener = link::bind(&node).await?;
    let bound = listener.address().to_string();
    node.bound.lock().insert("link", bound.clone());
    if !zones_known(&node).await || !engine::recover(&node).await {
        return Ok(());
    }
    life.spawn("swarm secrets", secret::keep(Arc::clone(&node)));
    if let Err(error) = front::restore(&node).await {
        tracing::warn!(%error, "what was open to foreign clients can't be read; open it again");
    }
    listener.serve(&node);
    life.announce("link", bound);

    let service = Arc::new(http::FileService {
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
        node.bound.lock().insert("internal", bound.to_string());
    }
    life.spawn("instance", instance::keep(Arc::clone(&node)));
    life.spawn("take-over", takeover::watch(Arc::clone(&node)));
    life.spawn("swarms", refresh(Arc::clone(&node)));
    life.spawn("relays", relay::keep(Arc::clone(&node)));
    life.spawn("uplinks", relay::uplink::keep(Arc::clone(&node)));
    life.spawn("cache", peer::sweep(Arc::clone(&node)));
    life.spawn("front", front::keep(Arc::clone(&node)));
    life.ready();
    life.draining().await;
    Ok(())
}

/// Reads until it succeeds; false when the instance drains first. Whoever comes before that would be taken for somebody next door.
async fn zones_known(node: &Node) -> bool {
    let mut wait = Duration::from_millis(100);
    while !zone::look(node).await {
        tokio::select! {
            () = node.life.draining() => return false,
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(Duration::from_secs(2));
    }
    true
}
