//! One session while it lasts. Reader, writer, heartbeat, results and orders are futures of their own, so that none waits for
//! another: a flood in one direction delays nothing in the other.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use gse_core::lifecycle::Lifecycle;
use gse_core::random::Random;
use gse_proto::frame::{self, Frame};
use gse_proto::session::{CallFailure, Goodbye, Heartbeat, Move, Ping, Pong, Refuse, Unsupported};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::backoff::about;
use super::dial::Connection;
use super::lanes::{Lanes, Outgoing, WriterEnd, lanes, write_frames};
use super::work::{Link, Report, Work, refused};
use crate::config::SessionConfig;
use crate::host::{Load, LoadMeter};

/// Room for what the next read brings.
const READ_AHEAD: usize = 16 * 1024;
/// When a server names no interval.
const DEFAULT_HEARTBEAT: Duration = Duration::from_secs(30);
const SHORTEST_HEARTBEAT: Duration = Duration::from_millis(50);
const LONGEST_HEARTBEAT: Duration = Duration::from_secs(3600);
/// Intervals of silence after which the server is asked for a sign of life.
const QUIET_INTERVALS: u32 = 3;
/// How long an order that the executor is taking may hold up the end of a session.
const ORDER_GRACE: Duration = Duration::from_secs(5);

/// Why a session ended.
#[derive(Debug, Clone)]
pub(super) enum End {
    /// The server closed the connection without a word.
    Closed,
    /// The network, or a frame that makes no sense.
    Failed(String),
    /// Nothing came from the server, not even the answer to a ping.
    Silent(Duration),
    /// The server's last word.
    Goodbye(Goodbye),
    /// The server changed its mind.
    Refused(Refuse),
    /// The agent has said goodbye.
    Left,
}

/// What heartbeats are made with.
#[derive(Debug)]
pub(super) struct Pace {
    pub(super) random: Random,
    /// Reads the host's load, if that is told.
    pub(super) meter: Option<LoadMeter>,
}

/// What a server says about servers in the course of a session.
struct Told {
    moves: watch::Sender<Option<Move>>,
    servers: watch::Sender<Vec<String>>,
}

/// The handle on a running session.
#[derive(Debug)]
pub(super) struct Live {
    /// Where to.
    pub(super) address: String,
    /// Since when.
    pub(super) since: Instant,
    moves: watch::Receiver<Option<Move>>,
    servers: watch::Receiver<Vec<String>>,
    ended: watch::Receiver<Option<End>>,
    leave: watch::Sender<Option<Goodbye>>,
    gate: Arc<Semaphore>,
}

/// While one of these is held, no order of the session reaches the executor.
#[derive(Debug)]
pub(super) struct Paused {
    _permit: OwnedSemaphorePermit,
}

impl Live {
    /// Attaches the executor to `connection` and starts the session.
    pub(super) fn start<W: Work>(
        connection: Connection,
        work: Arc<W>,
        config: &SessionConfig,
        pace: Pace,
        life: &Lifecycle,
    ) -> Self {
        let (ended_in, ended) = watch::channel(None);
        let (leave, left) = watch::channel(None);
        let (moves_in, moves) = watch::channel(None);
        let (servers_in, servers) = watch::channel(Vec::new());
        let told = Told {
            moves: moves_in,
            servers: servers_in,
        };
        let gate = Arc::new(Semaphore::new(1));
        let address = connection.address.clone();

        let (inbox, orders) = Inbox::new(config);
        let (lanes, outgoing) = lanes(config);
        let carrying = carry_out(work.clone(), orders, gate.clone(), lanes.clone(), config.max_calls);
        life.spawn_contained("session orders", carrying);
        let session = drive(
            connection,
            work,
            config.clone(),
            pace,
            inbox,
            left,
            told,
            (lanes, outgoing),
        );
        life.spawn_contained("session", async move {
            let end = session.await;
            ended_in.send_replace(Some(end));
        });
        Self {
            address,
            since: Instant::now(),
            moves,
            servers,
            ended,
            leave,
            gate,
        }
    }

    /// Holds the latest list of servers that the server has told since its welcome; empty until it does.
    pub(super) fn servers(&self) -> watch::Receiver<Vec<String>> {
        self.servers.clone()
    }

    /// Holds the latest wish of the server that the agent go elsewhere.
    pub(super) fn moves(&self) -> watch::Receiver<Option<Move>> {
        self.moves.clone()
    }

    /// Resolves when the session has ended.
    pub(super) async fn ended(&self) -> End {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or(End::Closed),
            Err(_) => End::Failed("the session's task was dropped".to_owned()),
        }
    }

    /// Holds back the orders of this session until the result is dropped, so that what a hello says is held does not grow behind
    /// its back. `None` when the executor does not let go of the order it is taking.
    pub(super) async fn pause(&self) -> Option<Paused> {
        match timeout(ORDER_GRACE, self.gate.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Some(Paused { _permit: permit }),
            Ok(Err(_)) | Err(_) => None,
        }
    }

    /// No further order of this session is carried out. Returns when the one that the executor is taking has been taken.
    pub(super) async fn stop_orders(&self) {
        let paused = self.pause().await;
        self.gate.close();
        drop(paused);
    }

    /// As [`Live::stop_orders`], with the orders held back already.
    pub(super) fn stop_paused(&self, paused: Paused) {
        self.gate.close();
        drop(paused);
    }

    /// Sends what is queued and a last word, and closes; gives up after the configured time and a little.
    pub(super) async fn leave(&self, goodbye: Goodbye, config: &SessionConfig) -> End {
        self.leave.send_replace(Some(goodbye));
        let limit = config.leave_timeout() + Duration::from_millis(200);
        timeout(limit, self.ended())
            .await
            .unwrap_or_else(|_| End::Failed("the session's task is stuck".to_owned()))
    }
}

/// Orders on their way to the executor, bounded in number and bytes; a full one stops the reader, and TCP the server.
#[derive(Debug)]
struct Inbox {
    queue: mpsc::Sender<(Frame, OwnedSemaphorePermit)>,
    room: Arc<Semaphore>,
    kib: u32,
}

type Orders = mpsc::Receiver<(Frame, OwnedSemaphorePermit)>;

impl Inbox {
    fn new(config: &SessionConfig) -> (Self, Orders) {
        let (queue, orders) = mpsc::channel(config.inbox_queue);
        let kib = u32::try_from(config.inbox_bytes / 1024).unwrap_or(u32::MAX >> 3).max(1);
        (
            Self {
                queue,
                room: Arc::new(Semaphore::new(kib as usize)),
                kib,
            },
            orders,
        )
    }

    async fn put(&self, order: Frame, size: usize) {
        let kib = u32::try_from(size.div_ceil(1024))
            .unwrap_or(self.kib)
            .clamp(1, self.kib);
        // Neither is ever closed while the session lasts, except when the executor's side has gone: then there is no one to tell.
        if let Ok(room) = self.room.clone().acquire_many_owned(kib).await
            && self.queue.send((order, room)).await.is_err()
        {
            tracing::debug!("an order came after the session's orders were stopped");
        }
    }
}

/// Gives orders to the executor one by one. Its own task, so that the end of a session never cuts one in half. Calls of other services
/// are answered beside that, so many at once, for as long as the session lasts.
async fn carry_out<W: Work>(work: Arc<W>, mut orders: Orders, gate: Arc<Semaphore>, lanes: Lanes, max_calls: usize) {
    let mut calls = JoinSet::new();
    loop {
        let next = tokio::select! {
            next = orders.recv() => next,
            Some(_) = calls.join_next() => continue,
        };
        let Some((order, room)) = next else { return };
        let Ok(_open) = gate.acquire().await else { return };
        match order {
            Frame::Call(call) if calls.len() >= max_calls => {
                lanes.control(refused(call.call_id, CallFailure::Busy));
            }
            Frame::Call(call) => {
                let (work, lanes) = (work.clone(), lanes.clone());
                calls.spawn(async move {
                    let reply = work.call(call).await;
                    if lanes.result(reply).await.is_err() {
                        tracing::debug!("the session ended before a call was answered");
                    }
                    drop(room);
                });
                continue;
            }
            Frame::Dispatch(dispatch) => work.dispatch(dispatch).await,
            Frame::Terminate(terminate) => match terminate.target {
                Some(target) => work.terminate(target).await,
                None => tracing::warn!("a Terminate without a target was ignored"),
            },
            Frame::Stored(stored) => work.stored(stored),
            Frame::ProcReported(stored) => work.processes_stored(stored),
            other => tracing::warn!(kind = other.kind(), "not an order; ignored"),
        }
        drop(room);
    }
}

#[allow(clippy::too_many_arguments)] // what a session consists of, taken apart once
async fn drive<W: Work>(
    connection: Connection,
    work: Arc<W>,
    config: SessionConfig,
    pace: Pace,
    inbox: Inbox,
    leave: watch::Receiver<Option<Goodbye>>,
    told: Told,
    (lanes, outgoing): (Lanes, Outgoing),
) -> End {
    let Connection {
        stream,
        buffer,
        welcome,
        ..
    } = connection;
    let reports = work.attach(Link {
        stream_window: welcome.stream_window,
        session_window: welcome.session_window,
        server_time_ms: welcome.server_time_ms,
    });
    let interval = match welcome.heartbeat_interval_ms {
        0 => DEFAULT_HEARTBEAT,
        ms => Duration::from_millis(ms.into()).clamp(SHORTEST_HEARTBEAT, LONGEST_HEARTBEAT),
    };
    let quiet = match config.read_idle_timeout_ms {
        0 => interval * QUIET_INTERVALS,
        ms => Duration::from_millis(ms),
    };
    let heard = Mutex::new(Instant::now());
    let (read, write) = tokio::io::split(stream);
    let reader = Reader {
        lanes: &lanes,
        inbox: &inbox,
        told: &told,
        heard: &heard,
        max_message: config.max_message,
    };
    let writer = write_frames(
        write,
        outgoing,
        leave.clone(),
        config.write_timeout(),
        config.leave_timeout(),
    );
    let Pace { random, meter } = pace;
    // In this order, so that a run can be repeated; none of them is ever ready for long.
    tokio::select! {
        biased;
        end = reader.run(read, buffer) => end,
        end = writer => match end {
            WriterEnd::Left => End::Left,
            WriterEnd::Failed(error) => End::Failed(format!("cannot send: {error}")),
        },
        () = no_time_left(leave.clone(), config.leave_timeout()) => {
            End::Failed("the server did not take the goodbye in time".to_owned())
        }
        end = listen_for_silence(&lanes, &heard, quiet, interval, &random) => end,
        never = beat(&lanes, work.as_ref(), interval, meter, &random) => match never {},
        never = pass_on(&lanes, reports, leave.clone()) => match never {},
        never = speak(&lanes, work.as_ref(), leave.clone()) => match never {},
        never = report_processes(&lanes, work.as_ref(), leave) => match never {},
    }
}

struct Reader<'a> {
    lanes: &'a Lanes,
    inbox: &'a Inbox,
    told: &'a Told,
    heard: &'a Mutex<Instant>,
    max_message: usize,
}

impl Reader<'_> {
    async fn run<R: AsyncRead + Unpin>(self, mut socket: R, mut buffer: BytesMut) -> End {
        loop {
            loop {
                let raw = match frame::take_raw(&mut buffer, self.max_message) {
                    Ok(Some(raw)) => raw,
                    Ok(None) => break,
                    Err(error) => return End::Failed(format!("undecodable: {error}")),
                };
                let size = raw.message.len();
                let frame = match Frame::decode(raw) {
                    Ok(frame) => frame,
                    Err(error) => return End::Failed(format!("undecodable: {error}")),
                };
                if let Some(end) = self.take(frame, size).await {
                    return end;
                }
            }
            let whole = frame::announced_len(&buffer)
                .unwrap_or(0)
                .min(self.max_message + frame::HEADER_LEN);
            buffer.reserve(whole.saturating_sub(buffer.len()).max(READ_AHEAD));
            match socket.read_buf(&mut buffer).await {
                Ok(0) => return End::Closed,
                Ok(_) => *self.heard.lock() = Instant::now(),
                Err(error) => return End::Failed(format!("cannot receive: {error}")),
            }
        }
    }

    async fn take(&self, frame: Frame, size: usize) -> Option<End> {
        match frame {
            Frame::Ping(ping) => {
                self.lanes.control(Pong { nonce: ping.nonce });
            }
            Frame::Pong(_) => {}
            order @ (Frame::Dispatch(_)
            | Frame::Terminate(_)
            | Frame::Stored(_)
            | Frame::Call(_)
            | Frame::ProcReported(_)) => {
                self.inbox.put(order, size).await;
            }
            Frame::Goodbye(goodbye) => return Some(End::Goodbye(goodbye)),
            Frame::Refuse(refuse) => return Some(End::Refused(refuse)),
            Frame::Move(wish) => {
                self.told.moves.send_replace(Some(wish));
            }
            Frame::Servers(list) => {
                self.told.servers.send_replace(list.servers);
            }
            Frame::Unsupported(answer) => {
                tracing::info!(
                    kind = answer.kind,
                    "the server does not know a kind of frame that was sent to it"
                );
            }
            Frame::Unknown { kind, .. } => {
                tracing::debug!(kind, "a frame of an unknown kind was skipped");
                self.lanes.control(Unsupported { kind: kind.into() });
            }
            other => tracing::debug!(kind = other.kind(), "not for an agent; skipped"),
        }
        None
    }
}

enum Never {}

/// A heartbeat at once, and then at every interval, give or take a tenth.
async fn beat<W: Work>(
    lanes: &Lanes,
    work: &W,
    interval: Duration,
    mut meter: Option<LoadMeter>,
    random: &Random,
) -> Never {
    loop {
        let load = match &mut meter {
            Some(meter) => meter.read().await,
            None => Load::default(),
        };
        let (running, queued) = work.counts();
        lanes.control(Heartbeat {
            cpu_permille: load.cpu_permille,
            mem_permille: load.mem_permille,
            running,
            queued,
        });
        sleep(about(interval, random)).await;
    }
}

/// Finds connections whose other end has gone without a word.
async fn listen_for_silence(
    lanes: &Lanes,
    heard: &Mutex<Instant>,
    quiet: Duration,
    grace: Duration,
    random: &Random,
) -> End {
    loop {
        let last = *heard.lock();
        sleep_until(last + quiet).await;
        let asked = *heard.lock();
        if asked > last {
            continue;
        }
        lanes.control(Ping { nonce: random.u64() });
        sleep(grace).await;
        if *heard.lock() == asked {
            return End::Silent(asked.elapsed());
        }
    }
}

/// Resolves when the agent was asked to leave and has had the time for it, whatever the writer is in the middle of.
async fn no_time_left(mut leave: watch::Receiver<Option<Goodbye>>, limit: Duration) {
    if leave.wait_for(Option::is_some).await.is_err() {
        return std::future::pending().await;
    }
    sleep(limit).await;
}

/// What the executor reports goes into the lanes, until the agent leaves or the executor is attached to another session.
async fn pass_on(
    lanes: &Lanes,
    mut reports: mpsc::Receiver<Report>,
    mut leave: watch::Receiver<Option<Goodbye>>,
) -> Never {
    let passing = async {
        while let Some(report) = reports.recv().await {
            let sent = match report {
                Report::Row(row) => lanes.result(row).await,
                Report::Output(output) => lanes.bulk(output).await,
            };
            if sent.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        biased;
        () = passing => {}
        // An error means that no one can ask any more, which is the end of the session as well.
        _ = leave.wait_for(Option::is_some) => {}
    }
    std::future::pending().await
}

/// What plugins say goes into the lanes, until the agent leaves. A place in the lane comes first, so that nothing is taken that can't be
/// sent.
async fn speak<W: Work>(lanes: &Lanes, work: &W, mut leave: watch::Receiver<Option<Goodbye>>) -> Never {
    let speaking = async {
        while let Ok(place) = lanes.place().await {
            place.send(work.said().await.into());
        }
    };
    tokio::select! {
        biased;
        () = speaking => {}
        _ = leave.wait_for(Option::is_some) => {}
    }
    std::future::pending().await
}

/// Reports about processes go into the lanes, until the agent leaves. One is under way at a time, so they need no place of their own.
async fn report_processes<W: Work>(lanes: &Lanes, work: &W, mut leave: watch::Receiver<Option<Goodbye>>) -> Never {
    let reporting = async { while lanes.result(work.process_report().await).await.is_ok() {} };
    tokio::select! {
        biased;
        () = reporting => {}
        _ = leave.wait_for(Option::is_some) => {}
    }
    std::future::pending().await
}
