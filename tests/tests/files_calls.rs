//! File tasks as job, bscp, nodemgr and cmdb see them: calls, rows and their rules, where no content has to move.
#![allow(clippy::unwrap_used)] // a test ends by panicking

use std::time::{Duration, Instant};

use bytes::BytesMut;
use gse_core::tls::{self, Role, TlsFiles};
use gse_proto::file::{LinkHello, ManifestWanted, Report};
use gse_proto::link::{LinkFrame, MAX_MESSAGE};
use gse_tests::files::{codes, host, push_body, transfer_body, transfer_task};
use gse_tests::site::{SECRET, SMALL_APP};
use gse_tests::{Api, Site, StoreKind};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const FEW_SECONDS: Duration = Duration::from_secs(8);

async fn site() -> Site {
    Site::with_files(StoreKind::Embedded).await.expect("a site")
}

fn of_mode(rows: &[Value], mode: i64) -> Vec<Value> {
    rows.iter()
        .filter(|row| row["content"]["mode"] == mode)
        .cloned()
        .collect()
}

#[tokio::test]
async fn every_host_gets_its_row_and_those_that_are_not_there_get_it_soon() {
    let site = site().await;
    let api = site.api();
    let mut task = transfer_task(
        "02000000src",
        "/data/",
        "a*.tar",
        &["0:10.0.0.7", "", "02000000gone"],
        "/tmp/t/",
    );
    task["target"]["agents"][2]["bk_container_id"] = json!("ab12");
    let begun = Instant::now();
    let id = api
        .submit_files("async_transfer_file", &transfer_body(&[task.clone(), task], 60))
        .await;
    let rows = api.files_over(&id, FEW_SECONDS).await;
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    // contract: v2-http-task#30, v2-http-task#32, v2-http-task#33, v2-http-task#38
    assert_eq!((of_mode(&rows, 0).len(), of_mode(&rows, 1).len()), (1, 3));
    assert_eq!(codes(&rows), [117, 117, 117, 106]);
    for row in &rows {
        let content = &row["content"];
        assert_eq!(
            (
                &content["source_agent_id"],
                &content["source_file_dir"],
                &content["source_file_name"]
            ),
            (&json!("02000000src"), &json!("/data/"), &json!("a*.tar"))
        );
        assert!(!row["error_msg"].as_str().unwrap().is_empty(), "{row}");
    }
    let targets: Vec<&str> = rows[1..]
        .iter()
        .map(|row| row["content"]["dest_agent_id"].as_str().unwrap())
        .collect();
    assert_eq!(targets, ["0:10.0.0.7", "", "02000000gone"]);
    assert_eq!(rows[3]["content"]["dest_container_id"], "ab12");
    assert_eq!(rows[1]["content"]["dest_file_dir"], "/tmp/t/");

    // contract: v2-http-task#41
    for (query, expect) in [
        (json!({"agents": []}), 4),
        (json!({"agents": [host("02000000src")]}), 1),
        (json!({"agents": [host("0:10.0.0.7"), host("nobody")]}), 1),
        (json!({"agent_id_list": ["0:10.0.0.7", "02000000gone"]}), 2),
    ] {
        assert_eq!(api.file_rows_of(&id, &query).await.len(), expect, "{query}");
    }
    // contract: v2-http-task#18
    api.terminate_files(&id, &json!([])).await;
    api.terminate_files(&id, &json!([host("0:10.0.0.7")])).await;
    assert_eq!(codes(&api.file_rows(&id).await), [117, 117, 117, 106]);
    // The state of a task is asked of the service that has it, also through gse_api.
    for front in [api.clone(), site.btsvr_api(1)] {
        for path in ["/api/v2/task/get_task_state", "/api/v2/task/extensions/get_task_state"] {
            let state = front.post(path, &json!({"task_id": id})).await;
            assert_eq!(state["data"]["result"]["state"], "failed", "{state}");
        }
    }
}

#[tokio::test]
async fn every_path_and_every_mistake() {
    let site = site().await;
    let api = site.api();
    let transfer = transfer_body(&[transfer_task("src", "/d", "f", &["t"], "/t/")], 60);
    let push = push_body(&["t"], "/t", "f", "x");
    let mut ids = vec![];
    // contract: v2-http-task#4, v2-http-task#5, v2-http-task#6, v2-http-task#44
    for (path, body) in [
        ("/api/v2/task/async_transfer_file", &transfer),
        ("/api/v2/task/extensions/async_transfer_file/", &transfer),
        ("//api/v2//task/extensions/async_push_file", &push),
        ("/api/v2/task/async_push_file", &push),
    ] {
        for front in [api.clone(), site.btsvr_api(1)] {
            let reply = front.post(path, body).await;
            assert_eq!(reply["code"], 0, "{path}: {reply}");
            ids.push(reply["data"]["result"]["task_id"].as_str().unwrap().to_owned());
        }
    }
    for (path, count) in [
        ("/api/v2/task/extensions/get_transfer_file_result", 2),
        ("/api/v2/task/get_transfer_file_result", 2),
        ("/api/v2/task/async/get_transfer_file_result", 2),
    ] {
        let reply = api
            .post(path, &json!({"task_id": ids[0], "agent_id_list": ["src", "t"]}))
            .await;
        assert_eq!(
            (&reply["code"], reply["data"]["result"].as_array().unwrap().len()),
            (&json!(0), count),
            "{reply}"
        );
    }
    // contract: v2-http-task#45
    let single = api.file_rows(&ids[4]).await;
    assert_eq!(single.len(), 1);
    assert_eq!(
        (&single[0]["content"]["mode"], &single[0]["content"]["dest_agent_id"]),
        (&json!(1), &json!("t"))
    );

    // contract: v2-http-task#2
    let with = |change: &dyn Fn(&mut Value)| {
        let mut body = transfer.clone();
        change(&mut body);
        body
    };
    for (body, word) in [
        (json!({}), "tasks"),
        (
            with(&|b| b["tasks"][0]["target"]["store_dir"] = json!("")),
            "target.store_dir",
        ),
        (
            with(&|b| b["tasks"][0]["target"]["store_dir"] = json!("t")),
            "target.store_dir",
        ),
        (
            with(&|b| b["tasks"][0]["target"]["agents"] = json!([])),
            "target.agents",
        ),
        (
            with(&|b| b["tasks"][0]["source"]["file_name"] = json!("../f")),
            "source.file_name",
        ),
        (
            with(&|b| b["tasks"][0]["target"]["permission"] = json!(888)),
            "permission",
        ),
        (with(&|b| b["download_speed"] = json!(-1)), "download_speed"),
        (with(&|b| b["tasks"][0]["source"] = json!(null)), "source"),
    ] {
        let reply = api.post("/api/v2/task/async_transfer_file", &body).await;
        assert_eq!(
            (&reply["code"], &reply["data"]),
            (&json!(1_000_106), &json!({"result": {}})),
            "{reply}"
        );
        assert!(reply["message"].as_str().unwrap().contains(word), "{word}: {reply}");
    }
    // contract: v2-http-task#44
    for (length, code) in [(102_400, 0), (102_401, 1_000_106)] {
        let body = push_body(&["t"], "/t", "f", &"x".repeat(length));
        assert_eq!(api.post("/api/v2/task/async_push_file", &body).await["code"], code);
    }
    // contract: v2-http-task#3
    let unknown = json!({"task_id": "GSETASK:F:20200101000000:0000000000000000:00000000"});
    let reply = api.post("/api/v2/task/get_transfer_file_result", &unknown).await;
    assert_eq!(
        (&reply["code"], &reply["data"]),
        (&json!(1_000_116), &json!({"result": []})),
        "{reply}"
    );
    let reply = api.post("/api/v2/task/async_terminate_transfer_file", &unknown).await;
    assert_eq!(
        (&reply["code"], &reply["data"]),
        (&json!(1_000_116), &json!({"result": {}})),
        "{reply}"
    );

    // An application that may do nothing with files, and one that may not see others' tasks.
    let small = Api::new(&api.address, SMALL_APP, SECRET);
    assert_eq!(
        small.post("/api/v2/task/async_transfer_file", &transfer).await["code"],
        1_000_903
    );
    assert_eq!(
        small.post("/api/v2/task/async_push_file", &push).await["code"],
        1_000_903
    );
}

#[tokio::test]
async fn twenty_files_for_five_thousand_hosts_in_one_task() {
    let site = site().await;
    let api = site.api();
    let names: Vec<String> = (0..5_000).map(|n| format!("0:10.1.{}.{}", n / 250, n % 250)).collect();
    let targets: Vec<&str> = names.iter().map(String::as_str).collect();
    let tasks: Vec<Value> = (0..20)
        .map(|n| transfer_task("02000000src", "/data", &format!("f{n}"), &targets, "/t/"))
        .collect();
    let body = transfer_body(&tasks, 60);
    let begun = Instant::now();
    let reply = api.post("/api/v2/task/extensions/async_transfer_file", &body).await;
    assert_eq!(reply["code"], 0, "{reply}");
    let submitted = begun.elapsed();
    assert!(submitted < Duration::from_secs(10), "{submitted:?}");
    let id = reply["data"]["result"]["task_id"].as_str().unwrap();
    let rows = api.files_over(id, Duration::from_secs(60)).await;
    assert_eq!(rows.len(), 20 + 100_000);
    assert!(rows.iter().all(|row| row["error_code"] == 117));
}

#[tokio::test]
async fn instances_answer_for_each_other_and_resume_their_own() {
    let mut site = site().await;
    site.start_btsvr(2).await.unwrap();
    let (first, second) = (site.btsvr_api(1), site.btsvr_api(2));
    // Known, and away only since a moment ago: its row stays open for a while.
    let agent = site.file_agent("02000000away", "10.0.0.9", &[]).await.unwrap();
    drop(agent);
    let id = first
        .submit_files(
            "async_push_file",
            &push_body(&["02000000away", "nobody"], "/tmp/x", "f", "x"),
        )
        .await;
    assert_eq!(second.file_rows(&id).await.len(), 2);
    let listed = second.post("/gse/v1/xfer/list", &json!({})).await;
    assert!(
        listed["data"]["tasks"]
            .as_array()
            .unwrap()
            .iter()
            .all(|task| task["push"] == true),
        "{listed}"
    );
    site.btsvr.get_mut(&1).unwrap().kill_9();
    assert_eq!(second.file_rows(&id).await.len(), 2);
    second.terminate_files(&id, &json!([])).await;
    site.start_btsvr(1).await.unwrap();
    let rows = second.files_over(&id, Duration::from_secs(25)).await;
    let ended = codes(&rows);
    assert!(ended[0] == 126 || ended[0] == 117, "{rows:?}");
    assert_eq!(ended[1], 117);
}

/// Sends frames over a link and gives the first ones that come back; none when the connection is closed instead.
async fn link(site: &Site, files: &TlsFiles, frames: &[LinkFrame], expect: usize) -> Vec<LinkFrame> {
    let config = tls::client_config(files, Role::Server, &[]).unwrap();
    let tcp = TcpStream::connect(site.btsvr[&1].address("link")).await.unwrap();
    let mut came = vec![];
    let Ok(mut stream) = TlsConnector::from(config).connect(tls::server_name(), tcp).await else {
        return came;
    };
    let mut out = BytesMut::new();
    frames.iter().for_each(|frame| frame.encode(0, &mut out));
    // The other side may have closed already; what it says is what counts.
    stream.write_all(&out).await.ok();
    let mut buffer = BytesMut::new();
    while came.len() < expect {
        if let Some(frame) = LinkFrame::take(&mut buffer, MAX_MESSAGE).unwrap() {
            came.push(frame);
            continue;
        }
        match tokio::time::timeout(FEW_SECONDS, stream.read_buf(&mut buffer)).await {
            Ok(Ok(read)) if read > 0 => {}
            _ => break,
        }
    }
    came
}

#[tokio::test]
async fn a_link_is_for_the_agent_of_its_certificate_and_tells_nobody_elses_business() {
    let site = site().await;
    let dir = site.path().join("certs");
    let files = |pair: (std::path::PathBuf, std::path::PathBuf)| TlsFiles {
        ca: dir.join("gseca.crt"),
        cert: pair.0,
        key: pair.1,
    };
    let own = files(site.agent_certificate("02000000own").unwrap());
    let hello = |id: &str| {
        LinkFrame::from(LinkHello {
            protocol: 1,
            agent_id: id.into(),
            peer_addresses: vec!["127.0.0.1:1".into()],
            ..LinkHello::default()
        })
    };
    let refused = link(&site, &own, &[hello("02000000other")], 1).await;
    assert!(
        matches!(&refused[..], [LinkFrame::Goodbye(bye)] if bye.reason.contains("02000000own")),
        "{refused:?}"
    );
    let server = files((dir.join("gse_server.crt"), dir.join("gse_server.key")));
    // A server may have a link as a relay, but not in an agent's name.
    let refused = link(&site, &server, &[hello("02000000own")], 1).await;
    assert!(matches!(&refused[..], [LinkFrame::Goodbye(_)]), "{refused:?}");

    // What is not a task of this agent is answered like what is over; a manifest is for members alone.
    let id = site
        .api()
        .submit_files("async_push_file", &push_body(&["02000000else"], "/tmp/x", "f", "x"))
        .await;
    let strange = |task: &str| {
        LinkFrame::from(Report {
            task_id: task.into(),
            order: 0,
            phase: 3,
            ..Report::default()
        })
    };
    let wanted = LinkFrame::from(ManifestWanted {
        manifest_id: vec![7; 32].into(),
    });
    let frames = [hello("02000000own"), wanted, strange(&id), strange("no task")];
    let came = link(&site, &own, &frames, 3).await;
    assert!(
        matches!(
            &came[..],
            [
                LinkFrame::Welcome(_),
                LinkFrame::ReportStored(_),
                LinkFrame::ReportStored(_)
            ]
        ),
        "{came:?}"
    );
    let rows = site.api().files_over(&id, FEW_SECONDS).await;
    assert_eq!(codes(&rows), [117]);
}
