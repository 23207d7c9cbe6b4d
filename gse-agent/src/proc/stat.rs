//! What the kernel says about one process, and the units it says it in. Which process is meant is left to [`super::find`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

/// `/proc/PID/stat`, as far as it is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stat {
    /// Process id.
    pub(super) pid: i32,
    /// The program's name, at most 15 bytes.
    pub(super) comm: String,
    /// `Z` for one that is dead and not yet collected.
    pub(super) state: char,
    /// Parent.
    pub(super) parent: i32,
    /// Clock ticks on a processor, by itself and by the kernel for it.
    pub(super) utime: u64,
    /// See `utime`.
    pub(super) stime: u64,
    /// Threads.
    pub(super) threads: u32,
    /// Clock ticks from boot to its start: with the id, its identity until the next boot.
    pub(super) started: u64,
    /// Pages in memory.
    pub(super) rss: u64,
}

impl Stat {
    /// Reads it; nothing when the process is gone. Blocking.
    pub(super) fn read(pid: i32) -> Option<Self> {
        Self::parse(pid, &std::fs::read(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(pid: i32, stat: &[u8]) -> Option<Self> {
        // The second field is the program's name in brackets, which may hold anything, brackets too.
        let begin = stat.iter().position(|b| *b == b'(')?;
        let end = stat.iter().rposition(|b| *b == b')')?;
        let comm = String::from_utf8_lossy(stat.get(begin + 1..end)?).into_owned();
        let text = std::str::from_utf8(&stat[end + 1..]).ok()?;
        let mut fields = text.split_ascii_whitespace();
        // Numbers of fields count from the state, which is 0.
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let utime = fields.nth(9)?.parse().ok()?;
        let stime = fields.next()?.parse().ok()?;
        let threads = fields.nth(4)?.parse().ok()?;
        let started = fields.nth(1)?.parse().ok()?;
        let rss = fields.nth(1)?.parse::<i64>().ok()?;
        Some(Self {
            pid,
            comm,
            state,
            parent,
            utime,
            stime,
            threads,
            started,
            rss: u64::try_from(rss).unwrap_or(0),
        })
    }

    /// Whether anything of it still runs. A main thread that ended before the others looks dead and is not.
    pub(super) fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X') || self.threads > 1
    }
}

/// A process and what it goes by.
#[derive(Debug, Clone)]
pub(super) struct Row {
    /// The process.
    pub(super) stat: Stat,
    /// Its executable.
    pub(super) exe: Option<PathBuf>,
    /// The beginning of its command line.
    pub(super) words: Vec<String>,
}

impl Row {
    /// Of one process. Blocking.
    pub(super) fn of(stat: Stat) -> Self {
        let mut words = cmdline(stat.pid);
        words.truncate(4);
        Self {
            exe: exe(stat.pid),
            words,
            stat,
        }
    }
}

/// The table of all processes with what they go by, shared by everybody who wants it at the same time.
#[derive(Debug, Default)]
pub(super) struct Names(Mutex<Option<(Instant, Arc<Vec<Row>>)>>);

impl Names {
    /// As it is at `asked` or later. Blocking.
    pub(super) fn since(&self, asked: Instant) -> Arc<Vec<Row>> {
        let mut last = self.0.lock();
        if let Some((at, rows)) = last.as_ref()
            && *at >= asked
        {
            return Arc::clone(rows);
        }
        let at = Instant::now();
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        let others = all().into_iter().filter(|stat| stat.pid != own && stat.is_alive());
        let rows = Arc::new(others.map(Row::of).collect());
        *last = Some((at, Arc::clone(&rows)));
        rows
    }

    /// Nobody has wanted it for a while.
    pub(super) fn forget(&self) {
        *self.0.lock() = None;
    }
}

/// The real and the saved user id of a process; nothing when it is gone. Blocking.
pub(super) fn uids(pid: i32) -> Option<(u32, u32)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let mut ids = line.split_ascii_whitespace().map(str::parse);
    let real = ids.next()?.ok()?;
    let saved = ids.nth(1)?.ok()?;
    Some((real, saved))
}

/// Every process that can be seen. Blocking.
pub(super) fn all() -> Vec<Stat> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(Stat::read).collect()
}

/// The executable; nothing when it may not be seen or there is none. One that was replaced meanwhile keeps its name.
pub(super) fn exe(pid: i32) -> Option<PathBuf> {
    let path = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let text = path.to_string_lossy();
    Some(match text.strip_suffix(" (deleted)") {
        Some(name) => PathBuf::from(name),
        None => path,
    })
}

/// Its working directory.
pub(super) fn cwd(pid: i32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/cwd")).ok()
}

/// Its command line, at most 4 KiB of it.
pub(super) fn cmdline(pid: i32) -> Vec<String> {
    let mut bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes.truncate(4096);
    let words = bytes
        .split(|b| *b == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned());
    let mut words: Vec<String> = words.collect();
    // Behind the last NUL is nothing.
    if words.last().is_some_and(String::is_empty) {
        words.pop();
    }
    words
}

/// Whether a variable of its environment is a path in or below `dir`.
pub(super) fn environment_is_below(pid: i32, name: &str, dir: &Path) -> bool {
    let Ok(bytes) = std::fs::read(format!("/proc/{pid}/environ")) else {
        return false;
    };
    bytes.split(|b| *b == 0).any(|entry| {
        let entry = String::from_utf8_lossy(entry);
        matches!(entry.split_once('='), Some((key, value)) if key == name && Path::new(value).starts_with(dir))
    })
}

/// The kernel's units on this host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Units {
    /// Clock ticks in a second.
    pub(super) ticks: u64,
    /// Bytes in a page.
    pub(super) page: u64,
    /// Processors of the whole machine.
    pub(super) processors: u64,
    /// Bytes of memory of the whole machine.
    pub(super) memory: u64,
}

impl Units {
    /// Of this host. Blocking.
    pub(super) fn read() -> Self {
        use nix::unistd::{SysconfVar, sysconf};
        let of = |var, default: u64| match sysconf(var) {
            Ok(Some(value)) if value > 0 => u64::try_from(value).unwrap_or(default),
            _ => default,
        };
        let page = of(SysconfVar::PAGE_SIZE, 4096);
        Self {
            ticks: of(SysconfVar::CLK_TCK, 100),
            page,
            processors: of(SysconfVar::_NPROCESSORS_ONLN, 1),
            memory: of(SysconfVar::_PHYS_PAGES, 1).saturating_mul(page),
        }
    }
}

/// When this host was booted, unix seconds by its clock as it stands now. Blocking.
pub(super) fn boot_time() -> u64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    stat.lines()
        .find_map(|line| line.strip_prefix("btime "))
        .and_then(|seconds| seconds.trim().parse().ok())
        .unwrap_or(0)
}

/// Seconds since boot.
pub(super) fn uptime() -> f64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split_ascii_whitespace()
        .next()
        .and_then(|s| s.parse().ok())
        .unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_kernel() {
        let line = b"42 (a) b ) S 7 8 9 0 -1 4 11 12 13 14 150 160 0 0 20 0 3 0 12345 1000 77 18446744073709551615 1\n";
        let stat = Stat::parse(42, line).unwrap();
        assert_eq!((stat.comm.as_str(), stat.state, stat.parent), ("a) b ", 'S', 7));
        assert_eq!((stat.utime, stat.stime, stat.threads), (150, 160, 3));
        assert_eq!((stat.started, stat.rss), (12345, 77));
        for short in [&b"42 (x"[..], b"42 (x) R 1", b"", b"42"] {
            assert!(Stat::parse(42, short).is_none());
        }
    }

    #[test]
    fn this_process() {
        let me = i32::try_from(std::process::id()).unwrap();
        let stat = Stat::read(me).unwrap();
        assert!(stat.is_alive() && stat.rss > 0 && stat.threads >= 1);
        assert!(all().iter().any(|other| other.pid == me));
        let units = Units::read();
        assert!(
            units.ticks >= 1 && units.page >= 1024 && units.memory > 1 << 20,
            "{units:?}"
        );
        assert!(boot_time() > 1_000_000_000 && uptime() > 0.0);
        assert!(!cmdline(me).is_empty() && exe(me).is_some() && cwd(me).is_some());
    }
}
