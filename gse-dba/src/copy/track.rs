//! What has changed since it was copied: marks on keys, and for large values on their elements. Bounded: when there are more marks than fit, all keys count as
//! changed, and one comparison of both ends finds out which are.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use super::Filter;
use super::touch::{self, Touch};
use crate::args::Args;
use crate::commands::Spec;

/// Bytes of marks kept at most, with what each costs beside its name.
const MOST: usize = 64 << 20;
const COST: usize = 96;

/// How a key has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// In any way.
    Whole,
    /// In these elements, and in nothing else.
    Elements(HashSet<Bytes>),
}

#[derive(Default)]
struct Marks {
    keys: HashMap<Bytes, Mark>,
    /// Large values without expiry whose elements are marked one by one.
    large: HashSet<Bytes>,
    bytes: usize,
}

impl Marks {
    fn whole(&mut self, key: &[u8]) {
        match self.keys.get_mut(key) {
            Some(Mark::Whole) => {}
            Some(m) => {
                // Its elements do not matter any more, and do not count.
                if let Mark::Elements(of) = std::mem::replace(m, Mark::Whole) {
                    let freed: usize = of.iter().map(|e| e.len() + COST).sum();
                    self.bytes = self.bytes.saturating_sub(freed);
                }
            }
            None => {
                self.bytes += key.len() + COST;
                self.keys.insert(Bytes::copy_from_slice(key), Mark::Whole);
            }
        }
    }

    fn elements(&mut self, key: &[u8], elements: &[&[u8]]) {
        if !self.large.contains(key) {
            return self.whole(key);
        }
        if !self.keys.contains_key(key) {
            self.bytes += key.len() + COST;
            self.keys
                .insert(Bytes::copy_from_slice(key), Mark::Elements(HashSet::new()));
        }
        if let Some(Mark::Elements(of)) = self.keys.get_mut(key) {
            for e in elements {
                if !of.contains(*e) {
                    self.bytes += e.len() + COST;
                    of.insert(Bytes::copy_from_slice(e));
                }
            }
        }
    }

    fn clear(&mut self, key: &[u8]) -> Option<Mark> {
        let mark = self.keys.remove(key)?;
        self.bytes = self.bytes.saturating_sub(key.len() + COST);
        if let Mark::Elements(of) = &mark {
            self.bytes = self.bytes.saturating_sub(of.iter().map(|e| e.len() + COST).sum());
        }
        Some(mark)
    }
}

/// Told of every write that concerns the keys of a copy, once it is answered and before its client is.
pub(crate) struct Tracker {
    filter: Filter,
    marks: Mutex<Marks>,
    flushes: AtomicU64,
    unknown: AtomicU64,
}

impl Tracker {
    pub(crate) fn new(filter: Filter) -> Arc<Self> {
        Arc::new(Self {
            filter,
            marks: Mutex::default(),
            flushes: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
        })
    }

    /// Every key is gone.
    pub(crate) fn touched_all(&self) {
        self.flushes.fetch_add(1, Ordering::SeqCst);
    }

    /// Something has been written and it is not known what: both ends must be compared.
    pub(crate) fn touched_unknown(&self) {
        self.unknown.fetch_add(1, Ordering::SeqCst);
    }

    fn mark(&self, touch: &Touch<'_>) {
        match touch {
            Touch::None => {}
            Touch::All => self.touched_all(),
            Touch::Unknown => self.touched_unknown(),
            Touch::Keys(keys) => {
                let mut marks = self.marks.lock();
                keys.iter().filter(|k| self.filter.has(k)).for_each(|k| marks.whole(k));
                self.bound(&mut marks);
            }
            Touch::Elements(keys, elements) => {
                let mut marks = self.marks.lock();
                keys.iter()
                    .filter(|k| self.filter.has(k))
                    .for_each(|k| marks.elements(k, elements));
                self.bound(&mut marks);
            }
        }
    }

    fn bound(&self, marks: &mut Marks) {
        if marks.bytes > MOST {
            marks.keys.clear();
            marks.bytes = 0;
            self.touched_unknown();
        }
    }

    /// The writes of one batch: they are marked when it is dropped.
    pub(crate) fn batch(self: &Arc<Self>) -> Touches {
        Touches {
            tracker: Arc::clone(self),
            writes: Writes::default(),
        }
    }

    /// Keys that are marked.
    pub(crate) fn len(&self) -> usize {
        self.marks.lock().keys.len()
    }

    /// Whether so much is marked that it would be good to let the copy catch up.
    pub(crate) fn is_full(&self) -> bool {
        self.marks.lock().bytes > MOST / 2
    }

    pub(super) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::SeqCst)
    }

    pub(super) fn unknown(&self) -> u64 {
        self.unknown.load(Ordering::SeqCst)
    }

    /// Marks keys that could not be copied.
    pub(super) fn again<'a>(&self, keys: impl Iterator<Item = &'a Bytes>) {
        let mut marks = self.marks.lock();
        keys.for_each(|k| marks.whole(k));
    }

    pub(super) fn is_marked(&self, key: &[u8]) -> bool {
        self.marks.lock().keys.contains_key(key)
    }

    /// Clears marks, before these keys are read. They are no large values any more unless somebody says so.
    pub(super) fn clear<'a>(&self, keys: impl Iterator<Item = &'a Bytes>) {
        let mut marks = self.marks.lock();
        for k in keys {
            marks.clear(k);
            marks.large.remove(k);
        }
    }

    /// Clears the mark of a large value that is copied from now on; with `elements`, its elements are marked one by one.
    pub(super) fn large(&self, key: &Bytes, elements: bool) {
        let mut marks = self.marks.lock();
        marks.clear(key);
        if elements {
            marks.large.insert(key.clone());
        } else {
            marks.large.remove(key);
        }
    }

    /// Takes marked keys, and clears them.
    pub(super) fn take(&self, most: usize) -> Vec<(Bytes, Mark)> {
        let mut marks = self.marks.lock();
        let keys: Vec<Bytes> = marks.keys.keys().take(most).cloned().collect();
        keys.into_iter()
            .filter_map(|k| marks.clear(&k).map(|m| (k, m)))
            .collect()
    }
}

enum Noted {
    Keys(Vec<Bytes>),
    Elements(Vec<Bytes>, Vec<Bytes>),
    All,
    Unknown,
}

/// What commands may change, for later.
#[derive(Default)]
pub(crate) struct Writes(Vec<Noted>);

impl Writes {
    /// One more command.
    pub(crate) fn add(&mut self, spec: Option<&'static Spec>, a: Args<'_>) {
        let own = |l: Vec<&[u8]>| l.into_iter().map(Bytes::copy_from_slice).collect::<Vec<_>>();
        self.0.push(match touch::of(spec, a) {
            Touch::None => return,
            Touch::All => Noted::All,
            Touch::Unknown => Noted::Unknown,
            Touch::Keys(k) => Noted::Keys(own(k)),
            Touch::Elements(k, e) => Noted::Elements(own(k), own(e)),
        });
    }
}

/// The writes of one batch of commands. They count as done when this is dropped, whatever has become of them.
pub(crate) struct Touches {
    tracker: Arc<Tracker>,
    writes: Writes,
}

impl Touches {
    /// A command of the batch.
    pub(crate) fn add(&mut self, spec: Option<&'static Spec>, a: Args<'_>) {
        self.writes.add(spec, a);
    }

    /// A command that may have changed anything.
    pub(crate) fn add_unknown(&mut self) {
        self.writes.0.push(Noted::Unknown);
    }

    /// Commands that were queued and are executed in this batch; None: it is not known which.
    pub(crate) fn add_all(&mut self, queued: Option<Writes>) {
        match queued {
            Some(w) => self.writes.0.extend(w.0),
            None => self.add_unknown(),
        }
    }
}

impl Drop for Touches {
    fn drop(&mut self) {
        fn refs(l: &[Bytes]) -> Vec<&[u8]> {
            l.iter().map(AsRef::as_ref).collect()
        }
        for n in &self.writes.0 {
            self.tracker.mark(&match n {
                Noted::Keys(k) => Touch::Keys(refs(k)),
                Noted::Elements(k, e) => Touch::Elements(refs(k), refs(e)),
                Noted::All => Touch::All,
                Noted::Unknown => Touch::Unknown,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements<'a>(k: &'a [u8], e: &'a [u8]) -> Touch<'a> {
        Touch::Elements(vec![k], vec![e])
    }

    #[test]
    fn elements_are_marked_one_by_one_only_where_that_was_said() {
        let t = Tracker::new(Filter::all());
        t.mark(&elements(b"h", b"f"));
        assert_eq!(t.take(9), vec![(Bytes::from("h"), Mark::Whole)]);
        let h = Bytes::from("h");
        t.large(&h, true);
        t.mark(&elements(b"h", b"f"));
        t.mark(&elements(b"h", b"g"));
        let want: HashSet<Bytes> = [Bytes::from("f"), Bytes::from("g")].into();
        assert_eq!(t.take(9), vec![(h.clone(), Mark::Elements(want))]);
        t.mark(&elements(b"h", b"f"));
        t.mark(&Touch::Keys(vec![b"h"]));
        t.mark(&elements(b"h", b"g"));
        assert_eq!(
            t.take(9),
            vec![(h.clone(), Mark::Whole)],
            "a deletion is more than its elements"
        );
        t.clear([h.clone()].iter());
        t.mark(&elements(b"h", b"f"));
        assert_eq!(t.take(9), vec![(h, Mark::Whole)]);
        assert_eq!(t.marks.lock().bytes, 0);
    }

    #[test]
    fn too_many_marks_become_one_question() {
        let t = Tracker::new(Filter::all());
        let big = vec![b'x'; 1 << 20];
        for i in 0..80u8 {
            let mut k = big.clone();
            k[0] = i;
            t.mark(&Touch::Keys(vec![&k]));
        }
        assert_eq!(t.unknown(), 1);
        assert!(t.len() < 80 && t.marks.lock().bytes <= MOST);
    }

    #[test]
    fn a_batch_marks_when_it_ends_and_only_what_is_meant() {
        let t = Tracker::new(Filter::slots([crate::sharded::slots::slot(b"a")]));
        let mut b = t.batch();
        b.writes.0.push(Noted::Keys(vec![Bytes::from("a"), Bytes::from("b")]));
        assert_eq!(t.len(), 0);
        drop(b);
        assert_eq!(t.take(9), vec![(Bytes::from("a"), Mark::Whole)]);
        let mut b = t.batch();
        b.add_all(None);
        drop(b);
        assert_eq!(t.unknown(), 1);
    }
}
