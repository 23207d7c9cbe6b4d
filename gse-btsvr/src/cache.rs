//! Content that this instance keeps on its disk, named by its manifest: what it has passed on once it can offer again, whether the
//! source is slow, gone or was never there (content of a call).
//!
//! Each entry is a directory with the manifest, all content in one file, and a map of the pieces that are there. After a restart or a
//! kill everything is taken up again: a manifest that is not what its name says is removed with its content, and pieces are verified
//! before they are offered. What was not used for a time goes, and so does what was used longest ago when room is needed; what is in
//! use stays. All calls block; they belong on a thread for that.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use gse_bt::{Bitmap, ResumeFile, Storage, StorageError};
use gse_core::random::HashMap;
use gse_proto::file::Manifest;
use parking_lot::Mutex;
use prost::Message;
use sha2::{Digest, Sha256};

use crate::metrics::Metrics;
use crate::swarm::ManifestId;

const MANIFEST: &str = "manifest";
const CONTENT: &str = "content";
const MAP: &str = "map";

/// Why something is not kept.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// It does not fit beside what is in use.
    #[error("{wanted} bytes do not fit into the cache of {quota} bytes beside what is in use (cache.quota_bytes)")]
    Full {
        /// Bytes of the content.
        wanted: u64,
        /// Bytes that the cache may have.
        quota: u64,
    },
    /// Somebody has it open already.
    #[error("it is in use already")]
    InUse,
    /// The disk says no.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The manifest is not usable.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

#[derive(Debug)]
struct Slot {
    bytes: u64,
    used: SystemTime,
    in_use: bool,
    /// Who only reads it.
    readers: usize,
    whole: bool,
}

impl Slot {
    fn is_idle(&self) -> bool {
        !self.in_use && self.readers == 0
    }
}

/// The directory, and what is known of it.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    quota: u64,
    expiry: Duration,
    metrics: Metrics,
    slots: Mutex<HashMap<ManifestId, Slot>>,
}

/// Content that is in use. It can't be removed until this is dropped.
#[derive(Debug)]
pub struct Kept {
    cache: Arc<Cache>,
    id: ManifestId,
    /// The content.
    pub storage: Storage,
    /// Pieces that are said to be there; of an earlier life, so they have to be verified.
    pub claimed: Bitmap,
    map: Option<ResumeFile>,
}

/// Content that is read, beside whoever else does. It can't be removed until this is dropped.
#[derive(Debug)]
pub struct Shared {
    cache: Arc<Cache>,
    id: ManifestId,
    /// What it is.
    pub manifest: Arc<Manifest>,
    /// The content, all of it; of an earlier life perhaps, so it has to be verified.
    pub storage: Storage,
}

fn at(path: &Path) -> impl Fn(io::Error) -> CacheError + '_ {
    move |source| CacheError::Io {
        path: path.to_owned(),
        source,
    }
}

fn open_rw(path: &Path) -> Result<File, CacheError> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(at(path))
}

impl Cache {
    /// Opens a directory, made if need be, and takes up what an earlier life has left there.
    ///
    /// # Errors
    /// When the directory can't be used.
    pub fn open(dir: &Path, quota: u64, expiry: Duration, metrics: Metrics) -> Result<Arc<Self>, CacheError> {
        fs::create_dir_all(dir).map_err(at(dir))?;
        let cache = Self {
            dir: dir.to_owned(),
            quota,
            expiry,
            metrics,
            slots: Mutex::default(),
        };
        let mut found = HashMap::default();
        for entry in fs::read_dir(dir).map_err(at(dir))? {
            let path = entry.map_err(at(dir))?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .and_then(|name| hex::decode(name).ok());
            let Some(id) = name.and_then(|name| ManifestId::try_from(name).ok()) else {
                // Not ours: it is left alone.
                continue;
            };
            match look(&path, &id) {
                Ok(slot) => {
                    found.insert(id, slot);
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "an entry of the cache is not usable and is removed");
                    fs::remove_dir_all(&path).map_err(at(&path))?;
                }
            }
        }
        *cache.slots.lock() = found;
        cache.count(&cache.slots.lock());
        Ok(Arc::new(cache))
    }

    /// Whether all of some content is here.
    #[must_use]
    pub fn has(&self, id: &ManifestId) -> bool {
        self.slots.lock().get(id).is_some_and(|slot| slot.whole)
    }

    /// Takes an entry into use, made if there is none; others make room for it.
    ///
    /// # Errors
    /// When there is no room, or the disk says no.
    pub fn enter(
        self: &Arc<Self>,
        id: ManifestId,
        encoded: &Bytes,
        manifest: Arc<Manifest>,
    ) -> Result<Kept, CacheError> {
        let bytes = manifest.total;
        let evicted = {
            let mut slots = self.slots.lock();
            let known = slots.get(&id).map(|slot| slot.in_use);
            if known == Some(true) {
                return Err(CacheError::InUse);
            }
            let mut evicted = Vec::new();
            if known.is_none() {
                let busy: u64 = slots
                    .values()
                    .filter(|slot| !slot.is_idle())
                    .map(|slot| slot.bytes)
                    .sum();
                if busy.saturating_add(bytes) > self.quota {
                    // Nothing is removed in vain.
                    return Err(CacheError::Full {
                        wanted: bytes,
                        quota: self.quota,
                    });
                }
                let mut total: u64 = slots.values().map(|slot| slot.bytes).sum();
                while total.saturating_add(bytes) > self.quota {
                    let idle = slots.iter().filter(|(_, slot)| slot.is_idle());
                    let Some(oldest) = idle.min_by_key(|(_, slot)| slot.used).map(|(id, _)| *id) else {
                        break;
                    };
                    total -= slots.remove(&oldest).map_or(0, |slot| slot.bytes);
                    evicted.push(oldest);
                }
            }
            let slot = slots.entry(id).or_insert(Slot {
                bytes,
                used: SystemTime::now(),
                in_use: true,
                readers: 0,
                whole: false,
            });
            (slot.in_use, slot.used) = (true, SystemTime::now());
            self.count(&slots);
            evicted
        };
        for gone in evicted {
            self.remove(&gone);
        }
        let opened = self.open_entry(&id, encoded, manifest);
        match opened {
            Ok((storage, map, claimed)) => Ok(Kept {
                cache: Arc::clone(self),
                id,
                storage,
                claimed,
                map: Some(map),
            }),
            Err(error) => {
                self.slots.lock().remove(&id);
                self.remove(&id);
                Err(error)
            }
        }
    }

    /// Takes content that is whole into use, beside others; `None` when it is not here, or not whole.
    ///
    /// # Errors
    /// When the disk says no.
    pub fn share(self: &Arc<Self>, id: &ManifestId) -> Result<Option<Shared>, CacheError> {
        {
            let mut slots = self.slots.lock();
            let Some(slot) = slots.get_mut(id).filter(|slot| slot.whole) else {
                return Ok(None);
            };
            slot.readers += 1;
        }
        match self.open_whole(id) {
            Ok((manifest, storage)) => Ok(Some(Shared {
                cache: Arc::clone(self),
                id: *id,
                manifest,
                storage,
            })),
            Err(error) => {
                self.unread(id);
                Err(error)
            }
        }
    }

    fn open_whole(&self, id: &ManifestId) -> Result<(Arc<Manifest>, Storage), CacheError> {
        let dir = self.path(id);
        let path = dir.join(MANIFEST);
        let encoded = fs::read(&path).map_err(at(&path))?;
        if <[u8; 32]>::from(Sha256::digest(&encoded)) != *id {
            let wrong = io::Error::other("the manifest is not the one that the entry is named by");
            return Err(at(&path)(wrong));
        }
        let manifest = Manifest::decode(&encoded[..]).map_err(|error| at(&path)(io::Error::other(error)))?;
        let manifest = Arc::new(manifest);
        let path = dir.join(CONTENT);
        let content = File::open(&path).map_err(at(&path))?;
        Ok((Arc::clone(&manifest), Storage::flat(manifest, content)?))
    }

    fn unread(&self, id: &ManifestId) {
        if let Some(slot) = self.slots.lock().get_mut(id) {
            slot.readers = slot.readers.saturating_sub(1);
            slot.used = SystemTime::now();
        }
    }

    /// Keeps content that is at hand.
    ///
    /// # Errors
    /// When there is no room, the disk says no, or it is not what the manifest says.
    pub async fn put(self: &Arc<Self>, id: ManifestId, encoded: &Bytes, content: &Bytes) -> Result<(), CacheError> {
        let dir = self.path(&id);
        let gone = |error: tokio::task::JoinError| at(&dir)(io::Error::other(error));
        let manifest = Manifest::decode(encoded.clone()).map_err(|error| at(&dir)(io::Error::other(error)))?;
        let (cache, encoded, manifest) = (Arc::clone(self), encoded.clone(), Arc::new(manifest));
        let length = manifest.piece_length as usize;
        let entered = tokio::task::spawn_blocking(move || cache.enter(id, &encoded, manifest)).await;
        let mut kept = entered.map_err(gone)??;
        for (piece, begin) in (0..).zip((0..content.len()).step_by(length.max(1))) {
            let part = content.slice(begin..content.len().min(begin + length));
            kept.storage.keep(piece, vec![part]).await?;
        }
        let pieces = Bitmap::full(kept.storage.geometry().pieces());
        tokio::task::spawn_blocking(move || kept.save(&pieces))
            .await
            .map_err(gone)?
    }

    /// Removes what was not used for long.
    pub fn sweep(&self, now: SystemTime) {
        let old: Vec<ManifestId> = {
            let mut slots = self.slots.lock();
            let is_old =
                |slot: &Slot| slot.is_idle() && now.duration_since(slot.used).is_ok_and(|unused| unused >= self.expiry);
            let old: Vec<ManifestId> = slots
                .iter()
                .filter(|(_, slot)| is_old(slot))
                .map(|(id, _)| *id)
                .collect();
            slots.retain(|id, _| !old.contains(id));
            self.count(&slots);
            old
        };
        for id in old {
            self.remove(&id);
        }
    }

    fn open_entry(
        &self,
        id: &ManifestId,
        encoded: &Bytes,
        manifest: Arc<Manifest>,
    ) -> Result<(Storage, ResumeFile, Bitmap), CacheError> {
        let dir = self.path(id);
        fs::create_dir_all(&dir).map_err(at(&dir))?;
        let path = dir.join(CONTENT);
        let content = open_rw(&path)?;
        content.set_len(manifest.total).map_err(at(&path))?;
        let storage = Storage::flat(manifest, content)?;
        let pieces = storage.geometry().pieces();
        let path = dir.join(MAP);
        let (map, claimed) = ResumeFile::open(open_rw(&path)?, *id, pieces).map_err(at(&path))?;
        // Last, and anew: its time says when the entry was last used.
        let (path, new) = (dir.join(MANIFEST), dir.join("manifest.new"));
        fs::write(&new, encoded).map_err(at(&new))?;
        fs::rename(&new, &path).map_err(at(&path))?;
        Ok((storage, map, claimed.unwrap_or_else(|| Bitmap::new(pieces))))
    }

    fn path(&self, id: &ManifestId) -> PathBuf {
        self.dir.join(hex::encode(id))
    }

    fn remove(&self, id: &ManifestId) {
        let path = self.path(id);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "an entry of the cache can't be removed");
            }
            _ => {}
        }
    }

    fn count(&self, slots: &HashMap<ManifestId, Slot>) {
        let bytes: u64 = slots.values().map(|slot| slot.bytes).sum();
        self.metrics.cache_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        self.metrics
            .cache_entries
            .set(i64::try_from(slots.len()).unwrap_or(i64::MAX));
    }
}

/// What an earlier life has left.
fn look(dir: &Path, id: &ManifestId) -> Result<Slot, CacheError> {
    let wrong = |text: &str| at(dir)(io::Error::other(text.to_owned()));
    let path = dir.join(MANIFEST);
    let encoded = fs::read(&path).map_err(at(&path))?;
    if <[u8; 32]>::from(Sha256::digest(&encoded)) != *id {
        return Err(wrong("the manifest is not the one that the entry is named by"));
    }
    let manifest = Manifest::decode(&encoded[..]).map_err(|error| at(&path)(io::Error::other(error)))?;
    let geometry = gse_bt::Geometry::new(manifest.total, manifest.piece_length)
        .map_err(|error| at(&path)(io::Error::other(error)))?;
    let content = dir.join(CONTENT);
    if fs::metadata(&content).map_err(at(&content))?.len() != manifest.total {
        return Err(wrong("the content is not as long as the manifest says"));
    }
    let map = dir.join(MAP);
    let (_, claimed) = ResumeFile::open(open_rw(&map)?, *id, geometry.pieces()).map_err(at(&map))?;
    let used = fs::metadata(&path)
        .and_then(|meta| meta.modified())
        .map_err(at(&path))?;
    Ok(Slot {
        bytes: manifest.total,
        used,
        in_use: false,
        readers: 0,
        whole: claimed.is_some_and(|claimed| claimed.is_full()),
    })
}

impl Kept {
    /// Notes which pieces are there, once they are on the disk.
    ///
    /// # Errors
    /// When the disk does not take it; what is lost with that is time.
    pub fn save(&mut self, pieces: &Bitmap) -> Result<(), CacheError> {
        let path = self.cache.path(&self.id).join(MAP);
        if let Some(map) = &mut self.map {
            if let Some(content) = self.storage.file(0)? {
                content.sync_data().map_err(at(&path))?;
            }
            map.save(pieces).and_then(|()| map.sync()).map_err(at(&path))?;
        }
        if let Some(slot) = self.cache.slots.lock().get_mut(&self.id) {
            slot.whole = pieces.is_full();
        }
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.cache.unread(&self.id);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(slot) = self.cache.slots.lock().get_mut(&self.id) {
            (slot.in_use, slot.used) = (false, SystemTime::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(name: &str, len: usize) -> (ManifestId, Bytes, Arc<Manifest>, Vec<u8>) {
        let bytes = vec![name.as_bytes()[0]; len];
        let manifest = crate::peer::manifest_of(name, &bytes).unwrap();
        let encoded = Bytes::from(manifest.encode_to_vec());
        (Sha256::digest(&encoded).into(), encoded, Arc::new(manifest), bytes)
    }

    async fn fill(cache: &Arc<Cache>, name: &str, len: usize) -> ManifestId {
        let (id, encoded, manifest, bytes) = content(name, len);
        let mut kept = cache.enter(id, &encoded, manifest).unwrap();
        let length = kept.storage.geometry().piece_length() as usize;
        for (piece, part) in (0..).zip(bytes.chunks(length)) {
            kept.storage
                .keep(piece, vec![Bytes::copy_from_slice(part)])
                .await
                .unwrap();
        }
        kept.save(&Bitmap::full(kept.storage.geometry().pieces())).unwrap();
        id
    }

    fn open(dir: &Path) -> Arc<Cache> {
        Cache::open(dir, 500_000, Duration::from_secs(60), Metrics::default()).unwrap()
    }

    #[tokio::test]
    async fn what_was_used_longest_ago_makes_room_and_what_is_in_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path());
        let one = fill(&cache, "a", 200_000).await;
        let two = fill(&cache, "b", 200_000).await;
        assert!(cache.has(&one) && cache.has(&two));
        // Used again: now the other one is the oldest.
        let (_, encoded, manifest, _) = content("a", 200_000);
        let used = cache.enter(one, &encoded, manifest).unwrap();
        let three = fill(&cache, "c", 200_000).await;
        assert!(cache.has(&one) && !cache.has(&two) && cache.has(&three));
        assert!(!dir.path().join(hex::encode(two)).exists());
        let (id, encoded, manifest, _) = content("d", 400_000);
        assert!(matches!(
            cache.enter(id, &encoded, manifest),
            Err(CacheError::Full { .. })
        ));
        assert!(
            cache.has(&three),
            "nothing is removed in vain: it would not have helped"
        );
        drop(used);
        let read = cache.share(&one).unwrap().unwrap();
        cache.sweep(SystemTime::now() + Duration::from_secs(61));
        assert!(cache.has(&one) && !cache.has(&three), "what is read stays");
        drop(read);
        cache.sweep(SystemTime::now() + Duration::from_secs(61));
        assert!(!cache.has(&one) && !cache.has(&three));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_restart_takes_up_what_is_good_and_removes_what_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (good, bad) = {
            let cache = open(dir.path());
            (fill(&cache, "a", 100_000).await, fill(&cache, "b", 100_000).await)
        };
        fs::write(dir.path().join(hex::encode(bad)).join(MANIFEST), b"something else").unwrap();
        fs::write(dir.path().join("a stranger's file"), b"").unwrap();
        let cache = open(dir.path());
        assert!(cache.has(&good) && !cache.has(&bad));
        assert!(!dir.path().join(hex::encode(bad)).exists() && dir.path().join("a stranger's file").exists());
        // A piece that was spoilt on the disk is found out before it is offered.
        let path = dir.path().join(hex::encode(good)).join(CONTENT);
        let mut bytes = fs::read(&path).unwrap();
        bytes[70_000] ^= 1;
        fs::write(&path, bytes).unwrap();
        let (_, encoded, manifest, _) = content("a", 100_000);
        let kept = cache.enter(good, &encoded, manifest).unwrap();
        assert!(kept.claimed.is_full());
        let found = kept.storage.verify(kept.claimed.clone()).await.unwrap();
        assert_eq!(found.ones().collect::<Vec<_>>(), [0]);
    }
}
