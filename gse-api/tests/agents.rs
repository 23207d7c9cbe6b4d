//! Agent state and information over HTTP, from records in a real Redis.
#![allow(clippy::unwrap_used)] // a test ends by panicking

mod support;

use std::time::{Duration, Instant};

use gse_core::store::Batch;
use http::{HeaderMap, HeaderValue};
use serde_json::{Value, json};
use support::{Api, Redis, now_ms, record, write};

const STATE: &str = "/api/v2/cluster/list_agent_state";
const INFO: &str = "/api/v2/cluster/list_agent_info";
const LIST: &str = "/gse/v1/agents/list";

const OPAQUE: &str = "02000000005254003dd2ea1700473962076n";

/// One agent of each kind.
async fn site() -> (Redis, Api) {
    let redis = Redis::start().await;
    let store = redis.store().await;
    let now = now_ms();
    let mut batch = Batch::new();
    write(&mut batch, &record("0:10.0.0.1"), now - 1_000, &[]);
    let mut opaque = record(OPAQUE);
    opaque.cloud_id = 3;
    opaque.run_mode = 0;
    opaque.clone_of = "10.9.9.9 feedbeef".into();
    opaque.clone_at_ms = now - 30_000;
    write(&mut batch, &opaque, now - 2_000, &["3:10.0.0.2", "3:fe80::1"]);
    // Connected as far as the record says, but not heard of for too long.
    let mut silent = record("0:10.0.0.3");
    silent.connected_at_ms = now - 500_000;
    write(&mut batch, &silent, now - 100_000, &[]);
    let mut stopped = record("0:10.0.0.4");
    stopped.disconnected_at_ms = now - 5_000;
    stopped.stopped = true;
    write(&mut batch, &stopped, now - 5_000, &[]);
    let mut lost = record("0:10.0.0.5");
    lost.disconnected_at_ms = now - 5_000;
    write(&mut batch, &lost, now - 5_000, &[]);
    store.run(batch).await.unwrap();
    let api = Api::start(redis.config(), |_| {}).await;
    (redis, api)
}

fn body(ids: &[&str]) -> String {
    json!({ "agent_id_list": ids }).to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn states_repeat_the_ids_in_order() {
    // contract: v2-http-task#10, procmgr-agent-lifecycle#27
    let (_redis, api) = site().await;
    let too_long = "x".repeat(500);
    let ids = [
        "0:10.0.0.1",
        OPAQUE,
        "3:10.0.0.2",
        "3:fe80:0::1",
        "0:10.0.0.3",
        "0:10.0.0.4",
        "0:10.0.0.5",
        "0:10.0.0.99",
        "0:10.0.0.1",
        "",
        "no such {agent}",
        &too_long,
        "9:10.0.0.2",
    ];
    let rows = api.data(STATE, &body(&ids)).await;
    let rows = rows.as_array().unwrap();
    let echoed: Vec<&str> = rows.iter().map(|row| row["bk_agent_id"].as_str().unwrap()).collect();
    assert_eq!(echoed, ids);
    // contract: v2-http-task#46, v2-http-task#47, procmgr-agent-lifecycle#28, procmgr-agent-lifecycle#29
    let codes: Vec<i64> = rows.iter().map(|row| row["status_code"].as_i64().unwrap()).collect();
    assert_eq!(codes, [2, 2, 2, 2, -1, 6, -1, -2, 2, -2, -2, -2, -2]);
    // contract: v2-http-task#49
    assert_eq!(
        (&rows[0]["run_mode"], &rows[1]["run_mode"], &rows[2]["run_mode"]),
        (&json!(1), &json!(0), &json!(0))
    );
    assert_eq!(
        (&rows[0]["version"], &rows[7]["version"]),
        (&json!("0.1.0"), &json!(""))
    );
    assert_eq!(
        (&rows[0]["bk_cloud_id"], &rows[1]["bk_cloud_id"]),
        (&json!(0), &json!(3))
    );
    assert!(
        now_ms() - rows[0]["report_time"].as_u64().unwrap() < 60_000,
        "milliseconds"
    );
    assert_eq!(rows[7]["report_time"], 0);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn information_has_the_types_that_clients_decode() {
    let (_redis, api) = site().await;
    let rows = api
        .data(INFO, &body(&["0:10.0.0.1", OPAQUE, "0:10.0.0.99", "0:10.0.0.4"]))
        .await;
    for row in rows.as_array().unwrap() {
        // contract: v2-http-task#50, procmgr-agent-lifecycle#30
        for unsigned in [
            "parent_port",
            "report_time",
            "cpu_num",
            "mem_size",
            "start_time",
            "last_work_time",
        ] {
            assert!(row[unsigned].is_u64(), "{unsigned}: {row}");
        }
        for text in [
            "conn_cycle_time",
            "status",
            "last_status",
            "remark",
            "bk_host_ip",
            "parent_ip",
            "bk_os_type",
            "bk_cpu_architecture",
        ] {
            assert!(row[text].is_string(), "{text}: {row}");
        }
        assert!(row["cpu_rate"].is_f64() && row["mem_rate"].is_f64());
        assert!(row["status_code"].is_i64() && row["last_status_code"].is_i64());
    }
    let row = &rows[0];
    let now = now_ms();
    assert!(now - row["report_time"].as_u64().unwrap() < 60_000);
    assert!(now / 1000 - row["start_time"].as_u64().unwrap() < 200, "seconds");
    let lasted: u64 = row["conn_cycle_time"].as_str().unwrap().parse().unwrap();
    assert!((60_000..120_000).contains(&lasted), "{lasted}");
    assert_eq!(
        (&row["status"], &row["bk_host_ip"], &row["parent_port"]),
        (&json!("running"), &json!("10.0.0.1"), &json!(28668))
    );
    assert_eq!(
        (&row["cpu_rate"], &row["mem_rate"], &row["cpu_num"]),
        (&json!(12.5), &json!(50.0), &json!(8))
    );
    assert!(
        rows[1]["remark"]
            .as_str()
            .unwrap()
            .starts_with("id also claimed by 10.9.9.9 feedbeef")
    );
    assert_eq!(
        (&rows[2]["status"], &rows[2]["status_code"]),
        (&json!("not_found"), &json!(-2))
    );
    assert_eq!(
        (&rows[3]["status"], &rows[3]["last_status"]),
        (&json!("stopped"), &json!("running"))
    );
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_old_calls_answer_with_maps() {
    // contract: procmgr-agent-lifecycle#53
    let (_redis, api) = site().await;
    let hosts = json!({"bk_supplier_account": "0", "hosts": [
        {"ip": "10.0.0.1", "bk_cloud_id": 0}, {"ip": "10.0.0.2", "bk_cloud_id": 3}, {"ip": "10.0.0.3"}, {"ip": "10.0.0.99", "bk_cloud_id": 0},
    ]})
    .to_string();
    for path in [
        "/api/c/compapi/v2/gse/get_agent_status/",
        "/api/c/compapi/gse/get_agent_status",
    ] {
        let data = api.data(path, &hosts).await;
        assert_eq!(
            data["0:10.0.0.1"],
            json!({"ip": "10.0.0.1", "bk_cloud_id": 0, "bk_agent_alive": 1})
        );
        assert_eq!(data["3:10.0.0.2"]["bk_agent_alive"], 1);
        assert_eq!(data["0:10.0.0.3"]["bk_agent_alive"], 0);
        assert_eq!(
            data["0:10.0.0.99"],
            json!({"ip": "10.0.0.99", "bk_cloud_id": 0, "bk_agent_alive": 0})
        );
        assert_eq!(data.as_object().unwrap().len(), 4);
    }
    let data = api.data("/api/c/compapi/v2/gse/get_agent_info/", &hosts).await;
    assert_eq!(
        data["3:10.0.0.2"],
        json!({"ip": "10.0.0.2", "version": "0.1.0", "bk_cloud_id": 3, "parent_ip": "192.0.2.1", "parent_port": 28668})
    );
    assert_eq!(data["0:10.0.0.99"]["version"], "");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_bodies_and_headers() {
    let (_redis, api) = site().await;
    // contract: v2-http-task#3
    for empty in [r#"{"agent_id_list":[]}"#, r#"{"agent_id_list":null}"#, "{}", ""] {
        assert_eq!(api.data(STATE, empty).await, json!([]), "{empty}");
        assert_eq!(api.data(INFO, empty).await, json!([]), "{empty}");
    }
    // contract: v2-http-task#7
    let noise = r#"{"agent_id_list":["0:10.0.0.1"],"no_request":true,"bk_username":"admin","x":{"y":[1]}}"#;
    assert_eq!(api.data(STATE, noise).await[0]["status_code"], 2);
    // contract: v2-http-task#56
    for tenant in ["default", "system", ""] {
        let mut headers = HeaderMap::new();
        headers.insert("x-bk-tenant-id", HeaderValue::from_str(tenant).unwrap());
        let answer = api.post_with(STATE, &body(&["0:10.0.0.1"]), headers).await;
        assert_eq!(answer["data"][0]["status_code"], 2, "{tenant}");
    }
    // contract: v2-http-task#6
    for path in [
        "//api/v2/cluster/list_agent_state/",
        "/api/bk-gse/prod/api/v2/cluster/list_agent_state",
    ] {
        assert_eq!(api.data(path, &body(&["0:10.0.0.1"])).await[0]["status_code"], 2);
    }
    // Errors keep the shape of the call.
    for bad in [
        r#"{"agent_id_list":"a"}"#,
        r#"{"agent_id_list":[7]}"#,
        "[",
        "7",
        r#"{"agent_id_list":[[[[]]]]}"#,
    ] {
        let answer = api.post(STATE, bad).await;
        assert_eq!(
            (&answer["code"], &answer["data"]),
            (&json!(1_000_106), &json!([])),
            "{bad}"
        );
    }
    let mut stranger = HeaderMap::new();
    stranger.insert(
        "x-bkapi-authorization",
        HeaderValue::from_static(r#"{"bk_app_code":"bk_job","bk_app_secret":"wrong"}"#),
    );
    let answer = api.post_with(STATE, &body(&["0:10.0.0.1"]), stranger).await;
    assert_eq!((&answer["code"], &answer["data"]), (&json!(1_000_901), &json!([])));
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_ids_at_once_and_too_many() {
    let redis = Redis::start().await;
    let store = redis.store().await;
    let mut batch = Batch::new();
    for n in 0..5_000 {
        write(&mut batch, &record(&format!("agent-{n}")), now_ms(), &[]);
    }
    store.run(batch).await.unwrap();
    let api = Api::start(redis.config(), |config| config.limits.max_ids = 20_000).await;
    // contract: v2-http-task#48 (5,000 ids within 3 s), v2-http-task#50
    let ids: Vec<String> = (0..20_000).map(|n| format!("agent-{n}")).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let started = Instant::now();
    let rows = api.data(STATE, &body(&ids)).await;
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 20_000);
    for (n, row) in rows.iter().enumerate() {
        assert_eq!(row["bk_agent_id"], format!("agent-{n}"));
        assert_eq!(row["status_code"], if n < 5_000 { 2 } else { -2 });
    }
    assert_eq!(
        api.data(INFO, &body(&ids[..1_000])).await.as_array().unwrap().len(),
        1_000
    );
    let too_many: Vec<&str> = ids.iter().copied().chain(["one-more"]).collect();
    let answer = api.post(STATE, &body(&too_many)).await;
    assert_eq!((&answer["code"], &answer["data"]), (&json!(1_000_121), &json!([])));
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_operators_list_shows_every_agent_once() {
    let redis = Redis::start().await;
    let store = redis.store().await;
    let api = Api::start(redis.config(), |_| {}).await;
    assert_eq!(api.data(LIST, "{}").await, json!({"agents": [], "next": ""}));
    let mut batch = Batch::new();
    for n in 0..500 {
        let mut record = record(&format!("agent-{n:03}"));
        if n % 10 == 0 {
            record.disconnected_at_ms = now_ms();
            record.disconnect_reason = "test".into();
        }
        write(&mut batch, &record, now_ms(), &[]);
    }
    store.run(batch).await.unwrap();
    for (limit, online, expected) in [
        (0, false, 500),
        (1, false, 500),
        (7, false, 500),
        (64, true, 450),
        (499, false, 500),
        (500, false, 500),
    ] {
        let (mut seen, mut cursor, mut pages) = (Vec::new(), String::new(), 0);
        loop {
            let asked = json!({"cursor": cursor, "limit": limit, "online": online}).to_string();
            let data = api.data(LIST, &asked).await;
            let agents = data["agents"].as_array().unwrap();
            assert!(limit == 0 || agents.len() <= limit);
            seen.extend(
                agents
                    .iter()
                    .map(|agent| agent["bk_agent_id"].as_str().unwrap().to_owned()),
            );
            cursor = data["next"].as_str().unwrap().to_owned();
            pages += 1;
            assert!(pages <= 600, "the list does not end");
            if cursor.is_empty() {
                break;
            }
        }
        seen.sort();
        let all = seen.len();
        seen.dedup();
        assert_eq!((all, seen.len()), (expected, expected), "limit {limit}");
    }
    let data = api.data(LIST, r#"{"limit":1000}"#).await;
    let agents = data["agents"].as_array().unwrap();
    let one = agents.iter().find(|agent| agent["bk_agent_id"] == "agent-010").unwrap();
    assert_eq!(
        (&one["disconnect_reason"], &one["hostname"], &one["status_code"]),
        (&json!("test"), &json!("host-of-agent-010"), &json!(-1))
    );
    assert_eq!(
        (&one["running"], &one["queued"], &one["node_id"]),
        (&json!(3), &json!(4), &json!("node-1"))
    );
    let answer = api.post(LIST, r#"{"cursor":"nonsense"}"#).await;
    assert_eq!(answer["code"], 1_000_106);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_record_spoils_no_other() {
    let (redis, api) = site().await;
    let key = gse_proto::keys::agent_info(gse_proto::keys::agent_shard("broken"));
    let mut batch = Batch::new();
    batch.push(
        &key,
        redis::cmd("HSET").arg(&key).arg("broken").arg(&b"\xff\xff"[..]).clone(),
    );
    redis.store().await.run(batch).await.unwrap();
    let rows = api.data(STATE, &body(&["broken", "0:10.0.0.1"])).await;
    assert_eq!(
        (&rows[0]["status_code"], &rows[1]["status_code"]),
        (&json!(-2), &json!(2))
    );
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_hangs_or_is_gone_is_said_within_two_seconds() {
    let (redis, api) = site().await;
    let asked = body(&["0:10.0.0.1"]);
    let down = async |what: &str| {
        let started = Instant::now();
        let answer: Value = api.post(STATE, &asked).await;
        assert!(
            started.elapsed() < Duration::from_secs(2),
            "{what}: {:?}",
            started.elapsed()
        );
        assert_eq!(
            (&answer["code"], &answer["data"]),
            (&json!(1_000_190), &json!([])),
            "{what}"
        );
    };
    redis.signal("STOP");
    down("hangs").await;
    redis.signal("CONT");
    let started = Instant::now();
    while api.post(STATE, &asked).await["code"] != 0 {
        assert!(started.elapsed() < support::PATIENCE, "it does not heal");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(redis);
    down("gone").await;
    api.stop().await;
}
