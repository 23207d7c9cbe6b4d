//! One plugin's connection: read all that there is, at once, and never wait for anything else.
//!
//! A plugin that finds its socket full for five seconds sends the frame that it is writing again from its first byte, and everything
//! behind it is lost to the eye; so reading goes on whatever happens to records. What has no room is dropped and counted, by the intake
//! for records and here for long ones of which there are too many at once. While a plugin says nothing its connection holds no buffer.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::frame::{Frame, Implausible, Parser, Step, sent_again};
use super::rule::Forbidden;
use super::{Metrics, Shared};
use crate::data::{Fill, Reason};
use crate::local::{Pass, Peer, Stream};

/// Room for what the next read brings, and the longest frame that is waited for without asking for room.
const READ: usize = 64 << 10;
/// Reads before other tasks get their turn.
const YIELD_EVERY: u32 = 8;
/// When the agent stops, what plugins have sent before is read for so long at most.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Why a connection ended.
enum End {
    /// The plugin closed it.
    Closed,
    /// The network, so to speak.
    Failed(io::Error),
    /// Nothing behind this can be understood.
    Implausible(Implausible),
    /// An answer was taken in part, so that no later one would be understood.
    HalfAnswered,
    /// The agent stops.
    Stopped,
}

struct Connection {
    shared: Arc<Shared>,
    stream: Stream,
    forbidden: Forbidden,
    parser: Parser,
    buffer: BytesMut,
    /// Bytes that the frame at the front will have.
    wanted: usize,
    /// A part of a frame stands at the front since the read before.
    part: bool,
    /// The right to hold a long frame.
    room: Option<OwnedSemaphorePermit>,
}

/// Serves a connection until it ends.
pub(super) async fn serve(shared: Arc<Shared>, stream: Stream, peer: Peer, pass: Pass) {
    let inside = shared.metrics.enter();
    let forbidden = shared.rules.load().forbidden(peer);
    let mut connection = Connection {
        shared: Arc::clone(&shared),
        stream,
        forbidden,
        parser: Parser::default(),
        buffer: BytesMut::new(),
        wanted: 0,
        part: false,
        room: None,
    };
    let end = connection.run().await;
    if !connection.buffer.is_empty() {
        shared.metrics.cut.inc();
    }
    drop((connection, inside, pass));
    let (uid, pid) = (peer.uid, peer.pid);
    match end {
        End::Closed => tracing::debug!(?uid, ?pid, "a plugin left"),
        End::Stopped => shared.metrics.closed("stopped"),
        End::Failed(error) => {
            shared.metrics.closed("failed");
            tracing::debug!(?uid, ?pid, %error, "a plugin's connection failed");
        }
        End::HalfAnswered => {
            shared.metrics.closed("half_answered");
            tracing::debug!(?uid, ?pid, "a plugin took half an answer");
        }
        End::Implausible(what) => {
            shared.metrics.closed("implausible");
            if shared.may_say() {
                tracing::warn!(?uid, ?pid, "a plugin's connection was closed: {what}");
            }
        }
    }
}

impl Connection {
    async fn run(&mut self) -> End {
        let life = self.shared.life.clone();
        let mut reads = 0_u32;
        let mut until: Option<Instant> = None;
        loop {
            if until.is_some_and(|until| Instant::now() >= until) {
                return End::Stopped;
            }
            match self.fill() {
                Ok(0) => return End::Closed,
                Ok(read) => {
                    self.shared.metrics.bytes.inc_by(read as u64);
                    if let Err(end) = self.take() {
                        return end;
                    }
                    reads += 1;
                    if reads.is_multiple_of(YIELD_EVERY) {
                        tokio::task::yield_now().await;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if until.is_some() {
                        return End::Stopped;
                    }
                    if self.buffer.is_empty() {
                        self.buffer = BytesMut::new();
                    }
                    tokio::select! {
                        biased;
                        () = life.draining() => until = Some(Instant::now() + LAST_WORDS),
                        readable = self.stream.readable() => {
                            if let Err(error) = readable {
                                return End::Failed(error);
                            }
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return End::Failed(error),
            }
        }
    }

    fn fill(&mut self) -> io::Result<usize> {
        // A long frame gets its room once instead of step by step.
        self.buffer
            .reserve(self.wanted.saturating_sub(self.buffer.len()).max(READ));
        self.stream.try_read_buf(&mut self.buffer)
    }

    /// Takes every frame that is whole.
    fn take(&mut self) -> Result<(), End> {
        let (mut at, mut questions) = (0, 0_usize);
        let mut in_pieces = self.part;
        let mut implausible = None;
        let mut long = false;
        let metrics = &self.shared.metrics;
        let mut fill = self.shared.intake.fill();
        loop {
            let front = &self.buffer[at..];
            match self.parser.next(front) {
                Err(what) => {
                    implausible = Some(what);
                    break;
                }
                Ok(Step::Need(total)) => {
                    self.wanted = total;
                    if total > READ && self.room.is_none() {
                        self.room = self.shared.room_for(total);
                        if self.room.is_none() {
                            refuse(&mut fill, metrics, Reason::NoRoom, total);
                            self.parser.pass_over(total);
                            continue;
                        }
                    }
                    break;
                }
                Ok(Step::Frame(frame, taken)) => {
                    if in_pieces
                        && matches!(frame, Frame::Record { .. })
                        && let Some(again) = sent_again(front, taken)
                    {
                        metrics.sent_again.inc();
                        at += again;
                        continue;
                    }
                    in_pieces = false;
                    at += taken;
                    match frame {
                        Frame::GetConf => questions += 1,
                        Frame::Record {
                            kind,
                            data_id,
                            utctime,
                            payload,
                        } => {
                            if self.forbidden.covers(data_id) {
                                refuse(&mut fill, metrics, Reason::NotAllowed, payload.len());
                            } else {
                                // What is dropped has been counted, and there is nobody to tell.
                                fill.offer(data_id, utctime, kind, payload).ok();
                            }
                            long |= self.room.is_some();
                            self.room = None;
                        }
                        Frame::TooLong { data_id, length } => {
                            refuse(&mut fill, metrics, Reason::TooLong, length);
                            if self.shared.may_say() {
                                tracing::warn!(data_id, length, "a record is longer than any may be; it was dropped");
                            }
                        }
                        Frame::UnknownLayout { .. } => refuse(&mut fill, metrics, Reason::Unsupported, 0),
                        Frame::Passed => {}
                    }
                }
            }
        }
        drop(fill);
        self.buffer.advance(at);
        self.part = !self.buffer.is_empty();
        if long {
            // Or the connection would go on holding what the long frame took.
            self.buffer = BytesMut::from(&self.buffer[..]);
        }
        for _ in 0..questions {
            self.answer()?;
        }
        implausible.map_or(Ok(()), |what| Err(End::Implausible(what)))
    }

    /// Answers a question in one write, now or not at all: a plugin that reads nothing asks again.
    fn answer(&self) -> Result<(), End> {
        let metrics = &self.shared.metrics;
        metrics.questions.inc();
        match self.stream.try_write(&self.shared.reply) {
            Ok(written) if written == self.shared.reply.len() => Ok(()),
            Ok(_) => Err(End::HalfAnswered),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                metrics.unanswered.inc();
                Ok(())
            }
            // Whoever asks and leaves may have sent records before; those are read.
            Err(_) => {
                metrics.unanswered.inc();
                Ok(())
            }
        }
    }
}

/// Counts a record that is not passed on, here and where all records are counted.
fn refuse(fill: &mut Fill<'_>, metrics: &Metrics, reason: Reason, bytes: usize) {
    metrics.refused(reason);
    fill.refuse(reason, 1, bytes as u64);
}
