//! The front door as a whole.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use gse_core::audit::Audit;
use gse_core::authz::Authenticator;
use gse_core::http::{self, Front, HttpMetrics};
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::{self, Health};
use gse_core::process::ServiceInfo;
use gse_core::store::Store;
use prometheus_client::registry::Registry;

use crate::agents::Agents;
use crate::config::Config;
use crate::proxy::Proxy;
use crate::service::Api;

/// What the program is called.
pub const INFO: ServiceInfo = ServiceInfo {
    name: "gse_api",
    version: env!("CARGO_PKG_VERSION"),
    about: "The front door: every HTTP path of the contract at one address, agent state and information",
};

/// Runs the front door until its lifecycle drains. Listeners: `http`, and `ops` if configured.
///
/// # Errors
/// Why it cannot start: a file that is not usable, or an address that cannot be bound.
pub async fn run(config: Config, life: Lifecycle) -> anyhow::Result<()> {
    let mut registry = Registry::default();
    let metrics = HttpMetrics::new(&mut registry);
    let settings = config.clone();
    // Files are read here, all of them small.
    let (front, proxy, registry) = tokio::task::spawn_blocking(move || {
        let front = Front {
            authenticator: Authenticator::new(&settings.authz).context("table of applications")?,
            audit: Audit::open(&settings.audit)?,
            metrics,
        };
        let proxy = Proxy::new(&settings, &mut registry).context("certificate for the other services")?;
        anyhow::Ok((front, proxy, registry))
    })
    .await
    .context("reading the configuration's files")??;
    let mut registry = registry;
    front.authenticator.follow_reloads(&life);
    let proxy = Arc::new(proxy);
    proxy.follow_reloads(&life);

    let store = Store::connect(&config.store).await.context("store")?;
    store.metrics().register(&mut registry);
    let health = Health::new();
    store.report(&health, &life);
    ops::serve(&config.ops, Arc::new(registry), health.clone(), &life).await?;
    proxy.find_nodes(&store, &health, &life).await;

    let api = Api {
        agents: Agents::new(store, Duration::from_millis(config.limits.lookup_timeout_ms)),
        proxy,
        limits: config.limits.clone(),
        heartbeat: Duration::from_secs(config.heartbeat_interval_s.into()),
    };
    http::serve(&config.http, "http", None, Arc::new(api), &front, &life).await?;
    life.ready();
    life.draining().await;
    Ok(())
}
