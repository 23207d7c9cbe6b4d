//! The listener for agents: TCP, TLS 1.3, then one owned task per connection.
//!
//! Connections that have not said hello are bounded in number and in time; they get no memory beyond a handshake and one bounded
//! frame.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use gse_core::net::Duplex;
use gse_core::tls::{self, PeerIdentity, Role, TlsError, TlsFiles};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::conn;
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
    let acceptor = acceptor(&files).context("certificates of the agents listener")?;
    let address: SocketAddr = config
        .listen
        .parse()
        .with_context(|| format!("agents.listen is not an address: {}", config.listen))?;
    let listener = bind(address).with_context(|| format!("cannot listen for agents on {address}"))?;
    let bound = listener.local_addr().context("address of the agents listener")?;
    node.life
        .spawn("agents listener", accept(Arc::clone(node), listener, files, acceptor));
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

fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, TlsError> {
    tls::server_config(files, &[Role::Agent], &[]).map(TlsAcceptor::from)
}

/// Certificates as they are on disk now; the old ones go on being used when these can't be.
async fn reread(files: &TlsFiles, old: TlsAcceptor) -> TlsAcceptor {
    let files = files.clone();
    match tokio::task::spawn_blocking(move || acceptor(&files)).await {
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

async fn accept(node: Arc<Node>, listener: TcpListener, files: TlsFiles, mut acceptor: TlsAcceptor) {
    let pending = Arc::new(Semaphore::new(node.config.session.max_pending));
    let mut reloads = node.life.reloads();
    loop {
        let accepted = tokio::select! {
            () = node.life.draining() => return,
            Ok(()) = reloads.changed() => {
                acceptor = reread(&files, acceptor).await;
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        let (tcp, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, mostly: accepting at full speed again would only burn a core.
                tracing::warn!(%error, "cannot accept a connection on the agents listener");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&pending).try_acquire_owned() else {
            node.metrics.refused("pending");
            continue;
        };
        node.life.spawn_contained(
            "agent session",
            start(Arc::clone(&node), acceptor.clone(), tcp, peer, permit),
        );
    }
}

async fn start(
    node: Arc<Node>,
    acceptor: TlsAcceptor,
    tcp: TcpStream,
    peer: SocketAddr,
    permit: tokio::sync::OwnedSemaphorePermit,
) {
    let limit = Duration::from_millis(node.config.session.hello_timeout_ms);
    let deadline = tokio::time::Instant::now() + limit;
    // Boxed and gone before the session begins: what a handshake needs must not stay in every idle session's task.
    if let Some((tls, identity)) = Box::pin(handshake(&node, acceptor, tcp, peer, deadline)).await {
        conn::run(node, tls, peer, identity, deadline, permit).await;
    }
}

/// Serves an agent on a stream that was made elsewhere; that it is the one of `identity` has been proven there. For simulations: it
/// is not counted among the pending connections.
pub async fn serve(node: Arc<Node>, stream: impl Duplex + 'static, peer: SocketAddr, identity: PeerIdentity) {
    let limit = Duration::from_millis(node.config.session.hello_timeout_ms);
    let deadline = tokio::time::Instant::now() + limit;
    if let Ok(permit) = Arc::new(Semaphore::new(1)).acquire_owned().await {
        conn::run(node, Plain::new(stream), peer, identity, deadline, permit).await;
    }
}

async fn handshake(
    node: &Node,
    acceptor: TlsAcceptor,
    tcp: TcpStream,
    peer: SocketAddr,
    deadline: tokio::time::Instant,
) -> Option<(TlsStream<TcpStream>, PeerIdentity)> {
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::debug!(%peer, %error, "no TCP_NODELAY");
    }
    let tls = match tokio::time::timeout_at(deadline, acceptor.accept(tcp)).await {
        Ok(Ok(tls)) => tls,
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
    match tls::identity_of(tls.get_ref().1) {
        Ok(identity) => Some((tls, identity)),
        Err(error) => {
            node.metrics.refused("identity");
            tracing::warn!(%peer, %error, "certificate does not name an agent");
            None
        }
    }
}
