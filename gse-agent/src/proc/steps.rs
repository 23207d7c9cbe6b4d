//! What operations and the supervisor's own starts are made of: the command of an operation, running it, waiting for what it should have
//! brought about, signals. In which order is left to [`super::operate`] and [`super::respawn`].

use std::sync::Arc;
use std::time::Duration;

use gse_proto::proc::{OpType, Policy, Spec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::find::{self, Ident};
use super::journal::Op;
use super::stat::{self, Stat};
use super::{Shared, unix_ms};
use crate::account;
use crate::exec::command::{self, End, Leaving, Order};

/// Between two looks at whether a process has ended.
const LOOK: Duration = Duration::from_millis(100);
/// How much longer than was asked for a process may take to come up.
const MOMENT: Duration = Duration::from_secs(1);

/// What an operation is called.
pub(super) fn name(kind: OpType) -> &'static str {
    match kind {
        OpType::Start => "start",
        OpType::Stop => "stop",
        OpType::Status => "status",
        OpType::Register => "register",
        OpType::Unregister => "unregister",
        OpType::Restart => "restart",
        OpType::Reload => "reload",
        OpType::Kill => "kill",
    }
}

/// The command for an operation; a signal that does the same when none is configured; nothing when it can't be done without.
pub(super) fn command_of(kind: OpType, spec: &Spec) -> Result<String, Option<Signal>> {
    let (command, instead) = match kind {
        OpType::Start => (&spec.start_cmd, None),
        OpType::Stop => (&spec.stop_cmd, Some(Signal::SIGTERM)),
        OpType::Restart if spec.restart_cmd.is_empty() && !spec.stop_cmd.is_empty() && !spec.start_cmd.is_empty() => {
            return Ok(format!("{}\n{}", spec.stop_cmd, spec.start_cmd));
        }
        OpType::Restart => (&spec.restart_cmd, None),
        OpType::Reload => (&spec.reload_cmd, None),
        OpType::Kill => (&spec.kill_cmd, Some(Signal::SIGKILL)),
        OpType::Status | OpType::Register | OpType::Unregister => return Err(None),
    };
    if command.trim().is_empty() {
        Err(instead)
    } else {
        Ok(command.clone())
    }
}

/// Runs a control command of `op`, which is on disk before that.
pub(super) async fn run_command(
    shared: &Arc<Shared>,
    op: &Arc<Op>,
    spec: &Spec,
    command: String,
) -> Result<End, Leaving> {
    let refuse = |why: String| End {
        ok: false,
        output: String::new(),
        why,
        start_ms: unix_ms(),
        end_ms: unix_ms(),
    };
    if !shared.accounts.allows(&spec.user) {
        return Ok(refuse(format!(
            "not run: this agent's settings (exec.allowed_accounts) do not allow commands as {}",
            spec.user
        )));
    }
    let writing = Arc::clone(op);
    let written = tokio::task::spawn_blocking(move || writing.write()).await;
    if let Some(error) = match written {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(error) => Some(error.to_string()),
    } {
        return Ok(refuse(format!(
            "not run: the operation cannot be recorded in the agent's journal: {error}"
        )));
    }
    let _slot = tokio::select! {
        slot = shared.slots.acquire() => slot.map_err(|_| Leaving)?,
        () = shared.life.draining() => return Err(Leaving),
    };
    let seconds = u64::from(Policy::of(spec).op_timeout).min(shared.config.max_op_timeout_s);
    let order = Order {
        user: spec.user.clone(),
        work_dir: spec.setup_path.clone(),
        command,
        timeout: Duration::from_secs(seconds),
        output_limit: shared.config.max_output,
    };
    command::carry_out(op.dir.clone(), order, &shared.config.self_exec, &shared.life).await
}

/// Ticks since boot of a moment, a little before it to be sure.
pub(super) fn since(shared: &Shared, start_ms: u64) -> u64 {
    let ago = unix_ms().saturating_sub(start_ms) as f64 / 1000.0;
    let at = (stat::uptime() - ago - 0.1).max(0.0);
    (at * shared.units.ticks as f64) as u64
}

/// Sleeps, unless the agent stops.
pub(super) async fn sleep(shared: &Shared, time: Duration) -> Result<(), Leaving> {
    tokio::select! {
        () = tokio::time::sleep(time) => Ok(()),
        () = shared.life.draining() => Err(Leaving),
    }
}

/// What runs after a start; what only just comes up, on a busy host, is waited for a moment longer.
pub(super) async fn started(
    shared: &Arc<Shared>,
    spec: &Arc<Spec>,
    ident: Option<Ident>,
    since: u64,
) -> Result<Option<(Stat, Ident)>, Leaving> {
    let until = tokio::time::Instant::now() + MOMENT;
    loop {
        let found = shared.find(spec, ident.clone(), Some(since), true).await;
        if found.is_some() || tokio::time::Instant::now() >= until {
            return Ok(found);
        }
        sleep(shared, LOOK).await?;
    }
}

/// Waits until it runs no more; what runs still when patience is over.
pub(super) async fn wait_for_end(
    shared: &Arc<Shared>,
    spec: &Arc<Spec>,
    ident: Option<Ident>,
    patience: Duration,
) -> Result<Option<(Stat, Ident)>, Leaving> {
    let until = tokio::time::Instant::now() + patience;
    // Who is known by more than a name is not looked for by name: another one of that name is not meant.
    let by_name = ident.is_none() || spec.pid_path.is_empty();
    loop {
        let over = tokio::time::Instant::now() >= until;
        let found = shared.find(spec, ident.clone(), None, by_name).await;
        if found.is_none() || over {
            return Ok(found);
        }
        sleep(shared, LOOK).await?;
    }
}

/// Sends a signal to a process with the rights of the account `user`, if it is still the one; why that was not possible.
pub(super) async fn send(shared: &Shared, ident: &Ident, user: &str, signal: Signal) -> String {
    let (ident, user, boot) = (ident.clone(), user.to_owned(), shared.boot.clone());
    let sent = tokio::task::spawn_blocking(move || match find::still(&ident, &boot) {
        Some(stat) => {
            may_signal(&user, stat.pid)?;
            kill(Pid::from_raw(stat.pid), signal).map_err(|error| error.desc().to_owned())
        }
        None => Ok(()),
    });
    match sent.await {
        Ok(Ok(())) => String::new(),
        Ok(Err(error)) => format!("{signal} could not be sent: {error}"),
        Err(error) => error.to_string(),
    }
}

/// Whether the account may signal the process, by the kernel's rule for `kill`. The agent is mostly root, and which process is meant may come from
/// a pid file that the account itself writes: it must not reach further through the agent than it could by itself.
fn may_signal(user: &str, pid: i32) -> Result<(), String> {
    if user.is_empty() {
        return Ok(());
    }
    let account = account::look_up(user).map_err(|error| error.to_string())?;
    match stat::uids(pid) {
        // It has ended in this moment.
        None => Ok(()),
        Some((real, saved)) if account.uid.is_root() || [real, saved].contains(&account.uid.as_raw()) => Ok(()),
        Some((real, _)) => Err(format!(
            "process {pid} belongs to another account (uid {real}) than {user}, which this process is registered for"
        )),
    }
}

/// Kills a process and everything below it, as far as the account `user` may.
pub(super) async fn kill_tree(shared: &Shared, ident: Ident, user: String) {
    let boot = shared.boot.clone();
    let task = tokio::task::spawn_blocking(move || {
        let Some(head) = find::still(&ident, &boot) else { return };
        let table = stat::all();
        let mut doomed = vec![head.pid];
        let mut at = 0;
        while let Some(parent) = doomed.get(at).copied() {
            let children = table.iter().filter(|stat| stat.parent == parent).map(|stat| stat.pid);
            let fresh: Vec<i32> = children.filter(|pid| !doomed.contains(pid)).collect();
            doomed.extend(fresh);
            at += 1;
        }
        for pid in doomed {
            if let Err(error) = may_signal(&user, pid) {
                tracing::warn!(pid, error, "a process is not killed");
            } else if let Err(error) = kill(Pid::from_raw(pid), Signal::SIGKILL) {
                tracing::debug!(pid, error = error.desc(), "a process could not be killed");
            }
        }
    });
    if let Err(error) = task.await {
        tracing::error!(%error, "a process could not be killed");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;

    use super::*;

    #[test]
    fn an_account_signals_its_own_and_root_everybody() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert_eq!(may_signal("", me), Ok(()));
        let own = nix::unistd::User::from_uid(nix::unistd::Uid::current())
            .unwrap()
            .unwrap();
        assert_eq!(may_signal(&own.name, me), Ok(()));
        assert!(may_signal("no-such-account", me).is_err());
        if !own.uid.is_root() {
            return;
        }
        let nobody = account::look_up("nobody").unwrap();
        let refused = may_signal("nobody", me).unwrap_err();
        assert!(refused.contains("another account"), "{refused}");
        let mut child = std::process::Command::new("/bin/sleep")
            .arg("60")
            .uid(nobody.uid.as_raw())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let answers = (
            may_signal("nobody", pid),
            may_signal("root", pid),
            may_signal("daemon", pid).is_err(),
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(answers, (Ok(()), Ok(()), true));
    }
}
