//! The flow in a world of lists: a spool, a link and a server that do what they like, in any order.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Debug, Clone)]
enum Step {
    Put(usize),
    Refuse,
    Wait(u64),
    /// The link sends so many batches.
    Send(usize),
    /// The server acknowledges so many of those sent.
    Ack(usize),
    /// The link is gone: sending begins again behind what is acknowledged.
    Lost,
    /// The keeper begins to write; ends it, all but so many; the spool drops so many.
    Write(bool),
    Written(usize),
    Drop(usize),
    Release,
    Commit,
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0usize..400).prop_map(Step::Put),
        1 => Just(Step::Refuse),
        3 => (0u64..300).prop_map(Step::Wait),
        4 => (1usize..5).prop_map(Step::Send),
        4 => (1usize..4).prop_map(Step::Ack),
        1 => Just(Step::Lost),
        3 => any::<bool>().prop_map(Step::Write),
        3 => (0usize..2).prop_map(Step::Written),
        1 => (1usize..3).prop_map(Step::Drop),
        3 => Just(Step::Release),
        2 => Just(Step::Commit),
        1 => Just(Step::Kill),
    ]
}

/// A spool as a list, a server as a list, and a flow between them.
struct World {
    limits: Limits,
    flow: Flow,
    now: Instant,
    next: u32,
    writing: Vec<Batch>,
    disk: BTreeMap<u64, Batch>,
    released: u64,
    kept: (Kept, u64),
    sent: u64,
    on_way: Vec<u64>,
    /// What the server has, in the order of arrival, and up to where it has said so.
    delivered: Vec<u32>,
    told: u64,
    /// Records that a killed agent had taken, and that its kept counters do not know of.
    unknown: u64,
}

impl World {
    fn deliver(&mut self, batch: &Batch) {
        let mut body = batch.body.clone();
        let mut records = 0;
        while let Some(record) = datalink::take_record(&mut body).unwrap() {
            // Once what it tells of is behind it nothing older comes that it has acknowledged.
            self.delivered.push(record.data_id);
            records += 1;
        }
        assert_eq!(records, batch.records);
        assert!(
            batch.seq > self.sent && batch.seq > self.told,
            "in order, and nothing that was acknowledged"
        );
        self.sent = batch.seq;
        self.on_way.push(batch.seq);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Put(len) => {
                let payload = vec![0; len];
                let full = self.flow.snapshot().memory_bytes >= self.limits.memory_bytes as u64;
                let (taken, _) = self.flow.put(self.now, self.next, 0, 9, &payload);
                assert_eq!(taken.is_err(), full);
                self.next += 1;
            }
            Step::Refuse => self.flow.refuse(Reason::NotAllowed, 2, 9),
            Step::Wait(ms) => self.now += Duration::from_millis(ms),
            Step::Send(count) => {
                for _ in 0..count {
                    match self.flow.next(self.sent, self.now) {
                        Next::Batch(batch) => self.deliver(&batch),
                        Next::Disk => {
                            let from = self.disk.range(self.sent + 1..).next().map(|(_, batch)| batch.clone());
                            match from {
                                Some(batch) => self.deliver(&batch),
                                None => self.sent = self.flow.disk_last(),
                            }
                        }
                        Next::At(at) => assert!(at > self.now),
                        Next::Nothing => {}
                    }
                }
            }
            Step::Ack(count) => {
                for _ in 0..count.min(self.on_way.len()) {
                    self.told = self.on_way.remove(0);
                    self.flow.acked(self.told);
                }
            }
            Step::Lost => {
                self.on_way.clear();
                self.sent = self.flow.acked_seq();
            }
            Step::Write(everything) => {
                if self.writing.is_empty()
                    && let Ok(batches) = self.flow.overdue(self.now, everything, 600)
                {
                    self.writing = batches;
                }
            }
            Step::Written(missing) => {
                let written = self.writing.len().saturating_sub(missing);
                let mut upto = 0;
                for batch in self.writing.drain(..).take(written) {
                    upto = batch.seq;
                    assert!(self.disk.last_key_value().is_none_or(|(last, _)| *last < upto));
                    self.disk.insert(upto, batch);
                }
                self.flow.spooled(upto);
            }
            Step::Drop(count) => {
                for _ in 0..count {
                    if let Some((_, batch)) = self.disk.pop_first() {
                        self.flow.lost(Reason::SpoolFull, u64::from(batch.records));
                    }
                }
            }
            Step::Release => {
                let upto = self.flow.acked_seq();
                let rest = self.disk.split_off(&(upto + 1));
                let records = self.disk.values().map(|batch| u64::from(batch.records)).sum();
                self.disk = rest;
                self.released = upto;
                self.flow.released(records);
            }
            Step::Commit => self.kept = (self.flow.kept(), self.released),
            Step::Kill => {
                // What was released after the last commit comes again, as it may on disk.
                let (kept, acked) = self.kept;
                let records = |batch: &Batch| u64::from(batch.records);
                let found = Found {
                    records: self.disk.values().map(records).sum(),
                    newer: self
                        .disk
                        .range(kept.last_seq + 1..)
                        .map(|(_, batch)| records(batch))
                        .sum(),
                    last_seq: self.disk.last_key_value().map_or(0, |(last, _)| *last),
                    acked,
                };
                let taken = self.flow.snapshot().counts.taken;
                self.flow = Flow::new(self.limits);
                self.flow.restore(&kept, found, kept.last_seq + 1_000, Reason::Killed);
                self.unknown += taken - self.flow.snapshot().counts.taken;
                self.flow.acked(self.told);
                self.writing.clear();
                self.on_way.clear();
                self.sent = self.flow.acked_seq();
                self.kept.0 = self.flow.kept();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever happens in whatever order, every record is in one place, and none comes out of its order.
    #[test]
    fn it_always_adds_up(steps in prop::collection::vec(step(), 0..150)) {
        // contract: reliability#F15, data-plane#49
        let limits = Limits {
            batch_bytes: 500,
            memory_bytes: 3_000,
            linger: Duration::from_millis(5),
            spool_after: Duration::from_millis(200),
            served: true,
        };
        let flow = Flow::new(limits);
        let kept = flow.kept();
        let mut world = World {
            limits,
            flow,
            now: Instant::now(),
            next: 1,
            writing: Vec::new(),
            disk: BTreeMap::new(),
            released: 0,
            kept: (kept, 0),
            sent: 0,
            on_way: Vec::new(),
            delivered: Vec::new(),
            told: 0,
            unknown: 0,
        };
        for step in steps {
            world.step(step);
            let snapshot = world.flow.snapshot();
            prop_assert!(snapshot.adds_up(), "{:?}", snapshot);
            prop_assert_eq!(snapshot.on_disk, world.disk.values().map(|batch| u64::from(batch.records)).sum::<u64>());
            prop_assert!(snapshot.memory_bytes <= 3_000 + 416);
        }
        // In the end everything that can come comes: a link that holds, and acknowledges.
        world.step(Step::Written(0));
        world.step(Step::Wait(10));
        world.step(Step::Lost);
        let mut before = world.delivered.len();
        loop {
            world.step(Step::Send(10));
            world.step(Step::Ack(100));
            world.step(Step::Release);
            if world.delivered.len() == before {
                break;
            }
            before = world.delivered.len();
        }
        prop_assert!(world.flow.is_empty(), "{:?}", world.flow.snapshot());
        prop_assert!(world.flow.snapshot().adds_up());
        // The first time that each record arrives is in the order in which they were taken.
        let mut highest = 0;
        let mut seen = std::collections::BTreeSet::new();
        for id in &world.delivered {
            if seen.insert(*id) {
                prop_assert!(*id > highest, "{} came after {}", id, highest);
                highest = *id;
            }
        }
        let missing = u64::from(world.next - 1) - seen.len() as u64;
        let counts = world.flow.snapshot().counts;
        let dropped = counts.dropped(Reason::NoRoom) + counts.dropped(Reason::SpoolFull) + counts.dropped(Reason::Killed);
        prop_assert!(missing <= dropped + world.unknown);
    }
}
