//! Calls that belong to other services: who they come from over there, what comes back, and what happens when nobody is there.
#![allow(clippy::unwrap_used)] // a test ends by panicking

mod support;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use gse_core::store::StoreConfig;
use gse_core::tls::Role;
use serde_json::json;
use support::Api;
use support::upstream::{Pki, accomplice, closed_port, task, task_at, task_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const EXECUTE: &str = "/api/v2/task/extensions/async_execute_script";
const RESULT: &str = "/api/v2/task/extensions/get_execute_script_result";

/// A front door without a store, which no call here needs.
async fn api(pki: &Pki, task: &[&str], change: impl FnOnce(&mut gse_api::Config)) -> Api {
    let store = StoreConfig {
        url: "redis+unix:///nonexistent/redis.sock".into(),
        ..StoreConfig::default()
    };
    let name = format!("api-{}", rand::random::<u32>());
    let tls = pki.issue(&name, Role::Server);
    Api::start(store, |config| {
        config.tls = tls;
        config.upstreams.task = task.iter().map(|address| (*address).to_owned()).collect();
        change(config);
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_arrives_on_behalf_of_its_caller_and_its_answer_comes_back_unchanged() {
    let pki = Pki::new();
    let task = task(&pki, "task").await;
    let api = api(&pki, &[&task.address], |_| {}).await;
    let mut headers = ::http::HeaderMap::new();
    for (name, value) in [
        (
            "x-bkapi-authorization",
            format!(
                r#"{{"bk_app_code":"bk_job","bk_app_secret":"{}","bk_username":"admin"}}"#,
                support::SECRET
            ),
        ),
        ("x-bk-tenant-id", "system".into()),
        ("x-bkapi-request-id", "req-17".into()),
        // A caller that would like to be somebody else.
        ("x-gse-app", "operator".into()),
        ("x-gse-via", "operator".into()),
        ("x-gse-user", "root".into()),
    ] {
        headers.insert(name, ::http::HeaderValue::from_str(&value).unwrap());
    }
    let answer = api
        .post_with(
            "/api/bk-gse/prod/api/v2/task//async_execute_script/",
            r#"{"a":1}"#,
            headers,
        )
        .await;
    assert_eq!(answer["code"], 0, "{answer}");
    assert_eq!(
        answer["data"]["result"],
        json!({"server": "task", "app": "bk_job", "user": "admin", "via": "server", "tenant": "system", "request_id": "req-17",
               "bytes": 7, "path": "/api/v2/task/async_execute_script", "filler": ""})
    );
    assert_eq!(answer["request_id"], "req-17");
    // An error of the service is the service's own, whole.
    let answer = api.post(EXECUTE, r#"{"fail":true}"#).await;
    assert_eq!(
        (&answer["code"], &answer["message"], &answer["data"]),
        (&json!(1_000_106), &json!("as asked"), &json!({"result": {}}))
    );
    // Large both ways.
    let large = format!(r#"{{"filler":20000000,"x":"{}"}}"#, "y".repeat(20_000_000));
    let answer = api.post(EXECUTE, &large).await;
    assert_eq!(answer["data"]["result"]["bytes"], large.len());
    assert_eq!(answer["data"]["result"]["filler"].as_str().unwrap().len(), 20_000_000);
    api.stop().await;
    task.life.drain();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_take_turns_and_unreachable_ones_are_passed_over() {
    let pki = Pki::new();
    let (first, second) = (task(&pki, "first").await, task(&pki, "second").await);
    let nobody = closed_port();
    let api = api(&pki, &[&nobody, &first.address, &second.address], |_| {}).await;
    for _ in 0..12 {
        assert_eq!(api.post(EXECUTE, "{}").await["code"], 0);
    }
    let (a, b) = (
        first.echo.calls.load(Ordering::SeqCst),
        second.echo.calls.load(Ordering::SeqCst),
    );
    assert_eq!(a + b, 12);
    assert!(a >= 3 && b >= 3, "{a} and {b}");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_goes_to_the_next_server_whole_when_the_first_is_not_there() {
    let pki = Pki::new();
    let task = task(&pki, "task").await;
    let api = api(&pki, &[&closed_port(), &closed_port(), &task.address], |_| {}).await;
    let large = format!(r#"{{"x":"{}"}}"#, "y".repeat(3_000_000));
    for _ in 0..3 {
        assert_eq!(api.post(EXECUTE, &large).await["data"]["result"]["bytes"], large.len());
    }
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_and_not_installed_are_said() {
    let pki = Pki::new();
    let api = api(&pki, &[&closed_port()], |_| {}).await;
    // contract: v2-http-task#2, v2-http-task#3
    for (path, data, code, words) in [
        (EXECUTE, json!({"result": {}}), 1_000_915, "nothing was done"),
        (RESULT, json!({"result": []}), 1_000_915, "nothing was done"),
        // Its servers are found through the store, and there is none.
        (
            "/api/v2/task/extensions/async_transfer_file",
            json!({"result": {}}),
            1_000_190,
            "nothing was done",
        ),
        (
            "/api/v2/task/extensions/get_transfer_file_result",
            json!({"result": []}),
            1_000_190,
            "nothing was done",
        ),
        (
            "/api/v2/proc/operate_proc_multi",
            json!({}),
            1_000_190,
            "nothing was done",
        ),
        ("/api/v2/data/query_route", json!([]), 1_000_915, "set upstreams.data"),
    ] {
        let answer = api.post(path, "{}").await;
        assert_eq!((&answer["code"], &answer["data"]), (&json!(code), &data), "{path}");
        assert!(answer["message"].as_str().unwrap().contains(words), "{answer}");
    }
    assert_eq!(api.post("/api/v2/nothing", "{}").await["code"], 1_000_904);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_have_been_sent_is_never_sent_again() {
    let pki = Pki::new();
    let good = task(&pki, "good").await;
    let (dies, died) = accomplice(&pki, false).await;
    let api = api(&pki, &[&dies, &good.address], |_| {}).await;
    let answer = api.post(EXECUTE, "{}").await;
    assert_eq!(
        (&answer["code"], &answer["data"]),
        (&json!(1_000_915), &json!({"result": {}}))
    );
    assert!(
        answer["message"]
            .as_str()
            .unwrap()
            .contains("may have been carried out"),
        "{answer}"
    );
    assert_eq!(
        (died.load(Ordering::SeqCst), good.echo.calls.load(Ordering::SeqCst)),
        (1, 0)
    );
    // The next calls go where an answer can be had.
    for _ in 0..3 {
        assert_eq!(api.post(EXECUTE, "{}").await["code"], 0);
    }
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_costs_a_time_out() {
    let pki = Pki::new();
    let (hangs, _) = accomplice(&pki, true).await;
    let api = api(&pki, &[&hangs], |config| config.limits.upstream_timeout_ms = 700).await;
    let started = Instant::now();
    let answer = api.post(EXECUTE, "{}").await;
    assert_eq!(
        (&answer["code"], &answer["data"]),
        (&json!(1_000_120), &json!({"result": {}}))
    );
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_servers_of_ours_get_a_call() {
    let (pki, other) = (Pki::new(), Pki::new());
    let foreign = task(&other, "foreign").await;
    let api = api(&pki, &[&foreign.address], |_| {}).await;
    let answer = api.post(EXECUTE, "{}").await;
    assert_eq!(answer["code"], 1_000_915);
    assert_eq!(foreign.echo.calls.load(Ordering::SeqCst), 0);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_stops_half_way_is_the_callers_fault() {
    let pki = Pki::new();
    let task = task(&pki, "task").await;
    let api = api(&pki, &[&task.address], |config| {
        config.http.body_timeout_ms = 500;
        config.http.max_body_bytes = 10_000;
    })
    .await;
    let head = |length: usize| {
        format!(
            "POST {EXECUTE} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\nX-Bkapi-Authorization: \
             {{\"bk_app_code\":\"bk_job\",\"bk_app_secret\":\"{}\"}}\r\nConnection: close\r\n\r\n",
            support::SECRET
        )
    };
    for (length, sent, code) in [(1_000, 10, "1000120"), (20_000, 10, "1000913")] {
        let mut socket = tokio::net::TcpStream::connect(&api.address).await.unwrap();
        socket.write_all(head(length).as_bytes()).await.unwrap();
        socket.write_all(&vec![b' '; sent]).await.unwrap();
        let mut answer = String::new();
        tokio::time::timeout(support::PATIENCE, socket.read_to_string(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(code), "{answer}");
    }
    // The server behind was not blamed for it.
    assert_eq!(api.post(EXECUTE, "{}").await["code"], 0);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_accepts_and_says_nothing_is_passed_over() {
    let pki = Pki::new();
    let task = task(&pki, "task").await;
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = mute.local_addr().unwrap().to_string();
    let api = api(&pki, &[&address, &task.address], |config| {
        config.limits.connect_timeout_ms = 500;
    })
    .await;
    let started = Instant::now();
    for _ in 0..4 {
        assert_eq!(api.post(EXECUTE, "{}").await["code"], 0);
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
    assert_eq!(task.echo.calls.load(Ordering::SeqCst), 4);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_the_service_loses_no_call() {
    let pki = Pki::new();
    let mut running = task(&pki, "generation-0").await;
    let address = running.address.clone();
    let api = api(&pki, &[&address], |_| {}).await;
    for name in ["generation-1", "generation-2", "generation-3"] {
        assert_eq!(api.post(EXECUTE, "{}").await["code"], 0);
        running.life.drain();
        assert!(running.life.finished(support::PATIENCE).await);
        running = task_at(&pki, name, &address).await;
        let answer = api.post(EXECUTE, "{}").await;
        assert_eq!(answer["data"]["result"]["server"], name, "{answer}");
    }
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_uploads_of_one_caller_keep_nobody_else_waiting() {
    let pki = Pki::new();
    let task = task_with(&pki, "task", "127.0.0.1:0", |config| config.max_inflight_requests = 4).await;
    let api = api(&pki, &[&task.address], |_| {}).await;
    assert_eq!(api.post(EXECUTE, "{}").await["code"], 0);
    let head = format!(
        "POST {EXECUTE} HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\nX-Bkapi-Authorization: \
         {{\"bk_app_code\":\"bk_job\",\"bk_app_secret\":\"{}\"}}\r\n\r\n{{",
        support::SECRET
    );
    let mut slow = Vec::new();
    for _ in 0..20 {
        let mut socket = tokio::net::TcpStream::connect(&api.address).await.unwrap();
        socket.write_all(head.as_bytes()).await.unwrap();
        slow.push(socket);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let started = Instant::now();
    for _ in 0..10 {
        for socket in &mut slow {
            socket.write_all(b" ").await.unwrap();
        }
        let answer = api.post(RESULT, "{}").await;
        assert_eq!(answer["code"], 0, "{answer}");
    }
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    drop(slow);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_waits_for_its_turn_is_not_held_against_the_server() {
    let pki = Pki::new();
    let full = task_with(&pki, "full", "127.0.0.1:0", |config| config.max_inflight_requests = 1).await;
    let api = api(&pki, &[&full.address], |config| {
        config.limits.connect_timeout_ms = 300;
        config.limits.upstream_timeout_ms = 3_000;
    })
    .await;
    assert_eq!(api.post(EXECUTE, "{}").await["code"], 0);
    // It waits longer than a connection may take, and is answered.
    let (first, second) = tokio::join!(api.post(EXECUTE, r#"{"sleep_ms":1500}"#), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        api.post(EXECUTE, "{}").await
    });
    assert_eq!((&first["code"], &second["code"]), (&json!(0), &json!(0)), "{second}");
    // Too long: said as what it is, and the call that was given up is never carried out.
    let calls = full.echo.calls.load(Ordering::SeqCst);
    let hog = async {
        let first = api.post(EXECUTE, r#"{"sleep_ms":2400}"#);
        let second = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            api.post(EXECUTE, r#"{"sleep_ms":2400}"#).await
        };
        tokio::join!(first, second)
    };
    let (hogs, given_up) = tokio::join!(hog, async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        api.post(EXECUTE, "{}").await
    });
    assert_eq!((&hogs.0["code"], &hogs.1["code"]), (&json!(0), &json!(0)), "{hogs:?}");
    assert_eq!(given_up["code"], 1_000_915, "{given_up}");
    let words = given_up["message"].as_str().unwrap();
    assert!(
        words.contains("takes no more calls") && words.contains("nothing was done"),
        "{words}"
    );
    assert_eq!(api.post(EXECUTE, "{}").await["code"], 0);
    assert_eq!(full.echo.calls.load(Ordering::SeqCst), calls + 3);
    api.stop().await;
}
