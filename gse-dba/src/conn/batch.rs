//! The commands of one read, one after the other: who may, which way each goes, and what the connection has to remember of it. What is the connection's own is done by
//! `own`, the sending is `store`'s, and another store that serves meanwhile is taken up by `follow`.

use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::wire::watched;
use super::{Conn, Ended};
use crate::admin;
use crate::behind::Behind;
use crate::blocking;
use crate::client::Replies;
use crate::commands::{self, Class, OPEN, Run, SUBSCRIBES, Tx};
use crate::copy::{Tracker, Writes};
use crate::engine::db::Refusal;
use crate::engine::{Batch, Op};
use crate::local::After;
use crate::resp::parse::Requests;
use crate::server::Shared;
use crate::sharded::route;

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Conn<S> {
    /// Executes what one read brought. Commands of the connection's own are answered between what goes to the store, never before it.
    pub(super) async fn batch(&mut self, requests: Requests) -> Result<Requests, Ended> {
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
