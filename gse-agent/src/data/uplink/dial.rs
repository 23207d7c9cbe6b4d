//! From an address to a link that the server has let in: TCP, TLS with both certificates, hello and welcome.

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use gse_core::tls::{self, Role};
use gse_proto::data::{Compression, DataHello, DataWelcome};
use gse_proto::datalink::{DataFrame, PROTOCOL};
use gse_proto::frame::HELLO_MAX_MESSAGE;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Shared;

/// A link that has begun.
pub(super) struct Connection {
    pub(super) stream: TlsStream<TcpStream>,
    /// What came after the welcome.
    pub(super) buffer: BytesMut,
    pub(super) welcome: DataWelcome,
}

/// Connects to `address` (`host:port`) and introduces the agent.
pub(super) async fn dial(shared: &Shared, address: &str, spool_id: Bytes) -> anyhow::Result<Connection> {
    let limit = Duration::from_millis(shared.config.connect_timeout_ms);
    timeout(limit, introduce(shared, address, spool_id))
        .await
        .with_context(|| format!("no link within {} ms", limit.as_millis()))?
}

async fn introduce(shared: &Shared, address: &str, spool_id: Bytes) -> anyhow::Result<Connection> {
    let files = shared.identity.tls.clone();
    // Read again each time: certificates are replaced while the agent runs.
    let tls = tokio::task::spawn_blocking(move || tls::client_config(&files, Role::Server, &[]))
        .await
        .context("reading certificates")??;
    let socket = TcpStream::connect(address).await.context("cannot connect")?;
    socket.set_nodelay(true).context("cannot set TCP_NODELAY")?;
    let mut stream = TlsConnector::from(tls)
        .connect(tls::server_name(), socket)
        .await
        .context("TLS handshake")?;
    let next_seq = {
        let flow = shared.intake.flow.lock();
        flow.acked_seq() + 1
    };
    let compressions = if shared.config.enable_compression {
        vec![Compression::Zstd.into()]
    } else {
        Vec::new()
    };
    let hello = DataFrame::from(DataHello {
        protocol: PROTOCOL,
        agent_id: shared.identity.agent_id.clone(),
        spool_id,
        next_seq,
        compressions,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    });
    stream
        .write_all(&hello.to_bytes())
        .await
        .context("cannot send the hello")?;
    stream.flush().await.context("cannot send the hello")?;
    let mut buffer = BytesMut::new();
    loop {
        match DataFrame::take(&mut buffer, HELLO_MAX_MESSAGE).context("answer to the hello")? {
            Some(DataFrame::Welcome(welcome)) if welcome.protocol == PROTOCOL => {
                return Ok(Connection {
                    stream,
                    buffer,
                    welcome,
                });
            }
            Some(DataFrame::Welcome(welcome)) => bail!("the server speaks protocol {} on data links", welcome.protocol),
            Some(DataFrame::Goodbye(bye)) => bail!("the server refused the link: {}", bye.reason),
            Some(other) => bail!("the answer to the hello is a frame of kind {}", other.kind()),
            None => {}
        }
        if stream.read_buf(&mut buffer).await.context("no answer to the hello")? == 0 {
            bail!("the server closed the connection instead of answering the hello");
        }
    }
}
