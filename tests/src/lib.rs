//! A site in a temporary directory: the real binaries with real certificates, a real store, on free ports of loopback.
//!
//! A test makes a [`Site`], starts what it needs, calls the HTTP API as a platform would, kills and restarts processes, and looks at
//! what callers see. Nothing here stands in for a part of the system.

pub mod api;
pub mod cmdb;
pub mod files;
pub mod metrics;
pub mod plugin;
pub mod plugins;
pub mod process;
pub mod proxy;
pub mod receiver;
pub mod script;
pub mod site;
pub mod swarm;
pub mod wire;

pub use api::{Api, script_body};
pub use process::Child;
pub use proxy::{Fault, Proxy};
pub use site::{AgentOptions, Site, StoreKind};
pub use swarm::Swarm;
pub use wire::Wire;

use std::time::{Duration, Instant};

/// Calls `probe` until it gives something, at most `limit`; then panics with `what`.
///
/// # Panics
/// When the time is up.
pub async fn eventually<T, F>(what: &str, limit: Duration, mut probe: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let started = Instant::now();
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(started.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
