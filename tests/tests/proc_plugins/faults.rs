//! A store that goes away in the middle, a gse_procmgr that is killed, and specifications that make no sense.

use std::time::Duration;

use gse_tests::plugins::{PROC, Plugin, daemon, finished, op, submit};
use gse_tests::{Fault, Site, StoreKind, eventually};
use serde_json::{Value, json};

use super::{AGENT, PATIENCE, agent as connected, expect, only, site};

#[tokio::test(flavor = "multi_thread")]
async fn the_store_goes_away_in_the_middle() {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    site.proxy_the_store().await.unwrap();
    site.start_task().await.unwrap();
    site.start_procmgr(1).await.unwrap();
    site.start_api().await.unwrap();
    let agent = connected(&site).await;
    let api = site.api();
    let plugins: Vec<Plugin> = (0..5)
        .map(|n| Plugin::install(site.path(), &format!("bkaway{n}"), &format!("bkaway{n}"), daemon::PLAIN))
        .collect();
    let slowly = json!({"alive_monitor_policy": {"start_check_secs": 2}});
    let elements: Vec<Value> = plugins
        .iter()
        .map(|plugin| plugin.element(AGENT, op::START, &slowly))
        .collect();
    let task = submit(&api, &elements).await;
    eventually("the first has begun", PATIENCE, || async {
        (plugins[0].starts() == 1).then_some(())
    })
    .await;
    let proxy = site.store_proxy.as_ref().unwrap();
    proxy.set(Fault::Refuse);
    tokio::time::sleep(Duration::from_secs(4)).await;
    // An honest error, in time, and data that is an object.
    let reply = api
        .post(&format!("{PROC}/get_proc_operate_result_v2"), &json!({"task_id": task}))
        .await;
    assert!(reply["code"] != 0 && reply["data"].is_object(), "{reply}");
    // Hosts go on meanwhile.
    let pid = only(&plugins[0]);
    plugins[0].crash();
    super::respawned(&plugins[0], pid).await;
    proxy.set(Fault::None);
    let rows = finished(&api, &task, PATIENCE * 2).await;
    assert_eq!(rows.len(), 5);
    for (key, row) in &rows {
        assert_eq!(row["error_code"], 0, "{key}: {row}");
    }
    for (n, plugin) in plugins.iter().enumerate() {
        only(plugin);
        assert_eq!(plugin.starts(), if n == 0 { 2 } else { 1 });
    }
    let pid = only(&plugins[0]);
    eventually("the store hears of it", PATIENCE, || async {
        let body = json!({"meta": {"namespace": "nodeman", "name": "bkaway0"}, "agent_id_list": [AGENT]});
        let reply = api.post(&format!("{PROC}/get_proc_status_v2"), &body).await;
        (reply["data"]["proc_infos"][0]["pid"] == pid).then_some(())
    })
    .await;
    drop(agent);
}

#[tokio::test(flavor = "multi_thread")]
async fn gse_procmgr_is_killed_in_the_middle() {
    let (mut site, _agent) = site().await;
    let api = site.api();
    let plugin = Plugin::install(site.path(), "bkmiddle", "bkmiddle", daemon::PLAIN);
    let slowly = json!({"alive_monitor_policy": {"start_check_secs": 3}});
    let task = submit(&api, &[plugin.element(AGENT, op::START, &slowly)]).await;
    eventually("it has begun", PATIENCE, || async {
        (plugin.starts() == 1).then_some(())
    })
    .await;
    site.procmgr.get_mut(&1).unwrap().kill_9();
    site.start_procmgr(1).await.unwrap();
    let rows = finished(&api, &task, PATIENCE * 2).await;
    rows.values().for_each(|row| expect(row, 0));
    assert_eq!(
        (plugin.alive().len(), plugin.starts(), plugin.commands().len()),
        (1, 1, 1)
    );
}

/// What makes no sense is refused, for its entry or for the whole call, and hurts nobody.
// contract: procmgr-agent-lifecycle#7, procmgr-agent-lifecycle#16, procmgr-agent-lifecycle#33
#[tokio::test(flavor = "multi_thread")]
async fn specifications_that_make_no_sense() {
    let (site, _agent) = site().await;
    let api = site.api();
    let plugin = Plugin::install(site.path(), "bksense", "bksense", daemon::PLAIN);
    let long = "x".repeat(100_000);
    let wrong: Vec<(&str, Value)> = vec![
        ("a relative directory", json!({"identity": {"setup_path": "bin"}})),
        ("no directory", json!({"identity": {"setup_path": ""}})),
        (
            "a directory that is not there",
            json!({"identity": {"setup_path": "/nonexistent/bin"}}),
        ),
        (
            "a file for a directory",
            json!({"identity": {"setup_path": "/etc/passwd"}}),
        ),
        ("no such account", json!({"identity": {"user": "no-such-account"}})),
        ("no account", json!({"identity": {"user": ""}})),
        ("an account that is none", json!({"identity": {"user": "a b\n"}})),
        ("no command", json!({"control": {"start_cmd": ""}})),
        (
            "a command that is not there",
            json!({"control": {"start_cmd": "./nothing.sh"}}),
        ),
        (
            "a command that fails",
            json!({"control": {"start_cmd": "echo so; echo it >&2; echo goes; exit 7"}}),
        ),
        ("a zero byte", json!({"control": {"start_cmd": "echo \u{0}"}})),
        (
            "a command that hangs",
            json!({"control": {"start_cmd": "sleep 600"}, "alive_monitor_policy": {"op_timeout": 1}}),
        ),
        ("a very long name", json!({"identity": {"proc_name": long}})),
        (
            "a negative time",
            json!({"alive_monitor_policy": {"start_check_secs": -5}}),
        ),
        (
            "a number that is none",
            json!({"alive_monitor_policy": {"start_check_secs": "soon"}}),
        ),
        ("a type of none", json!({"identity": {"proc_name": 7}})),
        ("a limit of none", json!({"resource": {"cpu": -1, "mem": "much"}})),
    ];
    for (what, other) in &wrong {
        let body = json!({ "proc_operate_req": [plugin.element(AGENT, op::START, other)] });
        let reply = api.post(&format!("{PROC}/operate_proc_multi"), &body).await;
        if reply["code"] != 0 {
            assert!(
                reply["message"].as_str().is_some_and(|text| text.len() > 5),
                "{what}: {reply}"
            );
            continue;
        }
        let rows = finished(&api, reply["data"]["task_id"].as_str().unwrap(), PATIENCE).await;
        let row = rows.values().next().unwrap();
        let code = row["error_code"].as_i64().unwrap();
        if code == 0 {
            // Read as if it had not been said.
            assert!(["a negative time", "a limit of none"].contains(what), "{what}: {row}");
            expect(&plugin.operate(&api, AGENT, op::KILL).await, 0);
            continue;
        }
        assert!(
            row["error_msg"].as_str().is_some_and(|text| text.len() > 3),
            "{what}: {row}"
        );
        let content: Value = serde_json::from_str(row["content"].as_str().unwrap()).unwrap();
        assert_eq!(content["value"].as_array().map(Vec::len), Some(1), "{what}: {row}");
        // Under a wrong name nobody finds what was started.
        plugin.crash();
        if *what == "a command that fails" {
            expect(row, 65535);
            let message = row["error_msg"].as_str().unwrap();
            assert!(["so", "it", "goes"].iter().all(|word| message.contains(word)), "{row}");
        }
        if *what == "a command that hangs" {
            expect(row, 65535);
        }
    }
    for operation in [5, 6, 10, -1, 99] {
        expect(&plugin.operate(&api, AGENT, operation).await, 832);
    }
    for text in [
        "",
        "[]",
        "{}",
        "{\"proc_operate_req\":{}}",
        "{\"proc_operate_req\":[]}",
        "{\"proc_operate_req\":[7]}",
        "{\"proc_operate_req\":[{\"meta\":null}]}",
        "{\"proc_operate_req\":[{\"meta\":{\"namespace\":\"a\"},\"op_type\":2}]}",
    ] {
        let reply = api.post_text(&format!("{PROC}/operate_proc_multi"), text).await;
        assert!(reply["code"] != 0 && reply["data"].is_object(), "{text}: {reply}");
    }
    // Some of these have a start command that does start it, with a name under which it is not found.
    expect(&plugin.operate(&api, AGENT, op::REGISTER).await, 0);
    expect(&plugin.operate(&api, AGENT, op::UNREGISTER).await, 0);
    plugin.crash();
    let before = plugin.starts();
    expect(&plugin.operate(&api, AGENT, op::START).await, 0);
    only(&plugin);
    assert_eq!(plugin.starts(), before + 1);
}
