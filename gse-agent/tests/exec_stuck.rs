//! Runners that scripts or people stop, and runners that stay for daemons.

mod exec_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use exec_support::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn runners(host: &Host) -> Vec<i32> {
    processes_with(&format!("runner run {}", host.dir.display()))
}

// contract: v2-http-task#16
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_script_that_stops_its_runner_gains_nothing() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let began = Instant::now();
    let done = host.sh("once", "echo x; kill -STOP $PPID; exit 3").await;
    assert_eq!((done.codes(), done.text()), ((0, FAILED, 3), "x\n"));

    let mark = format!("{}.4741", 500_000 + std::process::id());
    let hold = format!("trap '' TERM; kill -STOP $PPID; while :; do sleep {mark}; done");
    let mut order = host.order("limit", &[&hold]);
    order.atomic_tasks[0].timeout_ms = 500;
    assert_eq!(host.run(order).await.codes(), (0, TIMED_OUT, 124));

    let order = host.order("stop", &[&hold]);
    host.executor.dispatch(order).await;
    let wanted = format!("sleep {mark}");
    host.until("it runs", move || !processes_with(&wanted).is_empty()).await;
    host.executor.terminate(target("stop")).await;
    assert_eq!(host.done("stop", 0).await.codes(), (126, STOPPED, 143));
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    assert_eq!(processes_with(&mark), Vec::<i32>::new());
    assert_eq!(host.executor.counts(), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_runner_of_an_earlier_agent_goes_on() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let mark = format!("{}.4742", 500_000 + std::process::id());
    let mut order = host.order("adopted", &[&format!("echo x; exec sleep {mark}")]);
    order.atomic_tasks[0].timeout_ms = 1000;
    host.executor.dispatch(order).await;
    let wanted = format!("sleep {mark}");
    host.until("it runs", move || !processes_with(&wanted).is_empty()).await;
    let runner = runners(&host);
    let settings = host.config.clone();
    host.stop().await;
    kill(Pid::from_raw(runner[0]), Signal::SIGSTOP).expect("kill");
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(processes_with(&format!("sleep {mark}")).len(), 1, "nobody ends it");
    let mut host = Host::start(settings).await;
    assert_eq!(host.done("adopted", 0).await.codes(), (0, TIMED_OUT, 124));
    assert_eq!(processes_with(&mark), Vec::<i32>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_runner_that_is_stopped_again_and_again_is_ended() {
    let data = tempfile::tempdir().expect("a directory");
    let mut settings = config(data.path());
    settings.runner_margin_ms = 200;
    let mut host = Host::start(settings).await;
    let mark = format!("{}.4743", 500_000 + std::process::id());
    let command = format!("(setsid sleep {mark} &); echo x; trap '' TERM; while :; do sleep {mark}; done");
    let mut order = host.order("again", &[&command]);
    order.atomic_tasks[0].timeout_ms = 1000;
    host.executor.dispatch(order).await;
    let wanted = format!("sleep {mark}");
    host.until("it runs", move || processes_with(&wanted).len() >= 2).await;
    let runner = Pid::from_raw(runners(&host)[0]);
    let over = Arc::new(AtomicBool::new(false));
    let until = Arc::clone(&over);
    let stopping =
        tokio::task::spawn_blocking(
            move || {
                while !until.load(Ordering::Relaxed) && kill(runner, Signal::SIGSTOP).is_ok() {}
            },
        );
    let done = host.done("again", 0).await;
    over.store(true, Ordering::Relaxed);
    stopping.await.expect("the stopper");
    // Between two signals it may have come so far as to end the script's first process, or everything.
    let ways = [(0, TIMED_OUT, 124), (-1, LOST, 255)];
    assert!(ways.contains(&done.codes()) && done.text() == "x\n", "{done:?}");
    if done.row.status == LOST {
        assert!(done.row.error_msg.contains("did not react"), "{}", done.row.error_msg);
    }
    assert_eq!(processes_with(&mark), Vec::<i32>::new());
    let here = format!("runner run {}", host.dir.display());
    host.until("its runner has gone", move || processes_with(&here).is_empty())
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_so_many_runners_stay_for_daemons() {
    let data = tempfile::tempdir().expect("a directory");
    let mut settings = config(data.path());
    settings.max_lingering = 2;
    let mut host = Host::start(settings).await;
    let mark = format!("{}.4744", 500_000 + std::process::id());
    let mut first = Vec::new();
    for n in 0..4 {
        let done = host
            .sh(&format!("daemon-{n}"), &format!("setsid sleep {mark} & exit 0"))
            .await;
        assert_eq!(done.codes(), (0, SUCCEEDED, 0));
        if n == 1 {
            first = runners(&host);
        }
    }
    assert_eq!((first.len(), runners(&host).len()), (2, 4));
    let here = format!("runner run {}", host.dir.display());
    host.until("two have left", move || processes_with(&here).len() == 2)
        .await;
    assert!(
        runners(&host).iter().all(|runner| !first.contains(runner)),
        "the oldest"
    );
    // The next sweep finds nothing to do.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(runners(&host).len(), 2);
    let daemons = processes_with(&format!("sleep {mark}"));
    assert_eq!(daemons.len(), 4, "daemons that write nothing do not notice");
    for pid in daemons {
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill");
    }
}
