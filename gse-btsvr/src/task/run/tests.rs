use super::*;
use crate::task::layout::tests::header;
use proptest::prelude::*;

const PATIENCE: Patience = Patience {
    lost_ms: 60_000,
    stop_ms: 5_000,
    tries: 3,
};

fn run_of(header: XferHeader) -> Run {
    let layout = Arc::new(Layout::new(&header));
    let mut run = Run::new(Arc::new(header), layout, PATIENCE, HashMap::default());
    run.begin(1_000);
    run
}

fn store_all(run: &mut Run) {
    let rows: Vec<u32> = run.unstored(1_000).into_iter().map(|(row, _)| row).collect();
    run.stored(&rows, HashMap::default());
}

fn said(phase: Phase, moved: u64) -> Report {
    Report {
        phase: phase.into(),
        size: 200,
        moved,
        ..Report::default()
    }
}

fn failed(code: i32) -> Report {
    Report {
        phase: Phase::Failed.into(),
        code,
        message: "why".into(),
        ..Report::default()
    }
}

#[test]
fn from_the_source_to_the_last_target() {
    // contract: v2-http-task#29, v2-http-task#35, v2-http-task#36, v2-http-task#39
    let mut run = run_of(header());
    assert_eq!(run.effects(), [Effect::Ask(0), Effect::Ask(1)]);
    assert!((0..8).all(|row| run.view(row).code == 115));
    run.report(0, &said(Phase::Moving, 0), 1_100);
    run.ready(0, 200, false);
    assert_eq!(run.effects(), [2, 3, 4, 7].map(Effect::Ask));
    run.report(2, &said(Phase::Moving, 100), 1_200);
    assert_eq!((run.view(2).progress, run.view(0).progress), (50, 12));
    // Never backwards.
    run.report(2, &said(Phase::Moving, 20), 1_250);
    assert_eq!(run.view(2).progress, 50);
    run.report(2, &said(Phase::Verifying, 200), 1_260);
    assert_eq!(run.view(2).status, 508);
    for row in [2, 3, 4, 7] {
        assert_eq!(run.view(0).code, 115);
        run.report(row, &said(Phase::Done, 200), 1_300);
    }
    assert_eq!(run.effects(), [Effect::Over(0)]);
    // Not shown before it is stored.
    assert_eq!((run.view(2).code, run.view(2).progress), (115, 99));
    store_all(&mut run);
    for row in [0, 2, 3, 4, 7] {
        let view = run.view(row);
        assert_eq!((view.code, view.progress), (0, 100));
        assert!(view.start_ms > 0 && view.end_ms >= view.start_ms);
        assert_eq!(view.status, if row == 0 { 590 } else { 592 });
    }
    assert!(!run.is_finished() && run.open_rows() == 3);
}

#[test]
fn one_target_that_fails_spoils_nothing() {
    // contract: p2p#28
    let mut run = run_of(header());
    run.ready(0, 200, false);
    for row in [3, 4, 7] {
        run.report(row, &said(Phase::Done, 200), 1_300);
    }
    run.report(2, &failed(705), 1_400);
    store_all(&mut run);
    assert_eq!((run.view(0).code, run.view(2).code, run.view(3).code), (0, 705, 0));
}

#[test]
fn a_source_that_fails_takes_its_own_downloads_along_and_no_others() {
    // contract: v2-http-task#38
    let mut run = run_of(header());
    run.effects();
    run.report(0, &failed(104), 1_100);
    store_all(&mut run);
    assert_eq!(run.view(0).code, 104);
    for row in [2, 3, 4, 7] {
        let view = run.view(row);
        assert!(
            view.code == 104 && view.message.contains("source failed: why"),
            "{view:?}"
        );
    }
    assert_eq!((run.view(1).code, run.view(5).code, run.open_rows()), (115, 115, 3));
    assert_eq!(run.effects(), [Effect::Over(0)]);
}

#[test]
fn what_was_sent_ends_with_what_its_agent_says() {
    // contract: v2-http-task#40
    let mut run = run_of(header());
    run.ready(0, 200, false);
    run.effects();
    run.stop(|_| true, 2_000);
    let cancelled = run.effects();
    assert!(cancelled.contains(&Effect::Cancel(0)) && cancelled.contains(&Effect::Cancel(2)));
    // It had just been placed.
    run.report(2, &said(Phase::Done, 200), 2_100);
    run.report(3, &failed(126), 2_100);
    run.tick(2_200, |_| true);
    // Those of the other upload had not been sent at all.
    assert_eq!(run.open_rows(), 3);
    run.tick(7_001, |_| true);
    store_all(&mut run);
    assert!(run.is_finished());
    let codes: Vec<i32> = (0..8).map(|row| run.view(row).code).collect();
    assert_eq!(codes, [126, 126, 0, 126, 126, 126, 126, 126]);
}

#[test]
fn only_the_named_end() {
    let mut run = run_of(header());
    run.stop(|endpoint| endpoint.agent_id == "y", 2_000);
    store_all(&mut run);
    let codes: Vec<i32> = (0..8).map(|row| run.view(row).code).collect();
    assert_eq!(codes, [115, 115, 115, 126, 115, 115, 126, 115]);
}

#[test]
fn everything_is_over_some_time_after_the_deadline() {
    // contract: v2-http-task#40
    let mut run = run_of(header());
    run.ready(0, 200, false);
    run.tick(99_999, |_| true);
    assert_eq!(run.open_rows(), 8);
    run.tick(100_000, |_| true);
    run.tick(105_000, |_| true);
    store_all(&mut run);
    assert!(run.is_finished());
    assert!((0..8).all(|row| run.view(row).code == 120));
}

#[test]
fn agents_that_are_away() {
    let mut run = run_of(header());
    run.ready(0, 200, false);
    run.effects();
    let away = CallFailed::Offline("offline".into());
    run.call_failed(2, &away, 1_100);
    // One that had begun gets time to come back.
    run.report(3, &said(Phase::Moving, 10), 1_200);
    run.tick(21_200, |_| false);
    assert!(run.effects().contains(&Effect::Ask(3)));
    run.call_failed(3, &away, 21_300);
    run.tick(24_300, |_| false);
    assert!(run.effects().contains(&Effect::Ask(3)));
    run.call_failed(3, &away, 62_000);
    // One that does not answer.
    for at in [30_000, 40_000, 50_000] {
        run.call_failed(4, &CallFailed::Passing("slow".into()), at);
        run.tick(at + 9_000, |_| true);
    }
    store_all(&mut run);
    assert_eq!([2, 3, 4].map(|row| run.view(row).code), [117, 117, 117]);
    assert_eq!(run.view(0).code, 115);
}

#[test]
fn when_no_target_is_there_nothing_is_said_to_be_sent() {
    let mut run = run_of(header());
    for row in [5, 6] {
        run.fail(row, 117, "offline", 1_100);
    }
    store_all(&mut run);
    assert_eq!(run.view(1).code, 117);
}

#[test]
fn a_new_life_goes_on_where_the_old_one_stopped() {
    let ended = |code| StoredEnd {
        code,
        start_ms: 1,
        end_ms: 2,
        progress: 100,
        ..StoredEnd::default()
    };
    let header = header();
    let layout = Arc::new(Layout::new(&header));
    // The row of upload 1 was stored, but not that of its last download; upload 0 has failed, and one download was told.
    let ends = [(1, ended(0)), (5, ended(0)), (0, ended(104)), (2, ended(104))];
    let mut run = Run::new(Arc::new(header), layout, PATIENCE, ends.into_iter().collect());
    run.begin(5_000);
    assert_eq!(run.effects(), [Effect::Over(0), Effect::Ask(1)]);
    assert_eq!(run.open_rows(), 1);
    run.ready(1, 10, false);
    assert_eq!(run.effects(), [Effect::Ask(6)]);
    run.report(6, &said(Phase::Done, 10), 5_100);
    store_all(&mut run);
    assert!(run.is_finished());
    assert_eq!((run.view(1).code, run.view(6).code, run.view(7).code), (0, 0, 104));
}

#[derive(Debug, Clone)]
enum Event {
    Report(u32, i32, u64, i32),
    Ready(u32, bool),
    Failed(u32, u8),
    Stop(u8),
    Tick(bool),
    Store,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0..8u32, 0..5i32, 0..300u64, prop_oneof![Just(0), Just(115), Just(126), Just(705)])
            .prop_map(|(row, phase, moved, code)| Event::Report(row, phase, moved, code)),
        2 => (0..2u32, any::<bool>()).prop_map(|(upload, apart)| Event::Ready(upload, apart)),
        2 => (0..8u32, 0..3u8).prop_map(|(row, kind)| Event::Failed(row, kind)),
        1 => (0..4u8).prop_map(Event::Stop),
        3 => any::<bool>().prop_map(Event::Tick),
        2 => Just(Event::Store),
    ]
}

proptest! {
    // contract: v2-http-task#29, v2-http-task#37, v2-http-task#39, p2p#30
    #[test]
    fn whatever_happens_every_row_ends_once_and_nothing_goes_backwards(
        events in prop::collection::vec((event(), 0..4_000u64), 0..120)
    ) {
        let mut run = run_of(header());
        let layout = Layout::new(&header());
        let mut now = 1_000;
        let mut shown: Vec<View> = (0..8).map(|row| run.view(row)).collect();
        let mut over = [false; 2];
        for (event, pause) in events {
            now += pause;
            match event {
                Event::Report(row, phase, moved, code) => {
                    let report = Report { phase, moved, code, size: 200, ..Report::default() };
                    run.report(row, &report, now);
                }
                Event::Ready(upload, apart) => run.ready(upload, 200, apart),
                Event::Failed(row, kind) => {
                    let text = || "why".to_owned();
                    let kinds = [CallFailed::Offline(text()), CallFailed::Unsupported(text()), CallFailed::Passing(text())];
                    run.call_failed(row, &kinds[usize::from(kind)], now);
                }
                Event::Stop(who) => {
                    let name = ["src", "x", "y", "z"][usize::from(who)];
                    run.stop(|endpoint| endpoint.agent_id == name, now);
                }
                Event::Tick(linked) => run.tick(now, |_| linked),
                Event::Store => store_all(&mut run),
            }
            for effect in run.effects() {
                if let Effect::Over(upload) = effect {
                    prop_assert!(!std::mem::replace(&mut over[upload as usize], true));
                    prop_assert!(layout.downloads_of(upload).all(|row| run.is_over(row)));
                }
            }
            for upload in 0..2 {
                if layout.downloads_of(upload).all(|row| run.is_over(row)) {
                    prop_assert!(run.is_over(upload), "an upload outlives its downloads");
                }
            }
            for row in 0..8 {
                let (old, new) = (&shown[row as usize], run.view(row));
                prop_assert!(new.progress >= old.progress && new.progress <= 100, "{old:?} {new:?}");
                if old.code != 115 {
                    prop_assert_eq!(old, &new, "an end that changes");
                }
                if new.code != 115 {
                    prop_assert!(new.end_ms >= new.start_ms && new.start_ms > 0);
                    prop_assert_eq!(new.status, if row < 2 { 590 } else { 592 });
                }
                shown[row as usize] = new;
            }
        }
        // The deadline ends everything that agents do not.
        for _ in 0..4 {
            now += 110_000;
            run.tick(now, |_| false);
        }
        store_all(&mut run);
        prop_assert!(run.is_finished());
        prop_assert_eq!(run.effects().iter().filter(|e| matches!(e, Effect::Over(_))).count() + over.iter().filter(|o| **o).count(), 2);
    }
}

#[test]
fn what_another_life_may_have_sent_is_told_to_stop() {
    let header = header();
    let layout = Arc::new(Layout::new(&header));
    let mut run = Run::new(Arc::new(header), layout, PATIENCE, HashMap::default());
    run.stop_held(|_| true, 1_000);
    let cancelled: Vec<Effect> = run.effects();
    for row in [0, 2, 3] {
        assert!(cancelled.contains(&Effect::Cancel(row)), "{row}: {cancelled:?}");
    }
    // The agent's word counts: it may have been done before.
    run.report(2, &said(Phase::Done, 200), 1_100);
    run.report(3, &failed(126), 1_100);
    run.tick(1_000 + PATIENCE.stop_ms, |_| false);
    store_all(&mut run);
    assert_eq!((run.view(2).code, run.view(3).code, run.view(4).code), (0, 126, 126));
    assert!(run.is_finished());
}
