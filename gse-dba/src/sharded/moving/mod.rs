//! Several gse_dba in front of the same groups, and slots that move between groups while all of them serve. `topology` is what they agree on, `store` and `keeper`
//! how they do, `mover` moves; `gate` and `peer` are where commands for moving slots go.
//!
//! A leg (slots from one group to another) goes so: the document says that these slots are moving and by whom; every gse_dba sends commands for them to that one
//! from then on, and nothing moves until each of them has said so in the old group, or can't have a lease on it any more. Then the mover copies, with all writes
//! passing its gate; holds the gate for the last keys; writes the new table; opens the gate to the new group; and deletes what is left in the old one.

mod both;
mod end;
pub(crate) mod gate;
mod keeper;
pub(crate) mod lease;
mod mover;
pub(crate) mod peer;
mod store;
pub(crate) mod topology;
pub(crate) mod verbs;
pub(super) mod waiting;

use std::sync::Arc;

use bytes::Bytes;

use super::Group;
use super::route::{self, Route};
use super::slots::slot;
use super::table::Table;
use crate::commands;
use crate::resp::parse::{Limits, Parser};
pub(crate) use gate::{Gate, Side};
pub(crate) use keeper::Keeper;
pub(crate) use peer::Peer;

/// How commands for moving slots get on.
pub(crate) enum Via {
    /// We move them.
    Gate(Arc<Gate>),
    /// Another does.
    Peer(Arc<Peer>),
}

/// What was read from a client under its own limits is not limited again.
pub(super) const UNLIMITED: Limits = Limits {
    max_args: usize::MAX >> 1,
    max_bulk: usize::MAX >> 1,
    max_query: usize::MAX >> 1,
};

/// The one group that all commands in these bytes are for, if there is one.
fn group_of(table: &Table, bytes: &Bytes) -> Option<Arc<Group>> {
    let mut parser = Parser::default();
    parser.buf.extend_from_slice(bytes);
    parser.parse(&UNLIMITED, usize::MAX).ok()?;
    let requests = parser.take();
    let mut only = None;
    for i in 0..requests.len() {
        let a = requests.args(i);
        let g = match route::route(&table.map, commands::find(a.at(0)), a, true) {
            Route::Slot(s) => table.map.group(s),
            Route::Split(_) => {
                let first = table.map.group(slot(a.at(1)));
                let step = if a.is(0, "MSET") { 2 } else { 1 };
                let same = (1..a.len())
                    .step_by(step)
                    .all(|k| table.map.group(slot(a.at(k))) == first);
                same.then_some(first)?
            }
            _ => return None,
        };
        if *only.get_or_insert(g) != g {
            return None;
        }
    }
    table.group(only?).cloned()
}
