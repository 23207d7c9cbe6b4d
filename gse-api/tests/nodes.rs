//! Several nodes of gse_task behind the front door: found through the store, chosen by load, stopped one after the other.
#![allow(clippy::unwrap_used)] // a test ends by panicking

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use gse_core::store::{Batch, Store, StoreConfig};
use gse_core::tls::Role;
use gse_proto::keys;
use gse_proto::state::NodeInfo;
use prost::Message;
use serde_json::json;
use support::upstream::{Pki, Task, accomplice, closed_port, task};
use support::{Api, Redis, now_ms};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const EXECUTE: &str = "/api/v2/task/extensions/async_execute_script";
const RESULT: &str = "/api/v2/task/extensions/get_execute_script_result";
const TERMINATE: &str = "/api/v2/task/extensions/async_terminate_execute_script";

/// Writes what a node writes of itself.
async fn announce(store: &Store, node: &str, life: u64, calls: &str, draining: bool) {
    let info = NodeInfo {
        node_id: node.into(),
        life,
        calls: calls.into(),
        draining,
        ..NodeInfo::default()
    };
    let key = keys::node_info(node);
    let mut batch = Batch::new();
    let set = redis::cmd("SET").arg(&key).arg(info.encode_to_vec()).to_owned();
    batch.push(&key, set);
    let listed = redis::cmd("ZADD").arg(keys::nodes()).arg(now_ms()).arg(node).to_owned();
    batch.push(keys::nodes(), listed);
    store.run(batch).await.unwrap();
}

/// What is left of a node that was killed, once its keys have expired.
async fn expire(store: &Store, node: &str) {
    let key = keys::node_info(node);
    let mut batch = Batch::new();
    batch.push(&key, redis::cmd("DEL").arg(&key).to_owned());
    store.run(batch).await.unwrap();
}

async fn api(pki: &Pki, store: StoreConfig, change: impl FnOnce(&mut gse_api::Config)) -> Api {
    let tls = pki.issue(&format!("api-{}", rand::random::<u32>()), Role::Server);
    Api::start(store, |config| {
        config.tls = tls;
        config.upstreams.discover_ms = 100;
        config.ops.listen = "127.0.0.1:0".into();
        change(config);
    })
    .await
}

fn calls(task: &Task) -> usize {
    task.echo.calls.load(Ordering::SeqCst)
}

/// Asks the operations listener.
async fn ops(api: &Api, path: &str) -> String {
    let address = api.life.wait_ready().await["ops"].clone();
    let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Waits until the operations listener says something.
async fn until(api: &Api, path: &str, words: &str) {
    let started = Instant::now();
    loop {
        let answer = ops(api, path).await;
        if answer.contains(words) {
            return;
        }
        assert!(started.elapsed() < support::PATIENCE, "no {words:?} in {answer}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_found_through_the_store_and_dropped_when_they_stop_or_die() {
    let pki = Pki::new();
    let redis = Redis::start().await;
    let store = redis.store().await;
    let (a, b) = (task(&pki, "a").await, task(&pki, "b").await);
    announce(&store, "a", 1, &a.address, false).await;
    announce(&store, "b", 1, &b.address, false).await;
    let api = api(&pki, redis.config(), |_| {}).await;
    // Both are known from the start on, and take turns.
    for _ in 0..6 {
        assert_eq!(api.post(EXECUTE, "{}").await["code"], 0);
    }
    assert_eq!((calls(&a), calls(&b)), (3, 3));
    until(
        &api,
        "/metrics",
        r#"gse_api_node_calls_total{service="task",node="a"} 3"#,
    )
    .await;
    until(&api, "/readyz", r#""ready":true"#).await;

    announce(&store, "a", 1, &a.address, true).await;
    until(&api, "/metrics", r#"gse_api_node_up{service="task",node="a"} 0"#).await;
    for _ in 0..4 {
        assert_eq!(api.post(EXECUTE, "{}").await["code"], 0);
    }
    assert_eq!((calls(&a), calls(&b)), (3, 7));

    announce(&store, "a", 2, &a.address, false).await;
    expire(&store, "b").await;
    until(&api, "/metrics", r#"gse_api_node_up{service="task",node="b"} 0"#).await;
    until(&api, "/metrics", r#"gse_api_node_up{service="task",node="a"} 1"#).await;
    assert_eq!(api.post(EXECUTE, "{}").await["code"], 0);
    assert_eq!((calls(&a), calls(&b)), (4, 7));

    // The last list that was read stands while the store is away.
    redis.signal("KILL");
    until(&api, "/readyz", "store").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(api.post(EXECUTE, "{}").await["code"], 0);
    assert_eq!((calls(&a), calls(&b)), (5, 7));
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_without_a_living_node_says_so_in_time_and_takes_the_first_that_comes() {
    let pki = Pki::new();
    let redis = Redis::start().await;
    let store = redis.store().await;
    announce(&store, "dead", 1, "127.0.0.1:1", false).await;
    expire(&store, "dead").await;
    // What is not an address is no node.
    announce(&store, "odd", 1, "not an address", false).await;
    let api = api(&pki, redis.config(), |_| {}).await;
    until(&api, "/readyz", "no gse_task node is alive").await;
    for (path, data) in [(EXECUTE, json!({"result": {}})), (RESULT, json!({"result": []}))] {
        let started = Instant::now();
        let answer = api.post(path, "{}").await;
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        assert_eq!((&answer["code"], &answer["data"]), (&json!(1_000_915), &data));
        let words = answer["message"].as_str().unwrap();
        assert!(
            words.contains("no gse_task node is alive") && words.contains("nothing was done"),
            "{words}"
        );
    }
    // A service that was never there is not waited for.
    let started = Instant::now();
    let answer = api.post("/api/v2/task/extensions/async_transfer_file", "{}").await;
    assert!(
        started.elapsed() < Duration::from_millis(1_000),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(
        (&answer["code"], &answer["data"]),
        (&json!(1_000_915), &json!({"result": {}}))
    );
    assert!(
        answer["message"].as_str().unwrap().contains("set upstreams.file"),
        "{answer}"
    );
    // A call that waits gets the node that comes.
    let first = task(&pki, "first").await;
    let (answer, ()) = tokio::join!(api.post(EXECUTE, "{}"), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        announce(&store, "first", 1, &first.address, false).await;
    });
    assert_eq!(answer["data"]["result"]["server"], "first", "{answer}");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_never_came_is_named_as_the_reason() {
    let pki = Pki::new();
    let store = StoreConfig {
        url: "redis+unix:///nonexistent/redis.sock".into(),
        ..StoreConfig::default()
    };
    let api = api(&pki, store, |_| {}).await;
    let started = Instant::now();
    let answer = api.post(EXECUTE, "{}").await;
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert_eq!(answer["code"], 1_000_190, "{answer}");
    assert!(
        answer["message"].as_str().unwrap().contains("store cannot be reached"),
        "{answer}"
    );
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_be_repeated_gets_one_more_chance_and_a_submit_none() {
    let pki = Pki::new();
    let redis = Redis::start().await;
    let store = redis.store().await;
    for hangs in [false, true] {
        let (bad, visits) = accomplice(&pki, hangs).await;
        let good = task(&pki, "good").await;
        // The first of equals is the first by name.
        announce(&store, "a-bad", 1, &bad, false).await;
        announce(&store, "b-good", 1, &good.address, false).await;
        for path in [RESULT, TERMINATE] {
            let api = api(&pki, redis.config(), |config| config.limits.read_timeout_ms = 500).await;
            let before = visits.load(Ordering::SeqCst);
            let answer = api.post(path, "{}").await;
            assert_eq!(answer["data"]["result"]["server"], "good", "{answer}");
            assert_eq!(visits.load(Ordering::SeqCst), before + 1);
            api.stop().await;
        }
        let api = api(&pki, redis.config(), |config| config.limits.upstream_timeout_ms = 1_000).await;
        let (before, carried_out) = (visits.load(Ordering::SeqCst), calls(&good));
        let answer = api.post(EXECUTE, "{}").await;
        assert_eq!(answer["code"], if hangs { 1_000_120 } else { 1_000_915 }, "{answer}");
        assert!(
            answer["message"]
                .as_str()
                .unwrap()
                .contains("may have been carried out"),
            "{answer}"
        );
        assert_eq!((visits.load(Ordering::SeqCst), calls(&good)), (before + 1, carried_out));
        until(
            &api,
            "/metrics",
            r#"gse_api_node_failures_total{service="task",node="a-bad"} 1"#,
        )
        .await;
        api.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_cannot_be_reached_is_passed_over_and_rests() {
    let pki = Pki::new();
    let redis = Redis::start().await;
    let store = redis.store().await;
    let good = task(&pki, "good").await;
    announce(&store, "a-gone", 1, &closed_port(), false).await;
    announce(&store, "b-good", 1, &good.address, false).await;
    let api = api(&pki, redis.config(), |_| {}).await;
    let large = format!(r#"{{"x":"{}"}}"#, "y".repeat(3_000_000));
    for _ in 0..10 {
        assert_eq!(api.post(EXECUTE, &large).await["data"]["result"]["bytes"], large.len());
    }
    assert_eq!(calls(&good), 10);
    let metrics = ops(&api, "/metrics").await;
    assert!(
        metrics.contains(r#"gse_api_node_up{service="task",node="a-gone"} 0"#),
        "{metrics}"
    );
    // Ten calls took well below the rest of a second, most of them.
    let line = metrics
        .lines()
        .find(|line| line.starts_with(r#"gse_api_node_failures_total{service="task",node="a-gone"}"#));
    let failures: u32 = line.unwrap().rsplit_once(' ').unwrap().1.parse().unwrap();
    assert!((1..=4).contains(&failures), "{failures}");
    api.stop().await;
}

/// Calls of one kind, one after the other, until told to stop; how many there were.
async fn load(api: Arc<Api>, path: &'static str, body: String, stop: Arc<AtomicBool>, done: Arc<AtomicUsize>) {
    while !stop.load(Ordering::SeqCst) {
        let answer = api.post(path, &body).await;
        assert_eq!(answer["code"], 0, "{path}: {answer}");
        done.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_one_node_after_the_other_under_load_fails_no_call_and_repeats_none() {
    // What is said on standard error when it fails.
    gse_core::log::init(&gse_core::config::LogConfig {
        level: "warn,gse_api=info,gse_core=debug".into(),
        ..Default::default()
    })
    .unwrap();
    let pki = Pki::new();
    let redis = Redis::start().await;
    let store = redis.store().await;
    let mut nodes = vec![("a", task(&pki, "a").await), ("b", task(&pki, "b").await)];
    for (name, node) in &nodes {
        announce(&store, name, 1, &node.address, false).await;
    }
    // Longer between two looks than nodes are: those that stop have to be noticed by what they answer.
    let api = api(&pki, redis.config(), |config| {
        config.upstreams.discover_ms = 600_000;
        // A busy machine may take longer over the start of a node.
        config.upstreams.wait_ms = 10_000;
    });
    let api = Arc::new(api.await);
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let bodies = [
        (EXECUTE, "{}".to_owned()),
        (EXECUTE, r#"{"sleep_ms":20}"#.to_owned()),
        (EXECUTE, format!(r#"{{"x":"{}"}}"#, "y".repeat(600_000))),
        (RESULT, r#"{"filler":300000}"#.to_owned()),
    ];
    let callers: Vec<_> = bodies
        .iter()
        .cycle()
        .take(12)
        .map(|(path, body)| tokio::spawn(load(api.clone(), path, body.clone(), stop.clone(), done.clone())))
        .collect();
    let mut carried_out = 0;
    for life in 2..6 {
        for (name, node) in &mut nodes {
            tokio::time::sleep(Duration::from_millis(150)).await;
            node.life.drain();
            assert!(node.life.finished(support::PATIENCE).await);
            carried_out += calls(node);
            // Elsewhere than before, as in a container.
            *node = task(&pki, name).await;
            announce(&store, name, life, &node.address, false).await;
        }
    }
    stop.store(true, Ordering::SeqCst);
    for caller in callers {
        caller.await.unwrap();
    }
    carried_out += nodes.iter().map(|(_, node)| calls(node)).sum::<usize>();
    let done = done.load(Ordering::SeqCst);
    assert_eq!(carried_out, done, "calls carried out, and answered");
    assert!(done > 100, "{done}");
    api.stop().await;
}
