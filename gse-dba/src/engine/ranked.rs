//! The order of a sorted set: (score, member) pairs in buckets of bounded size, so that rank, range and change all cost a short search and a short move.

use std::cmp::Ordering;
use std::sync::Arc;

/// A score and its member.
pub(crate) type Pair = (f64, Arc<[u8]>);

const BUCKET: usize = 256;

/// Pairs in ascending (score, member) order.
#[derive(Default, Debug)]
pub(crate) struct Ranked {
    buckets: Vec<Vec<Pair>>,
    len: usize,
}

fn compare(a: &Pair, score: f64, member: &[u8]) -> Ordering {
    // Scores are never NaN: the commands refuse it.
    a.0.partial_cmp(&score)
        .unwrap_or(Ordering::Equal)
        .then_with(|| a.1.as_ref().cmp(member))
}

impl Ranked {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Bucket and place where `below` turns false for the first time.
    fn place(&self, below: impl Fn(&Pair) -> bool) -> (usize, usize) {
        let b = self.buckets.partition_point(|b| b.last().is_some_and(&below));
        match self.buckets.get(b) {
            Some(bucket) => (b, bucket.partition_point(below)),
            None => (b, 0),
        }
    }

    /// How many pairs are `below`, a predicate that holds for a prefix of the order.
    pub(crate) fn count_below(&self, below: impl Fn(&Pair) -> bool) -> usize {
        let (b, i) = self.place(below);
        self.buckets[..b].iter().map(Vec::len).sum::<usize>() + i
    }

    pub(crate) fn rank(&self, score: f64, member: &[u8]) -> usize {
        self.count_below(|p| compare(p, score, member) == Ordering::Less)
    }

    pub(crate) fn insert(&mut self, score: f64, member: Arc<[u8]>) {
        let (mut b, mut i) = self.place(|p| compare(p, score, &member) == Ordering::Less);
        if b == self.buckets.len() {
            match self.buckets.last() {
                Some(last) => (b, i) = (b - 1, last.len()),
                None => self.buckets.push(Vec::new()),
            }
        }
        let bucket = &mut self.buckets[b];
        bucket.insert(i, (score, member));
        if bucket.len() > BUCKET {
            let upper = bucket.split_off(BUCKET / 2);
            self.buckets.insert(b + 1, upper);
        }
        self.len += 1;
    }

    pub(crate) fn remove(&mut self, score: f64, member: &[u8]) -> bool {
        let (b, i) = self.place(|p| compare(p, score, member) == Ordering::Less);
        let Some(bucket) = self.buckets.get_mut(b) else {
            return false;
        };
        if bucket
            .get(i)
            .is_none_or(|p| compare(p, score, member) != Ordering::Equal)
        {
            return false;
        }
        bucket.remove(i);
        if bucket.is_empty() {
            self.buckets.remove(b);
        }
        self.len -= 1;
        true
    }

    /// Pairs of rank `from..to`, ascending.
    pub(crate) fn range(&self, from: usize, to: usize) -> impl Iterator<Item = &Pair> {
        let (mut b, mut i) = (0, from.min(self.len));
        while let Some(bucket) = self.buckets.get(b)
            && i >= bucket.len()
        {
            i -= bucket.len();
            b += 1;
        }
        self.buckets
            .get(b..)
            .unwrap_or_default()
            .iter()
            .flatten()
            .skip(i)
            .take(to.min(self.len).saturating_sub(from))
    }

    /// Pairs of rank `from..to`, descending.
    pub(crate) fn range_rev(&self, from: usize, to: usize) -> impl Iterator<Item = &Pair> {
        let to = to.min(self.len);
        let mut i = self.len - to;
        let mut b = self.buckets.len();
        while b > 0 && i >= self.buckets[b - 1].len() {
            i -= self.buckets[b - 1].len();
            b -= 1;
        }
        self.buckets[..b]
            .iter()
            .rev()
            .flat_map(|b| b.iter().rev())
            .skip(i)
            .take(to.saturating_sub(from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_as_a_sorted_vector(ops in prop::collection::vec((any::<bool>(), 0u8..40, 0u16..400), 0..1500), from in 0usize..300, n in 0usize..300) {
            let mut ranked = Ranked::default();
            let mut model: Vec<(f64, Vec<u8>)> = Vec::new();
            for (add, score, member) in ops {
                let (score, member) = (f64::from(score), member.to_be_bytes().to_vec());
                let at = model.iter().position(|p| p.0 == score && p.1 == member);
                match (add, at) {
                    (true, None) => { ranked.insert(score, member.as_slice().into()); model.push((score, member)); }
                    (false, at) => {
                        prop_assert_eq!(ranked.remove(score, &member), at.is_some());
                        if let Some(i) = at { model.remove(i); }
                    }
                    _ => {}
                }
            }
            model.sort_by(|a, b| a.partial_cmp(b).unwrap());
            let plain = |p: &Pair| (p.0, p.1.to_vec());
            prop_assert_eq!(ranked.len(), model.len());
            prop_assert_eq!(ranked.range(0, model.len()).map(plain).collect::<Vec<_>>(), model.clone());
            for (i, p) in model.iter().enumerate() { prop_assert_eq!(ranked.rank(p.0, &p.1), i); }
            let (from, to) = (from.min(model.len()), (from + n).min(model.len()));
            let (from, to) = (from.min(to), to);
            prop_assert_eq!(ranked.range(from, to).map(plain).collect::<Vec<_>>(), model[from..to].to_vec());
            let mut rev = model[from..to].to_vec();
            rev.reverse();
            prop_assert_eq!(ranked.range_rev(from, to).map(plain).collect::<Vec<_>>(), rev);
        }
    }
}
