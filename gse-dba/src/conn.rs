//! One connection: reads, hands whole batches to the store, writes replies in order, one flush per read. Nothing is read while replies are owed, so a client that does not
//! take its replies holds up nobody but itself.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::poll_immediate;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::admin;
use crate::behind::Behind;
use crate::blocking;
use crate::client::{Client, Replies};
use crate::clients;
use crate::commands::{self, Class, OPEN, Run, SUBSCRIBES, Tx};
use crate::copy::{Tracker, Writes};
use crate::engine::db::Refusal;
use crate::engine::{Batch, Job, Message, Op};
use crate::hotkeys::Dice;
use crate::local::{self, After, State};
use crate::resp::parse::{Limits, Parser, Requests, UNAUTHENTICATED};
use crate::resp::write::Writer;
use crate::resubscribe::Subscriptions;
use crate::server::{Shared, Store};
use crate::sharded::hub::Inbox;
use crate::sharded::route;
use crate::view::View;

/// Bytes taken in one read at most.
const READ: usize = 64 * 1024;
/// Replies beyond this count among those that wait for clients to take them.
const KEEP: usize = 256 * 1024;
/// Bytes read ahead of a client that waits in a blocking command.
const AHEAD: usize = 1 << 20;
/// Bytes a second that a long command must come with.
const SLOWEST: usize = 64 * 1024;
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

/// What a change of the store puts an end to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begun {
    /// Commands were being queued.
    Transaction,
    /// Keys were watched: they count as changed.
    Watch,
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

    /// Reads once; false when the client has left or must.
    async fn fill(&mut self, opened: Instant) -> Result<bool, Ended> {
        let l = &self.shared.config.limits;
        let handshake = Duration::from_millis(l.handshake_timeout_ms);
        let wait = if self.state.user.is_none() {
            Some(handshake.saturating_sub(opened.elapsed()))
        } else if self.parser.is_partial() {
            // However slowly its bytes drip, it must become whole in a time that its length explains.
            let since = *self.begun.get_or_insert_with(Instant::now);
            let more = Duration::from_secs((self.parser.buf.len() / SLOWEST) as u64);
            Some((handshake + more).saturating_sub(since.elapsed()))
        } else if l.idle_timeout_ms > 0 {
            Some(Duration::from_millis(l.idle_timeout_ms))
        } else {
            None
        };
        let partial = self.parser.is_partial();
        let listens = self.inbox.as_ref().is_some_and(|i| !i.is_empty());
        // One who only listens must hear of another store too.
        let mut turn = listens.then(|| self.shared.office.views.now().ended.clone());
        let n = loop {
            let inbox = self.inbox.as_mut().filter(|i| !i.is_empty());
            // Who listens may be silent, but not in the middle of a command.
            let wait = wait.filter(|_| inbox.is_none() || partial);
            let message = tokio::select! {
                biased;
                read = read_within(&mut self.stream, &mut self.parser.buf, wait) => break read?,
                () = self.shared.life.draining() => return Ok(false),
                message = next_message(inbox) => message,
                () = over(turn.as_ref()) => {
                    turn = Some(self.turn_over().await?);
                    if self.session.as_ref().is_some_and(Behind::subscribed) {
                        return Ok(true);
                    }
                    continue;
                }
            };
            self.push(message.ok_or(Ended::SlowSubscriber)?).await?;
        };
        match n {
            Some(n) if n > 0 => {
                self.shared.metrics.received(n);
                Ok(true)
            }
            Some(_) => Ok(false),
            None if self.state.user.is_none() => {
                self.shared.metrics.evicted("no_password");
                self.out.error(b"NOAUTH no password was given in time");
                self.flush().await?;
                Ok(false)
            }
            None => {
                let cut = self.parser.is_partial();
                self.shared.metrics.evicted(if cut { "slow_sender" } else { "idle" });
                Ok(false)
            }
        }
    }

    pub(crate) async fn flush(&mut self) -> Result<(), Ended> {
        if let Some(from) = &mut self.muted {
            self.out.buf.truncate(*from);
            *from = 0;
        }
        if self.out.buf.is_empty() {
            return Ok(());
        }
        if self.out.buf.len() > self.shared.config.limits.output_buffer_bytes {
            return Err(Ended::LargeReply);
        }
        let held = if self.out.buf.len() > KEEP {
            Some(clients::hold_output(&self.shared, &self.state.client, self.out.buf.len()).await?)
        } else {
            None
        };
        // Nothing of it is kept while the client is idle.
        let bytes = std::mem::take(&mut self.out.buf);
        let stream = &mut self.stream;
        let mut write = std::pin::pin!(async {
            stream.write_all(&bytes).await?;
            stream.flush().await
        });
        // The usual client takes all of it at once; only the other ones need a clock.
        match poll_immediate(&mut write).await {
            Some(written) => written?,
            None => {
                let limit = Duration::from_millis(self.shared.config.limits.write_timeout_ms);
                timeout(limit, write).await.map_err(|_| Ended::SlowReader)??;
            }
        }
        drop(held);
        self.shared.metrics.sent(bytes.len());
        Ok(())
    }

    /// Executes what one read brought. Commands of the connection's own are answered between what goes to the store, never before it.
    async fn batch(&mut self, requests: Requests) -> Result<Requests, Ended> {
        let n = requests.len();
        if self.shared.pause.is_set() {
            let shared = Arc::clone(&self.shared);
            paused(&shared, &requests).await;
        }
        let begun = std::time::Instant::now();
        self.state.client.active(n, begun);
        let mut counts = [(0u64, 0u64); 5];
        let office = Arc::clone(&self.shared.office);
        // Held until the last reply of this batch is here: who replaces the view can wait for that.
        let mut view = office.views.enter().await;
        if view.generation != self.generation {
            self.follow(&view).await?;
        }
        // Marked when this is dropped, whatever has become of the commands.
        let mut touches = view.tracker.as_ref().map(Tracker::batch);
        let mut batch = Batch {
            requests,
            ops: Vec::with_capacity(if self.session.is_none() { n } else { 0 }),
        };
        for i in 0..n {
            let a = batch.requests.args(i);
            let spec = commands::find(a.at(0));
            let class = spec.map_or(Class::Unknown, commands::Spec::class);
            if self.state.user.is_none() && !spec.is_some_and(|s| s.is(OPEN)) {
                counts[class as usize].1 += 1;
                self.store(&mut batch).await?;
                self.out.error(b"NOAUTH Authentication required.");
                continue;
            }
            if let Some(user) = &self.state.user
                && let Err(denied) = user.may(spec, a)
            {
                counts[class as usize].1 += 1;
                if let Some(session) = &mut self.session {
                    session.flush(&batch.requests, &mut self.out).await?;
                    session.spoil();
                    self.out.error(denied.as_bytes());
                } else {
                    batch.ops.push((i as u32, Err(denied.into())));
                }
                continue;
            }
            if self.replies == Replies::Skip {
                self.store(&mut batch).await?;
                self.muted = Some(self.out.buf.len());
            }
            let subscribes = spec.is_some_and(|s| s.is(SUBSCRIBES))
                && !self.in_multi
                && matches!(self.session, Some(Behind::Sharded(_)));
            let listens = self.inbox.as_ref().is_some_and(|i| !i.is_empty()) && !self.out.resp3;
            if subscribes || listens {
                self.store(&mut batch).await?;
                if self.subscribed(spec, batch.requests.args(i)).await? {
                    counts[class as usize].0 += 1;
                    self.unskip(&mut batch).await?;
                    continue;
                }
            }
            let a = batch.requests.args(i);
            if let Some(spec) = spec
                && let Run::Local(kind) = spec.run
                && !self.passes_on(kind)
            {
                let ends = matches!(kind, commands::Local::Quit | commands::Local::Reset);
                if !self.in_multi || ends {
                    counts[class as usize].0 += 1;
                    self.store(&mut batch).await?;
                    if kind == commands::Local::Info && self.info(batch.requests.args(i)).await? {
                        self.unskip(&mut batch).await?;
                        continue;
                    }
                    let after = self
                        .state
                        .answer(&self.shared, kind, spec, batch.requests.args(i), &mut self.out);
                    match after {
                        After::Go => {}
                        After::Close => {
                            self.count(counts);
                            return self.flush().await.and(Err(Ended::Done));
                        }
                        After::Reset => self.reset().await?,
                        After::Replies(how) => {
                            self.set_replies(how);
                            continue;
                        }
                        After::Unblock { group, upstream, error } => {
                            if let Some(session) = &mut self.session {
                                session.unblock(group, upstream, error, &mut self.out).await;
                            }
                        }
                    }
                    self.unskip(&mut batch).await?;
                    continue;
                }
            }
            if let Some(spec) = spec
                && matches!(spec.run, Run::Admin)
                && !self.in_multi
            {
                counts[class as usize].0 += 1;
                let words: Vec<Bytes> = a.iter().map(Bytes::copy_from_slice).collect();
                self.store(&mut batch).await?;
                // It may take longer than a command of the store: what is owed goes out first.
                self.flush().await?;
                drop((view, touches.take()));
                admin::run(&self.shared, &self.state.client, &words, &mut self.out).await;
                view = office.views.enter().await;
                if view.generation != self.generation {
                    self.follow(&view).await?;
                }
                touches = view.tracker.as_ref().map(Tracker::batch);
                continue;
            }
            let op = self.decide(spec, a);
            if let Ok(Some(spec @ commands::Spec { run: Run::Tx(tx), .. })) = &op
                && spec.arity_fits(a.len())
            {
                match tx {
                    Tx::Multi if !self.in_multi => {
                        self.in_multi = true;
                        self.queued = touches.is_some().then(Writes::default);
                    }
                    Tx::Multi => {}
                    Tx::Exec | Tx::Discard => {
                        let exec = matches!(tx, Tx::Exec) && self.in_multi;
                        if let Some(touches) = touches.as_mut().filter(|_| exec) {
                            touches.add_all(self.queued.take());
                        }
                        (self.in_multi, self.watching, self.queued) = (false, false, None);
                    }
                    Tx::Watch => self.watching |= !self.in_multi,
                    Tx::Unwatch => self.watching &= self.in_multi,
                }
            } else if let (Ok(spec), Some(touches)) = (&op, touches.as_mut()) {
                match (&mut self.queued, self.in_multi) {
                    (Some(queued), true) => queued.add(*spec, a),
                    (None, true) => {}
                    (_, false) => touches.add(*spec, a),
                }
            }
            match &op {
                Ok(_) => counts[class as usize].0 += 1,
                Err(_) => counts[class as usize].1 += 1,
            }
            if self.lost.is_some() {
                let (tx, a) = (tx_of(&op), batch.requests.args(i));
                if let Some(reply) = self.answer_lost(tx, a) {
                    self.store(&mut batch).await?;
                    self.out.raw(reply);
                    continue;
                }
            }
            let waits = !self.in_multi && matches!(&op, Ok(spec) if route::blocks(*spec, a));
            if waits && self.session.is_some() {
                // It may take long: what is owed goes out first.
                self.store(&mut batch).await?;
                self.flush().await?;
            }
            let a = batch.requests.args(i);
            if spec.is_some_and(|s| s.is(SUBSCRIBES)) && !self.in_multi {
                self.subscriptions.note(spec, a);
            }
            if let Some(session) = &mut self.session {
                match op {
                    Err(refusal) => {
                        session.flush(&batch.requests, &mut self.out).await?;
                        session.spoil();
                        self.out.error(refusal.0.as_bytes());
                    }
                    Ok(spec) if waits => {
                        let mut again: Option<Requests> = None;
                        let since = Instant::now();
                        loop {
                            // It does not outlast its view: who changes that must not wait for as long as it does.
                            let client = Arc::clone(&self.state.client);
                            client.turn.begin(&view.ended);
                            let (requests, at) = again.as_ref().map_or((&batch.requests, i), |r| (r, 0));
                            if let Some(session) = &mut self.session {
                                let waiting = session.forward(requests, at, spec, &mut self.out);
                                let buf = &mut self.parser.buf;
                                watched(&mut self.stream, buf, &self.shared, waiting).await?;
                            } else {
                                let why =
                                    spec.map_or_else(|| commands::unknown(requests.args(at)), commands::not_embedded);
                                self.out.error(why.0.as_bytes());
                            }
                            if !client.turn.end() {
                                break;
                            }
                            drop((view, touches.take()));
                            view = office.views.enter().await;
                            if view.generation != self.generation {
                                self.follow(&view).await?;
                            }
                            touches = view.tracker.as_ref().map(Tracker::batch);
                            let a = batch.requests.args(i);
                            if let Some(t) = &mut touches {
                                t.add(spec, a);
                            }
                            again = Some(blocking::shortened(a, since.elapsed()));
                        }
                    }
                    Ok(spec) => session.forward(&batch.requests, i, spec, &mut self.out).await?,
                }
                self.unskip(&mut batch).await?;
            } else {
                let op: Op = match op {
                    Ok(Some(spec)) => Ok(spec),
                    Ok(None) => Err(commands::unknown(a)),
                    Err(e) => Err(e),
                };
                batch.ops.push((i as u32, op));
                self.unskip(&mut batch).await?;
            }
        }
        self.count(counts);
        let stored = self.store(&mut batch).await;
        let (shared, client) = (&self.shared, &self.state.client);
        shared.watch.batch(
            &shared.metrics,
            client,
            &mut self.dice,
            &batch.requests,
            counts,
            begun.elapsed(),
        );
        stored.map(|()| batch.requests)
    }

    fn count(&self, counts: [(u64, u64); 5]) {
        for (class, (passed, refused)) in [
            Class::Read,
            Class::Write,
            Class::Transaction,
            Class::Connection,
            Class::Unknown,
        ]
        .into_iter()
        .zip(counts)
        {
            for (refused, n) in [(false, passed), (true, refused)] {
                if n > 0 {
                    self.shared.metrics.commands(class, refused, n);
                }
            }
        }
    }

    /// Whether a command of the connection's own goes to the Redis behind all the same, because that knows more.
    fn passes_on(&self, kind: commands::Local) -> bool {
        matches!(
            (&self.session, kind),
            (Some(_), commands::Local::Command) | (Some(Behind::Sharded(_)), commands::Local::Config)
        )
    }

    /// `INFO` with what the groups say; false when nobody is behind who is to be asked.
    async fn info(&mut self, a: crate::args::Args<'_>) -> Result<bool, Ended> {
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

    fn set_replies(&mut self, how: Replies) {
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
    async fn unskip(&mut self, batch: &mut Batch) -> Result<(), Ended> {
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

    /// Whether a command goes to the store: `Ok(None)` is one that only a Redis behind can know.
    fn decide(
        &self,
        spec: Option<&'static commands::Spec>,
        a: crate::args::Args<'_>,
    ) -> Result<Option<&'static commands::Spec>, Refusal> {
        let embedded = self.session.is_none();
        let Some(spec) = spec else {
            return if embedded { Err(commands::unknown(a)) } else { Ok(None) };
        };
        match spec.run {
            Run::Local(kind) if self.passes_on(kind) => return Ok(Some(spec)),
            Run::Elsewhere if spec.name == "DEBUG" && !embedded && !a.is(1, "OBJECT") => {
                return Err(String::from("ERR of DEBUG, only DEBUG OBJECT is allowed through gse_dba").into());
            }
            Run::Refused if self.in_multi => {
                return Err(String::from("ERR Command not allowed inside a transaction").into());
            }
            Run::Refused => return Err(commands::not_allowed(spec)),
            // Queued, not done now; another database than the only one never reaches a Redis behind.
            Run::Local(commands::Local::Select) if a.len() == 2 && (embedded || a.at(1) == b"0") => {
                return Ok(embedded.then_some(&commands::SELECT_QUEUED));
            }
            Run::Local(_) | Run::Admin => {
                return Err(format!(
                    "ERR command '{}' is not allowed inside a transaction by gse_dba",
                    spec.name
                )
                .into());
            }
            _ => {}
        }
        // A Redis behind says itself what is wrong: inside a transaction it must.
        if embedded && !spec.arity_fits(a.len()) {
            return Err(commands::wrong_arity(spec));
        }
        if embedded && matches!(spec.run, Run::Elsewhere) {
            return Err(commands::not_embedded(spec));
        }
        Ok(Some(spec))
    }

    /// Sends what is collected to the store and takes its replies.
    async fn store(&mut self, batch: &mut Batch) -> Result<(), Ended> {
        if let Some(session) = &mut self.session {
            return session.flush(&batch.requests, &mut self.out).await;
        }
        if batch.ops.is_empty() {
            return Ok(());
        }
        let mut from = 0;
        loop {
            let Some(inbox) = &self.engine else {
                return Err(Ended::StoreGone);
            };
            let resp3 = self.out.resp3;
            let (reply, done) = oneshot::channel();
            let job = Job {
                session: self.state.client.id,
                batch: std::mem::take(batch),
                from,
                out: std::mem::take(&mut self.out),
                soft_limit: self.shared.config.limits.output_soft_bytes,
                reply,
            };
            inbox
                .send(Message::Job(Box::new(job)))
                .await
                .map_err(|_| Ended::StoreGone)?;
            let done = done.await.map_err(|_| Ended::StoreGone)?;
            *batch = done.batch;
            self.out = done.out;
            self.out.resp3 = resp3;
            from = done.next;
            if from >= batch.ops.len() {
                batch.ops.clear();
                return Ok(());
            }
            self.flush().await?;
        }
    }

    async fn reset(&mut self) -> Result<(), Ended> {
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

    /// The view has been replaced, and this client may have nothing to say for long. Gives the end of the one that has followed.
    async fn turn_over(&mut self) -> Result<CancellationToken, Ended> {
        let office = Arc::clone(&self.shared.office);
        let view = office.views.enter().await;
        if view.generation != self.generation {
            self.follow(&view).await?;
            self.flush().await?;
        }
        Ok(view.ended.clone())
    }

    /// Lets go of the embedded engine.
    async fn forget(&mut self) {
        if let Some(engine) = self.engine.take()
            && engine.send(Message::Gone(self.state.client.id)).await.is_err()
        {
            tracing::debug!("the engine ended before its connections");
        }
    }

    /// Another store serves from now on. What was begun in front of the other one ends as if it had been disturbed: clients try that again.
    async fn follow(&mut self, view: &View) -> Result<(), Ended> {
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
    fn answer_lost(&mut self, tx: Option<Tx>, a: crate::args::Args<'_>) -> Option<&'static [u8]> {
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

    /// The connection has subscribed: from now on what the store sends goes to the client as it comes, and the client's commands to the store.
    async fn pump(&mut self) -> Result<bool, Ended> {
        let Some(mut private) = self.session.as_mut().and_then(Behind::take_subscribed) else {
            return Err(Ended::StoreGone);
        };
        let limit = Duration::from_millis(self.shared.config.limits.write_timeout_ms);
        let mut chunk = BytesMut::with_capacity(READ);
        let life = self.shared.life.clone();
        let mut turn = self.shared.office.views.now().ended.clone();
        loop {
            self.parser.buf.reserve(READ);
            tokio::select! {
                () = turn.cancelled() => {
                    let generation = self.generation;
                    turn = self.turn_over().await?;
                    if self.generation != generation {
                        return Ok(true);
                    }
                }
                () = life.draining() => return Ok(false),
                read = private.stream.read_buf(&mut chunk) => {
                    if read? == 0 {
                        return Err(Ended::StoreGone);
                    }
                    self.shared.metrics.sent(chunk.len());
                    timeout(limit, self.stream.write_all(&chunk)).await.map_err(|_| Ended::SlowReader)??;
                    chunk.clear();
                }
                read = self.stream.read_buf(&mut self.parser.buf) => {
                    let n = read?;
                    if n == 0 {
                        return Ok(false);
                    }
                    self.shared.metrics.received(n);
                }
            }
            let broken = self
                .parser
                .parse(&self.limits, self.shared.config.limits.max_batch)
                .err();
            let requests = self.parser.take();
            for i in 0..requests.len() {
                let a = requests.args(i);
                let spec = commands::find(a.at(0));
                match spec.map(|s| s.run) {
                    Some(Run::Local(commands::Local::Quit | commands::Local::Reset)) => {
                        self.out.ok();
                        return self.flush().await.map(|()| false);
                    }
                    Some(Run::Local(_) | Run::Admin | Run::Refused) => self
                        .out
                        .error(b"ERR this command is not allowed through gse_dba on a connection that has subscribed"),
                    // With RESP3 it may still do anything: that goes where it would go without subscriptions.
                    _ if self.out.resp3 && !spec.is_some_and(|s| s.is(SUBSCRIBES)) => {
                        let office = Arc::clone(&self.shared.office);
                        let view = office.views.enter().await;
                        let mut touches = view.tracker.as_ref().map(Tracker::batch);
                        if let Some(t) = &mut touches {
                            match spec.map(|s| s.run) {
                                Some(Run::Tx(_)) => t.add_unknown(),
                                _ => t.add(spec, a),
                            }
                        }
                        if let Some(session) = self.session.as_mut().filter(|_| view.generation == self.generation) {
                            session.forward(&requests, i, spec, &mut self.out).await?;
                            session.flush(&requests, &mut self.out).await?;
                        } else {
                            self.out.error(
                                b"UNAVAILABLE the data has just moved to another store; the command was not sent",
                            );
                        }
                    }
                    _ => {
                        self.subscriptions.note(spec, a);
                        let bytes = crate::single::session::encode(&requests, i);
                        timeout(limit, private.stream.write_all(&bytes))
                            .await
                            .map_err(|_| Ended::SlowReader)??;
                    }
                }
            }
            if let Some(e) = broken {
                self.out.error(format!("ERR {}", e.0).as_bytes());
                return self.flush().await.map(|()| false);
            }
            self.flush().await?;
        }
    }
}

async fn over(turn: Option<&CancellationToken>) {
    match turn {
        Some(turn) => turn.cancelled().await,
        None => std::future::pending().await,
    }
}

fn tx_of(op: &Result<Option<&'static commands::Spec>, Refusal>) -> Option<Tx> {
    match op {
        Ok(Some(commands::Spec { run: Run::Tx(tx), .. })) => Some(*tx),
        _ => None,
    }
}

/// Waits while other clients are held back by `CLIENT PAUSE`.
async fn paused(shared: &Shared, requests: &Requests) {
    let (mut any, mut writes) = (false, false);
    for i in 0..requests.len() {
        let a = requests.args(i);
        let spec = commands::find(a.at(0));
        if !spec.is_some_and(|s| matches!(s.run, Run::Local(_) | Run::Admin)) {
            any = true;
            writes |= route::writes(spec, a);
        }
    }
    if any {
        shared.pause.wait(writes).await;
    }
}

/// Waits for what a command brings, while the client may leave or be ended. What it sends meanwhile is kept for later.
async fn watched<S: AsyncRead + Unpin>(
    stream: &mut S,
    buf: &mut BytesMut,
    shared: &Shared,
    waiting: impl Future<Output = Result<(), Ended>>,
) -> Result<(), Ended> {
    tokio::pin!(waiting);
    loop {
        let room = buf.len() < AHEAD;
        if room {
            buf.reserve(READ);
        }
        tokio::select! {
            biased;
            done = &mut waiting => return done,
            () = shared.life.draining() => return Err(Ended::Done),
            read = stream.read_buf(buf), if room => {
                let n = read?;
                if n == 0 {
                    return Err(Ended::Left);
                }
                shared.metrics.received(n);
            }
        }
    }
}

async fn next_message(inbox: Option<&mut Inbox>) -> Option<Bytes> {
    match inbox {
        Some(inbox) => inbox.next().await,
        None => std::future::pending().await,
    }
}

fn limits_changed(used: &Limits, authenticated: bool) -> bool {
    authenticated && used.max_query == UNAUTHENTICATED.max_query
}

/// Reads into the buffer; `None` when the time was up.
async fn read_within(
    stream: &mut (impl AsyncRead + Unpin),
    buf: &mut BytesMut,
    wait: Option<Duration>,
) -> io::Result<Option<usize>> {
    match wait {
        None => read_some(stream, buf).await.map(Some),
        Some(wait) => match timeout(wait, read_some(stream, buf)).await {
            Ok(n) => n.map(Some),
            Err(_) => Ok(None),
        },
    }
}

thread_local! {
    /// Where reads of all clients of a thread go first: a client that sends nothing holds no memory for what it might send.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into());
}

/// Reads once; 0 is the end.
async fn read_some(stream: &mut (impl AsyncRead + Unpin), buf: &mut BytesMut) -> io::Result<usize> {
    poll_fn(|cx| {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut read = ReadBuf::new(scratch);
            ready!(Pin::new(&mut *stream).poll_read(cx, &mut read))?;
            buf.extend_from_slice(read.filled());
            Poll::Ready(Ok(read.filled().len()))
        })
    })
    .await
}
