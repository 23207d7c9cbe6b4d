//! Connecting to the Redis behind, and a connection that belongs to one client for a while.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::{Lost, Passed};
use crate::config::Single;
use crate::resp::skip::{End, Skipper};
use crate::tls::Outward;

/// Where a Redis listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Tcp(String, u16),
    Unix(PathBuf),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Where the Redis is and how one is let in.
#[derive(Clone)]
pub(crate) struct Target {
    place: Place,
    user: String,
    password: Option<String>,
    db: i64,
    /// For people: without the password.
    pub(crate) name: String,
    timeout: Duration,
    tls: Option<Arc<Outward>>,
}

/// TCP, TCP with TLS, or Unix.
pub(crate) enum Stream {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Stream::Tls(s) => Pin::new(s).poll_read(cx, buf),
            Stream::Unix(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(s) => Pin::new(s).poll_write(cx, buf),
            Stream::Tls(s) => Pin::new(s).poll_write(cx, buf),
            Stream::Unix(s) => Pin::new(s).poll_write(cx, buf),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(s) => Pin::new(s).poll_flush(cx),
            Stream::Tls(s) => Pin::new(s).poll_flush(cx),
            Stream::Unix(s) => Pin::new(s).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Stream::Tls(s) => Pin::new(s).poll_shutdown(cx),
            Stream::Unix(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}

/// What our connections are called on the servers behind: the same for all of this process and for no other.
pub(crate) fn client_name() -> &'static str {
    static NAME: std::sync::LazyLock<String> =
        std::sync::LazyLock::new(|| format!("gse_dba-{:016x}", rand::random::<u64>()));
    &NAME
}

/// Undoes `%41`.
pub(crate) fn decode(text: &str) -> anyhow::Result<String> {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b != b'%' {
            out.push(b);
            continue;
        }
        let digit = |b: Option<u8>| {
            b.and_then(|b| char::from(b).to_digit(16))
                .context("a % in it is not followed by two hexadecimal digits")
        };
        out.push((digit(bytes.next())? * 16 + digit(bytes.next())?) as u8);
    }
    String::from_utf8(out).context("it is not UTF-8")
}

impl Target {
    /// Reads a URL. Its password may also come from beside it.
    pub(crate) fn parse(single: &Single, password: Option<String>) -> anyhow::Result<Self> {
        let url = &single.url;
        let limit = Duration::from_millis(single.connect_timeout_ms);
        if let Some(path) = url
            .strip_prefix("redis+unix://")
            .or_else(|| url.strip_prefix("unix://"))
        {
            return Ok(Self {
                place: Place::Unix(path.into()),
                user: "default".into(),
                password,
                db: 0,
                name: format!("redis+unix://{path}"),
                timeout: limit,
                tls: None,
            });
        }
        let Some(rest) = url.strip_prefix("redis://") else {
            bail!("single.url must begin with redis:// or redis+unix://");
        };
        let (login, rest) = rest.rsplit_once('@').map_or((None, rest), |(l, r)| (Some(l), r));
        let (address, db) = rest.split_once('/').unwrap_or((rest, ""));
        let db = if db.is_empty() {
            0
        } else {
            db.parse()
                .with_context(|| format!("the database {db:?} in single.url is not a number"))?
        };
        let (host, port) = match address.strip_prefix('[').and_then(|a| a.split_once(']')) {
            Some((host, port)) => (host, port.strip_prefix(':').unwrap_or("")),
            None => address.rsplit_once(':').unwrap_or((address, "")),
        };
        anyhow::ensure!(!host.is_empty(), "single.url names no host");
        let port = if port.is_empty() {
            6379
        } else {
            port.parse()
                .with_context(|| format!("the port {port:?} in single.url is not a port"))?
        };
        let (mut user, mut secret) = ("default".to_owned(), None);
        if let Some(login) = login {
            let (u, p) = login.split_once(':').unwrap_or((login, ""));
            let (u, p) = (
                decode(u).context("the user in single.url")?,
                decode(p).context("the password in single.url")?,
            );
            if !u.is_empty() {
                user = u;
            }
            secret = Some(p).filter(|p| !p.is_empty());
        }
        let name = format!("redis://{address}/{db}");
        Ok(Self {
            place: Place::Tcp(host.to_owned(), port),
            user,
            password: password.or(secret),
            db,
            name,
            timeout: limit,
            tls: None,
        })
    }

    /// A server by its address alone.
    pub(crate) fn at(place: Place, user: &str, password: Option<String>, timeout: Duration) -> Self {
        Self {
            name: place.to_string(),
            place,
            user: user.to_owned(),
            password,
            db: 0,
            timeout,
            tls: None,
        }
    }

    /// With TLS, where it is not a socket on this host.
    pub(crate) fn over(self, tls: Option<Arc<Outward>>) -> Self {
        Self { tls, ..self }
    }

    /// Connects and introduces itself. Bounded by the connect timeout as a whole.
    pub(crate) async fn connect(&self, resp3: bool) -> anyhow::Result<Stream> {
        timeout(self.timeout, self.dial(resp3))
            .await
            .unwrap_or_else(|_| bail!("it did not answer within {:?}", self.timeout))
            .with_context(|| format!("cannot connect to {}", self.name))
    }

    async fn dial(&self, resp3: bool) -> anyhow::Result<Stream> {
        let mut stream = match &self.place {
            Place::Tcp(host, port) => {
                let s = TcpStream::connect((host.as_str(), *port)).await?;
                s.set_nodelay(true)?;
                match &self.tls {
                    None => Stream::Tcp(s),
                    Some(tls) => Stream::Tls(Box::new(tls.shake(host, s).await?)),
                }
            }
            Place::Unix(path) => Stream::Unix(UnixStream::connect(path).await?),
        };
        let mut commands: Vec<Vec<&[u8]>> = Vec::new();
        let db = self.db.to_string();
        match (resp3, &self.password) {
            (true, Some(p)) => commands.push(vec![b"HELLO", b"3", b"AUTH", self.user.as_bytes(), p.as_bytes()]),
            (true, None) => commands.push(vec![b"HELLO", b"3"]),
            (false, Some(p)) if self.user == "default" => commands.push(vec![b"AUTH", p.as_bytes()]),
            (false, Some(p)) => commands.push(vec![b"AUTH", self.user.as_bytes(), p.as_bytes()]),
            (false, None) => commands.push(vec![b"PING"]),
        }
        if self.db != 0 {
            commands.push(vec![b"SELECT", db.as_bytes()]);
        }
        // So that our connections can be told from those of others. A store that has no names does without.
        commands.push(vec![b"CLIENT", b"SETNAME", client_name().as_bytes()]);
        let mut out = Vec::new();
        for c in &commands {
            super::session::push_command(&mut out, c.iter().copied());
        }
        stream.write_all(&out).await?;
        stream.flush().await?;
        let (mut skipper, mut seen, mut buf, mut start) = (Skipper::default(), 0, BytesMut::new(), 0);
        let mut scanned = 0;
        while seen < commands.len() {
            anyhow::ensure!(stream.read_buf(&mut buf).await? > 0, "it closed the connection");
            while let Some(end) = skipper.next(&buf, scanned).map_err(anyhow::Error::msg)? {
                let (End::Reply(at) | End::Push(at)) = end;
                if buf.get(start) == Some(&b'-') && seen + 1 < commands.len() {
                    let line = buf[start + 1..at].trim_ascii_end();
                    bail!("it refuses us: {}", String::from_utf8_lossy(line));
                }
                start = at;
                scanned = at;
                seen += usize::from(matches!(end, End::Reply(_)));
            }
            scanned = buf.len();
        }
        Ok(stream)
    }
}

/// A connection for one client.
pub(crate) struct Private {
    pub(crate) stream: Stream,
    pub(crate) resp3: bool,
    /// What the server calls it, once that was asked.
    pub(crate) id: Option<i64>,
    usable: bool,
    reply_timeout: Duration,
    max_reply: usize,
    _place: OwnedSemaphorePermit,
}

impl Private {
    pub(crate) fn new(
        stream: Stream,
        resp3: bool,
        place: OwnedSemaphorePermit,
        reply_timeout: Duration,
        max_reply: usize,
    ) -> Self {
        Self {
            stream,
            resp3,
            id: None,
            usable: true,
            reply_timeout,
            max_reply,
            _place: place,
        }
    }

    /// Whether nothing has gone wrong on it, and nothing has come in that was not asked for.
    pub(crate) fn is_usable(&self) -> bool {
        let mut probe = [0; 1];
        let quiet = |r: std::io::Result<usize>| r.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock);
        self.usable
            && match &self.stream {
                Stream::Tcp(s) => quiet(s.try_read(&mut probe)),
                Stream::Tls(s) => quiet(s.get_ref().0.try_read(&mut probe)),
                Stream::Unix(s) => quiet(s.try_read(&mut probe)),
            }
    }

    /// Sends commands and takes as many replies. `blocking`: they may take as long as they like.
    pub(crate) async fn pass(&mut self, bytes: Bytes, count: usize, blocking: bool) -> Passed {
        let mut passed = Passed::default();
        if let Err(reason) = self.exchange(&bytes, count, blocking, &mut passed).await {
            self.usable = false;
            passed.lost = Some(reason);
        }
        passed
    }

    async fn exchange(&mut self, bytes: &[u8], count: usize, blocking: bool, passed: &mut Passed) -> Result<(), Lost> {
        let lost = |reason: String| Lost {
            sent: true,
            reason,
            too_large: false,
        };
        let (mut reader, mut writer) = tokio::io::split(&mut self.stream);
        let write = async {
            writer.write_all(bytes).await.map_err(|e| lost(e.to_string()))?;
            writer.flush().await.map_err(|e| lost(e.to_string()))
        };
        let limit = self.reply_timeout;
        let max = self.max_reply;
        let read = async {
            let (mut skipper, mut scanned) = (Skipper::default(), 0);
            while passed.count < count {
                let more = reader.read_buf(&mut passed.replies);
                let n = if blocking {
                    more.await
                } else {
                    timeout(limit, more)
                        .await
                        .map_err(|_| lost(format!("no reply within {limit:?}")))?
                };
                if n.map_err(|e| lost(e.to_string()))? == 0 {
                    return Err(lost("the connection was closed".into()));
                }
                while scanned < passed.replies.len() {
                    match skipper.next(&passed.replies, scanned).map_err(lost)? {
                        Some(End::Reply(at)) => (passed.count, scanned) = (passed.count + 1, at),
                        Some(End::Push(at)) => scanned = at,
                        None => scanned = passed.replies.len(),
                    }
                }
                if passed.replies.len() > max {
                    return Err(Lost {
                        sent: true,
                        reason: "the reply is larger than limits.output_buffer_bytes".into(),
                        too_large: true,
                    });
                }
            }
            Ok(())
        };
        tokio::try_join!(write, read).map(|_| ())
    }
}
