//! F1: an agent is cut off from the server for a second, ten seconds, ten minutes. The wire keeps what was sent and delivers it later
//! (as TCP does), or loses it (as a middlebox that has forgotten the connection does).

use std::time::Duration;

use super::script::Script;
use super::truth::{Taken, check};
use super::world::{Setup, World};
use super::{for_seeds, past};

const MINUTE: Duration = Duration::from_secs(60);

/// Cuts agent 0 off. With `liveness` off neither side looks for silence.
fn cut(seed: u64, liveness: bool) -> Result<(), String> {
    let mut setup = Setup::new(seed, 2);
    if !liveness {
        setup.server.session.missed_heartbeats = 1_000_000;
        setup.agent.session.read_idle_timeout_ms = 1_000_000_000;
    }
    let heartbeat = Duration::from_millis(setup.server.session.heartbeat_interval_ms);
    let mut world = World::new(&setup);
    world.all_online(MINUTE)?;
    let time = match seed % 4 {
        0 => Duration::from_secs(1),
        1 => Duration::from_secs(10),
        _ => Duration::from_secs(600),
    };
    let lossy = (seed / 4) % 2 == 1 || !liveness;
    // Somewhere between two heartbeats, with work under way.
    world.run(world.random.up_to(heartbeat));
    let script = Script {
        runs_ms: 5_000 + world.random.below(30_000),
        bytes: world.random.below(300_000),
        exit: 0,
    };
    let targets = vec![0, 1];
    let mut tasks = vec![world.submitted(&targets, &[script], 600)?];
    world.run(world.random.up_to(Duration::from_secs(8)));
    world.note(&format!("cut for {time:?}, lossy: {lossy}"));
    if lossy {
        world.net.partition("host-0", "server");
    } else {
        world.net.hold("host-0", "server");
    }
    world.run(time / 2);
    tasks.push(world.submitted(&targets, &[script], 600)?);
    world.run(time.saturating_sub(time / 2));
    world.note("healed");
    if lossy {
        world.net.repair("host-0", "server");
    } else {
        world.net.release("host-0", "server");
    }
    let healed = world.ms();
    // Online: there is a session, and it has been heard since.
    let agent = world.hosts[0].agent.clone();
    let heard = move |world: &World| {
        let session = world.node()?.registry.get(&agent)?;
        Some((session.id, session.last_seen()))
    };
    let then = heard(&world);
    // A wire that loses frames without either end's TCP noticing leaves a connection that is dead although it is healed: it is found
    // after three intervals of silence, and only then does the agent come again, within its spread.
    let dead = if lossy { Duration::from_secs(10) } else { Duration::ZERO };
    world.until("online again after the heal", heartbeat * 3 + dead, |world| {
        let now = heard(world);
        (now.is_some() && now != then).then_some(())
    })?;
    world.note(&format!("online {} ms after the heal", world.ms() - healed));
    // A task now goes through at once.
    let quick = Script {
        runs_ms: 100,
        bytes: 10,
        exit: 0,
    };
    let after = world.submitted(&[0], &[quick], 60)?;
    let rows = world.finished(&after, &[0], 1, heartbeat * 4 + MINUTE)?;
    let taken = |id: &str, targets: &[usize]| Taken {
        id: id.to_owned(),
        targets: targets.to_vec(),
        atomics: 1,
    };
    check(&world, &taken(&after, &[0]), &rows)?;
    if !lossy && rows[0].status != 2 {
        return Err(format!("a task after the heal did not succeed: {rows:?}"));
    }
    for id in &tasks {
        let rows = world.finished(id, &targets, 1, MINUTE * 20)?;
        check(&world, &taken(id, &targets), &rows)?;
        if rows[1].status != 2 {
            return Err(format!("the agent that was never cut off suffered: {rows:?}"));
        }
    }
    // What was started before the cut is reported, however long that took: nothing is lost.
    let rows = world.rows(&tasks[0], &targets, 1)?;
    if rows[0].status != 2 {
        return Err(format!("the result of what ran during the cut is lost: {rows:?}"));
    }
    Ok(())
}

#[test]
fn partitions_heal() {
    // contract: reliability#F1
    for_seeds(
        "partitions_heal",
        past("partitions_heal").into_iter().chain(0..20),
        |seed| cut(seed, true),
    );
}

#[test]
#[ignore = "full tier: 200 seeds"]
fn partitions_heal_many_seeds() {
    // contract: reliability#F1
    for_seeds("partitions_heal", 0..200, |seed| cut(seed, true));
}

#[test]
fn without_a_watch_for_silence_they_do_not() {
    // contract: reliability#F1
    // Proves that the test above notices: a cut of ten minutes that loses frames, and nobody who looks for silence.
    let outcome = cut(6, false);
    assert!(
        outcome.as_ref().is_err_and(|why| why.contains("online again")),
        "an agent that nobody looks for came back: {outcome:?}"
    );
}
