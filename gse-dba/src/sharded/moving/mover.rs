//! Moves slots: takes on what is to move (or what another gse_dba has left), waits until all serve by the new topology, lets the copy run, switches and cleans up.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::end::GroupEnd;
use super::gate::Gate;
use super::store::{Put, Shelf};
use super::topology::{Leg, SlotSet, Speed, Topology};
use crate::copy::{self, Copier, Filter, Pace, Progress, Settings, Tracker, Trouble};
use crate::sharded::{Group, Sharded};

/// Between looks at whether there is something to do.
const TICK: Duration = Duration::from_millis(100);
/// The gate is given up when what is under way does not end in this time: commands wait for it.
const HOLD: Duration = Duration::from_millis(60);
/// What is left may take this long with the gate held.
const REST: Duration = Duration::from_millis(60);
/// After an attempt to hold, or a try that failed.
const AGAIN: Duration = Duration::from_millis(50);
/// An end that is out of reach is waited for: a fail-over is no reason to give up, and whoever wants to can abort.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// A leg that we move.
pub(crate) struct Work {
    leg: Leg,
    slots: SlotSet,
    /// The topology by which everybody sends us commands for these slots.
    epoch: u64,
    pub(super) gate: Arc<Gate>,
    source: Arc<Group>,
    target: Arc<Group>,
    tracker: Arc<Tracker>,
    filter: Filter,
    pace: Arc<Pace>,
    progress: Arc<Progress>,
    stop: CancellationToken,
    begun: Instant,
    state: Mutex<String>,
    /// For how long the gate was held in the end.
    held: Mutex<Option<Duration>>,
}

impl Work {
    pub(super) fn new(
        leg: &Leg,
        epoch: u64,
        speed: Speed,
        source: &Arc<Group>,
        target: &Arc<Group>,
    ) -> Result<Arc<Self>, String> {
        let slots = SlotSet::of(&leg.slots)?;
        let filter = Filter::slots(slots.iter());
        let tracker = Tracker::new(filter.clone());
        let work = Self {
            gate: Gate::new(Arc::clone(source), Arc::clone(target), Arc::clone(&tracker)),
            leg: leg.clone(),
            slots,
            epoch,
            source: Arc::clone(source),
            target: Arc::clone(target),
            tracker,
            filter,
            pace: Arc::new(Pace::new(0, 0)),
            progress: Arc::default(),
            stop: CancellationToken::new(),
            begun: Instant::now(),
            state: Mutex::new("taken on".into()),
            held: Mutex::new(None),
        };
        work.speed(speed);
        Ok(Arc::new(work))
    }

    pub(super) fn speed(&self, speed: Speed) {
        self.pace.set(speed.bytes, speed.keys);
        self.pace.pause(speed.paused);
    }

    fn say(&self, state: impl Into<String>) {
        let state = state.into();
        tracing::info!(
            slots = self.slots.len(),
            from = self.leg.from,
            to = self.leg.to,
            state,
            "moving"
        );
        *self.state.lock() = state;
    }

    /// For `DBA MOVES`, and for other gse_dba.
    pub(super) fn told(&self) -> Value {
        use Ordering::Relaxed;
        let p = &self.progress;
        json!({
            "job": self.leg.job,
            "state": self.state.lock().clone(),
            "seconds": self.begun.elapsed().as_secs(),
            "keys_in_source": p.expected.load(Relaxed),
            "keys_seen": p.scanned.load(Relaxed),
            "keys_copied": p.copied.load(Relaxed),
            "bytes_copied": p.bytes.load(Relaxed),
            "parts_of_large_values": p.parts.load(Relaxed),
            "changed_and_copied_again": p.again.load(Relaxed),
            "waiting_to_be_copied_again": self.tracker.len(),
            "held_ms": self.held.lock().map(|d| d.as_millis() as u64),
        })
    }
}

/// Why a leg did not come to its end.
enum Stopped {
    /// It is not ours any more, or was aborted.
    Gone,
    Failed(String),
}

impl From<Trouble> for Stopped {
    fn from(t: Trouble) -> Self {
        match t {
            Trouble::Stopped => Self::Gone,
            other => Self::Failed(other.to_string()),
        }
    }
}

impl Sharded {
    /// Does what there is to do, for as long as we run.
    pub(super) async fn move_slots(&self) {
        let keeper = self.keeper();
        let mut epochs = keeper.epochs();
        let mut waited = Instant::now();
        let mut waited_for = 0;
        loop {
            tokio::select! {
                _ = epochs.changed() => {}
                () = tokio::time::sleep(TICK) => {}
            }
            let Some(topology) = keeper.topology() else { continue };
            let Some(leg) = topology.legs.first().cloned() else {
                *keeper.work.lock() = None;
                continue;
            };
            match &leg.mover {
                Some(m) if m.id == keeper.id => {
                    if let Err(e) = self.carry_on(&leg).await {
                        tracing::warn!(error = e, "a move does not go on; it is tried again");
                        tokio::time::sleep(AGAIN).await;
                    }
                    waited = Instant::now();
                }
                other => {
                    // Whoever was asked for it, or had it, comes first.
                    if waited_for != topology.epoch {
                        (waited, waited_for) = (Instant::now(), topology.epoch);
                    }
                    let restarted = other
                        .as_ref()
                        .is_some_and(|m| keeper.me().is_ok_and(|me| me.address == m.address));
                    let patience = keeper.lease() * 2;
                    if (!restarted && waited.elapsed() < patience) || keeper.me().is_err() {
                        continue;
                    }
                    if let Some(m) = other
                        && !restarted
                        && self.is_there(&topology, &m.id).await
                    {
                        waited = Instant::now();
                        continue;
                    }
                    if let Err(e) = self.take_on(topology.epoch).await {
                        tracing::info!(why = e, "a move was not taken on");
                        waited = Instant::now();
                    }
                }
            }
        }
    }

    /// Whether another gse_dba is there; when that can't be known, it is.
    async fn is_there(&self, topology: &Topology, id: &str) -> bool {
        let Some(home) = self.named(&topology.home) else {
            return true;
        };
        match Shelf::new(&home.seat).instances().await {
            Ok(all) => all.iter().any(|i| i.id == id),
            Err(_) => true,
        }
    }

    /// Becomes the one who moves what comes first, if nothing has changed since.
    async fn take_on(&self, epoch: u64) -> Result<(), String> {
        let me = self.keeper().me()?;
        self.change(|t| {
            if t.epoch != epoch {
                return Err("something has changed".into());
            }
            t.with_mover(me.clone())
                .ok_or_else(|| "there is nothing to move".into())
        })
        .await
        .map(|_| ())
    }

    /// Does the leg that is ours, from wherever it is.
    async fn carry_on(&self, leg: &Leg) -> Result<(), String> {
        let keeper = self.keeper();
        if let Some(litter) = &leg.cleaning {
            self.clean(leg, litter).await?;
            return Ok(());
        }
        let Some(work) = keeper.work.lock().clone().filter(|w| w.leg == *leg) else {
            return Err("what is to be moved is not known yet".into());
        };
        let watch = async {
            let mut epochs = keeper.epochs();
            loop {
                let ours = keeper.topology().is_some_and(|t| t.legs.first() == Some(leg));
                if !ours || epochs.changed().await.is_err() {
                    work.stop.cancel();
                    std::future::pending::<()>().await;
                }
            }
        };
        let moved = tokio::select! {
            moved = self.carry(&work) => moved,
            () = watch => return Ok(()),
        };
        match moved {
            Ok(()) => Ok(()),
            Err(Stopped::Gone) => {
                work.say("stopped");
                Ok(())
            }
            Err(Stopped::Failed(e)) => {
                work.say(format!("tried again: {e}"));
                Err(e)
            }
        }
    }

    async fn carry(&self, work: &Arc<Work>) -> Result<(), Stopped> {
        self.wait_for_all(work).await?;
        let source = GroupEnd::new(&work.source);
        let target = GroupEnd::new(&work.target);
        work.say("clearing the target of what an earlier attempt has left");
        copy::purge(&*target, &work.filter, &Pace::new(0, 0), &work.stop, PATIENCE).await?;
        let mut copier = Copier::new(copy::Job {
            source,
            target,
            filter: work.filter.clone(),
            tracker: Arc::clone(&work.tracker),
            pace: Arc::clone(&work.pace),
            progress: Arc::clone(&work.progress),
            settings: Settings {
                patience: PATIENCE,
                ..Settings::default()
            },
            stop: work.stop.clone(),
        });
        work.say("copying");
        copier.copy_all().await?;
        work.say("copying what has changed meanwhile");
        loop {
            copier.converge().await?;
            if work.pace.is_paused() {
                work.say("paused");
                while work.pace.is_paused() {
                    tokio::time::sleep(TICK).await;
                }
                continue;
            }
            // Between two looks: a group without its primary can't end a move, and clients would wait for it.
            if work.source.seat.short().is_some() || work.target.seat.short().is_some() {
                tokio::time::sleep(TICK).await;
                continue;
            }
            let begun = Instant::now();
            let Some(mut held) = work.gate.hold(HOLD).await else {
                tokio::time::sleep(AGAIN).await;
                continue;
            };
            if !copier.finish(REST).await? {
                drop(held);
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            // From here on until it is known what the topology says, no command for these slots goes anywhere.
            let leg = &work.leg;
            let switched = self
                .change(|t| {
                    if t.legs.first() != Some(leg) {
                        return Err("the move was aborted, or another has taken it on".into());
                    }
                    t.switched()
                })
                .await;
            if let Err(e) = switched {
                drop(held);
                tracing::info!(why = e, "slots were not switched");
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            held.switch();
            drop(held);
            *work.held.lock() = Some(begun.elapsed());
            let p = &work.progress;
            let (keys, bytes) = (p.copied.load(Ordering::Relaxed), p.bytes.load(Ordering::Relaxed));
            self.metrics().moved(keys, bytes);
            work.say("switched");
            return Ok(());
        }
    }

    /// Waits until every gse_dba sends commands for these slots to us, and what it sent before is answered.
    async fn wait_for_all(&self, work: &Arc<Work>) -> Result<(), Stopped> {
        let keeper = self.keeper();
        let mut shelf = Shelf::new(&work.source.seat);
        let mut pushed: Option<(Instant, bool)> = None;
        let mut said = String::new();
        loop {
            let waits_for = match pushed {
                None => match self.push(&mut shelf, work.epoch).await {
                    Ok(()) => {
                        // Whoever serves the group is known to it, if it could be told so all the time.
                        let complete = keeper.noted_for(&work.leg.from) >= keeper.lease() * 2;
                        pushed = Some((Instant::now(), complete));
                        continue;
                    }
                    Err(e) => format!("group '{}' to take the new topology: {e:#}", work.leg.from),
                },
                // Who has read the old topology there just before may serve by it for a lease.
                Some((at, false)) if at.elapsed() < keeper.lease() * 5 / 4 => {
                    "leases of the old topology to end".into()
                }
                Some(_) if keeper.settled(&work.leg.from) < work.epoch => "commands that were planned before".into(),
                Some(_) => match shelf.instances().await {
                    Ok(all) => {
                        let late: Vec<String> = all
                            .iter()
                            .filter(|i| i.id != keeper.id && i.epoch < work.epoch)
                            .map(|i| format!("the gse_dba at {} to take the new topology", i.address))
                            .collect();
                        if late.is_empty() {
                            return Ok(());
                        }
                        late.join(", ")
                    }
                    Err(e) => format!("group '{}' to say who serves it: {e:#}", work.leg.from),
                },
            };
            let state = format!("waiting for {waits_for}");
            if state != said {
                work.say(state.clone());
                said = state;
            }
            tokio::select! {
                () = tokio::time::sleep(keeper.poll().min(TICK)) => {}
                () = work.stop.cancelled() => return Err(Stopped::Gone),
            }
        }
    }

    /// Makes sure that a group has the topology that we serve by, or a newer one.
    async fn push(&self, shelf: &mut Shelf, epoch: u64) -> anyhow::Result<()> {
        let topology = self
            .keeper()
            .topology()
            .ok_or_else(|| anyhow::anyhow!("there is none"))?;
        match shelf.put(&topology, None).await? {
            Put::Done => Ok(()),
            Put::Other(there) => {
                anyhow::ensure!(there >= epoch, "it has epoch {there}");
                Ok(())
            }
        }
    }

    /// Deletes what is left in a group that does not serve these slots.
    async fn clean(&self, leg: &Leg, litter: &str) -> Result<(), String> {
        let keeper = self.keeper();
        let group = self
            .named(litter)
            .ok_or_else(|| format!("group '{litter}' is not known"))?;
        let slots = SlotSet::of(&leg.slots)?;
        let work = keeper.work.lock().clone().filter(|w| w.slots == slots);
        if let Some(w) = &work {
            w.say(format!("deleting what is left in group '{litter}'"));
        }
        let stop = CancellationToken::new();
        let ours = |t: &Topology| t.legs.first() == Some(leg);
        let pace = work
            .as_ref()
            .map_or_else(|| Arc::new(Pace::new(0, 0)), |w| Arc::clone(&w.pace));
        let end = GroupEnd::new(&group);
        let filter = Filter::slots(slots.iter());
        let purge = copy::purge(&*end, &filter, &pace, &stop, PATIENCE);
        let gone = async {
            let mut epochs = keeper.epochs();
            while keeper.topology().is_some_and(|t| ours(&t)) {
                if epochs.changed().await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            purged = purge => purged.map_err(|e| e.to_string())?,
            () = gone => return Ok(()),
        }
        self.change(|t| {
            if !ours(t) {
                return Err("another has taken it on".into());
            }
            t.cleaned().ok_or_else(|| "there is nothing to clean".into())
        })
        .await?;
        // The next leg may have put its own there.
        let mut current = keeper.work.lock();
        if let (Some(now), Some(done)) = (&*current, &work)
            && Arc::ptr_eq(now, done)
        {
            *current = None;
        }
        Ok(())
    }
}
