//! The far end of an agent's data links, with the site's server certificate: it notes what arrives, and can be gone, silent, or deaf. For
//! what a test needs to see batch by batch; where records go behind it is gse_data's own tests' business.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use gse_core::tls::{self, Role, TlsFiles};
use gse_proto::data::{BatchAck, DataWelcome};
use gse_proto::datalink::{DataFrame, MAX_MESSAGE, PROTOCOL, take_record};
use gse_proto::session::Pong;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

/// What all the receivers of a test have taken.
#[derive(Debug, Default)]
pub struct Taken {
    /// Payloads in the order of their arrival; batches that were acknowledged before are not taken again.
    pub payloads: Mutex<Vec<Bytes>>,
    acked: Mutex<HashMap<Bytes, u64>>,
    /// Batches are read and not acknowledged.
    pub silent: AtomicBool,
    /// Nothing is read.
    pub deaf: AtomicBool,
}

impl Taken {
    /// How many records there are.
    ///
    /// # Panics
    /// When a receiver has panicked.
    #[must_use]
    pub fn count(&self) -> usize {
        self.payloads.lock().expect("no panic").len()
    }

    /// The payloads as numbers.
    ///
    /// # Panics
    /// When one is none.
    #[must_use]
    pub fn numbers(&self) -> Vec<u64> {
        let payloads = self.payloads.lock().expect("no panic");
        let number = |payload: &Bytes| {
            let digits = std::str::from_utf8(&payload[..payload.len().min(12)]).expect("digits");
            digits.parse().expect("a number")
        };
        payloads.iter().map(number).collect()
    }
}

/// A listening receiver. Gone, with all its links, when dropped.
#[derive(Debug)]
pub struct Receiver {
    /// Where it listens.
    pub address: String,
    task: JoinHandle<()>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Receiver {
    /// Listens at `address`.
    ///
    /// # Errors
    /// When that is taken, or the certificates are not usable.
    pub async fn start(files: &TlsFiles, taken: &Arc<Taken>, address: &str) -> Result<Self> {
        let acceptor = TlsAcceptor::from(tls::server_config(files, &[Role::Agent], &[])?);
        let listener = TcpListener::bind(address).await.with_context(|| address.to_owned())?;
        let address = listener.local_addr()?.to_string();
        let taken = Arc::clone(taken);
        let task = tokio::spawn(async move {
            let mut links = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let (acceptor, taken) = (acceptor.clone(), Arc::clone(&taken));
                links.spawn(async move {
                    // Agents are killed while they send.
                    let _ = link(acceptor, socket, &taken).await;
                });
            }
        });
        Ok(Self { address, task })
    }
}

async fn link(acceptor: TlsAcceptor, socket: TcpStream, taken: &Taken) -> Result<()> {
    let mut stream = acceptor.accept(socket).await?;
    let mut buffer = BytesMut::new();
    let mut spool = Bytes::new();
    loop {
        while let Some(frame) = DataFrame::take(&mut buffer, MAX_MESSAGE)? {
            let answer = match frame {
                DataFrame::Hello(hello) => {
                    spool = hello.spool_id;
                    DataFrame::from(DataWelcome {
                        protocol: PROTOCOL,
                        acked: taken.acked.lock().expect("no panic").get(&spool).copied().unwrap_or(0),
                        window_batches: 32,
                        window_bytes: 8 << 20,
                        ..DataWelcome::default()
                    })
                }
                DataFrame::Batch(_) if taken.silent.load(Ordering::Relaxed) => continue,
                DataFrame::Batch(batch) => {
                    let mut acked = taken.acked.lock().expect("no panic");
                    let known = acked.entry(spool.clone()).or_default();
                    if batch.seq > *known {
                        *known = batch.seq;
                        let mut body = batch.body;
                        let mut payloads = taken.payloads.lock().expect("no panic");
                        while let Some(record) = take_record(&mut body)? {
                            payloads.push(Bytes::copy_from_slice(&record.payload));
                        }
                    }
                    DataFrame::from(BatchAck { seq: batch.seq })
                }
                DataFrame::Ping(ping) => DataFrame::from(Pong { nonce: ping.nonce }),
                _ => continue,
            };
            stream.write_all(&answer.to_bytes()).await?;
        }
        stream.flush().await?;
        while taken.deaf.load(Ordering::Relaxed) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        if stream.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
    }
}
