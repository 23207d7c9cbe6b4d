//! A host for the executor's tests: a data directory, an executor with quick settings, and a server's view of its reports.

#![allow(dead_code, reason = "each test program uses its part of this")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gse_agent::exec::{ExecConfig, Executor, Link, Report};
use gse_core::lifecycle::Lifecycle;
use gse_proto::session::{AtomicTask, Dispatch, Row, Script, Stored, TargetRef};
use tokio::sync::mpsc::Receiver;

pub(crate) const RUNNING: i32 = 1;
pub(crate) const SUCCEEDED: i32 = 2;
pub(crate) const TIMED_OUT: i32 = 3;
pub(crate) const STOPPED: i32 = 4;
pub(crate) const FAILED: i32 = 5;
pub(crate) const LOST: i32 = 6;

/// No test waits longer for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock after 1970")
        .as_millis() as u64
}

pub(crate) fn config(dir: &Path) -> ExecConfig {
    ExecConfig {
        data_dir: dir.to_owned(),
        self_exec: vec![env!("CARGO_BIN_EXE_gse_agent").into(), "runner".into()],
        machine_id: "this-host".to_owned(),
        kill_grace_ms: 300,
        quiet_after_exit_ms: 200,
        max_chatter_after_exit_ms: 1000,
        resend_ms: 500,
        adopted_poll_ms: 50,
        ..ExecConfig::default()
    }
}

/// A finished atomic task, as the server has put it together.
#[derive(Debug, Clone)]
pub(crate) struct Done {
    pub(crate) row: Row,
    pub(crate) output: Vec<u8>,
}

impl Done {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.output).expect("output is always valid text")
    }

    pub(crate) fn codes(&self) -> (i32, i32, i32) {
        (self.row.error_code, self.row.status, self.row.exit_code)
    }
}

pub(crate) struct Host {
    pub(crate) dir: PathBuf,
    pub(crate) config: ExecConfig,
    pub(crate) executor: Executor,
    pub(crate) life: Lifecycle,
    pub(crate) reports: Receiver<Report>,
    /// Output by target and atomic task, as stored by the server.
    pub(crate) stored: HashMap<(String, u32), Vec<u8>>,
    pub(crate) running: Vec<(String, u32)>,
    pub(crate) done: HashMap<(String, u32), Done>,
    /// Whether terminal rows are acknowledged.
    pub(crate) acknowledge: bool,
}

impl Host {
    pub(crate) async fn start(config: ExecConfig) -> Self {
        let life = Lifecycle::new("exec-test");
        let executor = Executor::start(config.clone(), &life)
            .await
            .expect("the executor starts");
        let reports = executor.attach(link());
        Self {
            dir: config.data_dir.clone(),
            config,
            executor,
            life,
            reports,
            stored: HashMap::new(),
            running: Vec::new(),
            done: HashMap::new(),
            acknowledge: true,
        }
    }

    /// As if the agent had been killed and started again.
    pub(crate) async fn restart(self) -> Self {
        let config = self.config.clone();
        self.stop().await;
        Self::start(config).await
    }

    /// The agent's part in this process ends; its runners are not told.
    pub(crate) async fn stop(self) {
        let Self {
            executor,
            life,
            reports,
            ..
        } = self;
        drop(reports);
        life.abort();
        life.finished(Duration::from_secs(5)).await;
        drop(executor);
    }

    pub(crate) fn order(&self, task: &str, commands: &[&str]) -> Dispatch {
        let atomic = |(at, command): (usize, &&str)| AtomicTask {
            id: at as u32,
            command: (*command).to_owned(),
            timeout_ms: 20_000,
            after: (0..at as u32).collect(),
        };
        Dispatch {
            target: Some(target(task)),
            epoch: self.executor.epoch(),
            user: "root".to_owned(),
            not_after_ms: now_ms() + 60_000,
            output_limit: 5 * 1024 * 1024,
            scripts: Vec::new(),
            atomic_tasks: commands.iter().enumerate().map(atomic).collect(),
            asked_id: "0:127.0.0.1".to_owned(),
        }
    }

    /// Takes one report as a server would. False when none came in time.
    pub(crate) async fn take(&mut self, wait: Duration) -> bool {
        let Ok(report) = tokio::time::timeout(wait, self.reports.recv()).await else {
            return false;
        };
        match report.expect("the session goes on") {
            Report::Output(output) => {
                let target = output.target.expect("a target");
                assert!(output.data.len() <= 64 * 1024 && !output.data.is_empty());
                std::str::from_utf8(&output.data).expect("whole characters");
                let key = (target.task_id.clone(), output.atomic);
                let all = self.stored.entry(key).or_default();
                if output.offset == all.len() as u64 {
                    all.extend_from_slice(&output.data);
                }
                let offset = all.len() as u64;
                self.executor.stored(Stored {
                    target: Some(target),
                    atomic: output.atomic,
                    offset,
                    terminal: false,
                });
            }
            Report::Row(row) => {
                let target = row.target.clone().expect("a target");
                let key = (target.task_id.clone(), row.atomic);
                if row.status == RUNNING {
                    assert_eq!(row.error_code, 115);
                    assert!(row.start_ms > 0);
                    self.running.push(key);
                    return true;
                }
                assert!(row.tail.len() <= 64 * 1024);
                assert!(row.start_ms > 0 && row.end_ms >= row.start_ms, "{row:?}");
                assert!(row.status == SUCCEEDED || row.exit_code != 0, "{row:?}");
                let mut output = self.stored.get(&key).cloned().unwrap_or_default();
                output.truncate(usize::try_from(row.tail_offset).expect("an offset"));
                assert_eq!(
                    output.len() as u64,
                    row.tail_offset,
                    "the tail does not follow what is stored"
                );
                output.extend_from_slice(&row.tail);
                assert_eq!(output.len() as u64, row.output_len);
                if self.acknowledge {
                    self.executor.stored(Stored {
                        target: Some(target),
                        atomic: row.atomic,
                        offset: row.output_len,
                        terminal: true,
                    });
                }
                self.done.insert(key, Done { row, output });
            }
        }
        true
    }

    /// Waits for the terminal row.
    pub(crate) async fn done(&mut self, task: &str, atomic: u32) -> Done {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(done) = self.done.get(&(task.to_owned(), atomic)) {
                return done.clone();
            }
            assert!(Instant::now() < until, "no row of {task} {atomic} came");
            self.take(Duration::from_millis(100)).await;
        }
    }

    pub(crate) async fn run(&mut self, order: Dispatch) -> Done {
        let task = order.target.as_ref().expect("a target").task_id.clone();
        self.executor.dispatch(order).await;
        self.done(&task, 0).await
    }

    pub(crate) async fn sh(&mut self, task: &str, command: &str) -> Done {
        let order = self.order(task, &[command]);
        self.run(order).await
    }

    /// Takes reports until `is` holds.
    pub(crate) async fn until(&mut self, what: &str, is: impl Fn() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !is() {
            assert!(Instant::now() < until, "in vain: {what}");
            self.take(Duration::from_millis(20)).await;
        }
    }
}

pub(crate) fn link() -> Link {
    Link {
        stream_window: 256 * 1024,
        session_window: 4 * 1024 * 1024,
        server_time_ms: now_ms(),
    }
}

pub(crate) fn target(task: &str) -> TargetRef {
    TargetRef {
        task_id: task.to_owned(),
        bucket: 0,
        index: 7,
    }
}

pub(crate) fn script(dir: &Path, name: &str, content: &str) -> Script {
    Script {
        name: name.to_owned(),
        store_dir: dir.to_str().expect("a plain path").to_owned(),
        content: content.as_bytes().to_vec().into(),
    }
}

/// Processes whose command line holds `mark`.
pub(crate) fn processes_with(mark: &str) -> Vec<i32> {
    let me = std::process::id().to_string();
    let entries = std::fs::read_dir("/proc").expect("the process table");
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str().map(str::to_owned))
        .filter(|pid| pid.bytes().all(|b| b.is_ascii_digit()) && *pid != me)
        .filter(|pid| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).replace('\0', " ").contains(mark))
        })
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

/// A directory that other accounts may enter, below one that everybody may write to.
pub(crate) fn open_dir() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::Builder::new()
        .prefix("gse-exec-test-")
        .tempdir_in("/tmp")
        .expect("a temporary directory");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("chmod");
    dir
}

pub(crate) fn is_root() -> bool {
    nix::unistd::Uid::effective().is_root()
}
