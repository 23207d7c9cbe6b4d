//! What the application table and the audit trail promise, seen from outside: tasks of others, quotas, a trail that cannot be written,
//! and the trail read back.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use gse_tests::api::EXT;
use gse_tests::files::{push_body, transfer_body, transfer_task};
use gse_tests::process::binary;
use gse_tests::site::{APP, SECRET};
use gse_tests::{Api, Site, StoreKind, eventually, script_body};
use serde_json::{Value, json};
use sha2::Digest;

const AGENT: &str = "020000000242010a00002f17521298676501";
const MISSING: &str = "GSETASK:S:20200101000000:0123456789abcdef";

/// A site whose applications are the usual one and these: code and further lines of the table.
async fn site(apps: &[(&str, &str)]) -> Site {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    let file = site.path().join("apps.toml");
    let mut table = std::fs::read_to_string(&file).unwrap();
    let hash = hex::encode(sha2::Sha256::digest(SECRET.as_bytes()));
    for (code, lines) in apps {
        table.push_str(&format!(
            "\n[[app]]\ncode = \"{code}\"\nsecret_sha256 = \"{hash}\"\noperations = [\"*\"]\naccounts = [\"*\"]\ntargets = [\"*\"]\n{lines}\n"
        ));
    }
    std::fs::write(&file, table).unwrap();
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    site
}

/// Everything that can be asked about a task.
fn calls(task: &str) -> Vec<(String, Value)> {
    let query = json!({"task_id": task, "agent_tasks": [{"bk_agent_id": "away", "atomic_tasks": [{"atomic_task_id": 0, "offset": 0}]}]});
    vec![
        (format!("{EXT}/get_execute_script_result"), query),
        (
            "/api/v2/task/get_task_state".to_owned(),
            json!({"task_id": task, "agent_id_list": ["away"]}),
        ),
        (
            "/gse/v1/task/describe".to_owned(),
            json!({"task_id": task, "start": 0, "limit": 10}),
        ),
        (
            format!("{EXT}/async_terminate_execute_script"),
            json!({"task_id": task, "agents": [{"bk_agent_id": "away"}]}),
        ),
    ]
}

/// An answer without what may differ from call to call.
fn plain(mut reply: Value, task: &str) -> String {
    reply["request_id"] = Value::Null;
    reply.to_string().replace(task, "TASK")
}

fn audit_text(site: &Site, of: &str) -> String {
    std::fs::read_to_string(site.path().join(format!("{of}-audit.log"))).unwrap()
}

// contract: reliability#S2
#[tokio::test]
async fn a_task_of_another_application_looks_like_one_that_does_not_exist() {
    let site = site(&[
        ("nosy", ""),
        ("reader", "others_tasks = \"read\""),
        ("keeper", "others_tasks = \"all\""),
        // No name is a prefix of another's rights.
        ("bk_jo", ""),
        ("bk_job2", ""),
    ])
    .await;
    let task = site
        .api()
        .submit(&script_body(&["away"], "root", "#!/bin/sh\n", 60))
        .await;
    for front in [site.api().address, site.task_api().address] {
        let ask = async |app: &str, path: &str, body: &Value| Api::new(&front, app, SECRET).post(path, body).await;
        for ((path, body), (_, missing)) in calls(&task).iter().zip(calls(MISSING)) {
            let stops = path.contains("terminate");
            for app in ["nosy", "bk_jo", "bk_job2"] {
                let hidden = ask(app, path, body).await;
                assert_eq!(hidden["code"], 1_000_116, "{app} {path}: {hidden}");
                assert_eq!(
                    plain(hidden, &task),
                    plain(ask(app, path, &missing).await, MISSING),
                    "{app} {path}"
                );
            }
            let read = ask("reader", path, body).await;
            assert_eq!(read["code"], if stops { 1_000_116 } else { 0 }, "{path}: {read}");
            for app in [APP, "keeper"] {
                assert_eq!(ask(app, path, body).await["code"], 0, "{app} {path}");
            }
        }
    }
    // The trail tells what the caller is not told.
    let trail = audit_text(&site, "gse_task");
    assert!(trail.lines().any(|line| line.contains("\"app\":\"nosy\"")
        && line.contains(&task)
        && line.contains("\"decision\":\"refused\"")
        && line.contains("belongs to another application")));
}

#[tokio::test]
async fn quotas_of_an_application() {
    let site = site(&[("few", "max_running_tasks = 2"), ("slow", "max_targets_per_minute = 5")]).await;
    let _agent = site.agent(AGENT, "10.1.1.1").await.unwrap();
    let submit = format!("{EXT}/async_execute_script");
    let few = Api::new(&site.api().address, "few", SECRET);
    let sleep = script_body(&[AGENT], "root", "#!/bin/sh\nsleep 50\n", 60);
    let first = few.submit(&sleep).await;
    let second = few.submit(&sleep).await;
    for _ in 0..3 {
        let reply = few.post(&submit, &sleep).await;
        assert_eq!(reply["code"], 1_000_121, "{reply}");
        assert_eq!(reply["data"], json!({"result": {}}));
        let text = reply["message"].as_str().unwrap();
        assert!(
            text.contains("max_running_tasks") && text.contains("2 tasks under way") && text.contains("try again"),
            "{text}"
        );
    }
    // Others are not held up by it.
    let row = site.api().run(AGENT, "root", "#!/bin/sh\necho others\n", 60).await;
    assert_eq!(row["screen"], "others\n");
    // A place is free as soon as a task has ended, and only that one.
    few.terminate(&first, &json!([])).await;
    let third = eventually("a place is free", Duration::from_secs(15), || async {
        let reply = few.post(&submit, &sleep).await;
        (reply["code"] == 0).then(|| reply["data"]["result"]["task_id"].as_str().unwrap().to_owned())
    })
    .await;
    assert_eq!(few.post(&submit, &sleep).await["code"], 1_000_121);
    for task in [&second, &third] {
        few.terminate(task, &json!([])).await;
    }

    let slow = Api::new(&site.api().address, "slow", SECRET);
    let to = |count: usize| {
        let names: Vec<String> = (0..count).map(|n| format!("away-{n}")).collect();
        script_body(
            &names.iter().map(String::as_str).collect::<Vec<_>>(),
            "root",
            "#!/bin/sh\n",
            60,
        )
    };
    let reply = slow.post(&submit, &to(6)).await;
    assert_eq!(reply["code"], 1_000_121, "{reply}");
    assert!(
        reply["message"].as_str().unwrap().contains("this call alone has 6"),
        "{reply}"
    );
    // Whatever minute it is when this runs, the sixth target within one is refused.
    let mut refused = None;
    for _ in 0..3 {
        slow.submit(&to(2)).await;
        let reply = slow.post(&submit, &to(4)).await;
        if reply["code"] != 0 {
            refused = Some(reply);
            break;
        }
    }
    let refused = refused.expect("six targets in a minute are refused");
    assert_eq!(refused["code"], 1_000_121, "{refused}");
    let text = refused["message"].as_str().unwrap();
    assert!(
        text.contains("max_targets_per_minute") && text.contains("try again in "),
        "{text}"
    );
    let trail = audit_text(&site, "gse_task");
    for quota in ["max_running_tasks", "max_targets_per_minute"] {
        let told = trail
            .lines()
            .any(|line| line.contains(quota) && line.contains("\"decision\":\"refused\""));
        assert!(told, "no audit line about {quota}");
    }
    let figures = gse_tests::metrics::Figures::of(site.task.as_ref().unwrap())
        .await
        .unwrap();
    let lines: Vec<&str> = figures.lines("gse_task_quota_refused_total").collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
}

/// A file system of 64 KiB; gone when dropped.
struct Tiny(PathBuf);

impl Tiny {
    fn mount(at: PathBuf) -> Self {
        std::fs::create_dir(&at).unwrap();
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
            .arg(&at)
            .status()
            .unwrap();
        assert!(done.success(), "a tmpfs can be mounted");
        Tiny(at)
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        // Whatever the outcome, nothing else can be done about it here.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

// The audit trail: S14 of docs/contract/reliability.md
#[tokio::test]
async fn what_cannot_be_written_down_is_not_done() {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    let tiny = Tiny::mount(site.path().join("tiny"));
    let trail = tiny.0.join("audit.jsonl");
    site.task_sets.push(format!("audit.file={}", trail.display()));
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    let _agent = site.agent(AGENT, "10.1.1.1").await.unwrap();
    let api = site.api();
    let mark = site.path().join("mark");
    let script = |word: &str| {
        let text = format!("#!/bin/sh\necho {word} >> {}\n", mark.display());
        script_body(&[AGENT], "root", &text, 60)
    };
    let filler = tiny.0.join("filler");
    let submit = format!("{EXT}/async_execute_script");
    let task = api.submit(&script("before")).await;
    api.finished(&task, &[AGENT], Duration::from_secs(20)).await;
    // Fails half-way: the space ends within a line.
    let _ = std::fs::write(&filler, vec![0; 1 << 20]);
    let mut refused = 0;
    for _ in 0..200 {
        let reply = api.post(&submit, &script("full")).await;
        if reply["code"] != 0 {
            assert_eq!(reply["code"], 1_000_101, "{reply}");
            assert!(reply["message"].as_str().unwrap().contains("audit"), "{reply}");
            refused += 1;
            if refused == 3 {
                break;
            }
        }
    }
    assert_eq!(refused, 3, "the trail is full and calls are taken all the same");
    let written = || gse_core::audit::verify_all(&trail).unwrap().lines;
    // What was taken was written down, nothing else ran.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let ran = std::fs::read_to_string(&mark).unwrap().lines().count() as u64;
    assert!(ran <= written(), "{ran} ran and {} were written down", written());
    std::fs::remove_file(&filler).unwrap();
    let task = api.submit(&script("after")).await;
    api.finished(&task, &[AGENT], Duration::from_secs(20)).await;
    assert!(std::fs::read_to_string(&mark).unwrap().ends_with("after\n"));
    assert!(written() > ran, "the chain goes on");
    drop(site);
    drop(tiny);
}

fn gse(args: &[&str], paths: &[&Path]) -> (i32, String, String) {
    let done = Command::new(binary("gse").unwrap())
        .arg("audit")
        .args(args)
        .args(paths)
        .env("TZ", "UTC")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (done.status.code().unwrap(), text(done.stdout), text(done.stderr))
}

// The audit trail: S14 of docs/contract/reliability.md
#[tokio::test]
async fn the_trail_is_read_and_checked() {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    // Small files, so that some are put aside.
    site.task_sets.push("audit.max_file_bytes=3000".into());
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    let api = site.api();
    for n in 0..20 {
        let target = format!("host-{n}");
        api.submit(&script_body(&[&target], "root", "#!/bin/sh\n", 60)).await;
    }
    let wrong = Api::new(&api.address, APP, "not the secret");
    let reply = wrong
        .post(
            &format!("{EXT}/async_execute_script"),
            &script_body(&["x"], "root", "", 1),
        )
        .await;
    assert_eq!(reply["code"], 1_000_901);

    let (status, out, err) = gse(&["verify"], &[site.path()]);
    assert_eq!(status, 0, "{out}{err}");
    assert!(
        out.contains("gse_task-audit.log: in order, 20 lines, number 1 to 20"),
        "{out}"
    );
    assert!(out.contains("api-audit.log: in order"), "{out}");

    let (status, out, _) = gse(&[], &[site.path()]);
    assert_eq!(status, 0);
    assert!(out.lines().next().unwrap().starts_with("TIME"), "{out}");
    assert!(out.contains("host-19") && out.contains("UNAUTHENTICATED"), "{out}");
    let (_, out, _) = gse(&["--agent", "host-7", "-o", "json"], &[site.path()]);
    let lines: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 1, "{out}");
    assert_eq!(lines[0]["first_targets"], json!(["host-7"]));
    let task = lines[0]["task_id"].as_str().unwrap();
    for (args, count) in [
        (vec!["--task", task], 1),
        (vec!["--refused"], 1),
        (vec!["--refused", "--app", "bk_small"], 0),
        (vec!["--operation", "script.execute", "--since", "1h"], 21),
        (vec!["--operation", "script"], 0),
        (vec!["--until", "1h"], 0),
        (vec!["--last", "4"], 4),
    ] {
        let (status, out, err) = gse(&[&args[..], &["-o", "json"]].concat(), &[site.path()]);
        assert_eq!((status, out.lines().count()), (0, count), "{args:?}: {out}{err}");
    }

    // One that looks on sees what comes, through files that are put aside.
    let seen = site.path().join("seen.txt");
    let mut follow = Command::new(binary("gse").unwrap())
        .args(["audit", "--follow", "--app", APP, "--last", "1", "-o", "json"])
        .arg(site.path().join("gse_task-audit.log"))
        .stdout(std::fs::File::create(&seen).unwrap())
        .spawn()
        .unwrap();
    eventually("the last line is shown", Duration::from_secs(10), || async {
        (std::fs::read_to_string(&seen).unwrap().lines().count() == 1).then_some(())
    })
    .await;
    for n in 20..35 {
        let target = format!("host-{n}");
        api.submit(&script_body(&[&target], "root", "#!/bin/sh\n", 60)).await;
    }
    eventually("new lines are shown", Duration::from_secs(10), || async {
        (std::fs::read_to_string(&seen).unwrap().lines().count() == 16).then_some(())
    })
    .await;
    follow.kill().unwrap();
    follow.wait().unwrap();

    // A line changed in a file that was put aside, and a file taken away: found, and told where.
    let copy = site.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(site.path()).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().to_string_lossy().starts_with("gse_task-audit.log") {
            std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
            files.push(copy.join(entry.file_name()));
        }
    }
    files.sort();
    assert!(files.len() > 3, "{files:?}");
    // The current file sorts first, the oldest put aside is next.
    let victim = &files[2];
    let good = std::fs::read_to_string(victim).unwrap();
    let changed = good.replacen("\"accounts\":[\"root\"]", "\"accounts\":[\"nobody\"]", 1);
    assert_ne!(good, changed);
    std::fs::write(victim, changed).unwrap();
    let (status, out, _) = gse(&["verify"], &[&copy]);
    assert_eq!(status, 1, "{out}");
    let place = format!("{} line 1: its hash is wrong", victim.display());
    assert!(out.contains("BROKEN") && out.contains(&place), "{out}");
    std::fs::remove_file(victim).unwrap();
    let (status, out, _) = gse(&["verify"], &[&copy]);
    assert_eq!(status, 1);
    assert!(
        out.contains(&format!("{} line 1: ", files[3].display())) && out.contains("lines are missing"),
        "{out}"
    );
    let (status, _, err) = gse(&["verify"], &[&site.path().join("certs")]);
    assert_eq!(status, 2, "{err}");
    assert!(err.contains("holds no audit trail"), "{err}");
}

// contract: reliability#S9
#[tokio::test]
async fn quotas_hold_for_files_and_scripts_together() {
    let mut site = site(&[("few", "max_running_tasks = 2"), ("slow", "max_targets_per_minute = 5")]).await;
    site.start_btsvr(1).await.unwrap();
    let _agent = site.file_agent(AGENT, "10.1.1.1", &[]).await.unwrap();
    let other = "020000000242010a00002f17521298676502";
    let _other = site.file_agent(other, "10.1.1.2", &[]).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_str().unwrap();
    std::fs::write(dir.path().join("large"), vec![7; 60 << 20]).unwrap();
    let task = transfer_task(AGENT, at, "large", &[other], &format!("{at}/to"));
    let mut long = transfer_body(&[task], 60);
    long["download_speed"] = json!(1);
    let transfer = format!("{EXT}/async_transfer_file");

    let few = Api::new(&site.api().address, "few", SECRET);
    eventually("gse_api knows gse_btsvr", Duration::from_secs(15), || async {
        let reply = few.post(&transfer, &json!({})).await;
        (reply["code"] != 1_000_915).then_some(())
    })
    .await;
    let script = script_body(&[AGENT], "root", "#!/bin/sh\nsleep 50\n", 60);
    let first = few.submit(&script).await;
    let second = few.submit_files("async_transfer_file", &long).await;
    // Each kind finds the other's tasks counted.
    for (call, body) in [("async_transfer_file", &long), ("async_execute_script", &script)] {
        let reply = few.post(&format!("{EXT}/{call}"), body).await;
        assert_eq!(reply["code"], 1_000_121, "{reply}");
        let text = reply["message"].as_str().unwrap();
        assert!(
            text.contains("max_running_tasks") && text.contains("2 tasks under way"),
            "{text}"
        );
    }
    // The end of a file task frees its place.
    few.terminate_files(&second, &json!([])).await;
    let third = eventually("a place is free", Duration::from_secs(15), || async {
        let reply = few.post(&transfer, &long).await;
        (reply["code"] == 0).then(|| reply["data"]["result"]["task_id"].as_str().unwrap().to_owned())
    })
    .await;
    assert_eq!(few.post(&transfer, &long).await["code"], 1_000_121);
    few.terminate(&first, &json!([])).await;
    few.terminate_files(&third, &json!([])).await;

    let slow = Api::new(&site.api().address, "slow", SECRET);
    let push = format!("{EXT}/async_push_file");
    let to = |count: usize| {
        let names: Vec<String> = (0..count).map(|n| format!("away-{n}")).collect();
        push_body(&names.iter().map(String::as_str).collect::<Vec<_>>(), at, "small", "x")
    };
    let reply = slow.post(&push, &to(6)).await;
    assert_eq!(reply["code"], 1_000_121, "{reply}");
    assert!(
        reply["message"].as_str().unwrap().contains("this call alone has 6"),
        "{reply}"
    );
    let mut refused = false;
    for _ in 0..3 {
        slow.submit_files("async_push_file", &to(2)).await;
        let reply = slow.post(&push, &to(4)).await;
        // A minute may end between the two.
        refused = reply["code"] == 1_000_121;
        if refused {
            break;
        }
    }
    assert!(refused, "six targets in a minute are refused");
    let trail = audit_text(&site, "gse_btsvr-1");
    for quota in ["max_running_tasks", "max_targets_per_minute"] {
        let told = trail
            .lines()
            .any(|line| line.contains(quota) && line.contains("\"decision\":\"refused\""));
        assert!(told, "no audit line about {quota}");
    }
    let figures = gse_tests::metrics::Figures::of(&site.btsvr[&1]).await.unwrap();
    let lines: Vec<&str> = figures.lines("gse_btsvr_quota_refused_total").collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
}
