//! The listener for agents: TCP, TLS 1.3, then one owned task per connection.
//!
//! Connections that have not said hello are bounded in number and in time; they get no memory beyond a handshake and one bounded
//! frame. While there are as many as may be, the next ones wait in the kernel's queue: after a restart the whole fleet comes at once,
//! and who is turned away comes again and costs more. Only as many handshakes as there are cores compute at a time, so that
//! sessions that are there already go on being served meanwhile.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::BytesMut;
use gse_core::net::Duplex;
use gse_core::per_address::{PerAddress, Place};
use gse_core::tls::{self, PeerIdentity, Role, TlsError, TlsFiles};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::rustls::ServerConfig;

use super::conn;
use super::tls::TlsStream;
use super::wire::Plain;
use crate::Node;

/// Pending connections that the kernel keeps for us (bounded by somaxconn).
const BACKLOG: u32 = 4096;

/// Binds the listener and starts accepting; returns the bound address.
///
/// # Errors
/// When the address can't be bound or the certificate files can't be used.
pub fn listen(node: &Arc<Node>) -> anyhow::Result<SocketAddr> {
    let config = &node.config.agents;
    let files = config
        .tls
        .clone()
        .context("agents.tls is not set: agents are only let in over mutual TLS")?;
    let tls = config_of(&files).context("certificates of the agents listener")?;
    let address: SocketAddr = config
        .listen
        .parse()
        .with_context(|| format!("agents.listen is not an address: {}", config.listen))?;
    let listener = bind(address).with_context(|| format!("cannot listen for agents on {address}"))?;
    let bound = listener.local_addr().context("address of the agents listener")?;
    node.life
        .spawn("agents listener", accept(Arc::clone(node), listener, files, tls));
    Ok(bound)
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv6() {
        TcpSocket::new_v6()
    } else {
        TcpSocket::new_v4()
    }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn config_of(files: &TlsFiles) -> Result<Arc<ServerConfig>, TlsError> {
    tls::server_config(files, &[Role::Agent], &[])
}

/// Certificates as they are on disk now; the old ones go on being used when these can't be.
async fn reread(files: &TlsFiles, old: Arc<ServerConfig>) -> Arc<ServerConfig> {
    let files = files.clone();
    match tokio::task::spawn_blocking(move || config_of(&files)).await {
        Ok(Ok(new)) => new,
        Ok(Err(error)) => {
            tracing::error!(%error, "certificates of the agents listener can't be read again; the old ones stay in use");
            old
        }
        Err(error) => {
            tracing::error!(%error, "certificates of the agents listener were not read again");
            old
        }
    }
}

async fn accept(node: Arc<Node>, listener: TcpListener, files: TlsFiles, mut tls: Arc<ServerConfig>) {
    let pending = Arc::new(Semaphore::new(node.config.session.max_pending));
    let addresses = PerAddress::new(node.config.session.max_pending_per_address);
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let computing = Arc::new(Semaphore::new(cores));
    let mut reloads = node.life.reloads();
    loop {
        let accepted = async {
            let permit = Arc::clone(&pending).acquire_owned().await;
            let permit = permit.map_err(std::io::Error::other)?;
            let (tcp, peer) = listener.accept().await?;
            Ok::<_, std::io::Error>((tcp, peer, permit))
        };
        let accepted = tokio::select! {
            () = node.life.draining() => return,
            Ok(()) = reloads.changed() => {
                tls = reread(&files, tls).await;
                continue;
            }
            accepted = accepted => accepted,
        };
        let (tcp, peer, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, mostly: accepting at full speed again would only burn a core.
                tracing::warn!(%error, "cannot accept a connection on the agents listener");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(of_address) = addresses.take(peer.ip()) else {
            node.metrics.refused("pending_address");
            continue;
        };
        let places = Places {
            _pending: permit,
            _of_address: Some(of_address),
        };
        let handshake = Handshake {
            tls: Arc::clone(&tls),
            computing: Arc::clone(&computing),
        };
        node.life
            .spawn_contained("agent session", start(Arc::clone(&node), handshake, tcp, peer, places));
    }
}

/// Room for a connection that has not said hello yet; given back when it has.
pub(super) struct Places {
    _pending: OwnedSemaphorePermit,
    _of_address: Option<Place>,
}

/// What a handshake takes.
struct Handshake {
    tls: Arc<ServerConfig>,
    /// One place for each handshake that computes.
    computing: Arc<Semaphore>,
}

async fn start(node: Arc<Node>, handshake: Handshake, tcp: TcpStream, peer: SocketAddr, places: Places) {
    let limit = Duration::from_millis(node.config.session.hello_timeout_ms);
    let deadline = tokio::time::Instant::now() + limit;
    // Boxed and gone before the session begins: what a handshake needs must not stay in every idle session's task.
    if let Some((stream, buffer, identity)) = Box::pin(shake(&node, handshake, tcp, peer, deadline)).await {
        conn::run(node, stream, buffer, peer, identity, deadline, places).await;
    }
}

/// Serves an agent on a stream that was made elsewhere; that it is the one of `identity` has been proven there. For simulations: it
/// is not counted among the pending connections.
pub async fn serve(node: Arc<Node>, stream: impl Duplex + 'static, peer: SocketAddr, identity: PeerIdentity) {
    let limit = Duration::from_millis(node.config.session.hello_timeout_ms);
    let deadline = tokio::time::Instant::now() + limit;
    if let Ok(permit) = Arc::new(Semaphore::new(1)).acquire_owned().await {
        let places = Places {
            _pending: permit,
            _of_address: None,
        };
        conn::run(node, Plain(stream), BytesMut::new(), peer, identity, deadline, places).await;
    }
}

async fn shake(
    node: &Node,
    handshake: Handshake,
    tcp: TcpStream,
    peer: SocketAddr,
    deadline: tokio::time::Instant,
) -> Option<(TlsStream<TcpStream>, BytesMut, PeerIdentity)> {
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::debug!(%peer, %error, "no TCP_NODELAY");
    }
    let accepting = TlsStream::accept(handshake.tls, tcp, &handshake.computing);
    let (stream, buffer) = match tokio::time::timeout_at(deadline, accepting).await {
        Ok(Ok(accepted)) => accepted,
        Ok(Err(error)) => {
            node.metrics.refused("tls");
            tracing::info!(%peer, %error, "TLS handshake refused");
            return None;
        }
        Err(_) => {
            node.metrics.refused("timeout");
            tracing::debug!(%peer, "no TLS handshake in time");
            return None;
        }
    };
    match stream.identity() {
        Ok(identity) => Some((stream, buffer, identity)),
        Err(error) => {
            node.metrics.refused("identity");
            tracing::warn!(%peer, %error, "certificate does not name an agent");
            None
        }
    }
}
