//! Threads that serve clients, one runtime each. A client and the connections to Redis that it uses live on the same thread: nothing is handed from
//! one thread to another for a command, and what all clients of a thread have brought in one turn of its loop goes to a Redis in one write.
//!
//! What is no client's (followers, listeners, health) stays on the runtime of the process.

use std::sync::Arc;

use anyhow::Context as _;
use gse_core::lifecycle::Lifecycle;
use tokio::runtime::{EnterGuard, Handle};
use tokio::sync::oneshot;

/// With `workers = 0` there is one for every two processors, as Redis is beside it and needs the others; and no more than this: Redis is busy long before.
const MOST: usize = 8;

/// The threads. A clone is the same ones; none at all stands for the runtime of whoever asks.
#[derive(Clone, Default)]
pub(crate) struct Workers(Arc<[Handle]>);

impl Workers {
    /// Starts `n` threads, which end with the server.
    ///
    /// # Errors
    /// When the system gives no more threads.
    pub(crate) fn start(n: usize, life: &Lifecycle) -> anyhow::Result<Self> {
        let n = match n {
            0 => std::thread::available_parallelism()
                .map_or(1, |n| n.get() / 2)
                .clamp(1, MOST),
            n => n,
        };
        (0..n).map(|i| thread(i, life)).collect::<anyhow::Result<_>>().map(Self)
    }

    /// What is spawned and connected while the guard lives belongs to worker `i` (counted round).
    pub(crate) fn enter(&self, i: usize) -> Option<EnterGuard<'_>> {
        self.0.get(i.checked_rem(self.0.len())?).map(Handle::enter)
    }

    /// How many connections there must be for each worker to have its own: `wanted`, rounded up to a multiple.
    pub(crate) fn share(&self, wanted: usize) -> usize {
        wanted.next_multiple_of(self.0.len().max(1))
    }
}

fn thread(i: usize, life: &Lifecycle) -> anyhow::Result<Handle> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("a worker's runtime")?;
    let handle = runtime.handle().clone();
    let (ended, has_ended) = oneshot::channel::<()>();
    let closing = life.clone();
    std::thread::Builder::new()
        .name(format!("gse_dba-{i}"))
        .spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = closing.closing() => {}
                    () = closing.aborted() => {}
                }
            });
            // What is left on it is dropped here.
            drop(runtime);
            drop(ended);
        })
        .context("a worker's thread")?;
    // The server has not ended before its threads have.
    life.spawn_until_closed("dba-worker", async move {
        let _ = has_ended.await;
    });
    Ok(handle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_has_a_connection_of_its_own() {
        let none = Workers::default();
        assert_eq!((none.share(4), none.enter(7).is_some()), (4, false));
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let life = Lifecycle::new("test");
        let three = runtime.block_on(async { Workers::start(3, &life).unwrap() });
        assert_eq!((three.share(1), three.share(3), three.share(4)), (3, 3, 6));
        let on: Vec<String> = (0..4)
            .map(|i| {
                let _in = three.enter(i).unwrap();
                let named = tokio::spawn(async { std::thread::current().name().unwrap_or_default().to_owned() });
                runtime.block_on(named).unwrap()
            })
            .collect();
        assert_eq!(on, ["gse_dba-0", "gse_dba-1", "gse_dba-2", "gse_dba-0"]);
        life.abort();
    }
}
