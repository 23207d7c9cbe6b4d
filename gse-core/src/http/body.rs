//! Bodies: requests read whole or passed on as they arrive, within limits; answers sent piece by piece so that a reader that has stopped
//! can be told from a slow one.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use super::connection::Activity;

/// Any error of a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// A body of any origin.
pub type RawBody = UnsyncBoxBody<Bytes, BoxError>;

/// A body that is there already.
pub fn full(bytes: impl Into<Bytes>) -> RawBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// No body.
pub fn empty() -> RawBody {
    full(Bytes::new())
}

/// A body that is made piece by piece, its size not known before.
pub fn stream(pieces: impl Stream<Item = Bytes> + Send + 'static) -> RawBody {
    StreamBody::new(pieces.map(|piece| Ok(Frame::data(piece)))).boxed_unsync()
}

/// A body that ends, whatever is still to come of it, when `over` is cancelled.
pub(super) fn until(body: RawBody, over: CancellationToken) -> RawBody {
    let pieces = futures::stream::unfold(body, |mut body| async move {
        let frame = body.frame().await?;
        Some((frame, body))
    });
    StreamBody::new(pieces.take_until(over.cancelled_owned())).boxed_unsync()
}

/// The budget for bodies counts in these.
const UNIT: usize = 1024;
/// Pieces in which an answer is handed to the connection.
pub(super) const PIECE: usize = 64 * 1024;
/// Memory taken for a body before any of it has arrived.
const FIRST: usize = 64 * 1024;

/// Why a body was not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// More than is allowed.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// The bodies of all requests together are more than is allowed.
    #[error("too many large bodies at once, try again later")]
    Budget,
    /// It did not arrive in time.
    #[error("the body did not arrive within {0:?}")]
    Slow(Duration),
    /// The connection ended before the body did, or the body is not well-formed.
    #[error("the body is incomplete: {0}")]
    Incomplete(String),
}

/// Memory for bodies, shared by all requests of a listener.
#[derive(Clone)]
pub(super) struct Budget(Arc<Semaphore>);

impl Budget {
    pub(super) fn new(bytes: usize) -> Self {
        Budget(Arc::new(Semaphore::new(
            (bytes / UNIT).clamp(1, Semaphore::MAX_PERMITS),
        )))
    }

    fn has(&self, bytes: usize) -> bool {
        self.0.available_permits() >= bytes.div_ceil(UNIT)
    }
}

/// A share of the budget, given back when dropped.
pub(super) struct Share {
    budget: Budget,
    held: Option<OwnedSemaphorePermit>,
    units: usize,
}

impl Share {
    pub(super) fn none(budget: &Budget) -> Self {
        Share {
            budget: budget.clone(),
            held: None,
            units: 0,
        }
    }

    fn grow_to(&mut self, bytes: usize) -> Result<(), BodyError> {
        let units = bytes.div_ceil(UNIT);
        let more = u32::try_from(units.saturating_sub(self.units)).map_err(|_| BodyError::Budget)?;
        if more == 0 {
            return Ok(());
        }
        let permit = Arc::clone(&self.budget.0)
            .try_acquire_many_owned(more)
            .map_err(|_| BodyError::Budget)?;
        match &mut self.held {
            Some(held) => held.merge(permit),
            None => self.held = Some(permit),
        }
        self.units = units;
        Ok(())
    }
}

/// Reads a whole body. `share` grows with what has arrived, not with what was announced.
pub(super) async fn read_whole(
    body: &mut Incoming,
    limit: usize,
    deadline: Duration,
    share: &mut Share,
    activity: &Activity,
) -> Result<Bytes, BodyError> {
    let announced = announced(body, limit)?;
    if !share.budget.has(announced) {
        return Err(BodyError::Budget);
    }
    let read = async {
        let mut whole = BytesMut::with_capacity(announced.min(FIRST));
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| incomplete(&error))?;
            activity.touch();
            if let Ok(data) = frame.into_data() {
                if data.len() > limit - whole.len() {
                    return Err(BodyError::TooLarge(limit));
                }
                share.grow_to(whole.len() + data.len())?;
                whole.extend_from_slice(&data);
            }
        }
        Ok(whole.freeze())
    };
    tokio::time::timeout(deadline, read)
        .await
        .map_err(|_| BodyError::Slow(deadline))?
}

fn announced(body: &Incoming, limit: usize) -> Result<usize, BodyError> {
    let announced = body.size_hint().lower();
    usize::try_from(announced)
        .ok()
        .filter(|size| *size <= limit)
        .ok_or(BodyError::TooLarge(limit))
}

fn incomplete(error: &hyper::Error) -> BodyError {
    BodyError::Incomplete(error.to_string())
}

/// A body as it arrives, within the listener's size and time.
pub struct BodyStream {
    body: Incoming,
    limit: usize,
    left: usize,
    allowed: Duration,
    deadline: Pin<Box<Sleep>>,
    activity: Activity,
}

impl BodyStream {
    pub(super) fn new(
        body: Incoming,
        limit: usize,
        allowed: Duration,
        activity: &Activity,
    ) -> Result<Self, (BodyError, Incoming)> {
        match announced(&body, limit) {
            Err(error) => Err((error, body)),
            Ok(_) => Ok(BodyStream {
                body,
                limit,
                left: limit,
                allowed,
                deadline: Box::pin(tokio::time::sleep_until(Instant::now() + allowed)),
                activity: activity.clone(),
            }),
        }
    }

    /// As a body to send elsewhere.
    pub fn boxed(self) -> RawBody {
        self.map_err(BoxError::from).boxed_unsync()
    }
}

impl Body for BodyStream {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.activity.touch();
                let size = frame.data_ref().map_or(0, Bytes::len);
                if size > this.left {
                    return Poll::Ready(Some(Err(BodyError::TooLarge(this.limit))));
                }
                this.left -= size;
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(incomplete(&error)))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => match this.deadline.as_mut().poll(cx) {
                Poll::Ready(()) => Poll::Ready(Some(Err(BodyError::Slow(this.allowed)))),
                Poll::Pending => Poll::Pending,
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Reads what is left of a body to nowhere, for a while: a connection closed with unread data on it is reset, and the answer that was on
/// its way is lost with it.
pub(super) async fn discard(mut body: Incoming, activity: Activity, patience: Duration) {
    let read = async {
        while let Some(Ok(_)) = body.frame().await {
            activity.touch();
        }
    };
    // Either way there is nothing more to do: the caller has had its time.
    drop(tokio::time::timeout(patience, read).await);
}

/// The body of an answer. While it lives, its connection counts as busy.
pub(super) struct Answer {
    content: Content,
    activity: Activity,
}

enum Content {
    /// One after the other, each let go as soon as it has been handed over.
    Parts([Bytes; 3]),
    Stream(RawBody),
}

impl Answer {
    pub(super) fn whole(bytes: impl Into<Bytes>, activity: Activity) -> Self {
        Answer::around(Bytes::new(), bytes.into(), Bytes::new(), activity)
    }

    /// `data` with something before and something after it. It is sent as it is and not copied: what its owner holds is held until
    /// its last piece has gone out, or the answer is dropped, and no longer.
    pub(super) fn around(before: Bytes, data: Bytes, after: Bytes, activity: Activity) -> Self {
        Answer {
            content: Content::Parts([before, data, after]),
            activity,
        }
    }

    pub(super) fn stream(body: RawBody, activity: Activity) -> Self {
        Answer {
            content: Content::Stream(body),
            activity,
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let polled = match &mut this.content {
            Content::Parts(parts) => Poll::Ready(next_piece(parts).map(|piece| Ok(Frame::data(piece)))),
            Content::Stream(body) => Pin::new(body).poll_frame(cx),
        };
        if polled.is_ready() {
            this.activity.touch();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Parts(parts) => parts.iter().all(Bytes::is_empty),
            Content::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Parts(parts) => SizeHint::with_exact(parts.iter().map(|part| part.len() as u64).sum()),
            Content::Stream(body) => body.size_hint(),
        }
    }
}

fn next_piece(parts: &mut [Bytes; 3]) -> Option<Bytes> {
    let rest = parts.iter_mut().find(|part| !part.is_empty())?;
    Some(if rest.len() > PIECE {
        rest.split_to(PIECE)
    } else {
        // Nothing of it stays here: an empty rest might still keep its owner alive.
        std::mem::take(rest)
    })
}
