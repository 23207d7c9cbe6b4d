//! Content on disk, through files that somebody else has opened: pieces are read and written at their places, across the borders of
//! files, away from the threads that serve connections. Nothing is written that was not verified first, so what has been counted
//! once is never spoilt by a later copy.
//!
//! Opening, naming, owning and placing files is left to whoever gives them; so is [`Storage::sync`] and when it is worth its time.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use gse_proto::file::{EntryKind, Manifest};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::{Bitmap, Geometry};

/// Reads and writes of one swarm that are under way at a time.
const AT_ONCE: usize = 4;
const HASH: usize = 32;

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
        /// read or write.
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

#[derive(Debug)]
struct Inner {
    manifest: Arc<Manifest>,
    geometry: Geometry,
    spans: Vec<Span>,
    files: Vec<Option<File>>,
    slots: Arc<Semaphore>,
    /// Pieces that were seen to be as they should be, so that a source whose file has changed is found out by itself first.
    sure: Mutex<Bitmap>,
}

/// The files of one swarm. Cheap to clone; every clone is the same.
#[derive(Debug, Clone)]
pub struct Storage(Arc<Inner>);

impl Storage {
    /// Content of `manifest` in `files`, one for each entry in its order; `None` for directories, links and empty files.
    pub fn new(manifest: Arc<Manifest>, mut files: Vec<Option<File>>) -> Result<Self, StorageError> {
        let geometry = Geometry::new(manifest.total, manifest.piece_length)
            .map_err(|error| StorageError::Unfit(format!("the manifest is not usable: {error}")))?;
        if manifest.piece_hashes.len() != geometry.pieces() as usize * HASH {
            return Err(StorageError::Unfit(format!(
                "the manifest has {} bytes of hashes for {} pieces",
                manifest.piece_hashes.len(),
                geometry.pieces()
            )));
        }
        if files.len() > manifest.entries.len() {
            return Err(StorageError::Unfit(format!(
                "{} files were given for the {} entries of the manifest",
                files.len(),
                manifest.entries.len()
            )));
        }
        files.resize_with(manifest.entries.len(), || None);
        let mut spans = Vec::new();
        let mut begin = 0u64;
        for (entry, (what, file)) in manifest.entries.iter().zip(&files).enumerate() {
            if what.kind != EntryKind::File as i32 || what.size == 0 {
                continue;
            }
            if file.is_none() {
                return Err(StorageError::Unfit(format!(
                    "no open file was given for entry {entry} of the manifest"
                )));
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
        Ok(Self(Arc::new(Inner {
            manifest,
            geometry,
            spans,
            files,
            slots: Arc::new(Semaphore::new(AT_ONCE)),
            sure: Mutex::new(Bitmap::new(geometry.pieces())),
        })))
    }

    /// All content of `manifest` in one file, without borders: for who only keeps it to pass it on.
    pub fn flat(manifest: Arc<Manifest>, file: File) -> Result<Self, StorageError> {
        let geometry = Geometry::new(manifest.total, manifest.piece_length)
            .map_err(|error| StorageError::Unfit(format!("the manifest is not usable: {error}")))?;
        if manifest.piece_hashes.len() != geometry.pieces() as usize * HASH {
            return Err(StorageError::Unfit(
                "the manifest has not one hash for each piece".to_owned(),
            ));
        }
        let span = Span {
            begin: 0,
            end: manifest.total,
            entry: 0,
        };
        Ok(Self(Arc::new(Inner {
            manifest,
            geometry,
            spans: vec![span],
            files: vec![Some(file)],
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

    /// The open file of an entry, for what is said about it as a whole.
    #[must_use]
    pub fn file(&self, entry: usize) -> Option<&File> {
        self.0.files.get(entry)?.as_ref()
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
        self.work(|inner| {
            for (entry, file) in inner.files.iter().enumerate() {
                let Some(file) = file else { continue };
                file.sync_data().map_err(|source| StorageError::Io {
                    what: "sync",
                    entry,
                    offset: 0,
                    source,
                })?;
            }
            Ok(())
        })
        .await
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
            self.each_span(offset, bytes.len() as u64, "write", |file, at, part| {
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
            let file = self.files.get(entry).and_then(Option::as_ref);
            let file = file.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
            with(file, at, (from - offset) as usize..(to - offset) as usize).map_err(failed)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::file::Entry;
    use sha2_of::sha256;

    mod sha2_of {
        pub(super) fn sha256(bytes: &[u8]) -> Vec<u8> {
            ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().to_vec()
        }
    }

    fn entry(kind: EntryKind, size: u64) -> Entry {
        Entry {
            kind: kind as i32,
            size,
            ..Entry::default()
        }
    }

    /// Three files, an empty one and a directory among them, in pieces of 16 bytes.
    fn three() -> (Vec<u8>, Arc<Manifest>) {
        let content: Vec<u8> = (0..50u8).collect();
        let manifest = Manifest {
            piece_length: 16,
            total: 50,
            piece_hashes: content.chunks(16).flat_map(sha256).collect(),
            entries: vec![
                entry(EntryKind::Directory, 0),
                entry(EntryKind::File, 10),
                entry(EntryKind::File, 0),
                entry(EntryKind::File, 3),
                entry(EntryKind::File, 37),
            ],
            ..Manifest::default()
        };
        (content, Arc::new(manifest))
    }

    fn files() -> Vec<Option<File>> {
        let file = || Some(tempfile::tempfile().unwrap());
        vec![None, file(), None, file(), file()]
    }

    #[tokio::test]
    async fn pieces_lie_across_files() {
        let (content, manifest) = three();
        let files = files();
        let last = files[4].as_ref().unwrap().try_clone().unwrap();
        let storage = Storage::new(manifest, files).unwrap();
        for piece in [3, 1, 0, 2] {
            let from = piece as usize * 16;
            let whole = Bytes::copy_from_slice(&content[from..(from + 16).min(50)]);
            let parts = vec![whole.slice(..1), whole.slice(1..)];
            storage.keep(piece, parts).await.unwrap();
        }
        assert_eq!(storage.read(0, 8, 8).await.unwrap(), content[8..16]);
        assert_eq!(storage.read(3, 0, 2).await.unwrap(), content[48..]);
        assert!(storage.verify(Bitmap::full(4)).await.unwrap().is_full());
        let mut tail = [0; 37];
        last.read_exact_at(&mut tail, 0).unwrap();
        assert_eq!(tail, content[13..]);
        storage.sync().await.unwrap();
    }

    #[tokio::test]
    async fn what_is_wrong_is_not_written() {
        // contract: p2p#17
        let (content, manifest) = three();
        let storage = Storage::new(manifest, files()).unwrap();
        let good = Bytes::copy_from_slice(&content[..16]);
        storage.keep(0, vec![good.clone()]).await.unwrap();
        let mut bad = good.to_vec();
        bad[3] ^= 1;
        let refused = storage.keep(0, vec![Bytes::from(bad)]).await;
        assert!(matches!(refused, Err(StorageError::Mismatch(0))));
        assert_eq!(storage.read(0, 0, 16).await.unwrap(), good, "the good copy stays");
        for (piece, len) in [(0, 15), (0, 17), (4, 16), (u32::MAX, 1)] {
            assert!(storage.keep(piece, vec![Bytes::from(vec![0; len])]).await.is_err());
        }
        assert!(storage.read(0, u32::MAX, 1).await.is_err());
        let found = storage.verify(Bitmap::full(4)).await.unwrap();
        assert_eq!(
            found.ones().collect::<Vec<_>>(),
            [0],
            "what was never written is not there"
        );
    }

    #[tokio::test]
    async fn a_source_that_has_changed_is_found_out() {
        let (content, manifest) = three();
        let files = files();
        for (at, range) in [(1, 0..10), (3, 10..13), (4, 13..50)] {
            files[at].as_ref().unwrap().write_all_at(&content[range], 0).unwrap();
        }
        let changed = files[4].as_ref().unwrap().try_clone().unwrap();
        let storage = Storage::new(manifest, files).unwrap();
        assert_eq!(storage.read(2, 3, 5).await.unwrap(), content[35..40]);
        changed.write_all_at(b"x", 5).unwrap();
        assert!(matches!(storage.read(1, 0, 1).await, Err(StorageError::Mismatch(1))));
        changed.set_len(20).unwrap();
        assert!(matches!(
            storage.read(3, 0, 1).await,
            Err(StorageError::Io { entry: 4, .. })
        ));
    }

    #[tokio::test]
    async fn one_file_holds_what_many_do() {
        let (content, manifest) = three();
        let file = tempfile::tempfile().unwrap();
        let storage = Storage::flat(manifest, file.try_clone().unwrap()).unwrap();
        for piece in 0..4u32 {
            let from = piece as usize * 16;
            let whole = Bytes::copy_from_slice(&content[from..(from + 16).min(50)]);
            storage.keep(piece, vec![whole]).await.unwrap();
        }
        let mut kept = [0; 50];
        file.read_exact_at(&mut kept, 0).unwrap();
        assert_eq!(kept[..], content[..]);
        assert_eq!(storage.read(1, 4, 4).await.unwrap(), content[20..24]);
    }

    #[test]
    fn files_and_manifest_have_to_fit() {
        let (_, manifest) = three();
        assert!(matches!(
            Storage::new(Arc::clone(&manifest), vec![]),
            Err(StorageError::Unfit(_))
        ));
        for change in [
            |manifest: &mut Manifest| manifest.total = 49,
            |manifest: &mut Manifest| manifest.total = u64::MAX,
            |manifest: &mut Manifest| manifest.piece_length = 0,
            |manifest: &mut Manifest| manifest.piece_hashes.truncate(127),
            |manifest: &mut Manifest| manifest.entries[4].size = u64::MAX,
        ] {
            let mut other = Manifest::clone(&manifest);
            change(&mut other);
            assert!(matches!(
                Storage::new(Arc::new(other), files()),
                Err(StorageError::Unfit(_))
            ));
        }
    }
}
