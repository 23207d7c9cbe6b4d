//! The agent is killed, at bad moments too: what it keeps alive survives it and is found again.

use std::time::Duration;

use gse_tests::eventually;
use gse_tests::plugins::{Plugin, daemon, finished, op, submit};
use serde_json::json;

use super::{AGENT, PATIENCE, agent as restarted, expect, only, options, respawned, site};

// contract: procmgr-agent-lifecycle#57, procmgr-agent-lifecycle#58
#[tokio::test(flavor = "multi_thread")]
async fn what_it_keeps_alive_survives_it_and_is_adopted() {
    let (site, mut agent) = site().await;
    let api = site.api();
    let kept = Plugin::install(site.path(), "bkkept", "bkkept", daemon::DOUBLE_FORK);
    let lost = Plugin::install(site.path(), "bklost", "bklost", daemon::PLAIN);
    let stopped = Plugin::install(site.path(), "bkstopped", "bkstopped", daemon::PLAIN);
    for plugin in [&kept, &lost, &stopped] {
        expect(&plugin.operate(&api, AGENT, op::START).await, 0);
    }
    expect(&stopped.operate(&api, AGENT, op::STOP).await, 0);
    let (pid, before) = (only(&kept), only(&lost));

    agent.kill_9();
    lost.crash();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(only(&kept), pid, "it went with the agent");
    agent = restarted(&site).await;
    respawned(&lost, before).await;
    let status = kept.status(&api, AGENT).await;
    assert_eq!(
        (&status["pid"], &status["isAuto"]),
        (&json!(pid), &json!(true)),
        "{status}"
    );
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!((only(&kept), kept.starts(), lost.starts()), (pid, 1, 2));
    assert_eq!(
        (stopped.starts(), stopped.alive().len()),
        (1, 0),
        "a stopped process came back"
    );
    kept.crash();
    respawned(&kept, pid).await;
    // Its forks come and go before it is there.
    eventually("it has begun again", PATIENCE, || async {
        (kept.starts() == 2 && kept.alive().len() == 1).then_some(())
    })
    .await;

    // Told to leave, as for an upgrade, it takes nothing with it either.
    let pid = only(&kept);
    agent.terminate(PATIENCE).await.unwrap();
    assert_eq!(only(&kept), pid);
    let _agent = restarted(&site).await;
    assert_eq!(kept.status(&api, AGENT).await["pid"], pid);
    assert_eq!(kept.starts(), 2);
    drop(agent);
}

/// Killed while the start command runs: the process is there, but nobody has noted down yet how that went.
#[tokio::test(flavor = "multi_thread")]
async fn killed_between_the_start_and_its_record() {
    let (site, mut agent) = site().await;
    let api = site.api();
    let slow = Plugin::install(site.path(), "bkslow", "bkslow", daemon::PLAIN);
    slow.script(
        "start.sh",
        "#!/bin/sh
cd \"$(dirname \"$0\")\"
echo start >> ../run/commands
setsid ./$1 ../etc/daemon.sh ../run/$1.pid </dev/null >/dev/null 2>&1 &
sleep 2
",
    );
    let task = submit(&api, &[slow.element(AGENT, op::START, &json!({}))]).await;
    eventually("the daemon has begun", PATIENCE, || async {
        (slow.starts() == 1).then_some(())
    })
    .await;
    agent.kill_9();
    let _agent = restarted(&site).await;
    let rows = finished(&api, &task, PATIENCE * 2).await;
    let row = rows.values().next().unwrap();
    expect(row, 0);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((slow.starts(), slow.commands()), (1, vec!["start".to_owned()]));
    let status = slow.status(&api, AGENT).await;
    assert_eq!(
        (&status["pid"], &status["isAuto"]),
        (&json!(only(&slow)), &json!(true)),
        "{status}"
    );
    drop(agent);
}

/// The servers are away: the host goes on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn it_goes_on_without_any_server() {
    let (mut site, mut agent) = site().await;
    let plugin = Plugin::install(site.path(), "bkalone", "bkalone", daemon::PLAIN);
    expect(&plugin.operate(&site.api(), AGENT, op::START).await, 0);
    site.task.as_mut().unwrap().kill_9();
    site.procmgr.get_mut(&1).unwrap().kill_9();
    let first = only(&plugin);
    plugin.crash();
    let second = respawned(&plugin, first).await;
    agent.kill_9();
    plugin.crash();
    agent = site.spawn_agent(&options(), "").unwrap();
    let third = respawned(&plugin, second).await;
    site.start_task().await.unwrap();
    site.start_procmgr(1).await.unwrap();
    site.wait_state(AGENT, 2).await;
    // The start may just be under way, its pid file not written yet.
    eventually("the host tells of it", PATIENCE, || async {
        (plugin.status(&site.api(), AGENT).await["pid"] == third).then_some(())
    })
    .await;
    assert_eq!((only(&plugin), plugin.starts()), (third, 3));
    drop(agent);
}

/// Killed again and again, wherever it happens to be: an operation is carried out once, and never are there two of one process.
async fn killed_at_any_moment(rounds: usize) {
    let (site, mut agent) = site().await;
    let api = site.api();
    let plugins: Vec<Plugin> = ["bkany1", "bkany2", "bkany3"]
        .map(|name| Plugin::install(site.path(), name, name, daemon::LATE))
        .into();
    let mut asked = 0;
    for round in 0..rounds {
        let operation = if round % 2 == 0 { op::START } else { op::RESTART };
        if operation == op::RESTART {
            // Its own stop.sh finds it by that alone.
            for plugin in &plugins {
                let file = || async { plugin.pid_file().exists().then_some(()) };
                eventually("its pid file is there", PATIENCE, file).await;
            }
        }
        let elements: Vec<_> = plugins
            .iter()
            .map(|plugin| plugin.element(AGENT, operation, &json!({})))
            .collect();
        if operation == op::RESTART {
            // Without its pid file a plugin's own scripts could not find what they are to end.
            for plugin in &plugins {
                eventually("its pid file names it", PATIENCE, || async {
                    let text = std::fs::read_to_string(plugin.pid_file()).unwrap_or_default();
                    (text.trim().parse() == Ok(only(plugin))).then_some(())
                })
                .await;
            }
        }
        let task = submit(&api, &elements).await;
        asked += 1;
        for _ in 0..2 {
            tokio::time::sleep(Duration::from_millis(rand::random_range(50..1500))).await;
            agent.kill_9();
            agent = site.spawn_agent(&options(), "").unwrap();
        }
        let rows = finished(&api, &task, PATIENCE * 3).await;
        for plugin in &plugins {
            let row = &rows[&format!("{AGENT}:nodeman:{}", plugin.name)];
            println!(
                "round {round} {}: {} {}",
                plugin.name, row["error_code"], row["error_msg"]
            );
            assert!(
                plugin.starts() <= asked,
                "{} was started {} times in {asked} operations",
                plugin.name,
                plugin.starts()
            );
            assert!(plugin.alive().len() <= 1, "{}: {:?}", plugin.name, plugin.alive());
        }
        if operation == op::RESTART {
            for plugin in &plugins {
                // Whatever became of the restart, this is where they all are afterwards.
                expect(&plugin.operate(&api, AGENT, op::UNREGISTER).await, 0);
                plugin.crash();
                let _ = std::fs::remove_file(plugin.pid_file());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_a_few_times() {
    killed_at_any_moment(2).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "full tier: several minutes"]
async fn killed_at_any_moment_many_times() {
    killed_at_any_moment(20).await;
}

/// What is on disk can be read by those who look for lines; damaged, it is set aside and put together again from what the servers know.
// contract: procmgr-agent-lifecycle#57, procmgr-agent-lifecycle#58
#[tokio::test(flavor = "multi_thread")]
async fn the_file_of_registrations() {
    let (site, mut agent) = site().await;
    let api = site.api();
    let plugin = Plugin::install(site.path(), "bkfile", "bkfile", daemon::PLAIN);
    let other = Plugin::install(site.path(), "bkother", "bkother", daemon::PLAIN);
    expect(&plugin.operate(&api, AGENT, op::START).await, 0);
    expect(&other.operate(&api, AGENT, op::REGISTER).await, 0);
    let file = find(site.path(), "procinfo.json").expect("a file of registrations");
    let text = std::fs::read_to_string(&file).unwrap();
    // As ops tools do it: lines that have one of two keys, in turn.
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("\"startCmd\"") || line.contains("\"type\""))
        .collect();
    assert_eq!(lines.len(), 4, "{text}");
    for pair in lines.chunks(2) {
        assert!(pair[0].contains("./start.sh") && pair[1].contains(": 1"), "{pair:?}");
    }
    assert!(text.contains("bkfile") && text.contains("bkother"));

    // The servers know of both before the file is lost.
    eventually("the store has both", PATIENCE, || async {
        let body = json!({"meta": {"namespace": "nodeman"}, "page": {"start": 0, "limit": 10}});
        let reply = api.post("/api/v2/proc/sync_proc_status", &body).await;
        let infos = reply["data"]["proc_infos"].as_array()?.clone();
        (infos.len() == 2 && infos.iter().all(|info| info["isauto"] == true)).then_some(())
    })
    .await;
    let pid = only(&plugin);
    agent.kill_9();
    std::fs::write(&file, &text[..text.len() / 2]).unwrap();
    agent = restarted(&site).await;
    eventually("both are registered again", PATIENCE, || async {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        (text.contains("bkfile") && text.contains("bkother")).then_some(())
    })
    .await;
    let status = plugin.status(&api, AGENT).await;
    assert_eq!(
        (&status["pid"], &status["isAuto"]),
        (&json!(pid), &json!(true)),
        "{status}"
    );
    assert_eq!((plugin.starts(), other.starts()), (1, 0));
    plugin.crash();
    respawned(&plugin, pid).await;
    drop(agent);
}

fn find(dir: &std::path::Path, name: &str) -> Option<std::path::PathBuf> {
    std::fs::read_dir(dir).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        match path.is_dir() {
            true => find(&path, name),
            false => (path.file_name()? == name).then_some(path),
        }
    })
}
