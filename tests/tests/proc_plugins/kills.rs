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

    // Told to leave, as for an upgrade, it takes nothing with it either.
    let pid = only(&kept);
    agent.terminate(PATIENCE).await.unwrap();
    assert_eq!(only(&kept), pid);
    agent = restarted(&site).await;
    assert_eq!(kept.status(&api, AGENT).await["pid"], pid);
    assert_eq!(kept.starts(), 2);
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
    agent = restarted(&site).await;
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
    let status = plugin.status(&site.api(), AGENT).await;
    assert_eq!(status["pid"], third, "{status}");
    assert_eq!(plugin.starts(), 3);
    drop(agent);
}
