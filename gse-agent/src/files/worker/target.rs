//! The worker's side of a target: part files beside their places, then renames. The directory that was asked for may be reached through
//! links, as the account; below it no link is followed.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use gse_proto::codes::Inner;
use gse_proto::file::EntryKind;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat, mkdirat};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{Uid, UnlinkatFlags, fsync, symlinkat, syncfs, unlinkat};

use super::wire::{Again, Create, Enter, Put, Same};
use super::{Failed, at_target, shown};
use crate::files::names;

const DIR: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);
/// Enough to be told from others, needs no right to read.
const PLACE: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);
const PART: OFlag = OFlag::O_RDWR
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_CLOEXEC);
/// What was put at its place is only read.
const PLACED: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_CLOEXEC);
/// Tells which file it is, without any right to it.
const WHICH: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

fn name_of(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

/// The target directory of one transfer.
pub(super) struct Target {
    dir: OwnedFd,
    real: String,
    stage: Option<(Vec<u8>, OwnedFd)>,
    /// There was a stage from the beginning.
    staged: bool,
    /// Directories in which something was put, as paths below the target directory.
    touched: BTreeSet<Vec<Vec<u8>>>,
    /// Directories that were made here.
    fresh: BTreeSet<Vec<Vec<u8>>>,
}

impl Target {
    /// Opens the directory, and makes it if that is asked for; also returns the directories that were made.
    pub(super) fn enter(ask: &Enter) -> Result<(Self, Vec<OwnedFd>), Failed> {
        let parts = names::absolute(&ask.dir, "target")?;
        let (dir, made) = match open(name_of(ask.dir.as_bytes()), DIR, Mode::empty()) {
            Ok(dir) => (dir, vec![]),
            Err(Errno::ENOENT) if ask.make_dirs => make_dirs(ask, &parts)?,
            Err(Errno::ENOENT) => {
                return Err(Failed::new(
                    Inner::NoTargetDir,
                    format!("the target directory {} does not exist, and is not to be made", ask.dir),
                ));
            }
            Err(error @ (Errno::ENOTDIR | Errno::ELOOP)) => {
                return Err(Failed::new(
                    Inner::NoTargetDir,
                    format!("the target directory {}: {}", ask.dir, error.desc()),
                ));
            }
            Err(error) => return Err(at_target(&format!("the target directory {}", ask.dir), error)),
        };
        let real = names::real_path(&dir).map_err(|e| at_target(&ask.dir, e))?;
        check_roots(&real, ask)?;
        let mut this = Self {
            dir,
            real,
            stage: None,
            staged: !ask.stage.is_empty(),
            touched: BTreeSet::new(),
            fresh: BTreeSet::new(),
        };
        if !ask.stage.is_empty() {
            this.stage = Some(this.open_stage(&ask.stage)?);
        }
        Ok((this, made))
    }

    fn open_stage(&self, name: &[u8]) -> Result<(Vec<u8>, OwnedFd), Failed> {
        check_plain(name)?;
        let what = format!("{}/{}", self.real, shown(&[name.to_vec()]));
        match mkdirat(&self.dir, name_of(name), Mode::S_IRWXU) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(at_target(&what, error)),
        }
        let stage = openat(&self.dir, name_of(name), DIR | OFlag::O_NOFOLLOW, Mode::empty())
            .map_err(|e| at_target(&what, e))?;
        let stat = fstat(&stage).map_err(|e| at_target(&what, e))?;
        if stat.st_uid != Uid::effective().as_raw() {
            return Err(Failed::new(
                Inner::Place,
                format!("{what} belongs to somebody else; remove it"),
            ));
        }
        Ok((name.to_vec(), stage))
    }

    /// Where the directory really is.
    pub(super) fn real(&self) -> &str {
        &self.real
    }

    /// Bytes that this account may still write there.
    pub(super) fn free(&self) -> Result<u64, Failed> {
        let stat = fstatvfs(&self.dir).map_err(|e| at_target(&self.real, e))?;
        let blocks = if Uid::effective().is_root() {
            stat.blocks_free()
        } else {
            stat.blocks_available()
        };
        Ok(blocks.saturating_mul(stat.fragment_size()))
    }

    /// Whether what would be written is the source itself.
    pub(super) fn same(&self, ask: &Same) -> bool {
        let identity = |fd: &OwnedFd| fstat(fd).ok().map(|stat| (stat.st_dev, stat.st_ino));
        let Ok(source) = open(name_of(ask.dir.as_bytes()), PLACE, Mode::empty()) else {
            return false;
        };
        if !ask.whole {
            return identity(&source) == identity(&self.dir);
        }
        let Some(top) = ask.tops.first().filter(|top| names::plain(top)) else {
            return false;
        };
        openat(&self.dir, name_of(top), PLACE, Mode::empty()).is_ok_and(|there| identity(&there) == identity(&source))
    }

    fn base(&self) -> &OwnedFd {
        self.stage.as_ref().map_or(&self.dir, |(_, stage)| stage)
    }

    fn named(&self, part: &[u8]) -> String {
        format!("{}/{}", self.real, shown(&[part.to_vec()]))
    }

    /// Makes a part file, or takes up that of an earlier run.
    pub(super) fn create(&mut self, ask: &Create) -> Result<OwnedFd, Failed> {
        check_plain(&ask.part)?;
        let (base, part) = (self.base(), name_of(&ask.part));
        if ask.again
            && let Ok(old) = openat(base, part, PART, Mode::empty())
            && let Ok(stat) = fstat(&old)
            && stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits()
            && stat.st_nlink == 1
            && stat.st_uid == Uid::effective().as_raw()
        {
            return Ok(old);
        }
        match unlinkat(base, part, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(error) => {
                return Err(at_target(&format!("{} can't be removed", self.named(&ask.part)), error));
            }
        }
        openat(
            base,
            part,
            PART | OFlag::O_CREAT | OFlag::O_EXCL,
            Mode::S_IRUSR | Mode::S_IWUSR,
        )
        .map_err(|e| at_target(&format!("{} can't be made", self.named(&ask.part)), e))
    }

    /// Opens a part file once more, or what it has become at its place; also says whether that is no more than a name for it, since the
    /// account has no right to it any more. Whether it is still the file that it was is for the agent to tell.
    pub(super) fn again(&self, ask: &Again) -> Result<(OwnedFd, bool), Failed> {
        if !ask.part.is_empty() && self.stage.is_some() == self.staged {
            check_plain(&ask.part)?;
            match open_any(self.base(), name_of(&ask.part), &[PART, PLACED, WHICH]) {
                Err(Errno::ENOENT) => {}
                opened => return opened.map_err(|e| at_target(&self.named(&ask.part), e)),
            }
        }
        let Some((name, dirs)) = ask.path.split_last() else {
            return Err(Failed::new(Inner::Arguments, "an entry without a name"));
        };
        for part in &ask.path {
            check_plain(part)?;
        }
        let parent = self.parent(dirs)?;
        open_any(&parent, name_of(name), &[PLACED, WHICH])
            .map_err(|e| at_target(&format!("{}/{}", self.real, shown(&ask.path)), e))
    }

    /// Opens the directory that holds `path`, below the target directory, through no link.
    fn parent(&self, path: &[Vec<u8>]) -> Result<OwnedFd, Failed> {
        let mut here = openat(&self.dir, ".", DIR, Mode::empty()).map_err(|e| at_target(&self.real, e))?;
        for (depth, part) in path.iter().enumerate() {
            here = openat(&here, name_of(part), DIR | OFlag::O_NOFOLLOW, Mode::empty()).map_err(|error| {
                let what = format!("{}/{}", self.real, shown(&path[..=depth]));
                match error {
                    Errno::ENOTDIR | Errno::ELOOP => Failed::new(
                        Inner::Place,
                        format!("{what} is there and is no directory (links are not followed here)"),
                    ),
                    error => at_target(&what, error),
                }
            })?;
        }
        Ok(here)
    }

    /// Puts one entry at its place. Of a directory it returns the open directory if it was made here.
    pub(super) fn put(&mut self, ask: &Put) -> Result<Option<OwnedFd>, Failed> {
        let Some((name, dirs)) = ask.path.split_last() else {
            return Err(Failed::new(Inner::Arguments, "an entry without a name"));
        };
        for part in &ask.path {
            check_plain(part)?;
        }
        let parent = self.parent(dirs)?;
        let what = format!("{}/{}", self.real, shown(&ask.path));
        let made = match EntryKind::try_from(ask.kind) {
            Ok(EntryKind::Directory) => match mkdirat(&parent, name_of(name), Mode::S_IRWXU) {
                Ok(()) => {
                    self.fresh.insert(ask.path.clone());
                    Some(self.parent(&ask.path)?)
                }
                Err(Errno::EEXIST) => {
                    self.parent(&ask.path)?;
                    return Ok(None);
                }
                Err(error) => return Err(at_target(&what, error)),
            },
            Ok(EntryKind::Symlink) => {
                check_plain(&ask.part)?;
                if !names::stays_inside(&ask.path, &ask.link) {
                    return Err(Failed::new(
                        Inner::Arguments,
                        format!("{what} would be a link that leads outside"),
                    ));
                }
                let (base, part) = (self.base(), name_of(&ask.part));
                match unlinkat(base, part, UnlinkatFlags::NoRemoveDir) {
                    Ok(()) | Err(Errno::ENOENT) => {}
                    Err(error) => return Err(at_target(&what, error)),
                }
                symlinkat(name_of(&ask.link), base, part).map_err(|e| at_target(&what, e))?;
                self.rename(&ask.part, &parent, name, &what)?;
                None
            }
            Ok(EntryKind::File) => {
                check_plain(&ask.part)?;
                self.rename(&ask.part, &parent, name, &what)?;
                None
            }
            Err(_) => return Err(Failed::new(Inner::Arguments, format!("{what} is of an unknown kind"))),
        };
        self.touched.insert(dirs.to_vec());
        Ok(made)
    }

    /// Opens a directory below the target directory if it was made here.
    pub(super) fn fresh(&self, path: &[Vec<u8>]) -> Result<Option<OwnedFd>, Failed> {
        match self.fresh.contains(path) {
            true => self.parent(path).map(Some),
            false => Ok(None),
        }
    }

    fn rename(&self, part: &[u8], parent: &OwnedFd, name: &[u8], what: &str) -> Result<(), Failed> {
        match renameat(self.base(), name_of(part), parent, name_of(name)) {
            Ok(()) => Ok(()),
            Err(Errno::EISDIR | Errno::ENOTEMPTY | Errno::EEXIST) => Err(Failed::new(
                Inner::Place,
                format!("{what} is a directory; a file can't take its place"),
            )),
            Err(error) => Err(at_target(&format!("{what} can't be put in its place"), error)),
        }
    }

    /// Removes part files, and the stage with everything in it.
    pub(super) fn discard(&mut self, parts: &[Vec<u8>]) -> Result<(), Failed> {
        for part in parts {
            check_plain(part)?;
            match unlinkat(self.base(), name_of(part), UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(error) => {
                    return Err(at_target(&format!("{} can't be removed", self.named(part)), error));
                }
            }
        }
        self.remove_stage()
    }

    fn remove_stage(&mut self) -> Result<(), Failed> {
        let Some((name, stage)) = self.stage.take() else {
            return Ok(());
        };
        let what = self.named(&name);
        let mut listing = openat(&stage, ".", DIR, Mode::empty())
            .and_then(Dir::from_fd)
            .map_err(|e| at_target(&what, e))?;
        for entry in listing.iter().flatten() {
            let file = entry.file_name();
            if file.to_bytes() != b"." && file.to_bytes() != b".." {
                unlinkat(&stage, file, UnlinkatFlags::NoRemoveDir).map_err(|e| at_target(&what, e))?;
            }
        }
        match unlinkat(&self.dir, name_of(&name), UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(at_target(&what, error)),
        }
    }

    /// Removes part files and stages whose names end with `ending`, which only those of one order do.
    pub(super) fn sweep(&mut self, ending: &[u8]) -> Result<(), Failed> {
        check_plain(ending)?;
        let mut listing = openat(&self.dir, ".", DIR, Mode::empty())
            .and_then(Dir::from_fd)
            .map_err(|e| at_target(&self.real, e))?;
        let mut left = Vec::new();
        for entry in listing.iter() {
            let entry = entry.map_err(|e| at_target(&self.real, e))?;
            let name = entry.file_name().to_bytes();
            if name.starts_with(b".") && name.ends_with(ending) {
                left.push(name.to_vec());
            }
        }
        for name in left {
            match openat(&self.dir, name_of(&name), DIR | OFlag::O_NOFOLLOW, Mode::empty()) {
                Ok(stage) => {
                    self.stage = Some((name, stage));
                    self.remove_stage()?;
                }
                Err(Errno::ENOTDIR | Errno::ELOOP) => {
                    match unlinkat(&self.dir, name_of(&name), UnlinkatFlags::NoRemoveDir) {
                        Ok(()) | Err(Errno::ENOENT) => {}
                        Err(error) => return Err(at_target(&format!("{} can't be removed", self.named(&name)), error)),
                    }
                }
                Err(Errno::ENOENT) => {}
                Err(error) => return Err(at_target(&self.named(&name), error)),
            }
        }
        Ok(())
    }

    /// Everything that was written to this file system is on the disk.
    pub(super) fn sync_all(&self) -> Result<(), Failed> {
        syncfs(&self.dir).map_err(|e| at_target(&format!("{} can't be synced", self.real), e))
    }

    /// Everything is at its place: directories get their modes and are synced, the stage goes.
    pub(super) fn finish(&mut self, dirs: &[Put]) -> Result<(), Failed> {
        self.remove_stage()?;
        for path in std::mem::take(&mut self.touched) {
            let dir = self.parent(&path)?;
            sync(&dir, &self.real)?;
        }
        // The innermost first: a directory without rights for its owner can't be entered any more.
        for dir in dirs.iter().rev() {
            if self.fresh.contains(&dir.path) {
                let open = self.parent(&dir.path)?;
                fchmod(&open, Mode::from_bits_truncate(dir.mode & 0o7777))
                    .map_err(|e| at_target(&format!("{}/{}", self.real, shown(&dir.path)), e))?;
            }
        }
        sync(&self.dir, &self.real)
    }
}

/// Opens a file in the first of these ways that the account has the right to; whether that was only to know which it is.
fn open_any(at: &OwnedFd, name: &OsStr, ways: &[OFlag]) -> Result<(OwnedFd, bool), Errno> {
    let mut last = Errno::EACCES;
    for way in ways {
        match openat(at, name, *way, Mode::empty()) {
            Ok(file) => return Ok((file, *way == WHICH)),
            Err(error @ (Errno::EACCES | Errno::EPERM | Errno::ETXTBSY | Errno::EROFS)) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

fn sync(dir: &OwnedFd, what: &str) -> Result<(), Failed> {
    match fsync(dir) {
        // Some file systems do not know this for directories.
        Ok(()) | Err(Errno::EINVAL | Errno::EROFS) => Ok(()),
        Err(error) => Err(at_target(&format!("{what} can't be synced"), error)),
    }
}

fn check_plain(name: &[u8]) -> Result<(), Failed> {
    if names::plain(name) {
        return Ok(());
    }
    Err(Failed::new(
        Inner::Arguments,
        format!("{:?} is not a plain file name", String::from_utf8_lossy(name)),
    ))
}

fn check_roots(real: &str, ask: &Enter) -> Result<(), Failed> {
    if names::within(real, &ask.roots) {
        return Ok(());
    }
    Err(Failed::new(
        Inner::Limit,
        format!(
            "the target {real} is in none of the directories that this agent's settings (files.target_dirs) allow: {}",
            ask.roots.join(", ")
        ),
    ))
}

/// Makes what is missing of a path, as the account. Links lead to what exists; nothing is made through one.
fn make_dirs(ask: &Enter, parts: &[Vec<u8>]) -> Result<(OwnedFd, Vec<OwnedFd>), Failed> {
    let path_of = |count: usize| {
        let mut path = vec![b'/'];
        path.extend_from_slice(&parts[..count].join(&b'/'));
        path
    };
    let mut existing = parts.len();
    let mut here = loop {
        existing = existing.saturating_sub(1);
        let path = path_of(existing);
        match open(name_of(&path), DIR, Mode::empty()) {
            Ok(dir) => break dir,
            // Without the right to list it can still be walked through.
            Err(Errno::EACCES) if open(name_of(&path), PLACE, Mode::empty()).is_ok() => {
                break open(name_of(&path), PLACE, Mode::empty()).map_err(|e| at_target(&ask.dir, e))?;
            }
            Err(Errno::ENOENT) if existing > 0 => {}
            Err(error @ (Errno::ENOTDIR | Errno::ELOOP)) => {
                return Err(Failed::new(
                    Inner::NoTargetDir,
                    format!("{}: {}", String::from_utf8_lossy(&path), error.desc()),
                ));
            }
            Err(error) => {
                return Err(at_target(&String::from_utf8_lossy(&path), error));
            }
        }
    };
    let mut real = names::real_path(&here).map_err(|e| at_target(&ask.dir, e))?;
    for part in &parts[existing..] {
        real.push('/');
        real.push_str(&String::from_utf8_lossy(part));
    }
    check_roots(&real, ask)?;
    let mut made = Vec::new();
    for (at, part) in parts.iter().enumerate().skip(existing) {
        let path = String::from_utf8_lossy(&path_of(at + 1)).into_owned();
        let fresh = match mkdirat(&here, name_of(part), Mode::from_bits_truncate(0o755)) {
            Ok(()) => true,
            // Somebody else was quicker; what is there now is judged like anything that was there before.
            Err(Errno::EEXIST) => false,
            Err(error) => return Err(at_target(&format!("the directory {path} can't be made"), error)),
        };
        let next = openat(&here, name_of(part), DIR | OFlag::O_NOFOLLOW, Mode::empty()).map_err(|error| {
            Failed::new(
                Inner::NoTargetDir,
                format!("{path} is there and is no directory: {}", error.desc()),
            )
        })?;
        if fresh {
            fsync(&here).ok(); // a directory that may not be read can't be synced; the next start makes it again
            made.push(
                next.as_fd()
                    .try_clone_to_owned()
                    .map_err(|e| Failed::new(Inner::System, e.to_string()))?,
            );
        }
        here = next;
    }
    Ok((here, made))
}

#[cfg(test)]
mod tests;
