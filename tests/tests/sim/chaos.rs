//! F5: every frame between agents and server may be delayed, repeated and overtaken.

use std::time::Duration;

use gse_core::random::Random;
use gse_proto::http::Route;
use serde_json::json;

use super::chaos_relay::relay;
use super::script::Script;
use super::truth::{Taken, check};
use super::world::{Setup, World};
use super::{for_seeds, past};

fn messed_about(seed: u64) -> Result<(), String> {
    let mut setup = Setup::new(seed, 3);
    setup.connect_to = "relay:7000".into();
    setup.server.agents.advertise = vec!["relay:7000".into()];
    let mut world = World::new(&setup);
    let (random, log) = (Random::seeded(seed ^ 0xc0de), world.log.clone());
    world.net.host("relay", move || relay(random.clone(), log.clone()));
    world.all_online(Duration::from_secs(60))?;
    let mut tasks = Vec::new();
    for _ in 0..6 {
        let script = Script {
            runs_ms: world.random.below(15_000),
            bytes: world.random.below(600_000),
            exit: i32::from(world.random.below(4) == 0),
        };
        let id = world.submitted(&[0, 1, 2], &[script], 60)?;
        world.run(world.random.up_to(Duration::from_secs(3)));
        let ended = world.random.below(3) == 0;
        if ended {
            let body = json!({"task_id": id, "agents": []});
            world.ask(Route::TerminateScript, body, Duration::from_secs(10))?;
        }
        tasks.push((id, script, ended));
    }
    for (id, script, ended) in tasks {
        let taken = Taken {
            id,
            targets: vec![0, 1, 2],
            atomics: 1,
        };
        let rows = world.finished(&taken.id, &taken.targets, 1, Duration::from_secs(400))?;
        check(&world, &taken, &rows)?;
        // The model: with nobody away, what was not asked to end ends as its script says, with all of its output.
        let expected = if script.exit == 0 { 2 } else { 5 };
        for row in rows.iter().filter(|_| !ended) {
            if row.status != expected || row.screen.len() as u64 != script.bytes {
                return Err(format!(
                    "{script:?} became {} with {} bytes",
                    row.status,
                    row.screen.len()
                ));
            }
        }
    }
    for host in &world.hosts {
        if let Some((place, starts)) = host.disk.lock().starts.iter().find(|(_, starts)| starts.len() > 1) {
            return Err(format!("P1: {place:?} was started {} times", starts.len()));
        }
    }
    Ok(())
}

#[test]
fn repeated_delayed_and_overtaking_frames() {
    // contract: reliability#F5
    for_seeds(
        "repeated_delayed_and_overtaking_frames",
        past("repeated_delayed_and_overtaking_frames").into_iter().chain(0..6),
        messed_about,
    );
}

#[test]
#[ignore = "full tier: 300 seeds"]
fn repeated_delayed_and_overtaking_frames_many_seeds() {
    // contract: reliability#F5
    for_seeds("repeated_delayed_and_overtaking_frames", 0..300, messed_about);
}
