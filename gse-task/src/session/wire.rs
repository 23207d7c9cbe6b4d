//! The stream under a session: TLS over TCP, or any other one, as a simulation has.
//!
//! Who is at the other end is known before a stream comes here.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::BytesMut;
use gse_core::net::Duplex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::io::poll_read_buf;

use super::tls::TlsStream;

/// A connected stream.
pub(super) trait Wire: AsyncWrite + Send + Unpin + 'static {
    /// Appends what there is to read to `text`, in one step; `Ok(0)` is the end. `text` need not have room.
    fn poll_fill(&mut self, cx: &mut Context<'_>, text: &mut BytesMut) -> Poll<io::Result<usize>>;
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> Wire for TlsStream<S> {
    fn poll_fill(&mut self, cx: &mut Context<'_>, text: &mut BytesMut) -> Poll<io::Result<usize>> {
        self.poll_fill(cx, text)
    }
}

/// Room for one read of a plain stream.
const ROOM: usize = 4 * 1024;

/// Any stream.
pub(super) struct Plain<S>(pub(super) S);

impl<S: Duplex + 'static> Wire for Plain<S> {
    fn poll_fill(&mut self, cx: &mut Context<'_>, text: &mut BytesMut) -> Poll<io::Result<usize>> {
        text.reserve(ROOM);
        poll_read_buf(Pin::new(&mut self.0), cx, text)
    }
}

impl<S: Duplex> AsyncWrite for Plain<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
