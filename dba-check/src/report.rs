//! All checks over one history.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::history::{Event, Outcome, Window, Workload};
use crate::{collections, counter, queue, register};

/// What is wrong with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Wrong {
    /// What was acknowledged is gone.
    Lost,
    /// What is there was never written, or certainly not executed.
    Phantom,
    /// One thing took effect twice.
    Twice,
    /// Effects are in an order that can't have been.
    Order,
    /// A read showed an older state than it may.
    Stale,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub key: String,
    pub wrong: Wrong,
    pub text: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}: {}", self.wrong, self.key, self.text)
    }
}

/// What a history shows.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub keys: usize,
    pub answered: usize,
    pub failed: usize,
    pub unknown: usize,
    pub faults: Vec<Fault>,
    /// Keys whose check took too long to come to an end.
    pub undecided: Vec<String>,
}

impl Report {
    #[must_use]
    pub fn count(&self, wrong: Wrong) -> usize {
        self.faults.iter().filter(|f| f.wrong == wrong).count()
    }

    /// Nothing is wrong and nothing was left open.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.faults.is_empty() && self.undecided.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} keys, {} answered, {} not executed, {} unknown; {} faults, {} keys undecided",
            self.keys,
            self.answered,
            self.failed,
            self.unknown,
            self.faults.len(),
            self.undecided.len()
        )?;
        for fault in self.faults.iter().take(20) {
            write!(f, "\n  {fault}")?;
        }
        Ok(())
    }
}

/// What the checks of one key have found.
#[derive(Debug)]
pub(crate) struct Findings<'a> {
    key: &'a str,
    pub(crate) faults: Vec<Fault>,
}

impl Findings<'_> {
    pub(crate) fn add(&mut self, wrong: Wrong, text: impl Into<String>) {
        self.faults.push(Fault {
            key: self.key.to_owned(),
            wrong,
            text: text.into(),
        });
    }
}

/// Checks a history, key by key. Reads that touch one of `exempt` are left out; `limit` bounds the search for one key.
#[must_use]
pub fn check(events: &[Event], exempt: &[Window], limit: Duration) -> Report {
    let mut report = Report::default();
    let mut keys: BTreeMap<(Workload, &str), Vec<&Event>> = BTreeMap::new();
    for e in events {
        match e.outcome {
            Outcome::Ok(_) => report.answered += 1,
            Outcome::Failed => report.failed += 1,
            Outcome::Unknown => report.unknown += 1,
        }
        if e.kind.is_read() && (e.reply().is_none() || exempt.iter().any(|w| w.touches(e))) {
            continue;
        }
        keys.entry((e.kind.workload(), &e.key)).or_default().push(e);
    }
    report.keys = keys.len();
    for ((workload, key), mut events) in keys {
        events.sort_by_key(|e| e.began);
        let mut found = Findings {
            key,
            faults: Vec::new(),
        };
        match workload {
            Workload::Register => {
                if !register::check(&events, limit, &mut found) {
                    report.undecided.push(key.to_owned());
                }
            }
            Workload::Counter => counter::check(&events, &mut found),
            Workload::List => collections::list(&events, &mut found),
            Workload::Set => collections::set(&events, &mut found),
            Workload::Queue => queue::check(&events, &mut found),
        }
        report.faults.append(&mut found.faults);
    }
    report
}
