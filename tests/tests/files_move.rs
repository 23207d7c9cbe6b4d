//! Content on its way between real agents: pushed, in messages, through a swarm.
#![allow(clippy::unwrap_used)] // a test ends by panicking

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use gse_tests::files::{codes, push_body, transfer_body, transfer_task};
use gse_tests::{Child, Site, StoreKind};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);

/// A site with some agents.
async fn site(agents: usize, sets: &[&str]) -> (Site, Vec<Child>, Vec<String>) {
    let site = Site::with_files(StoreKind::Embedded).await.expect("a site");
    let ids: Vec<String> = (0..agents).map(|n| format!("02000000file{n:02}")).collect();
    let children = ids
        .iter()
        .enumerate()
        .map(|(n, id)| site.spawn_file_agent(id, &format!("10.2.0.{}", n + 1), sets).unwrap())
        .collect();
    for id in &ids {
        site.wait_state(id, 2).await;
    }
    (site, children, ids)
}

fn random_bytes(length: usize) -> Vec<u8> {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64 ^ length as u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        bytes.extend_from_slice(&seed.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn pushed_content_is_there_with_its_mode() {
    let (site, _agents, ids) = site(2, &[]).await;
    let api = site.api();
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("made/for it");
    let targets: Vec<&str> = ids.iter().map(String::as_str).collect();
    let content = "x".repeat(102_400);
    // contract: v2-http-task#44, v2-http-task#45
    let body = push_body(&targets[..1], &text(&target), "pushed", &content);
    let id = api.submit_files("async_push_file", &body).await;
    let rows = api.files_over(&id, LIMIT).await;
    assert_eq!(codes(&rows), [0], "{rows:?}");
    assert_eq!(
        (&rows[0]["content"]["mode"], &rows[0]["content"]["size"]),
        (&json!(1), &json!(102_400))
    );
    let file = target.join("pushed");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), content);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o7777, 0o644);
    // contract: v2-http-task#43
    let mut body = push_body(&targets[1..], &text(&dir.path().join("missing")), "f", "x");
    body["auto_mkdir"] = json!(false);
    let id = api.submit_files("async_push_file", &body).await;
    let rows = api.files_over(&id, LIMIT).await;
    assert!(
        rows[0]["error_code"] != 0 && !rows[0]["error_msg"].as_str().unwrap().is_empty(),
        "{rows:?}"
    );
}

#[tokio::test]
async fn a_small_file_a_directory_and_a_pattern_go_in_messages() {
    let (site, _agents, ids) = site(3, &[]).await;
    let api = site.api();
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("src");
    std::fs::create_dir_all(source.join("sub/empty")).unwrap();
    std::fs::write(source.join("one file"), random_bytes(60_000)).unwrap();
    std::fs::write(source.join("sub/two"), b"").unwrap();
    let at = |n: u32| text(&dir.path().join(format!("t{n}"))) + "/";
    let (from, rest) = (ids[0].as_str(), [ids[1].as_str(), "02000000nobody"]);
    let tasks = [
        transfer_task(from, &text(&source), "one file", &rest, &at(1)),
        transfer_task(from, &text(&source), "", &rest, &at(2)),
        transfer_task(from, &text(&source), "one*", &rest, &at(3)),
        transfer_task(from, &text(&source), "absent", &rest, &at(4)),
    ];
    let begun = Instant::now();
    let id = api
        .submit_files("async_transfer_file", &transfer_body(&tasks, 60))
        .await;
    let rows = api.files_over(&id, LIMIT).await;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    // Uploads, then each file's two targets. contract: p2p#28
    let ended = codes(&rows);
    assert_eq!(ended[..3], [0, 0, 0], "{rows:#?}");
    assert!(ended[3] != 0 && ended[3] != 115, "{rows:#?}");
    assert_eq!(ended[4..10], [0, 117, 0, 117, 0, 117], "{rows:#?}");
    assert!(ended[10] != 0 && ended[11] != 0, "{rows:#?}");
    for file in ["t1/one file", "t2/src/one file", "t3/one file"] {
        assert_eq!(
            std::fs::read(dir.path().join(file)).unwrap(),
            random_bytes(60_000),
            "{file}"
        );
    }
    // contract: v2-http-task#34
    assert_eq!(rows[1]["content"]["source_file_name"], "");
    assert!(dir.path().join("t2/src/sub/empty").is_dir() && dir.path().join("t2/src/sub/two").is_file());
    assert!(!dir.path().join("t4/absent").exists());
    assert_eq!(rows[0]["content"]["size"], 60_000);

    // A new name, and the source among the targets. contract: v2-http-task#43, p2p#29
    let mut renamed = transfer_task(from, &text(&source), "one file", &[from, ids[2].as_str()], &at(5));
    renamed["target"]["file_name"] = json!("renamed");
    let same = transfer_task(from, &text(&source), "one file", &[from], &(text(&source) + "/"));
    let id = api
        .submit_files("async_transfer_file", &transfer_body(&[renamed, same], 60))
        .await;
    let rows = api.files_over(&id, LIMIT).await;
    assert_eq!(codes(&rows), [0, 0, 0, 0], "{rows:#?}");
    assert_eq!(rows[1]["content"]["dest_file_name"], "renamed");
    assert_eq!(std::fs::read(dir.path().join("t5/renamed")).unwrap().len(), 60_000);
}

#[tokio::test]
async fn a_large_file_goes_through_a_swarm() {
    let (site, _agents, ids) = site(5, &[]).await;
    let api = site.api();
    let dir = tempfile::tempdir().unwrap();
    let content = random_bytes(24 << 20);
    std::fs::write(dir.path().join("large"), &content).unwrap();
    // All on one host: each to a directory of its own.
    let tasks: Vec<_> = (1..5)
        .map(|n| {
            let to = text(&dir.path().join(format!("t{n}"))) + "/";
            transfer_task(&ids[0], &text(dir.path()), "large", &[&ids[n]], &to)
        })
        .collect();
    let id = api
        .submit_files("async_transfer_file", &transfer_body(&tasks, 60))
        .await;
    let rows = api.files_over(&id, LIMIT).await;
    // contract: v2-http-task#30
    assert_eq!(codes(&rows), [0, 0, 0, 0, 0], "{rows:#?}");
    for n in 1..5 {
        assert!(
            std::fs::read(dir.path().join(format!("t{n}/large"))).unwrap() == content,
            "{n}"
        );
    }
    assert_eq!(rows[0]["content"]["size"], content.len());
}

#[tokio::test]
async fn limits_hold_terminate_ends_and_time_runs_out() {
    let (site, _agents, ids) = site(2, &[]).await;
    let api = site.api();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("large"), random_bytes(40 << 20)).unwrap();
    let to = |n: u32| text(&dir.path().join(format!("t{n}"))) + "/";
    let body = |n: u32, timeout_s: i64| {
        let task = transfer_task(&ids[0], &text(dir.path()), "large", &[&ids[1]], &to(n));
        let mut body = transfer_body(&[task], timeout_s);
        // contract: v2-http-task#42
        body["download_speed"] = json!(2);
        body
    };
    let id = api.submit_files("async_transfer_file", &body(1, 60)).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let rows = api.file_rows(&id).await;
    let moved = rows[1]["content"]["progress"].as_u64().unwrap();
    assert!(codes(&rows) == [115, 115] && (3..=40).contains(&moved), "{rows:#?}");
    // contract: v2-http-task#40
    let asked = Instant::now();
    api.terminate_files(&id, &json!([])).await;
    let rows = api.files_over(&id, LIMIT).await;
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    assert_eq!(codes(&rows), [126, 126], "{rows:#?}");
    let left: Vec<_> = std::fs::read_dir(dir.path().join("t1")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");

    let begun = Instant::now();
    let id = api.submit_files("async_transfer_file", &body(2, 3)).await;
    let rows = api.files_over(&id, LIMIT).await;
    assert_eq!(codes(&rows), [120, 120], "{rows:#?}");
    assert!((3..12).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_transfer_outlives_its_server_and_its_target() {
    let (mut site, mut agents, ids) = site(2, &[]).await;
    let api = site.api();
    let dir = tempfile::tempdir().unwrap();
    let content = random_bytes(30 << 20);
    std::fs::write(dir.path().join("large"), &content).unwrap();
    let to = text(&dir.path().join("t")) + "/";
    let mut body = transfer_body(
        &[transfer_task(&ids[0], &text(dir.path()), "large", &[&ids[1]], &to)],
        60,
    );
    body["download_speed"] = json!(4);
    let id = api.submit_files("async_transfer_file", &body).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    site.btsvr.get_mut(&1).unwrap().kill_9();
    tokio::time::sleep(Duration::from_millis(500)).await;
    site.start_btsvr(1).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    agents[1].kill_9();
    agents[1] = site.spawn_file_agent(&ids[1], "10.2.0.2", &[]).unwrap();
    let rows = api.files_over(&id, Duration::from_secs(45)).await;
    assert_eq!(codes(&rows), [0, 0], "{rows:#?}");
    assert!(std::fs::read(dir.path().join("t/large")).unwrap() == content);
}

// contract: p2p#24
#[tokio::test]
async fn small_files_for_eight_hosts_take_no_time_worth_mentioning() {
    let (site, _agents, ids) = site(9, &[]).await;
    let api = site.api();
    let dir = tempfile::tempdir().unwrap();
    // Links are made and certificates read before it counts.
    let rounds = [
        (1 << 10, 1, 3_000),
        (64 << 10, 12, 150),
        (1 << 20, 12, 500),
        (8 << 20, 12, 900),
    ];
    for (size, tries, limit_ms) in rounds {
        let mut best = Duration::MAX;
        for attempt in 0..tries {
            best = best.min(to_eight(&api, dir.path(), &ids, size, attempt).await);
            if best < Duration::from_millis(limit_ms) {
                break;
            }
        }
        println!("{size} bytes to 8 hosts: {best:?}");
        // Whatever else this machine does meanwhile: the best of some.
        assert!(best < Duration::from_millis(limit_ms), "{size} bytes took {best:?}");
    }
}

/// How long it takes until eight hosts have a file.
async fn to_eight(api: &gse_tests::Api, dir: &Path, ids: &[String], size: usize, attempt: usize) -> Duration {
    let name = format!("f{size}-{attempt}");
    let mut content = random_bytes(size);
    content[0] = u8::try_from(attempt).unwrap();
    std::fs::write(dir.join(&name), &content).unwrap();
    let tasks: Vec<_> = (1..9)
        .map(|n| {
            let to = text(&dir.join(format!("t{n}"))) + "/";
            transfer_task(&ids[0], &text(dir), &name, &[&ids[n]], &to)
        })
        .collect();
    let begun = Instant::now();
    let id = api
        .submit_files("async_transfer_file", &transfer_body(&tasks, 60))
        .await;
    let rows = api.files_over(&id, LIMIT).await;
    let took = begun.elapsed();
    assert!(codes(&rows).iter().all(|code| *code == 0), "{rows:#?}");
    for n in 1..9 {
        assert!(std::fs::read(dir.join(format!("t{n}")).join(&name)).unwrap() == content);
    }
    took
}

#[tokio::test]
async fn who_has_it_goes_on_when_the_source_is_gone() {
    // contract: p2p#20
    let (site, mut agents, mut ids) = site(2, &[]).await;
    for n in 2..4 {
        let id = format!("02000000slow{n}");
        let slow = ["files.download_bytes_per_s=4000000"];
        let address = format!("10.2.0.{}", n + 1);
        agents.push(site.file_agent(&id, &address, &slow).await.unwrap());
        ids.push(id);
    }
    let api = site.api();
    let dir = tempfile::tempdir().unwrap();
    let content = random_bytes(24 << 20);
    std::fs::write(dir.path().join("large"), &content).unwrap();
    let to = |n: usize| text(&dir.path().join(format!("t{n}"))) + "/";
    let tasks: Vec<_> = (1..4)
        .map(|n| transfer_task(&ids[0], &text(dir.path()), "large", &[&ids[n]], &to(n)))
        .collect();
    let id = api
        .submit_files("async_transfer_file", &transfer_body(&tasks, 90))
        .await;
    // One of them has everything soon, and goes on offering it.
    gse_tests::eventually("the fast one is done", LIMIT, || async {
        let rows = api.file_rows(&id).await;
        (rows[1]["error_code"] == 0).then_some(())
    })
    .await;
    agents[0].kill_9();
    let rows = api.files_over(&id, Duration::from_secs(45)).await;
    assert_eq!(codes(&rows), [0, 0, 0, 0], "{rows:#?}");
    for n in 1..4 {
        assert!(
            std::fs::read(dir.path().join(format!("t{n}/large"))).unwrap() == content,
            "{n}"
        );
    }
}
