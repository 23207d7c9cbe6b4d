//! The link to the server that controls a transfer: reports, manifests and peers, over a connection of its own. There is one for each
//! server that some order needs, for as long as it does. Frames are those of [`gse_proto::link`].

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use gse_core::random::Random;
use gse_core::tls::{self, Role, TlsFiles};
use gse_proto::file::{LinkHello, SwarmPeers};
use gse_proto::link::{LinkFrame, MAX_MESSAGE, PROTOCOL};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, broadcast};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;

use super::cell::Cell;
use super::orders::Shared;
use super::talk::talk;

/// Pauses between tries begin with this.
const FIRST_RETRY: Duration = Duration::from_millis(200);
/// Messages about swarms that wait for whoever moves them.
const SWARM_QUEUE: usize = 256;

/// Who this agent is on its links.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its id.
    pub agent_id: String,
    /// Its certificate, and whom it trusts.
    pub tls: TlsFiles,
    /// The host's addresses.
    pub addresses: Vec<IpAddr>,
    /// Its cloud area.
    pub cloud_id: i32,
}

/// What a server says about swarms.
#[derive(Debug, Clone)]
pub(super) enum SwarmNews {
    /// Who takes part.
    Peers(SwarmPeers),
    /// Nothing of it is needed any more, says this server.
    Over(String, Bytes),
    /// A manifest that was asked for is here.
    Manifest(Bytes, Bytes),
}

/// The links of this agent.
#[derive(Debug)]
pub(super) struct Links {
    identity: Identity,
    /// Servers to which a link is kept.
    kept: Mutex<HashSet<String>>,
    /// Manifests that somebody waits for, by server.
    pub(super) wanted: Mutex<HashMap<String, HashSet<Bytes>>>,
    /// What came about swarms.
    pub(super) news: broadcast::Sender<SwarmNews>,
    /// The last word about the peers of each swarm that is not over, so that it can come before anybody listens.
    pub(super) known: Mutex<HashMap<Bytes, SwarmPeers>>,
    /// Swarms that a server has ended.
    pub(super) over: Mutex<HashSet<(String, Bytes)>>,
    /// Somebody needs something that no order says.
    pub(super) poked: Notify,
    begun: AtomicU64,
}

impl Links {
    pub(super) fn new(identity: Identity) -> Self {
        Self {
            identity,
            kept: Mutex::default(),
            wanted: Mutex::default(),
            news: broadcast::Sender::new(SWARM_QUEUE),
            known: Mutex::default(),
            over: Mutex::default(),
            poked: Notify::new(),
            begun: AtomicU64::new(0),
        }
    }

    /// Who this agent is.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What is said about swarms from now on.
    pub(super) fn news(&self) -> broadcast::Receiver<SwarmNews> {
        self.news.subscribe()
    }

    /// What was last said about the peers of a swarm.
    pub(super) fn peers_of(&self, manifest_id: &Bytes) -> Option<SwarmPeers> {
        self.known.lock().get(manifest_id).cloned()
    }

    /// Whether a swarm is said to be over.
    pub(super) fn is_over(&self, server: &str, manifest_id: &Bytes) -> bool {
        self.over.lock().contains(&(server.to_owned(), manifest_id.clone()))
    }

    /// Somebody here has to do with a swarm (again).
    pub(super) fn begin(&self, server: &str, manifest_id: &Bytes) {
        self.over.lock().remove(&(server.to_owned(), manifest_id.clone()));
    }

    /// Nobody here has to do with a swarm any more.
    pub(super) fn forget(&self, manifest_id: &Bytes) {
        self.known.lock().remove(manifest_id);
        self.over.lock().retain(|(_, id)| id != manifest_id);
    }

    /// Asks the server of an order for a manifest, until it is here.
    pub(super) fn want(&self, server: &str, manifest_id: &Bytes) {
        self.wanted
            .lock()
            .entry(server.to_owned())
            .or_default()
            .insert(manifest_id.clone());
        self.poked.notify_waiters();
    }

    /// Orders of one server are another one's now: what was asked of the first is asked of the second, too.
    pub(super) fn ask_too(&self, from: &str, to: &str) {
        let mut wanted = self.wanted.lock();
        if let Some(ids) = wanted.get(from).cloned() {
            wanted.entry(to.to_owned()).or_default().extend(ids);
        }
    }

    /// Sees to it that the order's server is linked to.
    pub(super) fn need(shared: &Arc<Shared>, cell: &Cell) {
        let Some(server) = cell.server() else { return };
        if shared.links.kept.lock().insert(server.clone()) {
            let keeping = keep(Arc::clone(shared), server);
            shared.life.spawn_contained("file link", keeping);
        }
        shared.changed.notify_waiters();
    }
}

/// Keeps a link until nobody needs it.
async fn keep(shared: Arc<Shared>, server: String) {
    let random = Random::system();
    let mut pause = FIRST_RETRY;
    loop {
        // While somebody may insert itself no link may end itself.
        {
            let mut kept = shared.links.kept.lock();
            if shared.linked_to(&server).is_empty() || shared.life.is_draining() {
                kept.remove(&server);
                return;
            }
        }
        let begun = Instant::now();
        let ended = tokio::select! {
            () = shared.life.draining() => Ok(()),
            ended = link(&shared, &server) => ended,
        };
        match ended {
            Ok(()) => tracing::debug!(server, "the file link is not needed any more"),
            Err(error) => {
                if begun.elapsed() > Duration::from_secs(10) {
                    pause = FIRST_RETRY;
                }
                tracing::info!(server, pause_ms = pause.as_millis() as u64, "file link: {error:#}");
                tokio::select! {
                    () = shared.life.draining() => {}
                    () = sleep(pause / 2 + random.up_to(pause / 2)) => {}
                }
                pause = (pause * 2).min(Duration::from_millis(shared.config.link_retry_ms));
            }
        }
    }
}

/// One connection, from its hello to its end. Ends well when it was not needed for a while.
async fn link(shared: &Arc<Shared>, server: &str) -> anyhow::Result<()> {
    let limit = Duration::from_millis(shared.config.link_connect_ms);
    let (stream, buffer) = timeout(limit, connect(shared, server))
        .await
        .with_context(|| format!("no link within {} ms", limit.as_millis()))??;
    let begun = shared.links.begun.fetch_add(1, Ordering::Relaxed);
    tracing::debug!(server, begun, "file link");
    shared.metrics.links.inc();
    let ended = talk(shared, server, stream, buffer).await;
    shared.metrics.links.dec();
    ended
}

async fn connect(
    shared: &Shared,
    server: &str,
) -> anyhow::Result<(tokio_rustls::client::TlsStream<TcpStream>, BytesMut)> {
    let identity = &shared.links.identity;
    let files = identity.tls.clone();
    let tls = tokio::task::spawn_blocking(move || tls::client_config(&files, Role::Server, &[]))
        .await
        .context("reading certificates")??;
    let socket = TcpStream::connect(server).await.context("cannot connect")?;
    socket.set_nodelay(true).context("cannot set TCP_NODELAY")?;
    let mut stream = TlsConnector::from(tls)
        .connect(tls::server_name(), socket)
        .await
        .context("TLS handshake")?;
    let hello = LinkFrame::from(LinkHello {
        protocol: PROTOCOL,
        agent_id: identity.agent_id.clone(),
        peer_addresses: shared.swarms.addresses(shared).await,
        cloud_area: identity.cloud_id,
        relay: None,
    });
    stream
        .write_all(&hello.to_bytes())
        .await
        .context("cannot send the hello")?;
    stream.flush().await.context("cannot send the hello")?;
    let mut buffer = BytesMut::new();
    loop {
        match LinkFrame::take(&mut buffer, MAX_MESSAGE).context("answer to the hello")? {
            Some(LinkFrame::Welcome(welcome)) if welcome.protocol == PROTOCOL => return Ok((stream, buffer)),
            Some(LinkFrame::Welcome(welcome)) => bail!("the server speaks protocol {} on links", welcome.protocol),
            Some(LinkFrame::Goodbye(bye)) => bail!("the server refused the link: {}", bye.reason),
            Some(other) => bail!("answer to the hello is a frame of kind {}", other.kind()),
            None => {}
        }
        if stream.read_buf(&mut buffer).await.context("no answer to the hello")? == 0 {
            bail!("the server closed the connection instead of answering the hello");
        }
    }
}
