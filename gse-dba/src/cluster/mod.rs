//! The back end that is a Redis Cluster or a Valkey Cluster. Which node serves which slot, fail-over and the moving of slots are the cluster's own; its shards are groups
//! of the sharded back end, fed by what the nodes say instead of by Sentinels. What is added here is that a client never sees a redirection: `redirect` reads them, `retry`
//! follows them, `watch` keeps up with the cluster.

pub(crate) mod copies;
pub(crate) mod redirect;
pub(crate) mod retry;
pub(crate) mod topology;
mod watch;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch as channel};

use crate::config::cluster::Reads;
use crate::config::sharded::Checks;
use crate::config::{Cluster as Settings, Config, Sharded as OfAShard};
use crate::metrics::Metrics;
use crate::sharded::control::Login;
use crate::sharded::feed;
use crate::sharded::hub::{Carriers, Hub};
use crate::sharded::moving::Keeper;
use crate::sharded::seat::Seat;
use crate::sharded::slots::{SLOTS, SlotMap};
use crate::sharded::table::Table;
use crate::sharded::{Group, Sharded};
use crate::single::dial::Place;
use crate::workers::Workers;
use topology::Topology;

/// Groups there can be: their places are kept in 16 bits, and a shard that comes back gets its old one.
const MAX_GROUPS: usize = 1000;

/// What is known of the cluster beside its table.
pub(crate) struct Cluster {
    settings: Settings,
    shard: OfAShard,
    login: Login,
    max_reply: usize,
    metrics: Metrics,
    life: Lifecycle,
    workers: Workers,
    hub: Hub,
    /// When copies may answer reads.
    readers: Option<copies::Readers>,
    /// Makes the watcher look at once.
    nudge: Notify,
    /// How many looks there were.
    looks: channel::Sender<u64>,
    /// Of which group each node was last. Whoever holds this may change the table.
    members: Mutex<HashMap<String, usize>>,
}

/// Starts watching and connecting. A cluster that is not reachable within a connect timeout may come later.
///
/// # Errors
/// When a node is set up in a way that breaks the promise, and that is not to be put up with.
pub(crate) async fn start(
    config: &Config,
    workers: &Workers,
    metrics: Metrics,
    life: &Lifecycle,
    health: &Health,
) -> anyhow::Result<Sharded> {
    let c = &config.cluster;
    let shard = c.of_a_shard();
    let login = tokio::task::spawn_blocking(move || Login::of(&shard)).await??;
    let timeout = login.timeout;
    let l = &config.limits;
    let hub = Hub::new(metrics.clone(), l.subscriber_messages, l.subscriber_bytes);
    let cluster = Cluster {
        settings: c.clone(),
        shard: c.of_a_shard(),
        login,
        max_reply: config.limits.output_buffer_bytes,
        metrics: metrics.clone(),
        life: life.clone(),
        workers: workers.clone(),
        hub: hub.clone(),
        readers: (c.reads == Reads::Replica)
            .then(|| copies::Readers::new(Duration::from_millis(c.max_read_lag_ms), c.max_private)),
        nudge: Notify::new(),
        looks: channel::Sender::new(0),
        members: Mutex::default(),
    };
    // Commands that come before anything is known wait there; the first shard that is found takes it.
    let first = cluster.group(0);
    let nobody = Table::of(0, SlotMap::of_cluster(vec![0; SLOTS], 1), vec![first], Box::default());
    let keeper = Keeper::new(config, cluster.login.clone(), String::new(), workers, life);
    health.set("store", Err("not connected yet".into()));
    let sharded = Sharded::of(
        nobody,
        hub,
        metrics,
        (c.split_mset, false),
        c.durability(),
        keeper,
        Some(cluster),
    );
    if let Some(c) = sharded.cluster() {
        // Until the first look; every feed has it from here on.
        let map = SlotMap::of_cluster(vec![0; SLOTS], 1);
        c.hub.carry(Carriers { map, home: 0 });
    }
    watch::start(&sharded, life);
    let complete = async {
        while sharded.table().epoch == 0 || sharded.state().is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for g in &sharded.table().groups {
            g.seat.wait_looked().await;
        }
    };
    if tokio::time::timeout(timeout, complete).await.is_err() {
        tracing::warn!("the cluster is not complete yet; clients are told so until it is");
    }
    if c.checks == Checks::Refuse {
        let problems: Vec<String> = sharded
            .table()
            .groups
            .iter()
            .flat_map(|g| g.seat.problems().into_iter().map(|p| format!("{}: {p}", g.seat.name)))
            .collect();
        anyhow::ensure!(
            problems.is_empty(),
            "the cluster is set up in a way that breaks the promise not to lose acknowledged writes (cluster.checks = \"warn\" starts all the same):\n  {}",
            problems.join("\n  ")
        );
    }
    tracing::info!(durability = sharded.durability(), "in front of a cluster");
    let (watched, health) = (sharded.clone(), health.clone());
    life.spawn_until_closed("dba-health", async move {
        let mut every = tokio::time::interval(Duration::from_millis(200));
        loop {
            every.tick().await;
            watched.metrics().epoch(watched.table().epoch);
            health.set("store", watched.state());
        }
    });
    Ok(sharded)
}

impl Cluster {
    /// A new group, with its connections and whoever looks after its set-up.
    fn group(&self, number: usize) -> Arc<Group> {
        let seat = Arc::new(Seat::new(
            &format!("shard{number}"),
            self.shard.clone(),
            self.login.clone(),
            self.max_reply,
            self.metrics.clone(),
        ));
        watch::look_after(&seat, &self.life);
        feed::start(&seat, &self.hub, &self.life);
        Arc::new(Group::start(seat, &self.workers, &self.life))
    }

    /// When copies may answer reads.
    pub(crate) fn readers(&self) -> Option<&copies::Readers> {
        self.readers.as_ref()
    }

    /// For how long a command is tried again.
    pub(crate) fn hold(&self) -> Duration {
        Duration::from_millis(self.settings.hold_ms)
    }

    /// Bytes of commands that one transaction may hold.
    pub(crate) fn max_transaction(&self) -> usize {
        self.settings.max_transaction_bytes
    }

    /// Makes the watcher look, and waits until it has, for a while.
    pub(crate) async fn look(&self, limit: Duration) {
        let mut looks = self.looks.subscribe();
        // One that is under way may have asked before it happened.
        let next = *looks.borrow() + 1;
        self.nudge.notify_one();
        // The sender is ours: it can't be gone. Whoever waited in vain asks again.
        let _ = tokio::time::timeout(limit, looks.wait_for(|n| *n >= next)).await;
    }

    /// Takes in what the nodes say.
    fn apply(&self, sharded: &Sharded, topology: &Topology) {
        let mut members = self.members.lock();
        let old = sharded.table();
        let mut groups = old.groups.clone();
        let mut of_shard: Vec<Option<usize>> = vec![None; topology.shards.len()];
        let mut taken = vec![false; groups.len()];
        let mut order: Vec<usize> = (0..topology.shards.len()).collect();
        // Who serves slots first, and of those first who is at home: a copy that has left its shard must not take the group with it.
        let at_home = |i: usize| {
            topology.shards.get(i).is_some_and(|s| {
                members.get(&s.primary.id).is_some_and(|g| {
                    old.group(*g)
                        .is_some_and(|g| g.seat.head().place.as_ref() == Some(&s.primary.place))
                })
            })
        };
        order.sort_by_key(|i| {
            let serves = topology.shards.get(*i).is_some_and(|s| !s.slots.is_empty());
            (!serves, !at_home(*i))
        });
        for i in order {
            let Some(shard) = topology.shards.get(i) else { continue };
            let is_new = members.is_empty();
            let own = members.get(&shard.primary.id).copied();
            let free = |g: &usize| !taken.get(*g).copied().unwrap_or(false);
            let found = if shard.slots.is_empty() {
                match own {
                    // A primary of yesterday, which is about to become a copy.
                    Some(g) if !free(&g) => continue,
                    None if !shard.healthy => continue,
                    own => own,
                }
            } else {
                let ids = std::iter::once(&shard.primary).chain(&shard.copies);
                ids.filter_map(|n| members.get(&n.id).copied()).find(free)
            };
            let g = match found {
                Some(g) => g,
                None if is_new && groups.len() == 1 => 0,
                None if groups.len() >= MAX_GROUPS => {
                    tracing::error!(primary = %shard.primary.place, "the cluster has had more shards than can be told apart: restart gse_dba");
                    continue;
                }
                None => {
                    groups.push(self.group(groups.len()));
                    taken.push(false);
                    groups.len() - 1
                }
            };
            if let Some(t) = taken.get_mut(g) {
                *t = true;
            }
            if let Some(of) = of_shard.get_mut(i) {
                *of = Some(g);
            }
            for node in std::iter::once(&shard.primary).chain(&shard.copies) {
                members.insert(node.id.clone(), g);
            }
        }
        for (i, g) in of_shard.iter().enumerate() {
            if let (Some(shard), Some(group)) = (topology.shards.get(i), g.and_then(|g| groups.get(g))) {
                switch(group, Some(shard.primary.place.clone()), &self.metrics);
            }
        }
        for (group, taken) in groups.iter().zip(&taken) {
            if !taken {
                switch(group, None, &self.metrics);
                group.seat.set_copies(0);
            }
        }
        let owners: Vec<u16> = (0..SLOTS)
            .map(|slot| {
                let owner = topology.owners.get(slot).copied().flatten();
                let g = owner.and_then(|i| of_shard.get(i).copied().flatten());
                // A slot that nobody serves stays where it was: who is asked for it says so.
                g.unwrap_or_else(|| old.map.group(slot as u16)) as u16
            })
            .collect();
        let idle: Box<[bool]> = taken.iter().map(|t| !t).collect();
        let same = old.epoch > 0
            && groups.len() == old.groups.len()
            && idle == old.idle
            && owners
                .iter()
                .enumerate()
                .all(|(s, o)| old.map.group(s as u16) == usize::from(*o));
        if !same {
            self.set(
                sharded,
                Table::of(old.epoch + 1, SlotMap::of_cluster(owners, groups.len()), groups, idle),
            );
        }
    }

    fn set(&self, sharded: &Sharded, table: Table) {
        let carriers = Carriers {
            map: table.map.clone(),
            home: table.home(),
        };
        sharded.set_table(table);
        self.hub.carry(carriers);
    }

    /// A node says that a slot is served elsewhere: from now on it is asked for there. None when nobody is known there.
    pub(crate) fn moved(&self, sharded: &Sharded, slot: u16, place: &Place) -> Option<usize> {
        self.nudge.notify_one();
        let _changing = self.members.lock();
        let old = sharded.table();
        let g = at(&old, place)?;
        if old.map.group(slot) != g {
            self.set(
                sharded,
                Table::of(
                    old.epoch + 1,
                    old.map.with(slot, g as u16),
                    old.groups.clone(),
                    old.idle.clone(),
                ),
            );
        }
        Some(g)
    }
}

/// The group whose primary is at a place.
pub(crate) fn at(table: &Table, place: &Place) -> Option<usize> {
    table
        .groups
        .iter()
        .position(|g| g.seat.head().place.as_ref() == Some(place))
}

fn switch(group: &Group, place: Option<Place>, metrics: &Metrics) {
    let before = group.seat.head().place;
    let name = place.as_ref().map(ToString::to_string);
    if group.seat.set_head(place) {
        // Its copies need a moment to follow it. Until they are counted there are none, and writes wait for them.
        group.seat.set_copies(0);
        if before.is_some() {
            metrics.switched();
        }
        tracing::info!(shard = %group.seat.name, primary = name.as_deref().unwrap_or("none"), "the shard's primary");
    }
}
