//! Limits that an agent's own settings set, through a server that knows nothing of them: each ends in a terminal row that says which
//! setting it was, and nothing is done on the host.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::path::Path;
use std::time::{Duration, Instant};

use gse_tests::{AgentOptions, Api, Site, StoreKind, script_body};
use serde_json::{Value, json};

const AGENT: &str = "020000000242010a00002f17521298676601";
const MINUTE: Duration = Duration::from_secs(60);

async fn site(sets: Vec<String>) -> (Site, gse_tests::Child) {
    let site = Site::start(StoreKind::Embedded).await.expect("a site");
    let agent = site
        .spawn_agent(
            &AgentOptions {
                sets,
                ..AgentOptions::new(AGENT, "10.11.12.14")
            },
            "",
        )
        .expect("an agent");
    site.wait_state(AGENT, 2).await;
    (site, agent)
}

fn expect(row: &Value, error_code: i64, status: i64) {
    assert_eq!(
        (row["error_code"].as_i64(), row["status"].as_i64()),
        (Some(error_code), Some(status)),
        "{row}"
    );
}

fn says(row: &Value, what: &str) {
    assert!(
        row["error_msg"].as_str().is_some_and(|text| text.contains(what)),
        "{what}: {row}"
    );
}

/// A submit of one script that is written to `dir`.
fn body_at(dir: &Path, name: &str, content: &str) -> Value {
    let mut body = script_body(&[AGENT], "root", content, 60);
    body["scripts"][0]["script_name"] = json!(name);
    body["scripts"][0]["script_store_dir"] = json!(dir.to_str().expect("a plain path"));
    body["atomic_tasks"][0]["command"] = json!(format!("{}/{name}", dir.display()));
    body
}

async fn done(api: &Api, body: &Value) -> Value {
    let task = api.submit(body).await;
    api.finished(&task, &[AGENT], MINUTE).await.remove(0)
}

#[tokio::test]
async fn accounts_times_outputs_and_sizes() {
    let (site, _agent) = site(vec![
        "exec.allowed_accounts=[\"root\"]".into(),
        "exec.max_timeout_ms=1500".into(),
        "exec.max_output=10000".into(),
        "exec.max_script_bytes=2000".into(),
    ])
    .await;
    let api = site.api();
    let file = site.path().join("ran");
    let touch = format!("#!/bin/sh\ntouch {}\n", file.display());

    let row = api.run(AGENT, "nobody", &touch, 60).await;
    expect(&row, 101, 5);
    says(&row, "exec.allowed_accounts");

    // Longer is asked for, and "as long as may be".
    for asked in [60, 0] {
        let started = Instant::now();
        let row = api.run(AGENT, "root", "#!/bin/sh\necho x; sleep 1000\n", asked).await;
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        expect(&row, 0, 3);
        says(&row, "1.5 s");
        assert_eq!(row["screen"], "x\n");
        says(&row, "exec.max_timeout_ms");
    }

    let row = api.run(AGENT, "root", "#!/bin/sh\nseq 1 20000\n", 60).await;
    expect(&row, 0, 2);
    let screen = row["screen"].as_str().expect("a screen");
    let (head, mark) = screen.split_once("\n[output cut at ").expect("a marker");
    let written: usize = (1..=20_000).map(|n| format!("{n}\n").len()).sum();
    assert_eq!(mark, format!("{} bytes, {written} were written]\n", head.len()));
    assert!(screen.len() <= 10_000 && head.len() > 9_800, "{}", screen.len());

    let large = format!("{touch}# {}\n", "x".repeat(2000));
    let row = api.run(AGENT, "root", &large, 60).await;
    expect(&row, 111, 5);
    says(&row, "exec.max_script_bytes");
    assert!(!file.exists(), "nothing of what was refused has run");
    // And what keeps to all of it runs.
    let row = api.run(AGENT, "root", &touch, 1).await;
    expect(&row, 0, 2);
    assert!(file.exists());
}

#[tokio::test]
async fn script_directories() {
    // Not below /tmp, where links are refused anyway.
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let base = place.path().canonicalize().expect("a path");
    let at = |name: &str| base.join(name);
    for dir in ["good", "good2", "bad"] {
        std::fs::create_dir(at(dir)).expect("mkdir");
    }
    std::os::unix::fs::symlink(at("bad"), at("good/out")).expect("a link");
    std::os::unix::fs::symlink(at("good"), at("in")).expect("a link");
    let (site, _agent) = site(vec![
        format!(
            "exec.allowed_script_dirs=[\"/nonexistent/scripts\", \"{}\"]",
            at("good").display()
        ),
        "exec.script_prefix=bk_".into(),
        "exec.max_script_dir_bytes=1000".into(),
    ])
    .await;
    let api = site.api();
    for dir in ["good", "good/new/newer", "in", "in/linked", "./good//new"] {
        let row = done(&api, &body_at(&at(dir), "bk_a.sh", "#!/bin/sh\necho fine\n")).await;
        expect(&row, 0, 2);
        assert_eq!(row["screen"], "fine\n");
    }
    assert!(at("good/linked/bk_a.sh").exists());
    for dir in [
        "bad",
        "bad/new",
        "good2",
        "good3",
        "good/out",
        "good/out/new",
        "good/../bad",
        "",
    ] {
        let row = done(&api, &body_at(&at(dir), "bk_b.sh", "#!/bin/sh\necho never\n")).await;
        expect(&row, 111, 5);
        let text = row["error_msg"].as_str().expect("a text");
        assert!(
            text.contains("exec.allowed_script_dirs") || text.contains("\"..\""),
            "{dir}: {row}"
        );
        assert_eq!(row["screen"], "");
    }
    for untouched in ["bad/new", "bad/bk_b.sh", "good2/bk_b.sh", "good3", "bk_b.sh"] {
        assert!(!at(untouched).exists(), "{untouched}");
    }
    // A directory's share of the disk.
    let filler = format!("#!/bin/sh\n# {}\n", "x".repeat(700));
    expect(&done(&api, &body_at(&at("good"), "bk_c.sh", &filler)).await, 0, 2);
    let row = done(&api, &body_at(&at("good"), "bk_d.sh", &filler)).await;
    expect(&row, 111, 5);
    says(&row, "exec.max_script_dir_bytes");
    expect(&done(&api, &body_at(&at("good"), "bk_c.sh", &filler)).await, 0, 2);
}

#[tokio::test]
async fn room_on_the_disk() {
    let (site, _agent) = site(vec!["exec.min_free_disk_bytes=4611686018427387904".into()]).await;
    let row = site.api().run(AGENT, "root", "#!/bin/sh\necho never\n", 60).await;
    expect(&row, 111, 5);
    says(&row, "exec.min_free_disk_bytes");
    assert_eq!(row["screen"], "");
}

#[tokio::test]
async fn how_many_run_and_wait() {
    let (site, _agent) = site(vec![
        "exec.concurrency=1".into(),
        "exec.queue=1".into(),
        "exec.queue_wait_ms=1500".into(),
    ])
    .await;
    let api = site.api();
    let slow = "#!/bin/sh\necho begun\nsleep 4\n";
    let first = api.submit(&script_body(&[AGENT], "root", slow, 60)).await;
    gse_tests::eventually("it runs", MINUTE, || async {
        (api.rows(&first, &[AGENT]).await[0]["screen"] == "begun\n").then_some(())
    })
    .await;
    let second = api.submit(&script_body(&[AGENT], "root", slow, 60)).await;
    // The second one is counted as waiting once the agent has written it down.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let third = api.run(AGENT, "root", slow, 60).await;
    expect(&third, 121, 5);
    says(&third, "1 scripts run and 1 wait");
    let rows = api.finished(&second, &[AGENT], MINUTE).await;
    expect(&rows[0], 121, 5);
    says(&rows[0], "may wait");
    let rows = api.finished(&first, &[AGENT], MINUTE).await;
    expect(&rows[0], 0, 2);
}

#[tokio::test]
async fn two_scripts_under_one_name_do_not_take_each_others_file_away() {
    let (site, _agent) = site(vec!["exec.queue_wait_ms=4000".into()]).await;
    let api = site.api();
    let dir = site.path().join("scripts");
    // Each looks at its own file while it runs.
    let script = |word: &str, seconds: &str| format!("#!/bin/sh\nsleep {seconds}\ntail -n 1 \"$0\"\n# {word}\n");
    let mut tasks = Vec::new();
    for n in 0..8 {
        let body = body_at(&dir, "bk_gse_script_same.sh", &script(&format!("number {n}"), "0.1"));
        tasks.push((format!("# number {n}\n"), api.submit(&body).await));
    }
    for (screen, task) in tasks {
        let row = api.finished(&task, &[AGENT], MINUTE).await.remove(0);
        expect(&row, 0, 2);
        assert_eq!(row["screen"], screen.as_str());
    }
    // The same one twice needs no waiting.
    let body = body_at(&dir, "bk_gse_script_same.sh", &script("long", "6"));
    let started = Instant::now();
    let first = api.submit(&body).await;
    let twin = api.submit(&body).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    // Another one waits for as long as it may, and no longer.
    let row = done(&api, &body_at(&dir, "bk_gse_script_same.sh", "#!/bin/sh\necho other\n")).await;
    expect(&row, 121, 5);
    says(&row, "bk_gse_script_same.sh");
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    for task in [first, twin] {
        let row = api.finished(&task, &[AGENT], MINUTE).await.remove(0);
        expect(&row, 0, 2);
        assert_eq!(row["screen"], "# long\n");
    }
    assert!(started.elapsed() < Duration::from_secs(11), "{:?}", started.elapsed());
}

#[tokio::test]
async fn what_is_in_force_can_be_seen_and_mistakes_are_told() {
    let agent = gse_tests::process::binary("gse_agent").expect("the agent");
    let run = |args: &[&str]| {
        let done = std::process::Command::new(&agent).args(args).output().expect("it runs");
        let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        (done.status.success(), text)
    };
    let needed = [
        "--set",
        "servers=[\"a:1\"]",
        "--set",
        "tls.ca=a",
        "--set",
        "tls.cert=b",
        "--set",
        "tls.key=c",
    ];
    let with = |more: &[&str]| run(&[&needed[..], more].concat());
    let (_, shown) = with(&["--print-config", "--set", "exec.allowed_script_dirs=[\"/tmp/bkjob\"]"]);
    for key in [
        "allowed_accounts",
        "allowed_script_dirs",
        "max_script_bytes",
        "max_script_dir_bytes",
        "min_free_disk_bytes",
        "max_timeout_ms",
        "max_output",
        "concurrency",
        "queue",
        "control_groups",
    ] {
        assert!(shown.contains(key), "{key}: {shown}");
    }
    assert!(shown.contains("/tmp/bkjob"), "{shown}");
    for bad in ["[]", "[\"tmp\"]", "[\"/tmp/../etc\"]"] {
        let (fine, text) = with(&["--check", "--set", &format!("exec.allowed_script_dirs={bad}")]);
        assert!(!fine && text.contains("exec.allowed_script_dirs"), "{bad}: {text}");
    }
}
