//! TLS under a session, at the price of an idle one: records are taken apart and put together in memory that all sessions of a thread
//! share, and one call to the kernel moves as many of them as there are.
//!
//! A connection keeps bytes of its own only while a record has come in part, or while the kernel has taken a write in part. Who may
//! connect is decided by the configuration (see `gse_core::tls`); this only moves bytes.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use gse_core::tls::{PeerIdentity, TlsError, identity_of};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Semaphore;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use tokio_rustls::rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};

/// Bytes taken from the kernel, or text encrypted, in one step.
const STEP: usize = 64 * 1024;
/// Most that is kept of what has come in part: a record (16 KiB of text, what encryption adds, the header), and during the handshake
/// a message (64 KiB) over several of them.
const MAX_HELD: usize = (16 << 10) + 256 + 5 + (64 << 10);
/// What encryption adds to a step, with room to spare.
const OVERHEAD: usize = 1024;

thread_local! {
    /// Used within one poll and never across two.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; STEP + MAX_HELD + OVERHEAD]);
}

fn with_scratch<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with(|scratch| match scratch.try_borrow_mut() {
        Ok(mut scratch) => work(&mut scratch),
        // A stream below that itself runs another one within its poll.
        Err(_) => work(&mut vec![0; STEP + MAX_HELD + OVERHEAD]),
    })
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Appends a record that the connection itself wants to send.
fn put(outgoing: &mut BytesMut, data: &mut EncodeTlsData<'_, ServerConnectionData>) -> io::Result<()> {
    let start = outgoing.len();
    outgoing.resize(start + OVERHEAD, 0);
    let mut encoded = data.encode(&mut outgoing[start..]);
    if let Err(EncodeError::InsufficientSize(short)) = &encoded {
        outgoing.resize(start + short.required_size, 0);
        encoded = data.encode(&mut outgoing[start..]);
    }
    outgoing.truncate(start + encoded.as_ref().copied().unwrap_or(0));
    encoded.map(drop).map_err(invalid)
}

/// The server's end of a TLS connection.
pub(super) struct TlsStream<S> {
    io: S,
    tls: UnbufferedServerConnection,
    /// The beginning of a record whose end has not come.
    incoming: Vec<u8>,
    /// Records that the kernel has not taken yet.
    outgoing: BytesMut,
    /// The peer has said that nothing more comes.
    ended: bool,
    close_notified: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream<S> {
    /// Takes a connection through its handshake. What the peer has sent right behind it comes along. A place of `computing` is held
    /// while there is something to compute, and never while the peer is waited for.
    ///
    /// # Errors
    /// Of the stream or of the handshake; the peer has been told why, as far as it listens.
    pub(super) async fn accept(
        config: Arc<ServerConfig>,
        io: S,
        computing: &Semaphore,
    ) -> io::Result<(Self, BytesMut)> {
        let tls = UnbufferedServerConnection::new(config).map_err(invalid)?;
        let mut stream = Self {
            io,
            tls,
            incoming: Vec::new(),
            outgoing: BytesMut::new(),
            ended: false,
            close_notified: false,
        };
        let mut early = BytesMut::new();
        while stream.tls.is_handshaking() {
            poll_fn(|cx| stream.poll_receive(cx)).await?;
            let outcome = {
                let place = computing.acquire().await;
                let _place = place.map_err(io::Error::other)?;
                let mut incoming = std::mem::take(&mut stream.incoming);
                let used = stream.take_records(&mut incoming, &mut early);
                used.and_then(|used| stream.keep(&incoming[used..]))
            };
            // Also when it has failed: an alert says why.
            let told = poll_fn(|cx| stream.poll_drain(cx)).await;
            outcome.and(told)?;
            if stream.ended {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok((stream, early))
    }

    /// Takes what has come, as it is.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        with_scratch(|scratch| {
            let mut room = ReadBuf::new(&mut scratch[..STEP]);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut room))?;
            if room.filled().is_empty() {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            self.incoming.extend_from_slice(room.filled());
            Poll::Ready(Ok(()))
        })
    }

    /// Whose certificate the peer has shown.
    ///
    /// # Errors
    /// When it does not name its holder or is not valid any more.
    pub(super) fn identity(&self) -> Result<PeerIdentity, TlsError> {
        identity_of(&self.tls)
    }

    /// Appends what there is to read to `text`. `Ok(0)`: the peer has said that nothing more comes.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>, text: &mut BytesMut) -> Poll<io::Result<usize>> {
        let before = text.len();
        with_scratch(|scratch| {
            while !self.ended && text.len() == before {
                let held = self.incoming.len();
                scratch[..held].copy_from_slice(&self.incoming);
                let mut room = ReadBuf::new(&mut scratch[held..held + STEP]);
                ready!(Pin::new(&mut self.io).poll_read(cx, &mut room))?;
                let read = room.filled().len();
                if read == 0 {
                    // Not said inside TLS: it may have been cut off by somebody else.
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                let used = self.take_records(&mut scratch[..held + read], text)?;
                self.keep(&scratch[used..held + read])?;
            }
            Poll::Ready(Ok(text.len() - before))
        })
    }

    fn keep(&mut self, rest: &[u8]) -> io::Result<()> {
        if rest.len() > MAX_HELD {
            return Err(invalid("a record or message longer than TLS allows"));
        }
        if rest.is_empty() {
            self.incoming = Vec::new();
        } else {
            self.incoming.clear();
            self.incoming.extend_from_slice(rest);
        }
        Ok(())
    }

    /// Decrypts the whole records in `records` and says how many bytes they were.
    fn take_records(&mut self, records: &mut [u8], text: &mut BytesMut) -> io::Result<usize> {
        let mut used = 0;
        loop {
            let UnbufferedStatus { mut discard, state, .. } = self.tls.process_tls_records(&mut records[used..]);
            let mut more = true;
            let mut failure = None;
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record.map_err(invalid)?;
                        discard += record.discard;
                        text.extend_from_slice(record.payload);
                    }
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => put(&mut self.outgoing, &mut data)?,
                // What there is to transmit waits in `outgoing`, in its order.
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                    self.ended = true;
                    more = false;
                }
                Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => more = false,
                Ok(other) => failure = Some(invalid(format!("unexpected state of TLS: {other:?}"))),
                Err(error) => failure = Some(invalid(error)),
            }
            used += discard;
            if let Some(failure) = failure {
                self.take_alert();
                return Err(failure);
            }
            if !more {
                return Ok(used);
            }
        }
    }

    /// After an error: the alert that tells the peer.
    fn take_alert(&mut self) {
        while let Ok(ConnectionState::EncodeTlsData(mut data)) = self.tls.process_tls_records(&mut []).state {
            if put(&mut self.outgoing, &mut data).is_err() {
                return;
            }
        }
    }

    /// Encrypts into `out`; no text: the last word. What the connection itself has to say is in `outgoing` then and comes first.
    /// `None`: the connection takes no more.
    fn encrypt(&mut self, text: Option<&[u8]>, out: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            // A record that has come in part is shown again: the connection may remember where in it it is.
            let UnbufferedStatus { discard, state, .. } = self.tls.process_tls_records(&mut self.incoming);
            let outcome = match state {
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    let len = match text {
                        Some(text) => traffic.encrypt(text, out),
                        None => traffic.queue_close_notify(out),
                    };
                    Some(len.map(Some).map_err(invalid))
                }
                // The answer to a key update of the peer.
                Ok(ConnectionState::EncodeTlsData(mut data)) => put(&mut self.outgoing, &mut data).err().map(Err),
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    None
                }
                // Told once; writing goes on.
                Ok(ConnectionState::PeerClosed) => {
                    self.ended = true;
                    None
                }
                Ok(ConnectionState::Closed) => Some(Ok(None)),
                Ok(other) => Some(Err(invalid(format!("unexpected state of TLS: {other:?}")))),
                Err(error) => Some(Err(invalid(error))),
            };
            self.incoming.drain(..discard);
            if let Some(outcome) = outcome {
                return outcome;
            }
        }
    }

    /// Hands the kernel what waits.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.outgoing.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while !self.outgoing.is_empty() {
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, &self.outgoing))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.outgoing.advance(written);
        }
        // Nothing of a large write stays with an idle session.
        self.outgoing = BytesMut::new();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, text: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        let text = &text[..text.len().min(STEP)];
        with_scratch(|scratch| {
            let Some(len) = this.encrypt(Some(text), scratch)? else {
                return Poll::Ready(Ok(0));
            };
            let mut records = &scratch[..len];
            if this.outgoing.is_empty() {
                match Pin::new(&mut this.io).poll_write(cx, records) {
                    Poll::Ready(Ok(written)) => records = &records[written..],
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => {}
                }
            }
            // What the kernel has no room for is written by the next call, or by the flush.
            this.outgoing.extend_from_slice(records);
            Poll::Ready(Ok(text.len()))
        })
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.close_notified {
            this.close_notified = true;
            let mut alert = [0; OVERHEAD];
            if let Some(len) = this.encrypt(None, &mut alert)? {
                this.outgoing.extend_from_slice(&alert[..len]);
            }
        }
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}
