//! gse_task dies of SIGKILL at every place between taking a submit and forgetting the task, and comes back.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::path::Path;
use std::time::Duration;

use gse_tests::script::{counting, runs_by_target};
use gse_tests::{Child, Site, StoreKind, eventually, script_body};

const ONE: &str = "020000000242010a00002f17521298676511";
const TWO: &str = "020000000242010a00002f17521298676512";

/// A deadline that the server sets itself, and what it may take over that on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

async fn site() -> (Site, [Child; 2]) {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    // How long what was never sent may still be sent, and how long somebody away is waited for.
    site.task_sets.push("task.reconnect_grace_ms=5000".into());
    site.task_sets.push("task.start_window_ms=20000".into());
    site.task_sets.push("task.return_grace_ms=2000".into());
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    let agents = [
        site.agent(ONE, "10.1.1.1").await.unwrap(),
        site.agent(TWO, "10.1.1.2").await.unwrap(),
    ];
    (site, agents)
}

/// What must hold of a task once everything is back, whether its caller was told of it or not.
async fn judge(site: &Site, place: &str, task: Option<&str>, marks: &Path) {
    let api = site.api();
    if let Some(task) = task {
        let rows = api.finished_at_last(task, &[ONE, TWO, "gone"], LIMIT).await;
        let runs = runs_by_target(marks);
        for (row, agent) in rows.iter().zip([ONE, TWO]) {
            let ran = runs
                .iter()
                .filter(|(who, _)| who.contains(&hex::encode(agent)))
                .map(|(_, n)| n)
                .sum::<usize>();
            let row_says = (row["error_code"].as_i64(), row["status"].as_i64());
            match row_says {
                (Some(0), Some(5)) => {
                    assert_eq!((ran, row["script_exit_code"].as_i64()), (1, Some(7)), "{place}: {row}");
                    assert_eq!(row["screen"], "begun\nend\n", "{place}");
                }
                // It can't be known whether it ran, and the row says so.
                (Some(-1), Some(6)) => assert!(ran <= 1, "{place}: {row}"),
                // It was not run, and the row says so.
                (Some(117), Some(5)) => assert_eq!(ran, 0, "{place}: {row}"),
                _ => panic!("{place}: neither a true end nor an unknown one: {row}"),
            }
        }
        assert_eq!(rows[2]["error_code"], 117, "{place}");
    }
    // Nothing that was begun to be stored stays behind unfinished, told or not.
    let mut store = site.store_client().await.unwrap();
    eventually(&format!("{place}: no unfinished task is left"), LIMIT, || {
        let mut store = store.clone();
        async move {
            let left: Vec<String> = redis::cmd("SMEMBERS")
                .arg(gse_proto::keys::node_tasks("local"))
                .query_async(&mut store)
                .await
                .unwrap();
            left.is_empty().then_some(())
        }
    })
    .await;
    let runs = runs_by_target(marks);
    assert!(runs.values().all(|n| *n == 1), "{place}: run twice: {runs:?}");
    let _: () = redis::cmd("PING").query_async(&mut store).await.unwrap();
}

async fn dies_at(places: &[&str]) {
    let (mut site, _agents) = site().await;
    for place in places {
        site.the_task().unwrap().kill_9();
        // What agents tell again of the place before is not what it is to die of.
        let armed = site.path().join(format!("armed-{place}"));
        site.start_task_to_die_at(place, Some(&armed)).await.unwrap();
        for id in [ONE, TWO] {
            site.wait_state(id, 2).await;
        }
        std::fs::write(&armed, "").unwrap();
        let marks = site.path().join(format!("runs-at-{place}"));
        let body = script_body(&[ONE, TWO, "gone"], "root", &counting(&marks, 0.5, 7), 20);
        let told = site.api().try_submit(&body).await;
        let task = told.clone().and_then(Result::ok);
        let died = site.the_task().unwrap().wait(Duration::from_secs(20)).await;
        let status = died.unwrap_or_else(|error| panic!("it does not get to {place}: {error}"));
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9),
            "{place}"
        );
        // Before the reply nobody can have been told that it was accepted.
        if place.starts_with("submit-") {
            assert!(task.is_none(), "{place}: {told:?}");
        }
        // Recovery is begun and dies as well.
        if site.start_task_to_die_at("recover-read", None).await.is_ok() {
            panic!("{place}: it does not get to recover-read");
        }
        site.start_task().await.unwrap();
        judge(&site, place, task.as_deref(), &marks).await;
        // And goes on taking new ones.
        for id in [ONE, TWO] {
            site.wait_state(id, 2).await;
        }
        let row = site.api().run(TWO, "root", "#!/bin/sh\necho next\n", 60).await;
        assert_eq!(row["screen"], "next\n", "{place}: {row}");
    }
}

// contract: reliability#F3
#[tokio::test]
async fn between_the_submit_and_its_answer() {
    dies_at(&["submit-audited", "submit-buckets", "submit-stored", "submit-started"]).await;
}

// contract: reliability#F3
#[tokio::test]
async fn in_the_fan_out() {
    dies_at(&[
        "fan-out",
        "dispatch-before",
        "dispatch-after",
        "dispatch-before:2",
        "dispatch-after:2",
    ])
    .await;
}

// contract: reliability#F3
#[tokio::test]
async fn while_results_come_in() {
    dies_at(&["results-before", "results-stored", "results-acked"]).await;
}

// contract: reliability#F3
#[tokio::test]
async fn while_more_results_come_in() {
    dies_at(&["results-before:2", "results-stored:2", "results-acked:2"]).await;
}

// contract: reliability#F3
#[tokio::test]
async fn at_the_end_of_the_task() {
    dies_at(&["finish-before", "finish-stored"]).await;
}
