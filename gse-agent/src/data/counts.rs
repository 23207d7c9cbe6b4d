//! What became of the records of this host, in numbers that add up: `taken = acknowledged + buffered + dropped`.
//!
//! The numbers outlive the agent: they are kept with the spool (see [`Counts::encode`]).

use bytes::{Buf, BufMut};

/// Why a record was dropped. The order is that of the kept numbers: reasons are only added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Reason {
    /// Its payload is longer than [`gse_proto::datalink::MAX_PAYLOAD`].
    TooLong,
    /// Memory is full, because the servers are slow or gone and the disk does not take records either.
    NoRoom,
    /// The plugin may not write this data id.
    NotAllowed,
    /// No server for data is configured.
    NoServer,
    /// It was among the oldest in the spool when that reached its bound.
    SpoolFull,
    /// It stood in a part of the spool that is damaged.
    Damaged,
    /// It was in memory when the agent was killed; whether a server has it nobody knows.
    Killed,
    /// A kind of message that is not carried.
    Unsupported,
}

impl Reason {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::TooLong,
        Self::NoRoom,
        Self::NotAllowed,
        Self::NoServer,
        Self::SpoolFull,
        Self::Damaged,
        Self::Killed,
        Self::Unsupported,
    ];

    /// As metrics and people call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::TooLong => "too_long",
            Self::NoRoom => "no_room",
            Self::NotAllowed => "not_allowed",
            Self::NoServer => "no_server",
            Self::SpoolFull => "spool_full",
            Self::Damaged => "damaged",
            Self::Killed => "killed",
            Self::Unsupported => "unsupported",
        }
    }
}

const REASONS: usize = Reason::ALL.len();

/// Records that came in, and those that are over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Records that plugins have handed over, refused ones included.
    pub taken: u64,
    /// Bytes of their payloads.
    pub taken_bytes: u64,
    /// Records that a server has acknowledged.
    pub acknowledged: u64,
    dropped: [u64; REASONS],
}

impl Counts {
    /// Counts dropped records. They must have been counted as taken.
    pub(super) fn drop(&mut self, reason: Reason, records: u64) {
        self.dropped[reason as usize] += records;
    }

    /// Records dropped for a reason.
    #[must_use]
    pub fn dropped(&self, reason: Reason) -> u64 {
        self.dropped[reason as usize]
    }

    /// Records dropped for any reason.
    #[must_use]
    pub fn dropped_total(&self) -> u64 {
        self.dropped.iter().sum()
    }

    /// Taken and neither acknowledged nor dropped.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.taken.saturating_sub(self.acknowledged + self.dropped_total())
    }

    /// Writes the numbers as they are kept on disk.
    pub(super) fn encode(&self, out: &mut impl BufMut) {
        for number in [self.taken, self.taken_bytes, self.acknowledged] {
            out.put_u64(number);
        }
        out.put_u64(REASONS as u64);
        for number in self.dropped {
            out.put_u64(number);
        }
    }

    /// Reads what [`Counts::encode`] wrote, or an earlier version that knew of fewer reasons.
    pub(super) fn decode(mut from: &[u8]) -> Option<Self> {
        let mut counts = Self {
            taken: from.try_get_u64().ok()?,
            taken_bytes: from.try_get_u64().ok()?,
            acknowledged: from.try_get_u64().ok()?,
            dropped: [0; REASONS],
        };
        let reasons = usize::try_from(from.try_get_u64().ok()?).ok()?;
        for number in counts.dropped.iter_mut().take(reasons) {
            *number = from.try_get_u64().ok()?;
        }
        Some(counts)
    }
}

/// The counters at one moment, with what is on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    /// What is over.
    pub counts: Counts,
    /// Records in memory: not sent, or sent and not acknowledged.
    pub in_memory: u64,
    /// Records in the spool on disk that are not acknowledged.
    pub on_disk: u64,
    /// Bytes that records take in memory.
    pub memory_bytes: u64,
}

impl Snapshot {
    /// Whether every record is accounted for. Contract reliability, P5.
    #[must_use]
    pub fn adds_up(&self) -> bool {
        let counts = &self.counts;
        counts.taken == counts.acknowledged + self.in_memory + self.on_disk + counts.dropped_total()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_kept() {
        let mut counts = Counts {
            taken: 10,
            taken_bytes: 1 << 40,
            acknowledged: 4,
            ..Counts::default()
        };
        for (n, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(
                reason as usize,
                n,
                "{} has its place in the kept numbers",
                reason.name()
            );
            counts.drop(reason, n as u64);
        }
        let mut kept = Vec::new();
        counts.encode(&mut kept);
        assert_eq!(Counts::decode(&kept), Some(counts));
        for cut in 0..kept.len() {
            assert_eq!(Counts::decode(&kept[..cut]), None);
        }
    }

    #[test]
    fn numbers_of_an_agent_with_fewer_reasons_are_read() {
        let kept: Vec<u8> = [7u64, 70, 2, 1, 5].iter().flat_map(|n| n.to_be_bytes()).collect();
        let counts = Counts::decode(&kept).unwrap();
        assert_eq!(
            (counts.dropped(Reason::TooLong), counts.dropped_total(), counts.open()),
            (5, 5, 0)
        );
    }
}
