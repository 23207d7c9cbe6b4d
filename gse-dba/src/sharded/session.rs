//! One client's way to the groups: what one read has brought is planned, sent to all groups it concerns at once, and answered in order. Transactions are
//! `transaction`'s.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use super::hub::Kind as HubKind;
use super::merge;
use super::moving::Side;
use super::moving::waiting::shortened;
use super::route::{self, Merge, Route, Split};
use super::slots::{MOVING, slot};
use super::table::Table;
use super::transaction::Transaction;
use super::{Answer, Fate, Group, Pinned, Sharded};
use crate::args::Args;
use crate::client::Client;
use crate::cluster::{Cluster, redirect, retry};
use crate::commands::{Run, Spec};
use crate::conn::Ended;
use crate::resp::parse::Requests;
use crate::resp::write::Writer;
use crate::single::session::{encode, push_command};

/// Bytes of a command up to which room is made for several like it.
const ROOM: usize = 512;
/// Room for steps that is kept for the next ones.
const KEPT: usize = 32;

enum Kind {
    One(usize),
    /// For each part its group and which of the keys it is about.
    Parts(Split, Vec<(usize, Vec<u32>)>),
    All(Merge),
    /// A step of an iteration: the group, and its own cursor.
    Scan(usize, Option<u64>),
    /// A command in other words.
    Instead(usize, Vec<u8>),
    /// A script by its digest.
    Digest(usize),
    /// `PUBLISH`: the group, clients here that get it, and subscriptions of this process at the group that it meets.
    Publish(usize, usize, usize),
    /// `PUBSUB NUMSUB` and the like.
    Subscribers(usize, HubKind),
    /// `CONFIG GET`.
    Settings(usize),
    Here(Vec<u8>),
}

struct Step {
    i: usize,
    kind: Kind,
    writes: bool,
    /// Of its keys, when they are in one.
    slot: Option<u16>,
}

/// What goes to one group.
#[derive(Default)]
struct Load {
    bytes: Vec<u8>,
    count: usize,
    writes: bool,
    answer: Option<Answer>,
    ends: Vec<usize>,
    taken: usize,
    /// Answers that were had at a second attempt, by place.
    instead: HashMap<usize, (BytesMut, Fate)>,
}

impl Load {
    fn push(&mut self, bytes: &[u8], writes: bool) {
        if self.bytes.is_empty() {
            self.bytes.reserve(8 * bytes.len().min(ROOM));
        }
        self.bytes.extend_from_slice(bytes);
        self.count += 1;
        self.writes |= writes;
    }

    /// Where a reply is.
    fn bounds(&self, at: usize) -> (usize, usize) {
        let from = at.checked_sub(1).and_then(|i| self.ends.get(i)).copied().unwrap_or(0);
        (from, self.ends.get(at).copied().unwrap_or(from))
    }

    /// A reply as it came at first.
    fn peek(&self, at: usize) -> (&[u8], Fate) {
        let (from, to) = self.bounds(at);
        self.answer.as_ref().map_or((&[], Fate::TooLarge), |a| {
            (a.replies.get(from..to).unwrap_or_default(), a.fate.clone())
        })
    }

    /// The next reply, as far as there is one.
    fn next(&mut self) -> (&[u8], &Fate) {
        const NONE: Fate = Fate::TooLarge;
        let at = self.taken;
        let (from, to) = self.bounds(at);
        self.taken += 1;
        if let Some((reply, fate)) = self.instead.get(&at) {
            return (reply, fate);
        }
        match &self.answer {
            Some(a) => (a.replies.get(from..to).unwrap_or_default(), &a.fate),
            None => (&[], &NONE),
        }
    }
}

pub(crate) struct Session {
    pub(super) sharded: Sharded,
    /// What the batch at hand is planned by.
    pub(super) table: Arc<Table>,
    pub(super) client: Arc<Client>,
    steps: Vec<Step>,
    /// Slots for which a command of several keys is planned.
    several: Vec<u16>,
    pub(super) transaction: Transaction,
}

impl Session {
    pub(crate) fn new(sharded: Sharded, client: Arc<Client>) -> Self {
        Self {
            table: sharded.no_table(),
            sharded,
            client,
            steps: Vec::new(),
            several: Vec::new(),
            transaction: Transaction::default(),
        }
    }

    pub(crate) fn reset(&mut self) {
        self.transaction = Transaction::default();
        self.steps.clear();
    }

    /// A command was refused before it came here: a transaction that is being queued can't be executed any more.
    pub(crate) fn spoil(&mut self) {
        self.transaction.spoil();
    }

    /// Plans request `i`; sends what was planned before when this one goes another way.
    pub(crate) async fn forward(
        &mut self,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        if self.steps.is_empty() {
            self.table = self.sharded.table();
        }
        let done = self.plan(requests, i, spec, out).await;
        self.let_go();
        done
    }

    /// A table that nobody plans by any more must not be taken for one in use.
    fn let_go(&mut self) {
        if self.steps.is_empty() {
            self.table = self.sharded.no_table();
        }
    }

    /// Sends what is planned and takes the replies.
    pub(crate) async fn flush(&mut self, requests: &Requests, out: &mut Writer) -> Result<(), Ended> {
        let done = self.send(requests, out).await;
        self.let_go();
        done
    }

    async fn plan(
        &mut self,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        let a = requests.args(i);
        let is_tx = spec.is_some_and(|s| matches!(s.run, Run::Tx(_)));
        if is_tx || self.transaction.is_open() {
            self.send(requests, out).await?;
            return self.transact(requests, i, spec, out).await;
        }
        if (a.is(0, "SCRIPT") || a.is(0, "FUNCTION")) && a.is(1, "KILL") && a.len() == 2 {
            self.send(requests, out).await?;
            let words: Vec<&[u8]> = a.iter().collect();
            self.kill(&words, out).await;
            return Ok(());
        }
        let route = if self.undivided() {
            route::undivided(&self.table.map, spec, a)
        } else {
            route::route(&self.table.map, spec, a, self.sharded.split_mset())
        };
        if matches!(route, Route::All(_))
            && let Some(s) = spec
        {
            if flushes(s)
                && let Some(moving) = self.table.moving.clone()
            {
                self.send(requests, out).await?;
                self.empty(&moving, &encode(requests, i), a, out).await;
                return Ok(());
            }
            if s.name == "DBSIZE" && self.table.is_moving() {
                self.send(requests, out).await?;
                self.count(out).await;
                return Ok(());
            }
        }
        if let Some(s) = spec
            && s.name == "WAIT"
            && s.arity_fits(a.len())
        {
            // Whatever this client has written and was acknowledged is on so many other copies already.
            let need = self.table.group(self.table.home()).map_or(0, |g| g.seat.need);
            let kind = Kind::Here(format!(":{need}\r\n").into_bytes());
            self.steps.push(Step {
                i,
                kind,
                writes: false,
                slot: None,
            });
            return Ok(());
        }
        if route::blocks(spec, a) {
            match route {
                Route::Slot(_) | Route::Any => {
                    self.send(requests, out).await?;
                    return self.block(requests, i, spec, &route, out).await;
                }
                _ => {}
            }
        }
        if self.table.map.is_strict() {
            self.keep_apart(requests, i, spec, &route, out).await?;
        }
        let map = &self.table.map;
        let slot_of = match route {
            Route::Slot(s) => Some(s),
            _ => None,
        };
        let kind = match route {
            Route::Slot(s) => {
                let g = super::mutants::group(map.group(s), map.groups(), route::writes(spec, a));
                self.script(a, g, a.len())
            }
            Route::Any => match (spec.map_or("", |s| s.name), a.len()) {
                ("PING", 1) => Kind::Here(b"+PONG\r\n".to_vec()),
                ("PING" | "ECHO", 2) => {
                    let mut w = Writer::new(false);
                    w.bulk(a.at(1));
                    Kind::Here(w.buf.to_vec())
                }
                ("CONFIG", _) if a.is(1, "GET") => Kind::Settings(self.table.home()),
                (name, n) => self
                    .channels(name, a)
                    .unwrap_or_else(|| self.script(a, self.table.home(), n)),
            },
            Route::Split(how) => {
                let step = if how == Split::Pairs { 2 } else { 1 };
                let mut parts: Vec<(usize, Vec<u32>)> = Vec::new();
                let mut places: HashMap<usize, usize> = HashMap::new();
                for (n, at) in (1..a.len()).step_by(step).enumerate() {
                    let s = slot(a.at(at));
                    let place = *places.entry(map.part(s)).or_insert(parts.len());
                    match parts.get_mut(place) {
                        Some((_, keys)) => keys.push(n as u32),
                        None => parts.push((map.group(s), vec![n as u32])),
                    }
                }
                Kind::Parts(how, parts)
            }
            Route::All(how) => {
                if a.is(0, "SCRIPT") && a.is(1, "LOAD") && a.len() == 3 {
                    let all = self.table.groups.iter().enumerate();
                    let all = all.map(|(g, group)| (g, group.seat.head().generation));
                    self.sharded.scripts().learn(a.at(2), all);
                } else if a.is(0, "SCRIPT") && a.is(1, "FLUSH") {
                    self.sharded.scripts().flush();
                }
                Kind::All(how)
            }
            Route::Scan => match merge::cursor(a.at(1), self.table.generation()) {
                Some((g, own)) if self.table.is_used(g) && g < map.groups() => Kind::Scan(g, Some(own)),
                // It has gone since.
                Some((g, _)) => match self.table.after(g) {
                    Some(next) => Kind::Scan(next, Some(0)),
                    None => Kind::Here(b"*2\r\n$1\r\n0\r\n*0\r\n".to_vec()),
                },
                None => Kind::Scan(0, None),
            },
            Route::Refuse(why) => {
                if why.starts_with("CROSSSLOT") {
                    self.sharded.metrics().crossslot();
                }
                let mut w = Writer::new(false);
                w.error(why.as_bytes());
                Kind::Here(w.buf.to_vec())
            }
        };
        let writes = route::writes(spec, a);
        self.steps.push(Step {
            i,
            kind,
            writes,
            slot: slot_of.or_else(|| a.is(0, "SPUBLISH").then(|| slot(a.at(1)))),
        });
        Ok(())
    }

    /// In front of a cluster: a command of several keys may have to wait while its slot is on its way, when commands of single keys need not. What comes after it for the
    /// same slot is sent when it is done.
    async fn keep_apart(
        &mut self,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        route: &Route,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        let a = requests.args(i);
        let (slots, several): (Vec<u16>, bool) = match route {
            Route::Slot(s) => (vec![*s], !spec.is_some_and(|s| s.keys.0 == 1 && s.keys.1 == 1)),
            Route::Split(_) => ((1..a.len()).map(|k| slot(a.at(k))).collect(), true),
            _ => return Ok(()),
        };
        if !self.several.is_empty() && slots.iter().any(|s| self.several.contains(s)) {
            self.flush(requests, out).await?;
            self.table = self.sharded.table();
        }
        if several {
            self.several.extend(slots);
        }
        Ok(())
    }

    /// There is one group only, and commands over several slots are permitted as long as that is so.
    pub(super) fn undivided(&self) -> bool {
        self.sharded.any_slots() && self.table.map.groups() == 1
    }

    /// What is to be done with a command about channels.
    fn channels(&self, name: &str, a: Args<'_>) -> Option<Kind> {
        let shard = a.is(0, "SPUBLISH");
        if (name == "PUBLISH" || shard) && a.len() == 3 {
            let kind = if shard { HubKind::Shard } else { HubKind::Channel };
            let (clients, ours) = self.sharded.hub().reach(kind, a.at(1));
            // Every node of a cluster hands it on to the others; the one that we have subscribed at knows best who gets it. A channel does not move.
            let g = if self.table.map.is_strict() && !shard {
                self.table.home()
            } else {
                self.table.owners().group(slot(a.at(1)))
            };
            return Some(Kind::Publish(g, clients, ours));
        }
        if a.is(0, "PUBSUB") && a.is(1, "NUMSUB") {
            return Some(Kind::Subscribers(self.table.home(), HubKind::Channel));
        }
        (a.is(0, "PUBSUB") && a.is(1, "SHARDNUMSUB")).then_some(Kind::Subscribers(self.table.home(), HubKind::Shard))
    }

    /// A command for one group; scripts are remembered, and sent whole where they may not be known.
    fn script(&self, a: Args<'_>, g: usize, n: usize) -> Kind {
        match self.in_full(a, g, n) {
            Some(bytes) => Kind::Instead(g, bytes),
            None if n > 2 && (a.is(0, "EVALSHA") || a.is(0, "EVALSHA_RO")) => Kind::Digest(g),
            None => Kind::One(g),
        }
    }

    /// `EVALSHA` as `EVAL`, for a group that may not have the script.
    pub(super) fn in_full(&self, a: Args<'_>, g: usize, n: usize) -> Option<Vec<u8>> {
        let first = a.at(0).first().map(u8::to_ascii_uppercase);
        if n < 3 || first != Some(b'E') || !a.at(0).get(..4).is_some_and(|e| e.eq_ignore_ascii_case(b"EVAL")) {
            return None;
        }
        let generation = self.table.group(g)?.seat.head().generation;
        if a.is(0, "EVAL") || a.is(0, "EVAL_RO") {
            self.sharded.scripts().learn(a.at(1), std::iter::once((g, generation)));
            return None;
        }
        let body = self.sharded.scripts().instead(a.at(1), g, generation)?;
        let name: &[u8] = if a.is(0, "EVALSHA_RO") { b"EVAL_RO" } else { b"EVAL" };
        let words: Vec<&[u8]> = [name, &body].into_iter().chain(a.iter().skip(2)).collect();
        Some(command(&words))
    }

    async fn send(&mut self, requests: &Requests, out: &mut Writer) -> Result<(), Ended> {
        let steps = std::mem::take(&mut self.steps);
        self.several.clear();
        let (Some(first), Some(last)) = (steps.first(), steps.last()) else {
            return Ok(());
        };
        // The usual case is one group for all of it: then bytes go through as they came.
        if let Kind::One(g) = first.kind
            && steps.iter().all(|s| matches!(s.kind, Kind::One(of) if of == g))
            && last.i - first.i + 1 == steps.len()
            && let Some(bytes) = requests.raw_run(first.i, last.i + 1)
            && let Some(group) = self.table.group(g)
        {
            let writes = steps.iter().any(|s| s.writes);
            let answer = self.ask(g, group, out.resp3, bytes, steps.len(), writes).await;
            let odd = self.sharded.cluster().is_some() && is_odd(&answer);
            if answer.fate == Fate::Sealed && !odd {
                if out.buf.is_empty() {
                    out.buf = answer.replies;
                } else {
                    out.raw(&answer.replies);
                }
                let mut steps = steps;
                steps.clear();
                if steps.capacity() <= KEPT {
                    self.steps = steps;
                }
                return Ok(());
            }
            let mut load = Load {
                ends: merge::ends(&answer.replies, steps.len()),
                answer: Some(answer),
                ..Load::default()
            };
            if odd {
                let mut loads: Vec<Load> = (0..g).map(|_| Load::default()).collect();
                loads.push(load);
                self.follow(requests, &steps, &mut loads, out.resp3).await;
                load = loads.pop().unwrap_or_default();
            }
            for step in &steps {
                one(&self.sharded, &mut load, g, step.writes, out)?;
            }
            return Ok(());
        }
        let mut loads = self.load(requests, &steps);
        if self.sharded.cluster().is_some_and(|c| c.readers().is_some()) {
            self.ask_all(&mut loads, out.resp3).await;
        }
        let mut waiting = Vec::with_capacity(loads.len());
        let moving = loads.len() - 1;
        for (g, load) in loads.iter_mut().enumerate() {
            waiting.push(match self.table.group(if g == moving { MOVING } else { g }) {
                Some(group) if load.count > 0 && load.answer.is_none() => {
                    let bytes = Bytes::from(std::mem::take(&mut load.bytes));
                    Some(
                        group
                            .send(self.client.id, out.resp3, bytes, load.count, load.writes)
                            .await,
                    )
                }
                _ => None,
            });
        }
        for (load, waiting) in loads.iter_mut().zip(waiting) {
            if let Some(waiting) = waiting {
                let answer = waiting
                    .await
                    .unwrap_or_else(|_| Answer::lost(true, "this server is stopping"));
                load.ends = merge::ends(&answer.replies, load.count);
                load.answer = Some(answer);
            }
        }
        let is_odd = |l: &Load| l.answer.as_ref().is_some_and(is_odd);
        if self.sharded.cluster().is_some() && loads.iter().any(is_odd) {
            self.follow(requests, &steps, &mut loads, out.resp3).await;
        }
        let mut steps = steps;
        for step in steps.drain(..) {
            self.answer(requests, step, &mut loads, out)?;
        }
        if steps.capacity() <= KEPT {
            self.steps = steps;
        }
        Ok(())
    }

    /// Asks a group, or for a read one of its copies where that is allowed.
    async fn ask(&self, g: usize, group: &Group, resp3: bool, bytes: Bytes, count: usize, writes: bool) -> Answer {
        if !writes
            && let Some(readers) = self.sharded.cluster().and_then(Cluster::readers)
            && let Some(answer) = readers.read(g, &group.seat, resp3, &bytes, count).await
        {
            return answer;
        }
        let waiting = group.send(self.client.id, resp3, bytes, count, writes).await;
        waiting
            .await
            .unwrap_or_else(|_| Answer::lost(true, "this server is stopping"))
    }

    /// The same for what goes to several groups.
    async fn ask_all(&self, loads: &mut [Load], resp3: bool) {
        let asked = loads
            .iter_mut()
            .enumerate()
            .filter(|(_, l)| l.count > 0)
            .filter_map(|(g, load)| {
                let group = self.table.group(g)?;
                let bytes = Bytes::from(std::mem::take(&mut load.bytes));
                Some(async move {
                    let answer = self.ask(g, group, resp3, bytes, load.count, load.writes).await;
                    load.ends = merge::ends(&answer.replies, load.count);
                    load.answer = Some(answer);
                })
            });
        futures::future::join_all(asked).await;
    }

    /// In front of a cluster: what a node did not execute is asked for again, where it belongs.
    async fn follow(&self, requests: &Requests, steps: &[Step], loads: &mut [Load], resp3: bool) {
        let mut asked = Vec::new();
        let mut taken = vec![0; loads.len()];
        let mut places = Vec::new();
        for step in steps {
            let a = requests.args(step.i);
            let slots: Vec<Option<u16>> = match &step.kind {
                Kind::Parts(how, parts) => {
                    let width = if *how == Split::Pairs { 2 } else { 1 };
                    let first = |keys: &[u32]| keys.first().map(|k| slot(a.at(1 + width * *k as usize)));
                    parts.iter().map(|(_, keys)| first(keys)).collect()
                }
                _ => vec![step.slot],
            };
            let mut part = 0;
            self.each(requests, step, loads.len(), |g, bytes| {
                let at = taken.get_mut(g).map_or(0, |t| std::mem::replace(t, *t + 1));
                let (reply, fate) = loads.get(g).map_or((&[][..], Fate::TooLarge), |l| l.peek(at));
                places.push((g, at));
                asked.push(retry::Asked {
                    group: g,
                    slot: slots.get(part).copied().flatten(),
                    bytes: Bytes::copy_from_slice(bytes),
                    writes: step.writes,
                    reply: BytesMut::from(reply),
                    fate,
                    again: false,
                });
                part += 1;
            });
        }
        retry::follow(&self.sharded, self.client.id, resp3, &mut asked).await;
        for (a, (g, at)) in asked.into_iter().zip(places) {
            if a.again
                && let Some(l) = loads.get_mut(g)
            {
                l.instead.insert(at, (a.reply, a.fate));
            }
        }
    }

    /// What each group gets.
    fn load(&self, requests: &Requests, steps: &[Step]) -> Vec<Load> {
        let groups = self.table.map.groups();
        // The last is for slots on their way.
        let mut loads: Vec<Load> = (0..=groups).map(|_| Load::default()).collect();
        for step in steps {
            if let (Kind::One(g), Some(bytes)) = (&step.kind, requests.raw_bytes(step.i)) {
                // The usual one, as it came.
                if let Some(l) = loads.get_mut((*g).min(groups)) {
                    l.push(bytes, step.writes);
                }
                continue;
            }
            self.each(requests, step, groups, |g, bytes| {
                if let Some(l) = loads.get_mut(g.min(groups)) {
                    l.push(bytes, step.writes);
                }
            });
        }
        loads
    }

    /// The commands that one step is made of, each with its group, in the order in which their answers are taken.
    fn each(&self, requests: &Requests, step: &Step, groups: usize, mut to: impl FnMut(usize, &[u8])) {
        let a = requests.args(step.i);
        match &step.kind {
            Kind::One(g)
            | Kind::Scan(g, None)
            | Kind::Digest(g)
            | Kind::Publish(g, ..)
            | Kind::Subscribers(g, _)
            | Kind::Settings(g) => match requests.raw_bytes(step.i) {
                Some(bytes) => to(*g, bytes),
                None => to(*g, &encode(requests, step.i)),
            },
            Kind::Instead(g, bytes) => to(*g, bytes),
            Kind::All(_) => {
                let bytes = everywhere(a).unwrap_or_else(|| encode(requests, step.i));
                (0..groups)
                    .filter(|g| self.table.is_used(*g))
                    .for_each(|g| to(g, &bytes));
            }
            Kind::Scan(g, Some(own)) => {
                let own = own.to_string();
                let mut words: Vec<&[u8]> = a.iter().collect();
                if let Some(c) = words.get_mut(1) {
                    *c = own.as_bytes();
                }
                to(*g, &command(&words));
            }
            Kind::Parts(how, parts) => {
                for (g, keys) in parts {
                    let mut words = vec![a.at(0)];
                    for k in keys {
                        let k = *k as usize;
                        match how {
                            Split::Pairs => words.extend([a.at(1 + 2 * k), a.at(2 + 2 * k)]),
                            _ => words.push(a.at(1 + k)),
                        }
                    }
                    to(*g, &command(&words));
                }
            }
            Kind::Here(_) => {}
        }
    }

    fn answer(&self, requests: &Requests, step: Step, loads: &mut [Load], out: &mut Writer) -> Result<(), Ended> {
        match step.kind {
            Kind::Here(bytes) => out.raw(&bytes),
            Kind::One(g) | Kind::Instead(g, _) => {
                if let Some(l) = loads.get_mut(g.min(self.table.map.groups())) {
                    one(&self.sharded, l, g, step.writes, out)?;
                }
            }
            Kind::Digest(g) | Kind::Publish(g, ..) | Kind::Subscribers(g, _) | Kind::Settings(g) => {
                let Some(l) = loads.get_mut(g.min(self.table.map.groups())) else {
                    return Ok(());
                };
                let reply = match whole(&self.sharded, l, g, step.writes)? {
                    Ok(reply) => reply,
                    Err(e) => {
                        out.error(e.as_bytes());
                        return Ok(());
                    }
                };
                let a = requests.args(step.i);
                match step.kind {
                    Kind::Publish(_, clients, ours) => merge::published(&reply, clients, ours, out),
                    Kind::Subscribers(_, kind) => {
                        merge::subscribers(&reply, |name| self.sharded.hub().here(kind, name), out);
                    }
                    Kind::Settings(_) => merge::settings(&reply, out),
                    _ => {
                        if reply.starts_with(b"-NOSCRIPT") {
                            self.sharded.scripts().unknown(a.at(1));
                        }
                        out.raw(&reply);
                    }
                }
            }
            Kind::Scan(g, own) => {
                let Some(l) = loads.get_mut(g) else { return Ok(()) };
                match whole(&self.sharded, l, g, step.writes)? {
                    Ok(reply) if own.is_some() => {
                        let shows = |k: &[u8]| self.table.shows(g, k);
                        merge::scanned(&reply, g, self.table.after(g), self.table.generation(), shows, out);
                    }
                    Ok(reply) => out.raw(&reply),
                    Err(e) => out.error(e.as_bytes()),
                }
            }
            Kind::All(how) => {
                let mut replies = Vec::with_capacity(loads.len());
                for (g, l) in loads.iter_mut().take(self.table.map.groups()).enumerate() {
                    if self.table.is_used(g) {
                        let reply = whole(&self.sharded, l, g, step.writes)?;
                        replies.push(match how {
                            // What another group serves is not this one's to show.
                            Merge::Join => reply.map(|r| merge::shown(r, |k| self.table.shows(g, k))),
                            Merge::AnyOf => reply.map(|r| merge::shown_one(r, |k| self.table.shows(g, k))),
                            _ => reply,
                        });
                    }
                }
                match worst(&replies) {
                    Some(e) => out.error(e.as_bytes()),
                    None if how == Merge::Least => {
                        let a = requests.args(step.i);
                        let all: Vec<&[u8]> = replies.iter().flatten().map(AsRef::as_ref).collect();
                        merge::exist(&all, |n| self.sharded.scripts().has(a.at(2 + n)), out);
                    }
                    None => {
                        let all: Vec<&[u8]> = replies.iter().flatten().map(AsRef::as_ref).collect();
                        merge::all(how, &all, out);
                    }
                }
            }
            Kind::Parts(how, parts) => {
                let mut replies = Vec::with_capacity(parts.len());
                for (g, _) in &parts {
                    if let Some(l) = loads.get_mut((*g).min(self.table.map.groups())) {
                        replies.push(whole(&self.sharded, l, *g, step.writes)?);
                    }
                }
                let a = requests.args(step.i);
                match worst(&replies) {
                    Some(e) if replies.iter().any(Result::is_ok) && step.writes => out.error(
                        format!(
                            "{e}; other keys of this command were served: {}",
                            failed_keys(&replies, &parts, a, how)
                        )
                        .as_bytes(),
                    ),
                    Some(e) => out.error(e.as_bytes()),
                    None => {
                        let all: Vec<(&[u8], &[u32])> = replies
                            .iter()
                            .flatten()
                            .map(AsRef::as_ref)
                            .zip(parts.iter().map(|(_, k)| k.as_slice()))
                            .collect();
                        let step = if how == Split::Pairs { 2 } else { 1 };
                        merge::parts(how, &all, (a.len() - 1) / step, out);
                    }
                }
            }
        }
        Ok(())
    }

    async fn block(
        &mut self,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        route: &Route,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        let slot = match route {
            Route::Slot(s) => Some(*s),
            _ => None,
        };
        let (begun, mut bytes) = (Instant::now(), encode(requests, i));
        while !self.block_at(slot, requests, i, spec, &bytes, out).await? {
            // Its slot is on its way to another group: it waits there for as long as is left.
            self.table = self.sharded.table();
            bytes = shortened(requests.args(i), begun.elapsed()).into();
        }
        Ok(())
    }

    /// False when its slot moves and nothing was executed.
    async fn block_at(
        &mut self,
        slot: Option<u16>,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        bytes: &[u8],
        out: &mut Writer,
    ) -> Result<bool, Ended> {
        let g = slot.map_or_else(|| self.table.home(), |s| self.table.map.group(s));
        let writes = route::writes(spec, requests.args(i));
        let sharded = self.sharded.clone();
        let Some(group) = self.table.group(g).cloned() else {
            return Ok(true);
        };
        if writes && group.seat.short().is_some() {
            group.seat.patience_ends().await;
        }
        if writes && let Some(why) = group.seat.short() {
            out.error(told(&sharded, &Fate::Refused(why), &[], g, true).as_bytes());
            return Ok(true);
        }
        let mut pinned = match group.private(out.resp3).await {
            Ok(p) => p,
            Err(why) => {
                out.error(unsent(&sharded, g, &why).as_bytes());
                return Ok(true);
            }
        };
        if pinned.id.is_none() {
            let answer = group
                .exchange(&mut pinned, &command(&[b"CLIENT", b"ID"]), 1, false, false)
                .await;
            pinned.id = merge::number(&answer.replies);
        }
        let client = Arc::clone(&self.client);
        let (answer, woken) = {
            let _counted = sharded.metrics().blocked();
            let _waits = pinned.id.map(|id| client.waits(g, id));
            let id = pinned.id;
            let going = sharded.wait_at(&mut self.table, slot, &group, &mut pinned, bytes);
            tokio::pin!(going);
            tokio::select! {
                biased;
                answer = &mut going => (answer, false),
                () = client.turn.over(), if id.is_some() => {
                    // It is told to give up: what it has got by then it has got, and otherwise it gets nothing.
                    let wake = command(&[b"CLIENT", b"UNBLOCK", id.unwrap_or_default().to_string().as_bytes(), b"TIMEOUT"]);
                    let straight = group.gate().map_or(&group.seat, |gate| &gate.group(Side::Source).seat);
                    if super::everywhere::ask(straight, &wake).await.is_none() {
                        tracing::debug!("a command that waits could not be woken; it ends by itself");
                    }
                    (going.await, true)
                }
            }
        };
        let Some(answer) = answer else { return Ok(false) };
        if woken && answer.fate == Fate::Sealed && crate::single::is_null(&answer.replies) {
            client.turn.disturb();
            group.give_back(pinned);
            return Ok(true);
        }
        settle(&sharded, answer, g, writes, out)?;
        group.give_back(pinned);
        Ok(true)
    }
}

/// Whether a command deletes everything.
fn flushes(spec: &'static Spec) -> bool {
    matches!(spec.name, "FLUSHALL" | "FLUSHDB")
}

/// How a command for all groups goes to them, when it is not as it came: what is gse_dba's own is in another database than the clients' data.
pub(super) fn everywhere(a: Args<'_>) -> Option<Bytes> {
    a.is(0, "FLUSHALL").then(|| {
        let mut words: Vec<&[u8]> = a.iter().collect();
        if let Some(name) = words.first_mut() {
            *name = b"FLUSHDB";
        }
        command(&words).into()
    })
}

/// Whether a node may have refused some of a batch.
fn is_odd(answer: &Answer) -> bool {
    answer.fate != Fate::Sealed || redirect::any_error(&answer.replies)
}

pub(super) fn command(words: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    push_command(&mut out, words.iter().copied());
    out
}

/// Takes back a connection unless something went wrong on it.
pub(super) fn give_back(sharded: &Sharded, g: usize, pinned: Pinned) {
    if let Some(group) = sharded.group(g) {
        group.give_back(pinned);
    }
}

/// Which keys of a command were not served.
fn failed_keys(replies: &[Result<BytesMut, String>], parts: &[(usize, Vec<u32>)], a: Args<'_>, how: Split) -> String {
    let step = if how == Split::Pairs { 2 } else { 1 };
    let names: Vec<String> = replies
        .iter()
        .zip(parts)
        .filter(|(r, _)| r.is_err())
        .flat_map(|(_, (_, keys))| keys.iter())
        .take(8)
        .map(|k| {
            String::from_utf8_lossy(a.at(1 + step * *k as usize))
                .chars()
                .take(64)
                .collect()
        })
        .collect();
    format!("not these: {}", names.join(" "))
}

/// The error that says most: what may have happened before what has not.
fn worst(replies: &[Result<BytesMut, String>]) -> Option<&str> {
    let errors = || replies.iter().filter_map(|r| r.as_ref().err());
    errors()
        .find(|e| e.starts_with("UNCERTAIN"))
        .or_else(|| errors().next())
        .map(String::as_str)
}

fn whole(sharded: &Sharded, load: &mut Load, g: usize, writes: bool) -> Result<Result<BytesMut, String>, Ended> {
    let (reply, fate) = load.next();
    match fate {
        Fate::Sealed => Ok(Ok(BytesMut::from(reply))),
        Fate::TooLarge => Err(Ended::LargeReply),
        fate => Ok(Err(told(sharded, fate, reply, g, writes))),
    }
}

fn one(sharded: &Sharded, load: &mut Load, g: usize, writes: bool, out: &mut Writer) -> Result<(), Ended> {
    let (reply, fate) = load.next();
    match fate {
        Fate::Sealed => out.raw(reply),
        Fate::TooLarge => return Err(Ended::LargeReply),
        fate => out.error(told(sharded, fate, reply, g, writes).as_bytes()),
    }
    Ok(())
}

/// Writes the answer to one command on a private connection.
pub(super) fn settle(sharded: &Sharded, answer: Answer, g: usize, writes: bool, out: &mut Writer) -> Result<(), Ended> {
    match answer.fate {
        Fate::Sealed => out.raw(&answer.replies),
        Fate::TooLarge => return Err(Ended::LargeReply),
        fate => out.error(told(sharded, &fate, &answer.replies, g, writes).as_bytes()),
    }
    Ok(())
}

pub(super) fn unsent(sharded: &Sharded, g: usize, why: &str) -> String {
    let lost = Fate::Lost {
        sent: false,
        reason: why.to_owned(),
    };
    told(sharded, &lost, &[], g, true)
}

/// What a client is told that gets no reply.
pub(super) fn told(sharded: &Sharded, fate: &Fate, reply: &[u8], g: usize, writes: bool) -> String {
    let group = sharded.group(g);
    let (name, need) = group.as_ref().map_or(("", 0), |g| (g.seat.name.as_str(), g.seat.need));
    let m = sharded.metrics();
    let text = match fate {
        // It says itself that nothing was done.
        Fate::Demoted if reply.starts_with(b"-BUSY") => String::from_utf8_lossy(reply.get(1..).unwrap_or_default())
            .trim_end()
            .to_owned(),
        Fate::Sealed | Fate::TooLarge => "ERR the reply was lost".to_owned(),
        Fate::Moved => "UNAVAILABLE the slot has just moved to another group; nothing was executed".to_owned(),
        Fate::Refused(why) => format!("NOREPLICAS {why}; nothing was executed"),
        Fate::Unserved(why) => format!("UNAVAILABLE {why}; nothing was executed, try it again"),
        Fate::Short(n) if writes => format!(
            "UNCERTAIN the primary of group '{name}' has executed this, but {n} of the {need} other copies that it needs have confirmed it in time: it may or may not survive"
        ),
        Fate::Short(_) => {
            format!(
                "UNAVAILABLE what was read from group '{name}' could not be confirmed by enough copies; nothing was changed"
            )
        }
        Fate::Demoted if writes && !reply.starts_with(b"-READONLY") => {
            format!(
                "UNCERTAIN the server that answered for group '{name}' is no primary any more: this may or may not have taken effect"
            )
        }
        Fate::Demoted => format!("UNAVAILABLE group '{name}' is changing its primary; nothing was executed"),
        Fate::Lost { sent: false, reason } => {
            format!("UNAVAILABLE group '{name}' is not reachable ({reason}); the command was not sent")
        }
        Fate::Lost { reason, .. } if writes => format!(
            "UNCERTAIN group '{name}' was lost before it answered ({reason}): this may or may not have taken effect"
        ),
        Fate::Lost { reason, .. } => format!(
            "UNAVAILABLE group '{name}' was lost before it answered ({reason}); nothing was changed by this command"
        ),
    };
    if text.starts_with("UNCERTAIN") {
        m.uncertain();
    } else if text.starts_with("NOREPLICAS") {
        m.noreplicas();
    }
    text
}
