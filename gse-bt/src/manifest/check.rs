//! Checks a manifest that came from elsewhere.

use super::*;
use crate::metainfo::check_component;
use crate::metainfo::paths::{find_overlap, join};

/// Bytes of a path with its separators.
const MAX_PATH: usize = 4096;
/// Parts of a path.
const MAX_PARTS: usize = 256;

/// How much a receiver takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes in all.
    pub total: u64,
    /// Files, directories and links.
    pub entries: usize,
    /// Bytes of all paths and links together, which is what a manifest mostly takes in memory.
    pub path_bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            total: 4 << 40,
            entries: 1_000_000,
            path_bytes: 64 << 20,
        }
    }
}

/// Checks a manifest as a whole; one that passes can be fetched and placed without a look at its numbers and names again.
///
/// Names are those of the sender's file system: what is fetched lies below the target directory by its path, but directories and links
/// that are there already, on the target, are for the one who places it to see.
pub fn check(manifest: &Manifest, bounds: &Bounds) -> Result<(), ManifestError> {
    let at_most = |what, got: u64, most: u64| match got <= most {
        true => Ok(()),
        false => Err(ManifestError::TooMuch { what, got, most }),
    };
    let length = manifest.piece_length;
    if !length.is_power_of_two() || !(MIN_PIECE_LENGTH..=MAX_PIECE_LENGTH).contains(&length) {
        return Err(ManifestError::PieceLength(length));
    }
    at_most("bytes", manifest.total, bounds.total)?;
    at_most("entries", manifest.entries.len() as u64, bounds.entries as u64)?;
    let pieces = geometry(manifest)?.pieces() as usize;
    debug_assert!(pieces <= MAX_PIECES as usize);
    hashes("SHA-256 of pieces", &manifest.piece_hashes, pieces * 32)?;
    hashes("SHA-1 of pieces", &manifest.piece_sha1, pieces * 20)?;
    check_component(manifest.name.as_bytes()).map_err(|problem| ManifestError::Path {
        path: shown(&[Bytes::copy_from_slice(manifest.name.as_bytes())]),
        problem,
    })?;

    let (mut sum, mut path_bytes) = (0_u64, 0_usize);
    let mut paths = Vec::with_capacity(manifest.entries.len());
    for entry in &manifest.entries {
        let path = check_path(entry)?;
        path_bytes += path.len() + entry.link.len();
        at_most("bytes of paths", path_bytes as u64, bounds.path_bytes as u64)?;
        paths.push(path);
        check_fields(entry)?;
        sum = sum.saturating_add(entry.size);
    }
    if sum != manifest.total {
        return Err(ManifestError::Total {
            sum,
            total: manifest.total,
        });
    }
    let is_dir = |at: usize| manifest.entries[at].kind() == EntryKind::Directory;
    if let Some(at) = find_overlap(&paths, is_dir) {
        return Err(path_error(&manifest.entries[at], PathProblem::Overlaps));
    }
    Ok(())
}

fn hashes(what: &'static str, hashes: &[u8], expected: usize) -> Result<(), ManifestError> {
    if hashes.len() == expected {
        return Ok(());
    }
    Err(ManifestError::Hashes {
        what,
        got: hashes.len(),
        expected,
    })
}

fn path_error(entry: &Entry, problem: PathProblem) -> ManifestError {
    ManifestError::Path {
        path: shown(&entry.path),
        problem,
    }
}

fn check_path(entry: &Entry) -> Result<Bytes, ManifestError> {
    if entry.path.is_empty() {
        return Err(path_error(entry, PathProblem::Empty));
    }
    let len: usize = entry.path.iter().map(|part| part.len() + 1).sum();
    if len > MAX_PATH || entry.path.len() > MAX_PARTS {
        return Err(path_error(entry, PathProblem::TooLong));
    }
    for part in &entry.path {
        check_component(part).map_err(|problem| path_error(entry, problem))?;
    }
    Ok(join(&entry.path))
}

/// Whether an entry has what its kind has, and nothing else.
fn check_fields(entry: &Entry) -> Result<(), ManifestError> {
    let fail = |problem| {
        Err(ManifestError::Entry {
            path: shown(&entry.path),
            problem,
        })
    };
    if entry.mode > 0o7777 {
        return fail("its mode is more than permission bits");
    }
    let Ok(kind) = EntryKind::try_from(entry.kind) else {
        return fail("it is neither file, directory nor link");
    };
    if kind == EntryKind::File {
        if entry.sha256.len() != 32 {
            return fail("it is a file without a SHA-256 of 32 bytes");
        }
    } else if entry.size != 0 || !entry.sha256.is_empty() {
        return fail("it has content and is no file");
    }
    if kind == EntryKind::Symlink {
        return check_link(entry);
    }
    if !entry.link.is_empty() {
        return fail("it leads elsewhere and is no link");
    }
    Ok(())
}

/// A link may go up from its directory, not above what is sent, and then down; nowhere up again. Every link of a manifest then leads to
/// a place below the target, also one that leads through other links: `..` behind one of those would be that link's own parent.
fn check_link(entry: &Entry) -> Result<(), ManifestError> {
    let above = entry.path.len() - 1;
    let (mut up, mut down) = (0, false);
    let mut good = !entry.link.is_empty() && entry.link.len() < MAX_PATH && !entry.link.contains(&0);
    good &= entry.link.first() != Some(&b'/');
    for part in entry.link.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                up += 1;
                good &= !down && up <= above;
            }
            _ => down = true,
        }
    }
    if good {
        return Ok(());
    }
    Err(ManifestError::Link {
        path: shown(&entry.path),
        link: shown(std::slice::from_ref(&entry.link)),
    })
}
