//! Process tasks and registrations when gse_procmgr dies, when there are several of it, when the store goes away, and when a host has lost
//! what it had.
#![allow(clippy::unwrap_used)] // a test ends by panicking

use std::time::Duration;

use gse_proto::keys;
use gse_tests::plugins::{PROC, Plugin, daemon, finished, op, submit};
use gse_tests::{AgentOptions, Child, Fault, Site, StoreKind, eventually};
use serde_json::{Value, json};

const AGENT: &str = "02000000store01";
const PATIENCE: Duration = Duration::from_secs(60);

fn options() -> AgentOptions {
    let mut options = AgentOptions::new(AGENT, "10.13.0.1");
    options.sets = vec!["proc.report_changes_ms=200".into(), "proc.check_interval_ms=200".into()];
    options
}

async fn agent(site: &Site) -> Child {
    let agent = site.spawn_agent(&options(), "").unwrap();
    site.wait_state(AGENT, 2).await;
    agent
}

/// Starts that take three seconds to be looked after.
fn slow() -> Value {
    json!({"alive_monitor_policy": {"start_check_secs": 3}})
}

#[tokio::test]
async fn a_task_goes_on_after_kill_9_and_nothing_is_started_twice() {
    let mut site = Site::with_procs(StoreKind::Redis).await.unwrap();
    let _agent = agent(&site).await;
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::install(dir.path(), "kept", "kept_program", daemon::PLAIN);
    let task = submit(&site.api(), &[plugin.element(AGENT, op::START, &slow())]).await;
    eventually("it is begun", PATIENCE, || async {
        (plugin.starts() == 1).then_some(())
    })
    .await;
    site.procmgr.get_mut(&1).unwrap().kill_9();
    site.start_procmgr(1).await.unwrap();
    let rows = finished(&site.api(), &task, PATIENCE).await;
    assert_eq!(rows[&format!("{AGENT}:nodeman:kept")]["error_code"], 0, "{rows:?}");
    assert_eq!((plugin.starts(), plugin.alive().len()), (1, 1));
    // contract: procmgr-agent-lifecycle#59
    let mut store = site.store_client().await.unwrap();
    let kept = [keys::proc_header(&task), keys::proc_rows(&task, 0)];
    eventually(
        "its keys live for more than an hour, and not for ever",
        PATIENCE,
        || {
            let (mut store, kept) = (store.clone(), kept.clone());
            async move {
                for key in &kept {
                    let ttl: i64 = redis::cmd("TTL").arg(key).query_async(&mut store).await.unwrap();
                    if !(3_600..=7_200).contains(&ttl) {
                        return None;
                    }
                }
                Some(())
            }
        },
    )
    .await;
    let unfinished: i64 = redis::cmd("SCARD")
        .arg(keys::proc_tasks("procs-1"))
        .query_async(&mut store)
        .await
        .unwrap();
    assert_eq!(unfinished, 0);
}

#[tokio::test]
async fn another_instance_answers_polls_and_takes_over() {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    site.procmgr_sets.push("internal.lease_ms=1000".into());
    site.start_task().await.unwrap();
    site.start_procmgr(1).await.unwrap();
    site.start_procmgr(2).await.unwrap();
    site.start_api().await.unwrap();
    let _agent = agent(&site).await;
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::install(dir.path(), "taken", "taken_program", daemon::PLAIN);
    let (one, two) = (site.procmgr_api(1), site.procmgr_api(2));
    let task = submit(&one, &[plugin.element(AGENT, op::START, &slow())]).await;
    let reply = two
        .post(
            &format!("{PROC}/get_proc_operate_result_v2"),
            &json!({ "task_id": task }),
        )
        .await;
    // contract: procmgr-agent-lifecycle#2
    assert_eq!(
        reply["data"][format!("{AGENT}:nodeman:taken")]["error_code"],
        115,
        "{reply}"
    );
    eventually("it is begun", PATIENCE, || async {
        (plugin.starts() == 1).then_some(())
    })
    .await;
    site.procmgr.get_mut(&1).unwrap().kill_9();
    let rows = finished(&two, &task, PATIENCE).await;
    assert_eq!(rows[&format!("{AGENT}:nodeman:taken")]["error_code"], 0, "{rows:?}");
    assert_eq!(plugin.starts(), 1);
    // The front door has noticed, too.
    let status = plugin.status(&site.api(), AGENT).await;
    assert!(status["pid"].as_i64().unwrap() > 0, "{status}");
}

#[tokio::test]
async fn a_store_that_goes_away_in_the_middle() {
    let mut site = Site::start_behind_a_proxy(StoreKind::Embedded).await.unwrap();
    site.start_procmgr(1).await.unwrap();
    let _agent = agent(&site).await;
    let api = site.procmgr_api(1);
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::install(dir.path(), "stored", "stored_program", daemon::PLAIN);
    let task = submit(&api, &[plugin.element(AGENT, op::START, &slow())]).await;
    eventually("it is begun", PATIENCE, || async {
        (plugin.starts() == 1).then_some(())
    })
    .await;
    site.store_proxy.as_ref().unwrap().set(Fault::Refuse);
    for (path, body) in [
        ("get_proc_operate_result_v2", json!({ "task_id": task })),
        ("operate_proc_v2", plugin.element(AGENT, op::STATUS, &json!({}))),
        (
            "get_proc_status_v2",
            json!({"meta": {"namespace": "nodeman", "name": "stored"}, "agent_id_list": [AGENT]}),
        ),
        ("sync_proc_status", json!({"meta": {"namespace": "nodeman"}})),
    ] {
        let reply = api.post(&format!("{PROC}/{path}"), &body).await;
        assert_eq!(reply["code"], 1_000_190, "{path}: {reply}");
        assert_eq!(reply["data"], json!({}), "{path}: {reply}");
    }
    // The start ends while there is nowhere to write that down.
    tokio::time::sleep(Duration::from_secs(4)).await;
    site.store_proxy.as_ref().unwrap().set(Fault::None);
    let rows = finished(&api, &task, PATIENCE).await;
    assert_eq!(rows[&format!("{AGENT}:nodeman:stored")]["error_code"], 0, "{rows:?}");
    assert_eq!((plugin.starts(), plugin.alive().len()), (1, 1));
    eventually("what the host told meanwhile is known", PATIENCE, || async {
        let query = json!({"meta": {"namespace": "nodeman", "name": "stored"}, "agent_id_list": [AGENT]});
        let reply = api.post(&format!("{PROC}/get_proc_status_v2"), &query).await;
        (reply["data"]["proc_infos"][0]["status"] == 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_a_host_has_lost_is_put_back() {
    let site = Site::with_procs(StoreKind::Cluster).await.unwrap();
    let mut first = agent(&site).await;
    let api = site.api();
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::install(dir.path(), "lost", "lost_program", daemon::PLAIN);
    let row = plugin.operate(&api, AGENT, op::START).await;
    assert_eq!(row["error_code"], 0, "{row}");
    first.terminate(PATIENCE).await.unwrap();
    // contract: procmgr-agent-lifecycle#57
    let data = site.path().join(format!("agent-{}", hex::encode(AGENT)));
    let mut damaged = 0;
    let mut dirs = vec![data];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.file_name().is_some_and(|name| name == "procinfo.json") {
                let whole = std::fs::read(&path).unwrap();
                std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
                damaged += 1;
            }
        }
    }
    assert_eq!(damaged, 1);
    let _second = agent(&site).await;
    eventually("the registration is on the host again", PATIENCE, || async {
        let status = plugin.status(&api, AGENT).await;
        (status["isAuto"] == true).then_some(())
    })
    .await;
    assert_eq!(
        (plugin.starts(), plugin.alive().len()),
        (1, 1),
        "found again, not started again"
    );
}

#[tokio::test]
async fn a_host_that_says_nothing_any_more_is_given_up_and_does_nothing_later() {
    let site = Site::with_procs(StoreKind::Embedded).await.unwrap();
    let first = agent(&site).await;
    let api = site.api();
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::install(dir.path(), "away", "away_program", daemon::PLAIN);
    // It says nothing any more, although its connection is open.
    first.freeze();
    let begun = std::time::Instant::now();
    let task = submit(&api, &[plugin.element(AGENT, op::START, &json!({}))]).await;
    let rows = finished(&api, &task, PATIENCE).await;
    // contract: procmgr-agent-lifecycle#23
    assert_eq!(rows[&format!("{AGENT}:nodeman:away")]["error_code"], 117, "{rows:?}");
    assert!(begun.elapsed() < Duration::from_secs(14), "{:?}", begun.elapsed());
    first.go_on();
    site.wait_state(AGENT, 2).await;
    // What the caller was told did not happen does not happen later.
    let status = plugin.status(&api, AGENT).await;
    assert_eq!((status["pid"].as_i64(), plugin.starts()), (Some(-1), 0), "{status}");
}

#[tokio::test]
async fn a_host_that_has_just_gone_is_waited_for_and_given_up_soon() {
    let site = Site::with_procs(StoreKind::Embedded).await.unwrap();
    let mut first = agent(&site).await;
    let api = site.api();
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::install(dir.path(), "away", "away_program", daemon::PLAIN);
    first.kill_9();
    let begun = std::time::Instant::now();
    let waited = submit(&api, &[plugin.element(AGENT, op::START, &slow())]).await;
    // Back within its heartbeat interval: it gets what was meant for it.
    let second = agent(&site).await;
    let rows = finished(&api, &waited, PATIENCE).await;
    assert_eq!(
        rows[&format!("{AGENT}:nodeman:away")]["error_code"],
        0,
        "{rows:?} after {:?}",
        begun.elapsed()
    );
    assert_eq!(plugin.starts(), 1);
    drop(second);
    let task = submit(&api, &[plugin.element(AGENT, op::STATUS, &json!({}))]).await;
    let begun = std::time::Instant::now();
    let rows = finished(&api, &task, PATIENCE).await;
    assert_eq!(rows[&format!("{AGENT}:nodeman:away")]["error_code"], 117, "{rows:?}");
    assert!(begun.elapsed() < Duration::from_secs(14), "{:?}", begun.elapsed());
}
