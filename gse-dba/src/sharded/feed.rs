//! One connection to the primary of a group that is subscribed to everything that clients of this process want, and subscribes again wherever the primary is
//! next. Messages go to `hub`.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use ahash::RandomState;
use bytes::{Buf as _, Bytes, BytesMut};
use gse_core::lifecycle::Lifecycle;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::hub::{Hub, Key, Kind};
use super::link;
use super::merge;
use super::seat::Seat;
use crate::resp::skip::{End, Skipper};
use crate::single::dial::Stream;
use crate::single::session::push_command;

/// Changes that may wait; past them the feed connects anew, which takes everything in at once.
const MAX_TODO: usize = 100_000;
/// Names in one command.
const AT_ONCE: usize = 500;
const READ: usize = 64 * 1024;
/// A connection without messages is asked for a sign of life so often.
const QUIET: Duration = Duration::from_secs(1);

#[derive(Default)]
struct State {
    connected: bool,
    todo: VecDeque<(Key, bool)>,
    overrun: bool,
    /// For each key the changes that are not confirmed yet, and whether the last confirmation was of a subscription.
    keys: HashMap<Key, (u32, bool), RandomState>,
}

/// What one group is to be subscribed to, and what it has confirmed.
pub(super) struct Wanted {
    pub(super) name: String,
    /// Of its group.
    pub(super) index: usize,
    state: Mutex<State>,
    work: Notify,
    tick: watch::Sender<u64>,
}

impl Wanted {
    /// Takes in a change.
    pub(super) fn change(&self, hub: &Hub, key: &Key, on: bool) {
        let mut s = self.state.lock();
        if !s.connected || !hub.carries(self.index, key) {
            // All that is wanted then is taken in on connecting.
            return;
        }
        s.keys.entry(key.clone()).or_insert((0, false)).0 += 1;
        if s.todo.len() < MAX_TODO {
            s.todo.push_back((key.clone(), on));
        } else {
            s.overrun = true;
        }
        drop(s);
        self.work.notify_one();
    }

    pub(super) fn has(&self, key: &Key) -> bool {
        self.state.lock().keys.get(key) == Some(&(0, true))
    }

    /// The group may still count it.
    pub(super) fn knows(&self, key: &Key) -> bool {
        self.state.lock().keys.contains_key(key)
    }

    pub(super) async fn confirmed(&self, key: &Key) {
        let mut ticks = self.tick.subscribe();
        while !self.has(key) {
            if ticks.changed().await.is_err() {
                return;
            }
        }
    }

    pub(super) async fn settled(&self, key: &Key) {
        let mut ticks = self.tick.subscribe();
        while self.state.lock().keys.get(key).is_some_and(|k| k.0 > 0) {
            if ticks.changed().await.is_err() {
                return;
            }
        }
    }

    fn confirm(&self, key: &Key, on: bool) {
        let mut s = self.state.lock();
        if let Some(k) = s.keys.get_mut(key) {
            *k = (k.0.saturating_sub(1), on);
            if *k == (0, false) {
                s.keys.remove(key);
            }
        }
        drop(s);
        self.tick.send_modify(|n| *n += 1);
    }

    /// It is to be subscribed to other things than before.
    pub(super) fn begin_anew(&self) {
        self.state.lock().overrun = true;
        self.work.notify_one();
    }

    fn begin(&self, hub: &Hub) {
        hub.snapshot(|mut all| {
            all.retain(|k| hub.carries(self.index, k));
            let mut s = self.state.lock();
            s.connected = true;
            s.overrun = false;
            s.keys = all.iter().map(|k| (k.clone(), (1, false))).collect();
            s.todo = all.into_iter().map(|k| (k, true)).collect();
        });
    }

    fn end(&self) {
        *self.state.lock() = State::default();
        self.tick.send_modify(|n| *n += 1);
    }

    /// What there is to say: runs of the same kind in one command.
    fn take(&self) -> Result<Vec<u8>, String> {
        let mut s = self.state.lock();
        if s.overrun {
            return Err("too many changes at once".into());
        }
        let mut out = Vec::new();
        while let Some(((kind, _), on)) = s.todo.front() {
            let (kind, on) = (*kind, *on);
            let n = s
                .todo
                .iter()
                // In a cluster the names of one command have to be in one slot.
                .take(if kind == Kind::Shard { 1 } else { AT_ONCE })
                .take_while(|((k, _), o)| *k == kind && *o == on)
                .count();
            let names: Vec<Bytes> = s.todo.drain(..n).map(|((_, name), _)| name).collect();
            let verb = if on { kind.subscribe() } else { kind.unsubscribe() };
            let words: Vec<&[u8]> = std::iter::once(verb.as_bytes())
                .chain(names.iter().map(AsRef::as_ref))
                .collect();
            push_command(&mut out, words.into_iter());
        }
        Ok(out)
    }
}

/// Starts the feed of one group.
pub(crate) fn start(seat: &Arc<Seat>, hub: &Hub, life: &Lifecycle) {
    let wanted = Arc::new(Wanted {
        name: seat.name.clone(),
        index: hub.feeds(),
        state: Mutex::default(),
        work: Notify::new(),
        tick: watch::Sender::new(0),
    });
    hub.attach(Arc::clone(&wanted));
    let (seat, hub, closing) = (Arc::clone(seat), hub.clone(), life.clone());
    life.spawn_until_closed("dba-feed", async move {
        tokio::select! {
            () = run(seat, hub, wanted) => {}
            () = closing.closing() => {}
        }
    });
}

async fn run(seat: Arc<Seat>, hub: Hub, wanted: Arc<Wanted>) {
    let mut heads = seat.heads();
    let wait = Duration::from_millis(seat.config.reconnect_max_ms.min(500));
    loop {
        let head = heads.borrow_and_update().clone();
        let reason = match link::connect(&seat, &head, false).await {
            Ok(stream) => {
                wanted.begin(&hub);
                let reason = tokio::select! {
                    reason = serve(stream, &hub, &wanted, seat.max_reply) => reason,
                    _ = heads.changed() => {
                        heads.mark_changed();
                        "the group has another primary".to_owned()
                    }
                };
                wanted.end();
                reason
            }
            Err(reason) => reason,
        };
        seat.nudge();
        tracing::debug!(group = %seat.name, reason, "no subscription connection");
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = heads.changed() => heads.mark_changed(),
        }
    }
}

/// Until something is wrong with the connection, and what.
async fn serve(mut stream: Stream, hub: &Hub, wanted: &Wanted, max: usize) -> String {
    let mut buf = BytesMut::with_capacity(READ);
    let (mut skipper, mut scanned, mut asked) = (Skipper::default(), 0, false);
    loop {
        let out = match wanted.take() {
            Ok(out) => out,
            Err(reason) => return reason,
        };
        if !out.is_empty() {
            match timeout(QUIET * 5, stream.write_all(&out)).await {
                Ok(Ok(())) => {}
                Ok(Err(e)) => return e.to_string(),
                Err(_) => return "it does not take commands".to_owned(),
            }
        }
        buf.reserve(READ);
        tokio::select! {
            () = wanted.work.notified() => continue,
            read = timeout(QUIET * 2, stream.read_buf(&mut buf)) => match read {
                Ok(Ok(0)) => return "it closed the connection".to_owned(),
                Ok(Ok(_)) => asked = false,
                Ok(Err(e)) => return e.to_string(),
                Err(_) if asked => return "it gives no sign of life".to_owned(),
                Err(_) => {
                    asked = true;
                    if let Err(e) = stream.write_all(b"*1\r\n$4\r\nPING\r\n").await {
                        return e.to_string();
                    }
                }
            },
        }
        loop {
            match skipper.next(&buf, scanned) {
                Ok(Some(End::Reply(end) | End::Push(end))) => {
                    let frame = buf.split_to(end).freeze();
                    scanned = 0;
                    if let Err(reason) = take(&frame, hub, wanted) {
                        return reason;
                    }
                }
                Ok(None) => {
                    scanned = buf.len();
                    break;
                }
                Err(e) => return e,
            }
            if !buf.has_remaining() {
                break;
            }
        }
        if buf.len() > max {
            return "a message is larger than limits.output_buffer_bytes".to_owned();
        }
    }
}

fn take(frame: &Bytes, hub: &Hub, wanted: &Wanted) -> Result<(), String> {
    if frame.first() == Some(&b'-') {
        return Err(String::from_utf8_lossy(frame).trim_end().to_owned());
    }
    // A sign of life is all that is no list.
    let Some(words) = merge::elements(frame) else {
        return Ok(());
    };
    let word = |i: usize| words.get(i).and_then(|w| merge::body(w));
    let Some(first) = word(0) else { return Ok(()) };
    let name = || word(1).map(|n| frame.slice_ref(n));
    match first {
        b"message" => name().map(|n| hub.deliver(&(Kind::Channel, n), frame)),
        b"pmessage" => name().map(|n| hub.deliver(&(Kind::Pattern, n), frame)),
        b"smessage" => name().map(|n| hub.deliver(&(Kind::Shard, n), frame)),
        _ => {
            let found = Kind::ALL.into_iter().find_map(|k| {
                (first == k.subscribe().as_bytes())
                    .then_some((k, true))
                    .or_else(|| (first == k.unsubscribe().as_bytes()).then_some((k, false)))
            });
            if let Some((kind, on)) = found
                && let Some(n) = name()
            {
                wanted.confirm(&(kind, n), on);
            }
            None
        }
    };
    Ok(())
}
