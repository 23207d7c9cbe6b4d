//! A connection once both ends are known: what comes is taken apart and told to the swarm, what the swarm wants said is written, and
//! requests for what was shown are answered, a block at a time, under the limits.
//!
//! One task reads and writes; a peer that does not read holds up nobody but itself, and is left after a time.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use futures::{Stream, StreamExt as _};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, timeout};

use super::assembly::{Assembly, Taken};
use super::{ASK_FOREIGN, Command, Established, Event, LinkConfig, OWN_BLOCK, Place, QUEUE, Who};
use crate::geometry::BLOCK;
use crate::limit::Limit;
use crate::plan::PeerKey;
use crate::storage::{Storage, StorageError};
use crate::wire::{EXT_HANDSHAKE, ExtHandshake, Message, WireError, piece_head};
use crate::{Bitmap, Block};

/// Bytes that are read from disk at a time, from which blocks are then cut.
const READ_AHEAD: u32 = 256 * 1024;
/// Unsent bytes that may wait in the kernel for one connection, however many there are.
const LEAST_SHARE: usize = 32 * 1024;
/// What the peer hardly needs to know waits for so many times longer than what it may be waiting for.
const HARDLY: u32 = 10;
/// Room in the buffer before each read.
const READ: usize = 64 * 1024;

/// Bytes of content moved, both ways.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) up: AtomicU64,
    pub(crate) down: AtomicU64,
    /// Of `down`, across the border of the zone.
    pub(crate) crossed: AtomicU64,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it says what cannot be understood: {0}")]
    Wire(#[from] WireError),
    #[error("it asks for a block that does not exist: {0}")]
    Block(#[from] crate::geometry::GeometryError),
    #[error("it asks for more than {QUEUE} blocks at a time")]
    Greedy,
    #[error("its bitfield is wrong: {0}")]
    Bitfield(#[from] crate::bitmap::BitmapError),
    #[error("it has sent nothing for {} s though it was asked for blocks", .0.as_secs())]
    Silent(Duration),
    #[error("it has said nothing for {} s", .0.as_secs())]
    Idle(Duration),
    #[error("it has taken nothing for {} s", .0.as_secs())]
    Stuck(Duration),
    #[error("{0}")]
    Storage(String),
}

/// What a link is made of.
pub(crate) struct Link {
    pub(crate) key: PeerKey,
    pub(crate) who: Arc<Who>,
    pub(crate) storage: Storage,
    pub(crate) config: LinkConfig,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) events: mpsc::Sender<(PeerKey, Event)>,
    /// Of the swarm, and of the engine.
    pub(crate) up: [Limit; 2],
    pub(crate) down: [Limit; 2],
    pub(crate) counters: Arc<Counters>,
    pub(crate) engine: crate::metrics::Metrics,
    /// The swarm wants to know of everything sent.
    pub(crate) report_sent: bool,
}

/// What the peer has asked for.
struct Uploads {
    queue: VecDeque<Block>,
    /// To be told that they will not come.
    refused: Vec<Block>,
    announced: Bitmap,
    last_asked: Option<u32>,
}

/// What the reading and the writing half share.
struct State {
    down: Mutex<Assembly>,
    up: Mutex<Uploads>,
    /// What the peer has said that it has.
    theirs: Mutex<Bitmap>,
    /// Something may be written: requests, refusals.
    wake: Notify,
    /// The peer has asked for something.
    asked: Notify,
}

struct Fixed {
    key: PeerKey,
    who: Arc<Who>,
    storage: Storage,
    config: LinkConfig,
    events: mpsc::Sender<(PeerKey, Event)>,
    up: [Limit; 2],
    down: [Limit; 2],
    counters: Arc<Counters>,
    engine: crate::metrics::Metrics,
    report_sent: bool,
}

/// Runs a connection until either side ends it.
pub(crate) async fn run(link: Link, connection: Established) -> Result<(), LinkError> {
    let Established {
        stream,
        rest,
        permit,
        socket,
        ..
    } = connection;
    let geometry = link.storage.geometry();
    let (block, most) = if link.who.is_own() {
        (OWN_BLOCK, QUEUE / 2)
    } else {
        (BLOCK, ASK_FOREIGN.min(link.who.queue))
    };
    let state = State {
        down: Mutex::new(Assembly::new(geometry, block, most)),
        up: Mutex::new(Uploads {
            queue: VecDeque::new(),
            refused: Vec::new(),
            announced: Bitmap::new(geometry.pieces()),
            last_asked: None,
        }),
        theirs: Mutex::new(Bitmap::new(geometry.pieces())),
        wake: Notify::new(),
        asked: Notify::new(),
    };
    let fixed = Fixed {
        key: link.key,
        who: link.who,
        storage: link.storage,
        config: link.config,
        events: link.events,
        up: link.up,
        down: link.down,
        counters: link.counters,
        engine: link.engine,
        report_sent: link.report_sent,
    };
    let (from, to) = tokio::io::split(stream);
    let ended = tokio::select! {
        ended = read(&fixed, &state, from, rest) => ended,
        ended = write(&fixed, &state, to, &socket, link.commands) => ended,
    };
    drop(permit);
    ended
}

async fn read(
    link: &Fixed,
    state: &State,
    mut from: impl AsyncRead + Unpin,
    mut buffer: BytesMut,
) -> Result<(), LinkError> {
    loop {
        while let Some(message) = Message::decode(&mut buffer)? {
            if !take(link, state, message).await? {
                return Ok(());
            }
        }
        buffer.reserve(READ);
        let owed = state.down.lock().is_owed();
        let patience = if owed { link.config.silence } else { link.config.idle };
        let got = timeout(patience, from.read_buf(&mut buffer)).await.map_err(|_| {
            if owed {
                LinkError::Silent(patience)
            } else {
                LinkError::Idle(patience)
            }
        })??;
        if got == 0 {
            return Ok(());
        }
    }
}

/// Deals with a message; false if the swarm is gone.
async fn take(link: &Fixed, state: &State, message: Message) -> Result<bool, LinkError> {
    let geometry = link.storage.geometry();
    let event = match message {
        Message::KeepAlive | Message::Interested | Message::NotInterested => None,
        Message::Choke => {
            // What was asked for is void: the swarm asks for it anew, here or elsewhere.
            state.down.lock().forget_all();
            Some(Event::Choking(true))
        }
        Message::Unchoke => Some(Event::Choking(false)),
        Message::Have(piece) => {
            geometry.check_piece(piece)?;
            state.theirs.lock().set(piece);
            Some(Event::Have(piece))
        }
        Message::Bitfield(bits) => Some(has(state, Bitmap::from_wire(&bits, geometry.pieces())?)),
        Message::HaveAll => Some(has(state, Bitmap::full(geometry.pieces()))),
        Message::HaveNone => None,
        Message::Request(block) => {
            geometry.check(block)?;
            asked(link, state, block)?
        }
        Message::Cancel(block) => {
            let mut up = state.up.lock();
            let before = up.queue.len();
            up.queue.retain(|other| *other != block);
            if link.who.fast && up.queue.len() < before {
                up.refused.push(block);
                state.wake.notify_one();
            }
            None
        }
        Message::Reject(block) => {
            let refused = state.down.lock().refused(block);
            state.wake.notify_one();
            refused.map(Event::Refused)
        }
        Message::Piece { piece, begin, data } => {
            let len = data.len();
            link.counters.down.fetch_add(len as u64, Ordering::Relaxed);
            if link.who.place == Place::Upstream {
                link.counters.crossed.fetch_add(len as u64, Ordering::Relaxed);
            }
            link.engine.received.inc_by(len as u64);
            let taken = state.down.lock().take(piece, begin, data);
            state.wake.notify_one();
            for limit in &link.down {
                limit.take(len).await;
            }
            match taken {
                Taken::Whole(piece, parts) => Some(Event::Piece { piece, parts }),
                Taken::First => Some(Event::Started(piece)),
                Taken::Part | Taken::Unwanted => None,
            }
        }
        Message::Extended { id, payload } => {
            if id == EXT_HANDSHAKE
                && let Ok(shake) = ExtHandshake::decode(&payload)
                && let Some(most) = shake.reqq
                && !link.who.is_own()
            {
                state.down.lock().set_most(ASK_FOREIGN.min(most as usize));
            }
            None
        }
        Message::Suggest(_) | Message::AllowedFast(_) | Message::Port(_) | Message::Unknown(_) => None,
    };
    match event {
        Some(event) => Ok(link.events.send((link.key, event)).await.is_ok()),
        None => Ok(true),
    }
}

/// The peer says all that it has.
fn has(state: &State, bits: Bitmap) -> Event {
    state.theirs.lock().clone_from(&bits);
    Event::Bitfield(bits)
}

/// The peer wants a block.
fn asked(link: &Fixed, state: &State, block: Block) -> Result<Option<Event>, LinkError> {
    let mut up = state.up.lock();
    if !up.announced.get(block.piece) {
        // It was not shown this piece: it is not here, or is kept for others.
        if link.who.fast {
            up.refused.push(block);
            state.wake.notify_one();
        }
        if up.refused.len() > QUEUE {
            return Err(LinkError::Greedy);
        }
        return Ok(None);
    }
    if up.queue.len() >= QUEUE {
        return Err(LinkError::Greedy);
    }
    up.queue.push_back(block);
    state.asked.notify_one();
    let new = up.last_asked.replace(block.piece) != Some(block.piece);
    Ok((new && link.report_sent).then_some(Event::Asked(block.piece)))
}

/// What was read last for the peer, of which further blocks are cut.
struct Ahead {
    piece: u32,
    begin: u32,
    data: Bytes,
}

/// Blocks that the peer has asked for, read and let through by the limits, one after the other.
fn blocks<'a>(link: &'a Fixed, state: &'a State) -> impl Stream<Item = Result<(Block, Bytes), StorageError>> + 'a {
    let none = Ahead {
        piece: u32::MAX,
        begin: 0,
        data: Bytes::new(),
    };
    futures::stream::unfold(none, move |mut ahead| async move {
        let block = loop {
            let next = state.up.lock().queue.pop_front();
            match next {
                Some(block) => break block,
                None => state.asked.notified().await,
            }
        };
        let end = block.begin + block.len;
        let inside = ahead.piece == block.piece
            && block.begin >= ahead.begin
            && end as usize <= ahead.begin as usize + ahead.data.len();
        if !inside {
            let begin = block.begin / READ_AHEAD * READ_AHEAD;
            let left = link.storage.geometry().piece_len(block.piece) - begin;
            let len = left.min(READ_AHEAD).max(end - begin);
            match link.storage.read(block.piece, begin, len).await {
                Ok(data) => {
                    ahead = Ahead {
                        piece: block.piece,
                        begin,
                        data,
                    }
                }
                Err(error) => return Some((Err(error), ahead)),
            }
        }
        let at = (block.begin - ahead.begin) as usize;
        let data = ahead.data.slice(at..at + block.len as usize);
        for limit in &link.up {
            limit.take(data.len()).await;
        }
        Some((Ok((block, data)), ahead))
    })
}

async fn write(
    link: &Fixed,
    state: &State,
    mut to: impl AsyncWrite + Unpin,
    socket: &OwnedFd,
    mut commands: mpsc::Receiver<Command>,
) -> Result<(), LinkError> {
    let blocks = blocks(link, state);
    tokio::pin!(blocks);
    let mut out = BytesMut::new();
    let mut said = Instant::now();
    // When what waits in `out` has to go; a write is a record of TLS and mostly a packet, so small messages wait for company.
    let mut due: Option<Instant> = None;
    let mut share = 0;
    loop {
        let mut content = None;
        tokio::select! {
            biased;
            command = commands.recv() => {
                let Some(command) = command else { return Ok(()) };
                due = sooner(due, obey(link, state, command, said, &mut out));
                for _ in 0..256 {
                    let Ok(command) = commands.try_recv() else { break };
                    due = sooner(due, obey(link, state, command, said, &mut out));
                }
            }
            () = state.wake.notified() => {}
            block = blocks.next() => match block {
                Some(Ok(block)) => content = Some(block),
                Some(Err(error)) => {
                    let text = error.to_string();
                    // The swarm has to know; if it is gone, there is nobody to tell.
                    let _told = link.events.send((link.key, Event::Unreadable(error))).await;
                    return Err(LinkError::Storage(text));
                }
                None => return Ok(()),
            },
            () = tokio::time::sleep_until(due.unwrap_or(said + link.config.keep_alive)) => {
                if due.is_none() {
                    Message::KeepAlive.encode(&mut out);
                    due = Some(said);
                }
            }
        }
        if pump(state, &mut out) {
            due = Some(said);
        }
        if content.is_none() && due.is_none_or(|due| due > Instant::now()) {
            continue;
        }
        due = None;
        if content.is_some() {
            keep_to_share(link, socket, &mut share);
        }
        let patience = link.config.idle;
        let sent = content.as_ref().map(|(block, data)| (*block, data.len()));
        let writing = async {
            match content {
                Some((block, data)) => {
                    out.extend_from_slice(&piece_head(block.piece, block.begin, data.len()));
                    to.write_all_buf(&mut (&mut out).chain(data)).await?;
                }
                None => to.write_all_buf(&mut out).await?,
            }
            to.flush().await
        };
        timeout(patience, writing)
            .await
            .map_err(|_| LinkError::Stuck(patience))??;
        out.clear();
        said = Instant::now();
        if let Some((block, bytes)) = sent {
            let bytes = bytes as u64;
            link.counters.up.fetch_add(bytes, Ordering::Relaxed);
            link.engine.sent.inc_by(bytes);
            if link.report_sent {
                let event = Event::Sent {
                    piece: block.piece,
                    bytes,
                };
                if link.events.send((link.key, event)).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

/// Holds what waits in the kernel to this connection's share of what may wait there in all; the shares change as peers come and go.
/// What is on its way counts for nothing: how much that is, the kernel finds out by the distance.
fn keep_to_share(link: &Fixed, socket: &OwnedFd, share: &mut usize) {
    let others = usize::try_from(link.engine.connections.get()).unwrap_or(1).max(1);
    let fair = (link.config.unsent / others).max(LEAST_SHARE);
    if fair.abs_diff(*share) * 4 <= *share {
        return;
    }
    *share = fair;
    let bytes = u32::try_from(fair).unwrap_or(u32::MAX);
    // A refusal costs patience at most.
    if let Err(error) = socket2::SockRef::from(socket).set_tcp_notsent_lowat(bytes) {
        tracing::debug!(%error, "bound of unsent bytes of a peer's connection");
    }
}

fn sooner(due: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    [due, other].into_iter().flatten().min()
}

/// Writes the requests that the peer may be sent now, and the refusals it is owed; whether there were any.
fn pump(state: &State, out: &mut BytesMut) -> bool {
    let before = out.len();
    {
        let mut down = state.down.lock();
        while let Some(block) = down.next() {
            Message::Request(block).encode(out);
        }
    }
    let refused = std::mem::take(&mut state.up.lock().refused);
    for block in refused {
        Message::Reject(block).encode(out);
    }
    out.len() > before
}

/// Puts what the swarm wants said into words; returns when they have to go, if there are any. `said`: when something was written last.
fn obey(link: &Fixed, state: &State, command: Command, said: Instant, out: &mut BytesMut) -> Option<Instant> {
    match command {
        Command::Begin { have, interested } => {
            let count = have.as_ref().map_or(0, Bitmap::count);
            match have {
                Some(have) if count > 0 => {
                    if link.who.fast && have.is_full() {
                        Message::HaveAll.encode(out);
                    } else {
                        Message::Bitfield(have.to_wire()).encode(out);
                    }
                    state.up.lock().announced = have;
                }
                _ if link.who.fast => Message::HaveNone.encode(out),
                _ => {}
            }
            if link.who.extended && !link.who.is_own() {
                let shake = ExtHandshake {
                    reqq: Some(QUEUE as u32),
                    ..ExtHandshake::default()
                };
                Message::Extended {
                    id: EXT_HANDSHAKE,
                    payload: shake.encode(),
                }
                .encode(out);
            }
            if interested {
                Message::Interested.encode(out);
            }
            Message::Unchoke.encode(out);
        }
        Command::Have(piece) => {
            state.up.lock().announced.set(piece);
            Message::Have(piece).encode(out);
            // Who has the piece can't want it; how rare it is, is of no importance to it, either.
            return Some(match state.theirs.lock().get(piece) {
                true => Instant::now() + link.config.gather * HARDLY,
                false => said + link.config.gather,
            });
        }
        Command::Show(pieces) => {
            let mut up = state.up.lock();
            for piece in pieces {
                up.announced.set(piece);
                Message::Have(piece).encode(out);
            }
        }
        Command::Request(piece) => {
            state.down.lock().want(piece);
            // `pump` writes of it what the peer may be asked for now.
            return None;
        }
        Command::Cancel(piece) => {
            for block in state.down.lock().forget(piece) {
                Message::Cancel(block).encode(out);
            }
        }
        Command::NotInterested => Message::NotInterested.encode(out),
    }
    Some(said)
}
