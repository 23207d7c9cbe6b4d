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
use crate::resp::deal::{Waiting, deal};
use crate::resp::skip::Skipper;

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
pub(super) struct Upstream {
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
    pub(super) fn start(target: Target, resp3: bool, config: &Config, metrics: Metrics, life: &Lifecycle) -> Self {
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

    pub(super) async fn pass(&self, bytes: Bytes, count: usize) -> Passed {
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
                let mut calls = Calls {
                    open: &mut open,
                    pending: &mut pending,
                    max_reply: self.max_reply,
                };
                if let Err(reason) = deal(&mut buf, &mut skipper, &mut calls) {
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

/// Calls that wait for replies: the one whose replies come now, and those after it.
struct Calls<'a> {
    open: &'a mut Option<Pending>,
    pending: &'a mut mpsc::Receiver<Pending>,
    max_reply: usize,
}

impl Calls<'_> {
    fn current(&mut self) -> Option<&mut Pending> {
        if self.open.is_none() {
            *self.open = self.pending.try_recv().ok();
        }
        self.open.as_mut()
    }
}

impl Waiting for Calls<'_> {
    fn counts(&mut self) -> Option<bool> {
        let p = self.current()?;
        p.passed.count += 1;
        Some(p.passed.count == p.count)
    }

    fn keep(&mut self, bytes: &[u8]) {
        let max = self.max_reply;
        if let Some(p) = self.current() {
            keep(p, bytes, max);
        }
    }

    fn next(&mut self) {
        if let Some(p) = self.open.take() {
            let _ = p.reply.send(p.passed);
        }
    }
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
