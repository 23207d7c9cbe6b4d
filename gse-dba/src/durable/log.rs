//! The open log: one record per group of commands, written before the replies go, synced before them too when asked for.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::{Settings, format, log_path, sync_dir};
use crate::metrics::Metrics;

/// Room that must be had before writes are taken again after a failure, bytes.
const PROBE_ROOM: i64 = 1 << 20;

/// Where an open log stands.
pub(crate) struct Position {
    pub(crate) generation: u64,
    pub(crate) epoch: u32,
    /// Of the next record.
    pub(crate) seq: u64,
    /// Bytes of whole records, with the header.
    pub(crate) len: u64,
    /// Bytes of snapshot and closed logs below it.
    pub(crate) below: u64,
    /// Bytes of the snapshot alone.
    pub(crate) snapshot: u64,
}

pub(crate) struct Journal {
    settings: Arc<Settings>,
    file: File,
    pub(crate) generation: u64,
    epoch: u32,
    seq: u64,
    /// Bytes of this file that hold whole records.
    pub(crate) len: u64,
    /// Bytes of snapshot and closed logs below it.
    pub(crate) below: u64,
    /// Bytes of the snapshot alone.
    pub(crate) snapshot: u64,
    /// The file may have lost what was written to it (a sync failed): nothing more is appended to it.
    tainted: bool,
    buf: Vec<u8>,
    /// Held for as long as the store is open.
    _lock: Arc<File>,
}

impl Journal {
    /// A journal over an open log of which `at` says everything.
    pub(crate) fn new(settings: Arc<Settings>, file: File, at: Position, lock: Arc<File>) -> Self {
        let Position {
            generation,
            epoch,
            seq,
            len,
            below,
            snapshot,
        } = at;
        Self {
            settings,
            file,
            generation,
            epoch,
            seq,
            len,
            below,
            snapshot,
            tainted: false,
            buf: Vec::new(),
            _lock: lock,
        }
    }

    /// Makes an empty log of this generation.
    pub(crate) fn create(dir: &Path, generation: u64) -> io::Result<File> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(log_path(dir, generation))?;
        file.write_all_at(&format::header(format::Kind::Log, generation), 0)?;
        file.sync_all()?;
        sync_dir(dir)?;
        Ok(file)
    }

    /// Whether the open file can no longer be relied on.
    pub(crate) fn is_tainted(&self) -> bool {
        self.tainted
    }

    /// Log bytes on the disk since the last snapshot.
    pub(crate) fn total(&self) -> u64 {
        self.len + self.below
    }

    /// Appends one record. On an error the file is as it was before.
    pub(crate) fn append(&mut self, payload: &[u8], metrics: &Metrics) -> io::Result<()> {
        if self.tainted {
            return Err(io::Error::other(
                "an earlier sync of the log failed; waiting for a new snapshot",
            ));
        }
        if payload.len() > format::MAX_PAYLOAD as usize {
            return Err(io::Error::other(
                "the changes of one transaction are larger than a log record may be",
            ));
        }
        self.buf.clear();
        format::push_record(&mut self.buf, self.epoch, self.seq, payload);
        let bytes = self.buf.len() as u64;
        if self.settings.max_disk > 0 && self.total() + bytes > self.settings.max_disk {
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "max_disk_mb is reached"));
        }
        let written = self.file.write_all_at(&self.buf, self.len).and_then(|()| {
            if self.settings.always {
                let start = Instant::now();
                let synced = self.file.sync_data();
                metrics.fsync(start.elapsed());
                self.tainted = synced.is_err();
                synced?;
            }
            Ok(())
        });
        if self.buf.capacity() > 8 << 20 {
            self.buf = Vec::new();
        }
        if let Err(e) = written {
            // What was written of the record is taken back. Should even that fail, the next record is written over it, and recovery takes neither for whole by mistake: the checksum decides.
            if let Err(e) = self.file.set_len(self.len) {
                tracing::warn!(error = %e, "a half-written log record could not be cut off; it will be written over");
            }
            return Err(e);
        }
        self.len += bytes;
        self.seq += 1;
        metrics.logged(bytes);
        Ok(())
    }

    /// Tries whether writing works again, and writes what waited.
    pub(crate) fn probe(&mut self, waiting: &[u8], metrics: &Metrics) -> io::Result<()> {
        use nix::fcntl::{FallocateFlags, fallocate};
        if self.settings.max_disk > 0 && self.total() + PROBE_ROOM as u64 / 16 > self.settings.max_disk {
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "max_disk_mb is reached"));
        }
        match fallocate(
            &self.file,
            FallocateFlags::FALLOC_FL_KEEP_SIZE,
            self.len as i64,
            PROBE_ROOM,
        ) {
            // A file system that cannot say beforehand is tried by writing.
            Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS) => {}
            Err(e) => return Err(e.into()),
        }
        self.append(waiting, metrics)
    }

    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Closes this log and goes on in one of the next generation; returns that generation.
    pub(crate) fn rotate(&mut self) -> io::Result<u64> {
        // A file whose sync failed is not waited for: the snapshot to come replaces it.
        if !self.tainted {
            self.file.sync_data()?;
        }
        let generation = self.generation + 1;
        self.file = Self::create(&self.settings.dir, generation)?;
        self.generation = generation;
        self.below += self.len;
        self.len = format::HEADER as u64;
        self.seq = 0;
        Ok(generation)
    }

    /// A snapshot of this size has replaced everything below the open log.
    pub(crate) fn compacted(&mut self, snapshot: u64) {
        self.below = snapshot;
        self.snapshot = snapshot;
        self.tainted = false;
    }
}
