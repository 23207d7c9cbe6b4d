//! Processes whose runner has died. The agent is a subreaper like its runners, so most of them become its own children: it ends
//! those that a dead runner left behind and collects the dead.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getsid};
use parking_lot::Mutex;
use tokio::process::{Child, Command};

use super::cgroup::Cgroup;
use super::job::Running;
use super::proc::{self, Process};

/// Children that this process started itself and waits for by other means. Process-wide, as children are.
static OWN: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// Passes of killing before what is left is given up.
const PASSES: u32 = 200;
const PASS: Duration = Duration::from_millis(20);

/// Starts a child that is not mistaken for an orphan.
pub(super) fn spawn_owned(command: &mut Command) -> io::Result<(Child, i32)> {
    // Held across the start: a look at the children must not see one that is not in the list yet.
    let mut own = OWN.lock();
    let child = command.spawn()?;
    let pid = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .ok_or_else(|| io::Error::other("a child without an id"))?;
    own.insert(pid);
    Ok((child, pid))
}

/// The child has been collected.
pub(super) fn disown(pid: i32) {
    OWN.lock().remove(&pid);
}

/// Children of this process that others left to it: not started here, and in a session that is not ours.
fn inherited(own: &BTreeSet<i32>) -> Vec<Process> {
    let session = getsid(None).map_or(0, Pid::as_raw);
    proc::own_children()
        .into_iter()
        .filter(|p| !own.contains(&p.pid) && p.session != session)
        .collect()
}

/// Whether it came of a command that exists to leave processes behind: no runner's loss makes those left over.
fn supervised(pid: i32) -> bool {
    let mark = format!("{}=", super::environment::SUPERVISED);
    std::fs::read(format!("/proc/{pid}/environ"))
        .is_ok_and(|all| all.split(|b| *b == 0).any(|entry| entry.starts_with(mark.as_bytes())))
}

/// Collects inherited children that have ended.
pub(crate) fn collect_dead() {
    let own = OWN.lock();
    for process in inherited(&own) {
        if !process.is_alive() {
            // Somebody else may have collected it in the meantime.
            waitpid(Pid::from_raw(process.pid), Some(WaitPidFlag::WNOHANG)).ok();
        }
    }
}

/// What a dead runner left behind, as far as it can be told for certain.
fn left_behind(running: &Running, watched: bool) -> Vec<Process> {
    let table = proc::all();
    let reused = table.iter().any(|p| p.pid == running.runner);
    let mine: BTreeSet<i32> = if watched {
        let own = OWN.lock();
        inherited(&own)
            .into_iter()
            .filter(|p| p.started >= running.runner_started && !supervised(p.pid))
            .map(|p| p.pid)
            .collect()
    } else {
        BTreeSet::new()
    };
    let me = Pid::this().as_raw();
    let group: BTreeSet<i32> = Cgroup::recorded(&running.cgroup)
        .map(|group| group.pids().into_iter().collect())
        .unwrap_or_default();
    let ours = |p: &Process| {
        // A session or group keeps its number from being given away for as long as it has members. But when nobody watched, it may
        // have ended and the number be another's: then only the pipe proves anything.
        let named = watched && !reused && (p.session == running.runner || p.group == running.main);
        named || mine.contains(&p.pid) || group.contains(&p.pid) || proc::holds_pipe(p.pid, running.pipe)
    };
    let heads: Vec<i32> = table
        .iter()
        .filter(|p| p.pid != me && p.pid != running.runner && ours(p))
        .map(|p| p.pid)
        .collect();
    let mut all: BTreeSet<i32> = heads.iter().copied().collect();
    for head in heads {
        all.extend(proc::descendants(head).into_iter().map(|p| p.pid));
    }
    all.remove(&me);
    table
        .into_iter()
        .filter(|p| all.contains(&p.pid) && p.is_alive())
        .collect()
}

/// Ends what a dead runner left behind; returns how many processes that were. `watched`: the runner was this process's child
/// until now.
pub(super) async fn kill_left_behind(running: Running, watched: bool) -> usize {
    let mut killed = BTreeSet::new();
    for _ in 0..PASSES {
        let running = running.clone();
        let pass = tokio::task::spawn_blocking(move || {
            let left = left_behind(&running, watched);
            if let Some(group) = Cgroup::recorded(&running.cgroup) {
                group.kill();
            }
            for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
                // Gone already, if it cannot be delivered.
                for process in &left {
                    kill(Pid::from_raw(process.pid), signal).ok();
                }
            }
            collect_dead();
            left.into_iter().map(|p| p.pid).collect::<Vec<_>>()
        });
        match pass.await {
            Ok(left) if left.is_empty() => return killed.len(),
            Ok(left) => killed.extend(left),
            Err(error) => tracing::error!(%error, "the processes of a lost script could not be looked for"),
        }
        tokio::time::sleep(PASS).await;
    }
    tracing::error!(
        runner = running.runner,
        "processes of a lost script resist being killed"
    );
    killed.len()
}
