//! Subscriptions that go on at another store: what a client is subscribed to is asked for there, and the client does not hear of it.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, timeout};

use crate::args::Args;
use crate::behind::Behind;
use crate::commands::Spec;
use crate::conn::{Conn, Ended};
use crate::resp::parse::{Limits, Parser, Requests};
use crate::resp::skip::{End, Skipper};
use crate::resp::write::Writer;
use crate::server::Store;
use crate::sharded::hub::{Inbox, Key, Kind};
use crate::single::Single;
use crate::single::dial::Private;
use crate::single::session::push_command;

/// For how long a store that has just taken over may be out of reach.
const PATIENCE: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(50);

/// What a client has subscribed to at the one Redis behind.
#[derive(Default)]
pub(crate) struct Subscriptions(Vec<Key>);

impl Subscriptions {
    /// A command of the client's went to that Redis.
    pub(crate) fn note(&mut self, spec: Option<&'static Spec>, a: Args<'_>) {
        let name = spec.map_or("", |s| s.name);
        for kind in Kind::ALL {
            if name.eq_ignore_ascii_case(kind.subscribe()) {
                for n in a.iter().skip(1) {
                    let key = (kind, Bytes::copy_from_slice(n));
                    if !self.0.contains(&key) {
                        self.0.push(key);
                    }
                }
            } else if name.eq_ignore_ascii_case(kind.unsubscribe()) {
                self.0
                    .retain(|(k, n)| *k != kind || (a.len() > 1 && !a.iter().skip(1).any(|gone| gone == n)));
            }
        }
    }
}

fn requests(key: &Key) -> Requests {
    let mut bytes = Vec::new();
    push_command(&mut bytes, [key.0.subscribe().as_bytes(), &key.1].into_iter());
    let mut parser = Parser::default();
    parser.buf.extend_from_slice(&bytes);
    let limits = Limits {
        max_args: 16,
        max_bulk: bytes.len(),
        max_query: bytes.len().max(1024),
    };
    if let Err(e) = parser.parse(&limits, 1) {
        tracing::warn!(error = e.0, "a subscription could not be asked for again");
    }
    parser.take()
}

/// Whether a frame says that something was subscribed to.
fn confirms(frame: &[u8]) -> bool {
    frame
        .split(|b| *b == b'\n')
        .nth(2)
        .is_some_and(|verb| verb.ends_with(b"subscribe\r"))
}

/// A connection with these subscriptions, and the messages that have come already.
async fn subscribe(single: &Single, names: &[Key], resp3: bool) -> Result<(Private, BytesMut), String> {
    let mut private = single.private(resp3).await?;
    let mut bytes = Vec::new();
    for (kind, name) in names {
        push_command(&mut bytes, [kind.subscribe().as_bytes(), name].into_iter());
    }
    let asked = async {
        private.stream.write_all(&bytes).await.map_err(|e| e.to_string())?;
        let (mut buf, mut early, mut skipper) = (BytesMut::new(), BytesMut::new(), Skipper::default());
        let (mut from, mut at, mut left) = (0, 0, names.len());
        while left > 0 {
            if private.stream.read_buf(&mut buf).await.map_err(|e| e.to_string())? == 0 {
                return Err("it closed the connection".to_owned());
            }
            while let Some(End::Reply(end) | End::Push(end)) = skipper.next(&buf, at)? {
                if confirms(&buf[from..end]) {
                    left -= 1;
                } else {
                    early.extend_from_slice(&buf[from..end]);
                }
                (from, at) = (end, end);
            }
            at = buf.len();
        }
        // What is left is messages, perhaps one that is not whole: the rest of it follows.
        early.extend_from_slice(&buf[from..]);
        Ok(early)
    };
    let early = timeout(PATIENCE, asked)
        .await
        .map_err(|_| "it does not answer".to_owned())??;
    Ok((private, early))
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Conn<S> {
    /// What this client is subscribed to, wherever that is; it is so no more.
    fn take_subscriptions(&mut self) -> Vec<Key> {
        let mut names = std::mem::take(&mut self.subscriptions.0);
        if let Some(inbox) = self.inbox.take() {
            for kind in Kind::ALL {
                names.extend(inbox.all(kind).into_iter().map(|n| (kind, n)));
            }
        }
        names
    }

    /// Subscribes at the store that serves now to what the client was subscribed to before.
    pub(crate) async fn resubscribe(&mut self, store: &Store) -> Result<(), Ended> {
        let listens = self.inbox.as_ref().is_some_and(|i: &Inbox| !i.is_empty());
        if self.subscriptions.0.is_empty() && !listens {
            return Ok(());
        }
        let names = self.take_subscriptions();
        match store {
            // It has no channels: there will be no messages, and nobody can publish either.
            Store::Embedded(_) => {}
            Store::Single(single) => {
                let until = Instant::now() + PATIENCE;
                let (private, early) = loop {
                    match subscribe(single, &names, self.out.resp3).await {
                        Ok(done) => break done,
                        Err(why) if Instant::now() >= until => {
                            tracing::warn!(why, "a client's subscriptions could not be taken to the other store");
                            return Err(Ended::StoreGone);
                        }
                        Err(_) => tokio::time::sleep(AGAIN).await,
                    }
                };
                self.subscriptions.0 = names;
                if let Some(Behind::Single(session)) = &mut self.session {
                    session.adopt(private);
                }
                self.out.raw(&early);
            }
            _ => {
                // The client has been told that it is subscribed long ago.
                let resp3 = self.out.resp3;
                let out = std::mem::replace(&mut self.out, Writer::new(resp3));
                for key in &names {
                    let asked = requests(key);
                    let spec = crate::commands::find(asked.args(0).at(0));
                    self.subscribed(spec, asked.args(0)).await?;
                }
                self.out = out;
            }
        }
        self.count_subscriptions();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_subscribed_to_is_known_and_confirmations_are_told_from_messages() {
        let mut s = Subscriptions::default();
        let mut say = |line: &str| {
            let mut parser = Parser::default();
            parser.buf.extend_from_slice(format!("{line}\r\n").as_bytes());
            parser.parse(&crate::resp::parse::UNAUTHENTICATED, 1).unwrap();
            let r = parser.take();
            s.note(crate::commands::find(r.args(0).at(0)), r.args(0));
            s.0.len()
        };
        assert_eq!(say("SUBSCRIBE a b a"), 2);
        assert_eq!(say("PSUBSCRIBE a*"), 3);
        assert_eq!(say("GET a"), 3);
        assert_eq!(say("UNSUBSCRIBE a"), 2);
        assert_eq!(say("UNSUBSCRIBE"), 1);
        assert!(confirms(b"*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n"));
        assert!(confirms(b">3\r\n$10\r\npsubscribe\r\n$1\r\na\r\n:1\r\n"));
        assert!(!confirms(b"*3\r\n$7\r\nmessage\r\n$9\r\nsubscribe\r\n$1\r\na\r\n"));
    }
}
