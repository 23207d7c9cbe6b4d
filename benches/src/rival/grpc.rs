//! A server that does nothing but fan out over one tonic stream an agent, with the TLS settings of gse_task.
//!
//! `tonic-server` is a process of its own: it says where it listens, takes `fanout` lines on standard input, and answers each with how
//! long it took until the last reply was there. It stores nothing and checks nothing but certificates.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::Args;
use gse_core::tls::{Role, TlsFiles, server_config};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};

use super::TASK;
use super::wire::Payload;
use super::wire::rival_server::{Rival, RivalServer};

/// Tasks that may wait for one agent.
const QUEUE: usize = 4;
/// For everybody's reply.
const ROUND: Duration = Duration::from_secs(120);
const HANDSHAKE: Duration = Duration::from_secs(30);

/// Options of `tonic-server`.
#[derive(Args)]
pub(crate) struct ServerArgs {
    /// Directory with gseca.crt and the server's pair.
    #[arg(long, value_name = "DIR")]
    certs: PathBuf,
}

/// What it prints.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Said {
    /// Where it listens.
    Listening(String),
    /// Milliseconds of a fan-out, until so many had replied.
    Round { agents: u64, all_ms: f64 },
}

type Lane = mpsc::Sender<Result<Payload, Status>>;

/// Everybody who is connected, and how many replies have come.
struct Hub {
    lanes: Mutex<HashMap<u64, Lane>>,
    next: AtomicU64,
    replies: watch::Sender<u64>,
}

impl Hub {
    fn lanes(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Lane>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fan_out(&self) -> Result<Said> {
        let lanes: Vec<Lane> = self.lanes().values().cloned().collect();
        let mut replies = self.replies.subscribe();
        let wanted = *replies.borrow_and_update() + lanes.len() as u64;
        let started = Instant::now();
        let data = Bytes::from(vec![b't'; TASK]);
        for lane in &lanes {
            let task = Payload { data: data.clone() };
            lane.send(Ok(task)).await.context("an agent has gone")?;
        }
        tokio::time::timeout(ROUND, replies.wait_for(|now| *now >= wanted))
            .await
            .context("not all have replied")??;
        Ok(Said::Round {
            agents: lanes.len() as u64,
            all_ms: started.elapsed().as_secs_f64() * 1000.0,
        })
    }
}

struct Service(Arc<Hub>);

type Tasks = Pin<Box<dyn futures::Stream<Item = Result<Payload, Status>> + Send>>;

#[tonic::async_trait]
impl Rival for Service {
    type AttachStream = Tasks;

    async fn attach(&self, request: Request<Streaming<Payload>>) -> Result<Response<Tasks>, Status> {
        let hub = Arc::clone(&self.0);
        let id = hub.next.fetch_add(1, Relaxed);
        let (lane, mut tasks) = mpsc::channel(QUEUE);
        hub.lanes().insert(id, lane);
        let mut replies = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(_)) = replies.message().await {
                hub.replies.send_modify(|count| *count += 1);
            }
            hub.lanes().remove(&id);
        });
        let tasks = futures::stream::poll_fn(move |cx| tasks.poll_recv(cx));
        Ok(Response::new(Box::pin(tasks)))
    }
}

/// A connection as tonic wants it.
struct Io(TlsStream<TcpStream>);

impl Connected for Io {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}

/// Runs until its standard input ends.
pub(crate) async fn run(args: ServerArgs) -> Result<()> {
    crate::swarm::raise_files(0)?;
    let files = TlsFiles {
        ca: args.certs.join("gseca.crt"),
        cert: args.certs.join("gse_server.crt"),
        key: args.certs.join("gse_server.key"),
    };
    let tls = tokio::task::spawn_blocking(move || server_config(&files, &[Role::Agent], &[b"h2"])).await??;
    let listener = listener()?;
    say(&Said::Listening(listener.local_addr()?.to_string()))?;
    let hub = Arc::new(Hub {
        lanes: Mutex::default(),
        next: AtomicU64::new(0),
        replies: watch::Sender::new(0),
    });
    let (accepted, mut incoming) = mpsc::channel(256);
    let accepting = accept(listener, TlsAcceptor::from(tls), accepted);
    let incoming = futures::stream::poll_fn(move |cx| incoming.poll_recv(cx).map(|io| io.map(Ok::<_, std::io::Error>)));
    let service = RivalServer::new(Service(Arc::clone(&hub)));
    let serving = Server::builder().add_service(service).serve_with_incoming(incoming);
    let mut lines = crate::swarm::stdin_lines();
    let commands = async {
        while let Some(line) = lines.recv().await {
            let line = line?;
            anyhow::ensure!(line == "fanout", "not a command: {line:?}");
            say(&hub.fan_out().await?)?;
        }
        Ok(())
    };
    tokio::select! {
        ended = serving => bail!("the server has ended: {ended:?}"),
        () = accepting => bail!("nobody is accepted any more"),
        ended = commands => ended,
    }
}

/// With as long a queue as gse_task has.
fn listener() -> Result<TcpListener> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.bind(([127, 0, 0, 1], 0).into())?;
    Ok(socket.listen(4096)?)
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, accepted: mpsc::Sender<Io>) {
    while let Ok((tcp, _)) = listener.accept().await {
        let (tls, accepted) = (tls.clone(), accepted.clone());
        tokio::spawn(async move {
            let prepared = tcp.set_nodelay(true);
            let shaken = tokio::time::timeout(HANDSHAKE, tls.accept(tcp)).await;
            if let (Ok(()), Ok(Ok(stream))) = (prepared, shaken) {
                // Fails only when the process is ending.
                drop(accepted.send(Io(stream)).await);
            }
        });
    }
}

fn say(what: &Said) -> Result<()> {
    let line = serde_json::to_string(what)? + "\n";
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.flush().context("nobody listens any more")
}
