//! The largest questions about agents: how long they take, and what they leave behind. Apart from the other tests, because it looks at
//! the memory of its process.
#![allow(clippy::unwrap_used)] // a test ends by panicking

mod support;

use std::time::{Duration, Instant};

use gse_core::store::Batch;
use serde_json::json;
use support::{Api, Redis, now_ms, record, write};

const STATE: &str = "/api/v2/cluster/list_agent_state";
const INFO: &str = "/api/v2/cluster/list_agent_info";

/// Memory of this process (RSS), with everything that runs in it.
fn memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Asks for 5,000 known agents' states, and 1,000 agents' information, again and again; by how much memory has grown since the middle.
async fn again_and_again(times: usize) -> usize {
    let redis = Redis::start().await;
    let store = redis.store().await;
    let mut batch = Batch::new();
    for n in 0..5_000 {
        let (a, b) = (n / 250, n % 250);
        let mut record = record(&format!("02000000{n:028}"));
        record.node_id = format!("node-{}", n % 3);
        write(&mut batch, &record, now_ms(), &[&format!("0:10.2.{a}.{b}")]);
    }
    store.run(batch).await.unwrap();
    let api = Api::start(redis.config(), |_| {}).await;
    // By their own names and by their addresses.
    let ids: Vec<String> = (0..5_000).map(|n| format!("02000000{n:028}")).collect();
    let addresses: Vec<String> = (0..5_000).map(|n| format!("0:10.2.{}.{}", n / 250, n % 250)).collect();
    let (mut took, mut took_info, mut before) = (Vec::new(), Vec::new(), 0);
    for round in 0..times {
        if round == times / 2 {
            before = memory();
        }
        let names = if round % 8 == 7 { &addresses } else { &ids };
        let asked = json!({ "agent_id_list": names }).to_string();
        let started = Instant::now();
        let rows = api.data(STATE, &asked).await;
        if round % 8 != 7 {
            took.push(started.elapsed());
        }
        let rows = rows.as_array().unwrap();
        assert_eq!(rows.len(), 5_000);
        assert!(rows.iter().all(|row| row["status_code"] == 2), "round {round}");
        if round % 4 == 0 {
            let asked = json!({ "agent_id_list": names[..1_000] }).to_string();
            let started = Instant::now();
            assert_eq!(api.data(INFO, &asked).await.as_array().unwrap().len(), 1_000);
            took_info.push(started.elapsed());
        }
    }
    let grown = memory().saturating_sub(before);
    took.sort_unstable();
    took_info.sort_unstable();
    println!(
        "{times} times: states p50 {:?} max {:?}, information p50 {:?}, memory grown by {grown} bytes",
        took[took.len() / 2],
        took[took.len() - 1],
        took_info[took_info.len() / 2],
    );
    assert!(
        took[took.len() / 2] < Duration::from_millis(500),
        "{:?}",
        took[took.len() / 2]
    );
    assert!(
        took_info[took_info.len() / 2] < Duration::from_millis(500),
        "{took_info:?}"
    );
    api.stop().await;
    grown
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_states_take_less_than_half_a_second() {
    // contract: v2-http-task#48
    again_and_again(16).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "full tier: a minute of the same call"]
async fn memory_stays_flat_over_two_hundred_large_calls() {
    // contract: v2-http-task#48
    let grown = again_and_again(200).await;
    // An answer of 5,000 rows is more than half a MiB: one that stayed each time would be far more than this.
    assert!(grown < 24 << 20, "{grown} bytes more than after half of the calls");
}
