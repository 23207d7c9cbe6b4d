//! Bodies on their way through: a caller's body that is not lost by an attempt to connect that fails, and an answer that may not stall
//! for ever.
//!
//! What a caller sends slowly is waited for here, where only that caller waits: a server is asked only once there is something to give it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use gse_core::http::{BodyError, BoxError, RawBody, full};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

/// Of a caller's body, bytes that have to be there before a server is asked; a body that is smaller has to be there whole.
const FIRST: usize = 64 * 1024;

/// How much of a body is kept, so that it can be sent again when a server has said that it did nothing with it.
#[derive(Debug, Clone)]
pub(super) struct Replay {
    /// Of one body, bytes.
    each: usize,
    /// Of all bodies, one permit a byte.
    room: Arc<Semaphore>,
}

impl Replay {
    pub(super) fn new(each: usize, total: usize) -> Self {
        Self {
            each: each.min(total),
            room: Arc::new(Semaphore::new(total.min(Semaphore::MAX_PERMITS))),
        }
    }
}

/// A caller's body that can be offered to one server after the other: as long as no server has taken any of it, and again later if
/// all that was taken is still kept.
pub(super) struct Upload {
    inner: Arc<Inner>,
}

struct Inner {
    source: Mutex<Source>,
    hint: SizeHint,
    failure: Mutex<Option<BodyError>>,
    sent: CancellationToken,
    replay: Replay,
}

struct Source {
    body: RawBody,
    ended: bool,
    /// The attempt that may read.
    attempt: usize,
    /// Whether that attempt has.
    touched: bool,
    /// Everything read so far; none once that was too much.
    kept: Option<Kept>,
}

#[derive(Default)]
struct Kept {
    pieces: Vec<Bytes>,
    bytes: usize,
    share: Option<OwnedSemaphorePermit>,
}

impl Kept {
    /// Whether there was room.
    fn keep(&mut self, piece: &Bytes, replay: &Replay) -> bool {
        self.bytes = self.bytes.saturating_add(piece.len());
        let (Ok(len), true) = (u32::try_from(piece.len()), self.bytes <= replay.each) else {
            return false;
        };
        let Ok(share) = Arc::clone(&replay.room).try_acquire_many_owned(len) else {
            return false;
        };
        match &mut self.share {
            Some(all) => all.merge(share),
            none => *none = Some(share),
        }
        self.pieces.push(piece.clone());
        true
    }
}

impl Upload {
    /// Waits for the beginning of a body, as long as the body itself allows.
    pub(super) async fn begun<B>(mut body: B, replay: &Replay) -> Result<Self, BodyError>
    where
        B: Body<Data = Bytes, Error = BodyError> + Send + Unpin + 'static,
    {
        let mut first = BytesMut::new();
        while first.len() < FIRST {
            let Some(frame) = body.frame().await else {
                return Ok(Self::new(full(first), replay));
            };
            if let Ok(data) = frame?.into_data() {
                first.extend_from_slice(&data);
            }
        }
        let first = first.freeze();
        Ok(Self::new(Begun { first, rest: body }.boxed_unsync(), replay))
    }

    pub(super) fn new(body: RawBody, replay: &Replay) -> Self {
        let hint = body.size_hint();
        let sent = CancellationToken::new();
        if body.is_end_stream() {
            sent.cancel();
        }
        Self {
            inner: Arc::new(Inner {
                source: Mutex::new(Source {
                    ended: body.is_end_stream(),
                    body,
                    attempt: 0,
                    touched: false,
                    kept: Some(Kept::default()),
                }),
                hint,
                failure: Mutex::new(None),
                sent,
                replay: replay.clone(),
            }),
        }
    }

    /// The body from its beginning, for one attempt; none when what was read before is not there any more.
    pub(super) fn offer(&self) -> Option<RawBody> {
        let mut source = self.inner.source.lock();
        source.kept.as_ref()?;
        source.attempt += 1;
        source.touched = false;
        Some(
            Attempt {
                inner: self.inner.clone(),
                number: source.attempt,
                pieces: 0,
                bytes: 0,
            }
            .boxed_unsync(),
        )
    }

    /// Takes back what was offered; whether it was untouched. From then on no earlier attempt can take it: one that was given up
    /// while it waited for its turn on a connection may get that turn all the same.
    pub(super) fn withdraw(&self) -> bool {
        let mut source = self.inner.source.lock();
        source.attempt += 1;
        !source.touched
    }

    /// Whether there is nothing to send. Such a body is never asked for, so it never counts as touched.
    pub(super) fn is_empty(&self) -> bool {
        self.inner.hint.exact() == Some(0)
    }

    /// Resolves when the attempt has not asked for any of the body for `patience`, and takes the body back; never for one of no bytes.
    pub(super) async fn ignored_for(&self, patience: Duration) {
        tokio::time::sleep(patience).await;
        let ignored = {
            let mut source = self.inner.source.lock();
            let ignored = !source.touched && !self.is_empty();
            source.attempt += usize::from(ignored);
            ignored
        };
        if !ignored {
            std::future::pending().await
        }
    }

    /// Why the body did not arrive from the caller, if it did not.
    pub(super) fn failure(&self) -> Option<BodyError> {
        self.inner.failure.lock().clone()
    }

    /// Resolves `patience` after the last of the body has gone out.
    pub(super) async fn sent_and(&self, patience: Duration) {
        self.inner.sent.cancelled().await;
        tokio::time::sleep(patience).await;
    }
}

/// A body whose first bytes are there already.
struct Begun<B> {
    first: Bytes,
    rest: B,
}

impl<B: Body<Data = Bytes, Error = BodyError> + Unpin> Body for Begun<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if !self.first.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.first)))));
        }
        Pin::new(&mut self.rest).poll_frame(cx).map_err(BoxError::from)
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_empty() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (first, rest) = (self.first.len() as u64, self.rest.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(first));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(first));
        }
        hint
    }
}

/// One attempt's view of the body: what was read for earlier attempts, then the rest of it.
struct Attempt {
    inner: Arc<Inner>,
    number: usize,
    /// What this attempt has had.
    pieces: usize,
    bytes: u64,
}

impl Body for Attempt {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let inner = &*this.inner;
        let mut guard = inner.source.lock();
        let source = &mut *guard;
        if source.attempt != this.number {
            return Poll::Ready(Some(Err("the body was sent elsewhere".into())));
        }
        source.touched = true;
        if let Some(piece) = source.kept.as_ref().and_then(|kept| kept.pieces.get(this.pieces)) {
            this.pieces += 1;
            this.bytes += piece.len() as u64;
            return Poll::Ready(Some(Ok(Frame::data(piece.clone()))));
        }
        if source.ended {
            return Poll::Ready(None);
        }
        let polled = Pin::new(&mut source.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Err(error))) => {
                source.ended = true;
                source.kept = None;
                if let Some(error) = error.downcast_ref::<BodyError>() {
                    *inner.failure.lock() = Some(error.clone());
                }
            }
            Poll::Ready(None) => {
                source.ended = true;
                inner.sent.cancel();
            }
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(piece) = frame.data_ref() {
                    this.bytes += piece.len() as u64;
                    this.pieces += 1;
                    if source
                        .kept
                        .as_mut()
                        .is_some_and(|kept| !kept.keep(piece, &inner.replay))
                    {
                        source.kept = None;
                    }
                }
                if source.body.is_end_stream() {
                    source.ended = true;
                    inner.sent.cancel();
                }
            }
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        // A body of no bytes is never polled.
        if self.inner.hint.exact() == Some(0) {
            return true;
        }
        let source = self.inner.source.lock();
        let behind = source.kept.as_ref().is_some_and(|kept| self.pieces < kept.pieces.len());
        source.attempt == self.number && source.ended && !behind
    }

    fn size_hint(&self) -> SizeHint {
        let whole = &self.inner.hint;
        let mut left = SizeHint::new();
        left.set_lower(whole.lower().saturating_sub(self.bytes));
        if let Some(upper) = whole.upper() {
            left.set_upper(upper.saturating_sub(self.bytes));
        }
        left
    }
}

/// An answer whose pieces may not be further apart than a given time.
pub(super) struct Impatient<H> {
    body: RawBody,
    /// Kept until the answer has gone through.
    _held: H,
    idle: Duration,
    deadline: Pin<Box<Sleep>>,
}

impl<H: Send + Unpin + 'static> Impatient<H> {
    pub(super) fn boxed(body: RawBody, idle: Duration, held: H) -> RawBody {
        Self {
            body,
            _held: held,
            idle,
            deadline: Box::pin(tokio::time::sleep(idle)),
        }
        .boxed_unsync()
    }
}

impl<H: Unpin> Body for Impatient<H> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Pending => match this.deadline.as_mut().poll(cx) {
                Poll::Ready(()) => Poll::Ready(Some(Err(format!(
                    "the answer stalled for {} ms",
                    this.idle.as_millis()
                )
                .into()))),
                Poll::Pending => Poll::Pending,
            },
            ready => {
                this.deadline.as_mut().reset(Instant::now() + this.idle);
                ready
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replay() -> Replay {
        Replay::new(1_000_000, 1_000_000)
    }

    #[tokio::test]
    async fn what_was_taken_is_there_again_if_it_was_not_too_much() {
        let pieces_of = || {
            pieces(vec![Ok("hel"), Ok("lo")], true)
                .map_err(BoxError::from)
                .boxed_unsync()
        };
        let room = Replay::new(5, 5);
        let upload = Upload::new(pieces_of(), &room);
        let mut first = upload.offer().unwrap();
        assert_eq!(first.frame().await.unwrap().unwrap().into_data().unwrap(), "hel");
        assert!(!upload.withdraw());
        assert!(first.frame().await.unwrap().is_err(), "the first attempt reads on");
        for _ in 0..2 {
            let body = upload.offer().unwrap();
            assert_eq!(body.collect().await.unwrap().to_bytes(), "hello");
        }
        // The room of all is taken: the next body is sent, and not kept.
        let crowded = Upload::new(pieces_of(), &room);
        let body = crowded.offer().unwrap();
        assert_eq!(body.collect().await.unwrap().to_bytes(), "hello");
        assert!(crowded.offer().is_none());
        // With its owner goes its share.
        drop((upload, first));
        let upload = Upload::new(pieces_of(), &room);
        upload.offer().unwrap().collect().await.unwrap();
        assert!(upload.offer().is_some());

        let upload = Upload::new(pieces_of(), &Replay::new(4, 1_000));
        upload.offer().unwrap().collect().await.unwrap();
        assert!(upload.offer().is_none());
    }

    #[tokio::test]
    async fn a_body_can_be_offered_until_it_is_touched() {
        let upload = Upload::new(full("hello"), &Replay::new(0, 0));
        let first = upload.offer().unwrap();
        assert_eq!(first.size_hint().exact(), Some(5));
        drop(first);
        let second = upload.offer().unwrap();
        assert_eq!(second.collect().await.unwrap().to_bytes(), "hello");
        assert!(upload.offer().is_none() && !upload.withdraw());
        // The clock for the answer has begun to run.
        tokio::time::timeout(Duration::from_secs(5), upload.sent_and(Duration::ZERO))
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn an_attempt_that_was_given_up_gets_nothing() {
        let upload = Upload::new(full("hello"), &replay());
        let late = upload.offer().unwrap();
        assert!(upload.withdraw());
        late.collect().await.unwrap_err();
        let second = upload.offer().unwrap();
        assert_eq!(second.collect().await.unwrap().to_bytes(), "hello");
    }

    /// A body of these pieces, and then nothing for ever, or an error.
    fn pieces(
        pieces: Vec<Result<&'static str, BodyError>>,
        ends: bool,
    ) -> impl Body<Data = Bytes, Error = BodyError> + Send + Unpin + 'static {
        use futures::StreamExt;
        let frames = futures::stream::iter(pieces)
            .map(|piece| piece.map(|text| Frame::data(Bytes::from_static(text.as_bytes()))));
        let rest = if ends {
            futures::stream::empty().boxed()
        } else {
            futures::stream::pending().boxed()
        };
        http_body_util::StreamBody::new(frames.chain(rest).boxed())
    }

    #[tokio::test]
    async fn nobody_is_asked_before_there_is_something_to_give() {
        let upload = Upload::begun(pieces(vec![Ok("he"), Ok("llo")], true), &replay())
            .await
            .unwrap();
        let body = upload.offer().unwrap();
        assert_eq!(body.size_hint().exact(), Some(5));
        assert_eq!(body.collect().await.unwrap().to_bytes(), "hello");

        let error = BodyError::Slow(Duration::from_secs(1));
        let failed = Upload::begun(pieces(vec![Ok("he"), Err(error.clone())], true), &replay()).await;
        assert_eq!(failed.err(), Some(error));

        let kept = replay();
        let slow = Upload::begun(pieces(vec![Ok("he")], false), &kept);
        assert!(tokio::time::timeout(Duration::from_millis(50), slow).await.is_err());

        // The rest of a large one is not waited for, and comes after its beginning.
        let large: &'static str = "x".repeat(FIRST).leak();
        let upload = Upload::begun(pieces(vec![Ok(large), Ok("y")], false), &replay())
            .await
            .unwrap();
        let mut body = upload.offer().unwrap();
        for (expected, last) in [(FIRST, b'x'), (1, b'y')] {
            let data = body.frame().await.unwrap().unwrap().into_data().unwrap();
            assert_eq!((data.len(), data.last()), (expected, Some(&last)));
        }
    }

    #[tokio::test]
    async fn an_empty_body_is_sent_before_it_is_touched() {
        let upload = Upload::new(full(""), &replay());
        tokio::time::timeout(Duration::from_secs(5), upload.sent_and(Duration::ZERO))
            .await
            .unwrap();
        assert!(upload.offer().unwrap().is_end_stream());
    }

    #[tokio::test]
    async fn a_stalled_answer_is_an_error() {
        let stalled = http_body_util::StreamBody::new(futures_pending());
        let mut body = Impatient::boxed(stalled.boxed_unsync(), Duration::from_millis(50), ());
        let error = body.frame().await.unwrap().unwrap_err();
        assert!(error.to_string().contains("stalled"), "{error}");
    }

    fn futures_pending() -> impl futures::Stream<Item = Result<Frame<Bytes>, BoxError>> + Send {
        futures::stream::pending()
    }
}
