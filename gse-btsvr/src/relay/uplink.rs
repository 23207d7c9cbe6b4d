//! A relay's connections to the instances that it works for: it finds them in the store, dials the listener for links of each, and says
//! where it is. Orders, manifests and peers come in, its state goes out.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use dashmap::DashMap;
use gse_core::tls::{self, Role};
use gse_proto::file::{LinkHello, ManifestPart, RelayHello, RelayOrder};
use gse_proto::link::{LinkFrame, MAX_MANIFEST, MAX_MESSAGE, PING_MS, PROTOCOL};
use gse_proto::session::{Ping, Pong, Unsupported};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::ordered;
use crate::peer::Word;
use crate::swarm::{self, ManifestId};
use crate::{Node, instance};

/// Between two looks at which instances there are.
const LOOK: Duration = Duration::from_secs(2);
/// Pause between two tries, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Manifests that come at the same time at most.
const MANIFESTS: usize = 64;
/// Orders that wait for their manifests at most; the others are repeated.
const WAITING: usize = 10_000;
/// Room for what the next read brings.
const READ: usize = 64 << 10;

/// Connections, by the name of the instance.
#[derive(Debug, Default)]
pub struct Uplinks {
    table: DashMap<String, mpsc::Sender<LinkFrame>>,
}

impl Uplinks {
    /// Sends a frame, if there is a connection; what does not get through is said again with the next order.
    pub(super) fn send(&self, instance: &str, frame: LinkFrame) {
        if let Some(frames) = self.table.get(instance)
            && frames.try_send(frame).is_err()
        {
            tracing::debug!(instance, "an instance takes nothing from this relay at present");
        }
    }
}

/// Keeps a connection to each other instance, if this one is a relay.
pub async fn keep(node: Arc<Node>) {
    if !node.config.zone.relay || node.peer.is_none() {
        return;
    }
    let mut kept: BTreeMap<String, (String, CancellationToken)> = BTreeMap::new();
    // Whoever is dialled looks there for the zone.
    while let Err(error) = instance::renew(&node).await {
        tracing::debug!(%error, "this relay can't say which zone it serves");
        tokio::select! {
            () = node.life.draining() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    loop {
        match node.others.all(node.store.raw()).await {
            Ok(table) => {
                let others: BTreeMap<String, String> = table
                    .values()
                    .filter(|info| info.node_id != node.config.node_id)
                    .filter_map(|info| Some((info.node_id.clone(), info.agents.first()?.clone())))
                    .collect();
                kept.retain(|id, (address, over)| {
                    let stays = others.get(id) == Some(address);
                    if !stays {
                        over.cancel();
                    }
                    stays
                });
                for (id, address) in others {
                    if let Entry::Vacant(place) = kept.entry(id) {
                        let over = CancellationToken::new();
                        let work = reach(Arc::clone(&node), place.key().clone(), address.clone(), over.clone());
                        node.life.spawn_contained("uplink", work);
                        place.insert((address, over));
                    }
                }
            }
            Err(error) => tracing::debug!(%error, "other instances can't be read; those that are known stay"),
        }
        tokio::select! {
            () = node.life.draining() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Keeps the connection to one instance until it is gone.
async fn reach(node: Arc<Node>, instance: String, address: String, over: CancellationToken) {
    let mut pause = PAUSE.0;
    loop {
        let begun = Instant::now();
        let ended = tokio::select! {
            () = node.life.draining() => return,
            () = over.cancelled() => return,
            ended = serve(&node, &instance, &address) => ended,
        };
        if begun.elapsed() > Duration::from_secs(10) {
            pause = PAUSE.0;
        }
        let error = ended
            .err()
            .map_or_else(|| "it closed the connection".to_owned(), |error| format!("{error:#}"));
        tracing::info!(
            instance,
            address,
            error,
            pause_ms = pause.as_millis() as u64,
            "no uplink"
        );
        tokio::select! {
            () = node.life.draining() => return,
            () = over.cancelled() => return,
            () = tokio::time::sleep(pause / 2 + node.random.up_to(pause / 2)) => {}
        }
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// Takes itself out of the table again, counts while it lives.
struct Listed<'a> {
    node: &'a Node,
    instance: &'a str,
    frames: mpsc::Sender<LinkFrame>,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        let table = &self.node.relays.uplinks.table;
        table.remove_if(self.instance, |_, frames| frames.same_channel(&self.frames));
        self.node.metrics.uplinks.dec();
    }
}

/// One connection, from its hello to its end.
async fn serve(node: &Arc<Node>, instance: &str, address: &str) -> anyhow::Result<()> {
    let limit = Duration::from_millis(node.config.link.hello_timeout_ms);
    let stream = timeout(limit, connect(node, address)).await.context("not in time")??;
    let (mut from, mut to) = tokio::io::split(stream);
    let (frames, mut outgoing) = mpsc::channel(node.config.link.queue);
    node.relays.uplinks.table.insert(instance.to_owned(), frames.clone());
    node.metrics.uplinks.inc();
    let _listed = Listed {
        node,
        instance,
        frames: frames.clone(),
    };
    let stall = Duration::from_millis(node.config.link.write_stall_ms);
    let writing = async {
        let mut out = BytesMut::new();
        loop {
            let frame: LinkFrame = tokio::select! {
                frame = outgoing.recv() => match frame {
                    Some(frame) => frame,
                    None => return anyhow::Ok(()),
                },
                () = tokio::time::sleep(Duration::from_millis(PING_MS)) => Ping { nonce: 1 }.into(),
            };
            frame.encode(0, &mut out);
            timeout(stall, async {
                to.write_all(&out).await?;
                to.flush().await
            })
            .await
            .context("it takes nothing")?
            .context("cannot send")?;
            out.clear();
        }
    };
    let reading = async {
        let mut inbox = Inbox {
            node,
            instance,
            waiting: BTreeMap::new(),
            coming: BTreeMap::new(),
        };
        let mut buffer = BytesMut::new();
        let silence = Duration::from_millis(3 * PING_MS);
        loop {
            while let Some(frame) = LinkFrame::take(&mut buffer, MAX_MESSAGE)? {
                match frame {
                    LinkFrame::Ping(ping) => {
                        frames.try_send(Pong { nonce: ping.nonce }.into()).ok();
                    }
                    LinkFrame::Welcome(_) | LinkFrame::Pong(_) | LinkFrame::Unsupported(_) => {}
                    LinkFrame::Goodbye(bye) => bail!("it said goodbye: {}", bye.reason),
                    frame => {
                        if let Some(kind) = inbox.take(frame)? {
                            frames.try_send(Unsupported { kind }.into()).ok();
                        }
                    }
                }
            }
            buffer.reserve(READ);
            let read = timeout(silence, from.read_buf(&mut buffer)).await;
            if read.context("nothing was heard of it")?.context("cannot receive")? == 0 {
                return anyhow::Ok(());
            }
        }
    };
    tokio::select! {
        ended = writing => ended,
        ended = reading => ended,
    }
}

async fn connect(node: &Node, address: &str) -> anyhow::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let files = node.config.link.tls.clone().context("link.tls is not set")?;
    let tls = tokio::task::spawn_blocking(move || tls::client_config(&files, Role::Server, &[]))
        .await
        .context("reading certificates")??;
    let socket = TcpStream::connect(address).await.context("cannot connect")?;
    socket.set_nodelay(true).context("cannot set TCP_NODELAY")?;
    let mut stream = TlsConnector::from(tls)
        .connect(tls::server_name(), socket)
        .await
        .context("TLS handshake")?;
    let peer = node.peer.as_ref().context("this instance has no cache")?;
    let hello = LinkFrame::from(LinkHello {
        protocol: PROTOCOL,
        agent_id: peer.name().to_owned(),
        peer_addresses: peer.addresses().to_vec(),
        cloud_area: 0,
        relay: Some(RelayHello {
            zone: node.config.zone.name.clone(),
            outer_addresses: node.config.zone.advertise.clone(),
        }),
    });
    stream
        .write_all(&hello.to_bytes())
        .await
        .context("cannot send the hello")?;
    stream.flush().await.context("cannot send the hello")?;
    Ok(stream)
}

/// A manifest as it arrives.
struct Coming {
    total: u64,
    data: BytesMut,
}

/// What one instance says.
struct Inbox<'a> {
    node: &'a Arc<Node>,
    instance: &'a str,
    /// Orders whose manifests are not here.
    waiting: BTreeMap<ManifestId, RelayOrder>,
    coming: BTreeMap<ManifestId, Coming>,
}

impl Inbox<'_> {
    /// Takes a frame; its kind if it is none that an instance sends to a relay.
    fn take(&mut self, frame: LinkFrame) -> anyhow::Result<Option<u32>> {
        match frame {
            LinkFrame::RelayOrder(order) => self.order(order),
            LinkFrame::SwarmPeers(told) => {
                if let (Some(peer), Some(id)) = (&self.node.peer, swarm::manifest_id(&told.manifest_id)) {
                    peer.want(&id, self.instance, Some(Word::Peers(told)));
                }
            }
            LinkFrame::SwarmOver(over) => {
                if let (Some(peer), Some(id)) = (&self.node.peer, swarm::manifest_id(&over.manifest_id)) {
                    self.waiting.remove(&id);
                    peer.release(&id, self.instance);
                }
            }
            LinkFrame::ManifestPart(part) => self.part(part)?,
            other => return Ok(Some(other.kind().into())),
        }
        Ok(None)
    }

    fn order(&mut self, order: RelayOrder) {
        ordered(self.node, self.instance, &order);
        let Some(id) = swarm::manifest_id(&order.manifest_id) else {
            return;
        };
        if self.node.has_copy(&id) {
            self.waiting.remove(&id);
        } else if self.waiting.len() < WAITING {
            self.waiting.insert(id, order);
        }
    }

    /// A part of a manifest that an order waits for.
    fn part(&mut self, part: ManifestPart) -> anyhow::Result<()> {
        let id = swarm::manifest_id(&part.manifest_id).context("the id of a manifest has not 32 bytes")?;
        if !self.waiting.contains_key(&id) {
            self.coming.remove(&id);
            return Ok(());
        }
        if part.offset == 0 {
            let most = MAX_MANIFEST.min(self.node.config.link.incoming_bytes as u64);
            if part.total > most || self.coming.len() >= MANIFESTS {
                bail!(
                    "a manifest of {} bytes can't be taken (link.incoming_bytes)",
                    part.total
                );
            }
            let data = BytesMut::new();
            self.coming.insert(
                id,
                Coming {
                    total: part.total,
                    data,
                },
            );
        }
        let Some(coming) = self.coming.get_mut(&id) else {
            return Ok(());
        };
        if part.offset != coming.data.len() as u64 || part.offset + part.data.len() as u64 > coming.total {
            // It was asked for twice: what comes first counts.
            return Ok(());
        }
        coming.data.extend_from_slice(&part.data);
        if (coming.data.len() as u64) < coming.total {
            return Ok(());
        }
        let manifest = self
            .coming
            .remove(&id)
            .map_or_else(Bytes::new, |coming| coming.data.freeze());
        if <[u8; 32]>::from(Sha256::digest(&manifest)) != id {
            bail!("a manifest is not the one that its id names");
        }
        self.node.manifests.insert(id, manifest);
        if let Some(order) = self.waiting.remove(&id) {
            ordered(self.node, self.instance, &order);
        }
        Ok(())
    }
}
