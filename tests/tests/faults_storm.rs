//! Everybody comes back at once: gse_task is killed with a fleet connected.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::time::{Duration, Instant};

use gse_tests::metrics::Figures;
use gse_tests::swarm::Progress;
use gse_tests::{Site, StoreKind, Swarm, script_body};

/// The most connects in any 100 ms.
fn peak(lines: &[Progress]) -> u64 {
    let mut most = 0;
    for (n, first) in lines.iter().enumerate() {
        let last = lines[n..]
            .iter()
            .take_while(|line| line.at - first.at <= Duration::from_millis(100))
            .last();
        most = most.max(last.map_or(0, |last| last.connects - first.connects));
    }
    most
}

async fn storm(agents: u64, allowed_peak: u64) {
    let mut site = Site::with_store(StoreKind::Redis).await.unwrap();
    site.task_sets = vec!["session.heartbeat_interval_ms=30000".into()];
    site.api_sets = vec!["heartbeat_interval_s=30".into()];
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    let mut swarm = Swarm::start(&site, agents, &[]).unwrap();
    swarm.all_connected(Duration::from_secs(300)).await.unwrap();
    // One fan-out before, so that everybody has something that a restart could lose.
    let ids = swarm.ids();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let before = site
        .api()
        .submit(&script_body(&ids, "root", "#!/bin/sh\ntrue\n", 60))
        .await;
    for part in ids.chunks(1000) {
        site.api().finished(&before, part, Duration::from_secs(60)).await;
    }

    let killed = Instant::now();
    site.the_task().unwrap().kill_9();
    site.start_task().await.unwrap();
    let ready = killed.elapsed();
    let all = swarm.all_connected(Duration::from_secs(120)).await.unwrap() - killed;
    let lines = swarm.since(killed);
    let peak = peak(&lines);
    let figures = Figures::of(site.task.as_ref().unwrap()).await.unwrap();
    let refused: Vec<&str> = figures.lines("gse_task_connections_refused_total").collect();
    println!(
        "{agents} agents: ready after {ready:?}, all back after {all:?}; at most {peak} of them within 100 ms ({:.1} %); refused {refused:?}; {:?}",
        peak as f64 * 100.0 / agents as f64,
        swarm.last().map(|line| line.all)
    );
    assert!(all <= Duration::from_secs(60), "all back only after {all:?}");
    assert!(peak <= allowed_peak, "{peak} of {agents} came within 100 ms");
    // Nobody who was in is put out again to make room.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let figures = Figures::of(site.task.as_ref().unwrap()).await.unwrap();
    let closed: Vec<&str> = figures.lines("gse_task_sessions_closed_total").collect();
    assert_eq!(figures.sum("gse_task_sessions_closed_total"), 0.0, "{closed:?}");
    assert_eq!(figures.sum("gse_task_sessions"), agents as f64);
    assert_eq!(figures.sum("gse_task_sessions_opened_total"), agents as f64);
    // And everybody can be reached.
    let after = site
        .api()
        .submit(&script_body(&ids, "root", "#!/bin/sh\ntrue\n", 60))
        .await;
    for part in ids.chunks(1000) {
        let rows = site.api().finished(&after, part, Duration::from_secs(60)).await;
        assert!(rows.iter().all(|row| row["status"] == 2), "{rows:?}");
    }
    let last = swarm.last().unwrap().all;
    assert_eq!(
        (last["repeated"].as_u64(), last["foreign"].as_u64()),
        (Some(0), Some(0)),
        "{last}"
    );
}

// contract: reliability#F14
#[tokio::test]
async fn three_hundred() {
    // One in twenty of so few is fifteen: by chance some more may come in one of many such spans.
    storm(300, 30).await;
}

// contract: reliability#F14
#[tokio::test]
#[ignore = "full tier: 10,000 agents"]
async fn ten_thousand() {
    storm(10_000, 500).await;
}
