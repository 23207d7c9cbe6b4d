//! The bytes of a connection: how they are read, within the time that a client has for it, and how replies are sent. What they say is left to `batch`.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::poll_immediate;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::{Conn, Ended};
use crate::behind::Behind;
use crate::clients;
use crate::server::Shared;
use crate::sharded::hub::Inbox;

/// Bytes taken in one read at most.
pub(super) const READ: usize = 64 * 1024;
/// Replies beyond this count among those that wait for clients to take them.
const KEEP: usize = 256 * 1024;
/// Bytes read ahead of a client that waits in a blocking command.
const AHEAD: usize = 1 << 20;
/// Bytes a second that a long command must come with.
const SLOWEST: usize = 64 * 1024;

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Conn<S> {
    /// Reads once; false when the client has left or must.
    pub(super) async fn fill(&mut self, opened: Instant) -> Result<bool, Ended> {
        let l = &self.shared.config.limits;
        let handshake = Duration::from_millis(l.handshake_timeout_ms);
        let wait = if self.state.user.is_none() {
            Some(handshake.saturating_sub(opened.elapsed()))
        } else if self.parser.is_partial() {
            // However slowly its bytes drip, it must become whole in a time that its length explains.
            let since = *self.begun.get_or_insert_with(Instant::now);
            let more = Duration::from_secs((self.parser.buf.len() / SLOWEST) as u64);
            Some((handshake + more).saturating_sub(since.elapsed()))
        } else if l.idle_timeout_ms > 0 {
            Some(Duration::from_millis(l.idle_timeout_ms))
        } else {
            None
        };
        let partial = self.parser.is_partial();
        let listens = self.inbox.as_ref().is_some_and(|i| !i.is_empty());
        // One who only listens must hear of another store too.
        let mut turn = listens.then(|| self.shared.office.views.now().ended.clone());
        let n = loop {
            let inbox = self.inbox.as_mut().filter(|i| !i.is_empty());
            // Who listens may be silent, but not in the middle of a command.
            let wait = wait.filter(|_| inbox.is_none() || partial);
            let message = tokio::select! {
                biased;
                read = read_within(&mut self.stream, &mut self.parser.buf, wait) => break read?,
                () = self.shared.life.draining() => return Ok(false),
                message = next_message(inbox) => message,
                () = over(turn.as_ref()) => {
                    turn = Some(self.turn_over().await?);
                    if self.session.as_ref().is_some_and(Behind::subscribed) {
                        return Ok(true);
                    }
                    continue;
                }
            };
            self.push(message.ok_or(Ended::SlowSubscriber)?).await?;
        };
        match n {
            Some(n) if n > 0 => {
                self.shared.metrics.received(n);
                Ok(true)
            }
            Some(_) => Ok(false),
            None if self.state.user.is_none() => {
                self.shared.metrics.evicted("no_password");
                self.out.error(b"NOAUTH no password was given in time");
                self.flush().await?;
                Ok(false)
            }
            None => {
                let cut = self.parser.is_partial();
                self.shared.metrics.evicted(if cut { "slow_sender" } else { "idle" });
                Ok(false)
            }
        }
    }

    pub(crate) async fn flush(&mut self) -> Result<(), Ended> {
        if let Some(from) = &mut self.muted {
            self.out.buf.truncate(*from);
            *from = 0;
        }
        if self.out.buf.is_empty() {
            return Ok(());
        }
        if self.out.buf.len() > self.shared.config.limits.output_buffer_bytes {
            return Err(Ended::LargeReply);
        }
        let held = if self.out.buf.len() > KEEP {
            Some(clients::hold_output(&self.shared, &self.state.client, self.out.buf.len()).await?)
        } else {
            None
        };
        // Nothing of it is kept while the client is idle.
        let bytes = std::mem::take(&mut self.out.buf);
        let stream = &mut self.stream;
        let mut write = std::pin::pin!(async {
            stream.write_all(&bytes).await?;
            stream.flush().await
        });
        // The usual client takes all of it at once; only the other ones need a clock.
        match poll_immediate(&mut write).await {
            Some(written) => written?,
            None => {
                let limit = Duration::from_millis(self.shared.config.limits.write_timeout_ms);
                timeout(limit, write).await.map_err(|_| Ended::SlowReader)??;
            }
        }
        drop(held);
        self.shared.metrics.sent(bytes.len());
        Ok(())
    }
}

async fn over(turn: Option<&CancellationToken>) {
    match turn {
        Some(turn) => turn.cancelled().await,
        None => std::future::pending().await,
    }
}

/// Waits for what a command brings, while the client may leave or be ended. What it sends meanwhile is kept for later.
pub(super) async fn watched<S: AsyncRead + Unpin>(
    stream: &mut S,
    buf: &mut BytesMut,
    shared: &Shared,
    waiting: impl Future<Output = Result<(), Ended>>,
) -> Result<(), Ended> {
    tokio::pin!(waiting);
    loop {
        let room = buf.len() < AHEAD;
        if room {
            buf.reserve(READ);
        }
        tokio::select! {
            biased;
            done = &mut waiting => return done,
            () = shared.life.draining() => return Err(Ended::Done),
            read = stream.read_buf(buf), if room => {
                let n = read?;
                if n == 0 {
                    return Err(Ended::Left);
                }
                shared.metrics.received(n);
            }
        }
    }
}

async fn next_message(inbox: Option<&mut Inbox>) -> Option<Bytes> {
    match inbox {
        Some(inbox) => inbox.next().await,
        None => std::future::pending().await,
    }
}

/// Reads into the buffer; `None` when the time was up.
async fn read_within(
    stream: &mut (impl AsyncRead + Unpin),
    buf: &mut BytesMut,
    wait: Option<Duration>,
) -> io::Result<Option<usize>> {
    match wait {
        None => read_some(stream, buf).await.map(Some),
        Some(wait) => match timeout(wait, read_some(stream, buf)).await {
            Ok(n) => n.map(Some),
            Err(_) => Ok(None),
        },
    }
}

thread_local! {
    /// Where reads of all clients of a thread go first: a client that sends nothing holds no memory for what it might send.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into());
}

/// Reads once; 0 is the end.
async fn read_some(stream: &mut (impl AsyncRead + Unpin), buf: &mut BytesMut) -> io::Result<usize> {
    poll_fn(|cx| {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut read = ReadBuf::new(scratch);
            ready!(Pin::new(&mut *stream).poll_read(cx, &mut read))?;
            buf.extend_from_slice(read.filled());
            Poll::Ready(Ok(read.filled().len()))
        })
    })
    .await
}
