//! Several nodes of gse_task that share a store: whichever is asked, it reaches everybody and knows everything.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::time::Duration;

use gse_tests::script::{counting, runs_by_target};
use gse_tests::{AgentOptions, Child, Site, StoreKind, eventually, script_body};
use serde_json::json;

const IDS: [&str; 4] = [
    "020000000242010a00002f17521298676551",
    "020000000242010a00002f17521298676552",
    "020000000242010a00002f17521298676553",
    "020000000242010a00002f17521298676554",
];
const LIMIT: Duration = Duration::from_secs(30);

/// An agent that is told of one node alone to begin with.
async fn agent_of(site: &Site, n: u32, id: &str, address: &str) -> Child {
    let options = AgentOptions {
        nodes: Some(vec![n]),
        ..AgentOptions::new(id, address)
    };
    let child = site.spawn_agent(&options, "").unwrap();
    site.wait_state(id, 2).await;
    child
}

/// Two nodes with two agents each.
async fn site(kind: StoreKind) -> (Site, Vec<Child>) {
    let site = Site::with_nodes(kind, 2).await.unwrap();
    let mut agents = Vec::new();
    for (n, id) in (0..).zip(IDS) {
        agents.push(agent_of(&site, 1 + n / 2, id, &format!("10.5.1.{n}")).await);
    }
    (site, agents)
}

#[tokio::test]
async fn any_node_reaches_every_agent_and_answers_every_poll() {
    let (site, _agents) = site(StoreKind::Embedded).await;
    let (one, two, front) = (site.node_api(1), site.node_api(2), site.api());
    let mut asked = IDS.to_vec();
    asked.push("gone");
    // By its cloud and address, which another node knows.
    asked.push("0:10.5.1.3");
    for (n, (submit, poll)) in [(&one, &two), (&two, &one), (&front, &one), (&front, &two)]
        .into_iter()
        .enumerate()
    {
        let marks = site.path().join(format!("runs-{n}"));
        let script = counting(&marks, 0.2, 7);
        let task = submit.submit(&script_body(&asked, "root", &script, 60)).await;
        // Read your writes, on any node, at once.
        assert_eq!(poll.rows(&task, &asked).await.len(), asked.len());
        let rows = poll.finished(&task, &asked, LIMIT).await;
        for (row, id) in rows.iter().zip(&asked) {
            assert_eq!(row["bk_agent_id"], *id);
            if *id == "gone" {
                assert_eq!(row["error_code"], 117, "{row}");
            } else {
                assert_eq!(
                    (row["status"].as_i64(), row["script_exit_code"].as_i64()),
                    (Some(5), Some(7)),
                    "{row}"
                );
                assert_eq!(row["screen"], "begun\nend\n");
            }
        }
        assert_eq!(rows, front.rows(&task, &asked).await);
        assert_eq!(rows, submit.rows(&task, &asked).await);
        let runs = runs_by_target(&marks);
        assert_eq!(
            (runs.len(), runs.values().sum::<usize>()),
            (asked.len() - 1, asked.len() - 1),
            "{runs:?}"
        );
    }
}

#[tokio::test]
async fn the_end_can_be_asked_for_at_any_node() {
    let (site, _agents) = site(StoreKind::Embedded).await;
    for (n, (submitter, stopper)) in [(1, 2), (2, 1)].into_iter().enumerate() {
        let marks = site.path().join(format!("runs-{n}"));
        let task = site
            .node_api(submitter)
            .submit(&script_body(&IDS, "root", &counting(&marks, 600.0, 0), 600))
            .await;
        eventually("it runs everywhere", LIMIT, || async {
            (runs_by_target(&marks).len() == IDS.len()).then_some(())
        })
        .await;
        let api = site.node_api(stopper);
        // One of them, then the rest.
        api.terminate(&task, &json!([{"bk_agent_id": IDS[n]}])).await;
        let rows = api.finished(&task, &IDS[n..=n], LIMIT).await;
        assert_eq!(
            (rows[0]["error_code"].as_i64(), rows[0]["status"].as_i64()),
            (Some(126), Some(4)),
            "{rows:?}"
        );
        let others: Vec<&str> = IDS.into_iter().filter(|id| *id != IDS[n]).collect();
        assert!(
            api.rows(&task, &others)
                .await
                .iter()
                .all(|row| row["error_code"] == 115)
        );
        api.terminate(&task, &json!([])).await;
        let rows = site.api().finished(&task, &IDS, LIMIT).await;
        assert!(
            rows.iter().all(|row| row["error_code"] == 126 && row["status"] == 4),
            "{rows:?}"
        );
    }
}

#[tokio::test]
async fn large_output_comes_through_whichever_node_has_the_session() {
    let (site, _agents) = site(StoreKind::Redis).await;
    let script = "#!/bin/bash\nfor i in $(seq 100000); do echo \"line $i\"; done\n";
    let wanted: usize = (1..=100_000).map(|i| format!("line {i}\n").len()).sum();
    let task = site.node_api(1).submit(&script_body(&IDS, "root", script, 60)).await;
    for row in site.node_api(2).finished(&task, &IDS, Duration::from_secs(60)).await {
        let screen = row["screen"].as_str().unwrap();
        assert_eq!((row["status"].as_i64(), screen.len()), (Some(2), wanted));
        assert!(screen.ends_with("line 100000\n"));
    }
}

#[tokio::test]
async fn one_id_at_two_nodes_is_one_host() {
    let (site, mut agents) = site(StoreKind::Embedded).await;
    // The same host leaves node 1 for node 2 without a word: its old session must not get what is meant for it.
    agents[0].freeze();
    let options = AgentOptions {
        nodes: Some(vec![2]),
        ..AgentOptions::new(IDS[0], "10.5.1.0")
    };
    let _again = site.spawn_agent(&options, "-again").unwrap();
    let marks = site.path().join("runs");
    eventually("it can be reached", LIMIT, || async {
        let task = site
            .node_api(1)
            .submit(&script_body(&IDS[..1], "root", &counting(&marks, 0.0, 0), 20))
            .await;
        let rows = site.node_api(1).finished(&task, &IDS[..1], LIMIT).await;
        (rows[0]["status"] == 2).then_some(())
    })
    .await;
    agents[0].kill_9();
    let runs = runs_by_target(&marks);
    assert!(runs.values().all(|n| *n == 1), "{runs:?}");
}
