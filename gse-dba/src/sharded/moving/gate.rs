//! The one place through which, while slots are on their way, all commands for them go: to the old group, with every write told to the copy, and after the switch
//! to the new one. It can be held: then nothing is under way and nothing begins.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, watch};

use super::UNLIMITED;
use crate::commands;
use crate::copy::{Touches, Tracker};
use crate::resp::parse::Parser;
use crate::sharded::{Answer, Fate, Group, Pinned};

/// When the copy has fallen far behind, a write waits so long for it, so often.
const CATCH_UP: (Duration, u32) = (Duration::from_millis(5), 20);

/// Where commands go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Target,
}

pub(crate) struct Gate {
    source: Arc<Group>,
    target: Arc<Group>,
    /// Held for reading while a command is under way.
    side: Arc<RwLock<Side>>,
    /// Commands that wait for something to happen must not keep the gate from being held.
    held: watch::Sender<bool>,
    tracker: Arc<Tracker>,
}

/// A command that is under way: what it touches is marked before the gate can be held.
pub(crate) struct UnderWay {
    touches: Option<Touches>,
    /// What it changes could not be read: then anything.
    unknown: Option<Arc<Tracker>>,
    side: OwnedRwLockReadGuard<Side>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.touches = None;
        if let Some(tracker) = &self.unknown {
            tracker.touched_unknown();
        }
    }
}

/// Nothing is under way as long as this is there.
pub(crate) struct Held {
    gate: Arc<Gate>,
    side: OwnedRwLockWriteGuard<Side>,
}

impl Held {
    /// From now on commands go to the new group.
    pub(crate) fn switch(&mut self) {
        *self.side = Side::Target;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.gate.held.send_replace(false);
    }
}

impl Gate {
    pub(crate) fn new(source: Arc<Group>, target: Arc<Group>, tracker: Arc<Tracker>) -> Arc<Self> {
        Arc::new(Self {
            source,
            target,
            side: Arc::new(RwLock::new(Side::Source)),
            held: watch::Sender::new(false),
            tracker,
        })
    }

    pub(crate) fn group(&self, side: Side) -> &Arc<Group> {
        match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        }
    }

    pub(crate) async fn side(&self) -> Side {
        *self.side.read().await
    }

    /// Waits until nothing is under way and lets nothing begin; not for longer than `limit`, for commands wait for it.
    pub(crate) async fn hold(self: &Arc<Self>, limit: Duration) -> Option<Held> {
        self.held.send_replace(true);
        let write = Arc::clone(&self.side).write_owned();
        match tokio::time::timeout(limit, write).await {
            Ok(side) => Some(Held {
                gate: Arc::clone(self),
                side,
            }),
            Err(_) => {
                self.held.send_replace(false);
                None
            }
        }
    }

    /// Becomes true when the gate is about to be held.
    pub(crate) fn holding(&self) -> watch::Receiver<bool> {
        self.held.subscribe()
    }

    async fn enter(&self, writes: &[&[Bytes]]) -> UnderWay {
        if !writes.is_empty() {
            for _ in 0..CATCH_UP.1 {
                if !self.tracker.is_full() {
                    break;
                }
                tokio::time::sleep(CATCH_UP.0).await;
            }
        }
        let side = Arc::clone(&self.side).read_owned().await;
        let mut way = UnderWay {
            touches: None,
            unknown: None,
            side,
        };
        if !writes.is_empty() && *way.side == Side::Source {
            let mut touches = self.tracker.batch();
            let known = writes.iter().flat_map(|w| w.iter()).all(|w| note(&mut touches, w));
            way.unknown = (!known).then(|| Arc::clone(&self.tracker));
            way.touches = Some(touches);
        }
        way
    }

    /// For what deletes everything, wherever it is: the copy begins anew.
    pub(crate) async fn enter_all(&self) -> UnderWay {
        let side = Arc::clone(&self.side).read_owned().await;
        let mut way = UnderWay {
            touches: None,
            unknown: None,
            side,
        };
        if *way.side == Side::Source {
            let mut touches = self.tracker.batch();
            let flush = Bytes::from_static(b"*1\r\n$7\r\nFLUSHDB\r\n");
            note(&mut touches, &flush);
            way.touches = Some(touches);
        }
        way
    }

    /// Passes commands on. They are under way until the answer is there, or nobody waits for it any more.
    pub(crate) fn send(
        self: &Arc<Self>,
        client: u64,
        resp3: bool,
        bytes: Bytes,
        count: usize,
        writes: bool,
    ) -> BoxFuture<'static, Answer> {
        let gate = Arc::clone(self);
        async move {
            let what = [bytes.clone()];
            let all: &[&[Bytes]] = if writes { &[&what] } else { &[] };
            let way = gate.enter(all).await;
            let waiting = gate.group(*way.side).send(client, resp3, bytes, count, writes).await;
            let answer = waiting
                .await
                .unwrap_or_else(|_| Answer::lost(true, "this server is stopping"));
            drop(way);
            answer
        }
        .boxed()
    }

    /// Like a group's own exchange. [`Fate::Moved`] when the connection is to the group that does not serve the slots any more.
    pub(crate) fn exchange<'a>(
        &'a self,
        pinned: &'a mut Pinned,
        bytes: &'a [u8],
        count: usize,
        sealed: bool,
        blocking: bool,
    ) -> BoxFuture<'a, Answer> {
        async move {
            let own = [Bytes::copy_from_slice(bytes)];
            let log = std::mem::take(&mut pinned.log);
            // What is queued takes effect with what is sealed.
            let all: &[&[Bytes]] = if sealed { &[&log, &own] } else { &[] };
            let way = self.enter(all).await;
            if pinned.side != *way.side {
                return Answer::without(Fate::Moved);
            }
            let answer = self
                .group(pinned.side)
                .pass(pinned, bytes, count, sealed, blocking)
                .await;
            drop(way);
            if !sealed {
                pinned.log = log;
                pinned.log.extend(own);
            }
            answer
        }
        .boxed()
    }
}

/// Notes what the commands in these bytes may change; false when they can't be read.
fn note(touches: &mut Touches, bytes: &Bytes) -> bool {
    let mut parser = Parser::default();
    parser.buf.extend_from_slice(bytes);
    if parser.parse(&UNLIMITED, usize::MAX).is_err() || parser.has_more() {
        return false;
    }
    let requests = parser.take();
    for i in 0..requests.len() {
        let a = requests.args(i);
        touches.add(commands::find(a.at(0)), a);
    }
    true
}
