//! What became of how many records, by data id: in = delivered + waiting + dropped, copies of several routes counted each.
//!
//! A bounded number of ids is counted one by one; the rest is counted together, under id 0.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use gse_core::random::HashMap;
use parking_lot::{Mutex, RwLock};

/// Counts of one id.
#[derive(Debug, Default)]
pub struct IdStats {
    /// Records that came in.
    pub records: AtomicU64,
    /// Bytes of them.
    pub bytes: AtomicU64,
    /// Copies handed to sinks, those that were delivered or dropped since included.
    pub copies: AtomicU64,
    /// Copies that a sink has taken.
    pub delivered: AtomicU64,
    /// Records for which there was no route.
    pub unrouted: AtomicU64,
    dropped: Mutex<BTreeMap<&'static str, u64>>,
}

impl IdStats {
    /// Counts copies that are dropped.
    pub fn drop_copies(&self, reason: &'static str, records: u64) {
        *self.dropped.lock().entry(reason).or_default() += records;
    }

    /// The counts at one moment.
    #[must_use]
    pub fn snapshot(&self) -> IdCounts {
        let dropped: BTreeMap<&'static str, u64> = self.dropped.lock().clone();
        let copies = self.copies.load(Relaxed);
        let delivered = self.delivered.load(Relaxed);
        IdCounts {
            records: self.records.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            unrouted: self.unrouted.load(Relaxed),
            delivered,
            lag: copies.saturating_sub(delivered).saturating_sub(dropped.values().sum()),
            dropped,
        }
    }
}

/// Counts of one id at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct IdCounts {
    /// Records that came in.
    pub records: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Records for which there was no route.
    pub unrouted: u64,
    /// Copies that a sink has taken.
    pub delivered: u64,
    /// Copies that wait in memory or in a spool, of those that this life of the server has seen come in.
    pub lag: u64,
    /// Copies dropped, by reason.
    pub dropped: BTreeMap<&'static str, u64>,
}

/// Counts of all ids.
#[derive(Debug)]
pub struct Stats {
    ids: RwLock<HashMap<u32, Arc<IdStats>>>,
    others: Arc<IdStats>,
    most: usize,
}

impl Stats {
    /// None yet; at most `most` ids one by one.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            ids: RwLock::default(),
            others: Arc::default(),
            most,
        }
    }

    /// The counts of an id.
    #[must_use]
    pub fn id(&self, data_id: u32) -> Arc<IdStats> {
        if let Some(stats) = self.ids.read().get(&data_id) {
            return Arc::clone(stats);
        }
        let mut ids = self.ids.write();
        if ids.len() >= self.most && !ids.contains_key(&data_id) {
            return Arc::clone(&self.others);
        }
        Arc::clone(ids.entry(data_id).or_default())
    }

    /// All counts at about one moment, by id; 0 stands for the ids that are counted together.
    #[must_use]
    pub fn all(&self) -> BTreeMap<u32, IdCounts> {
        let mut all: BTreeMap<u32, IdCounts> = self.ids.read().iter().map(|(id, one)| (*id, one.snapshot())).collect();
        let others = self.others.snapshot();
        if others != IdCounts::default() {
            all.insert(0, others);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_beyond_the_bound_are_counted_together() {
        let stats = Stats::new(2);
        for id in [1, 2, 3, 4, 3] {
            stats.id(id).records.fetch_add(1, Relaxed);
        }
        let all = stats.all();
        assert_eq!(all.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(all[&0].records, 3);
    }

    #[test]
    fn what_is_neither_delivered_nor_dropped_waits() {
        let one = IdStats::default();
        one.copies.fetch_add(10, Relaxed);
        one.delivered.fetch_add(4, Relaxed);
        one.drop_copies("spool_full", 3);
        assert_eq!(one.snapshot().lag, 3);
    }
}
