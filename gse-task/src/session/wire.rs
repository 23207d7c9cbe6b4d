//! The stream under a session: TLS over TCP, or any other one, as a simulation has.
//!
//! Who is at the other end is known before a stream comes here.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use gse_core::net::Duplex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_util::io::poll_read_buf;

/// A connected stream that can be waited for without a buffer.
pub(super) trait Wire: Duplex + 'static {
    /// Resolves when a read is worth trying.
    fn readable(&mut self) -> impl Future<Output = io::Result<()>> + Send;
}

impl Wire for TlsStream<TcpStream> {
    async fn readable(&mut self) -> io::Result<()> {
        self.get_ref().0.readable().await
    }
}

/// Room for what is read while waiting.
const AHEAD: usize = 1024;

/// Any stream. Waiting for it reads a little ahead.
pub(super) struct Plain<S> {
    inner: S,
    ahead: BytesMut,
    ended: bool,
}

impl<S> Plain<S> {
    pub(super) fn new(inner: S) -> Self {
        Self {
            inner,
            ahead: BytesMut::new(),
            ended: false,
        }
    }
}

impl<S: Duplex + 'static> Wire for Plain<S> {
    async fn readable(&mut self) -> io::Result<()> {
        if self.ended || !self.ahead.is_empty() {
            return Ok(());
        }
        self.ahead.reserve(AHEAD);
        let read = poll_fn(|cx| poll_read_buf(Pin::new(&mut self.inner), cx, &mut self.ahead)).await?;
        self.ended = read == 0;
        Ok(())
    }
}

impl<S: Duplex> AsyncRead for Plain<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() {
            let len = self.ahead.len().min(buf.remaining());
            buf.put_slice(&self.ahead[..len]);
            self.ahead.advance(len);
            return Poll::Ready(Ok(()));
        }
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: Duplex> AsyncWrite for Plain<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn waiting_loses_nothing() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut wire = Plain::new(near);
        far.write_all(b"hello").await.unwrap();
        wire.readable().await.unwrap();
        wire.readable().await.unwrap();
        let mut two = [0; 2];
        wire.read_exact(&mut two).await.unwrap();
        far.write_all(b" world").await.unwrap();
        drop(far);
        let mut rest = String::new();
        wire.read_to_string(&mut rest).await.unwrap();
        assert_eq!((&two[..], &rest[..]), (&b"he"[..], "llo world"));
        wire.readable().await.unwrap();
        assert_eq!(wire.read(&mut two).await.unwrap(), 0, "the end stays the end");
    }
}
