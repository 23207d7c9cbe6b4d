//! One control command of a supervised process, carried out by a runner like an atomic task: at most once, whatever becomes of the agent
//! meanwhile, and with its true end on disk. What the command is for, and what follows from how it ended, is left to [`crate::proc`].

use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use gse_core::lifecycle::Lifecycle;
use tokio::io::AsyncReadExt;
use tokio::process::{ChildStdout, Command};

use super::job::{Ended, Files, Job, Outcome, status};
use super::orphans;
use super::record::{Record, sync_dir};

/// Between two looks at a command that an earlier agent process has started, or whose runner has not told anything.
const LOOK: Duration = Duration::from_millis(200);
/// How long after a restart of the agent a runner may take to show that it exists.
const SHOW_UP: Duration = Duration::from_secs(3);
/// How long the output must be quiet after the command has ended, and how long it may go on: a daemon may hold it.
const QUIET_MS: u64 = 200;
const CHATTER_MS: u64 = 1_000;
/// From asking to killing when the time is over.
const GRACE_MS: u64 = 1_000;
/// Longest end that is set aside for.
const RESERVE: usize = 4096;
/// What a runner may take longer than its command: until the processes that resist are given up.
const MARGIN: Duration = Duration::from_secs(30);

/// What is to be done.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    /// Account.
    pub(crate) user: String,
    /// Where; must exist.
    pub(crate) work_dir: String,
    /// What the account's shell is given.
    pub(crate) command: String,
    /// How long it may take.
    pub(crate) timeout: Duration,
    /// Bytes of output kept.
    pub(crate) output_limit: u64,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    /// It ran and exited with 0.
    pub(crate) ok: bool,
    /// What it printed, both streams, valid UTF-8.
    pub(crate) output: String,
    /// Why it is not `ok`, for people.
    pub(crate) why: String,
    /// When it began and ended, unix milliseconds.
    pub(crate) start_ms: u64,
    /// See `start_ms`.
    pub(crate) end_ms: u64,
}

/// The agent is stopping: the runner goes on, the next agent process takes over.
#[derive(Debug)]
pub(crate) struct Leaving;

fn files(dir: &Path) -> Files {
    Files::new(dir, 0)
}

/// Whether a command was (or was about to be) started in `dir`. Blocking.
pub(crate) fn was_started(dir: &Path) -> bool {
    files(dir).starting().exists()
}

/// Carries `order` out in the directory `dir`, which is its alone; takes it up where it is if it was started before.
///
/// # Errors
/// [`Leaving`] when the agent stops.
pub(crate) async fn carry_out(
    dir: PathBuf,
    order: Order,
    self_exec: &[OsString],
    life: &Lifecycle,
) -> Result<End, Leaving> {
    let limit = order.timeout + MARGIN;
    let prepared = {
        let (dir, lead) = (dir.clone(), self_exec.iter().skip(1).cloned().collect());
        tokio::task::spawn_blocking(move || prepare(&dir, &order, lead)).await
    };
    let fresh = match prepared {
        Ok(Ok(fresh)) => fresh,
        Ok(Err(error)) => return Ok(not_run(format!("not run: its start cannot be recorded: {error}"))),
        Err(error) => return Ok(not_run(format!("not run: the agent failed inside: {error}"))),
    };
    let pipe = match (fresh, self_exec.first()) {
        (false, _) => None,
        (true, Some(program)) => match start(program, &self_exec[1..], &dir, life) {
            Ok(pipe) => pipe,
            Err(error) => {
                return Ok(not_run(format!(
                    "not run: the agent's own program {} cannot be started: {error}",
                    program.display()
                )));
            }
        },
        (true, None) => return Ok(not_run("not run: the agent does not know its own program".to_owned())),
    };
    let ended = follow(&dir, pipe, limit, life).await?;
    let read = tokio::task::spawn_blocking(move || end_of(&dir, &ended)).await;
    Ok(read.unwrap_or_else(|error| not_run(format!("its end cannot be read: {error}"))))
}

fn not_run(why: String) -> End {
    let now = super::job::now_ms();
    End {
        ok: false,
        output: String::new(),
        why,
        start_ms: now,
        end_ms: now,
    }
}

/// Puts everything down that a runner needs. False if that was done before: then it is, or may be, under way. Blocking.
fn prepare(dir: &Path, order: &Order, lead: Vec<OsString>) -> io::Result<bool> {
    let files = files(dir);
    if files.starting().exists() {
        return Ok(false);
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let job = Job {
        lead,
        user: order.user.clone(),
        command: order.command.clone(),
        timeout_ms: u64::try_from(order.timeout.as_millis()).unwrap_or(u64::MAX),
        kill_grace_ms: GRACE_MS,
        quiet_ms: QUIET_MS,
        chatter_ms: CHATTER_MS,
        output_limit: order.output_limit,
        work_dir: order.work_dir.clone(),
        keep_daemons: true,
        ..Job::default()
    };
    job.to_record().write_for_this_boot(&files.job())?;
    let mut reserve = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(files.reserve())?;
    reserve.write_all(&[0u8; RESERVE])?;
    reserve.sync_all()?;
    File::create(files.starting())?;
    sync_dir(dir)?;
    Ok(true)
}

fn start(program: &OsString, lead: &[OsString], dir: &Path, life: &Lifecycle) -> io::Result<Option<ChildStdout>> {
    let mut command = Command::new(program);
    command.args(lead).arg("run").arg(dir).arg("0");
    command
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(false);
    let (mut child, pid) = orphans::spawn_owned(&mut command)?;
    let pipe = child.stdout.take();
    let owner = life.clone();
    life.spawn_contained("command runner", async move {
        tokio::select! {
            status = child.wait() => {
                if let Err(error) = status {
                    tracing::warn!(pid, %error, "a command's runner could not be waited for");
                }
                orphans::disown(pid);
            }
            // One that outlives the agent is not waited for.
            () = owner.draining() => {}
        }
    });
    Ok(pipe)
}

enum Look {
    Ended(Box<Ended>),
    Running,
    /// Nobody holds the runner's lock, and there is no end.
    Nobody,
}

fn look(dir: &Path) -> Look {
    let files = files(dir);
    // The lock before the end: a runner writes the end first and lets the lock go afterwards.
    let lock = File::open(files.starting());
    let locked = lock.as_ref().is_ok_and(|file| file.try_lock().is_ok());
    let end = Record::read(&files.end()).and_then(|record| Ended::from_record(&record));
    match end {
        Ok(end) => Look::Ended(Box::new(end)),
        Err(_) if locked => Look::Nobody,
        Err(_) => Look::Running,
    }
}

/// Follows the runner to its end.
async fn follow(
    dir: &Path,
    mut pipe: Option<ChildStdout>,
    limit: Duration,
    life: &Lifecycle,
) -> Result<Ended, Leaving> {
    let began = tokio::time::Instant::now();
    let mut nobody_since: Option<tokio::time::Instant> = None;
    let mut buffer = [0u8; 256];
    loop {
        let seen = {
            let dir = dir.to_owned();
            tokio::task::spawn_blocking(move || look(&dir))
                .await
                .unwrap_or(Look::Running)
        };
        match seen {
            Look::Ended(ended) => return Ok(*ended),
            Look::Running => nobody_since = None,
            // It may just be being started, by this process or by the one before.
            Look::Nobody => {
                let since = *nobody_since.get_or_insert_with(tokio::time::Instant::now);
                if since.elapsed() >= SHOW_UP {
                    return Ok(give_up(dir, "the process that ran it was killed: it is not known how it ended").await);
                }
            }
        }
        if began.elapsed() >= limit {
            return Ok(give_up(
                dir,
                "the process that runs it does not react: it is not known how it ended",
            )
            .await);
        }
        tokio::select! {
            () = life.draining() => return Err(Leaving),
            read = async {
                match &mut pipe {
                    Some(pipe) => pipe.read(&mut buffer).await,
                    None => std::future::pending().await,
                }
            } => if !matches!(read, Ok(n) if n > 0) {
                pipe = None;
            },
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Makes sure that nobody runs it any more, nor ever will: the end is written by the one who holds the lock.
async fn give_up(dir: &Path, why: &str) -> Ended {
    let ended = Ended::without_run(Outcome::unknown(why));
    let (dir, record) = (dir.to_owned(), ended.to_record());
    let written = tokio::task::spawn_blocking(move || {
        let files = files(&dir);
        // While this is held no runner begins; one that can't have it is going, and its own end takes the place of this one.
        let lock = File::open(files.starting())?;
        let _held = lock.try_lock();
        if files.end().exists() {
            return Record::read(&files.end())
                .and_then(|record| Ended::from_record(&record))
                .map(Some);
        }
        record.write(&files.end())?;
        sync_dir(&dir).map(|()| None)
    });
    match written.await {
        Ok(Ok(Some(true_end))) => true_end,
        Ok(Ok(None)) => ended,
        Ok(Err(error)) => {
            tracing::error!(%error, "the end of a control command cannot be recorded");
            ended
        }
        Err(error) => {
            tracing::error!(%error, "the end of a control command cannot be recorded");
            ended
        }
    }
}

fn end_of(dir: &Path, ended: &Ended) -> End {
    let files = files(dir);
    let mut bytes = Vec::new();
    // Nothing was printed, or nothing is left of it.
    if let Ok(file) = File::open(files.out()) {
        file.take(ended.output_len).read_to_end(&mut bytes).ok();
    }
    let outcome = &ended.outcome;
    let ok = outcome.status == status::SUCCEEDED;
    let why = match (ok, outcome.message.is_empty()) {
        (true, _) => String::new(),
        (false, false) => outcome.message.clone(),
        (false, true) => format!("exit status {}", outcome.exit_code),
    };
    End {
        ok,
        output: String::from_utf8_lossy(&bytes).into_owned(),
        why,
        start_ms: ended.start_ms,
        end_ms: ended.end_ms,
    }
}
