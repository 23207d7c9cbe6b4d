//! The look at all known processes, every so often and off the runtime, and what follows from it. One read for a process that runs; only what
//! does not run is looked for by its pid file, and by name more rarely still. With nothing registered nothing is looked at.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use gse_proto::proc::Spec;
use tokio::signal::unix::{SignalKind, signal};

use super::events::{self, GROUP_OVER_LIMIT};
use super::find::{Ident, Look};
use super::limits::Usage;
use super::machine::{Action, Told};
use super::registry::Key;
use super::stat::Stat;
use super::steps::kill_tree;
use super::{Held, Shared, respawn, status};

/// Between two rounds of forgetting old results.
const SWEEP: Duration = Duration::from_secs(60);

/// Between two rounds of collecting the dead.
const COLLECT: Duration = Duration::from_millis(20);

/// A process to look at.
struct Ask {
    key: Arc<Key>,
    spec: Arc<Spec>,
    last: Option<Ident>,
}

/// What was seen of it.
struct Seen {
    key: Arc<Key>,
    spec: Arc<Spec>,
    found: Option<(Stat, Ident)>,
}

/// What follows.
struct Work {
    key: Arc<Key>,
    actions: Vec<Action>,
    why: String,
    ident: Option<Ident>,
    /// The account that it is registered for.
    user: String,
    /// With a start: the process's turn.
    held: Option<Held>,
}

/// Namespaces that take more than they may, so that it is told once.
type Groups = BTreeMap<String, bool>;

/// Looks until the agent stops.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut names_at: Option<u64> = None;
    let mut swept = tokio::time::Instant::now();
    let mut groups = Groups::new();
    loop {
        let idle = shared.entries.lock().is_empty();
        tokio::select! {
            () = shared.life.draining() => return,
            () = shared.look.notified(), if idle => {}
            () = tokio::time::sleep(SWEEP), if idle => {}
            () = tokio::time::sleep(shared.config.check_interval()), if !idle => {}
        }
        if swept.elapsed() >= SWEEP {
            swept = tokio::time::Instant::now();
            let task = Arc::clone(&shared);
            let sweeping = tokio::task::spawn_blocking(move || {
                task.ops.sweep();
                task.names.forget();
            });
            if let Err(error) = sweeping.await {
                tracing::error!(%error, "results of operations could not be swept");
            }
        }
        if shared.entries.lock().is_empty() {
            continue;
        }
        let now = shared.now();
        let by_name = names_at.is_none_or(|at| now.saturating_sub(at) >= shared.config.name_scan_ms);
        if by_name {
            names_at = Some(now);
        }
        look(&shared, by_name, &mut groups).await;
    }
}

/// Collects the dead that were left to the agent as soon as they die: a script that waits for a process to be gone must not wait for the next
/// look.
pub(super) async fn collect(shared: Arc<Shared>) {
    let mut died = match signal(SignalKind::child()) {
        Ok(died) => died,
        Err(error) => return tracing::error!(%error, "dead processes are collected only at every look"),
    };
    loop {
        tokio::select! {
            _ = died.recv() => {}
            () = shared.life.draining() => return,
        }
        if shared.entries.lock().is_empty() {
            continue;
        }
        if let Err(error) = tokio::task::spawn_blocking(crate::exec::collect_dead).await {
            tracing::error!(%error, "dead processes could not be collected");
        }
        // Together, when many die.
        tokio::time::sleep(COLLECT).await;
    }
}

async fn look(shared: &Arc<Shared>, by_name: bool, groups: &mut Groups) {
    let asks: Vec<Ask> = {
        let entries = shared.entries.lock();
        let free = entries.iter().filter(|(_, entry)| entry.machine.is_free());
        free.map(|(key, entry)| Ask {
            key: Arc::clone(key),
            spec: Arc::clone(&entry.kept.spec),
            last: entry.kept.ident.clone(),
        })
        .collect()
    };
    let task = Arc::clone(shared);
    let looked = tokio::task::spawn_blocking(move || {
        let claim = || task.claimed();
        let look = Look::new(&task.boot, task.units, &task.names, &claim);
        let mut ended = false;
        let see = |ask: Ask| {
            let found = match ask.last.as_ref().and_then(|last| look.still(last)) {
                Some(stat) => Some(stat),
                None => {
                    ended |= ask.last.is_some();
                    // With a pid file there is no need to go by a name.
                    look.find(&ask.spec, None, None, by_name && ask.spec.pid_path.is_empty())
                }
            };
            let found = found.map(|stat| {
                let ident = look.ident(&stat);
                (stat, ident)
            });
            Seen {
                key: ask.key,
                spec: ask.spec,
                found,
            }
        };
        let seen: Vec<Seen> = asks.into_iter().map(see).collect();
        if ended {
            // Whoever was left to the agent is collected by it.
            crate::exec::collect_dead();
        }
        seen
    });
    let seen = match looked.await {
        Ok(seen) => seen,
        Err(error) => return tracing::error!(%error, "processes could not be looked at"),
    };
    let work: Vec<Work> = seen.into_iter().filter_map(|seen| take(shared, seen)).collect();
    watch_groups(shared, groups);
    for one in work {
        let Work {
            key,
            actions,
            why,
            ident,
            user,
            mut held,
        } = one;
        for action in actions {
            match (action, held.take()) {
                (Action::Start, Some(held)) => respawn::begin(shared, Key::clone(&key), held),
                (Action::Kill, _) => {
                    if let Some(ident) = ident.clone() {
                        kill_tree(shared, ident, user.clone()).await;
                    }
                }
                (other, _) => act(shared, &key, other, &why).await,
            }
        }
    }
}

/// Puts down what was seen of one process; what is to be done about it.
fn take(shared: &Arc<Shared>, seen: Seen) -> Option<Work> {
    let Seen { key, spec, found } = seen;
    let now = shared.now();
    let mut entries = shared.entries.lock();
    let entry = entries.get_mut(key.as_ref())?;
    // An operation has come in between: it knows better.
    if !entry.machine.is_free() || !Arc::ptr_eq(&entry.kept.spec, &spec) {
        return None;
    }
    let ident = found.as_ref().map(|(_, ident)| ident.clone());
    let (hosted, seen) = (entry.machine.hosted(), entry.machine.seen());
    let was = entry.kept.ident.clone();
    let was_running = entry.stat.is_some();
    shared.seen_as(entry, found);
    let mut actions = entry.machine.observe(now, entry.stat.is_some());
    let mut why = String::new();
    if let Some(text) = entry.meter.over(shared.units, spec.cpu_limit, spec.mem_limit) {
        let over = entry.machine.over_limit();
        if !over.is_empty() {
            entry.kept.trouble.clone_from(&text);
            why = text;
        }
        actions.extend(over);
    }
    let mut held = None;
    if actions.is_empty() {
        // Whose turn it is decides: an operation that waits for it comes first.
        held = shared.try_turn(&key);
        if held.is_some() {
            actions = entry.machine.tick(now);
        }
    }
    let changed = was != entry.kept.ident
        || was_running != entry.stat.is_some()
        || (hosted, seen) != (entry.machine.hosted(), entry.machine.seen())
        || !why.is_empty();
    if changed {
        entry.kept.serial += 1;
        entry.kept.seen = entry.machine.seen();
        entry.kept.hosted = entry.machine.hosted();
        shared.reporter.changed(&key);
        shared.keeper.ask();
    }
    let stale = status::version_due(entry);
    drop(entries);
    if stale {
        status::refresh_version(shared, &key);
    }
    (!actions.is_empty()).then_some(Work {
        key,
        actions,
        why,
        ident,
        user: spec.user.clone(),
        held,
    })
}

/// Does what the machine of a process wants, starts and kills excepted.
pub(super) async fn act(shared: &Arc<Shared>, key: &Key, action: Action, why: &str) {
    let name = &key.name;
    match action {
        Action::Tell(told) => {
            let content = match told {
                Told::Restarted => format!("check {name} not running, and restart it success"),
                Told::RestartFailed => format!("check {name} not running, and restart it failed: {why}"),
                Told::GivenUp => format!("{name} was restarted in vain too often in a row, and is hosted no longer"),
                Told::OverLimit => format!("{name}: {why}, and it is killed"),
            };
            shared.tell(events::name(told), key, &content);
        }
        Action::Unhost => {
            let gave_up = shared.change(key, |entry| {
                if entry.kept.trouble.is_empty() {
                    entry.kept.trouble = "it ended again and again".to_owned();
                }
                entry.kept.trouble = format!("hosted no longer: {}", entry.kept.trouble);
            });
            if gave_up.is_none() {
                tracing::debug!(process = %key, "given up, and not known any more");
            }
        }
        Action::Start | Action::Kill => tracing::error!(process = %key, ?action, "not to be done here"),
    }
}

/// What whole namespaces take, and the gauges.
fn watch_groups(shared: &Arc<Shared>, groups: &mut Groups) {
    let (cpu_limit, mem_limit) = (shared.config.group_cpu_limit, shared.config.group_mem_limit);
    let limited = cpu_limit > 0.0 || mem_limit > 0.0;
    let mut sums: BTreeMap<String, Usage> = BTreeMap::new();
    let (mut known, mut hosted, mut running) = (0i64, 0i64, 0i64);
    for (key, entry) in shared.entries.lock().iter() {
        known += 1;
        hosted += i64::from(entry.kept.hosted);
        running += i64::from(entry.stat.is_some());
        if limited && entry.kept.hosted && entry.stat.is_some() {
            let usage = entry.meter.usage(shared.units);
            let sum = sums.entry(key.namespace.clone()).or_default();
            sum.cpu += usage.cpu;
            sum.mem += usage.mem;
        }
    }
    shared.metrics.known.set(known);
    shared.metrics.hosted.set(hosted);
    shared.metrics.running.set(running);
    groups.retain(|namespace, _| sums.contains_key(namespace));
    for (namespace, sum) in sums {
        let over = [("cpu", sum.cpu, cpu_limit), ("memory", sum.mem, mem_limit)]
            .into_iter()
            .find(|(_, used, limit)| *limit > 0.0 && used > limit);
        let before = groups.insert(namespace.clone(), over.is_some()).unwrap_or(false);
        if let (Some((what, used, limit)), false) = (over, before) {
            let key = Key {
                name: namespace.clone(),
                namespace,
            };
            let content = format!(
                "processes of {} together: {what} usage {used:.2}% is over their limit of {limit}%",
                key.name
            );
            shared.tell(GROUP_OVER_LIMIT, &key, &content);
        }
    }
}
