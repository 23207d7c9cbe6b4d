//! The executor's memory: targets, their reports, the agenda of what is due. One mutex, never held across an await; everything that
//! takes time is left to [`super::drive`] and [`super::pump`].

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use gse_proto::session::Dispatch;
use tokio_util::sync::CancellationToken;

use super::job::Ended;
use super::journal::Key;
use super::window::{CHUNK, Phase, Stream};

/// One atomic task of one target.
pub(super) type StreamKey = (Arc<Key>, u32);

/// Streams that are looked at again when room appears in the session's window.
const WAKE_BLOCKED: usize = 8;

/// Where a target's rows come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// In the journal.
    Live,
    /// Refused; known to this process only.
    Refused,
    /// Over and acknowledged.
    Done,
}

/// A target.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) kind: Kind,
    pub(super) not_after_ms: u64,
    pub(super) streams: Vec<Stream>,
    due: Vec<Option<(Instant, u64)>>,
    /// Asked to end.
    pub(super) stop: CancellationToken,
    /// Bytes in the journal, output not counted.
    pub(super) intent_bytes: u64,
    /// Being removed: no more reports.
    pub(super) closing: bool,
}

impl Target {
    pub(super) fn new(kind: Kind, dispatch: Option<&Dispatch>, streams: Vec<Stream>) -> Self {
        let not_after_ms = dispatch.map_or(0, |d| d.not_after_ms);
        let due = vec![None; streams.len()];
        let stop = CancellationToken::new();
        Self {
            kind,
            not_after_ms,
            streams,
            due,
            stop,
            intent_bytes: 0,
            closing: false,
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.intent_bytes + self.streams.iter().map(|s| s.spooled).sum::<u64>()
    }

    pub(super) fn ends(&self) -> Vec<Ended> {
        let end = |s: &Stream| match &s.phase {
            Phase::Ended(end) => Some((**end).clone()),
            _ => None,
        };
        self.streams.iter().filter_map(end).collect()
    }
}

/// A session.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) generation: u64,
    pub(super) stream_window: u64,
    pub(super) session_window: u64,
    pub(super) cancel: CancellationToken,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) targets: HashMap<Arc<Key>, Target>,
    agenda: BTreeMap<(Instant, u64), StreamKey>,
    sequence: u64,
    blocked: VecDeque<StreamKey>,
    in_flight: u64,
    pub(super) session: Option<Session>,
    pub(super) running: u32,
    pub(super) queued: u32,
    pub(super) refused: usize,
    pub(super) spool_bytes: u64,
}

impl State {
    /// Bytes that may still be sent in this session.
    pub(super) fn free(&self) -> u64 {
        self.session
            .as_ref()
            .map_or(0, |s| s.session_window.max(2 * CHUNK).saturating_sub(self.in_flight))
    }

    /// Changes one stream, keeping the sums right. `None` when it is not known (any more).
    pub(super) fn with<R>(&mut self, key: &StreamKey, change: impl FnOnce(&mut Stream) -> R) -> Option<R> {
        let target = self.targets.get_mut(&key.0)?;
        let counted = target.kind == Kind::Live;
        let stream = target.streams.get_mut(key.1 as usize)?;
        let before = (stream.in_flight(), stream.spooled);
        let result = change(stream);
        self.in_flight = (self.in_flight + stream.in_flight()).saturating_sub(before.0);
        if counted {
            self.spool_bytes = (self.spool_bytes + stream.spooled).saturating_sub(before.1);
        }
        Some(result)
    }

    /// Adds a target.
    pub(super) fn insert(&mut self, key: Arc<Key>, target: Target) {
        match target.kind {
            Kind::Live => self.spool_bytes += target.bytes(),
            Kind::Refused => self.refused += 1,
            Kind::Done => {}
        }
        self.targets.insert(key, target);
    }

    /// Forgets a target.
    pub(super) fn remove(&mut self, key: &Arc<Key>) -> Option<Target> {
        let target = self.targets.remove(key)?;
        for at in target.due.iter().flatten() {
            self.agenda.remove(at);
        }
        self.in_flight = self
            .in_flight
            .saturating_sub(target.streams.iter().map(Stream::in_flight).sum());
        match target.kind {
            Kind::Live => self.spool_bytes = self.spool_bytes.saturating_sub(target.bytes()),
            Kind::Refused => self.refused = self.refused.saturating_sub(1),
            Kind::Done => {}
        }
        Some(target)
    }

    /// Has a stream looked at no later than `at`. Without a session there is nobody to look.
    pub(super) fn schedule(&mut self, key: &StreamKey, at: Instant) {
        if self.session.is_none() {
            return;
        }
        let Some(due) = self.targets.get_mut(&key.0).and_then(|t| t.due.get_mut(key.1 as usize)) else {
            return;
        };
        if due.is_some_and(|(when, _)| when <= at) {
            return;
        }
        if let Some(old) = due.take() {
            self.agenda.remove(&old);
        }
        self.sequence += 1;
        *due = Some((at, self.sequence));
        self.agenda.insert((at, self.sequence), key.clone());
    }

    /// Has all streams of a target looked at now.
    pub(super) fn schedule_all(&mut self, key: &Arc<Key>, now: Instant) {
        let count = self.targets.get(key).map_or(0, |t| t.streams.len());
        for atomic in 0..count {
            self.schedule(&(Arc::clone(key), u32::try_from(atomic).unwrap_or(u32::MAX)), now);
        }
    }

    /// Takes the next stream that is due, or says when one will be.
    pub(super) fn next_due(&mut self, now: Instant) -> Result<StreamKey, Option<Instant>> {
        match self.agenda.first_entry() {
            Some(entry) if entry.key().0 <= now => {
                let key = entry.remove();
                if let Some(due) = self.targets.get_mut(&key.0).and_then(|t| t.due.get_mut(key.1 as usize)) {
                    *due = None;
                }
                Ok(key)
            }
            Some(entry) => Err(Some(entry.key().0)),
            None => Err(None),
        }
    }

    /// Remembers a stream for which the session has no room.
    pub(super) fn block(&mut self, key: StreamKey) {
        if self.with(&key, |s| std::mem::replace(&mut s.blocked, true)) == Some(false) {
            self.blocked.push_back(key);
        }
    }

    /// Room has appeared: the streams that wait longest are looked at.
    pub(super) fn unblock(&mut self, now: Instant) {
        for _ in 0..WAKE_BLOCKED {
            match self.blocked.pop_front() {
                Some(key) => {
                    self.with(&key, |s| s.blocked = false);
                    self.schedule(&key, now);
                }
                None => return,
            }
        }
    }

    /// Begins a session: everything that is not acknowledged is to be reported to it.
    pub(super) fn begin(&mut self, session: Session, now: Instant) {
        self.agenda.clear();
        self.blocked.clear();
        self.in_flight = 0;
        self.session = Some(session);
        let keys: Vec<Arc<Key>> = self.targets.keys().cloned().collect();
        for key in keys {
            let Some(target) = self.targets.get_mut(&key) else {
                continue;
            };
            target.due.fill(None);
            target.streams.iter_mut().for_each(|stream| stream.restart(now));
            if target.kind != Kind::Done {
                self.schedule_all(&key, now);
            }
        }
    }
}
