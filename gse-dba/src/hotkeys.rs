//! Which keys are used most, about: a sample of all batches goes into a sketch of bounded memory, one for each window of time. Almost nothing is done on the
//! way of a command: most batches only draw a number.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use ahash::RandomState;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::config::Admin;

/// Bytes kept of a key; what is longer is told by these, its length and a hash.
const MAX_KEY: usize = 128;
/// Commands looked at in one sampled batch.
pub(crate) const PER_BATCH: usize = 64;

/// One connection's dice.
pub(crate) struct Dice(u32);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        // Any number but nought; connections must not draw alike.
        Self((seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32 | 1)
    }

    /// True once in `one_in` times; never when that is nought.
    pub(crate) fn falls(&mut self, one_in: u32) -> bool {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        one_in > 0 && self.0.is_multiple_of(one_in)
    }
}

#[derive(Clone, Debug)]
struct Counter {
    key: Box<[u8]>,
    hash: u64,
    count: u64,
    /// How much of `count` may belong to keys that were here before.
    inherited: u64,
}

/// Counts of the most frequent keys of a stream (the "space saving" sketch): a key that is not held takes the place of the rarest, and its count with it. Every
/// key with more than 1/`capacity` of the stream is held.
#[derive(Debug, Default)]
struct Sketch {
    counters: Vec<Counter>,
    by_hash: HashMap<u64, usize, RandomState>,
    total: u64,
}

impl Sketch {
    fn add(&mut self, capacity: usize, hasher: &RandomState, key: &[u8], weight: u64) {
        self.total += weight;
        let hash = hasher.hash_one(key);
        if let Some(counter) = self.by_hash.get(&hash).and_then(|i| self.counters.get_mut(*i)) {
            counter.count += weight;
            return;
        }
        let clipped = || -> Box<[u8]> {
            if key.len() <= MAX_KEY {
                return key.into();
            }
            let mut text = key[..MAX_KEY].to_vec();
            text.extend_from_slice(format!("... ({} bytes, #{hash:016x})", key.len()).as_bytes());
            text.into()
        };
        if self.counters.len() < capacity {
            self.by_hash.insert(hash, self.counters.len());
            self.counters.push(Counter {
                key: clipped(),
                hash,
                count: weight,
                inherited: 0,
            });
            return;
        }
        if let Some((i, rarest)) = self.counters.iter_mut().enumerate().min_by_key(|(_, c)| c.count) {
            self.by_hash.remove(&rarest.hash);
            *rarest = Counter {
                key: clipped(),
                hash,
                count: rarest.count + weight,
                inherited: rarest.count,
            };
            self.by_hash.insert(hash, i);
        }
    }

    /// The first `n` by what they have at the least.
    fn top(&self, n: usize) -> Vec<Value> {
        let mut all: Vec<&Counter> = self.counters.iter().collect();
        all.sort_by_key(|c| std::cmp::Reverse((c.count - c.inherited, c.count)));
        let share = |count: u64| (count as f64 / self.total.max(1) as f64 * 1e4).round() / 1e4;
        all.into_iter()
            .take(n)
            .map(|c| {
                json!({
                    "key": String::from_utf8_lossy(&c.key),
                    "share": share(c.count),
                    "share_at_least": share(c.count - c.inherited),
                    "sampled": c.count,
                })
            })
            .collect()
    }
}

struct Windows {
    since: Instant,
    now: Sketch,
    before: Sketch,
}

/// The sketches of this window and the one before.
pub(crate) struct Hotkeys {
    one_in: u32,
    window: Duration,
    capacity: usize,
    hasher: RandomState,
    windows: Mutex<Windows>,
}

impl Hotkeys {
    pub(crate) fn new(config: &Admin) -> Self {
        Self {
            one_in: config.hotkeys_sample,
            window: Duration::from_secs(config.hotkeys_window_s),
            capacity: config.hotkeys_capacity,
            hasher: RandomState::new(),
            windows: Mutex::new(Windows {
                since: Instant::now(),
                now: Sketch::default(),
                before: Sketch::default(),
            }),
        }
    }

    /// One batch of so many is looked at; nought is none.
    pub(crate) fn one_in(&self) -> u32 {
        self.one_in
    }

    fn turn(&self, w: &mut Windows) {
        let past = w.since.elapsed();
        if past < self.window {
            return;
        }
        let last = std::mem::take(&mut w.now);
        // Nobody came for more than a window: what is known is older than the one before.
        w.before = if past < self.window * 2 {
            last
        } else {
            Sketch::default()
        };
        w.since = Instant::now();
    }

    /// Takes in the keys of a sampled batch, each standing for `weight` commands. When another batch is just taken in, this one is left out.
    pub(crate) fn add<'a>(&self, keys: impl Iterator<Item = &'a [u8]>, weight: u64) {
        let Some(mut w) = self.windows.try_lock() else { return };
        self.turn(&mut w);
        for key in keys {
            w.now.add(self.capacity, &self.hasher, key, weight);
        }
    }

    /// The top `n` of this window and of the whole one before.
    pub(crate) fn json(&self, n: usize) -> Value {
        let mut w = self.windows.lock();
        self.turn(&mut w);
        json!({
            "sampled_one_batch_in": self.one_in,
            "window_s": self.window.as_secs(),
            "now": { "age_s": w.since.elapsed().as_secs(), "sampled": w.now.total, "keys": w.now.top(n) },
            "before": { "sampled": w.before.total, "keys": w.before.top(n) },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hot_keys_are_found_among_many_cold_ones_in_bounded_memory() {
        let hot = Hotkeys::new(&Admin {
            hotkeys_capacity: 64,
            ..Admin::default()
        });
        let long = vec![b'l'; 100_000];
        for i in 0..50_000u64 {
            let cold = format!("cold:{i}");
            let key: &[u8] = match i % 10 {
                0..3 => b"hot:a",
                3 => b"hot:b",
                4 => &long,
                _ => cold.as_bytes(),
            };
            hot.add(std::iter::once(key), 1);
        }
        let told = hot.json(3);
        let keys = told["now"]["keys"].as_array().unwrap();
        assert_eq!(keys[0]["key"], "hot:a");
        let near = |v: &Value, want: f64| (v.as_f64().unwrap() - want).abs() < 0.03;
        assert!(
            near(&keys[0]["share"], 0.3) && near(&keys[0]["share_at_least"], 0.3),
            "{told}"
        );
        let rest: Vec<&str> = keys[1..].iter().map(|k| k["key"].as_str().unwrap()).collect();
        assert!(
            rest.contains(&"hot:b") && rest.iter().any(|k| k.len() < 200 && k.contains("100000 bytes")),
            "{told}"
        );
        let w = hot.windows.lock();
        assert!(w.now.counters.len() == 64 && w.now.by_hash.len() == 64);
        assert_eq!(w.now.counters.iter().map(|c| c.count).sum::<u64>(), 50_000);
    }

    #[test]
    fn windows_pass_and_dice_fall_as_often_as_asked() {
        let hot = Hotkeys::new(&Admin::default());
        hot.add(std::iter::once(&b"k"[..]), 1);
        hot.windows.lock().since -= Duration::from_secs(Admin::default().hotkeys_window_s);
        let told = hot.json(1);
        assert_eq!(
            (&told["now"]["sampled"], &told["before"]["keys"][0]["key"]),
            (&json!(0), &json!("k"))
        );
        hot.windows.lock().since -= Duration::from_secs(2 * Admin::default().hotkeys_window_s);
        assert_eq!(hot.json(1)["before"]["sampled"], json!(0));
        let mut dice = Dice::new(7);
        let n = (0..64_000).filter(|_| dice.falls(64)).count();
        assert!((800..1200).contains(&n), "{n}");
        assert!(!(0..1000).any(|_| dice.falls(0)));
    }
}
