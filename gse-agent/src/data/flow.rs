//! What becomes of records, as a plain state machine: taken into the open batch, closed and numbered, sent, acknowledged, written to
//! the spool, dropped and counted. It does no input or output and reads no clock.
//!
//! Batches are numbered in the order of their records. The spool holds the older ones, memory the younger: what goes to the spool is
//! always the oldest in memory. A batch is in exactly one of the places, so that [`Flow::snapshot`] adds up whenever it is asked for.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use gse_proto::datalink::{self, MAX_PAYLOAD, RECORD_HEADER};

use super::counts::{Counts, Reason, Snapshot};

/// Buffers kept for the next batches.
const SPARE: usize = 4;

/// Bounds of the flow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// See [`super::DataConfig`]; so all of these.
    pub(super) batch_bytes: usize,
    pub(super) memory_bytes: usize,
    pub(super) linger: Duration,
    pub(super) spool_after: Duration,
    /// Whether there is a server to send to.
    pub(super) served: bool,
}

/// A closed batch.
#[derive(Debug, Clone)]
pub(super) struct Batch {
    pub(super) seq: u64,
    pub(super) records: u32,
    /// As it travels before compression.
    pub(super) body: Bytes,
    /// When its first record came.
    pub(super) since: Instant,
}

#[derive(Debug)]
struct Held {
    batch: Batch,
    /// It is being written to the spool: it stays where it is until that has ended.
    writing: bool,
}

/// What a change means for those who wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wake {
    /// Nothing new.
    Nobody,
    /// The first record of a batch came, or a batch was closed.
    Everybody,
}

/// What the link should send next.
#[derive(Debug)]
pub(super) enum Next {
    /// This batch.
    Batch(Batch),
    /// What the spool has after the last number that was sent.
    Disk,
    /// Nothing before this time.
    At(Instant),
    /// Nothing.
    Nothing,
}

/// What is kept beside the spool, so that numbers and counters go on after a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kept {
    /// Counters without the open batch, which has no number yet.
    pub(super) counts: Counts,
    /// The highest number that was given to a batch.
    pub(super) last_seq: u64,
}

/// What was found on disk after a start.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Found {
    /// Records in the spool.
    pub(super) records: u64,
    /// Those of them that came after the counters were kept for the last time.
    pub(super) newer: u64,
    /// The highest number in the spool.
    pub(super) last_seq: u64,
    /// The highest number that is known to be acknowledged.
    pub(super) acked: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Flow {
    limits: Limits,
    open: BytesMut,
    open_records: u32,
    open_since: Option<Instant>,
    held: VecDeque<Held>,
    held_bytes: usize,
    /// Those of them in batches of one long record.
    long_bytes: usize,
    held_records: u64,
    next_seq: u64,
    acked: u64,
    /// Records in the spool that are not over.
    on_disk: u64,
    /// The highest number in the spool.
    disk_last: u64,
    counts: Counts,
    spare: Vec<BytesMut>,
}

impl Flow {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            open: BytesMut::new(),
            open_records: 0,
            open_since: None,
            held: VecDeque::new(),
            held_bytes: 0,
            long_bytes: 0,
            held_records: 0,
            next_seq: 1,
            acked: 0,
            on_disk: 0,
            disk_last: 0,
            counts: Counts::default(),
            spare: Vec::new(),
        }
    }

    /// Goes on where the agent was before: the counters kept last, the records in the spool, and numbers from `next_seq` on. Records that
    /// the kept counters speak of and that are not there are counted as dropped, for `missing`.
    pub(super) fn restore(&mut self, kept: &Kept, found: Found, next_seq: u64, missing: Reason) {
        let mut counts = kept.counts;
        counts.taken += found.newer;
        let open = counts.open();
        if found.records <= open {
            counts.drop(missing, open - found.records);
        } else {
            // The counters are older than they should be, or lost: what is there was taken.
            counts.taken += found.records - open;
        }
        self.counts = counts;
        self.on_disk = found.records;
        self.disk_last = found.last_seq;
        self.acked = found.acked;
        self.next_seq = next_seq.max(found.last_seq + 1);
    }

    fn memory_bytes(&self) -> usize {
        self.held_bytes + self.open.len()
    }

    /// Takes a record, or counts it as dropped.
    pub(super) fn put(
        &mut self,
        now: Instant,
        data_id: u32,
        utctime: u32,
        kind: u16,
        payload: &[u8],
    ) -> (Result<(), Reason>, Wake) {
        self.counts.taken += 1;
        self.counts.taken_bytes += payload.len() as u64;
        let length = RECORD_HEADER + payload.len();
        // Long records have room of their own: one of them must not cost the short ones theirs.
        let used = if length > self.limits.batch_bytes {
            self.long_bytes
        } else {
            self.memory_bytes() - self.long_bytes
        };
        let refused = if payload.len() > MAX_PAYLOAD {
            Some(Reason::TooLong)
        } else if !self.limits.served {
            Some(Reason::NoServer)
        } else if used >= self.limits.memory_bytes {
            Some(Reason::NoRoom)
        } else {
            None
        };
        if let Some(reason) = refused {
            self.counts.drop(reason, 1);
            return (Err(reason), Wake::Nobody);
        }
        let mut wake = Wake::Nobody;
        if self.open.len() + length > self.limits.batch_bytes && self.open_records > 0 {
            self.close();
            wake = Wake::Everybody;
        }
        if self.open_records == 0 {
            self.open_since = Some(now);
            wake = Wake::Everybody;
            if self.open.capacity() < length.max(self.limits.batch_bytes) {
                self.open = match self.spare.pop() {
                    Some(spare) if length <= spare.capacity() => spare,
                    _ => BytesMut::with_capacity(length.max(self.limits.batch_bytes)),
                };
            }
        }
        datalink::put_record(&mut self.open, data_id, utctime, kind, payload);
        self.open_records += 1;
        if self.open.len() >= self.limits.batch_bytes {
            self.close();
            wake = Wake::Everybody;
        }
        (Ok(()), wake)
    }

    /// Counts records that somebody else had to refuse.
    pub(super) fn refuse(&mut self, reason: Reason, records: u64, bytes: u64) {
        self.counts.taken += records;
        self.counts.taken_bytes += bytes;
        self.counts.drop(reason, records);
    }

    /// Closes the open batch if it has a record.
    pub(super) fn close(&mut self) {
        let Some(since) = self.open_since.take() else { return };
        let body = if self.open.len() * 2 < self.open.capacity() {
            // A quiet host: the large buffer stays, so that memory is what the records take.
            let body = Bytes::copy_from_slice(&self.open);
            self.open.clear();
            body
        } else {
            std::mem::take(&mut self.open).freeze()
        };
        self.held_bytes += body.len();
        if body.len() > self.limits.batch_bytes {
            self.long_bytes += body.len();
        }
        self.held_records += u64::from(self.open_records);
        self.held.push_back(Held {
            batch: Batch {
                seq: self.next_seq,
                records: self.open_records,
                body,
                since,
            },
            writing: false,
        });
        self.open_records = 0;
        self.next_seq += 1;
    }

    /// Closes the open batch if its first record has waited long enough; when to ask again if it has not.
    pub(super) fn close_due(&mut self, now: Instant) -> Option<Instant> {
        let due = self.open_since? + self.limits.linger;
        if due > now {
            return Some(due);
        }
        self.close();
        None
    }

    /// What comes after the batch with the number `sent`.
    pub(super) fn next(&mut self, sent: u64, now: Instant) -> Next {
        if self.on_disk > 0 && sent < self.disk_last {
            return Next::Disk;
        }
        let due = self.close_due(now);
        let at = self.held.partition_point(|held| held.batch.seq <= sent);
        match (self.held.get(at), due) {
            (Some(held), _) => Next::Batch(held.batch.clone()),
            (None, Some(due)) => Next::At(due),
            (None, None) => Next::Nothing,
        }
    }

    /// A server has everything up to this number. What of it is in the spool is counted when the spool has let go of it.
    pub(super) fn acked(&mut self, seq: u64) {
        self.acked = self.acked.max(seq);
        // Numbers go on behind what a server knows, also when this host's memory of them is older.
        self.next_seq = self.next_seq.max(self.acked + 1);
        while let Some(held) = self.held.front() {
            if held.writing || held.batch.seq > self.acked {
                break;
            }
            self.counts.acknowledged += u64::from(held.batch.records);
            self.unhold();
        }
    }

    /// Takes the oldest batch out of memory.
    fn unhold(&mut self) {
        let Some(held) = self.held.pop_front() else { return };
        let bytes = held.batch.body.len();
        self.held_bytes -= bytes;
        if bytes > self.limits.batch_bytes {
            self.long_bytes -= bytes;
        }
        self.held_records -= u64::from(held.batch.records);
        if let Ok(mut buffer) = held.batch.body.try_into_mut()
            && self.spare.len() < SPARE
            && (self.limits.batch_bytes..=2 * self.limits.batch_bytes).contains(&buffer.capacity())
        {
            buffer.clear();
            self.spare.push(buffer);
        }
    }

    /// The batches that should be in the spool by now, the oldest first, `most` bytes of them or one; or when to ask again. They stay
    /// in memory until [`Flow::spooled`].
    pub(super) fn overdue(
        &mut self,
        now: Instant,
        everything: bool,
        most: usize,
    ) -> Result<Vec<Batch>, Option<Instant>> {
        let linger = if everything {
            self.close();
            None
        } else {
            self.close_due(now)
        };
        let mut later = self.open_since.map(|since| since + self.limits.spool_after).max(linger);
        let mut batches = Vec::new();
        let (mut bytes, mut left) = (0, self.memory_bytes());
        for held in &mut self.held {
            let batch = &held.batch;
            if batch.seq <= self.acked {
                continue;
            }
            // Memory that is half full is emptied early: the disk is to be ahead of the plugins.
            let due = batch.since + self.limits.spool_after;
            if !everything && due > now && left < self.limits.memory_bytes / 2 {
                later = Some(due);
                break;
            }
            if bytes > 0 && bytes + batch.body.len() > most {
                break;
            }
            bytes += batch.body.len();
            left -= batch.body.len();
            held.writing = true;
            batches.push(held.batch.clone());
        }
        if batches.is_empty() { Err(later) } else { Ok(batches) }
    }

    /// Of the batches that were to be written those up to `seq` are in the spool, the others are not.
    pub(super) fn spooled(&mut self, seq: u64) {
        while let Some(held) = self.held.front() {
            if !held.writing || held.batch.seq > seq {
                break;
            }
            self.on_disk += u64::from(held.batch.records);
            self.disk_last = held.batch.seq;
            self.unhold();
        }
        for held in &mut self.held {
            held.writing = false;
        }
        self.acked(self.acked);
    }

    /// The spool has let go of acknowledged records.
    pub(super) fn released(&mut self, records: u64) {
        self.on_disk -= records;
        self.counts.acknowledged += records;
    }

    /// The spool has lost records.
    pub(super) fn lost(&mut self, reason: Reason, records: u64) {
        self.on_disk -= records;
        self.counts.drop(reason, records);
    }

    /// The highest number that a server is known to have.
    pub(super) fn acked_seq(&self) -> u64 {
        self.acked
    }

    /// Whether the spool has something that is not over.
    pub(super) fn on_disk(&self) -> bool {
        self.on_disk > 0
    }

    /// The highest number in the spool.
    pub(super) fn disk_last(&self) -> u64 {
        self.disk_last
    }

    /// The number of the next batch.
    pub(super) fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Whether nothing waits for anything.
    pub(super) fn is_empty(&self) -> bool {
        self.on_disk == 0 && self.held.is_empty() && self.open_records == 0
    }

    /// All counters at this moment.
    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot {
            counts: self.counts,
            in_memory: self.held_records + u64::from(self.open_records),
            on_disk: self.on_disk,
            memory_bytes: self.memory_bytes() as u64,
        }
    }

    /// What is to be kept.
    pub(super) fn kept(&self) -> Kept {
        let mut counts = self.counts;
        counts.taken -= u64::from(self.open_records);
        Kept {
            counts,
            last_seq: self.next_seq - 1,
        }
    }
}

#[cfg(test)]
mod tests;
