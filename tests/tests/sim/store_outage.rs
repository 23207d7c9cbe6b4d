//! F6: the store is cut off, hangs, or answers slowly for half a minute.

use std::time::Duration;

use gse_proto::codes::Code;

use super::script::Script;
use super::truth::{Taken, check};
use super::world::{Setup, Slot, World, task_id};

const SECOND: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// What is sent is lost.
    Lost,
    /// What is sent is held back.
    Held,
    /// Every message takes seconds.
    Slow,
}

fn outage(seed: u64, fault: Fault) -> Result<(), String> {
    let setup = Setup::new(seed, 3);
    let mut world = World::new(&setup);
    world.all_online(SECOND * 60)?;
    let all = [0, 1, 2];
    let script = |runs_ms| Script {
        runs_ms,
        bytes: 50_000,
        exit: 0,
    };
    let before = world.submitted(&all, &[script(10_000)], 60)?;
    world.run(SECOND * 2);
    let sessions: Vec<u64> = sessions(&world)?;
    world.note(&format!("store: {fault:?}"));
    match fault {
        Fault::Lost => world.net.partition("store", "server"),
        Fault::Held => world.net.hold("store", "server"),
        Fault::Slow => world.net.set_link_latency("store", "server", SECOND * 4),
    }
    let mut submits: Vec<(u64, Slot)> = Vec::new();
    for _ in 0..30 {
        submits.extend(world.submit(&all, &[script(100)], 60).map(|slot| (world.ms(), slot)));
        world.run(SECOND);
    }
    world.note("store back");
    match fault {
        Fault::Lost => world.net.repair("store", "server"),
        Fault::Held => world.net.release("store", "server"),
        Fault::Slow => world.net.set_link_latency("store", "server", Duration::from_millis(20)),
    }
    if self::sessions(&world)? != sessions {
        return Err("agents did not stay connected".to_owned());
    }
    world.run(SECOND * 20);
    let mut taken = vec![Taken {
        id: before,
        targets: all.to_vec(),
        atomics: 1,
    }];
    for (at, slot) in submits {
        let answer = slot.lock().clone().ok_or("a submit was never answered")?;
        let took = answer.at_ms - at;
        if took > 2_000 {
            return Err(format!("a submit was answered after {took} ms: {:?}", answer.outcome));
        }
        match task_id(&answer) {
            Ok(id) => taken.push(Taken {
                id,
                targets: all.to_vec(),
                atomics: 1,
            }),
            Err((code, _)) if code == Code::StoreUnavailable.code() || code == Code::Timeout.code() => {}
            Err((code, text)) => return Err(format!("a submit was refused with {code} {text}")),
        }
    }
    // By itself, and nothing that was taken is lost.
    let after = world.submitted(&all, &[script(100)], 60)?;
    taken.push(Taken {
        id: after,
        targets: all.to_vec(),
        atomics: 1,
    });
    for taken in taken {
        let rows = world.finished(&taken.id, &taken.targets, 1, SECOND * 60)?;
        check(&world, &taken, &rows)?;
        if rows.iter().any(|row| row.status != 2) {
            return Err(format!("{rows:?}"));
        }
    }
    if self::sessions(&world)? != sessions {
        return Err("agents did not stay connected".to_owned());
    }
    Ok(())
}

fn sessions(world: &World) -> Result<Vec<u64>, String> {
    let node = world.node().ok_or("no node")?;
    let ids = world
        .hosts
        .iter()
        .map(|host| node.registry.get(&host.agent).map(|session| session.id));
    ids.collect::<Option<Vec<u64>>>()
        .ok_or_else(|| "an agent is away".to_owned())
}

#[test]
fn the_store_is_away_for_half_a_minute() {
    // contract: reliability#F6
    for seed in 0..4 {
        for fault in [Fault::Lost, Fault::Held, Fault::Slow] {
            outage(seed, fault).unwrap_or_else(|why| panic!("seed {seed}, {fault:?}: {why}"));
        }
    }
}
