//! One shared connection to the primary of a group. What waits is joined into one write, which ends with a seal: `ROLE`, and `WAIT` when the batch
//! must be on other copies too. No reply leaves here before its seal has come and says that a primary gave it and enough copies have it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use gse_core::lifecycle::Lifecycle;
use rand::RngExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::gate::Flight;
use super::mutants::{self, Mutant};
use super::returned::Identity;
use super::seat::{Head, Seat};
use crate::config::sharded::Reads;
use crate::resp::deal::{Waiting, deal};
use crate::resp::skip::{End, Skipper};
use crate::single::dial::Stream;

/// What became of commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// A primary has executed them and enough copies have them.
    Sealed,
    /// A primary has executed them, and only so many other copies have confirmed it.
    Short(u64),
    /// Who answered is no primary any more.
    Demoted,
    /// There were too few copies, or the group is barred from writes: nothing was executed.
    Refused(String),
    /// The connection was lost; they may have been executed if they were sent.
    Lost { sent: bool, reason: String },
    /// The reply was larger than a client may get.
    TooLarge,
    /// Nothing was executed: the connection leads to the group that has served these slots before.
    Moved,
    /// Nobody would execute it in time.
    Unserved(String),
}

/// Replies, in order, and what became of the commands.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) replies: BytesMut,
    pub(crate) fate: Fate,
}

impl Answer {
    pub(crate) fn without(fate: Fate) -> Self {
        Self {
            replies: BytesMut::new(),
            fate,
        }
    }

    pub(crate) fn lost(sent: bool, reason: impl Into<String>) -> Self {
        Self::without(Fate::Lost {
            sent,
            reason: reason.into(),
        })
    }
}

struct Call {
    bytes: Bytes,
    count: usize,
    writes: bool,
    /// Since when it is sent again and again, if it is.
    again_since: Option<Instant>,
    reply: oneshot::Sender<Answer>,
}

struct Open {
    call: Call,
    replies: BytesMut,
    too_large: bool,
}

impl Open {
    /// Whether it certainly has changed nothing: it only reads, or every command of it was refused by a copy.
    fn is_harmless(&self) -> bool {
        !self.call.writes
            || (!self.replies.is_empty() && !self.too_large && {
                let ends = super::merge::ends(&self.replies, self.call.count);
                let starts = std::iter::once(0).chain(ends.iter().copied());
                ends.len() == self.call.count
                    && starts.take(self.call.count).all(|at| {
                        let reply = self.replies.get(at..).unwrap_or_default();
                        // Of a cluster's node the second.
                        reply.starts_with(b"-READONLY") || reply.starts_with(b"-MOVED")
                    })
            })
    }
}

/// Calls written together, and their seal.
struct Batch {
    /// When it was written.
    since: std::time::Instant,
    calls: Vec<Open>,
    /// The call whose replies come now; past the last one it is the seal.
    at: usize,
    got: usize,
    seal: BytesMut,
    waits: bool,
    _flight: Flight,
}

impl Batch {
    /// What has certainly changed nothing is put into `again`; of the rest nothing is known.
    fn lost(self, reason: &str, again: &mut VecDeque<Call>) {
        for c in self.calls {
            if c.call.writes {
                // A client that has left does not want to know.
                let _ = c.call.reply.send(Answer::lost(true, reason));
            } else {
                again.push_back(c.call);
            }
        }
    }

    fn keep(&mut self, bytes: &[u8], max: usize) {
        match self.calls.get_mut(self.at) {
            Some(c) if c.replies.len() + bytes.len() > max => {
                c.replies = BytesMut::new();
                c.too_large = true;
            }
            Some(c) if !c.too_large => c.replies.extend_from_slice(bytes),
            Some(_) => {}
            None => self.seal.extend_from_slice(bytes),
        }
    }

    /// True when the server that answered is a primary. With `doubtful` it may have been one that was replaced while this was under way, and a copy that had not
    /// heard of it yet has confirmed: that is worth nothing.
    fn finish(self, need: usize, doubtful: bool, again: &mut VecDeque<Call>) -> bool {
        let mut fate = judge(&self.seal, self.waits.then_some(need));
        if doubtful && fate != Fate::Demoted {
            fate = Fate::Lost {
                sent: true,
                reason: "its primary may have been replaced meanwhile".into(),
            };
        }
        let demoted = fate == Fate::Demoted;
        for c in self.calls {
            if (demoted && c.is_harmless()) || (doubtful && !c.call.writes) {
                again.push_back(c.call);
                continue;
            }
            let fate = if c.too_large { Fate::TooLarge } else { fate.clone() };
            let _ = c.call.reply.send(Answer {
                replies: c.replies,
                fate,
            });
        }
        !demoted
    }
}

/// Replies to a seal with `WAIT`.
pub(super) const SEALS: usize = 3;
/// Where the mark of a batch is published. Nobody listens: channels of slots are in no pattern, and the hub has none of this name.
const MARK: &[u8] = b"gse_dba:mark";

/// The commands that end a batch, and how many they are. `ROLE` says who answered. The mark is something new that goes to the copies, whatever the batch was:
/// without it `WAIT` could count what copies confirmed long ago, before they were cut off, and a batch that changed nothing would look confirmed.
pub(super) fn seal(waits: Option<(usize, Duration)>) -> (Vec<u8>, usize) {
    let mut out = b"*1\r\n$4\r\nROLE\r\n".to_vec();
    let Some((need, limit)) = waits else { return (out, 1) };
    let (need, limit) = (need.to_string(), limit.as_millis().to_string());
    crate::single::session::push_command(&mut out, [b"SPUBLISH".as_slice(), MARK, b""].into_iter());
    crate::single::session::push_command(
        &mut out,
        [b"WAIT".as_slice(), need.as_bytes(), limit.as_bytes()].into_iter(),
    );
    (out, SEALS)
}

/// Nobody knows whether the group still serves the slots.
pub(super) fn lapsed(sent: bool) -> Fate {
    Fate::Lost {
        sent,
        reason: "this gse_dba can't see the topology in it".into(),
    }
}

/// Whether this is what a primary answers to `ROLE`.
fn is_primary(role: &[u8]) -> bool {
    role.split(|b| *b == b'\n').nth(2) == Some(b"master\r")
}

/// What the replies to a seal mean; `need` is how many other copies were waited for.
pub(super) fn judge(seal: &[u8], need: Option<usize>) -> Fate {
    let mut skipper = Skipper::default();
    let Ok(Some(End::Reply(end))) = skipper.next(seal, 0) else {
        return Fate::Lost {
            sent: true,
            reason: "its answer to ROLE can't be understood".into(),
        };
    };
    if !is_primary(&seal[..end]) {
        return if mutants::is(Mutant::NoDemotionCheck) {
            Fate::Sealed
        } else {
            Fate::Demoted
        };
    }
    let Some(need) = need else { return Fate::Sealed };
    // Whatever was said to the mark (an older Redis does not know it): it has been executed by now or never will be.
    let Ok(Some(End::Reply(end))) = Skipper::default().next(seal, end) else {
        return Fate::Lost {
            sent: true,
            reason: "its answer to the mark can't be understood".into(),
        };
    };
    let number = seal[end..].strip_prefix(b":").and_then(|n| n.strip_suffix(b"\r\n"));
    match number.and_then(crate::engine::numbers::parse_int) {
        Some(n) if n >= need as i64 => Fate::Sealed,
        Some(n) => Fate::Short(n.max(0) as u64),
        None => Fate::Lost {
            sent: true,
            reason: format!(
                "it broke off WAIT: {}",
                String::from_utf8_lossy(&seal[end..]).trim_end()
            ),
        },
    }
}

/// Connects to a server and makes sure that it is a primary.
pub(super) async fn connect(seat: &Seat, head: &Head, resp3: bool) -> Result<Stream, String> {
    let Some(place) = &head.place else {
        return Err("the group has no primary now".into());
    };
    let mut stream = seat
        .target(place.clone())
        .connect(resp3)
        .await
        .map_err(|e| format!("{e:#}"))?;
    let ask = async {
        let mut ask = seal(None).0;
        for section in ["server", "persistence"] {
            crate::single::session::push_command(&mut ask, [b"INFO".as_slice(), section.as_bytes()].into_iter());
        }
        stream.write_all(&ask).await.map_err(|e| e.to_string())?;
        stream.flush().await.map_err(|e| e.to_string())?;
        let (mut buf, mut skipper, mut at) = (BytesMut::new(), Skipper::default(), 0);
        let mut ends = Vec::with_capacity(3);
        while ends.len() < 3 {
            if at >= buf.len() && stream.read_buf(&mut buf).await.map_err(|e| e.to_string())? == 0 {
                return Err("it closed the connection".to_owned());
            }
            match skipper.next(&buf, at)? {
                Some(End::Reply(end)) => {
                    ends.push(end);
                    at = end;
                }
                Some(End::Push(end)) => at = end,
                None => at = buf.len(),
            }
        }
        if !is_primary(&buf) && !mutants::is(Mutant::NoDemotionCheck) {
            return Ok(false);
        }
        let told = String::from_utf8_lossy(buf.get(ends.first().copied().unwrap_or(0)..).unwrap_or_default());
        if let Some(now) = Identity::read(&told)
            && seat.need > 0
        {
            seat.returned.see(place, now)?;
        }
        Ok(true)
    };
    match timeout(seat.config.connect_timeout(), ask).await {
        Ok(Ok(true)) => Ok(stream),
        Ok(Ok(false)) => Err(format!("{place} is no primary any more")),
        Ok(Err(e)) => Err(e),
        Err(_) => Err(format!("{place} did not say what it is")),
    }
}

/// A handle on one shared connection.
#[derive(Clone)]
pub(crate) struct Link {
    calls: mpsc::Sender<Call>,
}

struct Worker {
    seat: Arc<Seat>,
    resp3: bool,
    calls: mpsc::Receiver<Call>,
    /// Taken from the queue and not sent, or to be sent again: they go first.
    hand: VecDeque<Call>,
}

/// A batch that is not answered for so long keeps the next ones here: whoever stands still may never answer, and what was not sent is in no doubt.
const STALL: Duration = Duration::from_millis(150);
const RECONNECT_FIRST: Duration = Duration::from_millis(20);
/// Bytes joined into one write at most.
const JOIN: usize = 256 * 1024;
const READ: usize = 64 * 1024;
/// Room for one write that is kept for the next.
const KEPT: usize = 64 * 1024;

impl Link {
    pub(super) fn start(seat: Arc<Seat>, resp3: bool, life: &Lifecycle) -> Self {
        let (calls, inbox) = mpsc::channel(seat.config.max_inflight);
        let worker = Worker {
            seat,
            resp3,
            calls: inbox,
            hand: VecDeque::new(),
        };
        let closing = life.clone();
        life.spawn_until_closed("dba-link", async move {
            tokio::select! {
                () = worker.run() => {}
                () = closing.closing() => {}
            }
        });
        Self { calls }
    }

    /// Hands commands over; the answer comes later. A full queue is emptied by the worker, connected or not: this wait ends.
    pub(crate) async fn send(&self, bytes: Bytes, count: usize, writes: bool) -> oneshot::Receiver<Answer> {
        let (reply, answer) = oneshot::channel();
        let call = Call {
            bytes,
            count,
            writes,
            again_since: None,
            reply,
        };
        if let Err(e) = self.calls.send(call).await {
            let _ = e.0.reply.send(Answer::lost(false, "this server is stopping"));
        }
        answer
    }
}

impl Worker {
    async fn run(mut self) {
        let seat = Arc::clone(&self.seat);
        let mut heads = seat.heads();
        let (mut bound, mut down_since) = (RECONNECT_FIRST, Instant::now());
        let mut first = true;
        loop {
            let head = heads.borrow_and_update().clone();
            let reason = match connect(&seat, &head, self.resp3).await {
                Ok(stream) => {
                    bound = RECONNECT_FIRST;
                    seat.metrics.upstream(true);
                    if !std::mem::take(&mut first) {
                        seat.metrics.reconnected();
                    }
                    seat.settle(&head).await;
                    let ended = self.serve(stream, &mut heads, head.generation).await;
                    seat.metrics.upstream(false);
                    down_since = Instant::now();
                    seat.nudge();
                    match ended {
                        None => return,
                        Some(reason) => reason,
                    }
                }
                Err(reason) => {
                    seat.nudge();
                    reason
                }
            };
            let wait = bound.mul_f64(rand::rng().random_range(0.0..1.0));
            bound = (bound * 2).min(Duration::from_millis(seat.config.reconnect_max_ms));
            tracing::info!(group = %seat.name, reason, retry_in = ?wait, "no connection to the primary");
            let pause = tokio::time::sleep(wait);
            tokio::pin!(pause);
            let until = down_since + Duration::from_millis(seat.config.hold_ms);
            loop {
                let held = Instant::now() < until;
                if !held {
                    for call in self.hand.drain(..) {
                        let _ = call.reply.send(Answer::lost(false, reason.as_str()));
                    }
                }
                tokio::select! {
                    () = &mut pause => break,
                    changed = heads.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    // What came while a fail-over may be under way waits for its end.
                    () = sleep_until(until), if held => {}
                    call = self.calls.recv(), if !held => match call {
                        None => return,
                        Some(call) => {
                            let _ = call.reply.send(Answer::lost(false, reason.as_str()));
                        }
                    },
                }
            }
        }
    }

    /// Serves calls until the connection fails or the group has another primary (then: why) or nobody can call any more.
    async fn serve(&mut self, stream: Stream, heads: &mut watch::Receiver<Head>, generation: u64) -> Option<String> {
        let seat = Arc::clone(&self.seat);
        let limit = Duration::from_millis(seat.config.reply_timeout_ms);
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (pend, mut pending) = mpsc::channel::<Batch>(seat.config.max_inflight);
        let mut open: Option<Batch> = None;
        let (calls, hand) = (&mut self.calls, &mut self.hand);
        let (mut waiting, mut again) = (VecDeque::new(), VecDeque::new());
        let waiting = &mut waiting;
        let state = State::default();
        let write = async {
            let mut sent = Sent::default();
            let mut out = BytesMut::new();
            loop {
                if !waiting.is_empty() && !seat.is_patient() {
                    // They were here first.
                    waiting.extend(hand.drain(..));
                    std::mem::swap(hand, waiting);
                }
                if hand.is_empty() {
                    tokio::select! {
                        call = calls.recv() => match call {
                            Some(call) => hand.push_back(call),
                            None => return None,
                        },
                        () = seat.patience_ends(), if !waiting.is_empty() => continue,
                    }
                }
                // Until here and no further when the one there stands still or is no primary any more.
                sent.keep_up(&state).await;
                // Held back rather than sent to a group that may not serve these slots any more.
                let holds = seat.lease.holds() || seat.lease.wait(seat.config.hold()).await;
                let flight = seat.gate.depart().await;
                if seat.generation() != generation {
                    // The gate was opened to another primary.
                    return Some("the group has another primary".to_owned());
                }
                out.clear();
                if out.capacity() > KEPT {
                    out = BytesMut::new();
                }
                let mut batch = Batch {
                    since: std::time::Instant::now(),
                    calls: Vec::new(),
                    at: 0,
                    got: 0,
                    seal: BytesMut::new(),
                    waits: false,
                    _flight: flight,
                };
                let short = seat.short();
                let patient = short.is_some() && seat.is_patient();
                // What a primary says that may be none any more is worth nothing.
                let doubtful = short.is_some() && seat.is_doubtful();
                while let Some(call) = hand.pop_front().or_else(|| calls.try_recv().ok()) {
                    match &short {
                        _ if !holds => {
                            let _ = call.reply.send(Answer::without(lapsed(false)));
                        }
                        Some(_) if (call.writes || doubtful) && patient && waiting.len() < seat.config.max_inflight => {
                            waiting.push_back(call);
                        }
                        Some(why) if call.writes => {
                            let _ = call.reply.send(Answer::without(Fate::Refused(why.clone())));
                        }
                        Some(why) if doubtful => {
                            let _ = call.reply.send(Answer::lost(false, why.as_str()));
                        }
                        _ => {
                            // Reads of a group that is short of copies are what its primary has: nothing is acknowledged meanwhile.
                            batch.waits |= seat.need > 0
                                && !mutants::is(Mutant::NoWait)
                                && (call.writes || (seat.config.reads == Reads::Confirmed && short.is_none()));
                            out.extend_from_slice(&call.bytes);
                            batch.calls.push(Open {
                                call,
                                replies: BytesMut::new(),
                                too_large: false,
                            });
                        }
                    }
                    if out.len() >= JOIN {
                        break;
                    }
                }
                if batch.calls.is_empty() {
                    continue;
                }
                out.extend_from_slice(seat.seal(batch.waits));
                sent.one();
                // Known as pending before a byte of it is out: its reply can then never be a surprise.
                if let Err(e) = pend.send(batch).await {
                    e.0.lost("the connection was lost", hand);
                    return Some("the reader ended".to_owned());
                }
                let whole = async {
                    writer.write_all(&out).await?;
                    writer.flush().await
                };
                match timeout(limit, whole).await {
                    Ok(Ok(())) => {}
                    Ok(Err(e)) => return Some(e.to_string()),
                    Err(_) => return Some("it does not take commands".to_owned()),
                }
            }
        };
        let read = async {
            let mut buf = BytesMut::with_capacity(READ);
            let mut skipper = Skipper::default();
            loop {
                if state.demoted.load(Ordering::Relaxed) && open.is_none() {
                    match pending.try_recv() {
                        Ok(b) => open = Some(b),
                        Err(_) => return "it is no primary any more".to_owned(),
                    }
                }
                buf.reserve(READ);
                let n = if open.is_some() {
                    match timeout(limit, reader.read_buf(&mut buf)).await {
                        Ok(n) => n,
                        Err(_) => return format!("no reply within {limit:?}"),
                    }
                } else {
                    tokio::select! {
                        biased;
                        b = pending.recv() => {
                            open = b;
                            continue;
                        }
                        n = reader.read_buf(&mut buf) => n,
                    }
                };
                match n {
                    Ok(0) => return "the store closed the connection".to_owned(),
                    Ok(_) => {}
                    Err(e) => return e.to_string(),
                }
                let mut batches = Batches {
                    open: &mut open,
                    pending: &mut pending,
                    seat: &seat,
                    generation,
                    state: &state,
                    again: &mut again,
                };
                if let Err(reason) = deal(&mut buf, &mut skipper, &mut batches) {
                    return reason;
                }
            }
        };
        let ended = tokio::select! {
            ended = write => ended,
            reason = read => Some(reason),
            _ = heads.changed() => {
                heads.mark_changed();
                Some("the group has another primary".to_owned())
            }
        };
        let reason = ended.as_deref().unwrap_or("this server is stopping");
        let mut rest: VecDeque<Batch> = open.into_iter().collect();
        pending.close();
        while let Ok(b) = pending.try_recv() {
            rest.push_back(b);
        }
        rest.into_iter().for_each(|b| b.lost(reason, &mut again));
        // In the order in which they came: what was sent, what waited for copies, what was still in hand.
        again.append(waiting);
        again.append(&mut self.hand);
        let hold = seat.config.hold();
        for mut call in again {
            let since = *call.again_since.get_or_insert_with(Instant::now);
            if since.elapsed() < hold {
                self.hand.push_back(call);
            } else {
                let _ = call.reply.send(Answer::lost(false, reason));
            }
        }
        ended
    }
}

/// What the two halves of a connection tell each other.
#[derive(Default)]
struct State {
    answered: AtomicU64,
    progress: Notify,
    demoted: AtomicBool,
}

/// When what is not answered yet was sent.
#[derive(Default)]
struct Sent {
    times: VecDeque<Instant>,
    count: u64,
}

impl Sent {
    fn one(&mut self) {
        self.times.push_back(Instant::now());
        self.count += 1;
    }

    /// Waits while the oldest batch is not answered for too long; for ever when there is no primary there any more.
    async fn keep_up(&mut self, state: &State) {
        loop {
            let open = self.count.saturating_sub(state.answered.load(Ordering::Relaxed));
            while self.times.len() as u64 > open {
                self.times.pop_front();
            }
            let stalls = self.times.front().is_some_and(|t| t.elapsed() > STALL);
            if !stalls && !state.demoted.load(Ordering::Relaxed) {
                return;
            }
            state.progress.notified().await;
        }
    }
}

/// Batches that wait for replies: the one whose replies come now, and those after it.
struct Batches<'a> {
    open: &'a mut Option<Batch>,
    pending: &'a mut mpsc::Receiver<Batch>,
    seat: &'a Seat,
    /// Of the primary that this connection is to.
    generation: u64,
    state: &'a State,
    again: &'a mut VecDeque<Call>,
}

impl Batches<'_> {
    fn current(&mut self) -> Option<&mut Batch> {
        if self.open.is_none() {
            *self.open = self.pending.try_recv().ok();
        }
        self.open.as_mut()
    }
}

impl Waiting for Batches<'_> {
    fn counts(&mut self) -> Option<bool> {
        let b = self.current()?;
        b.got += 1;
        let seals = if b.waits { SEALS } else { 1 };
        Some(b.got == b.calls.get(b.at).map_or(seals, |c| c.call.count))
    }

    fn keep(&mut self, bytes: &[u8]) {
        let max = self.seat.max_reply;
        if let Some(b) = self.current() {
            b.keep(bytes, max);
        }
    }

    fn next(&mut self) {
        let Some(b) = self.open.as_mut() else { return };
        b.got = 0;
        b.at += 1;
        if b.at > b.calls.len()
            && let Some(b) = self.open.take()
        {
            self.seat.backend.observe(b.since.elapsed(), 1);
            if !b.finish(self.seat.need, self.seat.is_past(self.generation), self.again) {
                self.state.demoted.store(true, Ordering::Relaxed);
            }
            self.state.answered.fetch_add(1, Ordering::Relaxed);
            self.state.progress.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIMARY: &str = "*3\r\n$6\r\nmaster\r\n:1\r\n*0\r\n";

    // contract: redis-proxy#20
    #[test]
    fn a_seal_is_good_only_from_a_primary_with_enough_copies() {
        let with = |wait: &str| judge(format!("{PRIMARY}:0\r\n{wait}").as_bytes(), Some(1));
        assert_eq!(with(":1\r\n"), Fate::Sealed);
        assert_eq!(with(":2\r\n"), Fate::Sealed);
        assert_eq!(with(":0\r\n"), Fate::Short(0));
        assert!(matches!(with("-UNBLOCKED gone\r\n"), Fate::Lost { sent: true, .. }));
        assert!(matches!(with(""), Fate::Lost { sent: true, .. }));
        assert_eq!(judge(PRIMARY.as_bytes(), None), Fate::Sealed);
        let copy = b"*5\r\n$5\r\nslave\r\n$1\r\nh\r\n:1\r\n$9\r\nconnected\r\n:1\r\n:2\r\n";
        assert_eq!(judge(copy, Some(1)), Fate::Demoted);
        assert!(matches!(judge(b"", None), Fate::Lost { .. }));
    }
}
