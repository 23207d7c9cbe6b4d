//! One client's way to the Redis behind: what it has collected to send, and whether it goes over a shared connection or needs its own.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::dial::Private;
use super::{Passed, Single};
use crate::args::Args;
use crate::client::Client;
use crate::commands::{self, BLOCKS, Run, SUBSCRIBES, Spec, Tx, WRITE};
use crate::conn::Ended;
use crate::resp::parse::Requests;
use crate::resp::write::Writer;

/// Appends a command in its wire form.
pub(crate) fn push_command<'a>(out: &mut Vec<u8>, args: impl ExactSizeIterator<Item = &'a [u8]>) {
    out.extend_from_slice(format!("*{}\r\n", args.len()).as_bytes());
    for a in args {
        out.extend_from_slice(format!("${}\r\n", a.len()).as_bytes());
        out.extend_from_slice(a);
        out.extend_from_slice(b"\r\n");
    }
}

/// Command `i` in its wire form.
pub(crate) fn encode(requests: &Requests, i: usize) -> Bytes {
    requests.raw(i).unwrap_or_else(|| {
        let mut out = Vec::new();
        push_command(&mut out, requests.args(i).iter());
        out.into()
    })
}

pub(crate) struct Session {
    single: Single,
    client: Arc<Client>,
    /// Requests collected and not sent: from and to.
    run: Option<(usize, usize)>,
    private: Option<Private>,
    /// One with subscriptions that were made elsewhere.
    adopted: Option<Private>,
    in_multi: bool,
    watching: bool,
    subscribed: bool,
    /// The collected requests may make the connection wait.
    blocking: bool,
}

impl Session {
    pub(crate) fn new(single: Single, client: Arc<Client>) -> Self {
        Self {
            single,
            client,
            run: None,
            private: None,
            adopted: None,
            in_multi: false,
            watching: false,
            subscribed: false,
            blocking: false,
        }
    }

    /// Whether the connection has become one that is sent to.
    pub(crate) fn subscribed(&self) -> bool {
        self.subscribed
    }

    pub(crate) fn take_subscribed(&mut self) -> Option<Private> {
        self.adopted.take().or_else(|| self.private.take())
    }

    /// Takes over a connection that has subscribed for this client.
    pub(crate) fn adopt(&mut self, private: Private) {
        self.adopted = Some(private);
        self.subscribed = true;
    }

    /// Forgets transaction and watches with the connection that held them.
    pub(crate) fn reset(&mut self) {
        self.private = None;
        self.in_multi = false;
        self.watching = false;
        self.run = None;
    }

    /// Whether a command that only the server behind knows can make its connection wait.
    fn blocks(&self, spec: Option<&'static Spec>, name: &[u8]) -> bool {
        spec.is_none()
            && self
                .single
                .capabilities()
                .and_then(|c| c.known(name))
                .is_some_and(|k| k.blocks)
    }

    fn needs_private(&self, spec: Option<&'static Spec>, name: &[u8]) -> bool {
        self.in_multi
            || self.watching
            || self.blocks(spec, name)
            || spec.is_some_and(|s| matches!(s.run, Run::Tx(_)) || s.is(BLOCKS))
    }

    /// Collects request `i`; sends what was collected before when this one goes another way.
    pub(crate) async fn forward(
        &mut self,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        if spec.is_some_and(|s| s.is(SUBSCRIBES)) && !self.in_multi {
            self.flush(requests, out).await?;
            return self.subscribe(encode(requests, i), out).await;
        }
        let name = requests.args(i).at(0);
        if self.needs_private(spec, name) && self.private.is_none() {
            self.flush(requests, out).await?;
            match self.single.private(out.resp3).await {
                Ok(private) => self.private = Some(private),
                Err(reason) => {
                    out.error(
                        format!("UNAVAILABLE the store is not reachable ({reason}); the command was not sent")
                            .as_bytes(),
                    );
                    return Ok(());
                }
            }
        }
        self.run = match self.run {
            Some((from, to)) if to == i => Some((from, i + 1)),
            Some(_) => {
                self.flush(requests, out).await?;
                Some((i, i + 1))
            }
            None => Some((i, i + 1)),
        };
        self.blocking |= (spec.is_some_and(|s| s.is(BLOCKS)) || self.blocks(spec, name)) && !self.in_multi;
        match spec.map(|s| s.run) {
            Some(Run::Tx(Tx::Multi)) => self.in_multi = true,
            Some(Run::Tx(Tx::Watch)) if !self.in_multi => self.watching = true,
            Some(Run::Tx(Tx::Unwatch)) if !self.in_multi => self.watching = false,
            Some(Run::Tx(Tx::Exec | Tx::Discard)) => {
                self.in_multi = false;
                self.watching = false;
            }
            _ => {}
        }
        // The way ends here: what comes next can be shared again.
        if self.private.is_some() && !self.in_multi && !self.watching {
            self.flush(requests, out).await?;
            if let Some(private) = self.private.take() {
                self.single.give_back(private);
            }
        }
        Ok(())
    }

    /// Sends what is collected and takes the replies.
    pub(crate) async fn flush(&mut self, requests: &Requests, out: &mut Writer) -> Result<(), Ended> {
        let Some((from, to)) = self.run.take() else {
            return Ok(());
        };
        let bytes = requests.raw_run(from, to).unwrap_or_else(|| {
            let mut joined = BytesMut::new();
            (from..to).for_each(|i| joined.extend_from_slice(&encode(requests, i)));
            joined.freeze()
        });
        let blocking = std::mem::take(&mut self.blocking);
        let passed = match &mut self.private {
            Some(private) if blocking && !self.watching && to - from == 1 => {
                self.single.wait(private, bytes, &self.client.turn).await
            }
            Some(private) => private.pass(bytes, to - from, blocking).await,
            None => self.single.pass(self.client.id, out.resp3, bytes, to - from).await,
        };
        self.take(passed, requests, from, to, out)
    }

    fn take(
        &mut self,
        passed: Passed,
        requests: &Requests,
        from: usize,
        to: usize,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        let Some(lost) = passed.lost else {
            append(out, passed.replies);
            return Ok(());
        };
        if lost.too_large {
            return Err(Ended::LargeReply);
        }
        out.raw(&whole(&passed.replies, passed.count));
        for i in from + passed.count..to {
            let a = requests.args(i);
            let known = self.single.capabilities().and_then(|c| c.known(a.at(0)));
            out.error(refusal(a, known.is_none_or(|k| k.writes), lost.sent, &lost.reason).as_bytes());
        }
        if self.private.take().is_some() {
            // What was watched and queued is gone. As after the death of a Redis, the client must connect again and begin anew.
            tracing::debug!(
                client = self.client.id,
                reason = lost.reason,
                "a private connection to the store was lost"
            );
            return Err(Ended::TransactionLost);
        }
        Ok(())
    }

    async fn subscribe(&mut self, bytes: Bytes, out: &mut Writer) -> Result<(), Ended> {
        use tokio::io::AsyncWriteExt as _;
        if self.private.is_none() {
            match self.single.private(out.resp3).await {
                Ok(private) => self.private = Some(private),
                Err(reason) => {
                    out.error(
                        format!("UNAVAILABLE the store is not reachable ({reason}); the command was not sent")
                            .as_bytes(),
                    );
                    return Ok(());
                }
            }
        }
        if let Some(private) = &mut self.private {
            private.stream.write_all(&bytes).await?;
            self.subscribed = true;
        }
        Ok(())
    }
}

fn append(out: &mut Writer, replies: BytesMut) {
    if out.buf.is_empty() {
        out.buf = replies;
    } else {
        out.raw(&replies);
    }
}

/// The first `count` replies without the piece of one that was cut.
fn whole(replies: &[u8], count: usize) -> Vec<u8> {
    let mut skipper = crate::resp::skip::Skipper::default();
    let mut at = 0;
    for _ in 0..count {
        match skipper.next(replies, at) {
            Ok(Some(crate::resp::skip::End::Reply(end) | crate::resp::skip::End::Push(end))) => at = end,
            Ok(None) | Err(_) => break,
        }
    }
    replies[..at].to_vec()
}

/// `writes`: of a command that only the server behind knows.
fn refusal(a: Args<'_>, writes: bool, sent: bool, reason: &str) -> String {
    let writes = commands::find(a.at(0)).map_or(writes, |s| s.is(WRITE) || matches!(s.run, Run::Tx(_)));
    match (sent, writes) {
        (false, _) => format!("UNAVAILABLE the store is not reachable ({reason}); the command was not sent"),
        (true, false) => {
            format!("UNAVAILABLE the store was lost before it answered ({reason}); nothing was changed by this command")
        }
        (true, true) => format!(
            "UNAVAILABLE the store was lost before it answered ({reason}); whether this command took effect is unknown"
        ),
    }
}
