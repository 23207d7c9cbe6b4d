//! A stream to the Redis that sentinels name, through a fail-over, with a real Redis, its replica and a real sentinel.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::process::Command;
use std::time::Duration;

use futures::StreamExt;
use gse_tests::plugin::{Plugin, plain};
use gse_tests::{AgentOptions, Child, Fault, Proxy, Site, StoreKind, eventually};
use redis::aio::MultiplexedConnection;
use serde_json::json;

const AGENT: &str = "0100005254008ed86116666614661856";
const ID: u32 = 1_500_021;
const PATIENCE: Duration = Duration::from_secs(15);
const PASSWORD: &str = "of-the-redis";
const SENTINEL_PASSWORD: &str = "of-the-sentinel";
const CHANNEL: &str = "snapshot2";

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

async fn connect(port: u16, password: &str) -> Option<MultiplexedConnection> {
    let client = redis::Client::open(format!("redis://:{password}@127.0.0.1:{port}")).unwrap();
    client.get_multiplexed_async_connection().await.ok()
}

fn server(site: &Site, port: u16, master: Option<u16>) -> Child {
    let name = format!("redis-{port}");
    let dir = site.path().join(&name);
    std::fs::create_dir_all(&dir).unwrap();
    let mut command = Command::new("redis-server");
    command
        .args(["--bind", "127.0.0.1", "--save", "", "--repl-diskless-sync-delay", "0"])
        .args(["--requirepass", PASSWORD, "--masterauth", PASSWORD])
        .args(["--port", &port.to_string(), "--dir"])
        .arg(&dir);
    if let Some(master) = master {
        command.args(["--replicaof", &format!("127.0.0.1 {master}")]);
    }
    Child::spawn(&name, command, &site.path().join(format!("{name}.log"))).unwrap()
}

fn sentinel(site: &Site, port: u16, master: u16) -> Child {
    let dir = site.path().join("sentinel");
    std::fs::create_dir_all(&dir).unwrap();
    let file = dir.join("sentinel.conf");
    let text = format!(
        "port {port}\nbind 127.0.0.1\ndir {}\nrequirepass {SENTINEL_PASSWORD}\n\
         sentinel monitor events 127.0.0.1 {master} 1\nsentinel auth-pass events {PASSWORD}\n\
         sentinel down-after-milliseconds events 500\nsentinel failover-timeout events 3000\n",
        dir.display()
    );
    std::fs::write(&file, text).unwrap();
    let mut command = Command::new("redis-server");
    command.arg(&file).arg("--sentinel");
    Child::spawn("sentinel", command, &site.path().join("sentinel.log")).unwrap()
}

async fn role(port: u16) -> Option<Vec<redis::Value>> {
    let mut connection = connect(port, PASSWORD).await?;
    redis::cmd("ROLE").query_async(&mut connection).await.ok()
}

fn is(role: &[redis::Value], what: &str) -> bool {
    redis::from_redis_value::<String>(role[0].clone()).is_ok_and(|role| role == what)
}

/// The master, by the sentinel, and how many replicas it knows.
async fn named(sentinel: u16) -> Option<(u16, usize)> {
    let mut connection = connect(sentinel, SENTINEL_PASSWORD).await?;
    let ask = redis::cmd("SENTINEL")
        .arg("get-master-addr-by-name")
        .arg("events")
        .to_owned();
    let (_, port): (String, u16) = ask.query_async(&mut connection).await.ok()?;
    let ask = redis::cmd("SENTINEL").arg("replicas").arg("events").to_owned();
    let replicas: Vec<redis::Value> = ask.query_async(&mut connection).await.ok()?;
    Some((port, replicas.len()))
}

/// Everything that is published there from now on.
async fn listen(port: u16) -> impl futures::Stream<Item = redis::Msg> + Unpin {
    let client = redis::Client::open(format!("redis://:{PASSWORD}@127.0.0.1:{port}")).unwrap();
    let mut heard = client.get_async_pubsub().await.unwrap();
    heard.subscribe(CHANNEL).await.unwrap();
    heard.into_on_message()
}

async fn expect(heard: &mut (impl futures::Stream<Item = redis::Msg> + Unpin), numbers: std::ops::Range<u32>) {
    for number in numbers {
        let next = tokio::time::timeout(PATIENCE, heard.next()).await.unwrap().unwrap();
        assert_eq!(next.get_payload_bytes(), format!("{number:06}").as_bytes());
    }
}

async fn send(plugin: &mut Plugin, numbers: std::ops::Range<u32>) {
    for number in numbers {
        let frame = plain(0xC01, ID, format!("{number:06}").as_bytes());
        plugin.send(&frame).await.unwrap();
    }
}

// contract: data-plane#28, data-plane#25
#[tokio::test]
async fn records_follow_the_master_through_a_fail_over() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let (first, second, port) = (free_port(), free_port(), free_port());
    let mut master = server(&site, first, None);
    let _replica = server(&site, second, Some(first));
    eventually("a replica", PATIENCE, || async {
        let role = role(second).await?;
        let state = redis::from_redis_value::<String>(role.get(3)?.clone()).ok()?;
        (is(&role, "slave") && state == "connected").then_some(())
    })
    .await;
    let _sentinel = sentinel(&site, port, first);
    eventually("a sentinel that knows both", PATIENCE, || async {
        (named(port).await? == (first, 1)).then_some(())
    })
    .await;
    let proxy = Proxy::start(&format!("127.0.0.1:{port}")).await.unwrap();

    let sets = ["sinks.retry_max_ms=200".into(), "sinks.attempt_timeout_ms=1000".into()];
    let data = site.data("sentinel", &sets).await.unwrap();
    let mut options = AgentOptions::new(AGENT, "10.1.2.8");
    options.sets = vec![format!("data.servers=[\"{}\"]", data.address("link"))];
    let _agent = site.spawn_agent(&options, "").unwrap();
    let api = site.data_api(&data);
    let who = json!({"operator_name": "admin"});
    // The first of the sentinels is away for good.
    let stream = json!({"name": "r", "report_mode": "redis", "redis": {
        "storage_address": [{"ip": "127.0.0.1", "port": 1}, {"ip": "localhost", "port": proxy.address().port()}],
        "mode": "sentinel", "master_name": "events", "passwd": PASSWORD, "sentinel_passwd": SENTINEL_PASSWORD}});
    let body = json!({"metadata": {"plat_name": "bkmonitor"}, "operation": who, "stream_to": stream});
    let made = api.post("/api/v2/data/add_streamto", &body).await;
    let to = json!({"stream_to_id": made["data"]["stream_to_id"], "redis": {"channel_name": CHANNEL}});
    let body = json!({"metadata": {"plat_name": "bkmonitor", "channel_id": ID}, "operation": who,
        "route": [{"name": "r", "stream_to": to}]});
    let made = api.post("/api/v2/data/add_route", &body).await;
    assert_eq!(made["code"], 0, "{made}");
    tokio::time::sleep(Duration::from_millis(500)).await;

    let mut heard = listen(first).await;
    let mut plugin = Plugin::connect(&site.data_socket(AGENT)).await;
    send(&mut plugin, 0..500).await;
    expect(&mut heard, 0..500).await;

    // Nobody is told of the new master before there is somebody who listens to it: Redis keeps nothing.
    proxy.set(Fault::Refuse);
    proxy.cut();
    master.kill_9();
    send(&mut plugin, 500..1_000).await;
    eventually("a fail-over", PATIENCE, || async {
        let (port, _) = named(port).await?;
        (port == second && is(&role(second).await?, "master")).then_some(())
    })
    .await;
    let mut heard = listen(second).await;
    send(&mut plugin, 1_000..1_100).await;
    proxy.set(Fault::None);
    expect(&mut heard, 500..1_100).await;
    send(&mut plugin, 1_100..1_200).await;
    expect(&mut heard, 1_100..1_200).await;
}
