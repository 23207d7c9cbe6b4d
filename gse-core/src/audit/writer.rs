//! The thread that writes the trail: one file, locked, appended to; put aside by size; healed after a failed write.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use tokio::sync::mpsc;

use super::chain::{self, Head, MAX_LINE, aside, aside_name};
use super::{AuditConfig, AuditError, Entry, Written};

/// Most lines written and synced in one go.
const BATCH: usize = 256;

pub(super) struct Trail {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines in the file; anything beyond is the rest of a failed write.
    size: u64,
    head: Head,
    sync: bool,
    max_bytes: u64,
    keep: usize,
}

impl Trail {
    pub(super) fn open(path: &Path, config: &AuditConfig) -> Result<Self, AuditError> {
        let fail = |reason: String| AuditError::File {
            file: path.display().to_string(),
            reason,
        };
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(|error| fail(error.to_string()))?;
        }
        let mut file = open_file(path).map_err(|error| fail(error.to_string()))?;
        let (size, head, torn) = last_line(&mut file, path).map_err(fail)?;
        let mut trail = Trail {
            path: path.to_path_buf(),
            file,
            size,
            head,
            sync: config.sync,
            max_bytes: config.max_file_bytes,
            keep: config.keep_files,
        };
        if torn > 0 {
            tracing::warn!(file = %path.display(), bytes = torn, "removed an unfinished last line of the audit trail");
            trail.file.set_len(size).map_err(|error| fail(error.to_string()))?;
            let entry = Entry {
                operation: "audit.recover".to_owned(),
                reason: Some(format!("{torn} bytes of an unfinished line removed")),
                ..Entry::default()
            };
            trail.append(&[entry]).map_err(|error| fail(error.to_string()))?;
        }
        Ok(trail)
    }

    /// Writes until nobody can send any more.
    pub(super) fn run(mut self, mut lines: mpsc::Receiver<(Entry, Written)>) {
        while let Some((entry, written)) = lines.blocking_recv() {
            let mut entries = vec![entry];
            let mut waiting = vec![written];
            while entries.len() < BATCH
                && let Ok((entry, written)) = lines.try_recv()
            {
                entries.push(entry);
                waiting.push(written);
            }
            let outcome = self.append(&entries).map_err(|error| AuditError::File {
                file: self.path.display().to_string(),
                reason: error.to_string(),
            });
            for written in waiting {
                // A caller that has stopped waiting has refused its call already.
                drop(written.send(outcome.clone()));
            }
        }
    }

    /// Appends the lines in one write, all or none.
    fn append(&mut self, entries: &[Entry]) -> io::Result<()> {
        self.follow_path()?;
        if self.size >= self.max_bytes {
            self.put_aside()?;
        }
        let time = jiff::Timestamp::now().to_string();
        let mut head = self.head.clone();
        let mut text = Vec::with_capacity(entries.len() * 512);
        for entry in entries {
            chain::seal(&mut head, &time, entry, &mut text)?;
        }
        let written = self
            .file
            .write_all(&text)
            .and_then(|()| if self.sync { self.file.sync_data() } else { Ok(()) });
        if let Err(error) = written {
            // Half a line must not stay: the next one would be glued to it.
            self.file.set_len(self.size)?;
            return Err(error);
        }
        self.size += text.len() as u64;
        self.head = head;
        Ok(())
    }

    /// Opens the file anew when somebody has moved or removed it, and takes back what a failed write may have left.
    fn follow_path(&mut self) -> io::Result<()> {
        let ours = self.file.metadata()?;
        let there = match std::fs::metadata(&self.path) {
            Ok(meta) => Some((meta.dev(), meta.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if there != Some((ours.dev(), ours.ino())) {
            tracing::warn!(file = %self.path.display(), "the audit file was moved away; going on in a new one");
            self.file = open_file(&self.path)?;
            self.size = self.file.metadata()?.len();
            return Ok(());
        }
        if ours.len() > self.size {
            let bytes = ours.len() - self.size;
            tracing::warn!(file = %self.path.display(), bytes, "removed what a failed write left at the end of the audit file");
            self.file.set_len(self.size)?;
        }
        Ok(())
    }

    fn put_aside(&mut self) -> io::Result<()> {
        std::fs::rename(&self.path, aside_name(&self.path, self.head.seq))?;
        self.file = open_file(&self.path)?;
        self.size = 0;
        if self.keep > 0 {
            let old = aside(&self.path)?;
            for (_, file) in old.iter().take(old.len().saturating_sub(self.keep)) {
                tracing::info!(file = %file.display(), "removing the oldest audit file (audit.keep_files)");
                std::fs::remove_file(file)?;
            }
        }
        Ok(())
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    // A lock on a device would be one for the whole host.
    if !file.metadata()?.is_file() {
        return Ok(file);
    }
    file.try_lock().map_err(|error| match error {
        std::fs::TryLockError::WouldBlock => {
            io::Error::other("another writer has it; give every process an audit file of its own")
        }
        std::fs::TryLockError::Error(error) => error,
    })?;
    Ok(file)
}

/// Size of the whole lines, the head of the chain, and the bytes of an unfinished line after them.
fn last_line(file: &mut File, path: &Path) -> Result<(u64, Head, u64), String> {
    let io = |error: io::Error| error.to_string();
    let size = file.metadata().map_err(io)?.len();
    // Two lines at most fit into this: the last whole one and an unfinished one.
    let from = size.saturating_sub(2 * MAX_LINE);
    file.seek(SeekFrom::Start(from)).map_err(io)?;
    let mut tail = Vec::new();
    file.take(2 * MAX_LINE).read_to_end(&mut tail).map_err(io)?;
    let Some(end) = tail.iter().rposition(|byte| *byte == b'\n') else {
        if from > 0 {
            return Err("it does not end with a line; move it away".to_owned());
        }
        // A new file goes on from the newest one put aside.
        let older = aside(path).map_err(io)?.pop();
        let head = match older {
            None => Head::start(),
            Some((_, older)) => {
                let mut older_file = File::open(&older).map_err(io)?;
                last_line(&mut older_file, &older)?.1
            }
        };
        return Ok((0, head, size));
    };
    let begin = tail[..end]
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    let line =
        std::str::from_utf8(&tail[begin..end]).map_err(|_| "its last line is not UTF-8; move it away".to_owned())?;
    let (head, _) = chain::open(line).map_err(|reason| format!("its last line is broken ({reason}); move it away"))?;
    let torn = (tail.len() - end - 1) as u64;
    Ok((size - torn, head, torn))
}
