//! Kinds of daemons.

use std::time::Duration;

use gse_tests::plugins::{Plugin, daemon, op};
use gse_tests::{Api, eventually};
use serde_json::json;

use super::{AGENT, PATIENCE, dead_pid, expect, only, respawned, site};

// contract: procmgr-agent-lifecycle#14, procmgr-agent-lifecycle#17, procmgr-agent-lifecycle#18, procmgr-agent-lifecycle#36
#[tokio::test(flavor = "multi_thread")]
async fn the_whole_life_of_a_plain_one() {
    let (site, _agent) = site().await;
    let api = site.api();
    let plugin = Plugin::install(site.path(), "bkplain", "bkplain", daemon::PLAIN);

    assert_eq!(plugin.status(&api, AGENT).await["pid"], -1);
    expect(&plugin.operate(&api, AGENT, op::STOP).await, 829);
    expect(&plugin.operate(&api, AGENT, op::START).await, 0);
    let first = only(&plugin);
    let status = plugin.status(&api, AGENT).await;
    assert_eq!(
        (&status["pid"], &status["isAuto"]),
        (&json!(first), &json!(true)),
        "{status}"
    );
    assert_eq!(
        (&status["processName"], &status["version"]),
        (&json!("bkplain"), &json!("1.2.3")),
        "{status}"
    );
    expect(&plugin.operate(&api, AGENT, op::START).await, 828);

    expect(&plugin.operate(&api, AGENT, op::RELOAD).await, 0);
    eventually("the reload was noticed", PATIENCE, || async {
        plugin.commands().contains(&"reload".to_owned()).then_some(())
    })
    .await;
    expect(&plugin.operate(&api, AGENT, op::RESTART).await, 0);
    let second = only(&plugin);
    assert_ne!(first, second);

    // Undelegated, it runs on and is not brought back.
    expect(&plugin.operate(&api, AGENT, op::UNREGISTER).await, 0);
    assert_eq!(only(&plugin), second);
    assert_eq!(plugin.status(&api, AGENT).await["isAuto"], false);
    expect(&plugin.operate(&api, AGENT, op::REGISTER).await, 0);
    assert_eq!(only(&plugin), second);
    let begun = plugin.starts();
    expect(&plugin.operate(&api, AGENT, op::STOP).await, 0);
    let status = plugin.status(&api, AGENT).await;
    assert_eq!(
        (&status["pid"], &status["isAuto"]),
        (&json!(-1), &json!(false)),
        "{status}"
    );
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(
        (plugin.alive().len(), plugin.starts()),
        (0, begun),
        "a stopped process was started again"
    );

    // contract: procmgr-agent-lifecycle#21: never registered as far as anybody knows
    expect(&plugin.operate(&api, AGENT, op::RESTART).await, 0);
    let third = only(&plugin);
    assert_eq!(plugin.status(&api, AGENT).await["isAuto"], true);
    // contract: procmgr-agent-lifecycle#22
    plugin.crash();
    let fourth = respawned(&plugin, third).await;
    assert_eq!(plugin.starts(), begun + 2);
    expect(&plugin.operate(&api, AGENT, op::KILL).await, 0);
    assert!(plugin.alive().is_empty() && fourth != third);
    assert_eq!(plugin.status(&api, AGENT).await["isAuto"], false);
    expect(&plugin.operate(&api, AGENT, op::KILL).await, 829);
}

#[tokio::test(flavor = "multi_thread")]
async fn forks_late_stale_and_foreign_pid_files() {
    let (site, _agent) = site().await;
    let api = site.api();
    let root = site.path();
    let plugin = |name: &str, text: &str| Plugin::install(root, name, name, text);
    tokio::join!(
        forks(&api, plugin("bkforks", daemon::DOUBLE_FORK)),
        late(&api, plugin("bklate", daemon::LATE)),
        stale(&api, plugin("bkstale", daemon::PLAIN)),
        stale_and_late(&api, plugin("bkboth", daemon::LATE)),
        foreign(&api, plugin("bkforeign", daemon::PLAIN)),
    );
}

async fn forks(api: &Api, plugin: Plugin) {
    expect(&plugin.operate(api, AGENT, op::START).await, 0);
    let pid = only(&plugin);
    assert_eq!(plugin.status(api, AGENT).await["pid"], pid);
    plugin.crash();
    respawned(&plugin, pid).await;
    expect(&plugin.operate(api, AGENT, op::STOP).await, 0);
    assert!(plugin.alive().is_empty());
    assert_eq!(plugin.starts(), 2);
}

/// Without its pid file it is found by its name; once there is one, it is the same.
async fn late(api: &Api, plugin: Plugin) {
    expect(&plugin.operate(api, AGENT, op::START).await, 0);
    let pid = only(&plugin);
    assert_eq!(plugin.status(api, AGENT).await["pid"], pid);
    eventually("its pid file", PATIENCE, || async {
        plugin.pid_file().exists().then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((only(&plugin), plugin.starts()), (pid, 1));
    expect(&plugin.operate(api, AGENT, op::STOP).await, 0);
    assert!(plugin.alive().is_empty());
}

async fn stale(api: &Api, plugin: Plugin) {
    std::fs::write(plugin.pid_file(), format!("{}\n", dead_pid())).unwrap();
    assert_eq!(plugin.status(api, AGENT).await["pid"], -1);
    expect(&plugin.operate(api, AGENT, op::STOP).await, 829);
    expect(&plugin.operate(api, AGENT, op::START).await, 0);
    assert_eq!(plugin.status(api, AGENT).await["pid"], only(&plugin));
    // It leaves one when it crashes, too.
    let pid = only(&plugin);
    plugin.crash();
    respawned(&plugin, pid).await;
    assert_eq!(plugin.starts(), 2);
}

/// The old file stays until the daemon gets round to writing its own.
async fn stale_and_late(api: &Api, plugin: Plugin) {
    std::fs::write(plugin.pid_file(), format!("{}\n", dead_pid())).unwrap();
    let patient = json!({"alive_monitor_policy": {"start_check_secs": 6}});
    expect(&plugin.operate_with(api, AGENT, op::START, &patient).await, 0);
    let pid = only(&plugin);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!((only(&plugin), plugin.starts()), (pid, 1));
}

/// The process id in the old file is somebody else's by now.
async fn foreign(api: &Api, plugin: Plugin) {
    let mut other = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    std::fs::write(plugin.pid_file(), format!("{}\n", other.id())).unwrap();
    assert_eq!(plugin.status(api, AGENT).await["pid"], -1);
    for operation in [op::STOP, op::KILL] {
        expect(&plugin.operate(api, AGENT, operation).await, 829);
    }
    assert!(plugin.commands().is_empty(), "{:?}", plugin.commands());
    expect(&plugin.operate(api, AGENT, op::START).await, 0);
    assert_eq!(plugin.status(api, AGENT).await["pid"], only(&plugin));
    expect(&plugin.operate(api, AGENT, op::STOP).await, 0);
    assert!(other.try_wait().unwrap().is_none(), "a stranger was killed");
    other.kill().unwrap();
    other.wait().unwrap();
}

/// Two programs of the same name are told apart by their pid files: what is done to one is not done to the other, nor counted as its life.
#[tokio::test(flavor = "multi_thread")]
async fn two_whose_executables_have_the_same_name() {
    let (site, _agent) = site().await;
    let api = site.api();
    let a = Plugin::install(site.path(), "java_1", "java", daemon::PLAIN);
    let b = Plugin::install(site.path(), "java_2", "java", daemon::PLAIN);
    expect(&b.operate(&api, AGENT, op::START).await, 0);
    let pid_b = only(&b);
    expect(&a.operate(&api, AGENT, op::START).await, 0);
    let pid_a = only(&a);
    assert_eq!(a.status(&api, AGENT).await["pid"], pid_a);
    assert_eq!(b.status(&api, AGENT).await["pid"], pid_b);
    a.crash();
    let pid_a = respawned(&a, pid_a).await;
    assert_eq!(only(&b), pid_b);
    // Its pid file is gone then, the other's process is not.
    expect(&a.operate(&api, AGENT, op::STOP).await, 0);
    assert!(a.alive().is_empty() && !a.pid_file().exists());
    assert_eq!((only(&b), b.starts()), (pid_b, 1));
    assert_eq!(a.status(&api, AGENT).await["pid"], -1);
    expect(&a.operate(&api, AGENT, op::STOP).await, 829);
    expect(&a.operate(&api, AGENT, op::START).await, 0);
    assert_ne!(only(&a), pid_a);
    assert_eq!(only(&b), pid_b);
    expect(&b.operate(&api, AGENT, op::KILL).await, 0);
    assert_eq!((a.alive().len(), b.alive().len()), (1, 0));
}

// contract: procmgr-agent-lifecycle#15, procmgr-agent-lifecycle#22
#[tokio::test(flavor = "multi_thread")]
async fn those_that_die_at_once_or_do_not_die() {
    let (site, _agent) = site().await;
    let api = site.api();
    let mayfly = Plugin::install(site.path(), "bkmayfly", "bkmayfly", daemon::MAYFLY);
    let deaf = Plugin::install(site.path(), "bkdeaf", "bkdeaf", daemon::DEAF);
    let weary = Plugin::install(site.path(), "bkweary", "bkweary", daemon::PLAIN);
    let once = Plugin::install(site.path(), "bkonce", "bkonce", daemon::PLAIN);
    tokio::join!(
        async {
            let row = mayfly.operate(&api, AGENT, op::START).await;
            expect(&row, 836);
            assert!(!row["error_msg"].as_str().unwrap().starts_with("stop"), "{row}");
            assert_eq!(mayfly.status(&api, AGENT).await["pid"], -1);
        },
        async {
            expect(&deaf.operate(&api, AGENT, op::START).await, 0);
            let row = deaf.operate(&api, AGENT, op::STOP).await;
            expect(&row, 836);
            assert!(row["error_msg"].as_str().unwrap().starts_with("stop"), "{row}");
            only(&deaf);
            expect(&deaf.operate(&api, AGENT, op::KILL).await, 0);
            assert!(deaf.alive().is_empty());
        },
        async {
            // It was well once; after its crash it dies at every start.
            expect(&weary.operate(&api, AGENT, op::START).await, 0);
            weary.daemon(daemon::MAYFLY);
            weary.crash();
            eventually("all tries", PATIENCE, || async { (weary.starts() >= 4).then_some(()) }).await;
        },
        async {
            let single = json!({"alive_monitor_policy": {"auto_type": 2}});
            expect(&once.operate_with(&api, AGENT, op::START, &single).await, 0);
            once.crash();
        },
    );
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(weary.starts(), 4, "one start and three tries, then it is given up");
    assert!(mayfly.starts() <= 4, "{} starts", mayfly.starts());
    assert_eq!(
        (once.starts(), once.alive().len()),
        (1, 0),
        "a single execution was started again"
    );
    assert_eq!(deaf.starts(), 1);
    let before = weary.starts();
    weary.daemon(daemon::PLAIN);
    expect(&weary.operate(&api, AGENT, op::START).await, 0);
    assert_eq!((weary.alive().len(), weary.starts()), (1, before + 1));
}

// contract: procmgr-agent-lifecycle#20
#[tokio::test(flavor = "multi_thread")]
async fn stop_register_start_in_a_row() {
    let (site, _agent) = site().await;
    let api = site.api();
    let plugin = Plugin::install(site.path(), "bkrow", "bkrow", daemon::PLAIN);
    expect(&plugin.operate(&api, AGENT, op::START).await, 0);
    for round in 0..3 {
        let changed = json!({"control": {"version_cmd": format!("echo 1.{round}")}});
        for operation in [op::STOP, op::REGISTER, op::START] {
            let row = plugin.operate_with(&api, AGENT, operation, &changed).await;
            assert_eq!(row["error_code"], 0, "round {round}, operation {operation}: {row}");
        }
        let status = plugin.status(&api, AGENT).await;
        assert_eq!(status["pid"], only(&plugin), "{status}");
    }
    assert_eq!(plugin.starts(), 4);

    // All at once: they are carried out one after the other, in their order.
    let elements: Vec<_> = [op::STOP, op::REGISTER, op::START]
        .map(|operation| plugin.element(AGENT, operation, &json!({})))
        .to_vec();
    for element in elements {
        let row = gse_tests::plugins::submit(&api, &[element]).await;
        let rows = gse_tests::plugins::finished(&api, &row, PATIENCE).await;
        assert!(rows.values().all(|row| row["error_code"] == 0), "{rows:?}");
    }
    assert_eq!((plugin.alive().len(), plugin.starts()), (1, 5));
}

// contract: procmgr-agent-lifecycle#34, procmgr-agent-lifecycle#37
#[tokio::test(flavor = "multi_thread")]
async fn those_that_take_too_much() {
    let (site, _agent) = site().await;
    let api = site.api();
    let info = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total: f64 = info.split_whitespace().nth(1).unwrap().parse().unwrap();
    let percent = 60.0 * 1024.0 / total * 100.0;
    let greedy = Plugin::install(site.path(), "bkgreedy", "bkgreedy", daemon::GREEDY);
    let frugal = Plugin::install(site.path(), "bkfrugal", "bkfrugal", daemon::PLAIN);
    let free = Plugin::install(site.path(), "bkfree", "bkfree", daemon::GREEDY);
    let limit = json!({"resource": {"mem": percent}, "alive_monitor_policy": {"start_check_secs": 3}});
    let (a, b, c) = tokio::join!(
        greedy.operate_with(&api, AGENT, op::START, &limit),
        frugal.operate_with(&api, AGENT, op::START, &limit),
        free.operate(&api, AGENT, op::START),
    );
    [a, b, c].iter().for_each(|row| expect(row, 0));
    eventually("it is killed", PATIENCE * 2, || async {
        (greedy.starts() >= 2 || greedy.alive().is_empty()).then_some(())
    })
    .await;
    // Those beside it are left alone: the one within its limit and the one without any.
    assert_eq!((only(&frugal), frugal.starts()), (frugal.alive()[0], 1));
    assert_eq!((only(&free), free.starts()), (free.alive()[0], 1));
}
