//! What commands of the connection's own do to it: which of them it answers, which replies its client gets, and that everything is as at the beginning after `RESET`. The
//! answers themselves are `local`'s.

use tokio::io::{AsyncRead, AsyncWrite};

use super::{Conn, Ended};
use crate::behind::Behind;
use crate::client::Replies;
use crate::commands;
use crate::engine::{Batch, Message};
use crate::local;

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Conn<S> {
    /// Whether a command of the connection's own goes to the Redis behind all the same, because that knows more.
    pub(super) fn passes_on(&self, kind: commands::Local) -> bool {
        matches!(
            (&self.session, kind),
            (Some(_), commands::Local::Command) | (Some(Behind::Sharded(_)), commands::Local::Config)
        )
    }

    /// `INFO` with what the groups say; false when nobody is behind who is to be asked.
    pub(super) async fn info(&mut self, a: crate::args::Args<'_>) -> Result<bool, Ended> {
        let Some(session) = &mut self.session else {
            return Ok(false);
        };
        let Some(behind) = session.info().await else {
            return Ok(false);
        };
        let text = local::info(&self.shared, a, &behind);
        self.out.verbatim(&text);
        Ok(true)
    }

    pub(super) fn set_replies(&mut self, how: Replies) {
        match how {
            Replies::On => {
                if let Some(from) = self.muted.take() {
                    self.out.buf.truncate(from);
                }
                self.out.ok();
            }
            Replies::Off => self.muted = self.muted.or(Some(self.out.buf.len())),
            // Who gets no replies at all gets none after that either.
            Replies::Skip if self.muted.is_some() => return,
            Replies::Skip => {}
        }
        self.replies = how;
    }

    /// The reply that was to be skipped is there, and goes.
    pub(super) async fn unskip(&mut self, batch: &mut Batch) -> Result<(), Ended> {
        if self.replies == Replies::Skip
            && let Some(from) = self.muted
        {
            self.store(batch).await?;
            self.out.buf.truncate(from.min(self.out.buf.len()));
            self.muted = None;
            self.replies = Replies::On;
        }
        Ok(())
    }

    pub(super) async fn reset(&mut self) -> Result<(), Ended> {
        (self.in_multi, self.watching, self.queued, self.lost) = (false, false, None, None);
        self.inbox = None;
        self.count_subscriptions();
        self.replies = Replies::On;
        self.muted = None;
        if let Some(session) = &mut self.session {
            session.reset();
        }
        if let Some(engine) = &self.engine {
            engine
                .send(Message::Gone(self.state.client.id))
                .await
                .map_err(|_| Ended::StoreGone)?;
        }
        Ok(())
    }
}
