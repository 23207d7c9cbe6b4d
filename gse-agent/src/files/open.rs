//! Opening the files of a swarm whenever they are needed, which is what bounds the descriptors of a directory of ten thousand files. They
//! are opened by a worker of their account; one that serves many files lives as long as the swarm, for few it is started when need be.

use std::fs::File;
use std::io;
use std::sync::Arc;

use gse_bt::OpenFiles;
use gse_proto::codes::Inner;
use gse_proto::file::{Manifest, Placing, Source};
use parking_lot::Mutex;

use super::cell::Key;
use super::config::FilesConfig;
use super::place::{FileId, Place};
use super::source;
use super::worker::{Failed, Found, Worker};

/// So many files are likely to stay open; a worker for more of them is kept.
pub(super) const FEW: usize = 16;

fn failed(error: Failed) -> io::Error {
    match error.code {
        code if code == Inner::NoSpace.code() => io::Error::new(io::ErrorKind::StorageFull, error),
        _ => io::Error::other(error),
    }
}

/// The files of a source.
#[derive(Debug)]
pub(super) struct SourceFiles {
    config: FilesConfig,
    source: Source,
    found: Vec<Found>,
    worker: Mutex<Option<Worker>>,
}

impl SourceFiles {
    /// Those that `worker` has found.
    pub(super) fn new(config: &FilesConfig, source: Source, found: Vec<Found>, worker: Worker) -> Self {
        let many = found.len() > FEW;
        Self {
            config: config.clone(),
            source,
            found,
            worker: Mutex::new(many.then_some(worker)),
        }
    }

    fn open(&self, entry: usize) -> Result<File, Failed> {
        let found = self.found.get(entry);
        let found = found.ok_or_else(|| Failed::new(Inner::System, "there is no such entry"))?;
        // One at a time: the worker answers one question at a time.
        let worker = self.worker.lock();
        if let Some(worker) = &*worker {
            return source::open(worker, entry, found);
        }
        let (fresh, now) = source::find(&self.config, &self.source)?;
        let at = now.iter().position(|one| one.path == found.path);
        let at = at.ok_or_else(|| source::changed(found))?;
        source::open(&fresh, at, found)
    }
}

impl OpenFiles for SourceFiles {
    fn open(&self, entry: usize) -> io::Result<File> {
        self.open(entry).map_err(failed)
    }

    fn sync_all(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Part files of a target, and what becomes of them.
#[derive(Debug)]
pub(super) struct PartFiles {
    config: FilesConfig,
    key: Key,
    placing: Placing,
    manifest: Arc<Manifest>,
    ids: Vec<FileId>,
    /// `None`: everything is at its place, and few files need no worker all the time.
    place: Mutex<Option<Arc<Place>>>,
}

impl PartFiles {
    /// Those that were made in `place`, by entries.
    pub(super) fn new(
        config: &FilesConfig,
        key: &Key,
        placing: Placing,
        manifest: Arc<Manifest>,
        ids: Vec<FileId>,
        place: Arc<Place>,
    ) -> Self {
        Self {
            config: config.clone(),
            key: key.clone(),
            placing: Placing {
                make_dirs: false,
                ..placing
            },
            manifest,
            ids,
            place: Mutex::new(Some(place)),
        }
    }

    /// Everything is at its place.
    pub(super) fn placed(&self) {
        if self.ids.len() <= FEW {
            *self.place.lock() = None;
        }
    }

    fn open(&self, n: usize) -> Result<File, Failed> {
        let (Some(entry), Some(id)) = (self.manifest.entries.get(n), self.ids.get(n)) else {
            return Err(Failed::new(Inner::System, "there is no such entry"));
        };
        let place = self.place.lock().clone();
        match place {
            Some(place) => place.again(n, entry, true, *id),
            None => Place::enter(&self.config, &self.placing, &self.key, None)?.again(n, entry, false, *id),
        }
    }
}

impl OpenFiles for PartFiles {
    fn open(&self, entry: usize) -> io::Result<File> {
        self.open(entry).map_err(failed)
    }

    fn sync_all(&self) -> io::Result<()> {
        let place = self.place.lock().clone();
        place.map_or(Ok(()), |place| place.sync_all()).map_err(failed)
    }
}
