//! A swarm as a child process, so that its CPU and memory are not those of the harness.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;

use crate::site::Site;
use crate::swarm::Progress;

/// What kind of swarm.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SwarmOptions {
    /// Simulated agents.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=18_000))]
    pub(crate) agents: u32,
    /// Between a dispatch and its row.
    #[arg(long, default_value_t = 0, value_name = "MS")]
    pub(crate) delay_ms: u64,
    /// Output of every script.
    #[arg(long, default_value_t = 64, value_name = "BYTES")]
    pub(crate) output_bytes: u32,
    /// One certificate for all agents.
    #[arg(long)]
    pub(crate) shared_certificate: bool,
}

/// The child; killed when dropped.
pub(crate) struct SwarmChild {
    child: Child,
    stdin: ChildStdin,
    progress: watch::Receiver<Progress>,
}

impl SwarmChild {
    /// Starts it against the site.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) fn start(site: &Site, options: &SwarmOptions, more: &[&str]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe().context("path of this program")?);
        command
            .args(["swarm", "--stdin-commands", "--report-ms", "20"])
            .args(["--agents", &options.agents.to_string()])
            .args(site.agents()?.into_iter().flat_map(|server| ["--server", server]))
            .arg("--certs")
            .arg(site.certs())
            .args(["--delay-ms", &options.delay_ms.to_string()])
            .args(["--output-bytes", &options.output_bytes.to_string()])
            .args(more);
        if options.shared_certificate {
            command.arg("--shared-certificate");
        }
        Self::spawn(command)
    }

    /// Starts any program that prints the swarm's progress.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) fn spawn(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("starting the swarm")?;
        let stdin = child.stdin.take().context("input of the swarm")?;
        let stdout = child.stdout.take().context("output of the swarm")?;
        let (sender, progress) = watch::channel(Progress::default());
        tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                match serde_json::from_str(&line) {
                    Ok(now) => {
                        sender.send_replace(now);
                    }
                    Err(error) => eprintln!("a line of the swarm is not progress ({error}): {line}"),
                }
            }
        });
        Ok(Self { child, stdin, progress })
    }

    /// Its process.
    pub(crate) fn pid(&self) -> Result<u32> {
        self.child.id().context("the swarm has ended")
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()?)?);
        nix::sys::signal::kill(pid, signal).with_context(|| format!("{signal} to the swarm"))
    }

    /// SIGKILL, and waits for the end.
    ///
    /// # Errors
    /// When that does not come about.
    pub(crate) async fn kill_9(&mut self) -> Result<()> {
        self.child.kill().await.context("killing the swarm")
    }

    /// The last line.
    pub(crate) fn now(&self) -> Progress {
        self.progress.borrow().clone()
    }

    /// Waits for a state of the swarm.
    ///
    /// # Errors
    /// When it does not come within `limit`, or the swarm ends.
    pub(crate) async fn until(
        &mut self,
        what: &str,
        limit: Duration,
        is: impl Fn(&Progress) -> bool,
    ) -> Result<Instant> {
        let waited = tokio::time::timeout(limit, self.progress.wait_for(|now| is(now))).await;
        let ended = waited.map(|seen| seen.is_err());
        match ended {
            Ok(false) => Ok(Instant::now()),
            Ok(true) => bail!("the swarm has ended while waiting for: {what}"),
            Err(_) => bail!("not within {limit:?}: {what}: {:?}", self.now()),
        }
    }

    /// Waits until all agents are connected.
    ///
    /// # Errors
    /// As [`Self::until`].
    pub(crate) async fn all_connected(&mut self) -> Result<Instant> {
        let limit = Duration::from_secs(300);
        self.until("all agents connected", limit, |now| {
            now.agents > 0 && now.connected == now.agents
        })
        .await
    }

    /// Waits until so many rows have been acknowledged: that comes a little later than the rows can be read.
    ///
    /// # Errors
    /// As [`Self::until`].
    pub(crate) async fn all_acknowledged(&mut self, rows: u64) -> Result<Instant> {
        let limit = Duration::from_secs(60);
        self.until("all rows acknowledged", limit, |now| now.rows_acknowledged >= rows)
            .await
    }

    /// Progress with everything in it that has happened until now, and a little later.
    ///
    /// # Errors
    /// When the swarm does not answer.
    pub(crate) async fn settled(&mut self) -> Result<Progress> {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mark = self.now().mark + 1;
        self.stdin.write_all(format!("mark {mark}\n").as_bytes()).await?;
        self.stdin.flush().await.context("the swarm has ended")?;
        let limit = Duration::from_secs(30);
        self.until("progress up to now", limit, |now| now.mark >= mark).await?;
        Ok(self.now())
    }

    /// Sets the time between heartbeats; 0 for the server's.
    ///
    /// # Errors
    /// When the swarm has ended.
    pub(crate) async fn beat_every(&mut self, ms: u64) -> Result<()> {
        let command = format!("beat {ms}\n");
        self.stdin.write_all(command.as_bytes()).await?;
        self.stdin.flush().await.context("the swarm has ended")
    }
}
