//! From the intake to the servers. `keeper` looks after the spool and the kept counters, `link` holds one connection to one server;
//! both move records only through the flow (`flow`), which knows where each of them is.
//!
//! Batches that a server acknowledges in time never touch the disk. What waits longer than `spool_after_ms` is written to the spool, and
//! is sent from there in its turn, before anything newer. A killed agent loses what was in memory then: at most the records of the last
//! `spool_after_ms` and a write, acknowledged ones among them. After a restart they are counted as dropped ("killed"), as far as the
//! counters kept last speak of them (`keep_counts_ms`); what stands in the spool is sent again.

mod dial;
mod keeper;
mod link;
mod metrics;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use gse_core::tls::TlsFiles;
use tokio::sync::{mpsc, watch};

pub use self::metrics::Metrics;
use super::config::DataConfig;
use super::intake::{self, Intake};

/// Who this agent is to the servers of data.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its id.
    pub agent_id: String,
    /// Its certificate, and whom it trusts.
    pub tls: TlsFiles,
}

/// What the tasks of the uplink have in common.
struct Shared {
    config: DataConfig,
    identity: Identity,
    intake: Arc<intake::Shared>,
    metrics: Metrics,
    health: Health,
    life: Lifecycle,
}

/// Starts sending what the intake takes, after what an earlier agent has left. With no server configured there is nothing to start.
///
/// # Errors
/// The spool's directory cannot be used.
pub async fn start(
    config: DataConfig,
    identity: Identity,
    intake: &Intake,
    metrics: Metrics,
    health: &Health,
    life: &Lifecycle,
) -> anyhow::Result<()> {
    if config.servers.is_empty() {
        return Ok(());
    }
    let shared = Arc::new(Shared {
        config,
        identity,
        intake: Arc::clone(&intake.shared),
        metrics,
        health: health.clone(),
        life: life.clone(),
    });
    let (ask, asked) = mpsc::channel(1);
    let (left, link_left) = watch::channel(false);
    let keeper = keeper::Keeper::open(Arc::clone(&shared), asked, link_left).await?;
    let linking = link::keep(shared, keeper.spool_id(), ask, left);
    // It goes on while the sockets end, so that what they took last is on disk too.
    life.spawn_until_closed("spool of data", keeper.run());
    life.spawn("data link", linking);
    Ok(())
}
