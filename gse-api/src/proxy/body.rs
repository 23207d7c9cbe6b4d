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
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

/// Of a caller's body, bytes that have to be there before a server is asked; a body that is smaller has to be there whole.
const FIRST: usize = 64 * 1024;

/// A caller's body that can be offered to one server after the other until one of them has taken the first piece of it.
pub(super) struct Upload {
    inner: Arc<Inner>,
}

struct Inner {
    body: Mutex<Untaken>,
    hint: SizeHint,
    failure: Mutex<Option<BodyError>>,
    sent: CancellationToken,
}

struct Untaken {
    /// None once an attempt has taken it.
    body: Option<RawBody>,
    /// The attempt that may take it.
    attempt: usize,
}

impl Upload {
    /// Waits for the beginning of a body, as long as the body itself allows.
    pub(super) async fn begun<B>(mut body: B) -> Result<Self, BodyError>
    where
        B: Body<Data = Bytes, Error = BodyError> + Send + Unpin + 'static,
    {
        let mut first = BytesMut::new();
        while first.len() < FIRST {
            let Some(frame) = body.frame().await else {
                return Ok(Self::new(full(first)));
            };
            if let Ok(data) = frame?.into_data() {
                first.extend_from_slice(&data);
            }
        }
        let first = first.freeze();
        Ok(Self::new(Begun { first, rest: body }.boxed_unsync()))
    }

    pub(super) fn new(body: RawBody) -> Self {
        let hint = body.size_hint();
        let sent = CancellationToken::new();
        if body.is_end_stream() {
            sent.cancel();
        }
        Self {
            inner: Arc::new(Inner {
                body: Mutex::new(Untaken {
                    body: Some(body),
                    attempt: 0,
                }),
                hint,
                failure: Mutex::new(None),
                sent,
            }),
        }
    }

    /// The body, for one attempt; none when an earlier attempt has begun to send it.
    pub(super) fn offer(&self) -> Option<RawBody> {
        let mut untaken = self.inner.body.lock();
        untaken.body.as_ref()?;
        untaken.attempt += 1;
        Some(
            Attempt {
                inner: self.inner.clone(),
                number: untaken.attempt,
                taken: None,
            }
            .boxed_unsync(),
        )
    }

    /// Takes back what was offered; whether it was still there. From then on no earlier attempt can take it: one that was given up
    /// while it waited for its turn on a connection may get that turn all the same.
    pub(super) fn withdraw(&self) -> bool {
        let mut untaken = self.inner.body.lock();
        untaken.attempt += 1;
        untaken.body.is_some()
    }

    /// Whether there is nothing to send. Such a body is never asked for, so it never counts as touched.
    pub(super) fn is_empty(&self) -> bool {
        self.inner.hint.exact() == Some(0)
    }

    /// Resolves when no attempt has asked for any of the body for `patience`; never for one of no bytes.
    pub(super) async fn ignored_for(&self, patience: Duration) {
        tokio::time::sleep(patience).await;
        if self.is_empty() || self.inner.body.lock().body.is_none() {
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

/// One attempt's view of the body; takes it with the first poll.
struct Attempt {
    inner: Arc<Inner>,
    number: usize,
    taken: Option<RawBody>,
}

impl Body for Attempt {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if this.taken.is_none() {
            let mut untaken = this.inner.body.lock();
            if untaken.attempt == this.number {
                this.taken = untaken.body.take();
            }
        }
        let Some(body) = &mut this.taken else {
            return Poll::Ready(Some(Err("the body was sent elsewhere".into())));
        };
        let polled = Pin::new(&mut *body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Err(error))) => {
                if let Some(error) = error.downcast_ref::<BodyError>() {
                    *this.inner.failure.lock() = Some(error.clone());
                }
            }
            Poll::Ready(None) => this.inner.sent.cancel(),
            Poll::Ready(Some(Ok(_))) if body.is_end_stream() => this.inner.sent.cancel(),
            Poll::Ready(Some(Ok(_))) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.taken {
            Some(body) => body.is_end_stream(),
            // A body of no bytes is never polled.
            None => self.inner.hint.exact() == Some(0),
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.taken.as_ref().map_or_else(|| self.inner.hint, Body::size_hint)
    }
}

/// An answer whose pieces may not be further apart than a given time.
pub(super) struct Impatient {
    body: RawBody,
    idle: Duration,
    deadline: Pin<Box<Sleep>>,
}

impl Impatient {
    pub(super) fn boxed(body: RawBody, idle: Duration) -> RawBody {
        Self {
            body,
            idle,
            deadline: Box::pin(tokio::time::sleep(idle)),
        }
        .boxed_unsync()
    }
}

impl Body for Impatient {
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

    #[tokio::test]
    async fn a_body_can_be_offered_until_it_is_touched() {
        let upload = Upload::new(full("hello"));
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
        let upload = Upload::new(full("hello"));
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
        let upload = Upload::begun(pieces(vec![Ok("he"), Ok("llo")], true)).await.unwrap();
        let body = upload.offer().unwrap();
        assert_eq!(body.size_hint().exact(), Some(5));
        assert_eq!(body.collect().await.unwrap().to_bytes(), "hello");

        let error = BodyError::Slow(Duration::from_secs(1));
        let failed = Upload::begun(pieces(vec![Ok("he"), Err(error.clone())], true)).await;
        assert_eq!(failed.err(), Some(error));

        let slow = Upload::begun(pieces(vec![Ok("he")], false));
        assert!(tokio::time::timeout(Duration::from_millis(50), slow).await.is_err());

        // The rest of a large one is not waited for, and comes after its beginning.
        let large: &'static str = "x".repeat(FIRST).leak();
        let upload = Upload::begun(pieces(vec![Ok(large), Ok("y")], false)).await.unwrap();
        let mut body = upload.offer().unwrap();
        for (expected, last) in [(FIRST, b'x'), (1, b'y')] {
            let data = body.frame().await.unwrap().unwrap().into_data().unwrap();
            assert_eq!((data.len(), data.last()), (expected, Some(&last)));
        }
    }

    #[tokio::test]
    async fn an_empty_body_is_sent_before_it_is_touched() {
        let upload = Upload::new(full(""));
        tokio::time::timeout(Duration::from_secs(5), upload.sent_and(Duration::ZERO))
            .await
            .unwrap();
        assert!(upload.offer().unwrap().is_end_stream());
    }

    #[tokio::test]
    async fn a_stalled_answer_is_an_error() {
        let stalled = http_body_util::StreamBody::new(futures_pending());
        let mut body = Impatient::boxed(stalled.boxed_unsync(), Duration::from_millis(50));
        let error = body.frame().await.unwrap().unwrap_err();
        assert!(error.to_string().contains("stalled"), "{error}");
    }

    fn futures_pending() -> impl futures::Stream<Item = Result<Frame<Bytes>, BoxError>> + Send {
        futures::stream::pending()
    }
}
