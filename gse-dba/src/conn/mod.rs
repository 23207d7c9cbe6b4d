//! One connection: reads, hands whole batches to the store, writes replies in order, one flush per read. Nothing is read while replies are owed, so a client that does not
//! take its replies holds up nobody but itself.
//!
//! Here is what a connection has, why it ends, and the loop that it lives in. How bytes come and go is `wire`'s, what one read brought is executed by `batch`, and a
//! connection that has subscribed at the one Redis behind is `pump`'s.

mod batch;
mod follow;
mod own;
mod pump;
mod store;
mod wire;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use crate::behind::Behind;
use crate::client::{Client, Replies};
use crate::copy::Writes;
use crate::engine::Message;
use crate::hotkeys::Dice;
use crate::local::State;
use crate::resp::parse::{Limits, Parser, UNAUTHENTICATED};
use crate::resp::write::Writer;
use crate::resubscribe::Subscriptions;
use crate::server::Shared;
use crate::sharded::hub::Inbox;
use follow::Begun;

const TURN_AWAY: Duration = Duration::from_secs(1);

/// Tells a client that there is no place for it.
pub(crate) async fn turn_away(mut stream: impl AsyncWrite + Unpin) {
    // It may not even listen; it is closed either way.
    let _ = timeout(TURN_AWAY, stream.write_all(b"-ERR max number of clients reached\r\n")).await;
}

/// Why a connection ended before its client wanted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it did not take its replies in time")]
    SlowReader,
    #[error("one reply was larger than limits.output_buffer_bytes")]
    LargeReply,
    #[error("the store has stopped")]
    StoreGone,
    #[error("its transaction was lost together with the connection to the store")]
    TransactionLost,
    #[error("it did not take the messages of its subscriptions in time")]
    SlowSubscriber,
    #[error("it left while a command was waiting")]
    Left,
    #[error("it was told to go")]
    Done,
    #[error("CLIENT KILL")]
    Killed,
    #[error("the replies of all clients together were larger than limits.all_output_bytes")]
    NoRoom,
}

impl Ended {
    /// The metric label of those that were not the client's own wish or the store's doing.
    fn eviction(&self) -> Option<&'static str> {
        match self {
            Self::SlowReader => Some("slow_reader"),
            Self::LargeReply => Some("large_reply"),
            Self::Killed => Some("killed"),
            Self::NoRoom => Some("all_output"),
            Self::SlowSubscriber => Some("slow_subscriber"),
            Self::Io(_) | Self::Left | Self::StoreGone | Self::TransactionLost | Self::Done => None,
        }
    }
}

pub(crate) struct Conn<S> {
    pub(crate) stream: S,
    pub(crate) shared: Arc<Shared>,
    pub(crate) state: State,
    pub(crate) parser: Parser,
    pub(crate) out: Writer,
    limits: Limits,
    /// Inside MULTI, as far as the connection's own commands show.
    in_multi: bool,
    /// The way to the store: a session where a Redis is behind, or the embedded engine's inbox.
    pub(crate) session: Option<Behind>,
    engine: Option<mpsc::Sender<Message>>,
    /// Of the view that these belong to.
    generation: u64,
    /// What the open transaction writes, when writes are being told to somebody.
    queued: Option<Writes>,
    /// Keys are watched.
    watching: bool,
    /// What was begun in front of another store and can't be ended in front of this one.
    lost: Option<Begun>,
    /// What it has subscribed to at the one Redis behind.
    pub(crate) subscriptions: Subscriptions,
    /// Its subscriptions, once it has had one.
    pub(crate) inbox: Option<Inbox>,
    replies: Replies,
    /// Where replies begin in the buffer that are not sent.
    pub(crate) muted: Option<usize>,
    /// Since when a command is begun and not whole.
    begun: Option<Instant>,
    dice: Dice,
    /// Commands that are being served.
    under_way: i64,
}

/// Serves a client until it leaves.
pub(crate) async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send>(
    stream: S,
    shared: Arc<Shared>,
    client: Arc<Client>,
) {
    let l = &shared.config.limits;
    let limits = Limits {
        max_args: l.max_args,
        max_bulk: l.max_bulk_bytes,
        max_query: l.query_buffer_bytes,
    };
    let (id, me) = (client.id, Arc::clone(&client));
    let state = State {
        client,
        user: shared.users.open(),
        failures: 0,
    };
    let mut conn = Conn {
        stream,
        shared,
        state,
        parser: Parser::default(),
        out: Writer::new(false),
        limits,
        in_multi: false,
        session: None,
        engine: None,
        generation: 0,
        queued: None,
        watching: false,
        lost: None,
        subscriptions: Subscriptions::default(),
        inbox: None,
        replies: Replies::On,
        muted: None,
        begun: None,
        dice: Dice::new(id),
        under_way: 0,
    };
    let ended = tokio::select! {
        ended = conn.run() => ended,
        () = me.killed.notified() => Err(Ended::Killed),
    };
    conn.shared.metrics.inflight(-conn.under_way);
    if let Err(e) = ended {
        if let Some(reason) = e.eviction() {
            conn.shared.metrics.evicted(reason);
        }
        tracing::debug!(client = id, reason = %e, "connection ended");
    }
    conn.forget().await;
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Conn<S> {
    async fn run(&mut self) -> Result<(), Ended> {
        let opened = Instant::now();
        loop {
            let limits = if self.state.user.is_some() {
                self.limits
            } else {
                UNAUTHENTICATED
            };
            let broken = self.parser.parse(&limits, self.shared.config.limits.max_batch).err();
            if self.parser.ready() > 0 {
                let requests = self.parser.take();
                self.begun = None;
                self.under_way = requests.len() as i64;
                self.shared.metrics.inflight(self.under_way);
                // Room for all the ways that a command can go is only taken while there are commands.
                let result = Box::pin(self.batch(requests)).await;
                self.shared.metrics.inflight(-std::mem::take(&mut self.under_way));
                self.flush().await?;
                self.parser.recycle(result?);
            }
            if let Some(e) = broken {
                // Unless commands before it have changed what may be sent.
                if !limits_changed(&limits, self.state.user.is_some()) {
                    self.out.error(format!("ERR {}", e.0).as_bytes());
                    return self.flush().await;
                }
                continue;
            }
            if self.session.as_ref().is_some_and(Behind::subscribed) {
                self.state.client.subscribed();
                if Box::pin(self.pump()).await? {
                    continue;
                }
                return Ok(());
            }
            if self.parser.has_more() {
                // A full batch was taken and there may be another in the buffer.
                if self.parser.parse(&self.limits, 1).is_ok_and(|n| n > 0) {
                    continue;
                }
            }
            if !self.fill(opened).await? {
                return Ok(());
            }
        }
    }
}

fn limits_changed(used: &Limits, authenticated: bool) -> bool {
    authenticated && used.max_query == UNAUTHENTICATED.max_query
}
