//! A control group (version 2) of each script's own, where the host lets the agent make one: then everything that the script has
//! started can be told for certain and killed at one stroke, also when its runner is dead and nobody has watched. Only an addition to
//! the walk over the process table in [`super::tree`]; where there are no such groups that walk is all there is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// How the names of our groups begin; then the runner's process id and start.
const PREFIX: &str = "gse-agent-run-";

/// The group of one script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cgroup {
    dir: PathBuf,
}

/// Where this process's own group is, if this host has a hierarchy of version 2.
fn own_dir(mountinfo: &str, own: &str) -> Option<PathBuf> {
    let path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
        // Outside of what this process's namespace shows.
        return None;
    }
    mountinfo.lines().find_map(|line| {
        // id parent device root mount-point options ... - type source options
        let (front, back) = line.split_once(" - ")?;
        if back.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = front.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        // Blanks in a mount point are written in a way that need not be understood here.
        let below = Path::new(path)
            .strip_prefix(root)
            .ok()
            .filter(|_| !point.contains('\\'))?;
        Some(Path::new(point).join(below))
    })
}

fn is_ours(dir: &Path) -> bool {
    dir.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with(PREFIX))
}

/// The directory in which our groups are made: the agent's own group, and not that of a script that (re)started the agent.
fn base() -> Option<PathBuf> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut dir = own_dir(&mountinfo, &own)?;
    if let Some(outermost) = dir.ancestors().filter(|dir| is_ours(dir)).last() {
        dir = outermost.parent()?.to_owned();
    }
    Some(dir)
}

impl Cgroup {
    /// Makes a group for the process `pid`, which has no children yet, and puts it in. Nothing where that is not possible.
    pub(super) fn with(pid: i32, runner: i32, started: u64) -> Option<Self> {
        let dir = base()?.join(format!("{PREFIX}{runner}-{started}"));
        let group = Self { dir };
        // Whoever looks for empty groups may take this one away before there is anything in it.
        for _ in 0..3 {
            match fs::create_dir(&group.dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return None,
                _ => {}
            }
            match fs::write(group.dir.join("cgroup.procs"), pid.to_string()) {
                Ok(()) => return Some(group),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(_) => break,
            }
        }
        group.remove();
        None
    }

    /// One that has been recorded; nothing if that can't have been one of ours.
    pub(super) fn recorded(path: &str) -> Option<Self> {
        let dir = PathBuf::from(path);
        (dir.is_absolute() && is_ours(&dir) && !path.split('/').any(|part| part == "..")).then_some(Self { dir })
    }

    /// What to record.
    pub(super) fn path(&self) -> String {
        self.dir.to_string_lossy().into_owned()
    }

    /// Everything that runs in it and in groups that were made below it.
    pub(super) fn pids(&self) -> Vec<i32> {
        let mut found = Vec::new();
        let mut open = vec![self.dir.clone()];
        while let Some(dir) = open.pop() {
            // What cannot be read is gone, and then nothing is in it.
            let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            found.extend(text.lines().filter_map(|pid| pid.parse::<i32>().ok()));
            open.extend(below(&dir));
        }
        found
    }

    /// Kills everything in it at once. False where the kernel cannot do that; then the processes have to be killed one by one.
    pub(super) fn kill(&self) -> bool {
        fs::write(self.dir.join("cgroup.kill"), "1").is_ok()
    }

    /// Removes it if nothing is left in it.
    pub(super) fn remove(&self) {
        remove(&self.dir);
    }
}

fn below(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn remove(dir: &Path) {
    for inner in below(dir) {
        remove(&inner);
    }
    // Refused for as long as something is in it; it is tried again.
    fs::remove_dir(dir).ok();
}

/// Removes groups that nothing is left in: those of scripts whose daemons have ended after their runner.
pub(super) fn remove_empty() {
    let Some(base) = base() else { return };
    for dir in below(&base) {
        let empty = || {
            let events = fs::read_to_string(dir.join("cgroup.events")).unwrap_or_default();
            events.lines().any(|line| line == "populated 0")
        };
        if is_ours(&dir) && empty() {
            remove(&dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
        32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:7 - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_own_group_is_found() {
        let of = |mounts: &str, own: &str| own_dir(mounts, own).map(|dir| dir.to_string_lossy().into_owned());
        assert_eq!(
            of(HYBRID, "4:memory:/x\n0::/system.slice/agent.service\n").as_deref(),
            Some("/sys/fs/cgroup/unified/system.slice/agent.service")
        );
        let container = "9 8 0:38 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
        assert_eq!(
            of(container, "0::/docker/abc/in\n").as_deref(),
            Some("/sys/fs/cgroup/in")
        );
        assert_eq!(of(container, "0::/docker/other\n"), None);
        assert_eq!(of(HYBRID, "0::/../elsewhere\n"), None);
        assert_eq!(of(HYBRID, "4:memory:/x\n"), None);
        assert_eq!(of("", "0::/\n"), None);
    }

    #[test]
    fn only_our_own_are_taken_from_a_record() {
        assert!(Cgroup::recorded("/sys/fs/cgroup/gse-agent-run-1-2").is_some());
        for other in [
            "",
            "/",
            "/sys/fs/cgroup/system.slice",
            "gse-agent-run-1-2",
            "/x/../gse-agent-run-1-2",
        ] {
            assert_eq!(Cgroup::recorded(other), None, "{other}");
        }
    }

    #[test]
    fn everything_in_it_is_killed_at_once() {
        let mut shell = std::process::Command::new("sh")
            .args(["-c", "read go; (setsid sleep 1000 </dev/null &) ; sleep 1000"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("a shell");
        let pid = i32::try_from(shell.id()).expect("a process id");
        let Some(group) = Cgroup::with(pid, pid, u64::from(rand::random::<u32>())) else {
            eprintln!("this host lets nobody make control groups; there is nothing to test");
            shell.kill().expect("kill");
            shell.wait().expect("wait");
            return;
        };
        assert_eq!(Cgroup::recorded(&group.path()), Some(group.clone()));
        drop(shell.stdin.take());
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while group.pids().len() < 3 {
            assert!(std::time::Instant::now() < until, "{:?}", group.pids());
            std::thread::yield_now();
        }
        group.remove();
        assert!(group.dir.exists(), "it is not empty");
        assert!(group.kill());
        shell.wait().expect("it has ended");
        while group.dir.exists() {
            assert!(std::time::Instant::now() < until, "{:?}", group.pids());
            remove_empty();
        }
    }
}
