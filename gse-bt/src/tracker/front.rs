//! Sockets of the tracker: HTTP/1.1, a request per connection, and UDP.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::http::{Method, StatusCode, header};
use anyhow::Context as _;
use bytes::Bytes;
use gse_core::lifecycle::Lifecycle;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::ids::ConnectionIds;
use super::{Peers, Refusal, Scrape, Tracker, http, udp};

/// Pause after a failed accept or receive; the usual reason (no file descriptor left) does not go away at once.
const PAUSE: Duration = Duration::from_millis(100);
/// Datagrams that are answered before others on the same thread get their turn.
const BATCH: usize = 64;
/// Longest datagram of a request: a scrape of the most swarms; options behind an announce are not read.
const DATAGRAM: usize = 2048;
/// Bytes of a request's head, most of which is the query.
const HEAD: usize = 16 * 1024;
/// Time between searches for peers that are gone.
const EXPIRE_EVERY: Duration = Duration::from_secs(10);

/// Where the tracker listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FrontConfig {
    /// Address and port for HTTP; empty: none.
    pub http_listen: String,
    /// Address and port for UDP; empty: none.
    pub udp_listen: String,
    /// HTTP connections at once; more wait in the kernel's queue.
    pub max_connections: usize,
    /// From a connection to the end of its answer, milliseconds.
    pub request_timeout_ms: u64,
}

impl Default for FrontConfig {
    fn default() -> Self {
        Self {
            http_listen: String::new(),
            udp_listen: String::new(),
            max_connections: 1024,
            request_timeout_ms: 10_000,
        }
    }
}

impl FrontConfig {
    /// What is wrong with the settings, in words.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let positive = [
            ("max_connections", self.max_connections as u64),
            ("request_timeout_ms", self.request_timeout_ms),
        ];
        positive
            .iter()
            .filter(|(_, value)| *value == 0)
            .map(|(name, _)| format!("{name} has to be positive"))
            .collect()
    }
}

/// Where the tracker can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listening {
    /// Over HTTP.
    pub http: Option<SocketAddr>,
    /// Over UDP.
    pub udp: Option<SocketAddr>,
    /// When the tracker's clock began.
    pub since: Instant,
}

impl Listening {
    /// Seconds of the tracker's clock, for announces that do not come over a socket.
    #[must_use]
    pub fn now(&self) -> u32 {
        seconds_since(self.since)
    }
}

/// `.torrent` files that are offered beside the tracker, by the path of the request; what it does not know is not found.
pub type Torrents = Arc<dyn Fn(&str) -> Option<Bytes> + Send + Sync>;

/// Binds the listeners and answers on them until the server drains. `key` is for connection ids; nodes that share an address share it.
pub async fn serve(
    config: &FrontConfig,
    tracker: Arc<Tracker>,
    key: &[u8; 32],
    life: &Lifecycle,
) -> anyhow::Result<Listening> {
    serve_with(config, tracker, key, None, life).await
}

/// The same, with `.torrent` files over HTTP.
pub async fn serve_with(
    config: &FrontConfig,
    tracker: Arc<Tracker>,
    key: &[u8; 32],
    torrents: Option<Torrents>,
    life: &Lifecycle,
) -> anyhow::Result<Listening> {
    let problems = [config.problems(), tracker.config().problems()].concat();
    anyhow::ensure!(problems.is_empty(), "tracker: {}", problems.join("; "));
    let front = Arc::new(Front {
        tracker,
        torrents,
        ids: ConnectionIds::new(key),
        started: Instant::now(),
    });
    let mut listening = Listening {
        http: None,
        udp: None,
        since: front.started,
    };
    if !config.http_listen.is_empty() {
        let listener = TcpListener::bind(&config.http_listen).await.with_context(|| {
            format!(
                "tracker: cannot bind {} (TCP); is it in use or not of this host?",
                config.http_listen
            )
        })?;
        let address = listener.local_addr()?;
        life.announce("tracker_http", address.to_string());
        listening.http = Some(address);
        let (front, config, owner) = (front.clone(), config.clone(), life.clone());
        life.spawn(
            "tracker http",
            async move { accept(front, listener, &config, &owner).await },
        );
    }
    if !config.udp_listen.is_empty() {
        let socket = UdpSocket::bind(&config.udp_listen).await.with_context(|| {
            format!(
                "tracker: cannot bind {} (UDP); is it in use or not of this host?",
                config.udp_listen
            )
        })?;
        let address = socket.local_addr()?;
        life.announce("tracker_udp", address.to_string());
        listening.udp = Some(address);
        let (front, owner) = (front.clone(), life.clone());
        life.spawn("tracker udp", async move { datagrams(&front, &socket, &owner).await });
    }
    let owner = life.clone();
    life.spawn("tracker expiry", async move {
        let mut every = tokio::time::interval(EXPIRE_EVERY);
        loop {
            tokio::select! {
                _ = every.tick() => front.tracker.expire(front.now()),
                () = owner.draining() => return,
            }
        }
    });
    Ok(listening)
}

struct Front {
    tracker: Arc<Tracker>,
    torrents: Option<Torrents>,
    ids: ConnectionIds,
    started: Instant,
}

impl Front {
    /// Seconds of the tracker's clock.
    fn now(&self) -> u32 {
        seconds_since(self.started)
    }
}

fn seconds_since(start: Instant) -> u32 {
    u32::try_from(start.elapsed().as_secs()).unwrap_or(u32::MAX)
}

async fn accept(front: Arc<Front>, listener: TcpListener, config: &FrontConfig, life: &Lifecycle) {
    let seats = Arc::new(Semaphore::new(config.max_connections));
    let timeout = Duration::from_millis(config.request_timeout_ms);
    loop {
        let next = async {
            let seat = seats.clone().acquire_owned().await;
            (seat, listener.accept().await)
        };
        let (seat, accepted) = tokio::select! {
            next = next => next,
            () = life.draining() => return,
        };
        match (seat, accepted) {
            (Ok(seat), Ok((stream, peer))) => {
                let front = front.clone();
                life.spawn_contained("tracker request", async move {
                    // A client that breaks off, or is too slow, has no other use for an error than this.
                    let _ = tokio::time::timeout(timeout, connection(&front, stream, peer.ip(), timeout)).await;
                    drop(seat);
                });
            }
            (_, Err(error)) => {
                tracing::warn!(%error, "tracker: cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
            // The semaphore is never closed.
            (Err(_), Ok(_)) => return,
        }
    }
}

async fn connection(front: &Front, stream: TcpStream, peer: IpAddr, timeout: Duration) -> hyper::Result<()> {
    let service = service_fn(|request: ::http::Request<Incoming>| {
        let response = answer(front, &request, peer);
        async move { Ok::<_, Infallible>(response) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeout)
        .keep_alive(false)
        .max_buf_size(HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

fn answer(front: &Front, request: &::http::Request<Incoming>, peer: IpAddr) -> ::http::Response<Full<Bytes>> {
    let tracker = &front.tracker;
    let (mut status, mut body) = (StatusCode::OK, None);
    if request.method() == Method::GET {
        let uri = request.uri();
        if let Some(torrent) = front.torrents.as_ref().and_then(|torrents| torrents(uri.path())) {
            let mut response = ::http::Response::new(Full::new(torrent));
            let kind = ::http::HeaderValue::from_static("application/x-bittorrent");
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            return response;
        }
        match http::Request::parse(uri.path(), uri.query().unwrap_or_default()) {
            Ok(http::Request::Announce(announce)) => {
                let mut peers = Peers::default();
                body = Some(match tracker.announce(peer, &announce, front.now(), &mut peers) {
                    Ok(()) => http::Response::Announce(peers),
                    Err(refusal) => http::Response::Failure(refusal.to_string()),
                });
            }
            Ok(http::Request::Scrape(swarms)) => {
                let figures: Vec<([u8; 20], Scrape)> = swarms
                    .into_iter()
                    .filter_map(|swarm| Some((swarm, tracker.scrape(&swarm)?)))
                    .collect();
                tracker.metrics().scrapes.inc();
                body = Some(match figures.is_empty() {
                    true => http::Response::Failure(Refusal::UnknownSwarm.to_string()),
                    false => http::Response::Scrape(figures),
                });
            }
            Err(bad) => {
                tracker.metrics().malformed.inc();
                if bad == http::BadRequest::Path {
                    status = StatusCode::NOT_FOUND;
                }
                body = Some(http::Response::Failure(bad.to_string()));
            }
        }
    } else {
        status = StatusCode::METHOD_NOT_ALLOWED;
        tracker.metrics().malformed.inc();
    }
    let body = body.map_or_else(Vec::new, |body| body.encode());
    let mut response = ::http::Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let plain = ::http::HeaderValue::from_static("text/plain");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}

async fn datagrams(front: &Front, socket: &UdpSocket, life: &Lifecycle) {
    let mut datagram = [0; DATAGRAM];
    let mut answerer = Answerer::new(front);
    loop {
        let readable = tokio::select! {
            readable = socket.readable() => readable,
            () = life.draining() => return,
        };
        let mut failed = readable.err();
        answerer.now = front.now();
        for _ in 0..BATCH {
            if failed.is_some() {
                break;
            }
            match socket.try_recv_from(&mut datagram) {
                Ok((len, from)) => {
                    if let Some(answer) = answerer.answer(&datagram[..len], from.ip())
                        && socket.try_send_to(answer, from).is_err()
                    {
                        // It is as good as lost on its way; the client asks again.
                        front.tracker.metrics().unsent.inc();
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                // A client that is gone: the network's answer to what was sent to it.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            tracing::warn!(%error, "tracker: cannot receive datagrams");
            tokio::time::sleep(PAUSE).await;
        }
        tokio::task::consume_budget().await;
    }
}

/// Answers datagrams, in memory that is used again for each.
struct Answerer<'f> {
    front: &'f Front,
    now: u32,
    peers: Peers,
    out: Vec<u8>,
}

impl<'f> Answerer<'f> {
    fn new(front: &'f Front) -> Self {
        Self {
            front,
            now: front.now(),
            peers: Peers::default(),
            out: Vec::with_capacity(DATAGRAM),
        }
    }

    /// The answer to a datagram, if there is one. Without a valid connection id it is never longer than the question, so that nobody
    /// can have more sent to somebody else's address than he sends himself.
    fn answer(&mut self, datagram: &[u8], from: IpAddr) -> Option<&[u8]> {
        let from = from.to_canonical();
        let tracker = &self.front.tracker;
        let metrics = tracker.metrics();
        let Ok(request) = udp::Request::parse(datagram) else {
            metrics.malformed.inc();
            return None;
        };
        self.out.clear();
        let known = |id| self.front.ids.check(id, from, u64::from(self.now));
        match request {
            udp::Request::Connect { transaction } => {
                let id = self.front.ids.make(from, u64::from(self.now));
                udp::write_connect(&mut self.out, transaction, id);
            }
            udp::Request::Announce {
                connection,
                transaction,
                ..
            }
            | udp::Request::Scrape {
                connection,
                transaction,
                ..
            } if !known(connection) => {
                metrics.strangers.inc();
                udp::write_error(&mut self.out, transaction, "connection id unknown or expired");
                self.out.truncate(datagram.len());
            }
            udp::Request::Announce {
                transaction, announce, ..
            } => match tracker.announce(from, &announce, self.now, &mut self.peers) {
                Ok(()) => udp::write_announce(&mut self.out, transaction, &self.peers, from.is_ipv6()),
                Err(refusal) => udp::write_error(&mut self.out, transaction, &refusal.to_string()),
            },
            udp::Request::Scrape {
                transaction, swarms, ..
            } => {
                metrics.scrapes.inc();
                let figures = swarms.iter().map(|swarm| tracker.scrape(swarm).unwrap_or_default());
                udp::write_scrape(&mut self.out, transaction, figures);
            }
        }
        Some(&self.out)
    }
}

#[cfg(test)]
mod tests;
