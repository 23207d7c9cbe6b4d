//! Agents coming, going, returning and being cloned, as callers of gse_api see them.

use std::time::Duration;

use gse_tests::{AgentOptions, Site, StoreKind, eventually, script_body};
use nix::sys::signal::Signal;
use serde_json::json;

const ONE: &str = "020000000242010a00002f17521298676501";

#[tokio::test]
async fn state_and_info() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let mut agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    let api = site.api();
    // contract: v2-http-task#46, v2-http-task#47, v2-http-task#49, procmgr-agent-lifecycle#27-29
    let ids = [ONE, "0:10.1.1.1", "unknown", "5:10.1.1.1", ONE];
    let reply = api
        .post("/api/v2/cluster/list_agent_state/", &json!({"agent_id_list": ids}))
        .await;
    let rows = reply["data"].as_array().unwrap();
    assert_eq!(rows.len(), ids.len());
    for (row, id) in rows.iter().zip(ids) {
        assert_eq!(row["bk_agent_id"], id);
        assert!(row["bk_cloud_id"].is_i64() && row["run_mode"].is_i64() && row["report_time"].is_u64());
    }
    let codes: Vec<i64> = rows.iter().map(|row| row["status_code"].as_i64().unwrap()).collect();
    assert_eq!(codes, [2, 2, -2, -2, 2]);
    let version = rows[0]["version"].as_str().unwrap();
    assert!(!version.is_empty() && version.chars().all(|c| c.is_ascii_alphanumeric() || ".-".contains(c)));
    assert_eq!(rows[0]["run_mode"], 1);

    // contract: v2-http-task#50, procmgr-agent-lifecycle#30
    let mut ids: Vec<String> = (0..999).map(|n| format!("nobody-{n}")).collect();
    ids.push(ONE.into());
    let reply = api
        .post("/api/v2/cluster/list_agent_info", &json!({"agent_id_list": ids}))
        .await;
    let info = &reply["data"].as_array().unwrap()[999];
    let now_s = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(
        info["report_time"].as_u64().unwrap().abs_diff(now_s * 1000) < 60_000,
        "{info}"
    );
    assert!(info["start_time"].as_u64().unwrap().abs_diff(now_s) < 60, "{info}");
    assert_eq!(info["bk_host_ip"], "10.1.1.1");
    assert_eq!(info["status"], "running");
    assert!(info["cpu_num"].as_u64().unwrap() > 0 && info["mem_size"].as_u64().unwrap() > 0);
    assert!(info["conn_cycle_time"].is_string());

    // contract: procmgr-agent-lifecycle#53
    let hosts = json!({"hosts": [{"ip": "10.1.1.1", "bk_cloud_id": 0}, {"ip": "10.9.9.9", "bk_cloud_id": 3}]});
    let reply = api.post("/api/c/compapi/v2/gse/get_agent_status/", &hosts).await;
    assert_eq!(
        reply["data"]["0:10.1.1.1"],
        json!({"ip": "10.1.1.1", "bk_cloud_id": 0, "bk_agent_alive": 1})
    );
    assert_eq!(reply["data"]["3:10.9.9.9"]["bk_agent_alive"], 0);
    let reply = api.post("/api/c/compapi/v2/gse/get_agent_info/", &hosts).await;
    assert_eq!(reply["data"]["0:10.1.1.1"]["version"], version);

    // Stopped on purpose, and killed, are told apart; both are not alive.
    agent.terminate(Duration::from_secs(10)).await.unwrap();
    site.wait_state(ONE, 6).await;
    let mut agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    agent.kill_9();
    site.wait_state(ONE, -1).await;
    let reply = api.post("/api/c/compapi/v2/gse/get_agent_status/", &hosts).await;
    assert_eq!(reply["data"]["0:10.1.1.1"]["bk_agent_alive"], 0);
}

#[tokio::test]
async fn an_agent_that_hangs_is_found_and_comes_back() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    agent.signal(Signal::SIGSTOP);
    // contract: v2-http-task#46
    site.wait_state(ONE, -1).await;
    agent.signal(Signal::SIGCONT);
    site.wait_state(ONE, 2).await;
    let row = site.api().run(ONE, "root", "#!/bin/sh\necho back\n", 60).await;
    assert_eq!(row["screen"], "back\n");
}

#[tokio::test]
async fn a_clone_is_fenced_and_shown() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let _agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    // Another host with the same id: other machine, other boot.
    let mut options = AgentOptions::new(ONE, "10.1.1.2");
    options.other_host = true;
    let clone = site.spawn_agent(&options, "-clone").unwrap();
    let api = site.api();
    let remark = eventually("the clone is shown", Duration::from_secs(15), || async {
        let reply = api
            .post("/api/v2/cluster/list_agent_info", &json!({"agent_id_list": [ONE]}))
            .await;
        let remark = reply["data"][0]["remark"].as_str().unwrap_or_default().to_owned();
        (!remark.is_empty()).then_some((remark, reply["data"][0]["status_code"].clone()))
    })
    .await;
    assert!(remark.0.contains("127.0.0.1"), "{}", remark.0);
    assert_eq!(remark.1, 2, "the healthy one is not harmed");
    let row = api.run(ONE, "root", "#!/bin/sh\necho fine\n", 60).await;
    assert_eq!(row["screen"], "fine\n");
    drop(clone);

    // A rebuilt host takes over when the old one does not answer.
    let site2 = Site::start(StoreKind::Embedded).await.unwrap();
    let old = site2.agent(ONE, "10.1.1.1").await.unwrap();
    old.signal(Signal::SIGSTOP);
    let _new = site2.spawn_agent(&options, "-rebuilt").unwrap();
    let api = site2.api();
    eventually("the rebuilt host is let in", Duration::from_secs(15), || async {
        let reply = api
            .post("/api/v2/cluster/list_agent_info", &json!({"agent_id_list": [ONE]}))
            .await;
        (reply["data"][0]["bk_host_ip"] == "10.1.1.2").then_some(())
    })
    .await;
    let task = api
        .submit(&script_body(&[ONE], "root", "#!/bin/sh\necho new\n", 60))
        .await;
    let rows = api.finished(&task, &[ONE], Duration::from_secs(30)).await;
    assert_eq!(rows[0]["screen"], "new\n", "{rows:?}");
}

#[tokio::test]
async fn certificates_decide_who_is_who() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    // The certificate of one agent does not let it be another.
    let mut options = AgentOptions::new("somebody-else", "10.1.1.9");
    let (cert, key) = site.agent_certificate(ONE).unwrap();
    options.sets.push(format!("tls.cert={}", cert.display()));
    options.sets.push(format!("tls.key={}", key.display()));
    let liar = site.spawn_agent(&options, "-liar").unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(site.api().agent_state("somebody-else").await["status_code"], -2);
    drop(liar);
    // Nor does an agent's key open the listener of our own servers.
    let internal = site.task.as_ref().unwrap().address("internal").to_owned();
    let files = gse_core::tls::TlsFiles {
        ca: site.path().join("certs/gseca.crt"),
        cert,
        key,
    };
    let client = gse_core::tls::client_config(&files, gse_core::tls::Role::Server, &[]).unwrap();
    let tcp = tokio::net::TcpStream::connect(internal).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(client);
    let outcome = async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = connector.connect(gse_core::tls::server_name(), tcp).await?;
        stream
            .write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            .await?;
        let mut answer = [0; 16];
        stream.read(&mut answer).await
    };
    let outcome = tokio::time::timeout(Duration::from_secs(5), outcome)
        .await
        .expect("an answer");
    assert!(outcome.is_err() || matches!(outcome, Ok(0)), "{outcome:?}");
}
