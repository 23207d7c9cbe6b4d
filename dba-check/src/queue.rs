//! Queues: what was pushed comes out once, in order, and nothing acknowledged stays away.

use std::collections::HashMap;

use crate::history::{Event, Kind, Reply};
use crate::report::{Findings, Wrong};

pub(crate) fn check(events: &[&Event], found: &mut Findings<'_>) {
    let mut pushed: HashMap<i64, &Event> = HashMap::new();
    let mut popped: HashMap<i64, &Event> = HashMap::new();
    let mut unknown_pops: Vec<u64> = Vec::new();
    let mut empty: Vec<&Event> = Vec::new();
    for e in events {
        match (&e.kind, e.reply()) {
            (Kind::Push(v), _) => {
                pushed.insert(*v, e);
            }
            (Kind::Pop, Some(Reply::Value(Some(v)))) => {
                if let Some(other) = popped.insert(*v, e) {
                    found.add(
                        Wrong::Twice,
                        format!(
                            "{v} came out at {} ms and at {} ms",
                            other.began / 1_000_000,
                            e.began / 1_000_000
                        ),
                    );
                }
            }
            (Kind::Pop, Some(Reply::Value(None))) => empty.push(e),
            (Kind::Pop, None) if !e.failed() => unknown_pops.push(e.began),
            _ => {}
        }
    }
    for (v, pop) in &popped {
        match pushed.get(v) {
            None => found.add(Wrong::Phantom, format!("nobody pushed {v}")),
            Some(p) if p.failed() => found.add(Wrong::Phantom, format!("the push of {v} was refused")),
            Some(p) if p.began > pop.ended => found.add(Wrong::Phantom, format!("{v} came out before it was pushed")),
            _ => {}
        }
    }
    // First in, first out, where the order of both is certain.
    let mut through: Vec<(&Event, &Event, i64)> = pushed
        .iter()
        .filter_map(|(v, p)| popped.get(v).map(|q| (*p, *q, *v)))
        .collect();
    let mut by_push_end = through.clone();
    by_push_end.sort_by_key(|(p, _, _)| p.ended);
    through.sort_by_key(|(p, _, _)| p.began);
    let mut before = by_push_end.iter().peekable();
    let mut latest: Option<(u64, i64)> = None;
    for (push, pop, v) in &through {
        while let Some((p, q, w)) = before.next_if(|(p, _, _)| p.ended < push.began) {
            debug_assert!(p.ended < push.began);
            if latest.is_none_or(|(t, _)| q.began > t) {
                latest = Some((q.began, *w));
            }
        }
        if let Some((t, w)) = latest
            && t > pop.ended
        {
            found.add(
                Wrong::Order,
                format!("{v} came out before {w}, which was pushed before it"),
            );
        }
    }
    // "Empty" is wrong when more was certainly there than unknown pops can have taken.
    let last = empty.iter().map(|e| e.began).max();
    for e in empty {
        let taken = unknown_pops.iter().filter(|t| **t < e.ended).count();
        let there: Vec<i64> = pushed
            .iter()
            .filter(|(v, p)| {
                p.reply().is_some() && p.ended < e.began && popped.get(v).is_none_or(|q| q.began > e.ended)
            })
            .map(|(v, _)| *v)
            .collect();
        if there.len() > taken {
            let wrong = if last == Some(e.began) {
                Wrong::Lost
            } else {
                Wrong::Stale
            };
            found.add(
                wrong,
                format!(
                    "empty at {} ms, but {} elements were acknowledged and not taken ({taken} pops are unknown), as {:?}",
                    e.began / 1_000_000,
                    there.len(),
                    there.first()
                ),
            );
        }
    }
}
