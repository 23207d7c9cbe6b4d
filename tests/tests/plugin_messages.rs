//! Messages between platforms and plugins: the call, the agent's message socket, the call-back.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::path::Path;
use std::time::{Duration, Instant};

use gse_tests::metrics::Figures;
use gse_tests::plugin::Talker;
use gse_tests::{AgentOptions, Api, Child, Site, StoreKind};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

const DISPATCH: &str = "/api/v2/cluster/dispatch_message";
const DISPATCH_MULTI: &str = "/api/v2/cluster/dispatch_multi_message";
const TOKEN: &str = "a-token-of-the-tests";

/// A platform that takes call-backs: answers each with the next of `statuses`, then with 200.
async fn platform(statuses: &[u16]) -> (String, mpsc::Receiver<Value>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/callback", listener.local_addr().unwrap());
    let (sender, receiver) = mpsc::channel(100);
    let statuses = statuses.to_vec();
    tokio::spawn(async move {
        let mut statuses = statuses.into_iter();
        while let Ok((stream, _)) = listener.accept().await {
            let mut stream = BufReader::new(stream);
            loop {
                let (mut length, mut line) = (0, String::new());
                while stream.read_line(&mut line).await.unwrap_or(0) > 2 {
                    let lower = line.to_lowercase();
                    if let Some(value) = lower.strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                    line.clear();
                }
                if length == 0 {
                    break;
                }
                let mut body = vec![0; length];
                stream.read_exact(&mut body).await.unwrap();
                let status = statuses.next().unwrap_or(200);
                let answer = format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
                if status == 200 {
                    sender.send(serde_json::from_slice(&body).unwrap()).await.unwrap();
                }
            }
        }
    });
    (url, receiver)
}

fn slots(url: &str) -> String {
    format!(
        "messages.slots=[{{slot_id=7,token=\"{TOKEN}\",plugin=\"beat\",callback=\"{url}\"}},\
         {{slot_id=8,token=\"another token\",plugin=\"other\"}}]"
    )
}

fn body(agents: &[&str], content: &str) -> Value {
    json!({"slot_id": 7, "token": TOKEN, "message_id": "beat.fetch.0123", "agent_id_list": agents, "content": content})
}

async fn site(url: &str) -> (Site, Child) {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    site.task_sets.push(slots(url));
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    let agent = site.agent("a1", "10.0.0.1").await.unwrap();
    (site, agent)
}

async fn talker(path: &Path) -> (Talker, Value) {
    Talker::connect(path, "beat").await.unwrap()
}

async fn failures(api: &Api, path: &str, body: &Value) -> Vec<Value> {
    let reply = api.post(path, body).await;
    assert_eq!(reply["code"], 0, "{reply}");
    reply["data"]["results"].as_array().expect("a list").clone()
}

// contract: data-plane#47, v2-http-task#58
#[tokio::test]
async fn there_and_back() {
    let (url, mut said) = platform(&[503]).await;
    let (site, agent) = site(&url).await;
    let (mut plugin, answer) = talker(&site.message_socket("a1")).await;
    assert_eq!(
        answer,
        json!({"agent_id": "a1", "version": answer["version"], "cloud_id": 0, "run_mode": 1, "status_code": 2, "status": "running"})
    );
    assert!(!answer["version"].as_str().unwrap().is_empty());

    // By id and by address; content of any kind, empty too.
    let api = site.api();
    for (asked, content) in [("a1", "content \u{0} \u{1F600}"), ("0:10.0.0.1", "")] {
        assert_eq!(
            failures(&api, DISPATCH, &body(&[asked], content)).await,
            Vec::<Value>::new()
        );
        let message = plugin.next().await.unwrap();
        assert_eq!(message.kind, 0x9008);
        let (info, long) = message.reserved;
        assert_eq!(message.body.len(), (info + long) as usize);
        assert_eq!(message.length, 28 + info + long);
        let (info, rest) = message.body.split_at(info as usize);
        let info: Value = serde_json::from_slice(info).unwrap();
        assert_eq!(info, json!({"message_id": "beat.fetch.0123", "session_id": ""}));
        assert_eq!(rest, content.as_bytes());
    }
    // Back, although the platform has no time at first.
    plugin.say("beat.fetch.0123", b"{\"code\":0}").await.unwrap();
    let posted = tokio::time::timeout(Duration::from_secs(10), said.recv())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        posted,
        json!({"message_id": "beat.fetch.0123", "bk_agent_id": "a1", "content": "{\"code\":0}"})
    );
    // A plugin may be there for long without a word from anybody.
    assert_eq!(plugin.keepalive().await.unwrap()["status_code"], 2);
    let figures = Figures::of(site.task.as_ref().unwrap()).await.unwrap();
    assert_eq!(figures.sum("gse_task_messages_delivered_total"), 2.0);
    assert_eq!(figures.sum("gse_task_messages_retried_total"), 1.0);
    assert_eq!(figures.sum("gse_task_messages_posted_total"), 1.0);
    drop(agent);
}

#[tokio::test]
async fn each_its_own() {
    let (site, _agent) = site("http://127.0.0.1:1/nobody").await;
    let _second = site.agent("a2", "10.0.0.2").await.unwrap();
    let (mut one, _) = talker(&site.message_socket("a1")).await;
    let (mut two, _) = talker(&site.message_socket("a2")).await;
    let body = json!({"slot_id": 7, "token": TOKEN, "message_id": "m", "front_content": "<", "back_content": ">",
        "agent_message_list": [{"bk_agent_id": "a1", "content": "one"}, {"bk_agent_id": "a2", "content": "two"}]});
    assert_eq!(failures(&site.api(), DISPATCH_MULTI, &body).await, Vec::<Value>::new());
    for (plugin, content) in [(&mut one, "<one>"), (&mut two, "<two>")] {
        let message = plugin.next().await.unwrap();
        assert_eq!(&message.body[message.reserved.0 as usize..], content.as_bytes());
    }
}

// contract: v2-http-task#58
#[tokio::test]
async fn failures_are_listed_and_nothing_else() {
    let (site, _agent) = site("http://127.0.0.1:1/nobody").await;
    let _silent = site.agent("a2", "10.0.0.2").await.unwrap();
    let (mut plugin, _) = talker(&site.message_socket("a1")).await;
    let api = site.api();
    let failed = failures(&api, DISPATCH, &body(&["a1", "a2", "nobody", "not an id"], "x")).await;
    let codes: Vec<(&str, i64)> = failed
        .iter()
        .map(|row| (row["bk_agent_id"].as_str().unwrap(), row["code"].as_i64().unwrap()))
        .collect();
    assert_eq!(codes, [("a2", 710), ("nobody", 117), ("not an id", 106)], "{failed:?}");
    assert!(failed.iter().all(|row| !row["message"].as_str().unwrap().is_empty()));
    assert_eq!(plugin.next().await.unwrap().kind, 0x9008);

    let with = |key: &str, value: Value| {
        let mut changed = body(&["a1"], "x");
        changed[key] = value;
        changed
    };
    let long = "\u{1F600}".repeat(64);
    let good = failures(&api, DISPATCH, &with("message_id", json!(long))).await;
    assert_eq!(good, Vec::<Value>::new());
    for (wrong, code) in [
        (with("message_id", json!("m".repeat(65))), 1_000_106),
        (with("agent_id_list", json!([])), 1_000_106),
        (with("content", json!("x".repeat(3 << 20))), 1_000_106),
        (with("token", json!("a wrong token")), 1_000_903),
        (with("token", Value::Null), 1_000_903),
        (with("slot_id", json!(9)), 1_000_903),
        (with("slot_id", json!(8)), 1_000_903),
    ] {
        let reply = api.post(DISPATCH, &wrong).await;
        assert_eq!(reply["code"], code, "{reply:.300}");
        assert_eq!(reply["data"], json!({}), "the shape of the call");
    }
}

#[tokio::test]
async fn through_another_node_and_a_new_session() {
    let (url, mut said) = platform(&[]).await;
    let mut site = Site::with_store(StoreKind::Redis).await.unwrap();
    site.task_sets.push(slots(&url));
    for n in 1..=2 {
        site.start_node(n).await.unwrap();
    }
    site.start_api().await.unwrap();
    site.settled().await;
    let mut options = AgentOptions::new("a1", "10.0.0.1");
    options.nodes = Some(vec![2, 1]);
    options.sets.push("first_server=listed".into());
    let _agent = site.spawn_agent(&options, "").unwrap();
    site.wait_state("a1", 2).await;
    let (mut plugin, _) = talker(&site.message_socket("a1")).await;
    for n in 1..=2 {
        let api = site.node_api(n);
        assert_eq!(failures(&api, DISPATCH, &body(&["a1"], "x")).await, Vec::<Value>::new());
        assert_eq!(plugin.next().await.unwrap().kind, 0x9008);
    }
    // While the agent has no session what the plugin says waits; what was given to the session that ended is lost, so it asks again.
    site.kill_node(2);
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        plugin.say("late", b"node 2 is gone").await.unwrap();
        if let Ok(Some(said)) = tokio::time::timeout(Duration::from_secs(2), said.recv()).await {
            assert_eq!(
                (&said["message_id"], &said["bk_agent_id"]),
                (&json!("late"), &json!("a1"))
            );
            break;
        }
        assert!(Instant::now() < deadline, "nothing came through node 1");
    }
}
