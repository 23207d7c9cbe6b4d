//! `rival-swarm`: many clients of a rival in one process, answering at once; progress as the swarm's own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::{Args, ValueEnum};
use gse_core::tls::server_name;
use hyper_util::rt::TokioIo;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tonic::transport::Endpoint;

use super::nats::Connection;
use super::wire::Payload;
use super::wire::rival_client::RivalClient;
use super::{REPLY, nats};
use crate::agent::Stats;
use crate::dial;
use crate::swarm::{identities, raise_files, report};

/// Handshakes at once.
const CONNECTING: usize = 256;
const HANDSHAKE: Duration = Duration::from_secs(60);
/// The window of a control link; the default would be more than it ever needs.
const WINDOW: u32 = 64 * 1024;

/// Whom they are clients of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Rival {
    Nats,
    Tonic,
}

/// Options of `rival-swarm`.
#[derive(Args)]
pub(crate) struct RivalSwarmArgs {
    #[arg(long)]
    rival: Rival,
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=18_000))]
    agents: u32,
    #[arg(long)]
    server: SocketAddr,
    /// Directory with the authority; for tonic.
    #[arg(long, value_name = "DIR")]
    certs: Option<PathBuf>,
}

/// Runs until it is killed or a client fails.
pub(crate) async fn run(args: RivalSwarmArgs) -> Result<()> {
    raise_files(u64::from(args.agents))?;
    let stats = Arc::new(Stats::default());
    let gate = Arc::new(Semaphore::new(CONNECTING));
    let mut agents = JoinSet::new();
    match args.rival {
        Rival::Nats => {
            for index in 0..args.agents {
                agents.spawn(nats_agent(args.server, index, Arc::clone(&gate), Arc::clone(&stats)));
            }
        }
        Rival::Tonic => {
            let certs = args.certs.context("--certs is needed for tonic")?;
            let range = 0..args.agents;
            let found = tokio::task::spawn_blocking(move || identities(&certs, false, range)).await??;
            for (index, tls) in (0..).zip(found) {
                agents.spawn(tonic_agent(
                    args.server,
                    index,
                    tls,
                    Arc::clone(&gate),
                    Arc::clone(&stats),
                ));
            }
        }
    }
    tokio::select! {
        ended = report(&stats, u64::from(args.agents), Duration::from_millis(20)) => ended,
        ended = agents.join_next() => bail!("a client has ended: {ended:?}"),
    }
}

async fn nats_agent(server: SocketAddr, index: u32, gate: Arc<Semaphore>, stats: Arc<Stats>) -> Result<()> {
    let permit = gate.acquire().await?;
    let stream = dial::from_spread(server, index).await?;
    let [all, own] = Connection::subjects(index);
    let mut connection = nats::Connection::begin(stream, &[&all, &own]).await?;
    drop(permit);
    connected(&stats);
    connection.answer(|| answered(&stats)).await
}

async fn tonic_agent(
    server: SocketAddr,
    index: u32,
    tls: Arc<ClientConfig>,
    gate: Arc<Semaphore>,
    stats: Arc<Stats>,
) -> Result<()> {
    let permit = gate.acquire().await?;
    let connector = tower::service_fn(move |_: http::Uri| {
        let tls = TlsConnector::from(Arc::clone(&tls));
        async move {
            let tcp = dial::from_spread(server, index).await.map_err(std::io::Error::other)?;
            Ok::<_, std::io::Error>(TokioIo::new(tls.connect(server_name(), tcp).await?))
        }
    });
    let (replies, mut waiting) = mpsc::channel(4);
    let attached = async {
        let endpoint = Endpoint::from_static("http://rival")
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW);
        let channel = endpoint.connect_with_connector(connector).await?;
        let outgoing = futures::stream::poll_fn(move |cx| waiting.poll_recv(cx));
        let stream = RivalClient::new(channel).attach(outgoing).await?;
        anyhow::Ok(stream.into_inner())
    };
    let mut tasks = Box::pin(tokio::time::timeout(HANDSHAKE, attached))
        .await
        .context("no stream in time")??;
    drop(permit);
    connected(&stats);
    let data = Bytes::from(vec![b'r'; REPLY]);
    while tasks.message().await?.is_some() {
        replies
            .send(Payload { data: data.clone() })
            .await
            .context("the stream has ended")?;
        answered(&stats);
    }
    bail!("the server has ended the stream")
}

fn connected(stats: &Stats) {
    stats.connects.fetch_add(1, Relaxed);
    stats.connected.fetch_add(1, Relaxed);
}

fn answered(stats: &Stats) {
    stats.rows_sent.fetch_add(1, Relaxed);
}
