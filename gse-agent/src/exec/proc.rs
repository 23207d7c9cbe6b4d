//! Reads the process table: who descends from whom, and whether a process is still the one that was meant.

use std::collections::{HashMap, HashSet};
use std::path::Path;

/// One line of `/proc/PID/stat`, as far as it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    /// Process id.
    pub(super) pid: i32,
    /// `Z` for a process that is dead and not yet collected.
    pub(super) state: u8,
    /// Parent.
    pub(super) parent: i32,
    /// Process group.
    pub(super) group: i32,
    /// Session.
    pub(super) session: i32,
    /// Threads, 0 or 1 for a dead one.
    pub(super) threads: i32,
    /// When it started, in clock ticks since boot: with the id, its identity until the next boot.
    pub(super) started: u64,
}

impl Process {
    /// Whether anything of it still runs. A main thread that ended before the others looks dead and is not.
    pub(super) fn is_alive(&self) -> bool {
        !matches!(self.state, b'Z' | b'X') || self.threads > 1
    }
}

/// Looks one process up; nothing when it is gone.
pub(super) fn process(pid: i32) -> Option<Process> {
    parse(pid, &std::fs::read(format!("/proc/{pid}/stat")).ok()?)
}

fn parse(pid: i32, stat: &[u8]) -> Option<Process> {
    // The second field is the program's name in brackets, which may hold anything, brackets too.
    let end = stat.iter().rposition(|b| *b == b')')?;
    let text = std::str::from_utf8(&stat[end + 1..]).ok()?;
    let fields: Vec<&str> = text.split_ascii_whitespace().collect();
    Some(Process {
        pid,
        state: *fields.first()?.as_bytes().first()?,
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        threads: fields.get(17)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

/// Every process that can be seen.
pub(super) fn all() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(process)
        .collect()
}

/// Everything below `root`, itself not included.
pub(super) fn descendants(root: i32) -> Vec<Process> {
    below(&all(), root)
}

fn below(table: &[Process], root: i32) -> Vec<Process> {
    let mut children: HashMap<i32, Vec<&Process>> = HashMap::new();
    for process in table {
        children.entry(process.parent).or_default().push(process);
    }
    let mut found = Vec::new();
    let mut seen = HashSet::from([root]);
    let mut open = vec![root];
    while let Some(parent) = open.pop() {
        for child in children.get(&parent).into_iter().flatten() {
            if seen.insert(child.pid) {
                found.push(**child);
                open.push(child.pid);
            }
        }
    }
    found
}

/// Children of this very process, read from the kernel's own lists where it keeps them.
pub(super) fn own_children() -> Vec<Process> {
    let me = i32::try_from(std::process::id()).unwrap_or(0);
    let mut pids = Vec::new();
    let mut complete = true;
    match std::fs::read_dir("/proc/self/task") {
        Ok(threads) => {
            for thread in threads.flatten() {
                match std::fs::read_to_string(thread.path().join("children")) {
                    Ok(text) => pids.extend(text.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok())),
                    // A thread that has just ended hands its children on to another; the next look finds them.
                    Err(_) => complete &= !thread.path().exists(),
                }
            }
        }
        Err(_) => complete = false,
    }
    if complete {
        pids.into_iter()
            .filter_map(process)
            .filter(|p| p.parent == me)
            .collect()
    } else {
        all().into_iter().filter(|p| p.parent == me).collect()
    }
}

/// Whether `pid` has an open descriptor on the pipe with this inode.
pub(super) fn holds_pipe(pid: i32, inode: u64) -> bool {
    let name = format!("pipe:[{inode}]");
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    entries
        .flatten()
        .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|target| target.as_os_str() == name.as_str()))
}

/// Closes every descriptor but the standard ones: what whoever started the agent left open is not for scripts. Only for the very
/// beginning of a process, when nothing of its own is open yet.
pub(crate) fn close_inherited() {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    let open: Vec<i32> = entries
        .flatten()
        .filter_map(|fd| fd.file_name().to_str()?.parse().ok())
        .collect();
    // The list itself was one of them and is closed by now; that it cannot be closed twice does not matter.
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        nix::unistd::close(fd).ok();
    }
}

/// Identifies this boot of the host; empty where the kernel does not say.
pub(crate) fn boot_id() -> String {
    std::fs::read_to_string(Path::new("/proc/sys/kernel/random/boot_id"))
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let line = b"42 (a) b ) R 7 8 9 0 -1 4 0 0 0 0 0 0 0 0 20 0 3 0 12345 1 2\n";
        let expected = Process {
            pid: 42,
            state: b'R',
            parent: 7,
            group: 8,
            session: 9,
            threads: 3,
            started: 12345,
        };
        assert_eq!(parse(42, line), Some(expected));
        assert_eq!(parse(42, b"42 (x"), None);
        assert_eq!(parse(42, b"42 (x) R 1"), None);
    }

    #[test]
    fn this_process_is_found() {
        let me = i32::try_from(std::process::id()).expect("a process id");
        let own = process(me).expect("this process");
        assert!(own.is_alive());
        assert!(descendants(own.parent).iter().any(|p| p.pid == me));
    }

    #[test]
    fn trees_without_end_are_walked_once() {
        let process = |pid, parent| Process {
            pid,
            state: b'S',
            parent,
            group: 0,
            session: 0,
            threads: 1,
            started: 0,
        };
        let table = [
            process(2, 1),
            process(3, 2),
            process(4, 3),
            process(5, 9),
            process(1, 4),
        ];
        let mut pids: Vec<i32> = below(&table, 2).iter().map(|p| p.pid).collect();
        pids.sort_unstable();
        assert_eq!(pids, [1, 3, 4]);
    }
}
