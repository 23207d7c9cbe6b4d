//! Bringing content to its place: part files beside it, digests, modes and owners, renames. Everything in here blocks and belongs on a
//! blocking thread; paths are touched by a worker only, bytes go through the files that it has opened.

use std::fs::{File, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use bytes::Bytes;
use gse_proto::codes::Inner;
use gse_proto::file::{Entry, EntryKind, Manifest, Placing};
use nix::unistd::{Gid, Uid, fchown};
use sha2::{Digest, Sha256};

use super::cell::Key;
use super::config::FilesConfig;
use super::names;
use super::stop::Stop;
use super::worker::wire::{Again, Create, Discard, Enter, Finish, Put, Same, What};
use super::worker::{Failed, Worker};
use crate::account;

/// Bytes read or written between two looks at whether to go on.
pub(super) const CHUNK: usize = 256 << 10;
/// Mode of a file that is pushed without one.
const PUSHED: u32 = 0o644;
/// More files than this are synced by their file system in one go.
const SYNC_EACH: usize = 256;

/// A failure of reading or writing through an open file at the target.
pub(super) fn writing(what: &str, error: &io::Error) -> Failed {
    let code = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Inner::NoSpace,
        _ => Inner::Place,
    };
    Failed::new(code, format!("{what}: {error}"))
}

/// The account that a placing or a source names.
pub(super) fn account_of(config: &FilesConfig, user: &str) -> Result<String, Failed> {
    let user = if user.is_empty() { "root" } else { user };
    if config.allows(user) {
        return Ok(user.to_owned());
    }
    Err(Failed::new(
        Inner::Limit,
        format!("this agent's settings (files.allowed_accounts) do not allow files of {user}"),
    ))
}

/// What the names of everything that an order leaves unfinished end with, and no other's.
fn part_tail(key: &Key) -> String {
    let tag = hex::encode(&Sha256::digest(key.task_id.as_bytes())[..6]);
    format!(".gse.{tag}-{}.part", key.order)
}

/// Removes what an earlier life of the agent has left of an order, as the account that made it. Without a directory there is nothing.
pub(super) fn sweep(config: &FilesConfig, key: &Key, placing: &Placing) -> Result<(), Failed> {
    let worker = Worker::start(&config.self_exec, &account_of(config, &placing.user)?)?;
    let entered = worker.ask(What::Enter(Enter {
        dir: placing.dir.clone(),
        make_dirs: false,
        roots: config.target_dirs.clone(),
        stage: vec![],
    }));
    match entered {
        Ok(_) => worker.ask(What::Sweep(part_tail(key).into_bytes())).map(drop),
        Err(error) if error.code == Inner::NoTargetDir.code() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Name of what is unfinished: beside the target, told from every other order's.
pub(super) fn part_name(name: &[u8], key: &Key) -> Vec<u8> {
    let tail = part_tail(key);
    let keep = name.len().min(255 - 1 - tail.len());
    let mut part = Vec::with_capacity(255);
    part.push(b'.');
    part.extend_from_slice(&name[..keep]);
    part.extend_from_slice(tail.as_bytes());
    part
}

/// Tells a file from every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct FileId(u64, u64);

impl FileId {
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self(meta.dev(), meta.ino()))
    }
}

/// A target directory in which something is being put together.
#[derive(Debug)]
pub(super) struct Place {
    worker: Worker,
    key: Key,
    owner: Option<(Uid, Gid)>,
    mode: u32,
    free: u64,
    /// Where it really is, for messages.
    pub(super) real: String,
    /// Name that replaces the only one at the top.
    name: Vec<u8>,
    parts: Vec<Vec<u8>>,
    /// Directories above the target directory, and itself, that were made for it.
    made: Vec<File>,
    staged: bool,
    keep: u64,
}

impl Place {
    /// Has the account enter the directory. `tree`: the name of what is put together, if that is more than one file.
    pub(super) fn enter(
        config: &FilesConfig,
        placing: &Placing,
        key: &Key,
        tree: Option<&[u8]>,
    ) -> Result<Self, Failed> {
        let user = account_of(config, &placing.user)?;
        let owner = match placing.owner.as_str() {
            "" => None,
            owner if owner == user => None,
            owner => {
                let found = account::look_up(owner)?;
                if !Uid::effective().is_root() {
                    return Err(Failed::new(
                        Inner::System,
                        format!("the agent is not root and can't give files to {owner}"),
                    ));
                }
                Some((found.uid, found.gid))
            }
        };
        if !placing.name.is_empty() && !names::plain(placing.name.as_bytes()) {
            return Err(Failed::new(
                Inner::Arguments,
                format!("{:?} is not a plain file name", placing.name),
            ));
        }
        let worker = Worker::start(&config.self_exec, &user)?;
        let (said, made) = worker.ask(What::Enter(Enter {
            dir: placing.dir.clone(),
            make_dirs: placing.make_dirs,
            roots: config.target_dirs.clone(),
            stage: tree.map(|name| part_name(name, key)).unwrap_or_default(),
        }))?;
        Ok(Self {
            worker,
            key: key.clone(),
            owner,
            mode: placing.mode & 0o7777,
            free: said.free,
            real: said.real,
            name: placing.name.as_bytes().to_vec(),
            parts: vec![],
            made,
            staged: tree.is_some(),
            keep: config.min_free_disk_bytes,
        })
    }

    /// Whether there is room for so many bytes, of which `have` are there already.
    pub(super) fn check_room(&self, bytes: u64, have: u64) -> Result<(), Failed> {
        let need = bytes.saturating_sub(have);
        if need > 0 && self.free < need.saturating_add(self.keep) {
            return Err(Failed::new(
                Inner::NoSpace,
                format!(
                    "{} has {} MiB free; {} MiB are to be written, and {} MiB have to stay free",
                    self.real,
                    self.free >> 20,
                    need.div_ceil(1 << 20),
                    self.keep >> 20
                ),
            ));
        }
        Ok(())
    }

    fn give(&self, file: &File) -> Result<(), Failed> {
        if let Some((uid, gid)) = self.owner {
            fchown(file, Some(uid), Some(gid)).map_err(|e| {
                Failed::new(
                    Inner::Place,
                    format!("{}: the owner can't be set: {}", self.real, e.desc()),
                )
            })?;
        }
        Ok(())
    }

    /// The part file of entry `n`, made anew or, `again`, taken up.
    pub(super) fn create(&mut self, n: usize, name: &[u8], again: bool) -> Result<File, Failed> {
        let part = self.part(n, name);
        let (file, _) = self.worker.file(What::Create(Create {
            part: part.clone(),
            again,
        }))?;
        if !self.parts.contains(&part) || self.staged {
            self.parts.push(part);
        }
        // At once, so that nobody but the new owner can write to it on the way.
        self.give(&file)?;
        Ok(file)
    }

    /// Opens the part file of an entry once more, or what it has become at its place. Without `parts`, it can only be there. It has to be
    /// the file that it was.
    pub(super) fn again(&self, n: usize, entry: &Entry, parts: bool, id: FileId) -> Result<File, Failed> {
        let path = self.target_path(entry);
        let part = match path.last() {
            Some(name) if parts => self.part(n, name),
            _ => vec![],
        };
        let what = format!(
            "{}/{}",
            self.real,
            path.iter()
                .map(|part| String::from_utf8_lossy(part))
                .collect::<Vec<_>>()
                .join("/")
        );
        let (file, said) = self.worker.file_and(What::Again(Again { part, path }))?;
        if FileId::of(&file).map_err(|e| writing(&what, &e))? != id {
            return Err(Failed::new(
                Inner::Changed,
                format!("{what} was replaced by something else"),
            ));
        }
        if !said.yes {
            return Ok(file);
        }
        // It belongs to its owner by now, and the account that writes has no right to it. Giving files away takes root: so the agent, which
        // has made this very file, can open it by itself.
        let name = format!("/proc/self/fd/{}", file.as_raw_fd());
        File::options()
            .read(true)
            .write(true)
            .open(&name)
            .or_else(|_| File::open(&name))
            .map_err(|e| writing(&what, &e))
    }

    /// An earlier life may have left the part file of entry `n`: it goes with the others if nothing comes of this.
    pub(super) fn expect(&mut self, n: usize, name: &[u8]) {
        let part = self.part(n, name);
        self.parts.push(part);
    }

    fn part(&self, n: usize, name: &[u8]) -> Vec<u8> {
        if self.staged {
            n.to_string().into_bytes()
        } else {
            part_name(name, &self.key)
        }
    }

    /// Mode of an entry; of one that has no source there is none to take over.
    pub(super) fn mode_of(&self, from_source: Option<u32>) -> u32 {
        match (self.mode, from_source) {
            (0, None) => PUSHED,
            // Rights beyond the ordinary ones are given only if they are asked for.
            (0, Some(mode)) => mode & 0o777,
            (mode, _) => mode,
        }
    }

    /// The last words about a part file's content: its mode, and on the disk.
    pub(super) fn settle(&self, file: &File, mode: u32, sync: bool) -> Result<(), Failed> {
        let set = file.set_permissions(Permissions::from_mode(mode));
        set.map_err(|e| writing(&format!("{}: the mode can't be set", self.real), &e))?;
        if sync {
            file.sync_all().map_err(|e| writing(&self.real, &e))?;
        }
        Ok(())
    }

    /// The path at which an entry is put: the first part is replaced by the new name, if there is one.
    fn target_path(&self, entry: &Entry) -> Vec<Vec<u8>> {
        let mut path: Vec<Vec<u8>> = entry.path.iter().map(|part| part.to_vec()).collect();
        if let Some(top) = path.first_mut()
            && !self.name.is_empty()
        {
            top.clone_from(&self.name);
        }
        path
    }

    /// Names at the top of what would be written.
    pub(super) fn tops(&self, manifest: &Manifest) -> Vec<Vec<u8>> {
        let tops = manifest.entries.iter().filter(|entry| entry.path.len() == 1);
        tops.filter_map(|entry| self.target_path(entry).into_iter().next())
            .collect()
    }

    /// Whether what would be written is the source itself.
    pub(super) fn is_source(&self, dir: &str, whole: bool, manifest: &Manifest) -> Result<bool, Failed> {
        // Under another name it is another file.
        let renamed = manifest
            .entries
            .iter()
            .filter(|entry| entry.path.len() == 1)
            .any(|entry| self.target_path(entry).first().map(Vec::as_slice) != entry.path.first().map(AsRef::as_ref));
        if renamed {
            return Ok(false);
        }
        let (said, _) = self.worker.ask(What::Same(Same {
            dir: dir.to_owned(),
            tops: self.tops(manifest),
            whole,
        }))?;
        Ok(said.yes)
    }

    /// Everything written so far is on the disk, in one go.
    pub(super) fn sync_all(&self) -> Result<(), Failed> {
        self.worker.ask(What::Sync(true)).map(drop)
    }

    /// Puts a finished part file in its place.
    pub(super) fn put_file(&self, name: &[u8]) -> Result<(), Failed> {
        self.put(EntryKind::File, vec![name.to_vec()], self.part(0, name), 0, &[])
    }

    fn put(&self, kind: EntryKind, path: Vec<Vec<u8>>, part: Vec<u8>, mode: u32, link: &[u8]) -> Result<(), Failed> {
        let put = Put {
            kind: kind.into(),
            path,
            part,
            mode,
            link: link.to_vec(),
        };
        self.worker.ask(What::Put(put)).map(drop)
    }

    /// Puts everything of a manifest in its place, directories first; every part file is complete.
    pub(super) fn put_all(&self, manifest: &Manifest, stop: &Stop) -> Result<(), Failed> {
        let mut dirs = Vec::new();
        for (n, entry) in manifest.entries.iter().enumerate() {
            stop.check()?;
            let path = self.target_path(entry);
            let kind = EntryKind::try_from(entry.kind).unwrap_or_default();
            let name = path.last().cloned().unwrap_or_default();
            let part = match kind {
                EntryKind::Directory => vec![],
                _ => self.part(n, &name),
            };
            if kind == EntryKind::Directory {
                dirs.push(Put {
                    kind: kind.into(),
                    path: path.clone(),
                    part: vec![],
                    mode: dir_mode(self.mode_of(Some(entry.mode))),
                    link: vec![],
                });
            }
            self.put(kind, path, part, entry.mode, &entry.link)?;
        }
        self.finish(dirs)
    }

    /// Directories get their modes and their owner, and are synced.
    pub(super) fn finish(&self, dirs: Vec<Put>) -> Result<(), Failed> {
        if self.owner.is_none() {
            return self.worker.ask(What::Finish(Finish { dirs })).map(drop);
        }
        self.worker.ask(What::Finish(Finish { dirs: vec![] }))?;
        // Only now: the account that writes may have no right to what belongs to the owner. The innermost first, for the same reason.
        for dir in dirs.into_iter().rev() {
            let mode = dir.mode;
            let (_, opened) = self.worker.ask(What::Fresh(dir))?;
            for dir in &opened {
                self.give(dir)?;
                self.settle(dir, mode & 0o7777, false)?;
            }
        }
        self.made.iter().rev().try_for_each(|dir| self.give(dir))
    }

    /// Removes what is unfinished. The failure that led here is the one to tell; what can't be removed now is for the log.
    pub(super) fn discard(&self) {
        let parts = if self.staged { vec![] } else { self.parts.clone() };
        if let Err(error) = self.worker.ask(What::Discard(Discard { parts })) {
            tracing::warn!(dir = self.real, %error, "unfinished files could not be removed");
        }
    }
}

/// Who may read a directory may enter it.
fn dir_mode(mode: u32) -> u32 {
    mode | ((mode & 0o444) >> 2)
}

/// Writes content and says what its digest is.
pub(super) fn copy(
    mut from: impl Read,
    to: &mut File,
    stop: &Stop,
    what: &str,
    mut moved: impl FnMut(u64),
) -> Result<(u64, [u8; 32]), Failed> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut total = 0;
    loop {
        stop.check()?;
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Failed::new(Inner::Read, format!("{what}: {e}"))),
        };
        hash.update(&buffer[..n]);
        to.write_all(&buffer[..n]).map_err(|e| writing(what, &e))?;
        total += n as u64;
        moved(n as u64);
    }
    Ok((total, hash.finalize().into()))
}

/// SHA-256 of a whole file.
pub(super) fn digest(mut file: &File, stop: &Stop, what: &str) -> Result<[u8; 32], Failed> {
    file.rewind().map_err(|e| writing(what, &e))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        stop.check()?;
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hash.finalize().into()),
            Ok(n) => hash.update(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(writing(what, &e)),
        }
    }
}

/// Whether each of so many files is synced by itself.
pub(super) fn sync_each(files: usize) -> bool {
    files <= SYNC_EACH
}

/// Puts pushed content in its place.
pub(super) fn push(
    config: &FilesConfig,
    key: &Key,
    placing: &Placing,
    content: &Bytes,
    sha256: &[u8],
    stop: &Stop,
) -> Result<(), Failed> {
    if content.len() > config.max_inline_bytes {
        return Err(Failed::new(
            Inner::TooLarge,
            format!(
                "{} bytes of content, at most {} are taken in one piece (files.max_inline_bytes)",
                content.len(),
                config.max_inline_bytes
            ),
        ));
    }
    if !sha256.is_empty() && Sha256::digest(content)[..] != *sha256 {
        return Err(Failed::new(Inner::Digest, "the content does not match its digest"));
    }
    let name = placing.name.as_bytes();
    if !names::plain(name) {
        return Err(Failed::new(
            Inner::Arguments,
            format!("{:?} is not a plain file name", placing.name),
        ));
    }
    let mut place = Place::enter(config, placing, key, None)?;
    let done = (|| {
        place.check_room(content.len() as u64, 0)?;
        stop.check()?;
        let mut file = place.create(0, name, false)?;
        file.write_all(content)
            .map_err(|e| writing(&format!("{}/{}", place.real, placing.name), &e))?;
        place.settle(&file, place.mode_of(None), true)?;
        stop.check()?;
        place.put_file(name)?;
        place.finish(vec![])
    })();
    if done.is_err() {
        place.discard();
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_files_fit_and_differ() {
        let key = |task: &str, order| Key {
            task_id: task.to_owned(),
            order,
        };
        let name = part_name(b"a.txt", &key("T", 3));
        assert!(name.starts_with(b".a.txt.gse.") && name.ends_with(b"-3.part"));
        assert_ne!(name, part_name(b"a.txt", &key("U", 3)));
        assert!(part_name(&[0xff; 255], &key("T", u32::MAX)).len() <= 255);
    }

    #[test]
    fn directories_can_be_entered() {
        assert_eq!(
            (dir_mode(0o644), dir_mode(0o600), dir_mode(0o750)),
            (0o755, 0o700, 0o750)
        );
    }
}
