//! Appending: segments are begun, filled and closed, room is made or refused, and what a failed write has left is cut off.

use std::io;
use std::time::Instant;

use super::disk::DiskFile;
use super::format::{self, ENTRY_HEADER, EntryHeader, SEGMENT_HEADER};
use super::index::Segment;
use super::{Appended, Gone, Put, Spool, SpoolError, SyncPolicy, WhenFull, Writer};

/// Bodies up to this length are gathered into one write.
const GATHER: usize = 16 << 10;

impl Spool {
    /// Writes entries behind the others.
    pub fn append(&mut self, entries: &[Put<'_>]) -> Appended {
        let mut appended = Appended {
            written: 0,
            dropped: Gone::default(),
            failed: None,
        };
        while appended.written < entries.len() && appended.failed.is_none() {
            let rest = &entries[appended.written..];
            match self.append_to_one(rest, &mut appended.dropped) {
                Ok(written) => appended.written += written,
                Err(error) => appended.failed = Some(error),
            }
        }
        appended
    }

    /// Writes as many of the entries as go into one segment, at least one.
    fn append_to_one(&mut self, entries: &[Put<'_>], dropped: &mut Gone) -> Result<usize, SpoolError> {
        let mut last = self.last_index;
        let (mut fitting, mut added) = (0, 0u64);
        let begin = self.writer.as_ref().map_or(0, |_| self.index.tail_bytes());
        for put in entries {
            let len = (ENTRY_HEADER + put.body.len()) as u64;
            let limit = self.limit();
            if put.body.len() > limit {
                if fitting > 0 {
                    break;
                }
                return Err(SpoolError::TooLong {
                    len: put.body.len(),
                    limit,
                });
            }
            if put.index <= last {
                if fitting > 0 {
                    break;
                }
                return Err(SpoolError::Order { index: put.index, last });
            }
            let before = begin + added;
            if before > 0 && before + len > self.config.segment_bytes.max(len) {
                break;
            }
            last = put.index;
            added += len;
            fitting += 1;
        }
        if fitting == 0 {
            // The segment is full.
            self.close_writer()?;
            return self.append_to_one(entries, dropped);
        }
        self.make_room(SEGMENT_HEADER as u64 + added, dropped)?;
        let entries = &entries[..fitting];
        self.write(entries)?;
        Ok(fitting)
    }

    fn limit(&self) -> usize {
        let whole = self
            .config
            .max_bytes
            .saturating_sub((SEGMENT_HEADER + ENTRY_HEADER) as u64);
        self.config
            .max_entry_bytes
            .min(usize::try_from(whole).unwrap_or(usize::MAX))
    }

    /// Sees to it that `needed` bytes more stay within the bound.
    fn make_room(&mut self, needed: u64, dropped: &mut Gone) -> Result<(), SpoolError> {
        if self.bytes() + needed <= self.config.max_bytes {
            return Ok(());
        }
        self.bury()?;
        while self.bytes() + needed > self.config.max_bytes {
            if self.config.when_full == WhenFull::Refuse {
                return Err(SpoolError::Bound {
                    dir: self.config.dir.display().to_string(),
                    bound: self.config.max_bytes,
                });
            }
            if self.index.segments().len() == 1 {
                self.writer = None;
                self.index.close_tail();
            }
            let Some(segment) = self.index.drop_oldest() else {
                return Ok(());
            };
            dropped.add(segment.live);
            let name = format::name(segment.first);
            self.reader.forget();
            self.disk
                .remove(&name)
                .map_err(|error| self.failed("remove", &name, error))?;
        }
        Ok(())
    }

    /// Writes entries that fit into the segment, all or none.
    fn write(&mut self, entries: &[Put<'_>]) -> Result<(), SpoolError> {
        if self.writer.is_none() {
            self.new_segment(entries[0].index)?;
        }
        let begin = self.index.tail_bytes();
        let Some(writer) = self.writer.as_ref() else {
            return Ok(());
        };
        let name = writer.name.clone();
        let mut at = begin;
        self.scratch.clear();
        let mut outcome = Ok(());
        for put in entries {
            EntryHeader::of(put).encode(&mut self.scratch);
            if put.body.len() <= GATHER {
                self.scratch.extend_from_slice(put.body);
                if self.scratch.len() < 4 * GATHER {
                    continue;
                }
            }
            outcome = put_at(writer.file.as_ref(), &mut self.scratch, &mut at);
            if outcome.is_ok() && put.body.len() > GATHER {
                outcome = writer.file.write_at(put.body, at);
                at += put.body.len() as u64;
            }
            if outcome.is_err() {
                break;
            }
        }
        if outcome.is_ok() {
            outcome = put_at(writer.file.as_ref(), &mut self.scratch, &mut at);
        }
        let due = match self.config.sync {
            SyncPolicy::Never => false,
            SyncPolicy::Interval(interval) => self.last_sync.is_none_or(|last| last.elapsed() >= interval),
            SyncPolicy::Always => true,
        };
        self.unsynced = true;
        if outcome.is_ok() && due {
            outcome = writer.file.sync();
            if outcome.is_ok() {
                self.unsynced = false;
                self.last_sync = Some(Instant::now());
            }
        }
        if let Err(error) = outcome {
            // What stands behind the last good entry is not to be taken for one. If it cannot be cut off the segment gets no more, and
            // none that was to begin with an entry which is not there.
            let cut = writer.file.set_len(begin);
            let empty = self.index.drop_empty_tail();
            if empty || cut.is_err() || self.config.sync != SyncPolicy::Never {
                self.writer = None;
                self.index.close_tail();
            }
            if empty {
                // If it stays it is taken away when the spool is opened.
                self.disk.remove(&name).ok();
            }
            return Err(self.failed("write", &name, error));
        }
        for put in entries {
            let bytes = (ENTRY_HEADER + put.body.len()) as u64;
            self.index.push(put.index, put.records, bytes);
            self.last_index = put.index;
        }
        Ok(())
    }

    fn new_segment(&mut self, first: u64) -> Result<(), SpoolError> {
        let name = format::name(first);
        let made = self.disk.create(&name).and_then(|file| {
            file.write_at(&format::segment_header(first), 0)?;
            if self.config.sync != SyncPolicy::Never {
                self.disk.sync_dir()?;
            }
            Ok(file)
        });
        match made {
            Ok(file) => {
                self.index.begin(Segment::new(first, SEGMENT_HEADER as u64));
                self.writer = Some(Writer { name, file });
                Ok(())
            }
            Err(error) => {
                // A file without an entry is taken away when the spool is opened, if this does not succeed.
                self.disk.remove(&name).ok();
                Err(self.failed("begin", &name, error))
            }
        }
    }

    pub(super) fn close_writer(&mut self) -> Result<(), SpoolError> {
        if self.config.sync != SyncPolicy::Never {
            self.sync()?;
        }
        self.writer = None;
        self.index.close_tail();
        Ok(())
    }
}

fn put_at(file: &dyn DiskFile, scratch: &mut Vec<u8>, at: &mut u64) -> io::Result<()> {
    if !scratch.is_empty() {
        file.write_at(scratch, *at)?;
        *at += scratch.len() as u64;
        scratch.clear();
    }
    Ok(())
}
