//! What has to hold for every task, whatever happened: started at most once, one terminal row per target, and rows that tell the truth.

use gse_proto::codes::Inner;
use gse_proto::http::ScriptRow;
use gse_proto::session::RowStatus;

use super::script::{Key, output};
use super::world::World;

/// Rows whose text says that nothing was run.
const NEVER_RUN: [&str; 5] = [
    "not run:",
    "it was not run",
    "before it was started",
    "before it was run",
    "meant for another journal",
];

/// A task that was taken.
#[derive(Debug, Clone)]
pub(crate) struct Taken {
    pub(crate) id: String,
    pub(crate) targets: Vec<usize>,
    pub(crate) atomics: usize,
}

/// Where a host has the target of a task.
fn place(world: &World, task: &str, n: usize) -> Vec<Key> {
    let disk = world.hosts[n].disk.lock();
    let mut keys: Vec<Key> = disk
        .starts
        .keys()
        .map(|(key, _)| key)
        .filter(|key| key.0 == task)
        .cloned()
        .collect();
    keys.dedup();
    keys
}

/// Checks the rows of a task against what happened on the hosts.
///
/// # Errors
/// What does not hold.
pub(crate) fn check(world: &World, taken: &Taken, rows: &[ScriptRow]) -> Result<(), String> {
    if rows.len() != taken.targets.len() * taken.atomics {
        return Err(format!(
            "{}: {} rows for {} targets",
            taken.id,
            rows.len(),
            taken.targets.len()
        ));
    }
    for (at, row) in rows.iter().enumerate() {
        let n = taken.targets[at / taken.atomics];
        let atomic = (at % taken.atomics) as u32;
        row_holds(world, taken, n, atomic, row).map_err(|why| {
            let shown = ScriptRow {
                screen: format!("({} bytes)", row.screen.len()),
                ..row.clone()
            };
            let under_way = world.node().map(|node| node.tasks.run(&taken.id).is_some());
            let told: Vec<_> = world.hosts[n].disk.lock().told(&taken.id);
            format!(
                "{} host-{n} atomic {atomic}: {why}; row: {shown:?}; under way: {under_way:?}; host: {told:?}",
                taken.id
            )
        })?;
    }
    Ok(())
}

fn row_holds(world: &World, taken: &Taken, n: usize, atomic: u32, row: &ScriptRow) -> Result<(), String> {
    if row.status <= 1 {
        return Err("not terminal".to_owned());
    }
    let keys = place(world, &taken.id, n);
    let disk = world.hosts[n].disk.lock();
    if keys.len() > 1 {
        return Err(format!("the host has it in {} places", keys.len()));
    }
    let started = keys.first().and_then(|key| disk.starts.get(&(key.clone(), atomic)));
    let times = started.map_or(0, Vec::len);
    if times > 1 {
        return Err(format!("P1: started {times} times"));
    }
    if times == 1 && NEVER_RUN.iter().any(|text| row.error_msg.contains(text)) {
        return Err("the row says that it never ran, but it did".to_owned());
    }
    let agent_says = |code: Inner| code.code() == row.error_code;
    let outcome_unknown = agent_says(Inner::AgentOffline) || agent_says(Inner::Unknown);
    let Some(key) = keys.first() else {
        if row.status == RowStatus::Succeeded as i32
            || row.status == RowStatus::TimedOut as i32
            || !row.screen.is_empty()
        {
            return Err("the row tells of a run that never was".to_owned());
        }
        return Ok(());
    };
    let expected = output(key, atomic, 0, row.screen.len() as u64);
    if row.screen.as_bytes() != expected {
        let from = row
            .screen
            .bytes()
            .zip(&expected)
            .position(|(got, expect)| got != *expect);
        return Err(format!("P4: output is not what was printed, from byte {from:?} on"));
    }
    match disk.ends.get(&(key.clone(), atomic)) {
        _ if outcome_unknown => Ok(()),
        None => Err("an end that the host never reported".to_owned()),
        Some(end) => {
            let right = (end.status as i32, end.code.code(), end.exit, end.output_len);
            let told = (
                row.status,
                row.error_code,
                row.script_exit_code,
                row.screen.len() as u64,
            );
            // What was asked to end may be closed by the server before the agent's own row comes.
            if told == right || agent_says(Inner::Terminated) && times == 0 {
                Ok(())
            } else {
                Err(format!("P4: the host reported {right:?}, the row says {told:?}"))
            }
        }
    }
}
