//! What survives: the agent's end, its journal's loss, lost sessions, killed runners, and more work than there is room for.

mod exec_support;

use std::time::{Duration, Instant};

use exec_support::*;
use gse_agent::exec::{Executor, Link, Report};
use gse_core::lifecycle::Lifecycle;
use gse_proto::session::Stored;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn runs(file: &std::path::Path) -> usize {
    std::fs::read_to_string(file)
        .map(|text| text.lines().count())
        .unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_agent_reports_the_true_exit() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let count = data.path().join("count");
    let go = data.path().join("go");
    let script = |n: u32| {
        format!(
            "echo x >> {}; echo before; while [ ! -e {} ]; do sleep 0.05; done; seq 1 50000; echo after; exit {n}",
            count.display(),
            go.display()
        )
    };
    let order = host.order("over", &[&script(7), "echo never"]);
    host.executor.dispatch(order.clone()).await;
    let seen = count.clone();
    host.until("the script runs", move || runs(&seen) == 1).await;
    let epoch = host.executor.epoch();

    // It still runs when the next agent comes.
    let mut host = host.restart().await;
    assert_eq!(host.executor.epoch(), epoch);
    assert_eq!(host.executor.held(), [target("over")]);
    host.executor.dispatch(order.clone()).await;
    std::fs::write(&go, "").expect("write");
    let done = host.done("over", 0).await;
    assert_eq!(done.codes(), (0, FAILED, 7));
    let numbers: String = (1..=50_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(done.text(), format!("before\n{numbers}after\n"));
    assert_eq!(host.done("over", 1).await.codes(), (101, FAILED, 1));
    assert_eq!(runs(&count), 1);

    // Known to be over, after another restart too: reported again, not run again.
    let executor = host.executor.clone();
    host.until("it is forgotten", move || executor.held().is_empty()).await;
    let mut host = host.restart().await;
    host.executor.dispatch(order).await;
    let again = host.executor.clone();
    assert!(again.held().is_empty());
    let row = loop {
        match tokio::time::timeout(PATIENCE, host.reports.recv())
            .await
            .expect("in time")
            .expect("a report")
        {
            Report::Row(row) if row.atomic == 0 => break row,
            _ => {}
        }
    };
    assert_eq!(
        (row.status, row.exit_code, row.output_len),
        (FAILED, 7, done.output.len() as u64)
    );
    assert_eq!(runs(&count), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ends_while_the_agent_is_away_is_reported() {
    let data = tempfile::tempdir().expect("a directory");
    let host = Host::start(config(data.path())).await;
    let settings = host.config.clone();
    let order = host.order("away", &["sleep 0.6; echo 'job_success:[done]'; exit 5"]);
    host.executor.dispatch(order).await;
    let mut long = host.order("limit", &["sleep 300.12345"]);
    long.atomic_tasks[0].timeout_ms = 700;
    host.executor.dispatch(long).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    host.stop().await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(
        processes_with("sleep 300.12345").is_empty(),
        "the time limit holds without the agent"
    );
    let mut host = Host::start(settings).await;
    let done = host.done("away", 0).await;
    assert_eq!(done.codes(), (0, FAILED, 5));
    assert_eq!(done.row.tag, "done");
    assert!(done.row.end_ms - done.row.start_ms < 1400, "the true times");
    assert_eq!(host.done("limit", 0).await.codes(), (0, TIMED_OUT, 124));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_runner_is_noticed_and_leaves_nothing_behind() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let mark = format!("{}.4721", 400_000 + std::process::id());
    let command = format!(
        "echo half; (setsid sh -c '(setsid sleep {mark} >/dev/null 2>&1 &)' &); trap '' TERM; while :; do sleep {mark}; done"
    );
    let order = host.order("killed", &[&command]);
    host.executor.dispatch(order.clone()).await;
    let wanted = format!("sleep {mark}");
    host.until("it runs", move || processes_with(&wanted).len() >= 3).await;
    let runners = processes_with(&format!("runner run {}", data.path().display()));
    assert_eq!(runners.len(), 1);
    kill(Pid::from_raw(runners[0]), Signal::SIGKILL).expect("kill");
    let began = Instant::now();
    let done = host.done("killed", 0).await;
    assert_eq!(done.codes(), (-1, LOST, 255));
    assert_eq!(done.text(), "half\n");
    assert!(done.row.error_msg.contains("runner"), "{}", done.row.error_msg);
    assert!(began.elapsed() < Duration::from_secs(3));
    assert_eq!(processes_with(&mark), Vec::<i32>::new());
    host.executor.dispatch(order).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(processes_with(&mark), Vec::<i32>::new(), "never run again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_or_foreign_journal_never_leads_to_a_second_run() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let count = data.path().join("count");
    let order = host.order("first", &[&format!("echo x >> {}", count.display())]);
    assert_eq!(host.run(order.clone()).await.codes(), (0, SUCCEEDED, 0));
    let settings = host.config.clone();
    let epoch = host.executor.epoch();
    assert!(epoch.len() >= 16);
    let executor = host.executor.clone();
    host.until("it is forgotten", move || executor.held().is_empty()).await;
    host.stop().await;

    std::fs::remove_dir_all(data.path().join("tasks")).expect("remove");
    std::fs::remove_file(data.path().join("journal")).expect("remove");
    let mut host = Host::start(settings.clone()).await;
    assert_ne!(host.executor.epoch(), epoch);
    let done = host.run(order.clone()).await;
    assert_eq!(done.codes(), (-1, LOST, 255));
    assert!(done.row.error_msg.contains("unknown whether it ran"));
    assert_eq!(runs(&count), 1);
    host.stop().await;

    // A damaged one.
    std::fs::write(data.path().join("journal"), "rubbish").expect("write");
    let host = Host::start(settings.clone()).await;
    let epoch = host.executor.epoch();
    let kept = host.order("copied", &["sleep 100"]);
    host.executor.dispatch(kept).await;
    host.stop().await;

    // A copy on another host.
    let mut copy = settings;
    copy.machine_id = "another-host".to_owned();
    let host = Host::start(copy).await;
    assert_ne!(host.executor.epoch(), epoch);
    assert!(
        host.executor.held().is_empty(),
        "the other host's tasks are not this one's"
    );
    for pid in processes_with(&format!("run {}", data.path().display())) {
        kill(Pid::from_raw(pid), Signal::SIGTERM).expect("kill");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_entries_are_unknown_and_do_no_harm() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    host.acknowledge = false;
    for task in ["intent", "end"] {
        host.sh(task, "echo out; exit 3").await;
    }
    let settings = host.config.clone();
    host.stop().await;
    let mut seen = 0;
    for entry in std::fs::read_dir(data.path().join("tasks")).expect("list") {
        let dir = entry.expect("an entry").path();
        let intent = std::fs::read(dir.join("intent")).expect("read");
        let file = if intent.windows(6).any(|w| w == b"intent") {
            "intent"
        } else {
            "0.end"
        };
        let mut bytes = std::fs::read(dir.join(file)).expect("read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(dir.join(file), bytes).expect("write");
        seen += 1;
    }
    assert_eq!(seen, 2);
    let nameless = data.path().join("tasks/nameless");
    std::fs::create_dir(&nameless).expect("mkdir");
    std::fs::write(nameless.join("intent"), "rubbish").expect("write");
    let mut host = Host::start(settings).await;
    assert_eq!(host.done("intent", 0).await.codes(), (0, FAILED, 3), "its end is whole");
    assert_eq!(host.done("end", 0).await.codes(), (-1, LOST, 255));
    assert!(!nameless.exists() && data.path().join("aside").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_starts_too_late_or_unrecorded() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let count = data.path().join("count");
    let mut order = host.order("late", &[&format!("echo x >> {}", count.display())]);
    order.not_after_ms = now_ms() - 1;
    let done = host.run(order).await;
    assert_eq!(done.codes(), (120, FAILED, 1));
    assert!(done.row.error_msg.contains("not started in time"));
    // The journal cannot be written.
    std::fs::rename(data.path().join("tasks"), data.path().join("moved")).expect("rename");
    std::fs::write(data.path().join("tasks"), "").expect("write");
    let done = host.sh("unrecorded", &format!("echo x >> {}", count.display())).await;
    assert_eq!(done.codes(), (101, FAILED, 1));
    assert!(done.row.error_msg.contains("journal"), "{}", done.row.error_msg);
    assert_eq!(runs(&count), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_dispatch_many_times_is_one_run() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let count = data.path().join("count");
    let order = host.order("twice", &[&format!("echo x >> {}; sleep 0.3", count.display())]);
    let calls = (0..8).map(|_| host.executor.dispatch(order.clone()));
    futures::future::join_all(calls).await;
    host.executor.dispatch(order.clone()).await;
    assert_eq!(host.done("twice", 0).await.codes(), (0, SUCCEEDED, 0));
    host.executor.dispatch(order.clone()).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(runs(&count), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_scripts_twenty_at_a_time() {
    let data = tempfile::tempdir().expect("a directory");
    let mut settings = config(data.path());
    settings.concurrency = 20;
    settings.queue_wait_ms = 60_000;
    let mut host = Host::start(settings).await;
    let began = Instant::now();
    for n in 0..200 {
        let order = host.order(&format!("many-{n}"), &[&format!("echo {n}; exit {}", n % 3)]);
        host.executor.dispatch(order).await;
        assert!(host.executor.counts().0 <= 20);
    }
    for n in 0..200 {
        let done = host.done(&format!("many-{n}"), 0).await;
        assert_eq!(done.row.exit_code, n % 3);
        assert_eq!(done.text(), format!("{n}\n"));
        assert!(host.executor.counts().0 <= 20);
    }
    println!("200 scripts in {:?}", began.elapsed());
    let executor = host.executor.clone();
    host.until("all are forgotten", move || executor.held().is_empty())
        .await;
    let here = data.path().display().to_string();
    host.until("no runner is left", move || processes_with(&here).is_empty())
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_much_work_is_refused_with_a_reason() {
    let data = tempfile::tempdir().expect("a directory");
    let mut settings = config(data.path());
    settings.concurrency = 1;
    settings.queue = 1;
    settings.queue_wait_ms = 400;
    let mut host = Host::start(settings).await;
    let long = host.order("long", &["sleep 30.4731"]);
    host.executor.dispatch(long).await;
    let running = host.executor.clone();
    host.until("it runs", move || running.counts() == (1, 0)).await;
    let waiting = host.order("waiting", &["echo x"]);
    host.executor.dispatch(waiting).await;
    let queued = host.executor.clone();
    host.until("it waits", move || queued.counts() == (1, 1)).await;
    let done = host.sh("surplus", "echo x").await;
    assert_eq!(done.codes(), (121, FAILED, 1));
    assert!(done.row.error_msg.contains("busy"));
    let done = host.done("waiting", 0).await;
    assert_eq!(done.codes(), (121, FAILED, 1));
    let stopped = host.order("stopped", &["echo x"]);
    host.executor.dispatch(stopped).await;
    host.executor.terminate(target("stopped")).await;
    assert_eq!(host.done("stopped", 0).await.codes(), (126, STOPPED, 143));
    host.executor.terminate(target("long")).await;
    assert_eq!(host.done("long", 0).await.codes(), (126, STOPPED, 143));
    assert_eq!(host.sh("now", "echo x").await.codes(), (0, SUCCEEDED, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waited_when_the_agent_ended_is_started_by_the_next_one() {
    let data = tempfile::tempdir().expect("a directory");
    let mut settings = config(data.path());
    settings.concurrency = 1;
    let host = Host::start(settings).await;
    let count = data.path().join("count");
    let first = host.order("first", &["sleep 0.8"]);
    host.executor.dispatch(first).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let second = host.order("second", &[&format!("echo x >> {}", count.display())]);
    host.executor.dispatch(second).await;
    let mut third = host.order("third", &[&format!("echo x >> {}", count.display())]);
    third.not_after_ms = now_ms() + 300;
    host.executor.dispatch(third).await;
    let settings = host.config.clone();
    host.stop().await;
    tokio::time::sleep(Duration::from_millis(400)).await;

    // Not before a session has told the time.
    let life = Lifecycle::new("exec-test");
    let executor = Executor::start(settings.clone(), &life).await.expect("start");
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert_eq!(runs(&count), 0);
    assert_eq!(executor.held().len(), 3);
    life.abort();
    life.finished(Duration::from_secs(1)).await;
    drop(executor);

    let mut host = Host::start(settings).await;
    assert_eq!(host.done("first", 0).await.codes(), (0, SUCCEEDED, 0));
    assert_eq!(host.done("second", 0).await.codes(), (0, SUCCEEDED, 0));
    assert_eq!(host.done("third", 0).await.codes(), (120, FAILED, 1));
    assert_eq!(runs(&count), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn windows_are_kept_and_a_new_session_goes_on_where_the_old_one_was() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let small = Link {
        stream_window: 100_000,
        session_window: 150_000,
        server_time_ms: now_ms(),
    };
    host.reports = host.executor.attach(small);
    let order = host.order("stream", &["seq 1 100000; sleep 2"]);
    host.executor.dispatch(order).await;
    let (mut sent, mut stored) = (0u64, 0u64);
    // A server that does not answer gets a window's worth, and after a while the same again.
    let until = Instant::now() + Duration::from_millis(1500);
    let mut again = false;
    while let Ok(report) = tokio::time::timeout_at(until.into(), host.reports.recv()).await {
        if let Report::Output(output) = report.expect("the session goes on") {
            again |= output.offset < sent;
            sent = sent.max(output.offset + output.data.len() as u64);
        }
        assert!(sent <= 100_000);
    }
    assert!(again && sent > 90_000, "{sent}");
    // It stores a part and is gone; the next session begins behind that part.
    host.executor.stored(Stored {
        target: Some(target("stream")),
        atomic: 0,
        offset: 5000,
        terminal: false,
    });
    stored += 5000;
    let mut old = std::mem::replace(&mut host.reports, host.executor.attach(link()));
    while old.recv().await.is_some() {}
    let numbers: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    host.stored.insert(
        ("stream".to_owned(), 0),
        numbers.as_bytes()[..usize::try_from(stored).expect("a length")].to_vec(),
    );
    let done = host.done("stream", 0).await;
    assert_eq!(done.text(), numbers);
    assert!(host.running.contains(&("stream".to_owned(), 0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_repeated_until_they_are_stored() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    host.acknowledge = false;
    assert_eq!(host.sh("again", "echo x").await.codes(), (0, SUCCEEDED, 0));
    for _ in 0..2 {
        host.done.clear();
        assert_eq!(host.done("again", 0).await.text(), "x\n");
    }
    assert_eq!(host.executor.held(), [target("again")]);
    host.acknowledge = true;
    host.done.clear();
    host.done("again", 0).await;
    let executor = host.executor.clone();
    host.until("it is forgotten", move || executor.held().is_empty()).await;
    assert!(!host.take(Duration::from_millis(700)).await, "nothing is left to say");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_agent_per_directory() {
    let data = tempfile::tempdir().expect("a directory");
    let host = Host::start(config(data.path())).await;
    let second = Executor::start(host.config.clone(), &Lifecycle::new("exec-test")).await;
    assert!(second.is_err_and(|error| error.to_string().contains("another agent")));
}
