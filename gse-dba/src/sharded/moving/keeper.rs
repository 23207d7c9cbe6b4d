//! Keeps the topology: reads it in every group, again and again, says there that this gse_dba serves by it, brings groups that have an older one up to date, and
//! makes a table of it for those who plan commands.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use gse_core::lifecycle::Lifecycle;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::mover::Work;
use super::store::{Instance, Put, Seen, Shelf};
use super::topology::{Leg, Member, Mover, SlotSet, Speed, Topology};
use super::{Gate, Peer, Via};
use crate::config::Config;
use crate::config::sharded::Group as GroupConfig;
use crate::sharded::control::Login;
use crate::sharded::slots::{SLOTS, SlotMap};
use crate::sharded::table::Table;
use crate::sharded::{Group, Sharded};
use crate::workers::Workers;

/// Looks are at least this far apart, however often one is asked for.
const BREATH: Duration = Duration::from_millis(10);
/// A change is tried so often against others who change something at the same time.
const CONTESTS: usize = 50;

/// What no waiting heals.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Contradiction(String);

/// What a table's place for moving slots was made for.
#[derive(PartialEq, Eq)]
struct Way {
    leg: Leg,
    ours: bool,
}

/// A table that was replaced.
struct Older {
    epoch: u64,
    table: Weak<Table>,
    /// Places of the groups that the next table has taken slots from: only to these it matters when it was the last time used.
    lost: Vec<usize>,
}

/// What is known.
#[derive(Default)]
struct Known {
    topology: Option<Arc<Topology>>,
    /// All groups that were started, by name.
    started: HashMap<String, Arc<Group>>,
    /// Tables that were replaced and may still be in use.
    older: Vec<Older>,
    way: Option<(Way, Arc<Group>)>,
    /// Since when each group has taken down without a break that we are there.
    noted: HashMap<String, Instant>,
    /// What the first look at each group of the configuration has shown.
    first: BTreeMap<String, bool>,
}

pub(crate) struct Keeper {
    pub(super) config: Config,
    login: Login,
    password: String,
    workers: Workers,
    pub(super) life: Lifecycle,
    pub(super) id: String,
    address: Mutex<Option<String>>,
    known: Mutex<Known>,
    epochs: watch::Sender<u64>,
    troubles: Mutex<BTreeMap<String, String>>,
    pub(super) work: Mutex<Option<Arc<Work>>>,
    contradiction: Mutex<Option<String>>,
    /// Makes everybody look at once.
    nudge: Notify,
}

impl Keeper {
    pub(crate) fn new(config: &Config, login: Login, password: String, workers: &Workers, life: &Lifecycle) -> Self {
        Self {
            workers: workers.clone(),
            config: config.clone(),
            login,
            password,
            life: life.clone(),
            id: format!("{:032x}", rand::random::<u128>()),
            address: Mutex::new(Some(config.sharded.announce.clone()).filter(|a| !a.is_empty())),
            known: Mutex::default(),
            epochs: watch::Sender::new(0),
            troubles: Mutex::default(),
            work: Mutex::default(),
            contradiction: Mutex::default(),
            nudge: Notify::new(),
        }
    }

    /// Takes in where clients reach us, unless the configuration says where other gse_dba do.
    pub(crate) fn announced(&self, address: &str) {
        let mut known = self.address.lock();
        if known.is_none() && !address.starts_with("0.0.0.0:") && !address.starts_with("[::]:") {
            *known = Some(address.to_owned());
        }
    }

    /// As what we move slots.
    pub(super) fn me(&self) -> Result<Mover, String> {
        match self.address.lock().clone() {
            Some(address) => Ok(Mover {
                id: self.id.clone(),
                address,
            }),
            None => Err("other gse_dba could not reach this one: set sharded.announce to its host:port".into()),
        }
    }

    pub(crate) fn topology(&self) -> Option<Arc<Topology>> {
        self.known.lock().topology.clone()
    }

    pub(crate) fn epochs(&self) -> watch::Receiver<u64> {
        self.epochs.subscribe()
    }

    /// Why what is set up can't be what was meant.
    pub(crate) fn contradiction(&self) -> Option<String> {
        self.contradiction.lock().clone()
    }

    /// What is wrong with the agreement, if anything is.
    pub(crate) fn trouble(&self) -> Option<String> {
        if self.topology().is_none() {
            return Some(
                "which group serves which slot could not be read yet, or not be agreed on before every group was seen"
                    .into(),
            );
        }
        let all = self.troubles.lock();
        (!all.is_empty()).then(|| all.values().cloned().collect::<Vec<_>>().join("; "))
    }

    fn say(&self, group: &str, trouble: Option<String>) {
        let mut all = self.troubles.lock();
        match trouble {
            None => {
                all.remove(group);
            }
            Some(t) if all.get(group) != Some(&t) => {
                tracing::warn!(group, trouble = t, "the topology");
                all.insert(group.to_owned(), t);
            }
            Some(_) => {}
        }
    }

    /// By which epoch at least everything that is under way to this group was planned.
    pub(super) fn settled(&self, group: &str) -> u64 {
        let mut known = self.known.lock();
        known.older.retain(|o| o.table.strong_count() > 0);
        let Some(t) = &known.topology else { return 0 };
        let place = t.groups.iter().position(|m| m.name == group);
        let under_way = known
            .older
            .iter()
            .filter(|o| place.is_some_and(|p| o.lost.contains(&p)));
        under_way.map(|o| o.epoch).min().unwrap_or(t.epoch)
    }

    /// For how long a group has taken down, without a break, that we are there: others could be taken down all that time too.
    pub(super) fn noted_for(&self, group: &str) -> Duration {
        self.known
            .lock()
            .noted
            .get(group)
            .map_or(Duration::ZERO, Instant::elapsed)
    }

    pub(super) fn lease(&self) -> Duration {
        let ms = self.topology().map_or(self.config.sharded.lease_ms, |t| t.lease_ms);
        Duration::from_millis(ms)
    }

    /// Between two looks at a group.
    pub(super) fn poll(&self) -> Duration {
        Duration::from_millis(self.config.sharded.poll_ms).min(self.lease() / 4)
    }

    fn instance(&self, group: &str) -> Instance {
        let epoch = self.settled(group);
        Instance {
            id: self.id.clone(),
            address: self.address.lock().clone().unwrap_or_default(),
            epoch,
            work: self.work.lock().as_ref().map(|w| w.told()),
        }
    }
}

impl Sharded {
    /// Begins with a group: who its primary is, connections, and what the topology in it says.
    fn start_group(&self, group: &GroupConfig) -> Arc<Group> {
        let keeper = self.keeper();
        let started = Group::of_config(
            &keeper.config,
            &keeper.login,
            group,
            self.metrics(),
            self.hub(),
            &keeper.workers,
            &keeper.life,
        );
        // Nothing is sent there before the topology was read there.
        started.seat.lease.bound();
        let (sharded, watched) = (self.clone(), Arc::clone(&started));
        let closing = keeper.life.clone();
        keeper.life.spawn_until_closed("dba-topology", async move {
            tokio::select! {
                () = sharded.watch(&watched) => {}
                () = closing.closing() => {
                    let mut shelf = Shelf::new(&watched.seat);
                    let left = tokio::time::timeout(Duration::from_millis(500), shelf.leave(&sharded.keeper().id)).await;
                    if !matches!(left, Ok(Ok(()))) {
                        tracing::debug!(group = %watched.seat.name, "could not be told that this gse_dba stops; it finds out");
                    }
                }
            }
        });
        started
    }

    /// Starts with the groups of the configuration. Who serves what is known once the topology was read.
    pub(crate) fn begin(&self) {
        let groups: Vec<GroupConfig> = self.keeper().config.sharded.groups.clone();
        let started: Vec<Arc<Group>> = groups.iter().map(|g| self.start_group(g)).collect();
        let mut known = self.keeper().known.lock();
        for g in &started {
            known.started.insert(g.seat.name.clone(), Arc::clone(g));
        }
        let before = self.table();
        self.replace(Table::of(0, before.map.clone(), started, Box::default()));
        drop(known);
        let (sharded, closing) = (self.clone(), self.keeper().life.clone());
        self.keeper().life.spawn_until_closed("dba-mover", async move {
            tokio::select! {
                () = sharded.move_slots() => {}
                () = closing.closing() => {}
            }
        });
    }

    /// Looks at the topology in one group for as long as we run.
    async fn watch(&self, group: &Arc<Group>) {
        let keeper = self.keeper();
        let mut shelf = Shelf::new(&group.seat);
        let mut heads = group.seat.heads();
        group.seat.wait_looked().await;
        loop {
            heads.mark_unchanged();
            let looked = self.look(&mut shelf, group).await;
            let looked_at = Instant::now();
            let name = &group.seat.name;
            match looked {
                Ok(again) => {
                    keeper.say(name, None);
                    if again {
                        tokio::time::sleep(BREATH).await;
                        continue;
                    }
                }
                Err(e) if group.seat.head().place.is_none() => {
                    tracing::debug!(group = %name, error = %format!("{e:#}"), "no topology");
                    keeper.say(name, None);
                }
                Err(e) => {
                    if e.is::<Contradiction>() {
                        *keeper.contradiction.lock() = Some(format!("group '{name}': {e:#}"));
                    }
                    keeper.say(name, Some(format!("group '{name}': {e:#}")));
                }
            }
            tokio::time::sleep(BREATH).await;
            tokio::select! {
                () = tokio::time::sleep_until(looked_at + keeper.poll()) => {}
                () = keeper.nudge.notified() => {}
                _ = heads.changed() => {}
            }
        }
    }

    /// One look; true when it is worth looking again at once.
    async fn look(&self, shelf: &mut Shelf, group: &Arc<Group>) -> anyhow::Result<bool> {
        let keeper = self.keeper();
        let lease = keeper.lease();
        let asked = Instant::now();
        let name = &group.seat.name;
        let me = keeper.instance(name);
        let settled = me.epoch;
        let limit = Duration::from_millis(keeper.config.sharded.connect_timeout_ms) * 2;
        let known = keeper.topology();
        // Before anything is known there is nothing that we could serve.
        let me = known.is_some().then_some((&me, lease));
        let looked = tokio::time::timeout(limit, shelf.look(me))
            .await
            .unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {limit:?}")));
        let noted = looked.as_ref().is_ok_and(|l| l.noted);
        {
            let mut known = keeper.known.lock();
            if noted {
                known.noted.entry(name.clone()).or_insert(asked);
            } else {
                known.noted.remove(name);
            }
        }
        let seen = looked?.seen;
        match (seen, known) {
            (None, None) => {
                keeper.known.lock().first.insert(name.clone(), false);
                self.found(shelf, name).await
            }
            (None, Some(t)) => {
                shelf.put(&t, None).await?;
                Ok(true)
            }
            (Some(seen), known) => {
                check(&seen, known.as_deref(), name)?;
                let ours = known.map_or(0, |t| t.epoch);
                if seen.epoch > ours {
                    if let Some(doc) = shelf.read().await? {
                        self.adopt(doc)?;
                    }
                    return Ok(true);
                }
                if seen.epoch < ours
                    && let Some(t) = keeper.topology()
                {
                    // Short of copies it keeps the older one; everybody knows better by the others.
                    if let Err(e) = shelf.put(&t, None).await {
                        tracing::debug!(group = %name, error = %format!("{e:#}"), "has an older topology and can't be told");
                    }
                }
                if seen.epoch <= settled {
                    // Who has taken us down waits for us for twice as long.
                    let length = if noted { lease * 3 / 2 } else { lease };
                    group.seat.lease.renew(asked, length, seen.epoch);
                    return Ok(false);
                }
                // What was planned by an older table is still under way; it will be over soon.
                Ok(true)
            }
        }
    }

    /// Makes the first document, once all groups of the configuration were seen to have none.
    async fn found(&self, shelf: &mut Shelf, name: &str) -> anyhow::Result<bool> {
        let keeper = self.keeper();
        let c = &keeper.config.sharded;
        let complete = {
            let known = keeper.known.lock();
            c.groups.iter().all(|g| known.first.contains_key(&g.name))
        };
        if super::topology::home(&c.groups) != name {
            return Ok(false);
        }
        if !complete {
            return Ok(true);
        }
        let speed = Speed {
            paused: false,
            bytes: c.move_bytes_per_s,
            keys: c.move_keys_per_s,
        };
        let id = format!("{:032x}", rand::random::<u128>());
        let first = Topology::first(id, &c.groups, c.lease_ms, speed).map_err(anyhow::Error::msg)?;
        if shelf.put(&first, Some(0)).await? == Put::Done {
            tracing::info!(
                groups = c.groups.len(),
                "the first topology was made, by the configuration"
            );
            self.adopt(first)?;
            keeper.nudge.notify_waiters();
        }
        Ok(true)
    }

    /// Takes in a newer document.
    pub(super) fn adopt(&self, doc: Topology) -> anyhow::Result<()> {
        let keeper = self.keeper();
        let mut known = keeper.known.lock();
        match &known.topology {
            Some(t) if t.epoch >= doc.epoch => return Ok(()),
            Some(_) => {}
            None => doc.contradicted(&keeper.config.sharded.groups).map_err(Contradiction)?,
        }
        let owners = doc.owners().map_err(anyhow::Error::msg)?;
        let routes = doc.routes().map_err(anyhow::Error::msg)?;
        let mut groups = Vec::with_capacity(doc.groups.len());
        for m in &doc.groups {
            let group = match known.started.get(&m.name) {
                Some(g) => Arc::clone(g),
                None if m.drained && m.slots.is_empty() => {
                    Group::gone(&keeper.config, &keeper.login, &m.name, self.metrics())
                }
                None => {
                    let config = keeper.config.sharded.groups.iter().find(|g| g.name == m.name);
                    let by_doc = GroupConfig {
                        name: m.name.clone(),
                        sentinels: m.sentinels.clone(),
                        servers: m.servers.clone(),
                        ..GroupConfig::default()
                    };
                    let started = self.start_group(config.unwrap_or(&by_doc));
                    known.started.insert(m.name.clone(), Arc::clone(&started));
                    started
                }
            };
            groups.push(group);
        }
        let n = groups.len();
        let moving = self.way(&mut known, &doc, &groups)?;
        if let Some(work) = &*keeper.work.lock() {
            work.speed(doc.speed);
        }
        let epoch = doc.epoch;
        let unused = |m: &Member| m.drained && m.slots.is_empty();
        let idle: Box<[bool]> = doc.groups.iter().map(unused).collect();
        let coming = doc.legs.iter().filter(|l| l.cleaning.is_none());
        let slots_left = coming.map(|l| SlotSet::of(&l.slots).map_or(0, |s| s.len())).sum();
        let doc = Arc::new(doc);
        let before = self.table();
        let mut lost: Vec<usize> = (0..SLOTS as u16)
            .map(|s| {
                (
                    before.map.group(s),
                    routes.get(usize::from(s)).copied().map_or(0, usize::from),
                )
            })
            .filter(|(was, is)| was != is)
            .map(|(was, _)| was)
            .collect();
        lost.sort_unstable();
        lost.dedup();
        drop(before);
        let old = self.replace(Table {
            epoch,
            map: SlotMap::from_owners(routes, n),
            owners: Some(SlotMap::from_owners(owners, n)),
            groups,
            moving,
            topology: Some(Arc::clone(&doc)),
            idle,
        });
        known.older.push(Older {
            epoch: old.epoch,
            table: Arc::downgrade(&old),
            lost,
        });
        drop(old);
        known.topology = Some(doc);
        drop(known);
        self.metrics().epoch(epoch);
        self.metrics().moving(slots_left);
        tracing::info!(epoch, "serving by another topology");
        keeper.epochs.send_replace(epoch);
        keeper.nudge.notify_waiters();
        Ok(())
    }

    /// Where commands for moving slots go: the same as before as long as the same one moves the same.
    fn way(&self, known: &mut Known, doc: &Topology, groups: &[Arc<Group>]) -> anyhow::Result<Option<Arc<Group>>> {
        let keeper = self.keeper();
        let Some((leg, mover)) = doc.running() else {
            known.way = None;
            // Only the cleaning of it may be left, which knows its own.
            return Ok(None);
        };
        let way = Way {
            leg: leg.clone(),
            ours: mover.id == keeper.id,
        };
        if let Some((before, group)) = &known.way
            && *before == way
        {
            return Ok(Some(Arc::clone(group)));
        }
        let group = |name: &str| {
            let place = doc.groups.iter().position(|m| m.name == name);
            place
                .and_then(|i| groups.get(i))
                .cloned()
                .ok_or_else(|| anyhow::anyhow!("the topology speaks of a group {name:?} that it does not have"))
        };
        let (source, target) = (group(&leg.from)?, group(&leg.to)?);
        let via = if way.ours {
            let work = Work::new(leg, doc.epoch, doc.speed, &source, &target).map_err(anyhow::Error::msg)?;
            let gate: Arc<Gate> = Arc::clone(&work.gate);
            *keeper.work.lock() = Some(work);
            Via::Gate(gate)
        } else {
            Via::Peer(Peer::start(
                self,
                doc.epoch,
                &mover.address,
                &keeper.config,
                keeper.password.clone(),
                self.metrics(),
                &keeper.life,
            )?)
        };
        let group = Arc::new(Group::by_way(&source, via));
        known.way = Some((way, Arc::clone(&group)));
        Ok(Some(group))
    }

    /// Changes the topology: what `f` makes of the newest one is written where it is decided, taken in and spread. `f` may say why not.
    pub(super) async fn change(
        &self,
        mut f: impl FnMut(&Topology) -> Result<Topology, String>,
    ) -> Result<Arc<Topology>, String> {
        let keeper = self.keeper();
        for _ in 0..CONTESTS {
            let known = keeper.topology().ok_or("the topology could not be read yet")?;
            let home = self
                .named(&known.home)
                .ok_or_else(|| format!("the deciding group '{}' is not known", known.home))?;
            let mut shelf = Shelf::new(&home.seat);
            let said = |e: anyhow::Error| format!("group '{}', where this is decided: {e:#}", known.home);
            let newest = shelf
                .read()
                .await
                .map_err(said)?
                .ok_or("the deciding group has lost the topology")?;
            if newest.home != known.home || newest.epoch < known.epoch {
                // It has been decided elsewhere since.
                if newest.epoch > known.epoch {
                    self.adopt(newest).map_err(|e| format!("{e:#}"))?;
                }
                tokio::time::sleep(keeper.poll()).await;
                continue;
            }
            let next = f(&newest)?;
            match shelf.put(&next, Some(newest.epoch)).await {
                Ok(Put::Done) => {}
                Ok(Put::Other(_)) => continue,
                Err(e) => {
                    // It may be there all the same: whether it is can be read once the group answers.
                    self.confirm(&home, &next, &e).await?;
                }
            }
            self.adopt(next).map_err(|e| format!("{e:#}"))?;
            keeper.nudge.notify_waiters();
            return keeper.topology().ok_or_else(|| "the topology is gone".to_owned());
        }
        Err("others change the topology all the time; try again".into())
    }

    /// Finds out whether a change whose answer was lost is in force. Not knowing would be worse than waiting.
    async fn confirm(&self, home: &Arc<Group>, next: &Topology, why: &anyhow::Error) -> Result<(), String> {
        let until = Instant::now() + Duration::from_millis(self.keeper().config.sharded.hold_ms) * 6;
        let mut shelf = Shelf::new(&home.seat);
        loop {
            tokio::time::sleep(BREATH * 5).await;
            match shelf.read().await {
                Ok(Some(there)) if there == *next => return Ok(()),
                Ok(Some(there)) if there.epoch >= next.epoch => {
                    return Err(format!("another change came first ({why:#})"));
                }
                Ok(_) => return Err(format!("the change was not made: {why:#}")),
                Err(e) if Instant::now() >= until => {
                    return Err(format!(
                        "UNCERTAIN whether the change was made is not known: {why:#}; {e:#}"
                    ));
                }
                Err(_) => {}
            }
        }
    }

    /// A group that was started, by its name.
    pub(super) fn named(&self, name: &str) -> Option<Arc<Group>> {
        self.keeper().known.lock().started.get(name).cloned()
    }

    /// A group that is to be added: it is looked at before anything is written.
    pub(super) async fn probe(&self, group: &GroupConfig) -> Result<(), String> {
        let keeper = self.keeper();
        let known = keeper.topology().ok_or("the topology could not be read yet")?;
        if known.member(&group.name).is_some() {
            return Err(format!("there is a group called {:?} already", group.name));
        }
        let started = match self.named(&group.name) {
            Some(g) => g,
            None => {
                let g = self.start_group(group);
                keeper.known.lock().started.insert(group.name.clone(), Arc::clone(&g));
                g
            }
        };
        let until = Instant::now() + keeper.config.sharded.connect_timeout();
        loop {
            let seat = &started.seat;
            let ready = seat.head().place.is_some() && seat.copies() >= seat.need && seat.lease.holds();
            match (ready, keeper.troubles.lock().get(&group.name)) {
                (_, Some(t)) => return Err(t.clone()),
                (true, None) => return Ok(()),
                (false, None) if Instant::now() < until => {}
                (false, None) => {
                    return Err(format!(
                        "group {:?} can't be reached, or is short of copies: {}",
                        group.name,
                        seat.short().unwrap_or_else(|| "it has no primary".into())
                    ));
                }
            }
            tokio::time::sleep(BREATH).await;
        }
    }
}

/// Whether what a group shows can be believed.
fn check(seen: &Seen, known: Option<&Topology>, name: &str) -> anyhow::Result<()> {
    if seen.name != name {
        let why = format!(
            "its servers say that they are group '{}': are the addresses of two groups mixed up?",
            seen.name
        );
        return Err(Contradiction(why).into());
    }
    if let Some(t) = known
        && t.id != seen.id
    {
        let why = format!(
            "its servers belong to another installation ({} instead of {})",
            seen.id, t.id
        );
        return Err(Contradiction(why).into());
    }
    Ok(())
}
