//! gse_data's sinks with a real agent in front: Redis, gone and back, while files go on.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::process::Command;
use std::time::Duration;

use futures::StreamExt;
use gse_tests::plugin::{Plugin, plain};
use gse_tests::{AgentOptions, Child, Fault, Proxy, Site, StoreKind, eventually};
use serde_json::json;

const AGENT: &str = "0100005254008ed86116666614661854";
const ID: u32 = 1_500_003;

// contract: data-plane#13, data-plane#28, data-plane#30
#[tokio::test]
async fn redis_goes_and_comes_back_while_files_go_on() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut command = Command::new("redis-server");
    command.args(["--port", &port.to_string(), "--save", "", "--bind", "127.0.0.1"]);
    let _redis = Child::spawn("redis", command, &site.path().join("publish-redis.log")).unwrap();
    let client = redis::Client::open(format!("redis://127.0.0.1:{port}")).unwrap();
    let mut heard = eventually("a Redis", Duration::from_secs(10), || async {
        client.get_async_pubsub().await.ok()
    })
    .await;
    heard.subscribe("snapshot2").await.unwrap();
    let mut heard = heard.into_on_message();
    let proxy = Proxy::start(&format!("127.0.0.1:{port}")).await.unwrap();

    let data = site
        .data(
            "sinks",
            &["sinks.retry_max_ms=200".into(), "sinks.attempt_timeout_ms=1000".into()],
        )
        .await
        .unwrap();
    let mut options = AgentOptions::new(AGENT, "10.1.2.6");
    options.sets = vec![format!("data.servers=[\"{}\"]", data.address("link"))];
    let _agent = site.spawn_agent(&options, "").unwrap();
    let mut plugin = Plugin::connect(&site.data_socket(AGENT)).await;

    // Routed while everything runs.
    let api = site.data_api(&data);
    let who = json!({"operator_name": "admin"});
    let mut routes = Vec::new();
    for (name, stream) in [
        (
            "r",
            json!({"name": "r", "report_mode": "redis", "redis": {"storage_address": [{"ip": "127.0.0.1", "port": proxy.address().port()}], "mode": "single"}}),
        ),
        ("f", json!({"name": "f", "report_mode": "file", "data_log_path": ""})),
    ] {
        let body = json!({"metadata": {"plat_name": "bkmonitor"}, "operation": who, "stream_to": stream});
        let made = api.post("/api/v2/data/add_streamto", &body).await;
        let mut to = json!({"stream_to_id": made["data"]["stream_to_id"]});
        if name == "r" {
            to["redis"] = json!({"channel_name": "snapshot2"});
        }
        routes.push(json!({"name": name, "stream_to": to}));
    }
    let body = json!({"metadata": {"plat_name": "bkmonitor", "channel_id": ID}, "operation": who, "route": routes});
    let made = api.post("/api/v2/data/add_route", &body).await;
    assert_eq!(made["code"], 0, "{made}");
    tokio::time::sleep(Duration::from_secs(2)).await;

    plugin.send(&plain(0xC01, ID, b"\xff\x00raw")).await.unwrap();
    let first = tokio::time::timeout(Duration::from_secs(10), heard.next())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(first.get_payload_bytes(), b"\xff\x00raw");

    proxy.set(Fault::Refuse);
    proxy.cut();
    for number in 0..500 {
        plugin
            .send(&plain(0xC01, ID, format!("{number:06}").as_bytes()))
            .await
            .unwrap();
    }
    let files = site.path().join("gse_data-sinks/files");
    eventually("all of them in the file", Duration::from_secs(10), || async {
        let mut lines = 0;
        for entry in std::fs::read_dir(&files).ok()? {
            let content = std::fs::read(entry.ok()?.path()).ok()?;
            lines += content.iter().filter(|byte| **byte == b'\n').count();
        }
        (lines == 501).then_some(())
    })
    .await;
    proxy.set(Fault::None);
    for number in 0..500 {
        let next = tokio::time::timeout(Duration::from_secs(10), heard.next())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(next.get_payload_bytes(), format!("{number:06}").as_bytes());
    }
}
