//! One link, of an agent or a relay: hello and welcome, then frames both ways until either side has nothing left to do.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use gse_core::tls::{PeerIdentity, Role};
use gse_proto::file::{LinkHello, LinkWelcome, ManifestPart, Report, ReportStored};
use gse_proto::frame::HELLO_MAX_MESSAGE;
use gse_proto::ids::AgentId;
use gse_proto::link::{LinkFrame, MAX_MANIFEST, MAX_MESSAGE, PART, PROTOCOL};
use gse_proto::session::{Goodbye, Pong, Unsupported};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::At;
use crate::swarm::{self, ManifestId};
use crate::task::engine::{self, Answer};
use crate::task::orders;
use crate::zone::Reach;
use crate::{Node, peer, relay};

/// Manifests that one link sends at the same time at most.
const ASSEMBLIES: usize = 8;
/// Read from the socket at a time.
const READ: usize = 64 << 10;
/// Frames are gathered up to this before they are written.
const WRITE: usize = 256 << 10;

/// A manifest as it arrives.
struct Assembly {
    total: u64,
    data: BytesMut,
    /// Its share of what all links together may take.
    _room: OwnedSemaphorePermit,
}

/// Who is at the other end.
#[derive(Debug, Clone)]
enum Party {
    Agent(AgentId),
    /// By its name as a member of swarms.
    Relay(String),
}

impl Party {
    fn name(&self) -> &str {
        match self {
            Self::Agent(agent) => agent.as_str(),
            Self::Relay(name) => name,
        }
    }
}

/// Serves one agent or relay.
pub(super) async fn run<S>(node: Arc<Node>, stream: S, peer: SocketAddr, identity: PeerIdentity, deadline: Instant)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut buffer = BytesMut::new();
    let hello = match timeout_at(deadline, take(&mut reader, &mut buffer, HELLO_MAX_MESSAGE)).await {
        Ok(Ok(Some(LinkFrame::Hello(hello)))) => hello,
        Ok(Ok(_)) | Err(_) => {
            node.metrics.link_refused("hello");
            return tracing::debug!(%peer, "a link without a hello");
        }
        Ok(Err(error)) => {
            node.metrics.link_refused("hello");
            return tracing::debug!(%peer, %error, "a link without a hello");
        }
    };
    let party = match admit(&node, &hello, &identity) {
        Ok(party) => party,
        Err(reason) => {
            node.metrics.link_refused("identity");
            tracing::warn!(%peer, reason, "a link is refused");
            let frame = LinkFrame::from(Goodbye {
                reason,
                stopping: false,
                ..Goodbye::default()
            });
            // It is closed anyway.
            timeout_at(deadline, send(&mut writer, &[frame])).await.ok();
            return;
        }
    };
    let (frames, outgoing) = mpsc::channel(node.config.link.queue);
    let over = CancellationToken::new();
    let at = match &hello.relay {
        Some(relay) => At::Relay(Reach {
            zone: relay.zone.as_str().into(),
            inner: hello.peer_addresses.clone(),
            outer: relay.outer_addresses.clone(),
        }),
        None => At::Agent(hello.cloud_area, hello.peer_addresses.clone()),
    };
    let name = party.name().to_owned();
    let number = node.links.open(&name, frames.clone(), at, over.clone());
    node.metrics.links.inc();
    tracing::debug!(agent = name, %peer, "link opened");
    let welcome = LinkWelcome {
        protocol: PROTOCOL,
        server_id: node.config.node_id.clone(),
        server_time_ms: node.clock.unix_ms(),
    };
    // There is room: it is the first.
    frames.try_send(welcome.into()).ok();
    match &party {
        Party::Agent(agent) => {
            for id in node.swarms.of(agent.as_str()) {
                node.tell_peers(&id, agent);
            }
        }
        Party::Relay(_) => {
            // It has said in the store for which zone, before it came here.
            node.others.forget().await;
            node.swarms.relay_came(&name);
            relay::changed(&node);
        }
    }
    let mut conn = Conn {
        node: Arc::clone(&node),
        party: party.clone(),
        frames,
        assemblies: BTreeMap::new(),
    };
    let stall = Duration::from_millis(node.config.link.write_stall_ms);
    let end = tokio::select! {
        ended = conn.read(reader, buffer) => ended.err().map(|error| error.to_string()),
        ended = write(writer, outgoing, stall, &node, &over) => ended.err().map(|error| error.to_string()),
    };
    let gone = node.links.close(&name, number);
    if gone && matches!(party, Party::Relay(_)) {
        node.swarms.relay_gone(&name);
        relay::changed(&node);
    }
    node.metrics.links.dec();
    tracing::debug!(agent = name, %peer, reason = end.as_deref().unwrap_or("done"), "link ended");
}

/// Who it is, or why not.
fn admit(node: &Node, hello: &LinkHello, identity: &PeerIdentity) -> Result<Party, String> {
    if hello.protocol == 0 {
        return Err("the hello names no version of the protocol".into());
    }
    if hello.relay.is_some() {
        if identity.role != Role::Server {
            return Err("a relay shows a server's certificate".into());
        }
        let name = hello.agent_id.as_str();
        let is_name = peer::instance_of(name).is_some_and(|id| id != node.config.node_id);
        return match is_name {
            true => Ok(Party::Relay(name.to_owned())),
            false => Err("a relay is called by the name of another instance of gse_btsvr".into()),
        };
    }
    if identity.role != Role::Agent {
        return Err("the certificate is not an agent's".into());
    }
    let agent = AgentId::parse(&hello.agent_id).map_err(|error| format!("agent id: {error}"))?;
    match identity.id.as_deref() {
        Some(id) if id == agent.as_str() => Ok(Party::Agent(agent)),
        None if node.config.link.allow_shared_certificate => Ok(Party::Agent(agent)),
        None => Err("the certificate is shared by the fleet; this site asks for one that names the agent".into()),
        Some(id) => Err(format!("the certificate is for agent {id}, not {agent}")),
    }
}

/// The next frame; `None` at the end of the stream.
async fn take<R: AsyncRead + Unpin>(
    reader: &mut R,
    buffer: &mut BytesMut,
    longest: usize,
) -> io::Result<Option<LinkFrame>> {
    loop {
        if let Some(frame) = LinkFrame::take(buffer, longest).map_err(io::Error::other)? {
            return Ok(Some(frame));
        }
        buffer.reserve(READ);
        if reader.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

async fn send<W: AsyncWrite + Unpin>(writer: &mut W, frames: &[LinkFrame]) -> io::Result<()> {
    let mut out = BytesMut::new();
    for frame in frames {
        frame.encode(0, &mut out);
    }
    writer.write_all(&out).await?;
    writer.flush().await
}

/// Writes what is queued until the link is to end.
async fn write<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut outgoing: mpsc::Receiver<LinkFrame>,
    stall: Duration,
    node: &Node,
    over: &CancellationToken,
) -> io::Result<()> {
    let mut out = BytesMut::new();
    loop {
        let frame = tokio::select! {
            () = over.cancelled() => return Ok(()),
            () = node.life.draining() => {
                let reason = "the server is stopping".to_owned();
                return timeout(stall, send(&mut writer, &[Goodbye {
                reason,
                stopping: false,
                ..Goodbye::default()
            }.into()])).await?;
            }
            frame = outgoing.recv() => frame,
        };
        let Some(frame) = frame else { return Ok(()) };
        frame.encode(0, &mut out);
        while out.len() < WRITE
            && let Ok(frame) = outgoing.try_recv()
        {
            frame.encode(0, &mut out);
        }
        timeout(stall, async {
            writer.write_all(&out).await?;
            writer.flush().await
        })
        .await??;
        out.clear();
        if out.capacity() > 2 * WRITE {
            out = BytesMut::new();
        }
    }
}

struct Conn {
    node: Arc<Node>,
    party: Party,
    frames: mpsc::Sender<LinkFrame>,
    assemblies: BTreeMap<ManifestId, Assembly>,
}

impl Conn {
    async fn read<R: AsyncRead + Unpin>(&mut self, mut reader: R, mut buffer: BytesMut) -> io::Result<()> {
        let silence = Duration::from_millis(self.node.config.link.silence_ms);
        loop {
            let Some(frame) = timeout(silence, take(&mut reader, &mut buffer, MAX_MESSAGE)).await?? else {
                return Ok(());
            };
            match frame {
                LinkFrame::Ping(ping) => self.answer(Pong { nonce: ping.nonce }).await,
                LinkFrame::Pong(_) | LinkFrame::Unsupported(_) => {}
                LinkFrame::Goodbye(_) => return Ok(()),
                LinkFrame::Report(report) if self.is_agent() => self.report(&report).await,
                LinkFrame::ManifestPart(part) if self.is_agent() => self.part(part)?,
                LinkFrame::RelayState(state) if !self.is_agent() => relay::heard(&self.node, self.party.name(), &state),
                LinkFrame::ManifestWanted(wanted) => self.manifest(&wanted.manifest_id).await,
                other => {
                    self.answer(Unsupported {
                        kind: other.kind().into(),
                    })
                    .await
                }
            }
        }
    }

    fn is_agent(&self) -> bool {
        matches!(self.party, Party::Agent(_))
    }

    async fn answer(&self, frame: impl Into<LinkFrame>) {
        // The other end is in the same task; when it is gone so is the link.
        self.frames.send(frame.into()).await.ok();
    }

    async fn report(&self, report: &Report) {
        let Party::Agent(agent) = &self.party else { return };
        match engine::report(&self.node, agent, report) {
            Answer::Noted => {}
            Answer::Stored => {
                let (task_id, order) = (report.task_id.clone(), report.order);
                self.answer(ReportStored { task_id, order }).await;
            }
            Answer::Unwanted => {
                let servers = self.node.link_addresses();
                let order = match self.node.transfers.get(&report.task_id) {
                    Some(cell) => orders::cancel(&cell.header, &servers, report.order),
                    None => orders::cancel_forgotten(&report.task_id, &servers, report.order),
                };
                self.answer(order).await;
            }
            Answer::ManifestMissing => {
                let manifest_id = report.manifest_id.clone();
                self.answer(gse_proto::file::ManifestWanted { manifest_id }).await;
            }
        }
    }

    /// A part of a manifest from its source.
    fn part(&mut self, part: ManifestPart) -> io::Result<()> {
        let wrong = |text: &str| io::Error::other(format!("manifest part: {text}"));
        let id = swarm::manifest_id(&part.manifest_id).ok_or_else(|| wrong("the id has not 32 bytes"))?;
        if part.offset == 0 {
            let most = MAX_MANIFEST.min(self.node.config.link.incoming_bytes as u64);
            if part.total > most {
                return Err(wrong(&format!(
                    "the manifest has {} bytes, at most {most} are taken",
                    part.total
                )));
            }
            if !self.assemblies.contains_key(&id) && self.assemblies.len() >= ASSEMBLIES {
                return Err(wrong("too many manifests at the same time"));
            }
            self.assemblies.remove(&id);
            let share = u32::try_from(part.total.div_ceil(1024)).unwrap_or(u32::MAX);
            let room = Arc::clone(&self.node.incoming).try_acquire_many_owned(share);
            let assembly = Assembly {
                total: part.total,
                data: BytesMut::new(),
                // The agent comes again, after a pause.
                _room: room.map_err(|_| wrong("too much is on its way already (link.incoming_bytes)"))?,
            };
            self.assemblies.insert(id, assembly);
        }
        let Some(assembly) = self.assemblies.get_mut(&id) else {
            return Err(wrong("it does not follow on anything"));
        };
        if part.offset != assembly.data.len() as u64 || part.offset + part.data.len() as u64 > assembly.total {
            return Err(wrong("parts are not in order"));
        }
        assembly.data.extend_from_slice(&part.data);
        if assembly.data.len() as u64 == assembly.total {
            let manifest = self
                .assemblies
                .remove(&id)
                .map_or_else(Bytes::new, |assembly| assembly.data.freeze());
            if <[u8; 32]>::from(Sha256::digest(&manifest)) != id {
                return Err(wrong("the manifest is not the one that its id names"));
            }
            self.node.manifests.insert(id, manifest);
        }
        Ok(())
    }

    /// Sends a manifest, if the agent takes part in its swarm.
    async fn manifest(&self, id: &Bytes) {
        let manifest = swarm::manifest_id(id).and_then(|id| self.node.swarms.manifest(&id, self.party.name()));
        let Some(manifest) = manifest else {
            return tracing::debug!(
                agent = self.party.name(),
                "an agent asks for a manifest that it does not need"
            );
        };
        let total = manifest.len() as u64;
        for offset in (0..manifest.len().max(1)).step_by(PART) {
            let end = (offset + PART).min(manifest.len());
            let part = ManifestPart {
                manifest_id: id.clone(),
                offset: offset as u64,
                total,
                data: manifest.slice(offset..end),
            };
            self.answer(part).await;
        }
    }
}
