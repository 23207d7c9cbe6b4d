//! A set of pieces of one swarm: which of them are had, wanted, shown. Counting is free, and its form on the wire (BEP 3: the first
//! piece is the highest bit of the first byte) is the form in memory.
//!
//! It knows nothing of what the pieces are.

use bytes::{BufMut as _, Bytes, BytesMut};

const BITS: u32 = u64::BITS;

/// A fixed number of bits, and how many of them are set.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Bitmap {
    /// Bit 0 is the highest of the first word. Spare bits of the last word are zero, always.
    words: Vec<u64>,
    len: u32,
    count: u32,
}

/// Why bytes from the wire are not a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BitmapError {
    /// Not as many bytes as the number of pieces asks for.
    #[error("a bitfield of {got} bytes for {pieces} pieces, which take {expected}")]
    Length {
        /// Bytes that came.
        got: usize,
        /// Bytes that there should be.
        expected: usize,
        /// Pieces of the swarm.
        pieces: u32,
    },
    /// Bits beyond the last piece are set.
    #[error("a bitfield with bits set beyond the last of {0} pieces")]
    SpareBits(u32),
}

impl Bitmap {
    /// `len` bits, none set.
    #[must_use]
    pub fn new(len: u32) -> Self {
        Self {
            words: vec![0; len.div_ceil(BITS) as usize],
            len,
            count: 0,
        }
    }

    /// `len` bits, all set.
    #[must_use]
    pub fn full(len: u32) -> Self {
        let mut words = vec![u64::MAX; len.div_ceil(BITS) as usize];
        if let Some(last) = words.last_mut() {
            *last = last_mask(len);
        }
        Self { words, len, count: len }
    }

    /// Number of bits, set or not.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there are no bits at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of bits that are set.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whether all bits are set.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.count == self.len
    }

    /// Whether bit `at` is set; false beyond the end.
    #[must_use]
    pub fn get(&self, at: u32) -> bool {
        at < self.len && self.words[(at / BITS) as usize] & bit(at) != 0
    }

    /// Sets bit `at`; true if it was not set before. Nothing happens beyond the end.
    pub fn set(&mut self, at: u32) -> bool {
        if at >= self.len || self.get(at) {
            return false;
        }
        self.words[(at / BITS) as usize] |= bit(at);
        self.count += 1;
        true
    }

    /// Takes bit `at` back; true if it was set before.
    pub fn clear(&mut self, at: u32) -> bool {
        if !self.get(at) {
            return false;
        }
        self.words[(at / BITS) as usize] &= !bit(at);
        self.count -= 1;
        true
    }

    /// The bits that are set, in order.
    pub fn ones(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().flat_map(|(at, &word)| Ones {
            base: at as u32 * BITS,
            word,
        })
    }

    /// The bits that are not set, in order.
    pub fn zeros(&self) -> impl Iterator<Item = u32> + '_ {
        let last = self.words.len().saturating_sub(1);
        self.words.iter().enumerate().flat_map(move |(at, &word)| Ones {
            base: at as u32 * BITS,
            word: !word & if at == last { last_mask(self.len) } else { u64::MAX },
        })
    }

    /// What is set here and not in `other`. Bits that `other` does not have count as not set there.
    #[must_use]
    pub fn and_not(&self, other: &Bitmap) -> Bitmap {
        let mut words = self.words.clone();
        for (word, not) in words.iter_mut().zip(&other.words) {
            *word &= !not;
        }
        Self {
            count: words.iter().map(|word| word.count_ones()).sum(),
            words,
            len: self.len,
        }
    }

    /// Whether anything is set here that is not set in `other`.
    #[must_use]
    pub fn has_more_than(&self, other: &Bitmap) -> bool {
        self.words
            .iter()
            .enumerate()
            .any(|(at, word)| word & !other.words.get(at).copied().unwrap_or(0) != 0)
    }

    /// Sets whatever is set in `other`, as far as this one reaches.
    pub fn union(&mut self, other: &Bitmap) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
        if let Some(last) = self.words.last_mut() {
            *last &= last_mask(self.len);
        }
        self.count = self.words.iter().map(|word| word.count_ones()).sum();
    }

    /// Bytes that a bitfield for `len` pieces has.
    #[must_use]
    pub fn wire_len(len: u32) -> usize {
        len.div_ceil(8) as usize
    }

    /// Reads a bitfield for `len` pieces; wrong lengths and spare bits are refused, as BEP 3 asks for.
    pub fn from_wire(bytes: &[u8], len: u32) -> Result<Self, BitmapError> {
        let expected = Self::wire_len(len);
        if bytes.len() != expected {
            return Err(BitmapError::Length {
                got: bytes.len(),
                expected,
                pieces: len,
            });
        }
        let words: Vec<u64> = bytes
            .chunks(8)
            .map(|chunk| {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                u64::from_be_bytes(word)
            })
            .collect();
        if words.last().is_some_and(|last| last & !last_mask(len) != 0) {
            return Err(BitmapError::SpareBits(len));
        }
        Ok(Self {
            count: words.iter().map(|word| word.count_ones()).sum(),
            words,
            len,
        })
    }

    /// The bitfield for the wire; also what a resume map keeps.
    #[must_use]
    pub fn to_wire(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.words.len() * 8);
        for word in &self.words {
            out.put_u64(*word);
        }
        out.truncate(Self::wire_len(self.len));
        out.freeze()
    }
}

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bitmap({} of {})", self.count, self.len)
    }
}

fn bit(at: u32) -> u64 {
    1 << (BITS - 1 - at % BITS)
}

/// The bits of the last word that belong to pieces.
fn last_mask(len: u32) -> u64 {
    match len % BITS {
        0 => u64::MAX,
        used => u64::MAX << (BITS - used),
    }
}

struct Ones {
    base: u32,
    word: u64,
}

impl Iterator for Ones {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.word == 0 {
            return None;
        }
        let at = self.word.leading_zeros();
        self.word &= !bit(at);
        Some(self.base + at)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn wire_form_is_that_of_bep_3() {
        let mut map = Bitmap::new(10);
        assert!(map.set(0) && map.set(9) && !map.set(9) && !map.set(10));
        assert_eq!(map.to_wire().as_ref(), [0x80, 0x40]);
        assert_eq!(map.count(), 2);
        assert!(map.clear(0) && !map.clear(0));
        assert_eq!(Bitmap::full(10).to_wire().as_ref(), [0xff, 0xc0]);
    }

    #[test]
    fn spare_bits_and_wrong_lengths_are_refused() {
        assert_eq!(Bitmap::from_wire(&[0, 0x20], 10), Err(BitmapError::SpareBits(10)));
        for bytes in [&[][..], &[0], &[0, 0, 0]] {
            assert!(matches!(
                Bitmap::from_wire(bytes, 10),
                Err(BitmapError::Length { expected: 2, .. })
            ));
        }
        assert!(Bitmap::from_wire(&[], 0).expect("no pieces").is_full());
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(len in 1_u32..300, bits in prop::collection::vec((any::<bool>(), 0_u32..320), 0..200)) {
            let mut map = Bitmap::new(len);
            let mut set = BTreeSet::new();
            for (add, at) in bits {
                if add {
                    prop_assert_eq!(map.set(at), at < len && set.insert(at));
                } else {
                    prop_assert_eq!(map.clear(at), set.remove(&at));
                }
            }
            prop_assert_eq!(map.count() as usize, set.len());
            prop_assert_eq!(map.ones().collect::<Vec<_>>(), set.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(map.zeros().collect::<Vec<_>>(), (0..len).filter(|at| !set.contains(at)).collect::<Vec<_>>());
            prop_assert!(map.ones().all(|at| map.get(at)) && map.zeros().all(|at| !map.get(at)));
            prop_assert_eq!(&Bitmap::from_wire(&map.to_wire(), len).expect("own form"), &map);
            let rest = Bitmap::full(len).and_not(&map);
            prop_assert_eq!(rest.ones().collect::<Vec<_>>(), map.zeros().collect::<Vec<_>>());
            prop_assert_eq!(rest.count(), len - map.count());
            prop_assert_eq!(Bitmap::full(len).has_more_than(&map), !map.is_full());
            prop_assert!(!map.has_more_than(&map));
            let mut all = rest.clone();
            all.union(&map);
            prop_assert!(all.is_full());
        }
    }
}
