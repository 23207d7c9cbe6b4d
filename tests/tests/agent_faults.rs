//! An agent that dies while scripts run, scripts that do not want to end, and what a thousand runs leave behind: through a real server,
//! with the process table as the witness.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use gse_tests::{AgentOptions, Api, Child, Site, StoreKind, eventually, script_body};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const AGENT: &str = "020000000242010a00002f17521298676602";
const MINUTE: Duration = Duration::from_secs(60);

fn options(sets: &[&str]) -> AgentOptions {
    AgentOptions {
        sets: sets.iter().map(|set| (*set).to_owned()).collect(),
        ..AgentOptions::new(AGENT, "10.11.12.15")
    }
}

async fn site(sets: &[&str]) -> (Site, Child) {
    let site = Site::start(StoreKind::Embedded).await.expect("a site");
    let agent = site.spawn_agent(&options(sets), "").expect("an agent");
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

/// Processes whose command line holds `mark` and that are not dead, by id.
fn with(mark: &str) -> BTreeMap<i32, String> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").expect("the process table").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // What has ended meanwhile has no command line.
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(mark) && pid != std::process::id() as i32 {
            found.insert(pid, line);
        }
    }
    found
}

/// The runner processes of an agent of this site.
fn runners(site: &Site) -> BTreeMap<i32, String> {
    with(&format!("runner run {}", site.path().display()))
}

/// A number that no other process on this host sleeps for.
fn mark() -> String {
    format!("{}.{}", 100_000 + std::process::id(), rand::random::<u32>())
}

fn children(pid: i32) -> Vec<(i32, char)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("the process table").flatten() {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((_, rest)) = stat.rsplit_once(") ") else {
            continue;
        };
        let fields: Vec<&str> = rest.split(' ').collect();
        if fields[1] == pid.to_string() {
            let child = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse().ok())
                .expect("a number");
            found.push((child, fields[0].chars().next().expect("a state")));
        }
    }
    found
}

async fn screen_is(api: &Api, task: &str, screen: &str) {
    eventually(&format!("the screen is {screen:?}"), MINUTE, || async {
        (api.rows(task, &[AGENT]).await[0]["screen"] == screen).then_some(())
    })
    .await;
}

fn runs(file: &Path) -> usize {
    std::fs::read_to_string(file).map_or(0, |text| text.lines().count())
}

fn counting(file: &Path, rest: &str) -> String {
    format!("#!/bin/bash\necho run >> {}\necho begun\n{rest}\n", file.display())
}

// contract: reliability#F4
#[tokio::test]
async fn scripts_of_a_killed_agent_are_taken_over_by_the_next_one() {
    let (site, mut agent) = site(&["exec.kill_grace_ms=300"]).await;
    let api = site.api();
    let file = |name: &str| site.path().join(name);
    let mark = mark();
    let scripts = [
        // Goes on while nobody is there, and ends when the next agent is.
        (file("long"), "sleep 10; echo end; exit 7".to_owned(), 60),
        // Ends while nobody is there.
        (file("short"), "sleep 6; echo end; exit 8".to_owned(), 60),
        // Its time is over while nobody is there: nobody but its runner ends it.
        (
            file("limit"),
            format!("trap '' TERM; (setsid sleep {mark} &); while :; do sleep {mark}; done"),
            6,
        ),
        // Is asked to end while nobody is there.
        (
            file("stop"),
            format!("trap '' TERM; while :; do sleep 2{mark}; done"),
            600,
        ),
        // Loses its runner too.
        (
            file("lost"),
            format!("(setsid sleep 1{mark} >/dev/null 2>&1 &); sleep 1{mark}"),
            600,
        ),
    ];
    let mut tasks = Vec::new();
    for (file, rest, timeout) in &scripts {
        let task = api
            .submit(&script_body(&[AGENT], "root", &counting(file, rest), *timeout))
            .await;
        screen_is(&api, &task, "begun\n").await;
        tasks.push(task);
    }
    agent.kill_9();
    // Policy "adopt": every script lives on without the agent.
    assert_eq!(runners(&site).len(), scripts.len(), "{:?}", runners(&site));
    let lost = std::fs::read_dir(site.path().join(format!("agent-{}/exec/tasks", hex(AGENT))))
        .expect("the journal")
        .flatten()
        .map(|entry| entry.path())
        .find(|dir| {
            std::fs::read(dir.join("0.job"))
                .is_ok_and(|job| String::from_utf8_lossy(&job).contains(&format!("1{mark}")))
        })
        .expect("the entry of the one to lose");
    let runner = runners(&site)
        .into_iter()
        .find(|(_, line)| line.contains(lost.to_str().expect("plain")))
        .expect("its runner")
        .0;
    kill(Pid::from_raw(runner), Signal::SIGKILL).expect("kill");
    api.terminate(&tasks[3], &json!([])).await;
    let limit = mark.clone();
    eventually(
        "the time limit is kept without an agent",
        Duration::from_secs(10),
        || async { with(&format!("sleep {limit}")).is_empty().then_some(()) },
    )
    .await;

    // The first successor dies at once, as fast as it came.
    let mut second = site.spawn_agent(&options(&[]), "").expect("an agent");
    tokio::time::sleep(Duration::from_millis(700)).await;
    second.kill_9();
    let _third = site.spawn_agent(&options(&[]), "").expect("an agent");
    let mut rows = Vec::new();
    for task in &tasks {
        rows.push(api.finished(task, &[AGENT], MINUTE).await.remove(0));
    }
    for (row, exit) in [(&rows[0], 7), (&rows[1], 8)] {
        expect(row, 0, 5);
        assert_eq!(row["script_exit_code"], exit, "{row}");
        assert_eq!(row["screen"], "begun\nend\n");
    }
    expect(&rows[2], 0, 3);
    // Whether the server or the agent was first to close the row depends on how long the agent was away.
    let stopped = (rows[3]["error_code"].as_i64(), rows[3]["status"].as_i64());
    assert!(
        [(Some(126), Some(4)), (Some(117), Some(5))].contains(&stopped),
        "{}",
        rows[3]
    );
    expect(&rows[4], -1, 6);
    // Also of the one whose end nobody knows nothing is left, if the host has control groups; and nothing was run twice.
    for (file, ..) in &scripts {
        assert_eq!(runs(file), 1, "{}", file.display());
    }
    eventually("every runner has gone", Duration::from_secs(10), || async {
        runners(&site).is_empty().then_some(())
    })
    .await;
    assert_eq!(with(&format!("sleep 2{mark}")), BTreeMap::new());
    if control_groups() {
        assert_eq!(with(&format!("sleep 1{mark}")), BTreeMap::new());
    } else {
        for pid in with(&format!("sleep 1{mark}")).into_keys() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill");
        }
    }
}

fn hex(text: &str) -> String {
    text.bytes().map(|b| format!("{b:02x}")).collect()
}

/// Whether this host lets the agent make control groups.
fn control_groups() -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("the mounts");
    mounts.lines().any(|line| {
        let point = line.split(' ').nth(4).unwrap_or_default();
        line.contains(" - cgroup2 ") && {
            let probe = Path::new(point).join(format!("gse-agent-run-probe-{}", std::process::id()));
            let made = std::fs::create_dir(&probe).is_ok();
            // Only an empty directory; whether it could be made is the question.
            let _ = std::fs::remove_dir(&probe);
            made
        }
    })
}

// contract: reliability#F9
#[tokio::test]
async fn nothing_outlives_its_time() {
    const GRACE: Duration = Duration::from_millis(1000);
    for groups in ["true", "false"] {
        let (site, _agent) = site(&["exec.kill_grace_ms=1000", &format!("exec.control_groups={groups}")]).await;
        let api = site.api();
        let mark = mark();
        let deaf = format!("trap '' TERM INT HUP; while :; do sleep {mark}; done");
        let scripts = [
            // Forks away twice and leaves the session.
            format!(
                "(setsid bash -c \"(setsid bash -c \\\"{deaf}\\\" >/dev/null 2>&1 </dev/null &)\" &)\necho begun\n{deaf}"
            ),
            // Closes its output.
            format!("echo begun\nexec >&- 2>&-\n{deaf}"),
            // A grandchild holds the pipe, its parents are gone.
            format!("echo begun\n((setsid bash -c \"{deaf}\" &) &)\nsleep {mark}"),
            // Stops itself.
            format!("echo begun\n(sleep {mark} &)\nkill -STOP $$\nsleep {mark}"),
        ];
        for script in scripts {
            let task = api
                .submit(&script_body(&[AGENT], "nobody", &format!("#!/bin/bash\n{script}\n"), 2))
                .await;
            screen_is(&api, &task, "begun\n").await;
            let wanted = mark.clone();
            let limit = Instant::now() + Duration::from_secs(2);
            eventually("it runs", MINUTE, || async {
                (!with(&wanted).is_empty()).then_some(())
            })
            .await;
            while !with(&mark).is_empty() {
                assert!(
                    Instant::now() < limit + GRACE + Duration::from_secs(1),
                    "left after its time: {script}: {:?}",
                    with(&mark)
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let row = api.finished(&task, &[AGENT], MINUTE).await.remove(0);
            expect(&row, 0, 3);
            assert_eq!(row["screen"], "begun\n");
        }
    }
}

async fn many_runs(count: usize) {
    const AT_ONCE: usize = 25;
    let (site, agent) = site(&[]).await;
    let api = site.api();
    let kinds = [
        "echo x",
        "exit 3",
        "(sleep 0.05 &) ; echo x",
        "(setsid sleep 0.1 >/dev/null 2>&1 &) ; echo x",
        "exec >&- 2>&-; exit 0",
    ];
    let files = |pid: i32| std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the agent").count();
    let mut before = None;
    let mut ran = 0;
    while ran < count {
        let mut tasks = Vec::new();
        for n in 0..AT_ONCE {
            let script = format!("#!/bin/bash\n{}\n", kinds[n % kinds.len()]);
            tasks.push(api.submit(&script_body(&[AGENT], "root", &script, 60)).await);
        }
        for task in &tasks {
            api.finished(task, &[AGENT], MINUTE).await;
        }
        ran += AT_ONCE;
        // What the first ones leave open is what is open in any case.
        before.get_or_insert(files(agent.pid()));
    }
    eventually("every runner has gone", MINUTE, || async {
        runners(&site).is_empty().then_some(())
    })
    .await;
    eventually("no dead child is left", MINUTE, || async {
        children(agent.pid()).is_empty().then_some(())
    })
    .await;
    let after = files(agent.pid());
    let before = before.expect("at least one round");
    assert!(
        after <= before + 4,
        "{after} descriptors after {ran} runs, {before} after the first"
    );
}

// contract: reliability#F9
#[tokio::test]
async fn many_runs_leave_nothing_open() {
    many_runs(150).await;
}

// contract: reliability#F9
#[tokio::test]
#[ignore = "full tier: a thousand runs"]
async fn a_thousand_runs_leave_nothing_open() {
    many_runs(1000).await;
}
