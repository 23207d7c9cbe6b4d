//! One shared connection to the Redis behind: a writer that joins what waits into one write, a reader that counts replies, and a loop that connects again for ever.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use gse_core::lifecycle::Lifecycle;
use rand::RngExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::dial::{Stream, Target};
use super::{Lost, Passed};
use crate::config::Config;
use crate::metrics::Metrics;
use crate::resp::skip::{End, Skipper};

struct Call {
    bytes: Bytes,
    count: usize,
    reply: oneshot::Sender<Passed>,
}

/// A call whose commands are written (or are being written).
struct Pending {
    count: usize,
    passed: Passed,
    reply: oneshot::Sender<Passed>,
}

impl Pending {
    fn fail(mut self, reason: &str) {
        self.passed.lost.get_or_insert(Lost {
            sent: true,
            reason: reason.to_owned(),
            too_large: false,
        });
        // A client that has left does not want to know.
        let _ = self.reply.send(self.passed);
    }
}

#[derive(Clone)]
pub(crate) struct Upstream {
    calls: mpsc::Sender<Call>,
    up: Arc<AtomicBool>,
}

struct Worker {
    target: Target,
    resp3: bool,
    calls: mpsc::Receiver<Call>,
    up: Arc<AtomicBool>,
    metrics: Metrics,
    reply_timeout: Duration,
    reconnect_max: Duration,
    max_inflight: usize,
    max_reply: usize,
}

const RECONNECT_FIRST: Duration = Duration::from_millis(20);
/// Bytes joined into one write at most.
const JOIN: usize = 256 * 1024;
const READ: usize = 64 * 1024;

fn unsent(call: Call, reason: &str) {
    let _ = call.reply.send(Passed {
        lost: Some(Lost {
            sent: false,
            reason: reason.to_owned(),
            too_large: false,
        }),
        ..Passed::default()
    });
}

impl Upstream {
    pub(crate) fn start(target: Target, resp3: bool, config: &Config, metrics: Metrics, life: &Lifecycle) -> Self {
        let (calls, inbox) = mpsc::channel(config.single.max_inflight);
        let up = Arc::new(AtomicBool::new(false));
        let worker = Worker {
            target,
            resp3,
            calls: inbox,
            up: Arc::clone(&up),
            metrics,
            reply_timeout: Duration::from_millis(config.single.reply_timeout_ms),
            reconnect_max: Duration::from_millis(config.single.reconnect_max_ms),
            max_inflight: config.single.max_inflight,
            max_reply: config.limits.output_buffer_bytes,
        };
        let closing = life.clone();
        life.spawn_until_closed("dba-upstream", async move {
            tokio::select! {
                () = worker.run() => {}
                () = closing.closing() => {}
            }
        });
        Self { calls, up }
    }

    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    pub(crate) async fn pass(&self, bytes: Bytes, count: usize) -> Passed {
        let lost = |sent, reason: &str| Passed {
            lost: Some(Lost {
                sent,
                reason: reason.to_owned(),
                too_large: false,
            }),
            ..Passed::default()
        };
        let (reply, passed) = oneshot::channel();
        // A full queue is emptied by the worker, connected or not: this wait ends.
        if self.calls.send(Call { bytes, count, reply }).await.is_err() {
            return lost(false, "this server is stopping");
        }
        passed.await.unwrap_or_else(|_| lost(true, "this server is stopping"))
    }
}

impl Worker {
    async fn run(mut self) {
        let mut bound = RECONNECT_FIRST;
        let mut first = true;
        loop {
            let connected = {
                let connect = self.target.connect(self.resp3);
                tokio::pin!(connect);
                loop {
                    tokio::select! {
                        connected = &mut connect => break connected,
                        call = self.calls.recv() => match call {
                            None => return,
                            Some(call) => unsent(call, "not connected"),
                        },
                    }
                }
            };
            let reason = match connected {
                Ok(stream) => {
                    if !first {
                        self.metrics.reconnected();
                        tracing::info!(store = %self.target.name, "connected again");
                    }
                    first = false;
                    bound = RECONNECT_FIRST;
                    self.up.store(true, Ordering::Relaxed);
                    self.metrics.upstream(true);
                    let ended = self.serve(stream).await;
                    self.up.store(false, Ordering::Relaxed);
                    self.metrics.upstream(false);
                    match ended {
                        None => return,
                        Some(reason) => reason,
                    }
                }
                Err(e) => format!("{e:#}"),
            };
            let wait = bound.mul_f64(rand::rng().random_range(0.0..1.0));
            bound = (bound * 2).min(self.reconnect_max);
            tracing::warn!(store = %self.target.name, reason, retry_in = ?wait, "no connection to the store");
            let pause = tokio::time::sleep(wait);
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    call = self.calls.recv() => match call {
                        None => return,
                        Some(call) => unsent(call, &reason),
                    },
                }
            }
        }
    }

    /// Serves calls until the connection fails (then: why) or nobody can call any more.
    async fn serve(&mut self, stream: Stream) -> Option<String> {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (pend, mut pending) = mpsc::channel::<Pending>(self.max_inflight);
        let mut open: Option<Pending> = None;
        let calls = &mut self.calls;
        let write = async {
            let mut joined = BytesMut::new();
            while let Some(first) = calls.recv().await {
                let mut next = Some(first);
                let mut alone: Option<Bytes> = None;
                while let Some(call) = next {
                    let p = Pending {
                        count: call.count,
                        passed: Passed::default(),
                        reply: call.reply,
                    };
                    // Known as pending before a byte of it is out: its reply can then never be a surprise.
                    if let Err(e) = pend.send(p).await {
                        e.0.fail("the connection was lost");
                        return Some("the reader ended".to_owned());
                    }
                    if joined.is_empty() && alone.is_none() {
                        alone = Some(call.bytes);
                    } else {
                        if let Some(a) = alone.take() {
                            joined.extend_from_slice(&a);
                        }
                        joined.extend_from_slice(&call.bytes);
                    }
                    next = if joined.len() < JOIN {
                        calls.try_recv().ok()
                    } else {
                        None
                    };
                }
                let result = match alone {
                    Some(bytes) => timeout(self.reply_timeout, writer.write_all(&bytes)).await,
                    None => timeout(self.reply_timeout, writer.write_all(&joined)).await,
                };
                joined.clear();
                match result {
                    Ok(Ok(())) => {}
                    Ok(Err(e)) => return Some(e.to_string()),
                    Err(_) => return Some("it does not take commands".to_owned()),
                }
            }
            None
        };
        let read = async {
            let mut buf = BytesMut::with_capacity(READ);
            let mut skipper = Skipper::default();
            loop {
                buf.reserve(READ);
                let n = if open.is_some() {
                    match timeout(self.reply_timeout, reader.read_buf(&mut buf)).await {
                        Ok(n) => n,
                        Err(_) => return format!("no reply within {:?}", self.reply_timeout),
                    }
                } else {
                    tokio::select! {
                        biased;
                        p = pending.recv() => {
                            open = p;
                            continue;
                        }
                        n = reader.read_buf(&mut buf) => n,
                    }
                };
                match n {
                    Ok(0) => return "the store closed the connection".to_owned(),
                    Ok(_) => {}
                    Err(e) => return e.to_string(),
                }
                if let Err(reason) = take_replies(&mut buf, &mut skipper, &mut open, &mut pending, self.max_reply) {
                    return reason;
                }
            }
        };
        let ended = tokio::select! {
            ended = write => ended,
            reason = read => Some(reason),
        };
        let reason = ended.as_deref().unwrap_or("this server is stopping");
        let mut rest: VecDeque<Pending> = open.into_iter().collect();
        pending.close();
        while let Ok(p) = pending.try_recv() {
            rest.push_back(p);
        }
        rest.into_iter().for_each(|p| p.fail(reason));
        ended
    }
}

/// Hands the replies in `buf` to those who wait for them.
fn take_replies(
    buf: &mut BytesMut,
    skipper: &mut Skipper,
    open: &mut Option<Pending>,
    pending: &mut mpsc::Receiver<Pending>,
    max_reply: usize,
) -> Result<(), String> {
    let (mut from, mut at) = (0, 0);
    loop {
        if open.is_none() {
            *open = pending.try_recv().ok();
        }
        if at >= buf.len() {
            break;
        }
        match skipper.next(buf, at)? {
            Some(End::Push(end)) => {
                // Nobody subscribes on a shared connection; what it says unasked is for nobody.
                at = end;
                from = end;
            }
            Some(End::Reply(end)) => {
                let Some(p) = open.as_mut() else {
                    return Err("the store sent a reply that nobody had asked for".into());
                };
                p.passed.count += 1;
                at = end;
                if p.passed.count == p.count
                    && let Some(mut p) = open.take()
                {
                    keep(&mut p, &buf[from..at], max_reply);
                    from = at;
                    let _ = p.reply.send(p.passed);
                }
            }
            None => at = buf.len(),
        }
    }
    if let Some(p) = open.as_mut() {
        keep(p, &buf[from..], max_reply);
    }
    buf.clear();
    Ok(())
}

/// Adds to what was received for a call, unless that is too much already: then the rest is only counted.
fn keep(p: &mut Pending, bytes: &[u8], max: usize) {
    if p.passed.lost.is_some() {
        return;
    }
    if p.passed.replies.len() + bytes.len() > max {
        p.passed.replies = BytesMut::new();
        p.passed.lost = Some(Lost {
            sent: true,
            reason: "the reply is larger than limits.output_buffer_bytes".into(),
            too_large: true,
        });
        return;
    }
    p.passed.replies.extend_from_slice(bytes);
}
