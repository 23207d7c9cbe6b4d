//! An end of a connection that loses nothing of what was sent before it.
//!
//! A socket that is closed while the other side still sends is reset, and a reset takes away what that side has received and not yet
//! read: the last answers. So the write side is closed first, and what still comes is read to nowhere until the other side has closed
//! too, or has had time to.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// How long the other side may take to close.
const LINGER: Duration = Duration::from_secs(1);
/// Read at a time, and in one go before others get their turn.
const PIECE: usize = 8 * 1024;
const PIECES: usize = 32;

/// A connection that is ended this way.
pub(super) struct Lingering<S> {
    stream: S,
    /// There once the write side is closed.
    until: Option<Pin<Box<Sleep>>>,
}

impl<S> Lingering<S> {
    pub(super) fn new(stream: S) -> Self {
        Lingering { stream, until: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Lingering<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Lingering<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let until = match &mut this.until {
            Some(until) => until,
            none => {
                ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
                none.insert(Box::pin(tokio::time::sleep(LINGER)))
            }
        };
        let mut piece = [0; PIECE];
        for _ in 0..PIECES {
            if until.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let mut buf = ReadBuf::new(&mut piece);
            match Pin::new(&mut this.stream).poll_read(cx, &mut buf) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {}
                // Closed, or broken: there is nothing left to lose.
                Poll::Ready(_) => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        (client.unwrap(), accepted.unwrap().0)
    }

    #[tokio::test]
    async fn an_answer_arrives_although_its_reader_still_sends() {
        let (mut client, server) = pair().await;
        let mut server = Lingering::new(server);
        client.write_all(&[0; 100_000]).await.unwrap();
        server.write_all(b"answer").await.unwrap();
        let ended = tokio::spawn(async move { server.shutdown().await });
        // Late to read, and not done with sending.
        tokio::time::sleep(Duration::from_millis(100)).await;
        client.write_all(&[0; 100_000]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        drop(client);
        ended.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn one_who_never_closes_is_not_waited_for_long() {
        let (_client, server) = pair().await;
        let started = Instant::now();
        Lingering::new(server).shutdown().await.unwrap();
        assert!(started.elapsed() < LINGER * 3, "{:?}", started.elapsed());
    }
}
