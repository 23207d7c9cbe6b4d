//! Plugins of every kind on a real host: the real gse_api, gse_procmgr, gse_task and agent operate daemons that behave as daemons do.
//! Nothing may be started twice, nothing lost, nothing left behind, nothing started over and over.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

mod clients;
mod events;
mod faults;
mod kills;
mod line;
mod many;
mod shapes;

use std::time::Duration;

use gse_tests::plugins::Plugin;
use gse_tests::{AgentOptions, Child, Site, StoreKind, eventually};
use serde_json::Value;

const AGENT: &str = "02000000plugins0";
/// For anything that is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// A site with one agent.
async fn site() -> (Site, Child) {
    let site = Site::with_procs(StoreKind::Embedded).await.unwrap();
    let agent = agent(&site).await;
    (site, agent)
}

/// The agent, which looks more often than it would on a host that has to last.
fn options() -> AgentOptions {
    let mut options = AgentOptions::new(AGENT, "10.11.12.13");
    options.sets = vec![
        "proc.check_interval_ms=200".into(),
        "proc.name_scan_ms=500".into(),
        "proc.limit_window_ms=2000".into(),
        "proc.report_changes_ms=200".into(),
    ];
    options
}

/// Starts it (again) and waits until it is connected.
async fn agent(site: &Site) -> Child {
    let agent = site.spawn_agent(&options(), "").unwrap();
    site.wait_state(AGENT, 2).await;
    agent
}

/// Checks the code of an entry.
fn expect(row: &Value, code: i64) {
    assert_eq!(row["error_code"], code, "{row}");
}

/// The only process that is alive of a plugin.
fn only(plugin: &Plugin) -> i32 {
    let alive = plugin.alive();
    assert_eq!(alive.len(), 1, "{}: {alive:?}, begun {}", plugin.name, plugin.starts());
    alive[0]
}

/// Waits until exactly one process of a plugin is alive, and it is not `before`.
async fn respawned(plugin: &Plugin, before: i32) -> i32 {
    eventually(&format!("{} is started again", plugin.name), PATIENCE, || async {
        match plugin.alive()[..] {
            [pid] if pid != before => Some(pid),
            _ => None,
        }
    })
    .await
}

/// A process id that nothing has.
fn dead_pid() -> u32 {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    pid
}
