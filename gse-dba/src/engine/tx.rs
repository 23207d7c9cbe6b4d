//! Transactions of the embedded store: MULTI, EXEC, DISCARD, WATCH, UNWATCH. A transaction is executed within one group, so it is one record of the log: all of it or nothing.

use super::Engine;
use crate::args::{Args, Span};
use crate::commands::Spec;
pub(crate) use crate::commands::Tx;
use crate::resp::write::Writer;

/// A command that waits for EXEC.
#[derive(Clone)]
pub(crate) struct Queued {
    spec: &'static Spec,
    buf: Vec<u8>,
    spans: Vec<Span>,
}

/// A connection that is inside a transaction or watches keys.
#[derive(Clone, Default)]
pub(crate) struct Session {
    pub(crate) queue: Option<Vec<Queued>>,
    queued_bytes: usize,
    /// A command was refused since MULTI.
    pub(crate) failed: bool,
    pub(crate) watched: Vec<Vec<u8>>,
}

/// Bytes that a transaction may hold queued.
const MAX_QUEUED: usize = 256 << 20;

impl Engine {
    pub(super) fn queue(&mut self, session: u64, spec: &'static Spec, args: Args<'_>, out: &mut Writer) {
        let Some(s) = self.sessions.get_mut(&session) else {
            return;
        };
        let mut buf = Vec::with_capacity(args.iter().map(<[u8]>::len).sum());
        let spans = args
            .iter()
            .map(|a| {
                let start = buf.len() as u32;
                buf.extend_from_slice(a);
                Span {
                    start,
                    end: buf.len() as u32,
                }
            })
            .collect::<Vec<_>>();
        let size = buf.len() + spans.len() * size_of::<Span>() + size_of::<Queued>();
        if s.queued_bytes + size > MAX_QUEUED {
            s.failed = true;
            out.error(b"ERR the transaction holds more than this server accepts");
            return;
        }
        s.queued_bytes += size;
        if let Some(queue) = &mut s.queue {
            queue.push(Queued { spec, buf, spans });
        }
        out.simple("QUEUED");
    }

    pub(super) fn unwatch(&mut self, session: u64) {
        if let Some(s) = self.sessions.get_mut(&session) {
            for key in std::mem::take(&mut s.watched) {
                self.db.unwatch(&key, session);
            }
            if s.queue.is_none() {
                self.sessions.remove(&session);
            }
        }
        self.db.dirty.remove(&session);
    }

    pub(super) fn transaction(
        &mut self,
        session: u64,
        kind: Tx,
        spec: &'static Spec,
        args: Args<'_>,
        out: &mut Writer,
        now: i64,
    ) {
        let queueing = self.sessions.get(&session).is_some_and(|s| s.queue.is_some());
        match (kind, queueing) {
            (Tx::Multi, true) => out.error(b"ERR MULTI calls can not be nested"),
            (Tx::Multi, false) => {
                let s = self.sessions.entry(session).or_default();
                s.queue = Some(Vec::new());
                s.failed = false;
                s.queued_bytes = 0;
                out.ok();
            }
            (Tx::Watch, true) => out.error(b"ERR WATCH inside MULTI is not allowed"),
            (Tx::Watch, false) => {
                for key in args.iter().skip(1) {
                    // One that has expired already goes now: its going later would look like a change.
                    super::Exec {
                        db: &mut self.db,
                        log: &mut self.effects,
                        now,
                    }
                    .live(key);
                    self.db.watch(key, session);
                    let s = self.sessions.entry(session).or_default();
                    if !s.watched.iter().any(|k| k == key) {
                        s.watched.push(key.to_vec());
                    }
                }
                out.ok();
            }
            (Tx::Unwatch, true) => self.queue(session, spec, args, out),
            (Tx::Unwatch, false) => {
                self.unwatch(session);
                out.ok();
            }
            (Tx::Discard, false) => out.error(b"ERR DISCARD without MULTI"),
            (Tx::Discard, true) => {
                self.end(session);
                out.ok();
            }
            (Tx::Exec, false) => out.error(b"ERR EXEC without MULTI"),
            (Tx::Exec, true) => self.exec(session, out, now),
        }
    }

    /// Leaves the transaction; returns what was queued and whether it had failed.
    fn end(&mut self, session: u64) -> (Vec<Queued>, bool) {
        let (queue, failed) = self
            .sessions
            .get_mut(&session)
            .map_or((Vec::new(), false), |s| (s.queue.take().unwrap_or_default(), s.failed));
        self.unwatch(session);
        (queue, failed)
    }

    fn exec(&mut self, session: u64, out: &mut Writer, now: i64) {
        // A watched key whose time has come counts as changed.
        let watched = self
            .sessions
            .get(&session)
            .map(|s| s.watched.clone())
            .unwrap_or_default();
        for key in &watched {
            super::Exec {
                db: &mut self.db,
                log: &mut self.effects,
                now,
            }
            .live(key);
        }
        let dirty = self.db.dirty.contains(&session);
        let flags = self
            .sessions
            .get(&session)
            .and_then(|s| s.queue.as_ref())
            .map_or(0, |q| q.iter().fold(0, |f, c| f | c.spec.flags));
        let admitted = self.admit(flags);
        let (queue, failed) = self.end(session);
        if failed {
            return out.error(b"EXECABORT Transaction discarded because of previous errors.");
        }
        if let Err(refusal) = admitted {
            return out.error(format!("EXECABORT Transaction discarded because of: {}", refusal.0).as_bytes());
        }
        if dirty {
            return out.null_array();
        }
        out.array(queue.len());
        for c in queue {
            self.run_one(session, c.spec, Args::new(&c.buf, &c.spans), out, now);
        }
    }
}
