//! Finding entries in segments: reading them in large pieces, releasing part of a segment, and setting aside what is damaged.

use std::io;

use bytes::{Bytes, BytesMut};

use super::disk::DiskFile;
use super::format::{self, ENTRY_HEADER, EntryHeader};
use super::index::Segment;
use super::{Entry, Found, Gone, Released, Spool, SpoolError};

/// Headers are looked at through a window of this size.
const WINDOW: usize = 64 << 10;
/// Files set aside that are kept; the oldest go.
const ASIDE: usize = 2;

/// Where reading goes on.
#[derive(Default)]
pub(super) struct Reader {
    /// An open segment, and what of it was read last.
    file: Option<(u64, Box<dyn DiskFile>)>,
    /// After the entry `.1` of segment `.0` the next one stands at `.2`.
    place: Option<(u64, u64, u64)>,
}

impl Reader {
    /// Segments have gone: nothing remembered may be of use.
    pub(super) fn forget(&mut self) {
        self.file = None;
        self.place = None;
    }
}

/// Looks at headers one after the other, few reads for many small entries.
pub(super) struct Scan<'a> {
    file: &'a dyn DiskFile,
    end: u64,
    longest: usize,
    window: Vec<u8>,
    begin: u64,
}

impl<'a> Scan<'a> {
    /// Over the first `end` bytes of a file.
    pub(super) fn new(file: &'a dyn DiskFile, end: u64, longest: usize) -> Self {
        Self {
            file,
            end,
            longest,
            window: Vec::new(),
            begin: 0,
        }
    }

    /// The header of a whole entry at `at`; none if there is no such.
    pub(super) fn header(&mut self, at: u64) -> io::Result<Option<EntryHeader>> {
        if at + ENTRY_HEADER as u64 > self.end {
            return Ok(None);
        }
        let inside = at >= self.begin && at + ENTRY_HEADER as u64 <= self.begin + self.window.len() as u64;
        if !inside {
            let len = usize::try_from(self.end - at).unwrap_or(WINDOW).min(WINDOW);
            self.window.resize(len, 0);
            let read = self.file.read_at(&mut self.window, at)?;
            self.window.truncate(read);
            self.begin = at;
        }
        let from = usize::try_from(at - self.begin).unwrap_or(usize::MAX);
        let header = self
            .window
            .get(from..)
            .and_then(|bytes| EntryHeader::decode(bytes, self.longest));
        Ok(header.filter(|header| at + header.bytes() <= self.end))
    }
}

impl Spool {
    pub(super) fn read_entries(&mut self, mut after: u64, most: usize) -> Result<Found, SpoolError> {
        let mut found = Found::default();
        let mut bytes = 0;
        while let Some(segment) = self.index.holding(after) {
            let full = self.read_segment(segment, &mut after, most, &mut bytes, &mut found)?;
            if full || bytes >= most {
                break;
            }
        }
        Ok(found)
    }

    /// Reads on in one segment; true when there is enough.
    fn read_segment(
        &mut self,
        segment: Segment,
        after: &mut u64,
        most: usize,
        bytes: &mut usize,
        found: &mut Found,
    ) -> Result<bool, SpoolError> {
        let name = format::name(segment.first);
        let file = match self.reader.file.take() {
            Some((first, file)) if first == segment.first => file,
            _ => self
                .disk
                .open(&name)
                .map_err(|error| self.failed("open", &name, error))?,
        };
        let mut at = match self.reader.place {
            Some((first, last, at)) if first == segment.first && last == *after => at,
            _ => segment.front,
        };
        let mut previous = 0;
        let outcome = loop {
            if at >= segment.bytes {
                *after = (*after).max(segment.last);
                break Ok(false);
            }
            let piece = match read_piece(
                file.as_ref(),
                at,
                segment.bytes,
                most - *bytes,
                self.config.max_entry_bytes,
            ) {
                Ok(piece) => piece,
                Err(error) => break Err(self.failed("read", &name, error)),
            };
            let mut rest = piece;
            let mut full = false;
            while let Some(header) = EntryHeader::decode(&rest, self.config.max_entry_bytes) {
                let len = header.bytes() as usize;
                if rest.len() < len || header.index <= previous || header.index > segment.last {
                    break;
                }
                previous = header.index;
                let body = rest.split_to(len).slice(ENTRY_HEADER..);
                if header.index <= *after || header.is_damaged() {
                    at += header.bytes();
                    *after = (*after).max(header.index);
                    continue;
                }
                if *bytes > 0 && *bytes + len > most {
                    full = true;
                    break;
                }
                if header.is_whole(&body) {
                    *bytes += len;
                    found.entries.push(Entry {
                        index: header.index,
                        records: header.records,
                        body,
                    });
                } else if let Err(error) =
                    self.note_damage(segment.first, file.as_ref(), at, header, &mut found.damaged)
                {
                    return Err(self.failed("write", &name, error));
                }
                at += header.bytes();
                *after = header.index;
            }
            if full || *bytes >= most {
                break Ok(true);
            }
            // Either the piece ended inside an entry, or what stands here is none.
            let mut scan = Scan::new(file.as_ref(), segment.bytes, self.config.max_entry_bytes);
            match scan.header(at) {
                Ok(Some(header)) if header.index > previous && header.index <= segment.last => {
                    if *bytes > 0 && *bytes as u64 + header.bytes() > most as u64 {
                        break Ok(true);
                    }
                }
                Ok(_) if at >= segment.bytes => {}
                Ok(_) => {
                    *after = segment.last;
                    break self
                        .set_aside(segment, file.as_ref(), at, &mut found.damaged)
                        .map(|()| false);
                }
                Err(error) => break Err(self.failed("read", &name, error)),
            }
        };
        self.reader.place = Some((segment.first, *after, at));
        self.reader.file = Some((segment.first, file));
        outcome
    }

    /// The body of one entry is not what it was: it is marked and counted, the entries behind it can be read.
    pub(super) fn note_damage(
        &mut self,
        first: u64,
        file: &dyn DiskFile,
        at: u64,
        header: EntryHeader,
        damaged: &mut Gone,
    ) -> io::Result<()> {
        let mut marked = Vec::with_capacity(ENTRY_HEADER);
        header.damaged().encode(&mut marked);
        file.write_at(&marked, at)?;
        let gone = Gone {
            entries: 1,
            records: u64::from(header.records),
        };
        tracing::error!(
            spool = %self.config.dir.display(),
            entry = header.index,
            records = header.records,
            "an entry of the spool is damaged and left out"
        );
        damaged.add(gone);
        self.index.change(first, |segment| {
            segment.live.entries -= gone.entries;
            segment.live.records -= gone.records;
        });
        Ok(())
    }

    /// From `at` on a segment cannot be understood: what is before stays, the rest goes into a file of its own.
    fn set_aside(
        &mut self,
        segment: Segment,
        file: &dyn DiskFile,
        at: u64,
        damaged: &mut Gone,
    ) -> Result<(), SpoolError> {
        let name = format::name(segment.first);
        let mut kept = Gone::default();
        let mut last = segment.first.saturating_sub(1);
        let mut entries = 0;
        let mut scan = Scan::new(file, at, self.config.max_entry_bytes);
        let mut place = format::SEGMENT_HEADER as u64;
        while let Some(header) = scan.header(place).map_err(|error| self.failed("read", &name, error))? {
            entries += 1;
            last = header.index;
            if place >= segment.front && !header.is_damaged() {
                kept.add(Gone {
                    entries: 1,
                    records: u64::from(header.records),
                });
            }
            place += header.bytes();
        }
        self.keep_aside(&name, file, at, segment.bytes);
        // A segment that cannot be cut is left to its next reader; it ends here for this one.
        if let Err(error) = file.set_len(at) {
            tracing::warn!("cannot cut {name}: {error}");
        }
        let lost = Gone {
            entries: segment.live.entries - kept.entries.min(segment.live.entries),
            records: segment.live.records - kept.records.min(segment.live.records),
        };
        tracing::error!(
            spool = %self.config.dir.display(),
            segment = name,
            records = lost.records,
            "a segment of the spool is damaged; its good beginning is kept, the rest set aside"
        );
        damaged.add(lost);
        if self
            .index
            .segments()
            .back()
            .is_some_and(|tail| tail.first == segment.first)
        {
            self.writer = None;
            self.index.close_tail();
        }
        self.index.change(segment.first, |segment| {
            segment.live = kept;
            segment.bytes = at;
            segment.last = last;
            segment.entries = entries;
        });
        Ok(())
    }

    /// Copies the end of a file into one of its own, for people; that this fails (the disk is full) changes nothing.
    pub(super) fn keep_aside(&self, name: &str, file: &dyn DiskFile, from: u64, to: u64) {
        let copy = || -> io::Result<()> {
            let aside = self.disk.create(&format!("{name}.bad"))?;
            let mut buffer = vec![0; WINDOW];
            let mut at = from;
            while at < to {
                let read = file.read_at(&mut buffer, at)?;
                if read == 0 {
                    break;
                }
                aside.write_at(&buffer[..read], at - from)?;
                at += read as u64;
            }
            Ok(())
        };
        if let Err(error) = copy() {
            tracing::warn!("cannot set aside the damaged end of {name}: {error}");
        }
        self.limit_aside();
    }

    /// Only the newest of the files that were set aside stay.
    pub(super) fn limit_aside(&self) {
        let Ok(names) = self.disk.list() else { return };
        let mut bad: Vec<String> = names.into_iter().filter(|name| name.ends_with(".bad")).collect();
        bad.sort();
        let excess = bad.len().saturating_sub(ASIDE);
        for name in &bad[..excess] {
            if let Err(error) = self.disk.remove(name) {
                tracing::warn!("cannot remove {name}: {error}");
            }
        }
    }

    /// What is in the spool after index `after`.
    ///
    /// # Errors
    /// The disk failed.
    pub fn after(&self, after: u64) -> Result<Gone, SpoolError> {
        let mut sum = Gone::default();
        for segment in self.index.segments() {
            if segment.last <= after {
                continue;
            }
            if segment.first > after {
                sum.add(segment.live);
                continue;
            }
            let name = format::name(segment.first);
            let file = self
                .disk
                .open(&name)
                .map_err(|error| self.failed("open", &name, error))?;
            let mut scan = Scan::new(file.as_ref(), segment.bytes, self.config.max_entry_bytes);
            let mut at = segment.front;
            while let Some(header) = scan.header(at).map_err(|error| self.failed("read", &name, error))? {
                if header.index > after && !header.is_damaged() {
                    sum.add(Gone {
                        entries: 1,
                        records: u64::from(header.records),
                    });
                }
                at += header.bytes();
            }
        }
        Ok(sum)
    }

    /// Releases the entries up to `upto` of the oldest segment, which has others behind them.
    pub(super) fn release_part(&mut self, upto: u64, released: &mut Released) -> Result<(), SpoolError> {
        let Some(segment) = self.index.front().copied() else {
            return Ok(());
        };
        if segment.entries == 0 || segment.first > upto || segment.front >= segment.bytes {
            return Ok(());
        }
        let name = format::name(segment.first);
        let file = self
            .disk
            .open(&name)
            .map_err(|error| self.failed("open", &name, error))?;
        let mut scan = Scan::new(file.as_ref(), segment.bytes, self.config.max_entry_bytes);
        let mut at = segment.front;
        let mut gone = Gone::default();
        let mut cut = None;
        while at < segment.bytes {
            match scan.header(at).map_err(|error| self.failed("read", &name, error))? {
                Some(header) if header.index > upto => break,
                Some(header) => {
                    if !header.is_damaged() {
                        gone.add(Gone {
                            entries: 1,
                            records: u64::from(header.records),
                        });
                    }
                    at += header.bytes();
                }
                None => {
                    cut = Some(at);
                    break;
                }
            }
        }
        released.released.add(gone);
        self.index.change(segment.first, |segment| {
            segment.front = at;
            segment.live.entries -= gone.entries.min(segment.live.entries);
            segment.live.records -= gone.records.min(segment.live.records);
        });
        if let Some(at) = cut
            && let Some(segment) = self.index.front().copied()
        {
            self.set_aside(segment, file.as_ref(), at, &mut released.damaged)?;
            self.reader.forget();
        }
        Ok(())
    }
}

/// Reads up to `most` bytes at `at`, or one whole entry if that is longer.
fn read_piece(file: &dyn DiskFile, at: u64, end: u64, most: usize, longest: usize) -> io::Result<Bytes> {
    let left = usize::try_from(end - at).unwrap_or(usize::MAX);
    let mut want = left.min(most.max(ENTRY_HEADER));
    let mut head = [0; ENTRY_HEADER];
    let read = file.read_at(&mut head, at)?;
    if let Some(header) = EntryHeader::decode(&head[..read], longest) {
        want = want
            .max(usize::try_from(header.bytes()).unwrap_or(usize::MAX))
            .min(left);
    }
    let mut piece = BytesMut::zeroed(want);
    let read = file.read_at(&mut piece, at)?;
    piece.truncate(read);
    Ok(piece.freeze())
}
