//! gse_data: records of plugins, taken from agents, routed by data id alone, handed to sinks.
//!
//! * [`ingest`]: links of agents and proxies: batches come in, acknowledgements go out;
//! * [`intake`]: records that our own servers hand over;
//! * [`http`]: calls of administrators;
//! * [`routes`]: which id goes where, and the calls that change it;
//! * [`router`]: takes a batch apart by the routes of the moment;
//! * [`sinks`]: hands on what they are given, or keeps it on disk until it can;
//! * [`stats`]: what became of how many records, by data id;
//! * [`tail`]: records shown to operators as they come in.
//!
//! A batch is acknowledged when every sink of its routes has it, or has it in its spool on disk, or when what is missing was dropped and
//! counted.

mod conf;
pub mod config;
pub mod http;
pub mod ingest;
pub mod intake;
pub mod metrics;
pub mod router;
pub mod routes;
pub mod sinks;
pub mod stats;
pub mod tail;

use std::sync::Arc;

use anyhow::Context;
use arc_swap::ArcSwap;
use gse_core::clock::Clock;
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::{self, Health};
use gse_core::random::Random;
use gse_core::store::Store;
use prometheus_client::registry::Registry;
use tokio::sync::Semaphore;

pub use config::Config;
use config::RunMode;

use crate::ingest::book::Books;
use crate::metrics::Metrics;
use crate::router::Router;
use crate::routes::table::RouteTable;
use crate::sinks::Sinks;
use crate::stats::Stats;
use crate::tail::Tails;

/// Everything a running instance consists of.
pub struct Node {
    /// As configured.
    pub config: Config,
    /// Stop signals and owned tasks.
    pub life: Lifecycle,
    /// Figures.
    pub metrics: Metrics,
    /// The server's clock.
    pub clock: Clock,
    /// Ids and choices.
    pub random: Random,
    /// The routes of the moment; who reads them from the store puts each new table here.
    pub routes: Arc<ArcSwap<RouteTable>>,
    /// Takes batches apart.
    pub router: Router,
    /// Where records go.
    pub sinks: Sinks,
    /// What became of them.
    pub stats: Arc<Stats>,
    /// Who looks on.
    pub tails: Arc<Tails>,
    /// What each sender was told.
    pub books: Books,
    /// Room (KiB) for batches of all links.
    pub memory: Arc<Semaphore>,
}

/// Runs an instance until `life` drains.
///
/// # Errors
/// When a listener can't be bound, or a file or directory of the configuration can't be used.
pub async fn run(config: Config, life: Lifecycle) -> anyhow::Result<()> {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let health = Health::new();
    let mut store = None;
    let mut front = None;
    if config.run_mode == RunMode::Server {
        let connected = Store::connect(&config.store).await.context("store")?;
        connected.metrics().register(&mut registry);
        connected.report(&health, &life);
        store = Some(connected);
        front = Some(http::front(&config, &mut registry, &life)?);
    }
    let stats = Arc::new(Stats::new(config.sinks.max_ids));
    let sinks = Sinks::new(&config, Arc::clone(&stats), metrics.clone()).await?;
    ops::serve(&config.ops, Arc::new(registry), health, &life).await?;

    let mut ways = None;
    if let Some(store) = store {
        ways = Some(routes::start(&config.routes, store, Random::system(), &life).await?);
    }
    let node = Arc::new(Node {
        routes: ways.as_ref().map(|ways| ways.watch.table()).unwrap_or_default(),
        router: Router::default(),
        books: Books::new(config.link.remember),
        memory: Arc::new(Semaphore::new(config.link.memory_bytes / 1024)),
        clock: Clock::system(),
        random: Random::system(),
        life: life.clone(),
        sinks,
        stats,
        tails: Arc::new(Tails::new(&config.tail, &metrics)),
        metrics,
        config,
    });
    router::refresh(&node).await;
    life.spawn("routes", router::follow(Arc::clone(&node)));
    ingest::serve(&node).await?;
    if let (Some(front), Some(ways)) = (&front, &ways) {
        http::serve(&node, front, ways).await?;
        intake::serve(&node).await?;
    }
    life.ready();
    life.draining().await;
    // Links say goodbye first; then what they brought goes to its sinks, or to their spools.
    let end = tokio::time::Instant::now() + ingest::STOPPING;
    while node.metrics.links.get() > 0 && tokio::time::Instant::now() < end {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    node.sinks.finish().await;
    Ok(())
}
