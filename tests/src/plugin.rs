//! A plugin's side of the agent's two sockets, byte by byte as the contract has it: what public clients do, and what they never do.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Message types of the data socket.
pub mod kind {
    /// The question who the agent is.
    pub const GET_CONF: u32 = 10;
    /// A report with a meta area.
    pub const DYNAMIC: u32 = 9;
    /// A plain report.
    pub const COMMON: u32 = 0xC01;
    /// A plain report of operations.
    pub const OPS: u32 = 0xC0C;
}

/// How long a plugin waits for anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// A plain frame.
#[must_use]
pub fn plain(kind: u32, data_id: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short payload");
    let mut frame = Vec::with_capacity(24 + payload.len());
    for number in [kind, data_id, 0x6448_9136, length, 0, 0] {
        frame.extend_from_slice(&number.to_be_bytes());
    }
    frame.extend_from_slice(payload);
    frame
}

/// A dynamic report with the meta area that every known sender has, and nothing in it.
#[must_use]
pub fn dynamic(data_id: u32, payload: &[u8]) -> Vec<u8> {
    dynamic_with(data_id, &[], payload)
}

/// A dynamic report with entries in its meta area.
#[must_use]
pub fn dynamic_with(data_id: u32, meta: &[(&str, &str)], payload: &[u8]) -> Vec<u8> {
    const AREA: usize = 408;
    let number = |number: usize| u32::try_from(number).expect("a short frame");
    let mut area = Vec::new();
    for (key, value) in meta {
        area.extend_from_slice(&number(key.len()).to_be_bytes());
        area.extend_from_slice(&number(value.len()).to_be_bytes());
        area.extend_from_slice(key.as_bytes());
        area.extend_from_slice(value.as_bytes());
    }
    let used = number(area.len());
    area.resize(AREA, 0);
    let length = number(24 + AREA + payload.len());
    let head = [
        kind::DYNAMIC,
        data_id,
        0x6448_9136,
        length,
        0,
        0,
        0,
        0,
        0,
        used,
        number(AREA),
        number(meta.len()),
    ];
    let mut frame: Vec<u8> = head.iter().flat_map(|number| number.to_be_bytes()).collect();
    frame.extend_from_slice(&area);
    frame.extend_from_slice(payload);
    frame
}

/// A plugin on the data socket.
#[derive(Debug)]
pub struct Plugin {
    /// The connection.
    pub stream: UnixStream,
}

impl Plugin {
    /// Connects, waiting for the agent a little.
    ///
    /// # Panics
    /// When nobody listens in time.
    pub async fn connect(path: &Path) -> Self {
        let stream = crate::eventually(&format!("an agent at {}", path.display()), PATIENCE, || async {
            UnixStream::connect(path).await.ok()
        })
        .await;
        Self { stream }
    }

    /// Sends bytes.
    ///
    /// # Errors
    /// When the agent does not take them within five seconds, which is when public clients begin to send again.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        tokio::time::timeout(Duration::from_secs(5), self.stream.write_all(bytes))
            .await
            .context("the agent stopped reading")?
            .context("sending to the agent")
    }

    /// Asks who the agent is.
    ///
    /// # Errors
    /// When there is no answer, or another one.
    pub async fn ask(&mut self) -> Result<Value> {
        self.send(&plain(kind::GET_CONF, 0, b"")).await?;
        self.answer().await
    }

    /// Reads one answer.
    ///
    /// # Errors
    /// When there is none, or another one.
    pub async fn answer(&mut self) -> Result<Value> {
        let mut head = [0_u8; 8];
        let reading = async {
            self.stream.read_exact(&mut head).await?;
            let kind = u32::from_be_bytes(head[..4].try_into()?);
            ensure!(kind == kind::GET_CONF, "an answer of type {kind}");
            let length = u32::from_be_bytes(head[4..].try_into()?) as usize;
            let mut body = vec![0; length];
            self.stream.read_exact(&mut body).await?;
            Ok(serde_json::from_slice(&body)?)
        };
        tokio::time::timeout(PATIENCE, reading).await.context("no answer")?
    }

    /// Whether the agent has closed the connection, or does within a while; anything that it says instead is an error.
    ///
    /// # Errors
    /// When it says something, or goes on listening.
    pub async fn closed(&mut self) -> Result<()> {
        let mut byte = [0_u8; 1];
        match tokio::time::timeout(PATIENCE, self.stream.read(&mut byte)).await {
            Ok(Ok(0) | Err(_)) => Ok(()),
            Ok(Ok(_)) => bail!("the agent says something"),
            Err(_) => bail!("the agent goes on listening"),
        }
    }
}

/// A frame of the message socket.
#[derive(Debug, Clone)]
pub struct Message {
    /// Its type.
    pub kind: u16,
    /// The total length as the header has it.
    pub length: u32,
    /// Lengths of the two parts as the header has them.
    pub reserved: (u32, u32),
    /// Everything behind the header.
    pub body: Vec<u8>,
}

/// A plugin on the message socket.
#[derive(Debug)]
pub struct Talker {
    /// The connection.
    pub stream: UnixStream,
    name: String,
}

impl Talker {
    /// Connects and says its name, as clients do every three seconds; gives the agent's answer too.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn connect(path: &Path, name: &str) -> Result<(Self, Value)> {
        let Plugin { stream } = Plugin::connect(path).await;
        let mut talker = Self {
            stream,
            name: name.to_owned(),
        };
        let answer = talker.keepalive().await?;
        Ok((talker, answer))
    }

    /// Says that it is there and gives the answer.
    ///
    /// # Errors
    /// When there is none.
    pub async fn keepalive(&mut self) -> Result<Value> {
        let body = json!({"plugin_name": self.name, "version": "1.0", "pid": 7, "status_code": 0, "status": "ok", "remark": ""});
        self.send(0x9006, &serde_json::to_vec(&body)?, None).await?;
        let answer = self.next().await?;
        ensure!(answer.kind == 0x9007, "an answer of type {:#x}", answer.kind);
        ensure!(answer.reserved == (0, 0) && answer.length as usize == 28 + answer.body.len());
        Ok(serde_json::from_slice(&answer.body)?)
    }

    /// Says something to its platform.
    ///
    /// # Errors
    /// When the agent does not take it.
    pub async fn say(&mut self, message_id: &str, content: &[u8]) -> Result<()> {
        let info =
            json!({"name": self.name, "transmit_type": 0, "topic": "", "message_id": message_id, "session_id": ""});
        self.send(0x900a, &serde_json::to_vec(&info)?, Some(content)).await
    }

    async fn send(&mut self, kind: u16, info: &[u8], content: Option<&[u8]>) -> Result<()> {
        let long = content.unwrap_or_default().len();
        let mut frame = 0xdead_beef_u32.to_be_bytes().to_vec();
        frame.extend_from_slice(&kind.to_be_bytes());
        frame.extend_from_slice(&6_u16.to_be_bytes());
        frame.extend_from_slice(&1_u64.to_be_bytes());
        let parts = if content.is_some() { (info.len(), long) } else { (0, 0) };
        for number in [28 + info.len() + long, parts.0, parts.1] {
            frame.extend_from_slice(&u32::try_from(number)?.to_be_bytes());
        }
        frame.extend_from_slice(info);
        frame.extend_from_slice(content.unwrap_or_default());
        self.stream.write_all(&frame).await.context("sending to the agent")
    }

    /// The next frame from the agent.
    ///
    /// # Errors
    /// When there is none, or it begins with something else.
    pub async fn next(&mut self) -> Result<Message> {
        let mut head = [0_u8; 28];
        let number = |head: &[u8], at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let reading = async {
            self.stream.read_exact(&mut head).await?;
            ensure!(number(&head, 0) == 0xdead_beef, "no frame of this protocol");
            let length = number(&head, 16);
            let mut body = vec![
                0;
                (length as usize)
                    .checked_sub(28)
                    .context("a length below the header's")?
            ];
            self.stream.read_exact(&mut body).await?;
            Ok(Message {
                kind: u16::from_be_bytes([head[4], head[5]]),
                length,
                reserved: (number(&head, 20), number(&head, 24)),
                body,
            })
        };
        tokio::time::timeout(PATIENCE, reading)
            .await
            .context("no frame from the agent")?
    }
}
