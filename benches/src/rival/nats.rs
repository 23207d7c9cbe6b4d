//! As much of the NATS client protocol as the comparison needs: a smaller client is the fairer one.
//!
//! An agent subscribes to what is for everybody and to a subject of its own, and publishes its reply to the inbox that a message names.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{REPLY, TASK};

/// Longest line of control taken from the server.
const MAX_LINE: usize = 64 * 1024;
/// Longest payload taken from it.
const MAX_PAYLOAD: usize = 1 << 20;
const HANDSHAKE: Duration = Duration::from_secs(30);
const EVERYBODY: &str = "task.all";

/// What the server sends, as far as it matters here.
#[derive(Debug, PartialEq)]
pub(crate) enum Message {
    /// INFO, +OK: nothing to be done.
    Other,
    Ping,
    Pong,
    /// A message; the subject that a reply goes to.
    Msg {
        reply: Option<String>,
        payload: usize,
    },
}

/// Takes the next whole message; `None` when more bytes are needed.
///
/// # Errors
/// When it is none, or an error of the server.
pub(crate) fn take(buffer: &mut BytesMut) -> Result<Option<Message>> {
    let Some(end) = buffer.windows(2).position(|pair| pair == b"\r\n") else {
        ensure!(buffer.len() <= MAX_LINE, "a line without end");
        return Ok(None);
    };
    let line = std::str::from_utf8(&buffer[..end]).context("a line that is no text")?;
    let message = if let Some(msg) = line.strip_prefix("MSG ") {
        // Subject, subscription, perhaps a subject for replies, length.
        let words: Vec<&str> = msg.split_ascii_whitespace().collect();
        let (length, reply) = match words[..] {
            [_, _, length] => (length, None),
            [_, _, reply, length] => (length, Some(reply.to_owned())),
            _ => bail!("not a message: {line}"),
        };
        let payload: usize = length.parse().with_context(|| format!("length of a message: {line}"))?;
        ensure!(payload <= MAX_PAYLOAD, "a message of {payload} bytes");
        if buffer.len() < end + 2 + payload + 2 {
            return Ok(None);
        }
        buffer.advance(end + 2 + payload + 2);
        return Ok(Some(Message::Msg { reply, payload }));
    } else if line.starts_with("-ERR") {
        bail!("nats-server: {line}");
    } else {
        match line {
            "PING" => Message::Ping,
            "PONG" => Message::Pong,
            _ => Message::Other,
        }
    };
    buffer.advance(end + 2);
    Ok(Some(message))
}

/// A connection with its subscriptions made.
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: BytesMut,
}

impl Connection {
    /// Subscribes over a fresh connection.
    ///
    /// # Errors
    /// When the server does not take it.
    pub(crate) async fn begin(stream: TcpStream, subjects: &[&str]) -> Result<Self> {
        let mut hello =
            String::from("CONNECT {\"verbose\":false,\"pedantic\":false,\"lang\":\"own\",\"version\":\"0\"}\r\n");
        for (n, subject) in (1..).zip(subjects) {
            hello.push_str(&format!("SUB {subject} {n}\r\n"));
        }
        hello.push_str("PING\r\n");
        let mut connection = Self {
            stream,
            buffer: BytesMut::new(),
        };
        let introduced = async {
            connection.stream.write_all(hello.as_bytes()).await?;
            while connection.next().await? != Message::Pong {}
            anyhow::Ok(())
        };
        timeout(HANDSHAKE, introduced)
            .await
            .context("nats-server does not answer")??;
        Ok(connection)
    }

    async fn next(&mut self) -> Result<Message> {
        loop {
            if let Some(message) = take(&mut self.buffer)? {
                return Ok(message);
            }
            if self.buffer.is_empty() {
                // Nothing is kept while there is nothing to be read.
                self.buffer = BytesMut::new();
                self.stream.readable().await?;
            }
            self.buffer.reserve(4096);
            ensure!(
                self.stream.read_buf(&mut self.buffer).await? > 0,
                "closed by nats-server"
            );
        }
    }

    /// An agent: replies to everything that asks for it.
    pub(crate) async fn answer(&mut self, answered: impl Fn()) -> Result<()> {
        let payload = "r".repeat(REPLY);
        loop {
            match self.next().await? {
                Message::Ping => self.stream.write_all(b"PONG\r\n").await?,
                Message::Msg { reply: Some(inbox), .. } => {
                    let reply = format!("PUB {inbox} {REPLY}\r\n{payload}\r\n");
                    self.stream.write_all(reply.as_bytes()).await?;
                    answered();
                }
                _ => {}
            }
        }
    }

    /// The one who asks: one task to everybody, until so many have replied.
    pub(crate) async fn fan_out(&mut self, inbox: &str, agents: u32) -> Result<()> {
        let task = format!("PUB {EVERYBODY} {inbox} {TASK}\r\n{}\r\n", "t".repeat(TASK));
        self.stream.write_all(task.as_bytes()).await?;
        let mut replies = 0;
        while replies < agents {
            match self.next().await? {
                Message::Ping => self.stream.write_all(b"PONG\r\n").await?,
                Message::Msg { payload, .. } => {
                    ensure!(payload == REPLY, "a reply of {payload} bytes");
                    replies += 1;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Subjects of agent `index`.
    pub(crate) fn subjects(index: u32) -> [String; 2] {
        [EVERYBODY.to_owned(), format!("agent.{index}")]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_whole_or_not_at_all() {
        let wire = b"INFO {}\r\nPING\r\nMSG task.all 1 inbox.7 3\r\nabc\r\nMSG inbox.7 1 0\r\n\r\nPONG\r\n";
        for step in 1..wire.len() {
            let (mut buffer, mut seen) = (BytesMut::new(), vec![]);
            for chunk in wire.chunks(step) {
                buffer.extend_from_slice(chunk);
                while let Some(message) = take(&mut buffer).unwrap() {
                    seen.push(message);
                }
            }
            let with_reply = Message::Msg {
                reply: Some("inbox.7".into()),
                payload: 3,
            };
            let without = Message::Msg {
                reply: None,
                payload: 0,
            };
            assert_eq!(
                seen,
                [Message::Other, Message::Ping, with_reply, without, Message::Pong]
            );
        }
    }

    #[test]
    fn errors_of_the_server_are_errors() {
        let mut refused = BytesMut::from(&b"-ERR 'Authorization Violation'\r\n"[..]);
        assert!(take(&mut refused).unwrap_err().to_string().contains("Authorization"));
        assert!(take(&mut BytesMut::from(&b"MSG a 1 99999999999\r\n"[..])).is_err());
        assert!(take(&mut BytesMut::from(&b"MSG a\r\n"[..])).is_err());
    }
}
