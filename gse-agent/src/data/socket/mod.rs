//! The data socket: where plugins of this host hand over records and ask who the agent is (contract data-plane, 1).
//!
//! Frames are understood in `frame`, connections read in `connection`, who may write what is decided in `rule`. What becomes of a record
//! after that is the intake's ([`super::Intake`]); nothing here ever waits for it.

mod config;
mod connection;
mod frame;
mod metrics;
mod reply;
mod rule;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use arc_swap::ArcSwap;
use bytes::Bytes;
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub use self::config::{COMPILED_IN, NAME, SocketConfig};
pub use self::frame::{HEADER, kind};
pub use self::metrics::Metrics;
pub use self::reply::Identity;
pub use self::rule::IdRule;
use self::rule::Rules;
use super::intake::Intake;
use crate::local::{Gate, Listener, Place, Status};

/// What plugins did wrong is spoken of this often.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// What all connections have in common.
struct Shared {
    intake: Intake,
    reply: Bytes,
    rules: ArcSwap<Rules>,
    /// KiB of frames that have not come whole yet.
    room: Arc<Semaphore>,
    metrics: Metrics,
    said: Mutex<Option<Instant>>,
    life: Lifecycle,
}

impl Shared {
    fn room_for(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let kib = u32::try_from(bytes.div_ceil(1024)).ok()?;
        Arc::clone(&self.room).try_acquire_many_owned(kib).ok()
    }

    /// Whether it is time to speak of something that a plugin can bring about as often as it likes.
    fn may_say(&self) -> bool {
        let mut said = self.said.lock();
        let due = said.is_none_or(|at| at.elapsed() >= SAY_EVERY);
        if due {
            *said = Some(Instant::now());
        }
        due
    }
}

/// Listens to plugins until the process drains. Places that are not to be had are tried again; when this returns every place was tried
/// once.
///
/// # Errors
/// When the answer to plugins cannot be made.
pub async fn start(
    config: &SocketConfig,
    data_dir: &Path,
    identity: &Identity,
    intake: Intake,
    metrics: Metrics,
    health: &Health,
    life: &Lifecycle,
) -> anyhow::Result<()> {
    if !config.enabled {
        return Ok(());
    }
    let rules = resolve(config).await?;
    let shared = Arc::new(Shared {
        intake,
        reply: reply::reply(identity, config)?,
        rules: ArcSwap::from_pointee(rules),
        room: Arc::new(Semaphore::new(config.pending_bytes / 1024)),
        metrics,
        said: Mutex::default(),
        life: life.clone(),
    });
    let gate = Gate::new(config.max_connections, config.max_per_account);
    let status = Status::new("data socket", health.clone());
    for place in config.places(data_dir) {
        // The compiled-in one is for some plugins only, and may be impossible on this host.
        let vital = place != Place::Path(COMPILED_IN.into());
        let listener = Listener::start((place, vital), config.file.clone(), gate.clone(), status.clone(), life).await;
        let (shared, refusing) = (Arc::clone(&shared), Arc::clone(&shared));
        life.spawn("data socket", async move {
            let take = |stream, peer, pass| {
                let serving = connection::serve(Arc::clone(&shared), stream, peer, pass);
                shared.life.spawn_contained("data connection", serving);
            };
            listener.run(take, || refusing.metrics.closed("no_room")).await;
        });
    }
    let (config, life) = (config.clone(), life.clone());
    let mut reloads = life.reloads();
    let following = life.clone();
    life.spawn("rules of data ids", async move {
        loop {
            tokio::select! {
                () = following.draining() => return,
                changed = reloads.changed() => if changed.is_err() { return },
            }
            // Accounts may have come or gone; connections that there are keep what they may.
            match resolve(&config).await {
                Ok(rules) => shared.rules.store(Arc::new(rules)),
                Err(error) => tracing::warn!("accounts of data.socket.reserved were not looked up again: {error:#}"),
            }
        }
    });
    Ok(())
}

async fn resolve(config: &SocketConfig) -> anyhow::Result<Rules> {
    let reserved = config.reserved.clone();
    tokio::task::spawn_blocking(move || Rules::resolve(&reserved))
        .await
        .context("looking up the accounts of data.socket.reserved")
}
