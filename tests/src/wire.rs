//! A peer that speaks the session's wire by hand, to do what no well-behaved agent does.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::BytesMut;
use gse_core::tls::{self, Role, TlsFiles};
use gse_proto::frame::Frame;
use gse_proto::session as s;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// One connection to the agents listener.
pub struct Wire {
    stream: TlsStream<TcpStream>,
    buffer: BytesMut,
}

/// A hello like that of an agent.
#[must_use]
pub fn hello(agent: &str) -> s::Hello {
    s::Hello {
        protocol: s::PROTOCOL,
        protocol_min: s::PROTOCOL_MIN,
        agent_id: agent.into(),
        machine_id: "wire".into(),
        boot_id: "wire".into(),
        addresses: vec!["10.99.0.1".into()],
        version: "0.0.1".into(),
        run_mode: s::RunMode::Agent.into(),
        journal_epoch: b"epoch".as_slice().into(),
        ..Default::default()
    }
}

impl Wire {
    /// Connects with a certificate.
    ///
    /// # Errors
    /// When the handshake fails.
    pub async fn connect(address: &str, ca: &Path, cert: &Path, key: &Path) -> Result<Self> {
        let files = TlsFiles {
            ca: ca.into(),
            cert: cert.into(),
            key: key.into(),
        };
        let config = tls::client_config(&files, Role::Server, &[])?;
        let tcp = TcpStream::connect(address).await?;
        let stream = TlsConnector::from(config).connect(tls::server_name(), tcp).await?;
        Ok(Self {
            stream,
            buffer: BytesMut::new(),
        })
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn send(&mut self, frame: impl Into<Frame>) -> Result<()> {
        self.send_raw(&frame.into().to_bytes()).await
    }

    /// Sends any bytes.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await?;
        Ok(())
    }

    /// Takes the next frame; `None` when the other side has closed.
    ///
    /// # Errors
    /// When nothing comes for ten seconds or it is not a frame.
    pub async fn recv(&mut self) -> Result<Option<Frame>> {
        loop {
            if let Some(frame) = Frame::take(&mut self.buffer, 1 << 26)? {
                return Ok(Some(frame));
            }
            let read = tokio::time::timeout(Duration::from_secs(10), self.stream.read_buf(&mut self.buffer));
            match read.await.context("nothing comes")? {
                // A peer that just goes away is an end as well.
                Ok(0) | Err(_) => return Ok(None),
                Ok(_) => {}
            }
        }
    }

    /// Says hello and expects a welcome.
    ///
    /// # Errors
    /// When something else comes.
    pub async fn greet(&mut self, hello: s::Hello) -> Result<s::Welcome> {
        self.send(hello).await?;
        match self.recv().await? {
            Some(Frame::Welcome(welcome)) => Ok(welcome),
            other => anyhow::bail!("not a welcome: {other:?}"),
        }
    }
}
