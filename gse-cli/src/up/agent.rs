//! The local agent: a child process, because it must be able to die and come back by itself. It is started again, more and more
//! slowly, whenever it ends.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use gse_core::process;
use gse_core::tls::Role;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use toml::{Table, Value};

use super::data::Data;
use crate::client::write_private;

/// First wait before the agent is started again; it doubles.
const BACKOFF_MIN: Duration = Duration::from_millis(500);
/// Longest wait.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// An agent that has run for so long was well; the next wait is the first one again.
const WELL: Duration = Duration::from_secs(60);
/// How long the agent may take to leave; beyond, it is killed.
const LEAVE: Duration = Duration::from_secs(15);

/// How to start the agent.
#[derive(Debug, Clone)]
pub(super) struct Agent {
    program: PathBuf,
    config: PathBuf,
    log: Option<PathBuf>,
}

/// Where the agent's process id is.
fn pid_file(data: &Data) -> PathBuf {
    data.path("agent/agent.pid")
}

/// Ends an agent that a `gse up` which was killed has left behind: two would fight over the same data. Blocking.
///
/// # Errors
/// It is there and does not go.
pub(super) fn stop_leftover(data: &Data) -> anyhow::Result<()> {
    process::quit(&pid_file(data), LEAVE)
        .map(|_| ())
        .context("the agent of an earlier gse up is still there")
}

impl Agent {
    /// Writes the agent's configuration: where its server is, and where records go. Blocking.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn prepare(data: &Data, server: &str, records: &str, verbose: bool) -> anyhow::Result<Self> {
        let tls = data.tls(Role::Agent);
        let text = |path: &Path| Value::from(path.display().to_string());
        let log = (!verbose).then(|| data.path("log/agent.log"));
        let mut table = Table::new();
        table.insert("agent_id".into(), data.identity.agent_id.clone().into());
        table.insert("cloud_id".into(), 0.into());
        table.insert("servers".into(), Value::Array(vec![server.into()]));
        table.insert("data_dir".into(), text(&data.path("agent/data")));
        let servers = Value::Array(vec![records.into()]);
        table.insert(
            "data".into(),
            Value::Table(Table::from_iter([("servers".to_owned(), servers)])),
        );
        let files = [("ca", &tls.ca), ("cert", &tls.cert), ("key", &tls.key)];
        table.insert(
            "tls".into(),
            Value::Table(
                files
                    .map(|(key, path)| (key.to_owned(), text(path)))
                    .into_iter()
                    .collect(),
            ),
        );
        table.insert(
            "runtime".into(),
            Value::Table(Table::from_iter([("pid_file".to_owned(), text(&pid_file(data)))])),
        );
        if let Some(log) = &log {
            table.insert(
                "log".into(),
                Value::Table(Table::from_iter([("file".to_owned(), text(log))])),
            );
        }
        let config = data.path("agent/agent.toml");
        let body = toml::to_string(&table).context("cannot express the agent's configuration as TOML")?;
        write_private(
            &config,
            format!("# Written by gse up at each start.\n{body}").as_bytes(),
        )?;
        let program = std::env::current_exe().context("cannot find the program itself")?;
        Ok(Self { program, config, log })
    }

    fn start(&self) -> anyhow::Result<Child> {
        let mut command = Command::new(&self.program);
        command.args([
            OsString::from("agent"),
            OsString::from("-f"),
            self.config.clone().into_os_string(),
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        if let Some(log) = &self.log {
            // What is said before the log is open, or by a crash, lands in the same file.
            let file = fs::OpenOptions::new().create(true).append(true).open(log);
            command.stderr(file.with_context(|| format!("cannot open {}", log.display()))?);
        }
        // A group of its own: Ctrl-C on the terminal is for us, who stop things in their order.
        command.process_group(0).kill_on_drop(true);
        command
            .spawn()
            .with_context(|| format!("cannot start the agent ({})", self.program.display()))
    }

    /// Keeps an agent running until `stop`, then lets it leave. `reload` passes on a reload.
    pub(super) async fn keep(self, stop: CancellationToken, mut reload: tokio::sync::watch::Receiver<u64>) {
        let mut wait = BACKOFF_MIN;
        while !stop.is_cancelled() {
            let started = Instant::now();
            match self.start() {
                Ok(mut child) => {
                    let Some(status) = watch(&mut child, &stop, &mut reload).await else {
                        leave(child).await;
                        return;
                    };
                    tracing::warn!("the local agent has ended ({status}) and is started again");
                }
                Err(error) => tracing::error!("{error:#}"),
            }
            if started.elapsed() >= WELL {
                wait = BACKOFF_MIN;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            wait = (wait * 2).min(BACKOFF_MAX);
        }
    }
}

/// Waits for the end of the child; `None` when it is to be stopped before.
async fn watch(
    child: &mut Child,
    stop: &CancellationToken,
    reload: &mut tokio::sync::watch::Receiver<u64>,
) -> Option<String> {
    loop {
        tokio::select! {
            ended = child.wait() => return Some(ended.map_or_else(|error| error.to_string(), |status: ExitStatus| status.to_string())),
            () = stop.cancelled() => return None,
            Ok(()) = reload.changed() => signal(child, Signal::SIGHUP),
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    // No id: it has ended and was waited for.
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok())
        && let Err(error) = kill(Pid::from_raw(pid), signal)
    {
        tracing::warn!("cannot send {signal} to the local agent: {error}");
    }
}

async fn leave(mut child: Child) {
    signal(&child, Signal::SIGTERM);
    if tokio::time::timeout(LEAVE, child.wait()).await.is_err() {
        tracing::warn!("the local agent does not leave and is killed");
        if let Err(error) = child.kill().await {
            tracing::error!("cannot kill the local agent: {error}");
        }
    }
}
