//! Brings the registrations to disk: one write at a time, with everything that has changed until it begins, however many ask for it. The form
//! of the files is [`super::registry`]'s business.

use std::sync::Arc;
use std::time::Duration;

use gse_core::ops::Health;
use tokio::sync::watch;

use super::Shared;
use super::registry::{Files, Texts};
use crate::exec::command::Leaving;

/// After a failed write the next try comes by itself.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(super) struct Keeper {
    asked: watch::Sender<u64>,
    done: watch::Sender<(u64, Option<String>)>,
}

impl Keeper {
    pub(super) fn new() -> Self {
        Self {
            asked: watch::Sender::new(0),
            done: watch::Sender::new((0, None)),
        }
    }

    /// Soon, without waiting for it.
    pub(super) fn ask(&self) -> u64 {
        let mut mine = 0;
        self.asked.send_modify(|count| {
            *count += 1;
            mine = *count;
        });
        mine
    }

    /// Waits until everything that is so now is on disk.
    ///
    /// # Errors
    /// [`Leaving`] when the agent stops first; inside, why it can't be written.
    pub(super) async fn commit(&self, shared: &Shared) -> Result<Result<(), String>, Leaving> {
        let mine = self.ask();
        let mut done = self.done.subscribe();
        let waited = tokio::select! {
            waited = done.wait_for(|(count, _)| *count >= mine) => waited,
            () = shared.life.draining() => return Err(Leaving),
        };
        match waited {
            Ok(outcome) => Ok(outcome.1.clone().map_or(Ok(()), Err)),
            Err(_) => Err(Leaving),
        }
    }
}

/// The one who writes, until the agent stops; then once more if something is left.
pub(super) async fn run(shared: Arc<Shared>, files: Files, health: Health) {
    let mut asked = shared.keeper.asked.subscribe();
    let mut written = Texts::default();
    loop {
        let failed = shared.keeper.done.borrow().1.is_some();
        let last = tokio::select! {
            biased;
            changed = asked.changed() => changed.is_err(),
            () = tokio::time::sleep(TRY_AGAIN), if failed => false,
            () = shared.life.draining() => true,
        };
        let count = *asked.borrow_and_update();
        if last && count == shared.keeper.done.borrow().0 && !failed {
            return;
        }
        let outcome = write(&shared, &files, &mut written).await;
        if let Err(error) = &outcome {
            tracing::error!("registrations of processes are not kept: {error}");
            shared.metrics.write_failures.inc();
        }
        let told = outcome.clone();
        let told = told.map_err(|error| format!("registrations are not kept: {error}"));
        health.set("processes", told);
        shared.keeper.done.send_replace((count, outcome.err()));
        if last {
            return;
        }
    }
}

async fn write(shared: &Arc<Shared>, files: &Files, written: &mut Texts) -> Result<(), String> {
    let (shared, files, before) = (Arc::clone(shared), files.clone(), std::mem::take(written));
    let task = tokio::task::spawn_blocking(move || {
        let all = shared.registrations();
        let texts = match Texts::of(all.iter().map(|(key, one)| (key.as_ref(), one))) {
            Ok(texts) => texts.without(&before),
            Err(error) => return (before, Err(error.to_string())),
        };
        match files.store(&texts) {
            Ok(()) => {
                let mut now = before;
                now.update(texts);
                (now, Ok(()))
            }
            // What of it was written is not known, so all of it is next time.
            Err(error) => (Texts::default(), Err(error.to_string())),
        }
    });
    match task.await {
        Ok((now, outcome)) => {
            *written = now;
            outcome
        }
        Err(error) => Err(format!("the agent failed inside: {error}")),
    }
}
