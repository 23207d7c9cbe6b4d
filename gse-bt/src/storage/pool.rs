//! A bound on open files: of all the files of all storages that share a pool, those that were used last stay open, and the others are opened
//! again when they are needed. A file that is in use when its turn comes is closed when that use ends, so that a few more than the bound may
//! be open for a moment.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;

/// Opens the files of a storage, as often as they are needed. Its calls may block; they come from threads for that.
pub trait OpenFiles: Send + Sync + fmt::Debug {
    /// Opens the file of an entry of the manifest: the very same one each time, or an error that says what has become of it.
    fn open(&self, entry: usize) -> io::Result<File>;

    /// Has everything that was ever written to the files put on the disk, those that are closed by now included.
    fn sync_all(&self) -> io::Result<()>;
}

/// A storage's files in a pool, and one of them.
type Key = (u64, usize);

#[derive(Debug)]
struct Slot {
    file: Arc<File>,
    used: u64,
}

#[derive(Debug, Default)]
struct State {
    shelves: u64,
    clock: u64,
    files: HashMap<Key, Slot>,
    /// By when they were used last.
    order: BTreeMap<u64, Key>,
}

impl State {
    fn touch(&mut self, key: Key) -> Option<Arc<File>> {
        self.clock += 1;
        let slot = self.files.get_mut(&key)?;
        self.order.remove(&slot.used);
        slot.used = self.clock;
        self.order.insert(slot.used, key);
        Some(Arc::clone(&slot.file))
    }

    fn remove(&mut self, key: Key) -> Option<Arc<File>> {
        let slot = self.files.remove(&key)?;
        self.order.remove(&slot.used);
        Some(slot.file)
    }
}

#[derive(Debug)]
struct Inner {
    most: usize,
    open: Gauge,
    state: Mutex<State>,
}

/// Open files that many storages share. Cheap to clone; every clone is the same.
#[derive(Debug, Clone)]
pub struct FilePool(Arc<Inner>);

impl FilePool {
    /// Keeps up to `most` files open, one at least; `open` shows how many there are.
    #[must_use]
    pub fn new(most: usize, open: Gauge) -> Self {
        Self(Arc::new(Inner {
            most: most.max(1),
            open,
            state: Mutex::default(),
        }))
    }

    pub(super) fn shelf(&self, opener: Arc<dyn OpenFiles>) -> Shelf {
        let mut state = self.0.state.lock();
        state.shelves += 1;
        Shelf {
            pool: self.clone(),
            id: state.shelves,
            opener,
            dirty: Mutex::default(),
        }
    }

    fn count(&self, state: &State) {
        self.0.open.set(i64::try_from(state.files.len()).unwrap_or(i64::MAX));
    }
}

/// One storage's part of a pool; what it has open is closed when this is dropped.
#[derive(Debug)]
pub(super) struct Shelf {
    pool: FilePool,
    id: u64,
    opener: Arc<dyn OpenFiles>,
    /// Written to since they were synced.
    dirty: Mutex<HashSet<usize>>,
}

impl Drop for Shelf {
    fn drop(&mut self) {
        let mut state = self.pool.0.state.lock();
        let own: Vec<Key> = state.files.keys().filter(|key| key.0 == self.id).copied().collect();
        let closed: Vec<_> = own.into_iter().map(|key| state.remove(key)).collect();
        self.pool.count(&state);
        drop(state);
        // Closing may take its time on some file systems.
        drop(closed);
    }
}

impl Shelf {
    /// The open file of an entry.
    pub(super) fn get(&self, entry: usize) -> io::Result<Arc<File>> {
        if let Some(file) = self.pool.0.state.lock().touch((self.id, entry)) {
            return Ok(file);
        }
        let file = Arc::new(self.opener.open(entry)?);
        self.put(entry, Arc::clone(&file));
        Ok(file)
    }

    /// Takes an open file in; that which was used longest ago makes room for it.
    pub(super) fn put(&self, entry: usize, file: Arc<File>) {
        let key = (self.id, entry);
        let mut closed = Vec::new();
        let mut state = self.pool.0.state.lock();
        closed.extend(state.remove(key));
        while state.files.len() >= self.pool.0.most {
            let Some(oldest) = state.order.first_key_value().map(|(_, key)| *key) else {
                break;
            };
            closed.extend(state.remove(oldest));
        }
        state.clock += 1;
        let used = state.clock;
        state.order.insert(used, key);
        state.files.insert(key, Slot { file, used });
        self.pool.count(&state);
        drop(state);
        drop(closed);
    }

    /// A write to the file of an entry has been made.
    pub(super) fn written(&self, entry: usize) {
        self.dirty.lock().insert(entry);
    }

    /// Has what was written put on the disk: up to `each` files one by one, more of them in one go.
    pub(super) fn sync(&self, each: usize) -> Result<(), (usize, io::Error)> {
        let dirty = std::mem::take(&mut *self.dirty.lock());
        let done = if dirty.len() > each {
            self.opener.sync_all().map_err(|error| (0, error))
        } else {
            dirty.iter().try_for_each(|entry| {
                let synced = self.get(*entry).and_then(|file| file.sync_data());
                synced.map_err(|error| (*entry, error))
            })
        };
        if done.is_err() {
            self.dirty.lock().extend(dirty);
        }
        done
    }
}
