//! Which process is meant by a registration, if any runs: the one that was known before as long as it lives, else the one that the pid file
//! names if its executable and its age fit, else, only when there is no pid file, one of that name. A pid file that names the dead, or
//! somebody else, means that nothing runs. Everything here blocks.

use std::cell::OnceCell;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gse_proto::proc::Spec;

use super::stat::{self, Names, Row, Stat, Units};

/// How much younger than its pid file's last change a process may look: clocks are coarse.
const SLACK_SECS: u64 = 30;
/// A pid file is not longer.
const MAX_PID_FILE: u64 = 4096;
/// How old a table of all processes may be.
const RECENT: Duration = Duration::from_secs(1);
/// How many bytes of a name the kernel keeps.
const COMM: usize = 15;

/// A process for certain, until the host is booted again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Ident {
    /// Process id.
    pub(super) pid: i32,
    /// Clock ticks from boot to its start.
    pub(super) started: u64,
    /// The boot in which this is true.
    pub(super) boot: String,
}

/// What looking takes, read once for many processes, and only when it is needed.
pub(super) struct Look<'a> {
    boot: &'a str,
    ticks: u64,
    names: &'a Names,
    claim: &'a dyn Fn() -> Vec<Claimed>,
    asked: Instant,
    boot_time: OnceCell<u64>,
    claimed: OnceCell<Vec<Claimed>>,
}

/// A process that is known to be of a registration.
#[derive(Debug, Clone)]
pub(super) struct Claimed {
    /// Its id.
    pub(super) pid: i32,
    /// Its start.
    pub(super) started: u64,
    /// The registration's.
    pub(super) spec: Arc<Spec>,
}

impl<'a> Look<'a> {
    /// For one round of looks. What is claimed is not found by name for a registration with another pid file.
    pub(super) fn new(boot: &'a str, units: Units, names: &'a Names, claim: &'a dyn Fn() -> Vec<Claimed>) -> Self {
        Self {
            boot,
            ticks: units.ticks.max(1),
            names,
            claim,
            asked: Instant::now(),
            boot_time: OnceCell::new(),
            claimed: OnceCell::new(),
        }
    }

    /// The process that `ident` is, if it lives.
    pub(super) fn still(&self, ident: &Ident) -> Option<Stat> {
        still(ident, self.boot)
    }

    /// The process of `spec`. `last`: the one that it was before. `since`: a start command began then (ticks since boot), and what has
    /// appeared since under the right name is taken for what it has started. `by_name`: whether the whole table may be looked through.
    pub(super) fn find(&self, spec: &Spec, last: Option<&Ident>, since: Option<u64>, by_name: bool) -> Option<Stat> {
        let before = last.and_then(|ident| self.still(ident));
        match self.by_pid_file(spec) {
            PidFile::Names(stat) => return Some(stat),
            // One that was found otherwise, or is about to take its pid file away.
            PidFile::Stale | PidFile::Absent if before.is_some() => return before,
            PidFile::Stale => {
                // It may not have come to writing its own yet.
                return since.and_then(|since| self.by_name(spec, Some(since)));
            }
            PidFile::Absent => {}
        }
        if !by_name {
            return None;
        }
        self.by_name(spec, since)
    }

    fn by_pid_file(&self, spec: &Spec) -> PidFile {
        if spec.pid_path.is_empty() {
            return PidFile::Absent;
        }
        let path = Path::new(&spec.pid_path);
        let Ok(meta) = std::fs::metadata(path) else {
            return PidFile::Absent;
        };
        if !meta.is_file() || meta.len() > MAX_PID_FILE {
            return PidFile::Stale;
        }
        let text = std::fs::read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let Some(pid) = text.split_whitespace().next().and_then(|word| word.parse::<i32>().ok()) else {
            return PidFile::Stale;
        };
        let Some(stat) = (pid > 0).then(|| Stat::read(pid)).flatten().filter(Stat::is_alive) else {
            return PidFile::Stale;
        };
        let row = Row::of(stat);
        if !spec.proc_name.is_empty() && !is_called(&row, &spec.proc_name) {
            return PidFile::Stale;
        }
        let written = meta
            .modified()
            .ok()
            .and_then(|at: SystemTime| at.duration_since(UNIX_EPOCH).ok())
            .map_or(0, |d| d.as_secs());
        let began = self.boot_time.get_or_init(stat::boot_time) + row.stat.started / self.ticks;
        // Written before the process existed: its number was given away again. But the clock may have been set since, so one that plainly
        // belongs here counts all the same.
        if began > written + SLACK_SECS && !belongs(&row, spec) {
            return PidFile::Stale;
        }
        PidFile::Names(row.stat)
    }

    fn by_name(&self, spec: &Spec, since: Option<u64>) -> Option<Stat> {
        if spec.proc_name.is_empty() {
            return None;
        }
        // After a start it has to be as it is now; else one that was just read does, as thousands may ask together.
        let asked = match since {
            Some(_) => self.asked,
            None => self.asked.checked_sub(RECENT).unwrap_or(self.asked),
        };
        let table = self.names.since(asked);
        let mut named: Vec<&Row> = table.iter().filter(|row| is_called(row, &spec.proc_name)).collect();
        if named.is_empty() {
            return None;
        }
        let claimed = self.claimed.get_or_init(self.claim);
        let is_claimed = |row: &Row| {
            let mut others = claimed.iter().filter(|one| one.spec.pid_path != spec.pid_path);
            others.any(|one| (one.pid, one.started) == (row.stat.pid, row.stat.started))
        };
        named.retain(|row| !is_claimed(row));
        if let Some(since) = since {
            // This look came right after a start: what was there before can't be what it has started, unless it belongs here.
            named.retain(|row| row.stat.started >= since || belongs(row, spec));
        } else if named.iter().any(|row| belongs(row, spec)) {
            named.retain(|row| belongs(row, spec));
        } else if !spec.pid_path.is_empty() && !spec.setup_path.is_empty() {
            // It would have a pid file: this is somebody else's of the same name.
            return None;
        }
        // The head of a tree of processes, the oldest one of several.
        let is_child = |row: &Row| named.iter().any(|other| other.stat.pid == row.stat.parent);
        let heads = named.iter().filter(|row| !is_child(row));
        let head = heads.min_by_key(|row| (row.stat.started, row.stat.pid))?;
        // It may have ended since the table was read.
        Stat::read(head.stat.pid).filter(|stat| stat.started == head.stat.started && stat.is_alive())
    }

    /// The identity of what was found.
    pub(super) fn ident(&self, stat: &Stat) -> Ident {
        Ident {
            pid: stat.pid,
            started: stat.started,
            boot: self.boot.to_owned(),
        }
    }
}

/// The process that `ident` is, if it lives in this boot.
pub(super) fn still(ident: &Ident, boot: &str) -> Option<Stat> {
    if ident.boot != boot {
        return None;
    }
    Stat::read(ident.pid).filter(|stat| stat.started == ident.started && stat.is_alive())
}

enum PidFile {
    /// There is none, or none is configured.
    Absent,
    /// It names nobody who could be meant.
    Stale,
    /// This one.
    Names(Stat),
}

/// Whether the process goes by the name: its executable, its own name, or what it was called as.
fn is_called(row: &Row, name: &str) -> bool {
    let short = name.as_bytes().get(..COMM).unwrap_or(name.as_bytes());
    // The kernel's name is cut; a longer one must be found whole elsewhere.
    if name.len() < COMM && row.stat.comm == name {
        return true;
    }
    let is = |path: &Path| path.file_name().is_some_and(|file| file == name);
    let mut words = row.words.iter().map(Path::new);
    if row.exe.as_deref().is_some_and(is) || words.next().is_some_and(is) {
        return true;
    }
    // A script: its interpreter is called, with the script's path behind; the kernel's name is the script's.
    row.stat.comm.as_bytes() == short && words.any(is)
}

/// Whether it plainly is of this installation: it runs there, comes from there, or was started from there.
fn belongs(row: &Row, spec: &Spec) -> bool {
    if spec.setup_path.is_empty() {
        return false;
    }
    let dir = Path::new(&spec.setup_path);
    row.exe.as_ref().is_some_and(|exe| exe.starts_with(dir))
        || row.words.iter().any(|word| Path::new(word).starts_with(dir))
        || stat::cwd(row.stat.pid).is_some_and(|cwd| cwd.starts_with(dir))
        || stat::environment_is_below(row.stat.pid, "PWD", dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::process::{Child, Command};

    struct Host {
        dir: tempfile::TempDir,
        children: Vec<Child>,
    }

    impl Drop for Host {
        fn drop(&mut self) {
            for child in &mut self.children {
                child.kill().ok();
                child.wait().ok();
            }
        }
    }

    impl Host {
        fn new() -> Self {
            Self {
                dir: tempfile::tempdir().unwrap(),
                children: Vec::new(),
            }
        }

        fn setup(&self, name: &str) -> PathBuf {
            let dir = self.dir.path().join(name);
            std::fs::create_dir_all(&dir).unwrap();
            dir.canonicalize().unwrap()
        }

        /// Starts a process with an executable of this name.
        fn start(&mut self, setup: &Path, name: &str) -> i32 {
            let exe = setup.join(name);
            if !exe.exists() {
                std::fs::copy("/bin/sleep", &exe).unwrap();
            }
            let child = Command::new(&exe).arg("60").current_dir("/").spawn().unwrap();
            let pid = i32::try_from(child.id()).unwrap();
            self.children.push(child);
            // Until it has become the program.
            let begun = std::time::Instant::now();
            while stat::exe(pid).is_none_or(|seen| seen != exe) {
                assert!(begun.elapsed().as_secs() < 20);
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            pid
        }
    }

    static NAMES: std::sync::LazyLock<Names> = std::sync::LazyLock::new(Names::default);

    fn look() -> Look<'static> {
        NAMES.forget();
        Look::new("boot", Units::read(), &NAMES, &Vec::new)
    }

    fn spec(setup: &Path, name: &str) -> Spec {
        Spec {
            proc_name: name.to_owned(),
            setup_path: setup.display().to_string(),
            pid_path: setup.join("x.pid").display().to_string(),
            ..Spec::default()
        }
    }

    #[test]
    fn the_pid_file_counts_and_a_stale_one_means_nothing_runs() {
        let mut host = Host::new();
        let setup = host.setup("a");
        let spec = spec(&setup, "gsetestbeat");
        let (first, second) = (host.start(&setup, "gsetestbeat"), host.start(&setup, "gsetestbeat"));
        let found = |text: &str| {
            std::fs::write(&spec.pid_path, text).unwrap();
            look().find(&spec, None, None, true).map(|stat| stat.pid)
        };
        assert_eq!(found(&format!("{second}\n")), Some(second));
        assert_eq!(found(&first.to_string()), Some(first));
        // Never by name while there is a pid file.
        let me = std::process::id();
        for stale in ["", "x", "-1", "0", "999999999", &me.to_string(), "4194304000"] {
            assert_eq!(found(stale), None, "{stale:?}");
        }
        std::fs::remove_file(&spec.pid_path).unwrap();
        assert_eq!(look().find(&spec, None, None, true).map(|stat| stat.pid), Some(first));
        assert_eq!(look().find(&spec, None, None, false), None);
    }

    #[test]
    fn one_of_the_same_name_elsewhere_is_somebody_elses() {
        let mut host = Host::new();
        let (here, there) = (host.setup("here"), host.setup("there"));
        let other = host.start(&there, "gsetestjava");
        let mut mine = spec(&here, "gsetestjava");
        assert_eq!(look().find(&mine, None, None, true), None);
        // What a start command has just brought is found though it has no pid file yet.
        let since = Stat::read(other).unwrap().started;
        assert_eq!(look().find(&mine, None, Some(since), true).map(|s| s.pid), Some(other));
        assert_eq!(look().find(&mine, None, Some(since + 1), true), None);
        // Without a pid file there is only the name to go by.
        mine.pid_path.clear();
        assert_eq!(look().find(&mine, None, None, true).map(|s| s.pid), Some(other));
        let own = host.start(&here, "gsetestjava");
        assert_eq!(look().find(&mine, None, None, true).map(|s| s.pid), Some(own));
    }

    #[test]
    fn a_number_that_was_given_away_again_is_not_the_process() {
        let mut host = Host::new();
        let (here, there) = (host.setup("here"), host.setup("there"));
        let spec = spec(&here, "gsetestold");
        let other = host.start(&there, "gsetestold");
        std::fs::write(&spec.pid_path, other.to_string()).unwrap();
        assert_eq!(look().find(&spec, None, None, true).map(|s| s.pid), Some(other));
        let long_ago = SystemTime::now() - std::time::Duration::from_secs(3600);
        let file = std::fs::File::options().write(true).open(&spec.pid_path).unwrap();
        file.set_modified(long_ago).unwrap();
        assert_eq!(look().find(&spec, None, None, true), None);
        let own = host.start(&here, "gsetestold");
        std::fs::write(&spec.pid_path, own.to_string()).unwrap();
        file.set_modified(long_ago).unwrap();
        assert_eq!(
            look().find(&spec, None, None, true).map(|s| s.pid),
            Some(own),
            "the clock was set"
        );
    }

    #[test]
    fn who_was_known_is_known_again_and_nobody_else() {
        let mut host = Host::new();
        let setup = host.setup("a");
        let mut spec = spec(&setup, "gsetestid");
        let pid = host.start(&setup, "gsetestid");
        let at = look();
        let ident = at.ident(&Stat::read(pid).unwrap());
        // Also when it has taken its pid file away.
        assert_eq!(at.find(&spec, Some(&ident), None, false).map(|s| s.pid), Some(pid));
        let wrong = Ident {
            started: ident.started + 1,
            ..ident.clone()
        };
        assert_eq!(at.find(&spec, Some(&wrong), None, false), None);
        let other_boot = Ident {
            boot: "another".to_owned(),
            ..ident.clone()
        };
        assert_eq!(at.find(&spec, Some(&other_boot), None, false), None);
        host.children[0].kill().unwrap();
        let begun = std::time::Instant::now();
        // Dead and not collected is dead.
        spec.pid_path.clear();
        while at.find(&spec, Some(&ident), None, false).is_some() {
            assert!(begun.elapsed().as_secs() < 20);
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}
