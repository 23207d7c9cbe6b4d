//! `gse up` and everything that can be done with it, through the real binary.

#![allow(clippy::unwrap_used)]

mod common;

use std::process::Stdio;

use common::{Done, Up, eventually, finish, gse, processes_of, soon};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};

const NOBODY: &str = "0:198.51.100.1";

fn json(done: &Done) -> Value {
    assert_eq!(done.code, Some(0), "{done:?}");
    serde_json::from_str(&done.out).unwrap()
}

async fn is_connected(up: &Up) -> Option<()> {
    let agents = up.gse(&["agents", "--online", "--output", "json"]).await;
    let agents: Value = serde_json::from_str(&agents.out).ok()?;
    agents
        .as_array()?
        .iter()
        .any(|agent| agent["bk_agent_id"] == up.agent_id().as_str())
        .then_some(())
}

#[tokio::test(flavor = "multi_thread")]
async fn from_nothing_to_a_script_that_ran() {
    let temp = tempfile::tempdir().unwrap();
    let data = temp.path().join("data");
    let up = Up::start(&data).await;
    let id = up.agent_id();
    assert!(up.text.contains(&id) && up.text.contains("connected"), "{}", up.text);

    let agents = json(&up.gse(&["agents", "--output", "json"]).await);
    assert_eq!(agents.as_array().unwrap().len(), 1);
    assert_eq!(
        (&agents[0]["bk_agent_id"], &agents[0]["status_code"]),
        (&Value::from(id.clone()), &Value::from(2))
    );
    let table = up.gse(&["agents"]).await;
    assert!(
        table.out.contains(&id) && table.out.contains("running") && table.out.contains("linux"),
        "{}",
        table.out
    );
    let detail = up.gse(&["agents", &id]).await;
    assert!(
        detail.out.contains(&id) && detail.out.contains("last seen"),
        "{}",
        detail.out
    );
    let stranger = up.gse(&["agents", NOBODY]).await;
    assert_eq!(stranger.code, Some(2));
    assert!(stranger.err.contains(NOBODY), "{}", stranger.err);

    let uname = std::process::Command::new("uname").arg("-a").output().unwrap().stdout;
    let ran = up.gse(&["run", "uname -a"]).await;
    assert_eq!(
        (ran.code, ran.out.as_bytes()),
        (Some(0), uname.as_slice()),
        "{}",
        ran.err
    );
    assert_eq!(ran.err, "");

    // contract: v2-http-task#14, v2-http-task#15
    let failed = up.gse(&["run", "-t", &id, "echo before; exit 7"]).await;
    assert_eq!(
        (failed.code, failed.out.as_str()),
        (Some(7), "before\n"),
        "{}",
        failed.err
    );
    assert!(failed.err.contains("exit code 7"), "{}", failed.err);

    let script = temp.path().join("args.sh");
    std::fs::write(&script, "printf '%s|' \"$@\"\nid -un\n").unwrap();
    let ran = up
        .gse(&["run", "--script", script.to_str().unwrap(), "a b", "it's", "-x"])
        .await;
    assert!(ran.out.starts_with("a b|it's|-x|") && ran.code == Some(0), "{ran:?}");

    // contract: v2-http-task#16
    let late = up.gse(&["run", "--timeout", "1s", "sleep 30"]).await;
    assert_eq!(late.code, Some(124), "{late:?}");

    // contract: v2-http-task#19
    let both = up.gse(&["run", "-t", &format!("{id},{NOBODY}"), "echo here"]).await;
    assert_eq!(both.code, Some(1), "{both:?}");
    assert!(
        both.out
            .contains(&format!("---------------\n{id}\n---------------\nhere\n")),
        "{}",
        both.out
    );
    assert!(
        both.err.contains(&format!("{id}: here")) && both.err.contains("117"),
        "{}",
        both.err
    );
    assert!(both.err.contains("1 of 2 targets succeeded, 1 failed"), "{}", both.err);

    let report = up
        .gse(&["run", "--output", "json", "-t", &id, "printf 'h\\303\\251'; exit 3"])
        .await;
    assert_eq!(report.code, Some(3), "{report:?}");
    let report: Value = serde_json::from_str(&report.out).unwrap();
    assert_eq!(report["results"][0]["exit_code"], 3);
    assert_eq!(report["results"][0]["output"], "hé");
    assert!(
        report["results"][0]["start_time"].as_u64().unwrap() > 1_600_000_000_000,
        "milliseconds: {report}"
    );

    assert_eq!(up.stop().await.code(), Some(0));
    assert_eq!(processes_of(&data), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_can_be_left_looked_at_and_stopped() {
    let temp = tempfile::tempdir().unwrap();
    let up = Up::start(temp.path()).await;
    let left = up.gse(&["run", "--detach", "echo started; sleep 300"]).await;
    assert_eq!(left.code, Some(0), "{left:?}");
    let task = left.out.trim().to_owned();
    eventually("the output of a running task", async || {
        let seen = up.gse(&["task", &task]).await;
        (seen.out.contains("1 running") && seen.out.contains("started\n")).then_some(())
    })
    .await;

    // contract: v2-http-task#17, v2-http-task#18
    for _ in 0..2 {
        let stopped = up.gse(&["stop", &task]).await;
        assert_eq!(stopped.code, Some(0), "{stopped:?}");
    }
    let end = eventually("the end of a stopped task", async || {
        let seen = json(&up.gse(&["task", &task, "--output", "json"]).await);
        let row = seen["atomic_tasks"]["0"]["results"][0].clone();
        (row["state"] != "running").then_some(row)
    })
    .await;
    assert_eq!(
        (&end["state"], &end["error_code"]),
        (&Value::from("stopped"), &Value::from(126)),
        "{end}"
    );
    assert_eq!(end["output"], "started\n");
    assert_eq!(
        up.gse(&["stop", &task]).await.code,
        Some(0),
        "a task that has ended is stopped already"
    );

    let unknown = up.gse(&["task", "GSETASK:S:20200101000000:0000000000000000"]).await;
    assert_eq!(unknown.code, Some(2));
    assert!(unknown.err.contains("1000116"), "{}", unknown.err);
    assert_eq!(up.gse(&["stop", "no such id"]).await.code, Some(2));
    assert_eq!(up.stop().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_stops_the_task_and_a_second_one_leaves() {
    let temp = tempfile::tempdir().unwrap();
    let up = Up::start(temp.path()).await;
    let agent = Pid::from_raw(up.agent_pid().unwrap());
    for agent_answers in [true, false] {
        let mut command = gse(temp.path());
        command
            .args(["run", "echo here; sleep 300"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut run = command.spawn().unwrap();
        let interrupt = Pid::from_raw(run.id().unwrap().try_into().unwrap());
        let mut out = BufReader::new(run.stdout.take().unwrap()).lines();
        let mut err = BufReader::new(run.stderr.take().unwrap()).lines();
        assert_eq!(soon(out.next_line()).await.unwrap().unwrap(), "here");
        if !agent_answers {
            kill(agent, Signal::SIGSTOP).unwrap();
        }
        kill(interrupt, Signal::SIGINT).unwrap();
        let said = soon(err.next_line()).await.unwrap().unwrap();
        assert!(said.contains("stopping the task"), "{said}");
        if !agent_answers {
            kill(interrupt, Signal::SIGINT).unwrap();
        }
        let last = soon(err.next_line()).await.unwrap().unwrap();
        let code = soon(run.wait()).await.unwrap().code();
        if agent_answers {
            assert_eq!(code, Some(1));
            assert!(last.contains("stopped on request"), "{last}");
        } else {
            kill(agent, Signal::SIGCONT).unwrap();
            assert_eq!(code, Some(130));
            assert!(last.contains("the task goes on"), "{last}");
        }
    }
    assert_eq!(up.stop().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_at_a_time_and_the_same_again() {
    let temp = tempfile::tempdir().unwrap();
    let first = Up::start(temp.path()).await;
    let id = first.agent_id();
    let secret = |up: &Up| {
        std::fs::read_to_string(up.data.join("cli.toml"))
            .unwrap()
            .parse::<toml::Table>()
            .unwrap()["secret"]
            .clone()
    };
    let made = secret(&first);
    assert!(first.text.contains(made.as_str().unwrap()), "the secret is shown once");

    let second = finish(gse(temp.path()).args(["up", "--any-port"])).await;
    assert_eq!((second.code, second.err.lines().count()), (Some(1), 1), "{second:?}");
    assert!(second.err.contains("another gse up"), "{}", second.err);

    let wrong = finish(gse(temp.path()).args(["agents"]).env("GSE_APP_SECRET", "wrong")).await;
    assert_eq!((wrong.code, wrong.err.lines().count()), (Some(2), 1), "{wrong:?}");
    assert!(wrong.err.contains("1000901"), "{}", wrong.err);

    let task = first.gse(&["run", "--output", "json", "echo kept"]).await;
    let task = json(&task)["task_id"].as_str().unwrap().to_owned();
    first.signal(Signal::SIGINT);
    assert_eq!(first.ended().await.code(), Some(0));
    let gone = finish(gse(temp.path()).args(["agents"])).await;
    assert_eq!((gone.code, gone.err.lines().count()), (Some(2), 1), "{gone:?}");
    assert!(gone.err.contains("gse up"), "{}", gone.err);

    let again = Up::start(temp.path()).await;
    assert_eq!((again.agent_id(), secret(&again)), (id, made.clone()));
    assert!(
        !again.text.contains(made.as_str().unwrap()),
        "the secret is shown only once"
    );
    let kept = again.gse(&["task", &task]).await;
    assert!(
        kept.out.contains("kept\n") && kept.out.contains("1 succeeded"),
        "{kept:?}"
    );
    assert_eq!(again.stop().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_comes_back_and_one_left_behind_is_replaced() {
    let temp = tempfile::tempdir().unwrap();
    let up = Up::start(temp.path()).await;
    let pid = up.agent_pid().unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let next = eventually("another agent", async || up.agent_pid().filter(|next| *next != pid)).await;
    eventually("its session", async || is_connected(&up).await).await;
    assert_eq!(up.gse(&["run", "true"]).await.code, Some(0));

    up.signal(Signal::SIGKILL);
    up.ended().await;
    assert!(
        !processes_of(temp.path()).is_empty(),
        "the agent goes on without its servers"
    );
    let up = Up::start(temp.path()).await;
    let agents = processes_of(temp.path())
        .iter()
        .filter(|line| line.contains(" agent "))
        .count();
    assert_eq!(agents, 1, "{:?}", processes_of(temp.path()));
    assert_ne!(up.agent_pid(), Some(next));
    eventually("its session", async || is_connected(&up).await).await;
    assert_eq!(up.gse(&["run", "echo again"]).await.out, "again\n");
    assert_eq!(up.stop().await.code(), Some(0));
    assert_eq!(processes_of(temp.path()), Vec::<String>::new());
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let temp = tempfile::tempdir().unwrap();
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = held.local_addr().unwrap();
    let refused = finish(gse(temp.path()).args(["up", "--port-base", &taken.port().to_string()])).await;
    assert_eq!((refused.code, refused.err.lines().count()), (Some(1), 1), "{refused:?}");
    assert!(
        refused.err.contains(&taken.to_string()) && refused.err.contains("--any-port"),
        "{}",
        refused.err
    );
}

#[tokio::test]
async fn without_servers_there_is_one_clear_line() {
    let temp = tempfile::tempdir().unwrap();
    for args in [&["agents"][..], &["run", "true"], &["task", "t"], &["stop", "t"]] {
        let done = finish(gse(temp.path()).args(args)).await;
        assert_eq!(
            (done.code, done.err.lines().count()),
            (Some(2), 1),
            "{args:?}: {done:?}"
        );
        assert!(
            done.err.contains("cli.toml") && done.err.contains("gse up"),
            "{}",
            done.err
        );
    }
    let usage = finish(gse(temp.path()).args(["run", "--timeout", "soon", "true"])).await;
    assert_eq!(usage.code, Some(2));
}
