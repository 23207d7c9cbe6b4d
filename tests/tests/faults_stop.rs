//! A server told to stop under load, once and twice.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gse_tests::script::{counting, runs_by_target};
use gse_tests::{Api, Fault, Site, StoreKind, script_body};
use nix::sys::signal::Signal;

const AGENTS: [&str; 2] = [
    "020000000242010a00002f17521298676531",
    "020000000242010a00002f17521298676532",
];
/// How long a server that stops may take (`runtime.drain_timeout_ms`).
const GRACE: Duration = Duration::from_secs(10);

/// Submits without a pause until told to end; the tasks that were accepted.
async fn load(api: Api, body: serde_json::Value, over: Arc<AtomicBool>) -> Vec<String> {
    let mut accepted = Vec::new();
    while !over.load(Ordering::Relaxed) {
        match api.try_submit(&body).await {
            Some(Ok(task)) => accepted.push(task),
            // Refused at once is what is wanted; asking again at full speed is not.
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    accepted
}

// contract: reliability#F17
#[tokio::test]
async fn once_drains() {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    site.task_sets
        .push(format!("runtime.drain_timeout_ms={}", GRACE.as_millis()));
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    let mut agents = Vec::new();
    for (n, id) in AGENTS.iter().enumerate() {
        agents.push(site.agent(id, &format!("10.3.1.{n}")).await.unwrap());
    }
    let marks = site.path().join("runs");
    let over = Arc::new(AtomicBool::new(false));
    let body = script_body(&AGENTS, "root", &counting(&marks, 1.0, 0), 60);
    // Agents run eight at a time by default: what is submitted faster than that waits on the host.
    let loads: Vec<_> = [site.api(), site.task_api()]
        .into_iter()
        .map(|api| tokio::spawn(load(api, body.clone(), Arc::clone(&over))))
        .collect();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let direct = site.task_api();
    let task = site.the_task().unwrap();
    let asked = Instant::now();
    task.signal(Signal::SIGTERM);
    tokio::time::sleep(Duration::from_millis(100)).await;
    // New work is refused at once: by an envelope, or because nobody listens.
    let answer = direct.try_submit(&body).await;
    assert!(matches!(answer, None | Some(Err(1_000_914))), "{answer:?}");
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    let status = task.wait(GRACE + Duration::from_secs(2)).await.unwrap();
    println!("stopped after {:?}", asked.elapsed());
    assert_eq!(status.code(), Some(0), "{status}");
    over.store(true, Ordering::Relaxed);
    let mut accepted = Vec::new();
    for load in loads {
        accepted.extend(load.await.unwrap());
    }
    assert!(!accepted.is_empty());
    // Handed over: to its next life, here.
    site.start_task().await.unwrap();
    for task in &accepted {
        for row in site
            .api()
            .finished_at_last(task, &AGENTS, Duration::from_secs(90))
            .await
        {
            assert_eq!(
                (row["error_code"].as_i64(), row["status"].as_i64()),
                (Some(0), Some(2)),
                "{row}"
            );
        }
    }
    let runs = runs_by_target(&marks);
    assert!(runs.values().all(|n| *n == 1), "run twice: {runs:?}");
    assert!(
        runs.len() >= accepted.len() * AGENTS.len(),
        "{} runs of {} tasks",
        runs.len(),
        accepted.len()
    );
}

// contract: reliability#F17
#[tokio::test]
async fn twice_leaves_at_once() {
    let mut site = Site::start_behind_a_proxy(StoreKind::Embedded).await.unwrap();
    let _agent = site.agent(AGENTS[0], "10.3.1.1").await.unwrap();
    let marks = site.path().join("runs");
    let body = script_body(&AGENTS[..1], "root", &counting(&marks, 1.0, 0), 60);
    let running = site.api().submit(&body).await;
    // Something that keeps a stopping server: a store that does not answer.
    site.store_proxy.as_ref().unwrap().set(Fault::Hang);
    let direct = site.task_api();
    let waiting = tokio::spawn(async move { direct.try_submit(&body).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let task = site.the_task().unwrap();
    task.signal(Signal::SIGTERM);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(task.is_running(), "nothing has kept it");
    let again = Instant::now();
    task.signal(Signal::SIGTERM);
    let status = task.wait(Duration::from_secs(5)).await.unwrap();
    println!("left {:?} after the second signal", again.elapsed());
    assert!(again.elapsed() <= Duration::from_secs(1), "{:?}", again.elapsed());
    // By itself, and saying that it left something behind.
    assert_eq!((status.signal(), status.code()), (None, Some(1)), "{status}");
    assert!(!matches!(waiting.await.unwrap(), Some(Ok(_))));
    site.store_proxy.as_ref().unwrap().set(Fault::None);
    site.start_task().await.unwrap();
    let rows = site
        .api()
        .finished_at_last(&running, &AGENTS[..1], Duration::from_secs(60))
        .await;
    assert_eq!(
        (rows[0]["error_code"].as_i64(), rows[0]["screen"].as_str()),
        (Some(0), Some("begun\nend\n"))
    );
    assert!(runs_by_target(&marks).values().all(|n| *n == 1));
}

// contract: reliability#F17
#[tokio::test]
async fn the_front_door_drains_too() {
    let mut site = Site::start(StoreKind::Embedded).await.unwrap();
    let _agent = site.agent(AGENTS[0], "10.3.1.1").await.unwrap();
    let marks = site.path().join("runs");
    let body = script_body(&AGENTS[..1], "root", &counting(&marks, 0.0, 0), 60);
    let over = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn(load(site.api(), body.clone(), Arc::clone(&over)));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut api = site.api.take().unwrap();
    let status = api.terminate(Duration::from_secs(10)).await.unwrap();
    assert_eq!(status.code(), Some(0), "{status}");
    over.store(true, Ordering::Relaxed);
    let accepted = load.await.unwrap();
    assert!(!accepted.is_empty());
    for task in &accepted {
        let rows = site
            .task_api()
            .finished_at_last(task, &AGENTS[..1], Duration::from_secs(60))
            .await;
        assert_eq!(rows[0]["status"], 2, "{rows:?}");
    }
    // What was told is what was run; at most the one call that was cut may be more.
    let runs = runs_by_target(&marks);
    assert!(runs.values().all(|n| *n == 1));
    assert!(
        (accepted.len()..=accepted.len() + 1).contains(&runs.len()),
        "{} of {}",
        runs.len(),
        accepted.len()
    );
}
