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
use gse_proto::file::{LinkHello, ManifestPart, ManifestWanted, Report, SwarmPeers};
use gse_proto::link::{LinkFrame, MAX_MANIFEST, MAX_MESSAGE, PART, PING_MS, PROTOCOL};
use gse_proto::session::{Goodbye, Ping, Pong, Unsupported};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, broadcast};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;

use super::orders::{Cell, Key, Shared, is_final};

/// Room for what the next read brings.
const READ_AHEAD: usize = 16 << 10;
/// A write that makes no progress for so long ends the link.
const WRITE_STALL: Duration = Duration::from_secs(30);
/// Pauses between tries begin with this.
const FIRST_RETRY: Duration = Duration::from_millis(200);
/// Messages about swarms that wait for whoever moves them.
const SWARM_QUEUE: usize = 256;
/// Swarms that are remembered.
const MAX_SWARMS: usize = 20_000;
/// Manifests that are being received at once.
const MAX_RECEIVING: usize = 64;

/// Who this agent is on its links.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its id.
    pub agent_id: String,
    /// Its certificate, and whom it trusts.
    pub tls: TlsFiles,
    /// The host's addresses.
    pub addresses: Vec<IpAddr>,
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

/// A manifest that comes in parts.
#[derive(Debug)]
struct Receiving {
    total: u64,
    data: BytesMut,
}

/// The links of this agent.
#[derive(Debug)]
pub(super) struct Links {
    identity: Identity,
    /// Servers to which a link is kept.
    kept: Mutex<HashSet<String>>,
    /// Manifests that somebody waits for, by server.
    wanted: Mutex<HashMap<String, HashSet<Bytes>>>,
    /// What came about swarms.
    news: broadcast::Sender<SwarmNews>,
    /// The last word about the peers of each swarm that is not over, so that it can come before anybody listens.
    known: Mutex<HashMap<Bytes, SwarmPeers>>,
    /// Swarms that a server has ended.
    over: Mutex<HashSet<(String, Bytes)>>,
    /// Somebody needs something that no order says.
    poked: Notify,
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

    /// Sees to it that the order's server is linked to.
    pub(super) fn need(shared: &Arc<Shared>, cell: &Cell) {
        let Some(server) = cell.server() else { return };
        if shared.links.kept.lock().insert(server.to_owned()) {
            let keeping = keep(Arc::clone(shared), server.to_owned());
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

/// What was last said about an order on this connection.
struct Sent {
    phase: i32,
    manifest: bool,
    moved: u64,
    at: Instant,
    over: bool,
}

/// The agent's side of one connection.
struct Talk<'a> {
    shared: &'a Arc<Shared>,
    server: &'a str,
    out: BytesMut,
    sent: HashMap<Key, Sent>,
    receiving: HashMap<Bytes, Receiving>,
    asked: HashMap<Bytes, Instant>,
    last_ping: Instant,
    heard: Instant,
    idle_since: Instant,
}

async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Arc<Shared>,
    server: &str,
    mut stream: S,
    mut buffer: BytesMut,
) -> anyhow::Result<()> {
    let now = Instant::now();
    let mut talk = Talk {
        shared,
        server,
        out: BytesMut::new(),
        sent: HashMap::new(),
        receiving: HashMap::new(),
        asked: HashMap::new(),
        last_ping: now,
        heard: now,
        idle_since: now,
    };
    let tick = Duration::from_millis(shared.config.report_ms.min(PING_MS) / 2).max(Duration::from_millis(10));
    loop {
        while let Some(frame) = LinkFrame::take(&mut buffer, MAX_MESSAGE)? {
            talk.take(frame)?;
        }
        // Before the look, so that what changes during it is not missed.
        let changed = shared.changed.notified();
        let poked = shared.links.poked.notified();
        tokio::pin!(changed, poked);
        changed.as_mut().enable();
        poked.as_mut().enable();
        let needed = talk.reports();
        talk.pings()?;
        if !talk.out.is_empty() {
            let out = talk.out.split();
            timeout(WRITE_STALL, async {
                stream.write_all(&out).await?;
                stream.flush().await
            })
            .await
            .context("the server takes nothing")?
            .context("cannot send")?;
            if talk.out.capacity() > 1 << 20 {
                talk.out = BytesMut::new();
            }
        }
        if needed {
            talk.idle_since = Instant::now();
        } else if talk.idle_since.elapsed() >= Duration::from_millis(shared.config.link_idle_ms) {
            let bye = Goodbye {
                reason: "not needed any more".to_owned(),
                stopping: false,
            };
            stream.write_all(&LinkFrame::from(bye).to_bytes()).await?;
            stream.shutdown().await?;
            return Ok(());
        }
        if buffer.is_empty() {
            buffer = BytesMut::new();
        }
        let whole = gse_proto::frame::announced_len(&buffer)
            .unwrap_or(0)
            .min(MAX_MESSAGE + 64);
        buffer.reserve(whole.saturating_sub(buffer.len()).max(READ_AHEAD));
        tokio::select! {
            read = stream.read_buf(&mut buffer) => {
                if read.context("cannot receive")? == 0 {
                    bail!("the server closed the connection");
                }
                talk.heard = Instant::now();
            }
            () = &mut changed => {}
            () = &mut poked => {}
            () = sleep(tick) => {}
        }
    }
}

impl Talk<'_> {
    fn put(&mut self, frame: impl Into<LinkFrame>) {
        frame.into().encode(0, &mut self.out);
    }

    fn pings(&mut self) -> anyhow::Result<()> {
        let interval = Duration::from_millis(PING_MS);
        if self.heard.elapsed() > interval * 3 {
            bail!(
                "nothing was heard from the server for {} s",
                self.heard.elapsed().as_secs()
            );
        }
        if self.last_ping.elapsed() >= interval {
            self.last_ping = Instant::now();
            self.put(Ping { nonce: 1 });
        }
        Ok(())
    }

    /// Says what there is to say about orders and asks for manifests; whether anything is left for which the link is needed.
    fn reports(&mut self) -> bool {
        let cells = self.shared.linked_to(self.server);
        let pause = Duration::from_millis(self.shared.config.report_ms);
        let again = Duration::from_millis(self.shared.config.resend_ms);
        for cell in &cells {
            // So much is enough for one write; the rest is for the next.
            if self.out.len() > MAX_MESSAGE {
                break;
            }
            let Some(report) = cell.report().filter(|_| !cell.is_stored()) else {
                continue;
            };
            let over = is_final(&report);
            let manifest = !report.manifest_id.is_empty();
            let due = match self.sent.get(&cell.key) {
                None => true,
                Some(sent) if over => !sent.over || sent.at.elapsed() >= again,
                Some(sent) if sent.phase != report.phase || sent.manifest != manifest => true,
                Some(sent) => sent.moved != report.moved && sent.at.elapsed() >= pause,
            };
            if !due {
                continue;
            }
            self.say(cell, report, manifest, over);
        }
        self.sent.retain(|key, _| cells.iter().any(|cell| cell.key == *key));
        let waits = self.ask_for_manifests();
        waits || !cells.is_empty()
    }

    fn say(&mut self, cell: &Cell, mut report: Report, manifest: bool, over: bool) {
        let before = self.sent.get(&cell.key);
        let told_before = before.is_some_and(|sent| sent.manifest);
        let since = before.map(|sent| (sent.moved, sent.at));
        if manifest && !told_before {
            let long = cell.manifest.lock().clone();
            if let Some(long) = long {
                self.put_manifest(&report.manifest_id, &long);
            }
        } else if manifest && !over {
            // Once on a connection is enough.
            report.inline_manifest = Bytes::new();
            report.inline_content = Bytes::new();
        }
        if let Some((moved, at)) = since
            && !over
        {
            let ms = u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
            report.rate = report.moved.saturating_sub(moved).saturating_mul(1000) / ms;
        }
        self.sent.insert(
            cell.key.clone(),
            Sent {
                phase: report.phase,
                manifest,
                moved: report.moved,
                at: Instant::now(),
                over,
            },
        );
        self.put(report);
    }

    fn put_manifest(&mut self, id: &Bytes, manifest: &Bytes) {
        for offset in (0..manifest.len()).step_by(PART) {
            let end = manifest.len().min(offset + PART);
            self.put(ManifestPart {
                manifest_id: id.clone(),
                offset: offset as u64,
                total: manifest.len() as u64,
                data: manifest.slice(offset..end),
            });
        }
    }

    fn ask_for_manifests(&mut self) -> bool {
        let wanted: Vec<Bytes> = {
            let wanted = self.shared.links.wanted.lock();
            wanted.get(self.server).into_iter().flatten().cloned().collect()
        };
        let again = Duration::from_millis(self.shared.config.resend_ms);
        for id in &wanted {
            if self.asked.get(id).is_none_or(|at| at.elapsed() >= again) && !self.receiving.contains_key(id) {
                self.asked.insert(id.clone(), Instant::now());
                self.put(ManifestWanted {
                    manifest_id: id.clone(),
                });
            }
        }
        self.asked.retain(|id, _| wanted.contains(id));
        !wanted.is_empty()
    }

    fn take(&mut self, frame: LinkFrame) -> anyhow::Result<()> {
        let links = &self.shared.links;
        match frame {
            LinkFrame::Ping(ping) => self.put(Pong { nonce: ping.nonce }),
            LinkFrame::Pong(_) | LinkFrame::Unsupported(_) => {}
            LinkFrame::ReportStored(stored) => self.shared.stored(&Key {
                task_id: stored.task_id,
                order: stored.order,
            }),
            LinkFrame::ManifestPart(part) => self.part(part)?,
            LinkFrame::SwarmPeers(peers) => {
                let mut known = links.known.lock();
                if known.len() >= MAX_SWARMS && !known.contains_key(&peers.manifest_id) {
                    bail!("the server tells of more than {MAX_SWARMS} swarms");
                }
                known.insert(peers.manifest_id.clone(), peers.clone());
                drop(known);
                links.begin(self.server, &peers.manifest_id);
                // Nobody may be there yet; then it is found among what is known.
                links.news.send(SwarmNews::Peers(peers)).ok();
            }
            LinkFrame::SwarmOver(over) => {
                let mut ended = links.over.lock();
                if ended.len() >= MAX_SWARMS {
                    // Those that matter were heard when they came; the server repeats what is asked about.
                    ended.clear();
                }
                ended.insert((self.server.to_owned(), over.manifest_id.clone()));
                drop(ended);
                let server = self.server.to_owned();
                links.news.send(SwarmNews::Over(server, over.manifest_id)).ok();
            }
            LinkFrame::Order(order) => {
                let shared = Arc::clone(self.shared);
                let taking = async move {
                    // It is reported over the link.
                    drop(shared.order(order).await);
                };
                self.shared.life.spawn_contained("file order over the link", taking);
            }
            LinkFrame::ManifestWanted(wanted) => self.wanted(&wanted.manifest_id),
            LinkFrame::Goodbye(bye) => bail!("the server said goodbye: {}", bye.reason),
            LinkFrame::Unknown { kind, .. } => self.put(Unsupported { kind: kind.into() }),
            other @ (LinkFrame::Hello(_) | LinkFrame::Welcome(_) | LinkFrame::Report(_)) => {
                bail!("a server does not send frames of kind {}", other.kind());
            }
        }
        Ok(())
    }

    /// The server has not, or no longer, the manifest of a source: its report is repeated with it.
    fn wanted(&mut self, id: &Bytes) {
        for cell in self.shared.linked_to(self.server) {
            if cell.report().is_some_and(|report| report.manifest_id == *id) {
                self.sent.remove(&cell.key);
            }
        }
    }

    /// A part of a manifest that somebody waits for.
    fn part(&mut self, part: ManifestPart) -> anyhow::Result<()> {
        let links = &self.shared.links;
        let waited = links
            .wanted
            .lock()
            .get(self.server)
            .is_some_and(|ids| ids.contains(&part.manifest_id));
        if !waited {
            return Ok(());
        }
        if part.total > MAX_MANIFEST || self.receiving.len() >= MAX_RECEIVING {
            bail!("a manifest of {} bytes can't be taken", part.total);
        }
        let receiving = self
            .receiving
            .entry(part.manifest_id.clone())
            .or_insert_with(|| Receiving {
                total: part.total,
                data: BytesMut::new(),
            });
        let here = receiving.data.len() as u64;
        if receiving.total != part.total || here != part.offset || here + part.data.len() as u64 > part.total {
            bail!("parts of a manifest came out of order");
        }
        receiving.data.extend_from_slice(&part.data);
        if (receiving.data.len() as u64) < receiving.total {
            return Ok(());
        }
        let Some(whole) = self.receiving.remove(&part.manifest_id) else {
            return Ok(());
        };
        let data = whole.data.freeze();
        if Sha256::digest(&data)[..] != part.manifest_id[..] {
            bail!("a manifest is not the one that was asked for");
        }
        if let Some(ids) = links.wanted.lock().get_mut(self.server) {
            ids.remove(&part.manifest_id);
        }
        links.news.send(SwarmNews::Manifest(part.manifest_id, data)).ok();
        Ok(())
    }
}
