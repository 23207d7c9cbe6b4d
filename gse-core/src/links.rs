//! Listeners for long-lived connections of our own: TCP, TLS 1.3 with a certificate of certain roles, then one owned task for each
//! connection.
//!
//! Handshakes compute only as many at a time as there are cores; certificates are read again with every reload; who finds no place is
//! closed at once, and counted. A probe that connects and closes is no error. What is said on a connection, its hello first, is the
//! server's own matter.

use std::future::Future;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;

use crate::lifecycle::Lifecycle;
use crate::tls::{self, PeerIdentity, Role, TlsError, TlsFiles};

/// Pause after a failed accept; the usual reason, no file descriptor left, does not go away at once.
const PAUSE: Duration = Duration::from_millis(100);

/// Who is let in, and how.
#[derive(Debug, Clone)]
pub struct LinkRules {
    /// What the listener is called in the log.
    pub name: &'static str,
    /// The server's own certificate.
    pub files: TlsFiles,
    /// Whose certificates are good.
    pub roles: &'static [Role],
    /// Connections that wait in the kernel for their turn.
    pub backlog: u32,
    /// For the TLS handshake, and whatever the server asks for after that.
    pub hello_timeout: Duration,
}

/// A connection that was let in.
#[derive(Debug)]
pub struct Incoming {
    /// What it says.
    pub stream: TlsStream<TcpStream>,
    /// Where it comes from.
    pub peer: SocketAddr,
    /// Who its certificate says that it is.
    pub identity: PeerIdentity,
    /// Until then it has to have said hello.
    pub deadline: Instant,
}

/// A bound listener that lets nobody in yet.
#[derive(Debug)]
pub struct LinkListener {
    rules: LinkRules,
    tcp: TcpListener,
    address: SocketAddr,
    tls: Arc<ServerConfig>,
}

impl LinkListener {
    /// Binds it; a name is bound to the first of its addresses that this host has.
    ///
    /// # Errors
    /// When the address can't be bound or the certificate files can't be used.
    pub async fn bind(listen: &str, rules: LinkRules) -> anyhow::Result<Self> {
        let tls = read(&rules)
            .await
            .with_context(|| format!("certificates of the {}", rules.name))?;
        let tcp = bind(listen, rules.backlog).await?;
        let address = tcp.local_addr()?;
        Ok(Self {
            rules,
            tcp,
            address,
            tls,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets connections in until the server drains, as many at a time as there are `places`. `refused` counts those that did not get as
    /// far as `connection`, by a word for why.
    pub async fn serve<F, R>(
        self,
        life: Lifecycle,
        places: Arc<Semaphore>,
        refused: impl Fn(&'static str) + Clone + Send + 'static,
        connection: F,
    ) where
        F: Fn(Incoming) -> R + Clone + Send + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        let Self {
            rules, tcp, mut tls, ..
        } = self;
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let computing = Arc::new(Semaphore::new(cores));
        let mut reloads = life.reloads();
        loop {
            let (stream, peer) = tokio::select! {
                () = life.draining() => return,
                Ok(()) = reloads.changed() => {
                    match read(&rules).await {
                        Ok(new) => tls = new,
                        Err(error) => tracing::error!(error = %format!("{error:#}"), "{}: the certificates in force stay", rules.name),
                    }
                    continue;
                }
                next = tcp.accept() => match next {
                    Ok(next) => next,
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection on the {}", rules.name);
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    }
                },
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                refused("max_links");
                continue;
            };
            let shake = Shake {
                name: rules.name,
                limit: rules.hello_timeout,
                acceptor: TlsAcceptor::from(Arc::clone(&tls)),
                computing: Arc::clone(&computing),
            };
            let (refused, connection) = (refused.clone(), connection.clone());
            life.spawn_contained("link", async move {
                match shake.hands(stream, peer).await {
                    Ok(Some(incoming)) => connection(incoming).await,
                    Ok(None) => tracing::debug!(%peer, "a connection that says nothing and goes"),
                    Err(why) => refused(why),
                }
                drop(place);
            });
        }
    }
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

async fn read(rules: &LinkRules) -> anyhow::Result<Arc<ServerConfig>> {
    let (files, roles) = (rules.files.clone(), rules.roles);
    let config = tokio::task::spawn_blocking(move || -> Result<_, TlsError> { tls::server_config(&files, roles, &[]) });
    Ok(config.await.context("reading certificates")??)
}

/// What one handshake needs.
struct Shake {
    name: &'static str,
    limit: Duration,
    acceptor: TlsAcceptor,
    computing: Arc<Semaphore>,
}

impl Shake {
    /// `None`: it has only looked. An error is the word for why it is refused.
    async fn hands(self, tcp: TcpStream, peer: SocketAddr) -> Result<Option<Incoming>, &'static str> {
        let Self {
            name,
            limit,
            acceptor,
            computing,
        } = self;
        let deadline = Instant::now() + limit;
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
            Ok(Ok(None)) => return Ok(None),
            Ok(Err(error)) => {
                tracing::info!(%peer, %error, "{name}: TLS handshake refused");
                return Err("tls");
            }
            Err(_) => {
                tracing::debug!(%peer, "{name}: no TLS handshake in time");
                return Err("timeout");
            }
        };
        match tls::identity_of(stream.get_ref().1) {
            Ok(identity) => Ok(Some(Incoming {
                stream,
                peer,
                identity,
                deadline,
            })),
            Err(error) => {
                tracing::warn!(%peer, %error, "{name}: the certificate does not say who it is");
                Err("identity")
            }
        }
    }
}
