//! A server of the session protocol in a few lines, and an executor that only remembers: what the session's tests need on both
//! sides of it.
#![allow(dead_code, unreachable_pub)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use gse_agent::config::{Config, FirstServer};
use gse_agent::session::{Keeper, Link, Metrics, Report, Work};
use gse_core::certs::Authority;
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use gse_core::tls::{Role, TlsFiles, server_config};
use gse_proto::frame::Frame;
use gse_proto::session::{Dispatch, Hello, PROTOCOL, Refuse, Stored, TargetRef, Welcome};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Longer than anything takes that goes well.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// An authority, and certificates of it.
pub struct Pki {
    dir: tempfile::TempDir,
    authority: Authority,
}

impl Pki {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(dir.path()).unwrap();
        Self { dir, authority }
    }

    pub fn issue(&self, name: &str, role: Role, id: Option<&str>) -> TlsFiles {
        let file = |suffix: &str| -> PathBuf { self.dir.path().join(format!("{name}.{suffix}")) };
        let (cert, key) = (file("crt"), file("key"));
        self.authority.issue(role, id, &[], &cert, &key, 30).unwrap();
        TlsFiles {
            ca: self.authority.ca_path(),
            cert,
            key,
        }
    }
}

/// A listener that lets agents in.
pub struct Server {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    pub address: String,
}

impl Server {
    pub async fn start(files: &TlsFiles) -> Self {
        Self::start_at(files, "127.0.0.1:0").await
    }

    pub async fn start_at(files: &TlsFiles, address: &str) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let config = server_config(files, &[Role::Agent], &[]).unwrap();
        Self {
            listener,
            acceptor: config.into(),
            address,
        }
    }

    /// The next connection, whatever becomes of its handshake.
    pub async fn connection(&self) -> std::io::Result<TlsStream<TcpStream>> {
        let (socket, _) = timeout(PATIENCE, self.listener.accept())
            .await
            .expect("an agent comes")
            .unwrap();
        self.acceptor.accept(socket).await
    }

    /// The next agent and its hello.
    pub async fn hello(&self) -> (Peer, Hello) {
        let mut peer = Peer {
            stream: self.connection().await.unwrap(),
            buffer: BytesMut::new(),
        };
        match peer.recv().await {
            Some(Frame::Hello(hello)) => (peer, hello),
            other => panic!("not a hello: {other:?}"),
        }
    }

    /// The next agent, let in.
    pub async fn agent(&self, heartbeat_ms: u32) -> Peer {
        let (mut peer, _) = self.hello().await;
        peer.welcome(heartbeat_ms, &[]).await;
        peer
    }

    /// Whether anybody comes within `time`.
    pub async fn anybody_within(&self, time: Duration) -> bool {
        timeout(time, self.listener.accept()).await.is_ok()
    }
}

/// An agent as its server sees it.
pub struct Peer {
    pub stream: TlsStream<TcpStream>,
    buffer: BytesMut,
}

impl Peer {
    pub async fn send(&mut self, frame: impl Into<Frame>) {
        self.stream.write_all(&frame.into().to_bytes()).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    pub async fn welcome(&mut self, heartbeat_ms: u32, servers: &[&str]) {
        self.send(Welcome {
            protocol: PROTOCOL,
            node_id: "node-1".into(),
            session_id: 7,
            heartbeat_interval_ms: heartbeat_ms,
            server_time_ms: 1_700_000_000_000,
            servers: servers.iter().map(|server| (*server).to_owned()).collect(),
            stream_window: 1 << 20,
            session_window: 4 << 20,
        })
        .await;
    }

    pub async fn refuse(&mut self, code: gse_proto::session::RefuseCode, retry_after: Duration) {
        self.send(Refuse {
            code: code.into(),
            reason: "test".into(),
            retry_after_ms: retry_after.as_millis() as u32,
        })
        .await;
    }

    /// The next frame; `None` when the agent has closed the connection.
    pub async fn recv(&mut self) -> Option<Frame> {
        timeout(PATIENCE, async {
            loop {
                if let Some(frame) = Frame::take(&mut self.buffer, 64 << 20).unwrap() {
                    return Some(frame);
                }
                match self.stream.read_buf(&mut self.buffer).await {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
        })
        .await
        .expect("a frame or an end")
    }

    /// The next frame that `pick` takes; the ones before it are skipped.
    pub async fn until<T>(&mut self, mut pick: impl FnMut(Frame) -> Option<T>) -> T {
        loop {
            let frame = self.recv().await.expect("the agent stays");
            if let Some(found) = pick(frame) {
                return found;
            }
        }
    }
}

/// What reached the executor.
#[derive(Debug, PartialEq)]
pub enum Order {
    Dispatch(String),
    Terminate(String),
    Stored(u64),
}

/// An executor that runs nothing.
pub struct Recorder {
    pub held: Mutex<Vec<TargetRef>>,
    orders: mpsc::Sender<Order>,
    reports: Mutex<Option<mpsc::Sender<Report>>>,
    attached: mpsc::Sender<(u32, u32, u64)>,
}

/// The test's ends of a [`Recorder`].
pub struct Seen {
    pub orders: mpsc::Receiver<Order>,
    pub attached: mpsc::Receiver<(u32, u32, u64)>,
}

impl Recorder {
    pub fn new() -> (Arc<Self>, Seen) {
        let (orders, orders_seen) = mpsc::channel(100_000);
        let (attached, attached_seen) = mpsc::channel(1_000);
        let recorder = Self {
            held: Mutex::new(Vec::new()),
            orders,
            reports: Mutex::new(None),
            attached,
        };
        (
            Arc::new(recorder),
            Seen {
                orders: orders_seen,
                attached: attached_seen,
            },
        )
    }

    /// The way to report over the present session.
    pub fn reports(&self) -> mpsc::Sender<Report> {
        self.reports.lock().clone().expect("a session is attached")
    }
}

impl Work for Recorder {
    fn epoch(&self) -> Bytes {
        Bytes::from_static(b"epoch-1")
    }

    fn held(&self) -> Vec<TargetRef> {
        self.held.lock().clone()
    }

    fn counts(&self) -> (u32, u32) {
        (3, 4)
    }

    async fn dispatch(&self, order: Dispatch) {
        self.orders.send(Order::Dispatch(order.asked_id)).await.unwrap();
    }

    async fn terminate(&self, target: TargetRef) {
        self.orders.send(Order::Terminate(target.task_id)).await.unwrap();
    }

    fn stored(&self, stored: Stored) {
        self.orders.try_send(Order::Stored(stored.offset)).unwrap();
    }

    fn attach(&self, link: Link) -> mpsc::Receiver<Report> {
        let (reports, out) = mpsc::channel(16);
        *self.reports.lock() = Some(reports);
        self.attached
            .try_send((link.stream_window, link.session_window, link.server_time_ms))
            .unwrap();
        out
    }
}

/// An agent without an executor, connected as its configuration says.
pub struct Agent {
    pub life: Lifecycle,
    pub work: Arc<Recorder>,
    pub seen: Seen,
    pub data: tempfile::TempDir,
}

impl Agent {
    pub fn start(tls: &TlsFiles, servers: &[&str], change: impl FnOnce(&mut Config)) -> Self {
        let data = tempfile::tempdir().unwrap();
        Self::start_in(data, tls, servers, change)
    }

    pub fn start_in(
        data: tempfile::TempDir,
        tls: &TlsFiles,
        servers: &[&str],
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let mut config = Config {
            servers: servers.iter().map(|server| (*server).to_owned()).collect(),
            tls: tls.clone(),
            data_dir: data.path().to_owned(),
            first_server: FirstServer::Listed,
            ..Config::default()
        };
        config.reconnect.min_ms = 20;
        config.reconnect.max_ms = 100;
        config.reconnect.spread_ms = 20;
        change(&mut config);
        let (work, seen) = Recorder::new();
        let life = Lifecycle::new("agent");
        let hello = Hello {
            agent_id: "0:10.0.0.1".into(),
            machine_id: "m".into(),
            version: "0.1.0".into(),
            ..Default::default()
        };
        let keeper = Keeper::new(&config, hello, work.clone(), Metrics::default(), Health::new(), &life).unwrap();
        life.spawn("keeper", keeper.run());
        Self { life, work, seen, data }
    }

    /// Stops it, and says how long that took.
    pub async fn stop(&self) -> Duration {
        let started = std::time::Instant::now();
        self.life.drain();
        assert!(self.life.finished(PATIENCE).await, "something had to be dropped");
        assert_eq!(self.life.failure(), None);
        started.elapsed()
    }
}

/// A directory that can be read back as text.
pub fn text_of(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).unwrap_or_default()
}
