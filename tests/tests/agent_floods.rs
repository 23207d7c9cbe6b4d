//! Scripts that write without end: the agent keeps what its limit allows, says exactly how much there was, and nobody else on the host
//! or behind the same agent notices.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gse_tests::{Api, Child, Site, StoreKind, script_body};

const AGENT: &str = "020000000242010a00002f17521298676603";
/// What an agent or a runner may take beyond what it takes when idle.
const MORE: u64 = 32 << 20;

/// Resident bytes of a process; 0 when it is gone.
fn resident(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    kib.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}

/// The agent's children: its runners.
fn runners(agent: i32) -> Vec<i32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{agent}/task")) else {
        return Vec::new();
    };
    let lists = threads
        .flatten()
        .map(|thread| std::fs::read_to_string(thread.path().join("children")).unwrap_or_default());
    lists
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<i32>>()
        })
        .collect()
}

/// Watches the memory of the agent and of its largest runner until told to stop.
fn watch(agent: &Child, over: &Arc<AtomicBool>) -> (Arc<AtomicU64>, Arc<AtomicU64>) {
    let most = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (own, runner, over, agent) = (Arc::clone(&most.0), Arc::clone(&most.1), Arc::clone(over), agent.pid());
    tokio::spawn(async move {
        while !over.load(Ordering::Relaxed) {
            own.fetch_max(resident(agent), Ordering::Relaxed);
            for pid in runners(agent) {
                runner.fetch_max(resident(pid), Ordering::Relaxed);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    most
}

/// How long each of `count` short scripts took, the longest last.
async fn times(api: &Api, count: usize) -> Vec<Duration> {
    let mut all = Vec::new();
    for n in 0..count {
        let began = Instant::now();
        let row = api.run(AGENT, "root", &format!("#!/bin/sh\necho {n}\n"), 60).await;
        assert_eq!(row["screen"], format!("{n}\n"));
        all.push(began.elapsed());
    }
    all.sort();
    all
}

async fn flood(bytes: u64, limit: Duration) {
    let site = Site::start(StoreKind::Embedded).await.expect("a site");
    let agent = site.agent(AGENT, "10.11.12.16").await.expect("an agent");
    let api = site.api();
    let quiet = times(&api, 30).await;
    let idle = resident(agent.pid());
    let over = Arc::new(AtomicBool::new(false));
    let (own, runner) = watch(&agent, &over);
    let scripts = [
        // Lines, as fast as it goes.
        (format!("yes 'a line of output' | head -c {bytes}"), bytes),
        // No line break at all.
        (format!("head -c {bytes} /dev/zero | tr '\\0' x"), bytes),
        // No text at all: each of these bytes takes three as U+FFFD.
        (format!("head -c {bytes} /dev/zero | tr '\\0' '\\377'"), bytes),
    ];
    let began = Instant::now();
    let mut tasks = Vec::new();
    for (script, bytes) in &scripts {
        let body = script_body(&[AGENT], "nobody", &format!("#!/bin/bash\n{script}\n"), 600);
        tasks.push((api.submit(&body).await, *bytes));
    }
    let busy = times(&api, 30).await;
    let at = |all: &[Duration]| all[all.len() * 99 / 100];
    let flooding = api.rows(&tasks[1].0, &[AGENT]).await[0]["error_code"] == 115;
    for (task, bytes) in &tasks {
        let row = api.finished(task, &[AGENT], limit).await.remove(0);
        assert_eq!(
            (row["error_code"].as_i64(), row["status"].as_i64()),
            (Some(0), Some(2)),
            "{}",
            row["error_msg"]
        );
        let screen = row["screen"].as_str().expect("a screen");
        let (head, mark) = screen.rsplit_once("\n[output cut at ").expect("a marker");
        assert_eq!(mark, format!("{} bytes, {bytes} were written]\n", head.len()));
        assert!(
            screen.len() <= 5 << 20 && screen.len() > (5 << 20) - 200,
            "{}",
            screen.len()
        );
    }
    over.store(true, Ordering::Relaxed);
    eprintln!(
        "{bytes} bytes three times: {:?}; agent {} KiB idle, {} KiB at most, a runner {} KiB; p99 of others {:?} before, {:?} during{}",
        began.elapsed(),
        idle >> 10,
        own.load(Ordering::Relaxed) >> 10,
        runner.load(Ordering::Relaxed) >> 10,
        at(&quiet),
        at(&busy),
        if flooding {
            ""
        } else {
            " (over before the last of them)"
        },
    );
    assert!(
        own.load(Ordering::Relaxed) > 0 && runner.load(Ordering::Relaxed) > 0,
        "nothing was measured"
    );
    assert!(own.load(Ordering::Relaxed) < idle + MORE);
    assert!(runner.load(Ordering::Relaxed) < MORE);
    // Three times for a loaded machine, and a time slice or two of processes that are no concern of the agent's.
    assert!(
        at(&busy) <= at(&quiet) * 2 * 3 + Duration::from_millis(500),
        "{quiet:?} {busy:?}"
    );
}

// contract: reliability#F10
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_are_cut_counted_and_noticed_by_nobody() {
    flood(32 << 20, Duration::from_secs(60)).await;
}

// contract: reliability#F10
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "full tier: three times a gibibyte"]
async fn a_gibibyte_is_cut_counted_and_noticed_by_nobody() {
    flood(1 << 30, Duration::from_secs(600)).await;
}
