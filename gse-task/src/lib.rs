//! gse_task: sessions of agents, fan-out of scripts and commands, results.
//!
//! * [`session`]: who is connected;
//! * [`presence`]: what others may know of that;
//! * [`reports`]: what agents report of their processes;
//! * [`task`]: script tasks from submit to last row;
//! * [`peers`]: the other nodes;
//! * [`calls`]: what other services ask of agents;
//! * [`message`]: what platforms and their plugins on the hosts say to each other;
//! * [`http`]: the calls.
//!
//! Files, processes and data are other servers' business; they reach agents through this one.

pub mod calls;
pub mod clock;
pub mod config;
pub mod http;
pub mod message;
pub mod metrics;
pub mod peers;
pub mod presence;
pub mod reports;
pub mod session;
pub mod task;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use gse_core::audit::Audit;
use gse_core::authz::Authenticator;
use gse_core::clock::Clock;
use gse_core::http::{Front, HttpConfig, HttpMetrics, InternalTls};
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::{self, Health};
use gse_core::quota::Quotas;
use gse_core::random::Random;
use gse_core::rpc::{self, Dialler};
use gse_core::store::Store;
use gse_core::tls::Role;
use gse_proto::calls::agent_calls_server::AgentCallsServer;
use gse_proto::peer::task_peer_server::TaskPeerServer;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

pub use config::Config;

use crate::calls::Calls;
use crate::message::Messages;
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::presence::Presence;
use crate::session::registry::{Registry as Sessions, Ticks};
use crate::task::budget::Budget;
use crate::task::engine::Tasks;
use crate::task::ingest::Ingest;
use crate::task::store::TaskStore;

/// How long a stopping node waits for its sessions to close.
const SESSIONS_GRACE: Duration = Duration::from_secs(5);

/// How long a starting node waits for its first look at the others.
const FIRST_LOOK: Duration = Duration::from_secs(3);

/// Everything a running node consists of.
pub struct Node {
    /// As configured.
    pub config: Config,
    /// Stop signals and owned tasks.
    pub life: Lifecycle,
    /// Figures.
    pub metrics: Metrics,
    /// What is decided by time is decided on this clock.
    pub clock: Clock,
    /// Ids and jitter.
    pub random: Random,
    /// Coarse clock for stamps.
    pub ticks: Ticks,
    /// Connected agents.
    pub registry: Sessions,
    /// What others know of them.
    pub presence: Presence,
    /// Reports of processes on their way to the store.
    pub reports: reports::Reports,
    /// Tasks in the store.
    pub task_store: TaskStore,
    /// Tasks under way.
    pub tasks: Tasks,
    /// How much each application may ask for.
    pub quotas: Quotas,
    /// Results on their way to the store.
    pub ingest: Ingest,
    /// What the HTTP listeners share.
    pub front: Front,
    /// Drawn at each start; what another life of this node held is not held any more.
    pub life_id: u64,
    /// Room (KiB) for answers with output, all together.
    pub answer_room: Arc<Semaphore>,
    /// How much output may be kept.
    pub budget: Budget,
    /// The other nodes.
    pub peers: Peers,
    /// What other services have asked of agents.
    pub calls: Calls,
    /// What platforms and plugins say to each other; nothing before the node listens.
    pub messages: OnceLock<Messages>,
    /// Cancelled when a stopping node has handed its tasks over, or has given that up.
    pub handed_over: CancellationToken,
    next_session: AtomicU64,
    bound: Mutex<BTreeMap<&'static str, String>>,
}

/// What a node is given from outside.
pub struct Parts {
    /// As configured.
    pub config: Config,
    /// Stop signals and owned tasks.
    pub life: Lifecycle,
    /// Figures.
    pub metrics: Metrics,
    /// Its clock.
    pub clock: Clock,
    /// Its randomness.
    pub random: Random,
    /// Its store.
    pub store: Store,
    /// What its HTTP listeners share.
    pub front: Front,
    /// Its table of other nodes.
    pub peers: Peers,
}

impl Node {
    /// Puts a node together and starts what runs for as long as it does. It listens to nobody yet.
    #[must_use]
    pub fn assemble(parts: Parts) -> Arc<Self> {
        let Parts {
            config,
            life,
            metrics,
            clock,
            random,
            store,
            front,
            peers,
        } = parts;
        let (ingest, writers) = Ingest::new(config.task.ingest_writers, config.task.ingest_queue);
        let node = Arc::new(Self {
            ticks: Ticks::start(),
            registry: Sessions::default(),
            presence: Presence::new(store.clone()),
            reports: reports::Reports::default(),
            quotas: Quotas::new(
                store.clone(),
                front.authenticator.policy(),
                metrics.quota_refused.clone(),
            ),
            task_store: TaskStore::new(
                store,
                config.task.cache_bytes,
                Duration::from_millis(config.task.cache_idle_ms),
            ),
            tasks: Tasks::default(),
            ingest,
            front,
            metrics,
            // Small enough to be exact in anything that reads it.
            life_id: random.u64() >> 16,
            answer_room: Arc::new(Semaphore::new(config.task.answers_total_bytes / 1024)),
            next_session: AtomicU64::new(random.u64() >> 16),
            budget: Budget::new(&config.task),
            peers,
            calls: Calls::new(config.calls.clone()),
            messages: OnceLock::new(),
            handed_over: CancellationToken::new(),
            bound: Mutex::default(),
            life,
            clock,
            random,
            config,
        });
        node.tasks.attach(&node);
        let life = &node.life;
        for writer in writers {
            life.spawn("result writer", writer.run(Arc::clone(&node)));
        }
        life.spawn("presence", Presence::write(Arc::clone(&node)));
        life.spawn("reports of processes", reports::write(Arc::clone(&node)));
        life.spawn("lease", peers::keep(Arc::clone(&node)));
        life.spawn("output budget", Budget::keep(Arc::clone(&node)));
        life.spawn("hand-over", peers::takeover::on_drain(Arc::clone(&node)));
        node
    }

    /// Takes up what was under way in the node's last life, and starts the sweeps; then agents may be let in. False when the node
    /// drains before that.
    pub async fn take_up(self: &Arc<Self>) -> bool {
        if !task::recover::recover(self).await {
            return false;
        }
        self.life.spawn("session sweep", session::sweep(Arc::clone(self)));
        self.life.spawn("task sweep", Tasks::sweep(Arc::clone(self)));
        self.life.spawn("balance", peers::balance::run(Arc::clone(self)));
        true
    }

    /// Addresses under which this node takes agents.
    #[must_use]
    pub fn own_addresses(&self) -> Vec<String> {
        if self.config.agents.advertise.is_empty() {
            self.reachable("agents").into_iter().collect()
        } else {
            self.config.agents.advertise.clone()
        }
    }

    /// Addresses that agents are told: of this node, then of the others.
    #[must_use]
    pub fn advertised(&self) -> Vec<String> {
        let mut all = self.own_addresses();
        all.extend(self.peers.agent_addresses());
        all
    }

    /// Address under which others reach a listener of this node; empty if there is none.
    #[must_use]
    pub fn address(&self, listener: &str) -> String {
        let advertise = match listener {
            "internal" => &self.config.internal.advertise,
            _ => &self.config.rpc.advertise,
        };
        match self.reachable(listener) {
            _ if !advertise.is_empty() && self.bound.lock().contains_key(listener) => advertise.clone(),
            bound => bound.unwrap_or_default(),
        }
    }

    /// The address of a listener, if it is one that others can use: all addresses of a host are none.
    fn reachable(&self, listener: &str) -> Option<String> {
        let bound = self.bound.lock().get(listener).cloned()?;
        let address: std::net::SocketAddr = bound.parse().ok()?;
        (!address.ip().is_unspecified()).then_some(bound)
    }

    /// Resolves when the node drains and its sessions have ended, or have had time to.
    pub async fn sessions_gone(&self) {
        self.life.draining().await;
        let deadline = tokio::time::Instant::now() + SESSIONS_GRACE;
        while !self.registry.is_empty() && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Runs a node until `life` drains.
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
    let rpc_files = rpc::files(&config.rpc, config.internal.tls.as_ref().or(config.agents.tls.as_ref()));
    let dialler = match &rpc_files {
        Some(files) if !config.rpc.listen.is_empty() => {
            let (rpc, files) = (config.rpc.clone(), files.clone());
            let made = tokio::task::spawn_blocking(move || Dialler::new(&rpc, &files)).await;
            Some(made.context("reading certificates")?.context("rpc.tls")?)
        }
        _ => None,
    };
    let message_metrics = message::Metrics::default();
    message_metrics.register(&mut registry);
    let messages = {
        let (config, store, dialler, life) = (config.clone(), store.clone(), dialler.clone(), life.clone());
        let making = tokio::task::spawn_blocking(move || {
            // It starts what belongs to the node, on the runtime.
            Messages::start(&config, store, dialler, message_metrics, &life)
        });
        making.await.context("reading certificates")?.context("messages.ca")?
    };
    let node = Node::assemble(Parts {
        life: life.clone(),
        metrics,
        clock: Clock::system(),
        random: Random::system(),
        store,
        front: front.clone(),
        peers: Peers::new(dialler),
        config,
    });

    if node.messages.set(messages).is_err() {
        anyhow::bail!("a node was given two ways for messages");
    }
    let service = Arc::new(http::ScriptService {
        node: Arc::clone(&node),
        policy,
    });
    let config = &node.config;
    if !config.http.listen.is_empty() {
        gse_core::http::serve(&config.http, "http", None, Arc::clone(&service), &front, &life).await?;
    }
    if !config.internal.listen.is_empty() {
        let files = config.internal.tls.clone().context("internal.tls is not set")?;
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
    if !config.rpc.listen.is_empty() {
        let files = rpc_files.context("rpc.tls is not set")?;
        let service = TaskPeerServer::new(peers::serve::Service {
            node: Arc::clone(&node),
        })
        .max_decoding_message_size(config.rpc.max_message_bytes)
        .max_encoding_message_size(config.rpc.max_message_bytes);
        let calls = AgentCallsServer::new(calls::Service {
            node: Arc::clone(&node),
        })
        .max_decoding_message_size(config.rpc.max_message_bytes)
        .max_encoding_message_size(config.rpc.max_message_bytes);
        let routes = tonic::service::Routes::new(service).add_service(calls);
        let gone = Arc::clone(&node);
        let bound = rpc::serve(
            &config.rpc,
            &files,
            routes,
            async move { gone.sessions_gone().await },
            &life,
        )
        .await?;
        life.announce("rpc", bound.to_string());
        node.bound.lock().insert("rpc", bound.to_string());
    }
    ops::serve(&config.ops, Arc::new(registry), health, &life).await?;

    // Agents are let in when everything that they may hold results of is known again.
    if !node.take_up().await {
        return Ok(());
    }
    node.peers.looked(FIRST_LOOK).await;
    let bound = session::listen(&node)?.to_string();
    node.bound.lock().insert("agents", bound.clone());
    // Where it is reached was not known when it first said that it is there.
    node.peers.say_again();
    life.announce("agents", bound);
    life.ready();
    life.draining().await;
    Ok(())
}
