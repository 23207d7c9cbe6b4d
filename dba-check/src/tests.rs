//! Histories made by hand: good ones pass, and each kind of bad one is caught.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use crate::history::{Event, Kind, Outcome, Reply, Window};
use crate::{Report, Wrong, check};

fn ev(began: u64, ended: u64, kind: Kind, outcome: Outcome) -> Event {
    Event {
        process: 0,
        key: "k".into(),
        kind,
        began,
        ended,
        outcome,
    }
}

fn ok(began: u64, ended: u64, kind: Kind, reply: Reply) -> Event {
    ev(began, ended, kind, Outcome::Ok(reply))
}

fn unknown(began: u64, kind: Kind) -> Event {
    ev(began, u64::MAX, kind, Outcome::Unknown)
}

fn failed(began: u64, kind: Kind) -> Event {
    ev(began, began + 1, kind, Outcome::Failed)
}

fn read(began: u64, v: i64) -> Event {
    ok(began, began + 1, Kind::Read, Reply::Value(Some(v)))
}

fn write(began: u64, v: i64) -> Event {
    ok(began, began + 1, Kind::Write(v), Reply::Done)
}

fn many(began: u64, kind: Kind, v: &[i64]) -> Event {
    ok(began, began + 1, kind, Reply::Many(v.to_vec()))
}

fn number(began: u64, kind: Kind, n: i64) -> Event {
    ok(began, began + 1, kind, Reply::Number(n))
}

fn pop(began: u64, v: Option<i64>) -> Event {
    ok(began, began + 1, Kind::Pop, Reply::Value(v))
}

fn run(events: &[Event]) -> Report {
    check(events, &[], Duration::from_secs(10))
}

fn good(events: &[Event]) {
    let report = run(events);
    assert!(report.is_clean(), "{report}");
}

fn bad(events: &[Event], wrong: Wrong) {
    let report = run(events);
    assert!(report.count(wrong) > 0, "no {wrong:?} was found: {report}");
}

#[test]
fn registers() {
    use Wrong::{Lost, Stale};
    good(&[write(1, 1), read(3, 1), write(5, 2), read(7, 2)]);
    // Two at once may be in either order, for as long as all see the same.
    let a = ok(1, 10, Kind::Write(1), Reply::Done);
    let b = ok(1, 10, Kind::Write(2), Reply::Done);
    good(&[a.clone(), b.clone(), read(11, 1), read(13, 1)]);
    good(&[a.clone(), b.clone(), read(11, 2)]);
    bad(&[a, b, read(11, 1), read(13, 2)], Lost);
    // What was acknowledged is gone.
    bad(&[write(1, 1), write(3, 2), read(5, 1)], Lost);
    bad(&[write(1, 1), ok(3, 4, Kind::Read, Reply::Value(None))], Lost);
    // An old value in between, although the new one is there at the end.
    bad(&[write(1, 1), write(3, 2), read(5, 1), write(7, 3), read(9, 3)], Stale);
    let both = [write(1, 1), write(3, 2), read(5, 1), write(7, 3), read(9, 3)];
    assert!(check(&both, &[Window { from: 5, to: 6 }], Duration::from_secs(10)).is_clean());
    assert!(!check(&both, &[Window { from: 7, to: 8 }], Duration::from_secs(10)).is_clean());
    // Unknown: at any time later, or never; but not twice, and not before it began.
    good(&[
        write(1, 1),
        unknown(3, Kind::Write(2)),
        read(5, 1),
        read(7, 2),
        read(9, 2),
    ]);
    good(&[write(1, 1), unknown(3, Kind::Write(2)), read(5, 1)]);
    bad(&[write(1, 1), unknown(3, Kind::Write(2)), read(5, 2), read(7, 1)], Lost);
    bad(
        &[
            write(1, 1),
            read(2, 2),
            unknown(5, Kind::Write(2)),
            write(7, 3),
            read(9, 3),
        ],
        Stale,
    );
    // Refused is refused.
    bad(&[write(1, 1), failed(3, Kind::Write(2)), read(5, 2)], Lost);
    let swap = |at, from, to, done| ok(at, at + 1, Kind::Swap { from: Some(from), to }, Reply::Swapped(done));
    good(&[write(1, 1), swap(3, 1, 2, true), swap(5, 1, 3, false), read(7, 2)]);
    bad(
        &[write(1, 1), swap(3, 1, 2, true), swap(5, 1, 3, true), read(7, 3)],
        Lost,
    );
    bad(&[write(1, 1), swap(3, 1, 2, false), read(5, 1)], Lost);
}

#[test]
fn a_search_without_end_is_said_to_be_undecided() {
    // Many at once that nobody acknowledged and a read that none explains: every order has to be tried.
    let mut events: Vec<Event> = (0..60).map(|i| ok(1, 1000, Kind::Write(i), Reply::Done)).collect();
    for i in 0..60 {
        events.push(ok(1, 1000, Kind::Read, Reply::Value(Some(i))));
    }
    events.push(read(2000, 999));
    let report = check(&events, &[], Duration::from_millis(200));
    assert!(!report.is_clean(), "{report}");
    assert_eq!(report.undecided.len(), 1, "{report}");
}

#[test]
fn counters() {
    let value = |at, v| ok(at, at + 1, Kind::ReadCounter, Reply::Value(Some(v)));
    let incr = |at, n| number(at, Kind::Incr, n);
    good(&[
        incr(1, 1),
        incr(3, 2),
        value(5, 2),
        unknown(7, Kind::Incr),
        incr(9, 4),
        value(11, 4),
    ]);
    good(&[incr(1, 1), unknown(3, Kind::Incr), failed(5, Kind::Incr), value(7, 1)]);
    bad(&[incr(1, 1), incr(3, 2), incr(5, 2), value(7, 2)], Wrong::Lost);
    bad(&[incr(1, 5), incr(3, 4)], Wrong::Lost);
    bad(&[incr(1, 1), incr(3, 2), value(5, 1)], Wrong::Lost);
    bad(
        &[incr(1, 1), incr(3, 2), value(5, 1), incr(7, 3), value(9, 3)],
        Wrong::Stale,
    );
    bad(&[incr(1, 1), failed(3, Kind::Incr), value(5, 2)], Wrong::Phantom);
    bad(
        &[incr(1, 1), incr(3, 2), ok(5, 6, Kind::ReadCounter, Reply::Value(None))],
        Wrong::Lost,
    );
}

#[test]
fn lists() {
    use Kind::{Append, ReadList};
    let add = |at, v, n| number(at, Append(v), n);
    good(&[add(1, 10, 1), add(3, 20, 2), many(5, ReadList, &[10, 20])]);
    good(&[
        add(1, 10, 1),
        unknown(3, Append(20)),
        many(5, ReadList, &[10]),
        many(7, ReadList, &[10, 20]),
    ]);
    bad(&[add(1, 10, 1), add(3, 20, 2), many(5, ReadList, &[10])], Wrong::Lost);
    bad(&[add(1, 10, 1), many(3, ReadList, &[10, 99])], Wrong::Phantom);
    bad(
        &[add(1, 10, 1), failed(3, Append(20)), many(5, ReadList, &[10, 20])],
        Wrong::Phantom,
    );
    bad(&[add(1, 10, 1), many(3, ReadList, &[10, 10])], Wrong::Twice);
    let two = [
        ok(1, 9, Append(10), Reply::Number(1)),
        ok(1, 9, Append(20), Reply::Number(2)),
    ];
    let with = |last: &[Event]| [&two[..], last].concat();
    bad(
        &with(&[many(10, ReadList, &[10, 20]), many(12, ReadList, &[20, 10])]),
        Wrong::Order,
    );
    bad(&with(&[many(10, ReadList, &[20, 10])]), Wrong::Order);
    bad(
        &[
            add(1, 10, 1),
            add(3, 20, 2),
            many(5, ReadList, &[10]),
            many(7, ReadList, &[10, 20]),
        ],
        Wrong::Stale,
    );
}

#[test]
fn sets() {
    use Kind::{Add, Members};
    let add = |at, v| number(at, Add(v), 1);
    good(&[
        add(1, 10),
        unknown(3, Add(20)),
        many(5, Members, &[10]),
        many(7, Members, &[20, 10]),
    ]);
    bad(&[add(1, 10), add(3, 20), many(5, Members, &[10])], Wrong::Lost);
    bad(
        &[
            add(1, 10),
            add(3, 20),
            many(5, Members, &[10]),
            many(7, Members, &[10, 20]),
        ],
        Wrong::Stale,
    );
    bad(&[add(1, 10), many(3, Members, &[10, 99])], Wrong::Phantom);
    bad(
        &[add(1, 10), failed(3, Add(20)), many(5, Members, &[10, 20])],
        Wrong::Phantom,
    );
    bad(&[number(1, Add(10), 0)], Wrong::Twice);
}

#[test]
fn queues() {
    let push = |at, v| number(at, Kind::Push(v), 1);
    good(&[
        push(1, 10),
        push(3, 20),
        pop(5, Some(10)),
        pop(7, Some(20)),
        pop(9, None),
    ]);
    good(&[push(1, 10), unknown(3, Kind::Pop), pop(5, None)]);
    bad(&[push(1, 10), pop(3, Some(10)), pop(5, Some(10))], Wrong::Twice);
    bad(&[push(1, 10), push(3, 20), pop(5, Some(10)), pop(7, None)], Wrong::Lost);
    bad(
        &[push(1, 10), push(3, 20), unknown(5, Kind::Pop), pop(7, None)],
        Wrong::Lost,
    );
    bad(&[push(1, 10), pop(3, Some(99))], Wrong::Phantom);
    bad(&[failed(1, Kind::Push(10)), pop(3, Some(10))], Wrong::Phantom);
    bad(
        &[push(1, 10), push(3, 20), pop(5, Some(20)), pop(7, Some(10))],
        Wrong::Order,
    );
    bad(
        &[push(1, 10), pop(3, None), pop(5, Some(10)), pop(7, None)],
        Wrong::Stale,
    );
}
