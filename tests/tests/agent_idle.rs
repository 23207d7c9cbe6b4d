//! What an agent costs its host while it has nothing to do. The figures of a release build are in the benchmarks; the bounds here are
//! wide enough for a debug build and narrow enough to notice a timer that fires every second or a thread for every processor.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::time::Duration;

use gse_tests::{AgentOptions, Site, StoreKind};

const AGENT: &str = "020000000242010a00002f17521298676604";

/// Resident KiB, threads, times that a thread went to sleep, and ticks of processor time (100 a second).
fn costs(pid: i32) -> (u64, usize, u64, u64) {
    let field = |text: &str, name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    };
    let read = |path: String| std::fs::read_to_string(path).expect("the agent lives");
    let resident = field(&read(format!("/proc/{pid}/status")), "VmRSS:");
    let mut threads = 0;
    let mut sleeps = 0;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))
        .expect("the agent lives")
        .flatten()
    {
        // A thread may end in between.
        let Ok(status) = std::fs::read_to_string(thread.path().join("status")) else {
            continue;
        };
        threads += 1;
        sleeps += field(&status, "voluntary_ctxt_switches:");
    }
    let stat = read(format!("/proc/{pid}/stat"));
    let (_, rest) = stat.rsplit_once(") ").expect("a stat line");
    let ticks = rest
        .split(' ')
        .skip(11)
        .take(2)
        .map(|n| n.parse::<u64>().expect("ticks"))
        .sum();
    (resident, threads, sleeps, ticks)
}

#[tokio::test]
async fn an_idle_agent_sleeps() {
    const WATCHED: Duration = Duration::from_secs(15);
    let mut site = Site::with_store(StoreKind::Embedded).await.expect("a store");
    // As it is by default, not as other tests have it.
    site.task_sets.push("session.heartbeat_interval_ms=30000".into());
    site.start_task().await.expect("gse_task");
    site.start_api().await.expect("gse_api");
    let agent = site
        .spawn_agent(&AgentOptions::new(AGENT, "10.11.12.17"), "")
        .expect("an agent");
    site.wait_state(AGENT, 2).await;
    let row = site.api().run(AGENT, "root", "#!/bin/sh\necho x\n", 60).await;
    assert_eq!(row["screen"], "x\n");
    // Idle threads end after ten seconds; what a run leaves is looked after every two seconds until it is forgotten.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let before = costs(agent.pid());
    tokio::time::sleep(WATCHED).await;
    let after = costs(agent.pid());
    let (sleeps, ticks) = (after.2.saturating_sub(before.2), after.3 - before.3);
    eprintln!(
        "{} KiB, {} threads; in {WATCHED:?} {sleeps} sleeps, {ticks} ticks",
        after.0, after.1
    );
    assert!(after.0 < 48 << 10, "{} KiB resident", after.0);
    assert!(after.1 <= 6, "{} threads", after.1);
    assert!(sleeps < 15 * 8, "it woke {sleeps} times within {WATCHED:?}");
    assert!(ticks <= 5, "{ticks} ticks of processor time within {WATCHED:?}");
}
