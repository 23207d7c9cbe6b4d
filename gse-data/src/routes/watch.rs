//! Keeps the table of routes as fresh as the store: a counter is looked at all the time, and only what has changed is read again.
//!
//! While the store is away, the table that was read last stands.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use gse_core::lifecycle::Lifecycle;
use gse_core::store::StoreError;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::store::{Channel, KeptStream, RouteStore};
use super::table::RouteTable;
use super::{spec, table};

/// Between two looks at the counter.
const EVERY: Duration = Duration::from_millis(500);
/// Everything is read again so often, whatever the counter says.
const WHOLE: Duration = Duration::from_secs(60);

/// What was read.
#[derive(Default)]
struct Known {
    version: Option<u64>,
    whole: Option<Instant>,
    versions: BTreeMap<u32, u64>,
    channels: BTreeMap<u32, Channel>,
    streams: BTreeMap<u64, KeptStream>,
}

/// The table and what it is made from.
pub struct Watch {
    store: RouteStore,
    table: Arc<ArcSwap<RouteTable>>,
    known: Mutex<Known>,
}

impl Watch {
    /// Nothing is read yet; the table is empty.
    #[must_use]
    pub fn new(store: RouteStore) -> Self {
        Self {
            store,
            table: Arc::default(),
            known: Mutex::default(),
        }
    }

    /// The table, made anew with every change. Its version is 0 until it was read for the first time.
    #[must_use]
    pub fn table(&self) -> Arc<ArcSwap<RouteTable>> {
        Arc::clone(&self.table)
    }

    /// Reads what has changed since the last time.
    ///
    /// # Errors
    /// The store does not answer; the table stays as it is.
    pub async fn refresh(&self) -> Result<(), StoreError> {
        let mut known = self.known.lock().await;
        let version = self.store.version().await?;
        let whole = known.whole.is_none_or(|at| at.elapsed() >= WHOLE);
        if !whole && known.version == Some(version) {
            return Ok(());
        }
        let streams = self.store.streams().await?;
        let versions = self.store.versions().await?;
        let changed: Vec<u32> = versions
            .iter()
            .filter(|(id, count)| whole || known.versions.get(id) != Some(count))
            .map(|(id, _)| *id)
            .collect();
        let channels = self.store.channels(&changed).await?;
        for (id, channel) in changed.into_iter().zip(channels) {
            match channel {
                Some(channel) => known.channels.insert(id, channel),
                None => known.channels.remove(&id),
            };
        }
        known.streams = streams;
        known.versions = versions;
        // A change that came meanwhile has another number and is read next time.
        known.version = Some(version);
        if whole {
            known.whole = Some(Instant::now());
        }
        let made = make(version, &known);
        let before = self.table.load();
        for problem in made
            .problems
            .iter()
            .filter(|problem| !before.problems.contains(problem))
        {
            tracing::warn!(problem, "a route cannot be followed");
        }
        tracing::debug!(version, data_ids = made.len(), "routes read");
        self.table.store(Arc::new(made));
        Ok(())
    }

    /// Reads whenever something has changed, until the process drains.
    pub fn follow(self: &Arc<Self>, life: &Lifecycle) {
        let (watch, drain) = (Arc::clone(self), life.drain_token());
        life.spawn("routes", async move {
            let mut failing = false;
            let looking = async {
                loop {
                    match watch.refresh().await {
                        Ok(()) => failing = false,
                        Err(error) if !failing => {
                            failing = true;
                            tracing::warn!(%error, "routes cannot be read; those read before stay in force");
                        }
                        Err(_) => {}
                    }
                    tokio::time::sleep(EVERY).await;
                }
            };
            // None: the process drains.
            let _: Option<()> = drain.run_until_cancelled(looking).await;
        });
    }
}

fn make(version: u64, known: &Known) -> RouteTable {
    let mut problems = Vec::new();
    let mut streams: Vec<table::StreamTo> = Vec::new();
    for (id, kept) in &known.streams {
        match spec::stream(*id, &kept.stream_to) {
            Ok(stream) => streams.push(stream),
            Err(error) => problems.push(format!("stream {id}: {error}")),
        }
    }
    let modes = streams.iter().map(|stream| (stream.id, stream.sink.mode())).collect();
    let channels: Vec<(u32, Vec<table::Rule>)> = known
        .channels
        .iter()
        .map(|(id, channel)| {
            let rules = spec::rules(*id, &channel.routes, &channel.filters, &modes, &mut problems);
            (*id, rules)
        })
        .collect();
    RouteTable::new(version.max(1), channels, streams, problems)
}
