//! A connection when another store begins to serve: it lets go of the old one and follows to the new one, and what was begun in front of the old one comes to an end.
//! Subscriptions that go on there are `resubscribe`'s.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use super::{Conn, Ended};
use crate::behind::Behind;
use crate::commands::Tx;
use crate::engine::Message;
use crate::server::Store;
use crate::view::View;

/// What a change of the store puts an end to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Begun {
    /// Commands were being queued.
    Transaction,
    /// Keys were watched: they count as changed.
    Watch,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Conn<S> {
    /// The view has been replaced, and this client may have nothing to say for long. Gives the end of the one that has followed.
    pub(super) async fn turn_over(&mut self) -> Result<CancellationToken, Ended> {
        let office = Arc::clone(&self.shared.office);
        let view = office.views.enter().await;
        if view.generation != self.generation {
            self.follow(&view).await?;
            self.flush().await?;
        }
        Ok(view.ended.clone())
    }

    /// Lets go of the embedded engine.
    pub(super) async fn forget(&mut self) {
        if let Some(engine) = self.engine.take()
            && engine.send(Message::Gone(self.state.client.id)).await.is_err()
        {
            tracing::debug!("the engine ended before its connections");
        }
    }

    /// Another store serves from now on. What was begun in front of the other one ends as if it had been disturbed: clients try that again.
    pub(super) async fn follow(&mut self, view: &View) -> Result<(), Ended> {
        self.forget().await;
        if self.generation != 0 {
            if self.in_multi {
                self.lost = Some(if self.watching {
                    Begun::Watch
                } else {
                    Begun::Transaction
                });
            } else if self.watching {
                self.lost = Some(Begun::Watch);
            }
        }
        self.queued = None;
        self.generation = view.generation;
        self.session = Behind::new(&view.store, &self.state.client);
        self.engine = match &*view.store {
            Store::Embedded(inbox) => Some(inbox.clone()),
            _ => None,
        };
        self.resubscribe(&view.store).await
    }

    /// Answers a command of a transaction that can't be executed any more. None: it is not part of it.
    pub(super) fn answer_lost(&mut self, tx: Option<Tx>, a: crate::args::Args<'_>) -> Option<&'static [u8]> {
        let begun = self.lost?;
        match tx {
            // What was watched counts as changed: so the transaction comes to nothing, and its client tries again.
            Some(Tx::Exec) => {
                self.lost = None;
                Some(match begun {
                    Begun::Watch if self.out.resp3 => b"_\r\n",
                    Begun::Watch => b"*-1\r\n",
                    Begun::Transaction => {
                        b"-EXECABORT Transaction discarded because the data has moved to another store meanwhile: nothing was executed, try it again\r\n"
                    }
                })
            }
            Some(Tx::Discard | Tx::Unwatch) if !self.in_multi => {
                self.lost = None;
                Some(b"+OK\r\n")
            }
            Some(Tx::Multi) => Some(b"+OK\r\n"),
            Some(Tx::Watch) if !self.in_multi => Some(b"+OK\r\n"),
            _ if self.in_multi && a.len() > 0 => Some(b"+QUEUED\r\n"),
            _ => None,
        }
    }
}
