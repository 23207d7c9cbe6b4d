//! The worker's side of a source: which files are meant, and opening them. Links on the way to the source are followed, as the account;
//! within a directory that is sent they are sent as links, if they stay inside it, and never followed.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use gse_proto::codes::Inner;
use gse_proto::file::EntryKind;
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, open, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use regex::bytes::{Regex, RegexBuilder};

use super::wire::{Expand, Found};
use super::{Failed, at_source, shown};
use crate::files::names;

const DIR: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);
/// A pipe that somebody has put there must not hold the worker up.
const FILE: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_CLOEXEC)
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_NOCTTY);
/// Directories within directories.
const MAX_DEPTH: usize = 100;
/// Compiled regular expressions are not larger.
const MAX_REGEX: usize = 1 << 20;
/// Marks a name as a regular expression.
const REGEX_MARK: &str = "REGEX:";

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// What is sent, opened as far as it is needed.
pub(super) struct Source {
    /// What the paths of the entries begin in.
    base: OwnedFd,
    /// First parts of paths are names in `base`, except that of a directory that is sent under its own name.
    whole: bool,
    /// Single files may be links.
    follow_top: bool,
    entries: Vec<Found>,
    shown: String,
}

fn found(kind: EntryKind, path: Vec<Vec<u8>>, stat: &FileStat, link: Vec<u8>) -> Found {
    Found {
        kind: kind.into(),
        path,
        size: match kind {
            EntryKind::File => u64::try_from(stat.st_size).unwrap_or(0),
            _ => 0,
        },
        mode: stat.st_mode & 0o7777,
        mtime_ns: stat
            .st_mtime
            .saturating_mul(1_000_000_000)
            .saturating_add(stat.st_mtime_nsec),
        link,
        inode: stat.st_ino,
    }
}

impl Source {
    /// Finds what is meant.
    pub(super) fn expand(ask: &Expand) -> Result<(Self, Vec<Found>), Failed> {
        let dir = names::absolute(&ask.dir, "source")?;
        let base = open(OsStr::from_bytes(ask.dir.as_bytes()), DIR, Mode::empty())
            .map_err(|e| at_source(&format!("source directory {}", ask.dir), e))?;
        let real = names::real_path(&base).map_err(|e| at_source(&ask.dir, e))?;
        if !names::within(&real, &ask.roots) {
            return Err(Failed::new(
                Inner::Limit,
                format!(
                    "the source {real} is in none of the directories that this agent's settings (files.source_dirs) allow: {}",
                    ask.roots.join(", ")
                ),
            ));
        }
        let mut this = Self {
            base,
            whole: ask.name.is_empty(),
            follow_top: !ask.name.is_empty(),
            entries: vec![],
            shown: ask.dir.clone(),
        };
        let mut left = Left {
            entries: ask.max_entries,
            bytes: ask.max_bytes,
        };
        if ask.name.is_empty() {
            let Some(name) = dir.last() else {
                return Err(Failed::new(
                    Inner::Arguments,
                    "the root directory as a whole can't be a source",
                ));
            };
            let top = this
                .base
                .try_clone()
                .map_err(|e| Failed::new(Inner::Read, e.to_string()))?;
            let stat = fstat(&top).map_err(|e| at_source(&ask.dir, e))?;
            left.take(&ask.dir, 0)?;
            this.entries
                .push(found(EntryKind::Directory, vec![name.clone()], &stat, vec![]));
            this.tree(top, &mut vec![name.clone()], &mut left)?;
        } else {
            for name in this.matching(&ask.name)? {
                this.top(name, &mut left)?;
            }
            if this.entries.is_empty() {
                return Err(Failed::new(
                    Inner::NoSource,
                    format!("nothing in {} is called or matches {:?}", ask.dir, ask.name),
                ));
            }
        }
        let entries = this.entries.clone();
        Ok((this, entries))
    }

    /// Names in the directory that are meant by `name`: itself if there is such a file, or else those of plain files that it matches as
    /// wildcards or as a regular expression.
    fn matching(&self, name: &str) -> Result<Vec<Vec<u8>>, Failed> {
        if name.contains(['/', '\0']) || name == "." || name == ".." {
            let plain = name.strip_suffix('/').filter(|rest| rest.starts_with(REGEX_MARK));
            let Some(rest) = plain else {
                return Err(Failed::new(
                    Inner::Arguments,
                    format!(
                        "the source name {name:?} must not hold a slash; what is before the name belongs into the directory"
                    ),
                ));
            };
            return self.by_regex(&rest[REGEX_MARK.len()..]);
        }
        if let Some(rest) = name.strip_prefix(REGEX_MARK) {
            return self.by_regex(rest);
        }
        if fstatat(&self.base, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok() {
            return Ok(vec![name.as_bytes().to_vec()]);
        }
        if name.contains(['*', '?', '[']) {
            let matched = self.by(|candidate| names::wildcard(name.as_bytes(), candidate))?;
            if !matched.is_empty() {
                return Ok(matched);
            }
        }
        if !name.contains(['*', '?', '[', '(', '{', '+', '\\', '|', '^', '$']) {
            return Ok(vec![]);
        }
        // Not an expression: then nothing is called like that.
        self.by_regex(name).or_else(|failed| match failed.code {
            code if code == Inner::Arguments.code() => Ok(vec![]),
            _ => Err(failed),
        })
    }

    fn by_regex(&self, text: &str) -> Result<Vec<Vec<u8>>, Failed> {
        let regex: Regex = RegexBuilder::new(&format!("^(?:{text})$"))
            .unicode(false)
            .dot_matches_new_line(true)
            .size_limit(MAX_REGEX)
            .dfa_size_limit(MAX_REGEX)
            .build()
            .map_err(|e| Failed::new(Inner::Arguments, format!("{text:?} is not a regular expression: {e}")))?;
        self.by(|candidate| regex.is_match(candidate))
    }

    /// Plain files, and links to such, whose names are wanted; in order of their names.
    fn by(&self, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<Vec<u8>>, Failed> {
        let mut matched = Vec::new();
        for name in list(&self.base, &self.shown)? {
            if !wanted(&name) {
                continue;
            }
            match fstatat(&self.base, OsStr::from_bytes(&name), AtFlags::empty()) {
                Ok(stat) if kind(&stat) == SFlag::S_IFREG => matched.push(name),
                // A directory, a device, a link to nowhere: patterns mean files.
                Ok(_) | Err(nix::errno::Errno::ENOENT) => {}
                Err(error) => return Err(at_source(&format!("{}/{}", self.shown, shown(&[name])), error)),
            }
        }
        Ok(matched)
    }

    /// One file or directory by its name.
    fn top(&mut self, name: Vec<u8>, left: &mut Left) -> Result<(), Failed> {
        let what = format!("{}/{}", self.shown, shown(std::slice::from_ref(&name)));
        let stat = fstatat(&self.base, OsStr::from_bytes(&name), AtFlags::empty()).map_err(|e| at_source(&what, e))?;
        match kind(&stat) {
            SFlag::S_IFREG => {
                left.take(&what, stat.st_size)?;
                self.entries.push(found(EntryKind::File, vec![name], &stat, vec![]));
                Ok(())
            }
            SFlag::S_IFDIR => {
                let top = openat(&self.base, OsStr::from_bytes(&name), DIR, Mode::empty())
                    .map_err(|e| at_source(&what, e))?;
                left.take(&what, 0)?;
                self.entries
                    .push(found(EntryKind::Directory, vec![name.clone()], &stat, vec![]));
                self.tree(top, &mut vec![name], left)
            }
            _ => Err(Failed::new(
                Inner::SourceKind,
                format!("{what} is neither a file nor a directory"),
            )),
        }
    }

    fn tree(&mut self, dir: OwnedFd, path: &mut Vec<Vec<u8>>, left: &mut Left) -> Result<(), Failed> {
        if path.len() > MAX_DEPTH {
            return Err(Failed::new(
                Inner::Limit,
                format!("{}: more than {MAX_DEPTH} directories within each other", shown(path)),
            ));
        }
        for name in list(&dir, &shown(path))? {
            path.push(name.clone());
            let what = format!("{}, {}", self.shown, shown(path));
            let stat = fstatat(&dir, OsStr::from_bytes(&name), AtFlags::AT_SYMLINK_NOFOLLOW)
                .map_err(|e| at_source(&what, e))?;
            left.take(&what, if kind(&stat) == SFlag::S_IFREG { stat.st_size } else { 0 })?;
            match kind(&stat) {
                SFlag::S_IFREG => self.entries.push(found(EntryKind::File, path.clone(), &stat, vec![])),
                SFlag::S_IFDIR => {
                    self.entries
                        .push(found(EntryKind::Directory, path.clone(), &stat, vec![]));
                    let next = openat(&dir, OsStr::from_bytes(&name), DIR | OFlag::O_NOFOLLOW, Mode::empty())
                        .map_err(|e| at_source(&what, e))?;
                    self.tree(next, path, left)?;
                }
                SFlag::S_IFLNK => {
                    let link = readlinkat(&dir, OsStr::from_bytes(&name)).map_err(|e| at_source(&what, e))?;
                    let link = link.as_bytes().to_vec();
                    if !names::stays_inside(path, &link) {
                        return Err(Failed::new(
                            Inner::SourceKind,
                            format!(
                                "{what} is a link to {}, which is outside of what is sent",
                                String::from_utf8_lossy(&link)
                            ),
                        ));
                    }
                    self.entries.push(found(EntryKind::Symlink, path.clone(), &stat, link));
                }
                _ => {
                    return Err(Failed::new(
                        Inner::SourceKind,
                        format!("{what} is neither a file, a directory nor a link; such things are not sent"),
                    ));
                }
            }
            path.pop();
        }
        Ok(())
    }

    /// Opens a file that was found, and says what it is now.
    pub(super) fn open(&self, n: u32) -> Result<(OwnedFd, Found), Failed> {
        let entry = self
            .entries
            .get(n as usize)
            .filter(|entry| entry.kind == i32::from(EntryKind::File))
            .ok_or_else(|| Failed::new(Inner::System, "there is no such entry"))?;
        let what = format!("{}, {}", self.shown, shown(&entry.path));
        let skip = usize::from(self.whole);
        let parts = entry.path.get(skip..).unwrap_or_default();
        let (name, dirs) = parts
            .split_last()
            .ok_or_else(|| Failed::new(Inner::System, "an entry without a name"))?;
        let mut here: Option<OwnedFd> = None;
        for (depth, part) in dirs.iter().enumerate() {
            // The one directory that was named may be a link; nothing below it.
            let flags = if depth == 0 && self.follow_top {
                DIR
            } else {
                DIR | OFlag::O_NOFOLLOW
            };
            let at = here.as_ref().unwrap_or(&self.base);
            here = Some(openat(at, OsStr::from_bytes(part), flags, Mode::empty()).map_err(|e| at_source(&what, e))?);
        }
        let flags = if dirs.is_empty() && self.follow_top {
            FILE
        } else {
            FILE | OFlag::O_NOFOLLOW
        };
        let at = here.as_ref().unwrap_or(&self.base);
        let file = openat(at, OsStr::from_bytes(name), flags, Mode::empty()).map_err(|e| at_source(&what, e))?;
        let stat = fstat(&file).map_err(|e| at_source(&what, e))?;
        if kind(&stat) != SFlag::S_IFREG {
            return Err(Failed::new(Inner::Changed, format!("{what} is no plain file any more")));
        }
        Ok((file, found(EntryKind::File, entry.path.clone(), &stat, vec![])))
    }
}

/// What may still be found.
struct Left {
    entries: u64,
    bytes: u64,
}

impl Left {
    fn take(&mut self, what: &str, size: i64) -> Result<(), Failed> {
        let bytes = u64::try_from(size).unwrap_or(0);
        self.entries = self.entries.checked_sub(1).ok_or_else(|| {
            Failed::new(
                Inner::TooLarge,
                "the source has more files than this agent sends in one go (files.max_entries)",
            )
        })?;
        self.bytes = self.bytes.checked_sub(bytes).ok_or_else(|| {
            Failed::new(
                Inner::TooLarge,
                format!("{what}: the source is larger than this agent sends in one go (files.max_bytes)"),
            )
        })?;
        Ok(())
    }
}

/// Names in a directory, in order.
fn list(dir: &OwnedFd, what: &str) -> Result<Vec<Vec<u8>>, Failed> {
    let own = openat(dir.as_fd(), ".", DIR, Mode::empty()).map_err(|e| at_source(what, e))?;
    let mut dir = Dir::from_fd(own).map_err(|e| at_source(what, e))?;
    let mut all = Vec::new();
    for entry in dir.iter() {
        let entry = entry.map_err(|e| at_source(what, e))?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            all.push(name.to_vec());
        }
    }
    all.sort_unstable();
    Ok(all)
}
