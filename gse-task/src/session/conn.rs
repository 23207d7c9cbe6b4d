//! One agent's connection: the hello, then frames both ways in one task until either side ends it.
//!
//! One task reads and writes, without splitting the stream: an idle session holds no buffer, no lock and no timer. A write that makes
//! no progress ends the session, so that an agent that stops reading costs a bounded amount and is told why.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use gse_core::tls::PeerIdentity;
use gse_proto::calls::Failure;
use gse_proto::frame::{Frame, FrameError, HELLO_MAX_MESSAGE, announced_len};
use gse_proto::session as s;
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;

use super::accept::Places;
use super::admit::admit;
use super::outbox::CloseReason;
use super::registry::Session;
use super::wire::Wire;
use crate::Node;

/// Bytes read in one go before writes get their turn.
const READ_BURST: usize = 256 * 1024;
/// Bytes written in one go before reads get their turn.
const WRITE_BURST: usize = 256 * 1024;

/// Serves one connection from the hello on. `buffer`: what has been read of it already. `places` counts connections that have not
/// said hello yet.
pub(super) async fn run<S: Wire>(
    node: Arc<Node>,
    mut stream: S,
    mut buffer: BytesMut,
    peer: SocketAddr,
    identity: PeerIdentity,
    hello_deadline: Instant,
    places: Places,
) {
    // Boxed and gone before the session idles, as is everything that ends it: only the frames stay.
    let opened = Box::pin(open(
        &node,
        &mut stream,
        &mut buffer,
        peer,
        identity,
        hello_deadline,
        places,
    ))
    .await;
    let Some((session, outcome)) = opened else { return };
    let reason = match outcome {
        Ok(()) => frames(&node, &session, &mut stream, &mut buffer).await,
        Err(reason) => reason,
    };
    Box::pin(close(&node, &session, stream, reason)).await;
}

/// Takes a connection from its hello to an open session. The session is registered even if it then fails at once.
async fn open<S: Wire>(
    node: &Arc<Node>,
    stream: &mut S,
    buffer: &mut BytesMut,
    peer: SocketAddr,
    identity: PeerIdentity,
    hello_deadline: Instant,
    places: Places,
) -> Option<(Arc<Session>, Result<(), CloseReason>)> {
    let mut hello = match tokio::time::timeout_at(hello_deadline, read_hello(stream, buffer)).await {
        Ok(Ok(hello)) => hello,
        Ok(Err(why)) => {
            node.metrics.refused("hello");
            tracing::info!(%peer, %why, "no valid hello");
            return None;
        }
        Err(_) => {
            node.metrics.refused("timeout");
            tracing::debug!(%peer, "no hello in time");
            return None;
        }
    };
    let session = match admit(node, &hello, peer, &identity).await {
        Ok(session) => session,
        Err(refuse) => {
            node.metrics.refused("admission");
            tracing::warn!(%peer, agent = hello.agent_id, reason = refuse.reason, "agent refused");
            let limit = Duration::from_millis(node.config.session.write_stall_ms);
            let farewell = async {
                stream.write_all(&Frame::from(refuse).to_bytes()).await?;
                stream.shutdown().await
            };
            if let Ok(Err(error)) = tokio::time::timeout(limit, farewell).await {
                tracing::debug!(%peer, %error, "refusal not delivered");
            }
            return None;
        }
    };
    drop(places);
    welcome(node, &session);
    node.metrics.sessions_opened.inc();
    tracing::info!(agent = %session.agent, %peer, session = session.id, version = hello.version, "agent connected");
    // The welcome goes out before anything that may wait for the store.
    let outcome = write_out(node, &session, stream).await;
    if outcome.is_ok() {
        let held = std::mem::take(&mut hello.held);
        node.presence.opened(node, &session, &hello).await;
        node.tasks.session_opened(&session, held).await;
    }
    Some((session, outcome))
}

/// Ends a session: takes it out of the registry, tells the others, closes the connection.
async fn close<S: Wire>(node: &Arc<Node>, session: &Arc<Session>, mut stream: S, reason: CloseReason) {
    session.outbox.close(reason);
    let reason = session.outbox.closed().unwrap_or(CloseReason::Draining);
    node.metrics.session_closed(reason.label());
    tracing::info!(agent = %session.agent, peer = %session.peer, session = session.id, %reason, "agent disconnected");
    if node.registry.remove(session) {
        node.presence.closed(session, &reason);
    }
    node.tasks.session_closed(session);
    node.calls.give_up(session.id, Failure::Lost);
    let limit = Duration::from_millis(node.config.session.write_stall_ms.min(1000));
    if let Ok(Err(error)) = tokio::time::timeout(limit, stream.shutdown()).await {
        tracing::debug!(agent = %session.agent, %error, "connection was gone before it could be closed");
    }
}

fn welcome(node: &Node, session: &Session) {
    let limits = &node.config.session;
    let welcome = s::Welcome {
        protocol: s::PROTOCOL,
        node_id: node.config.node_id.clone(),
        session_id: session.id,
        heartbeat_interval_ms: u32::try_from(limits.heartbeat_interval_ms).unwrap_or(u32::MAX),
        server_time_ms: node.clock.unix_ms(),
        servers: node.advertised(),
        stream_window: limits.stream_window,
        session_window: limits.session_window,
    };
    // A new outbox is neither closed nor full.
    if session.outbox.control(&welcome.into()).is_err() {
        tracing::debug!(agent = %session.agent, "session ended before its welcome");
    }
}

async fn read_hello<S: Wire>(stream: &mut S, buffer: &mut BytesMut) -> Result<s::Hello, String> {
    loop {
        match Frame::take(buffer, HELLO_MAX_MESSAGE) {
            Ok(Some(Frame::Hello(hello))) => return Ok(hello),
            Ok(Some(other)) => return Err(format!("first frame is of kind {}, not a hello", other.kind())),
            Ok(None) => {}
            Err(error) => return Err(error.to_string()),
        }
        match poll_fn(|cx| stream.poll_fill(cx, buffer)).await {
            Ok(0) => return Err("connection closed before a hello".into()),
            Ok(_) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// Moves frames until the session ends, and says why it does.
async fn frames<S: Wire>(
    node: &Arc<Node>,
    session: &Arc<Session>,
    stream: &mut S,
    buffer: &mut BytesMut,
) -> CloseReason {
    // What came right behind the hello.
    if let Err(reason) = handle(node, session, buffer) {
        return reason;
    }
    loop {
        if let Err(reason) = write_out(node, session, stream).await {
            return reason;
        }
        if let Some(reason) = session.outbox.closed() {
            return reason;
        }
        if buffer.is_empty() {
            *buffer = BytesMut::new();
        }
        // Both are looked at each time, so that neither direction holds up the other.
        let read = poll_fn(|cx| {
            let due = session.outbox.poll_due(cx);
            let read = poll_burst(stream, cx, buffer);
            if read.is_pending() && due.is_ready() {
                return Poll::Ready(Ok(()));
            }
            read
        });
        if let Err(reason) = read.await {
            // Frames that came with the end of the stream count.
            return handle(node, session, buffer).err().unwrap_or(reason);
        }
        if let Err(reason) = handle(node, session, buffer) {
            return reason;
        }
    }
}

/// Reads what is there, up to a bound. Pending when that is nothing.
fn poll_burst<S: Wire>(stream: &mut S, cx: &mut Context<'_>, buffer: &mut BytesMut) -> Poll<Result<(), CloseReason>> {
    let start = buffer.len();
    while buffer.len() - start < READ_BURST {
        // Once for a long frame instead of step by step; how long it may be is checked when it is taken.
        let announced = announced_len(buffer).unwrap_or(0).saturating_sub(buffer.len());
        buffer.reserve(announced.min(READ_BURST));
        match stream.poll_fill(cx, buffer) {
            Poll::Ready(Ok(0)) => return Poll::Ready(Err(CloseReason::ConnectionLost("closed by the agent".into()))),
            Poll::Ready(Ok(_)) => {}
            Poll::Ready(Err(error)) => return Poll::Ready(Err(CloseReason::ConnectionLost(error.to_string()))),
            Poll::Pending if buffer.len() > start => break,
            Poll::Pending => return Poll::Pending,
        }
    }
    Poll::Ready(Ok(()))
}

/// Writes what waits in the outbox.
async fn write_out<S: Wire>(node: &Node, session: &Session, stream: &mut S) -> Result<(), CloseReason> {
    let stall = Duration::from_millis(node.config.session.write_stall_ms);
    loop {
        let parts = session.outbox.take(WRITE_BURST);
        if parts.is_empty() {
            return Ok(());
        }
        for part in parts {
            write_part(stream, part, stall).await?;
        }
        match tokio::time::timeout(stall, stream.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(CloseReason::ConnectionLost(error.to_string())),
            Err(_) => return Err(CloseReason::NotReading),
        }
    }
}

/// Writes one buffer; every step forward renews the deadline, so that a slow link may take its time over a large script.
async fn write_part<S: Wire>(stream: &mut S, mut part: Bytes, stall: Duration) -> Result<(), CloseReason> {
    while !part.is_empty() {
        match tokio::time::timeout(stall, stream.write_buf(&mut part)).await {
            Ok(Ok(0)) => return Err(CloseReason::ConnectionLost("closed by the agent".into())),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(CloseReason::ConnectionLost(error.to_string())),
            Err(_) => return Err(CloseReason::NotReading),
        }
    }
    Ok(())
}

/// Handles every whole frame in `buffer`.
fn handle(node: &Arc<Node>, session: &Arc<Session>, buffer: &mut BytesMut) -> Result<(), CloseReason> {
    loop {
        let frame = match Frame::take(buffer, node.config.session.max_frame_bytes) {
            Ok(Some(frame)) => frame,
            Ok(None) => return Ok(()),
            Err(error @ (FrameError::TooLong { .. } | FrameError::Reserved(_) | FrameError::Message { .. })) => {
                return Err(CloseReason::Protocol(error.to_string()));
            }
        };
        session.touch(node.ticks.now());
        node.metrics.frames_in.inc();
        match frame {
            Frame::Heartbeat(beat) => node.presence.beat(session, &beat),
            Frame::Row(row) => node.ingest.row(node, session, row),
            Frame::Output(output) => node.ingest.output(node, session, output),
            Frame::Ping(ping) => {
                let pong = s::Pong { nonce: ping.nonce };
                // Closed or full: the session is ending anyway.
                if session.outbox.control(&pong.into()).is_err() {
                    return Ok(());
                }
            }
            Frame::Pong(pong) => session.pong(pong.nonce),
            Frame::CallReply(reply) => node.calls.reply(session.id, reply),
            Frame::PluginMessage(message) => {
                if let Some(messages) = node.messages.get() {
                    messages.said(session.agent.as_str(), &message);
                }
            }
            Frame::ProcReport(report) => node.reports.said(node, session, report),
            Frame::Goodbye(bye) => {
                let purpose = bye.purpose();
                return Err(CloseReason::Goodbye(bye.stopping.then_some(purpose)));
            }
            Frame::Unsupported(what) => {
                tracing::debug!(agent = %session.agent, kind = what.kind, "the agent does not know this kind of frame");
                if what.kind == u32::from(Frame::CALL) {
                    node.calls.give_up(session.id, Failure::Unsupported);
                }
            }
            Frame::Unknown { kind, .. } => {
                let answer = s::Unsupported { kind: u32::from(kind) };
                if session.outbox.control(&answer.into()).is_err() {
                    return Ok(());
                }
            }
            other @ (Frame::Hello(_)
            | Frame::Welcome(_)
            | Frame::Refuse(_)
            | Frame::Move(_)
            | Frame::Servers(_)
            | Frame::Dispatch(_)
            | Frame::Terminate(_)
            | Frame::Call(_)
            | Frame::ProcReported(_)
            | Frame::Stored(_)) => {
                return Err(CloseReason::Protocol(format!(
                    "an agent does not send frames of kind {}",
                    other.kind()
                )));
            }
        }
    }
}
