//! The calls between nodes go through a network that hangs, cuts and refuses.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::time::Duration;

use gse_tests::script::{counting, runs_by_target};
use gse_tests::{AgentOptions, Child, Fault, Proxy, Site, StoreKind, script_body};
use serde_json::json;

const IDS: [&str; 2] = [
    "020000000242010a00002f17521298676561",
    "020000000242010a00002f17521298676562",
];
const LIMIT: Duration = Duration::from_secs(40);

/// Two nodes with an agent each; what node 1 says to node 2 goes through the proxy.
async fn site() -> (Site, Proxy, Vec<Child>) {
    let mut site = Site::with_nodes(StoreKind::Embedded, 2).await.unwrap();
    let proxy = Proxy::start(&site.place(2, "rpc")).await.unwrap();
    site.node_sets
        .insert(2, vec![format!("rpc.advertise={}", proxy.address())]);
    site.kill_node(2);
    site.start_node(2).await.unwrap();
    let mut agents = Vec::new();
    for (n, id) in (1..).zip(IDS) {
        let options = AgentOptions {
            nodes: Some(vec![n]),
            ..AgentOptions::new(id, &format!("10.8.1.{n}"))
        };
        agents.push(site.spawn_agent(&options, "").unwrap());
        site.wait_state(id, 2).await;
    }
    site.settled().await;
    // Node 1 may still call node 2 where it was before.
    let api = site.node_api(1);
    gse_tests::eventually("node 1 calls through the proxy", LIMIT, || async {
        api.run(IDS[1], "root", "#!/bin/sh\ntrue\n", 60).await;
        proxy.in_use().then_some(())
    })
    .await;
    (site, proxy, agents)
}

#[tokio::test]
async fn a_link_hangs_and_heals() {
    let (site, proxy, _agents) = site().await;
    let one = site.node_api(1);
    for (n, (fault, seconds)) in [(Fault::Hang, 7), (Fault::Refuse, 4)].into_iter().enumerate() {
        let marks = site.path().join(format!("runs-{n}"));
        proxy.set(fault);
        let task = one
            .submit(&script_body(&IDS, "root", &counting(&marks, 0.0, 7), 120))
            .await;
        // Whoever can be reached is not held up by it.
        assert_eq!(
            one.finished(&task, &IDS[..1], Duration::from_secs(10)).await[0]["script_exit_code"],
            7
        );
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        assert_eq!(one.rows(&task, &IDS[1..]).await[0]["error_code"], 115, "{fault:?}");
        proxy.set(Fault::None);
        let rows = site.node_api(2).finished(&task, &IDS, LIMIT).await;
        assert!(
            rows.iter()
                .all(|row| row["status"] == 5 && row["script_exit_code"] == 7),
            "{fault:?}: {rows:?}"
        );
        let runs = runs_by_target(&marks);
        assert_eq!(
            (runs.len(), runs.values().sum::<usize>()),
            (2, 2),
            "{fault:?}: {runs:?}"
        );
    }
}

#[tokio::test]
async fn a_link_is_cut_again_and_again_under_load() {
    let (site, proxy, _agents) = site().await;
    let mut tasks = Vec::new();
    for n in 0..30 {
        let marks = site.path().join(format!("runs-{n}"));
        let task = site
            .node_api(1)
            .submit(&script_body(&IDS, "root", &counting(&marks, 0.2, 0), 120))
            .await;
        tasks.push((task, marks));
        if n % 3 == 0 {
            proxy.cut();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for (task, marks) in &tasks {
        let rows = site.node_api(1).finished(task, &IDS, LIMIT).await;
        assert!(rows.iter().all(|row| row["status"] == 2), "{rows:?}");
        let runs = runs_by_target(marks);
        assert_eq!((runs.len(), runs.values().sum::<usize>()), (2, 2), "{runs:?}");
    }
}

#[tokio::test]
async fn an_end_asked_for_while_a_link_hangs_comes_through_when_it_heals() {
    let (site, proxy, _agents) = site().await;
    let marks = site.path().join("runs");
    let api = site.node_api(1);
    let task = api
        .submit(&script_body(&IDS, "root", &counting(&marks, 600.0, 0), 600))
        .await;
    gse_tests::eventually("it runs everywhere", LIMIT, || async {
        (runs_by_target(&marks).len() == 2).then_some(())
    })
    .await;
    proxy.set(Fault::Hang);
    let reply = api
        .try_post(
            "/api/v2/task/extensions/async_terminate_execute_script",
            &json!({"task_id": task, "agents": []}),
        )
        .await
        .expect("an answer");
    assert_eq!(reply["code"], 0, "{reply}");
    tokio::time::sleep(Duration::from_secs(2)).await;
    proxy.set(Fault::None);
    let rows = api.finished(&task, &IDS, LIMIT).await;
    assert!(
        rows.iter().all(|row| row["error_code"] == 126 && row["status"] == 4),
        "{rows:?}"
    );
}
