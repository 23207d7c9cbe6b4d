//! The pid file: one instance at a time, and a way for `--quit` to find it.
//!
//! The file is locked for as long as the process lives, so a file left by a process that was killed is recognised as such, and a
//! process id that now belongs to somebody else is never signalled. The lock is an open-file-description lock, because whether it
//! is held can be asked without taking it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How often `--quit` looks whether the process has gone.
const QUIT_POLL: Duration = Duration::from_millis(50);
/// What `--quit` waits beyond the drain timeout, for the exit itself.
const QUIT_MARGIN: Duration = Duration::from_secs(3);
/// How often a file that is replaced while it is being opened is tried again.
const OPEN_ATTEMPTS: usize = 5;

/// A held pid file. It is removed when this is dropped.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    /// Holds the lock.
    _file: File,
}

impl PidFile {
    /// Takes the file at `path` for this process.
    ///
    /// # Errors
    /// Another instance holds it, or it cannot be written.
    pub fn acquire(path: &Path) -> anyhow::Result<Self> {
        let shown = || format!("cannot use the pid file {} (runtime.pid_file)", path.display());
        for _ in 0..OPEN_ATTEMPTS {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .with_context(shown)?;
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))) {
                Ok(_) => {}
                Err(Errno::EAGAIN | Errno::EACCES) => {
                    let holder = read_pid(&mut file)
                        .map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"));
                    anyhow::bail!(
                        "{holder} runs already with the pid file {}; stop it with --quit first",
                        path.display()
                    );
                }
                Err(error) => return Err(error).with_context(shown),
            }
            // The one before us may have removed the file between our opening and locking it; then ours is no file any more.
            let same = std::fs::metadata(path).is_ok_and(|now| {
                file.metadata()
                    .is_ok_and(|ours| (now.dev(), now.ino()) == (ours.dev(), ours.ino()))
            });
            if !same {
                continue;
            }
            file.set_len(0)
                .and_then(|()| writeln!(file, "{}", std::process::id()))
                .with_context(shown)?;
            return Ok(Self {
                path: path.to_owned(),
                _file: file,
            });
        }
        anyhow::bail!("{} (runtime.pid_file) is being replaced all the time", path.display())
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("cannot remove the pid file {}: {error}", self.path.display());
        }
    }
}

/// What became of the running instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quit {
    /// There was none.
    NotRunning,
    /// It has gone.
    Stopped {
        /// The process id it had.
        pid: i32,
    },
}

/// Tells the process that holds the pid file at `path` to drain, and waits until it has gone: `drain` and a little more.
///
/// # Errors
/// It may not be signalled, is not ours to judge (the file holds no process id), or is still there after that time.
pub fn quit(path: &Path, drain: Duration) -> anyhow::Result<Quit> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Quit::NotRunning),
        Err(error) => return Err(error).with_context(|| format!("cannot read the pid file {}", path.display())),
    };
    if !is_held(&file)? {
        return Ok(Quit::NotRunning);
    }
    let pid = read_pid(&mut file).with_context(|| format!("{} is locked but holds no process id", path.display()))?;
    match kill(Pid::from_raw(pid), Signal::SIGTERM) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => return Err(error).with_context(|| format!("cannot signal process {pid}")),
    }
    let patience = drain + QUIT_MARGIN;
    let waiting = async {
        while is_held(&file)? {
            tokio::time::sleep(QUIT_POLL).await;
        }
        anyhow::Ok(())
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime
        .block_on(async { tokio::time::timeout(patience, waiting).await })
        .with_context(|| format!("process {pid} is still there after {} ms", patience.as_millis()))??;
    Ok(Quit::Stopped { pid })
}

/// Whether a process holds the lock on `file`.
fn is_held(file: &File) -> anyhow::Result<bool> {
    let mut lock = whole_file(libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).context("cannot ask who holds the pid file")?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn whole_file(kind: i32) -> libc::flock {
    // Both constants are small; the field is a short.
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn read_pid(file: &mut File) -> Option<i32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok().filter(|pid| *pid > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_instance_is_refused_by_name_and_the_file_goes_with_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gse_task.pid");
        let held = PidFile::acquire(&path).unwrap();
        let refused = PidFile::acquire(&path).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("process {}", std::process::id())),
            "{refused}"
        );
        assert!(refused.contains("gse_task.pid"), "{refused}");
        drop(held);
        assert!(!path.exists());
        PidFile::acquire(&path).unwrap();
    }

    #[test]
    fn a_stale_file_is_taken_over_and_its_pid_is_not_signalled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stale.pid");
        // Signalling our own id would end this test.
        std::fs::write(&path, format!("{}\n", std::process::id())).unwrap();
        assert_eq!(quit(&path, Duration::from_millis(10)).unwrap(), Quit::NotRunning);
        let held = PidFile::acquire(&path).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            format!("{}\n", std::process::id())
        );
        drop(held);
    }

    #[test]
    fn nothing_runs_where_there_is_no_file() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            quit(&dir.path().join("none.pid"), Duration::from_millis(10)).unwrap(),
            Quit::NotRunning
        );
    }

    #[test]
    fn a_directory_that_is_missing_is_named() {
        let error = PidFile::acquire(Path::new("/nonexistent/x.pid")).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/x.pid"));
    }
}
