//! F13: wall clocks jump, of the server's host, of the store's, of agents'.

use std::time::Duration;

use super::script::Script;
use super::truth::{Taken, check};
use super::world::{Setup, World};

const SECOND: Duration = Duration::from_secs(1);
const HOUR_MS: i64 = 3_600_000;

fn script(runs_ms: u64) -> Script {
    Script {
        runs_ms,
        bytes: 1_000,
        exit: 0,
    }
}

fn jumped(seed: u64, server_ms: i64, store_ms: i64, agent_ms: i64) -> Result<(), String> {
    let setup = Setup::new(seed, 3);
    let limits = setup.server.task.clone();
    let mut world = World::new(&setup);
    world.all_online(SECOND * 60)?;
    let before = world.submitted(&[0, 1], &[script(1_000)], 60)?;
    let runs = world.submitted(&[0, 1], &[script(40_000)], 120)?;
    let overruns = world.submitted(&[0, 1], &[script(500_000)], 30)?;
    let vanishes = world.submitted(&[2], &[script(20_000)], 30)?;
    let submitted = world.now();
    world.run(SECOND * 5);
    world.kill_agent(2);
    world.note("jump");
    world.server_clock().jump(server_ms);
    world.store_clock().jump(store_ms);
    for host in &world.hosts {
        host.disk.lock().skew_ms = agent_ms;
    }
    // The start window of a new task is not affected, nor is anything else of it.
    let after = world.submitted(&[0, 1], &[script(1_000)], 60)?;
    let rows = world.finished(&after, &[0, 1], 1, SECOND * 10)?;
    expect(&world, &after, &rows, &[0, 1], 2)?;
    // What runs ends when it would have.
    let rows = world.finished(&runs, &[0, 1], 1, SECOND * 60)?;
    expect(&world, &runs, &rows, &[0, 1], 2)?;
    within("the script's own end", world.now() - submitted, SECOND * 40, SECOND * 6)?;
    let rows = world.rows(&overruns, &[0, 1], 1)?;
    expect(&world, &overruns, &rows, &[0, 1], 3)?;
    // Nobody was taken for silent.
    for n in [0, 1] {
        let session = world.node().and_then(|node| node.registry.get(&world.hosts[n].agent));
        session.ok_or(format!("agent {n} was expired"))?;
    }
    // The agent that does not come back is given up at the deadline, neither before nor much after.
    let rows = world.finished(&vanishes, &[2], 1, SECOND * 400)?;
    expect(&world, &vanishes, &rows, &[2], 5)?;
    let deadline = Duration::from_millis(limits.start_window_ms + 30_000 + limits.return_grace_ms);
    within("the deadline", world.now() - submitted, deadline, SECOND * 10)?;
    for n in [0, 1] {
        if !world.online(n) {
            return Err(format!("agent {n} was expired"));
        }
    }
    // Results stay as long as they should.
    let rows = world.rows(&before, &[0, 1], 1)?;
    expect(&world, &before, &rows, &[0, 1], 2)
}

fn within(what: &str, took: Duration, expected: Duration, give: Duration) -> Result<(), String> {
    // A clock may draw near a wall clock that was set by a hundredth of the time that passes.
    if took + SECOND + expected / 100 < expected || took > expected + give {
        return Err(format!("{what} came after {took:?} instead of {expected:?}"));
    }
    Ok(())
}

fn expect(
    world: &World,
    id: &str,
    rows: &[gse_proto::http::ScriptRow],
    targets: &[usize],
    status: i32,
) -> Result<(), String> {
    let taken = Taken {
        id: id.to_owned(),
        targets: targets.to_vec(),
        atomics: 1,
    };
    check(world, &taken, rows)?;
    match rows.iter().find(|row| row.status != status) {
        Some(row) => Err(format!("expected status {status}: {row:?}")),
        None => Ok(()),
    }
}

#[test]
fn jumps_of_the_servers_clock() {
    // contract: reliability#F13
    for jump in [HOUR_MS, -HOUR_MS, 24 * HOUR_MS, -24 * HOUR_MS, 300_000, -300_000] {
        jumped(1, jump, 0, 0).unwrap_or_else(|why| panic!("{jump} ms: {why}"));
    }
}

#[test]
fn jumps_of_the_stores_clock() {
    // contract: reliability#F13
    for jump in [HOUR_MS, -HOUR_MS, 24 * HOUR_MS, -24 * HOUR_MS] {
        jumped(2, 0, jump, 0).unwrap_or_else(|why| panic!("{jump} ms: {why}"));
    }
}

#[test]
fn jumps_of_the_agents_clocks() {
    // contract: reliability#F13
    for jump in [HOUR_MS, -HOUR_MS, 24 * HOUR_MS, -24 * HOUR_MS, 300_000, -300_000] {
        jumped(3, 0, 0, jump).unwrap_or_else(|why| panic!("{jump} ms: {why}"));
    }
}

#[test]
fn all_clocks_differ() {
    // contract: reliability#F13
    jumped(4, 300_000, -300_000, HOUR_MS).unwrap_or_else(|why| panic!("{why}"));
}
