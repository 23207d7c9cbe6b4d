//! Content on disk, through files that somebody else has opened: pieces are read and written at their places, across the borders of
//! files, away from the threads that serve connections. Nothing is written that was not verified first, so what has been counted
//! once is never spoilt by a later copy.
//!
//! Opening, naming, owning and placing files is left to whoever gives them ([`OpenFiles`]); so is [`Storage::sync`] and when it is worth its
//! time. How many files are open at a time is the business of a [`FilePool`].

mod pool;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use gse_proto::file::{EntryKind, Manifest};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use self::pool::Shelf;
pub use self::pool::{FilePool, OpenFiles};
use crate::{Bitmap, Geometry};

/// Reads and writes of one swarm that are under way at a time.
const AT_ONCE: usize = 4;
const HASH: usize = 32;
const WRITE: &str = "write";
/// More files than this that have been written to are synced in one go.
const SYNC_EACH: usize = 64;

/// Why a piece is not kept, or content cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The bytes are not those of the manifest.
    #[error("piece {0} is not what the manifest says it is")]
    Mismatch(u32),
    /// No such piece, or not within it.
    #[error("{len} bytes at {begin} of piece {piece}, which is not there")]
    OutOfRange {
        /// Piece.
        piece: u32,
        /// Offset in it.
        begin: u32,
        /// Bytes.
        len: usize,
    },
    /// The manifest and what was given do not fit together.
    #[error("{0}")]
    Unfit(String),
    /// The file system says no.
    #[error("cannot {what} file {entry} of the manifest at byte {offset}: {source}")]
    Io {
        /// open, read, write or sync.
        what: &'static str,
        /// Index of the entry.
        entry: usize,
        /// Where in the file.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The work was given up: the process is ending.
    #[error("the work on the file was given up, since the process is ending")]
    Ended,
}

impl StorageError {
    /// Whether the disk or the quota is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}

/// A file's place in the content.
#[derive(Debug, Clone, Copy)]
struct Span {
    begin: u64,
    end: u64,
    entry: usize,
}

/// Where the open files are.
#[derive(Debug)]
enum Files {
    /// All of them, all the time.
    Held(Vec<Option<Arc<File>>>),
    /// Opened when they are needed.
    Pooled(Shelf),
}

impl Files {
    fn of(files: Vec<Option<File>>) -> Self {
        Self::Held(files.into_iter().map(|file| file.map(Arc::new)).collect())
    }

    /// The open file of an entry that is one. May block.
    fn get(&self, entry: usize) -> io::Result<Arc<File>> {
        match self {
            Self::Held(files) => files
                .get(entry)
                .and_then(Option::as_ref)
                .map(Arc::clone)
                .ok_or_else(|| io::ErrorKind::NotFound.into()),
            Self::Pooled(shelf) => shelf.get(entry),
        }
    }

    fn written(&self, entry: usize) {
        if let Self::Pooled(shelf) = self {
            shelf.written(entry);
        }
    }
}

#[derive(Debug)]
struct Inner {
    manifest: Arc<Manifest>,
    geometry: Geometry,
    spans: Vec<Span>,
    files: Files,
    slots: Arc<Semaphore>,
    /// Pieces that were seen to be as they should be, so that a source whose file has changed is found out by itself first.
    sure: Mutex<Bitmap>,
}

/// The files of one swarm. Cheap to clone; every clone is the same.
#[derive(Debug, Clone)]
pub struct Storage(Arc<Inner>);

impl Storage {
    /// Content of `manifest` in `files`, one for each entry in its order; `None` for directories, links and empty files. They stay open:
    /// for few.
    pub fn new(manifest: Arc<Manifest>, mut files: Vec<Option<File>>) -> Result<Self, StorageError> {
        if files.len() > manifest.entries.len() {
            return Err(StorageError::Unfit(format!(
                "{} files were given for the {} entries of the manifest",
                files.len(),
                manifest.entries.len()
            )));
        }
        files.resize_with(manifest.entries.len(), || None);
        let spans = spans_of(&manifest)?;
        if let Some(span) = spans
            .iter()
            .find(|span| files.get(span.entry).is_none_or(Option::is_none))
        {
            return Err(StorageError::Unfit(format!(
                "no open file was given for entry {} of the manifest",
                span.entry
            )));
        }
        Self::of(manifest, spans, Files::of(files))
    }

    /// Content of `manifest` in files that `opener` opens when they are needed; `pool` bounds how many are open. `opened`: some, by their
    /// entries, that are open anyway.
    pub fn pooled(
        manifest: Arc<Manifest>,
        opener: Arc<dyn OpenFiles>,
        pool: &FilePool,
        opened: Vec<(usize, File)>,
    ) -> Result<Self, StorageError> {
        let spans = spans_of(&manifest)?;
        let shelf = pool.shelf(opener);
        for (entry, file) in opened {
            shelf.put(entry, Arc::new(file));
        }
        Self::of(manifest, spans, Files::Pooled(shelf))
    }

    /// All content of `manifest` in one file, without borders: for who only keeps it to pass it on.
    pub fn flat(manifest: Arc<Manifest>, file: File) -> Result<Self, StorageError> {
        let span = Span {
            begin: 0,
            end: manifest.total,
            entry: 0,
        };
        Self::of(manifest, vec![span], Files::of(vec![Some(file)]))
    }

    fn of(manifest: Arc<Manifest>, spans: Vec<Span>, files: Files) -> Result<Self, StorageError> {
        let geometry = Geometry::new(manifest.total, manifest.piece_length)
            .map_err(|error| StorageError::Unfit(format!("the manifest is not usable: {error}")))?;
        if manifest.piece_hashes.len() != geometry.pieces() as usize * HASH {
            return Err(StorageError::Unfit(format!(
                "the manifest has {} bytes of hashes for {} pieces",
                manifest.piece_hashes.len(),
                geometry.pieces()
            )));
        }
        Ok(Self(Arc::new(Inner {
            manifest,
            geometry,
            spans,
            files,
            slots: Arc::new(Semaphore::new(AT_ONCE)),
            sure: Mutex::new(Bitmap::new(geometry.pieces())),
        })))
    }

    /// What it is.
    #[must_use]
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.0.manifest
    }

    /// How it is cut.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.0.geometry
    }

    /// The open file of an entry, for what is said about it as a whole; `None`: the entry is no file. May block, like everything that
    /// opens files.
    pub fn file(&self, entry: usize) -> Result<Option<Arc<File>>, StorageError> {
        let is_file = match &self.0.files {
            Files::Held(files) => files.get(entry).is_some_and(Option::is_some),
            Files::Pooled(_) => {
                (self.0.manifest.entries.get(entry)).is_some_and(|entry| entry.kind() == EntryKind::File)
            }
        };
        if !is_file {
            return Ok(None);
        }
        self.0.open(entry, 0).map(Some)
    }

    /// Reads a part of a piece. The first time, all of the piece is read and verified.
    pub async fn read(&self, piece: u32, begin: u32, len: u32) -> Result<Bytes, StorageError> {
        self.work(move |inner| {
            if inner.sure.lock().get(piece) {
                return inner.read(piece, begin, len as usize);
            }
            let offset = begin as usize;
            inner.place(piece, begin, len as usize)?;
            let whole = inner.read(piece, 0, inner.geometry.piece_len(piece) as usize)?;
            let hash = ring::digest::digest(&ring::digest::SHA256, &whole);
            if inner.hash_of(piece) != Some(hash.as_ref()) {
                return Err(StorageError::Mismatch(piece));
            }
            inner.sure.lock().set(piece);
            Ok(whole.slice(offset..offset + len as usize))
        })
        .await
    }

    /// Verifies a piece that came in parts, in order, and writes it to its place.
    pub async fn keep(&self, piece: u32, parts: Vec<Bytes>) -> Result<(), StorageError> {
        self.work(move |inner| inner.keep(piece, &parts)).await
    }

    /// Which of these pieces are in the files as they should be.
    pub async fn verify(&self, pieces: Bitmap) -> Result<Bitmap, StorageError> {
        let mut good = Bitmap::new(self.0.geometry.pieces());
        for piece in pieces.ones() {
            if self.work(move |inner| inner.is_good(piece)).await? {
                good.set(piece);
            }
        }
        Ok(good)
    }

    /// Has what was written put on the disk.
    pub async fn sync(&self) -> Result<(), StorageError> {
        self.work(Inner::sync).await
    }

    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, StorageError> + Send + 'static,
    ) -> Result<T, StorageError> {
        let slot = Arc::clone(&self.0.slots)
            .acquire_owned()
            .await
            .map_err(|_| StorageError::Ended)?;
        let inner = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || {
            let done = work(&inner);
            drop(slot);
            done
        })
        .await
        .map_err(|_| StorageError::Ended)?
    }
}

impl Inner {
    fn open(&self, entry: usize, offset: u64) -> Result<Arc<File>, StorageError> {
        self.files.get(entry).map_err(|source| StorageError::Io {
            what: "open",
            entry,
            offset,
            source,
        })
    }

    fn sync(&self) -> Result<(), StorageError> {
        let failed = |entry| {
            move |source| StorageError::Io {
                what: "sync",
                entry,
                offset: 0,
                source,
            }
        };
        match &self.files {
            Files::Held(files) => {
                for (entry, file) in files.iter().enumerate() {
                    if let Some(file) = file {
                        file.sync_data().map_err(failed(entry))?;
                    }
                }
                Ok(())
            }
            Files::Pooled(shelf) => shelf.sync(SYNC_EACH).map_err(|(entry, source)| failed(entry)(source)),
        }
    }

    fn read(&self, piece: u32, begin: u32, len: usize) -> Result<Bytes, StorageError> {
        let offset = self.place(piece, begin, len)?;
        let mut buffer = BytesMut::zeroed(len);
        self.each_span(offset, len as u64, "read", |file, at, part| {
            let part = buffer.get_mut(part).ok_or(io::ErrorKind::InvalidInput)?;
            file.read_exact_at(part, at)
        })?;
        Ok(buffer.freeze())
    }

    fn keep(&self, piece: u32, parts: &[Bytes]) -> Result<(), StorageError> {
        let len: usize = parts.iter().map(Bytes::len).sum();
        let mut offset = self.place(piece, 0, len)?;
        let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
        for part in parts {
            hash.update(part);
        }
        if self.hash_of(piece) != Some(hash.finish().as_ref()) {
            return Err(StorageError::Mismatch(piece));
        }
        for bytes in parts {
            self.each_span(offset, bytes.len() as u64, WRITE, |file, at, part| {
                let part = bytes.get(part).ok_or(io::ErrorKind::InvalidInput)?;
                file.write_all_at(part, at)
            })?;
            offset += bytes.len() as u64;
        }
        self.sure.lock().set(piece);
        Ok(())
    }

    fn is_good(&self, piece: u32) -> Result<bool, StorageError> {
        let len = self.geometry.piece_len(piece) as usize;
        match self.read(piece, 0, len) {
            Ok(bytes) => {
                let hash = ring::digest::digest(&ring::digest::SHA256, &bytes);
                let good = self.hash_of(piece) == Some(hash.as_ref());
                if good {
                    self.sure.lock().set(piece);
                }
                Ok(good)
            }
            // A file that is not written that far yet.
            Err(StorageError::Io { source, .. }) if source.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn hash_of(&self, piece: u32) -> Option<&[u8]> {
        self.manifest.piece_hashes.chunks_exact(HASH).nth(piece as usize)
    }

    /// Where a part of a piece begins in the content.
    fn place(&self, piece: u32, begin: u32, len: usize) -> Result<u64, StorageError> {
        let end = u64::from(begin) + len as u64;
        if piece >= self.geometry.pieces() || len == 0 || end > u64::from(self.geometry.piece_len(piece)) {
            return Err(StorageError::OutOfRange { piece, begin, len });
        }
        Ok(self.geometry.offset(piece) + u64::from(begin))
    }

    /// Calls `with` for each file that a part of the content lies in: the file, where in it, and which of the part's bytes.
    fn each_span(
        &self,
        offset: u64,
        len: u64,
        what: &'static str,
        mut with: impl FnMut(&File, u64, std::ops::Range<usize>) -> io::Result<()>,
    ) -> Result<(), StorageError> {
        let end = offset + len;
        let first = self.spans.partition_point(|span| span.end <= offset);
        for span in self.spans.iter().skip(first).take_while(|span| span.begin < end) {
            let from = offset.max(span.begin);
            let to = end.min(span.end);
            let (at, entry) = (from - span.begin, span.entry);
            let failed = |source| StorageError::Io {
                what,
                entry,
                offset: at,
                source,
            };
            let file = self.open(entry, at)?;
            with(&file, at, (from - offset) as usize..(to - offset) as usize).map_err(failed)?;
            if what == WRITE {
                self.files.written(entry);
            }
        }
        Ok(())
    }
}

/// Where the files of a manifest lie in its content.
fn spans_of(manifest: &Manifest) -> Result<Vec<Span>, StorageError> {
    let mut spans = Vec::new();
    let mut begin = 0u64;
    for (entry, what) in manifest.entries.iter().enumerate() {
        if what.kind != EntryKind::File as i32 || what.size == 0 {
            continue;
        }
        let end = begin.checked_add(what.size).filter(|end| *end <= manifest.total);
        let Some(end) = end else {
            return Err(StorageError::Unfit(
                "the files of the manifest are longer than its total".to_owned(),
            ));
        };
        spans.push(Span { begin, end, entry });
        begin = end;
    }
    if begin != manifest.total {
        return Err(StorageError::Unfit(format!(
            "the files of the manifest have {begin} bytes, its total is {}",
            manifest.total
        )));
    }
    Ok(spans)
}

#[cfg(test)]
mod tests;
