//! What public platforms send, and how they read what comes back: types as narrow as theirs, keys built as they build them, and their
//! rules for when something is over, has gone well or has failed.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use gse_tests::plugins::{Plugin, daemon};
use gse_tests::{Api, Site};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{AGENT, PATIENCE, only, site};

const GATEWAY: &str = "/api/bk-gse/prod/api/v2/proc";
const OLD: &str = "/api/c/compapi/v2/gse";
const IP: &str = "10.11.12.13";
const OFFLINE: &str = "0:10.99.0.1";
/// An agent that nobody has heard of has its answer within this.
const SOON: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Deserialize)]
struct Entry {
    error_code: i64,
    error_msg: String,
    content: String,
}

/// The content of a status entry, with the types that a statically typed reader has.
#[derive(Debug, Deserialize)]
#[allow(dead_code)] // that they can be read is what counts
struct StatusContent {
    ip: String,
    bk_agent_id: String,
    utctime: String,
    utctime2: String,
    timezone: i32,
    process: Vec<StatusProcess>,
}

#[derive(Debug, Deserialize)]
#[allow(dead_code)]
struct StatusProcess {
    procname: String,
    instance: Vec<Instance>,
}

#[derive(Debug, Deserialize)]
#[allow(dead_code, non_snake_case)]
struct Instance {
    cmdline: String,
    processName: String,
    version: String,
    health: String,
    isAuto: bool,
    cpuUsage: f64,
    cpuUsageAve: f64,
    phyMemUsage: f64,
    usePhyMem: i64,
    diskSize: i64,
    pid: i64,
    startTime: String,
    stat: String,
    utime: String,
    stime: String,
    threadCount: i64,
    elapsedTime: i64,
    register_time: i64,
    last_start_time: i64,
    report_time: i64,
}

/// The content of any other entry.
#[derive(Debug, Deserialize)]
struct ControlContent {
    value: Vec<ControlValue>,
}

#[derive(Debug, Deserialize)]
#[allow(dead_code, non_snake_case)]
struct ControlValue {
    procName: String,
    setupPath: String,
    funcID: String,
    instanceID: String,
    result: String,
    isAuto: bool,
}

#[derive(Debug, Deserialize)]
#[allow(dead_code)]
struct ProcInfo {
    meta: ProcMeta,
    bk_agent_id: String,
    host: Host,
    status: u8,
    isauto: bool,
    pid: i64,
    version: String,
    register_time: i64,
    last_start_time: i64,
    report_time: i64,
    cpu_usage: f64,
    mem_usage: f64,
}

#[derive(Debug, Deserialize)]
#[allow(dead_code)]
struct ProcMeta {
    namespace: String,
    name: String,
    labels: Option<HashMap<String, String>>,
}

#[derive(Debug, Deserialize)]
struct Host {
    ip: String,
    bk_cloud_id: i64,
}

fn read<T: DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error}: {value}"))
}

fn text<T: DeserializeOwned>(text: &str) -> T {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Polls by the rule that all of them share: over when no entry has 115. Every poll has one entry for each key, and nothing else.
async fn poll(api: &Api, path: &str, task: &str, keys: &[String]) -> HashMap<String, Entry> {
    let started = Instant::now();
    loop {
        let reply = api.post(path, &json!({"task_id": task, "no_request": true})).await;
        // contract: procmgr-agent-lifecycle#26
        assert_eq!(reply["code"], 0, "a task is readable from the start: {reply}");
        let entries: HashMap<String, Entry> = read(&reply["data"]);
        // contract: procmgr-agent-lifecycle#2, procmgr-agent-lifecycle#3, procmgr-agent-lifecycle#5
        let mut have: Vec<&String> = entries.keys().collect();
        let mut want: Vec<&String> = keys.iter().collect();
        have.sort();
        want.sort();
        assert_eq!(have, want);
        if entries.values().all(|entry| entry.error_code != 115) {
            return entries;
        }
        assert!(started.elapsed() < PATIENCE, "{entries:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// The one instance of a status entry.
// contract: procmgr-agent-lifecycle#10, procmgr-agent-lifecycle#11, procmgr-agent-lifecycle#12
fn instance(entry: &Entry, name: &str) -> Instance {
    let mut content: StatusContent = text(&entry.content);
    assert_eq!(content.process.len(), 1, "{}", entry.content);
    let mut process = content.process.remove(0);
    assert_eq!(process.instance.len(), 1, "{}", entry.content);
    let instance = process.instance.remove(0);
    assert_eq!(instance.processName, name);
    assert!(instance.pid == -1 || instance.pid > 1, "{}", entry.content);
    instance
}

/// The one value of any other entry, whatever its code.
// contract: procmgr-agent-lifecycle#13
fn value(entry: &Entry) -> ControlValue {
    let mut content: ControlContent = text(&entry.content);
    assert_eq!(content.value.len(), 1, "{}", entry.content);
    content.value.remove(0)
}

async fn submit(api: &Api, path: &str, body: &Value) -> String {
    let reply = api.post(path, body).await;
    // contract: procmgr-agent-lifecycle#1
    assert_eq!(reply["code"], 0, "{reply}");
    let id = reply["data"]["task_id"].as_str().unwrap_or_default().to_owned();
    assert!(!id.is_empty(), "{reply}");
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn platforms_find_what_they_look_for() {
    let (site, _agent) = site().await;
    let plugin = |name: &str| Plugin::install(site.path(), name, name, daemon::PLAIN);
    tokio::join!(
        bscp(&site, plugin("http-server_1")),
        node_management(&site, plugin("bkmonitorbeat")),
        gsekit(&site, plugin("worker_2")),
        node_manager(&site, plugin("bkunifylogbeat")),
        before_specifications(&site, plugin("gsecmdbeat")),
    );
}

/// bscp: one element an agent, everything in it always; it decodes into fixed types and takes code 0 alone for success.
async fn bscp(site: &Site, plugin: Plugin) {
    let api = site.api();
    let key = format!("{AGENT}:GSEKIT_BIZ_3:{}", plugin.name);
    let element = |operation: i64, version: &str| {
        let spec = plugin.spec(&json!({}));
        json!({
            "meta": {"namespace": "GSEKIT_BIZ_3", "name": plugin.name}, "agent_id_list": [AGENT], "op_type": operation,
            "spec": {
                "identity": spec["identity"],
                "control": {
                    "start_cmd": spec["control"]["start_cmd"], "stop_cmd": spec["control"]["stop_cmd"],
                    "kill_cmd": spec["control"]["kill_cmd"], "version_cmd": version,
                },
                "resource": {"cpu": 0, "mem": 0},
                "monitor_policy": {"auto_type": 1, "start_check_secs": 1, "op_timeout": 10},
            },
        })
    };
    let run = |operation: i64, version: &'static str| {
        let (api, key, element) = (&api, key.clone(), element(operation, version));
        async move {
            let body = json!({ "proc_operate_req": [element] });
            let task = submit(api, &format!("{GATEWAY}/operate_proc_multi"), &body).await;
            let path = format!("{GATEWAY}/get_proc_operate_result_v2");
            poll(api, &path, &task, std::slice::from_ref(&key))
                .await
                .remove(&key)
                .unwrap()
        }
    };
    // A status query asks for what was never registered.
    let entry = run(2, "").await;
    assert_eq!((entry.error_code, instance(&entry, &plugin.name).pid), (0, -1));
    let entry = run(0, "echo 1.0").await;
    assert_eq!((entry.error_code, value(&entry).isAuto), (0, true), "{entry:?}");
    // Changing a registration: look, stop what runs, register anew, start, look.
    // contract: procmgr-agent-lifecycle#19, procmgr-agent-lifecycle#20
    for version in ["echo 2.0", "echo 3.0"] {
        assert!(instance(&run(2, version).await, &plugin.name).pid > 0);
        for operation in [1, 3, 0] {
            let entry = run(operation, version).await;
            assert_eq!(entry.error_code, 0, "operation {operation}: {entry:?}");
            value(&entry);
        }
        let now = instance(&run(2, version).await, &plugin.name);
        assert_eq!((now.pid, now.isAuto), (i64::from(only(&plugin)), true));
        // contract: procmgr-agent-lifecycle#32
        assert_eq!(now.version, version.trim_start_matches("echo "));
    }
    // What was refused at the submit shows at the first poll: the id is empty then.
    // contract: procmgr-agent-lifecycle#25
    for id in ["", "GSETASK:P:20200101000000:1"] {
        let reply = api
            .post(
                &format!("{GATEWAY}/get_proc_operate_result_v2"),
                &json!({"task_id": id}),
            )
            .await;
        assert!(reply["code"] != 0 && reply["data"].is_object(), "{reply}");
    }
    assert_eq!(run(9, "").await.error_code, 0);
    let entry = run(9, "").await;
    assert_eq!(entry.error_code, 829, "{entry:?}");
}

/// Node management: several hosts in an element; both generations, addresses of old hosts in place of ids, keys of its own beside ours.
async fn node_management(site: &Site, plugin: Plugin) {
    let api = site.api();
    let address = format!("0:{IP}");
    let spec = plugin.spec(&json!({}));
    let body = |operation: i64, targets: Value| {
        let mut element = json!({
            "meta": {"namespace": "nodeman", "name": plugin.name, "labels": {"proc_name": plugin.proc_name}},
            "op_type": operation, "spec": spec,
            "nodeman_spec": {"process_status_id": 7, "subscription_instance_id": 8},
        });
        element["spec"]["resource"] = json!({"mem": 50, "cpu": 50});
        for (key, value) in targets.as_object().unwrap() {
            element[key] = value.clone();
        }
        json!({ "proc_operate_req": [element], "no_request": true })
    };
    let key = |id: &str| format!("{id}:nodeman:{}", plugin.name);
    // Installing ends with a restart of what was never registered. contract: procmgr-agent-lifecycle#4, procmgr-agent-lifecycle#21
    let hosts =
        json!({"hosts": [{"ip": IP, "bk_cloud_id": 0, "bk_supplier_id": 0}, {"ip": "10.99.0.1", "bk_cloud_id": 0}]});
    let started = Instant::now();
    let task = submit(&api, &format!("{OLD}/operate_proc_multi/"), &body(7, hosts)).await;
    let keys = [key(&address), key(OFFLINE)];
    let entries = poll(&api, &format!("{OLD}/get_proc_operate_result_v2/"), &task, &keys).await;
    assert_eq!(entries[&keys[0]].error_code, 0, "{entries:?}");
    // contract: procmgr-agent-lifecycle#23
    assert_eq!(entries[&keys[1]].error_code, 117, "{entries:?}");
    entries.values().for_each(|entry| drop(value(entry)));
    assert!(started.elapsed() < PATIENCE);
    // contract: procmgr-agent-lifecycle#31
    let asked = Instant::now();
    loop {
        let body = json!({
            "meta": {"namespace": "nodeman", "name": plugin.name, "labels": {"proc_name": plugin.name}},
            "hosts": [{"ip": IP, "bk_cloud_id": 0}],
        });
        let reply = api.post(&format!("{OLD}/get_proc_status_v2/"), &body).await;
        assert_eq!((&reply["code"], &reply["result"]), (&json!(0), &json!(true)), "{reply}");
        let infos: Vec<ProcInfo> = read(&reply["data"]["proc_infos"]);
        if let [info] = &infos[..]
            && info.status == 1
            && info.version == "1.2.3"
        {
            assert_eq!(
                (info.host.ip.as_str(), info.host.bk_cloud_id, info.isauto),
                (IP, 0, true)
            );
            assert_eq!(info.meta.name, plugin.name);
            break;
        }
        assert!(asked.elapsed() < PATIENCE, "{infos:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // The newer generation: by address or by id, and each answer says what was asked.
    for id in [address.as_str(), AGENT] {
        let targets = json!({"agent_id_list": [id], "hosts": [{"ip": "10.99.0.2", "bk_cloud_id": 0}]});
        let task = submit(&api, &format!("{GATEWAY}/operate_proc_multi/"), &body(2, targets)).await;
        let keys = [key(id)];
        let entries = poll(&api, &format!("{GATEWAY}/get_proc_operate_result_v2/"), &task, &keys).await;
        assert_eq!(instance(&entries[&keys[0]], &plugin.name).pid, i64::from(only(&plugin)));
        let body = json!({"meta": {"namespace": "nodeman", "name": plugin.name}, "agent_id_list": [id]});
        let reply = api.post(&format!("{GATEWAY}/get_proc_status_v2/"), &body).await;
        let infos: Vec<ProcInfo> = read(&reply["data"]["proc_infos"]);
        assert_eq!((infos.len(), infos[0].bk_agent_id.as_str()), (1, id), "{reply}");
    }
}

/// gsekit: numbers in labels, nulls in its policy, and a process that runs already is a failure; then it looks.
async fn gsekit(site: &Site, plugin: Plugin) {
    let api = site.api();
    let namespace = "GSEKIT_BIZ_5";
    let key = format!("0:{IP}:{namespace}:{}", plugin.name);
    let run = |operation: i64, nulls: bool| {
        let mut spec = plugin.spec(&json!({}));
        if nulls {
            spec["alive_monitor_policy"] = json!({"auto_type": 1, "start_check_secs": null, "op_timeout": null});
        }
        let body = json!({
            "meta": {"namespace": namespace, "name": plugin.name, "labels": {"bk_process_name": "worker", "bk_process_id": 4711}},
            "op_type": operation, "hosts": [{"ip": IP, "bk_cloud_id": 0}], "spec": spec,
        });
        let (api, key) = (&api, key.clone());
        async move {
            let task = submit(api, &format!("{OLD}/operate_proc_v2/"), &body).await;
            let path = format!("{OLD}/get_proc_operate_result_v2/");
            poll(api, &path, &task, std::slice::from_ref(&key))
                .await
                .remove(&key)
                .unwrap()
        }
    };
    assert_eq!(run(1, false).await.error_code, 829);
    assert_eq!(run(0, false).await.error_code, 0);
    let entry = run(0, false).await;
    assert_eq!(entry.error_code, 828, "{}", entry.error_msg);
    // contract: procmgr-agent-lifecycle#33
    let entry = run(2, true).await;
    assert_eq!(
        (entry.error_code, instance(&entry, &plugin.name).pid),
        (0, i64::from(only(&plugin)))
    );
    // What it falls back to. contract: procmgr-agent-lifecycle#56
    let asked = Instant::now();
    loop {
        let body = json!({"meta": {"namespace": namespace}, "page": {"start": 0, "limit": 500, "return_total": true}});
        let reply = api.post(&format!("{OLD}/sync_proc_status/"), &body).await;
        assert_eq!(reply["code"], 0, "{reply}");
        let infos: Vec<ProcInfo> = read(&reply["data"]["proc_infos"]);
        assert_eq!(reply["data"]["count"], infos.len(), "{reply}");
        if let [info] = &infos[..]
            && info.status == 1
        {
            let (name, number) = info.meta.name.rsplit_once('_').unwrap();
            assert_eq!(
                (name, number, info.host.ip.as_str(), info.host.bk_cloud_id),
                ("worker", "2", IP, 0)
            );
            break;
        }
        assert!(asked.elapsed() < PATIENCE, "{infos:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// The newer node manager: real ids only, which it cuts off at the first colon; status queries that say next to nothing; a content that
/// can be read in every entry, whatever became of it.
async fn node_manager(site: &Site, plugin: Plugin) {
    let api = site.api();
    let lost = "02000000nobodyknowsme0000000000000000";
    let keys = [AGENT, lost].map(|id| format!("{id}:bk-nodemgr:{}", plugin.name));
    let run = |operation: i64, spec: Value| {
        let body = json!({
            "meta": {"namespace": "bk-nodemgr", "name": plugin.name, "labels": null},
            "op_type": operation, "agent_id_list": [AGENT, lost], "spec": spec,
        });
        let (api, keys) = (&api, keys.clone());
        async move {
            let task = submit(api, &format!("{GATEWAY}/operate_proc_v2"), &body).await;
            poll(api, &format!("{GATEWAY}/get_proc_operate_result_v2"), &task, &keys).await
        }
    };
    let bare = json!({
        "identity": {"proc_name": plugin.proc_name, "setup_path": "", "pid_path": "", "config_path": "", "log_path": "", "user": ""},
        "control": {"start_cmd": "", "stop_cmd": "", "restart_cmd": "", "reload_cmd": "", "kill_cmd": "", "version_cmd": "", "health_cmd": ""},
        "resource": {"cpu": 0, "mem": 0},
        "monitor_policy": {"auto_type": 0, "start_check_secs": 0, "stop_check_secs": 0, "op_timeout": 0},
    });
    let started = Instant::now();
    let entries = run(2, bare.clone()).await;
    assert!(
        started.elapsed() < SOON,
        "an agent that nobody knows holds the others up: {:?}",
        started.elapsed()
    );
    for (key, entry) in &entries {
        let (id, _) = key.split_once(':').unwrap();
        assert_eq!(entry.error_code, if id == AGENT { 0 } else { 117 }, "{entry:?}");
        assert_eq!(instance(entry, &plugin.name).pid, -1);
    }
    let entries = run(0, plugin.spec(&json!({}))).await;
    assert_eq!(
        (entries[&keys[0]].error_code, entries[&keys[1]].error_code),
        (0, 117),
        "{entries:?}"
    );
    entries.values().for_each(|entry| drop(value(entry)));
    // What is asked without a pid file must not make one forget where it is.
    let entries = run(2, bare).await;
    assert_eq!(instance(&entries[&keys[0]], &plugin.name).pid, i64::from(only(&plugin)));
    let entries = run(1, plugin.spec(&json!({}))).await;
    assert_eq!(entries[&keys[0]].error_code, 0, "{entries:?}");
    assert!(plugin.alive().is_empty());
}

/// The oldest client: the specification once, by an update that registers what is missing; operations by name alone; keys of five parts.
// contract: procmgr-agent-lifecycle#55
async fn before_specifications(site: &Site, plugin: Plugin) {
    let api = site.api();
    let key = format!("0:0:{IP}:nodeman:{}", plugin.name);
    let meta = json!({"labels": {"proc_name": plugin.name}, "namespace": "nodeman", "name": plugin.name});
    let hosts = json!([{"ip": IP, "bk_cloud_id": 0, "bk_supplier_id": 0}]);
    let spec = plugin.spec(&json!({}));
    let update = json!({
        "meta": meta, "hosts": hosts,
        "spec": {
            "control": spec["control"], "identity": spec["identity"], "resource": {"mem": 50, "cpu": 50},
            "monitor_policy": {"auto_type": 1, "start_check_secs": 1},
        },
    });
    for _ in 0..2 {
        let reply = api.post(&format!("{OLD}/update_proc_info/"), &update).await;
        assert_eq!((&reply["code"], &reply["result"]), (&json!(0), &json!(true)), "{reply}");
        let entries: HashMap<String, Entry> = read(&reply["data"]);
        assert!(
            [0, 850].contains(&entries[&key].error_code) && entries.len() == 1,
            "{reply}"
        );
    }
    assert!(plugin.alive().is_empty(), "to register is not to start");
    let run = |operation: i64| {
        let body = json!({"meta": meta, "hosts": hosts, "op_type": operation});
        let (api, key) = (&api, key.clone());
        async move {
            let task = submit(api, &format!("{OLD}/operate_proc/"), &body).await;
            let path = format!("{OLD}/get_proc_operate_result/");
            poll(api, &path, &task, std::slice::from_ref(&key))
                .await
                .remove(&key)
                .unwrap()
        }
    };
    let entry = run(0).await;
    assert_eq!(entry.error_code, 0, "{entry:?}");
    only(&plugin);
    assert_eq!(instance(&run(2).await, &plugin.name).pid, i64::from(only(&plugin)));
    let body = json!({"meta": meta, "hosts": hosts});
    let reply = api.post(&format!("{OLD}/unregister_proc_info/"), &body).await;
    let entries: HashMap<String, Entry> = read(&reply["data"]);
    assert!([0, 829].contains(&entries[&key].error_code), "{reply}");
    only(&plugin);
}
