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
    /// Something in it was wrong. What TLS remembers of the bytes then is not to be touched again.
    broken: bool,
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
            broken: false,
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
            if outcome.is_ok() && stream.tls.is_handshaking() {
                poll_fn(|cx| stream.poll_drain(cx)).await?;
            } else {
                // An alert that says why not, or a ticket: for those who take it at once, or else with what is written next.
                let told = poll_fn(|cx| Poll::Ready(stream.poll_drain(cx))).await;
                outcome?;
                if let Poll::Ready(told) = told {
                    told?;
                }
            }
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
            self.broken = true;
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
                self.broken = true;
                self.take_alert(&mut records[used..]);
                return Err(failure);
            }
            if !more {
                return Ok(used);
            }
        }
    }

    /// After an error: the alert that tells the peer. `rest`: the bytes that the error is about and what came behind them. Once: the
    /// connection would go on to the same bytes after it.
    fn take_alert(&mut self, rest: &mut [u8]) {
        if let Ok(ConnectionState::EncodeTlsData(mut data)) = self.tls.process_tls_records(rest).state
            && let Err(error) = put(&mut self.outgoing, &mut data)
        {
            tracing::debug!(%error, "the peer is not told why");
        }
    }

    /// Encrypts into `out`; no text: the last word. What the connection itself has to say is in `outgoing` then and comes first.
    /// `None`: the connection takes no more.
    fn encrypt(&mut self, text: Option<&[u8]>, out: &mut [u8]) -> io::Result<Option<usize>> {
        if self.broken {
            return Ok(None);
        }
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
                self.broken = outcome.is_err();
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

#[cfg(test)]
mod tests {
    use super::*;
    use gse_core::certs::{Authority, LEAF_DAYS};
    use gse_core::tls::{self, Role, TlsFiles};
    use tempfile::TempDir;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client;

    struct Site {
        dir: TempDir,
        ca: Authority,
    }

    impl Site {
        fn new() -> Self {
            let dir = TempDir::new().unwrap();
            let ca = Authority::create(dir.path().join("ca")).unwrap();
            Self { dir, ca }
        }

        fn files(&self, role: Role, id: Option<&str>) -> TlsFiles {
            let at = |suffix: &str| self.dir.path().join(format!("{role}.{suffix}"));
            let files = TlsFiles {
                ca: self.ca.ca_path(),
                cert: at("crt"),
                key: at("key"),
            };
            if !files.cert.exists() {
                self.ca
                    .issue(role, id, &[], &files.cert, &files.key, LEAF_DAYS)
                    .unwrap();
            }
            files
        }

        fn server(&self) -> Arc<ServerConfig> {
            tls::server_config(&self.files(Role::Server, None), &[Role::Agent], &[]).unwrap()
        }

        async fn connect(&self, role: Role, io: DuplexStream) -> io::Result<client::TlsStream<DuplexStream>> {
            let config = tls::client_config(&self.files(role, Some("one")), Role::Server, &[]).unwrap();
            TlsConnector::from(config).connect(tls::server_name(), io).await
        }
    }

    async fn fill(stream: &mut TlsStream<DuplexStream>, text: &mut BytesMut) -> io::Result<usize> {
        poll_fn(|cx| stream.poll_fill(cx, text)).await
    }

    #[tokio::test]
    async fn text_survives_any_pieces_and_new_keys_and_idling_takes_no_buffer() {
        let site = Site::new();
        let sent: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        // Steps of every size: a record comes, and is taken by the kernel, in pieces.
        for room in [7, 1_000, 1 << 20] {
            let (near, far) = duplex(room);
            let places = Semaphore::new(1);
            let (server, client) = tokio::join!(
                TlsStream::accept(site.server(), near, &places),
                site.connect(Role::Agent, far)
            );
            let ((mut server, early), mut client) = (server.unwrap(), client.unwrap());
            assert!(early.is_empty());
            assert_eq!(server.identity().unwrap().id.as_deref(), Some("one"));
            assert_eq!(places.available_permits(), 1);
            let (mut received, mut echoed) = (BytesMut::new(), Vec::new());
            let sent = if room == 7 { &sent[..40_000] } else { &sent[..] };
            let ask = async {
                let (first, second) = sent.split_at(sent.len() / 2);
                client.write_all(first).await.unwrap();
                client.get_mut().1.refresh_traffic_keys().unwrap();
                client.write_all(second).await.unwrap();
                client.flush().await.unwrap();
                let mut buffer = vec![0; sent.len()];
                client.read_exact(&mut buffer).await.unwrap();
                echoed = buffer;
                client.shutdown().await.unwrap();
            };
            let answer = async {
                while received.len() < sent.len() {
                    assert!(fill(&mut server, &mut received).await.unwrap() > 0);
                }
                server.write_all(&received).await.unwrap();
                server.flush().await.unwrap();
                assert_eq!(
                    fill(&mut server, &mut BytesMut::new()).await.unwrap(),
                    0,
                    "the end is told"
                );
            };
            tokio::join!(ask, answer);
            assert!(received[..] == *sent && echoed == sent, "room for {room}");
            assert_eq!((server.incoming.capacity(), server.outgoing.capacity()), (0, 0));
        }
    }

    #[tokio::test]
    async fn what_comes_right_behind_the_handshake_is_kept() {
        let site = Site::new();
        let (near, far) = duplex(1 << 16);
        let places = Semaphore::new(1);
        let client = async {
            let mut client = site.connect(Role::Agent, far).await.unwrap();
            client.write_all(b"hello").await.unwrap();
            client.flush().await.unwrap();
            client
        };
        // The server looks only when all of it is there.
        let server = async {
            tokio::task::yield_now().await;
            TlsStream::accept(site.server(), near, &places).await.unwrap()
        };
        let ((mut server, mut text), client) = tokio::join!(server, client);
        if text.is_empty() {
            fill(&mut server, &mut text).await.unwrap();
        }
        assert_eq!(&text[..], b"hello");
        drop(client);
        assert!(
            fill(&mut server, &mut text).await.is_err(),
            "an end that TLS does not tell is an error"
        );
    }

    #[tokio::test]
    async fn strangers_and_nonsense_are_refused() {
        let site = Site::new();
        let places = Semaphore::new(1);
        let (near, far) = duplex(1 << 16);
        let (server, client) = tokio::join!(TlsStream::accept(site.server(), near, &places), async {
            let mut client = site.connect(Role::ApiClient, far).await?;
            // TLS 1.3 tells a client only after its handshake.
            client.read(&mut [0; 1]).await
        });
        assert!(server.is_err(), "not an agent");
        let error = client.unwrap_err().to_string();
        assert!(error.contains("alert"), "it is told by an alert: {error}");

        for nonsense in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x16, 3, 1, 0xff, 0xff], &[0; 70_000]] {
            let (near, mut far) = duplex(1 << 20);
            far.write_all(nonsense).await.unwrap();
            far.shutdown().await.unwrap();
            assert!(TlsStream::accept(site.server(), near, &places).await.is_err());
        }
        assert_eq!(places.available_permits(), 1, "no place is lost");
    }
}
