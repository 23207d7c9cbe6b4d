//! Anything at any time: tasks, terminations, deaths of server and agents, reboots, lost journals, cuts between agents and server and
//! between server and store, all by seed. Then the faults stop, and every task has to come to a truthful end.

use std::collections::BTreeMap;
use std::time::Duration;

use gse_proto::codes::Inner;
use gse_proto::http::Route;
use parking_lot::Mutex;
use serde_json::json;

use super::script::Script;
use super::truth::{Taken, check};
use super::world::{Setup, Slot, World, task_id};
use super::{for_seeds, past};

const SECOND: Duration = Duration::from_secs(1);
const AGENTS: usize = 3;

/// What is broken at the moment.
#[derive(Default)]
struct Broken {
    server_back: Option<Duration>,
    agents_back: [Option<Duration>; AGENTS],
    cuts: [Option<(Duration, bool)>; AGENTS],
    store: Option<(Duration, bool)>,
}

/// Plays a run; gives what is left of it and whether everything held.
pub(crate) fn play(seed: u64) -> (World, Result<Ends, String>) {
    let mut setup = Setup::new(seed, AGENTS);
    setup.server.session.heartbeat_interval_ms = 5_000;
    setup.server.task.return_grace_ms = 60_000;
    let mut world = World::new(&setup);
    let outcome = story(&mut world);
    (world, outcome)
}

/// How rows of a run ended: status and code, and how often.
pub(crate) type Ends = BTreeMap<(i32, i32), usize>;

struct Asked {
    slot: Slot,
    targets: Vec<usize>,
    atomics: usize,
}

fn story(world: &mut World) -> Result<Ends, String> {
    world.all_online(SECOND * 60)?;
    let mut asked: Vec<Asked> = Vec::new();
    let mut broken = Broken::default();
    let end = world.now() + SECOND * 120;
    while world.now() < end {
        act(world, &mut broken, &mut asked);
        mend(world, &mut broken, false);
        world.run(world.random.up_to(SECOND * 2));
    }
    world.note("faults stop");
    mend(world, &mut broken, true);
    world.all_online(SECOND * 90)?;
    // Every task has ended by its deadline and a little: 60 s to start, 40 s to run twice, 60 s to return.
    world.run(SECOND * 250);
    let mut ends = Ends::new();
    for asked in &asked {
        let answer = asked.slot.lock().clone();
        let Some(Ok(id)) = answer.as_ref().map(task_id) else {
            continue;
        };
        let taken = Taken {
            id,
            targets: asked.targets.clone(),
            atomics: asked.atomics,
        };
        let rows = world.rows(&taken.id, &taken.targets, taken.atomics)?;
        check(world, &taken, &rows)?;
        for row in &rows {
            *ends.entry((row.status, row.error_code)).or_default() += 1;
        }
        world.note(&format!(
            "{} {:?}",
            taken.id,
            rows.iter()
                .map(|row| (row.status, row.error_code, row.screen.len()))
                .collect::<Vec<_>>()
        ));
        let again = world.rows(&taken.id, &taken.targets, taken.atomics)?;
        if again != rows {
            return Err(format!("P3: terminal rows have changed: {rows:?} became {again:?}"));
        }
    }
    started_once(world)?;
    Ok(ends)
}

/// Also of tasks whose submit was never answered.
fn started_once(world: &World) -> Result<(), String> {
    for host in &world.hosts {
        for (place, starts) in &host.disk.lock().starts {
            if starts.len() > 1 {
                return Err(format!(
                    "P1: {} started {place:?} {} times, at {starts:?}",
                    host.name,
                    starts.len()
                ));
            }
        }
    }
    Ok(())
}

/// One thing happens.
fn act(world: &mut World, broken: &mut Broken, asked: &mut Vec<Asked>) {
    let n = world.random.below(AGENTS as u64) as usize;
    let back = world.now() + SECOND / 2 + world.random.up_to(SECOND * 20);
    let lossy = world.random.below(2) == 0;
    match world.random.below(50) {
        0..=19 => {
            let targets: Vec<usize> = (0..AGENTS).filter(|_| world.random.below(3) > 0).collect();
            if targets.is_empty() {
                return;
            }
            let atomics = if world.random.below(4) == 0 { 2 } else { 1 };
            // Answers of a mebibyte and more are written on another thread, which has a time of its own; these stay below.
            let scripts: Vec<Script> = (0..atomics)
                .map(|_| Script {
                    runs_ms: world.random.below(30_000),
                    bytes: if world.random.below(4) == 0 {
                        world.random.below(160_000)
                    } else {
                        world.random.below(2_000)
                    },
                    exit: i32::from(world.random.below(5) == 0),
                })
                .collect();
            if let Some(slot) = world.submit(&targets, &scripts, 20 + world.random.below(20)) {
                world.note(&format!("submit {} to {targets:?}: {scripts:?}", asked.len()));
                asked.push(Asked { slot, targets, atomics });
            }
        }
        20..=22 => {
            let known: Vec<String> = asked
                .iter()
                .filter_map(|asked| task_id(asked.slot.lock().as_ref()?).ok())
                .collect();
            if let Some(id) = known.get(world.random.below(known.len() as u64) as usize) {
                world.note(&format!("terminate {id}"));
                let body = json!({"task_id": id, "agents": []});
                // Whether it is answered does not matter.
                drop(world.call(Route::TerminateScript, body));
            }
        }
        23 if broken.server_back.is_none() => {
            world.kill_server();
            broken.server_back = Some(back);
        }
        24..=26 if broken.agents_back[n].is_none() => {
            world.kill_agent(n);
            broken.agents_back[n] = Some(back);
        }
        27 if broken.agents_back[n].is_none() => {
            world.kill_agent(n);
            world.note(&format!("host {n} goes down"));
            let now = world.ms();
            world.hosts[n].disk.lock().reboot(now);
            if world.random.below(3) == 0 {
                world.note(&format!("host {n} loses its journal"));
                world.hosts[n].disk.lock().lose_journal();
            }
            broken.agents_back[n] = Some(back);
        }
        28..=30 if broken.cuts[n].is_none() => {
            world.note(&format!("cut {n}, lossy: {lossy}"));
            let name = world.hosts[n].name.clone();
            if lossy {
                world.net.partition(name.as_str(), "server");
            } else {
                world.net.hold(name.as_str(), "server");
            }
            broken.cuts[n] = Some((back, lossy));
        }
        31 if broken.store.is_none() => {
            world.note(&format!("store cut, lossy: {lossy}"));
            if lossy {
                world.net.partition("store", "server");
            } else {
                world.net.hold("store", "server");
            }
            broken.store = Some((back, lossy));
        }
        _ => {}
    }
}

/// Repairs what is due, or everything.
fn mend(world: &mut World, broken: &mut Broken, all: bool) {
    let now = world.now();
    let due = |at: Duration| all || at <= now;
    if broken.store.is_some_and(|(at, _)| due(at))
        && let Some((_, lossy)) = broken.store.take()
    {
        world.note("store back");
        if lossy {
            world.net.repair("store", "server");
        } else {
            world.net.release("store", "server");
        }
    }
    for n in 0..AGENTS {
        if broken.cuts[n].is_some_and(|(at, _)| due(at))
            && let Some((_, lossy)) = broken.cuts[n].take()
        {
            world.note(&format!("cut {n} healed"));
            let name = world.hosts[n].name.clone();
            if lossy {
                world.net.repair(name.as_str(), "server");
            } else {
                world.net.release(name.as_str(), "server");
            }
        }
        if broken.agents_back[n].is_some_and(due) {
            broken.agents_back[n] = None;
            world.start_agent(n);
        }
    }
    if broken.server_back.is_some_and(due) {
        broken.server_back = None;
        world.start_server();
    }
}

/// Plays all these seeds, and checks that enough happened in them to be worth it.
fn all_of(seeds: impl IntoIterator<Item = u64>) {
    let total = Mutex::new(Ends::new());
    for_seeds("anything_at_any_time", seeds, |seed| {
        for (end, count) in play(seed).1? {
            *total.lock().entry(end).or_default() += count;
        }
        Ok(())
    });
    let total = total.into_inner();
    eprintln!("ends of rows (status, code): {total:?}");
    if std::env::var_os("SIM_SEED").is_none() {
        let seen = |status: i32, code: Inner| total.get(&(status, code.code())).copied().unwrap_or(0);
        assert!(seen(2, Inner::Ok) >= 100, "hardly anything ever succeeded: {total:?}");
        assert!(seen(5, Inner::Ok) > 10 && seen(4, Inner::Terminated) > 0, "{total:?}");
        assert!(
            seen(6, Inner::Unknown) > 0 && seen(5, Inner::AgentOffline) > 0,
            "{total:?}"
        );
    }
}

#[test]
fn anything_at_any_time() {
    // contract: reliability#P1, reliability#P3, reliability#P4
    all_of(past("anything_at_any_time").into_iter().chain(0..30));
}

#[test]
#[ignore = "full tier: 1,000 seeds"]
fn anything_at_any_time_many_seeds() {
    // contract: reliability#P1, reliability#P3, reliability#P4
    all_of(0..1_000);
}
