//! A relay between agents and server that knows frames: it delays each, repeats some, and lets some overtake others.
//!
//! What it may not do is what TLS and TCP make impossible in any case: reports of one session overtaking each other, where the server
//! relies on the order of a stream, and anything before the hello and its answer.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use gse_core::random::Random;
use gse_proto::frame::{Frame, put_header, take_raw};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep_until};
use turmoil::net::TcpStream;

use super::log::Log;
use super::world::{SERVER, now_ms};

/// Longest delay of a frame.
const DELAY: Duration = Duration::from_millis(700);

/// Runs on a host of its own, on port 7000.
pub(crate) async fn relay(random: Random, log: Log) -> turmoil::Result {
    let listener = turmoil::net::TcpListener::bind("0.0.0.0:7000").await?;
    loop {
        let (agent, _) = listener.accept().await?;
        let (random, log) = (random.clone(), log.clone());
        tokio::spawn(async move {
            let Ok(server) = TcpStream::connect(SERVER).await else {
                return;
            };
            let (from_agent, to_agent) = agent.into_split();
            let (from_server, to_server) = server.into_split();
            // Either end takes the other with it.
            tokio::select! {
                biased;
                () = pass(from_agent, to_server, &random, &log, true) => {}
                () = pass(from_server, to_agent, &random, &log, false) => {}
            }
        });
    }
}

/// Whether frames of this kind may overtake and be overtaken.
fn free(frame: &Frame, up: bool) -> bool {
    !(up && matches!(frame, Frame::Row(_) | Frame::Output(_)))
}

async fn pass(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    random: &Random,
    log: &Log,
    up: bool,
) {
    let mut buffer = BytesMut::new();
    let mut waiting: BTreeMap<(Instant, u64), Bytes> = BTreeMap::new();
    let mut in_order = Instant::now();
    let mut count = 0_u64;
    loop {
        while let Ok(Some(raw)) = take_raw(&mut buffer, 64 << 20) {
            let mut bytes = BytesMut::new();
            put_header(&mut bytes, raw.kind, raw.correlation, raw.message.len());
            bytes.extend_from_slice(&raw.message);
            let bytes = bytes.freeze();
            let Ok(frame) = Frame::decode(raw) else { return };
            let now = Instant::now();
            count += 1;
            if count == 1 {
                // The hello, and its answer.
                if to.write_all(&bytes).await.is_err() {
                    return;
                }
                in_order = now;
                continue;
            }
            let mut at = now + random.up_to(DELAY);
            if !free(&frame, up) {
                at = at.max(in_order);
                in_order = at;
            }
            waiting.insert((at, count), bytes.clone());
            if random.below(4) == 0 {
                count += 1;
                log.add(now_ms(), format!("relay repeats a frame of kind {}", frame.kind()));
                waiting.insert((at + random.up_to(DELAY), count), bytes);
            }
        }
        let next = waiting.first_key_value().map(|((at, _), _)| *at);
        tokio::select! {
            biased;
            () = async { match next { Some(at) => sleep_until(at).await, None => std::future::pending().await } } => {
                if let Some((_, bytes)) = waiting.pop_first()
                    && to.write_all(&bytes).await.is_err()
                {
                    return;
                }
            }
            read = from.read_buf(&mut buffer) => {
                if !matches!(read, Ok(1..)) {
                    return;
                }
            }
        }
    }
}
