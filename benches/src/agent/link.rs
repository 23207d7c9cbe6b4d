//! An agent's way to a session and from one to the next: which server, when, and the hello.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::BytesMut;
use gse_core::tls::server_name;
use gse_proto::frame::{DEFAULT_MAX_MESSAGE, Frame};
use gse_proto::session as s;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsConnector;

use super::{Agent, End, Session, Stats, WRITE};
use crate::counted::Counted;
use crate::dial;
use crate::servers::Round;

/// For TCP, TLS and hello.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// A session that lasted this long ends a series of failures.
const SETTLED: Duration = Duration::from_secs(60);
/// A move begins somewhere within this time, and not sooner than [`MOVE_GAP`] after the one before.
const MOVE_SPREAD: Duration = Duration::from_millis(200);
const MOVE_GAP: Duration = Duration::from_secs(1);
/// Added, at random, to the wait that a refusal asks for; and the longest such wait.
const REFUSAL_SPREAD: Duration = Duration::from_millis(500);
const LONGEST_REFUSAL: Duration = Duration::from_secs(3600);

/// Why there is no session.
enum Failure {
    Refused(s::Refuse),
    Other(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

/// Counts a connected agent for as long as it is one.
struct Connected<'a>(&'a Stats);

impl<'a> Connected<'a> {
    fn new(stats: &'a Stats) -> Self {
        stats.connected.fetch_add(1, Relaxed);
        Self(stats)
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.connected.fetch_sub(1, Relaxed);
    }
}

fn up_to(most: Duration) -> Duration {
    most.mul_f64(rand::random())
}

impl Agent {
    /// Connects, again and again, for as long as the swarm lives.
    pub(crate) async fn run(mut self) {
        let (min, max) = self.fleet.reconnect;
        let mut bound = min;
        loop {
            let round = self.place.round(&self.fleet.servers.all(), Instant::now());
            let servers = match round {
                Round::Try(servers) => servers,
                Round::Wait(until) => {
                    sleep_until(until + up_to(REFUSAL_SPREAD)).await;
                    continue;
                }
            };
            let wait = match self.connect(servers).await {
                Ok(session) => {
                    let (began, spread) = (Instant::now(), up_to(self.fleet.spread));
                    let stopping = Box::pin(self.stay(session)).await;
                    if began.elapsed() >= SETTLED {
                        bound = min;
                    }
                    if stopping || began.elapsed() >= SETTLED {
                        spread
                    } else {
                        let wait = up_to(bound).max(spread);
                        bound = (bound * 2).min(max.max(min));
                        wait
                    }
                }
                // Every server has named its own time.
                Err(true) => continue,
                Err(false) => {
                    let wait = up_to(bound);
                    bound = (bound * 2).min(max.max(min));
                    wait
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// Tries one server after the other; the error says whether all that did not take the agent have named a time.
    async fn connect(&mut self, servers: Vec<SocketAddr>) -> Result<Session, bool> {
        let mut all_named = true;
        for server in servers {
            match Box::pin(self.dial(server)).await {
                Ok(session) => return Ok(session),
                Err(failure) => all_named &= self.failed(server, failure),
            }
        }
        Err(all_named)
    }

    /// Notes a failed try; true when the server has said when to come back.
    fn failed(&mut self, server: SocketAddr, failure: Failure) -> bool {
        match failure {
            Failure::Refused(refuse) => {
                self.fleet.stats.refused.fetch_add(1, Relaxed);
                self.note("", &anyhow!("refused: {}", refuse.reason));
                let time = Duration::from_millis(refuse.retry_after_ms.into()).min(LONGEST_REFUSAL);
                if !time.is_zero() {
                    self.place.leave_alone(server, time, Instant::now());
                }
                !time.is_zero()
            }
            Failure::Other(error) => {
                self.fleet.stats.failures.fetch_add(1, Relaxed);
                self.note("", &error);
                false
            }
        }
    }

    /// Stays connected until a session ends without another; true when its server was being stopped.
    async fn stay(&mut self, mut session: Session) -> bool {
        let fleet = Arc::clone(&self.fleet);
        let _connected = Connected::new(&fleet.stats);
        let mut last_move: Option<Instant> = None;
        loop {
            fleet.servers.learn(&session.welcome.servers);
            self.place.connected(&fleet.servers.all(), session.server);
            let end = loop {
                match self.frames(&mut session).await {
                    Ok(End::Move(servers)) => {
                        if last_move.is_some_and(|at| at.elapsed() < MOVE_GAP) {
                            continue;
                        }
                        last_move = Some(Instant::now());
                        tokio::time::sleep(up_to(MOVE_SPREAD)).await;
                        let mut servers = servers;
                        if !servers.is_empty() {
                            let first = self.index as usize % servers.len();
                            servers.rotate_left(first);
                        }
                        if let Ok(next) = self.connect(servers).await {
                            break Ok(Some(next));
                        }
                    }
                    Ok(End::Goodbye { stopping }) => {
                        if stopping {
                            self.place.prefer_others(&fleet.servers.all(), session.server);
                        }
                        return stopping;
                    }
                    Err(error) => break Err(error),
                }
            };
            match end {
                Ok(Some(next)) => {
                    fleet.stats.moves.fetch_add(1, Relaxed);
                    let mut left = std::mem::replace(&mut session, next);
                    let bye = s::Goodbye {
                        reason: "moved".into(),
                        stopping: false,
                        ..s::Goodbye::default()
                    };
                    // A last word; whether it arrives makes no difference.
                    if let Ok(Err(error)) = timeout(WRITE, left.stream.write_all(&Frame::from(bye).to_bytes())).await {
                        self.note("leaving: ", &error.into());
                    }
                }
                Ok(None) => return false,
                Err(error) => {
                    self.note("session ended: ", &error);
                    return false;
                }
            }
        }
    }

    async fn dial(&self, server: SocketAddr) -> Result<Session, Failure> {
        let permit = self
            .fleet
            .connecting
            .acquire()
            .await
            .map_err(|e| Failure::Other(e.into()))?;
        let session = timeout(HANDSHAKE, self.introduce(server))
            .await
            .unwrap_or_else(|_| Err(Failure::Other(anyhow!("no session within {HANDSHAKE:?}"))))?;
        drop(permit);
        self.fleet.stats.connects.fetch_add(1, Relaxed);
        Ok(session)
    }

    async fn introduce(&self, server: SocketAddr) -> Result<Session, Failure> {
        let tcp = self.open(server).await?;
        let tcp = Counted::new(tcp, Arc::clone(&self.fleet.stats.wire));
        let mut stream = TlsConnector::from(Arc::clone(&self.tls))
            .connect(server_name(), tcp)
            .await
            .context("TLS handshake")?;
        stream.write_all(&Frame::from(self.hello()).to_bytes()).await?;
        stream.flush().await?;
        let mut buffer = BytesMut::new();
        loop {
            match Frame::take(&mut buffer, DEFAULT_MAX_MESSAGE)? {
                Some(Frame::Welcome(welcome)) => {
                    return Ok(Session {
                        server,
                        stream,
                        buffer,
                        welcome,
                    });
                }
                Some(Frame::Refuse(refuse)) => return Err(Failure::Refused(refuse)),
                Some(other) => return Err(anyhow!("a frame of kind {} in place of a welcome", other.kind()).into()),
                None => {}
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Err(anyhow!("closed in place of a welcome").into());
            }
        }
    }

    async fn open(&self, server: SocketAddr) -> Result<TcpStream> {
        let tcp = dial::from_spread(server, self.index).await?;
        if self.fleet.reset {
            let at_once = nix::libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            setsockopt(&tcp, sockopt::Linger, &at_once).context("SO_LINGER")?;
        }
        Ok(tcp)
    }

    fn hello(&self) -> s::Hello {
        let [_, a, b, c] = self.index.to_be_bytes();
        s::Hello {
            protocol: s::PROTOCOL,
            protocol_min: s::PROTOCOL_MIN,
            agent_id: self.id.clone(),
            machine_id: format!("machine-{}", self.id),
            boot_id: format!("boot-{}", self.id),
            instance: self.epoch(),
            addresses: vec![Ipv4Addr::new(10, a, b, c).to_string()],
            hostname: self.id.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            os: "linux".into(),
            arch: "x86_64".into(),
            run_mode: s::RunMode::Agent.into(),
            journal_epoch: self.epoch(),
            cpu_num: 2,
            mem_size_mb: 2048,
            held: self.pending.iter().filter_map(|p| p.row.target.clone()).collect(),
            ..Default::default()
        }
    }
}
