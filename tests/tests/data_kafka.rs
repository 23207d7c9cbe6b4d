//! A real Kafka broker at the end: records from a plugin's socket through the real agent and the real gse_data to topics, and read back.
//! The broker is Apache Kafka, started by `tests/kafka/broker.sh`; where it is not to be had the test skips and says why.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use futures::StreamExt;
use gse_tests::metrics::Figures;
use gse_tests::plugin::{Plugin, dynamic, plain};
use gse_tests::{AgentOptions, Child, Site, StoreKind, eventually};
use rdkafka::ClientConfig;
use rdkafka::Message;
use rdkafka::consumer::{Consumer, StreamConsumer};
use serde_json::{Value, json};

const ID: u32 = 1_500_005;
const PATIENCE: Duration = Duration::from_secs(60);
/// What the script ends with where there is no Kafka.
const NOT_TO_BE_HAD: i32 = 77;
/// Fetching it takes so long at most.
const FETCHING: Duration = Duration::from_secs(300);

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Ports of the broker: for everybody, for users, its own.
struct Ports(u16, u16, u16);

/// Starts the broker; `None` and a word where it can't be had.
async fn broker(site: &Site, ports: &Ports) -> Option<Child> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("kafka/broker.sh");
    let mut command = Command::new("sh");
    command.arg(script).arg(site.path().join("kafka"));
    for port in [ports.0, ports.1, ports.2] {
        command.arg(port.to_string());
    }
    let mut child = Child::spawn("kafka", command, &site.path().join("kafka.log")).unwrap();
    let begun = std::time::Instant::now();
    loop {
        if tokio::net::TcpStream::connect(("127.0.0.1", ports.1)).await.is_ok() {
            return Some(child);
        }
        if !child.is_running() {
            let status = child.wait(PATIENCE).await.unwrap();
            assert_eq!(status.code(), Some(NOT_TO_BE_HAD), "{}", child.log());
            eprintln!("skipped: {}", child.log());
            return None;
        }
        assert!(begun.elapsed() < FETCHING, "no broker: {}", child.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Reads a topic from its beginning, as a user.
fn consumer(ports: &Ports, topic: &str) -> StreamConsumer {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", format!("127.0.0.1:{}", ports.1))
        .set("security.protocol", "SASL_PLAINTEXT")
        .set("sasl.mechanisms", "SCRAM-SHA-512")
        .set("sasl.username", "gse")
        .set("sasl.password", "gse-password")
        // One for each: readers of one group wait for each other.
        .set("group.id", topic)
        .set("auto.offset.reset", "earliest")
        .set("fetch.message.max.bytes", "20000000")
        .set("topic.metadata.refresh.interval.ms", "200")
        .create()
        .unwrap();
    consumer.subscribe(&[topic]).unwrap();
    consumer
}

/// The next `count` values of a topic.
async fn values(consumer: &StreamConsumer, count: usize) -> Vec<Vec<u8>> {
    let mut seen = Vec::new();
    let mut stream = consumer.stream();
    let reading = async {
        while seen.len() < count {
            match stream.next().await.unwrap() {
                Ok(message) => {
                    assert_eq!(message.key(), None);
                    seen.push(message.payload().unwrap_or_default().to_vec());
                }
                // The topic is made by the first record.
                Err(error) => eprintln!("reading: {error}"),
            }
        }
    };
    let ended = tokio::time::timeout(PATIENCE, reading).await;
    assert!(ended.is_ok(), "{} of {count} records", seen.len());
    seen
}

// contract: data-plane#3, data-plane#6, data-plane#13, data-plane#26, data-plane#27, data-plane#49
#[tokio::test]
#[ignore = "full tier: starts Apache Kafka, which is fetched once"]
async fn records_reach_a_real_broker_also_after_it_hung() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let ports = Ports(free_port(), free_port(), free_port());
    let Some(kafka) = broker(&site, &ports).await else {
        return;
    };
    let data = site.data("kafka", &["sinks.retry_max_ms=500".into()]).await.unwrap();
    let mut options = AgentOptions::new("0100005254008ed86116666614661856", "10.1.2.8");
    options.sets = vec![format!("data.servers=[\"{}\"]", data.address("link"))];
    let _agent = site.spawn_agent(&options, "").unwrap();
    let mut plugin = Plugin::connect(&site.data_socket(&options.id)).await;

    // One route to anybody's port, two with a user in either spelling; brokers by name.
    let api = site.data_api(&data);
    let who = json!({"operator_name": "admin"});
    let mut routes = Vec::new();
    for (name, port, user) in [
        ("open", ports.0, ""),
        ("usename", ports.1, "sasl_usename"),
        ("username", ports.1, "sasl_username"),
    ] {
        let mut kafka = json!({"storage_address": [{"ip": "localhost", "port": port}]});
        if !user.is_empty() {
            kafka["sasl_passwd"] = json!("gse-password");
            kafka["sasl_mechanisms"] = json!("SCRAM-SHA-512");
            kafka["security_protocol"] = json!("SASL_PLAINTEXT");
            kafka[user] = json!("gse");
        }
        let stream = json!({"name": name, "report_mode": "kafka", "kafka": kafka});
        let body = json!({"metadata": {"plat_name": "bkmonitor"}, "operation": who, "stream_to": stream});
        let made = api.post("/api/v2/data/add_streamto", &body).await;
        assert_eq!(made["code"], 0, "{made}");
        routes.push(json!({"name": name, "stream_to": {"stream_to_id": made["data"]["stream_to_id"],
            "kafka": {"topic_name": format!("0bkmonitor_{name}"), "data_set": "0bkmonitor_", "biz_id": 0, "partition": 1}}}));
    }
    let body = json!({"metadata": {"plat_name": "bkmonitor", "channel_id": ID}, "operation": who, "route": routes});
    let made: Value = api.post("/api/v2/data/add_route", &body).await;
    assert_eq!(made["code"], 0, "{made}");
    tokio::time::sleep(Duration::from_secs(2)).await;

    let long: Vec<u8> = (0..10_485_000u32).map(|n| (n % 251) as u8).collect();
    let mut sent: Vec<Vec<u8>> = vec![b"{\"dataid\":1500005}".to_vec(), b"\xff\x00raw\n\x00".to_vec(), long];
    plugin.send(&dynamic(ID, &sent[0])).await.unwrap();
    plugin.send(&plain(0xC01, ID, &sent[1])).await.unwrap();
    plugin.send(&dynamic(ID, &sent[2])).await.unwrap();
    let topics = ["open", "usename", "username"].map(|name| consumer(&ports, &format!("0bkmonitor_{name}")));
    for topic in &topics {
        assert!(values(topic, 3).await == sent, "not what was sent");
    }

    // What comes while the broker says nothing waits, and arrives in order.
    kafka.freeze();
    sent = (0..2_000).map(|number| format!("{number:06}").into_bytes()).collect();
    for part in sent.chunks(100) {
        let frames: Vec<u8> = part.iter().flat_map(|one| dynamic(ID, one)).collect();
        plugin.send(&frames).await.unwrap();
    }
    eventually("records on the disk of gse_data", PATIENCE, || async {
        let backlog = Figures::of(&data).await.ok()?.sum("gse_data_sink_backlog");
        (backlog >= 2_000.0).then_some(())
    })
    .await;
    kafka.go_on();
    for topic in &topics {
        assert!(
            values(topic, sent.len()).await == sent,
            "not what was sent, or in another order"
        );
    }
    eventually("nothing left", PATIENCE, || async {
        let backlog = Figures::of(&data).await.ok()?.sum("gse_data_sink_backlog");
        (backlog == 0.0).then_some(())
    })
    .await;
    assert_eq!(Figures::of(&data).await.unwrap().sum("gse_data_dropped_total"), 0.0);
}
