//! The process beside each script: it outlives the agent, keeps the output, holds the time limit and leaves the true end on disk.
//! One thread, no runtime. It stays what the agent is (root, usually) and never touches anything of the account's; that is left to
//! [`super::stage`]. Starting it, and telling anybody else, is left to the agent.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::WaitStatus;
use nix::unistd::{Pid, dup2_stdout, pipe2, setsid};

use super::capture::Capture;
use super::cgroup::Cgroup;
use super::job::{EXIT_TIMED_OUT, Ended, Files, Job, Outcome, Running, code, now_ms, status};
use super::proc;
use super::record::{Record, sync_dir};
use super::tree::{self, Ending, Progress};

/// Between two looks at a tree that is being ended.
const LOOK_AGAIN: Duration = Duration::from_millis(25);
/// Notices about output are not sent more often.
const NOTICE_EVERY: Duration = Duration::from_millis(20);
/// How long processes may resist SIGKILL before the row is written without them.
pub(super) const GIVE_UP: Duration = Duration::from_secs(10);
/// How long the stage may take to read its job.
const HAND_OVER: Duration = Duration::from_secs(30);
/// The runner's arguments went wrong: nothing was started.
const USAGE: u8 = 64;

/// What the runner mode of this executable does: `run DIR NUMBER`, or `stage`. `args` are those behind the ones that select the
/// mode.
pub fn runner_main(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    proc::close_inherited();
    let mode = args.next().unwrap_or_default();
    if mode == "stage" {
        return super::stage::main();
    }
    let dir = args.next();
    let number = args.next().and_then(|n| n.to_str().and_then(|n| n.parse().ok()));
    match (mode == "run", dir, number) {
        (true, Some(dir), Some(number)) => run(&Files::new(Path::new(&dir), number)),
        _ => ExitCode::from(USAGE),
    }
}

fn run(files: &Files) -> ExitCode {
    let began = now_ms();
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGCHLD,
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGPIPE,
    ] {
        signals.add(signal);
    }
    // A handler where "ignore" was inherited: what is ignored never reaches the signal descriptor.
    let unused = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    for signal in [Signal::SIGTERM, Signal::SIGCHLD] {
        if signal_hook::flag::register(signal as i32, std::sync::Arc::clone(&unused)).is_err() {
            return ExitCode::from(1);
        }
    }
    if signals.thread_set_mask().is_err() {
        return ExitCode::from(1);
    }
    // Locked for as long as this process lives: the agent's proof that the job has not been lost. The agent takes the lock
    // itself, and writes an end, before it gives a job up; so after the lock there is either an end or the right to run.
    let lock = match OpenOptions::new().read(true).open(files.starting()) {
        Ok(file) => file,
        Err(_) => return ExitCode::from(1),
    };
    if lock.lock().is_err() || files.end().exists() {
        return ExitCode::from(1);
    }
    let result = start(files, &signals);
    let (ended, linger) = match result {
        Ok(mut script) => {
            let outcome = script.watch();
            (script.ended(outcome), Some(script))
        }
        Err(outcome) => {
            let ended = Ended {
                outcome,
                start_ms: began,
                end_ms: now_ms(),
                output_len: 0,
                tag: String::new(),
            };
            (ended, None)
        }
    };
    if leave_end(files, &ended).is_err() {
        // The agent sees a runner that died without an end and says so.
        return ExitCode::from(1);
    }
    // The agent's pipe ends here, so that it looks; what follows is for the script's daemons only.
    if let Ok(null) = OpenOptions::new().write(true).open("/dev/null") {
        dup2_stdout(&null).ok();
    }
    if let Some(mut script) = linger {
        script.drain_for_daemons();
        if let Some(group) = &script.group {
            group.remove();
        }
    }
    drop(lock);
    ExitCode::SUCCESS
}

/// Writes the end into the space set aside for it, completely and for good, before it gets its name.
fn leave_end(files: &Files, ended: &Ended) -> io::Result<()> {
    let bytes = ended.to_record().encode();
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(files.reserve())?;
    file.write_all(&bytes)?;
    file.set_len(bytes.len() as u64)?;
    file.sync_all()?;
    std::fs::rename(files.reserve(), files.end())?;
    sync_dir(files.dir())
}

/// A script that has been started.
struct Script {
    main: Pid,
    group: Option<Cgroup>,
    pipe: Option<File>,
    reply: Option<UnixStream>,
    refusal: Vec<u8>,
    signals: SignalFd,
    capture: Capture,
    job: Job,
    began: Instant,
    start_ms: u64,
    /// How the main process ended, and when that was seen.
    main_end: Option<(i32, Instant)>,
    last_output: Instant,
    stop: Option<(Reason, Ending)>,
    noticed: Instant,
    notice_due: bool,
}

/// Why a script is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// It ran out of time.
    Time,
    /// Somebody asked for it.
    Request,
}

fn failed(text: String) -> Outcome {
    Outcome::not_run(code::FAILED, text)
}

/// Sets everything up and starts the stage.
fn start(files: &Files, signals: &SigSet) -> Result<Script, Outcome> {
    let says = |what: &'static str| move |e: Errno| failed(format!("{what}: {}", e.desc()));
    // Already leading a session is as good.
    setsid().ok();
    set_child_subreaper(true).map_err(says("the agent cannot become the parent of the script's processes"))?;
    let job = Record::read(&files.job()).and_then(|record| Job::from_record(&record));
    let job = job.map_err(|e| failed(format!("the job cannot be read from the agent's spool: {e}")))?;
    let capture = Capture::create(&files.out(), job.output_limit);
    let capture = capture.map_err(|e| failed(format!("the output cannot be kept in the agent's spool: {e}")))?;
    // If the agent does not read, notices are dropped, not waited for.
    set_nonblocking(io::stdout().as_fd()).map_err(says("the pipe to the agent"))?;
    let signals = SignalFd::with_flags(signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC);
    let signals = signals.map_err(says("signals cannot be received"))?;
    let (pipe, output) = pipe2(OFlag::O_CLOEXEC).map_err(says("no pipe for the output"))?;
    set_nonblocking(pipe.as_fd()).map_err(says("the pipe for the output"))?;
    let pipe = File::from(pipe);
    let spawn = |e: io::Error| failed(format!("the script's process cannot be started: {e}"));
    let inode = pipe.metadata().map_err(spawn)?.ino();
    let (ours, theirs) = UnixStream::pair().map_err(spawn)?;
    let main = spawn_stage(&job, theirs, output).map_err(spawn)?;
    let start_ms = now_ms();
    let me = Pid::this().as_raw();
    let runner_started = proc::process(me).map_or(0, |p| p.started);
    // Without its job the stage waits, so nothing has been started yet that could be missed.
    let group = job
        .control_group
        .then(|| Cgroup::with(main.as_raw(), me, runner_started));
    let group = group.flatten();
    let running = Running {
        runner: me,
        runner_started,
        main: main.as_raw(),
        cgroup: group.as_ref().map(Cgroup::path).unwrap_or_default(),
        pipe: inode,
        boot: proc::boot_id(),
        start_ms,
    };
    let now = Instant::now();
    let mut script = Script {
        main,
        group,
        pipe: Some(pipe),
        reply: None,
        refusal: Vec::new(),
        signals,
        capture,
        began: now,
        start_ms,
        main_end: None,
        last_output: now,
        stop: None,
        noticed: now,
        notice_due: false,
        job,
    };
    // From here on there is a process; until it has its job it does nothing, and without one it ends.
    if let Err(error) = running.to_record().write_for_this_boot(&files.run()) {
        return Err(failed(format!(
            "the agent's spool cannot be written, so the script was not started: {error}"
        )));
    }
    script.notify();
    let handed = ours
        .set_write_timeout(Some(HAND_OVER))
        .and_then(|()| (&ours).write_all(&script.job.to_record().encode()));
    let handed = handed
        .and_then(|()| ours.shutdown(std::net::Shutdown::Write))
        .and_then(|()| ours.set_nonblocking(true));
    if let Err(error) = handed {
        // A stage with half a job notices that and does nothing; its end is collected below.
        script.refusal = format!("the job could not be handed over: {error}").into_bytes();
    }
    script.reply = Some(ours);
    script.job.scripts.clear();
    Ok(script)
}

fn spawn_stage(job: &Job, input: UnixStream, output: OwnedFd) -> io::Result<Pid> {
    let errors = output.try_clone()?;
    let mut command = Command::new("/proc/self/exe");
    command
        .args(&job.lead)
        .arg("stage")
        .env_clear()
        .current_dir("/")
        .process_group(0);
    command
        .stdin(OwnedFd::from(input))
        .stdout(Stdio::from(output))
        .stderr(Stdio::from(errors));
    let child = command.spawn()?;
    i32::try_from(child.id()).map(Pid::from_raw).map_err(io::Error::other)
}

fn set_nonblocking(fd: impl AsFd) -> Result<(), Errno> {
    let flags = OFlag::from_bits_truncate(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

impl Script {
    /// Until the row can be written: says how it ended.
    fn watch(&mut self) -> Outcome {
        let mut buffer = vec![0u8; 64 * 1024];
        loop {
            if let Some(end) = self.decide() {
                return end;
            }
            self.wait();
            self.read_reply();
            self.read_output(&mut buffer);
            self.read_signals();
            if let Some(end) = tree::collect(self.main) {
                let code = match end {
                    WaitStatus::Exited(_, code) => code,
                    WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
                    _ => continue,
                };
                self.main_end = Some((code, Instant::now()));
            }
            self.notice();
        }
    }

    /// Whether it is over, and what has to be done if not.
    fn decide(&mut self) -> Option<Outcome> {
        let now = Instant::now();
        if let Some((reason, ending)) = &mut self.stop {
            let reason = *reason;
            let left = match ending.step(self.group.as_ref()) {
                Progress::Alive => return None,
                Progress::Gone => Vec::new(),
                Progress::Stuck(pids) => pids,
            };
            // With nobody left to write, what is in the pipe is all there is.
            self.read_output(&mut vec![0u8; 64 * 1024]);
            let mut outcome = stopped(reason, self.job.timeout_ms, &left);
            if reason == Reason::Time && self.job.refused_timeout_ms > 0 {
                outcome.message = format!(
                    "{}; {} s were asked for, but this agent's settings (exec.max_timeout_ms) allow no more",
                    outcome.message,
                    self.job.refused_timeout_ms as f64 / 1000.0
                );
            }
            return Some(outcome);
        }
        if let Some((exit, at)) = self.main_end {
            let quiet = now.duration_since(self.last_output.max(at)) >= Duration::from_millis(self.job.quiet_ms);
            let long = now.duration_since(at) >= Duration::from_millis(self.job.chatter_ms);
            // Whatever the stage said, it said before it ended.
            self.read_reply();
            return (self.pipe.is_none() || quiet || long)
                .then(|| self.refused().unwrap_or_else(|| Outcome::exited(exit)));
        }
        if now.duration_since(self.began) >= Duration::from_millis(self.job.timeout_ms) {
            self.stop(Reason::Time);
        }
        None
    }

    /// What the stage said instead of becoming the script.
    fn refused(&self) -> Option<Outcome> {
        if self.refusal.is_empty() {
            return None;
        }
        let record = Record::decode(&self.refusal).and_then(|record| Outcome::take(&record));
        Some(record.unwrap_or_else(|_| failed(String::from_utf8_lossy(&self.refusal).into_owned())))
    }

    fn stop(&mut self, reason: Reason) {
        if self.stop.is_none() {
            let grace = Duration::from_millis(self.job.kill_grace_ms);
            self.stop = Some((reason, Ending::begin(grace, GIVE_UP, self.job.keep_daemons)));
        }
    }

    /// Sleeps until something happens or something is due.
    fn wait(&self) {
        let now = Instant::now();
        let mut until = self.began + Duration::from_millis(self.job.timeout_ms);
        if self.stop.is_some() {
            until = now + LOOK_AGAIN;
        } else if let Some((_, at)) = self.main_end {
            let quiet = self.last_output.max(at) + Duration::from_millis(self.job.quiet_ms);
            until = quiet.min(at + Duration::from_millis(self.job.chatter_ms));
        }
        if self.notice_due {
            until = until.min(self.noticed + NOTICE_EVERY);
        }
        // One more millisecond: waking just before the moment would only mean to wait again.
        let millis = until.saturating_duration_since(now).as_millis().saturating_add(1);
        let timeout = PollTimeout::try_from(millis.min(60_000)).unwrap_or(PollTimeout::ZERO);
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.pipe.as_ref().map(|p| PollFd::new(p.as_fd(), PollFlags::POLLIN)));
        fds.extend(self.reply.as_ref().map(|r| PollFd::new(r.as_fd(), PollFlags::POLLIN)));
        // Interrupted or not: the loop looks at everything anyway.
        poll(&mut fds, timeout).ok();
    }

    fn read_reply(&mut self) {
        let Some(reply) = &self.reply else { return };
        let mut reply: &UnixStream = reply;
        let mut buffer = [0u8; 4096];
        loop {
            match reply.read(&mut buffer) {
                Ok(0) => break self.reply = None,
                Ok(n) if self.refusal.len() < 256 * 1024 => self.refusal.extend_from_slice(&buffer[..n]),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break self.reply = None,
            }
        }
    }

    /// Reads what is there, but not for ever: time limits and signals must be looked at under a flood too.
    fn read_output(&mut self, buffer: &mut [u8]) {
        for _ in 0..16 {
            let Some(pipe) = &mut self.pipe else { return };
            match pipe.read(buffer) {
                Ok(0) => self.pipe = None,
                Ok(n) => {
                    self.last_output = Instant::now();
                    self.notice_due |= self.capture.push(&buffer[..n]);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.pipe = None,
            }
        }
    }

    fn read_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            // Others that ask a process to end are for the agent, not for the scripts that outlive it.
            if info.ssi_signo == Signal::SIGTERM as u32 && self.main_end.is_none() {
                self.stop(Reason::Request);
            }
        }
    }

    fn notice(&mut self) {
        if self.notice_due && self.noticed.elapsed() >= NOTICE_EVERY {
            self.notify();
        }
    }

    /// Wakes the agent. It may be gone or busy: then it looks by itself.
    fn notify(&mut self) {
        self.notice_due = false;
        self.noticed = Instant::now();
        nix::unistd::write(io::stdout(), b".").ok();
    }

    fn ended(&mut self, mut outcome: Outcome) -> Ended {
        self.capture.finish();
        if let Some(trouble) = self.capture.trouble() {
            let space = if outcome.message.is_empty() { "" } else { "; " };
            outcome.message = format!("{}{space}{trouble}", outcome.message);
        }
        Ended {
            outcome,
            start_ms: self.start_ms,
            end_ms: now_ms(),
            output_len: self.capture.len(),
            tag: self.capture.tag(),
        }
    }

    /// Daemons of a script that has ended keep a pipe that somebody reads, so that writing to it does not kill them.
    fn drain_for_daemons(&mut self) {
        let Some(mut pipe) = self.pipe.take() else { return };
        let mut buffer = [0u8; 16 * 1024];
        loop {
            let mut fds = [
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(pipe.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
            while let Ok(Some(info)) = self.signals.read_signal() {
                if info.ssi_signo == Signal::SIGTERM as u32 {
                    return;
                }
            }
            tree::collect(self.main);
            match pipe.read(&mut buffer) {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(_) => return,
            }
        }
    }
}

/// The row of a script that was ended; `left` could not be.
pub(super) fn stopped(reason: Reason, timeout_ms: u64, left: &[i32]) -> Outcome {
    let mut outcome = match reason {
        Reason::Request => Outcome::stopped("stopped on request"),
        Reason::Time => Outcome {
            error_code: code::NONE,
            status: status::TIMED_OUT,
            exit_code: EXIT_TIMED_OUT,
            message: format!("ran longer than the {} s it was given", timeout_ms as f64 / 1000.0),
        },
    };
    if !left.is_empty() {
        let pids: Vec<String> = left.iter().map(i32::to_string).collect();
        outcome.message = format!(
            "{}; these processes could not be killed: {}",
            outcome.message,
            pids.join(" ")
        );
    }
    outcome
}
