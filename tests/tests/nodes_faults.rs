//! Nodes of gse_task that die, hang and are restarted, with work under way on all of them.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use gse_tests::api::expect;
use gse_tests::script::{counting, runs_by_target};
use gse_tests::{AgentOptions, Child, Site, StoreKind, eventually, script_body};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
/// Agents of a node that has died are elsewhere within this time.
const ELSEWHERE: Duration = Duration::from_secs(10);

fn id(n: u32) -> String {
    format!("020000000242010a00002f1752129867{:04}", 6000 + n)
}

/// `nodes` nodes with `each` agents on every one of them. Agents are told of one node; of the others they learn there.
async fn site(nodes: u32, each: u32, heartbeat_s: u32) -> (Site, Vec<Child>, Vec<String>) {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    site.task_sets.push("task.return_grace_ms=10000".into());
    site.task_sets
        .push(format!("session.heartbeat_interval_ms={}", heartbeat_s * 1000));
    site.api_sets.push(format!("heartbeat_interval_s={heartbeat_s}"));
    for n in 1..=nodes {
        site.start_node(n).await.unwrap();
    }
    site.start_api().await.unwrap();
    site.settled().await;
    let mut agents = Vec::new();
    let mut ids = Vec::new();
    for k in 0..nodes * each {
        let options = AgentOptions {
            nodes: Some(vec![1 + k % nodes]),
            ..AgentOptions::new(&id(k), &format!("10.6.1.{k}"))
        };
        agents.push(site.spawn_agent(&options, "").unwrap());
        ids.push(id(k));
    }
    for id in &ids {
        site.wait_state(id, 2).await;
    }
    (site, agents, ids)
}

fn refs(ids: &[String]) -> Vec<&str> {
    ids.iter().map(String::as_str).collect()
}

fn all_succeeded(rows: &[Value]) {
    for row in rows {
        expect(row, 0, 2);
        assert_eq!(row["screen"], "begun\nend\n", "{row}");
    }
}

/// Waits until scripts, each with the directory that they mark, have begun on every target.
async fn run_everywhere(tasks: &[(String, PathBuf)], targets: usize) {
    for (_, marks) in tasks {
        eventually("it runs everywhere", Duration::from_secs(30), || async {
            (runs_by_target(marks).len() == targets).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_node_dies_with_work_under_way() {
    let (mut site, _agents, ids) = site(3, 2, 1).await;
    let asked = refs(&ids);
    // Ended before; in the middle, of each node's own and others' agents; just begun.
    let mut tasks = Vec::new();
    for (k, seconds) in [(0, 0.0), (1, 4.0), (2, 8.0)] {
        for n in 1..=3 {
            let marks = site.path().join(format!("runs-{k}-{n}"));
            let task = site
                .node_api(n)
                .submit(&script_body(&asked, "root", &counting(&marks, seconds, 0), 120))
                .await;
            tasks.push((task, marks));
        }
    }
    run_everywhere(&tasks, asked.len()).await;
    // And some that were just accepted.
    let fresh = site.path().join("runs-fresh");
    let body = script_body(&asked, "root", &counting(&fresh, 1.0, 0), 120);
    tasks.push((site.node_api(1).submit(&body).await, fresh));
    let killed = Instant::now();
    site.kill_node(1);

    // The others go on meanwhile, and whoever was with the dead one is elsewhere soon.
    let api = site.api();
    eventually("its agents are elsewhere", ELSEWHERE, || async {
        let reply = api
            .try_post(
                "/api/v2/cluster/list_agent_state",
                &serde_json::json!({"agent_id_list": ids}),
            )
            .await?;
        let rows = reply["data"].as_array()?;
        let there = rows.len() == ids.len() && rows.iter().all(|row| row["status_code"] == 2);
        // Right after the death they still look as if they were there.
        (there && killed.elapsed() > Duration::from_secs(1)).then_some(())
    })
    .await;
    let reach = site.path().join("runs-reach");
    let task = site
        .node_api(2)
        .submit(&script_body(&asked, "root", &counting(&reach, 0.0, 0), 60))
        .await;
    all_succeeded(&site.node_api(3).finished(&task, &asked, LIMIT).await);
    println!("every agent has run a script {:?} after the death", killed.elapsed());
    assert!(killed.elapsed() < ELSEWHERE, "{:?}", killed.elapsed());

    // Every row of every task, the dead node's too, without its coming back; nothing lost, nothing twice.
    for (task, marks) in &tasks {
        let rows = api.finished_at_last(task, &asked, LIMIT).await;
        all_succeeded(&rows);
        assert_eq!(rows, site.node_api(2).rows(task, &asked).await);
        let runs = runs_by_target(marks);
        assert_eq!(
            (runs.len(), runs.values().sum::<usize>()),
            (asked.len(), asked.len()),
            "{runs:?}"
        );
    }
    println!("every task is finished {:?} after the death", killed.elapsed());
    // It comes back as if nothing had been, and does not do anything again.
    site.start_node(1).await.unwrap();
    let last = site.path().join("runs-last");
    let task = site
        .node_api(1)
        .submit(&script_body(&asked, "root", &counting(&last, 0.0, 0), 60))
        .await;
    all_succeeded(&site.node_api(2).finished(&task, &asked, LIMIT).await);
    for (_, marks) in &tasks {
        assert_eq!(runs_by_target(marks).values().sum::<usize>(), asked.len());
    }
}

#[tokio::test]
async fn a_rolling_restart_under_load_fails_no_task() {
    let (mut site, _agents, ids) = site(3, 1, 10).await;
    let over = Arc::new(AtomicBool::new(false));
    let refused = Arc::new(AtomicU32::new(0));
    let mut loads = Vec::new();
    for k in 0..2 {
        let (api, ids, over, refused) = (site.api(), ids.clone(), Arc::clone(&over), Arc::clone(&refused));
        let dir = site.path().to_owned();
        loads.push(tokio::spawn(async move {
            let mut accepted = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let marks = dir.join(format!("runs-{k}-{}", accepted.len()));
                let body = script_body(&refs(&ids), "root", &counting(&marks, 0.5, 0), 120);
                match api.try_submit(&body).await {
                    Some(Ok(task)) => accepted.push((task, marks)),
                    other => {
                        println!("a submit was refused: {other:?}");
                        refused.fetch_add(1, Ordering::Relaxed);
                    }
                }
                tokio::time::sleep(Duration::from_millis(400)).await;
            }
            accepted
        }));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    for n in 1..=3 {
        let mut node = site.nodes.remove(&n).unwrap();
        let asked = Instant::now();
        let status = node.terminate(Duration::from_secs(30)).await.unwrap();
        println!("node {n} has stopped after {:?}", asked.elapsed());
        assert_eq!(status.code(), Some(0), "node {n}: {status}");
        site.start_node(n).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    over.store(true, Ordering::Relaxed);
    let mut count = 0;
    for load in loads {
        for (task, marks) in load.await.unwrap() {
            all_succeeded(&site.api().finished_at_last(&task, &refs(&ids), LIMIT).await);
            let runs = runs_by_target(&marks);
            assert_eq!(
                (runs.len(), runs.values().sum::<usize>()),
                (ids.len(), ids.len()),
                "{runs:?}"
            );
            count += 1;
        }
    }
    println!("{count} tasks");
    assert!(count > 5);
    assert_eq!(
        refused.load(Ordering::Relaxed),
        0,
        "there was always a node that could have taken it"
    );
}

#[tokio::test]
async fn a_node_hangs_longer_than_its_lease_and_comes_back() {
    let (site, _agents, ids) = site(2, 2, 1).await;
    let asked = refs(&ids);
    let mut tasks = Vec::new();
    for n in 1..=2 {
        let marks = site.path().join(format!("runs-{n}"));
        let task = site
            .node_api(n)
            .submit(&script_body(&asked, "root", &counting(&marks, 6.0, 0), 120))
            .await;
        tasks.push((task, marks));
    }
    run_everywhere(&tasks, asked.len()).await;
    site.node(1).freeze();
    let frozen = Instant::now();
    // Its work is done without it, and it is not needed to say so.
    for (task, _) in &tasks {
        all_succeeded(&site.node_api(2).finished(task, &asked, LIMIT).await);
    }
    println!("all finished {:?} after node 1 hung", frozen.elapsed());
    tokio::time::sleep(Duration::from_secs(14).saturating_sub(frozen.elapsed())).await;
    let marks = site.path().join("runs-without");
    let without = site
        .node_api(2)
        .submit(&script_body(&asked, "root", &counting(&marks, 1.0, 0), 60))
        .await;
    tasks.push((without, marks));
    site.node(1).go_on();
    // It finds that it was taken for dead: it neither runs, nor closes, nor changes anything that others have done.
    for (task, _) in &tasks {
        all_succeeded(&site.node_api(2).finished(task, &asked, LIMIT).await);
    }
    let after = site.path().join("runs-after");
    let task = eventually("node 1 takes submits again", Duration::from_secs(20), || async {
        site.node_api(1)
            .try_submit(&script_body(&asked, "root", &counting(&after, 0.0, 0), 60))
            .await?
            .ok()
    })
    .await;
    all_succeeded(&site.node_api(2).finished(&task, &asked, LIMIT).await);
    tokio::time::sleep(Duration::from_secs(2)).await;
    for (task, marks) in &tasks {
        all_succeeded(&site.node_api(1).finished(task, &asked, LIMIT).await);
        let runs = runs_by_target(marks);
        assert_eq!(
            (runs.len(), runs.values().sum::<usize>()),
            (asked.len(), asked.len()),
            "{runs:?}"
        );
    }
}

#[tokio::test]
async fn all_nodes_die_at_once() {
    let (mut site, _agents, ids) = site(2, 2, 1).await;
    let asked = refs(&ids);
    let mut tasks = Vec::new();
    for n in 1..=2 {
        let marks = site.path().join(format!("runs-{n}"));
        let task = site
            .node_api(n)
            .submit(&script_body(&asked, "root", &counting(&marks, 3.0, 0), 120))
            .await;
        tasks.push((task, marks));
    }
    site.kill_node(1);
    site.kill_node(2);
    // Only one of them comes back: it does the other's work as well.
    site.start_node(2).await.unwrap();
    for (task, marks) in &tasks {
        let rows = site.api().finished_at_last(task, &asked, LIMIT).await;
        let runs = runs_by_target(marks);
        for row in &rows {
            assert!(
                row["status"] == 2 || (row["error_code"] == -1 && row["status"] == 6) || row["error_code"] == 117,
                "{row}"
            );
        }
        assert!(runs.values().all(|n| *n == 1), "{runs:?}");
        let succeeded = rows.iter().filter(|row| row["status"] == 2).count();
        assert!(runs.len() >= succeeded);
    }
}

#[tokio::test]
async fn a_node_that_stops_gives_its_work_to_the_others() {
    let (mut site, _agents, ids) = site(2, 2, 1).await;
    let asked = refs(&ids);
    let marks = site.path().join("runs");
    let task = site
        .node_api(1)
        .submit(&script_body(&asked, "root", &counting(&marks, 5.0, 0), 120))
        .await;
    eventually("it runs everywhere", Duration::from_secs(30), || async {
        (runs_by_target(&marks).len() == asked.len()).then_some(())
    })
    .await;
    let mut node = site.nodes.remove(&1).unwrap();
    let status = node.terminate(Duration::from_secs(30)).await.unwrap();
    assert_eq!(status.code(), Some(0), "{status}");
    // It does not come back.
    all_succeeded(&site.node_api(2).finished_at_last(&task, &asked, LIMIT).await);
    assert_eq!(runs_by_target(&marks).values().sum::<usize>(), asked.len());
}
