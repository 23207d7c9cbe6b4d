//! A connection that subscribes: what it asks for, what it may still do, and how messages are written to it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::args::Args;
use crate::commands::{self, Local, Run, Spec};
use crate::conn::{Conn, Ended};
use crate::resp::write::Writer;
use crate::sharded::hub::{Inbox, Kind};

/// Messages written before the client is sent to.
const AT_ONCE: usize = 256 * 1024;

fn head(w: &mut Writer, n: usize) {
    if w.resp3 {
        w.raw(format!(">{n}\r\n").as_bytes());
    } else {
        w.array(n);
    }
}

fn told(w: &mut Writer, verb: &str, name: Option<&[u8]>, count: usize) {
    head(w, 3);
    w.bulk(verb.as_bytes());
    w.bulk_or_null(name);
    w.len(count);
}

fn frame(w: &mut Writer, frame: &Bytes) {
    match frame.split_first() {
        Some((_, rest)) if w.resp3 => {
            w.raw(b">");
            w.raw(rest);
        }
        _ => w.raw(frame),
    }
}

fn asked(name: &str) -> Option<(Kind, bool)> {
    Some(match name {
        "SUBSCRIBE" => (Kind::Channel, true),
        "PSUBSCRIBE" => (Kind::Pattern, true),
        "SSUBSCRIBE" => (Kind::Shard, true),
        "UNSUBSCRIBE" => (Kind::Channel, false),
        "PUNSUBSCRIBE" => (Kind::Pattern, false),
        "SUNSUBSCRIBE" => (Kind::Shard, false),
        _ => return None,
    })
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Conn<S> {
    /// Writes a message, and what else is there already.
    pub(crate) async fn push(&mut self, message: Bytes) -> Result<(), Ended> {
        let muted = self.unmute().await?;
        frame(&mut self.out, &message);
        while self.out.buf.len() < AT_ONCE
            && let Some(more) = self.inbox.as_mut().and_then(Inbox::ready)
        {
            frame(&mut self.out, &more);
        }
        self.flush().await?;
        self.muted = muted;
        Ok(())
    }

    /// What is about subscriptions goes out even when a client wants no replies.
    async fn unmute(&mut self) -> Result<Option<usize>, Ended> {
        if self.muted.is_none() {
            return Ok(None);
        }
        self.flush().await?;
        Ok(self.muted.take())
    }

    /// A command about subscriptions, or any of one who has some in RESP2; false when it is to be done as always.
    pub(crate) async fn subscribed(&mut self, spec: Option<&'static Spec>, a: Args<'_>) -> Result<bool, Ended> {
        let name = spec.map_or("", |s| s.name);
        if let Some(spec) = spec
            && let Some((kind, on)) = asked(name)
        {
            let muted = self.unmute().await?;
            if !spec.arity_fits(a.len()) {
                self.out.error(commands::wrong_arity(spec).0.as_bytes());
            } else if on {
                self.subscribe(kind, a).await;
            } else {
                self.unsubscribe(kind, a).await;
            }
            if muted.is_some() {
                self.flush().await?;
                self.muted = muted;
            }
            self.count_subscriptions();
            self.state.client.names.lock().last = name.to_ascii_lowercase();
            return Ok(true);
        }
        if matches!(spec.map(|s| s.run), Some(Run::Local(Local::Quit | Local::Reset))) {
            return Ok(false);
        }
        if name == "PING" && a.len() <= 2 {
            head(&mut self.out, 2);
            self.out.bulk(b"pong");
            self.out.bulk(a.at(1));
        } else {
            let shown: String = String::from_utf8_lossy(a.at(0)).chars().take(64).collect();
            self.out.error(
                format!(
                    "ERR Can't execute '{}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this context",
                    shown.to_ascii_lowercase()
                )
                .as_bytes(),
            );
        }
        Ok(true)
    }

    /// What `CLIENT LIST` shows.
    pub(crate) fn count_subscriptions(&self) {
        let counts = self.inbox.as_ref().map_or([0; 3], Inbox::counts);
        for (shown, n) in self.state.client.subscriptions.iter().zip(counts) {
            shown.store(n, Ordering::Relaxed);
        }
    }

    async fn subscribe(&mut self, kind: Kind, a: Args<'_>) {
        let Some(hub) = self.shared.store().hub().cloned() else {
            return;
        };
        let id = self.state.client.id;
        let inbox = self.inbox.get_or_insert_with(|| hub.join(id));
        let max = self.shared.config.limits.max_subscriptions;
        let limit =
            Duration::from_millis(self.shared.config.sharded.hold_ms + self.shared.config.sharded.connect_timeout_ms);
        // All are asked for before the first is waited for.
        let mut asked = Vec::with_capacity(a.len());
        for name in a.iter().skip(1) {
            let key = (kind, Bytes::copy_from_slice(name));
            if inbox.counts().iter().sum::<usize>() >= max {
                asked.push((key, None));
                continue;
            }
            let new = inbox.add(&key);
            asked.push((key, Some((new, inbox.count(kind)))));
        }
        for (key, added) in asked {
            let Some((new, count)) = added else {
                self.out
                    .error(format!("ERR a client may have {max} subscriptions (limits.max_subscriptions)").as_bytes());
                continue;
            };
            match hub.confirmed(&key, limit).await {
                Ok(()) => told(&mut self.out, kind.subscribe(), Some(&key.1), count),
                Err(why) => {
                    if new && let Some(inbox) = &mut self.inbox {
                        inbox.remove(&key);
                    }
                    self.out.error(why.as_bytes());
                }
            }
        }
    }

    async fn unsubscribe(&mut self, kind: Kind, a: Args<'_>) {
        let names: Vec<Bytes> = if a.len() > 1 {
            a.iter().skip(1).map(Bytes::copy_from_slice).collect()
        } else {
            self.inbox.as_ref().map(|i| i.all(kind)).unwrap_or_default()
        };
        if names.is_empty() {
            let count = self.inbox.as_ref().map_or(0, |i| i.count(kind));
            return told(&mut self.out, kind.unsubscribe(), None, count);
        }
        let mut gone = Vec::with_capacity(names.len());
        for name in names {
            let key = (kind, name);
            let mut count = 0;
            if let Some(inbox) = &mut self.inbox {
                inbox.remove(&key);
                count = inbox.count(kind);
            }
            gone.push((key, count));
        }
        if let Some(hub) = self.shared.store().hub().cloned() {
            // So that who counts receivers afterwards counts right. When a group is away there is nothing to wait for.
            let keys = gone.iter().map(|(k, _)| k);
            hub.settled(
                keys,
                Duration::from_millis(self.shared.config.sharded.connect_timeout_ms),
            )
            .await;
        }
        for (key, count) in gone {
            told(&mut self.out, kind.unsubscribe(), Some(&key.1), count);
        }
    }
}
