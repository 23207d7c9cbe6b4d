//! The agent's memory on disk: which targets it has been given, which of them may have been started, what their rows were. One
//! directory per target under `tasks/`; everything in here blocks and belongs on a blocking thread.
//!
//! What makes "at most once" true: `intent` is on disk before a dispatch counts as taken, `N.starting` is on disk before the runner
//! of atomic task N is started, and the epoch changes when any of that may have been lost.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use gse_proto::session::{Dispatch, TargetRef};
use prost::Message;
use rand::{Rng, RngExt};
use sha2::{Digest, Sha256};

use super::job::{Ended, Files, Job, now_ms};
use super::record::{Record, sync_dir};

/// Space set aside for the record of an end.
const RESERVE: usize = 8 * 1024;

/// Names a target.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    /// The task.
    pub(super) task_id: String,
    /// Bucket of its target list.
    pub(super) bucket: u32,
    /// Place in the bucket.
    pub(super) index: u32,
}

impl From<&TargetRef> for Key {
    fn from(target: &TargetRef) -> Self {
        Self {
            task_id: target.task_id.clone(),
            bucket: target.bucket,
            index: target.index,
        }
    }
}

impl Key {
    /// The message form.
    pub(super) fn to_ref(&self) -> TargetRef {
        TargetRef {
            task_id: self.task_id.clone(),
            bucket: self.bucket,
            index: self.index,
        }
    }

    /// Task ids are the servers' and may hold anything: the directory's name is made from a hash.
    fn dir_name(&self) -> String {
        let hash = hex::encode(&Sha256::digest(self.task_id.as_bytes())[..16]);
        format!("{hash}-{}-{}", self.bucket, self.index)
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.task_id, self.bucket, self.index)
    }
}

/// Another process has the directory.
#[derive(Debug, thiserror::Error)]
#[error("the data directory {} is used by another agent: {reason}", root.display())]
pub(super) struct InUse {
    root: PathBuf,
    reason: String,
}

/// Why the epoch is a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Renewed {
    /// It is the old one.
    No,
    /// There was none that could be read: what an entry does not say may have been lost.
    Lost,
    /// It was another host's.
    Foreign,
}

/// What is found at a start.
#[derive(Debug)]
pub(super) enum Found {
    /// Taken and not yet forgotten.
    Live {
        /// Which.
        key: Key,
        /// How many atomic tasks.
        atomics: usize,
        /// What to do; missing when the record is damaged.
        dispatch: Option<Box<Dispatch>>,
    },
    /// Over and acknowledged; kept so that it is not started again.
    Done {
        /// Which.
        key: Key,
        /// After this moment (server's clock) nobody may start it anyway.
        not_after_ms: u64,
        /// What it reported.
        ends: Vec<Ended>,
    },
}

/// An open journal; holds the directory's lock.
#[derive(Debug)]
pub(super) struct Journal {
    root: PathBuf,
    epoch: Bytes,
    renewed: Renewed,
    _lock: File,
}

fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).recursive(true).create(path)
}

impl Journal {
    /// Opens or begins the journal in `root`.
    ///
    /// # Errors
    /// When the directory cannot be used or another agent uses it.
    pub(super) fn open(root: &Path, machine_id: &str) -> anyhow::Result<Self> {
        if root.as_os_str().is_empty() {
            bail!("no data directory is set for running scripts");
        }
        let what = || format!("the agent's data directory {} cannot be used", root.display());
        let tasks = root.join("tasks");
        make_dir(&tasks).with_context(what)?;
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(root.join("lock"))
            .with_context(what)?;
        if let Err(error) = lock.try_lock() {
            return Err(anyhow::Error::new(InUse {
                root: root.to_owned(),
                reason: error.to_string(),
            }));
        }
        let (epoch, renewed) = Self::epoch_of(root, machine_id).with_context(what)?;
        sync_dir(root).with_context(what)?;
        Ok(Self {
            root: root.to_owned(),
            epoch,
            renewed,
            _lock: lock,
        })
    }

    fn epoch_of(root: &Path, machine_id: &str) -> anyhow::Result<(Bytes, Renewed)> {
        let path = root.join("journal");
        let renewed = match Record::read(&path) {
            Ok(record) => match (record.need("epoch"), record.text("machine_id")) {
                (Ok(epoch), Ok(machine)) if epoch.len() >= 16 && machine == machine_id => {
                    return Ok((Bytes::copy_from_slice(epoch), Renewed::No));
                }
                (Ok(_), Ok(machine)) if machine != machine_id => Renewed::Foreign,
                _ => Renewed::Lost,
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Renewed::Lost,
            Err(error) => {
                tracing::error!(journal = %path.display(), %error, "the journal cannot be read; a new one is begun");
                fs::rename(&path, aside(root, "journal")?)?;
                Renewed::Lost
            }
        };
        if renewed == Renewed::Foreign {
            tracing::warn!(data_dir = %root.display(), "the journal was written on another host; its tasks are set aside");
            fs::rename(root.join("tasks"), aside(root, "tasks")?)?;
            make_dir(&root.join("tasks"))?;
        }
        let mut epoch = [0u8; 20];
        rand::rng().fill_bytes(&mut epoch);
        let mut record = Record::default();
        record.set("epoch", epoch).set("machine_id", machine_id);
        record.write(&path)?;
        Ok((Bytes::copy_from_slice(&epoch), renewed))
    }

    /// The journal's epoch.
    pub(super) fn epoch(&self) -> Bytes {
        self.epoch.clone()
    }

    /// Whether and why the epoch is new.
    pub(super) fn renewed(&self) -> Renewed {
        self.renewed
    }

    fn tasks(&self) -> PathBuf {
        self.root.join("tasks")
    }

    /// The directory of a target.
    pub(super) fn dir(&self, key: &Key) -> PathBuf {
        self.tasks().join(key.dir_name())
    }

    /// Records that this target has been given to this host. Returns the bytes that it takes.
    ///
    /// # Errors
    /// What the system says; then there is no entry.
    pub(super) fn take(&self, key: &Key, dispatch: &Dispatch) -> io::Result<u64> {
        let dir = self.dir(key);
        let result = (|| {
            make_dir(&dir)?;
            let mut record = key_record(key, dispatch.atomic_tasks.len(), dispatch.not_after_ms);
            // A second copy of the key alone, for an entry whose larger part is damaged.
            record.write_for_this_boot(&dir.join("key"))?;
            record.set("dispatch", dispatch.encode_to_vec());
            record.write(&dir.join("intent"))?;
            sync_dir(&dir)?;
            sync_dir(&self.tasks())
        })();
        if result.is_err() {
            // A part of an entry must not look like one that was lost; the first error is the one to tell.
            drop(fs::remove_dir_all(&dir));
        }
        result.map(|()| dispatch.encoded_len() as u64 + RESERVE as u64)
    }

    /// Records that atomic task `files` may be running from now on, with everything that the runner needs.
    ///
    /// # Errors
    /// What the system says; then it must not be started, and is not taken for started later.
    pub(super) fn before_start(&self, files: &Files, job: &Job) -> io::Result<()> {
        let result = (|| {
            job.to_record().write_for_this_boot(&files.job())?;
            let mut reserve = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(files.reserve())?;
            reserve.write_all(&[0u8; RESERVE])?;
            reserve.sync_all()?;
            File::create(files.starting())?;
            sync_dir(files.dir())
        })();
        if result.is_err() {
            for file in [files.starting(), files.job(), files.reserve()] {
                drop(fs::remove_file(file));
            }
        }
        result
    }

    /// Writes the end of an atomic task that has no runner to do so.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn leave_end(&self, files: &Files, ended: &Ended) -> io::Result<()> {
        make_dir(files.dir())?;
        ended.to_record().write(&files.end())?;
        sync_dir(files.dir())
    }

    /// Everything has been acknowledged: keeps only what prevents a second run.
    ///
    /// # Errors
    /// What the system says; then the entry is as it was, or partly removed and still known to be over.
    pub(super) fn forget(&self, key: &Key, not_after_ms: u64, ends: &[Ended]) -> io::Result<()> {
        let dir = self.dir(key);
        if !dir.exists() {
            return Ok(());
        }
        let mut record = key_record(key, ends.len(), not_after_ms);
        for (at, end) in ends.iter().enumerate() {
            record.set(format!("end.{at}"), end.to_record().encode());
        }
        record.write(&dir.join("done"))?;
        sync_dir(&dir)?;
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if entry.file_name() != "done" {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes the last trace of a target.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn remove(&self, key: &Key) -> io::Result<()> {
        match fs::remove_dir_all(self.dir(key)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Everything that earlier processes left.
    ///
    /// # Errors
    /// When the directory itself cannot be read.
    pub(super) fn load(&self) -> anyhow::Result<Vec<Found>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(self.tasks()).with_context(|| format!("{} cannot be read", self.tasks().display()))? {
            let path = entry.context("the list of tasks cannot be read")?.path();
            match self.load_one(&path) {
                Ok(Some(found)) => all.push(found),
                Ok(None) => {
                    // Begun and never taken: nobody was told that it is here.
                    fs::remove_dir_all(&path).with_context(|| format!("{} cannot be removed", path.display()))?;
                }
                Err(error) => {
                    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("entry");
                    let to = aside(&self.root, name)?;
                    tracing::error!(entry = %path.display(), moved_to = %to.display(), %error, "a task's record is damaged; it is set aside");
                    fs::rename(&path, &to).with_context(|| format!("{} cannot be set aside", path.display()))?;
                }
            }
        }
        Ok(all)
    }

    fn load_one(&self, dir: &Path) -> io::Result<Option<Found>> {
        if let Ok(record) = Record::read(&dir.join("done")) {
            let (key, atomics, not_after_ms) = read_key(&record)?;
            let ends = (0..atomics).map(|at| Ended::from_record(&Record::decode(record.need(&format!("end.{at}"))?)?));
            return Ok(Some(Found::Done {
                key,
                not_after_ms,
                ends: ends.collect::<io::Result<_>>()?,
            }));
        }
        let intent = match Record::read(&dir.join("intent")) {
            Ok(record) => record,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.join("done").exists() => return Ok(None),
            Err(error) => {
                let (key, atomics, _) = read_key(&Record::read(&dir.join("key"))?)?;
                tracing::error!(target = %key, %error, "the record of what was to be run is damaged");
                return Ok(Some(Found::Live {
                    key,
                    atomics,
                    dispatch: None,
                }));
            }
        };
        let (key, atomics, _) = read_key(&intent)?;
        let dispatch = Dispatch::decode(intent.need("dispatch")?).map(Box::new);
        Ok(Some(Found::Live {
            key,
            atomics,
            dispatch: dispatch.ok(),
        }))
    }

    /// Script directories that were used, the latest last.
    pub(super) fn script_dirs(&self) -> Vec<String> {
        // Without the list old files stay; new ones are remembered again.
        let Ok(record) = Record::read(&self.root.join("script_dirs")) else {
            return Vec::new();
        };
        (0..)
            .map_while(|at| record.text(&format!("dir.{at:06}")).ok())
            .collect()
    }

    /// Keeps the list of script directories.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn keep_script_dirs(&self, dirs: &[String]) -> io::Result<()> {
        let mut record = Record::default();
        for (at, dir) in dirs.iter().enumerate() {
            record.set(format!("dir.{at:06}"), dir);
        }
        record.write_for_this_boot(&self.root.join("script_dirs"))
    }
}

fn key_record(key: &Key, atomics: usize, not_after_ms: u64) -> Record {
    let mut record = Record::default();
    record
        .set("task_id", &key.task_id)
        .set_number("bucket", key.bucket)
        .set_number("index", key.index);
    record
        .set_number("atomics", atomics as i128)
        .set_number("not_after_ms", not_after_ms);
    record
}

fn read_key(record: &Record) -> io::Result<(Key, usize, u64)> {
    let key = Key {
        task_id: record.text("task_id")?,
        bucket: record.number("bucket")?,
        index: record.number("index")?,
    };
    Ok((key, record.number("atomics")?, record.number("not_after_ms")?))
}

/// A free name under `aside/`, where people can look at what could not be used.
fn aside(root: &Path, name: &str) -> io::Result<PathBuf> {
    let dir = root.join("aside");
    make_dir(&dir)?;
    Ok(dir.join(format!("{name}-{}-{:04x}", now_ms(), rand::rng().random::<u16>())))
}

/// How long a start waits for the lock of a process that is just ending.
pub(super) const LOCK_WAIT: Duration = Duration::from_secs(3);
