//! A real `gse up` on free ports and a directory of its own, and the other commands against it.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::{Instant, sleep, timeout};

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The program with nothing of the surroundings in its way.
pub(crate) fn gse(data: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gse"));
    for name in [
        "GSE_API",
        "GSE_APP_CODE",
        "GSE_APP_SECRET",
        "GSE_CA",
        "GSE_DBA_URL",
        "GSE_DBA_USER",
        "GSE_DBA_PASSWORD",
        "XDG_DATA_HOME",
    ] {
        command.env_remove(name);
    }
    command.env("GSE_DATA", data).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Runs a command to its end.
pub(crate) async fn finish(command: &mut Command) -> Done {
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output();
    timeout(PATIENCE, output)
        .await
        .expect("the command ends")
        .unwrap()
        .into()
}

/// The outcome of something that must not take long.
pub(crate) async fn soon<T>(work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.expect("it happens in time")
}

/// A running `gse up`.
pub(crate) struct Up {
    pub(crate) data: PathBuf,
    pub(crate) text: String,
    child: Child,
    _lines: Lines<BufReader<ChildStdout>>,
}

impl Up {
    /// Starts one and waits for its table.
    pub(crate) async fn start(data: &Path) -> Self {
        let mut child = gse(data)
            .args(["up", "--any-port"])
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut text = String::new();
        let read = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                text += &(line + "\n");
                if text.contains("Ctrl-C stops it") {
                    return true;
                }
            }
            false
        };
        let up = timeout(PATIENCE, read).await.expect("gse up prints its table in time");
        assert!(up, "gse up ended before it was up: {text}");
        Self {
            data: data.to_owned(),
            text,
            child,
            _lines: lines,
        }
    }

    /// One of the other commands.
    pub(crate) async fn gse(&self, args: &[&str]) -> Done {
        finish(gse(&self.data).args(args)).await
    }

    /// The id of the local agent.
    pub(crate) fn agent_id(&self) -> String {
        let text = std::fs::read_to_string(self.data.join("up.toml")).unwrap();
        text.parse::<toml::Table>().unwrap()["agent_id"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// Its process.
    pub(crate) fn agent_pid(&self) -> Option<i32> {
        std::fs::read_to_string(self.data.join("agent/agent.pid"))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// Sends a signal to `gse up`.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().unwrap().try_into().unwrap()), signal).unwrap();
    }

    /// Waits for the end of `gse up`.
    pub(crate) async fn ended(mut self) -> std::process::ExitStatus {
        timeout(PATIENCE, self.child.wait())
            .await
            .expect("gse up ends")
            .unwrap()
    }

    /// SIGTERM, and the end.
    pub(crate) async fn stop(self) -> std::process::ExitStatus {
        self.signal(Signal::SIGTERM);
        self.ended().await
    }
}

/// Processes that have the directory on their command line.
pub(crate) fn processes_of(dir: &Path) -> Vec<String> {
    let dir = dir.display().to_string();
    let lines = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let entry = entry.unwrap();
        entry.file_name().to_str()?.parse::<u32>().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&line).replace('\0', " "))
    });
    lines.filter(|line| line.contains(&dir)).collect()
}

/// Waits until `look` gives something.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < until, "not in time: {what}");
        sleep(Duration::from_millis(100)).await;
    }
}
