//! One client's way to the groups: what one read has brought is planned, sent to all groups it concerns at once, and answered in order. Transactions are
//! `transaction`'s.
//!
//! Here is what a session has and what a plan is made of. What a command comes to is decided by `plan`; `load` says which bytes that is for each group, `send` has them
//! answered, `answer` tells the client, and `block` is the way of commands that wait.

mod answer;
mod block;
mod load;
mod plan;
mod send;

use std::sync::Arc;

use bytes::Bytes;

use super::hub::Kind as HubKind;
use super::route::{Merge, Split};
use super::table::Table;
use super::transaction::Transaction;
use super::{Pinned, Sharded};
use crate::args::Args;
use crate::client::Client;
use crate::commands::Spec;
use crate::conn::Ended;
use crate::resp::parse::Requests;
use crate::resp::write::Writer;
use crate::single::session::push_command;
pub(super) use answer::{settle, told, unsent};

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

    /// There is one group only, and commands over several slots are permitted as long as that is so.
    pub(super) fn undivided(&self) -> bool {
        self.sharded.any_slots() && self.table.map.groups() == 1
    }
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
