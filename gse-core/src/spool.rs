//! A bounded queue on disk: entries are appended behind, read from any place, and released in front. It holds what cannot be passed on
//! now, across restarts, kill -9 and power cuts, and never gives out bytes other than those it was given.
//!
//! An entry is opaque: an index that the caller chooses (each higher than the last), a number of records that it stands for, and bytes.
//! Entries stand in segments (files of a bounded size, see `format`) with a checksum over each header and each body. A
//! `mark` file beside them says up to where entries were released, and keeps a small note of the caller's that changes together with
//! that place.
//!
//! All calls block on the disk: a spool belongs to a thread, or to tasks on the blocking pool. Sending, retrying and counting are the
//! caller's; every answer says how many records it was about, so that counts can be exact.

mod disk;
mod format;
mod index;
mod mark;
mod reader;
mod recover;
#[cfg(test)]
mod tests;
mod writer;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;

pub use self::disk::{Disk, DiskFile, RealDisk};
use self::index::Index;
pub use self::mark::MAX_NOTE;
use self::mark::Mark;
pub use self::recover::Recovery;

/// What a spool may use, and what it promises.
#[derive(Debug, Clone)]
pub struct SpoolConfig {
    /// Its directory; made if it is not there. Nothing else may use it.
    pub dir: PathBuf,
    /// A file gets no further entry once it has so many bytes.
    pub segment_bytes: u64,
    /// All files together at most; not less than two segments, or than the longest entry and a bit.
    pub max_bytes: u64,
    /// Longest body of an entry; longer ones are refused, and never allocated for when a damaged file speaks of them.
    pub max_entry_bytes: usize,
    /// What happens at `max_bytes`.
    pub when_full: WhenFull,
    /// When an entry is safe from a power cut.
    pub sync: SyncPolicy,
}

/// What happens to an entry for which there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// The oldest segment makes room for it.
    DropOldest,
    /// It is refused.
    Refuse,
}

/// When written entries are safe from a power cut. From a killed process they are safe at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncPolicy {
    /// When the system pleases.
    Never,
    /// With the first append after so long, or with [`Spool::sync`].
    Interval(Duration),
    /// Before an append returns.
    Always,
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The bound is reached, and the policy is to refuse.
    #[error("the spool {dir} has reached its bound of {bound} bytes")]
    Bound {
        /// Where.
        dir: String,
        /// `max_bytes`.
        bound: u64,
    },
    /// The file system is full, or the account's part of it. What is in the spool can be read; an append may be tried again later.
    #[error("no space left for the spool {dir}; free some, or give it another place")]
    NoSpace {
        /// Where.
        dir: String,
    },
    /// An entry is longer than `max_entry_bytes`, or than the whole spool may be.
    #[error("an entry of {len} bytes; the spool takes {limit} at most")]
    TooLong {
        /// The entry's.
        len: usize,
        /// The bound.
        limit: usize,
    },
    /// An index is not higher than the one before it.
    #[error("entry {index} comes after entry {last}; indices must rise")]
    Order {
        /// The entry's.
        index: u64,
        /// The highest so far.
        last: u64,
    },
    /// The note does not fit beside the mark.
    #[error("a note of {0} bytes; {MAX_NOTE} are kept at most")]
    Note(usize),
    /// The disk failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: String,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// An entry to be written.
#[derive(Debug, Clone, Copy)]
pub struct Put<'a> {
    /// Higher than that of every entry before.
    pub index: u64,
    /// How many records the entry stands for.
    pub records: u32,
    /// Its bytes.
    pub body: &'a [u8],
}

/// An entry as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The caller's number for it.
    pub index: u64,
    /// How many records it stands for.
    pub records: u32,
    /// Its bytes.
    pub body: Bytes,
}

/// Entries that are not in the spool any more, and the records in them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gone {
    /// Entries.
    pub entries: u64,
    /// Records.
    pub records: u64,
}

impl Gone {
    fn add(&mut self, other: Self) {
        self.entries += other.entries;
        self.records += other.records;
    }
}

/// What became of an append.
#[derive(Debug)]
#[must_use]
pub struct Appended {
    /// Entries that were written, from the first of those given.
    pub written: usize,
    /// What was dropped to make room.
    pub dropped: Gone,
    /// Why the others were not written.
    pub failed: Option<SpoolError>,
}

/// What reading has found.
#[derive(Debug, Default)]
#[must_use]
pub struct Found {
    /// In the order of their indices.
    pub entries: Vec<Entry>,
    /// What turned out to be damaged on the way; it is set aside and will not be found again.
    pub damaged: Gone,
}

/// What a release has let go of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use]
pub struct Released {
    /// Released.
    pub released: Gone,
    /// What turned out to be damaged on the way.
    pub damaged: Gone,
}

/// The segment that is written to.
struct Writer {
    name: String,
    file: Box<dyn DiskFile>,
}

/// See the module.
pub struct Spool {
    config: SpoolConfig,
    disk: Box<dyn Disk>,
    index: Index,
    mark: Mark,
    writer: Option<Writer>,
    /// Files whose entries are all released; they go when the mark says so.
    dead: Vec<(String, u64)>,
    reader: reader::Reader,
    scratch: Vec<u8>,
    last_sync: Option<Instant>,
    unsynced: bool,
    last_index: u64,
}

impl std::fmt::Debug for Spool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spool")
            .field("dir", &self.config.dir)
            .field("records", &self.records())
            .finish_non_exhaustive()
    }
}

impl Spool {
    /// Opens the spool in its directory, whatever state it was left in, and says what was found there.
    ///
    /// # Errors
    /// The directory cannot be used. Damaged content is no error: see [`Recovery`].
    pub fn open(config: SpoolConfig) -> Result<(Self, Recovery), SpoolError> {
        let disk = RealDisk::open(&config.dir).map_err(|error| io_error("open", &config.dir.display(), error))?;
        Self::open_on(config, Box::new(disk))
    }

    /// As [`Spool::open`], on a disk that somebody else provides: one that fails or forgets, in tests.
    ///
    /// # Errors
    /// As [`Spool::open`].
    pub fn open_on(config: SpoolConfig, disk: Box<dyn Disk>) -> Result<(Self, Recovery), SpoolError> {
        recover::recover(config, disk)
    }

    /// Entries that are not released.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.index.live().entries
    }

    /// Records that are not released.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.index.live().records
    }

    /// Bytes of all files of entries.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.index.bytes() + self.dead.iter().map(|(_, bytes)| bytes).sum::<u64>()
    }

    /// The highest index that was ever written, as far as the files and the mark tell; 0: none.
    #[must_use]
    pub fn last_index(&self) -> u64 {
        self.last_index
    }

    /// Entries up to this index were released.
    #[must_use]
    pub fn released(&self) -> u64 {
        self.mark.released
    }

    /// The note of the last [`Spool::commit`]; empty: none.
    #[must_use]
    pub fn note(&self) -> &[u8] {
        &self.mark.note
    }

    /// Makes everything that was written safe from a power cut.
    ///
    /// # Errors
    /// The disk failed; nothing is known then of what was written since the last success.
    pub fn sync(&mut self) -> Result<(), SpoolError> {
        if let Some(writer) = &self.writer
            && self.unsynced
        {
            let synced = writer.file.sync();
            synced.map_err(|error| self.failed("sync", &writer.name, error))?;
        }
        self.unsynced = false;
        self.last_sync = Some(Instant::now());
        Ok(())
    }

    /// The entries after index `after`, until they have `most` bytes; at least one if there is one.
    ///
    /// # Errors
    /// The disk failed. Damage is no error.
    pub fn read(&mut self, after: u64, most: usize) -> Result<Found, SpoolError> {
        let after = after.max(self.mark.released);
        self.read_entries(after, most)
    }

    /// Lets go of every entry up to and including `upto`. Files are removed by the [`Spool::commit`] that follows.
    ///
    /// # Errors
    /// The disk failed; what was released until then stays released and is in the next answer.
    pub fn release(&mut self, upto: u64) -> Result<Released, SpoolError> {
        let mut released = Released::default();
        if upto <= self.mark.released {
            return Ok(released);
        }
        while let Some(first) = self.index.front() {
            if first.last > upto || first.entries == 0 && self.index.segments().len() == 1 {
                break;
            }
            if self.index.segments().len() == 1 {
                self.writer = None;
                self.index.close_tail();
            }
            let Some(segment) = self.index.drop_oldest() else { break };
            released.released.add(segment.live);
            self.dead.push((format::name(segment.first), segment.bytes));
            self.mark.released = self.mark.released.max(segment.last);
            self.reader.forget();
        }
        self.release_part(upto, &mut released)?;
        self.mark.released = upto;
        self.last_index = self.last_index.max(upto);
        Ok(released)
    }

    /// Writes down what was released, together with a note of the caller's; then takes files away that are of no more use.
    ///
    /// # Errors
    /// The mark cannot be written: after a restart entries may come again, and the note is the one before.
    pub fn commit(&mut self, note: &[u8]) -> Result<(), SpoolError> {
        if note.len() > MAX_NOTE {
            return Err(SpoolError::Note(note.len()));
        }
        self.mark.note.clear();
        self.mark.note.extend_from_slice(note);
        let sync = self.config.sync == SyncPolicy::Always;
        let saved = self.mark.save(self.disk.as_ref(), sync);
        saved.map_err(|error| self.failed("write", mark::FILE, error))?;
        self.bury()
    }

    /// Removes files of which everything is released.
    fn bury(&mut self) -> Result<(), SpoolError> {
        while let Some((name, _)) = self.dead.last() {
            match self.disk.remove(name) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    let name = name.clone();
                    return Err(self.failed("remove", &name, error));
                }
            }
            self.dead.pop();
        }
        Ok(())
    }

    fn failed(&self, what: &'static str, name: &str, source: io::Error) -> SpoolError {
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return SpoolError::NoSpace {
                dir: self.config.dir.display().to_string(),
            };
        }
        io_error(what, &self.config.dir.join(name).display(), source)
    }
}

fn io_error(what: &'static str, path: &dyn std::fmt::Display, source: io::Error) -> SpoolError {
    SpoolError::Io {
        what,
        path: path.to_string(),
        source,
    }
}
