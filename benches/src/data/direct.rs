//! Simulated agents that do nothing but send batches, made beforehand, to gse_data.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::{Context, Result, bail};
use bytes::{Bytes, BytesMut};
use gse_core::certs::Authority;
use gse_core::tls::{self, Role, TlsFiles};
use gse_proto::data::{Batch, DataHello};
use gse_proto::datalink::{DataFrame, MAX_MESSAGE, PROTOCOL, put_record};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;

use super::{ID, plugin};
use crate::agent::agent_id;
use crate::site::Site;

/// Bytes of a batch, as the agent has them by default.
const BATCH: usize = 512 << 10;

/// Running links.
pub(super) struct Links {
    pub(super) acknowledged: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

/// Starts `count` of them.
///
/// # Errors
/// When there are no certificates for them.
pub(super) async fn start(site: &Site, address: &str, count: u32, bytes: u32) -> Result<Links> {
    let mut body = BytesMut::new();
    let mut payload = plugin::MARK.to_vec();
    payload.resize(bytes as usize, b'x');
    let mut records = 0;
    while body.is_empty() || body.len() + payload.len() + 16 <= BATCH {
        put_record(&mut body, ID, 0x6448_9136, 9, &payload);
        records += 1;
    }
    let body = body.freeze();
    let acknowledged: Arc<AtomicU64> = Arc::default();
    let mut tasks = JoinSet::new();
    let authority = Authority::open(site.certs())?;
    for number in 0..count {
        let id = agent_id(number);
        let (cert, key): (PathBuf, PathBuf) = (
            site.path().join(format!("link-{number}.crt")),
            site.path().join(format!("link-{number}.key")),
        );
        authority.issue(Role::Agent, Some(&id), &[], &cert, &key, 10)?;
        let files = TlsFiles {
            ca: site.certs().join("gseca.crt"),
            cert,
            key,
        };
        let config = tls::client_config(&files, Role::Server, &[])?;
        let (address, body, acknowledged) = (address.to_owned(), body.clone(), Arc::clone(&acknowledged));
        tasks.spawn(async move {
            if let Err(error) = link(config, &address, id, body, records, &acknowledged).await {
                eprintln!("link: {error:#}");
            }
        });
    }
    Ok(Links {
        acknowledged,
        _tasks: tasks,
    })
}

async fn link(
    config: Arc<ClientConfig>,
    address: &str,
    agent_id: String,
    body: Bytes,
    records: u32,
    acknowledged: &AtomicU64,
) -> Result<()> {
    let socket = TcpStream::connect(address).await.context("cannot connect")?;
    socket.set_nodelay(true)?;
    let mut stream = TlsConnector::from(config).connect(tls::server_name(), socket).await?;
    let hello = DataHello {
        protocol: PROTOCOL,
        agent_id,
        spool_id: Bytes::copy_from_slice(&rand::random::<[u8; 16]>()),
        next_seq: 1,
        ..DataHello::default()
    };
    stream.write_all(&DataFrame::from(hello).to_bytes()).await?;
    stream.flush().await?;
    let mut buffer = BytesMut::new();
    let welcome = loop {
        match DataFrame::take(&mut buffer, MAX_MESSAGE)? {
            Some(DataFrame::Welcome(welcome)) => break welcome,
            Some(other) => bail!("the answer to the hello is of kind {}", other.kind()),
            None if stream.read_buf(&mut buffer).await? == 0 => bail!("the server closed the link"),
            None => {}
        }
    };
    let window = u64::from(welcome.window_batches)
        .min(welcome.window_bytes / body.len().max(1) as u64)
        .max(1);
    let (mut sent, mut acked) = (0, 0);
    loop {
        while sent - acked < window {
            sent += 1;
            let batch = DataFrame::from(Batch {
                seq: sent,
                records,
                compression: 0,
                plain_len: u32::try_from(body.len())?,
                body: body.clone(),
            });
            stream.write_all(&batch.to_bytes()).await?;
        }
        stream.flush().await?;
        if stream.read_buf(&mut buffer).await? == 0 {
            bail!("the server closed the link");
        }
        while let Some(frame) = DataFrame::take(&mut buffer, MAX_MESSAGE)? {
            match frame {
                DataFrame::Ack(ack) => {
                    acknowledged.fetch_add(ack.seq.saturating_sub(acked) * u64::from(records), Relaxed);
                    acked = acked.max(ack.seq);
                }
                DataFrame::Goodbye(bye) => bail!("the server leaves: {}", bye.reason),
                _ => {}
            }
        }
    }
}
