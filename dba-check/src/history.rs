//! What was done, when, and what came of it.

use std::sync::Arc;
use std::time::Instant;

/// One clock for all who record.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    /// Nanoseconds since the recording began.
    #[must_use]
    pub fn now(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// An operation. Every number that is written, appended, added or pushed is used once on its key: that is how it is known again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of a register.
    Read,
    Write(i64),
    /// Writes `to` if `from` is there.
    Swap {
        from: Option<i64>,
        to: i64,
    },
    /// Of a counter.
    Incr,
    ReadCounter,
    /// Of a list that only grows.
    Append(i64),
    ReadList,
    /// Of a set that only grows.
    Add(i64),
    Members,
    /// Of a queue.
    Push(i64),
    Pop,
}

/// Which check an operation belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Workload {
    Register,
    Counter,
    List,
    Set,
    Queue,
}

impl Kind {
    /// Whether it changes nothing.
    #[must_use]
    pub fn is_read(&self) -> bool {
        matches!(self, Self::Read | Self::ReadCounter | Self::ReadList | Self::Members)
    }

    #[must_use]
    pub fn workload(&self) -> Workload {
        match self {
            Self::Read | Self::Write(_) | Self::Swap { .. } => Workload::Register,
            Self::Incr | Self::ReadCounter => Workload::Counter,
            Self::Append(_) | Self::ReadList => Workload::List,
            Self::Add(_) | Self::Members => Workload::Set,
            Self::Push(_) | Self::Pop => Workload::Queue,
        }
    }
}

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Done,
    /// Whether a swap was made.
    Swapped(bool),
    Value(Option<i64>),
    /// What a counter is now, how long a list is now, how many members are new.
    Number(i64),
    Many(Vec<i64>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ok(Reply),
    /// It certainly did not happen and never will.
    Failed,
    /// It may have happened, may happen yet, or never.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub process: u32,
    pub key: Arc<str>,
    pub kind: Kind,
    pub began: u64,
    /// For an unknown outcome the end of time.
    pub ended: u64,
    pub outcome: Outcome,
}

impl Event {
    /// What was answered, if it was.
    #[must_use]
    pub fn reply(&self) -> Option<&Reply> {
        match &self.outcome {
            Outcome::Ok(r) => Some(r),
            _ => None,
        }
    }

    #[must_use]
    pub fn failed(&self) -> bool {
        self.outcome == Outcome::Failed
    }
}

/// A span of time in which what is read is not held against the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub from: u64,
    pub to: u64,
}

impl Window {
    #[must_use]
    pub fn touches(&self, e: &Event) -> bool {
        e.began <= self.to && e.ended >= self.from
    }
}

/// Writes down what one process does.
#[derive(Debug)]
pub struct Recorder {
    clock: Clock,
    process: u32,
    pub events: Vec<Event>,
}

impl Recorder {
    #[must_use]
    pub fn new(clock: Clock, process: u32) -> Self {
        Self {
            clock,
            process,
            events: Vec::new(),
        }
    }

    /// Runs an operation and writes it down.
    pub fn run(&mut self, key: &Arc<str>, kind: Kind, operation: impl FnOnce(&str, &Kind) -> Outcome) -> &Outcome {
        let began = self.clock.now();
        let outcome = operation(key, &kind);
        let ended = if outcome == Outcome::Unknown {
            u64::MAX
        } else {
            self.clock.now()
        };
        let at = self.events.len();
        self.events.push(Event {
            process: self.process,
            key: Arc::clone(key),
            kind,
            began,
            ended,
            outcome,
        });
        &self.events[at].outcome
    }
}
