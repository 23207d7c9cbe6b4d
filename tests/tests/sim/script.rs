//! Scripts of simulated hosts: how long they run, what they print, how they end, all from their text.

use gse_proto::session::TargetRef;

/// A target on its host.
pub(crate) type Key = (String, u32, u32);

/// The key of a target.
pub(crate) fn key(target: &TargetRef) -> Key {
    (target.task_id.clone(), target.bucket, target.index)
}

/// What a command does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Script {
    /// Milliseconds.
    pub(crate) runs_ms: u64,
    /// Bytes of output, spread evenly over the time.
    pub(crate) bytes: u64,
    /// Its end.
    pub(crate) exit: i32,
}

impl Script {
    /// As the command of an atomic task.
    pub(crate) fn text(self) -> String {
        format!("sim {} {} {}", self.runs_ms, self.bytes, self.exit)
    }

    /// From a command; one that is none of ours ends at once.
    pub(crate) fn parse(text: &str) -> Self {
        let mut numbers = text
            .split_whitespace()
            .skip(1)
            .map(|word| word.parse::<u64>().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        Self {
            runs_ms: next(),
            bytes: next(),
            exit: next() as i32,
        }
    }

    /// Bytes printed after so long.
    pub(crate) fn printed(self, ran_ms: u64) -> u64 {
        if self.runs_ms == 0 || ran_ms >= self.runs_ms {
            return self.bytes;
        }
        self.bytes * ran_ms / self.runs_ms
    }
}

/// The output of a target's atomic task from one offset to another. Every byte depends on its place.
pub(crate) fn output(key: &Key, atomic: u32, from: u64, to: u64) -> Vec<u8> {
    let salt = u64::from(key.1) * 7
        + u64::from(key.2) * 31
        + u64::from(atomic) * 131
        + key.0.bytes().map(u64::from).sum::<u64>();
    (from..to)
        .map(|at| {
            if at % 64 == 63 {
                b'\n'
            } else {
                b'a' + ((salt + at + at / 64) % 26) as u8
            }
        })
        .collect()
}
