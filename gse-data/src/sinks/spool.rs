//! A sink's spool, asked from a task: the disk is waited for on threads that may block.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use gse_core::spool::{Put, Spool, SpoolConfig, SpoolError, SyncPolicy, WhenFull};
use parking_lot::Mutex;

use super::load::Load;

/// Longest entry: a chunk of the longest kind and its targets.
const MAX_ENTRY: usize = 48 << 20;
/// Bytes of one file of a spool.
const SEGMENT: u64 = 64 << 20;

/// What a sink can't hand on now.
pub(super) struct Backlog {
    spool: Option<Arc<Mutex<Spool>>>,
    next: u64,
    entries: u64,
    records: u64,
    damaged: u64,
}

/// What became of loads that were to be spooled.
pub(super) struct Kept {
    /// From the first.
    pub(super) written: usize,
    /// Why not the next.
    pub(super) failed: Option<SpoolError>,
}

impl Backlog {
    /// Opens the spool in `dir`. A sink whose spool can't be used works without one, and holds its senders up while it is away.
    pub(super) async fn open(dir: PathBuf, max_bytes: u64) -> Self {
        let config = SpoolConfig {
            segment_bytes: SEGMENT.min(max_bytes / 4),
            max_bytes,
            max_entry_bytes: MAX_ENTRY.min(usize::try_from(max_bytes / 2).unwrap_or(MAX_ENTRY)),
            when_full: WhenFull::Refuse,
            sync: SyncPolicy::Never,
            dir: dir.clone(),
        };
        let opened = tokio::task::spawn_blocking(move || Spool::open(config)).await;
        let mut backlog = Self {
            spool: None,
            next: 1,
            entries: 0,
            records: 0,
            damaged: 0,
        };
        match opened {
            Ok(Ok((spool, recovery))) => {
                backlog.damaged = recovery.damaged.records;
                if !recovery.is_clean() {
                    tracing::error!(dir = %dir.display(), ?recovery, "a sink's spool was damaged; what is whole is handed on");
                }
                backlog.next = spool.last_index() + 1;
                backlog.entries = spool.entries();
                backlog.records = spool.records();
                if backlog.entries > 0 {
                    tracing::info!(dir = %dir.display(), records = backlog.records, ?recovery, "a spool holds records of before");
                }
                backlog.spool = Some(Arc::new(Mutex::new(spool)));
            }
            Ok(Err(error)) => tracing::error!(%error, "a sink has no spool; while it is away its senders wait"),
            Err(error) => tracing::error!(%error, dir = %dir.display(), "a spool can't be opened"),
        }
        backlog
    }

    pub(super) fn exists(&self) -> bool {
        self.spool.is_some()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries == 0
    }

    pub(super) fn records(&self) -> u64 {
        self.records
    }

    /// How many records were found damaged since this was last asked.
    pub(super) fn take_damaged(&mut self) -> u64 {
        std::mem::take(&mut self.damaged)
    }

    /// The index that the last written entry has.
    pub(super) fn last(&self) -> u64 {
        self.next - 1
    }

    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Spool) -> Result<T, SpoolError> + Send + 'static,
    ) -> Result<T, String> {
        let Some(spool) = self.spool.clone() else {
            return Err("there is no spool".into());
        };
        let done = tokio::task::spawn_blocking(move || work(&mut spool.lock())).await;
        done.map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())
    }

    /// Writes loads behind what is there.
    pub(super) async fn keep(&mut self, loads: Vec<Load>) -> Result<Kept, String> {
        let first = self.next;
        let appended = self
            .on_disk(move |spool| {
                let bodies: Vec<(u32, Bytes)> = loads
                    .iter()
                    .map(|load| (u32::try_from(load.records).unwrap_or(u32::MAX), load.encode()))
                    .collect();
                let puts: Vec<Put<'_>> = (first..)
                    .zip(&bodies)
                    .map(|(index, (records, body))| Put {
                        index,
                        records: *records,
                        body,
                    })
                    .collect();
                let appended = spool.append(&puts);
                Ok((appended.written, appended.failed, spool.entries(), spool.records()))
            })
            .await?;
        let (written, failed, entries, records) = appended;
        self.next += written as u64;
        (self.entries, self.records) = (entries, records);
        Ok(Kept { written, failed })
    }

    /// The oldest loads, `most` bytes or one, and the index of the last of them. Entries that make no sense are let go of.
    pub(super) async fn oldest(&mut self, most: usize) -> Result<(Vec<Load>, u64), String> {
        let (found, entries, records) = self
            .on_disk(move |spool| {
                let found = spool.read(0, most)?;
                Ok((found, spool.entries(), spool.records()))
            })
            .await?;
        (self.entries, self.records) = (entries, records);
        let mut damaged = found.damaged.records;
        let upto = found.entries.last().map_or(0, |entry| entry.index);
        let mut loads = Vec::with_capacity(found.entries.len());
        for entry in &found.entries {
            match Load::decode(&entry.body) {
                Some(load) => loads.push(load),
                None => damaged += u64::from(entry.records),
            }
        }
        if damaged > 0 {
            tracing::error!(
                records = damaged,
                "records in a damaged part of a sink's spool are lost"
            );
            self.damaged += damaged;
        }
        Ok((loads, upto))
    }

    /// Lets go of everything up to an index.
    pub(super) async fn release(&mut self, upto: u64) -> Result<(), String> {
        let (damaged, entries, records) = self
            .on_disk(move |spool| {
                let released = spool.release(upto)?;
                spool.commit(b"")?;
                Ok((released.damaged.records, spool.entries(), spool.records()))
            })
            .await?;
        self.damaged += damaged;
        (self.entries, self.records) = (entries, records);
        Ok(())
    }
}
