//! What waits to be written to one agent: priority lanes, bounded in frames and bytes.
//!
//! Control frames (answers, acknowledgements, terminations) always go before dispatches, so that a flood of work never delays a
//! stop or a sign of life. An empty outbox owns no heap memory: idle sessions are what is multiplied by the fleet.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use gse_proto::frame::{Frame, HEADER_LEN, put_header};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Why a session ends; the label of a metric and the text in the agent's record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloseReason {
    /// The agent said goodbye: it is being stopped (true) or goes elsewhere.
    Goodbye(bool),
    /// End of stream or a connection error.
    ConnectionLost(String),
    /// Nothing was heard from it for too long.
    Silent,
    /// It does not read what is sent to it.
    NotReading,
    /// More waits for it than may.
    Overflow,
    /// It sent something that is not the protocol.
    Protocol(String),
    /// The same host has connected again.
    Replaced,
    /// The agent is connected to another node.
    Elsewhere,
    /// This node is stopping.
    Draining,
}

impl CloseReason {
    /// Short constant for metrics.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Goodbye(_) => "goodbye",
            Self::ConnectionLost(_) => "connection_lost",
            Self::Silent => "silent",
            Self::NotReading => "not_reading",
            Self::Overflow => "overflow",
            Self::Protocol(_) => "protocol",
            Self::Replaced => "replaced",
            Self::Elsewhere => "elsewhere",
            Self::Draining => "draining",
        }
    }
}

impl std::fmt::Display for CloseReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Goodbye(true) => f.write_str("the agent was stopped"),
            Self::Goodbye(false) => f.write_str("the agent went elsewhere"),
            Self::ConnectionLost(why) => write!(f, "connection lost: {why}"),
            Self::Silent => f.write_str("nothing was heard from the agent"),
            Self::NotReading => f.write_str("the agent does not read what is sent to it"),
            Self::Overflow => f.write_str("more waits for the agent than is allowed"),
            Self::Protocol(why) => write!(f, "protocol violation: {why}"),
            Self::Replaced => f.write_str("the same host connected again"),
            Self::Elsewhere => f.write_str("the agent is connected to another node"),
            Self::Draining => f.write_str("the server is stopping"),
        }
    }
}

/// One frame to be written: one buffer, or a head of its own and a body shared with other sessions.
#[derive(Debug)]
enum Out {
    Whole(Bytes),
    Shared(Bytes, Bytes),
}

impl Out {
    fn len(&self) -> usize {
        match self {
            Self::Whole(bytes) => bytes.len(),
            Self::Shared(head, body) => head.len() + body.len(),
        }
    }
}

/// Which queue a frame waits in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Before everything else.
    Control = 0,
    /// Dispatches.
    Work = 1,
}

#[derive(Debug, Default)]
struct Queues {
    lanes: [VecDeque<Out>; 2],
    bytes: usize,
    closed: Option<CloseReason>,
}

/// The queue between the rest of the node and the task that owns the connection.
#[derive(Debug)]
pub struct Outbox {
    queues: Mutex<Queues>,
    wake: Notify,
    max_frames: usize,
    max_bytes: usize,
}

/// A frame was not taken: the outbox is closed or full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The session has ended.
    Closed,
    /// Too much waits already.
    Full,
}

impl Outbox {
    /// An empty outbox that takes so many frames a lane and so many bytes altogether.
    #[must_use]
    pub fn new(max_frames: usize, max_bytes: usize) -> Self {
        Self {
            queues: Mutex::default(),
            wake: Notify::new(),
            max_frames,
            max_bytes,
        }
    }

    /// Queues a control frame. A full control lane closes the session: acknowledgements that can't be delivered mean that the
    /// agent does not read.
    ///
    /// # Errors
    /// When the session has ended, or ends because of this.
    pub fn control(&self, frame: &Frame) -> Result<(), Refused> {
        let outcome = self.push(Lane::Control, Out::Whole(frame.to_bytes()));
        if outcome == Err(Refused::Full) {
            self.close(CloseReason::Overflow);
        }
        outcome
    }

    /// Queues a frame whose message is `own` followed by `shared`; `shared` is not copied.
    ///
    /// # Errors
    /// When the session has ended or its outbox is full.
    pub fn work(&self, kind: u16, own: &[u8], shared: Bytes) -> Result<(), Refused> {
        let mut head = BytesMut::with_capacity(HEADER_LEN + own.len());
        put_header(&mut head, kind, 0, own.len() + shared.len());
        head.extend_from_slice(own);
        self.push(Lane::Work, Out::Shared(head.freeze(), shared))
    }

    fn push(&self, lane: Lane, out: Out) -> Result<(), Refused> {
        {
            let mut queues = self.queues.lock();
            if queues.closed.is_some() {
                return Err(Refused::Closed);
            }
            // One frame always fits, however large: its size was checked when it was accepted from the caller.
            let waiting = queues.lanes.iter().any(|queue| !queue.is_empty());
            if queues.lanes[lane as usize].len() >= self.max_frames
                || (waiting && queues.bytes + out.len() > self.max_bytes)
            {
                return Err(Refused::Full);
            }
            queues.bytes += out.len();
            queues.lanes[lane as usize].push_back(out);
        }
        self.wake.notify_one();
        Ok(())
    }

    /// Ends the session; what is queued in the control lane is still written. The first reason stays.
    pub fn close(&self, reason: CloseReason) {
        self.queues.lock().closed.get_or_insert(reason);
        self.wake.notify_one();
    }

    /// Why the session ends, once it does.
    #[must_use]
    pub fn closed(&self) -> Option<CloseReason> {
        self.queues.lock().closed.clone()
    }

    /// Resolves when there is something to write or the outbox was closed. May resolve without either.
    pub async fn wait(&self) {
        self.wake.notified().await;
    }

    /// Takes what goes out next, as slices for one write: at most `most` bytes unless one frame alone is larger.
    /// Control first. Empty when nothing waits. Once closed, only control frames are handed out.
    #[must_use]
    pub fn take(&self, most: usize) -> Vec<Bytes> {
        let mut queues = self.queues.lock();
        let mut out = Vec::new();
        let mut small = BytesMut::new();
        let mut taken = 0;
        let lanes = if queues.closed.is_some() { 1 } else { 2 };
        for lane in 0..lanes {
            while let Some(next) = queues.lanes[lane].front() {
                if taken > 0 && taken + next.len() > most {
                    break;
                }
                let Some(next) = queues.lanes[lane].pop_front() else {
                    break;
                };
                taken += next.len();
                // Small pieces are joined into one buffer and so into one TLS record; a large shared body is passed on as it is.
                match next {
                    Out::Whole(bytes) => small.extend_from_slice(&bytes),
                    Out::Shared(head, body) if body.len() <= JOIN_BELOW => {
                        small.extend_from_slice(&head);
                        small.extend_from_slice(&body);
                    }
                    Out::Shared(head, body) => {
                        small.extend_from_slice(&head);
                        out.push(small.split().freeze());
                        out.push(body);
                    }
                }
            }
            if taken >= most {
                break;
            }
        }
        if !small.is_empty() {
            out.push(small.freeze());
        }
        queues.bytes -= taken;
        if queues.bytes == 0 {
            // Give the memory of a burst back.
            queues.lanes = Default::default();
        }
        out
    }
}

/// Bodies up to this size are copied next to their heads rather than written by themselves.
const JOIN_BELOW: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::session as s;

    fn ping(nonce: u64) -> Frame {
        s::Ping { nonce }.into()
    }

    #[test]
    fn control_overtakes_work() {
        let outbox = Outbox::new(10, 1 << 20);
        outbox.work(Frame::DISPATCH, b"", Bytes::new()).unwrap();
        outbox.control(&ping(1)).unwrap();
        let mut wire = BytesMut::new();
        for part in outbox.take(1 << 20) {
            wire.extend_from_slice(&part);
        }
        assert_eq!(Frame::take(&mut wire, 100).unwrap(), Some(ping(1)));
        assert!(matches!(Frame::take(&mut wire, 100).unwrap(), Some(Frame::Dispatch(_))));
        assert!(outbox.take(1 << 20).is_empty());
    }

    #[test]
    fn bounds_hold_and_a_large_body_is_shared() {
        let outbox = Outbox::new(2, 1000);
        let body = Bytes::from(vec![0; 8192]);
        outbox
            .work(Frame::DISPATCH, b"ab", body.clone())
            .expect("the first frame fits whatever its size");
        assert_eq!(outbox.work(Frame::DISPATCH, b"ab", body.clone()), Err(Refused::Full));
        let parts = outbox.take(1 << 20);
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[1].as_ptr(), body.as_ptr());
        for _ in 0..2 {
            outbox.control(&ping(0)).unwrap();
        }
        assert_eq!(outbox.control(&ping(0)), Err(Refused::Full));
        assert_eq!(outbox.closed(), Some(CloseReason::Overflow));
        assert_eq!(outbox.control(&ping(0)), Err(Refused::Closed));
        assert!(
            !outbox.take(1 << 20).is_empty(),
            "what was queued before is still written"
        );
    }
}
