//! Agents and nodes that come and go: who is told of whom, and who is moved where.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::time::Duration;

use gse_tests::metrics::Figures;
use gse_tests::{Site, StoreKind, Swarm, eventually, script_body};

const LIMIT: Duration = Duration::from_secs(60);

async fn sessions(site: &Site, n: u32) -> f64 {
    Figures::of(site.node(n)).await.unwrap().sum("gse_task_sessions")
}

/// A script for everybody; every row has to be a success.
async fn reaches_all(site: &Site, n: u32, ids: &[&str]) {
    let task = site
        .node_api(n)
        .submit(&script_body(ids, "root", "#!/bin/sh\ntrue\n", 60))
        .await;
    for part in ids.chunks(1000) {
        for row in site.api().finished(&task, part, LIMIT).await {
            assert_eq!(
                (row["error_code"].as_i64(), row["status"].as_i64()),
                (Some(0), Some(2)),
                "{row}"
            );
        }
    }
}

#[tokio::test]
async fn a_node_joins_and_gets_its_share() {
    let mut site = Site::with_nodes(StoreKind::Redis, 1).await.unwrap();
    // These are told of node 1 and nothing else.
    let mut swarm = Swarm::start(&site, 300, &["--delay-ms", "300"]).unwrap();
    swarm.all_connected(LIMIT).await.unwrap();
    let ids = swarm.ids();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    reaches_all(&site, 1, &ids).await;
    site.start_node(2).await.unwrap();
    // While they are moved, work goes on and nobody notices.
    let site = &site;
    let mut rounds = 0;
    let started = std::time::Instant::now();
    loop {
        reaches_all(site, 1 + rounds % 2, &ids).await;
        rounds += 1;
        let (one, two) = (sessions(site, 1).await, sessions(site, 2).await);
        if two >= 135.0 && one + two == 300.0 {
            println!("{one} and {two} after {:?} and {rounds} rounds", started.elapsed());
            break;
        }
        assert!(started.elapsed() < LIMIT, "node 1 has {one}, node 2 {two}");
    }
    // It comes to rest.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let moves = swarm.last().unwrap().all["moves"].as_u64().unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let last = swarm.last().unwrap().all;
    assert!(
        last["moves"].as_u64().unwrap() <= moves + 5,
        "they are moved to and fro: {moves}, then {last}"
    );
    // A target may be given to an agent again while it moves; it is run once.
    assert_eq!(
        (last["rows_acknowledged"].as_u64(), last["foreign"].as_u64()),
        (Some(300 * (u64::from(rounds) + 1)), Some(0)),
        "{last}"
    );
}

#[tokio::test]
async fn agents_learn_of_a_node_that_they_were_never_told_of() {
    let mut site = Site::with_nodes(StoreKind::Embedded, 1).await.unwrap();
    let id = "020000000242010a00002f17521298677001";
    let _agent = site.agent(id, "10.7.1.1").await.unwrap();
    site.start_node(2).await.unwrap();
    // Agents are told once the news has lasted, so that a restart is none; then the node that it knows is gone for good.
    let told = site.place(2, "agents");
    let kept = site
        .path()
        .join(format!("agent-{}", hex::encode(id)))
        .join("servers.json");
    eventually("it has been told of the new node", LIMIT, || async {
        std::fs::read_to_string(&kept)
            .is_ok_and(|text| text.contains(&told))
            .then_some(())
    })
    .await;
    site.kill_node(1);
    eventually("it is with the other node", Duration::from_secs(20), || async {
        let task = site
            .node_api(2)
            .try_submit(&script_body(&[id], "root", "#!/bin/sh\necho here\n", 30))
            .await?
            .ok()?;
        let rows = site.node_api(2).finished(&task, &[id], LIMIT).await;
        (rows[0]["screen"] == "here\n").then_some(())
    })
    .await;
}
