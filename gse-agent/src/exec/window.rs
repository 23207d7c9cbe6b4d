//! What to report next about one atomic task, and when: pure decisions over counters and moments. Reading the spool, sending and the
//! server's acknowledgements are left to [`super::pump`] and [`super::executor`].

use std::time::{Duration, Instant};

use super::job::Ended;

/// Largest piece of output in one report.
pub(super) const CHUNK: u64 = 64 * 1024;
/// Less room than this in a window is not worth a report.
const WORTH: u64 = 4096;

/// How patient the reports are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timing {
    /// See `resend_ms`.
    pub(super) resend: Duration,
    /// See `flush_ms`.
    pub(super) flush: Duration,
    /// See `max_flush_ms`.
    pub(super) max_flush: Duration,
    /// See `report_running_after_ms`.
    pub(super) running_after: Duration,
}

/// How far the atomic task is.
#[derive(Debug, Clone)]
pub(super) enum Phase {
    /// Not started.
    Queued,
    /// Started.
    Running {
        /// Unix milliseconds.
        start_ms: u64,
        /// When this process learnt of it.
        since: Instant,
    },
    /// Over.
    Ended(Box<Ended>),
}

/// One atomic task's reports.
#[derive(Debug)]
pub(super) struct Stream {
    /// How far it is.
    pub(super) phase: Phase,
    /// Bytes in the spool.
    pub(super) spooled: u64,
    /// Of these, stored by the server.
    pub(super) acked: u64,
    /// Of these, sent in this session.
    pub(super) sent: u64,
    /// When output came that has not been sent.
    pub(super) unsent_since: Option<Instant>,
    /// The last acknowledgement, or the first send after one.
    pub(super) progress: Instant,
    /// Pieces sent because of their age.
    pub(super) flushes: u32,
    /// Whether this session knows that it runs.
    pub(super) running_sent: bool,
    /// When the terminal row was sent.
    pub(super) row_sent: Option<Instant>,
    /// The terminal row is stored.
    pub(super) stored: bool,
    /// Waits for room in the session's window.
    pub(super) blocked: bool,
}

/// What to do now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Say that it runs.
    Running,
    /// Send output from here, at most so many bytes.
    Chunk {
        /// Offset.
        from: u64,
        /// Bytes.
        max: u64,
    },
    /// Send the terminal row with the output from here to the end.
    Terminal {
        /// Offset.
        from: u64,
    },
    /// The session's window is full: look again when there is room, or when what is in flight counts as lost.
    Blocked,
    /// Nothing until then, or until something happens.
    Sleep(Option<Instant>),
}

impl Stream {
    /// One that has not been reported at all.
    pub(super) fn new(phase: Phase, spooled: u64, now: Instant) -> Self {
        Self {
            phase,
            spooled,
            acked: 0,
            sent: 0,
            unsent_since: (spooled > 0).then_some(now),
            progress: now,
            flushes: 0,
            running_sent: false,
            row_sent: None,
            stored: false,
            blocked: false,
        }
    }

    /// Sent and not acknowledged.
    pub(super) fn in_flight(&self) -> u64 {
        self.sent.saturating_sub(self.acked)
    }

    /// A new session knows nothing of what is not acknowledged.
    pub(super) fn restart(&mut self, now: Instant) {
        self.sent = self.acked;
        self.running_sent = false;
        self.row_sent = None;
        self.blocked = false;
        self.progress = now;
        self.unsent_since = (self.spooled > self.sent).then_some(now);
    }

    /// The spool has grown.
    pub(super) fn grown(&mut self, spooled: u64, now: Instant) {
        if spooled > self.spooled {
            self.spooled = spooled;
            self.unsent_since.get_or_insert(now);
        }
    }

    /// The server has stored up to `offset`.
    pub(super) fn acknowledged(&mut self, offset: u64, now: Instant) {
        let offset = offset.min(self.spooled);
        if offset > self.acked {
            self.acked = offset;
            self.sent = self.sent.max(offset);
            self.progress = now;
            if self.sent == self.spooled {
                self.unsent_since = None;
            }
        }
    }

    /// A piece has been sent.
    pub(super) fn sent(&mut self, upto: u64, aged: bool, now: Instant) {
        if self.in_flight() == 0 {
            self.progress = now;
        }
        self.sent = self.sent.max(upto);
        self.unsent_since = (self.spooled > self.sent).then_some(now);
        if aged {
            self.flushes = self.flushes.saturating_add(1);
        }
    }

    fn flush_after(&self, timing: &Timing) -> Duration {
        // Ten pieces at full readiness, then slower and slower: a long log costs few messages, a short one is seen at once.
        let doublings = self.flushes.saturating_sub(10) / 5;
        timing
            .flush
            .saturating_mul(1 << doublings.min(16))
            .clamp(timing.flush, timing.max_flush.max(timing.flush))
    }

    /// Decides. `window` is what this stream may have in flight, `free` what the session still may.
    pub(super) fn step(&mut self, now: Instant, timing: &Timing, window: u64, free: u64) -> Step {
        if self.stored {
            return Step::Sleep(None);
        }
        let mut free = free;
        let again = self.progress + timing.resend;
        if self.in_flight() > 0 && now >= again && !matches!((&self.phase, self.row_sent), (Phase::Ended(_), Some(_))) {
            free = free.saturating_add(self.in_flight());
            self.sent = self.acked;
            self.unsent_since = Some(now.checked_sub(timing.max_flush).unwrap_or(now));
            self.progress = now;
        }
        let unsent = self.spooled.saturating_sub(self.sent);
        let waiting = (self.in_flight() > 0).then_some(self.progress + timing.resend);
        match &self.phase {
            Phase::Queued => Step::Sleep(None),
            Phase::Running { since, .. } => {
                let announce = *since + timing.running_after;
                if !self.running_sent && now >= announce {
                    return Step::Running;
                }
                let announce = (!self.running_sent).then_some(announce);
                let flush = self
                    .unsent_since
                    .filter(|_| unsent > 0)
                    .map(|at| at + self.flush_after(timing));
                match flush {
                    // What ends within a moment is reported once, in its row.
                    Some(at) if self.running_sent && (unsent >= CHUNK || now >= at) => {
                        self.chunk(unsent, window, free, waiting)
                    }
                    _ => Step::Sleep(
                        [announce, flush.filter(|_| self.running_sent), waiting]
                            .into_iter()
                            .flatten()
                            .min(),
                    ),
                }
            }
            Phase::Ended(_) => {
                if self.spooled - self.acked <= CHUNK {
                    match self.row_sent.map(|at| at + timing.resend) {
                        Some(at) if now < at => Step::Sleep(Some(at)),
                        _ if unsent > free => Step::Blocked,
                        _ => Step::Terminal { from: self.acked },
                    }
                } else if unsent > CHUNK {
                    self.chunk(unsent - CHUNK, window, free, waiting)
                } else {
                    Step::Sleep(waiting)
                }
            }
        }
    }

    fn chunk(&self, unsent: u64, window: u64, free: u64, waiting: Option<Instant>) -> Step {
        let room = window.saturating_sub(self.in_flight());
        let want = unsent.min(CHUNK);
        // At least a whole character, whatever the windows are.
        let worth = want.min(WORTH).min(window.max(4));
        if room < worth && self.in_flight() > 0 {
            Step::Sleep(waiting)
        } else if free < worth {
            Step::Blocked
        } else {
            Step::Chunk {
                from: self.sent,
                max: want.max(4).min(room.max(4)).min(free.max(4)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::job::Outcome;
    use super::*;
    use proptest::prelude::*;

    const TIMING: Timing = Timing {
        resend: Duration::from_secs(5),
        flush: Duration::from_millis(100),
        max_flush: Duration::from_secs(1),
        running_after: Duration::from_millis(100),
    };

    fn ended() -> Phase {
        Phase::Ended(Box::new(Ended::without_run(Outcome::exited(0))))
    }

    #[test]
    fn a_short_script_is_one_row() {
        let now = Instant::now();
        let mut stream = Stream::new(
            Phase::Running {
                start_ms: 1,
                since: now,
            },
            0,
            now,
        );
        stream.grown(10, now);
        assert_eq!(
            stream.step(now, &TIMING, 1000, 1000),
            Step::Sleep(Some(now + TIMING.running_after))
        );
        stream.phase = ended();
        assert_eq!(stream.step(now, &TIMING, 1000, 1000), Step::Terminal { from: 0 });
    }

    #[test]
    fn a_running_one_is_announced_and_flushed_by_age() {
        let now = Instant::now();
        let mut stream = Stream::new(
            Phase::Running {
                start_ms: 1,
                since: now,
            },
            0,
            now,
        );
        let later = now + TIMING.running_after;
        assert_eq!(stream.step(later, &TIMING, 1000, 1000), Step::Running);
        stream.running_sent = true;
        stream.grown(10, later);
        assert_eq!(
            stream.step(later, &TIMING, 1000, 1000),
            Step::Sleep(Some(later + TIMING.flush))
        );
        assert_eq!(
            stream.step(later + TIMING.flush, &TIMING, 1000, 1000),
            Step::Chunk { from: 0, max: 10 }
        );
        stream.grown(CHUNK * 3, later);
        assert_eq!(
            stream.step(later, &TIMING, 1 << 20, 1 << 20),
            Step::Chunk { from: 0, max: CHUNK }
        );
    }

    #[test]
    fn chatty_scripts_are_flushed_less_often() {
        let mut stream = Stream::new(Phase::Queued, 0, Instant::now());
        assert_eq!(stream.flush_after(&TIMING), TIMING.flush);
        stream.flushes = 1000;
        assert_eq!(stream.flush_after(&TIMING), TIMING.max_flush);
    }

    #[test]
    fn unacknowledged_output_is_sent_again() {
        let now = Instant::now();
        let mut stream = Stream::new(
            Phase::Running {
                start_ms: 1,
                since: now,
            },
            200,
            now,
        );
        stream.running_sent = true;
        stream.sent(200, true, now);
        assert_eq!(
            stream.step(now, &TIMING, 1000, 0),
            Step::Sleep(Some(now + TIMING.resend))
        );
        stream.acknowledged(50, now);
        assert_eq!(
            stream.step(now + TIMING.resend, &TIMING, 1000, 0),
            Step::Chunk { from: 50, max: 150 }
        );
    }

    #[test]
    fn a_row_is_repeated_until_stored() {
        let now = Instant::now();
        let mut stream = Stream::new(ended(), 0, now);
        assert_eq!(stream.step(now, &TIMING, 1, 1), Step::Terminal { from: 0 });
        stream.row_sent = Some(now);
        assert_eq!(stream.step(now, &TIMING, 1, 1), Step::Sleep(Some(now + TIMING.resend)));
        assert_eq!(
            stream.step(now + TIMING.resend, &TIMING, 1, 1),
            Step::Terminal { from: 0 }
        );
        stream.stored = true;
        assert_eq!(stream.step(now + TIMING.resend, &TIMING, 1, 1), Step::Sleep(None));
    }

    proptest! {
        /// A server that stores at random moments, loses some of the first pieces, and has any window: everything arrives in order, windows are
        /// kept, and the row comes last with a tail of at most 64 KiB.
        #[test]
        fn everything_arrives(len in 0u64..600_000, window in 1u64..300_000, session in 1u64..300_000, events in proptest::collection::vec(0u8..4, 50)) {
            let mut now = Instant::now();
            let mut stream = Stream::new(ended(), len, now);
            let (mut stored, mut turn) = (0u64, 0usize);
            for _ in 0..20_000 {
                let event = events[turn % events.len()];
                turn += 1;
                let free = session.max(CHUNK).saturating_sub(stream.in_flight());
                match stream.step(now, &TIMING, window, free) {
                    Step::Chunk { from, max } => {
                        prop_assert!(max > 0 && max <= CHUNK && from + max <= len);
                        prop_assert!(from + max - stream.acked <= window.max(CHUNK.min(window)).max(4));
                        if (event != 0 || turn > 200) && from <= stored {
                            stored = stored.max(from + max);
                        }
                        stream.sent(from + max, false, now);
                    }
                    Step::Terminal { from } => {
                        prop_assert!(len - from <= CHUNK && from <= stored);
                        return Ok(());
                    }
                    Step::Sleep(at) => {
                        if event != 1 || turn > 200 {
                            stream.acknowledged(stored, now);
                        }
                        now = at.unwrap_or(now).max(now + Duration::from_millis(1));
                    }
                    Step::Blocked => {
                        if event != 2 || turn > 200 {
                            stream.acknowledged(stored, now);
                        }
                        now += TIMING.resend;
                    }
                    Step::Running => prop_assert!(false, "it has ended"),
                }
            }
            prop_assert!(false, "never finished: stored {} of {}", stored, len);
        }
    }
}
