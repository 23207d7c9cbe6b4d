//! One move of all data, from the first look at the target to the switch. Until the switch the source is what it was, whatever happens; after it the target is.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use tokio::time::Instant;

use super::state::{self, Note};
use super::{Office, Phase, Place, Started, view_of};
use crate::copy::{Copier, End, Filter, Job, RESERVED, Reply, Settings, StoreEnd, Tracker, Trouble, purge, words};
use crate::server::{self, Store};
use crate::single::Single;
use crate::view::quiet;

/// How often commands are held back for the last step before it is given up.
const ATTEMPTS: u64 = 20;
/// Between two of these.
const BREATH: Duration = Duration::from_millis(200);
/// Comparisons of all keys that may find what nobody has told.
const COMPARISONS: u32 = 3;

/// Why it ended without a switch.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("it was stopped")]
    Stopped,
    #[error("{0}")]
    Because(String),
}

impl From<Trouble> for Failed {
    fn from(t: Trouble) -> Self {
        match t {
            Trouble::Stopped => Self::Stopped,
            other => Self::Because(other.to_string()),
        }
    }
}

impl From<anyhow::Error> for Failed {
    fn from(e: anyhow::Error) -> Self {
        Self::Because(format!("{e:#}"))
    }
}

fn because(text: impl Into<String>) -> Failed {
    Failed::Because(text.into())
}

/// What a move is about.
struct Plan {
    source: Arc<Started>,
    target: Arc<Started>,
    from: Arc<dyn End>,
    to: Arc<dyn End>,
    job: Job,
    back: bool,
    /// The target was started for this move.
    fresh: bool,
    id: String,
}

/// Moves all data to `to`. Says how it went in the office's state.
pub(super) async fn run(office: Arc<Office>, to: Place, replace: bool, back: bool) {
    let stop = match &office.state.lock().last {
        Some(m) => m.stop.clone(),
        None => return,
    };
    // A server that stops does not finish this: the source stays the one.
    let moved = {
        let going = whole(&office, to, replace, back);
        tokio::pin!(going);
        tokio::select! {
            moved = &mut going => moved,
            () = office.life.draining() => {
                stop.cancel();
                going.await
            }
        }
    };
    let mut state = office.state.lock();
    let Some(m) = &mut state.last else { return };
    let of = |n: &std::sync::atomic::AtomicU64| n.load(std::sync::atomic::Ordering::Relaxed);
    office.metrics.moved(of(&m.progress.copied), of(&m.progress.bytes));
    match moved {
        Ok(()) => {
            m.phase = Phase::Switched;
            tracing::warn!(
                from = m.from,
                to = m.to,
                held_ms = m.held_ms,
                "the data has moved: this store serves now"
            );
        }
        Err(Failed::Stopped) => {
            m.phase = Phase::Aborted;
            tracing::warn!(
                from = m.from,
                to = m.to,
                "moving the data was stopped; the store is the one it was"
            );
        }
        Err(Failed::Because(why)) => {
            tracing::error!(
                from = m.from,
                to = m.to,
                why,
                "the data could not be moved; the store is the one it was"
            );
            m.phase = Phase::Failed;
            m.problem = Some(why);
        }
    }
}

async fn whole(office: &Arc<Office>, to: Place, replace: bool, back: bool) -> Result<(), Failed> {
    let plan = prepare(office, to, replace, back).await?;
    let result = copy_and_switch(office, &plan).await;
    if result.is_err() {
        // As it was: nobody is told of writes any more, nobody waits.
        office.views.replace(office.views.now().plain());
        if let Some(life) = plan.target.life.as_ref().filter(|_| plan.fresh) {
            life.abort();
        }
    }
    result
}

/// Starts the target and makes sure that moving there is safe.
async fn prepare(office: &Arc<Office>, to: Place, replace: bool, back: bool) -> Result<Plan, Failed> {
    let (source, kept, stop, pace, progress) = {
        let state = office.state.lock();
        let Some(m) = &state.last else {
            return Err(Failed::Stopped);
        };
        let kept = state.before.clone().filter(|_| back);
        (
            Arc::clone(&state.current),
            kept,
            m.stop.clone(),
            Arc::clone(&m.pace),
            Arc::clone(&m.progress),
        )
    };
    let dir = office.base.embedded.dir.clone();
    let (target, fresh) = match kept {
        Some(kept) => (kept, false),
        None => (Arc::new(start(office, to.clone()).await?), true),
    };
    let patience = Duration::from_millis(office.base.migrate.patience_ms);
    let from: Arc<dyn End> = Arc::new(StoreEnd::new(source.place.name(), Arc::clone(&source.store)));
    let towards: Arc<dyn End> = Arc::new(StoreEnd::new(target.place.name(), Arc::clone(&target.store)));
    let filter = Filter::all();
    let plan = Plan {
        job: Job {
            source: Arc::clone(&from),
            target: Arc::clone(&towards),
            filter: filter.clone(),
            tracker: Tracker::new(filter.clone()),
            pace,
            progress,
            settings: Settings {
                patience,
                ..Settings::default()
            },
            stop: stop.clone(),
        },
        source,
        target,
        from,
        to: towards,
        back,
        fresh,
        id: format!("{:032x}", rand::random::<u128>()),
    };
    let checked = check(&plan, &dir, replace, patience).await;
    if let (Err(_), Some(life), true) = (&checked, &plan.target.life, fresh) {
        life.abort();
    }
    checked.map(|()| plan)
}

async fn check(plan: &Plan, dir: &std::path::Path, replace: bool, patience: Duration) -> Result<(), Failed> {
    others(&plan.source.store, "source").await?;
    others(&plan.target.store, "target").await?;
    let marker = marker();
    let until = Instant::now() + patience.min(Duration::from_secs(10));
    let asked = [words([b"DBSIZE".as_slice()]), words([b"GET".as_slice(), &marker])];
    let got = loop {
        match plan.to.call(&asked).await {
            Err(Trouble::Later(why)) if Instant::now() >= until || plan.job.stop.is_cancelled() => {
                return Err(because(format!("{} can't be used: {why}", plan.to.name())));
            }
            Err(Trouble::Later(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
            other => break other?,
        }
    };
    let size = match got.first() {
        Some(Reply::Int(n)) => *n,
        other => {
            return Err(because(format!(
                "{} does not say how many keys it has: {other:?}",
                plan.to.name()
            )));
        }
    };
    let (at, place) = (dir.to_path_buf(), plan.target.place.clone());
    let unfinished = tokio::task::spawn_blocking(move || state::begun(&at, &place))
        .await
        .map_err(|e| because(e.to_string()))?;
    let ours = unfinished.is_some_and(|id| got.get(1).and_then(Reply::bytes).is_some_and(|b| *b == id.as_bytes()));
    if size > 0 && !replace && !ours {
        return Err(because(format!(
            "{} has {size} keys already; empty it, or say DBA MIGRATE TO <url> REPLACE to delete them",
            plan.to.name()
        )));
    }
    let (at, place, id) = (dir.to_path_buf(), plan.target.place.clone(), plan.id.clone());
    // It also shows that the directory can be written to, before anything depends on it.
    tokio::task::spawn_blocking(move || state::begin(&at, &place, &id))
        .await
        .map_err(|e| because(e.to_string()))??;
    // On the way back the old store is compared with and brought up to date, not emptied.
    if size > 0 && !plan.back {
        purge(&*plan.to, &plan.job.filter, &plan.job.pace, &plan.job.stop, patience).await?;
    }
    let got = plan
        .to
        .call(&[words([b"SET".as_slice(), &marker, plan.id.as_bytes()])])
        .await?;
    match got.first().and_then(Reply::error) {
        Some(e) => Err(because(format!("{} takes no writes: {e}", plan.to.name()))),
        None => Ok(()),
    }
}

fn marker() -> Vec<u8> {
    [RESERVED, b"unfinished"].concat()
}

/// Refuses when somebody else is connected to a Redis: such a one would go on writing to the old store without anybody's knowing.
async fn others(store: &Store, which: &str) -> Result<(), Failed> {
    let Store::Single(single) = store else { return Ok(()) };
    match strangers(single).await {
        Ok(found) if found.is_empty() => Ok(()),
        Ok(found) => Err(because(format!(
            "others are connected to the {which} directly ({}): what they write would be lost with the move. Another gse_dba in front of it? Disconnect them first",
            found.join(", ")
        ))),
        Err(why) => {
            // A store without CLIENT LIST can't tell.
            tracing::warn!(why, which, "whether others are connected to the store can't be known");
            Ok(())
        }
    }
}

async fn strangers(single: &Single) -> Result<Vec<String>, String> {
    let list = single.ask(&[b"CLIENT", b"LIST"]).await?;
    let text = list.bytes().map(|b| String::from_utf8_lossy(b).into_owned());
    let text = text.ok_or_else(|| list.error().unwrap_or("no list").to_owned())?;
    let ours = format!("name={} ", crate::single::dial::client_name());
    Ok(text
        .lines()
        .filter(|l| !l.contains(&ours))
        .filter_map(|l| {
            let field = |name: &str| l.split(' ').find_map(|f| f.strip_prefix(name));
            let flags = field("flags=")?;
            // Copies of it, and what Redis itself is there as, write nothing of their own; Sentinels neither.
            let harmless =
                flags.contains(['S', 'M', 'O']) || field("name=").is_some_and(|n| n.starts_with("sentinel-"));
            (!harmless).then(|| {
                format!("{} {}", field("addr=").unwrap_or("?"), field("name=").unwrap_or(""))
                    .trim()
                    .to_owned()
            })
        })
        .collect())
}

/// Starts a store beside the one that serves.
async fn start(office: &Arc<Office>, place: Place) -> Result<Started, Failed> {
    let config = place.config(&office.base).await?;
    let life = Lifecycle::new("gse_dba target");
    let (owner, child) = (office.life.clone(), life.clone());
    let grace = Duration::from_millis(office.base.runtime.drain_timeout_ms);
    office.life.spawn_until_closed("dba-target", async move {
        tokio::select! {
            () = owner.closing() => child.drain(),
            () = child.draining() => {}
        }
        child.finished(grace).await;
    });
    let health = Health::new();
    match server::start_store(&config, &office.workers, office.metrics.clone(), &life, &health).await {
        Ok((store, engine)) => {
            office.engines.lock().extend(engine);
            Ok(Started {
                place,
                config,
                store: Arc::new(store),
                life: Some(life),
                health,
            })
        }
        Err(e) => {
            life.abort();
            Err(because(format!("{} can't be started: {e:#}", place.name())))
        }
    }
}

async fn copy_and_switch(office: &Arc<Office>, plan: &Plan) -> Result<(), Failed> {
    let patience = plan.job.settings.patience;
    office.set_phase(Phase::Copying);
    let now = office.views.now();
    let old = office.views.replace(now.tracked(&plan.job.tracker));
    drop(now);
    // Writes that were under way before anybody was told of them must be done before the first key is read.
    let until = Instant::now() + patience;
    tokio::select! {
        quiet = quiet(&old, until) => if !quiet {
            return Err(because(format!("commands have been under way for more than {patience:?}: something blocks")));
        },
        () = plan.job.stop.cancelled() => return Err(Failed::Stopped),
    }
    drop(old);
    let mut copier = Copier::new(plan.job.clone());
    if plan.back {
        // Most of it is there still: what is equal is left as it is.
        copier.verify().await?;
    } else {
        copier.copy_all().await?;
    }
    copier.converge().await?;
    office.set_phase(Phase::Verifying);
    for n in 1.. {
        let wrong = copier.verify().await?;
        copier.converge().await?;
        if wrong == 0 {
            break;
        }
        if n == COMPARISONS {
            return Err(because(format!(
                "{wrong} keys differ again and again without a write through this server: somebody else writes to one of the stores"
            )));
        }
    }
    office.set_phase(Phase::Switching);
    for _ in 0..ATTEMPTS {
        copier.converge().await?;
        others(&plan.source.store, "source").await?;
        if let Some(m) = &mut office.state.lock().last {
            m.attempts += 1;
        }
        if last_step(office, plan, &mut copier).await? {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(BREATH) => {}
            () = plan.job.stop.cancelled() => return Err(Failed::Stopped),
        }
    }
    Err(because(format!(
        "within migrate.hold_ms ({} ms) the last changes could not be copied, {ATTEMPTS} times: large lists, strings or streams that change all the time, commands that block, or a slow target; set it higher, or try when less is written",
        office.base.migrate.hold_ms
    )))
}

/// Holds commands back, copies the rest, switches. False when the time was not enough: commands go on as before.
async fn last_step(office: &Arc<Office>, plan: &Plan, copier: &mut Copier) -> Result<bool, Failed> {
    let limit = Duration::from_millis(office.base.migrate.hold_ms);
    let begun = Instant::now();
    let now = office.views.now();
    let old = office.views.replace(now.held());
    let generation = now.generation;
    drop(now);
    let done = async {
        if !quiet(&old, begun + limit / 2).await {
            return Ok(false);
        }
        if !copier.finish(limit.saturating_sub(begun.elapsed())).await? {
            return Ok(false);
        }
        let keys = (size(&plan.from).await?, size(&plan.to).await?);
        let gone = plan.to.call(&[words([b"UNLINK".as_slice(), &marker()])]).await?;
        if let Some(e) = gone.first().and_then(Reply::error) {
            return Err(because(e));
        }
        let note = Note {
            store: plan.target.place.clone(),
            before: plan.source.place.clone(),
        };
        let dir = office.base.embedded.dir.clone();
        // From here on the target is the one, at the next start too.
        let undo = Note {
            store: plan.source.place.clone(),
            before: plan.target.place.clone(),
        };
        tokio::task::spawn_blocking(move || {
            note.write(&dir).inspect_err(|_| {
                // Half written down must not count as done: the source stays the one.
                if let Err(e) = undo.write(&dir) {
                    tracing::error!(error = %format!("{e:#}"), "the note of which store is the one can't be put right; look at it before the next start");
                }
            })
        })
        .await
        .map_err(|e| because(e.to_string()))??;
        if let Some(m) = &mut office.state.lock().last {
            // The marker is not counted any more; it was when the target was asked.
            m.keys = Some((keys.0, keys.1 - 1));
        }
        Ok(true)
    }
    .await;
    let switched = matches!(done, Ok(true));
    if switched {
        let older = {
            let mut state = office.state.lock();
            state.back = Some(plan.source.place.clone());
            state.current = Arc::clone(&plan.target);
            state.before.replace(Arc::clone(&plan.source))
        };
        // What was kept for another way back is let go.
        if let Some(life) = older
            .filter(|o| !Arc::ptr_eq(o, &plan.target))
            .as_ref()
            .and_then(|o| o.life.as_ref())
        {
            life.abort();
        }
        office.views.replace(view_of(&plan.target, generation + 1));
        if let Some(m) = &mut office.state.lock().last {
            m.held_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        }
        let dir = office.base.embedded.dir.clone();
        if let Ok(Err(e)) = tokio::task::spawn_blocking(move || state::end(&dir)).await {
            tracing::warn!(error = %format!("{e:#}"), "the note of the unfinished copy is left; it does no harm");
        }
    } else {
        let view = office.views.now();
        office.views.replace(view.tracked(&plan.job.tracker));
    }
    done
}

async fn size(end: &Arc<dyn End>) -> Result<i64, Failed> {
    let got = end.call(&[vec![Bytes::from_static(b"DBSIZE")]]).await?;
    Ok(got.first().and_then(Reply::int).unwrap_or(-1))
}
