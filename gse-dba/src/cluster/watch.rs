//! Keeps up with the cluster: asks all nodes what they know, at intervals, after a redirection and when a connection was lost. Every node is asked because any of them may be
//! the one that is cut off.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use gse_core::lifecycle::Lifecycle;
use rand::seq::SliceRandom as _;
use redis::Value;
use redis::aio::MultiplexedConnection;
use tokio::time::Instant;

use super::topology::{self, Shard};
use crate::config::sharded::Checks;
use crate::sharded::control::{self, Login, Replication};
use crate::sharded::seat::Seat;
use crate::sharded::{Sharded, checks};
use crate::single::dial::Place;

/// Looks are at least this far apart, however often one is asked for.
const BREATH: Duration = Duration::from_millis(30);
/// Nodes asked at once; of a larger cluster others each time, and every primary.
const ASKED: usize = 16;
/// How long the others are waited for once half of those asked have answered.
const STRAGGLERS: Duration = Duration::from_millis(150);
/// How often a set-up that is wrong, or right, is looked at again.
const CHECK_WRONG: Duration = Duration::from_secs(10);
const CHECK_RIGHT: Duration = Duration::from_secs(300);

/// What one node says.
struct Said {
    place: Place,
    conn: MultiplexedConnection,
    shards: Vec<Shard>,
    replication: Replication,
    /// How far it is, or was when it was asked.
    offset: Option<u64>,
    asked: std::time::Instant,
}

struct Watcher {
    sharded: Sharded,
    conns: HashMap<String, MultiplexedConnection>,
    /// Copies that were there at the last look.
    copies: Vec<Place>,
    /// Since when each primary is silent.
    silent: BTreeMap<usize, Instant>,
    said: String,
}

/// Starts watching.
pub(super) fn start(sharded: &Sharded, life: &Lifecycle) {
    let mut watcher = Watcher {
        sharded: sharded.clone(),
        conns: HashMap::new(),
        copies: Vec::new(),
        silent: BTreeMap::new(),
        said: String::new(),
    };
    let closing = life.clone();
    life.spawn_until_closed("dba-cluster", async move {
        tokio::select! {
            () = watcher.run() => {}
            () = closing.closing() => {}
        }
    });
}

/// Looks at how the servers of a shard are set up, whenever they become others.
pub(super) fn look_after(seat: &Arc<Seat>, life: &Lifecycle) {
    let (seat, closing) = (Arc::clone(seat), life.clone());
    life.spawn_until_closed("dba-shard-checks", async move {
        let run = async {
            let (mut heads, mut copies) = (seat.heads(), seat.watch_copies());
            loop {
                let head = heads.borrow_and_update().clone();
                copies.mark_unchanged();
                if let Some(place) = &head.place {
                    check(&seat, place).await;
                    seat.set_looked();
                }
                let again = if seat.problems().is_empty() {
                    CHECK_RIGHT
                } else {
                    CHECK_WRONG
                };
                tokio::select! {
                    changed = heads.changed() => if changed.is_err() { return },
                    changed = copies.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(again) => {}
                }
                // Several changes come together.
                tokio::time::sleep(BREATH).await;
            }
        };
        tokio::select! {
            () = run => {}
            () = closing.closing() => {}
        }
    });
}

async fn check(seat: &Seat, place: &Place) {
    let asked = async {
        let mut conn = control::connect(place, &seat.login).await?;
        let told = control::replication(&mut conn).await?;
        anyhow::Ok((conn, told))
    };
    // One that is not reachable says nothing of its set-up; who needs it is told that it is not.
    let Ok((mut conn, told)) = asked.await else { return };
    if !told.is_primary {
        return;
    }
    let problems = checks::of(seat, &mut conn, place, &told).await;
    if problems != seat.problems() {
        for p in &problems {
            tracing::warn!(shard = %seat.name, problem = p, "a node is set up in a way that breaks the promise");
        }
    }
    seat.set_problems(problems, seat.config.checks == Checks::Refuse);
}

impl Watcher {
    async fn run(&mut self) {
        let sharded = self.sharded.clone();
        let Some(cluster) = sharded.cluster() else { return };
        let poll = Duration::from_millis(cluster.settings.poll_ms);
        loop {
            if let Err(trouble) = self.look().await
                && trouble != self.said
            {
                tracing::warn!(trouble, "the cluster could not be looked at");
                self.said = trouble;
            }
            cluster.looks.send_modify(|n| *n += 1);
            tokio::time::sleep(BREATH).await;
            let table = sharded.table();
            let lost = async {
                let nudges = table.groups.iter().map(|g| Box::pin(g.seat.nudge.notified()));
                futures::future::select_all(nudges).await;
            };
            tokio::select! {
                () = tokio::time::sleep(poll.saturating_sub(BREATH)) => {}
                () = cluster.nudge.notified() => {}
                () = lost => {}
            }
        }
    }

    /// Who is asked: every primary, then others that are known, then the seeds.
    fn asked(&self) -> Result<Vec<Place>, String> {
        let Some(cluster) = self.sharded.cluster() else {
            return Ok(Vec::new());
        };
        let mut places: Vec<Place> = Vec::new();
        let mut add = |p: Place| {
            if !places.contains(&p) {
                places.push(p);
            }
        };
        self.sharded
            .table()
            .groups
            .iter()
            .filter_map(|g| g.seat.head().place)
            .for_each(&mut add);
        let mut known = self.copies.clone();
        known.shuffle(&mut rand::rng());
        known.into_iter().for_each(&mut add);
        let primaries = self.sharded.table().groups.len();
        places.truncate(ASKED.max(primaries));
        // The seeds are where it begins, and begins again when all that was known has gone.
        for seed in &cluster.settings.seeds {
            let place = control::place(seed).map_err(|e| format!("{e:#}"))?;
            if places.len() < ASKED.max(primaries + 2) && !places.contains(&place) {
                places.push(place);
            }
        }
        Ok(places)
    }

    async fn look(&mut self) -> Result<(), String> {
        let sharded = self.sharded.clone();
        let Some(cluster) = sharded.cluster() else {
            return Ok(());
        };
        let places = self.asked()?;
        let half = places.len().div_ceil(2);
        let mut asking: FuturesUnordered<_> = places
            .into_iter()
            .map(|place| {
                let conn = self.conns.remove(&place.to_string());
                let login = &cluster.login;
                async move {
                    let name = place.to_string();
                    let asked = tokio::time::timeout(login.timeout, ask(place, conn, login)).await;
                    asked
                        .unwrap_or_else(|_| Err(anyhow::anyhow!("it does not answer")))
                        .map_err(|e| (name, format!("{e:#}")))
                }
            })
            .collect();
        let (mut told, mut trouble) = (Vec::new(), BTreeMap::new());
        let mut until = None;
        loop {
            let next = match until {
                None => asking.next().await,
                Some(until) => match tokio::time::timeout_at(until, asking.next()).await {
                    Ok(next) => next,
                    Err(_) => break,
                },
            };
            match next {
                Some(Ok(said)) => told.push(said),
                Some(Err((name, why))) => {
                    trouble.insert(name, why);
                }
                None => break,
            }
            if until.is_none() && told.len() >= half {
                until = Some(Instant::now() + STRAGGLERS);
            }
        }
        drop(asking);
        if told.is_empty() {
            self.count(&[], &trouble);
            let all: Vec<String> = trouble.iter().map(|(name, why)| format!("{name}: {why}")).collect();
            return Err(format!("none of its nodes answers ({})", all.join("; ")));
        }
        let views: Vec<Vec<Shard>> = told.iter().map(|s| s.shards.clone()).collect();
        let merged = topology::merge(&views);
        cluster.apply(&sharded, &merged);
        self.copies = merged
            .shards
            .into_iter()
            .flat_map(|s| s.copies)
            .map(|n| n.place)
            .collect();
        self.count(&told, &trouble);
        for said in told {
            self.conns.insert(said.place.to_string(), said.conn);
        }
        self.said.clear();
        Ok(())
    }

    /// What is known of a primary for those who read from its copies.
    fn note(&self, group: usize, generation: u64, said: &Said) {
        let readers = self.sharded.cluster().and_then(super::Cluster::readers);
        if let (Some(readers), Some(offset)) = (readers, said.offset) {
            let copies = said
                .replication
                .copies
                .iter()
                .filter_map(|(address, _)| control::place(address).ok());
            readers.note(group, generation, copies.collect(), said.asked, offset);
        }
    }

    /// Takes in how many copies follow each primary.
    fn count(&mut self, told: &[Said], trouble: &BTreeMap<String, String>) {
        let table = self.sharded.table();
        let timeout = self.sharded.cluster().map_or(Duration::ZERO, |c| c.login.timeout);
        for (i, group) in table.groups.iter().enumerate() {
            let seat = &group.seat;
            let Some(place) = seat.head().place else { continue };
            let copies = match told.iter().find(|s| s.place == place) {
                Some(said) => {
                    self.silent.remove(&i);
                    let heard = |lag: u64| lag <= seat.config.max_lag_s;
                    if said.replication.is_primary {
                        self.note(i, seat.generation(), said);
                        said.replication.copies.iter().filter(|(_, lag)| heard(*lag)).count()
                    } else {
                        0
                    }
                }
                None if trouble.contains_key(&place.to_string()) => 0,
                // It was not waited for. Silence for long is as good as an error.
                None if self.silent.entry(i).or_insert_with(Instant::now).elapsed() > timeout => 0,
                None => continue,
            };
            seat.set_copies(copies);
            seat.metrics.group_copies(&seat.name, copies);
        }
    }
}

async fn ask(place: Place, conn: Option<MultiplexedConnection>, login: &Login) -> anyhow::Result<Said> {
    let mut conn = match conn {
        Some(conn) => conn,
        None => control::connect(&place, login).await?,
    };
    let since = std::time::Instant::now();
    let text: String = redis::cmd("INFO").arg("replication").query_async(&mut conn).await?;
    let replication = control::replication_of(&text)?;
    let offset = text
        .lines()
        .find_map(|l| l.trim_end().strip_prefix("master_repl_offset:")?.parse().ok());
    let asked: redis::RedisResult<Value> = redis::cmd("CLUSTER").arg("SHARDS").query_async(&mut conn).await;
    let mut shards = match asked {
        Ok(value) => topology::of_shards(&value, &place, login.tls.is_some()).map_err(anyhow::Error::msg)?,
        // Older servers, and some that only speak like one, have the other command.
        Err(e) if e.code().is_some() || matches!(e.kind(), redis::ErrorKind::Server(_)) => {
            let value: Value = redis::cmd("CLUSTER").arg("SLOTS").query_async(&mut conn).await?;
            topology::of_slots(&value, &place).map_err(anyhow::Error::msg)?
        }
        Err(e) => return Err(e.into()),
    };
    let nodes: String = redis::cmd("CLUSTER").arg("NODES").query_async(&mut conn).await?;
    let epochs = topology::epochs(&nodes);
    for shard in &mut shards {
        shard.epoch = epochs.get(shard.primary.id.as_str()).copied().unwrap_or(0);
    }
    Ok(Said {
        place,
        conn,
        shards,
        replication,
        offset,
        asked: since,
    })
}
