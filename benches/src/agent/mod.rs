//! One simulated agent: a session like a real agent's, without scripts behind it. It answers each dispatch with one terminal row for
//! every atomic task, keeps the rows until the server says that they are stored, and comes back with what it holds. A file that is pushed
//! it takes for written. It goes where a server sends it, and elsewhere when its server is gone, as the real agent does
//! ([`crate::servers`]).
//!
//! One task an agent, one timer, no buffer while idle. A Terminate is not acted on: what was asked for is as good as done already.

mod link;
pub(crate) mod procs;

use std::collections::VecDeque;
use std::fs::File;
use std::future::poll_fn;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::io::Write as _;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::Poll;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use bytes::{Bytes, BytesMut};
use gse_proto::file::order::What;
use gse_proto::file::{Order, Phase, Report};
use gse_proto::frame::{DEFAULT_MAX_MESSAGE, Frame};
use gse_proto::session as s;
use prost::Message as _;
use tokio::io::AsyncWriteExt;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;
use tokio_util::io::poll_read_buf;

use crate::counted::{Counted, WireBytes};
use crate::servers::{Known, Place, addresses};

/// A row without an answer is sent again after this long, as a real agent does.
const RESEND: Duration = Duration::from_secs(5);
/// A server that takes nothing for so long counts as gone.
const WRITE: Duration = Duration::from_secs(30);
/// Dispatches remembered to notice one that comes twice.
const REMEMBERED: usize = 64;
/// Bytes read at once.
const READ_CHUNK: usize = 4096;
type Stream = TlsStream<Counted>;

/// What all agents of a swarm have done together.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) connected: AtomicU64,
    pub(crate) connects: AtomicU64,
    pub(crate) failures: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) moves: AtomicU64,
    pub(crate) beats: AtomicU64,
    pub(crate) dispatches: AtomicU64,
    pub(crate) repeated: AtomicU64,
    pub(crate) foreign: AtomicU64,
    pub(crate) rows_sent: AtomicU64,
    pub(crate) rows_resent: AtomicU64,
    pub(crate) rows_acknowledged: AtomicU64,
    pub(crate) wire: Arc<WireBytes>,
    /// The last mark that the one who watches has asked for.
    pub(crate) mark: AtomicU64,
    pub(crate) last_failure: std::sync::Mutex<String>,
}

/// What all agents of a swarm have in common.
#[derive(Debug)]
pub(crate) struct Fleet {
    /// The agents listeners of all nodes.
    pub(crate) servers: Known,
    /// Between a dispatch and its rows.
    pub(crate) delay: Duration,
    /// Output of every atomic task.
    pub(crate) output: Bytes,
    /// Bounds of the wait before connecting again: random up to the first, doubled up to the second.
    pub(crate) reconnect: (Duration, Duration),
    /// The first try after the loss of a session comes within this time.
    pub(crate) spread: Duration,
    /// Connections end with a reset, as those of a host that has crashed and come back do.
    pub(crate) reset: bool,
    /// Where each sign of life is noted: number of the agent, unix milliseconds.
    pub(crate) signs: Option<File>,
    /// Handshakes at once.
    pub(crate) connecting: Semaphore,
    /// Milliseconds between heartbeats; 0 for what the server says.
    pub(crate) beat_ms: watch::Receiver<u64>,
    /// Processes of every agent.
    pub(crate) processes: u32,
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
    place: Place,
    pending: Vec<Pending>,
    seen: VecDeque<u64>,
    procs: procs::Procs,
}

/// Id of an agent by its number.
pub(crate) fn agent_id(index: u32) -> String {
    format!("bench-{index:06}")
}

/// Number of an agent by its id.
pub(crate) fn agent_index(id: &str) -> Option<u32> {
    id.strip_prefix("bench-")?.parse().ok()
}

pub(crate) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// A session that has begun.
struct Session {
    server: SocketAddr,
    stream: Stream,
    buffer: BytesMut,
    welcome: s::Welcome,
}

/// How a session has ended, or what it asks for.
enum End {
    /// The server is going, or wants to be rid of the agent.
    Goodbye { stopping: bool },
    /// To one of these instead. The session goes on until there is another.
    Move(Vec<SocketAddr>),
}

impl Agent {
    pub(crate) fn new(index: u32, tls: Arc<ClientConfig>, fleet: Arc<Fleet>) -> Self {
        let beat_ms = fleet.beat_ms.clone();
        Self {
            index,
            id: agent_id(index),
            tls,
            beat_ms,
            place: Place::new(index),
            procs: procs::Procs::new(index, fleet.processes),
            fleet,
            pending: vec![],
            seen: VecDeque::new(),
        }
    }

    fn note(&self, what: &str, error: &anyhow::Error) {
        if let Ok(mut last) = self.fleet.stats.last_failure.lock() {
            *last = format!("{}: {what}{error:#}", self.id);
        }
    }

    fn epoch(&self) -> Bytes {
        Bytes::from(format!("epoch-{}", self.id))
    }

    async fn frames(&mut self, session: &mut Session) -> Result<End> {
        let Session {
            stream,
            buffer,
            welcome,
            ..
        } = session;
        let mut out = BytesMut::new();
        self.procs.opened(unix_ms());
        for pending in self.pending.iter_mut().filter(|p| p.sent) {
            pending.due = Instant::now();
        }
        // The first one anywhere in the interval, so that agents that came together do not beat together.
        let mut beat = Instant::now() + self.interval(welcome).mul_f64(rand::random());
        loop {
            if let Some(end) = self.handle(buffer, &mut out)? {
                return Ok(end);
            }
            self.due_rows(&mut out);
            if let Some(report) = self.procs.report() {
                Frame::from(report).encode(0, &mut out);
            }
            if !out.is_empty() {
                let sent = async {
                    stream.write_all(&out).await?;
                    stream.flush().await
                };
                timeout(WRITE, sent).await.context("the server takes nothing")??;
                self.sign()?;
                out = BytesMut::new();
            }
            if buffer.is_empty() {
                *buffer = BytesMut::new();
            }
            let next = self
                .pending
                .iter()
                .map(|p| p.due)
                .chain(self.procs.due())
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

    /// Notes that something has just been sent. A short write to a file, and only where few agents are watched closely.
    fn sign(&self) -> Result<()> {
        if let Some(mut signs) = self.fleet.signs.as_ref() {
            let line = format!("{} {}\n", self.index, unix_ms());
            signs.write_all(line.as_bytes()).context("noting a sign of life")?;
        }
        Ok(())
    }

    /// Takes what has come; says when the session is to end.
    fn handle(&mut self, buffer: &mut BytesMut, out: &mut BytesMut) -> Result<Option<End>> {
        while let Some(frame) = Frame::take(buffer, DEFAULT_MAX_MESSAGE)? {
            match frame {
                Frame::Dispatch(dispatch) => self.dispatch(&dispatch),
                Frame::Stored(stored) => self.stored(&stored),
                Frame::Ping(ping) => Frame::from(s::Pong { nonce: ping.nonce }).encode(0, out),
                Frame::Goodbye(bye) => return Ok(Some(End::Goodbye { stopping: bye.stopping })),
                Frame::Call(call) if call.service == "file" => self.call(call, out),
                Frame::Servers(list) => self.fleet.servers.learn(&list.servers),
                Frame::Move(to) => return Ok(Some(End::Move(addresses(&to.servers)))),
                Frame::Call(call) => Frame::from(self.procs.call(&call)).encode(0, out),
                Frame::ProcReported(done) => self.procs.reported(done.sequence),
                Frame::Terminate(_) | Frame::Pong(_) | Frame::Unsupported(_) => {}
                other => bail!("a frame of kind {} is not for agents", other.kind()),
            }
        }
        Ok(None)
    }

    /// A call to the file service: what is pushed is as good as written. Anything else it does not know.
    fn call(&self, call: s::Call, out: &mut BytesMut) {
        let mut reply = s::CallReply {
            call_id: call.call_id,
            ..s::CallReply::default()
        };
        match Order::decode(call.payload) {
            Ok(Order {
                task_id,
                order,
                what: Some(What::Push(push)),
                ..
            }) if call.service == "file" => {
                let report = Report {
                    task_id,
                    order,
                    phase: Phase::Done.into(),
                    size: push.content.len() as u64,
                    ..Report::default()
                };
                reply.payload = report.encode_to_vec().into();
            }
            _ => reply.failure = s::CallFailure::Unsupported.into(),
        }
        Frame::from(reply).encode(0, out);
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
