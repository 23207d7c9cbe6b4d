//! A fixed set of piece numbers as machine words: what the scheduler walks through millions of times. The wire form and the resume map
//! are [`crate::bitmap`]'s matter.

/// A set of numbers below a fixed bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bits {
    words: Vec<u64>,
    len: u32,
}

impl Bits {
    pub(crate) fn new(len: u32) -> Self {
        Self {
            words: vec![0; len.div_ceil(64) as usize],
            len,
        }
    }

    pub(crate) fn full(len: u32) -> Self {
        let mut bits = Self::new(len);
        for index in 0..len {
            bits.set(index);
        }
        bits
    }

    pub(crate) fn get(&self, index: u32) -> bool {
        self.words
            .get((index / 64) as usize)
            .is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    /// Whether it was new.
    pub(crate) fn set(&mut self, index: u32) -> bool {
        if index >= self.len {
            return false;
        }
        let Some(word) = self.words.get_mut((index / 64) as usize) else {
            return false;
        };
        let bit = 1 << (index % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Whether it was in.
    pub(crate) fn clear(&mut self, index: u32) -> bool {
        let Some(word) = self.words.get_mut((index / 64) as usize) else {
            return false;
        };
        let bit = 1 << (index % 64);
        let was = *word & bit != 0;
        *word &= !bit;
        was
    }

    pub(crate) fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Every member, ascending.
    pub(crate) fn ones(&self) -> impl Iterator<Item = u32> + '_ {
        (0u32..).zip(&self.words).flat_map(|(at, word)| WordOnes {
            left: *word,
            base: at * 64,
        })
    }

    /// Calls `look` with members of `self` that are in none of `without`, from a word at `start` on and around, until it says stop.
    pub(crate) fn walk_without<const N: usize>(
        &self,
        without: [&Bits; N],
        start: u32,
        mut look: impl FnMut(u32) -> bool,
    ) {
        let words = self.words.len();
        if words == 0 {
            return;
        }
        let first = (start / 64) as usize % words;
        // The first word is begun in its middle and ended after the round, so that no number is preferred.
        let low = !0u64 << (start % 64);
        for step in 0..=words {
            let at = (first + step) % words;
            let mut word = self.words.get(at).copied().unwrap_or(0);
            for other in without {
                word &= !other.words.get(at).copied().unwrap_or(0);
            }
            if step == 0 {
                word &= low;
            } else if step == words {
                word &= !low;
            }
            while word != 0 {
                let index = u32::try_from(at).unwrap_or(0) * 64 + word.trailing_zeros();
                word &= word - 1;
                if !look(index) {
                    return;
                }
            }
        }
    }
}

struct WordOnes {
    left: u64,
    base: u32,
}

impl Iterator for WordOnes {
    type Item = u32;
    fn next(&mut self) -> Option<u32> {
        if self.left == 0 {
            return None;
        }
        let bit = self.left.trailing_zeros();
        self.left &= self.left - 1;
        Some(self.base + bit)
    }
}

/// A small generator of random numbers (SplitMix64), so that a seed repeats a whole run. Not for secrets.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 if that is 0.
    pub(crate) fn below(&mut self, end: u32) -> u32 {
        u32::try_from(((self.next() >> 32) * u64::from(end)) >> 32).unwrap_or(0)
    }

    pub(crate) fn shuffle<T>(&mut self, slice: &mut [T]) {
        for at in (1..slice.len()).rev() {
            let other = self.below(u32::try_from(at + 1).unwrap_or(u32::MAX)) as usize;
            slice.swap(at, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_sees_each_member_once() {
        let mut set = Bits::full(200);
        let mut without = Bits::new(200);
        set.clear(7);
        without.set(199);
        let none = Bits::new(200);
        for start in [0, 1, 63, 64, 130, 199] {
            let mut seen = Vec::new();
            set.walk_without([&without, &none], start, |index| {
                seen.push(index);
                true
            });
            assert_eq!(seen.len(), 198, "from {start}");
            assert!(seen[0] >= start || start == 199);
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 198);
            assert!(!seen.contains(&7) && !seen.contains(&199));
        }
        assert_eq!(set.count(), 199);
        assert_eq!(set.ones().count(), 199);
        assert!(!set.set(200) && !set.get(200));
    }
}
