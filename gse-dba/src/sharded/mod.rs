//! The back end that is several groups of Redis: keys go to groups by slot, a group is a primary and its copies. Replication and fail-over are Redis's and
//! Sentinel's own; what is added here is one address, routing, and an acknowledgement that waits until enough copies have a write.

pub(crate) mod change;
pub(crate) mod checks;
pub(crate) mod control;
mod decide;
mod deferred;
mod early;
mod everywhere;
pub(crate) mod feed;
mod follow;
mod gate;
pub(crate) mod hub;
mod link;
pub(crate) mod merge;
pub(crate) mod moving;
mod mutants;
mod plain;
pub(crate) mod promote;
mod record;
mod returned;
pub(crate) mod route;
pub(crate) mod scripts;
pub(crate) mod seat;
mod sentinels;
pub(crate) mod session;
pub(crate) mod slots;
pub(crate) mod table;
mod tell;
mod transaction;
mod trust;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::config::Config;
use crate::config::sharded::{Checks, Reads};
use crate::metrics::Metrics;
use crate::single::dial::Private;
use control::Login;
use link::Link;
pub(crate) use link::{Answer, Fate};
use moving::{Gate, Keeper, Side, Via};
use mutants::Mutant;
use seat::{Head, Seat};
use slots::SlotMap;
use table::Table;

use crate::workers::Workers;

/// Idle private connections kept for the next transaction, for each group and protocol.
const IDLE: usize = 16;

/// One group as commands see it.
pub(crate) struct Group {
    pub(crate) seat: Arc<Seat>,
    /// By protocol, then for writes and (when they go apart) for reads.
    links: [[Vec<Link>; 2]; 2],
    idle: [Mutex<Vec<Pinned>>; 2],
    places: Arc<Semaphore>,
    /// For slots on their way: not straight to a group.
    via: Option<Via>,
}

/// A private connection, and to which primary.
pub(crate) struct Pinned {
    pub(crate) private: Private,
    generation: u64,
    /// What the group calls it, once somebody has asked.
    id: Option<i64>,
    /// Of a gate for moving slots, which group it leads to, and what was queued on it and not executed yet.
    side: Side,
    log: Vec<Bytes>,
}

impl Pinned {
    fn new(private: Private, generation: u64) -> Self {
        Self {
            private,
            generation,
            id: None,
            side: Side::Source,
            log: Vec::new(),
        }
    }
}

/// An answer that will come.
pub(crate) enum Waiting {
    /// Sent at this time to this group.
    Link(oneshot::Receiver<Answer>, Arc<Seat>, Instant),
    Way(BoxFuture<'static, Answer>),
}

/// An answer that came when nobody could say whether the group still serves the slots: it counts when that can be said again.
async fn covered(answer: Answer, seat: Arc<Seat>, sent: Instant) -> Answer {
    if seat.lease.wait(seat.config.hold()).await && seat.lease.covers(sent) {
        answer
    } else {
        Answer::without(link::lapsed(true))
    }
}

impl Future for Waiting {
    type Output = Result<Answer, oneshot::error::RecvError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Link(l, seat, sent) => {
                let answer = match Pin::new(l).poll(cx) {
                    Poll::Ready(Ok(a)) if a.fate == Fate::Sealed && !seat.lease.covers(*sent) => a,
                    other => return other,
                };
                let (seat, sent) = (Arc::clone(seat), *sent);
                let mut covered = covered(answer, seat, sent).boxed();
                let now = covered.as_mut().poll(cx).map(Ok);
                *self.get_mut() = Self::Way(covered);
                now
            }
            Self::Way(w) => w.as_mut().poll(cx).map(Ok),
        }
    }
}

struct Inner {
    table: ArcSwap<Table>,
    /// What a session holds while it plans nothing.
    none: Arc<Table>,
    hub: hub::Hub,
    scripts: scripts::Scripts,
    metrics: Metrics,
    split_mset: bool,
    any_slots: bool,
    durability: String,
    keeper: Keeper,
    /// When the groups are the shards of a cluster.
    cluster: Option<Cluster>,
}

/// A handle on all groups.
#[derive(Clone)]
pub(crate) struct Sharded(Arc<Inner>);

impl Sharded {
    /// Starts following and connecting. Groups that are not reachable within a connect timeout may come later.
    ///
    /// # Errors
    /// When a Redis is set up in a way that breaks the promise, and that is not to be put up with.
    pub(crate) async fn start(
        config: &Config,
        workers: &Workers,
        metrics: Metrics,
        life: &Lifecycle,
        health: &Health,
    ) -> anyhow::Result<Self> {
        let c = config.clone();
        let (login, ours) =
            tokio::task::spawn_blocking(move || anyhow::Ok((Login::of(&c.sharded)?, c.resolve_password()?))).await??;
        let c = &config.sharded;
        let map = SlotMap::of(&c.groups).map_err(anyhow::Error::msg)?;
        let l = &config.limits;
        let hub = hub::Hub::new(metrics.clone(), l.subscriber_messages, l.subscriber_bytes);
        health.set("store", Err("not connected yet".into()));
        let sharded = Self::of(
            Table::of(0, map, Vec::new(), Box::default()),
            hub,
            metrics,
            (c.split_mset, c.any_slots),
            c.durability(),
            Keeper::new(config, login, ours, workers, life),
            None,
        );
        sharded.begin();
        let all = async {
            for g in &sharded.used() {
                g.seat.wait_looked().await;
                while g.seat.head().place.is_none() || g.seat.copies() < g.seat.need || !g.seat.lease.holds() {
                    if sharded.keeper().contradiction().is_some() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        };
        if tokio::time::timeout(c.connect_timeout(), all).await.is_err() {
            tracing::warn!("not every group is complete yet; clients are told so until it is");
        }
        if let Some(why) = sharded.keeper().contradiction() {
            anyhow::bail!("the groups and the configuration do not agree: {why}");
        }
        if c.checks == Checks::Refuse {
            let problems: Vec<String> = sharded
                .table()
                .groups
                .iter()
                .flat_map(|g| {
                    g.seat
                        .problems()
                        .into_iter()
                        .map(|p| format!("group {}: {p}", g.seat.name))
                })
                .collect();
            anyhow::ensure!(
                problems.is_empty(),
                "the groups are set up in a way that breaks the promise not to lose acknowledged writes (sharded.checks = \"warn\" starts all the same):\n  {}",
                problems.join("\n  ")
            );
        }
        tracing::info!(durability = sharded.0.durability, groups = c.groups.len(), "sharded");
        let (watched, health) = (sharded.clone(), health.clone());
        life.spawn_until_closed("dba-health", async move {
            let mut every = tokio::time::interval(Duration::from_millis(200));
            loop {
                every.tick().await;
                health.set("store", watched.state());
            }
        });
        Ok(sharded)
    }

    /// In front of these groups.
    pub(crate) fn of(
        table: Table,
        hub: hub::Hub,
        metrics: Metrics,
        (split_mset, any_slots): (bool, bool),
        durability: String,
        keeper: Keeper,
        cluster: Option<Cluster>,
    ) -> Self {
        Self(Arc::new(Inner {
            none: Arc::new(Table::of(0, table.map.clone(), Vec::new(), Box::default())),
            keeper,
            hub,
            scripts: scripts::Scripts::default(),
            table: ArcSwap::from_pointee(table),
            metrics,
            split_mset,
            any_slots,
            durability,
            cluster,
        }))
    }

    /// The cluster whose shards the groups are, when it is one.
    pub(crate) fn cluster(&self) -> Option<&Cluster> {
        self.0.cluster.as_ref()
    }

    /// Replaces the topology. Whoever does so sees to it that nobody else does at the same time.
    pub(crate) fn set_table(&self, table: Table) {
        self.0.table.store(Arc::new(table));
    }

    /// What is wrong now, if anything is.
    pub(crate) fn state(&self) -> Result<(), String> {
        let table = self.table();
        let wrong: Vec<String> = table
            .groups
            .iter()
            .enumerate()
            .filter(|(i, _)| table.is_used(*i))
            .filter_map(|(_, g)| match g.seat.head().place {
                None => Some(format!("group '{}' has no primary", g.seat.name)),
                Some(_) => g.seat.short(),
            })
            .chain(self.keeper().trouble().filter(|_| self.0.cluster.is_none()))
            .collect();
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(wrong.join("; "))
        }
    }

    /// The topology as it is now.
    pub(crate) fn table(&self) -> Arc<Table> {
        self.0.table.load_full()
    }

    /// The groups that serve, or will.
    fn used(&self) -> Vec<Arc<Group>> {
        let table = self.table();
        let all = table.groups.iter().enumerate();
        all.filter(|(i, _)| table.is_used(*i))
            .map(|(_, g)| Arc::clone(g))
            .collect()
    }

    /// What holds no table in use.
    pub(crate) fn no_table(&self) -> Arc<Table> {
        Arc::clone(&self.0.none)
    }

    /// Puts another table in its place; gives the one that was there.
    fn replace(&self, table: Table) -> Arc<Table> {
        self.0.table.swap(Arc::new(table))
    }

    pub(crate) fn keeper(&self) -> &Keeper {
        &self.0.keeper
    }

    /// Through which clients subscribe.
    pub(crate) fn hub(&self) -> &hub::Hub {
        &self.0.hub
    }

    pub(crate) fn scripts(&self) -> &scripts::Scripts {
        &self.0.scripts
    }

    /// Commands over several slots are permitted as long as there is one group only.
    pub(crate) fn any_slots(&self) -> bool {
        self.0.any_slots
    }

    pub(crate) fn split_mset(&self) -> bool {
        self.0.split_mset
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    pub(crate) fn group(&self, i: usize) -> Option<Arc<Group>> {
        self.0.table.load().group(i).cloned()
    }

    /// What an acknowledged write survives, in words.
    pub(crate) fn durability(&self) -> &str {
        &self.0.durability
    }

    /// Lines for `INFO`: what is promised, and each group.
    pub(crate) fn info(&self) -> String {
        let table = self.table();
        let counts = table.owners().counts();
        let mut out = format!(
            "# Sharding\r\ngse_dba_durability:{}\r\ngse_dba_groups:{}\r\n",
            self.0.durability,
            table.groups.len()
        );
        for (i, (g, slots)) in table.groups.iter().zip(counts).enumerate() {
            let head = g.seat.head();
            let state = match (&head.place, g.seat.short()) {
                (Some(_), None) if !g.seat.lease.holds() => "no-topology",
                (None, _) => "no-primary",
                (Some(_), Some(_)) => "no-writes",
                (Some(_), None) => "ok",
            };
            out.push_str(&format!(
                "group{i}:name={},slots={slots},primary={},copies={},state={state},problems={}\r\n",
                g.seat.name,
                head.place.map_or("none".to_owned(), |p| p.to_string()),
                g.seat.copies(),
                g.seat.problems().len(),
            ));
        }
        out
    }
}

impl Group {
    /// A group of the configuration, with what follows it.
    fn of_config(
        config: &Config,
        login: &Login,
        group: &crate::config::sharded::Group,
        metrics: &Metrics,
        hub: &hub::Hub,
        workers: &Workers,
        life: &Lifecycle,
    ) -> Arc<Self> {
        let seat = Arc::new(Seat::new(
            &group.name,
            config.sharded.clone(),
            login.clone(),
            config.limits.output_buffer_bytes,
            metrics.clone(),
        ));
        follow::start(&seat, group, life);
        feed::start(&seat, hub, life);
        Arc::new(Self::start(seat, workers, life))
    }

    /// A group whose primary is where `seat` says, with its connections.
    pub(crate) fn start(seat: Arc<Seat>, workers: &Workers, life: &Lifecycle) -> Self {
        let c = &seat.config;
        let links = |resp3: bool, wanted: bool| -> Vec<Link> {
            let n = if wanted { workers.share(c.connections) } else { 0 };
            (0..n)
                .map(|i| {
                    let _on = workers.enter(i);
                    Link::start(Arc::clone(&seat), resp3, life)
                })
                .collect()
        };
        let apart = c.reads == Reads::Primary;
        let links = [
            [links(false, true), links(false, apart)],
            [links(true, true), links(true, apart)],
        ];
        Self {
            links,
            idle: Default::default(),
            places: Arc::new(Semaphore::new(c.max_private)),
            seat,
            via: None,
        }
    }

    /// One that serves nothing any more and is only kept in its place.
    fn gone(config: &Config, login: &Login, name: &str, metrics: &Metrics) -> Arc<Self> {
        let limit = config.limits.output_buffer_bytes;
        let seat = Seat::new(name, config.sharded.clone(), login.clone(), limit, metrics.clone());
        Arc::new(Self {
            seat: Arc::new(seat),
            links: Default::default(),
            idle: Default::default(),
            places: Arc::new(Semaphore::new(0)),
            via: None,
        })
    }

    /// What stands for a group while slots of it are on their way.
    fn by_way(source: &Self, via: Via) -> Self {
        Self {
            seat: Arc::clone(&source.seat),
            links: Default::default(),
            idle: Default::default(),
            places: Arc::clone(&source.places),
            via: Some(via),
        }
    }

    /// The gate through which commands go, when it is ours.
    pub(crate) fn gate(&self) -> Option<&Arc<Gate>> {
        match &self.via {
            Some(Via::Gate(gate)) => Some(gate),
            _ => None,
        }
    }

    /// Whether another gse_dba answers for it.
    pub(crate) fn is_elsewhere(&self) -> bool {
        matches!(self.via, Some(Via::Peer(_)))
    }

    /// Hands commands to the shared connection that this client always uses, so that they stay in order.
    pub(crate) async fn send(&self, client: u64, resp3: bool, bytes: Bytes, count: usize, writes: bool) -> Waiting {
        match &self.via {
            None => {}
            Some(Via::Gate(gate)) => return Waiting::Way(gate.send(client, resp3, bytes, count, writes)),
            Some(Via::Peer(peer)) => return Waiting::Way(peer.send(client, resp3, bytes, count, writes)),
        }
        let [all, reads] = &self.links[usize::from(resp3)];
        let pool = if writes || reads.is_empty() { all } else { reads };
        match pool.get((client % pool.len().max(1) as u64) as usize) {
            Some(link) => {
                let sent = Instant::now();
                Waiting::Link(link.send(bytes, count, writes).await, Arc::clone(&self.seat), sent)
            }
            None => Waiting::Way(std::future::ready(Answer::lost(false, "no connections are configured")).boxed()),
        }
    }

    /// A connection to the primary of one's own.
    pub(crate) async fn private(&self, resp3: bool) -> Result<Pinned, String> {
        match &self.via {
            None => self.straight(resp3).await,
            Some(Via::Gate(gate)) => {
                let side = gate.side().await;
                let mut pinned = gate.group(side).straight(resp3).await?;
                pinned.side = side;
                Ok(pinned)
            }
            Some(Via::Peer(peer)) => peer.private(resp3).await,
        }
    }

    async fn straight(&self, resp3: bool) -> Result<Pinned, String> {
        let head: Head = self.seat.wait_head().await;
        while let Some(pinned) = self.idle[usize::from(resp3)].lock().pop() {
            if pinned.generation == head.generation && pinned.private.is_usable() {
                return Ok(pinned);
            }
        }
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            "too many transactions, blocking commands and subscriptions at once (sharded.max_private)".to_owned()
        })?;
        let stream = link::connect(&self.seat, &head, resp3).await?;
        let limit = Duration::from_millis(self.seat.config.reply_timeout_ms);
        let private = Private::new(stream, resp3, place, limit, self.seat.max_reply);
        Ok(Pinned::new(private, head.generation))
    }

    /// Takes back a private connection that holds no transaction, watch or subscription.
    pub(crate) fn give_back(&self, mut pinned: Pinned) {
        match &self.via {
            None => {}
            Some(Via::Gate(gate)) => {
                pinned.log.clear();
                let group = Arc::clone(gate.group(pinned.side));
                pinned.side = Side::Source;
                return group.keep(pinned);
            }
            // Another may move the slots by the time it would be used again.
            Some(Via::Peer(_)) => return,
        }
        self.keep(pinned);
    }

    fn keep(&self, pinned: Pinned) {
        let mut idle = self.idle[usize::from(pinned.private.resp3)].lock();
        if idle.len() < IDLE && pinned.private.is_usable() {
            idle.push(pinned);
        }
    }

    /// Sends commands over a private connection; with `sealed`, under the same rule as over a shared one. Ends when the group gets another primary.
    pub(crate) async fn exchange(
        &self,
        pinned: &mut Pinned,
        bytes: &[u8],
        count: usize,
        sealed: bool,
        blocking: bool,
    ) -> Answer {
        match &self.via {
            None => self.pass(pinned, bytes, count, sealed, blocking).await,
            Some(Via::Gate(gate)) => gate.exchange(pinned, bytes, count, sealed, blocking).await,
            Some(Via::Peer(peer)) => peer.exchange(pinned, bytes, count, blocking).await,
        }
    }

    async fn pass(&self, pinned: &mut Pinned, bytes: &[u8], count: usize, sealed: bool, blocking: bool) -> Answer {
        let lease = &self.seat.lease;
        if !lease.holds() && !lease.wait(self.seat.config.hold()).await {
            return Answer::without(link::lapsed(false));
        }
        let sent = Instant::now();
        let mut all = BytesMut::from(bytes);
        let waits = self.seat.need > 0 && !mutants::is(Mutant::NoWait);
        let seals = match (sealed, waits) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => link::SEALS,
        };
        if sealed {
            all.extend_from_slice(self.seat.seal(waits));
        }
        let mut heads = self.seat.heads();
        let generation = pinned.generation;
        // A planned change of the primary waits for what is under way, not for what blocks.
        let _flight = match sealed && !blocking {
            true => Some(self.seat.gate.depart().await),
            false => None,
        };
        if heads.borrow().generation != generation {
            return Answer::lost(false, "the group has another primary");
        }
        let passed = tokio::select! {
            passed = pinned.private.pass(all.freeze(), count + seals, blocking) => passed,
            _ = heads.wait_for(|h| h.generation != generation) => {
                return Answer::lost(true, "the group has another primary");
            }
        };
        if let Some(lost) = passed.lost {
            self.seat.nudge();
            return if lost.too_large {
                Answer::without(Fate::TooLarge)
            } else {
                Answer::lost(lost.sent, lost.reason)
            };
        }
        let mut replies = passed.replies;
        if !sealed {
            return Answer {
                replies,
                fate: Fate::Sealed,
            };
        }
        if self.seat.is_past(generation) {
            return Answer::lost(true, "its primary may have been replaced meanwhile");
        }
        let end = merge::ends(&replies, count).last().copied().unwrap_or(0);
        let seal = replies.split_off(end);
        let fate = link::judge(&seal, waits.then_some(self.seat.need));
        let answer = Answer { replies, fate };
        if answer.fate == Fate::Sealed && !lease.covers(sent) {
            return covered(answer, Arc::clone(&self.seat), sent).await;
        }
        answer
    }
}
