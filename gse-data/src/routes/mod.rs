//! Routes: which data id goes where. The calls that change them, their place in the store, and the table that records are routed by.
//!
//! * [`table`]: the routes as the way of a record sees them;
//! * [`raw`]: JSON kept as it was written; [`spec`]: what it means;
//! * [`store`]: routes in the state store; [`watch`]: the table kept as fresh as that; [`seed`]: a site's own file;
//! * [`calls`]: the calls of administrators.

pub mod calls;
pub mod raw;
pub mod seed;
pub mod spec;
pub mod store;
pub mod table;
pub mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use gse_core::lifecycle::Lifecycle;
use gse_core::random::Random;
use gse_core::store::Store;
use serde::{Deserialize, Serialize};

use self::seed::Seed;
use self::store::{ChangeError, RouteStore};
use self::watch::Watch;

/// Settings of routes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RoutesConfig {
    /// File of streams and routes (TOML or JSON) that is put into a store in which there never was one; none if not set.
    pub seed: Option<PathBuf>,
}

/// Routes of a running instance.
pub struct Routes {
    /// In the store.
    pub store: RouteStore,
    /// As of the moment.
    pub watch: Arc<Watch>,
}

/// Takes up the watch. A file of the site is put in as soon as the store answers.
///
/// # Errors
/// The site's file is not usable.
pub async fn start(config: &RoutesConfig, store: Store, random: Random, life: &Lifecycle) -> anyhow::Result<Routes> {
    let store = RouteStore::new(store, random);
    if let Some(path) = config.seed.clone() {
        let seed = tokio::task::spawn_blocking(move || Seed::read(&path))
            .await
            .context("reading routes.seed")?
            .context("routes.seed")?;
        life.spawn("seed of routes", plant(seed, store.clone(), life.clone()));
    }
    let watch = Arc::new(Watch::new(store.clone()));
    if let Err(error) = watch.refresh().await {
        tracing::warn!(%error, "routes cannot be read yet; records wait at their hosts");
    }
    watch.follow(life);
    Ok(Routes { store, watch })
}

/// Puts a site's file in, however often the store has to be asked.
async fn plant(seed: Seed, store: RouteStore, life: Lifecycle) {
    loop {
        match seed.apply(&store).await {
            Ok(()) => return,
            Err(ChangeError::Store(error)) => {
                tracing::warn!(%error, "routes.seed cannot be put in yet");
            }
            Err(error) => return tracing::error!(%error, "routes.seed is not put in"),
        }
        tokio::select! {
            () = life.draining() => return,
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
    }
}
