//! Calls between our own servers: gRPC over mutual TLS, HTTP/2 keepalive always on.
//!
//! Certificates and roles are checked by [`crate::tls`], not by the gRPC library. What is called is the servers' business; here is only
//! the listener and the channel.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::service::Routes;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Server};

use crate::config::Problems;
use crate::lifecycle::Lifecycle;
use crate::tls::{self, PeerIdentity, Role, TlsError, TlsFiles};

const H2: &[u8] = b"h2";
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listener for calls of our own servers, and how such calls are made.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RpcConfig {
    /// Address and port; empty: none.
    pub listen: String,
    /// `host:port` that others are told to use; empty: the address that is listened on.
    pub advertise: String,
    /// This node's server certificate; unset: the one of the internal listener.
    pub tls: Option<TlsFiles>,
    /// How often a quiet connection is tested.
    pub keepalive_ms: u64,
    /// How long the answer to such a test may take; then the connection is given up.
    pub keepalive_timeout_ms: u64,
    /// How long connecting may take, TLS included.
    pub connect_timeout_ms: u64,
    /// How long a call may take.
    pub call_timeout_ms: u64,
    /// Longest message.
    pub max_message_bytes: usize,
    /// Connections at once at most.
    pub max_connections: usize,
}

impl Default for RpcConfig {
    fn default() -> Self {
        Self {
            listen: String::new(),
            advertise: String::new(),
            tls: None,
            keepalive_ms: 2_000,
            keepalive_timeout_ms: 3_000,
            connect_timeout_ms: 2_000,
            call_timeout_ms: 10_000,
            max_message_bytes: 96 << 20,
            max_connections: 256,
        }
    }
}

impl RpcConfig {
    /// Adds what cannot work, under `key`.
    pub fn validate(&self, key: &str, problems: &mut Problems) {
        if !self.listen.is_empty() {
            problems.check_listen(&format!("{key}.listen"), &self.listen);
        }
        problems.check_range(&format!("{key}.keepalive_ms"), self.keepalive_ms, 100, 600_000);
        problems.check_range(
            &format!("{key}.keepalive_timeout_ms"),
            self.keepalive_timeout_ms,
            100,
            600_000,
        );
        problems.check_range(
            &format!("{key}.connect_timeout_ms"),
            self.connect_timeout_ms,
            100,
            60_000,
        );
        problems.check_range(&format!("{key}.call_timeout_ms"), self.call_timeout_ms, 100, 600_000);
        problems.check_range(
            &format!("{key}.max_message_bytes"),
            self.max_message_bytes as u64,
            1 << 20,
            1 << 30,
        );
        problems.check_range(
            &format!("{key}.max_connections"),
            self.max_connections as u64,
            1,
            65_536,
        );
    }
}

/// One accepted connection.
struct Incoming {
    stream: TlsStream<TcpStream>,
    identity: Arc<PeerIdentity>,
    _counted: tokio::sync::OwnedSemaphorePermit,
}

impl Connected for Incoming {
    /// Extension of each request: who calls.
    type ConnectInfo = Arc<PeerIdentity>;

    fn connect_info(&self) -> Self::ConnectInfo {
        Arc::clone(&self.identity)
    }
}

impl AsyncRead for Incoming {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Incoming {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Binds a listener and serves `routes` on it to holders of server certificates; returns the address once it is bound. It ends when
/// `until` resolves: then calls under way are finished and connections closed.
///
/// # Errors
/// When the address cannot be bound or the certificate cannot be used.
pub async fn serve(
    config: &RpcConfig,
    files: &TlsFiles,
    routes: Routes,
    until: impl Future<Output = ()> + Send + 'static,
    life: &Lifecycle,
) -> anyhow::Result<SocketAddr> {
    let acceptor = acceptor(files.clone())
        .await
        .context("certificates of the rpc listener")?;
    let listener = TcpListener::bind(&config.listen)
        .await
        .with_context(|| format!("cannot listen for other servers on {} (rpc.listen)", config.listen))?;
    let address = listener.local_addr().context("address of the rpc listener")?;
    let (accepted, incoming) = mpsc::channel(16);
    let accepting = accept(
        listener,
        acceptor,
        files.clone(),
        config.clone(),
        accepted,
        life.clone(),
    );
    life.spawn("rpc accept", accepting);
    let incoming = futures::stream::unfold(incoming, |mut incoming| async move {
        let next: Incoming = incoming.recv().await?;
        Some((Ok::<_, std::io::Error>(next), incoming))
    });
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_millis(config.keepalive_ms)))
        .http2_keepalive_timeout(Some(Duration::from_millis(config.keepalive_timeout_ms)))
        .initial_stream_window_size(Some(4 << 20))
        .initial_connection_window_size(Some(16 << 20))
        .max_concurrent_streams(Some(256));
    let serving = server.add_routes(routes).serve_with_incoming_shutdown(incoming, until);
    life.spawn("rpc listener", async move {
        if let Err(error) = serving.await {
            tracing::error!(%error, "the rpc listener ended with an error");
        }
    });
    Ok(address)
}

async fn acceptor(files: TlsFiles) -> anyhow::Result<TlsAcceptor> {
    let config = tokio::task::spawn_blocking(move || tls::server_config(&files, &[Role::Server], &[H2])).await;
    Ok(TlsAcceptor::from(config.context("reading certificates")??))
}

async fn accept(
    listener: TcpListener,
    mut tls: TlsAcceptor,
    files: TlsFiles,
    config: RpcConfig,
    accepted: mpsc::Sender<Incoming>,
    life: Lifecycle,
) {
    let connections = Arc::new(Semaphore::new(config.max_connections));
    let limit = Duration::from_millis(config.connect_timeout_ms);
    let mut reloads = life.reloads();
    loop {
        let (tcp, peer) = tokio::select! {
            () = accepted.closed() => return,
            Ok(()) = reloads.changed() => {
                match acceptor(files.clone()).await {
                    Ok(new) => tls = new,
                    Err(error) => tracing::error!(error = %format!("{error:#}"), "rpc listener: the certificates in force stay"),
                }
                continue;
            }
            next = listener.accept() => match next {
                Ok(next) => next,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection on the rpc listener");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let Ok(counted) = Arc::clone(&connections).try_acquire_owned() else {
            tracing::warn!(%peer, "rpc listener: more connections than rpc.max_connections; closed one");
            continue;
        };
        let (tls, accepted) = (tls.clone(), accepted.clone());
        life.spawn_contained("rpc connection", async move {
            if let Err(error) = tcp.set_nodelay(true) {
                tracing::debug!(%peer, %error, "no TCP_NODELAY");
            }
            let stream = match tokio::time::timeout(limit, tls.accept(tcp)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return tracing::warn!(%peer, %error, "rpc listener: TLS handshake refused"),
                Err(_) => return tracing::debug!(%peer, "rpc listener: no TLS handshake in time"),
            };
            match tls::identity_of(stream.get_ref().1) {
                Ok(identity) => {
                    let incoming = Incoming {
                        stream,
                        identity: Arc::new(identity),
                        _counted: counted,
                    };
                    // The listener has ended meanwhile: so does the connection.
                    drop(accepted.send(incoming).await);
                }
                Err(error) => tracing::warn!(%peer, %error, "rpc listener: refused a peer"),
            }
        });
    }
}

/// What channels are made with: our certificate, and how long things may take.
#[derive(Debug, Clone)]
pub struct Dialler {
    tls: Arc<ClientConfig>,
    config: RpcConfig,
}

impl Dialler {
    /// Reads the certificate (blocking, small).
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn new(config: &RpcConfig, files: &TlsFiles) -> Result<Self, TlsError> {
        Ok(Self {
            tls: tls::client_config(files, Role::Server, &[H2])?,
            config: config.clone(),
        })
    }

    /// A channel to the server at `host:port`. It connects when it is first used, and again whenever the connection is lost.
    ///
    /// # Errors
    /// When `address` is not one.
    pub fn channel(&self, address: &str) -> anyhow::Result<Channel> {
        let ms = Duration::from_millis;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .with_context(|| format!("{address:?} is not the address of a server"))?
            .connect_timeout(ms(self.config.connect_timeout_ms))
            .timeout(ms(self.config.call_timeout_ms))
            .http2_keep_alive_interval(ms(self.config.keepalive_ms))
            .keep_alive_timeout(ms(self.config.keepalive_timeout_ms))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(16 << 20);
        let (tls, address) = (Arc::clone(&self.tls), address.to_owned());
        let connector = tower::service_fn(move |_: http::Uri| {
            let (tls, address) = (TlsConnector::from(Arc::clone(&tls)), address.clone());
            async move {
                let tcp = TcpStream::connect(&address).await?;
                tcp.set_nodelay(true)?;
                let stream = tls.connect(tls::server_name(), tcp).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        Ok(endpoint.connect_with_connector_lazy(connector))
    }

    /// Longest message of a call.
    #[must_use]
    pub fn max_message_bytes(&self) -> usize {
        self.config.max_message_bytes
    }
}

/// The files to use for the rpc links: those set for them, or else those of another listener.
#[must_use]
pub fn files(config: &RpcConfig, other: Option<&TlsFiles>) -> Option<TlsFiles> {
    config.tls.as_ref().or(other).cloned()
}
