//! Routes of data as their public clients see them: the calls, their answers, and that all instances follow.
#![allow(clippy::unwrap_used)] // a test ends by panicking

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use gse_tests::{Api, Child, Site, StoreKind, eventually};
use serde_json::{Value, json};

const V2: &str = "/api/v2/data/";
const ESB: &str = "/api/c/compapi/v2/gse/config_";

/// Each client's own way of telling whether a call worked (data-plane, 3.2). All of them have to agree.
fn worked(reply: &Value) -> bool {
    for key in ["result", "code", "message", "data"] {
        assert!(reply.get(key).is_some(), "{key} is missing: {reply}");
    }
    let (result, code) = (reply["result"].as_bool(), reply["code"].as_i64().unwrap());
    let mon = !(result == Some(false) && code != 0);
    let bmw = result == Some(true);
    let cmdb_v2 = code == 0;
    let cmdb_esb = result == Some(true) && code == 0;
    assert!(
        [bmw, cmdb_v2, cmdb_esb].iter().all(|one| *one == mon),
        "clients disagree on {reply}"
    );
    mon
}

/// "It does not exist", as CMDB (by code) and MON (by words) find it.
fn is_missing(reply: &Value) -> bool {
    let by_code = [14_001, 1_014_003, 1_014_505].contains(&reply["code"].as_i64().unwrap());
    let by_words = reply["message"].as_str().unwrap().contains("not found");
    assert_eq!(by_code, by_words, "{reply}");
    assert!(!by_code || reply["result"] == false, "{reply}");
    by_code
}

struct Calls(Api);

impl Calls {
    async fn raw(&self, operation: &str, mut body: Value) -> Value {
        if body.get("operation").is_none() {
            body["operation"] = json!({"operator_name": "admin"});
        }
        // Clients of the gateway and of the old bus send more than anybody asks for.
        // contract: data-plane#29
        body["bk_username"] = json!("admin");
        body["bk_supplier_id"] = json!(0);
        self.0.post(&format!("{V2}{operation}"), &body).await
    }

    async fn ok(&self, operation: &str, body: Value) -> Value {
        let reply = self.raw(operation, body).await;
        assert!(worked(&reply), "{operation}: {reply}");
        reply["data"].clone()
    }

    async fn mint(&self, plat: &str) -> i64 {
        let data = self.ok("add_route", json!({"metadata": {"plat_name": plat}})).await;
        data["channel_id"].as_i64().unwrap()
    }

    async fn add(&self, id: i64, routes: Value) -> Value {
        self.raw(
            "add_route",
            json!({"metadata": {"plat_name": "bkmonitor", "channel_id": id}, "route": routes}),
        )
        .await
    }

    async fn update(&self, id: i64, routes: Value) {
        let body =
            json!({"condition": {"channel_id": id, "plat_name": "bkmonitor"}, "specification": {"route": routes}});
        self.ok("update_route", body).await;
    }

    async fn query(&self, id: i64) -> Value {
        self.raw("query_route", json!({"condition": {"channel_id": id}})).await
    }

    async fn routes(&self, id: i64) -> Vec<Value> {
        let reply = self.query(id).await;
        assert!(worked(&reply), "{reply}");
        let items = reply["data"].as_array().unwrap();
        assert_eq!(items.len(), 1, "CMDB stops at any other number: {reply}");
        items[0]["route"].as_array().unwrap().clone()
    }

    async fn overview(&self) -> Value {
        self.0.post("/gse/v1/data/routes", &json!({})).await["data"].clone()
    }
}

fn route(name: &str, stream: i64, topic: &str) -> Value {
    json!({"name": name, "stream_to": {"stream_to_id": stream, "kafka": {"topic_name": topic}}})
}

fn kafka(name: &str) -> Value {
    json!({"name": name, "report_mode": "kafka",
        "kafka": {"storage_address": [{"ip": "kafka.service.consul", "port": 9092}]}})
}

async fn site(kind: StoreKind) -> (Site, Child, Calls) {
    let site = Site::with_store(kind).await.unwrap();
    let child = site.data("one", &[]).await.unwrap();
    let calls = Calls(site.data_api(&child));
    // A cluster that was just made does not know all of its nodes yet; clients try again.
    let ask = json!({"condition": {"plat_name": "bkmonitor", "stream_to_id": 1}});
    eventually("a store that answers", Duration::from_secs(10), || async {
        let reply = calls.raw("query_streamto", ask.clone()).await;
        (reply["code"] != 1_000_190).then_some(())
    })
    .await;
    (site, child, calls)
}

#[tokio::test]
async fn every_path_of_both_families_through_the_front_door() {
    let (mut site, child, _) = site(StoreKind::Embedded).await;
    site.api_sets
        .push(format!("upstreams.data=[\"{}\"]", child.address("internal")));
    site.start_api().await.unwrap();
    // contract: data-plane#16
    for api in [site.api(), site.data_api(&child)] {
        for family in [V2, ESB, "/config_"] {
            for slash in ["", "/"] {
                for operation in ["add", "update", "delete", "query"] {
                    for what in ["route", "streamto"] {
                        let path = format!("{family}{operation}_{what}{slash}");
                        let reply = api.post(&path, &json!({"operation": {"operator_name": "x"}})).await;
                        // contract: data-plane#15
                        assert!(!worked(&reply), "{path}: {reply}");
                        assert_eq!(reply["code"], 1_000_106, "{path}: {reply}");
                    }
                }
            }
        }
    }
    let calls = Calls(site.api());
    let id = calls.mint("bkmonitor").await;
    assert!(worked(&calls.query(id).await));
    let log = std::fs::read_to_string(site.path().join("gse_data-one-audit.log")).unwrap();
    assert!(log.contains("data.write"), "{log}");
}

async fn platforms(kind: StoreKind) {
    let (site, _child, calls) = site(kind).await;

    // MON looks for stream 500, and adds one that it keeps the number of.
    // contract: data-plane#14
    let missing = calls
        .raw(
            "query_streamto",
            json!({"condition": {"plat_name": "bkmonitor", "stream_to_id": 500}}),
        )
        .await;
    assert!(
        !worked(&missing) && is_missing(&missing) && missing["data"].is_array(),
        "{missing}"
    );
    assert!(is_missing(&calls.query(1001).await));

    let mut stream_to = kafka("mq_stream_to_2");
    stream_to["kafka"]["sasl_usename"] = json!("cmdb");
    stream_to["kafka"]["sasl_passwd"] = json!("hunter-2-secret");
    stream_to["kafka"]["sasl_mechanisms"] = json!("SCRAM-SHA-512");
    stream_to["kafka"]["security_protocol"] = json!("SASL_PLAINTEXT");
    let added = calls
        .ok(
            "add_streamto",
            json!({"metadata": {"plat_name": "bkmonitor"}, "stream_to": stream_to}),
        )
        .await;
    // contract: data-plane#24
    let stream = added["stream_to_id"].as_i64().unwrap();
    assert!(stream > 0 && added["name"] == "mq_stream_to_2", "{added}");
    let items = calls
        .ok(
            "query_streamto",
            json!({"condition": {"plat_name": "bkmonitor", "stream_to_id": stream}}),
        )
        .await;
    // contract: data-plane#25, data-plane#26
    assert_eq!(items.as_array().unwrap().len(), 1);
    let item = &items[0];
    assert_eq!(item["metadata"]["stream_to_id"], stream);
    assert_eq!(item["stream_to"], stream_to);
    assert_eq!(item["kafka"], stream_to["kafka"]);
    assert_eq!(
        (&item["sasl_usename"], &item["sasl_passwd"]),
        (&json!("cmdb"), &json!("hunter-2-secret"))
    );
    assert!(item["kafka"].get("sasl_username").is_none(), "{item}");
    stream_to["name"] = json!("renamed");
    let update = json!({"condition": {"stream_to_id": stream, "plat_name": "bkmonitor"}, "specification": {"stream_to": stream_to}});
    calls.ok("update_streamto", update).await;

    // contract: data-plane#17
    let minted = calls.mint("bkmonitor").await;
    assert!((1_500_000..=2_097_151).contains(&minted), "{minted}");
    let tgdp = calls.mint("tgdp").await;
    assert!((1_021..=1_048_575).contains(&tgdp), "{tgdp}");
    assert!(calls.routes(minted).await.is_empty());
    // contract: data-plane#18
    let built_in = calls
        .add(1_100_008, json!([route("proc", stream, "0bkmonitor_11000080")]))
        .await;
    assert_eq!(built_in["data"]["channel_id"], 1_100_008, "{built_in}");
    let again = calls.add(1_100_008, json!([route("other", stream, "t")])).await;
    assert!(!worked(&again) && !is_missing(&again), "{again}");

    // MON hashes what it reads, BMW and CMDB compare it: nothing may be added, dropped or spelled anew.
    // contract: data-plane#19, data-plane#20, data-plane#21
    let mon = json!({"name": "stream_to_bkmonitor_kafka_0bkmonitor_10010", "stream_to": {"stream_to_id": stream,
        "kafka": {"topic_name": "0bkmonitor_10010", "partition": 1}}, "filter_name_and": [], "filter_name_or": []});
    let cmdb = json!({"name": "cc_hostsnap_route", "stream_to": {"stream_to_id": stream,
        "redis": {"channel_name": "snapshot2", "data_set": "snapshot", "biz_id": 2}}});
    assert!(worked(&calls.add(1001, json!([cmdb])).await));
    calls.update(1001, json!([mon])).await;
    let reply = calls.query(1001).await;
    assert_eq!(reply["data"][0]["metadata"]["channel_id"], 1001);
    assert_eq!(reply["data"][0]["metadata"]["plat_name"], "bkmonitor");
    assert!(reply["data"][0]["metadata"]["version"].is_string());
    assert!(reply["data"][0]["metadata"].get("label").is_none(), "{reply}");
    assert_eq!(calls.routes(1001).await, [cmdb.clone(), mon.clone()]);

    // contract: data-plane#22
    let changed = route("cc_hostsnap_route", stream, "elsewhere");
    calls.update(1001, json!([changed])).await;
    assert_eq!(calls.routes(1001).await, [changed.clone(), mon.clone()]);
    // contract: data-plane#23
    let some = json!({"condition": {"channel_id": 1001, "plat_name": "bkmonitor"},
        "operation": {"operator_name": "admin", "method": "specification"},
        "specification": {"route": ["cc_hostsnap_route"]}});
    calls.ok("delete_route", some).await;
    assert_eq!(calls.routes(1001).await, [mon]);
    let all = json!({"condition": {"channel_id": 1001, "plat_name": "bkmonitor"},
        "operation": {"operator_name": "admin", "method": "all"}});
    calls.ok("delete_route", all.clone()).await;
    assert!(is_missing(&calls.query(1001).await));
    assert!(is_missing(&calls.raw("delete_route", all).await));
    // What is made again has nothing of what it was.
    assert!(worked(&calls.add(1001, json!([])).await));
    assert!(calls.routes(1001).await.is_empty());

    // Passwords are answered to those who may read them, and are nowhere else.
    let overview = calls.overview().await.to_string();
    assert!(
        !overview.contains("hunter-2-secret") && overview.contains("renamed"),
        "{overview}"
    );
    for entry in std::fs::read_dir(site.path()).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("gse_data") && name.ends_with(".log") {
            let text = std::fs::read_to_string(entry.path()).unwrap();
            assert!(!text.contains("hunter-2-secret"), "{name}");
        }
    }
    let gone = json!({"condition": {"stream_to_id": stream, "plat_name": "bkmonitor"}});
    calls.ok("delete_streamto", gone.clone()).await;
    assert!(is_missing(&calls.raw("delete_streamto", gone).await));
}

#[tokio::test]
async fn platforms_find_what_they_wrote_in_the_store_that_is_built_in() {
    platforms(StoreKind::Embedded).await;
}

#[tokio::test]
async fn platforms_find_what_they_wrote_in_a_redis() {
    platforms(StoreKind::Redis).await;
}

#[tokio::test]
async fn platforms_find_what_they_wrote_in_a_cluster() {
    platforms(StoreKind::Cluster).await;
}

#[tokio::test]
async fn what_is_wrong_is_said_and_nothing_is_written() {
    let (_site, _child, calls) = site(StoreKind::Embedded).await;
    let meta = json!({"plat_name": "bkmonitor", "channel_id": 5});
    for (operation, body, word) in [
        ("add_route", json!({"metadata": {"plat_name": "nobody"}}), "bkmonitor"),
        ("add_route", json!({"metadata": {"plat_name": ""}}), "plat_name"),
        ("add_route", json!({"metadata": meta, "operation": {}}), "operator_name"),
        (
            "add_route",
            json!({"metadata": meta, "route": [{"name": "r"}]}),
            "route[0].stream_to",
        ),
        (
            "add_route",
            json!({"metadata": meta, "route": [route("r", 1, "t"), route("r", 1, "t")]}),
            "twice",
        ),
        (
            "add_route",
            json!({"metadata": {"plat_name": "bkmonitor", "channel_id": 1_u64 << 33}}),
            "at most",
        ),
        (
            "add_streamto",
            json!({"metadata": meta, "stream_to": {"name": "n", "report_mode": "x"}}),
            "report_mode",
        ),
        ("query_route", json!({"condition": {}}), "channel_id"),
        (
            "delete_streamto",
            json!({"condition": {"stream_to_id": 0}}),
            "stream_to_id",
        ),
    ] {
        let reply = calls.raw(operation, body.clone()).await;
        assert!(!worked(&reply) && !is_missing(&reply), "{body}: {reply}");
        assert!(reply["message"].as_str().unwrap().contains(word), "{body}: {reply}");
    }
    let mut partition = route("r", 1, "t");
    partition["stream_to"]["kafka"]["partition"] = json!(0);
    let reply = calls.add(5, json!([partition])).await;
    assert!(reply["message"].as_str().unwrap().contains("partition"), "{reply}");
    let mut filtered = route("r", 1, "t");
    filtered["filter_name_and"] = json!(["gone"]);
    let reply = calls.add(5, json!([filtered])).await;
    assert!(reply["message"].as_str().unwrap().contains("\"gone\""), "{reply}");
    assert!(is_missing(&calls.query(5).await));
}

#[tokio::test]
async fn two_instances_give_no_id_twice_lose_no_route_and_follow_each_other() {
    let (site, _first, one) = site(StoreKind::Redis).await;
    let second = site.data("two", &[]).await.unwrap();
    let two = Calls(site.data_api(&second));
    // One of the next ids is taken by hand.
    let start = one.mint("bkmonitor").await;
    assert!(worked(&two.add(start + 7, json!([])).await));
    let minting = (0..60).map(|n| {
        if n % 2 == 0 {
            one.mint("bkmonitor")
        } else {
            two.mint("bkmonitor")
        }
    });
    let ids: BTreeSet<i64> = futures::future::join_all(minting).await.into_iter().collect();
    assert_eq!(ids.len(), 60);
    assert!(!ids.contains(&(start + 7)) && !ids.contains(&start));

    let body = |name: String| async move { json!([route(&name, 500, "t")]) };
    let updating = (0..40).map(|n| {
        let calls = if n % 2 == 0 { &one } else { &two };
        async move { calls.update(start, body(format!("r{n}")).await).await }
    });
    futures::future::join_all(updating).await;
    assert_eq!(one.routes(start).await.len(), 40);
    let adding = [
        one.add(77, json!([route("a", 500, "a")])),
        two.add(77, json!([route("b", 500, "b")])),
    ];
    let [a, b]: [Value; 2] = futures::future::join_all(adding).await.try_into().unwrap();
    assert!(worked(&a) != worked(&b), "{a} {b}");
    assert_eq!(one.routes(77).await.len(), 1);

    // contract: data-plane#30
    let begun = Instant::now();
    let added = json!({"metadata": {"plat_name": "bkmonitor", "stream_to_id": 500}, "stream_to": kafka("mq")});
    one.ok("add_streamto", added).await;
    let followed = site.path().join("gse_data-two.log");
    gse_tests::eventually("the other instance follows", Duration::from_secs(2), || async {
        let overview = two.overview().await;
        let streams = overview["streams"].as_array()?;
        streams.iter().any(|stream| stream["stream_to_id"] == 500).then_some(())
    })
    .await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{}", followed.display());
}

#[tokio::test]
async fn a_sites_own_file_is_put_in_once() {
    let site = Site::with_store(StoreKind::Embedded).await.unwrap();
    let file = site.path().join("routes.toml");
    let text = r#"
        [[streams]]
        stream_to_id = 500
        plat_name = "bkmonitor"
        stream_to = { name = "mq", report_mode = "file" }

        [[routes]]
        channel_id = 1001
        plat_name = "bkmonitor"
        route = [{ name = "base", stream_to = { stream_to_id = 500 } }]
    "#;
    std::fs::write(&file, text).unwrap();
    let sets = [format!("routes.seed={}", file.display())];
    let first = site.data("one", &sets).await.unwrap();
    let calls = Calls(site.data_api(&first));
    gse_tests::eventually("the routes of the file are there", Duration::from_secs(5), || async {
        worked(&calls.query(1001).await).then_some(())
    })
    .await;
    let all = json!({"condition": {"channel_id": 1001}, "operation": {"operator_name": "admin", "method": "all"}});
    calls.ok("delete_route", all).await;
    drop(first);
    // What an administrator has removed stays away.
    let second = site.data("one", &sets).await.unwrap();
    let calls = Calls(site.data_api(&second));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(is_missing(&calls.query(1001).await));
    let stream = json!({"condition": {"stream_to_id": 500}});
    assert_eq!(calls.ok("query_streamto", stream).await[0]["stream_to"]["name"], "mq");
}
