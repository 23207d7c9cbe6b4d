//! Peers of one swarm and one address family: who they are, when they were heard last, and which of them are told to whom.

use std::hash::Hash;

use gse_core::random::{Hashing, Random};
use indexmap::IndexMap;
use indexmap::map::Entry;

/// Peers that are looked at for each that is told, beside a few, so that an answer costs the same however large the swarm is.
const LOOKS: usize = 4;

type Table<K> = IndexMap<K, Heard, Hashing>;

#[derive(Debug, Clone, Copy)]
struct Heard {
    /// Random part of the peer's id: a peer with two addresses is not told of itself.
    id: u64,
    /// Second of the tracker's clock.
    at: u32,
}

/// Peers by address.
#[derive(Debug)]
pub(super) struct Family<K> {
    seeds: Table<K>,
    leechers: Table<K>,
    /// Where the search for peers that are gone goes on, in each table.
    cursors: [usize; 2],
}

impl<K> Default for Family<K> {
    fn default() -> Self {
        Self {
            seeds: Table::default(),
            leechers: Table::default(),
            cursors: [0, 0],
        }
    }
}

/// Who asks, and for how many.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ask<'k, K> {
    /// Address of the asker, where it is of this family.
    pub(super) from: Option<&'k K>,
    pub(super) id: u64,
    pub(super) seed: bool,
    pub(super) wanted: usize,
    /// Peers last heard before this second count as gone.
    pub(super) alive_since: u32,
}

impl<K: Copy + Eq + Hash> Family<K> {
    pub(super) fn seeds(&self) -> u32 {
        self.seeds.len() as u32
    }

    pub(super) fn leechers(&self) -> u32 {
        self.leechers.len() as u32
    }

    /// Notes that a peer was heard. By how many there are now more; nothing is noted where that may not be (`room` is false).
    pub(super) fn heard(&mut self, key: K, id: u64, seed: bool, at: u32, room: bool) -> usize {
        let (own, other) = match seed {
            true => (&mut self.seeds, &mut self.leechers),
            false => (&mut self.leechers, &mut self.seeds),
        };
        let moved = other.swap_remove(&key).is_some();
        match own.entry(key) {
            Entry::Occupied(mut known) => {
                *known.get_mut() = Heard { id, at };
                0
            }
            Entry::Vacant(new) if moved || room => {
                new.insert(Heard { id, at });
                usize::from(!moved)
            }
            Entry::Vacant(_) => 0,
        }
    }

    /// Forgets a peer; whether it was known. Only who knows its id can have it forgotten.
    pub(super) fn gone(&mut self, key: &K, id: u64) -> bool {
        [&mut self.seeds, &mut self.leechers]
            .into_iter()
            .any(|table| table.get(key).is_some_and(|heard| heard.id == id) && table.swap_remove(key).is_some())
    }

    /// Chooses peers for who asks. A seed is told of leechers alone; a leecher of some seeds, and else of leechers.
    pub(super) fn choose(&self, ask: Ask<'_, K>, random: &Random, mut tell: impl FnMut(K)) {
        let seeds = match ask.seed {
            true => 0,
            false => ask.wanted.div_ceil(4).max(4).min(ask.wanted),
        };
        // What one table lacks, the other may have more of.
        let at_least = ask.wanted.saturating_sub(self.leechers.len());
        let told = if ask.seed {
            0
        } else {
            pick(&self.seeds, seeds.max(at_least), &ask, random, &mut tell)
        };
        pick(&self.leechers, ask.wanted - told, &ask, random, &mut tell);
    }

    /// Forgets peers that were last heard before `alive_since`, looking at no more than `looks`. How many that were, and whether all have
    /// been looked at.
    pub(super) fn expire(&mut self, alive_since: u32, looks: &mut usize) -> (usize, bool) {
        let mut gone = 0;
        for (table, cursor) in [&mut self.seeds, &mut self.leechers].into_iter().zip(&mut self.cursors) {
            while let Some((_, heard)) = table.get_index(*cursor) {
                if *looks == 0 {
                    return (gone, false);
                }
                *looks -= 1;
                if heard.at < alive_since {
                    // The last one takes its place and is looked at next.
                    table.swap_remove_index(*cursor);
                    gone += 1;
                } else {
                    *cursor += 1;
                }
            }
            *cursor = 0;
            if table.capacity() > 64 && table.len() < table.capacity() / 4 {
                table.shrink_to(table.len() * 2);
            }
        }
        (gone, true)
    }
}

/// Tells at most `most` peers of a table: all, or those from two random places on, one in each half.
fn pick<K: Copy + Eq + Hash>(
    table: &Table<K>,
    most: usize,
    ask: &Ask<'_, K>,
    random: &Random,
    tell: &mut impl FnMut(K),
) -> usize {
    let middle = table.len() / 2;
    let mut told = 0;
    for (from, to, until) in [(0, middle, most / 2), (middle, table.len(), most)] {
        let span = to - from;
        let start = random.below(span as u64) as usize;
        let looks = span.min(until.saturating_sub(told) * LOOKS + 16);
        for step in 0..looks {
            if told >= until {
                break;
            }
            let Some((key, heard)) = table.get_index(from + (start + step) % span) else {
                break;
            };
            if heard.at >= ask.alive_since && heard.id != ask.id && ask.from != Some(key) {
                tell(*key);
                told += 1;
            }
        }
    }
    told
}
