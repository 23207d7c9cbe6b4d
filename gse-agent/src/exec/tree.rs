//! Ends a whole tree of processes below a subreaper: asks first, then freezes everything so that nothing can fork away, then kills.
//! Nothing can leave the tree: whoever loses its parent becomes the subreaper's child.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getsid};

use super::cgroup::Cgroup;
use super::proc;

/// Passes that look for processes which appeared since the last one, before killing what there is.
const FREEZE_PASSES: usize = 32;

/// How far the ending of a tree has come.
#[derive(Debug)]
pub(super) struct Ending {
    ask_until: Instant,
    give_up_after: Duration,
    /// Only what is in this session.
    session: Option<i32>,
    /// Patience is counted from here: this process may have been stopped meanwhile, and then has not tried yet.
    killing_since: Option<Instant>,
}

/// What a look at the tree found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Something still runs; look again soon.
    Alive,
    /// Nothing is left.
    Gone,
    /// These cannot be killed (waiting in the kernel, or not ours).
    Stuck(Vec<i32>),
}

impl Ending {
    /// Asks everything below this process to end; with `spare` only what has not made a session of its own, as daemons do.
    pub(super) fn begin(grace: Duration, give_up_after: Duration, spare: bool) -> Self {
        let me = own_pid();
        let session = spare.then(|| getsid(None).map_or(0, Pid::as_raw));
        for process in meant(me, session) {
            signal(process.pid, Signal::SIGTERM);
            // What is stopped hears nothing until it goes on.
            signal(process.pid, Signal::SIGCONT);
        }
        Self {
            ask_until: Instant::now() + grace,
            give_up_after,
            session,
            killing_since: None,
        }
    }

    /// Looks at the tree, and kills what is left once the grace is over.
    pub(super) fn step(&mut self, group: Option<&Cgroup>) -> Progress {
        let me = own_pid();
        let mut alive = alive_below(me, self.session);
        if alive.is_empty() {
            // Nothing gets out of the tree by itself; but the superuser can put what it likes into the group.
            alive.extend(group.into_iter().flat_map(Cgroup::pids));
        }
        if alive.is_empty() {
            return Progress::Gone;
        }
        let now = Instant::now();
        if now < self.ask_until {
            return Progress::Alive;
        }
        let since = *self.killing_since.get_or_insert(now);
        if now.duration_since(since) >= self.give_up_after {
            return Progress::Stuck(alive);
        }
        freeze_and_kill(me, self.session);
        if let Some(group) = group
            && !group.kill()
        {
            group.pids().into_iter().for_each(|pid| signal(pid, Signal::SIGKILL));
        }
        Progress::Alive
    }
}

fn own_pid() -> i32 {
    Pid::this().as_raw()
}

/// Everything below `root`, or as much of it as is in `session`.
fn meant(root: i32, session: Option<i32>) -> Vec<proc::Process> {
    let mut all = proc::descendants(root);
    all.retain(|p| session.is_none_or(|session| p.session == session));
    all
}

fn alive_below(root: i32, session: Option<i32>) -> Vec<i32> {
    meant(root, session)
        .into_iter()
        .filter(proc::Process::is_alive)
        .map(|p| p.pid)
        .collect()
}

/// Whether it was delivered is found out by looking again: the process may be gone, or may have become somebody else's to signal.
fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).ok();
}

/// Kills everything below `root` (that is in `session`), itself not included; returns how many processes that were.
pub(super) fn freeze_and_kill(root: i32, session: Option<i32>) -> usize {
    let mut frozen = std::collections::HashSet::new();
    for _ in 0..FREEZE_PASSES {
        let fresh: Vec<i32> = meant(root, session)
            .into_iter()
            .map(|p| p.pid)
            .filter(|pid| frozen.insert(*pid))
            .collect();
        if fresh.is_empty() {
            break;
        }
        fresh.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
    }
    let frozen = meant(root, session);
    for process in &frozen {
        signal(process.pid, Signal::SIGKILL);
    }
    frozen.iter().filter(|p| p.is_alive()).count()
}

/// Collects every child that has ended; returns how `main` ended when it was among them.
pub(super) fn collect(main: Pid) -> Option<WaitStatus> {
    let mut found = None;
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return found,
            Ok(status) => {
                if status.pid() == Some(main) {
                    found = Some(status);
                }
            }
            Err(Errno::EINTR) => {}
            Err(_) => return found,
        }
    }
}
