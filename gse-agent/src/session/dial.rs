//! From an address to a session that the server has let in: TCP, TLS 1.3 with both certificates, hello, and the server's answer.
//!
//! A simulation gives streams of its own instead of TCP and TLS; no configuration leads there.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bytes::BytesMut;
use gse_core::net::{BoxDuplex, Dialer};
use gse_core::tls::server_name;
use gse_proto::frame::{Frame, HELLO_MAX_MESSAGE};
use gse_proto::session::{Hello, PROTOCOL, PROTOCOL_MIN, Refuse, Welcome};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::config::SessionConfig;

/// How a server is reached.
#[derive(Debug, Clone)]
pub(super) enum Way {
    /// TCP, and TLS with both certificates.
    Tls(Arc<rustls::ClientConfig>),
    /// Streams of which somebody else knows where they lead.
    Given(Dialer),
}

/// A session that has begun.
pub(super) struct Connection {
    /// Where to, as it was asked for.
    pub(super) address: String,
    /// The stream, encrypted where it is a network's.
    pub(super) stream: BoxDuplex,
    /// Whether the handshake took up an earlier one.
    pub(super) resumed: bool,
    /// What came after the Welcome.
    pub(super) buffer: BytesMut,
    /// The server's answer.
    pub(super) welcome: Welcome,
}

/// Why there is no session.
#[derive(Debug)]
pub(super) enum DialError {
    /// Nobody there, or nobody of ours.
    Failed(anyhow::Error),
    /// The server said no.
    Refused(Refuse),
}

/// Connects to `address` (`host:port`) and introduces the agent.
pub(super) async fn dial(
    address: &str,
    way: Way,
    hello: Hello,
    config: &SessionConfig,
) -> Result<Connection, DialError> {
    let dialer = match &way {
        Way::Tls(_) => None,
        Way::Given(dialer) => Some(dialer.clone()),
    };
    let socket = connect(address, dialer, config.connect_timeout())
        .await
        .map_err(DialError::Failed)?;
    let limit = config.handshake_timeout();
    timeout(limit, introduce(address, socket, way, hello))
        .await
        .unwrap_or_else(|_| {
            Err(DialError::Failed(anyhow!(
                "no handshake within {} ms; is this the agents' port of a server?",
                limit.as_millis()
            )))
        })
}

/// A stream that has been connected.
enum Socket {
    Tcp(TcpStream),
    Given(BoxDuplex),
}

async fn connect(address: &str, dialer: Option<Dialer>, limit: Duration) -> anyhow::Result<Socket> {
    let connected = timeout(limit, async {
        match dialer {
            Some(dialer) => dialer.dial(address).await.map(Socket::Given),
            None => TcpStream::connect(address).await.map(Socket::Tcp),
        }
    });
    let socket = connected
        .await
        .map_err(|_| anyhow!("no connection within {} ms", limit.as_millis()))?
        .context("cannot connect")?;
    if let Socket::Tcp(socket) = &socket {
        socket.set_nodelay(true).context("cannot set TCP_NODELAY")?;
    }
    Ok(socket)
}

/// Makes a socket a stream that only the two ends can read; also says whether an earlier handshake was taken up.
async fn secure(socket: Socket, way: Way) -> anyhow::Result<(BoxDuplex, bool)> {
    match (socket, way) {
        (Socket::Tcp(socket), Way::Tls(tls)) => {
            let stream = TlsConnector::from(tls)
                .connect(server_name(), socket)
                .await
                .context("TLS handshake")?;
            let resumed = stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
            Ok((Box::new(stream), resumed))
        }
        (Socket::Given(stream), Way::Given(_)) => Ok((stream, false)),
        (Socket::Tcp(_), Way::Given(_)) | (Socket::Given(_), Way::Tls(_)) => {
            bail!("a stream was made in another way than it is used")
        }
    }
}

async fn introduce(address: &str, socket: Socket, way: Way, hello: Hello) -> Result<Connection, DialError> {
    let fail = |error: anyhow::Error| DialError::Failed(error);
    let (mut stream, resumed) = secure(socket, way).await.map_err(fail)?;
    let hello = Frame::from(fitting(hello)).to_bytes();
    let sent = async {
        stream.write_all(&hello).await?;
        stream.flush().await
    };
    sent.await.context("cannot send the hello").map_err(fail)?;
    let mut buffer = BytesMut::with_capacity(4096);
    let answer = loop {
        if let Some(frame) = Frame::take(&mut buffer, HELLO_MAX_MESSAGE)
            .context("answer to the hello")
            .map_err(fail)?
        {
            break frame;
        }
        let read = stream
            .read_buf(&mut buffer)
            .await
            // In TLS 1.3 a server that turns the certificate down says so only now.
            .context("no answer to the hello")
            .map_err(fail)?;
        if read == 0 {
            return Err(fail(anyhow!(
                "the server closed the connection instead of answering the hello"
            )));
        }
    };
    match answer {
        Frame::Welcome(welcome) => {
            check(&welcome).map_err(fail)?;
            Ok(Connection {
                address: address.to_owned(),
                stream,
                resumed,
                buffer,
                welcome,
            })
        }
        Frame::Refuse(refuse) => Err(DialError::Refused(refuse)),
        other => Err(fail(anyhow!("answer to the hello is a frame of kind {}", other.kind()))),
    }
}

fn check(welcome: &Welcome) -> anyhow::Result<()> {
    if !(PROTOCOL_MIN..=PROTOCOL).contains(&welcome.protocol) {
        bail!(
            "the server wants to speak session protocol {}; this agent speaks {PROTOCOL_MIN} to {PROTOCOL}",
            welcome.protocol
        );
    }
    Ok(())
}

/// A server takes a hello of limited size. An agent that holds more than fits must come back all the same, or it would keep what it
/// holds for ever; what is left out is still reported as rows.
fn fitting(mut hello: Hello) -> Hello {
    let all = hello.held.len();
    while hello.encoded_len() > HELLO_MAX_MESSAGE && !hello.held.is_empty() {
        let keep = hello.held.len() * 9 / 10;
        hello.held.truncate(keep);
    }
    if hello.held.len() < all {
        tracing::error!(
            held = all,
            named = hello.held.len(),
            "more targets are held than a hello can name; lower the executor's limits"
        );
    }
    hello
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::session::TargetRef;

    #[test]
    fn a_hello_is_never_too_long_to_be_read() {
        let held = (0..40_000)
            .map(|index| TargetRef {
                task_id: "GSETASK:S:20261122233412:00000000000000FF".into(),
                bucket: 1,
                index,
            })
            .collect();
        let hello = fitting(Hello {
            agent_id: "a".into(),
            held,
            ..Default::default()
        });
        assert!(hello.encoded_len() <= HELLO_MAX_MESSAGE && hello.held.len() > 10_000);
    }

    #[test]
    fn another_protocol_is_said_so() {
        assert!(
            check(&Welcome {
                protocol: PROTOCOL,
                ..Default::default()
            })
            .is_ok()
        );
        let error = check(&Welcome {
            protocol: 99,
            ..Default::default()
        })
        .unwrap_err();
        assert!(error.to_string().contains("99"));
    }
}
