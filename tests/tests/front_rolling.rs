//! The front door while nodes of gse_task behind it stop and start: real processes, calls of every kind, none of which may fail.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use gse_proto::keys;
use gse_proto::state::NodeInfo;
use gse_tests::api::EXT;
use gse_tests::{Site, StoreKind, eventually, script_body};
use prost::Message;
use serde_json::json;

const NOBODY: &str = "020000000242010a00002f17521298676599";

/// Waits until the store says where a node is; writes it if the node itself does not.
async fn announced(site: &Site, n: u32) {
    let name = format!("node-{n}");
    let calls = site.node(n).address("internal").to_owned();
    let mut store = site.store_client().await.unwrap();
    for _ in 0..10 {
        let info: Option<Vec<u8>> = redis::cmd("GET")
            .arg(keys::node_info(&name))
            .query_async(&mut store)
            .await
            .unwrap();
        if info.is_some_and(|info| NodeInfo::decode(&info[..]).is_ok_and(|info| info.calls == calls && !info.draining))
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let info = NodeInfo {
        node_id: name.clone(),
        life: now.as_nanos() as u64,
        calls,
        ..NodeInfo::default()
    };
    let () = redis::pipe()
        .set(keys::node_info(&name), info.encode_to_vec())
        .zadd(keys::nodes(), &name, now.as_millis() as u64)
        .query_async(&mut store)
        .await
        .unwrap();
}

#[tokio::test]
async fn nodes_restarted_one_after_the_other_fail_no_call() {
    let mut site = Site::with_store(StoreKind::Redis).await.unwrap();
    for n in 1..=2 {
        site.start_node(n).await.unwrap();
        announced(&site, n).await;
    }
    site.start_api().await.unwrap();
    let (over, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (api, over, done) = (site.api(), Arc::clone(&over), Arc::clone(&done));
            tokio::spawn(async move {
                while !over.load(Ordering::SeqCst) {
                    let task = api.submit(&script_body(&[NOBODY], "root", "exit 0", 60)).await;
                    let rows = api.finished(&task, &[NOBODY], Duration::from_secs(20)).await;
                    assert_eq!(rows[0]["error_code"], 117, "{rows:?}");
                    api.terminate(&task, &json!([])).await;
                    let state = api.post("/api/v2/task/get_task_state", &json!({"task_id": task})).await;
                    assert_eq!(state["code"], 0, "{state}");
                    done.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    for n in [1, 2, 1, 2] {
        let before = done.load(Ordering::SeqCst);
        eventually("calls go through", Duration::from_secs(20), || async {
            (done.load(Ordering::SeqCst) > before + 4).then_some(())
        })
        .await;
        let mut node = site.nodes.remove(&n).unwrap();
        let asked = Instant::now();
        let status = node.terminate(Duration::from_secs(30)).await.unwrap();
        assert_eq!(status.code(), Some(0), "node {n}: {status}");
        println!("node {n} has stopped after {:?}", asked.elapsed());
        site.start_node(n).await.unwrap();
        announced(&site, n).await;
    }
    over.store(true, Ordering::SeqCst);
    for caller in callers {
        caller.await.unwrap();
    }

    // With nobody alive that is said, and not only after a time-out.
    for n in 1..=2 {
        site.nodes
            .remove(&n)
            .unwrap()
            .terminate(Duration::from_secs(30))
            .await
            .unwrap();
    }
    let asked = Instant::now();
    let body = script_body(&[NOBODY], "root", "exit 0", 60);
    let answer = site.api().post(&format!("{EXT}/async_execute_script"), &body).await;
    assert_eq!(answer["code"], 1_000_915, "{answer}");
    assert!(
        answer["message"].as_str().unwrap().contains("nothing was done"),
        "{answer}"
    );
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
}
