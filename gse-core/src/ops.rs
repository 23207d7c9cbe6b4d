//! The operator's listener: `/healthz` (the process lives), `/readyz` (it can do its work), `/metrics` (OpenMetrics text).
//!
//! It listens apart from everything else and goes on while the server drains, so that a balancer sees the 503 and a scrape the
//! last figures. What is healthy is said by the servers through [`Health`]; which metrics there are is theirs as well.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::config::OpsConfig;
use crate::lifecycle::Lifecycle;

/// Connections at a time; scrapers and probes need a handful.
const MAX_CONNECTIONS: usize = 64;
/// For a request head to arrive, and for an answer to be made.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest a connection is kept, whatever it does: one that does not read its answer holds a place no longer.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(60);
/// Pause after the system refuses a connection (no descriptors, say), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Which parts of a server can do their work. Cheap to clone; every clone is the same.
#[derive(Debug, Clone, Default)]
pub struct Health {
    parts: Arc<Mutex<BTreeMap<&'static str, Result<(), String>>>>,
}

impl Health {
    /// Nothing is known to be wrong.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says how `part` is; the text of an error is what `/readyz` shows as the reason.
    pub fn set(&self, part: &'static str, state: Result<(), String>) {
        let before = self.parts.lock().insert(part, state.clone());
        match (&state, before) {
            (Err(reason), Some(Ok(())) | None) => tracing::warn!(part, "not ready: {reason}"),
            (Ok(()), Some(Err(_))) => tracing::info!(part, "ready again"),
            _ => {}
        }
    }

    /// Says how `part` is unless something was said before.
    pub fn set_if_absent(&self, part: &'static str, state: Result<(), String>) {
        self.parts.lock().entry(part).or_insert(state);
    }

    /// Why the server is not ready, by part; empty when it is.
    pub fn reasons(&self) -> BTreeMap<&'static str, String> {
        let parts = self.parts.lock();
        parts
            .iter()
            .filter_map(|(part, state)| state.as_ref().err().map(|reason| (*part, reason.clone())))
            .collect()
    }
}

struct Ops {
    registry: Arc<Registry>,
    health: Health,
    life: Lifecycle,
}

/// Binds the listener of `cfg`, announces it as "ops", and serves it until the server's owned tasks have ended. Does nothing when
/// no address is set.
///
/// # Errors
/// The address cannot be bound.
pub async fn serve(cfg: &OpsConfig, registry: Arc<Registry>, health: Health, life: &Lifecycle) -> anyhow::Result<()> {
    if cfg.listen.is_empty() {
        return Ok(());
    }
    let listener = TcpListener::bind(&cfg.listen)
        .await
        .with_context(|| format!("cannot listen on {} (ops.listen)", cfg.listen))?;
    life.announce("ops", listener.local_addr()?.to_string());

    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Arc::new(Ops {
            registry,
            health,
            life: life.clone(),
        }));
    let owner = life.clone();
    life.spawn_until_closed("ops listener", async move {
        tokio::select! {
            () = accept(&listener, &router, &owner) => {}
            () = owner.closing() => {}
        }
    });
    Ok(())
}

async fn accept(listener: &TcpListener, router: &Router, life: &Lifecycle) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Never closed, so this waits for a place and cannot fail.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let connection = connection(stream, router.clone(), life.clone());
                life.spawn_until_closed("ops connection", async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("the ops listener cannot accept: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, router: Router, life: Lifecycle) {
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(STEP_TIMEOUT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut served = std::pin::pin!(served);
    let ended = tokio::time::timeout(CONNECTION_LIFETIME, async {
        tokio::select! {
            ended = served.as_mut() => ended,
            () = life.closing() => {
                served.as_mut().graceful_shutdown();
                served.as_mut().await
            }
        }
    });
    match ended.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("ops connection: {error}"),
        Err(_) => tracing::debug!("ops connection closed after {} s", CONNECTION_LIFETIME.as_secs()),
    }
}

async fn readyz(State(ops): State<Arc<Ops>>) -> Response {
    let mut reasons = ops.health.reasons();
    if ops.life.is_draining() {
        reasons.insert("process", "draining".to_owned());
    } else if !ops.life.is_ready() {
        reasons.insert("process", "starting".to_owned());
    }
    let status = if reasons.is_empty() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (
        status,
        axum::Json(serde_json::json!({ "ready": reasons.is_empty(), "reasons": reasons })),
    )
        .into_response()
}

async fn metrics(State(ops): State<Arc<Ops>>) -> Response {
    let encoded = tokio::time::timeout(
        STEP_TIMEOUT,
        tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &ops.registry).map(|()| text)
        }),
    );
    match encoded.await {
        Ok(Ok(Ok(text))) => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        Ok(Ok(Err(error))) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("cannot encode the metrics: {error}\n"),
        )
            .into_response(),
        Ok(Err(error)) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("cannot encode the metrics: {error}\n"),
        )
            .into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the metrics took too long to encode\n").into_response(),
    }
}

#[cfg(test)]
mod tests;
