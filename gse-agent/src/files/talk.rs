//! What is said on one connection of a link, from the welcome to its end: reports and pings out, acknowledgements, manifests, peers and
//! orders in. Making the connection, and keeping it for as long as it is needed, is [`super::link`]'s.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use gse_proto::file::{ManifestPart, ManifestWanted, Report};
use gse_proto::link::{LinkFrame, MAX_MANIFEST, MAX_MESSAGE, PART, PING_MS};
use gse_proto::session::{Goodbye, Ping, Pong, Unsupported};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};

use super::cell::{Cell, Key, is_final};
use super::link::SwarmNews;
use super::orders::Shared;

/// Room for what the next read brings.
const READ_AHEAD: usize = 16 << 10;
/// A write that makes no progress for so long ends the link.
const WRITE_STALL: Duration = Duration::from_secs(30);
/// Swarms that are remembered.
const MAX_SWARMS: usize = 20_000;
/// Manifests that are being received at once.
const MAX_RECEIVING: usize = 64;

/// A manifest that comes in parts.
#[derive(Debug)]
struct Receiving {
    total: u64,
    data: BytesMut,
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

/// Talks until the connection ends; ends well when it was not needed for a while.
pub(super) async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
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
                ..Goodbye::default()
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
            other @ (LinkFrame::Hello(_)
            | LinkFrame::Welcome(_)
            | LinkFrame::Report(_)
            | LinkFrame::RelayOrder(_)
            | LinkFrame::RelayState(_)) => {
                bail!("a server does not send an agent frames of kind {}", other.kind());
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
