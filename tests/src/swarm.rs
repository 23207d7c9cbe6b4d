//! Hundreds and thousands of agents that speak the real session, in one process: `gse-benches swarm` as a child.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;

use crate::process::binary;
use crate::site::Site;

/// One line of progress, and when it came.
#[derive(Debug, Clone)]
pub struct Progress {
    /// When it was read.
    pub at: Instant,
    /// Agents connected then.
    pub connected: u64,
    /// Connects since the start.
    pub connects: u64,
    /// The whole line.
    pub all: Value,
}

/// The running swarm; killed when dropped.
#[derive(Debug)]
pub struct Swarm {
    child: Child,
    // Its end would be the end of the swarm.
    _stdin: ChildStdin,
    progress: watch::Receiver<Vec<Progress>>,
    agents: u64,
}

/// Id of the swarm's agent number `index`.
#[must_use]
pub fn agent_id(index: u64) -> String {
    format!("bench-{index:06}")
}

impl Swarm {
    /// Starts agents against all of the site's gse_task; `more` are options of `gse-benches swarm`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(site: &Site, agents: u64, more: &[&str]) -> Result<Self> {
        let mut command = Command::new(binary("gse-benches")?);
        command.args(["swarm", "--stdin-commands", "--report-ms", "10"]);
        command.args(["--agents", &agents.to_string()]);
        for server in site.agents_addresses() {
            command.args(["--server", &server]);
        }
        command.arg("--certs").arg(site.path().join("certs")).args(more);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("starting the swarm")?;
        let stdin = child.stdin.take().context("input of the swarm")?;
        let stdout = child.stdout.take().context("output of the swarm")?;
        let (sender, progress) = watch::channel(vec![]);
        tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let Ok(all) = serde_json::from_str::<Value>(&line) else {
                    eprintln!("a line of the swarm is not progress: {line}");
                    continue;
                };
                let now = Progress {
                    at: Instant::now(),
                    connected: all["connected"].as_u64().unwrap_or(0),
                    connects: all["connects"].as_u64().unwrap_or(0),
                    all,
                };
                sender.send_modify(|lines| lines.push(now));
            }
        });
        Ok(Self {
            child,
            _stdin: stdin,
            progress,
            agents,
        })
    }

    /// Waits until `is` holds of its last line; when that was.
    ///
    /// # Errors
    /// When that takes longer than `limit`, or the swarm ends.
    pub async fn until(&mut self, what: &str, limit: Duration, is: impl Fn(&Progress) -> bool) -> Result<Instant> {
        let seen = self.progress.wait_for(|lines| lines.last().is_some_and(&is));
        let seen = tokio::time::timeout(limit, seen).await;
        match seen.map(|seen| seen.map(|lines| lines.last().map_or_else(Instant::now, |line| line.at))) {
            Ok(Ok(at)) => Ok(at),
            Ok(Err(_)) => anyhow::bail!("the swarm has ended while waiting for: {what}"),
            Err(_) => anyhow::bail!("not within {limit:?}: {what}: {:?}", self.last().map(|line| line.all)),
        }
    }

    /// Waits until all its agents are connected.
    ///
    /// # Errors
    /// As [`Swarm::until`].
    pub async fn all_connected(&mut self, limit: Duration) -> Result<Instant> {
        let agents = self.agents;
        self.until("all agents connected", limit, |now| now.connected == agents)
            .await
    }

    /// Its last line.
    #[must_use]
    pub fn last(&self) -> Option<Progress> {
        self.progress.borrow().last().cloned()
    }

    /// All lines since `from`.
    #[must_use]
    pub fn since(&self, from: Instant) -> Vec<Progress> {
        self.progress
            .borrow()
            .iter()
            .filter(|line| line.at >= from)
            .cloned()
            .collect()
    }

    /// Ids of its agents.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        (0..self.agents).map(agent_id).collect()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}
