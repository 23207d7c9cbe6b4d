//! Registers: linearizable or not, by search.

use std::collections::HashSet;
use std::time::Duration;

use porcupine_rs::{CheckResult, Model, Operation};

use crate::history::{Event, Kind, Reply};
use crate::report::{Findings, Wrong};

#[derive(Clone, Debug)]
enum Step {
    Read(Option<i64>),
    Write(i64),
    /// `done` is not known of one that was not answered.
    Swap {
        from: Option<i64>,
        to: i64,
        done: Option<bool>,
    },
}

#[derive(Clone, Debug)]
struct Register;

impl Model for Register {
    type State = Option<i64>;
    type Op = Step;
    type Metadata = ();

    fn init() -> Self::State {
        None
    }

    fn step(state: &Self::State, op: &Step) -> (bool, Self::State) {
        match op {
            Step::Read(v) => (v == state, *state),
            Step::Write(v) => (true, Some(*v)),
            Step::Swap { from, to, done } => {
                let fits = from == state;
                (done.is_none_or(|d| d == fits), if fits { Some(*to) } else { *state })
            }
        }
    }
}

fn operation(e: &Event) -> Option<Operation<Register>> {
    let op = match (&e.kind, e.reply()) {
        (Kind::Read, Some(Reply::Value(v))) => Step::Read(*v),
        (Kind::Write(v), _) => Step::Write(*v),
        (Kind::Swap { from, to }, reply) => Step::Swap {
            from: *from,
            to: *to,
            done: match reply {
                Some(Reply::Swapped(done)) => Some(*done),
                _ => None,
            },
        },
        _ => return None,
    };
    Some(Operation {
        client_id: Some(e.process),
        call_time: i64::try_from(e.began).unwrap_or(i64::MAX - 1),
        return_time: i64::try_from(e.ended).unwrap_or(i64::MAX),
        op,
        metadata: None,
    })
}

/// Checks one key; false when the search took longer than `limit`.
///
/// It is checked twice: first with only the last reads, which must show what all the writes have left, then with every read. What fails the first is a lost
/// write (or one that came back), what fails only the second is a read of an old state.
pub(crate) fn check(events: &[&Event], limit: Duration, found: &mut Findings<'_>) -> bool {
    // What was not answered and was never seen by anybody can be put behind everything else: it adds nothing but work.
    let seen: HashSet<i64> = events
        .iter()
        .filter_map(|e| match (&e.kind, e.reply()) {
            (Kind::Read, Some(Reply::Value(v))) => *v,
            (Kind::Swap { from, .. }, Some(Reply::Swapped(true))) => *from,
            _ => None,
        })
        .collect();
    let matters = |e: &Event| match (&e.kind, e.reply()) {
        _ if e.failed() => false,
        (Kind::Write(v) | Kind::Swap { to: v, .. }, None) => seen.contains(v),
        _ => true,
    };
    let kept: Vec<&Event> = events.iter().copied().filter(|e| matters(e)).collect();
    let last_write = kept
        .iter()
        .filter(|e| !e.kind.is_read() && e.reply().is_some())
        .map(|e| e.ended)
        .max()
        .unwrap_or(0);
    for (wrong, last_only) in [(Wrong::Lost, true), (Wrong::Stale, false)] {
        let ops: Vec<Operation<Register>> = kept
            .iter()
            .filter(|e| !last_only || !e.kind.is_read() || e.began > last_write)
            .filter_map(|e| operation(e))
            .collect();
        match porcupine_rs::check_operations_timeout::<Register>(&ops, limit) {
            CheckResult::Ok => {}
            CheckResult::Unknown => return false,
            CheckResult::Illegal => {
                found.add(wrong, tell(&kept, &ops, limit));
                return true;
            }
        }
    }
    true
}

/// How far the history could be explained, and what comes next.
fn tell(events: &[&Event], ops: &[Operation<Register>], limit: Duration) -> String {
    // The longest beginning (by end of the operations) that is still right; what ends next is what can't be explained.
    let mut ends: Vec<i64> = ops.iter().map(|o| o.return_time).filter(|t| *t < i64::MAX).collect();
    ends.sort_unstable();
    let until = |t: i64| -> Vec<Operation<Register>> {
        ops.iter()
            .filter(|o| o.call_time <= t)
            .map(|o| {
                let mut o = o.clone();
                if o.return_time > t {
                    o.return_time = i64::MAX;
                }
                o
            })
            // What is not answered yet at that time binds nobody: a read then says nothing, a swap may go either way.
            .filter_map(|mut o| {
                if o.return_time == i64::MAX {
                    match &mut o.op {
                        Step::Read(_) => return None,
                        Step::Swap { done, .. } => *done = None,
                        Step::Write(_) => {}
                    }
                }
                Some(o)
            })
            .collect()
    };
    let (mut good, mut bad) = (0, ends.len().saturating_sub(1));
    while good < bad {
        let middle = usize::midpoint(good, bad);
        let fine = ends
            .get(middle)
            .is_some_and(|t| porcupine_rs::check_operations_timeout::<Register>(&until(*t), limit) == CheckResult::Ok);
        if fine {
            good = middle + 1;
        } else {
            bad = middle;
        }
    }
    let at = ends.get(bad).copied().unwrap_or(0);
    let mut text = format!(
        "{} operations can't be explained from {} ms on:",
        ops.len(),
        at / 1_000_000
    );
    let near = events.iter().filter(|e| {
        let ended = i64::try_from(e.ended).unwrap_or(i64::MAX);
        i64::try_from(e.began).unwrap_or(i64::MAX) <= at && (ended == i64::MAX || ended >= at - 50_000_000)
    });
    let near: Vec<_> = near.collect();
    for e in near.iter().skip(near.len().saturating_sub(30)) {
        let ended = if e.ended == u64::MAX {
            "never".to_owned()
        } else {
            format!("{:.3}", e.ended as f64 / 1e6)
        };
        text.push_str(&format!(
            "\n    {:.3}..{ended} ms, process {}: {:?} -> {:?}",
            e.began as f64 / 1e6,
            e.process,
            e.kind,
            e.outcome
        ));
    }
    text
}
