//! Runners that do not react. A script of root's can stop its runner (SIGSTOP), again and again; then nobody keeps the script's time
//! limit. A runner that is stopped is made to go on, and one that has not ended when it must have is ended with everything below it.
//! Finding out that it is gone, and the row, are left to [`super::watch`].

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cgroup::Cgroup;
use super::config::ExecConfig;
use super::job::{Job, Outcome, Running, now_ms};
use super::proc::{self, Process};
use super::runner::{GIVE_UP, Reason, stopped};
use super::tree;

/// What a runner may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    /// The script's time limit.
    timeout: Duration,
    /// From there, or from a request to stop, to the runner's end.
    slack: Duration,
}

impl Bounds {
    /// Those of a job.
    pub(super) fn of(job: &Job, cfg: &ExecConfig) -> Self {
        let ending = Duration::from_millis(job.kill_grace_ms) + GIVE_UP;
        Self {
            timeout: Duration::from_millis(job.timeout_ms),
            slack: ending.max(Duration::from_millis(job.chatter_ms)) + Duration::from_millis(cfg.runner_margin_ms),
        }
    }

    /// Those of a job of which nothing is known.
    pub(super) fn widest(cfg: &ExecConfig) -> Self {
        let job = Job {
            timeout_ms: cfg.max_timeout_ms,
            kill_grace_ms: cfg.kill_grace_ms,
            chatter_ms: cfg.max_chatter_after_exit_ms,
            ..Job::default()
        };
        Self::of(&job, cfg)
    }
}

/// Looks after one runner.
#[derive(Debug)]
pub(super) struct Minder {
    bounds: Bounds,
    /// When this process saw that the script runs.
    since: Instant,
    /// How long it ran before that, by a clock that may have been set meanwhile.
    before: Duration,
    /// When it was first found stopped.
    resumed: Option<Instant>,
    /// When it was asked to stop its script.
    asked: Option<Instant>,
}

impl Minder {
    /// From now on. `own`: this process started the runner, just now.
    pub(super) fn new(bounds: Bounds, running: &Running, own: bool) -> Self {
        let before = if own {
            0
        } else {
            now_ms().saturating_sub(running.start_ms)
        };
        Self {
            bounds,
            since: Instant::now(),
            before: Duration::from_millis(before),
            resumed: None,
            asked: None,
        }
    }

    /// The runner was found stopped: it goes on.
    pub(super) fn resume(&mut self, running: &Running) {
        if self.resumed.is_none() {
            self.resumed = Some(Instant::now());
            tracing::warn!(
                runner = running.runner,
                "a script's runner process had been stopped; it is made to go on"
            );
        }
        signal(running, Signal::SIGCONT);
    }

    /// Asks the runner to end its script, once. False when there is nobody to ask.
    pub(super) fn ask(&mut self, running: &Running) -> bool {
        if self.asked.is_none() && ask_to_end(running) {
            self.asked = Some(Instant::now());
        }
        self.asked.is_some()
    }

    /// Why the runner must have ended by now; nothing while it need not have.
    pub(super) fn overdue(&self, now: Instant) -> Option<Reason> {
        let Bounds { timeout, slack } = self.bounds;
        let passed = |at: Instant, wait: Duration| now.saturating_duration_since(at) > wait;
        if self.asked.is_some_and(|at| passed(at, slack)) {
            return Some(Reason::Request);
        }
        // What ran before is not certain enough to end a runner that may be well; one that was stopped is not.
        let whole = timeout + slack;
        let late = passed(self.since, whole)
            || self.resumed.is_some_and(|at| passed(at, slack))
                && passed(self.since, whole.saturating_sub(self.before));
        late.then_some(Reason::Time)
    }
}

/// Ends the runner and everything below it; says what the row has to tell. Nothing when it is gone already. Blocking.
pub(super) fn end(bounds: Bounds, running: &Running, reason: Reason) -> Option<Outcome> {
    find(running)?;
    // The runner has not collected it, so the number is not another's.
    let runs = proc::process(running.main).is_some_and(|p| p.parent == running.runner && p.is_alive());
    signal(running, Signal::SIGSTOP);
    let ended = tree::freeze_and_kill(running.runner, None);
    if let Some(group) = Cgroup::recorded(&running.cgroup) {
        group.kill();
    }
    // Stopped or not, SIGKILL reaches it.
    signal(running, Signal::SIGKILL);
    tracing::warn!(
        runner = running.runner,
        ended,
        "a script's runner process did not react and was ended, with what was below it"
    );
    let why = format!("its runner process did not react and was ended, with {ended} processes below it");
    if !runs {
        return Some(Outcome::unknown(format!("how the script ended is not known: {why}")));
    }
    let timeout_ms = u64::try_from(bounds.timeout.as_millis()).unwrap_or(u64::MAX);
    let mut outcome = stopped(reason, timeout_ms, &[]);
    outcome.message = format!("{}; {why}", outcome.message);
    Some(outcome)
}

/// The runner's process, when it is still there.
pub(super) fn find(running: &Running) -> Option<Process> {
    proc::process(running.runner).filter(|p| p.started == running.runner_started)
}

fn signal(running: &Running, signal: Signal) -> bool {
    find(running).is_some() && kill(Pid::from_raw(running.runner), signal).is_ok()
}

/// Makes a runner whose script is over go on if it has been stopped. False when it has left.
pub(super) fn keep_going(running: &Running) -> bool {
    let Some(process) = find(running) else { return false };
    if process.state == b'T' {
        signal(running, Signal::SIGCONT);
    }
    process.is_alive()
}

/// Asks a runner to end its script, or to leave when that is over. False when there is nobody to ask (yet).
pub(super) fn ask_to_end(running: &Running) -> bool {
    // What is stopped hears nothing until it goes on.
    signal(running, Signal::SIGTERM) && signal(running, Signal::SIGCONT)
}

#[cfg(test)]
mod tests {
    use super::super::job::status;
    use super::*;

    #[test]
    fn a_runner_is_overdue_when_it_must_have_ended() {
        let second = Duration::from_secs(1);
        let cfg = ExecConfig {
            runner_margin_ms: 1000,
            ..ExecConfig::default()
        };
        let job = Job {
            timeout_ms: 5000,
            kill_grace_ms: 2000,
            chatter_ms: 4000,
            ..Job::default()
        };
        let bounds = Bounds::of(&job, &cfg);
        assert_eq!(bounds.slack, Duration::from_secs(2) + GIVE_UP + second);
        let since = Instant::now();
        let minder = |before| Minder {
            bounds,
            since,
            before,
            resumed: None,
            asked: None,
        };
        let whole = bounds.timeout + bounds.slack;
        let own = minder(Duration::ZERO);
        assert_eq!(own.overdue(since + whole), None);
        assert_eq!(own.overdue(since + whole + second), Some(Reason::Time));

        // One of an earlier agent, perhaps from before the clock was set.
        let mut adopted = minder(Duration::from_secs(1_000_000));
        assert_eq!(adopted.overdue(since + whole), None);
        assert_eq!(adopted.overdue(since + whole + second), Some(Reason::Time));
        adopted.resumed = Some(since);
        assert_eq!(
            adopted.overdue(since + bounds.slack),
            None,
            "it gets the time to end well"
        );
        assert_eq!(adopted.overdue(since + bounds.slack + second), Some(Reason::Time));

        let mut asked = minder(Duration::ZERO);
        asked.asked = Some(since);
        assert_eq!(asked.overdue(since + bounds.slack), None);
        assert_eq!(asked.overdue(since + bounds.slack + second), Some(Reason::Request));
    }

    #[test]
    fn a_runner_is_ended_with_everything_below_it_and_the_row_says_what_is_certain() {
        let mark = format!("{}.4745", 600_000 + std::process::id());
        let sleeps = || {
            let line = |p: &Process| std::fs::read(format!("/proc/{}/cmdline", p.pid)).unwrap_or_default();
            let is = |p: &Process| p.is_alive() && line(p).starts_with(format!("sleep\0{mark}").as_bytes());
            proc::all().into_iter().filter(is).collect::<Vec<_>>()
        };
        let cfg = ExecConfig::default();
        for (main_is_known, reason) in [(true, Reason::Time), (true, Reason::Request), (false, Reason::Time)] {
            let mut runner = std::process::Command::new("sh")
                .args(["-c", &format!("setsid sleep {mark} & sleep {mark} & wait")])
                .spawn()
                .expect("a shell");
            let until = Instant::now() + Duration::from_secs(30);
            while sleeps().len() < 2 {
                assert!(Instant::now() < until, "it does not start");
                std::thread::yield_now();
            }
            let pid = i32::try_from(runner.id()).expect("a process id");
            let running = Running {
                runner: pid,
                runner_started: proc::process(pid).expect("the runner").started,
                main: if main_is_known { sleeps()[0].pid } else { pid },
                pipe: 0,
                cgroup: String::new(),
                boot: proc::boot_id(),
                start_ms: now_ms(),
            };
            kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("kill");
            let bounds = Bounds::widest(&cfg);
            let outcome = end(bounds, &running, reason).expect("it was there");
            let status = match (main_is_known, reason) {
                (false, _) => status::LOST,
                (true, Reason::Time) => status::TIMED_OUT,
                (true, Reason::Request) => status::STOPPED,
            };
            assert_eq!(outcome.status, status, "{outcome:?}");
            assert!(outcome.message.contains("did not react"), "{outcome:?}");
            assert!(outcome.message.contains("with 2 processes"), "{outcome:?}");
            runner.wait().expect("it has ended");
            assert_eq!(end(bounds, &running, reason), None, "once is enough");
            while !sleeps().is_empty() {
                assert!(Instant::now() < until, "something is left");
                std::thread::yield_now();
            }
        }
    }
}
