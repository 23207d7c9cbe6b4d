//! A server of data links that counts records and acknowledges them, on a thread of its own: what the agent can do when the server is no
//! obstacle.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::{Context, Result};
use bytes::BytesMut;
use gse_core::tls::{self, Role, TlsFiles};
use gse_proto::data::{BatchAck, DataWelcome};
use gse_proto::datalink::{DataFrame, MAX_MESSAGE, PROTOCOL, take_record};
use gse_proto::session::Pong;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::plugin::{now_us, time_of};

/// What has arrived.
#[derive(Default)]
pub(super) struct Counts {
    records: AtomicU64,
    /// Of the first record of each batch.
    pub(super) latencies: Mutex<Vec<u64>>,
}

/// Starts it; where it listens.
///
/// # Errors
/// When the certificates are not usable.
pub(super) fn serve(certs: &Path, counts: Arc<Counts>) -> Result<String> {
    let files = TlsFiles {
        ca: certs.join("gseca.crt"),
        cert: certs.join("gse_server.crt"),
        key: certs.join("gse_server.key"),
    };
    let acceptor = TlsAcceptor::from(tls::server_config(&files, &[Role::Agent], &[])?);
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?.to_string();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new()
        .name("own sink".into())
        .spawn(move || {
            let served = runtime.block_on(async {
                let listener = TcpListener::from_std(listener)?;
                loop {
                    let (socket, _) = listener.accept().await?;
                    if let Err(error) = link(&acceptor, socket, &counts).await {
                        eprintln!("own sink: {error:#}");
                    }
                }
                #[allow(unreachable_code)]
                anyhow::Ok(())
            });
            if let Err(error) = served {
                eprintln!("own sink: {error:#}");
            }
        })
        .context("a thread for the sink")?;
    Ok(address)
}

async fn link(acceptor: &TlsAcceptor, socket: TcpStream, counts: &Counts) -> Result<()> {
    socket.set_nodelay(true)?;
    let mut stream = acceptor.accept(socket).await?;
    let mut buffer = BytesMut::with_capacity(1 << 20);
    loop {
        let mut acked = None;
        while let Some(frame) = DataFrame::take(&mut buffer, MAX_MESSAGE)? {
            match frame {
                DataFrame::Hello(_) => {
                    let welcome = DataFrame::from(DataWelcome {
                        protocol: PROTOCOL,
                        window_batches: 64,
                        window_bytes: 8 << 20,
                        ..DataWelcome::default()
                    });
                    stream.write_all(&welcome.to_bytes()).await?;
                }
                DataFrame::Batch(batch) => {
                    acked = Some(batch.seq);
                    let mut body = batch.body;
                    let mut first = None;
                    while let Some(record) = take_record(&mut body)? {
                        first.get_or_insert(record.payload);
                    }
                    counts.records.fetch_add(u64::from(batch.records), Relaxed);
                    if let Some(time) = first.as_deref().and_then(time_of) {
                        let mut latencies = counts.latencies.lock();
                        if latencies.len() < 1 << 20 {
                            latencies.push(now_us().saturating_sub(time));
                        }
                    }
                }
                DataFrame::Ping(ping) => {
                    let pong = DataFrame::from(Pong { nonce: ping.nonce });
                    stream.write_all(&pong.to_bytes()).await?;
                }
                _ => {}
            }
        }
        if let Some(seq) = acked {
            stream.write_all(&DataFrame::from(BatchAck { seq }).to_bytes()).await?;
        }
        stream.flush().await?;
        buffer.reserve(256 << 10);
        if stream.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
    }
}
