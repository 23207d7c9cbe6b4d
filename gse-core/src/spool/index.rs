//! Which segments there are and what is in them, without touching a disk.

use std::collections::VecDeque;

use super::Gone;

/// A segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// Index that it is named after: that of its first entry.
    pub(super) first: u64,
    /// Index of its last entry; below `first`: it has none.
    pub(super) last: u64,
    /// Entries in it, released and damaged ones included.
    pub(super) entries: u64,
    /// What is neither released nor damaged.
    pub(super) live: Gone,
    /// Length of the file.
    pub(super) bytes: u64,
    /// Where the first entry stands that is not released.
    pub(super) front: u64,
}

impl Segment {
    pub(super) fn new(first: u64, header: u64) -> Self {
        Self {
            first,
            last: first.saturating_sub(1),
            entries: 0,
            live: Gone::default(),
            bytes: header,
            front: header,
        }
    }

    /// Another entry stands at its end.
    pub(super) fn push(&mut self, index: u64, records: u32, bytes: u64) {
        self.last = index;
        self.entries += 1;
        self.bytes += bytes;
        self.live.entries += 1;
        self.live.records += u64::from(records);
    }
}

/// All segments, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Index {
    segments: VecDeque<Segment>,
    live: Gone,
    bytes: u64,
    open: bool,
}

impl Index {
    pub(super) fn segments(&self) -> &VecDeque<Segment> {
        &self.segments
    }

    /// What is neither released nor damaged.
    pub(super) fn live(&self) -> Gone {
        self.live
    }

    /// Of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of the segment that is written to.
    pub(super) fn tail_bytes(&self) -> u64 {
        self.segments.back().filter(|_| self.open).map_or(0, |tail| tail.bytes)
    }

    /// The oldest segment.
    pub(super) fn front(&self) -> Option<&Segment> {
        self.segments.front()
    }

    /// A segment that was there already, behind the others.
    pub(super) fn found(&mut self, segment: Segment) {
        self.live.add(segment.live);
        self.bytes += segment.bytes;
        self.segments.push_back(segment);
    }

    /// From now on entries go to this segment.
    pub(super) fn begin(&mut self, segment: Segment) {
        self.close_tail();
        self.found(segment);
        self.open = true;
    }

    /// A last segment without an entry is as if it had never been; whether there was one.
    pub(super) fn drop_empty_tail(&mut self) -> bool {
        let Some(tail) = self.segments.pop_back_if(|tail| tail.entries == 0) else {
            return false;
        };
        self.bytes -= tail.bytes;
        self.open = false;
        true
    }

    /// The last segment gets no more entries.
    pub(super) fn close_tail(&mut self) {
        self.open = false;
    }

    /// An entry was written.
    pub(super) fn push(&mut self, index: u64, records: u32, bytes: u64) {
        if let Some(tail) = self.segments.back_mut() {
            tail.push(index, records, bytes);
            self.bytes += bytes;
            self.live.entries += 1;
            self.live.records += u64::from(records);
        }
    }

    /// Takes the oldest segment out.
    pub(super) fn drop_oldest(&mut self) -> Option<Segment> {
        let segment = self.segments.pop_front()?;
        self.live.entries -= segment.live.entries;
        self.live.records -= segment.live.records;
        self.bytes -= segment.bytes;
        if self.segments.is_empty() {
            self.open = false;
        }
        Some(segment)
    }

    /// Changes one segment, and keeps the sums.
    pub(super) fn change(&mut self, first: u64, change: impl FnOnce(&mut Segment)) {
        let Some(segment) = self.segments.iter_mut().find(|segment| segment.first == first) else {
            return;
        };
        let before = *segment;
        change(segment);
        self.live.entries = self.live.entries - before.live.entries + segment.live.entries;
        self.live.records = self.live.records - before.live.records + segment.live.records;
        self.bytes = self.bytes - before.bytes + segment.bytes;
    }

    /// The segment in which the first entry after `after` stands.
    pub(super) fn holding(&self, after: u64) -> Option<Segment> {
        let at = self.segments.partition_point(|segment| segment.last <= after);
        self.segments.get(at).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Begin,
        Push(u32, u64),
        Drop,
        Part(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Begin),
            (0u32..9, 28u64..99).prop_map(|(records, bytes)| Step::Push(records, bytes)),
            (0u32..9, 28u64..99).prop_map(|(records, bytes)| Step::Push(records, bytes)),
            Just(Step::Drop),
            (0u64..3).prop_map(Step::Part),
        ]
    }

    proptest! {
        /// The sums are those of the segments, and an entry is found where it is, whatever happens.
        #[test]
        fn sums_hold(steps in prop::collection::vec(step(), 0..200)) {
            let mut index = Index::default();
            let mut next = 1;
            for step in steps {
                match step {
                    Step::Begin => index.begin(Segment::new(next, 24)),
                    Step::Push(records, bytes) => {
                        if index.open {
                            index.push(next, records, bytes);
                            next += 2;
                        }
                    }
                    Step::Drop => {
                        index.drop_oldest();
                    }
                    Step::Part(entries) => {
                        if let Some(first) = index.front().map(|segment| segment.first) {
                            index.change(first, |segment| {
                                let gone = entries.min(segment.live.entries);
                                segment.live.entries -= gone;
                                segment.live.records -= gone.min(segment.live.records);
                            });
                        }
                    }
                }
                let mut live = Gone::default();
                for segment in index.segments() {
                    live.add(segment.live);
                }
                prop_assert_eq!(index.live(), live);
                prop_assert_eq!(index.bytes(), index.segments().iter().map(|s| s.bytes).sum::<u64>());
                for segment in index.segments().iter().filter(|s| s.entries > 0) {
                    prop_assert_eq!(index.holding(segment.first - 1).map(|s| s.first), Some(segment.first));
                    prop_assert_eq!(index.holding(segment.last - 1).map(|s| s.first), Some(segment.first));
                }
                prop_assert_eq!(index.holding(next), None);
            }
        }
    }
}
