//! Byte streams to others, whoever carries them: TCP, or a network that a test simulates.
//!
//! What is spoken on a stream, and the trust in who is at its other end, is left to those who open it.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

/// A stream of bytes both ways.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// Any [`Duplex`].
pub type BoxDuplex = Box<dyn Duplex>;

/// A connection that is being made.
pub type Dialing = Pin<Box<dyn Future<Output = io::Result<BoxDuplex>> + Send>>;

/// Makes connections. Cheap to clone.
#[derive(Clone)]
pub struct Dialer(Arc<dyn Fn(String) -> Dialing + Send + Sync>);

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dialer")
    }
}

impl Dialer {
    /// Connects as `connect` does, which is given `host:port`.
    pub fn new<F>(connect: impl Fn(String) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = io::Result<BoxDuplex>> + Send + 'static,
    {
        Self(Arc::new(move |address| Box::pin(connect(address))))
    }

    /// TCP.
    #[must_use]
    pub fn tcp() -> Self {
        Self::new(|address| async move {
            let stream = tokio::net::TcpStream::connect(&address).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as BoxDuplex)
        })
    }

    /// Connects to `address` (`host:port`). Has no deadline of its own.
    ///
    /// # Errors
    /// When nobody takes the connection.
    pub async fn dial(&self, address: &str) -> io::Result<BoxDuplex> {
        (self.0)(address.to_owned()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn tcp_and_any_other_stream() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"tcp").await.unwrap();
        });
        let piped = Dialer::new(|_| async {
            let (near, mut far) = tokio::io::duplex(16);
            far.write_all(b"pipe").await?;
            Ok(Box::new(near) as BoxDuplex)
        });
        for (dialer, expect) in [(Dialer::tcp(), "tcp"), (piped, "pipe")] {
            let mut text = String::new();
            dialer
                .dial(&address)
                .await
                .unwrap()
                .read_to_string(&mut text)
                .await
                .unwrap();
            assert_eq!(text, expect);
        }
        server.await.unwrap();
        assert!(Dialer::tcp().dial(&address).await.is_err());
    }
}
