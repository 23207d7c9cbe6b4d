//! A connection with a program on this host, of either kind.

use std::io;

use bytes::BytesMut;
use tokio::net::{TcpStream, UnixStream};

/// A connection that is read and written without ever waiting inside of a read or write.
#[derive(Debug)]
pub enum Stream {
    /// By a path of the file system.
    Unix(UnixStream),
    /// By a port of the loopback interface.
    Tcp(TcpStream),
}

/// Who is at the other end, as the kernel says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Peer {
    /// The account; `None`: it can't be known, as on a port.
    pub uid: Option<u32>,
    /// The process that connected.
    pub pid: Option<i32>,
}

impl Stream {
    /// Resolves when there is something to read, or an end.
    ///
    /// # Errors
    /// What the system says.
    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.readable().await,
            Self::Tcp(stream) => stream.readable().await,
        }
    }

    /// Resolves when there is room to write.
    ///
    /// # Errors
    /// What the system says.
    pub async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.writable().await,
            Self::Tcp(stream) => stream.writable().await,
        }
    }

    /// Reads what is there into the spare room of `buffer`; 0 is the end.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there.
    pub fn try_read_buf(&self, buffer: &mut BytesMut) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.try_read_buf(buffer),
            Self::Tcp(stream) => stream.try_read_buf(buffer),
        }
    }

    /// Writes what there is room for.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.try_write(bytes),
            Self::Tcp(stream) => stream.try_write(bytes),
        }
    }

    pub(super) fn peer(&self) -> Peer {
        match self {
            Self::Unix(stream) => match stream.peer_cred() {
                Ok(cred) => Peer {
                    uid: Some(cred.uid()),
                    pid: cred.pid(),
                },
                Err(error) => {
                    // Then nobody is known to be there, which allows least.
                    tracing::debug!(%error, "the kernel does not say who connected");
                    Peer::default()
                }
            },
            Self::Tcp(_) => Peer::default(),
        }
    }
}
