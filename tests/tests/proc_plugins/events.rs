//! What is told about processes that end and are started again: events on the agent's own way to gse_data.

use std::time::Duration;

use gse_tests::plugins::{Plugin, daemon, op};
use gse_tests::{Site, StoreKind, eventually};
use serde_json::{Value, json};

use super::{AGENT, PATIENCE, expect, options, respawned};

/// All events in the file of the data id, in order.
fn events(site: &Site) -> Vec<Value> {
    let mut open = vec![site.path().join("events")];
    let mut text = String::new();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("1100008"))
        {
            text += &std::fs::read_to_string(path).unwrap();
        }
    }
    let records: Vec<Value> = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let mut events = Vec::new();
    for record in records {
        assert_eq!(record["data_id"], 1_100_008, "{record}");
        events.extend(record["data"].as_array().unwrap().clone());
    }
    events
}

fn count(site: &Site, name: &str, process: &str) -> usize {
    let index = format!("nodeman:{process}");
    let is_it = |event: &&Value| event["event_name"] == name && event["dimension"]["process_index"] == index;
    events(site).iter().filter(is_it).count()
}

// contract: procmgr-agent-lifecycle#37, procmgr-agent-lifecycle#51, data-plane#36
#[tokio::test(flavor = "multi_thread")]
async fn each_respawn_is_told_once() {
    let site = Site::with_procs(StoreKind::Embedded).await.unwrap();
    let sink = format!("default_sink=file:{}", site.path().join("events").display());
    let data = site.data("events", &[sink]).await.unwrap();
    let mut options = options();
    options
        .sets
        .push(format!("data.servers=[\"{}\"]", data.address("link")));
    let _agent = site.spawn_agent(&options, "").unwrap();
    site.wait_state(AGENT, 2).await;
    let api = site.api();
    let steady = Plugin::install(site.path(), "bksteady", "bksteady", daemon::PLAIN);
    let weary = Plugin::install(site.path(), "bkweary", "bkweary", daemon::PLAIN);
    let greedy = Plugin::install(site.path(), "bkgreedy", "bkgreedy", daemon::GREEDY);
    let info = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total: f64 = info.split_whitespace().nth(1).unwrap().parse().unwrap();
    let limit = json!({
        "resource": {"mem": 60.0 * 1024.0 / total * 100.0},
        "alive_monitor_policy": {"start_check_secs": 3, "start_interval": 20},
    });
    let (a, b, c) = tokio::join!(
        steady.operate(&api, AGENT, op::START),
        weary.operate(&api, AGENT, op::START),
        greedy.operate_with(&api, AGENT, op::START, &limit),
    );
    [a, b, c].iter().for_each(|row| expect(row, 0));

    let restarted = "process_restart_success";
    let mut pid = steady.alive()[0];
    for n in 1..=2 {
        steady.crash();
        pid = respawned(&steady, pid).await;
        // A crash before its check would make this a start in vain.
        eventually("its start is told", PATIENCE, || async {
            (count(&site, restarted, "bksteady") >= n).then_some(())
        })
        .await;
    }
    weary.daemon(daemon::MAYFLY);
    weary.crash();
    eventually("all events", PATIENCE * 2, || async {
        let all = count(&site, restarted, "bksteady") >= 2
            && count(&site, "process_cancel_restart", "bkweary") >= 1
            && count(&site, "process_resource_limit_exceed", "bkgreedy") >= 1;
        all.then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!((count(&site, restarted, "bksteady"), steady.starts()), (2, 3));
    assert_eq!(
        (count(&site, "process_cancel_restart", "bkweary"), weary.starts()),
        (1, 4)
    );
    assert_eq!(count(&site, restarted, "bkweary"), 0);
    for event in events(&site) {
        let dimension = &event["dimension"];
        assert_eq!(event["target"], "10.11.12.13|0", "{event}");
        assert_eq!(dimension["bk_target_cloud_id"], "0", "{event}");
        assert_eq!(dimension["bk_target_ip"], "10.11.12.13", "{event}");
        assert_eq!(dimension["process_group_id"], "nodeman", "{event}");
        let name = dimension["process_name"].as_str().unwrap();
        assert_eq!(dimension["process_index"], format!("nodeman:{name}"), "{event}");
        assert!(
            event["event"]["content"]
                .as_str()
                .is_some_and(|text| text.contains(name)),
            "{event}"
        );
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        let age = now.as_millis() as i64 - event["timestamp"].as_i64().unwrap();
        assert!((0..120_000).contains(&age), "{event}");
    }
    drop(data);
}
