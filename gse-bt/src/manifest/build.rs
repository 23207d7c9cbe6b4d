//! Builds a manifest while a source is read.

use ring::digest::Context;
use sha1::{Digest, Sha1};

use super::*;

/// Why no manifest comes of a source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// A file had another number of bytes than it was announced with: it changes while it is read.
    #[error("\"{path}\" changes while it is read: {got} bytes where there were {size}")]
    FileChanged {
        /// Which file.
        path: String,
        /// Bytes that came, as far as they were counted.
        got: u64,
        /// Bytes that it was announced with.
        size: u64,
    },
    /// All files have another number of bytes in all than was announced.
    #[error("the source changes while it is read: {got} bytes where there were {total}")]
    SourceChanged {
        /// Bytes that came.
        got: u64,
        /// Bytes that were announced.
        total: u64,
    },
    /// More than can be cut into pieces.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// Calls that don't follow each other: data without a file, a file within a file.
    #[error("a file has to be begun before its data comes and ended after it, one at a time")]
    OutOfOrder,
}

/// Takes entries in the order of the manifest, and the bytes of each file behind it.
///
/// Hashing takes a second for some 600 MB, so it belongs on a thread for blocking work.
pub struct ManifestBuilder {
    manifest: Manifest,
    total: u64,
    got: u64,
    file: Option<OpenFile>,
    piece: Hashes,
    sha256: Vec<u8>,
    sha1: Vec<u8>,
}

struct OpenFile {
    entry: Entry,
    got: u64,
    sha256: Context,
}

struct Hashes {
    len: u32,
    sha256: Context,
    /// Not by ring, whose SHA-1 does not use the processor's instructions for it.
    sha1: Sha1,
}

impl Hashes {
    fn new() -> Self {
        Self {
            len: 0,
            sha256: Context::new(&SHA256),
            sha1: Sha1::new(),
        }
    }
}

impl ManifestBuilder {
    /// For content of `total` bytes in all files together, called `name`.
    pub fn new(name: &str, total: u64) -> Result<Self, BuildError> {
        let piece_length = piece_length(total);
        let pieces = Geometry::new(total, piece_length)?.pieces() as usize;
        Ok(Self {
            manifest: Manifest {
                piece_length,
                total,
                name: name.to_owned(),
                ..Manifest::default()
            },
            total,
            got: 0,
            file: None,
            piece: Hashes::new(),
            sha256: Vec::with_capacity(pieces * 32),
            sha1: Vec::with_capacity(pieces * 20),
        })
    }

    /// A directory.
    pub fn directory(&mut self, path: Vec<Bytes>, mode: u32, mtime_ms: i64) -> Result<(), BuildError> {
        self.add(Entry {
            kind: EntryKind::Directory.into(),
            path,
            mode,
            mtime_ms,
            ..Entry::default()
        })
    }

    /// A link that leads to `link`.
    pub fn symlink(&mut self, path: Vec<Bytes>, link: Bytes, mtime_ms: i64) -> Result<(), BuildError> {
        self.add(Entry {
            kind: EntryKind::Symlink.into(),
            path,
            mode: 0o777,
            mtime_ms,
            link,
            ..Entry::default()
        })
    }

    /// A file of `size` bytes, which come by [`ManifestBuilder::data`] until [`ManifestBuilder::end_file`].
    pub fn begin_file(&mut self, path: Vec<Bytes>, size: u64, mode: u32, mtime_ms: i64) -> Result<(), BuildError> {
        if self.file.is_some() {
            return Err(BuildError::OutOfOrder);
        }
        self.file = Some(OpenFile {
            entry: Entry {
                kind: EntryKind::File.into(),
                path,
                size,
                mode,
                mtime_ms,
                ..Entry::default()
            },
            got: 0,
            sha256: Context::new(&SHA256),
        });
        Ok(())
    }

    /// The next bytes of the file.
    pub fn data(&mut self, mut data: &[u8]) -> Result<(), BuildError> {
        let Some(file) = &mut self.file else {
            return Err(BuildError::OutOfOrder);
        };
        file.got += data.len() as u64;
        if file.got > file.entry.size {
            return Err(file.changed());
        }
        self.got += data.len() as u64;
        if self.got > self.total {
            return Err(self.changed());
        }
        file.sha256.update(data);
        while !data.is_empty() {
            let room = (self.manifest.piece_length - self.piece.len) as usize;
            let (now, later) = data.split_at(room.min(data.len()));
            self.piece.sha256.update(now);
            self.piece.sha1.update(now);
            self.piece.len += now.len() as u32;
            if self.piece.len == self.manifest.piece_length {
                self.end_piece();
            }
            data = later;
        }
        Ok(())
    }

    /// The file has no more bytes.
    pub fn end_file(&mut self) -> Result<(), BuildError> {
        let Some(file) = self.file.take() else {
            return Err(BuildError::OutOfOrder);
        };
        if file.got != file.entry.size {
            return Err(file.changed());
        }
        let mut entry = file.entry;
        entry.sha256 = Bytes::copy_from_slice(file.sha256.finish().as_ref());
        self.manifest.entries.push(entry);
        Ok(())
    }

    /// The manifest of everything that came. [`check`] it before it is used: names are taken here as they come.
    pub fn finish(mut self) -> Result<Manifest, BuildError> {
        if self.file.is_some() {
            return Err(BuildError::OutOfOrder);
        }
        if self.got != self.total {
            return Err(self.changed());
        }
        if self.piece.len > 0 {
            self.end_piece();
        }
        self.manifest.piece_hashes = self.sha256.into();
        self.manifest.piece_sha1 = self.sha1.into();
        Ok(self.manifest)
    }

    fn add(&mut self, entry: Entry) -> Result<(), BuildError> {
        if self.file.is_some() {
            return Err(BuildError::OutOfOrder);
        }
        self.manifest.entries.push(entry);
        Ok(())
    }

    fn end_piece(&mut self) {
        let piece = std::mem::replace(&mut self.piece, Hashes::new());
        self.sha256.extend_from_slice(piece.sha256.finish().as_ref());
        self.sha1.extend_from_slice(&piece.sha1.finalize());
    }

    fn changed(&self) -> BuildError {
        BuildError::SourceChanged {
            got: self.got,
            total: self.total,
        }
    }
}

impl OpenFile {
    fn changed(&self) -> BuildError {
        BuildError::FileChanged {
            path: shown(&self.entry.path),
            got: self.got,
            size: self.entry.size,
        }
    }
}
