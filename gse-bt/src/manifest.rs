//! What a swarm moves, as gse_btsvr vouches for it: a [`Manifest`] is built while the source is read, checked by whoever gets it, and
//! named by hashes.
//!
//! * [`ManifestBuilder`] is fed directories, links and files, byte after byte, and hashes them.
//! * [`check`] is for a manifest that came from elsewhere: after it, every path lies below the target directory, links stay in there,
//!   and all numbers fit together.
//! * [`manifest_id`] names a manifest (SHA-256 of its encoding); [`swarm_id`] is what peers call its swarm on the wire (SHA-1 of the
//!   info dictionary of BitTorrent v1, which holds the manifest's id).
//!
//! The info dictionary knows only the files; directories, links, modes and SHA-256 are the manifest's alone. Reading sources and
//! placing what was fetched is left to the agent.

use bytes::Bytes;
use gse_proto::file::{Entry, EntryKind, Manifest};
use gse_proto::prost::Message as _;
use ring::digest::{SHA256, digest};

use crate::geometry::{Geometry, GeometryError, MAX_PIECES};
use crate::metainfo::{self, Content, Info, PathProblem};

mod build;
mod check;

pub use build::{BuildError, ManifestBuilder};
pub use check::{Bounds, check};

/// Bytes of a piece, at least.
pub const MIN_PIECE_LENGTH: u32 = 64 * 1024;
/// Bytes of a piece, at most.
pub const MAX_PIECE_LENGTH: u32 = 4 * 1024 * 1024;

/// Why a manifest is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Pieces of a length that is not used.
    #[error("pieces of {0} bytes; a power of two from {MIN_PIECE_LENGTH} to {MAX_PIECE_LENGTH} is possible")]
    PieceLength(u32),
    /// More than this receiver takes.
    #[error("{what}: {got}, at most {most} are taken here")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// How much.
        got: u64,
        /// How much is taken.
        most: u64,
    },
    /// The content can't be cut like this.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// Hashes for another number of pieces.
    #[error("{what} of {got} bytes where {expected} belong")]
    Hashes {
        /// Which hashes.
        what: &'static str,
        /// Bytes that there are.
        got: usize,
        /// Bytes that there should be.
        expected: usize,
    },
    /// The files' sizes are not the total.
    #[error("files of {sum} bytes in all, where the manifest says {total}")]
    Total {
        /// What the files come to.
        sum: u64,
        /// What is said.
        total: u64,
    },
    /// A name or path that is not safe.
    #[error("\"{path}\": {problem}")]
    Path {
        /// The path, escaped.
        path: String,
        /// What is wrong with it.
        problem: PathProblem,
    },
    /// A link that leads out of what is sent, or nowhere.
    #[error(
        "link \"{path}\" leads to \"{link}\": only places within what is sent are possible, with .. at the beginning alone"
    )]
    Link {
        /// The link, escaped.
        path: String,
        /// Where it leads, escaped.
        link: String,
    },
    /// An entry whose fields don't go together.
    #[error("\"{path}\": {problem}")]
    Entry {
        /// The path, escaped.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Bytes of a piece for content of `total` bytes: about a thousand pieces, within the bounds.
#[must_use]
pub fn piece_length(total: u64) -> u32 {
    let wanted = total
        .div_ceil(1024)
        .clamp(u64::from(MIN_PIECE_LENGTH), u64::from(MAX_PIECE_LENGTH));
    // Both bounds are powers of two, so the next one lies within them.
    wanted.next_power_of_two() as u32
}

/// How the content is cut.
pub fn geometry(manifest: &Manifest) -> Result<Geometry, ManifestError> {
    Ok(Geometry::new(manifest.total, manifest.piece_length)?)
}

/// The name of a manifest: SHA-256 of its encoding. Of one that came encoded, hash what came ([`manifest_id_of`]): a newer sender may
/// have written fields that are not known here.
#[must_use]
pub fn manifest_id(manifest: &Manifest) -> [u8; 32] {
    manifest_id_of(&manifest.encode_to_vec())
}

/// The name of an encoded manifest.
#[must_use]
pub fn manifest_id_of(encoded: &[u8]) -> [u8; 32] {
    let mut id = [0; 32];
    id.copy_from_slice(digest(&SHA256, encoded).as_ref());
    id
}

/// The info dictionary of BitTorrent v1 for a manifest, encoded. It is private, and its `source` holds the manifest's id.
#[must_use]
pub fn info_dict(manifest: &Manifest) -> Bytes {
    let source = format!("gse {}", hex::encode(manifest_id(manifest)));
    let files: Vec<&Entry> = files(manifest).collect();
    let content = match files.as_slice() {
        [only] if is_single(manifest, only) => Content::Single(only.size),
        _ => Content::Multi(files.iter().map(|entry| (entry.path.as_slice(), entry.size)).collect()),
    };
    Info {
        name: manifest.name.as_bytes(),
        piece_length: manifest.piece_length,
        pieces: &manifest.piece_sha1,
        private: true,
        source: Some(source.as_bytes()),
        content,
    }
    .encode()
}

/// What peers call the swarm of a manifest on the wire: the info-hash.
#[must_use]
pub fn swarm_id(manifest: &Manifest) -> [u8; 20] {
    metainfo::info_hash(&info_dict(manifest))
}

/// A `.torrent` file with which foreign clients can take part in the swarm.
#[must_use]
pub fn torrent_file(manifest: &Manifest, trackers: &[Vec<String>]) -> Bytes {
    metainfo::torrent_file(&info_dict(manifest), trackers)
}

/// SHA-256 of a piece, if there is such a piece.
#[must_use]
pub fn piece_sha256(manifest: &Manifest, piece: u32) -> Option<&[u8]> {
    let at = piece as usize * 32;
    manifest.piece_hashes.get(at..at + 32)
}

/// The entries that have content, in its order.
pub fn files(manifest: &Manifest) -> impl Iterator<Item = &Entry> {
    manifest.entries.iter().filter(|entry| entry.kind() == EntryKind::File)
}

/// One file that has the manifest's name: foreign clients then make no directory for it.
fn is_single(manifest: &Manifest, only: &Entry) -> bool {
    manifest.entries.len() == 1 && only.path.len() == 1 && only.path[0] == manifest.name.as_bytes()
}

/// A path for people.
fn shown(parts: &[Bytes]) -> String {
    let joined = parts.join(&b'/');
    joined.get(..200).unwrap_or(&joined).escape_ascii().to_string()
}

#[cfg(test)]
mod tests;
