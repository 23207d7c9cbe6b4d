//! Links of agents and proxies: TCP, TLS 1.3 with a certificate of either, then one owned task per connection.
//!
//! A probe that connects and closes is no error (contract data-plane#44).

pub mod book;
mod conn;

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use gse_core::tls::{self, Role, TlsError, TlsFiles};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use crate::Node;
use crate::config::RunMode;

/// How long a stopping server waits for what it has taken in to be acknowledged.
pub(crate) const STOPPING: Duration = Duration::from_secs(3);
/// Pause after a failed accept.
const PAUSE: Duration = Duration::from_millis(100);

/// Binds the listeners and lets senders in.
///
/// # Errors
/// When an address can't be bound or the certificate files can't be used.
pub async fn serve(node: &Arc<Node>) -> anyhow::Result<()> {
    let config = &node.config.link;
    let files = config.tls.clone().context("link.tls is not set")?;
    let places = Arc::new(Semaphore::new(config.max_links));
    for (name, key, listen) in [
        ("link", "link.listen", &config.listen),
        ("link_v1", "link.listen_v1", &config.listen_v1),
    ] {
        if listen.is_empty() {
            continue;
        }
        let tls = read(files.clone()).await.context("certificates of the data listener")?;
        let tcp = bind(listen, config.backlog)
            .await
            .with_context(|| format!("cannot listen for records on {listen} ({key})"))?;
        let address = tcp.local_addr().context("address of the data listener")?;
        let files = files.clone();
        let listener = Listener { tcp, files, tls };
        node.life
            .spawn("data listener", accept(Arc::clone(node), listener, Arc::clone(&places)));
        node.life.announce(name, address.to_string());
    }
    Ok(())
}

async fn bind(listen: &str, backlog: u32) -> std::io::Result<TcpListener> {
    let mut last = std::io::Error::other("the name has no address");
    for address in tokio::net::lookup_host(listen).await? {
        let socket = match address.is_ipv6() {
            true => TcpSocket::new_v6(),
            false => TcpSocket::new_v4(),
        }?;
        socket.set_reuseaddr(true)?;
        match socket.bind(address).and_then(|()| socket.listen(backlog)) {
            Ok(tcp) => return Ok(tcp),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A bound listener.
struct Listener {
    tcp: TcpListener,
    files: TlsFiles,
    tls: Arc<ServerConfig>,
}

async fn read(files: TlsFiles) -> anyhow::Result<Arc<ServerConfig>> {
    let accept = [Role::Agent, Role::Server];
    let config =
        tokio::task::spawn_blocking(move || -> Result<_, TlsError> { tls::server_config(&files, &accept, &[]) });
    Ok(config.await.context("reading certificates")??)
}

/// Waits until it is known what is routed. Whoever connects before that is not answered, and keeps its records: taken in now they would
/// count as records that nobody wants.
async fn routes(node: &Node) {
    let mut said = false;
    while node.config.run_mode == RunMode::Server && !node.router.has_routes() {
        if !said {
            tracing::warn!("the store has not told any routes yet; records wait at their hosts");
            said = true;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn accept(node: Arc<Node>, listener: Listener, places: Arc<Semaphore>) {
    tokio::select! {
        () = node.life.draining() => return,
        () = routes(&node) => {}
    }
    let Listener { tcp, files, mut tls } = listener;
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let computing = Arc::new(Semaphore::new(cores));
    let mut reloads = node.life.reloads();
    loop {
        let (stream, peer) = tokio::select! {
            () = node.life.draining() => return,
            Ok(()) = reloads.changed() => {
                match read(files.clone()).await {
                    Ok(new) => tls = new,
                    Err(error) => tracing::error!(error = %format!("{error:#}"), "data listener: the certificates in force stay"),
                }
                continue;
            }
            next = tcp.accept() => match next {
                Ok(next) => next,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection on the data listener");
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
        // Whoever resets the connection at once has only looked too.
        if !matches!(tcp.peek(&mut [0]).await, Ok(1..)) {
            return Ok(None);
        }
        let _place = computing.acquire().await.map_err(std::io::Error::other)?;
        acceptor.accept(tcp).await.map(Some)
    };
    let stream = match tokio::time::timeout_at(deadline, handshake).await {
        Ok(Ok(Some(stream))) => stream,
        Ok(Ok(None)) => return tracing::debug!(%peer, "a connection that says nothing and goes"),
        Ok(Err(error)) => {
            node.metrics.link_refused("tls");
            return tracing::info!(%peer, %error, "data listener: TLS handshake refused");
        }
        Err(_) => {
            node.metrics.link_refused("timeout");
            return tracing::debug!(%peer, "data listener: no TLS handshake in time");
        }
    };
    match tls::identity_of(stream.get_ref().1) {
        Ok(identity) => conn::run(node, stream, peer, identity, deadline).await,
        Err(error) => {
            node.metrics.link_refused("identity");
            tracing::warn!(%peer, %error, "data listener: certificate does not name a sender");
        }
    }
}
