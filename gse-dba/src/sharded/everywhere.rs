//! What a session asks of all groups at once or of connections of its own: sections of `INFO`, the end of a script that runs too long, the waking of a client that
//! waits.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use super::seat::Seat;
use super::session::{Session, command};
use super::{Answer, Fate, merge};
use crate::resp::skip::{End, Skipper};
use crate::resp::write::Writer;

/// How long a group is waited for.
const INFO: Duration = Duration::from_millis(500);

impl Session {
    /// What each group says in `INFO`, as far as they answer.
    pub(crate) async fn info(&mut self) -> Vec<String> {
        let words = Bytes::from(command(&[b"INFO", b"everything"]));
        let table = self.sharded.table();
        let used = table.groups.iter().enumerate().filter(|(g, _)| table.is_used(*g));
        // A group that has no primary now would keep it waiting.
        let asked = used.map(|(_, group)| {
            timeout(INFO, async {
                group.send(self.client.id, false, words.clone(), 1, false).await.await
            })
        });
        let mut all = Vec::new();
        for answer in futures::future::join_all(asked).await {
            if let Ok(Ok(Answer {
                replies,
                fate: Fate::Sealed,
            })) = answer
                && let Some(text) = merge::body(&replies)
            {
                all.push(String::from_utf8_lossy(text).into_owned());
            }
        }
        all
    }

    /// `SCRIPT KILL` and `FUNCTION KILL`: over new connections, because on the shared ones everything stands behind the script.
    pub(super) async fn kill(&mut self, words: &[&[u8]], out: &mut Writer) {
        let bytes = command(words);
        let table = self.sharded.table();
        let all = table.groups.iter().map(|g| ask(&g.seat, &bytes));
        let replies = futures::future::join_all(all).await;
        let good = replies.iter().flatten().find(|r| !r.starts_with(b"-"));
        match good.or_else(|| replies.iter().flatten().next()) {
            Some(reply) => out.raw(reply),
            None => out.error(b"UNAVAILABLE no group could be asked"),
        }
    }

    /// Wakes a connection that waits at a group.
    pub(crate) async fn unblock(&mut self, group: usize, upstream: i64, error: bool, out: &mut Writer) {
        let id = upstream.to_string();
        let how: &[u8] = if error { b"ERROR" } else { b"TIMEOUT" };
        let bytes = command(&[b"CLIENT", b"UNBLOCK", id.as_bytes(), how]);
        let reply = match self.sharded.group(group) {
            Some(g) => ask(&g.seat, &bytes).await,
            None => None,
        };
        match reply {
            Some(reply) => out.raw(&reply),
            None => out.error(b"UNAVAILABLE the group where it waits could not be asked"),
        }
    }
}

/// One command over a connection made for it, whatever the server is doing.
async fn ask(seat: &Seat, bytes: &[u8]) -> Option<BytesMut> {
    let place = seat.head().place?;
    let mut stream = seat.target(place).connect(true).await.ok()?;
    let limit = Duration::from_millis(seat.config.reply_timeout_ms);
    let asked = async {
        stream.write_all(bytes).await.ok()?;
        let (mut buf, mut skipper, mut at) = (BytesMut::new(), Skipper::default(), 0);
        loop {
            if stream.read_buf(&mut buf).await.ok()? == 0 {
                return None;
            }
            match skipper.next(&buf, at).ok()? {
                Some(End::Reply(end)) => {
                    buf.truncate(end);
                    return Some(buf);
                }
                Some(End::Push(end)) => at = end,
                None => at = buf.len(),
            }
        }
    };
    timeout(limit, asked).await.ok()?
}
