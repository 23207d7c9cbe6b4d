//! Counters: every reply of `INCR` is new and larger than what was known before; at the end the counter is between what was acknowledged and what was tried.

use std::collections::HashMap;

use crate::history::{Event, Kind, Reply};
use crate::report::{Findings, Wrong};

pub(crate) fn check(events: &[&Event], found: &mut Findings<'_>) {
    let mut replies: HashMap<i64, u64> = HashMap::new();
    // By begin: what was known when it began. By end: what it made known.
    let mut shown: Vec<(u64, i64)> = Vec::new();
    let mut increments: Vec<&Event> = Vec::new();
    for e in events {
        match (&e.kind, e.reply()) {
            (Kind::Incr, Some(Reply::Number(n))) => {
                if let Some(other) = replies.insert(*n, e.began) {
                    found.add(
                        Wrong::Lost,
                        format!(
                            "INCR answered {n} twice, to one that began at {} ms and one at {} ms: one of them is gone",
                            other / 1_000_000,
                            e.began / 1_000_000
                        ),
                    );
                }
                shown.push((e.ended, *n));
                increments.push(e);
            }
            (Kind::Incr, None) if !e.failed() => increments.push(e),
            (Kind::ReadCounter, Some(Reply::Value(v))) => shown.push((e.ended, v.unwrap_or(0))),
            _ => {}
        }
    }
    shown.sort_unstable();
    let mut begun: Vec<u64> = increments.iter().map(|e| e.began).collect();
    begun.sort_unstable();
    let mut acknowledged: Vec<u64> = increments
        .iter()
        .filter(|e| e.reply().is_some())
        .map(|e| e.ended)
        .collect();
    acknowledged.sort_unstable();
    let mut highest = Vec::with_capacity(shown.len());
    let mut top = 0;
    for (_, n) in &shown {
        top = top.max(*n);
        highest.push(top);
    }
    for e in events {
        let (value, adds) = match (&e.kind, e.reply()) {
            (Kind::Incr, Some(Reply::Number(n))) => (*n, 1),
            (Kind::ReadCounter, Some(Reply::Value(v))) => (v.unwrap_or(0), 0),
            _ => continue,
        };
        let wrong = if adds == 1 { Wrong::Lost } else { Wrong::Stale };
        let known = shown.partition_point(|(t, _)| *t < e.began);
        let known = known.checked_sub(1).and_then(|i| highest.get(i)).copied().unwrap_or(0);
        let sure = acknowledged.partition_point(|t| *t < e.began) as i64;
        let most = begun.partition_point(|t| *t <= e.ended) as i64;
        let least = known.max(sure) + adds;
        if value < least {
            found.add(
                wrong,
                format!(
                    "{:?} at {} ms answered {value}, but {known} was shown and {sure} were acknowledged before",
                    e.kind,
                    e.began / 1_000_000
                ),
            );
        }
        if value > most {
            found.add(
                Wrong::Phantom,
                format!(
                    "{:?} at {} ms answered {value}, but only {most} were tried that were not refused",
                    e.kind,
                    e.began / 1_000_000
                ),
            );
        }
    }
    // A value that a last read shows and that nobody can have changed since.
    if let (Some(last), Some(end)) = (acknowledged.last(), events.last())
        && let (Kind::ReadCounter, Some(Reply::Value(v))) = (&end.kind, end.reply())
        && end.began > *last
        && v.unwrap_or(0) < acknowledged.len() as i64
    {
        found.add(
            Wrong::Lost,
            format!("{} were acknowledged, {} are left", acknowledged.len(), v.unwrap_or(0)),
        );
    }
}
