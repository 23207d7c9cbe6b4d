//! Callers and scripts that nobody should write: nothing panics, hangs, grows, or is answered outside the envelope.

use std::time::{Duration, Instant};

use gse_tests::api::{EXT, expect};
use gse_tests::{Site, eventually, script_body};
use serde_json::{Value, json};

const AGENT: &str = "020000000242010a00002f17521298676503";
const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn bodies_nobody_should_send() {
    let (site, _agent) = Site::with_agent(AGENT).await;
    let task_api = site.task_api();
    let submit = format!("{EXT}/async_execute_script");
    let deep = "[".repeat(100_000);
    for api in [site.api(), task_api] {
        for body in [
            "",
            "null",
            "[]",
            "{}",
            "{",
            "\"x\"",
            "{\"agents\":",
            "{\"agents\":[]}",
            "{\"agents\":[{\"bk_agent_id\":5}]}",
            "{\"agents\":[{\"bk_agent_id\":\"a\"}],\"atomic_tasks\":[{\"atomic_task_id\":\"0\",\"command\":\"x\"}]}",
            &deep,
            "{\"agents\":[{\"bk_agent_id\":\"a\"}],\"atomic_tasks\":[{\"atomic_task_id\":0,\"command\":\"x\",\"timeout_seconds\":1e400}]}",
            "\u{0}\u{1}",
            "{\"agents\":[{\"bk_agent_id\":\"\\ud800\"}]}",
        ] {
            let reply = api.post_text(&submit, body).await;
            assert_ne!(reply["code"], 0, "{body:.80}: {reply}");
            assert_eq!(reply["data"], json!({"result": {}}), "{body:.80}");
        }
        // contract: v2-http-task#3
        for (path, data) in [
            (format!("{EXT}/get_execute_script_result"), json!({"result": []})),
            ("/api/v2/cluster/list_agent_info".to_owned(), json!([])),
        ] {
            let reply = api.post_text(&path, "{\"task_id\":\"no such task\"").await;
            assert_ne!(reply["code"], 0);
            assert_eq!(reply["data"], data);
        }
        let query = json!({"task_id": "GSETASK:S:20200101000000:0000000000000000", "agent_tasks": []});
        let reply = api.post(&format!("{EXT}/get_execute_script_result"), &query).await;
        assert_eq!(
            (reply["code"].as_i64(), &reply["data"]),
            (Some(1_000_116), &json!({"result": []}))
        );

        // Truncated, oversized, and not the method.
        let head = |method: &str, length: u64| {
            format!(
                "{method} {submit} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Bkapi-Authorization: \
                 {{\"bk_app_code\":\"bk_job\",\"bk_app_secret\":\"a-secret-of-the-tests\"}}\r\nContent-Length: {length}\r\n\r\n"
            )
        };
        for (method, length) in [("POST", 10_u64 << 30), ("GET", 2), ("PUT", 2)] {
            let answer = api.raw(format!("{}{{}}", head(method, length)).as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{method}: {answer}");
            assert!(
                answer.contains("\"code\":1000") && answer.contains("\"data\":{\"result\":{}}"),
                "{answer}"
            );
        }
        // Still alive and well.
        let row = api.run(AGENT, "root", "#!/bin/sh\necho alive\n", 60).await;
        assert_eq!(row["screen"], "alive\n");
    }
}

#[tokio::test]
async fn scripts_that_misbehave() {
    let (site, _agent) = Site::with_agent(AGENT).await;
    let api = site.api();
    let started = Instant::now();
    let scripts = [
        // Floods and never stops.
        "#!/bin/bash\nyes $'\\xff flood'\n",
        // Forks away, deaf to everything.
        "#!/bin/bash\ntrap '' TERM INT HUP\nfor i in 1 2 3; do (setsid bash -c 'trap \"\" TERM; while :; do sleep 1; done' &) ; done\nwhile :; do sleep 1; done\n",
        // Closes its output and hangs.
        "#!/bin/bash\nexec >&- 2>&-\nsleep 1000\n",
    ];
    let mut tasks = Vec::new();
    for script in scripts {
        tasks.push(api.submit(&script_body(&[AGENT], "nobody", script, 3)).await);
    }
    for task in &tasks {
        let rows = api.finished(task, &[AGENT], Duration::from_secs(40)).await;
        expect(&rows[0], 0, 3);
    }
    assert!(started.elapsed() < Duration::from_secs(40));
    // Nothing of them is left.
    eventually("every process of them is gone", Duration::from_secs(5), || async {
        let left = std::process::Command::new("pgrep")
            .args(["-u", "nobody", "-c", "-f", "while :|yes|sleep 1000"])
            .output()
            .unwrap();
        (String::from_utf8_lossy(&left.stdout).trim() == "0").then_some(())
    })
    .await;
    // A daemon that is left on purpose lives on, and does not hold up the row.
    let row = api
        .run(
            AGENT,
            "root",
            "#!/bin/bash\nnohup sleep 30 >/dev/null 2>&1 &\necho $!\n",
            60,
        )
        .await;
    expect(&row, 0, 2);
    let pid: i32 = row["screen"].as_str().unwrap().trim().parse().unwrap();
    assert!(
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None).is_ok(),
        "the daemon lives"
    );
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn slow_readers_hold_up_nobody() {
    let (site, _agent) = Site::with_agent(AGENT).await;
    let api = site.api();
    let mut body = script_body(
        &[AGENT],
        "root",
        "#!/bin/bash\nhead -c 6000000 /dev/zero | tr '\\0' x\n",
        60,
    );
    let command = body["atomic_tasks"][0]["command"].clone();
    body["atomic_tasks"] = (0..8)
        .map(|id| json!({"atomic_task_id": id, "command": command, "timeout_seconds": 60}))
        .collect();
    let task = api.submit(&body).await;
    let last = json!({"bk_agent_id": AGENT, "atomic_tasks": [{"atomic_task_id": 7, "offset": 5_000_000, "limit": 10}]});
    eventually("the last atomic task", MINUTE, || async {
        let row = api.query(&task, std::slice::from_ref(&last)).await.remove(0);
        (row["screen"] == "xxxxxxxxxx").then_some(())
    })
    .await;
    // Callers that ask for 40 MiB and never read it.
    let atomics: Vec<Value> = (0..8).map(|id| json!({"atomic_task_id": id, "offset": 0})).collect();
    let query = json!({"task_id": task, "agent_tasks": [{"bk_agent_id": AGENT, "atomic_tasks": atomics}]}).to_string();
    let mut silent = Vec::new();
    for _ in 0..6 {
        use tokio::io::AsyncWriteExt;
        let mut stream = tokio::net::TcpStream::connect(&api.address).await.unwrap();
        let head = format!(
            "POST {EXT}/get_execute_script_result HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\nX-Bkapi-Authorization: \
             {{\"bk_app_code\":\"bk_job\",\"bk_app_secret\":\"a-secret-of-the-tests\"}}\r\n\r\n",
            query.len()
        );
        stream.write_all(format!("{head}{query}").as_bytes()).await.unwrap();
        silent.push(stream);
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let started = Instant::now();
    let row = api.query(&task, &[last]).await.remove(0);
    assert_eq!(row["screen"], "xxxxxxxxxx");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}
