//! Tidies up after scripts: dead processes that were left to the agent, runners that stay too long, empty control groups, traces of
//! targets that nobody may start any more. While there is nothing that could leave any, the agent sleeps.

use std::sync::Arc;
use std::time::Duration;

use super::executor::Shared;
use super::journal::Key;
use super::state::{Kind, Target};
use super::{cgroup, orphans};

/// How often inherited dead children are collected and old traces removed.
const SWEEP: Duration = Duration::from_secs(2);
/// The same while there is nothing that could leave any.
const IDLE_SWEEP: Duration = Duration::from_secs(30);

/// Collects dead orphans, bounds the runners that stay, and drops traces of targets that nobody may start any more.
pub(super) async fn run(shared: Arc<Shared>) {
    loop {
        let unfinished = || shared.state.lock().targets.values().any(|t| t.kind != Kind::Done);
        let busy = !shared.lingering.is_empty() || unfinished();
        tokio::select! {
            () = tokio::time::sleep(if busy { SWEEP } else { IDLE_SWEEP }) => {}
            () = shared.work.notified(), if !busy => continue,
            () = shared.life.draining() => return,
        }
        let now = shared.server_now();
        let old: Vec<Arc<Key>> = {
            let state = shared.state.lock();
            let passed = |t: &Target| t.kind == Kind::Done && now.is_some_and(|now| t.not_after_ms < now);
            state
                .targets
                .iter()
                .filter(|(_, t)| passed(t))
                .map(|(key, _)| Arc::clone(key))
                .collect()
        };
        let task = {
            let (shared, old) = (Arc::clone(&shared), old.clone());
            tokio::task::spawn_blocking(move || {
                orphans::collect_dead();
                shared.lingering.trim(shared.cfg.max_lingering);
                if shared.cfg.control_groups {
                    cgroup::remove_empty();
                }
                old.into_iter()
                    .filter(|key| match shared.journal.remove(key) {
                        Ok(()) => true,
                        Err(error) => {
                            tracing::warn!(target = %key, %error, "the trace of a finished task cannot be removed");
                            false
                        }
                    })
                    .collect::<Vec<_>>()
            })
        };
        match task.await {
            Ok(removed) => {
                let mut state = shared.state.lock();
                removed.iter().for_each(|key| drop(state.remove(key)));
            }
            Err(error) => tracing::error!(%error, "the executor's sweep failed inside"),
        }
    }
}
