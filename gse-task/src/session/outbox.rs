//! What waits to be written to one agent: priority lanes, bounded in frames and bytes.
//!
//! Control frames (answers, acknowledgements, terminations) always go before dispatches, so that a flood of work never delays a
//! stop or a sign of life. An empty outbox owns no heap memory: idle sessions are what is multiplied by the fleet.

use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use gse_proto::frame::{Frame, HEADER_LEN, put_header};
use gse_proto::session::Purpose;
use parking_lot::Mutex;

/// Why a session ends; the label of a metric and the text in the agent's record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloseReason {
    /// The agent said goodbye: it is being stopped, and what for, or it goes elsewhere.
    Goodbye(Option<Purpose>),
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
            Self::Goodbye(Some(Purpose::Stop)) => f.write_str("the agent was stopped"),
            Self::Goodbye(Some(Purpose::Upgrade)) => f.write_str("the agent was stopped to be upgraded"),
            Self::Goodbye(Some(Purpose::Uninstall)) => f.write_str("the agent was uninstalled"),
            Self::Goodbye(None) => f.write_str("the agent went elsewhere"),
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
    /// Frames that may wait for company.
    patient: u32,
    /// Something is to be written now.
    due: bool,
    closed: Option<CloseReason>,
    /// The task that owns the connection, when it has nothing to do.
    waiter: Option<Waker>,
}

/// The queue between the rest of the node and the task that owns the connection.
#[derive(Debug)]
pub struct Outbox {
    queues: Mutex<Queues>,
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
        self.urgent(Lane::Control, Out::Whole(frame.to_bytes()))
    }

    /// Queues a control frame that may wait for company: it is written with the next one that may not, or when [`Outbox::hurry`] is
    /// called, which is the caller's business if this says true.
    ///
    /// # Errors
    /// As [`Outbox::control`].
    pub fn patient(&self, frame: &Frame) -> Result<bool, Refused> {
        let first = {
            let mut queues = self.queues.lock();
            self.push(&mut queues, Lane::Control, Out::Whole(frame.to_bytes()))
                .map(|()| {
                    queues.patient += 1;
                    !queues.due && queues.patient == 1
                })
        };
        match first {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            Err(Refused::Full) => self.close(CloseReason::Overflow),
            Err(Refused::Closed) => {}
        }
        if self.queues.lock().patient >= MAX_PATIENT {
            self.hurry();
        }
        first
    }

    /// What waits for company goes without.
    pub fn hurry(&self) {
        let waiter = {
            let mut queues = self.queues.lock();
            queues.due |= queues.bytes > 0;
            if queues.due { queues.waiter.take() } else { None }
        };
        if let Some(waiter) = waiter {
            waiter.wake();
        }
    }

    /// A full control lane ends the session.
    fn urgent(&self, lane: Lane, out: Out) -> Result<(), Refused> {
        let (outcome, waiter) = {
            let mut queues = self.queues.lock();
            let outcome = self.push(&mut queues, lane, out);
            if outcome.is_ok() {
                queues.due = true;
                (outcome, queues.waiter.take())
            } else {
                (outcome, None)
            }
        };
        if let Some(waiter) = waiter {
            waiter.wake();
        }
        if lane == Lane::Control && outcome == Err(Refused::Full) {
            self.close(CloseReason::Overflow);
        }
        outcome
    }

    /// Queues a frame whose message is `own` followed by `shared`; `shared` is not copied.
    ///
    /// # Errors
    /// When the session has ended or its outbox is full.
    pub fn work(&self, kind: u16, own: &[u8], shared: Bytes) -> Result<(), Refused> {
        self.urgent(Lane::Work, Self::put_together(kind, own, shared))
    }

    /// As [`Outbox::work`], ahead of dispatches. Calls take half of the room at most and are refused beyond that: the rest is for control
    /// frames, for which there being no room would end the session.
    ///
    /// # Errors
    /// When the session has ended or too much waits.
    pub fn call(&self, kind: u16, own: &[u8], shared: Bytes) -> Result<(), Refused> {
        let out = Self::put_together(kind, own, shared);
        let waiter = {
            let mut queues = self.queues.lock();
            let busy = queues.lanes[Lane::Control as usize].len() >= self.max_frames / 2
                || (queues.bytes > 0 && queues.bytes + out.len() > self.max_bytes / 2);
            if busy && queues.closed.is_none() {
                return Err(Refused::Full);
            }
            self.push(&mut queues, Lane::Control, out)?;
            queues.due = true;
            queues.waiter.take()
        };
        if let Some(waiter) = waiter {
            waiter.wake();
        }
        Ok(())
    }

    fn put_together(kind: u16, own: &[u8], shared: Bytes) -> Out {
        let joined = if shared.len() <= JOIN_AT_ONCE { shared.len() } else { 0 };
        let mut head = BytesMut::with_capacity(HEADER_LEN + own.len() + joined);
        put_header(&mut head, kind, 0, own.len() + shared.len());
        head.extend_from_slice(own);
        if joined == shared.len() {
            head.extend_from_slice(&shared);
            Out::Whole(head.freeze())
        } else {
            Out::Shared(head.freeze(), shared)
        }
    }

    fn push(&self, queues: &mut Queues, lane: Lane, out: Out) -> Result<(), Refused> {
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
        Ok(())
    }

    /// Ends the session; what is queued in the control lane is still written. The first reason stays.
    pub fn close(&self, reason: CloseReason) {
        let waiter = {
            let mut queues = self.queues.lock();
            queues.closed.get_or_insert(reason);
            queues.due = true;
            queues.waiter.take()
        };
        if let Some(waiter) = waiter {
            waiter.wake();
        }
    }

    /// Why the session ends, once it does.
    #[must_use]
    pub fn closed(&self) -> Option<CloseReason> {
        self.queues.lock().closed.clone()
    }

    /// Ready when something is to be written or the outbox was closed. One task at a time may wait.
    pub fn poll_due(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut queues = self.queues.lock();
        if queues.due || queues.closed.is_some() {
            return Poll::Ready(());
        }
        match &mut queues.waiter {
            Some(waiter) => waiter.clone_from(cx.waker()),
            waiter => *waiter = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Takes what goes out next, as slices for one write: at most `most` bytes unless one frame alone is larger.
    /// Control first. Empty when nothing is to be written now. Once closed, only control frames are handed out.
    #[must_use]
    pub fn take(&self, most: usize) -> Vec<Bytes> {
        let mut queues = self.queues.lock();
        let mut out = Vec::new();
        if !queues.due {
            return out;
        }
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
                if small.is_empty() && taken < queues.bytes {
                    small.reserve((queues.bytes - taken + next.len()).min(JOIN_BELOW));
                }
                // Small pieces are joined into one buffer and so into one TLS record; a large shared body is passed on as it is.
                match next {
                    // Mostly there is one frame.
                    Out::Whole(bytes) if taken == queues.bytes && small.is_empty() => out.push(bytes),
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
        if queues.lanes[0].is_empty() {
            queues.patient = 0;
        }
        if queues.bytes == 0 {
            // Give the memory of a burst back.
            queues.lanes = Default::default();
        }
        if out.is_empty() {
            queues.due = false;
        }
        out
    }
}

/// Bodies up to this size are copied when they are queued: one buffer a frame instead of two.
const JOIN_AT_ONCE: usize = 1024;
/// So many frames are company enough.
const MAX_PATIENT: u32 = 16;
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
    fn calls_overtake_work_and_never_end_a_session() {
        let outbox = Outbox::new(8, 1 << 20);
        outbox.work(Frame::DISPATCH, b"", Bytes::new()).unwrap();
        for _ in 0..4 {
            outbox.call(Frame::CALL, b"", Bytes::new()).unwrap();
        }
        assert_eq!(outbox.call(Frame::CALL, b"", Bytes::new()), Err(Refused::Full));
        assert_eq!(outbox.closed(), None);
        outbox.control(&ping(1)).unwrap();
        let mut wire = BytesMut::new();
        for part in outbox.take(1 << 20) {
            wire.extend_from_slice(&part);
        }
        assert!(matches!(Frame::take(&mut wire, 100).unwrap(), Some(Frame::Call(_))));
        let large = Bytes::from(vec![0; 600 << 10]);
        outbox.call(Frame::CALL, b"", large.clone()).expect("one always fits");
        assert_eq!(outbox.call(Frame::CALL, b"", large), Err(Refused::Full));
        outbox.close(CloseReason::Draining);
        assert_eq!(outbox.call(Frame::CALL, b"", Bytes::new()), Err(Refused::Closed));
    }

    #[test]
    fn the_patient_wait_for_company() {
        let ready = |outbox: &Outbox| outbox.poll_due(&mut Context::from_waker(Waker::noop())).is_ready();
        let outbox = Outbox::new(100, 1 << 20);
        assert_eq!(
            outbox.patient(&ping(1)),
            Ok(true),
            "the first one is somebody's business"
        );
        assert_eq!(outbox.patient(&ping(2)), Ok(false));
        assert!(!ready(&outbox) && outbox.take(1 << 20).is_empty());
        outbox.work(Frame::DISPATCH, b"", Bytes::new()).unwrap();
        assert!(ready(&outbox));
        assert_eq!(outbox.take(1 << 20).len(), 1, "all in one");
        assert!(outbox.take(1 << 20).is_empty() && !ready(&outbox));

        assert_eq!(outbox.patient(&ping(3)), Ok(true));
        outbox.hurry();
        assert!(ready(&outbox));
        assert_eq!(outbox.take(1 << 20).len(), 1);
        outbox.hurry();
        assert!(outbox.take(1 << 20).is_empty() && !ready(&outbox), "nothing to hurry");

        for _ in 0..MAX_PATIENT {
            assert!(!ready(&outbox));
            outbox.patient(&ping(4)).unwrap();
        }
        assert!(ready(&outbox), "enough company");
        outbox.close(CloseReason::Draining);
        assert_eq!(outbox.patient(&ping(5)), Err(Refused::Closed));
        assert_eq!(outbox.take(1 << 20).len(), 1, "what was queued before is still written");
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
