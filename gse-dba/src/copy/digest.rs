//! What a value comes to as one number: the same for equal values whatever holds them, whatever the order where there is none.

use std::collections::HashSet;
use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::LazyLock;

use ahash::RandomState;
use bytes::Bytes;

use super::values::Kind;

/// Nobody chooses values against these: they only have to be the same for both ends.
static SEEDS: LazyLock<[RandomState; 2]> = LazyLock::new(|| {
    [
        RandomState::with_seeds(0x9e37, 0x79b9, 0x7f4a, 0x7c15),
        RandomState::with_seeds(0xbf58, 0x476d, 0x1ce4, 0xe5b9),
    ]
});

/// A value's digest, element by element.
pub(super) struct Digest {
    kind: Kind,
    sum: u128,
    n: u64,
    /// Elements seen, where an iteration may show one twice.
    seen: HashSet<u128>,
}

fn hash(parts: &[&[u8]], place: u64) -> u128 {
    let one = |s: &RandomState| {
        let mut h = s.build_hasher();
        h.write_u64(place);
        for p in parts {
            h.write_u64(p.len() as u64);
            h.write(p);
        }
        u128::from(h.finish())
    };
    one(&SEEDS[0]) << 64 | one(&SEEDS[1])
}

impl Digest {
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            kind,
            sum: hash(&[kind.name().as_bytes()], 0),
            n: 0,
            seen: HashSet::new(),
        }
    }

    /// More of the value, in order where it has one. `pages`: from an iteration that may show an element twice.
    pub(super) fn add(&mut self, items: &[Bytes], pages: bool) {
        let step = if matches!(self.kind, Kind::Hash | Kind::Zset) {
            2
        } else {
            1
        };
        for item in items.chunks(step) {
            let score = item.get(1).filter(|_| self.kind == Kind::Zset).map(|s| number(s));
            let h = match (self.kind, item) {
                (Kind::Zset, [m, _]) => hash(&[m, &score.unwrap_or_default()], 0),
                (Kind::Hash, [f, v]) => hash(&[f, v], 0),
                (Kind::Set, [m]) => hash(&[m], 0),
                (_, [i, ..]) => hash(&[i], self.n + 1),
                _ => continue,
            };
            if pages && !self.seen.insert(h) {
                continue;
            }
            self.n += 1;
            self.sum = self.sum.wrapping_add(h);
        }
    }

    pub(super) fn done(self) -> u128 {
        self.sum.wrapping_add(hash(&[], self.n))
    }
}

/// A score as its number: stores write the same number in different words.
fn number(text: &[u8]) -> [u8; 8] {
    crate::engine::numbers::parse_double(text)
        .unwrap_or(f64::NAN)
        .to_bits()
        .to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: Kind, items: &[&str]) -> u128 {
        let mut d = Digest::new(kind);
        let items: Vec<Bytes> = items.iter().map(|i| Bytes::copy_from_slice(i.as_bytes())).collect();
        d.add(&items, false);
        d.done()
    }

    #[test]
    fn order_counts_where_there_is_one() {
        assert_eq!(of(Kind::Set, &["a", "b"]), of(Kind::Set, &["b", "a"]));
        assert_eq!(
            of(Kind::Hash, &["a", "1", "b", "2"]),
            of(Kind::Hash, &["b", "2", "a", "1"])
        );
        assert_ne!(
            of(Kind::Hash, &["a", "1", "b", "2"]),
            of(Kind::Hash, &["a", "2", "b", "1"])
        );
        assert_ne!(of(Kind::List, &["a", "b"]), of(Kind::List, &["b", "a"]));
        assert_ne!(of(Kind::Set, &["ab"]), of(Kind::Set, &["a", "b"]));
        assert_ne!(of(Kind::Set, &["a"]), of(Kind::List, &["a"]));
        assert_eq!(of(Kind::Zset, &["m", "1"]), of(Kind::Zset, &["m", "1.0"]));
        assert_ne!(of(Kind::Zset, &["m", "1"]), of(Kind::Zset, &["m", "2"]));
        let mut pages = Digest::new(Kind::Set);
        pages.add(&[Bytes::from("a"), Bytes::from("b")], true);
        pages.add(&[Bytes::from("b")], true);
        assert_eq!(pages.done(), of(Kind::Set, &["a", "b"]));
    }
}
