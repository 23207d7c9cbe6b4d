//! The listener: binds, accepts within its limits, speaks TLS where asked to, and drains.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwapOption;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::body::Budget;
use super::connection::{Clock, Limits, Verdict};
use super::linger::Lingering;
use super::pipeline::{Connection, Seat, Shared, handle};
use super::strangers::Strangers;
use super::{Front, HttpConfig, InternalTls, Service};
use crate::lifecycle::Lifecycle;
use crate::tls::{self, PeerIdentity, TlsError};

/// Pause after a failed accept; the usual reason (no file descriptor left) does not go away at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a connection that has only just been made still gets to bring its first request when the server drains. Who made it may
/// have sent one already, and would not know whether it was carried out if there were no answer.
const FIRST_REQUEST: Duration = Duration::from_millis(500);
/// Bytes of a request head, and of one read from a connection.
const BUFFER: usize = 64 * 1024;
/// Streams of one HTTP/2 connection of somebody we do not know.
const STREAMS: u32 = 256;

/// Binds a listener and serves on it until the server drains; returns the address once it is bound and announced under `name`.
///
/// With `internal` it speaks mutual TLS with our own certificates; with `cert` and `key` in the configuration HTTPS; otherwise plain HTTP.
/// Certificates are read again on reload. On a drain it stops accepting, answers what is under way and closes idle connections.
pub async fn serve<S: Service>(
    config: &HttpConfig,
    name: &'static str,
    internal: Option<InternalTls>,
    service: Arc<S>,
    front: &Front,
    life: &Lifecycle,
) -> anyhow::Result<SocketAddr> {
    let problems = config.problems();
    anyhow::ensure!(problems.is_empty(), "listener {name}: {}", problems.join("; "));
    let secure = Secure {
        internal,
        config: config.clone(),
        current: ArcSwapOption::empty(),
    };
    let secure = Arc::new(secure);
    secure.load().await.with_context(|| format!("listener {name}"))?;
    let listener = TcpListener::bind(&config.listen).await.with_context(|| {
        format!(
            "listener {name}: cannot bind {}; is the address in use or not of this host?",
            config.listen
        )
    })?;
    let address = listener.local_addr().with_context(|| format!("listener {name}"))?;
    let shared = Arc::new(Shared {
        service,
        front: front.clone(),
        config: config.clone(),
        name,
        life: life.clone(),
        inflight: Arc::new(Semaphore::new(config.max_inflight_requests)),
        budget: Budget::new(config.max_inflight_body_bytes),
    });
    follow_reloads(&secure, name, life);
    life.spawn("http-accept", accept(listener, shared, secure));
    life.announce(name, address.to_string());
    Ok(address)
}

/// How connections are secured; nothing in `current` means plain HTTP.
struct Secure {
    internal: Option<InternalTls>,
    config: HttpConfig,
    current: ArcSwapOption<rustls::ServerConfig>,
}

impl Secure {
    fn is_tls(&self) -> bool {
        self.internal.is_some() || self.config.cert.is_some()
    }

    /// Reads the files; what is in force stays on an error.
    async fn load(self: &Arc<Self>) -> anyhow::Result<()> {
        if !self.is_tls() {
            return Ok(());
        }
        let this = Arc::clone(self);
        let read = tokio::task::spawn_blocking(move || -> Result<_, TlsError> {
            match (&this.internal, &this.config.cert, &this.config.key) {
                (Some(internal), ..) => {
                    tls::server_config(&internal.files, &internal.accept, &[b"h2", b"http/1.1"]).map(Some)
                }
                (None, Some(cert), Some(key)) => tls::http_server_config(cert, key).map(Some),
                (None, ..) => Ok(None),
            }
        });
        let config = read.await.context("reading certificates")??;
        self.current.store(config);
        Ok(())
    }
}

fn follow_reloads(secure: &Arc<Secure>, name: &'static str, life: &Lifecycle) {
    if !secure.is_tls() {
        return;
    }
    let (secure, drain, mut reloads) = (Arc::clone(secure), life.drain_token(), life.reloads());
    life.spawn("http-tls-reload", async move {
        while let Some(Ok(())) = drain.run_until_cancelled(reloads.changed()).await {
            match secure.load().await {
                Ok(()) => tracing::info!(listener = name, "certificates read again"),
                Err(error) => {
                    tracing::error!(listener = name, error = %format!("{error:#}"), "the certificates in force stay")
                }
            }
        }
    });
}

async fn accept<S: Service>(listener: TcpListener, shared: Arc<Shared<S>>, secure: Arc<Secure>) {
    let drain = shared.life.drain_token();
    let connections = Arc::new(Semaphore::new(shared.config.max_connections));
    // A few more than are served get a proper answer saying so.
    let surplus = Arc::new(Semaphore::new(shared.config.max_connections / 8 + 8));
    let strangers = Strangers::new(shared.config.max_strangers_per_address);
    while let Some(accepted) = drain.run_until_cancelled(listener.accept()).await {
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(listener = shared.name, %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let regular = strangers.place(peer.ip()).and_then(|place| {
            let permit = Arc::clone(&connections).try_acquire_owned().ok();
            let permit = permit.or_else(|| strangers.make_room())?;
            Some(strangers.enter(place, permit))
        });
        let seat = match regular {
            Some(guest) => Seat::Regular(guest),
            None => match Arc::clone(&surplus).try_acquire_owned() {
                Ok(permit) => Seat::Surplus(permit),
                Err(_) => {
                    tracing::debug!(listener = shared.name, %peer, "too many connections; closed one without an answer");
                    continue;
                }
            },
        };
        let (shared_too, secure) = (Arc::clone(&shared), Arc::clone(&secure));
        shared.life.spawn_contained("http-connection", async move {
            let _counted = shared_too.front.metrics.connection(shared_too.name);
            let leave = match &seat {
                Seat::Regular(guest) => guest.leave.clone(),
                Seat::Surplus(_) => CancellationToken::new(),
            };
            let name = shared_too.name;
            let served = leave.run_until_cancelled(greet(stream, peer, seat, shared_too, secure));
            if served.await.is_none() {
                tracing::debug!(listener = name, %peer, "a connection without an authenticated call made room for another");
            }
        });
    }
}

/// Does the TLS handshake where there is one, then serves.
async fn greet<S: Service>(
    stream: TcpStream,
    peer: SocketAddr,
    seat: Seat,
    shared: Arc<Shared<S>>,
    secure: Arc<Secure>,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "cannot set TCP_NODELAY");
    }
    let name = shared.name;
    let Some(config) = secure.current.load_full() else {
        return serve_connection(stream, peer, None, seat, shared).await;
    };
    let patience = Duration::from_millis(shared.config.header_timeout_ms);
    let handshake = TlsAcceptor::from(config).accept(stream);
    let drain = shared.life.drain_token();
    let leaving = async {
        drain.cancelled().await;
        tokio::time::sleep(FIRST_REQUEST).await;
    };
    let stream = tokio::select! {
        outcome = tokio::time::timeout(patience, handshake) => match outcome {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return tracing::debug!(listener = name, %peer, %error, "TLS handshake failed"),
            Err(_) => return tracing::debug!(listener = name, %peer, "TLS handshake took too long"),
        },
        () = leaving => return,
    };
    let identity = match (&secure.internal, tls::identity_of(stream.get_ref().1)) {
        (None, _) => None,
        (Some(_), Ok(identity)) => Some(identity),
        (Some(_), Err(error)) => return tracing::warn!(listener = name, %peer, %error, "refused a peer"),
    };
    if let (Some(_), Seat::Regular(guest)) = (&identity, &seat) {
        guest.known();
    }
    serve_connection(stream, peer, identity, seat, shared).await;
}

async fn serve_connection<S: Service>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
    identity: Option<PeerIdentity>,
    seat: Seat,
    shared: Arc<Shared<S>>,
) {
    let limits = Limits::of(&shared.config);
    let clock = Clock::new();
    let drain = shared.life.drain_token();
    let fresh = Arc::clone(&clock);
    let mut leave = std::pin::pin!(async move {
        drain.cancelled().await;
        let until = tokio::time::Instant::now() + FIRST_REQUEST;
        while !fresh.is_used() && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let name = shared.name;
    let connection = Arc::new(Connection {
        peer,
        identity,
        seat,
        clock: Arc::clone(&clock),
    });
    let builder = builder(&limits, streams(&shared.config, connection.identity.is_some()));
    let service = service_fn(move |request| handle(Arc::clone(&shared), Arc::clone(&connection), request));
    let mut served = std::pin::pin!(builder.serve_connection(TokioIo::new(Lingering::new(stream)), service));
    let mut look = tokio::time::interval(limits.every());
    let mut leaving = false;
    loop {
        tokio::select! {
            ended = served.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(listener = name, %peer, %error, "connection ended with an error");
                }
                return;
            }
            () = leave.as_mut(), if !leaving => {
                leaving = true;
                served.as_mut().graceful_shutdown();
            }
            _ = look.tick() => match clock.verdict(&limits) {
                Verdict::Keep => {}
                Verdict::Retire if leaving => {}
                Verdict::Retire => {
                    leaving = true;
                    served.as_mut().graceful_shutdown();
                }
                Verdict::Drop => return tracing::debug!(listener = name, %peer, "dropped a connection that got nowhere"),
            },
        }
    }
}

/// How many calls one connection may carry at once. One of our own servers brings the calls of all its callers on a single connection, so
/// the listener's own limit is the only one there; otherwise a few slow calls would keep all others waiting in front of the door.
fn streams(config: &HttpConfig, ours: bool) -> u32 {
    if ours {
        u32::try_from(config.max_inflight_requests).unwrap_or(u32::MAX)
    } else {
        STREAMS
    }
}

fn builder(limits: &Limits, streams: u32) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // hyper counts the idle time before a head as part of it; the first head has its own, shorter limit (see `Clock`).
        .header_read_timeout(limits.idle + limits.head)
        .max_buf_size(BUFFER);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(streams)
        .max_header_list_size(u32::try_from(BUFFER).unwrap_or(u32::MAX))
        .initial_stream_window_size(1024 * 1024)
        .initial_connection_window_size(4 * 1024 * 1024)
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}
