//! The embedded store on the disk: a log of effects, snapshots that replace its beginning, and recovery. What an effect does is the engine's.
//!
//! A directory holds `snapshot-G` and `log-G`, `log-G+1`, … where the generation G grows with each compaction: the state is the newest whole snapshot and the logs from its
//! generation on. Both kinds of file are a header and records; a record is what one group of commands changed and is taken whole or not at all.

pub(crate) mod compact;
pub(crate) mod format;
pub(crate) mod log;
pub(crate) mod recover;
pub(crate) mod snapshot;

use std::path::{Path, PathBuf};

/// How the store uses its directory.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) dir: PathBuf,
    /// Sync before the reply.
    pub(crate) always: bool,
    /// Keep the good beginning of a file that is broken in the middle, instead of refusing to start.
    pub(crate) salvage: bool,
    /// Log bytes below which there is no compaction.
    pub(crate) compact_min: u64,
    /// Compact when the log is this many times as large as the last snapshot.
    pub(crate) compact_factor: u64,
    /// Bytes that snapshot and logs may take together; 0 is no bound.
    pub(crate) max_disk: u64,
}

pub(crate) fn log_path(dir: &Path, generation: u64) -> PathBuf {
    dir.join(format!("log-{generation:016}.gse"))
}

pub(crate) fn snapshot_path(dir: &Path, generation: u64) -> PathBuf {
    dir.join(format!("snapshot-{generation:016}.gse"))
}

/// Generations present in the directory, ascending.
#[derive(Default, Debug, Clone)]
pub(crate) struct Listing {
    pub(crate) snapshots: Vec<u64>,
    pub(crate) logs: Vec<u64>,
    pub(crate) leftovers: Vec<PathBuf>,
}

pub(crate) fn list(dir: &Path) -> std::io::Result<Listing> {
    let mut listing = Listing::default();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let number = |prefix: &str| name.strip_prefix(prefix)?.strip_suffix(".gse")?.parse().ok();
        if let Some(g) = number("snapshot-") {
            listing.snapshots.push(g);
        } else if let Some(g) = number("log-") {
            listing.logs.push(g);
        } else if name.starts_with("snapshot-") && name.ends_with(".tmp") {
            listing.leftovers.push(entry.path());
        }
    }
    listing.snapshots.sort_unstable();
    listing.logs.sort_unstable();
    Ok(listing)
}

/// Makes a creation, rename or removal in the directory last.
pub(crate) fn sync_dir(dir: &Path) -> std::io::Result<()> {
    std::fs::File::open(dir)?.sync_all()
}
