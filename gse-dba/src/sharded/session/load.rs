//! What goes to one group of all that is planned, and the replies that come back for it. The sending is left to `send`, what replies mean to `answer`.

use std::collections::HashMap;

use bytes::BytesMut;

use super::{Kind, Session, Step, command, everywhere};
use crate::resp::parse::Requests;
use crate::sharded::route::Split;
use crate::sharded::{Answer, Fate};
use crate::single::session::encode;

/// Bytes of a command up to which room is made for several like it.
const ROOM: usize = 512;

/// What goes to one group.
#[derive(Default)]
pub(super) struct Load {
    pub(super) bytes: Vec<u8>,
    pub(super) count: usize,
    pub(super) writes: bool,
    pub(super) answer: Option<Answer>,
    pub(super) ends: Vec<usize>,
    pub(super) taken: usize,
    /// Answers that were had at a second attempt, by place.
    pub(super) instead: HashMap<usize, (BytesMut, Fate)>,
}

impl Load {
    pub(super) fn push(&mut self, bytes: &[u8], writes: bool) {
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
    pub(super) fn peek(&self, at: usize) -> (&[u8], Fate) {
        let (from, to) = self.bounds(at);
        self.answer.as_ref().map_or((&[], Fate::TooLarge), |a| {
            (a.replies.get(from..to).unwrap_or_default(), a.fate.clone())
        })
    }

    /// The next reply, as far as there is one.
    pub(super) fn next(&mut self) -> (&[u8], &Fate) {
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

impl Session {
    /// What each group gets.
    pub(super) fn load(&self, requests: &Requests, steps: &[Step]) -> Vec<Load> {
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
    pub(super) fn each(&self, requests: &Requests, step: &Step, groups: usize, mut to: impl FnMut(usize, &[u8])) {
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
}
