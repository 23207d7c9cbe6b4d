//! Passes records on to gse_data nearer to the centre, over the link that agents use: the one sink of a proxy.
//!
//! A group goes out as numbered batches and has arrived when the last of them is acknowledged. Numbers stay with what they were given to
//! until then, over any number of links, so that a batch that comes twice is known where it was taken already. They begin anew, under a new
//! name, with each start of the proxy: what was sent and not yet acknowledged then may arrive twice.
//!
//! Between groups the link is kept open by [`Writer::idle`]. Which addresses are used is the administrator's word alone; what the other
//! side advertises is for agents, and often out of a proxy's reach.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, bail};
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use futures::future::BoxFuture;
use gse_core::random::Random;
use gse_core::tls::{self, Role};
use gse_proto::data::{Batch, Compression, DataHello, DataWelcome};
use gse_proto::datalink::{DataFrame, MAX_MESSAGE, PROTOCOL};
use gse_proto::frame::HELLO_MAX_MESSAGE;
use gse_proto::session::{Ping, Pong};
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{Attempted, Group, Load, Writer};
use crate::config::UpstreamConfig;

/// Small loads are put together up to this.
const BODY: usize = 512 << 10;
/// Bodies that are longer are compressed on a thread that may block.
const COMPRESS_INLINE: usize = 32 << 10;
/// Written in steps, so that the limit is for headway and not for the whole of a long batch.
const STEP: usize = 256 << 10;
/// Read from the socket at a time.
const READ: usize = 16 << 10;

/// A batch that is not acknowledged.
struct Waiting {
    seq: u64,
    records: u32,
    body: Bytes,
}

/// Tells a load from any other: its body, which is held so that nothing else comes to its place, and what of it is meant.
struct Mark {
    body: Bytes,
    from: Option<usize>,
    size: usize,
}

impl Mark {
    fn of(load: &Load) -> Self {
        Self {
            body: load.body.clone(),
            from: load.parts.first().map(|part| part.from),
            size: load.size,
        }
    }
}

impl PartialEq for Mark {
    fn eq(&self, other: &Self) -> bool {
        let place = |mark: &Self| (mark.body.as_ptr(), mark.body.len(), mark.from, mark.size);
        place(self) == place(other)
    }
}

/// An open link.
struct Link {
    stream: TlsStream<TcpStream>,
    buffer: BytesMut,
    compression: Compression,
    window_batches: usize,
    window_bytes: usize,
    /// Counted while it lives.
    _up: Up,
}

/// One more link, until dropped.
struct Up(Gauge);

impl Drop for Up {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// See the module.
pub(super) struct Relay {
    config: UpstreamConfig,
    links: Gauge,
    random: Random,
    /// Names this proxy's sequence.
    spool_id: Bytes,
    next_seq: u64,
    /// Of the group that is under way, in order.
    waiting: VecDeque<Waiting>,
    /// The group that is under way; empty: none.
    begun: Vec<Mark>,
    link: Option<Link>,
    /// Which address is next.
    address: usize,
    pauses: ExponentialBackoff,
}

impl Relay {
    pub(super) fn new(config: UpstreamConfig, links: Gauge) -> Self {
        let random = Random::system();
        Self {
            spool_id: new_name(&random),
            address: usize::try_from(random.below(config.servers.len().max(1) as u64)).unwrap_or(0),
            pauses: pauses(&config),
            config,
            links,
            random,
            next_seq: 1,
            waiting: VecDeque::new(),
            begun: vec![],
            link: None,
        }
    }

    /// Opens a link to the next address, unless there is one.
    async fn connect(&mut self) -> anyhow::Result<()> {
        if self.link.is_some() {
            return Ok(());
        }
        let servers = &self.config.servers;
        let address = servers.get(self.address).context("upstream.servers is empty")?.clone();
        self.address = (self.address + 1) % servers.len();
        let limit = Duration::from_millis(self.config.connect_timeout_ms);
        let (link, acked) = timeout(limit, self.dial(&address))
            .await
            .with_context(|| format!("{address}: no link within {} ms", limit.as_millis()))?
            .with_context(|| address.clone())?;
        // It is the one to come back to while it is well.
        self.address = (self.address + self.config.servers.len() - 1) % self.config.servers.len();
        self.pauses = pauses(&self.config);
        tracing::info!(server = address, "upstream link");
        self.acked(acked)?;
        self.link = Some(link);
        Ok(())
    }

    async fn dial(&self, address: &str) -> anyhow::Result<(Link, u64)> {
        let files = self.config.tls.clone().context("upstream.tls is not set")?;
        // Read again each time: certificates are replaced while the proxy runs.
        let tls = tokio::task::spawn_blocking(move || tls::client_config(&files, Role::Server, &[]))
            .await
            .context("reading certificates")??;
        let socket = TcpStream::connect(address).await.context("cannot connect")?;
        socket.set_nodelay(true).context("cannot set TCP_NODELAY")?;
        let mut stream = TlsConnector::from(tls)
            .connect(tls::server_name(), socket)
            .await
            .context("TLS handshake")?;
        let compressions = match self.config.compress {
            true => vec![Compression::Zstd.into()],
            false => vec![],
        };
        let hello = DataFrame::from(DataHello {
            protocol: PROTOCOL,
            agent_id: String::new(),
            spool_id: self.spool_id.clone(),
            next_seq: self.waiting.front().map_or(self.next_seq, |first| first.seq),
            compressions,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        });
        let write = async {
            stream.write_all(&hello.to_bytes()).await?;
            stream.flush().await
        };
        write.await.context("cannot send the hello")?;
        let mut buffer = BytesMut::new();
        let welcome = loop {
            match DataFrame::take(&mut buffer, HELLO_MAX_MESSAGE).context("answer to the hello")? {
                Some(DataFrame::Welcome(welcome)) if welcome.protocol == PROTOCOL => break welcome,
                Some(DataFrame::Welcome(welcome)) => bail!("the server speaks protocol {}", welcome.protocol),
                Some(DataFrame::Goodbye(bye)) => bail!("the server refused the link: {}", bye.reason),
                Some(other) => bail!("the answer to the hello is a frame of kind {}", other.kind()),
                None => {}
            }
            if stream.read_buf(&mut buffer).await.context("no answer to the hello")? == 0 {
                bail!("the server closed the connection instead of answering the hello");
            }
        };
        let acked = welcome.acked;
        Ok((self.welcomed(stream, buffer, &welcome)?, acked))
    }

    fn welcomed(&self, stream: TlsStream<TcpStream>, buffer: BytesMut, welcome: &DataWelcome) -> anyhow::Result<Link> {
        if welcome.compression() != Compression::None && !self.config.compress {
            bail!("the server asks for a compression that was not offered");
        }
        self.links.inc();
        Ok(Link {
            stream,
            buffer,
            compression: welcome.compression(),
            window_batches: welcome.window_batches.max(1) as usize,
            window_bytes: usize::try_from(welcome.window_bytes).unwrap_or(usize::MAX),
            _up: Up(self.links.clone()),
        })
    }

    /// Everything up to `seq` has arrived.
    fn acked(&mut self, seq: u64) -> anyhow::Result<()> {
        if seq >= self.next_seq {
            // Under another name nothing that was sent can be taken for something else.
            self.spool_id = new_name(&self.random);
            bail!("the server acknowledges batch {seq}, which was not sent");
        }
        while self.waiting.front().is_some_and(|first| first.seq <= seq) {
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// Sends what waits, as the window allows, until all of it is acknowledged.
    async fn send(&mut self, link: &mut Link) -> anyhow::Result<()> {
        let mut sent = 0;
        while !self.waiting.is_empty() {
            let (mut batches, mut bytes) = (0, 0);
            for one in &self.waiting {
                let open = batches == 0 || batches < link.window_batches && bytes + one.body.len() <= link.window_bytes;
                if !open {
                    break;
                }
                (batches, bytes) = (batches + 1, bytes + one.body.len());
                if one.seq > sent {
                    link.batch(one, &self.config).await?;
                    sent = one.seq;
                }
            }
            link.flush(&self.config).await?;
            let acked = link.heard(&self.config).await?;
            self.acked(acked)?;
        }
        Ok(())
    }

    async fn pass_on(&mut self, group: &Group) -> anyhow::Result<()> {
        let given: Vec<Mark> = group.loads.iter().map(Mark::of).collect();
        if self.begun != given {
            // One that was given up is not sent any more.
            self.waiting.clear();
            for (records, body) in bodies(&group.loads) {
                let seq = self.next_seq;
                self.next_seq += 1;
                self.waiting.push_back(Waiting { seq, records, body });
            }
            self.begun = given;
        }
        self.connect().await?;
        // Taken out: a link whose writing is cut short is not used again.
        let mut link = self.link.take().context("no link")?;
        self.send(&mut link).await?;
        self.link = Some(link);
        self.begun = vec![];
        Ok(())
    }
}

fn new_name(random: &Random) -> Bytes {
    Bytes::from([random.u64().to_be_bytes(), random.u64().to_be_bytes()].concat())
}

fn pauses(config: &UpstreamConfig) -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(config.retry_min_ms))
        .with_max_delay(Duration::from_millis(config.retry_max_ms))
        .with_jitter()
        .without_max_times()
        .build()
}

/// Loads as bodies of batches, records in their order. None is longer than what its sender sent.
fn bodies(loads: &[Load]) -> Vec<(u32, Bytes)> {
    let mut done = Vec::new();
    let (mut records, mut body) = (0, BytesMut::new());
    for load in loads {
        let mut parts = load.parts.iter().peekable();
        while let Some(part) = parts.next() {
            let (from, mut to, mut inside) = (part.from, part.to, part.records);
            while let Some(next) = parts.next_if(|next| next.from == to) {
                (to, inside) = (next.to, inside + next.records);
            }
            if !body.is_empty() && body.len() + (to - from) > BODY {
                done.push((std::mem::take(&mut records), body.split().freeze()));
            }
            if body.is_empty() && to - from > BODY / 2 {
                // As it is, without a copy.
                done.push((inside, load.body.slice(from..to)));
            } else {
                body.extend_from_slice(&load.body[from..to]);
                records += inside;
            }
        }
    }
    if !body.is_empty() {
        done.push((records, body.freeze()));
    }
    done
}

impl Link {
    async fn batch(&mut self, one: &Waiting, config: &UpstreamConfig) -> anyhow::Result<()> {
        let body = match self.compression {
            Compression::Zstd => compress(one.body.clone()).await?,
            Compression::None => one.body.clone(),
        };
        let frame = DataFrame::from(Batch {
            seq: one.seq,
            records: one.records,
            compression: self.compression.into(),
            plain_len: u32::try_from(one.body.len()).context("a batch beyond 4 GiB")?,
            body,
        });
        self.write(&frame, config).await
    }

    async fn write(&mut self, frame: &DataFrame, config: &UpstreamConfig) -> anyhow::Result<()> {
        let limit = Duration::from_millis(config.write_timeout_ms);
        for step in frame.to_bytes().chunks(STEP) {
            timeout(limit, self.stream.write_all(step))
                .await
                .with_context(|| format!("no headway for {} ms", limit.as_millis()))?
                .context("writing")?;
        }
        Ok(())
    }

    async fn flush(&mut self, config: &UpstreamConfig) -> anyhow::Result<()> {
        let limit = Duration::from_millis(config.write_timeout_ms);
        timeout(limit, self.stream.flush())
            .await
            .with_context(|| format!("no headway for {} ms", limit.as_millis()))?
            .context("writing")
    }

    /// The next acknowledgement. Questions are answered meanwhile, and asked when nothing comes.
    async fn heard(&mut self, config: &UpstreamConfig) -> anyhow::Result<u64> {
        let ask = Duration::from_millis(config.idle_timeout_ms / 3);
        let mut asked = 0;
        loop {
            let mut acked = None;
            while let Some(frame) = DataFrame::take(&mut self.buffer, MAX_MESSAGE).context("from the server")? {
                match frame {
                    DataFrame::Ack(ack) => acked = acked.max(Some(ack.seq)),
                    DataFrame::Ping(ping) => {
                        let pong = DataFrame::from(Pong { nonce: ping.nonce });
                        self.write(&pong, config).await?;
                        self.flush(config).await?;
                    }
                    // It acknowledges what it still takes, and closes; then the next address is tried.
                    DataFrame::Goodbye(bye) => tracing::info!(reason = bye.reason, "the upstream server leaves"),
                    _ => {}
                }
            }
            if let Some(seq) = acked {
                return Ok(seq);
            }
            self.buffer.reserve(READ);
            match timeout(ask, self.stream.read_buf(&mut self.buffer)).await {
                Ok(Ok(0)) => bail!("the server closed the link"),
                Ok(read) => {
                    read.context("reading")?;
                    asked = 0;
                }
                Err(_) if asked == 3 => bail!("not a byte from the server for {} ms", config.idle_timeout_ms),
                Err(_) => {
                    asked += 1;
                    self.write(&DataFrame::from(Ping { nonce: asked }), config).await?;
                    self.flush(config).await?;
                }
            }
        }
    }

    /// Waits until there is something to read. May be left off at any time.
    async fn readable(&mut self, limit: Duration) -> anyhow::Result<()> {
        self.buffer.reserve(READ);
        match timeout(limit, self.stream.read_buf(&mut self.buffer)).await {
            Ok(Ok(0)) => bail!("the server closed the link"),
            Ok(read) => read.map(drop).context("reading"),
            Err(_) => bail!("not a byte from the server for {} ms", limit.as_millis()),
        }
    }

    /// Answers what was asked.
    async fn answer(&mut self, config: &UpstreamConfig) -> anyhow::Result<()> {
        while let Some(frame) = DataFrame::take(&mut self.buffer, MAX_MESSAGE).context("from the server")? {
            match frame {
                DataFrame::Ping(ping) => {
                    self.write(&DataFrame::from(Pong { nonce: ping.nonce }), config).await?;
                }
                DataFrame::Goodbye(bye) => bail!("the server leaves: {}", bye.reason),
                _ => {}
            }
        }
        self.flush(config).await
    }
}

async fn compress(body: Bytes) -> anyhow::Result<Bytes> {
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

impl Writer for Relay {
    fn write<'a>(&'a mut self, group: &'a Group) -> Attempted<'a> {
        async move {
            self.pass_on(group).await.map_err(|error| format!("{error:#}"))?;
            Ok(vec![])
        }
        .boxed()
    }

    // Numbers must outlive a failed attempt; each step has a limit of its own.
    fn patient(&self) -> bool {
        true
    }

    fn idle<'a>(&'a mut self) -> BoxFuture<'a, ()> {
        async move {
            let silence = Duration::from_millis(self.config.idle_timeout_ms);
            loop {
                if let Err(error) = self.connect().await {
                    tracing::debug!("upstream link: {error:#}");
                    let longest = Duration::from_millis(self.config.retry_max_ms);
                    sleep(self.pauses.next().unwrap_or(longest)).await;
                    continue;
                }
                let Some(link) = &mut self.link else { continue };
                let mut ended = link.readable(silence).await;
                if ended.is_ok()
                    && let Some(mut link) = self.link.take()
                {
                    ended = link.answer(&self.config).await;
                    self.link = Some(link);
                }
                if let Err(error) = ended {
                    tracing::info!("upstream link: {error:#}");
                    self.link = None;
                    sleep(self.pauses.next().unwrap_or(silence)).await;
                }
            }
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Part;
    use super::*;
    use gse_proto::datalink::put_record;

    fn load(records: &[&[u8]]) -> Load {
        let mut body = BytesMut::new();
        let mut parts = Vec::new();
        for (record, data_id) in records.iter().zip(1..) {
            let from = body.len();
            put_record(&mut body, data_id, 7, 9, record);
            let (target, to) = ("".into(), body.len());
            parts.push(Part {
                data_id,
                target,
                from,
                to,
                records: 1,
            });
        }
        let mut load = Load::new(body.freeze());
        parts.into_iter().for_each(|part| load.push(part));
        load
    }

    #[test]
    fn a_group_is_told_from_another_of_the_same_content() {
        let (one, other) = (load(&[b"a"]), load(&[b"a"]));
        assert!(Mark::of(&one) == Mark::of(&one.clone()));
        assert!(Mark::of(&one) != Mark::of(&other));
    }

    #[test]
    fn bodies_hold_every_record_once_in_order() {
        let long = vec![b'l'; BODY];
        let loads = [load(&[b"a", b"b"]), load(&[b"c", &long, b"d"]), load(&[b"e"])];
        let mut seen = Vec::new();
        let mut count = 0;
        for (records, body) in bodies(&loads) {
            count += records;
            assert!(body.len() < BODY + 100);
            seen.extend(
                crate::router::records(&body, 0, body.len())
                    .map(<[u8]>::to_vec)
                    .collect::<Vec<_>>(),
            );
        }
        assert_eq!(seen, [&b"a"[..], b"b", b"c", &long, b"d", b"e"].map(<[u8]>::to_vec));
        assert_eq!(count, 6);
    }
}
