//! One plugin's connection of the message socket: keepalives are answered, messages go both ways, and a plugin that reads nothing is let go.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use gse_proto::message::{MAX_MESSAGE_ID, MAX_PLUGIN};
use gse_proto::session::PluginMessage;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep_until};

use super::Shared;
use super::frame::{Frame, HEADER, Implausible, Parser, Taken, encode, kind};
use crate::local::{Pass, Peer, Stream};

/// Room for what the next read brings.
const READ: usize = 16 << 10;
/// Longest part of a body that is no content.
const MAX_INFO: usize = 64 << 10;
/// Frames that wait for one plugin at most.
const OUTBOUND: usize = 1_024;

/// Where frames for one plugin are put. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Outbox {
    queue: mpsc::Sender<(Bytes, OwnedSemaphorePermit)>,
    room: Arc<Semaphore>,
}

/// Where they are taken from.
#[derive(Debug)]
pub(super) struct Outbound(mpsc::Receiver<(Bytes, OwnedSemaphorePermit)>);

impl Outbox {
    /// Holds `bytes` at most.
    pub(super) fn new(bytes: usize) -> (Self, Outbound) {
        let (queue, out) = mpsc::channel(OUTBOUND);
        let room = Arc::new(Semaphore::new(bytes));
        (Self { queue, room }, Outbound(out))
    }

    /// Puts a frame, if there is room.
    pub(super) fn put(&self, frame: Bytes) -> Result<(), ()> {
        let size = u32::try_from(frame.len()).map_err(drop)?;
        let room = Arc::clone(&self.room).try_acquire_many_owned(size).map_err(drop)?;
        self.queue.try_send((frame, room)).map_err(drop)
    }
}

#[cfg(test)]
impl Outbound {
    pub(super) fn try_next(&mut self) -> Option<Bytes> {
        self.0.try_recv().ok().map(|(frame, _)| frame)
    }
}

/// What a plugin says of itself.
#[derive(Debug, Deserialize)]
struct Keepalive {
    plugin_name: String,
    #[serde(default)]
    version: String,
    #[serde(default)]
    pid: i64,
}

/// The answer to it.
#[derive(Debug, Serialize)]
struct KeepaliveAnswer<'a> {
    agent_id: &'a str,
    version: &'a str,
    cloud_id: i32,
    run_mode: i32,
    status_code: i32,
    status: &'static str,
}

/// What stands in front of the content that a plugin says.
#[derive(Debug, Deserialize)]
struct Respond {
    name: String,
    message_id: String,
}

enum End {
    Closed,
    Stopped,
    NotReading,
    Failed(io::Error),
    Implausible(Implausible),
    /// It does not keep to what frames mean.
    Wrong(String),
}

struct Connection {
    shared: Arc<Shared>,
    number: u64,
    peer: Peer,
    stream: Stream,
    buffer: BytesMut,
    parser: Parser,
    /// What is being written, and the right to it.
    out: Bytes,
    room: Option<OwnedSemaphorePermit>,
    stalled_since: Option<Instant>,
    outbox: Outbox,
    outbound: Outbound,
    name: String,
}

/// Serves a connection until it ends.
pub(super) async fn serve(shared: Arc<Shared>, number: u64, stream: Stream, peer: Peer, pass: Pass) {
    let (outbox, outbound) = Outbox::new(shared.config.outbound_bytes);
    let mut connection = Connection {
        number,
        peer,
        stream,
        buffer: BytesMut::new(),
        parser: Parser::new(shared.config.max_content + MAX_INFO),
        out: Bytes::new(),
        room: None,
        stalled_since: None,
        outbox,
        outbound,
        name: String::new(),
        shared: Arc::clone(&shared),
    };
    shared.metrics.connections.inc();
    let end = connection.run().await;
    shared.metrics.connections.dec();
    let name = std::mem::take(&mut connection.name);
    if !name.is_empty() {
        shared.table.leave(&name, number);
    }
    drop((connection, pass));
    let (uid, pid) = (peer.uid, peer.pid);
    match end {
        End::Closed | End::Stopped => tracing::info!(plugin = name, ?uid, ?pid, "a plugin left"),
        End::NotReading => tracing::warn!(plugin = name, ?uid, ?pid, "a plugin reads nothing; it was disconnected"),
        End::Failed(error) => tracing::info!(plugin = name, ?uid, ?pid, %error, "a plugin's connection failed"),
        End::Implausible(what) => tracing::warn!(plugin = name, ?uid, ?pid, "a plugin was disconnected: {what}"),
        End::Wrong(what) => tracing::warn!(plugin = name, ?uid, ?pid, "a plugin was disconnected: {what}"),
    }
}

impl Connection {
    async fn run(&mut self) -> End {
        let life = self.shared.life.clone();
        let patience = Duration::from_millis(self.shared.config.write_timeout_ms);
        loop {
            if let Err(error) = self.write() {
                return End::Failed(error);
            }
            if self.buffer.is_empty() {
                self.buffer = BytesMut::new();
            }
            let stalled = self.stalled_since.map(|since| since + patience);
            tokio::select! {
                biased;
                () = life.draining() => return End::Stopped,
                () = sleep_until(stalled.unwrap_or_else(Instant::now)), if stalled.is_some() => return End::NotReading,
                writable = self.stream.writable(), if !self.out.is_empty() => {
                    if let Err(error) = writable {
                        return End::Failed(error);
                    }
                }
                Some((frame, room)) = self.outbound.0.recv(), if self.out.is_empty() => {
                    self.out = frame;
                    self.room = Some(room);
                }
                readable = self.stream.readable() => {
                    if let Err(error) = readable {
                        return End::Failed(error);
                    }
                    match self.read() {
                        Ok(()) => {}
                        Err(end) => return end,
                    }
                }
            }
        }
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match self.stream.try_write(&self.out) {
                Ok(written) => {
                    self.out.advance(written);
                    self.stalled_since = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.stalled_since.get_or_insert_with(Instant::now);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.stalled_since = None;
        self.room = None;
        Ok(())
    }

    fn read(&mut self) -> Result<(), End> {
        self.buffer.reserve(READ);
        match self.stream.try_read_buf(&mut self.buffer) {
            Ok(0) => return Err(End::Closed),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(error) => return Err(End::Failed(error)),
        }
        loop {
            match self.parser.take(&mut self.buffer).map_err(End::Implausible)? {
                Taken::Nothing => return Ok(()),
                Taken::Frame(frame) => self.take(frame)?,
                Taken::TooLong { length } => {
                    self.shared.metrics.dropped("too_long");
                    tracing::warn!(
                        plugin = self.name,
                        length,
                        "a plugin's message is too long and was dropped (messages.max_content)"
                    );
                }
            }
        }
    }

    fn take(&mut self, frame: Frame) -> Result<(), End> {
        match frame.kind {
            kind::KEEPALIVE => self.keepalive(&frame),
            kind::RESPOND => self.respond(frame),
            other => {
                tracing::debug!(
                    plugin = self.name,
                    kind = other,
                    "a frame of an unknown type was passed over"
                );
                Ok(())
            }
        }
    }

    fn keepalive(&mut self, frame: &Frame) -> Result<(), End> {
        let said: Keepalive = serde_json::from_slice(&frame.info)
            .map_err(|error| End::Wrong(format!("its keepalive does not decode: {error}")))?;
        let name = said.plugin_name;
        if name.is_empty() || name.len() > MAX_PLUGIN {
            return Err(End::Wrong(format!("a plugin's name has 1 to {MAX_PLUGIN} bytes")));
        }
        if name != self.name {
            if !self.name.is_empty() {
                self.shared.table.leave(&self.name, self.number);
            }
            tracing::info!(plugin = name, version = said.version, pid = said.pid, uid = ?self.peer.uid, "a plugin is there");
            self.shared.table.enter(&name, self.number, &self.outbox);
            self.name = name;
        }
        let identity = &self.shared.identity;
        let answer = serde_json::to_vec(&KeepaliveAnswer {
            agent_id: &identity.agent_id,
            version: identity.version,
            cloud_id: identity.cloud_id,
            run_mode: identity.run_mode,
            status_code: 2,
            status: "running",
        })
        .map_err(|error| End::Wrong(format!("the answer to it does not encode: {error}")))?;
        let answer = encode(kind::KEEPALIVE_ANSWER, frame.sequence, &answer, None);
        if self.outbox.put(answer).is_err() {
            // It reads nothing, and will ask again if that changes.
            self.shared.metrics.dropped("not_reading");
        }
        Ok(())
    }

    fn respond(&mut self, frame: Frame) -> Result<(), End> {
        let info: Respond = match serde_json::from_slice(&frame.info) {
            Ok(info) => info,
            Err(error) => {
                self.shared.metrics.dropped("undecodable");
                tracing::warn!(plugin = self.name, %error, "what a plugin said of its message does not decode; the message was dropped");
                return Ok(());
            }
        };
        if info.name.is_empty() || info.name.len() > MAX_PLUGIN || info.message_id.len() > MAX_MESSAGE_ID {
            self.shared.metrics.dropped("undecodable");
            return Ok(());
        }
        if frame.content.len() > self.shared.config.max_content {
            self.shared.metrics.dropped("too_long");
            return Ok(());
        }
        self.shared.say(PluginMessage {
            plugin: info.name,
            message_id: info.message_id,
            content: frame.content,
        });
        Ok(())
    }
}

/// A message on its way to a plugin.
#[derive(Debug, Serialize)]
struct DispatchInfo<'a> {
    message_id: &'a str,
    session_id: &'a str,
}

/// The frame that brings a plugin its message.
///
/// # Errors
/// When the message's id does not encode.
pub(super) fn dispatch(sequence: u64, message_id: &str, content: &[Bytes]) -> serde_json::Result<Bytes> {
    let info = serde_json::to_vec(&DispatchInfo {
        message_id,
        session_id: "",
    })?;
    debug_assert!(info.len() < MAX_INFO + HEADER);
    Ok(encode(kind::DISPATCH, sequence, &info, Some(content)))
}
