//! What the agent, a script's runner and its stage tell each other through files and a socket: the job, the fact that it runs
//! and how it ended. Only the contents; when each is written is left to the three of them.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::record::Record;
use super::room::ScriptLimits;

/// Inner error codes of rows, from the contract's table.
pub(super) mod code {
    /// See the status.
    pub(in crate::exec) const NONE: i32 = 0;
    /// It is not known what happened.
    pub(in crate::exec) const UNKNOWN: i32 = -1;
    /// It could not be done, for a reason that the text gives.
    pub(in crate::exec) const FAILED: i32 = 101;
    /// The script's file or directory could not be made.
    pub(in crate::exec) const SCRIPT_FILE: i32 = 111;
    /// Not started in time.
    pub(in crate::exec) const LATE: i32 = 120;
    /// The agent has too much to do.
    pub(in crate::exec) const BUSY: i32 = 121;
    /// The OS account does not exist.
    pub(in crate::exec) const NO_ACCOUNT: i32 = 122;
    /// Stopped on request.
    pub(in crate::exec) const STOPPED: i32 = 126;
}

/// States of rows, from the contract's table.
pub(super) mod status {
    /// Exit 0.
    pub(in crate::exec) const SUCCEEDED: i32 = 2;
    /// Ran longer than allowed.
    pub(in crate::exec) const TIMED_OUT: i32 = 3;
    /// Stopped on request.
    pub(in crate::exec) const STOPPED: i32 = 4;
    /// Anything else that is known.
    pub(in crate::exec) const FAILED: i32 = 5;
    /// The agent lost sight of it.
    pub(in crate::exec) const LOST: i32 = 6;
}

/// Exit code of a script that ran out of time.
pub(super) const EXIT_TIMED_OUT: i32 = 124;
/// Exit code of a script that was stopped.
pub(super) const EXIT_STOPPED: i32 = 143;
/// Exit code in rows of scripts that did not run.
pub(super) const EXIT_NOT_RUN: i32 = 1;
/// Exit code when the true one is not known.
pub(super) const EXIT_UNKNOWN: i32 = 255;

/// Unix milliseconds by this host's clock.
pub(super) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
        .unwrap_or(0)
}

/// Files of one atomic task in the target's directory.
#[derive(Debug, Clone)]
pub(super) struct Files {
    dir: PathBuf,
    atomic: usize,
}

impl Files {
    /// Those of atomic task number `atomic`.
    pub(super) fn new(dir: &Path, atomic: usize) -> Self {
        Self {
            dir: dir.to_owned(),
            atomic,
        }
    }

    fn named(&self, kind: &str) -> PathBuf {
        self.dir.join(format!("{}.{kind}", self.atomic))
    }

    /// The target's directory.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Exists, and is on disk, before a runner is started; locked by the runner for as long as it lives.
    pub(super) fn starting(&self) -> PathBuf {
        self.named("starting")
    }

    /// The job.
    pub(super) fn job(&self) -> PathBuf {
        self.named("job")
    }

    /// Written when the job's first process exists.
    pub(super) fn run(&self) -> PathBuf {
        self.named("run")
    }

    /// Output kept so far.
    pub(super) fn out(&self) -> PathBuf {
        self.named("out")
    }

    /// How it ended; the runner's last act.
    pub(super) fn end(&self) -> PathBuf {
        self.named("end")
    }

    /// Space set aside before the start, so that the end can be told on a disk that has become full.
    pub(super) fn reserve(&self) -> PathBuf {
        self.named("reserve")
    }
}

/// One script file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ScriptFile {
    /// Plain file name.
    pub(super) name: String,
    /// Absolute directory.
    pub(super) dir: String,
    /// The file's bytes; of a file that is there already only the beginning.
    pub(super) content: Vec<u8>,
}

/// One atomic task for a runner.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Job {
    /// Arguments that put this executable into runner mode.
    pub(super) lead: Vec<OsString>,
    /// The OS account.
    pub(super) user: String,
    /// What its shell is given.
    pub(super) command: String,
    /// Files to write first.
    pub(super) scripts: Vec<ScriptFile>,
    /// Whether the files are still to be written; an earlier atomic task of the target may have done so.
    pub(super) write_scripts: bool,
    /// Where and how much of them.
    pub(super) script_limits: ScriptLimits,
    /// Time the job may take.
    pub(super) timeout_ms: u64,
    /// Time that was asked for, when that was more than the agent allows; else 0.
    pub(super) refused_timeout_ms: u64,
    /// Whether it gets a control group of its own if that is possible.
    pub(super) control_group: bool,
    /// From asking processes to end to ending them.
    pub(super) kill_grace_ms: u64,
    /// How long the output must be quiet after the main process has ended.
    pub(super) quiet_ms: u64,
    /// How long it may go on after that at most.
    pub(super) chatter_ms: u64,
    /// Bytes of output kept.
    pub(super) output_limit: u64,
    /// Where it runs; empty: in the account's home directory.
    pub(super) work_dir: String,
    /// It exists to leave processes behind: those in a session of their own are not ended with it when it runs out of time, and none
    /// counts as left over when a runner is lost.
    pub(super) keep_daemons: bool,
}

impl Job {
    /// The record of this job.
    pub(super) fn to_record(&self) -> Record {
        let mut record = Record::default();
        record.set_number("lead", self.lead.len() as i128);
        for (at, word) in self.lead.iter().enumerate() {
            record.set(format!("lead.{at}"), word.as_bytes());
        }
        record.set("user", &self.user).set("command", &self.command);
        record.set_number("scripts", self.scripts.len() as i128);
        for (at, script) in self.scripts.iter().enumerate() {
            record.set(format!("script.{at}.name"), &script.name);
            record.set(format!("script.{at}.dir"), &script.dir);
            record.set(format!("script.{at}.content"), &script.content);
        }
        record.set_number("write_scripts", i128::from(self.write_scripts));
        self.script_limits.put(&mut record);
        record
            .set_number("timeout_ms", self.timeout_ms)
            .set_number("refused_timeout_ms", self.refused_timeout_ms);
        record.set_number("control_group", i128::from(self.control_group));
        record.set_number("kill_grace_ms", self.kill_grace_ms);
        record.set_number("quiet_ms", self.quiet_ms);
        record.set_number("chatter_ms", self.chatter_ms);
        record.set_number("output_limit", self.output_limit);
        record.set("work_dir", &self.work_dir);
        record.set_number("keep_daemons", i128::from(self.keep_daemons));
        record
    }

    /// Reads it back.
    ///
    /// # Errors
    /// `InvalidData` when something is missing.
    pub(super) fn from_record(record: &Record) -> io::Result<Self> {
        let count: usize = record.number("lead")?;
        let lead = (0..count).map(|at| Ok(OsString::from_vec(record.need(&format!("lead.{at}"))?.to_vec())));
        let lead = lead.collect::<io::Result<_>>()?;
        let count: usize = record.number("scripts")?;
        let scripts = (0..count).map(|at| {
            Ok(ScriptFile {
                name: record.text(&format!("script.{at}.name"))?,
                dir: record.text(&format!("script.{at}.dir"))?,
                content: record.need(&format!("script.{at}.content"))?.to_vec(),
            })
        });
        Ok(Self {
            lead,
            user: record.text("user")?,
            command: record.text("command")?,
            scripts: scripts.collect::<io::Result<_>>()?,
            write_scripts: record.number::<u8>("write_scripts")? != 0,
            script_limits: ScriptLimits::from_record(record)?,
            timeout_ms: record.number("timeout_ms")?,
            refused_timeout_ms: record.number("refused_timeout_ms").unwrap_or(0),
            control_group: record.number::<u8>("control_group").unwrap_or(0) != 0,
            kill_grace_ms: record.number("kill_grace_ms")?,
            quiet_ms: record.number("quiet_ms")?,
            chatter_ms: record.number("chatter_ms")?,
            output_limit: record.number("output_limit")?,
            // One of an earlier version has neither.
            work_dir: record.text("work_dir").unwrap_or_default(),
            keep_daemons: record.number::<u8>("keep_daemons").unwrap_or(0) != 0,
        })
    }
}

/// A job that runs: enough to find its processes again from another agent process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Running {
    /// The runner.
    pub(super) runner: i32,
    /// When it started, in ticks since boot.
    pub(super) runner_started: u64,
    /// The job's first process, which leads its process group.
    pub(super) main: i32,
    /// Inode of the pipe that the output goes through.
    pub(super) pipe: u64,
    /// Directory of the job's control group; empty when it has none.
    pub(super) cgroup: String,
    /// The boot in which all this is true.
    pub(super) boot: String,
    /// Unix milliseconds.
    pub(super) start_ms: u64,
}

impl Running {
    /// The record of it.
    pub(super) fn to_record(&self) -> Record {
        let mut record = Record::default();
        record
            .set_number("runner", self.runner)
            .set_number("runner_started", self.runner_started);
        record.set_number("main", self.main).set_number("pipe", self.pipe);
        record.set("cgroup", &self.cgroup);
        record.set("boot", &self.boot).set_number("start_ms", self.start_ms);
        record
    }

    /// Reads it back.
    ///
    /// # Errors
    /// `InvalidData` when something is missing.
    pub(super) fn from_record(record: &Record) -> io::Result<Self> {
        Ok(Self {
            runner: record.number("runner")?,
            runner_started: record.number("runner_started")?,
            main: record.number("main")?,
            pipe: record.number("pipe")?,
            // One of an earlier version has none.
            cgroup: record.text("cgroup").unwrap_or_default(),
            boot: record.text("boot")?,
            start_ms: record.number("start_ms")?,
        })
    }
}

/// What a row says about how something ended, or why it did not begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Outcome {
    /// See [`code`].
    pub(super) error_code: i32,
    /// See [`status`].
    pub(super) status: i32,
    /// Never 0 unless it succeeded.
    pub(super) exit_code: i32,
    /// For a person; may be empty when the script itself is the answer.
    pub(super) message: String,
}

impl Outcome {
    /// A failure that happened before the script could run.
    pub(super) fn not_run(error_code: i32, message: impl Into<String>) -> Self {
        Self {
            error_code,
            status: status::FAILED,
            exit_code: EXIT_NOT_RUN,
            message: message.into(),
        }
    }

    /// Nobody can tell what happened.
    pub(super) fn unknown(message: impl Into<String>) -> Self {
        Self {
            error_code: code::UNKNOWN,
            status: status::LOST,
            exit_code: EXIT_UNKNOWN,
            message: message.into(),
        }
    }

    /// Stopped on request.
    pub(super) fn stopped(message: impl Into<String>) -> Self {
        Self {
            error_code: code::STOPPED,
            status: status::STOPPED,
            exit_code: EXIT_STOPPED,
            message: message.into(),
        }
    }

    /// Ended by itself with this code.
    pub(super) fn exited(exit_code: i32) -> Self {
        let status = if exit_code == 0 {
            status::SUCCEEDED
        } else {
            status::FAILED
        };
        Self {
            error_code: code::NONE,
            status,
            exit_code,
            message: String::new(),
        }
    }

    /// Whether dependents may run.
    pub(super) fn succeeded(&self) -> bool {
        self.error_code == code::NONE && self.status == status::SUCCEEDED
    }

    /// Puts it into a record.
    pub(super) fn put(&self, record: &mut Record) {
        record
            .set_number("error_code", self.error_code)
            .set_number("status", self.status);
        record
            .set_number("exit_code", self.exit_code)
            .set("message", &self.message);
    }

    /// Takes it out of a record.
    ///
    /// # Errors
    /// `InvalidData` when something is missing.
    pub(super) fn take(record: &Record) -> io::Result<Self> {
        Ok(Self {
            error_code: record.number("error_code")?,
            status: record.number("status")?,
            exit_code: record.number("exit_code")?,
            message: record.text("message")?,
        })
    }
}

/// The end of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ended {
    /// How.
    pub(super) outcome: Outcome,
    /// Unix milliseconds.
    pub(super) start_ms: u64,
    /// Unix milliseconds.
    pub(super) end_ms: u64,
    /// Bytes of output kept.
    pub(super) output_len: u64,
    /// The script's own mark.
    pub(super) tag: String,
}

impl Ended {
    /// An end without a run.
    pub(super) fn without_run(outcome: Outcome) -> Self {
        let now = now_ms();
        Self {
            outcome,
            start_ms: now,
            end_ms: now,
            output_len: 0,
            tag: String::new(),
        }
    }

    /// The record of it.
    pub(super) fn to_record(&self) -> Record {
        let mut record = Record::default();
        self.outcome.put(&mut record);
        record
            .set_number("start_ms", self.start_ms)
            .set_number("end_ms", self.end_ms);
        record.set_number("output_len", self.output_len).set("tag", &self.tag);
        record
    }

    /// Reads it back.
    ///
    /// # Errors
    /// `InvalidData` when something is missing.
    pub(super) fn from_record(record: &Record) -> io::Result<Self> {
        Ok(Self {
            outcome: Outcome::take(record)?,
            start_ms: record.number("start_ms")?,
            end_ms: record.number("end_ms")?,
            output_len: record.number("output_len")?,
            tag: record.text("tag")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let job = Job {
            lead: vec!["a b".into(), OsString::from_vec(vec![0xff])],
            user: "app".into(),
            command: "x\ny".into(),
            scripts: vec![ScriptFile {
                name: "n".into(),
                dir: "/d".into(),
                content: vec![0, 10, 255],
            }],
            write_scripts: true,
            script_limits: ScriptLimits {
                roots: vec!["/a".into(), "/b c".into()],
                prefix: "p".into(),
                dir_bytes: 6,
                free_bytes: 7,
            },
            timeout_ms: 1,
            refused_timeout_ms: 8,
            control_group: true,
            kill_grace_ms: 2,
            quiet_ms: 3,
            chatter_ms: 4,
            output_limit: 5,
            work_dir: "/w d".into(),
            keep_daemons: true,
        };
        assert_eq!(Job::from_record(&job.to_record()).expect("a job"), job);
        let run = Running {
            runner: 1,
            runner_started: u64::MAX,
            main: 2,
            pipe: 3,
            cgroup: "c".into(),
            boot: "b".into(),
            start_ms: 4,
        };
        assert_eq!(Running::from_record(&run.to_record()).expect("a run"), run);
        let end = Ended {
            outcome: Outcome::unknown("why"),
            start_ms: 1,
            end_ms: 2,
            output_len: 3,
            tag: "t".into(),
        };
        assert_eq!(Ended::from_record(&end.to_record()).expect("an end"), end);
    }

    #[test]
    fn only_success_has_exit_0() {
        assert!(Outcome::exited(0).succeeded());
        for other in [
            Outcome::exited(1),
            Outcome::unknown(""),
            Outcome::stopped(""),
            Outcome::not_run(101, ""),
        ] {
            assert!(!other.succeeded() && other.exit_code != 0);
        }
    }
}
