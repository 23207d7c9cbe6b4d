//! Where records come in: from the data socket, and from the agent itself. Nobody who hands a record over ever waits: it goes into the
//! open batch in memory, or is counted as dropped. What happens to it then is the uplink's business.
//!
//! Records of one caller keep their order, and so do those of several callers as far as they are in an order.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::config::DataConfig;
use super::counts::{Reason, Snapshot};
use super::flow::{Flow, Limits, Wake};

/// See the module. Cheap to clone; every clone is the same intake.
#[derive(Debug, Clone)]
pub struct Intake {
    pub(super) shared: Arc<Shared>,
}

/// The flow, and those who wait for it to change.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) flow: Mutex<Flow>,
    /// The link waits for something to send.
    pub(super) to_send: Notify,
    /// The keeper of the spool waits for something to write.
    pub(super) to_keep: Notify,
}

impl Shared {
    pub(super) fn wake(&self) {
        self.to_send.notify_one();
        self.to_keep.notify_one();
    }
}

impl Intake {
    /// An intake of which nothing is sent until an uplink takes it up.
    #[must_use]
    pub fn new(config: &DataConfig) -> Self {
        let limits = Limits {
            batch_bytes: config.batch_bytes,
            memory_bytes: config.memory_bytes,
            linger: config.linger(),
            spool_after: config.spool_after(),
            served: !config.servers.is_empty(),
        };
        Self {
            shared: Arc::new(Shared {
                flow: Mutex::new(Flow::new(limits)),
                to_send: Notify::new(),
                to_keep: Notify::new(),
            }),
        }
    }

    /// Takes one record: `kind` is the message type of the plugin's frame, `utctime` what the plugin wrote there. Never waits.
    ///
    /// # Errors
    /// Why it was dropped; it has been counted.
    pub fn offer(&self, data_id: u32, utctime: u32, kind: u16, payload: &[u8]) -> Result<(), Reason> {
        self.fill().offer(data_id, utctime, kind, payload)
    }

    /// Counts records of `bytes` bytes of payload that the caller had to refuse.
    pub fn refuse(&self, reason: Reason, records: u64, bytes: u64) {
        self.shared.flow.lock().refuse(reason, records, bytes);
    }

    /// For many records in a row: other callers wait while this lives, so it must not live longer than it takes to go through what one
    /// read has brought.
    #[must_use]
    pub fn fill(&self) -> Fill<'_> {
        Fill {
            flow: self.shared.flow.lock(),
            now: Instant::now(),
            wake: Wake::Nobody,
            shared: &self.shared,
        }
    }

    /// The counters at this moment.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.shared.flow.lock().snapshot()
    }

    /// Everything that was taken and not sent, for tests of what feeds the intake. It counts as acknowledged then.
    #[cfg(test)]
    pub(crate) fn take_records(&self) -> Vec<gse_proto::datalink::Record> {
        let mut flow = self.shared.flow.lock();
        let mut records = Vec::new();
        flow.close();
        let mut sent = flow.acked_seq();
        while let super::flow::Next::Batch(batch) = flow.next(sent, Instant::now()) {
            let mut body = batch.body;
            sent = batch.seq;
            while let Some(record) = gse_proto::datalink::take_record(&mut body).expect("own batch") {
                records.push(record);
            }
        }
        flow.acked(sent);
        records
    }
}

/// See [`Intake::fill`].
#[derive(Debug)]
pub struct Fill<'a> {
    flow: MutexGuard<'a, Flow>,
    now: Instant,
    wake: Wake,
    shared: &'a Shared,
}

impl Fill<'_> {
    /// As [`Intake::offer`].
    ///
    /// # Errors
    /// Why it was dropped; it has been counted.
    pub fn offer(&mut self, data_id: u32, utctime: u32, kind: u16, payload: &[u8]) -> Result<(), Reason> {
        let (taken, wake) = self.flow.put(self.now, data_id, utctime, kind, payload);
        if wake == Wake::Everybody {
            self.wake = wake;
        }
        taken
    }

    /// As [`Intake::refuse`].
    pub fn refuse(&mut self, reason: Reason, records: u64, bytes: u64) {
        self.flow.refuse(reason, records, bytes);
    }
}

impl Drop for Fill<'_> {
    fn drop(&mut self) {
        if self.wake == Wake::Everybody {
            self.shared.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::datalink::MAX_PAYLOAD;

    fn intake(change: impl FnOnce(&mut DataConfig)) -> Intake {
        let mut config = DataConfig {
            servers: vec!["127.0.0.1:1".to_owned()],
            ..DataConfig::default()
        };
        change(&mut config);
        Intake::new(&config)
    }

    #[test]
    fn records_are_taken_in_order_and_without_change() {
        // contract: data-plane#49, data-plane#39
        let intake = intake(|config| config.batch_bytes = 4 << 10);
        for n in 0..1_000u32 {
            intake
                .offer(1001, u32::MAX - n, 9, format!("record \u{0} {n}").as_bytes())
                .unwrap();
        }
        assert!(intake.snapshot().adds_up());
        let records = intake.take_records();
        assert_eq!(records.len(), 1_000);
        for (n, record) in records.iter().enumerate() {
            assert_eq!(record.payload, format!("record \u{0} {n}").as_bytes());
            assert_eq!(
                (record.data_id, record.utctime, record.kind),
                (1001, u32::MAX - n as u32, 9)
            );
        }
        assert!(intake.snapshot().adds_up());
    }

    #[test]
    fn the_longest_record_passes_and_a_longer_one_does_no_harm() {
        // contract: data-plane#38
        let intake = intake(|_| ());
        let longest = vec![7u8; MAX_PAYLOAD + 1];
        intake.offer(1, 0, 9, b"before").unwrap();
        assert_eq!(intake.offer(1, 0, 9, &longest), Err(Reason::TooLong));
        intake.offer(1, 0, 9, &longest[..MAX_PAYLOAD]).unwrap();
        assert_eq!(intake.snapshot().counts.dropped(Reason::TooLong), 1);
        let lengths: Vec<usize> = intake
            .take_records()
            .iter()
            .map(|record| record.payload.len())
            .collect();
        assert_eq!(lengths, [6, MAX_PAYLOAD]);
        intake.offer(1, 0, 9, b"").unwrap();
        assert_eq!(intake.take_records().len(), 1);
    }

    #[test]
    fn full_memory_drops_and_counts_and_never_waits() {
        // contract: data-plane#9
        let intake = intake(|config| config.memory_bytes = 64 << 10);
        let mut taken = 0;
        for _ in 0..1_000 {
            match intake.offer(1, 0, 9, &[0; 512]) {
                Ok(()) => taken += 1,
                Err(reason) => assert_eq!(reason, Reason::NoRoom),
            }
        }
        let snapshot = intake.snapshot();
        assert!(snapshot.adds_up());
        assert_eq!(
            (snapshot.in_memory, snapshot.counts.dropped_total()),
            (taken, 1_000 - taken)
        );
        assert!(snapshot.memory_bytes <= (64 << 10) + 528, "{snapshot:?}");
        assert_eq!(intake.take_records().len() as u64, taken);
        assert_eq!(intake.offer(1, 0, 9, &[0; 512]), Ok(()));
    }

    #[test]
    fn with_no_server_records_are_dropped_and_counted() {
        let intake = intake(|config| config.servers.clear());
        assert_eq!(intake.offer(1, 0, 9, b"x"), Err(Reason::NoServer));
        intake.refuse(Reason::NotAllowed, 2, 10);
        let snapshot = intake.snapshot();
        assert!(snapshot.adds_up());
        assert_eq!((snapshot.counts.taken, snapshot.counts.taken_bytes), (3, 11));
    }
}
