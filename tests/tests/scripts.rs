//! Script tasks as bk-job, bscp and nodemgr see them: every situation of the contract's table, through gse_api, gse_task, a real
//! agent and the store that is built in.

use std::time::{Duration, Instant};

use gse_tests::api::{EXT, expect};
use gse_tests::{Site, eventually, script_body};
use serde_json::{Value, json};

const AGENT: &str = "020000000242010a00002f17521298676503";
const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn the_answers_for_every_situation() {
    let (site, _agent) = Site::with_agent(AGENT).await;
    let api = site.api();

    // contract: v2-http-task#1, v2-http-task#14, v2-http-task#23
    let before = gse_ms();
    let row = api
        .run(AGENT, "root", "#!/bin/bash\necho out; echo err >&2\n", 60)
        .await;
    expect(&row, 0, 2);
    assert_eq!(row["screen"], "out\nerr\n");
    let (start, end) = (row["start_time"].as_u64().unwrap(), row["end_time"].as_u64().unwrap());
    assert!(
        before <= start + 1000 && start <= end && end <= gse_ms() + 1000,
        "{row}"
    );

    // contract: v2-http-task#15
    let row = api.run(AGENT, "root", "#!/bin/bash\necho no; exit 42\n", 60).await;
    expect(&row, 0, 5);
    assert_eq!(
        (row["script_exit_code"].as_i64(), row["screen"].as_str()),
        (Some(42), Some("no\n"))
    );

    // contract: v2-http-task#16
    let started = Instant::now();
    let row = api
        .run(
            AGENT,
            "root",
            "#!/bin/bash\ntrap '' TERM\necho waiting; while true; do sleep 1; done\n",
            1,
        )
        .await;
    assert!(started.elapsed() < Duration::from_secs(20));
    expect(&row, 0, 3);
    assert_ne!(row["script_exit_code"], 0);
    assert_eq!(row["screen"], "waiting\n");

    // No such account, not the script's fault.
    let row = api.run(AGENT, "no-such-account", "#!/bin/bash\ntrue\n", 60).await;
    expect(&row, 122, 5);
    assert!(row["error_msg"].as_str().unwrap().contains("no-such-account"), "{row}");

    // Markers for the platform.
    let row = api
        .run(
            AGENT,
            "root",
            "#!/bin/bash\necho 'job_success:[first]'; echo 'job_success:[the tag]'\n",
            60,
        )
        .await;
    assert_eq!(row["tag"], "the tag");

    // A time-out of 0 is the configured maximum, not none and not at once.
    let row = api.run(AGENT, "root", "#!/bin/bash\necho fine\n", 0).await;
    expect(&row, 0, 2);
}

fn gse_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("a clock after 1970")
        .as_millis() as u64
}

#[tokio::test]
async fn rows_are_there_before_the_submit_returns() {
    let (site, _agent) = Site::with_agent(AGENT).await;
    let api = site.api();
    for _ in 0..20 {
        let task = api
            .submit(&script_body(
                &[AGENT, "0:10.11.12.13"],
                "root",
                "#!/bin/sh\nsleep 0.3; echo x\n",
                60,
            ))
            .await;
        // contract: v2-http-task#8, v2-http-task#10, v2-http-task#24
        let rows = api.rows(&task, &[AGENT, "0:10.11.12.13"]).await;
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0]["bk_agent_id"], AGENT);
        assert_eq!(rows[1]["bk_agent_id"], "0:10.11.12.13");
        for row in &rows {
            assert_eq!(row["error_code"], 115, "{row}");
        }
        let rows = api.finished(&task, &[AGENT, "0:10.11.12.13"], MINUTE).await;
        assert!(rows.iter().all(|row| row["status"] == 2), "{rows:?}");
    }
}

#[tokio::test]
async fn bad_targets_are_rows_and_spoil_nobody() {
    let (site, _agent) = Site::with_agent(AGENT).await;
    let api = site.api();
    let mut body = script_body(
        &[AGENT, "no-such-agent", "7:1.2.3.4", ""],
        "root",
        "#!/bin/sh\necho ok\n",
        60,
    );
    let agents = body["agents"].as_array_mut().unwrap();
    agents.push(json!({"bk_agent_id": AGENT, "bk_container_id": "deadbeef", "user": "root"}));
    agents.push(json!({"bk_agent_id": "with-password", "user": "Administrator", "pwd": "encrypted"}));
    let started = Instant::now();
    let task = api.submit(&body).await;
    let asked: Vec<Value> = body["agents"]
        .as_array()
        .unwrap()
        .iter()
        .map(|agent| {
            json!({"bk_agent_id": agent["bk_agent_id"], "bk_container_id": agent.get("bk_container_id"),
                   "atomic_tasks": [{"atomic_task_id": 0, "offset": 0, "limit": 0}]})
        })
        .collect();
    let rows = loop {
        let rows = api.query(&task, &asked).await;
        if rows.iter().all(|row| row["error_code"] != 115) {
            break rows;
        }
        assert!(started.elapsed() < Duration::from_secs(10), "{rows:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    // contract: v2-http-task#11, v2-http-task#19
    assert!(
        started.elapsed() < Duration::from_secs(3),
        "unknown agents are told within two seconds"
    );
    let codes: Vec<i64> = rows.iter().map(|row| row["error_code"].as_i64().unwrap()).collect();
    assert_eq!(codes, [0, 117, 117, 117, 106, 1326]);
    for row in &rows[1..] {
        assert_eq!(row["status"], 5);
        assert!(!row["error_msg"].as_str().unwrap().is_empty());
    }
    assert_eq!(rows[0]["bk_container_id"], "");
    assert_eq!(rows[4]["bk_container_id"], "deadbeef");

    // contract: v2-http-task#57, procmgr-agent-lifecycle#60
    let state = api
        .post(
            "/api/v2/task/get_task_state",
            &json!({"task_id": task, "agent_id_list": []}),
        )
        .await;
    let result = &state["data"]["result"];
    assert_eq!(result["state"], "failed");
    for list in [
        "successed_agents",
        "timeout_agents",
        "failed_agents",
        "pending_agents",
        "offline_agents",
        "restarted_agents",
    ] {
        assert!(result[list].is_array(), "{list}");
    }
    assert_eq!(result["successed_agents"], json!([AGENT]));
    assert_eq!(result["offline_agents"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn termination() {
    let (site, _agent) = Site::with_agent(AGENT).await;
    let api = site.api();
    let script =
        "#!/bin/bash\ntrap '' TERM HUP INT\necho started\nsetsid bash -c 'trap \"\" TERM; sleep 1000' &\nsleep 1000\n";
    let task = api.submit(&script_body(&[AGENT], "root", script, 600)).await;
    eventually("the script runs", MINUTE, || async {
        let rows = api.rows(&task, &[AGENT]).await;
        (rows[0]["screen"] == "started\n").then_some(())
    })
    .await;
    let state = api.post("/api/v2/task/get_task_state", &json!({"task_id": task})).await;
    assert_eq!(state["data"]["result"]["state"], "executing");
    // contract: v2-http-task#17, v2-http-task#18
    api.terminate(&task, &json!([{"bk_agent_id": AGENT}])).await;
    api.terminate(&task, &json!([])).await;
    let rows = api.finished(&task, &[AGENT], Duration::from_secs(20)).await;
    expect(&rows[0], 126, 4);
    api.terminate(
        &task,
        &json!([{"bk_agent_id": AGENT}, {"bk_agent_id": ""}, {"bk_agent_id": "stranger"}]),
    )
    .await;
    api.terminate(&task, &Value::Null).await;

    // A task that was done before keeps its result.
    let done = api
        .submit(&script_body(&[AGENT], "root", "#!/bin/sh\necho done\n", 60))
        .await;
    api.finished(&done, &[AGENT], MINUTE).await;
    api.terminate(&done, &json!([])).await;
    let rows = api.rows(&done, &[AGENT]).await;
    expect(&rows[0], 0, 2);
}

#[tokio::test]
async fn output_slices() {
    let (site, _agent) = Site::with_agent(AGENT).await;
    let api = site.api();
    // Multi-byte characters, invalid bytes, no newline at the end.
    let script = "#!/bin/bash\nfor i in $(seq 2000); do printf 'line %d é€😀\\n' $i; done; printf '\\xff\\xfe end'\n";
    let task = api.submit(&script_body(&[AGENT], "root", script, 60)).await;
    let whole = api.finished(&task, &[AGENT], MINUTE).await.remove(0);
    let whole = whole["screen"].as_str().unwrap().to_owned();
    assert!(
        whole.starts_with("line 1 é€😀\n") && whole.ends_with("\u{fffd}\u{fffd} end"),
        "{}",
        &whole[whole.len() - 40..]
    );
    // contract: v2-http-task#20, v2-http-task#21, v2-http-task#22
    for limit in [7, 1000, 65_536] {
        let mut read = String::new();
        let mut polls = 0;
        loop {
            let query = json!({"bk_agent_id": AGENT, "atomic_tasks": [{"atomic_task_id": 0, "offset": read.len(), "limit": limit}]});
            let row = api.query(&task, &[query]).await.remove(0);
            let screen = row["screen"].as_str().unwrap();
            assert!(screen.len() <= limit);
            read.push_str(screen);
            if row["error_code"] != 115 {
                break;
            }
            assert!(!screen.is_empty(), "progress in every poll");
            polls += 1;
            if limit == 7 && polls > 100 {
                read = whole.clone();
            }
        }
        assert_eq!(read, whole);
    }
    for offset in [whole.len(), whole.len() + 1000] {
        let query = json!({"bk_agent_id": AGENT, "atomic_tasks": [{"atomic_task_id": 0, "offset": offset}]});
        let row = api.query(&task, &[query]).await.remove(0);
        assert_eq!(row["screen"], "");
        expect(&row, 0, 2);
    }
}

#[tokio::test]
async fn five_mebibytes_and_a_marker() {
    let (site, _agent) = Site::with_agent(AGENT).await;
    let api = site.api();
    let row = api
        .run(
            AGENT,
            "root",
            "#!/bin/bash\nhead -c 20000000 /dev/zero | tr '\\0' 'x'\n",
            60,
        )
        .await;
    expect(&row, 0, 2);
    let screen = row["screen"].as_str().unwrap();
    assert!(
        screen.len() <= 5 << 20 && screen.len() > (5 << 20) - 200,
        "{}",
        screen.len()
    );
    assert!(
        screen[screen.len() - 100..].contains("cut"),
        "{}",
        &screen[screen.len() - 100..]
    );
}

#[tokio::test]
async fn chains_of_atomic_tasks() {
    let (site, _agent) = Site::with_agent(AGENT).await;
    let api = site.api();
    let mut body = script_body(
        &[AGENT],
        "root",
        "#!/bin/bash\necho first > /tmp/bkgse-tests/chain; echo one\n",
        60,
    );
    let dir = "/tmp/bkgse-tests/root";
    let second = "bk_gse_script_second.sh";
    body["scripts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"script_name": second, "script_store_dir": dir,
               "script_content": "#!/bin/bash\ncat /tmp/bkgse-tests/chain; head -c 1000000 /dev/zero | tr '\\0' y\n"}));
    body["atomic_tasks"]
        .as_array_mut()
        .unwrap()
        .push(json!({"atomic_task_id": 1, "command": format!("{dir}/{second}"), "timeout_seconds": 60}));
    body["atomic_tasks_relations"] = json!([{"atomic_task_id": 1, "atomic_task_id_idx": [0]}]);
    let task = api.submit(&body).await;
    api.finished(&task, &[AGENT], MINUTE).await;
    // contract: v2-http-task#26, v2-http-task#27
    let query = json!({"bk_agent_id": AGENT, "atomic_tasks": [{"atomic_task_id": 1, "offset": 0, "limit": 1000}]});
    let row = eventually("atomic task 1", MINUTE, || async {
        let row = api.query(&task, std::slice::from_ref(&query)).await.remove(0);
        (row["error_code"] != 115).then_some(row)
    })
    .await;
    expect(&row, 0, 2);
    let screen = row["screen"].as_str().unwrap();
    assert!(
        screen.starts_with("first\nyyy") && screen.len() == 1_000_006,
        "{}",
        screen.len()
    );

    // What depends on a failure is not run, and says so.
    body["scripts"][0]["script_content"] = json!("#!/bin/bash\nexit 3\n");
    body["atomic_tasks_relations"] =
        json!([{"atomic_task_id": 0, "atomic_task_id_idx": []}, {"atomic_task_id": 1, "atomic_task_id_idx": [0]}]);
    let task = api.submit(&body).await;
    let both = json!({"bk_agent_id": AGENT, "atomic_tasks": [{"atomic_task_id": 0, "offset": 0}, {"atomic_task_id": 1, "offset": 0}]});
    let rows = eventually("both rows", MINUTE, || async {
        let rows = api.query(&task, std::slice::from_ref(&both)).await;
        rows.iter().all(|row| row["error_code"] != 115).then_some(rows)
    })
    .await;
    expect(&rows[0], 0, 5);
    assert_eq!(rows[1]["status"], 5);
    assert!(!matches!(rows[1]["error_code"].as_i64(), Some(0 | 115 | 126)));
    assert!(!rows[1]["error_msg"].as_str().unwrap().is_empty());
}

#[tokio::test]
async fn the_accounts_own_environment() {
    let (site, _agent) = Site::with_agent(AGENT).await;
    let api = site.api();
    let script = "#!/bin/bash\nid -un; echo $HOME; echo $USER; umask; env | grep -c GSE_TEST_AGENT_ENVIRONMENT; ls -l $0 | cut -d' ' -f1,3\n";
    let row = api.run(AGENT, "nobody", script, 60).await;
    expect(&row, 0, 2);
    let lines: Vec<&str> = row["screen"].as_str().unwrap().lines().collect();
    let home = nix::unistd::User::from_name("nobody").unwrap().unwrap().dir;
    assert_eq!(lines[0], "nobody");
    assert_eq!(lines[1], home.to_str().unwrap());
    assert_eq!(&lines[2..5], ["nobody", "0022", "0"]);
    assert_eq!(lines[5], "-rwx------ nobody");
}

#[tokio::test]
async fn every_spelling_of_every_path() {
    let (site, _agent) = Site::with_agent(AGENT).await;
    let body = script_body(&[AGENT], "root", "#!/bin/sh\necho x\n", 60);
    // contract: v2-http-task#4, v2-http-task#6, v2-http-task#7
    for api in [site.api(), site.task_api()] {
        for prefix in [
            "/api/v2/task/extensions",
            "/api/v2/task",
            "//api/v2//task/extensions",
            "/api/bk-gse/prod/api/v2/task",
        ] {
            for slash in ["", "/"] {
                let reply = api.post(&format!("{prefix}/async_execute_script{slash}"), &body).await;
                assert_eq!(reply["code"], 0, "{prefix} {reply}");
                let task = reply["data"]["result"]["task_id"].clone();
                let query = json!({"task_id": task, "no_request": true, "bk_username": "admin",
                    "agent_tasks": [{"bk_agent_id": AGENT, "atomic_tasks": [{"atomic_task_id": 0, "offset": 0}]}]});
                let reply = api
                    .post(&format!("{prefix}/get_execute_script_result{slash}"), &query)
                    .await;
                assert_eq!(
                    (reply["code"].as_i64(), reply["data"]["result"].as_array().map(Vec::len)),
                    (Some(0), Some(1))
                );
                let reply = api
                    .post(
                        &format!("{prefix}/async_terminate_execute_script{slash}"),
                        &json!({"task_id": task}),
                    )
                    .await;
                assert_eq!(reply["code"], 0, "{reply}");
            }
        }
        // contract: v2-http-task#56
        for tenant in ["default", "system", ""] {
            let reply = api
                .clone()
                .with("x-bk-tenant-id", tenant)
                .post(&format!("{EXT}/async_execute_script"), &body)
                .await;
            assert_eq!(reply["code"], 0, "{reply}");
        }
        let reply = api
            .clone()
            .without("x-bk-tenant-id")
            .post(&format!("{EXT}/async_execute_script"), &body)
            .await;
        assert_eq!(reply["code"], 0, "{reply}");
    }
}

#[tokio::test]
async fn who_may_do_what() {
    use gse_tests::site::{SECRET, SMALL_APP};
    let (site, _agent) = Site::with_agent(AGENT).await;
    let api = site.api();
    let small = gse_tests::Api::new(&api.address, SMALL_APP, SECRET);
    let body = script_body(&[AGENT], "root", "#!/bin/sh\ntrue\n", 60);
    let submit = format!("{EXT}/async_execute_script");
    let result = format!("{EXT}/get_execute_script_result");
    for (who, code) in [
        (small.clone(), 1_000_903),
        (gse_tests::Api::new(&api.address, SMALL_APP, "wrong"), 1_000_901),
        (gse_tests::Api::new(&api.address, "stranger", SECRET), 1_000_901),
        (api.clone().without("x-bkapi-authorization"), 1_000_901),
    ] {
        // contract: v2-http-task#2
        let reply = who.post(&submit, &body).await;
        assert_eq!(reply["code"], code, "{reply}");
        assert_eq!(reply["data"], json!({"result": {}}));
        let reply = who.at(&site.task_api().address).post(&submit, &body).await;
        assert_eq!(reply["code"], code, "{reply}");
    }
    let own = small
        .submit(&script_body(&[AGENT], "nobody", "#!/bin/sh\nsleep 2; id -un\n", 60))
        .await;
    let other = api.submit(&body).await;
    // Somebody else's task looks like none at all.
    for (who, task) in [(&small, &other), (&api, &own)] {
        let query = json!({"task_id": task, "agent_tasks": []});
        let reply = who.post(&result, &query).await;
        assert_eq!(
            (reply["code"].as_i64(), &reply["data"]),
            (Some(1_000_116), &json!({"result": []}))
        );
        let reply = who
            .post(
                &format!("{EXT}/async_terminate_execute_script"),
                &json!({"task_id": task}),
            )
            .await;
        assert_eq!(reply["code"], 1_000_116);
    }
    let rows = small.finished(&own, &[AGENT], MINUTE).await;
    assert_eq!(rows[0]["screen"], "nobody\n");
    // Refusals leave a line too, and no line holds a secret or a script.
    let trail = std::fs::read_to_string(site.path().join("gse_task-audit.log")).unwrap();
    assert!(
        trail.contains("\"refused\"") && trail.contains(&other) && !trail.contains(SECRET) && !trail.contains("id -un")
    );
}
