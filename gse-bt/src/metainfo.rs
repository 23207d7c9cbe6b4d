//! `.torrent` files of version 1 (BEP 3), with the private flag (BEP 27), sources, tracker tiers (BEP 12) and attributes of files
//! (BEP 47: read, and trusted in nothing).
//!
//! A file that is read is checked as a whole: sizes, number of pieces, and paths that can do no harm. Paths that lead elsewhere or
//! that two files share are refused, where other clients rename them; content that comes in under another name than the one
//! announced is of no use here. Building torrents of our own content is left to [`crate::manifest`].

use bytes::Bytes;

use crate::bencode::{self, Dict, Encoder, List, Value};
use crate::geometry::{Geometry, GeometryError, MAX_PIECES};

mod hybrid;
pub(crate) mod paths;
mod read;

pub use paths::{PathProblem, check_component};

/// Bytes of a `.torrent` file that are looked at, at most.
pub const MAX_METAINFO: usize = 16 << 20;
/// Files of one torrent, at most.
pub const MAX_FILES: usize = 1 << 18;
/// Bytes of a piece, at most.
pub const MAX_PIECE_LENGTH: u32 = 512 << 20;
/// Trackers that are kept of a torrent.
const MAX_TRACKERS: usize = 64;
/// Bytes of a tracker's address.
const MAX_URL: usize = 2048;
/// Bytes of a path with its separators.
const MAX_PATH: usize = 4096;

/// A torrent that was read and found good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metainfo {
    /// SHA-1 of the info dictionary, byte for byte as it came.
    pub info_hash: [u8; 20],
    /// Name of the file, or of the directory that files lie in.
    pub name: Bytes,
    /// Whether there is a list of files; without one there is a single file called `name`.
    pub multi: bool,
    /// Length of content and pieces.
    pub geometry: Geometry,
    /// SHA-1 of each piece, one after the other.
    pub pieces: Bytes,
    /// The files, in the order of the content.
    pub files: Vec<File>,
    /// Peers come from the torrent's trackers alone.
    pub private: bool,
    /// Sets torrents of the same content apart.
    pub source: Option<Bytes>,
    /// Tiers of trackers.
    pub trackers: Vec<Vec<String>>,
}

/// A file of a torrent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Its path below the torrent's name, parts joined with `/`; the name itself for a single file. None of its parts is empty, `.`
    /// or `..`, or holds a separator or NUL.
    pub path: Bytes,
    /// Bytes.
    pub length: u64,
    /// What it is said to be.
    pub attr: Attr,
}

/// Attributes of a file, as the torrent claims them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attr {
    /// Filler between files; zeros that nobody keeps.
    pub padding: bool,
    /// May be run.
    pub executable: bool,
    /// Is not shown.
    pub hidden: bool,
    /// A link; where it leads is not kept.
    pub symlink: bool,
}

/// Why a torrent is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetainfoError {
    /// Longer than [`MAX_METAINFO`].
    #[error("{0} bytes; a torrent has at most {MAX_METAINFO}")]
    TooLong(usize),
    /// Not bencoding.
    #[error("not a torrent: {0}")]
    Bencode(#[from] bencode::Error),
    /// A key is missing, or its value is something else than it must be.
    #[error("`{0}` is missing or not what it must be")]
    Key(&'static str),
    /// Content only for version 2.
    #[error("a torrent of version 2 only; version 1 is needed")]
    VersionTwo,
    /// The files of version 1 and of version 2 are not the same.
    #[error("the files of version 1 and version 2 differ")]
    Hybrid,
    /// A length that is negative, zero where it must not be, or too large in all.
    #[error("`{key}` is {value}")]
    Length {
        /// Which.
        key: &'static str,
        /// What it is.
        value: i64,
    },
    /// All files together are longer than can be.
    #[error("the files are too long in all")]
    TooLarge,
    /// The content can't be cut like this.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// Hashes for another number of pieces.
    #[error("hashes of {got} bytes for {pieces} pieces, which take 20 each")]
    Pieces {
        /// Bytes of hashes.
        got: usize,
        /// Pieces that follow from the lengths.
        pieces: u32,
    },
    /// More files than [`MAX_FILES`].
    #[error("more than {MAX_FILES} files")]
    TooManyFiles,
    /// There is nothing in it.
    #[error("no content")]
    Empty,
    /// A path that is not safe.
    #[error("path \"{path}\": {problem}")]
    Path {
        /// The path, escaped.
        path: String,
        /// What is wrong with it.
        problem: PathProblem,
    },
}

impl Metainfo {
    /// Reads and checks a `.torrent` file.
    pub fn parse(bytes: &Bytes) -> Result<Self, MetainfoError> {
        read::parse(bytes)
    }

    /// SHA-1 of a piece.
    #[must_use]
    pub fn piece_sha1(&self, piece: u32) -> Option<&[u8]> {
        self.pieces.get(piece as usize * 20..piece as usize * 20 + 20)
    }
}

/// What an info dictionary is written from.
#[derive(Debug, Clone)]
pub struct Info<'a> {
    /// Name of the file or directory.
    pub name: &'a [u8],
    /// Bytes of a piece.
    pub piece_length: u32,
    /// SHA-1 of each piece, one after the other.
    pub pieces: &'a [u8],
    /// Whether peers come from the trackers alone.
    pub private: bool,
    /// Sets torrents of the same content apart.
    pub source: Option<&'a [u8]>,
    /// What is in it.
    pub content: Content<'a>,
}

/// Content of a torrent.
#[derive(Debug, Clone)]
pub enum Content<'a> {
    /// One file of so many bytes.
    Single(u64),
    /// Files below the name: parts of the path, and bytes.
    Multi(Vec<(&'a [Bytes], u64)>),
}

impl Info<'_> {
    /// The dictionary, encoded.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = Encoder::new();
        out.dict(|info| {
            match &self.content {
                Content::Single(length) => info.int(b"length", length_of(*length)),
                Content::Multi(files) => info.key(b"files").list(|list| {
                    for (path, length) in files {
                        list.dict(|file| {
                            file.int(b"length", length_of(*length));
                            file.key(b"path")
                                .list(|parts| path.iter().for_each(|part| parts.bytes(part)));
                        });
                    }
                }),
            }
            info.bytes(b"name", self.name);
            info.int(b"piece length", i64::from(self.piece_length));
            info.bytes(b"pieces", self.pieces);
            if self.private {
                info.int(b"private", 1);
            }
            if let Some(source) = self.source {
                info.bytes(b"source", source);
            }
        });
        out.finish().into()
    }
}

/// Lengths beyond what the encoding has are longer than any content that passes a check.
fn length_of(length: u64) -> i64 {
    i64::try_from(length).unwrap_or(i64::MAX)
}

/// A `.torrent` file of an encoded info dictionary and tiers of trackers.
#[must_use]
pub fn torrent_file(info: &[u8], trackers: &[Vec<String>]) -> Bytes {
    let mut out = Encoder::new();
    out.dict(|root| {
        if let Some(first) = trackers.iter().flatten().next() {
            root.bytes(b"announce", first.as_bytes());
        }
        if trackers.iter().flatten().count() > 1 {
            root.key(b"announce-list").list(|tiers| {
                for tier in trackers.iter().filter(|tier| !tier.is_empty()) {
                    tiers.list(|list| tier.iter().for_each(|url| list.bytes(url.as_bytes())));
                }
            });
        }
        root.key(b"info").raw(info);
    });
    out.finish().into()
}

/// SHA-1 of an encoded info dictionary.
#[must_use]
pub fn info_hash(info: &[u8]) -> [u8; 20] {
    let mut out = [0; 20];
    let digest = ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, info);
    out.copy_from_slice(digest.as_ref());
    out
}

#[cfg(test)]
mod tests;
