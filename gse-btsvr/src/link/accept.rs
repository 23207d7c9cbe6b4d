//! The listener for links: TCP, TLS 1.3 with the certificate of an agent, or of a server for a relay, then one owned task per connection.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use gse_core::tls::{self, Role, TlsError, TlsFiles};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use super::conn;
use crate::Node;

/// Pause after a failed accept.
const PAUSE: Duration = Duration::from_millis(100);

/// A bound listener that lets nobody in yet.
#[derive(Debug)]
pub struct Listener {
    tcp: TcpListener,
    address: SocketAddr,
    files: TlsFiles,
    tls: Arc<ServerConfig>,
}

/// Binds the listener.
///
/// # Errors
/// When the address can't be bound or the certificate files can't be used.
pub async fn bind(node: &Node) -> anyhow::Result<Listener> {
    let config = &node.config.link;
    let files = config.tls.clone().context("link.tls is not set")?;
    let tls = read(files.clone()).await.context("certificates of the link listener")?;
    let tcp = TcpListener::bind(&config.listen)
        .await
        .with_context(|| format!("cannot listen for links of agents on {} (link.listen)", config.listen))?;
    let address = tcp.local_addr().context("address of the link listener")?;
    Ok(Listener {
        tcp,
        address,
        files,
        tls,
    })
}

async fn read(files: TlsFiles) -> anyhow::Result<Arc<ServerConfig>> {
    let config =
        tokio::task::spawn_blocking(move || -> Result<_, TlsError> { 
            tls::server_config(&files, &[Role::Agent, Role::Server], &[])
        });
    Ok(config.await.context("reading certificates")??)
}

impl Listener {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets agents in from now on.
    pub fn serve(self, node: &Arc<Node>) {
        node.life.spawn("link listener", accept(Arc::clone(node), self));
    }
}

async fn accept(node: Arc<Node>, listener: Listener) {
    let Listener {
        tcp, files, mut tls, ..
    } = listener;
    let places = Arc::new(Semaphore::new(node.config.link.max_links));
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let computing = Arc::new(Semaphore::new(cores));
    let mut reloads = node.life.reloads();
    loop {
        let (stream, peer) = tokio::select! {
            () = node.life.draining() => return,
            Ok(()) = reloads.changed() => {
                match read(files.clone()).await {
                    Ok(new) => tls = new,
                    Err(error) => tracing::error!(error = %format!("{error:#}"), "link listener: the certificates in force stay"),
                }
                continue;
            }
            next = tcp.accept() => match next {
                Ok(next) => next,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection on the link listener");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            node.metrics.link_refused("max_links");
            continue;
        };
        let acceptor = TlsAcceptor::from(Arc::clone(&tls));
        let (node, computing) = (Arc::clone(&node), Arc::clone(&computing));
        let owner = Arc::clone(&node);
        owner.life.spawn_contained("link", async move {
            shake(node, acceptor, computing, stream, peer).await;
            drop(place);
        });
    }
}

async fn shake(node: Arc<Node>, acceptor: TlsAcceptor, computing: Arc<Semaphore>, tcp: TcpStream, peer: SocketAddr) {
    let limit = Duration::from_millis(node.config.link.hello_timeout_ms);
    let deadline = tokio::time::Instant::now() + limit;
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::debug!(%peer, %error, "no TCP_NODELAY");
    }
    let handshake = async {
        // The costly part is ours as soon as the first bytes are there.
        tcp.readable().await?;
        let _place = computing.acquire().await.map_err(std::io::Error::other)?;
        acceptor.accept(tcp).await
    };
    let stream = match tokio::time::timeout_at(deadline, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            node.metrics.link_refused("tls");
            return tracing::info!(%peer, %error, "link listener: TLS handshake refused");
        }
        Err(_) => {
            node.metrics.link_refused("timeout");
            return tracing::debug!(%peer, "link listener: no TLS handshake in time");
        }
    };
    match tls::identity_of(stream.get_ref().1) {
        Ok(identity) => conn::run(node, stream, peer, identity, deadline).await,
        Err(error) => {
            node.metrics.link_refused("identity");
            tracing::warn!(%peer, %error, "link listener: certificate does not say who it is");
        }
    }
}
