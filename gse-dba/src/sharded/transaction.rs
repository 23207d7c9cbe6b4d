//! Transactions over groups: one is bound to the slot of its first key and has a connection of its own to that group. Nothing is sent before there is a key,
//! and a connection that is lost spoils the transaction, not the client's.

use std::sync::Arc;

use bytes::Bytes;

use super::deferred::Kept;
use super::route::{self, Route};
use super::session::{Session, settle, unsent};
use super::{Answer, Fate, Group, Pinned};
use crate::cluster::Cluster;
use crate::cluster::redirect::{Turn, turn};
use crate::cluster::retry::ASKING;
use crate::commands::{self, Run, SUBSCRIBES, Spec, Tx};
use crate::conn::Ended;
use crate::resp::parse::Requests;
use crate::resp::write::Writer;
use crate::single::session::encode;

const MULTI: &[u8] = b"*1\r\n$5\r\nMULTI\r\n";
const DISCARD: &[u8] = b"*1\r\n$7\r\nDISCARD\r\n";
const UNWATCH: &[u8] = b"*1\r\n$7\r\nUNWATCH\r\n";
const EXEC: &[u8] = b"*1\r\n$4\r\nEXEC\r\n";
/// Commands without a key kept before the first with one.
const MAX_WAITING: usize = 10_000;
/// Bytes of one transaction kept to be queued again.
const MAX_LOG: usize = 64 << 20;
/// A slot can move only so fast: a command that has been sent after it so often is not sent again.
const MAX_MOVES: usize = 4;

#[derive(Default)]
struct Queue {
    /// Commands that named no key, until there is one.
    waiting: Vec<Bytes>,
    /// `MULTI` has been sent on the connection.
    begun: bool,
    spoiled: bool,
    writes: bool,
    /// All that was queued, to be queued again where the slot has moved to. None: too much was.
    log: Option<Vec<Bytes>>,
    logged: usize,
}

impl Queue {
    fn keep(&mut self, bytes: &Bytes) {
        self.logged += bytes.len();
        if self.logged > MAX_LOG {
            self.log = None;
        }
        if let Some(log) = &mut self.log {
            log.push(bytes.clone());
        }
    }
}

/// What a client has set up beyond single commands.
#[derive(Default)]
pub(crate) struct Transaction {
    queue: Option<Queue>,
    /// What the transaction, or what is watched, is bound to.
    pub(super) slot: Option<u16>,
    watching: bool,
    /// What was watched can't be known any more: as if it had changed.
    watch_lost: bool,
    pub(super) pinned: Option<(usize, Pinned)>,
    /// To which group that connection leads.
    at: Option<Arc<Group>>,
    /// In front of a cluster.
    kept: Kept,
}

impl Transaction {
    pub(super) fn is_open(&self) -> bool {
        self.queue.is_some()
    }

    pub(super) fn spoil(&mut self) {
        if let Some(q) = &mut self.queue {
            q.spoiled = true;
        }
    }

    pub(super) fn is_watching(&self) -> bool {
        self.watching
    }

    pub(super) fn watches(&mut self, g: usize, pinned: Pinned, asking: bool) {
        self.pinned = Some((g, pinned));
        self.watching = true;
        self.kept.asking = asking;
    }

    /// Ends it, for what it holds to be sent.
    pub(super) fn take_kept(&mut self) -> (Kept, Option<u16>) {
        let t = std::mem::take(self);
        (t.kept, t.slot)
    }

    /// The node that has some of it will not execute it: another gets all of it at `EXEC`.
    fn defer(&mut self) {
        if self.watching {
            self.lost();
        } else {
            self.pinned = None;
            self.kept.all_at_once = true;
        }
    }

    pub(super) fn lost(&mut self) {
        self.pinned = None;
        self.watch_lost |= self.watching;
        self.spoil();
    }

    /// The slot is another group's now. What was watched counts as changed; what was queued is queued again there.
    fn moved(&mut self) {
        self.pinned = None;
        self.at = None;
        self.watch_lost |= self.watching;
        let Some(q) = &mut self.queue else { return };
        q.begun = false;
        match &q.log {
            Some(log) => q.waiting.clone_from(log),
            None => q.spoiled = true,
        }
    }
}

/// Why `EXEC` was not executed, when it is to be tried elsewhere.
fn redirected(answer: &Answer, writes: bool) -> Option<Turn> {
    turn(&answer.replies, &answer.fate, writes)
}

impl Session {
    /// A command about a transaction, or inside one.
    pub(super) async fn transact(
        &mut self,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        let a = requests.args(i);
        if let Some(s) = spec
            && let Run::Tx(tx) = s.run
        {
            if !s.arity_fits(a.len()) {
                self.transaction.spoil();
                out.error(commands::wrong_arity(s).0.as_bytes());
                return Ok(());
            }
            let open = self.transaction.is_open();
            match tx {
                Tx::Multi if open => out.error(b"ERR MULTI calls can not be nested"),
                Tx::Multi => {
                    self.transaction.queue = Some(Queue {
                        log: Some(Vec::new()),
                        ..Queue::default()
                    });
                    out.ok();
                }
                Tx::Watch if open => out.error(b"ERR WATCH inside MULTI is not allowed"),
                Tx::Watch => self.watch(requests, i, s, out).await?,
                Tx::Exec if open => self.exec(out).await?,
                Tx::Exec => out.error(b"ERR EXEC without MULTI"),
                Tx::Discard if open => {
                    self.end(Some(DISCARD)).await;
                    out.ok();
                }
                Tx::Discard => out.error(b"ERR DISCARD without MULTI"),
                Tx::Unwatch if open => return self.queue(requests, i, spec, out).await,
                Tx::Unwatch => {
                    self.end(Some(UNWATCH)).await;
                    out.ok();
                }
            }
            return Ok(());
        }
        self.queue(requests, i, spec, out).await
    }

    fn refuse(&mut self, out: &mut Writer, why: &str) {
        self.transaction.spoil();
        out.error(why.as_bytes());
    }

    async fn queue(
        &mut self,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        let a = requests.args(i);
        let resp3 = out.resp3;
        if let Some(s) = spec {
            if !s.arity_fits(a.len()) {
                self.refuse(out, &commands::wrong_arity(s).0);
                return Ok(());
            }
            if s.is(SUBSCRIBES) {
                self.refuse(
                    out,
                    &format!(
                        "ERR command '{}' is not allowed inside a transaction by gse_dba",
                        s.name
                    ),
                );
                return Ok(());
            }
        }
        let undivided = self.undivided();
        let route = if undivided {
            route::undivided(&self.table.map, spec, a)
        } else {
            route::route(&self.table.map, spec, a, false)
        };
        let slot = match route {
            // One group is all there is: then everything is in one place.
            Route::Slot(_) | Route::Split(_) if undivided => Some(0),
            Route::All(_) | Route::Scan if undivided => None,
            Route::Slot(s) => Some(s),
            Route::Any => None,
            Route::Split(_) => {
                self.sharded.metrics().crossslot();
                self.refuse(out, "CROSSSLOT Keys in request don't hash to the same slot");
                return Ok(());
            }
            Route::All(_) | Route::Scan => {
                self.refuse(
                    out,
                    "ERR this command concerns all groups and can't be part of a transaction, which is in one slot",
                );
                return Ok(());
            }
            Route::Refuse(why) => {
                self.refuse(out, &why);
                return Ok(());
            }
        };
        if let Some(s) = slot {
            if self.transaction.slot.is_some_and(|bound| bound != s) {
                self.sharded.metrics().crossslot();
                self.refuse(out, "CROSSSLOT a transaction, and what it watches, must be in one slot");
                return Ok(());
            }
            self.transaction.slot = Some(s);
        }
        let g = self
            .transaction
            .slot
            .map_or_else(|| self.table.home(), |s| self.table.map.group(s));
        let bytes = match self.in_full(a, g, a.len()) {
            Some(bytes) => bytes.into(),
            None => encode(requests, i),
        };
        let max = self.sharded.cluster().map(Cluster::max_transaction);
        if max.is_some_and(|max| !self.transaction.kept.fits(bytes.len(), max)) {
            self.refuse(
                out,
                "ERR the commands of this transaction are too large together (cluster.max_transaction_bytes)",
            );
            return Ok(());
        }
        let begun = match &mut self.transaction.queue {
            Some(q) => {
                q.writes |= route::writes(spec, a);
                if q.spoiled && q.begun && self.transaction.pinned.is_none() {
                    // Nobody is there any more who could say what is wrong with further commands, and none will be executed.
                    out.simple("QUEUED");
                    return Ok(());
                }
                if !q.begun && slot.is_none() && self.transaction.slot.is_none() {
                    if q.waiting.len() >= MAX_WAITING {
                        self.refuse(out, "ERR too many commands without a key in one transaction");
                        return Ok(());
                    }
                    q.keep(&bytes);
                    q.waiting.push(bytes);
                    out.simple("QUEUED");
                    return Ok(());
                }
                q.begun
            }
            None => return Ok(()),
        };
        if self.transaction.kept.all_at_once {
            self.transaction.kept.add(bytes);
            out.simple("QUEUED");
            return Ok(());
        }
        self.keep_up();
        let is_cluster = max.is_some();
        for _ in 0..MAX_MOVES {
            let begun = begun && self.transaction.queue.as_ref().is_some_and(|q| q.begun);
            if !begun && let Err(why) = self.begin(resp3).await {
                self.refuse(out, &why);
                return Ok(());
            }
            let sharded = self.sharded.clone();
            let Some(group) = self.pinned_to() else { return Ok(()) };
            let t = &mut self.transaction;
            let Some((g, pinned)) = &mut t.pinned else {
                return Ok(());
            };
            let g = *g;
            let answer = group.exchange(pinned, &bytes, 1, false, false).await;
            match answer.fate {
                // Whatever happens to it there, nothing has been executed yet.
                ref fate if is_cluster && turn(&answer.replies, fate, false).is_some() => {
                    t.defer();
                    t.kept.add(bytes);
                    out.simple("QUEUED");
                    return Ok(());
                }
                Fate::Sealed => {
                    if let Some(q) = &mut t.queue {
                        q.keep(&bytes);
                    }
                    match answer.replies.first() {
                        Some(b'+') if is_cluster => t.kept.add(bytes),
                        // The node knows, and another one must not forget it.
                        _ => t.kept.failed |= is_cluster,
                    }
                    out.raw(&answer.replies);
                    return Ok(());
                }
                Fate::Moved => {
                    t.moved();
                    self.table = self.sharded.table();
                }
                _ => {
                    t.lost();
                    out.error(unsent(&sharded, g, "the connection of this transaction was lost").as_bytes());
                    return Ok(());
                }
            }
        }
        self.refuse(
            out,
            "UNAVAILABLE the slot moves from group to group; nothing was executed",
        );
        Ok(())
    }

    /// Lets go of a connection to a group that does not serve the slot any more.
    fn keep_up(&mut self) {
        let t = &self.transaction;
        // A cluster says itself where it is asked wrongly.
        if t.pinned.is_none() || self.sharded.cluster().is_some() {
            return;
        }
        let g = t.slot.map_or_else(|| self.table.home(), |s| self.table.map.group(s));
        let same = matches!((&t.at, self.table.group(g)), (Some(a), Some(b)) if Arc::ptr_eq(a, b));
        if !same {
            self.transaction.moved();
        }
    }

    /// The group to which the transaction's connection leads.
    fn pinned_to(&self) -> Option<Arc<Group>> {
        let (g, _) = self.transaction.pinned.as_ref()?;
        match self.sharded.cluster() {
            Some(_) => self.sharded.group(*g),
            None => self.transaction.at.clone(),
        }
    }

    /// Gets a connection to the group that the transaction is bound to, unless there is one.
    async fn pin(&mut self, resp3: bool) -> Result<(), String> {
        if self.transaction.pinned.is_some() {
            return Ok(());
        }
        let g = self
            .transaction
            .slot
            .map_or_else(|| self.table.home(), |s| self.table.map.group(s));
        let sharded = self.sharded.clone();
        let group = self.table.group(g).cloned().ok_or("ERR there is no such group")?;
        let pinned = group.private(resp3).await.map_err(|why| unsent(&sharded, g, &why))?;
        self.transaction.pinned = Some((g, pinned));
        self.transaction.at = Some(group);
        Ok(())
    }

    /// Begins on the connection, with what has been waiting.
    async fn begin(&mut self, resp3: bool) -> Result<(), String> {
        self.pin(resp3).await?;
        let sharded = self.sharded.clone();
        let group = self.pinned_to();
        let t = &mut self.transaction;
        let (Some(q), Some((g, pinned)), Some(group)) = (&mut t.queue, &mut t.pinned, group) else {
            return Ok(());
        };
        let asking = t.kept.asking;
        let mut bytes = [if asking { ASKING } else { b"" }, MULTI].concat();
        q.waiting.iter().for_each(|w| bytes.extend_from_slice(w));
        let count = 1 + usize::from(asking) + q.waiting.len();
        if sharded.cluster().is_some() {
            q.waiting.drain(..).for_each(|w| t.kept.add(w));
        }
        q.waiting.clear();
        q.begun = true;
        let g = *g;
        let answer = group.exchange(pinned, &bytes, count, false, false).await;
        if answer.fate == Fate::Sealed {
            return Ok(());
        }
        t.lost();
        Err(unsent(&sharded, g, "the connection of this transaction was lost"))
    }

    async fn exec(&mut self, out: &mut Writer) -> Result<(), Ended> {
        for _ in 0..MAX_MOVES {
            self.keep_up();
            if self.try_exec(out).await? {
                return Ok(());
            }
            self.transaction.moved();
            self.table = self.sharded.table();
        }
        self.end(Some(DISCARD)).await;
        out.error(b"UNAVAILABLE the slot moves from group to group; nothing was executed");
        Ok(())
    }

    /// False when the slot has moved meanwhile and nothing was executed.
    async fn try_exec(&mut self, out: &mut Writer) -> Result<bool, Ended> {
        let (spoiled, empty, writes, begun) = match &self.transaction.queue {
            Some(q) => (q.spoiled, q.waiting.is_empty(), q.writes, q.begun),
            None => return Ok(true),
        };
        if self.transaction.watch_lost {
            self.end(Some(DISCARD)).await;
            out.null_array();
            return Ok(true);
        }
        if spoiled {
            self.end(Some(DISCARD)).await;
            out.error(b"EXECABORT Transaction discarded because of previous errors.");
            return Ok(true);
        }
        if self.transaction.kept.all_at_once {
            return self.exec_at_once(None, writes, out).await.map(|()| true);
        }
        if !begun && empty && !self.transaction.watching {
            self.end(None).await;
            out.array(0);
            return Ok(true);
        }
        if !begun && let Err(why) = self.begin(out.resp3).await {
            self.end(None).await;
            out.error(why.as_bytes());
            return Ok(true);
        }
        let sharded = self.sharded.clone();
        let group = self.pinned_to();
        let (Some((g, mut pinned)), Some(group)) = (self.transaction.pinned.take(), group) else {
            self.end(None).await;
            return Ok(true);
        };
        if writes && group.seat.short().is_some() {
            group.seat.patience_ends().await;
        }
        if writes && let Some(why) = group.seat.short() {
            self.transaction.pinned = Some((g, pinned));
            self.end(Some(DISCARD)).await;
            let refused = Answer::without(Fate::Refused(why));
            settle(&sharded, refused, g, true, out)?;
            return Ok(true);
        }
        let answer = group.exchange(&mut pinned, EXEC, 1, true, false).await;
        if answer.fate == Fate::Moved {
            return Ok(false);
        }
        let whole = !matches!(answer.fate, Fate::Lost { .. } | Fate::TooLarge);
        if sharded.cluster().is_some()
            && let Some(why) = redirected(&answer, writes)
        {
            if whole {
                group.give_back(pinned);
            }
            if self.transaction.watching {
                self.end(None).await;
                out.null_array();
                return Ok(true);
            }
            return self.exec_at_once(Some(why), writes, out).await.map(|()| true);
        }
        settle(&sharded, answer, g, writes, out)?;
        if whole {
            group.give_back(pinned);
        }
        self.end(None).await;
        Ok(true)
    }

    /// Ends the transaction and what is watched; `last` tells the group so, when it knows of them.
    async fn end(&mut self, last: Option<&[u8]>) {
        let begun = self.transaction.queue.as_ref().is_some_and(|q| q.begun);
        let watching = self.transaction.watching;
        let at = self.pinned_to();
        let pinned = self.transaction.pinned.take();
        self.transaction = Transaction::default();
        let (Some((_, mut pinned)), Some(group), Some(last)) = (pinned, at, last) else {
            return;
        };
        let last = if last == DISCARD && !begun { UNWATCH } else { last };
        if begun || watching {
            let answer = group.exchange(&mut pinned, last, 1, false, false).await;
            if answer.fate != Fate::Sealed {
                return;
            }
        }
        group.give_back(pinned);
    }

    async fn watch(
        &mut self,
        requests: &Requests,
        i: usize,
        spec: &'static Spec,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        let route = if self.undivided() {
            route::undivided(&self.table.map, Some(spec), requests.args(i))
        } else {
            route::route(&self.table.map, Some(spec), requests.args(i), false)
        };
        let slot = match route {
            Route::Slot(s) if self.transaction.slot.is_none_or(|bound| bound == s) => s,
            Route::Slot(_) => {
                self.sharded.metrics().crossslot();
                out.error(b"CROSSSLOT a transaction, and what it watches, must be in one slot");
                return Ok(());
            }
            Route::Refuse(why) => {
                out.error(why.as_bytes());
                return Ok(());
            }
            _ => return Ok(()),
        };
        if self.transaction.watch_lost {
            out.ok();
            return Ok(());
        }
        let before = self.transaction.slot.replace(slot);
        self.keep_up();
        if let Err(why) = self.pin(out.resp3).await {
            self.transaction.slot = before;
            out.error(why.as_bytes());
            return Ok(());
        }
        let sharded = self.sharded.clone();
        let group = self.pinned_to();
        let t = &mut self.transaction;
        let (Some((g, pinned)), Some(group)) = (&mut t.pinned, group) else {
            return Ok(());
        };
        let g = *g;
        let bytes = encode(requests, i);
        let answer = group.exchange(pinned, &bytes, 1, false, false).await;
        if sharded.cluster().is_some()
            && let Some(why) = turn(&answer.replies, &answer.fate, false)
        {
            self.watch_elsewhere(&bytes, why, out).await;
            return Ok(());
        }
        match answer.fate {
            // Between two groups: as if it had changed at once.
            Fate::Moved => {
                t.watching = true;
                t.moved();
                out.ok();
            }
            Fate::Sealed => {
                self.transaction.watching = true;
                out.raw(&answer.replies);
            }
            _ => {
                self.transaction.lost();
                out.error(unsent(&sharded, g, "the connection was lost").as_bytes());
            }
        }
        Ok(())
    }
}
