//! Lists and sets that only grow: what was acknowledged stays, nothing is there that nobody put there, and a list never changes what it has shown.

use std::collections::{HashMap, HashSet};

use crate::history::{Event, Kind, Reply};
use crate::report::{Findings, Wrong};

/// Appends and whole reads. Every read must be a beginning of the longest one.
pub(crate) fn list(events: &[&Event], found: &mut Findings<'_>) {
    let reads: Vec<(&Event, &Vec<i64>)> = events
        .iter()
        .filter_map(|e| match (&e.kind, e.reply()) {
            (Kind::ReadList, Some(Reply::Many(v))) => Some((*e, v)),
            _ => None,
        })
        .collect();
    let Some((_, longest)) = reads.iter().max_by_key(|(_, v)| v.len()) else {
        return;
    };
    let mut places: HashMap<i64, usize> = HashMap::new();
    for (i, v) in longest.iter().enumerate() {
        if let Some(before) = places.insert(*v, i) {
            found.add(Wrong::Twice, format!("{v} is at {before} and at {i}"));
        }
    }
    let mut appended: HashMap<i64, &Event> = HashMap::new();
    for e in events {
        if let Kind::Append(v) = e.kind {
            appended.insert(v, e);
        }
    }
    for v in longest.iter() {
        match appended.get(v) {
            None => found.add(Wrong::Phantom, format!("nobody appended {v}")),
            Some(e) if e.failed() => found.add(Wrong::Phantom, format!("the append of {v} was refused")),
            _ => {}
        }
    }
    for (e, v) in &reads {
        if !longest.starts_with(v) {
            let at = v.iter().zip(longest.iter()).take_while(|(a, b)| a == b).count();
            found.add(
                Wrong::Order,
                format!(
                    "the read at {} ms differs from the longest one at {at}",
                    e.began / 1_000_000
                ),
            );
        }
        for a in appended.values() {
            let there = matches!(a.kind, Kind::Append(x) if places.get(&x).is_some_and(|p| *p < v.len()));
            if a.reply().is_some() && a.ended < e.began && !there {
                found.add(
                    Wrong::Stale,
                    format!("the read at {} ms lacks {:?}", e.began / 1_000_000, a.kind),
                );
            }
            if there && a.began > e.ended {
                found.add(
                    Wrong::Phantom,
                    format!(
                        "the read at {} ms has {:?} before it began",
                        e.began / 1_000_000,
                        a.kind
                    ),
                );
            }
        }
    }
    // Reads that follow one another never get shorter.
    let mut by_end: Vec<(u64, usize)> = reads.iter().map(|(e, v)| (e.ended, v.len())).collect();
    by_end.sort_unstable();
    for (e, v) in &reads {
        let known = by_end.iter().take_while(|(t, _)| *t < e.began).map(|(_, n)| *n).max();
        if known.is_some_and(|n| v.len() < n) {
            found.add(
                Wrong::Stale,
                format!(
                    "the read at {} ms has {} elements after one that had {}",
                    e.began / 1_000_000,
                    v.len(),
                    known.unwrap_or(0)
                ),
            );
        }
    }
    let end = reads.iter().max_by_key(|(e, _)| e.began);
    for a in appended.values() {
        let Kind::Append(v) = a.kind else { continue };
        match (a.reply(), places.get(&v)) {
            (Some(_), None) if end.is_some_and(|(e, _)| e.began > a.ended) => {
                found.add(Wrong::Lost, format!("{v} was acknowledged and is in no read"));
            }
            (Some(Reply::Number(n)), Some(p)) if *n != *p as i64 + 1 => {
                found.add(
                    Wrong::Order,
                    format!("{v} was said to be number {n} and is number {}", p + 1),
                );
            }
            _ => {}
        }
    }
}

/// Adds and whole reads.
pub(crate) fn set(events: &[&Event], found: &mut Findings<'_>) {
    let mut added: HashMap<i64, &Event> = HashMap::new();
    for e in events {
        if let Kind::Add(v) = e.kind {
            added.insert(v, e);
            if e.reply() == Some(&Reply::Number(0)) {
                found.add(Wrong::Twice, format!("{v} was there before it was added"));
            }
        }
    }
    let last = events.iter().filter(|e| e.kind == Kind::Members).map(|e| e.began).max();
    for e in events {
        let (Kind::Members, Some(Reply::Many(v))) = (&e.kind, e.reply()) else {
            continue;
        };
        let members: HashSet<i64> = v.iter().copied().collect();
        for m in &members {
            match added.get(m) {
                None => found.add(Wrong::Phantom, format!("nobody added {m}")),
                Some(a) if a.failed() => found.add(Wrong::Phantom, format!("adding {m} was refused")),
                Some(a) if a.began > e.ended => found.add(Wrong::Phantom, format!("{m} is there before it was added")),
                _ => {}
            }
        }
        let wrong = if last == Some(e.began) {
            Wrong::Lost
        } else {
            Wrong::Stale
        };
        for (m, a) in &added {
            if a.reply().is_some() && a.ended < e.began && !members.contains(m) {
                found.add(
                    wrong,
                    format!(
                        "{m} was acknowledged and is not in the read at {} ms",
                        e.began / 1_000_000
                    ),
                );
            }
        }
    }
}
