//! Process calls as platforms make them: every path and body variant, entries and their rules, what is read from the store.
#![allow(clippy::unwrap_used)] // a test ends by panicking

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use gse_tests::plugins::{PROC, Plugin, daemon, finished, op, submit};
use gse_tests::{AgentOptions, Api, Child, Site, StoreKind, Swarm, eventually};
use serde_json::{Value, json};

const AGENT: &str = "02000000procs01";
const IP: &str = "10.12.0.1";
const OLD: &str = "/api/c/compapi/v2/gse";
const PATIENCE: Duration = Duration::from_secs(30);

async fn site() -> Site {
    Site::with_procs(StoreKind::Embedded).await.expect("a site")
}

async fn agent(site: &Site) -> Child {
    let mut options = AgentOptions::new(AGENT, IP);
    options.sets = vec!["proc.report_changes_ms=200".into()];
    let agent = site.spawn_agent(&options, "").unwrap();
    site.wait_state(AGENT, 2).await;
    agent
}

fn element(ids: &[&str], name: &str, operation: i64) -> Value {
    json!({"meta": {"namespace": "n", "name": name}, "op_type": operation, "agent_id_list": ids, "hosts": null,
           "spec": {"identity": {"proc_name": "nothing-of-that-name", "setup_path": "", "pid_path": "", "user": ""}}})
}

fn content(row: &Value) -> Value {
    let text = row["content"].as_str().unwrap();
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {row}"))
}

async fn poll(api: &Api, task: &str) -> Value {
    let reply = api
        .post(
            &format!("{PROC}/get_proc_operate_result_v2"),
            &json!({ "task_id": task }),
        )
        .await;
    assert_eq!(reply["code"], 0, "{reply}");
    reply["data"].clone()
}

#[tokio::test]
async fn every_host_has_its_entry_from_the_first_poll_and_those_that_are_not_there_have_it_soon() {
    let site = site().await;
    let api = site.api();
    let elements = [
        element(
            &["02000000gone", "0:10.0.0.7", "not an id", "02000000gone"],
            "p_1",
            op::STATUS,
        ),
        element(&["02000000gone"], "p_2", op::START),
        element(&["02000000gone"], "名前_3", 5),
        json!({"meta": {"namespace": "n", "name": "p_4", "labels": {"bk_process_id": 7}}, "op_type": 1, "no_request": true,
               "hosts": [{"ip": "10.0.0.8", "bk_cloud_id": 3, "bk_supplier_id": 0}], "agent_id_list": null}),
    ];
    let begun = Instant::now();
    let task = submit(&api, &elements).await;
    // contract: procmgr-agent-lifecycle#1-6
    let expected = [
        "02000000gone:n:p_1",
        "0:10.0.0.7:n:p_1",
        "not an id:n:p_1",
        "02000000gone:n:p_2",
        "02000000gone:n:名前_3",
        "3:10.0.0.8:n:p_4",
    ];
    let keys = |rows: &Value| -> BTreeSet<String> { rows.as_object().unwrap().keys().cloned().collect() };
    let expected: BTreeSet<String> = expected.iter().map(|key| (*key).to_owned()).collect();
    let first = poll(&api, &task).await;
    assert_eq!(keys(&first), expected);
    for row in first.as_object().unwrap().values() {
        assert!(
            row["error_code"].is_i64() && row["error_msg"].is_string() && row["content"].is_string(),
            "{row}"
        );
    }
    let rows = finished(&api, &task, Duration::from_secs(8)).await;
    // contract: procmgr-agent-lifecycle#23
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert_eq!(rows.keys().cloned().collect::<BTreeSet<_>>(), expected);
    for (key, row) in &rows {
        // contract: procmgr-agent-lifecycle#7
        let code = if key.contains("名前") { 832 } else { 117 };
        assert_eq!(row["error_code"], code, "{key}: {row}");
        assert!(!row["error_msg"].as_str().unwrap().is_empty(), "{row}");
        if key.ends_with("p_1") {
            // contract: procmgr-agent-lifecycle#10-12
            let content = content(row);
            assert_eq!(content["process"].as_array().unwrap().len(), 1);
            let instance = &content["process"][0]["instance"][0];
            assert_eq!(
                (instance["pid"].as_i64(), instance["processName"].as_str()),
                (Some(-1), Some("p_1"))
            );
        } else {
            // contract: procmgr-agent-lifecycle#13
            assert_eq!(content(row)["value"].as_array().unwrap().len(), 1, "{row}");
        }
    }
    // Polled again, by another door, it is the same.
    assert_eq!(poll(&site.procmgr_api(1), &task).await, poll(&api, &task).await);
    // contract: procmgr-agent-lifecycle#55
    let old = api
        .post(&format!("{OLD}/get_proc_operate_result"), &json!({ "task_id": task }))
        .await;
    assert_eq!(old["data"]["3:0:10.0.0.8:n:p_4"]["error_code"], 117, "{old}");
    assert_eq!(old["data"].as_object().unwrap().len(), expected.len());
}

#[tokio::test]
async fn every_path_and_every_mistake() {
    let site = site().await;
    let api = site.api();
    let one = element(&["gone"], "p", op::STATUS);
    let multi = json!({ "proc_operate_req": [one] });
    let mut task = String::new();
    // contract: procmgr-agent-lifecycle#1, procmgr-agent-lifecycle#9
    for (path, body) in [
        ("/api/v2/proc/operate_proc_multi", &multi),
        ("/api/v2/proc/operate_proc_multi/", &multi),
        ("/api/bk-gse/prod/api/v2/proc/operate_proc_v2/", &one),
        ("//api/v2//proc/operate_proc_v2", &one),
        ("/api/c/compapi/v2/gse/operate_proc_multi/", &multi),
        ("/api/c/compapi/v2/gse/operate_proc_v2", &one),
        ("/api/c/compapi/v2/gse/operate_proc/", &one),
        ("/procapi/v2/proc/multioperate", &multi),
        ("/procapi/v1/proc/operate", &one),
    ] {
        for front in [api.clone(), site.procmgr_api(1)] {
            let reply = front.post(path, body).await;
            assert_eq!(reply["code"], 0, "{path}: {reply}");
            task = reply["data"]["task_id"].as_str().unwrap().to_owned();
            assert!(!task.is_empty() && task.len() <= 64, "{task}");
        }
    }
    // What was asked by method before: GET with a body.
    let body = json!({ "task_id": task }).to_string();
    for (path, key) in [
        ("/procapi/v2/proc/operate", "gone:n:p"),
        ("/procapi/v1/proc/operate/", "gone:n:p"),
        ("/api/c/compapi/v2/gse/get_proc_operate_result_v2/", "gone:n:p"),
    ] {
        let head = format!(
            "GET {path} HTTP/1.1\r\nhost: x\r\nbk-username: admin\r\nx-bkapi-authorization: {}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            json!({"bk_app_code": gse_tests::site::APP, "bk_app_secret": gse_tests::site::SECRET}),
            body.len()
        );
        let answer = api.raw(head.as_bytes()).await;
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.contains(key),
            "{path}: {answer}"
        );
    }
    // contract: procmgr-agent-lifecycle#25, procmgr-agent-lifecycle#26
    for body in [
        json!({"task_id": ""}),
        json!({}),
        json!({"task_id": null}),
        json!({"task_id": "GSETASK:P:20260101000000:0"}),
        json!({"task_id": "a b"}),
    ] {
        for path in [
            format!("{PROC}/get_proc_operate_result_v2"),
            format!("{OLD}/get_proc_operate_result"),
        ] {
            let reply = api.post(&path, &body).await;
            assert_ne!(reply["code"], 0, "{body}: {reply}");
            assert_ne!(reply["code"], 1_000_115, "{body}: {reply}");
            assert_eq!(reply["data"], json!({}), "{body}: {reply}");
        }
    }
    for (body, words) in [
        (json!({}), "no hosts"),
        (json!({"proc_operate_req": null}), "no hosts"),
        (json!({"proc_operate_req": [element(&[], "p", 0)]}), "no hosts"),
        (
            json!({"proc_operate_req": [{"op_type": 0, "agent_id_list": ["a"]}]}),
            "meta.namespace",
        ),
        (
            json!({"proc_operate_req": [element(&["a"], "p", 0), element(&["a"], "p", 1)]}),
            "element 1",
        ),
        (
            json!({"proc_operate_req": [{"meta": {"namespace": "n", "name": "p"}, "op_type": "start"}]}),
            "op_type",
        ),
    ] {
        let reply = api.post(&format!("{PROC}/operate_proc_multi"), &body).await;
        assert_eq!(reply["code"], 1_000_106, "{body}: {reply}");
        assert!(reply["message"].as_str().unwrap().contains(words), "{body}: {reply}");
        assert_eq!(reply["data"], json!({}), "{reply}");
    }
    // A task of somebody else does not exist, and not everybody may operate.
    let small = Api::new(&api.address, gse_tests::site::SMALL_APP, gse_tests::site::SECRET);
    let reply = small.post(&format!("{PROC}/operate_proc_v2"), &one).await;
    assert_eq!(reply["code"], 1_000_903, "{reply}");
    let groups = json!({"meta": {"namespace": "n"}, "hosts": [{"ip": "10.0.0.1", "bk_cloud_id": 0}], "groups": [{"name": "g", "cpu": 30}]});
    let reply = api.post("/procapi/v1/proc/groupinfo", &groups).await;
    assert_eq!(reply["data"]["0:10.0.0.1:n"]["error_code"], 0, "{reply}");
    let reply = api.post(&format!("{OLD}/get_process_group_info"), &groups).await;
    let kept = content(&reply["data"]["0:10.0.0.1:n"]);
    assert_eq!(kept["groups"][0]["cpu"], 30, "{reply}");
}

#[tokio::test]
async fn what_a_host_has_told_is_read_from_the_store() {
    let site = site().await;
    let api = site.api();
    let agent = agent(&site).await;
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::install(dir.path(), "told", "told_program", daemon::PLAIN);
    let row = plugin.operate(&api, AGENT, op::START).await;
    assert_eq!(row["error_code"], 0, "{row}");
    // contract: procmgr-agent-lifecycle#13, procmgr-agent-lifecycle#17
    let value = &content(&row)["value"][0];
    assert_eq!(
        (value["result"].as_str(), value["isAuto"].as_bool()),
        (Some("success"), Some(true)),
        "{row}"
    );
    let pid = plugin.alive()[0];
    // contract: procmgr-agent-lifecycle#31, procmgr-agent-lifecycle#32
    let alias = format!("0:{IP}");
    let query = json!({"meta": {"namespace": "nodeman", "name": "told", "labels": {"proc_name": "told_program"}},
                       "agent_id_list": [AGENT, "02000000gone", alias]});
    let reply = api.post(&format!("{PROC}/get_proc_status_v2"), &query).await;
    let infos = reply["data"]["proc_infos"].as_array().unwrap();
    let ids: Vec<&str> = infos.iter().map(|info| info["bk_agent_id"].as_str().unwrap()).collect();
    assert_eq!(ids, [AGENT, "02000000gone", alias.as_str()]);
    for (info, status) in infos.iter().zip([1, 0, 1]) {
        assert_eq!(info["status"], status, "{info}");
        assert_eq!(info["isauto"], status == 1, "{info}");
        assert_eq!(info["meta"]["name"], "told", "{info}");
        assert!(
            info["host"]["ip"].is_string() && info["host"]["bk_cloud_id"].is_i64(),
            "{info}"
        );
    }
    assert_eq!((&infos[0]["pid"], &infos[0]["host"]["ip"]), (&json!(pid), &json!(IP)));
    for path in [
        format!("{OLD}/get_proc_status/"),
        format!("{OLD}/get_proc_status_v2"),
        "/procapi/v1/proc/status".to_owned(),
    ] {
        let query = json!({"namespace": "nodeman", "meta": {"name": "told"}, "hosts": [{"ip": IP, "bk_cloud_id": 0}]});
        let reply = api.post(&path, &query).await;
        let infos = reply["data"]["proc_infos"].as_array().unwrap();
        assert_eq!(
            (infos.len(), &infos[0]["status"], &infos[0]["host"]["ip"]),
            (1, &json!(1), &json!(IP)),
            "{path}: {reply}"
        );
    }
    // It dies by itself and is not to be started again: told without anybody asking.
    plugin.operate(&api, AGENT, op::UNREGISTER).await;
    plugin.crash();
    eventually("that it has died is known", PATIENCE, || async {
        let reply = api.post(&format!("{PROC}/get_proc_status_v2"), &query).await;
        let info = &reply["data"]["proc_infos"][0];
        (info["status"] == 2 && info["isauto"] == false && info["pid"] == -1).then_some(())
    })
    .await;

    // The older calls: registered, changed, forgotten, with keys of five parts.
    let spec = json!({"identity": {"proc_name": "told_program", "setup_path": dir.path(), "pid_path": dir.path().join("p.pid"), "user": "root"},
                      "control": {"start_cmd": "true"}, "monitor_policy": {"auto_type": 2}});
    let body =
        json!({"meta": {"namespace": "nodeman", "name": "old"}, "hosts": [{"ip": IP, "bk_cloud_id": 0}], "spec": spec});
    let key = format!("0:0:{IP}:nodeman:old");
    for (path, code) in [
        ("update_proc_info", 0),
        ("register_proc_info", 850),
        ("unregister_proc_info", 0),
    ] {
        // contract: procmgr-agent-lifecycle#55
        let reply = api.post(&format!("{OLD}/{path}"), &body).await;
        assert_eq!(reply["data"].as_object().unwrap().len(), 1, "{path}: {reply}");
        assert_eq!(reply["data"][&key]["error_code"], code, "{path}: {reply}");
    }
    let reply = api.post(&format!("{PROC}/update_proc_info/"), &body).await;
    assert_eq!(reply["data"][format!("0:{IP}:nodeman:old")]["error_code"], 0, "{reply}");
    drop(agent);
}

#[tokio::test]
async fn pages_stay_in_order_while_things_change() {
    let site = Site::with_procs(StoreKind::Cluster).await.unwrap();
    let api = site.api();
    let _agent = agent(&site).await;
    let register = |from: usize, to: usize| {
        let elements: Vec<Value> = (from..to)
            .map(|n| {
                json!({"meta": {"namespace": "GSEKIT_BIZ_2", "name": format!("p_{n}"), "labels": {"bk_process_id": n}}, "op_type": 3,
                       "agent_id_list": [AGENT],
                       "spec": {"identity": {"proc_name": "none-such", "setup_path": "/tmp", "pid_path": format!("/tmp/none-such-{n}.pid"), "user": "root"},
                                "control": {"start_cmd": "true"}, "monitor_policy": {"auto_type": 2}}})
            })
            .collect();
        let api = api.clone();
        async move {
            let task = submit(&api, &elements).await;
            let rows = finished(&api, &task, PATIENCE).await;
            assert!(rows.values().all(|row| row["error_code"] == 0), "{rows:?}");
        }
    };
    register(0, 250).await;
    let page = |start: usize, limit: usize| {
        let api = api.clone();
        async move {
            let body = json!({"meta": {"namespace": "GSEKIT_BIZ_2"}, "page": {"start": start, "limit": limit, "return_total": true}});
            let reply = api.post(&format!("{PROC}/sync_proc_status"), &body).await;
            assert_eq!(reply["code"], 0, "{reply}");
            let data = &reply["data"];
            let names: Vec<String> = data["proc_infos"]
                .as_array()
                .unwrap()
                .iter()
                .map(|info| {
                    assert_eq!(
                        (&info["host"]["ip"], &info["host"]["bk_cloud_id"]),
                        (&json!(IP), &json!(0)),
                        "{info}"
                    );
                    info["meta"]["name"].as_str().unwrap().to_owned()
                })
                .collect();
            (data["count"].as_u64().unwrap(), names)
        }
    };
    // contract: procmgr-agent-lifecycle#56
    let (count, all) = page(0, 1_000).await;
    assert_eq!((count, all.len()), (250, 250));
    let (count, first) = page(0, 100).await;
    assert_eq!((count, &first[..]), (250, &all[..100]));
    // More come, some go, between one page and the next: nothing is missed or shown twice.
    register(250, 300).await;
    for (name, operation) in [("p_1", op::UNREGISTER), ("p_120", op::UNREGISTER)] {
        let element = json!({"meta": {"namespace": "GSEKIT_BIZ_2", "name": name}, "op_type": operation, "agent_id_list": [AGENT]});
        let task = submit(&api, &[element]).await;
        finished(&api, &task, PATIENCE).await;
    }
    let (count, rest) = page(100, 150).await;
    assert_eq!((count, &rest[..]), (300, &all[100..]));
    let (count, last) = page(250, 500).await;
    assert_eq!((count, last.len()), (300, 50));
    assert_eq!(page(5_000, 10).await, (300, vec![]));
    assert_eq!(page(0, 0).await, (300, vec![]));
    let nobody = json!({"meta": {"namespace": "nobody's"}, "page": {"start": 0, "limit": 10}});
    let reply = api.post(&format!("{PROC}/sync_proc_status"), &nobody).await;
    assert_eq!(reply["data"], json!({"count": 0, "proc_infos": []}), "{reply}");
}

#[tokio::test]
async fn registrations_move_to_the_new_id() {
    let site = site().await;
    let api = site.api();
    // An agent that has no id yet but its address.
    let old = format!("0:{IP}");
    let mut first = site.spawn_agent(&AgentOptions::new(&old, IP), "").unwrap();
    site.wait_state(&old, 2).await;
    let element = json!({"meta": {"namespace": "nodeman", "name": "moved"}, "op_type": 3, "hosts": [{"ip": IP, "bk_cloud_id": 0}],
                         "spec": {"identity": {"proc_name": "none-such", "setup_path": "/tmp", "pid_path": "/tmp/none-such-moved.pid", "user": "root"},
                                  "control": {"start_cmd": "true"}, "monitor_policy": {"auto_type": 2}}});
    let rows = finished(&api, &submit(&api, &[element]).await, PATIENCE).await;
    assert_eq!(rows[&format!("{old}:nodeman:moved")]["error_code"], 0, "{rows:?}");
    first.terminate(PATIENCE).await.unwrap();
    // contract: procmgr-agent-lifecycle#50
    let body = json!({"hosts": [{"ip": IP, "bk_cloud_id": 0, "bk_agent_id": AGENT}, {"ip": "10.12.0.9", "bk_cloud_id": 0, "bk_agent_id": ""}]});
    let reply = api.post(&format!("{PROC}/upgrade_to_agent_id"), &body).await;
    assert_eq!(
        reply["data"],
        json!({"success": [old], "failed": ["0:10.12.0.9"]}),
        "{reply}"
    );
    let query = json!({"meta": {"namespace": "nodeman", "name": "moved"}, "agent_id_list": [AGENT]});
    let reply = api.post(&format!("{PROC}/get_proc_status_v2"), &query).await;
    assert_eq!(reply["data"]["proc_infos"][0]["isauto"], true, "{reply}");
    // The agent comes back under its new id with nothing in its memory, and gets it back.
    let _second = agent(&site).await;
    let element = json!({"meta": {"namespace": "nodeman", "name": "moved"}, "op_type": 2, "agent_id_list": [AGENT]});
    eventually("the registration is on the host", PATIENCE, || async {
        let rows = finished(&api, &submit(&api, std::slice::from_ref(&element)).await, PATIENCE).await;
        let row = &rows[&format!("{AGENT}:nodeman:moved")];
        (content(row)["process"][0]["instance"][0]["isAuto"] == true).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_application_operates_as_its_accounts_on_its_hosts() {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    let path = site.path().join("apps.toml");
    let apps = std::fs::read_to_string(&path).unwrap();
    let hash = apps
        .split("secret_sha256 = \"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap()
        .to_owned();
    let more = format!(
        r#"
[[app]]
code = "bk_procs"
secret_sha256 = "{hash}"
operations = ["process.operate", "process.read"]
accounts = ["nobody"]
targets = ["{AGENT}"]
max_targets_per_minute = 5
"#
    );
    std::fs::write(&path, apps + &more).unwrap();
    site.start_task().await.unwrap();
    site.start_procmgr(1).await.unwrap();
    site.start_api().await.unwrap();
    let _agent = agent(&site).await;
    let all = site.api();
    let few = Api::new(&all.address, "bk_procs", gse_tests::site::SECRET);
    let spec = |user: &str| {
        json!({"identity": {"proc_name": "none-such", "setup_path": "/tmp", "pid_path": "/tmp/none-such-few.pid", "user": user},
               "control": {"start_cmd": "true"}, "monitor_policy": {"auto_type": 2}})
    };
    let body = |id: &str, operation: i64, spec: Value| json!({"meta": {"namespace": "n", "name": "few"}, "op_type": operation, "agent_id_list": [id], "spec": spec});
    let path = format!("{PROC}/operate_proc_v2");
    for (refused, body) in [
        ("another account", body(AGENT, op::REGISTER, spec("root"))),
        ("no account is root's", body(AGENT, op::REGISTER, spec(""))),
        ("another host", body("02000000other", op::REGISTER, spec("nobody"))),
        (
            "what is registered is not known, and may be root's",
            body(AGENT, op::START, Value::Null),
        ),
    ] {
        let reply = few.post(&path, &body).await;
        assert_eq!(reply["code"], 1_000_903, "{refused}: {reply}");
        assert_eq!(reply["data"], json!({}), "{refused}: {reply}");
    }
    // Registered as root by somebody else: to start it as it is registered would be to run as root.
    let theirs = all.post(&path, &body(AGENT, op::REGISTER, spec("root"))).await;
    let task = theirs["data"]["task_id"].as_str().unwrap().to_owned();
    finished(&all, &task, PATIENCE).await;
    let reply = few.post(&path, &body(AGENT, op::START, Value::Null)).await;
    assert_eq!(reply["code"], 1_000_903, "{reply}");
    // Nor is the other one's task there to be read.
    let reply = few
        .post(
            &format!("{PROC}/get_proc_operate_result_v2"),
            &json!({ "task_id": task }),
        )
        .await;
    assert_eq!(reply["code"], 1_000_116, "{reply}");
    let mut codes = vec![];
    // So many that a minute that ends in between does not matter.
    for _ in 0..12 {
        codes.push(
            few.post(&path, &body(AGENT, op::STATUS, spec("nobody"))).await["code"]
                .as_i64()
                .unwrap(),
        );
    }
    assert_eq!(
        (codes[0], codes.contains(&1_000_121)),
        (0, true),
        "the quota of targets: {codes:?}"
    );
    let trail = std::fs::read_to_string(site.path().join("gse_procmgr-1-audit.log")).unwrap();
    assert!(
        trail.contains("refused") && trail.contains("bk_procs") && trail.contains(&task),
        "{trail}"
    );
}

#[tokio::test]
async fn a_thousand_hosts_are_asked_and_paged() {
    let site = site().await;
    let api = site.api();
    let mut swarm = Swarm::start(&site, 1_000, &["--processes", "5"]).unwrap();
    swarm.all_connected(PATIENCE).await.unwrap();
    let ids = swarm.ids();
    eventually("all are known", PATIENCE, || async {
        let reply = api
            .post("/api/v2/cluster/list_agent_state", &json!({ "agent_id_list": ids }))
            .await;
        let states = reply["data"].as_array()?;
        states.iter().all(|state| state["status_code"] == 2).then_some(())
    })
    .await;
    let element = |ids: &[String]| {
        json!({"meta": {"namespace": "bench", "name": "process_2"}, "op_type": op::STATUS, "agent_id_list": ids,
               "spec": {"identity": {"proc_name": "bench_process"}}})
    };
    // contract: procmgr-agent-lifecycle#24
    let one = vec![element(&ids)];
    let many: Vec<Value> = ids.chunks(1).map(element).collect();
    for elements in [one, many] {
        let begun = Instant::now();
        let rows = finished(&api, &submit(&api, &elements).await, PATIENCE).await;
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
        assert_eq!(rows.len(), 1_000);
        assert!(
            rows.values().all(|row| row["error_code"] == 0),
            "{:?}",
            rows.values().next()
        );
    }
    // contract: procmgr-agent-lifecycle#56
    let page = |start: usize| {
        let api = api.clone();
        async move {
            let body = json!({"meta": {"namespace": "bench"}, "page": {"start": start, "limit": 500}});
            let reply = api.post(&format!("{PROC}/sync_proc_status"), &body).await;
            reply["data"].clone()
        }
    };
    eventually("every process is reported", PATIENCE, || async {
        (page(0).await["count"] == 5_000).then_some(())
    })
    .await;
    let mut seen = BTreeSet::new();
    for start in (0..5_000).step_by(500) {
        for info in page(start).await["proc_infos"].as_array().unwrap() {
            assert_eq!(info["status"], 1, "{info}");
            seen.insert(format!("{}/{}", info["bk_agent_id"], info["meta"]["name"]));
        }
    }
    assert_eq!(seen.len(), 5_000);
}
