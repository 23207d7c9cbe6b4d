//! The largest calls that the contract allows, again and again, and how long results are kept.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::time::{Duration, Instant};

use gse_tests::api::EXT;
use gse_tests::{Child, Site, StoreKind, script_body};
use serde_json::{Value, json};

const AGENTS: [&str; 2] = [
    "020000000242010a00002f17521298676541",
    "020000000242010a00002f17521298676542",
];
/// Times are meant for optimised programs; these here are not.
const DEBUG: u32 = if cfg!(debug_assertions) { 3 } else { 1 };

async fn site(kind: StoreKind) -> (Site, Vec<Child>) {
    let mut site = Site::with_store(kind).await.unwrap();
    // Full after the first large task: what memory grows by from then on is not of the cache.
    site.task_sets.push("task.cache_bytes=4194304".into());
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    let mut agents = Vec::new();
    for (n, id) in AGENTS.iter().enumerate() {
        agents.push(site.agent(id, &format!("10.4.1.{n}")).await.unwrap());
    }
    (site, agents)
}

/// Two real agents among 49,998 that nobody knows.
fn fifty_thousand() -> Vec<String> {
    let mut ids: Vec<String> = (0..50_000)
        .map(|n| format!("02000000024201{n:08x}17521298676599"))
        .collect();
    ids[17] = AGENTS[0].into();
    ids[49_999] = AGENTS[1].into();
    ids
}

async fn one_large_task(site: &Site, ids: &[String]) -> [Duration; 2] {
    let api = site.api();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let body = script_body(&ids, "root", "#!/bin/sh\necho here\n", 60);
    let started = Instant::now();
    let task = api.submit(&body).await;
    let submitted = started.elapsed();
    let mut slowest = Duration::ZERO;
    for part in ids.chunks(1000) {
        let rows = api.finished(&task, part, Duration::from_secs(60)).await;
        assert_eq!(rows.len(), 1000);
        for (row, id) in rows.iter().zip(part) {
            assert_eq!(row["bk_agent_id"], *id);
            if AGENTS.contains(id) {
                assert_eq!(
                    (row["status"].as_i64(), row["screen"].as_str()),
                    (Some(2), Some("here\n")),
                    "{row}"
                );
            } else {
                assert_eq!(row["error_code"], 117, "{row}");
            }
        }
        // Once everything has ended, what a poll of a thousand takes.
        let started = Instant::now();
        api.rows(&task, part).await;
        slowest = slowest.max(started.elapsed());
    }
    [submitted, slowest]
}

async fn large_tasks(kind: StoreKind, rounds: usize) {
    let (site, _agents) = site(kind).await;
    let ids = fifty_thousand();
    let mut memory = Vec::new();
    for round in 0..rounds {
        let [submitted, polled] = one_large_task(&site, &ids).await;
        let task = site.task.as_ref().unwrap().memory();
        let api = site.api.as_ref().unwrap().memory();
        println!(
            "{kind:?} round {round}: submit of 50,000 {submitted:?}, slowest poll of 1,000 {polled:?}, memory of gse_task {task}, of gse_api {api}"
        );
        memory.push((task, api));
    }
    // Each task of its own would leave some ten megabytes behind if it were kept.
    let (then, now) = (memory[1], memory[rounds - 1]);
    let allowed = 16 << 20;
    assert!(
        now.0 < then.0 + allowed && now.1 < then.1 + allowed,
        "memory grows: {memory:?}"
    );
}

// contract: v2-http-task#25
#[tokio::test]
async fn fifty_thousand_targets_and_a_thousand_rows() {
    large_tasks(StoreKind::Embedded, 5).await;
}

// contract: v2-http-task#25
#[tokio::test]
#[ignore = "full tier: twenty such tasks on each store"]
async fn fifty_thousand_targets_many_times() {
    for kind in [StoreKind::Embedded, StoreKind::Redis] {
        large_tasks(kind, 20).await;
    }
}

// contract: v2-http-task#25
#[tokio::test]
async fn one_target_too_many_is_refused_as_a_whole() {
    let (site, _agents) = site(StoreKind::Embedded).await;
    let mut ids = fifty_thousand();
    ids.push("one-too-many".into());
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let mark = site.path().join("ran");
    let content = format!("#!/bin/sh\necho ran >> {}\n", mark.display());
    let reply = site
        .api()
        .post(
            &format!("{EXT}/async_execute_script"),
            &script_body(&ids, "root", &content, 60),
        )
        .await;
    assert_eq!(
        (reply["code"].as_i64(), &reply["data"]),
        (Some(1_000_106), &json!({"result": {}}))
    );
    assert!(
        reply["message"].as_str().unwrap().contains("50000"),
        "{}",
        reply["message"]
    );
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!mark.exists());
}

async fn states(site: &Site, ids: &[String], rounds: usize) {
    let api = site.api();
    let body = json!({"agent_id_list": ids});
    let mut times = Vec::new();
    let mut memory = Vec::new();
    for _ in 0..rounds {
        let started = Instant::now();
        let reply = api.post("/api/v2/cluster/list_agent_state", &body).await;
        times.push(started.elapsed());
        assert_eq!(reply["code"], 0, "{}", reply["message"]);
        let rows = reply["data"].as_array().unwrap();
        assert_eq!(rows.len(), ids.len());
        for (row, id) in rows.iter().zip(ids) {
            assert_eq!(row["bk_agent_id"], **id);
            let wanted = if AGENTS.contains(&id.as_str()) { 2 } else { -2 };
            assert_eq!(row["status_code"], wanted, "{row}");
        }
        memory.push(site.api.as_ref().unwrap().memory());
    }
    times.sort();
    let (best, middle) = (times[0], times[times.len() / 2]);
    println!(
        "list_agent_state of {}: fastest {best:?}, median {middle:?}, slowest {:?}",
        ids.len(),
        times[times.len() - 1]
    );
    assert!(middle < Duration::from_millis(500) * DEBUG, "{times:?}");
    let (then, now) = (memory[memory.len() / 2], memory[memory.len() - 1]);
    assert!(now < then + (16 << 20), "memory grows: {memory:?}");
}

// contract: v2-http-task#48
#[tokio::test]
async fn the_state_of_five_thousand_agents() {
    for kind in [StoreKind::Embedded, StoreKind::Redis] {
        let (site, _agents) = site(kind).await;
        let mut ids = fifty_thousand();
        ids.truncate(5_000);
        ids[4_999] = AGENTS[1].into();
        states(&site, &ids, 15).await;
    }
}

/// Seconds that each key of a task has left.
async fn lifetimes(site: &Site, task: &str) -> Vec<(String, i64)> {
    let mut store = site.store_client().await.unwrap();
    let keys: Vec<String> = redis::cmd("KEYS")
        .arg(format!("{{{task}:*"))
        .query_async(&mut store)
        .await
        .unwrap();
    let mut left = Vec::new();
    for key in keys {
        let ttl: i64 = redis::cmd("TTL").arg(&key).query_async(&mut store).await.unwrap();
        left.push((key, ttl));
    }
    left
}

// contract: v2-http-task#51
#[tokio::test]
async fn results_stay_an_hour_and_as_long_as_the_task_may_run() {
    let (site, _agents) = site(StoreKind::Redis).await;
    let api = site.api();
    // While it runs its keys outlive the time it may take, and an hour.
    let hours = 5 * 3600;
    let long = api
        .submit(&script_body(
            &AGENTS,
            "root",
            "#!/bin/sh\necho begun\nsleep 300\n",
            hours,
        ))
        .await;
    gse_tests::eventually("it has written something", Duration::from_secs(20), || async {
        (api.rows(&long, &AGENTS)
            .await
            .iter()
            .all(|row| row["screen"] == "begun\n"))
        .then_some(())
    })
    .await;
    let running = lifetimes(&site, &long).await;
    assert!(running.len() >= 4, "header, targets, rows, output: {running:?}");
    assert!(running.iter().all(|(_, ttl)| *ttl > hours + 3600), "{running:?}");
    // Once it has ended they stay for an hour from then on.
    api.terminate(&long, &json!([])).await;
    api.finished(&long, &AGENTS, Duration::from_secs(20)).await;
    let short = api
        .submit(&script_body(&AGENTS, "root", "#!/bin/sh\necho here\n", 5))
        .await;
    let rows = api.finished(&short, &AGENTS, Duration::from_secs(20)).await;
    for task in [&long, &short] {
        let ended = gse_tests::eventually("its end is stored", Duration::from_secs(10), || async {
            let left = lifetimes(&site, task).await;
            left.iter()
                .any(|(key, _)| *key == gse_proto::keys::task_end(task))
                .then_some(left)
        })
        .await;
        assert!(ended.iter().all(|(_, ttl)| (3_590..=3_600).contains(ttl)), "{ended:?}");
    }
    // What is stored does not hang on the server that has put it there.
    assert_eq!(site.task_api().rows(&short, &AGENTS).await, rows);
}

// contract: v2-http-task#52
#[tokio::test]
async fn what_goes_wrong_has_a_code_that_no_client_takes_for_something_else() {
    let (site, _agents) = site(StoreKind::Embedded).await;
    let api = site.api();
    let mut rows: Vec<Value> = Vec::new();
    // A command that is not there, a script that is no program, a signal, an account that is not there, nobody at home, a bad id.
    for (agent, user, script) in [
        (AGENTS[0], "root", "#!/no/such/interpreter\n"),
        (AGENTS[0], "root", "\u{1}\u{2}\u{3}"),
        (AGENTS[0], "root", "#!/bin/sh\nkill -KILL $$\n"),
        (AGENTS[0], "root", "#!/bin/sh\nexit 300\n"),
        (AGENTS[0], "nobody-of-that-name", "#!/bin/sh\ntrue\n"),
        ("no-such-agent", "root", "#!/bin/sh\ntrue\n"),
        ("not an id at all", "root", "#!/bin/sh\ntrue\n"),
    ] {
        rows.push(api.run(agent, user, script, 30).await);
    }
    // A directory that can't be made, and a command that leaves out the script.
    let mut body = script_body(&AGENTS[..1], "root", "#!/bin/sh\ntrue\n", 30);
    body["scripts"][0]["script_store_dir"] = json!("/proc/not/here");
    let task = api.submit(&body).await;
    rows.extend(api.finished(&task, &AGENTS[..1], Duration::from_secs(30)).await);
    let mut body = script_body(&AGENTS[..1], "root", "#!/bin/sh\ntrue\n", 30);
    body["atomic_tasks"][0]["command"] = json!("/no/such/command at all");
    let task = api.submit(&body).await;
    rows.extend(api.finished(&task, &AGENTS[..1], Duration::from_secs(30)).await);
    for row in &rows {
        let code = row["error_code"].as_i64().unwrap();
        assert!(code != 115 && code != 126, "{row}");
        // Either it did not run, which has a code, or it ran, and its exit says that it failed.
        assert!(code != 0 || row["script_exit_code"] != 0, "{row}");
        assert!(matches!(row["status"].as_i64(), Some(3 | 5 | 6)), "{row}");
        assert!(code == 0 || !row["error_msg"].as_str().unwrap().is_empty(), "{row}");
    }
}
