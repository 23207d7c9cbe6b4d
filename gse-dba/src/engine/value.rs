//! The values a key can have, each keeping count of the memory it is reckoned to take (bytes; an estimate that errs high).

use std::collections::VecDeque;
use std::sync::Arc;

use ahash::RandomState;
use indexmap::{IndexMap, IndexSet};

use super::ranked::Ranked;

/// A field, member or element.
pub(crate) type Blob = Box<[u8]>;

const FIELD: usize = 96;
const MEMBER: usize = 56;
const ELEMENT: usize = 32;
const SCORED: usize = 136;

#[derive(Debug)]
pub(crate) enum Value {
    Str(Vec<u8>),
    Hash(Hash),
    List(List),
    Set(Set),
    Zset(Zset),
}

impl Value {
    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Value::Str(_) => "string",
            Value::Hash(_) => "hash",
            Value::List(_) => "list",
            Value::Set(_) => "set",
            Value::Zset(_) => "zset",
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Value::Str(s) => s.capacity(),
            Value::Hash(h) => h.bytes,
            Value::List(l) => l.bytes,
            Value::Set(s) => s.bytes,
            Value::Zset(z) => z.bytes,
        }
    }

    pub(crate) fn is_empty_collection(&self) -> bool {
        match self {
            Value::Str(_) => false,
            Value::Hash(h) => h.map.is_empty(),
            Value::List(l) => l.items.is_empty(),
            Value::Set(s) => s.set.is_empty(),
            Value::Zset(z) => z.scores.is_empty(),
        }
    }
}

/// A kind of value that commands ask for by type.
pub(crate) trait Kind: Sized {
    fn of(value: &Value) -> Option<&Self>;
    fn of_mut(value: &mut Value) -> Option<&mut Self>;
    fn empty() -> Value;
}

macro_rules! kind {
    ($t:ty, $v:ident) => {
        impl Kind for $t {
            fn of(value: &Value) -> Option<&Self> {
                if let Value::$v(x) = value { Some(x) } else { None }
            }
            fn of_mut(value: &mut Value) -> Option<&mut Self> {
                if let Value::$v(x) = value { Some(x) } else { None }
            }
            fn empty() -> Value {
                Value::$v(<$t>::default())
            }
        }
    };
}
kind!(Vec<u8>, Str);
kind!(Hash, Hash);
kind!(List, List);
kind!(Set, Set);
kind!(Zset, Zset);

#[derive(Default, Debug)]
pub(crate) struct Hash {
    pub(crate) map: IndexMap<Blob, Blob, RandomState>,
    bytes: usize,
}

impl Hash {
    /// True when the field is new.
    pub(crate) fn insert(&mut self, field: &[u8], value: &[u8]) -> bool {
        if let Some(old) = self.map.get_mut(field) {
            self.bytes = self.bytes + value.len() - old.len();
            *old = value.into();
            return false;
        }
        self.bytes += FIELD + field.len() + value.len();
        self.map.insert(field.into(), value.into());
        true
    }

    pub(crate) fn remove(&mut self, field: &[u8]) -> bool {
        let Some((f, v)) = self.map.swap_remove_entry(field) else {
            return false;
        };
        self.bytes -= FIELD + f.len() + v.len();
        true
    }
}

#[derive(Default, Debug)]
pub(crate) struct Set {
    pub(crate) set: IndexSet<Blob, RandomState>,
    bytes: usize,
}

impl Set {
    pub(crate) fn insert(&mut self, member: &[u8]) -> bool {
        if self.set.contains(member) {
            return false;
        }
        self.bytes += MEMBER + member.len();
        self.set.insert(member.into())
    }

    pub(crate) fn remove(&mut self, member: &[u8]) -> bool {
        let removed = self.set.swap_remove(member);
        if removed {
            self.bytes -= MEMBER + member.len();
        }
        removed
    }

    pub(crate) fn remove_at(&mut self, i: usize) -> Option<Blob> {
        let m = self.set.swap_remove_index(i)?;
        self.bytes -= MEMBER + m.len();
        Some(m)
    }
}

#[derive(Default, Debug)]
pub(crate) struct List {
    pub(crate) items: VecDeque<Blob>,
    bytes: usize,
}

impl List {
    pub(crate) fn push(&mut self, left: bool, item: &[u8]) {
        self.bytes += ELEMENT + item.len();
        if left {
            self.items.push_front(item.into())
        } else {
            self.items.push_back(item.into())
        }
    }

    pub(crate) fn pop(&mut self, left: bool) -> Option<Blob> {
        let item = if left {
            self.items.pop_front()
        } else {
            self.items.pop_back()
        }?;
        self.bytes -= ELEMENT + item.len();
        Some(item)
    }

    pub(crate) fn set(&mut self, i: usize, item: &[u8]) {
        if let Some(slot) = self.items.get_mut(i) {
            self.bytes = self.bytes + item.len() - slot.len();
            *slot = item.into();
        }
    }

    pub(crate) fn insert(&mut self, i: usize, item: &[u8]) {
        self.bytes += ELEMENT + item.len();
        self.items.insert(i, item.into());
    }

    /// Keeps `from..to` only.
    pub(crate) fn keep(&mut self, from: usize, to: usize) {
        self.items.truncate(to);
        self.items.drain(..from.min(self.items.len()));
        self.recount();
    }

    /// Removes up to `limit` elements equal to `item`, from the left or the right; returns how many.
    pub(crate) fn remove_equal(&mut self, item: &[u8], limit: usize, left: bool) -> usize {
        let equal = self.items.iter().filter(|x| x.as_ref() == item).count();
        let gone = equal.min(limit);
        // From the right: the first `equal - gone` equal ones stay.
        let mut pass = if left { 0 } else { equal - gone };
        let mut left_to_remove = gone;
        self.items.retain(|x| {
            if x.as_ref() != item {
                return true;
            }
            if pass > 0 {
                pass -= 1;
                return true;
            }
            if left_to_remove > 0 {
                left_to_remove -= 1;
                return false;
            }
            true
        });
        self.recount();
        gone
    }

    fn recount(&mut self) {
        self.bytes = self.items.iter().map(|i| ELEMENT + i.len()).sum();
    }
}

#[derive(Default, Debug)]
pub(crate) struct Zset {
    pub(crate) scores: IndexMap<Arc<[u8]>, f64, RandomState>,
    pub(crate) order: Ranked,
    bytes: usize,
}

impl Zset {
    pub(crate) fn score(&self, member: &[u8]) -> Option<f64> {
        self.scores.get(member).copied()
    }

    /// Sets a member's score; true when the member is new.
    pub(crate) fn insert(&mut self, member: &[u8], score: f64) -> bool {
        // A negative zero is kept as zero, as Redis does in its small form.
        let score = score + 0.0;
        if let Some((_, m, old)) = self.scores.get_full_mut(member) {
            if *old != score {
                let m = Arc::clone(m);
                self.order.remove(*old, member);
                *old = score;
                self.order.insert(score, m);
            }
            return false;
        }
        let m: Arc<[u8]> = member.into();
        self.bytes += SCORED + member.len();
        self.scores.insert(Arc::clone(&m), score);
        self.order.insert(score, m);
        true
    }

    pub(crate) fn remove(&mut self, member: &[u8]) -> Option<f64> {
        let score = self.scores.swap_remove(member)?;
        self.order.remove(score, member);
        self.bytes -= SCORED + member.len();
        Some(score)
    }

    pub(crate) fn rank(&self, member: &[u8]) -> Option<usize> {
        self.score(member).map(|s| self.order.rank(s, member))
    }
}
