//! One simulated agent: a session like a real agent's, without scripts behind it. It answers each dispatch with one terminal row for
//! every atomic task, keeps the rows until the server says that they are stored, and comes back with what it holds.
//!
//! One task an agent, one timer, no buffer while idle. A Terminate is not acted on: what was asked for is as good as done already.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::Poll;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use bytes::{Bytes, BytesMut};
use gse_core::tls::server_name;
use gse_proto::frame::{DEFAULT_MAX_MESSAGE, Frame};
use gse_proto::session as s;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;
use tokio_util::io::poll_read_buf;

use crate::counted::{Counted, WireBytes};

/// A row without an answer is sent again after this long, as a real agent does.
const RESEND: Duration = Duration::from_secs(5);
/// For TCP, TLS and hello.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// A server that takes nothing for so long counts as gone.
const WRITE: Duration = Duration::from_secs(30);
/// Dispatches remembered to notice one that comes twice.
const REMEMBERED: usize = 64;
/// Bytes read at once.
const READ_CHUNK: usize = 4096;
/// Agents that share a source address: far from what a range of ports holds.
const AGENTS_AN_ADDRESS: u32 = 500;

type Stream = TlsStream<Counted>;

/// What all agents of a swarm have done together.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) connected: AtomicU64,
    pub(crate) connects: AtomicU64,
    pub(crate) failures: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) beats: AtomicU64,
    pub(crate) dispatches: AtomicU64,
    pub(crate) repeated: AtomicU64,
    pub(crate) foreign: AtomicU64,
    pub(crate) rows_sent: AtomicU64,
    pub(crate) rows_resent: AtomicU64,
    pub(crate) rows_acknowledged: AtomicU64,
    pub(crate) wire: Arc<WireBytes>,
    pub(crate) last_failure: std::sync::Mutex<String>,
}

/// What all agents of a swarm have in common.
#[derive(Debug)]
pub(crate) struct Fleet {
    /// The agents listener.
    pub(crate) server: SocketAddr,
    /// Between a dispatch and its rows.
    pub(crate) delay: Duration,
    /// Output of every atomic task.
    pub(crate) output: Bytes,
    /// Bounds of the wait before connecting again: random up to the first, doubled up to the second.
    pub(crate) reconnect: (Duration, Duration),
    /// Handshakes at once.
    pub(crate) connecting: Semaphore,
    /// Milliseconds between heartbeats; 0 for what the server says.
    pub(crate) beat_ms: watch::Receiver<u64>,
    pub(crate) stats: Arc<Stats>,
}

struct Pending {
    row: s::Row,
    due: Instant,
    sent: bool,
}

/// One agent.
pub(crate) struct Agent {
    index: u32,
    id: String,
    tls: Arc<ClientConfig>,
    fleet: Arc<Fleet>,
    beat_ms: watch::Receiver<u64>,
    pending: Vec<Pending>,
    seen: VecDeque<u64>,
}

/// Id of an agent by its number.
pub(crate) fn agent_id(index: u32) -> String {
    format!("bench-{index:06}")
}

/// Number of an agent by its id.
pub(crate) fn agent_index(id: &str) -> Option<u32> {
    id.strip_prefix("bench-")?.parse().ok()
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Counts a connected agent for as long as it is one.
struct Connected<'a>(&'a Stats);

impl<'a> Connected<'a> {
    fn new(stats: &'a Stats) -> Self {
        stats.connects.fetch_add(1, Relaxed);
        stats.connected.fetch_add(1, Relaxed);
        Self(stats)
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.connected.fetch_sub(1, Relaxed);
    }
}

impl Agent {
    pub(crate) fn new(index: u32, tls: Arc<ClientConfig>, fleet: Arc<Fleet>) -> Self {
        let beat_ms = fleet.beat_ms.clone();
        Self {
            index,
            id: agent_id(index),
            tls,
            fleet,
            beat_ms,
            pending: vec![],
            seen: VecDeque::new(),
        }
    }

    /// Connects, again and again, for as long as the swarm lives.
    pub(crate) async fn run(mut self) {
        let (min, max) = self.fleet.reconnect;
        let mut bound = min;
        loop {
            match Box::pin(self.attempt()).await {
                Ok(()) => bound = min,
                Err(error) => {
                    self.fleet.stats.failures.fetch_add(1, Relaxed);
                    if let Ok(mut last) = self.fleet.stats.last_failure.lock() {
                        *last = format!("{}: {error:#}", self.id);
                    }
                }
            }
            let wait = bound.mul_f64(rand::random());
            bound = (bound * 2).min(max.max(min));
            tokio::time::sleep(wait).await;
        }
    }

    /// One session; `Ok` when it had begun, however it ended.
    async fn attempt(&mut self) -> Result<()> {
        let fleet = Arc::clone(&self.fleet);
        let permit = fleet.connecting.acquire().await?;
        let (mut stream, mut buffer, welcome) = timeout(HANDSHAKE, self.introduce())
            .await
            .map_err(|_| anyhow!("no session within {HANDSHAKE:?}"))??;
        drop(permit);
        let connected = Connected::new(&fleet.stats);
        let ended = self.frames(&mut stream, &mut buffer, &welcome).await;
        drop(connected);
        if let Err(error) = ended
            && let Ok(mut last) = fleet.stats.last_failure.lock()
        {
            *last = format!("{}: session ended: {error:#}", self.id);
        }
        Ok(())
    }

    async fn introduce(&self) -> Result<(Stream, BytesMut, s::Welcome)> {
        let tcp = Counted::new(self.dial().await?, Arc::clone(&self.fleet.stats.wire));
        let mut stream = TlsConnector::from(Arc::clone(&self.tls))
            .connect(server_name(), tcp)
            .await
            .context("TLS handshake")?;
        stream.write_all(&Frame::from(self.hello()).to_bytes()).await?;
        stream.flush().await?;
        let mut buffer = BytesMut::new();
        loop {
            match Frame::take(&mut buffer, DEFAULT_MAX_MESSAGE)? {
                Some(Frame::Welcome(welcome)) => return Ok((stream, buffer, welcome)),
                Some(Frame::Refuse(refuse)) => {
                    self.fleet.stats.refused.fetch_add(1, Relaxed);
                    bail!("refused: {}", refuse.reason);
                }
                Some(other) => bail!("a frame of kind {} in place of a welcome", other.kind()),
                None => {}
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                bail!("closed in place of a welcome");
            }
        }
    }

    async fn dial(&self) -> Result<TcpStream> {
        let server = self.fleet.server;
        let tcp = if server.ip().is_loopback() && server.is_ipv4() {
            let socket = TcpSocket::new_v4()?;
            // Without it every bind searches the whole port table, and the harness measures itself.
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true).context("IP_BIND_ADDRESS_NO_PORT")?;
            let group = self.index / AGENTS_AN_ADDRESS;
            let [_, _, high, low] = group.to_be_bytes();
            socket.bind((IpAddr::V4(Ipv4Addr::new(127, 1 + high, low, 1)), 0).into())?;
            socket.connect(server).await
        } else {
            TcpStream::connect(server).await
        };
        let tcp = tcp.with_context(|| format!("cannot connect to {server}"))?;
        tcp.set_nodelay(true)?;
        Ok(tcp)
    }

    fn hello(&self) -> s::Hello {
        let [_, a, b, c] = self.index.to_be_bytes();
        s::Hello {
            protocol: s::PROTOCOL,
            protocol_min: s::PROTOCOL_MIN,
            agent_id: self.id.clone(),
            machine_id: format!("machine-{}", self.id),
            boot_id: format!("boot-{}", self.id),
            instance: self.epoch(),
            addresses: vec![Ipv4Addr::new(10, a, b, c).to_string()],
            hostname: self.id.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            os: "linux".into(),
            arch: "x86_64".into(),
            run_mode: s::RunMode::Agent.into(),
            journal_epoch: self.epoch(),
            cpu_num: 2,
            mem_size_mb: 2048,
            held: self.pending.iter().filter_map(|p| p.row.target.clone()).collect(),
            ..Default::default()
        }
    }

    fn epoch(&self) -> Bytes {
        Bytes::from(format!("epoch-{}", self.id))
    }

    async fn frames(&mut self, stream: &mut Stream, buffer: &mut BytesMut, welcome: &s::Welcome) -> Result<()> {
        let mut out = BytesMut::new();
        for pending in self.pending.iter_mut().filter(|p| p.sent) {
            pending.due = Instant::now();
        }
        // The first one anywhere in the interval, so that agents that came together do not beat together.
        let mut beat = Instant::now() + self.interval(welcome).mul_f64(rand::random());
        loop {
            if self.handle(buffer, &mut out)? {
                return Ok(());
            }
            self.due_rows(&mut out);
            if !out.is_empty() {
                let sent = async {
                    stream.write_all(&out).await?;
                    stream.flush().await
                };
                timeout(WRITE, sent).await.context("the server takes nothing")??;
                out = BytesMut::new();
            }
            if buffer.is_empty() {
                *buffer = BytesMut::new();
            }
            let next = self
                .pending
                .iter()
                .map(|p| p.due)
                .min()
                .map_or(beat, |due| due.min(beat));
            tokio::select! {
                ready = stream.get_ref().0.tcp.readable() => {
                    ready?;
                    read_what_is_there(stream, buffer).await?;
                }
                () = sleep_until(next) => {
                    if Instant::now() >= beat {
                        self.beat(&mut out);
                        beat = Instant::now() + self.interval(welcome).mul_f64(0.9 + 0.2 * rand::random::<f64>());
                    }
                }
                changed = self.beat_ms.changed() => {
                    changed.context("the swarm is ending")?;
                    beat = Instant::now() + self.interval(welcome).mul_f64(rand::random());
                }
            }
        }
    }

    fn interval(&self, welcome: &s::Welcome) -> Duration {
        let asked = *self.beat_ms.borrow();
        let ms = if asked == 0 {
            u64::from(welcome.heartbeat_interval_ms)
        } else {
            asked
        };
        Duration::from_millis(ms.max(10))
    }

    fn beat(&self, out: &mut BytesMut) {
        self.fleet.stats.beats.fetch_add(1, Relaxed);
        let beat = s::Heartbeat {
            cpu_permille: rand::random_range(0..1000),
            mem_permille: rand::random_range(0..1000),
            running: u32::try_from(self.pending.len()).unwrap_or(u32::MAX),
            queued: 0,
        };
        Frame::from(beat).encode(0, out);
    }

    /// Takes what has come; true when the server says goodbye.
    fn handle(&mut self, buffer: &mut BytesMut, out: &mut BytesMut) -> Result<bool> {
        while let Some(frame) = Frame::take(buffer, DEFAULT_MAX_MESSAGE)? {
            match frame {
                Frame::Dispatch(dispatch) => self.dispatch(&dispatch),
                Frame::Stored(stored) => self.stored(&stored),
                Frame::Ping(ping) => Frame::from(s::Pong { nonce: ping.nonce }).encode(0, out),
                Frame::Goodbye(_) | Frame::Move(_) => return Ok(true),
                Frame::Terminate(_) | Frame::Pong(_) | Frame::Unsupported(_) => {}
                other => bail!("a frame of kind {} is not for agents", other.kind()),
            }
        }
        Ok(false)
    }

    fn dispatch(&mut self, dispatch: &s::Dispatch) {
        let stats = &self.fleet.stats;
        stats.dispatches.fetch_add(1, Relaxed);
        let Some(target) = &dispatch.target else {
            stats.foreign.fetch_add(1, Relaxed);
            return;
        };
        if dispatch.epoch != self.epoch() {
            stats.foreign.fetch_add(1, Relaxed);
            return;
        }
        let place = (&target.task_id, target.bucket, target.index);
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(place);
        if self.seen.contains(&hash) {
            stats.repeated.fetch_add(1, Relaxed);
            return;
        }
        if self.seen.len() == REMEMBERED {
            self.seen.pop_front();
        }
        self.seen.push_back(hash);
        let (now, start_ms) = (Instant::now(), unix_ms());
        let delay_ms = u64::try_from(self.fleet.delay.as_millis()).unwrap_or(u64::MAX);
        for (atomic, _) in dispatch.atomic_tasks.iter().enumerate() {
            let row = s::Row {
                target: Some(target.clone()),
                atomic: u32::try_from(atomic).unwrap_or(u32::MAX),
                status: s::RowStatus::Succeeded.into(),
                start_ms,
                end_ms: start_ms.saturating_add(delay_ms),
                output_len: self.fleet.output.len() as u64,
                tail: self.fleet.output.clone(),
                ..Default::default()
            };
            self.pending.push(Pending {
                row,
                due: now + self.fleet.delay,
                sent: false,
            });
        }
    }

    fn stored(&mut self, stored: &s::Stored) {
        if !stored.terminal {
            return;
        }
        let before = self.pending.len();
        self.pending
            .retain(|p| p.row.atomic != stored.atomic || p.row.target != stored.target);
        let kept = (before - self.pending.len()) as u64;
        self.fleet.stats.rows_acknowledged.fetch_add(kept, Relaxed);
        if self.pending.is_empty() {
            self.pending = vec![];
        }
    }

    fn due_rows(&mut self, out: &mut BytesMut) {
        let now = Instant::now();
        for pending in &mut self.pending {
            if pending.due > now {
                continue;
            }
            let count = if pending.sent {
                &self.fleet.stats.rows_resent
            } else {
                &self.fleet.stats.rows_sent
            };
            count.fetch_add(1, Relaxed);
            Frame::from(pending.row.clone()).encode(0, out);
            pending.sent = true;
            pending.due = now + RESEND;
        }
    }
}

/// Reads until there is nothing more, without waiting.
async fn read_what_is_there(stream: &mut Stream, buffer: &mut BytesMut) -> Result<()> {
    poll_fn(|cx| {
        loop {
            buffer.reserve(READ_CHUNK);
            match poll_read_buf(Pin::new(&mut *stream), cx, buffer) {
                Poll::Pending => return Poll::Ready(Ok(())),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(anyhow!(error))),
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(anyhow!("closed by the server"))),
                Poll::Ready(Ok(_)) => {}
            }
        }
    })
    .await
}
