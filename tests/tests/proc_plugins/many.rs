//! A host with very many registrations.

use std::time::{Duration, Instant};

use gse_tests::eventually;
use gse_tests::plugins::{PROC, Plugin, daemon, finished, op, submit};
use serde_json::{Value, json};

use super::{AGENT, PATIENCE, agent as restarted, expect, only, site};

const COUNT: usize = 1000;
const LIMIT: Duration = Duration::from_secs(15);

fn element(plugin: &Plugin, n: usize, operation: i64) -> Value {
    let mut element = plugin.element(AGENT, operation, &json!({}));
    element["meta"] =
        json!({"namespace": "GSEKIT_BIZ_3", "name": format!("进程 {n}_1"), "labels": {"bk_process_id": n}});
    element["spec"]["control"]["version_cmd"] = "".into();
    element["spec"]["identity"]["proc_name"] = format!("absent-{n}").into();
    element["spec"]["identity"]["pid_path"] = format!("/nonexistent/{n}.pid").into();
    element
}

// contract: procmgr-agent-lifecycle#24, procmgr-agent-lifecycle#56, procmgr-agent-lifecycle#57, procmgr-agent-lifecycle#58
#[tokio::test(flavor = "multi_thread")]
async fn a_host_with_a_thousand_registrations() {
    let (site, mut agent) = site().await;
    let api = site.api();
    let plugin = Plugin::install(site.path(), "bkone", "bkone", daemon::PLAIN);
    expect(&plugin.operate(&api, AGENT, op::START).await, 0);
    for operation in [op::REGISTER, op::STATUS] {
        let elements: Vec<Value> = (0..COUNT).map(|n| element(&plugin, n, operation)).collect();
        let started = Instant::now();
        let task = submit(&api, &elements).await;
        let rows = finished(&api, &task, PATIENCE * 2).await;
        let took = started.elapsed();
        assert_eq!(rows.len(), COUNT);
        for (key, row) in &rows {
            assert_eq!(row["error_code"], 0, "{key}: {row}");
        }
        assert!(operation != op::STATUS || took < LIMIT, "a status task took {took:?}");
        println!("operation {operation}: {took:?}");
    }
    // None of them has ever run: none is started.
    assert_eq!(plugin.starts(), 1);
    agent.kill_9();
    agent = restarted(&site).await;
    let page = |start: usize, limit: usize| {
        let api = api.clone();
        async move {
            let body = json!({"meta": {"namespace": "GSEKIT_BIZ_3"}, "page": {"start": start, "limit": limit}});
            let reply = api.post(&format!("{PROC}/sync_proc_status"), &body).await;
            assert_eq!(reply["code"], 0, "{reply}");
            reply["data"].clone()
        }
    };
    eventually("all of them are known", PATIENCE, || async {
        let reply = page(0, 1).await;
        (reply["count"] == COUNT).then_some(())
    })
    .await;
    let mut names: Vec<String> = Vec::new();
    for start in (0..COUNT).step_by(300) {
        let reply = page(start, 300).await;
        for info in reply["proc_infos"].as_array().unwrap() {
            assert_eq!(
                (&info["isauto"], &info["bk_agent_id"]),
                (&json!(true), &json!(AGENT)),
                "{info}"
            );
            names.push(info["meta"]["name"].as_str().unwrap().to_owned());
        }
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), COUNT, "pages overlap or leave out");
    let row = finished(&api, &submit(&api, &[element(&plugin, 7, op::STATUS)]).await, PATIENCE).await;
    let content: Value = serde_json::from_str(row.values().next().unwrap()["content"].as_str().unwrap()).unwrap();
    assert_eq!(content["process"][0]["instance"][0]["isAuto"], true, "{content}");
    assert_eq!((only(&plugin), plugin.starts()), (plugin.alive()[0], 1));
    drop(agent);
}
