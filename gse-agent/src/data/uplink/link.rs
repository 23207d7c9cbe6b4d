//! The link to a server: batches one way, acknowledgements the other. There is one at a time; when it ends the next address is tried, and
//! what was not acknowledged is sent again there.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use gse_core::random::Random;
use gse_core::spool::Entry;
use gse_proto::data::{Batch, Compression};
use gse_proto::datalink::{DataFrame, MAX_MESSAGE};
use gse_proto::frame::put_header;
use gse_proto::session::{Goodbye, Ping, Pong};
use parking_lot::Mutex;
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::Shared;
use super::dial::{Connection, dial};
use super::keeper::Ask;
use crate::config::ReconnectConfig;
use crate::data::flow::Next;
use crate::session::backoff::Backoff;
use crate::session::servers::{self, Servers};

/// What is asked of the spool at once.
const READ_AHEAD: usize = 1 << 20;
/// A server that said good-bye gets so long to acknowledge what it has.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// A link that lasted so long ends a series of failures.
const SETTLED_MS: u64 = 10_000;
/// Bodies that are longer are compressed on another thread.
const COMPRESS_INLINE: usize = 32 << 10;
const BATCH_KIND: u16 = 16;

/// The server knows more of this spool than the spool itself.
#[derive(Debug, thiserror::Error)]
#[error("the server knows of batch {0}, which this agent has not sent; was an older spool put back?")]
struct Foreign(u64);

/// What is on its way on one link.
#[derive(Default)]
struct Flight {
    /// Number and bytes of each batch.
    batches: VecDeque<(u64, u64)>,
    bytes: u64,
    last_read: Option<Instant>,
    pongs: VecDeque<u64>,
    /// The server is going: nothing more is sent.
    leaving: Option<Instant>,
}

/// One link, for its two directions.
struct Link<'a> {
    shared: &'a Shared,
    flight: Mutex<Flight>,
    /// The window has opened, or there is something to answer.
    changed: Notify,
    window_batches: usize,
    window_bytes: u64,
    compression: Compression,
}

/// Keeps a link to one of the servers until the agent ends.
pub(super) async fn keep(shared: Arc<Shared>, mut spool_id: Bytes, ask: mpsc::Sender<Ask>, left: watch::Sender<bool>) {
    let random = Random::system();
    let mut known = Servers::configured(&shared.config.servers);
    known.start_anywhere(&random);
    let mut pauses = Backoff::new(
        &ReconnectConfig {
            min_ms: shared.config.retry_min_ms,
            max_ms: shared.config.retry_max_ms,
            spread_ms: 0,
            settled_ms: SETTLED_MS,
        },
        random,
    );
    let life = shared.life.clone();
    while !life.is_draining() {
        let servers::Next::Try(addresses) = known.round(Instant::now()) else {
            break;
        };
        for address in addresses {
            let begun = Instant::now();
            let dialled = tokio::select! {
                () = life.draining() => break,
                dialled = dial(&shared, &address, spool_id.clone()) => dialled,
            };
            let ended = match dialled {
                Ok(connection) => {
                    known.connected(&address);
                    known.learn(&connection.welcome.servers);
                    shared.health.set("data link", Ok(()));
                    tracing::info!(server = address, "data link");
                    shared.metrics.links.inc();
                    let ended = talk(&shared, connection, &ask).await;
                    shared.metrics.links.dec();
                    known.prefer_others(&address);
                    pauses.session_lasted(begun.elapsed());
                    ended
                }
                Err(error) => Err(error),
            };
            match ended {
                Ok(()) => break,
                Err(error) => {
                    if error.is::<Foreign>() {
                        // Under another name nothing that was sent can be taken for something else; it may come twice.
                        spool_id = Bytes::copy_from_slice(&rand::random::<[u8; 16]>());
                    }
                    shared.metrics.link_failures.inc();
                    shared.health.set("data link", Err(format!("{address}: {error:#}")));
                    tracing::info!(server = address, "data link: {error:#}");
                }
            }
            if life.is_draining() {
                break;
            }
        }
        let pause = pauses.wait();
        tokio::select! {
            () = life.draining() => {}
            () = sleep(pause) => {}
        }
    }
    left.send_replace(true);
    shared.intake.to_keep.notify_one();
}

/// One link from its welcome to its end. Well ended: the server or the agent said so.
async fn talk(shared: &Shared, connection: Connection, ask: &mpsc::Sender<Ask>) -> anyhow::Result<()> {
    let Connection {
        stream,
        buffer,
        welcome,
    } = connection;
    {
        let mut flow = shared.intake.flow.lock();
        if welcome.acked >= flow.next_seq() {
            return Err(Foreign(welcome.acked).into());
        }
        flow.acked(welcome.acked);
    }
    shared.intake.to_keep.notify_one();
    let link = Link {
        shared,
        flight: Mutex::new(Flight {
            last_read: Some(Instant::now()),
            ..Flight::default()
        }),
        changed: Notify::new(),
        window_batches: welcome.window_batches.max(1) as usize,
        window_bytes: welcome.window_bytes.max(1),
        compression: welcome.compression(),
    };
    if link.compression != Compression::None && !shared.config.enable_compression {
        bail!("the server asks for a compression that was not offered");
    }
    let (read, write) = tokio::io::split(stream);
    let sending = link.send(write, ask);
    let reading = link.read(read, buffer);
    tokio::select! {
        ended = sending => ended,
        ended = reading => ended,
    }
}

impl Link<'_> {
    async fn read(&self, mut stream: impl AsyncRead + Unpin, mut buffer: BytesMut) -> anyhow::Result<()> {
        loop {
            let mut acked = None;
            while let Some(frame) = DataFrame::take(&mut buffer, MAX_MESSAGE).context("from the server")? {
                match frame {
                    DataFrame::Ack(ack) => acked = acked.max(Some(ack.seq)),
                    DataFrame::Ping(ping) => {
                        let mut flight = self.flight.lock();
                        if flight.pongs.len() < 8 {
                            flight.pongs.push_back(ping.nonce);
                        }
                        drop(flight);
                        self.changed.notify_one();
                    }
                    DataFrame::Goodbye(bye) => {
                        tracing::info!(reason = bye.reason, "the server of data leaves");
                        self.flight.lock().leaving = Some(Instant::now() + LAST_WORDS);
                        self.changed.notify_one();
                    }
                    _ => {}
                }
            }
            if let Some(seq) = acked {
                self.acked(seq)?;
            }
            self.flight.lock().last_read = Some(Instant::now());
            if stream.read_buf(&mut buffer).await.context("reading")? == 0 {
                if self.flight.lock().leaving.is_some() {
                    return Ok(());
                }
                bail!("the server closed the link");
            }
        }
    }

    fn acked(&self, seq: u64) -> anyhow::Result<()> {
        {
            let mut flow = self.shared.intake.flow.lock();
            if seq >= flow.next_seq() {
                bail!("the server acknowledges batch {seq}, which was not sent");
            }
            flow.acked(seq);
        }
        let mut flight = self.flight.lock();
        while let Some((sent, bytes)) = flight.batches.front().copied() {
            if sent > seq {
                break;
            }
            flight.bytes -= bytes;
            flight.batches.pop_front();
        }
        drop(flight);
        self.changed.notify_one();
        self.shared.intake.to_keep.notify_one();
        Ok(())
    }

    async fn send(&self, mut stream: impl AsyncWrite + Unpin, ask: &mpsc::Sender<Ask>) -> anyhow::Result<()> {
        let config = &self.shared.config;
        let life = &self.shared.life;
        let idle = Duration::from_millis(config.idle_timeout_ms);
        let ping_every = idle / 3;
        let mut next_ping = Instant::now() + ping_every;
        let mut sent = self.shared.intake.flow.lock().acked_seq();
        let mut stored: VecDeque<Entry> = VecDeque::new();
        let mut leave_at = None;
        loop {
            let now = Instant::now();
            let (pong, open, empty, leaving, last_read) = {
                let mut flight = self.flight.lock();
                let open = flight.batches.is_empty()
                    || flight.batches.len() < self.window_batches && flight.bytes < self.window_bytes;
                let empty = flight.batches.is_empty();
                (flight.pongs.pop_front(), open, empty, flight.leaving, flight.last_read)
            };
            if let Some(nonce) = pong {
                self.write(&mut stream, &[&DataFrame::from(Pong { nonce }).to_bytes()])
                    .await?;
                continue;
            }
            if let Some(last) = last_read
                && last + idle <= now
            {
                bail!("not a byte from the server for {} ms", idle.as_millis());
            }
            if next_ping <= now {
                let ping = Ping::default();
                self.write(&mut stream, &[&DataFrame::from(ping).to_bytes()]).await?;
                self.flush(&mut stream).await?;
                next_ping = now + ping_every;
            }
            if let Some(until) = leaving
                && (empty || until <= now)
            {
                return Ok(());
            }
            if life.is_draining() {
                let until = *leave_at.get_or_insert(now + Duration::from_millis(config.leave_ms));
                if until <= now || (empty && self.shared.intake.flow.lock().is_empty()) {
                    return self.say_goodbye(&mut stream).await;
                }
            }
            let mut wake = next_ping;
            if let Some(until) = leaving.or(leave_at) {
                wake = wake.min(until);
            }
            if open && leaving.is_none() {
                if let Some(entry) = stored.pop_front() {
                    sent = entry.index;
                    if sent > self.shared.intake.flow.lock().acked_seq() {
                        self.send_batch(&mut stream, entry.index, entry.records, entry.body)
                            .await?;
                    }
                    continue;
                }
                let next = self.shared.intake.flow.lock().next(sent, now.into_std());
                match next {
                    Next::Batch(batch) => {
                        sent = batch.seq;
                        self.send_batch(&mut stream, batch.seq, batch.records, batch.body)
                            .await?;
                        continue;
                    }
                    Next::Disk => {
                        let upto = self.shared.intake.flow.lock().disk_last();
                        stored = self.read_spool(ask, sent).await?;
                        if stored.is_empty() {
                            // What stood there is dropped, or damaged.
                            sent = upto;
                        }
                        continue;
                    }
                    Next::At(at) => wake = wake.min(at.into()),
                    Next::Nothing => {}
                }
            }
            self.flush(&mut stream).await?;
            tokio::select! {
                () = self.changed.notified() => {}
                () = self.shared.intake.to_send.notified(), if open => {}
                () = sleep_until(wake) => {}
                () = life.draining(), if leave_at.is_none() => {}
            }
        }
    }

    async fn read_spool(&self, ask: &mpsc::Sender<Ask>, after: u64) -> anyhow::Result<VecDeque<Entry>> {
        let (answer, answered) = oneshot::channel();
        let most = usize::try_from(self.window_bytes).unwrap_or(READ_AHEAD).min(READ_AHEAD);
        ask.send(Ask { after, most, answer })
            .await
            .context("the spool is closed")?;
        let entries = answered.await.context("the spool cannot be read")?;
        Ok(entries.into())
    }

    async fn send_batch(
        &self,
        stream: &mut (impl AsyncWrite + Unpin),
        seq: u64,
        records: u32,
        body: Bytes,
    ) -> anyhow::Result<()> {
        let plain_len = body.len();
        let body = match self.compression {
            Compression::Zstd => compress(body).await?,
            Compression::None => body,
        };
        let batch = Batch {
            seq,
            records,
            compression: self.compression.into(),
            plain_len: u32::try_from(plain_len).context("a batch beyond 4 GiB")?,
            body: Bytes::new(),
        };
        // The body goes out as it is instead of through another copy: it is the last field of the message.
        let mut head = BytesMut::with_capacity(64);
        let mut fields = BytesMut::with_capacity(48);
        batch.encode(&mut fields).context("a batch does not encode")?;
        prost::encoding::encode_key(5, prost::encoding::WireType::LengthDelimited, &mut fields);
        prost::encoding::encode_varint(body.len() as u64, &mut fields);
        put_header(&mut head, BATCH_KIND, 0, fields.len() + body.len());
        head.extend_from_slice(&fields);
        {
            let mut flight = self.flight.lock();
            flight.batches.push_back((seq, plain_len as u64));
            flight.bytes += plain_len as u64;
        }
        self.shared.metrics.sent.inc();
        self.shared.metrics.sent_bytes.inc_by((head.len() + body.len()) as u64);
        self.write(stream, &[&head, &body]).await
    }

    async fn write(&self, stream: &mut (impl AsyncWrite + Unpin), parts: &[&[u8]]) -> anyhow::Result<()> {
        let limit = Duration::from_millis(self.shared.config.write_timeout_ms);
        for part in parts {
            // In steps, so that the limit is for headway and not for the whole of a long batch.
            for step in part.chunks(256 << 10) {
                timeout(limit, stream.write_all(step))
                    .await
                    .with_context(|| format!("no headway for {} ms", limit.as_millis()))?
                    .context("writing")?;
            }
        }
        Ok(())
    }

    async fn flush(&self, stream: &mut (impl AsyncWrite + Unpin)) -> anyhow::Result<()> {
        let limit = Duration::from_millis(self.shared.config.write_timeout_ms);
        timeout(limit, stream.flush())
            .await
            .with_context(|| format!("no headway for {} ms", limit.as_millis()))?
            .context("writing")
    }

    async fn say_goodbye(&self, stream: &mut (impl AsyncWrite + Unpin)) -> anyhow::Result<()> {
        let bye = Goodbye {
            reason: "the agent ends".to_owned(),
            stopping: true,
            ..Goodbye::default()
        };
        self.write(stream, &[&DataFrame::from(bye).to_bytes()]).await?;
        self.flush(stream).await?;
        stream.shutdown().await.context("closing")
    }
}

async fn compress(body: Bytes) -> anyhow::Result<Bytes> {
    // The fastest level: the uplink is to keep up with the plugins.
    let squeeze = |body: &[u8]| zstd::bulk::compress(body, 1);
    let done = if body.len() <= COMPRESS_INLINE {
        squeeze(&body)
    } else {
        tokio::task::spawn_blocking(move || squeeze(&body))
            .await
            .context("compressing")?
    };
    Ok(done.context("compressing")?.into())
}
