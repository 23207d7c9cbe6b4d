//! The same on every store that a URL can name: the services do not know which one it is.

use std::time::Duration;

use gse_tests::{Site, StoreKind, script_body};
use serde_json::json;

const ONE: &str = "020000000242010a00002f17521298676501";

async fn the_main_job(kind: StoreKind) {
    let mut site = Site::start(kind).await.expect("it works");
    let _agent = site.agent(ONE, "10.1.1.1").await.expect("it works");
    let api = site.api();
    // Enough targets for several buckets, so for several shards of a cluster.
    let strangers: Vec<String> = (0..1200).map(|n| format!("3:10.20.{}.{}", n / 256, n % 256)).collect();
    let mut agents: Vec<&str> = vec![ONE, "0:10.1.1.1"];
    agents.extend(strangers.iter().map(String::as_str));
    let script = "#!/bin/bash\nfor i in $(seq 30000); do echo \"line $i\"; done\nexit 9\n";
    let task = api.submit(&script_body(&agents, "root", script, 60)).await;
    let rows = api.finished(&task, &agents[..1000], Duration::from_secs(30)).await;
    for row in &rows[..2] {
        assert_eq!(
            (row["status"].as_i64(), row["script_exit_code"].as_i64()),
            (Some(5), Some(9)),
            "{kind:?}"
        );
        assert!(row["screen"].as_str().expect("it works").ends_with("line 30000\n"));
    }
    assert!(rows[2..].iter().all(|row| row["error_code"] == 117));
    let state = api.post("/api/v2/task/get_task_state", &json!({"task_id": task})).await;
    assert_eq!(
        state["data"]["result"]["offline_agents"]
            .as_array()
            .expect("it works")
            .len(),
        1200
    );
    // What was stored is there for a new life of the server.
    site.task.as_mut().expect("it works").kill_9();
    site.start_task().await.expect("it works");
    let again = site.api().rows(&task, &agents[..1000]).await;
    assert_eq!(again, rows, "{kind:?}");
}

#[tokio::test]
async fn on_the_embedded_store() {
    the_main_job(StoreKind::Embedded).await;
}

#[tokio::test]
async fn on_gse_dba_in_front_of_a_redis() {
    the_main_job(StoreKind::Single).await;
}

#[tokio::test]
async fn on_a_plain_redis() {
    the_main_job(StoreKind::Redis).await;
}

#[tokio::test]
async fn on_a_redis_cluster() {
    the_main_job(StoreKind::Cluster).await;
}
