//! Opening a spool that was left in any state: what is whole is taken up, a torn end is cut off, what cannot be understood is set
//! aside, and all of it is reported.
//!
//! Headers of all segments are checked at once. Bodies are checked in the last segment, where a killed process may have left half an
//! entry; in the others when they are read, so that a large spool opens quickly.

use super::disk::Disk;
use super::format::{self, EntryHeader, SEGMENT_HEADER};
use super::index::{Index, Segment};
use super::mark::{self, Mark};
use super::reader::{Reader, Scan};
use super::{Gone, Spool, SpoolConfig, SpoolError, io_error};

/// What was found when a spool was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Entries and records that were taken up, those released before not counted.
    pub found: Gone,
    /// Bytes of a last entry that had not been written to its end.
    pub cut_bytes: u64,
    /// Entries that are damaged, as far as their number can be told.
    pub damaged: Gone,
    /// Files of which something, or everything, was set aside.
    pub set_aside: Vec<String>,
    /// The mark was damaged: nothing is known of what was released, and the note is lost.
    pub mark_lost: bool,
}

impl Recovery {
    /// Whether everything was as a spool leaves it that was closed or killed.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.damaged == Gone::default() && self.set_aside.is_empty() && !self.mark_lost
    }
}

pub(super) fn recover(config: SpoolConfig, disk: Box<dyn Disk>) -> Result<(Spool, Recovery), SpoolError> {
    let dir = config.dir.display().to_string();
    let (mark, mark_whole) = Mark::load(disk.as_ref()).map_err(|error| io_error("read the mark of", &dir, error))?;
    let names = disk.list().map_err(|error| io_error("list", &dir, error))?;
    let mut firsts: Vec<u64> = names.iter().filter_map(|name| format::first_of(name)).collect();
    firsts.sort_unstable();
    let last_index = mark.released;
    let mut spool = Spool {
        config,
        disk,
        index: Index::default(),
        mark,
        writer: None,
        dead: Vec::new(),
        reader: Reader::default(),
        scratch: Vec::new(),
        last_sync: None,
        unsynced: false,
        last_index,
    };
    let mut recovery = Recovery {
        mark_lost: !mark_whole,
        ..Recovery::default()
    };
    if !mark_whole {
        tracing::error!(
            spool = dir,
            "{} is damaged; entries that were passed on may come again",
            mark::FILE
        );
    }
    for (n, first) in firsts.iter().enumerate() {
        spool.take_up(*first, n + 1 == firsts.len(), &mut recovery)?;
    }
    let upto = spool.mark.released;
    spool.mark.released = 0;
    let released = spool.release(upto)?;
    recovery.damaged.add(released.damaged);
    spool.bury()?;
    if recovery.mark_lost
        && let Err(error) = spool.commit(&[])
    {
        tracing::warn!("the damaged mark stays for now: {error}");
    }
    spool.limit_aside();
    recovery.found = spool.index.live();
    Ok((spool, recovery))
}

impl Spool {
    fn take_up(&mut self, first: u64, is_last: bool, recovery: &mut Recovery) -> Result<(), SpoolError> {
        let name = format::name(first);
        let fail = |error| io_error("read", &self.config.dir.join(&name).display(), error);
        let file = self.disk.open(&name).map_err(fail)?;
        let len = file.len().map_err(fail)?;
        let mut head = [0; SEGMENT_HEADER];
        let read = file.read_at(&mut head, 0).map_err(fail)?;
        if !format::is_segment_header(&head[..read], first) {
            drop(file);
            let torn = is_last && read < SEGMENT_HEADER;
            return self.refuse_segment(&name, torn, len, recovery);
        }
        let longest = self.config.max_entry_bytes;
        let mut segment = Segment::new(first, SEGMENT_HEADER as u64);
        let mut scan = Scan::new(file.as_ref(), len, longest);
        let mut bad: Vec<(u64, EntryHeader)> = Vec::new();
        let mut body = Vec::new();
        let mut previous = self.last_index_found();
        let end = loop {
            let at = segment.bytes;
            let Some(header) = scan.header(at).map_err(fail)? else {
                break at;
            };
            if header.index <= previous || (segment.entries == 0 && header.index != first) {
                break at;
            }
            if is_last && !header.is_damaged() {
                body.resize(header.len as usize, 0);
                let from = at + format::ENTRY_HEADER as u64;
                let read = file.read_at(&mut body, from).map_err(fail)?;
                if read < body.len() || !header.is_whole(&body) {
                    bad.push((at, header));
                }
            }
            previous = header.index;
            segment.push(header.index, header.records, header.bytes());
            if header.is_damaged() {
                segment.live.entries -= 1;
                segment.live.records -= u64::from(header.records);
            }
        };
        if end < len {
            if is_last {
                recovery.cut_bytes += len - end;
                tracing::warn!(
                    segment = name,
                    bytes = len - end,
                    "the end of the spool was not written whole, or is damaged; cut off"
                );
            } else {
                tracing::error!(
                    segment = name,
                    bytes = len - end,
                    "the end of a segment is damaged and set aside"
                );
                recovery.set_aside.push(name.clone());
            }
            // Also of the last segment: half an entry and a damaged header look the same.
            self.keep_aside(&name, file.as_ref(), end, len);
            file.set_len(end)
                .map_err(|error| io_error("cut", &self.config.dir.join(&name).display(), error))?;
        }
        if segment.entries == 0 {
            drop(file);
            return self
                .disk
                .remove(&name)
                .map_err(|error| io_error("remove", &self.config.dir.join(&name).display(), error));
        }
        self.last_index = self.last_index.max(segment.last);
        self.index.found(segment);
        for (at, header) in bad {
            self.note_damage(first, file.as_ref(), at, header, &mut recovery.damaged)
                .map_err(|error| io_error("write", &self.config.dir.join(&name).display(), error))?;
        }
        Ok(())
    }

    /// The highest index in the segments taken up so far.
    fn last_index_found(&self) -> u64 {
        self.index.segments().back().map_or(0, |segment| segment.last)
    }

    /// A file that does not begin as a segment.
    fn refuse_segment(&self, name: &str, torn: bool, len: u64, recovery: &mut Recovery) -> Result<(), SpoolError> {
        let path = self.config.dir.join(name);
        if torn {
            recovery.cut_bytes += len;
            return self
                .disk
                .remove(name)
                .map_err(|error| io_error("remove", &path.display(), error));
        }
        tracing::error!(
            segment = name,
            bytes = len,
            "not a segment of a spool, or damaged at its beginning; set aside"
        );
        recovery.set_aside.push(name.to_owned());
        self.disk
            .rename(name, &format!("{name}.bad"))
            .map_err(|error| io_error("set aside", &path.display(), error))
    }
}
