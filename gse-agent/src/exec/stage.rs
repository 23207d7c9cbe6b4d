//! The last step before a script: a process of its own that becomes the asked account for good, writes the script files as that
//! account and turns into its shell. The job comes in over the socket that is its standard input; what goes wrong goes back over
//! it. Whatever happens afterwards is the business of [`super::runner`].

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nix::sys::resource::{getrlimit, setrlimit};
use nix::sys::signal::SigSet;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Group, Uid, User, chdir, getgroups};

use super::environment::{self, Person};
use super::job::{Job, Outcome, code};
use super::limits::{self, Limits};
use super::record::Record;
use super::{interpreter, scripts};
use crate::account::{self, AccountError};

/// The stage's whole life. Returns only when the script could not be started.
pub(super) fn main() -> ExitCode {
    let socket = match io::stdin().as_fd().try_clone_to_owned() {
        Ok(fd) => UnixStream::from(fd),
        // Without the socket there is nobody to tell; the exit code is all that is left.
        Err(_) => return ExitCode::from(125),
    };
    let outcome = match become_script(&socket) {
        Ok(never) => match never {},
        Err(outcome) => outcome,
    };
    let mut record = Record::default();
    outcome.put(&mut record);
    // If the runner is gone, its end is what the agent will report.
    drop((&socket).write_all(&record.encode()));
    ExitCode::from(126)
}

fn failed(text: impl Into<String>) -> Outcome {
    Outcome::not_run(code::FAILED, text)
}

fn become_script(mut socket: &UnixStream) -> Result<std::convert::Infallible, Outcome> {
    let mut bytes = Vec::new();
    socket
        .read_to_end(&mut bytes)
        .map_err(|e| failed(format!("the agent's own processes could not talk to each other: {e}")))?;
    let job = Record::decode(&bytes).and_then(|record| Job::from_record(&record));
    let job = job.map_err(|e| failed(format!("the agent's own processes did not understand each other: {e}")))?;
    drop(bytes);

    let user = account::look_up(&job.user)?;
    let me = Uid::effective();
    account::may_become(&user, "run scripts")?;
    if me.is_root() && job.write_scripts {
        for script in &job.scripts {
            scripts::open_dir(
                &script.dir,
                user.uid.as_raw(),
                scripts::Walk::SharedParent,
                &job.script_limits.roots,
            )
            .map_err(|text| Outcome::not_run(code::SCRIPT_FILE, text))?;
        }
    }
    account::take_groups(&user)?;
    apply_limits(&user, me.is_root())?;
    account::take_uid(&user)?;
    umask(Mode::from_bits_truncate(0o022));
    reset_signals()?;

    if job.write_scripts {
        for script in &job.scripts {
            scripts::write(script, user.uid.as_raw(), &job.script_limits)
                .map_err(|text| Outcome::not_run(code::SCRIPT_FILE, text))?;
        }
    }
    let home = user.dir.to_string_lossy().into_owned();
    let home = if !home.is_empty() && chdir(user.dir.as_path()).is_ok() {
        home
    } else {
        chdir("/").map_err(|e| failed(format!("neither the home directory nor / can be entered: {}", e.desc())))?;
        if home.is_empty() { "/".to_owned() } else { home }
    };
    if !job.work_dir.is_empty() {
        chdir(job.work_dir.as_str()).map_err(|e| {
            failed(format!(
                "the directory {} cannot be entered as {}: {}",
                job.work_dir,
                user.name,
                e.desc()
            ))
        })?;
    }
    let own_shell = user.shell.to_string_lossy();
    let shell = environment::shell_for(&own_shell);
    let person = Person {
        name: &user.name,
        home: &home,
        root: user.uid.is_root(),
    };
    let mut env = environment::compose(&person, &shell, Path::new("/etc"));
    if !job.work_dir.is_empty() {
        env.insert("PWD".to_owned(), job.work_dir.clone());
    }
    if job.keep_daemons {
        env.insert(environment::SUPERVISED.to_owned(), "1".to_owned());
    }
    let path = env.get("PATH").map(String::as_str).unwrap_or_default();
    let by_ending = job
        .scripts
        .iter()
        .find_map(|s| interpreter::with_interpreter(&job.command, &s.dir, &s.name, &s.content, path));
    let command = by_ending.as_deref().unwrap_or(&job.command);
    let error = Command::new(&shell)
        .arg("-c")
        .arg(command)
        .env_clear()
        .envs(&env)
        .stdin(Stdio::null())
        .exec();
    Err(failed(format!("cannot start {shell} as {}: {error}", user.name)))
}

impl From<AccountError> for Outcome {
    fn from(error: AccountError) -> Self {
        match error {
            AccountError::Missing(text) => Outcome::not_run(code::NO_ACCOUNT, text),
            AccountError::Failed(text) => failed(text),
        }
    }
}

/// Limits that cannot be set as a login would set them leave the script with what it has, as a login does.
fn apply_limits(user: &User, root: bool) -> Result<(), Outcome> {
    let base = std::fs::read_to_string("/proc/1/limits").unwrap_or_default();
    let mut wanted = Limits::from_proc(&base);
    let groups =
        getgroups().map_err(|e| failed(format!("the groups of {} cannot be read: {}", user.name, e.desc())))?;
    let groups: Vec<String> = groups.into_iter().chain([user.gid]).filter_map(group_name).collect();
    let texts = limits::conf_texts(Path::new("/etc/security"));
    wanted.apply_conf(
        texts.iter().map(String::as_str),
        &user.name,
        &groups,
        user.uid.is_root(),
    );
    for (resource, item, mut limit) in wanted.iter() {
        let current = getrlimit(resource).map_err(|e| failed(format!("limit {item} cannot be read: {}", e.desc())))?;
        if !root {
            limit.hard = limit.hard.min(current.1);
            limit.soft = limit.soft.min(limit.hard);
        }
        if current != (limit.soft, limit.hard) && setrlimit(resource, limit.soft, limit.hard).is_err() {
            // Not even root may go past the kernel's own bounds (open files, for one): then as far as it may.
            let hard = limit.hard.min(current.1);
            let soft = limit.soft.min(hard);
            setrlimit(resource, soft, hard)
                .map_err(|e| failed(format!("limit {item} cannot be set to {soft}: {}", e.desc())))?;
        }
    }
    Ok(())
}

fn group_name(gid: Gid) -> Option<String> {
    // A group without a name cannot be named in limits.conf.
    Group::from_gid(gid).ok().flatten().map(|group| group.name)
}

/// Signals that whoever started the agent had set to be ignored (as `nohup` and `&` do) would stay so in the script. A handler
/// does not survive the exec: what has one becomes the default. 32 and 33 are the C library's own, and it lets nobody change them.
fn reset_signals() -> Result<(), Outcome> {
    let says = |e: io::Error| failed(format!("signals cannot be reset: {e}"));
    let unused = Arc::new(AtomicBool::new(false));
    for signal in (1..=31).chain(34..=64) {
        if signal_hook::consts::FORBIDDEN.contains(&signal) {
            continue;
        }
        match signal_hook::flag::register(signal, Arc::clone(&unused)) {
            // Some C libraries keep one more of these for themselves.
            Err(error) if signal < 34 || error.kind() != io::ErrorKind::InvalidInput => return Err(says(error)),
            Ok(_) | Err(_) => {}
        }
    }
    SigSet::empty().thread_set_mask().map_err(|e| says(e.into()))
}
