//! A start of a hosted process that has ended: an operation of the supervisor's own, written down like those that are asked for, so that an
//! agent that is killed in the middle does not start twice. When one is due is [`super::machine`]'s business.

use std::sync::Arc;
use std::time::Duration;

use gse_proto::proc::{OpType, Operation, Policy};

use super::journal::{Op, remove};
use super::machine::{Action, Told};
use super::registry::Key;
use super::steps::{run_command, since, sleep, started};
use super::{Held, Shared, unix_ms, watch};
use crate::exec::command::{self, Leaving};

/// Starts it. `held` is its turn.
pub(super) fn begin(shared: &Arc<Shared>, key: Key, held: Held) {
    let op = shared.ops.respawn(Operation {
        op_type: OpType::Start as i32,
        key: Some(key.to_wire()),
        ..Operation::default()
    });
    spawn(shared, key, op, held);
}

/// Starts it, or goes on with a start of an earlier agent process.
pub(super) fn spawn(shared: &Arc<Shared>, key: Key, op: Arc<Op>, held: Held) {
    let task = Arc::clone(shared);
    shared.life.spawn_contained("process start", async move {
        let _held = held;
        if Box::pin(run(&task, &key, &op)).await.is_ok() {
            let removed = tokio::task::spawn_blocking(move || remove(&op.dir)).await;
            if let Err(error) = removed {
                tracing::error!(%error, "the record of a start cannot be removed");
            }
        }
    });
}

async fn run(shared: &Arc<Shared>, key: &Key, op: &Arc<Op>) -> Result<(), Leaving> {
    let known = {
        let entries = shared.entries.lock();
        entries
            .get(key)
            .map(|entry| (Arc::clone(&entry.kept.spec), entry.kept.ident.clone()))
    };
    let Some((spec, last)) = known else { return Ok(()) };
    let dir = op.dir.clone();
    let begun = tokio::task::spawn_blocking(move || command::was_started(&dir))
        .await
        .unwrap_or(true);
    // Somebody may have started it meanwhile.
    let there = if begun {
        None
    } else {
        shared.find(&spec, last, None, true).await
    };
    let by_others = there.is_some();
    let (found, why, start_ms) = if by_others {
        (there, String::new(), unix_ms())
    } else {
        let end = run_command(shared, op, &spec, spec.start_cmd.clone()).await?;
        let since = since(shared, end.start_ms);
        let found = match end.ok {
            true => {
                sleep(shared, Duration::from_secs(Policy::of(&spec).start_check_secs.into())).await?;
                started(shared, &spec, None, since).await?
            }
            false => shared.find(&spec, None, Some(since), true).await,
        };
        let why = match (end.ok, end.output.trim()) {
            (true, _) => "it does not run after its start command".to_owned(),
            (false, "") => end.why.clone(),
            (false, output) => format!("{output} ({})", end.why),
        };
        (found, why, end.start_ms)
    };
    let now = shared.now();
    let alive = found.is_some();
    let actions = shared.change(key, |entry| {
        let actions = entry.machine.started(now, alive);
        if alive {
            entry.kept.trouble.clear();
            if !by_others {
                entry.kept.last_start_time = start_ms / 1000;
            }
        } else {
            entry.kept.trouble = format!("could not be started again: {why}").chars().take(500).collect();
        }
        shared.seen_as(entry, found);
        actions
    });
    for action in actions.unwrap_or_default() {
        if by_others && action == Action::Tell(Told::Restarted) {
            tracing::info!(process = %key, "it runs again, and not by this agent's doing");
            continue;
        }
        watch::act(shared, key, action, &why).await;
    }
    shared.keeper.commit(shared).await?.unwrap_or_else(|error| {
        tracing::error!(process = %key, "a start is not recorded with its registration: {error}");
    });
    Ok(())
}
