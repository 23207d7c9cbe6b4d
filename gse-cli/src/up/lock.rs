//! One `gse up` for each data directory. The lock goes with the process, however it ends.

use std::fs::{self, File, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, bail};

/// The right to a data directory.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the right, or says who has it.
    ///
    /// # Errors
    /// Another process has it, or the file cannot be used.
    pub(super) fn take(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("up.lock");
        let shown = || format!("cannot lock {}", path.display());
        let mut file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .with_context(shown)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                // Only to name the holder; without a name the refusal is the same.
                let _ = file.take(20).read_to_string(&mut pid);
                let pid = pid.trim();
                let (who, how) = if pid.bytes().all(|b| b.is_ascii_digit()) && !pid.is_empty() {
                    (format!(" (process {pid})"), format!("kill {pid}"))
                } else {
                    (String::new(), "Ctrl-C".to_owned())
                };
                bail!(
                    "another gse up{who} runs with {}; stop it ({how}), or say --data with another directory",
                    dir.display()
                );
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(shown),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .with_context(shown)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().unwrap();
        let held = Lock::take(dir.path()).unwrap();
        let error = Lock::take(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert!(error.contains(&dir.path().display().to_string()), "{error}");
        drop(held);
        Lock::take(dir.path()).unwrap();
    }
}
