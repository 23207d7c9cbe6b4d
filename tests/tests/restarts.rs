//! Processes dying in the middle: nothing is run twice, everything that was started ends in one true row.

use std::time::Duration;

use gse_tests::{AgentOptions, Site, StoreKind, eventually, script_body};

const ONE: &str = "020000000242010a00002f17521298676501";

/// A script that counts its runs, then takes `seconds`.
fn counting(file: &std::path::Path, seconds: u32) -> String {
    format!(
        "#!/bin/bash\necho run >> {}\necho begun\nsleep {seconds}\necho end\nexit 7\n",
        file.display()
    )
}

fn runs(file: &std::path::Path) -> usize {
    std::fs::read_to_string(file).map_or(0, |text| text.lines().count())
}

async fn begun(site: &Site, task: &str) {
    let api = site.api();
    eventually("the script runs", Duration::from_secs(20), || async {
        (api.rows(task, &[ONE]).await[0]["screen"] == "begun\n").then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_agent_dies_and_the_true_exit_is_reported() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let mut agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    let file = site.path().join("runs");
    let api = site.api();
    let task = api.submit(&script_body(&[ONE], "root", &counting(&file, 4), 60)).await;
    begun(&site, &task).await;
    agent.kill_9();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let _agent = site.spawn_agent(&AgentOptions::new(ONE, "10.1.1.1"), "").unwrap();
    let rows = api.finished(&task, &[ONE], Duration::from_secs(30)).await;
    assert_eq!(
        (rows[0]["status"].as_i64(), rows[0]["script_exit_code"].as_i64()),
        (Some(5), Some(7)),
        "{rows:?}"
    );
    assert_eq!(rows[0]["screen"], "begun\nend\n");
    assert_eq!(runs(&file), 1);
}

#[tokio::test]
async fn the_server_dies_and_takes_its_tasks_up_again() {
    let mut site = Site::start(StoreKind::Embedded).await.unwrap();
    let _agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    let file = site.path().join("runs");
    let task = site
        .api()
        .submit(&script_body(&[ONE, "gone"], "root", &counting(&file, 4), 60))
        .await;
    begun(&site, &task).await;
    site.task.as_mut().unwrap().kill_9();
    // Nobody takes its agents for connected for long, whatever their last record says.
    site.wait_state(ONE, -1).await;
    site.start_task().await.unwrap();
    let rows = site
        .api()
        .finished(&task, &[ONE, "gone"], Duration::from_secs(30))
        .await;
    assert_eq!(
        (rows[0]["status"].as_i64(), rows[0]["script_exit_code"].as_i64()),
        (Some(5), Some(7)),
        "{rows:?}"
    );
    assert_eq!(rows[0]["screen"], "begun\nend\n");
    assert_eq!(rows[1]["error_code"], 117);
    assert_eq!(runs(&file), 1);
    // And goes on taking new ones.
    let row = site.api().run(ONE, "root", "#!/bin/sh\necho next\n", 60).await;
    assert_eq!(row["screen"], "next\n");
}

#[tokio::test]
async fn both_die_at_once() {
    let mut site = Site::start(StoreKind::Embedded).await.unwrap();
    let mut agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    let file = site.path().join("runs");
    let task = site
        .api()
        .submit(&script_body(&[ONE], "root", &counting(&file, 3), 60))
        .await;
    begun(&site, &task).await;
    agent.kill_9();
    site.task.as_mut().unwrap().kill_9();
    site.start_task().await.unwrap();
    let _agent = site.spawn_agent(&AgentOptions::new(ONE, "10.1.1.1"), "").unwrap();
    let rows = site.api().finished(&task, &[ONE], Duration::from_secs(30)).await;
    assert_eq!(
        (rows[0]["status"].as_i64(), rows[0]["script_exit_code"].as_i64()),
        (Some(5), Some(7)),
        "{rows:?}"
    );
    assert_eq!(runs(&file), 1);
}

#[tokio::test]
async fn a_lost_journal_gives_unknown_and_no_second_run() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let mut agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    let file = site.path().join("runs");
    let api = site.api();
    let task = api.submit(&script_body(&[ONE], "root", &counting(&file, 30), 60)).await;
    begun(&site, &task).await;
    agent.kill_9();
    // The host was rebuilt: its agent starts with nothing.
    let _agent = site
        .spawn_agent(&AgentOptions::new(ONE, "10.1.1.1"), "-rebuilt")
        .unwrap();
    let rows = api.finished(&task, &[ONE], Duration::from_secs(30)).await;
    assert_eq!(
        (rows[0]["error_code"].as_i64(), rows[0]["status"].as_i64()),
        (Some(-1), Some(6)),
        "{rows:?}"
    );
    assert_eq!(runs(&file), 1);
}

#[tokio::test]
async fn a_target_that_was_there_a_moment_ago_is_waited_for() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let mut agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    agent.kill_9();
    let api = site.api();
    let task = api
        .submit(&script_body(&[ONE], "root", "#!/bin/sh\necho waited\n", 60))
        .await;
    assert_eq!(api.rows(&task, &[ONE]).await[0]["error_code"], 115);
    let _agent = site.spawn_agent(&AgentOptions::new(ONE, "10.1.1.1"), "").unwrap();
    let rows = api.finished(&task, &[ONE], Duration::from_secs(20)).await;
    assert_eq!(rows[0]["screen"], "waited\n", "{rows:?}");
}

#[tokio::test]
async fn the_store_goes_and_comes_back() {
    let mut site = Site::start(StoreKind::Embedded).await.unwrap();
    let _agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    let file = site.path().join("runs");
    let api = site.api();
    let task = api.submit(&script_body(&[ONE], "root", &counting(&file, 2), 60)).await;
    begun(&site, &task).await;
    let mut dba = site.store.pop().unwrap();
    dba.kill_9();
    // A clear answer within two seconds; nothing is accepted that could be lost.
    let started = std::time::Instant::now();
    let reply = api
        .post(
            "/api/v2/task/extensions/async_execute_script",
            &script_body(&[ONE], "root", "#!/bin/sh\ntrue\n", 60),
        )
        .await;
    assert_eq!(reply["code"], 1_000_190, "{reply}");
    assert_eq!(reply["data"], serde_json::json!({"result": {}}));
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    tokio::time::sleep(Duration::from_secs(3)).await;
    site.start_dba(&["backend=embedded".into()]).await.unwrap();
    // Everything heals by itself; the result waited on the host.
    let rows = eventually("results are readable again", Duration::from_secs(30), || async {
        let body = serde_json::json!({"task_id": task, "agent_tasks": [{"bk_agent_id": ONE, "atomic_tasks": [{"atomic_task_id": 0, "offset": 0}]}]});
        let reply = api.post("/api/v2/task/extensions/get_execute_script_result", &body).await;
        (reply["code"] == 0 && reply["data"]["result"][0]["error_code"] != 115).then(|| reply["data"]["result"].clone())
    })
    .await;
    assert_eq!(
        (rows[0]["script_exit_code"].as_i64(), rows[0]["screen"].as_str()),
        (Some(7), Some("begun\nend\n"))
    );
    assert_eq!(runs(&file), 1);
    site.wait_state(ONE, 2).await;
}

#[tokio::test]
async fn a_server_that_is_stopped_drains() {
    let mut site = Site::start(StoreKind::Embedded).await.unwrap();
    let mut agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    for mut server in [site.api.take().unwrap(), site.task.take().unwrap()] {
        let status = server.terminate(Duration::from_secs(15)).await.unwrap();
        assert!(status.success(), "{}: {status}", server.name);
    }
    let status = agent.terminate(Duration::from_secs(15)).await.unwrap();
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn an_end_asked_for_while_the_agent_is_away_reaches_it_when_it_is_back() {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    site.task_sets.push("task.reconnect_grace_ms=1000".into());
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    let mut agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    let api = site.api();
    let mut pids = Vec::new();
    let mut tasks = Vec::new();
    for _ in 0..2 {
        let task = api
            .submit(&script_body(&[ONE], "root", "#!/bin/bash\necho $$\nsleep 600\n", 600))
            .await;
        let screen = eventually("the script runs", Duration::from_secs(20), || async {
            let screen = api.rows(&task, &[ONE]).await[0]["screen"].as_str()?.trim().to_owned();
            (!screen.is_empty()).then_some(screen)
        })
        .await;
        pids.push(nix::unistd::Pid::from_raw(screen.parse().unwrap()));
        tasks.push((task, screen));
    }
    let started = api.rows(&tasks[0].0, &[ONE]).await[0]["start_time"].clone();
    agent.kill_9();
    site.wait_state(ONE, -1).await;
    api.terminate(&tasks[0].0, &serde_json::json!([{"bk_agent_id": ONE}]))
        .await;
    let rows = api.finished(&tasks[0].0, &[ONE], Duration::from_secs(20)).await;
    assert_eq!(
        (rows[0]["error_code"].as_i64(), rows[0]["status"].as_i64()),
        (Some(117), Some(5))
    );
    // What the agent had told before it went stays.
    assert_eq!(
        (rows[0]["screen"].as_str().unwrap().trim(), &rows[0]["start_time"]),
        (tasks[0].1.as_str(), &started)
    );
    let alive = |pid| nix::sys::signal::kill(pid, None).is_ok();
    assert!(alive(pids[0]) && alive(pids[1]));
    let _agent = site.spawn_agent(&AgentOptions::new(ONE, "10.1.1.1"), "").unwrap();
    eventually("the script is ended", Duration::from_secs(20), || async {
        (!alive(pids[0])).then_some(())
    })
    .await;
    // The other one is under way still, and can be ended as ever.
    assert!(alive(pids[1]));
    api.terminate(&tasks[1].0, &serde_json::json!([])).await;
    let rows = api.finished(&tasks[1].0, &[ONE], Duration::from_secs(20)).await;
    assert_eq!(
        (rows[0]["error_code"].as_i64(), rows[0]["status"].as_i64()),
        (Some(126), Some(4))
    );
    eventually("the other script is gone too", Duration::from_secs(5), || async {
        (!alive(pids[1])).then_some(())
    })
    .await;
}
