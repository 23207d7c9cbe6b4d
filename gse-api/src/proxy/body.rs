//! Bodies on their way through: a caller's body that is not lost by an attempt to connect that fails, and an answer that may not stall
//! for ever.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use gse_core::http::{BodyError, BoxError, RawBody};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

/// A caller's body that can be offered to one server after the other until one of them has taken the first piece of it.
pub(super) struct Upload {
    inner: Arc<Inner>,
}

struct Inner {
    body: Mutex<Option<RawBody>>,
    hint: SizeHint,
    failure: Mutex<Option<BodyError>>,
    sent: CancellationToken,
}

impl Upload {
    pub(super) fn new(body: RawBody) -> Self {
        let hint = body.size_hint();
        let sent = CancellationToken::new();
        if body.is_end_stream() {
            sent.cancel();
        }
        Self {
            inner: Arc::new(Inner {
                body: Mutex::new(Some(body)),
                hint,
                failure: Mutex::new(None),
                sent,
            }),
        }
    }

    /// The body, for one attempt; none when an earlier attempt has begun to send it.
    pub(super) fn offer(&self) -> Option<RawBody> {
        self.untouched().then(|| {
            Attempt {
                inner: self.inner.clone(),
                taken: None,
            }
            .boxed_unsync()
        })
    }

    /// Whether no attempt has asked for any of it.
    pub(super) fn untouched(&self) -> bool {
        self.inner.body.lock().is_some()
    }

    /// Whether there is nothing to send. Such a body is never asked for, so it never counts as touched.
    pub(super) fn is_empty(&self) -> bool {
        self.inner.hint.exact() == Some(0)
    }

    /// Resolves when no attempt has asked for any of the body for `patience`; never for one of no bytes.
    pub(super) async fn ignored_for(&self, patience: Duration) {
        tokio::time::sleep(patience).await;
        if self.is_empty() || !self.untouched() {
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

/// One attempt's view of the body; takes it with the first poll.
struct Attempt {
    inner: Arc<Inner>,
    taken: Option<RawBody>,
}

impl Body for Attempt {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if this.taken.is_none() {
            this.taken = this.inner.body.lock().take();
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
    use gse_core::http::full;

    #[tokio::test]
    async fn a_body_can_be_offered_until_it_is_touched() {
        let upload = Upload::new(full("hello"));
        let first = upload.offer().unwrap();
        assert_eq!(first.size_hint().exact(), Some(5));
        drop(first);
        let second = upload.offer().unwrap();
        assert_eq!(second.collect().await.unwrap().to_bytes(), "hello");
        assert!(upload.offer().is_none() && !upload.untouched());
        // The clock for the answer has begun to run.
        tokio::time::timeout(Duration::from_secs(5), upload.sent_and(Duration::ZERO))
            .await
            .unwrap();
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
