//! The ledger, driven through what sources, agents and the store may do in any order.

use proptest::prelude::*;

use super::*;

const PAUSES: Pauses = Pauses {
    min_ms: 100,
    max_ms: 1_000,
};

fn identity(key: &str, host_id: u64, text: &str) -> Identity {
    Identity {
        host_id,
        ..Identity::of_bytes(AgentId::parse(key).unwrap(), Bytes::from(text.to_owned()))
    }
}

fn ledger() -> Ledger {
    Ledger::new(PAUSES, 100)
}

fn put(ledger: &mut Ledger, key: &str, host_id: u64, text: &str, now: u64) -> Wanted {
    let wanted = ledger.want(&identity(key, host_id, text), None, now);
    ledger.written(key, now);
    wanted
}

fn take(ledger: &mut Ledger, now: u64) -> Vec<Job> {
    ledger.take_due(now, 100, usize::MAX)
}

fn placed() -> End {
    End::Placed {
        to: "a".into(),
        epoch: Bytes::from_static(b"e"),
        path: "/p".into(),
    }
}

const NEW: Wanted = Wanted::New { before: None };

#[test]
fn only_what_changed_is_pushed() {
    let mut ledger = ledger();
    assert_eq!(put(&mut ledger, "a", 1, "x", 10), NEW);
    let jobs = take(&mut ledger, 10);
    assert_eq!(jobs.len(), 1);
    assert!(take(&mut ledger, 10).is_empty(), "it is being asked");
    ledger.end(&jobs[0], placed(), 20, 0.0);
    assert_eq!(put(&mut ledger, "a", 1, "x", 30), Wanted::Same);
    assert!(take(&mut ledger, u64::MAX).is_empty());
    assert_eq!(put(&mut ledger, "a", 1, "y", 40), NEW);
    assert_ne!(take(&mut ledger, 40)[0].task_id, jobs[0].task_id);
}

#[test]
fn nothing_is_pushed_before_it_is_stored() {
    let mut ledger = ledger();
    ledger.want(&identity("a", 1, "x"), None, 10);
    assert!(take(&mut ledger, u64::MAX).is_empty());
    ledger.written("a", 11);
    let first = take(&mut ledger, 11).remove(0);
    // It changes while it is being asked, and its agent is there.
    ledger.want(&identity("a", 1, "y"), None, 12);
    ledger.end(&first, placed(), 13, 0.0);
    assert!(take(&mut ledger, u64::MAX).is_empty());
    assert!(!ledger.seen("a", "a", b"e", 14));
    ledger.written("a", 15);
    assert_eq!(take(&mut ledger, 15).len(), 1);
}

#[test]
fn who_may_have_it_gets_the_same_order_again_and_who_failed_another_one() {
    let mut ledger = ledger();
    put(&mut ledger, "a", 1, "x", 0);
    let first = take(&mut ledger, 0).remove(0);
    ledger.end(&first, End::Unsure("?".into()), 0, 0.0);
    assert!(take(&mut ledger, 99).is_empty());
    let second = take(&mut ledger, 100).remove(0);
    assert_eq!((&second.task_id, second.order), (&first.task_id, first.order));
    let failed = End::Failed {
        code: 5,
        message: "no room".into(),
    };
    ledger.end(&second, failed.clone(), 100, 0.0);
    assert_eq!(ledger.counts().failed, 1);
    let third = take(&mut ledger, 200).remove(0);
    assert_eq!((&third.task_id, third.order), (&first.task_id, first.order + 1));
    // Pauses double, up to a limit.
    ledger.end(&third, failed.clone(), 1_000, 0.0);
    assert_eq!(ledger.next_due(), Some(1_200));
    for _ in 0..10 {
        let job = take(&mut ledger, u64::MAX).remove(0);
        ledger.end(&job, failed.clone(), 5_000, 1.0);
    }
    assert_eq!(ledger.next_due(), Some(5_700));
    // The next active instance goes on in the same way.
    let mut next = self::ledger();
    assert!(next.load("a", ledger.state("a").unwrap(), 5_001));
    assert_eq!(next.next_due(), Some(6_000));
    let job = take(&mut next, u64::MAX).remove(0);
    assert_eq!(job, take(&mut ledger, u64::MAX).remove(0));
    next.end(&job, placed(), 7_000, 0.0);
    assert_eq!((next.counts().failed, next.counts().open), (0, 0));
}

#[test]
fn a_host_that_is_down_waits_for_its_agent() {
    let mut ledger = ledger();
    put(&mut ledger, "0:10.0.0.1", 1, "x", 0);
    let job = take(&mut ledger, 0).remove(0);
    ledger.end(&job, End::Away, 0, 0.0);
    assert_eq!((ledger.counts().waiting, ledger.next_due()), (1, None));
    put(&mut ledger, "0:10.0.0.1", 1, "y", 10);
    assert_eq!(ledger.next_due(), None, "a change does not bring the agent back");
    assert_eq!(ledger.waiting_after("", 10).len(), 1);
    assert!(ledger.waiting_after("0:10.0.0.1", 10).is_empty());
    assert!(ledger.seen("0:10.0.0.1", "agent", b"e1", 20));
    let job = take(&mut ledger, 20).remove(0);
    let end = End::Placed {
        to: "agent".into(),
        epoch: Bytes::from_static(b"e1"),
        path: "/p".into(),
    };
    ledger.end(&job, end, 21, 0.0);
    assert!(!ledger.seen("0:10.0.0.1", "agent", b"e1", 30), "it has the file");
    assert!(ledger.seen("0:10.0.0.1", "agent", b"e2", 40), "it was installed anew");
    assert_eq!(take(&mut ledger, 40).len(), 1);
}

#[test]
fn pages_are_older_than_events_that_came_after_they_were_asked_for() {
    let mut ledger = ledger();
    put(&mut ledger, "a", 1, "old", 0);
    ledger.begin_pass();
    let asked = ledger.ask();
    put(&mut ledger, "a", 1, "new", 1);
    assert!(ledger.forget(2, &["b"]).is_empty());
    assert_eq!(ledger.want(&identity("a", 1, "old"), Some(asked), 2), Wanted::Stale);
    put(&mut ledger, "b", 2, "x", 3);
    assert_eq!(ledger.forget(2, &[])[0].key, "b");
    assert_eq!(ledger.want(&identity("b", 2, "x"), Some(asked), 4), Wanted::Stale);
    let asked = ledger.ask();
    assert_eq!(ledger.want(&identity("a", 1, "new"), Some(asked), 5), Wanted::Same);
    assert!(ledger.end_pass(true, false).is_empty());
}

#[test]
fn hosts_are_forgotten_when_two_whole_passes_have_missed_them() {
    let mut ledger = ledger();
    put(&mut ledger, "a", 1, "x", 0);
    put(&mut ledger, "b", 2, "x", 0);
    for (whole, gone) in [(true, 0), (false, 0), (true, 1), (true, 0)] {
        ledger.begin_pass();
        let asked = ledger.ask();
        ledger.want(&identity("a", 1, "x"), Some(asked), 1);
        assert_eq!(ledger.end_pass(whole, false).len(), gone, "{whole}");
    }
    assert_eq!(ledger.counts().hosts, 1);
}

#[test]
fn a_host_that_gets_an_agent_id_is_the_same_host() {
    let mut ledger = ledger();
    put(&mut ledger, "0:10.0.0.1", 7, "x", 0);
    assert_eq!(
        put(&mut ledger, "0200id", 7, "y", 1),
        Wanted::New {
            before: Some(Gone {
                key: "0:10.0.0.1".into(),
                others: vec![]
            })
        }
    );
    assert_eq!(ledger.counts().hosts, 1);
    assert_eq!(take(&mut ledger, 1)[0].key.as_ref(), "0200id");
}

#[test]
fn a_push_by_hand_is_another_order() {
    let mut ledger = ledger();
    put(&mut ledger, "a", 1, "x", 0);
    let first = take(&mut ledger, 0).remove(0);
    ledger.end(&first, placed(), 0, 0.0);
    assert!(!ledger.again("b", 0) && ledger.again("a", 0));
    let second = take(&mut ledger, 0).remove(0);
    assert_ne!(second.task_id, first.task_id);
    assert_eq!(second.digest, first.digest);
}

#[derive(Debug, Clone)]
enum Step {
    Put(u8, u8, bool),
    Written(u8),
    Take,
    End(u8, u8),
    Seen(u8, u8),
    Forget(u8),
    Pass(u8, bool),
    Again(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let host = 0..4_u8;
    let step = prop_oneof![
        (host.clone(), 0..3_u8, any::<bool>()).prop_map(|(h, t, page)| Step::Put(h, t, page)),
        host.clone().prop_map(Step::Written),
        Just(Step::Take),
        (any::<u8>(), 0..4_u8).prop_map(|(n, how)| Step::End(n, how)),
        (host.clone(), 0..3_u8).prop_map(|(h, e)| Step::Seen(h, e)),
        host.clone().prop_map(Step::Forget),
        (host.clone(), any::<bool>()).prop_map(|(h, whole)| Step::Pass(h, whole)),
        host.prop_map(Step::Again),
    ];
    proptest::collection::vec(step, 1..80)
}

proptest! {
    // Whatever happens: no host is lost, none is asked twice at a time, and in the end all have what they should.
    #[test]
    fn every_host_gets_what_it_should(steps in steps()) {
        let mut ledger = ledger();
        let name = |host: u8| format!("host{host}");
        let (mut asked, mut now): (Vec<Job>, u64) = (vec![], 0);
        for step in steps {
            now += 50;
            match step {
                Step::Put(host, text, page) => {
                    let one = identity(&name(host), u64::from(host) + 1, &text.to_string());
                    let at = page.then(|| ledger.ask());
                    ledger.want(&one, at, now);
                }
                Step::Written(host) => ledger.written(&name(host), now),
                Step::Take => {
                    let jobs = take(&mut ledger, now);
                    for job in &jobs {
                        prop_assert!(asked.iter().all(|other| other.key != job.key || ledger.state(&job.key).is_none()
                            || other.task_id != job.task_id || other.order != job.order));
                    }
                    asked.extend(jobs);
                }
                Step::End(n, how) if !asked.is_empty() => {
                    let job = asked.remove(usize::from(n) % asked.len());
                    let end = match how {
                        0 => placed(),
                        1 => End::Failed { code: 5, message: "m".into() },
                        2 => End::Away,
                        _ => End::Unsure("u".into()),
                    };
                    ledger.end(&job, end, now, 0.5);
                }
                Step::End(..) => {}
                Step::Seen(host, epoch) => {
                    ledger.seen(&name(host), "a", &[epoch], now);
                }
                Step::Forget(host) => {
                    ledger.forget(u64::from(host) + 1, &[]);
                }
                Step::Pass(host, whole) => {
                    ledger.begin_pass();
                    let at = ledger.ask();
                    ledger.want(&identity(&name(host), u64::from(host) + 1, "1"), Some(at), now);
                    ledger.end_pass(whole, false);
                }
                Step::Again(host) => {
                    ledger.again(&name(host), now);
                }
            }
            let counts = ledger.counts();
            prop_assert!(counts.waiting + counts.open <= counts.hosts, "{counts:?}");
            prop_assert!(counts.failed <= counts.hosts);
        }
        // Everything that is under way ends well, and all agents are there.
        let names: Vec<Arc<str>> = ledger.hosts_after("", 100).into_iter().map(|(key, _)| key).collect();
        for round in 0..3_u64 {
            for key in &names {
                ledger.written(key, now);
                ledger.seen(key, "a", b"e", now);
            }
            now += 10_000 * (round + 1);
            asked.extend(take(&mut ledger, now));
            for job in asked.drain(..) {
                ledger.end(&job, placed(), now, 0.0);
            }
        }
        for key in &names {
            let state = ledger.state(key).unwrap();
            prop_assert_eq!(&state.pushed_digest, &state.digest, "{}", key);
        }
        let counts = ledger.counts();
        prop_assert_eq!((counts.open, counts.waiting, counts.failed), (0, 0, 0));
    }
}
