//! The listeners for calls about routes: one for platforms, one for our own servers. What the calls do is [`crate::routes::calls`]'s.

use std::sync::Arc;

use anyhow::Context;
use gse_core::audit::Audit;
use gse_core::authz::Authenticator;
use gse_core::http::{Front, HttpConfig, HttpMetrics, InternalTls};
use gse_core::lifecycle::Lifecycle;
use gse_core::tls::Role;
use prometheus_client::registry::Registry;

use crate::Node;
use crate::config::Config;
use crate::routes::Routes;
use crate::routes::calls::RouteCalls;

/// What listeners share: who may call, where it is written down, figures.
///
/// # Errors
/// A file of the configuration is not usable.
pub fn front(config: &Config, registry: &mut Registry, life: &Lifecycle) -> anyhow::Result<Front> {
    let authenticator = Authenticator::new(&config.authz).context("authz")?;
    authenticator.follow_reloads(life);
    Ok(Front {
        authenticator,
        audit: Audit::open(&config.audit).context("audit")?,
        metrics: HttpMetrics::new(registry),
    })
}

/// Opens the listeners; says where our own servers find this one, empty if they do not.
///
/// # Errors
/// A listener can't be bound.
pub async fn serve(node: &Node, front: &Front, routes: &Routes) -> anyhow::Result<String> {
    let (config, life) = (&node.config, &node.life);
    let service = Arc::new(RouteCalls {
        store: routes.store.clone(),
        watch: Arc::clone(&routes.watch),
        audit: front.audit.clone(),
        stats: Arc::clone(&node.stats),
        tails: Arc::clone(&node.tails),
    });
    if !config.http.listen.is_empty() {
        gse_core::http::serve(&config.http, "http", None, Arc::clone(&service), front, life).await?;
    }
    let Some(files) = config
        .internal
        .tls
        .clone()
        .filter(|_| !config.internal.listen.is_empty())
    else {
        return Ok(String::new());
    };
    let tls = InternalTls {
        files,
        accept: vec![Role::Server, Role::Operator, Role::ApiClient],
    };
    let internal = HttpConfig {
        listen: config.internal.listen.clone(),
        cert: None,
        key: None,
        ..config.http.clone()
    };
    let bound = gse_core::http::serve(&internal, "internal", Some(tls), service, front, life).await?;
    Ok(if config.internal.advertise.is_empty() {
        bound.to_string()
    } else {
        config.internal.advertise.clone()
    })
}
