//! Offering something: it is found and read as its account, hashed, described by a manifest, and handed over inside the report or seeded
//! to a swarm until the server says that it is over.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use gse_bt::manifest::{self, Bounds, BuildError, ManifestBuilder};
use gse_bt::{Limits, Storage};
use gse_proto::codes::Inner;
use gse_proto::file::{EntryKind, Manifest, Source};
use gse_proto::link::PART;
use prost::Message;

use super::cell::{Cell, Done};
use super::config::FilesConfig;
use super::open::SourceFiles;
use super::orders::Shared;
use super::place::{CHUNK, account_of};
use super::stop::Stop;
use super::swarm;
use super::worker::wire::{Expand, What};
use super::worker::{Failed, Found, Worker};

/// A source that has been read.
pub(super) struct Prepared {
    /// Its worker, which can open its files again.
    pub(super) worker: Worker,
    /// What was found, in the order of the manifest.
    pub(super) found: Vec<Found>,
    /// What there is.
    pub(super) manifest: Manifest,
    /// All of its content, if it is no more than was asked for.
    pub(super) content: Option<Bytes>,
}

/// What may be in a manifest here.
pub(super) fn bounds(config: &FilesConfig) -> Bounds {
    Bounds {
        total: config.max_bytes,
        entries: usize::try_from(config.max_entries).unwrap_or(usize::MAX),
        ..Bounds::default()
    }
}

fn built(error: BuildError) -> Failed {
    let code = match error {
        BuildError::FileChanged { .. } | BuildError::SourceChanged { .. } => Inner::Changed,
        BuildError::Geometry(_) => Inner::TooLarge,
        BuildError::OutOfOrder => Inner::System,
    };
    Failed::new(code, error.to_string())
}

fn what(entry: &Found) -> String {
    let parts: Vec<_> = entry.path.iter().map(|part| String::from_utf8_lossy(part)).collect();
    parts.join("/")
}

/// Starts a worker for a source and has it find what is meant.
pub(super) fn find(config: &FilesConfig, source: &Source) -> Result<(Worker, Vec<Found>), Failed> {
    let user = account_of(config, &source.user)?;
    let worker = Worker::start(&config.self_exec, &user)?;
    let (said, _) = worker.ask(What::Expand(Expand {
        dir: source.dir.clone(),
        name: source.name.clone(),
        max_entries: config.max_entries,
        max_bytes: config.max_bytes,
        roots: config.source_dirs.clone(),
    }))?;
    Ok((worker, said.entries))
}

/// Opens one of the files of a source; it has to be the one that was found.
pub(super) fn open(worker: &Worker, n: usize, entry: &Found) -> Result<File, Failed> {
    let number = u32::try_from(n).map_err(|e| Failed::new(Inner::System, e.to_string()))?;
    let (file, now) = worker.file(What::Open(number))?;
    let now = now.unwrap_or_default();
    if !unchanged(entry, &now) {
        return Err(changed(entry));
    }
    Ok(file)
}

pub(super) fn changed(entry: &Found) -> Failed {
    Failed::new(
        Inner::Changed,
        format!(
            "{} was changed while it was read; send it again when nobody writes to it",
            what(entry)
        ),
    )
}

fn unchanged(before: &Found, now: &Found) -> bool {
    (before.size, before.mtime_ns, before.inode) == (now.size, now.mtime_ns, now.inode)
}

/// Whether a file that has been read is still what it was when it was found.
fn still(file: &File, entry: &Found) -> Result<(), Failed> {
    use std::os::unix::fs::MetadataExt;
    let meta = file
        .metadata()
        .map_err(|e| Failed::new(Inner::Read, format!("{}: {e}", what(entry))))?;
    let now = Found {
        size: meta.size(),
        mtime_ns: meta
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(meta.mtime_nsec()),
        inode: meta.ino(),
        ..Found::default()
    };
    if unchanged(entry, &now) {
        return Ok(());
    }
    Err(changed(entry))
}

/// Reads a whole source. `content_limit`: of no more content than this a copy is kept.
pub(super) fn read(
    config: &FilesConfig,
    source: &Source,
    content_limit: u64,
    stop: &Stop,
    mut moved: impl FnMut(u64),
) -> Result<Prepared, Failed> {
    let (worker, found) = find(config, source)?;
    let total = found.iter().map(|entry| entry.size).sum();
    let name = match found.first() {
        Some(first) if found.iter().filter(|entry| entry.path.len() == 1).count() == 1 => {
            String::from_utf8_lossy(first.path.first().map_or(&[], Vec::as_slice)).into_owned()
        }
        _ => "files".to_owned(),
    };
    let mut builder = ManifestBuilder::new(&name, total).map_err(built)?;
    let mut content = (total <= content_limit).then(Vec::new);
    let mut buffer = vec![0; CHUNK];
    for (n, entry) in found.iter().enumerate() {
        stop.check()?;
        let path: Vec<Bytes> = entry.path.iter().map(|part| Bytes::copy_from_slice(part)).collect();
        let mtime_ms = entry.mtime_ns / 1_000_000;
        match EntryKind::try_from(entry.kind) {
            Ok(EntryKind::Directory) => builder.directory(path, entry.mode & 0o777, mtime_ms).map_err(built)?,
            Ok(EntryKind::Symlink) => builder
                .symlink(path, Bytes::copy_from_slice(&entry.link), mtime_ms)
                .map_err(built)?,
            _ => {
                let mut file = open(&worker, n, entry)?;
                builder
                    .begin_file(path, entry.size, entry.mode & 0o777, mtime_ms)
                    .map_err(built)?;
                loop {
                    stop.check()?;
                    let n = match file.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(n) => n,
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                        Err(e) => return Err(Failed::new(Inner::Read, format!("{}: {e}", what(entry)))),
                    };
                    builder.data(&buffer[..n]).map_err(built)?;
                    if let Some(content) = &mut content {
                        content.extend_from_slice(&buffer[..n]);
                    }
                    moved(n as u64);
                }
                builder.end_file().map_err(built)?;
                still(&file, entry)?;
            }
        }
    }
    let manifest = builder.finish().map_err(built)?;
    manifest::check(&manifest, &bounds(config))
        .map_err(|e| Failed::new(Inner::SourceKind, format!("the source can't be sent: {e}")))?;
    Ok(Prepared {
        worker,
        found,
        manifest,
        content: content.map(Bytes::from),
    })
}

/// Carries an order out that offers something.
pub(super) async fn offer(shared: &Arc<Shared>, cell: &Arc<Cell>, source: Source) -> Result<Done, Failed> {
    let limit = source.inline_limit.min(shared.config.max_inline_bytes as u64);
    let asked = source.clone();
    let read = shared
        .blocking(cell, move |shared, cell| {
            read(&shared.config, &asked, limit, &cell.stop, |_| {})
        })
        .await?;
    let encoded = Bytes::from(read.manifest.encode_to_vec());
    let id = Bytes::copy_from_slice(&manifest::manifest_id_of(&encoded));
    let size = read.manifest.total;
    let short = encoded.len() <= PART;
    if !short {
        *cell.manifest.lock() = Some(encoded.clone());
    }
    if let Some(content) = read.content {
        cell.tell(|report| {
            report.size = size;
            report.manifest_id = id;
            report.inline_manifest = if short { encoded } else { Bytes::new() };
            report.inline_content = content;
        });
        cell.moved.store(size, Ordering::Relaxed);
        return Ok(Done::of(size));
    }
    let Prepared {
        worker,
        found,
        manifest,
        ..
    } = read;
    let manifest = Arc::new(manifest);
    let whole = Arc::clone(&manifest);
    let files = Arc::new(SourceFiles::new(&shared.config, source.clone(), found, worker));
    let storage = Storage::pooled(whole, files, &shared.open_files, vec![])
        .map_err(|e| Failed::new(Inner::System, e.to_string()))?;
    cell.tell(|report| {
        report.size = size;
        report.manifest_id = id.clone();
        report.inline_manifest = if short { encoded } else { Bytes::new() };
    });
    let limits = Limits {
        up: source.upload_limit,
        down: 0,
    };
    let member = tokio::select! {
        member = swarm::join(shared, cell, &id, &manifest, storage, None, limits) => member?,
        () = cell.cancelled() => return Err(stopped(cell)),
    };
    swarm::seed(cell, member).await?;
    Ok(Done::of(size))
}

/// Why an order that was stopped ended.
pub(super) fn stopped(cell: &Cell) -> Failed {
    let why = cell.stop.check().err();
    why.unwrap_or_else(|| Failed::new(Inner::System, "stopped"))
}
