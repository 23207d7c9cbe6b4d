//! What output may take, of a task and of the whole store: past it output is cut with a marker, and every row ends as ever.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::time::Duration;

use gse_tests::{Child, Site, StoreKind, script_body};

const AGENTS: [&str; 3] = [
    "020000000242010a00002f17521298676571",
    "020000000242010a00002f17521298676572",
    "020000000242010a00002f17521298676573",
];
const LIMIT: Duration = Duration::from_secs(40);
/// The marker's beginning.
const MARKER: &str = "\n[output is cut here";
/// What is under way when a budget is used up may still be stored: a window of each stream.
const SLACK: usize = 3 * (256 << 10);

async fn site(set: &str) -> (Site, Vec<Child>) {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    site.task_sets.push(set.into());
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    let mut agents = Vec::new();
    for (n, id) in AGENTS.iter().enumerate() {
        agents.push(site.agent(id, &format!("10.9.1.{n}")).await.unwrap());
    }
    (site, agents)
}

/// Prints lines that hardly compress, so many bytes of them.
fn printing(bytes: usize) -> String {
    format!("#!/bin/bash\nhead -c {bytes} /dev/urandom | base64 -w 99 | head -c {bytes}\nexit 3\n")
}

/// Runs it everywhere; the screens. Each row has the true end, whatever became of its output.
async fn screens(site: &Site, script: &str) -> Vec<String> {
    let api = site.api();
    let task = api.submit(&script_body(&AGENTS, "root", script, 60)).await;
    let rows = api.finished(&task, &AGENTS, LIMIT).await;
    let mut screens = Vec::new();
    for row in rows {
        assert_eq!(
            (
                row["status"].as_i64(),
                row["script_exit_code"].as_i64(),
                row["error_code"].as_i64()
            ),
            (Some(5), Some(3), Some(0)),
            "rows are never refused"
        );
        screens.push(row["screen"].as_str().unwrap().to_owned());
    }
    screens
}

#[tokio::test]
async fn of_a_task() {
    let budget = 1 << 20;
    let (mut site, _agents) = site(&format!("task.task_output_bytes={budget}")).await;
    // What fits is whole.
    for screen in screens(&site, &printing(200_000)).await {
        assert_eq!(screen.len(), 200_000);
    }
    for _ in 0..2 {
        let got = screens(&site, &printing(2_000_000)).await;
        let kept: usize = got.iter().map(String::len).sum();
        println!("kept {kept} of 6,000,000 bytes");
        assert!((budget / 2..budget + SLACK).contains(&kept), "{kept}");
        for screen in &got {
            let (_, marker) = screen.split_at(screen.find(MARKER).expect("a marker says that it is cut"));
            assert_eq!(marker.matches(MARKER).count(), 1);
            assert!(marker.len() < 200, "nothing comes behind it");
        }
        // A budget is of one task: the next one has its own, and a restart changes nothing.
        site.the_task().unwrap().kill_9();
        site.start_task().await.unwrap();
        for id in AGENTS {
            site.wait_state(id, 2).await;
        }
    }
    assert!(
        screens(&site, &printing(200_000))
            .await
            .iter()
            .all(|screen| screen.len() == 200_000)
    );
}

#[tokio::test]
async fn of_the_store() {
    let (site, _agents) = site("task.store_output_bytes=1000000").await;
    for screen in screens(&site, &printing(100_000)).await {
        assert_eq!(screen.len(), 100_000);
    }
    // Fills it, in the middle of this task or before.
    screens(&site, &printing(1_500_000)).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    for screen in screens(&site, &printing(100_000)).await {
        assert!(
            screen.contains(MARKER) && screen.len() < 1_000,
            "{} bytes",
            screen.len()
        );
    }
    // What needs no room goes on.
    let rows = site.api().run(AGENTS[0], "root", "#!/bin/sh\nexit 0\n", 60).await;
    assert_eq!((rows["status"].as_i64(), rows["screen"].as_str()), (Some(2), Some("")));
}
