//! Starting, watching and killing the real programs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a program may take to say that it is ready.
const START: Duration = Duration::from_secs(20);

/// Directory of programs to test in place of those of this workspace: as they were installed, or built before.
const PROGRAMS: &str = "GSE_TESTS_PROGRAMS";

/// Path of one of the workspace's programs, built if need be.
///
/// # Errors
/// When it can't be built.
pub fn binary(name: &str) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os(PROGRAMS) {
        return Ok(Path::new(&dir).join(name));
    }
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let dir = BUILT.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    match dir {
        Ok(dir) => Ok(dir.join(name)),
        Err(error) => bail!("{error}"),
    }
}

/// Path of the gse_task that can be told where to die, built if need be.
///
/// # Errors
/// When it can't be built.
pub fn failpoints_binary() -> Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let name = "gse_task_failpoints";
    if let Some(dir) = std::env::var_os(PROGRAMS) {
        return Ok(Path::new(&dir).join(name));
    }
    let build =
        || cargo_build(&["--workspace", "--features", "gse-task/failpoints", "--bin", name]).map(|dir| dir.join(name));
    let path = BUILT.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    path.clone().map_err(anyhow::Error::msg)
}

fn build() -> Result<PathBuf> {
    cargo_build(&["--workspace", "--bins"])
}

/// Builds in the target directory of the running test and says which one that is.
fn cargo_build(what: &[&str]) -> Result<PathBuf> {
    let test = std::env::current_exe().context("path of the test")?;
    // <target>/<profile>/deps/<test>
    let dir = test
        .parent()
        .and_then(Path::parent)
        .context("the test is not in a target directory")?
        .to_owned();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--quiet"])
        .args(what)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    if dir.ends_with("release") {
        command.arg("--release");
    }
    let done = command.status().context("cargo")?;
    anyhow::ensure!(done.success(), "the programs to be tested do not build");
    Ok(dir)
}

/// A running program. Killed when dropped.
#[derive(Debug)]
pub struct Child {
    /// For messages.
    pub name: String,
    child: std::process::Child,
    log: PathBuf,
    /// Listeners by name, once ready.
    pub addresses: BTreeMap<String, String>,
}

impl Child {
    /// Starts a program; its output goes to `log`.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("log {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
            addresses: BTreeMap::new(),
        })
    }

    /// Waits until the program has written its addresses.
    ///
    /// # Errors
    /// When it ends or takes too long; the end of its log is in the text.
    pub async fn ready(&mut self, addresses: &Path) -> Result<()> {
        let started = Instant::now();
        loop {
            if let Ok(text) = std::fs::read_to_string(addresses)
                && let Ok(read) = serde_json::from_str(&text)
            {
                self.addresses = read;
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status}: {}", self.name, self.log_tail());
            }
            if started.elapsed() > START {
                bail!("{} is not ready: {}", self.name, self.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Where a listener is.
    ///
    /// # Panics
    /// When there is no such listener.
    #[must_use]
    pub fn address(&self, listener: &str) -> &str {
        self.addresses
            .get(listener)
            .unwrap_or_else(|| panic!("{} has no listener {listener}: {:?}", self.name, self.addresses))
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process ids are small")
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("the process is there");
    }

    /// SIGKILL, and waits for the end.
    pub fn kill_9(&mut self) {
        // Gone already is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and waits for the end.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub async fn terminate(&mut self, limit: Duration) -> Result<std::process::ExitStatus> {
        self.signal(Signal::SIGTERM);
        self.wait(limit).await
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub async fn wait(&mut self, limit: Duration) -> Result<std::process::ExitStatus> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if started.elapsed() > limit {
                bail!("{} does not end: {}", self.name, self.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Memory it holds (RSS) in bytes.
    ///
    /// # Panics
    /// When the process is gone.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the process is there");
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        kib.expect("a process has memory") * 1024
    }

    /// SIGSTOP: it keeps everything and does nothing until [`Child::go_on`].
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Everything it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().rev().take(30).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {} ---\n{}", self.name, self.log_tail());
        }
        self.kill_9();
    }
}
