//! Randomness that is handed to whoever needs it: the system's, or one that a seed repeats. And hashed collections whose order a
//! seed repeats, for what is walked through.
//!
//! Keys and secrets are not made with this.

use std::cell::Cell;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, RngExt as _, SeedableRng as _};

/// A source of random numbers. Cheap to clone; every clone is the same source.
#[derive(Clone, Default)]
pub struct Random(Option<Arc<Mutex<StdRng>>>);

impl std::fmt::Debug for Random {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() {
            "Random(seeded)"
        } else {
            "Random(system)"
        })
    }
}

impl Random {
    /// The system's.
    #[must_use]
    pub fn system() -> Self {
        Self(None)
    }

    /// One that gives the same numbers again for the same seed.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self(Some(Arc::new(Mutex::new(StdRng::seed_from_u64(seed)))))
    }

    /// Any number.
    #[must_use]
    pub fn u64(&self) -> u64 {
        match &self.0 {
            None => rand::random(),
            Some(seeded) => seeded.lock().next_u64(),
        }
    }

    /// Any number from 0 (included) to 1 (not included).
    #[must_use]
    pub fn unit(&self) -> f64 {
        match &self.0 {
            None => rand::random(),
            Some(seeded) => seeded.lock().random(),
        }
    }

    /// A number below `end`, or 0 if that is 0.
    #[must_use]
    pub fn below(&self, end: u64) -> u64 {
        // The bias of a remainder is of no weight for what this is used for.
        self.u64().checked_rem(end).unwrap_or(0)
    }

    /// Any time up to `most`.
    #[must_use]
    pub fn up_to(&self, most: Duration) -> Duration {
        most.mul_f64(self.unit())
    }

    /// A wait of half of `time` at least, and all of it at most, so that many who wait do not come at once.
    #[must_use]
    pub fn jittered(&self, time: Duration) -> Duration {
        time.mul_f64(0.5 + self.unit() / 2.0)
    }

    /// Puts a slice into any order.
    pub fn shuffle<T>(&self, slice: &mut [T]) {
        match &self.0 {
            None => slice.shuffle(&mut rand::rng()),
            Some(seeded) => slice.shuffle(&mut *seeded.lock()),
        }
    }
}

thread_local! {
    static FIXED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// From now on, collections made on this thread with [`Hashing`] are walked through in an order that follows from `seed`; `None`: in
/// an order of their own again. For simulations, which have one thread.
pub fn fix_order_on_this_thread(seed: Option<u64>) {
    FIXED.set(seed);
}

/// How a hash map hashes: by keys drawn for it, unless [`fix_order_on_this_thread`] says otherwise.
#[derive(Debug, Clone)]
pub struct Hashing(ahash::RandomState);

impl Default for Hashing {
    fn default() -> Self {
        Self(match FIXED.get() {
            None => ahash::RandomState::new(),
            Some(seed) => ahash::RandomState::with_seeds(seed, !seed, seed.rotate_left(32), 0x243f_6a88_85a3_08d3),
        })
    }
}

impl BuildHasher for Hashing {
    type Hasher = ahash::AHasher;

    fn build_hasher(&self) -> ahash::AHasher {
        self.0.build_hasher()
    }
}

/// A map with [`Hashing`].
pub type HashMap<K, V> = std::collections::HashMap<K, V, Hashing>;
/// A set with [`Hashing`].
pub type HashSet<T> = std::collections::HashSet<T, Hashing>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_numbers_and_orders() {
        // contract: reliability#F18
        let draw = |seed| {
            let random = Random::seeded(seed);
            (random.u64(), random.unit().to_bits(), random.below(1000))
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        let order = |seed| {
            fix_order_on_this_thread(seed);
            let set: HashSet<u32> = (0..100).collect();
            fix_order_on_this_thread(None);
            set.into_iter().collect::<Vec<u32>>()
        };
        assert_eq!(order(Some(1)), order(Some(1)));
        assert_ne!(order(Some(1)), order(Some(2)));
        assert_ne!(order(None), order(None), "drawn for each");
    }

    #[test]
    fn ranges_hold() {
        for random in [Random::system(), Random::seeded(1)] {
            assert!((0..100).all(|_| random.below(3) < 3 && random.unit() < 1.0));
            assert_eq!(random.below(0), 0);
            let most = Duration::from_secs(1);
            assert!((0..100).all(|_| random.up_to(most) <= most));
            assert!((0..100).all(|_| (most / 2..=most).contains(&random.jittered(most))));
            let mut order: Vec<u32> = (0..100).collect();
            random.shuffle(&mut order);
            assert!(!order.is_sorted());
            order.sort_unstable();
            assert_eq!(order, (0..100).collect::<Vec<u32>>());
        }
    }
}
