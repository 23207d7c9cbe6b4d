//! What must hold of the scheduler whatever happens, and its rules one by one.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const LENGTH: u32 = 1000;

fn target(pieces: u32) -> Plan {
    Plan::new(PlanConfig::default(), pieces, LENGTH, &Bitmap::new(pieces), false, 7)
}

fn source(pieces: u32) -> Plan {
    Plan::new(PlanConfig::default(), pieces, LENGTH, &Bitmap::full(pieces), true, 7)
}

fn actions(plan: &mut Plan) -> Vec<Action> {
    let mut actions = Vec::new();
    plan.take_actions(&mut actions);
    actions
}

fn requests(plan: &mut Plan) -> Vec<(PeerKey, u32)> {
    let wanted = |action| match action {
        Action::Request { peer, piece } => Some((peer, piece)),
        _ => None,
    };
    actions(plan).into_iter().filter_map(wanted).collect()
}

fn shows(plan: &mut Plan) -> Vec<(PeerKey, u32)> {
    let shown = |action| match action {
        Action::Show { peer, piece } => Some((peer, piece)),
        _ => None,
    };
    actions(plan).into_iter().filter_map(shown).collect()
}

/// A peer that has all of these and answers.
fn holder(plan: &mut Plan, now: f64, has: &Bitmap) -> PeerKey {
    let key = plan.add_peer(now);
    plan.peer_bitfield(now, key, has);
    plan.peer_choking(now, key, false);
    key
}

#[test]
fn a_have_wakes_an_idle_requester_at_once() {
    let mut plan = target(100);
    let key = holder(&mut plan, 0.0, &Bitmap::new(100));
    assert!(requests(&mut plan).is_empty());
    plan.peer_have(1.0, key, 42);
    assert_eq!(requests(&mut plan), [(key, 42)]);
    plan.peer_have(1.0, key, 42);
    assert!(requests(&mut plan).is_empty(), "said before");
    plan.peer_have(1.0, key, 100);
    assert!(requests(&mut plan).is_empty(), "no such piece");
}

#[test]
fn the_rarest_is_asked_for_first_and_never_twice() {
    let mut plan = target(60);
    let mut common = Bitmap::full(60);
    common.clear(33);
    let mut choking = Vec::new();
    for _ in 0..3 {
        let key = plan.add_peer(0.0);
        plan.peer_bitfield(0.0, key, &common);
        choking.push(key);
    }
    let key = holder(&mut plan, 0.0, &Bitmap::full(60));
    assert_eq!(requests(&mut plan)[0], (key, 33));
    for other in choking {
        plan.peer_choking(0.0, other, false);
    }
    let asked = requests(&mut plan);
    let pieces: BTreeSet<u32> = asked.iter().map(|(_, piece)| *piece).chain([33]).collect();
    assert_eq!(pieces.len(), asked.len() + 1, "each once: {asked:?}");
    assert!(asked.len() <= PlanConfig::default().outstanding as usize);
}

#[test]
fn a_bad_piece_costs_one_more_fetch_from_somebody_else_and_the_second_is_the_last() {
    // contract: p2p#17
    let mut plan = target(4);
    let mut one = Bitmap::new(4);
    one.set(0);
    let bad = holder(&mut plan, 0.0, &one);
    assert_eq!(requests(&mut plan), [(bad, 0)]);
    let good = holder(&mut plan, 0.0, &Bitmap::full(4));
    let others: Vec<u32> = requests(&mut plan).into_iter().map(|(_, piece)| piece).collect();
    assert!(!others.contains(&0));
    assert!(plan.piece_arrived(0.1, bad, 0));
    plan.piece_bad(0.1, bad, 0);
    let mut all = actions(&mut plan);
    let mut open = others;
    open.extend(all.iter().filter_map(|action| match action {
        Action::Request { piece, .. } => Some(*piece),
        _ => None,
    }));
    while let Some(piece) = open.pop() {
        assert!(plan.piece_arrived(0.2, good, piece));
        plan.piece_verified(0.2, piece);
        let more = actions(&mut plan);
        open.extend(more.iter().filter_map(|action| match action {
            Action::Request { piece, .. } => Some(*piece),
            _ => None,
        }));
        all.extend(more);
    }
    assert!(plan.is_complete());
    let again = |action: &Action| matches!(action, Action::Request { piece: 0, .. });
    assert_eq!(all.iter().filter(|action| again(action)).count(), 1);
    assert!(all.contains(&Action::Request { peer: good, piece: 0 }));
    assert!(!all.iter().any(|action| matches!(action, Action::Ban { .. })));
    // It says that it has more; what it then sends is wrong, too.
    let mut plan = target(4);
    let bad = holder(&mut plan, 0.0, &Bitmap::full(4));
    let asked = requests(&mut plan);
    for (_, piece) in asked.iter().take(2) {
        assert!(plan.piece_arrived(0.1, bad, *piece));
        plan.piece_bad(0.1, bad, *piece);
    }
    all = actions(&mut plan);
    assert_eq!(
        all.iter()
            .filter(|action| **action == Action::Ban { peer: bad })
            .count(),
        1
    );
    plan.tick(1.0);
    assert!(requests(&mut plan).is_empty(), "nothing more is asked of it");
}

#[test]
fn two_copies_count_once() {
    // contract: p2p#18
    let mut plan = target(2);
    let slow = holder(&mut plan, 0.0, &Bitmap::full(2));
    let asked: Vec<u32> = requests(&mut plan).into_iter().map(|(_, piece)| piece).collect();
    assert_eq!(asked.len(), 2);
    let quick = holder(&mut plan, 0.0, &Bitmap::full(2));
    assert!(requests(&mut plan).is_empty(), "no end game before its time");
    plan.tick(10.0);
    let again = requests(&mut plan);
    assert_eq!(again.len(), 1, "one at a time: {again:?}");
    let piece = again[0].1;
    assert!(plan.piece_arrived(10.1, quick, piece));
    assert!(!plan.piece_arrived(10.1, slow, piece), "it is being verified already");
    plan.piece_verified(10.2, piece);
    plan.piece_verified(10.2, piece);
    assert_eq!(plan.missing(), 1);
    assert!(!plan.is_complete());
    assert!(!actions(&mut plan).contains(&Action::Complete));
}

#[test]
fn what_came_twice_is_cancelled() {
    let mut plan = target(1);
    let slow = holder(&mut plan, 0.0, &Bitmap::full(1));
    let quick = holder(&mut plan, 0.0, &Bitmap::full(1));
    actions(&mut plan);
    plan.tick(10.0);
    assert_eq!(requests(&mut plan), [(quick, 0)]);
    assert!(plan.piece_arrived(10.1, quick, 0));
    plan.piece_verified(10.1, 0);
    let done = actions(&mut plan);
    assert!(done.contains(&Action::Cancel { peer: slow, piece: 0 }));
    assert_eq!(done.iter().filter(|action| **action == Action::Complete).count(), 1);
    assert_eq!(plan.asked_of(slow), 0);
}

#[test]
fn what_was_offered_to_a_lost_peer_is_offered_to_others() {
    let mut plan = source(8);
    let (one, two) = (plan.add_peer(0.0), plan.add_peer(0.0));
    plan.peer_ready(0.0, one);
    plan.peer_ready(0.0, two);
    let first = shows(&mut plan);
    assert_eq!(
        first.iter().map(|(_, piece)| piece).collect::<BTreeSet<_>>().len(),
        8,
        "each once"
    );
    plan.peer_gone(0.1, one);
    for piece in first.iter().filter(|(key, _)| *key == two).map(|(_, piece)| *piece) {
        plan.bytes_sent(0.2, two, piece, u64::from(LENGTH));
        plan.peer_have(0.3, two, piece);
    }
    let lost: BTreeSet<u32> = first
        .iter()
        .filter(|(key, _)| *key == one)
        .map(|(_, piece)| *piece)
        .collect();
    let again: BTreeSet<u32> = shows(&mut plan).into_iter().map(|(_, piece)| piece).collect();
    assert_eq!(again, lost);
    assert!(!plan.first_copy_is_out());
    for piece in again {
        plan.peer_have(0.4, two, piece);
    }
    assert!(plan.first_copy_is_out());
}

#[test]
fn who_does_not_get_on_is_offered_everything() {
    let mut plan = source(500);
    let key = plan.add_peer(0.0);
    plan.peer_ready(0.0, key);
    assert_eq!(shows(&mut plan).len(), PlanConfig::default().window as usize);
    plan.tick(1.9);
    assert!(shows(&mut plan).is_empty());
    plan.tick(2.1);
    assert_eq!(shows(&mut plan).len(), 500 - PlanConfig::default().window as usize);
    // Somebody who has asked and waits for us has not stalled.
    let waits = plan.add_peer(3.0);
    plan.peer_ready(3.0, waits);
    let first = shows(&mut plan);
    plan.piece_asked(waits, first[0].1);
    plan.tick(9.0);
    assert!(shows(&mut plan).is_empty());
}

#[test]
fn who_keeps_everything_to_itself_is_given_less() {
    let mut plan = source(1000);
    let keys: Vec<PeerKey> = (0..4).map(|_| plan.add_peer(0.0)).collect();
    for key in &keys {
        plan.peer_ready(0.0, *key);
    }
    let mut given: BTreeMap<PeerKey, u32> = BTreeMap::new();
    let mut now = 0.0;
    let mut open: Vec<(PeerKey, u32)> = shows(&mut plan);
    while !open.is_empty() {
        now += 0.05;
        let (key, piece) = open.remove(0);
        *given.entry(key).or_default() += 1;
        plan.piece_asked(key, piece);
        plan.bytes_sent(now, key, piece, u64::from(LENGTH));
        plan.peer_have(now, key, piece);
        if key != keys[0] {
            // All but the first pass on what they get.
            plan.peer_have(now, keys[if key == keys[1] { 2 } else { 1 }], piece);
        }
        open.extend(shows(&mut plan));
    }
    let sum: u32 = given.values().sum();
    assert!(sum >= 1000);
    assert!(given[&keys[0]] < 100, "{given:?}");
}

/// What can happen to a target.
#[derive(Debug, Clone)]
enum Step {
    Add,
    Have(u8, u8),
    All(u8),
    Choke(u8, bool),
    Gone(u8),
    Arrive(u8),
    Verify(u8, bool),
    Lose(u8),
    Refuse(u8),
    Wait(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => Just(Step::Add),
        6 => (any::<u8>(), any::<u8>()).prop_map(|(peer, piece)| Step::Have(peer, piece)),
        1 => any::<u8>().prop_map(Step::All),
        2 => (any::<u8>(), any::<bool>()).prop_map(|(peer, choke)| Step::Choke(peer, choke)),
        1 => any::<u8>().prop_map(Step::Gone),
        8 => any::<u8>().prop_map(Step::Arrive),
        8 => (any::<u8>(), prop::bool::weighted(0.9)).prop_map(|(at, good)| Step::Verify(at, good)),
        1 => any::<u8>().prop_map(Step::Lose),
        1 => any::<u8>().prop_map(Step::Refuse),
        2 => any::<u8>().prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 0..400)
}

fn pick<T: Copy>(from: &[T], at: u8) -> Option<T> {
    (!from.is_empty()).then(|| from[at as usize % from.len()])
}

proptest! {
    #[test]
    fn a_target_is_done_when_it_has_everything_and_not_before(pieces in 1_u32..40, steps in steps()) {
        // contract: p2p#18
        let mut plan = target(pieces);
        let mut now = 0.0;
        let mut peers: Vec<PeerKey> = Vec::new();
        let mut open: Vec<(PeerKey, u32)> = Vec::new();
        let mut verifying: Vec<(PeerKey, u32)> = Vec::new();
        let mut had: BTreeSet<u32> = BTreeSet::new();
        let mut completed = 0;
        for step in steps {
            now += 0.01;
            match step {
                Step::Add if peers.len() < 6 => {
                    let key = plan.add_peer(now);
                    plan.peer_choking(now, key, false);
                    peers.push(key);
                }
                Step::Add => {}
                Step::Have(peer, piece) => if let Some(key) = pick(&peers, peer) {
                    plan.peer_have(now, key, u32::from(piece) % pieces);
                }
                Step::All(peer) => if let Some(key) = pick(&peers, peer) {
                    plan.peer_bitfield(now, key, &Bitmap::full(pieces));
                }
                Step::Choke(peer, choke) => if let Some(key) = pick(&peers, peer) {
                    plan.peer_choking(now, key, choke);
                    if choke {
                        open.retain(|(other, _)| *other != key);
                    }
                }
                Step::Gone(peer) => if let Some(key) = pick(&peers, peer) {
                    plan.peer_gone(now, key);
                    peers.retain(|other| *other != key);
                    open.retain(|(other, _)| *other != key);
                }
                Step::Arrive(at) => if let Some(flight) = pick(&open, at) {
                    open.retain(|other| *other != flight);
                    if plan.piece_arrived(now, flight.0, flight.1) {
                        prop_assert!(!had.contains(&flight.1));
                        prop_assert!(verifying.iter().all(|other| other.1 != flight.1), "one copy is verified at a time");
                        verifying.push(flight);
                    }
                }
                Step::Verify(at, good) => if let Some(flight) = pick(&verifying, at) {
                    verifying.retain(|other| *other != flight);
                    if good {
                        had.insert(flight.1);
                        plan.piece_verified(now, flight.1);
                    } else {
                        plan.piece_bad(now, flight.0, flight.1);
                    }
                }
                Step::Lose(at) => if let Some(flight) = pick(&verifying, at) {
                    verifying.retain(|other| *other != flight);
                    plan.piece_lost(now, flight.0, flight.1);
                }
                Step::Refuse(at) => if let Some(flight) = pick(&open, at) {
                    open.retain(|other| *other != flight);
                    plan.piece_refused(now, flight.0, flight.1);
                }
                Step::Wait(by) => {
                    now += f64::from(by) / 10.0;
                    plan.tick(now);
                }
            }
            for action in actions(&mut plan) {
                match action {
                    Action::Request { peer, piece } => {
                        prop_assert!(peers.contains(&peer), "asked of somebody who is there");
                        prop_assert!(!had.contains(&piece), "asked for what is missing");
                        prop_assert!(!open.contains(&(peer, piece)), "asked once of each");
                        open.push((peer, piece));
                    }
                    Action::Cancel { peer, piece } => open.retain(|other| *other != (peer, piece)),
                    Action::Ban { peer } => {
                        plan.peer_gone(now, peer);
                        peers.retain(|other| *other != peer);
                        open.retain(|(other, _)| *other != peer);
                    }
                    Action::Complete => completed += 1,
                    Action::Announce { piece } => prop_assert!(had.contains(&piece)),
                    Action::Show { .. } => prop_assert!(false, "a target shows nothing piece by piece"),
                }
            }
            prop_assert_eq!(plan.missing() as usize, pieces as usize - had.len());
            prop_assert_eq!(plan.is_complete(), had.len() == pieces as usize);
            prop_assert_eq!(completed, usize::from(plan.is_complete()));
        }
        // Whatever has happened: with one good peer, it comes to its end.
        let key = plan.add_peer(now);
        plan.peer_choking(now, key, false);
        plan.peer_bitfield(now, key, &Bitmap::full(pieces));
        for flight in verifying {
            had.insert(flight.1);
            plan.piece_verified(now, flight.1);
        }
        for _ in 0..1000 {
            now += 1.0;
            plan.tick(now);
            for action in actions(&mut plan) {
                if let Action::Request { peer, piece } = action && peer == key && plan.piece_arrived(now, key, piece) {
                    plan.piece_verified(now, piece);
                }
            }
            if plan.is_complete() {
                break;
            }
        }
        prop_assert!(plan.is_complete(), "{} missing", plan.missing());
    }

    #[test]
    fn everything_is_offered_once_before_anything_is_offered_twice(
        pieces in 1_u32..200,
        order in prop::collection::vec((any::<u8>(), any::<u8>()), 200..600),
    ) {
        // contract: p2p#2
        let mut plan = source(pieces);
        let mut peers: Vec<PeerKey> = Vec::new();
        let mut has: BTreeMap<PeerKey, BTreeSet<u32>> = BTreeMap::new();
        let mut open: Vec<(PeerKey, u32)> = Vec::new();
        let mut offered: BTreeSet<u32> = BTreeSet::new();
        let mut now = 0.0;
        for (what, which) in order {
            now += 0.001;
            match what % 8 {
                0 if peers.len() < 8 => {
                    let key = plan.add_peer(now);
                    plan.peer_ready(now, key);
                    peers.push(key);
                }
                1 | 2 => {
                    // One passes something on to another.
                    if let (Some(from), Some(to)) = (pick(&peers, which), pick(&peers, what / 8)) {
                        let some = has.get(&from).and_then(|has| has.iter().next().copied());
                        if let Some(piece) = some && has.entry(to).or_default().insert(piece) {
                            plan.peer_have(now, to, piece);
                        }
                    }
                }
                _ => if let Some((key, piece)) = pick(&open, which) {
                    open.retain(|other| *other != (key, piece));
                    plan.piece_asked(key, piece);
                    plan.bytes_sent(now, key, piece, u64::from(LENGTH));
                    has.entry(key).or_default().insert(piece);
                    plan.peer_have(now, key, piece);
                }
            }
            for (key, piece) in shows(&mut plan) {
                prop_assert!(offered.insert(piece) || offered.len() == pieces as usize, "{} twice, {} of {}", piece, offered.len(), pieces);
                open.push((key, piece));
            }
        }
    }
}
