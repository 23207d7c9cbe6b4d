//! One link: hello and welcome, then batches in and acknowledgements out.
//!
//! Batches of a link are handed to sinks in their order. A link holds at most its window in memory, all links together what
//! `link.memory_bytes` says; beyond either nothing is read, so that the sender keeps the rest on its disk.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use gse_core::tls::{PeerIdentity, Role};
use gse_proto::data::{Batch, BatchAck, Compression, DataHello, DataWelcome};
use gse_proto::datalink::{DataFrame, MAX_BODY, MAX_MESSAGE, PING_MS, PROTOCOL};
use gse_proto::frame::{HELLO_MAX_MESSAGE, announced_len};
use gse_proto::ids::AgentId;
use gse_proto::session::{Goodbye, Ping, Pong, Unsupported};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout, timeout_at};

use super::STOPPING;
use super::book::{Arrived, Book, Ticket};
use crate::Node;
use crate::router;

/// Read from the socket at a time.
const READ: usize = 64 << 10;
/// Bodies up to this are decompressed where they are; longer ones on a thread that may block.
const SMALL: usize = 1 << 20;
/// Between two looks of a stopping server.
const STEP: Duration = Duration::from_millis(20);
/// Answers that wait to be written.
const ANSWERS: usize = 16;

/// Serves one sender.
pub(super) async fn run<S>(node: Arc<Node>, stream: S, peer: SocketAddr, identity: PeerIdentity, deadline: Instant)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut buffer = BytesMut::new();
    let hello = match timeout_at(deadline, take(&mut reader, &mut buffer, HELLO_MAX_MESSAGE)).await {
        Ok(Ok(Some(DataFrame::Hello(hello)))) => hello,
        other => {
            node.metrics.link_refused("hello");
            return tracing::debug!(%peer, failed = ?other.err(), "a link without a hello");
        }
    };
    let sender = match admit(&node, &hello, &identity) {
        Ok(sender) => sender,
        Err(reason) => {
            node.metrics.link_refused("identity");
            tracing::warn!(%peer, reason, "a link is refused");
            let frame = DataFrame::from(Goodbye {
                reason,
                stopping: false,
                ..Goodbye::default()
            });
            // It is closed anyway.
            timeout_at(deadline, send(&mut writer, &frame)).await.ok();
            return;
        }
    };
    let book = node.books.open(&sender, &hello.spool_id);
    let (link, acked) = book.take();
    let config = &node.config.link;
    let zstd = config.compress && hello.compressions.contains(&(Compression::Zstd as i32));
    let welcome = DataFrame::from(DataWelcome {
        protocol: PROTOCOL,
        server_id: node.config.node_id.clone(),
        server_time_ms: node.clock.unix_ms(),
        acked,
        compression: if zstd { Compression::Zstd } else { Compression::None } as i32,
        window_batches: config.window_batches,
        window_bytes: config.window_bytes as u64,
        servers: config.advertise.clone(),
    });
    if !matches!(timeout_at(deadline, send(&mut writer, &welcome)).await, Ok(Ok(()))) {
        return tracing::debug!(%peer, "a link that does not take its welcome");
    }
    node.metrics.links.inc();
    tracing::debug!(sender, %peer, acked, "link opened");
    let (answers, outgoing) = mpsc::channel(ANSWERS);
    let mut conn = Conn {
        node: Arc::clone(&node),
        book: Arc::clone(&book),
        link,
        answers,
        window: Arc::new(Semaphore::new(config.window_bytes / 1024)),
    };
    let end = tokio::select! {
        ended = conn.read(reader, buffer) => ended.err().map(|error| error.to_string()),
        ended = write(writer, outgoing, &node, &book, link, acked) => ended.err().map(|error| error.to_string()),
    };
    node.metrics.links.dec();
    tracing::debug!(sender, %peer, reason = end.as_deref().unwrap_or("done"), "link ended");
}

/// Who it is, or why not.
fn admit(node: &Node, hello: &DataHello, identity: &PeerIdentity) -> Result<String, String> {
    if hello.protocol == 0 {
        return Err("the hello names no version of the protocol".into());
    }
    if hello.spool_id.len() != 16 {
        return Err("the hello's spool id has not 16 bytes".into());
    }
    if identity.role == Role::Server {
        return Ok(String::new());
    }
    let agent = AgentId::parse(&hello.agent_id).map_err(|error| format!("agent id: {error}"))?;
    match identity.id.as_deref() {
        Some(id) if id == agent.as_str() => Ok(agent.as_str().to_owned()),
        None if node.config.link.allow_shared_certificate => Ok(agent.as_str().to_owned()),
        None => Err("the certificate is shared by the fleet; this site asks for one that names the agent".into()),
        Some(id) => Err(format!("the certificate is for agent {id}, not {agent}")),
    }
}

/// The next frame; `None` at the end of the stream.
async fn take<R: AsyncRead + Unpin>(
    reader: &mut R,
    buffer: &mut BytesMut,
    longest: usize,
) -> io::Result<Option<DataFrame>> {
    loop {
        if let Some(frame) = DataFrame::take(buffer, longest).map_err(io::Error::other)? {
            return Ok(Some(frame));
        }
        // A long frame is made room for once. What it says of its length was bounded by the line before.
        let missing = announced_len(buffer).map_or(0, |whole| whole.saturating_sub(buffer.len()));
        buffer.reserve(missing.clamp(READ, READ * 16));
        if reader.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

async fn send<W: AsyncWrite + Unpin>(writer: &mut W, frame: &DataFrame) -> io::Result<()> {
    writer.write_all(&frame.to_bytes()).await?;
    writer.flush().await
}

/// Writes acknowledgements and answers until the link is to end.
async fn write<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut outgoing: mpsc::Receiver<DataFrame>,
    node: &Node,
    book: &Book,
    link: u64,
    mut told: u64,
) -> io::Result<()> {
    let stall = Duration::from_millis(node.config.link.write_stall_ms);
    let mut nonce = 0;
    let (mut stopping, mut end) = (false, Instant::now());
    loop {
        let frame = tokio::select! {
            acked = book.next(link, told) => {
                let Some(acked) = acked else {
                    return Err(io::Error::other("the sender's sequence is taken up by another link, or has to be sent again"));
                };
                told = acked;
                BatchAck { seq: acked }.into()
            }
            answer = outgoing.recv() => match answer {
                // Told again: whoever sends a batch again has not heard it.
                Some(DataFrame::Ack(_)) => BatchAck { seq: told }.into(),
                Some(frame) => frame,
                None => return Ok(()),
            },
            () = tokio::time::sleep(STEP), if stopping => continue,
            () = tokio::time::sleep(Duration::from_millis(PING_MS)), if !stopping => {
                // While there is no memory for more nothing is read; the sender sees that somebody is there.
                nonce += 1;
                Ping { nonce }.into()
            }
            () = node.life.draining(), if !stopping => {
                stopping = true;
                end = Instant::now() + STOPPING;
                continue;
            }
            () = tokio::time::sleep(Duration::from_millis(10)), if stopping && (book.is_idle() || Instant::now() >= end) => {
                let goodbye = Goodbye { reason: "the server is stopping".into(), ..Goodbye::default() };
                return timeout(stall, send(&mut writer, &goodbye.into())).await?;
            }
        };
        timeout(stall, send(&mut writer, &frame)).await??;
    }
}

struct Conn {
    node: Arc<Node>,
    book: Arc<Book>,
    link: u64,
    answers: mpsc::Sender<DataFrame>,
    window: Arc<Semaphore>,
}

impl Conn {
    async fn read<R: AsyncRead + Unpin>(&mut self, mut reader: R, mut buffer: BytesMut) -> io::Result<()> {
        let silence = Duration::from_millis(self.node.config.link.silence_ms);
        let mut zstd = zstd::bulk::Decompressor::new()?;
        loop {
            let next = tokio::select! {
                next = timeout(silence, take(&mut reader, &mut buffer, MAX_MESSAGE)) => next??,
                // What was taken in is still acknowledged; the writing side ends the link.
                () = self.node.life.draining() => return std::future::pending().await,
            };
            let Some(frame) = next else { return Ok(()) };
            match frame {
                DataFrame::Batch(batch) => self.batch(batch, &mut zstd).await?,
                DataFrame::Ping(ping) => self.answer(Pong { nonce: ping.nonce }).await,
                DataFrame::Pong(_) | DataFrame::Unsupported(_) => {}
                DataFrame::Goodbye(_) => return Ok(()),
                other => {
                    let kind = other.kind().into();
                    self.answer(Unsupported { kind }).await;
                }
            }
        }
    }

    async fn answer(&self, frame: impl Into<DataFrame>) {
        // The other end is in the same task; when it is gone so is the link.
        self.answers.send(frame.into()).await.ok();
    }

    async fn batch(&mut self, batch: Batch, zstd: &mut zstd::bulk::Decompressor<'static>) -> io::Result<()> {
        let node = &self.node;
        let plain = batch.plain_len as usize;
        if plain > MAX_BODY {
            return Err(io::Error::other(format!(
                "batch {} would have {plain} bytes, at most {MAX_BODY} are taken",
                batch.seq
            )));
        }
        match self.book.arrived(self.link, batch.seq) {
            Arrived::New => {}
            Arrived::Known => {
                node.metrics.repeated.inc();
                self.answer(BatchAck { seq: batch.seq }).await;
                return Ok(());
            }
            Arrived::Over => return Err(io::Error::other("the link's place is taken")),
        }
        let share = u32::try_from(plain.div_ceil(1024)).unwrap_or(u32::MAX);
        let (seq, claimed) = (batch.seq, u64::from(batch.records));
        // Made first: whatever fails from here on has the batch sent again.
        let ticket = Ticket::new(Arc::clone(&self.book), seq);
        for places in [&self.window, &node.memory] {
            let place = Arc::clone(places).acquire_many_owned(share).await;
            ticket.hold(place.map_err(io::Error::other)?);
        }
        let body = open(batch, zstd).await?;
        let sorted = router::sort(&node.router.plan(), &node.stats, &node.tails, &body).map_err(io::Error::other)?;
        if sorted.records != claimed {
            tracing::debug!(
                seq,
                claimed,
                found = sorted.records,
                "a batch says another number of records"
            );
        }
        node.metrics.batches.inc();
        node.metrics.records.inc_by(sorted.records);
        node.metrics.bytes.inc_by(sorted.bytes);
        router::hand_over(sorted, &ticket).await;
        ticket.settle();
        Ok(())
    }
}

/// The body of a batch as it was before compression.
async fn open(batch: Batch, zstd: &mut zstd::bulk::Decompressor<'static>) -> io::Result<Bytes> {
    let plain = batch.plain_len as usize;
    let wrong = |text: String| io::Error::other(format!("batch {}: {text}", batch.seq));
    let body = match Compression::try_from(batch.compression) {
        Ok(Compression::None) => batch.body,
        Ok(Compression::Zstd) => {
            let body = if plain <= SMALL {
                zstd.decompress(&batch.body, plain)
            } else {
                let packed = batch.body;
                tokio::task::spawn_blocking(move || zstd::bulk::decompress(&packed, plain))
                    .await
                    .map_err(io::Error::other)?
            };
            Bytes::from(body.map_err(|error| wrong(format!("it does not decompress: {error}")))?)
        }
        Err(_) => return Err(wrong(format!("compression {} is not known", batch.compression))),
    };
    if body.len() != plain {
        return Err(wrong(format!("it has {} bytes and says {plain}", body.len())));
    }
    Ok(body)
}
