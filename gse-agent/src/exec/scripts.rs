//! Puts script files where the task wants them without being led elsewhere: every component of the path is opened by itself and
//! never through a link, once the path has passed a directory in which anybody may create names; files appear by rename.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, readlinkat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::job::ScriptFile;
use super::room::{ScriptLimits, check_room};

/// Links followed in the trusted part of a path.
const MAX_LINKS: usize = 40;

/// Who walks, and what may be created on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Walk {
    /// As the superuser, before becoming the account: only the directory right below one like `/tmp`, which several accounts share:
    /// it belongs to root and has the sticky bit too, so none of them can touch what another has put there.
    SharedParent,
    /// As the account: everything that is missing.
    Create,
    /// Nothing.
    Open,
}

fn components(path: &str) -> VecDeque<String> {
    path.split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .map(str::to_owned)
        .collect()
}

fn anybody_may_create(stat: &FileStat) -> bool {
    stat.st_mode & 0o1002 == 0o1002
}

/// What sort of a thing it is.
pub(super) fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// How directories are opened to be read: never through a link.
pub(super) const DIR_FLAGS: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);
const PATH_FLAGS: OFlag = OFlag::O_PATH
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// Everywhere.
const ANYWHERE: &[String] = &[];

/// Whether the directory `path` is one of `roots` or below one, component by component.
fn within(path: impl Iterator<Item = String> + Clone, roots: &[String]) -> bool {
    roots.is_empty()
        || roots.iter().any(|root| {
            let mut path = path.clone();
            components(root).into_iter().all(|part| path.next() == Some(part))
        })
}

/// Opens the directory `path` on behalf of the account `uid`. `None` when it does not exist and is not to be created. What is opened
/// or created is one of `roots` or below one, whatever links led there; no roots at all are no restriction.
///
/// # Errors
/// A sentence for the row.
pub(super) fn open_dir(path: &str, uid: u32, walk: Walk, roots: &[String]) -> Result<Option<OwnedFd>, String> {
    if !path.starts_with('/') || path.contains('\0') {
        return Err(format!("the script directory {path:?} is not an absolute path"));
    }
    let mut todo = components(path);
    if todo.iter().any(|part| part == "..") {
        return Err(format!("the script directory {path:?} must not contain \"..\""));
    }
    let says = |at: &str, error: Errno| format!("script directory {path}: {at}: {}", error.desc());
    let outside = |real: &str| {
        let led = if components(real) == components(path) {
            String::new()
        } else {
            format!(" is {real}, which")
        };
        format!(
            "the script directory {path}{led} is in none of the directories that this agent's settings (exec.allowed_script_dirs) allow: {}",
            roots.join(", ")
        )
    };
    let mut here = open("/", PATH_FLAGS, Mode::empty()).map_err(|e| says("/", e))?;
    let mut walked = String::new();
    let mut shared = false;
    let mut links = 0;
    while let Some(part) = todo.pop_front() {
        let stat = fstat(&here).map_err(|e| says(&walked, e))?;
        let parent_is_sticky = anybody_may_create(&stat);
        let below_first_sticky = parent_is_sticky && !shared;
        shared |= parent_is_sticky;
        let name = format!("{walked}/{part}");
        let entry = match fstatat(&here, part.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(entry) => entry,
            Err(Errno::ENOENT) => {
                // Nothing on the rest of the way exists, so no link can lead it elsewhere any more.
                let whole = components(&name).into_iter().chain(todo.iter().cloned());
                if !within(whole.clone(), roots) {
                    return Err(outside(&format!("/{}", whole.collect::<Vec<_>>().join("/"))));
                }
                // Below a directory that is shared already, the last one is the account's own.
                let leaf = todo.is_empty();
                let mode = match walk {
                    Walk::SharedParent if parent_is_sticky && (!leaf || below_first_sticky) => 0o1777,
                    Walk::Create => 0o755,
                    _ => return Ok(None),
                };
                make(&here, &part, mode).map_err(|e| says(&format!("cannot create {name}"), e))?;
                fstatat(&here, part.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW).map_err(|e| says(&name, e))?
            }
            Err(error) => return Err(says(&name, error)),
        };
        if kind(&entry) == SFlag::S_IFLNK {
            if shared {
                return Err(format!(
                    "script directory {path}: {name} is a symbolic link in a directory that everybody may write to; remove it"
                ));
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(says(&name, Errno::ELOOP));
            }
            let target = readlinkat(&here, part.as_str()).map_err(|e| says(&name, e))?;
            let target = target.to_str().ok_or_else(|| says(&name, Errno::EILSEQ))?.to_owned();
            let mut parts = components(&target);
            parts.append(&mut todo);
            todo = parts;
            if target.starts_with('/') {
                here = open("/", PATH_FLAGS, Mode::empty()).map_err(|e| says("/", e))?;
                walked.clear();
            }
            continue;
        }
        if kind(&entry) != SFlag::S_IFDIR {
            return Err(format!("script directory {path}: {name} exists and is not a directory"));
        }
        let next = openat(&here, part.as_str(), PATH_FLAGS, Mode::empty()).map_err(|e| says(&name, e))?;
        // What was opened is judged, not what was looked at before.
        let opened = fstat(&next).map_err(|e| says(&name, e))?;
        if shared && opened.st_uid != 0 && opened.st_uid != uid {
            return Err(format!(
                "script directory {path}: {name} belongs to uid {}, neither to root nor to the account that is to run the script",
                opened.st_uid
            ));
        }
        here = next;
        walked = name;
    }
    if !within(components(&walked).into_iter(), roots) {
        return Err(outside(if walked.is_empty() { "/" } else { &walked }));
    }
    openat(&here, ".", DIR_FLAGS, Mode::empty())
        .map(Some)
        .or_else(|error| match (walk, error) {
            // For the superuser's walk it is enough that the way is safe; the account may have closed its own directory.
            (Walk::SharedParent, _) => Ok(None),
            (_, error) => Err(says(&walked, error)),
        })
}

fn make(parent: &OwnedFd, name: &str, mode: u32) -> Result<(), Errno> {
    match mkdirat(parent, name, Mode::from_bits_truncate(mode & 0o755)) {
        Ok(()) if mode & 0o1000 != 0 => {
            let fresh = openat(parent, name, DIR_FLAGS, Mode::empty())?;
            fchmod(&fresh, Mode::from_bits_truncate(mode))
        }
        // Somebody else was quicker; what is there now is judged like anything that was there before.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether a name can be that of a script file.
///
/// # Errors
/// A sentence for the row.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) || name.len() > 255 {
        return Err(format!(
            "{name:?} cannot be the name of a script file: it has to be a plain file name of at most 255 bytes"
        ));
    }
    Ok(())
}

/// Writes one script file as the current account: mode 0700, in place of whatever has its name.
///
/// # Errors
/// A sentence for the row.
pub(super) fn write(script: &ScriptFile, uid: u32, limits: &ScriptLimits) -> Result<(), String> {
    check_name(&script.name)?;
    let dir = open_dir(&script.dir, uid, Walk::Create, &limits.roots)?.ok_or_else(|| {
        format!(
            "script directory {} does not exist and could not be created",
            script.dir
        )
    })?;
    check_room(&dir, script, limits)?;
    let file = format!("{}/{}", script.dir.trim_end_matches('/'), script.name);
    let says = |what: &str, error: Errno| format!("script file {file}: {what}: {}", error.desc());
    // Begins like the file itself, so that what a crash leaves behind is cleaned up with the others.
    let keep = super::utf8::boundary(script.name.as_bytes(), 200);
    let temporary = format!("{}.{}.new", &script.name[..keep], std::process::id());
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut opened = openat(&dir, temporary.as_str(), flags, Mode::S_IRWXU);
    if matches!(opened, Err(Errno::EEXIST)) {
        unlinkat(&dir, temporary.as_str(), UnlinkatFlags::NoRemoveDir)
            .map_err(|e| says("cannot remove an old copy", e))?;
        opened = openat(&dir, temporary.as_str(), flags, Mode::S_IRWXU);
    }
    let fd = opened.map_err(|e| says("cannot create it", e))?;
    let written = (|| {
        fchmod(&fd, Mode::S_IRWXU).map_err(|e| says("cannot make it executable", e))?;
        let mut out = File::from(fd);
        out.write_all(&script.content)
            .map_err(|e| format!("script file {file}: cannot write it: {e}"))?;
        drop(out);
        renameat(&dir, temporary.as_str(), &dir, script.name.as_str())
            .map_err(|e| says("cannot put it in its place", e))
    })();
    if written.is_err() {
        // The first error is the one to tell; the clean-up finds what cannot be removed now.
        unlinkat(&dir, temporary.as_str(), UnlinkatFlags::NoRemoveDir).ok();
    }
    written
}

/// What one pass of cleaning did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Cleaned {
    /// Files removed.
    pub(super) removed: usize,
    /// The batch was full; there may be more.
    pub(super) more: bool,
    /// There is no such directory (any more).
    pub(super) gone: bool,
}

/// Removes files from `path` whose name begins with `prefix` and that were last written before `before` (Unix seconds): regular
/// files only, of the directory's owner or root, at most `batch` of them.
///
/// # Errors
/// A sentence for the log.
pub(super) fn clean(path: &str, prefix: &str, before: i64, batch: usize) -> Result<Cleaned, String> {
    let trust = match std::fs::symlink_metadata(path) {
        Ok(meta) => std::os::unix::fs::MetadataExt::uid(&meta),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Cleaned {
                gone: true,
                ..Cleaned::default()
            });
        }
        Err(error) => return Err(format!("{path}: {error}")),
    };
    let Some(dir) = open_dir(path, trust, Walk::Open, ANYWHERE)? else {
        return Ok(Cleaned {
            gone: true,
            ..Cleaned::default()
        });
    };
    let says = |error: Errno| format!("{path}: {}", error.desc());
    let owner = fstat(&dir).map_err(says)?;
    let shared = anybody_may_create(&owner);
    let mut list = Dir::openat(&dir, ".", DIR_FLAGS, Mode::empty()).map_err(says)?;
    let mut done = Cleaned::default();
    for entry in list.iter() {
        let entry = entry.map_err(says)?;
        let name = entry.file_name();
        if !name.to_bytes().starts_with(prefix.as_bytes()) {
            continue;
        }
        let Ok(stat) = fstatat(&dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) else {
            continue;
        };
        // In a directory that everybody may write to, a name proves nothing: only its owner's own files are old scripts.
        let owned = shared || stat.st_uid == owner.st_uid || stat.st_uid == 0;
        if kind(&stat) != SFlag::S_IFREG || !owned || stat.st_nlink != 1 || stat.st_mtime >= before {
            continue;
        }
        if done.removed >= batch {
            done.more = true;
            break;
        }
        unlinkat(dir.as_fd(), name, UnlinkatFlags::NoRemoveDir).map_err(says)?;
        done.removed += 1;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;

    fn allowed(path: &str, roots: &[&str]) -> bool {
        let roots: Vec<String> = roots.iter().map(|root| (*root).to_owned()).collect();
        within(components(path).into_iter(), &roots)
    }

    #[test]
    fn a_root_is_whole_components() {
        assert!(allowed("/tmp/bkjob/root", &["/tmp/bkjob"]));
        assert!(allowed("/tmp/bkjob", &["/tmp/bkjob/"]));
        assert!(allowed("/tmp//./bkjob/", &["/var", "/tmp/bkjob"]));
        assert!(allowed("/anything", &["/"]));
        for other in ["/tmp/bkjob2", "/tmp/bkjo", "/tmp", "/", "/var/tmp/bkjob"] {
            assert!(!allowed(other, &["/tmp/bkjob"]), "{other}");
        }
    }

    #[test]
    fn links_are_followed_before_the_place_is_judged() {
        // Not below a directory that everybody may write to, such as /tmp: there links are not followed at all.
        let shared = |path: &Path| {
            let mode = |dir: &Path| std::fs::metadata(dir).map_or(0, |meta| meta.permissions().mode());
            path.ancestors().any(|dir| mode(dir) & 0o002 != 0)
        };
        let home = std::env::var("HOME").unwrap_or_default();
        let places = [env!("CARGO_MANIFEST_DIR"), home.as_str()];
        let own = places
            .into_iter()
            .find(|dir| dir.starts_with('/') && !shared(Path::new(dir)));
        let place = tempfile::tempdir_in(own.expect("a directory of one's own")).expect("a directory");
        let base = place.path().canonicalize().expect("a path");
        let at = |name: &str| base.join(name).to_str().expect("plain").to_owned();
        std::fs::create_dir(at("good")).expect("mkdir");
        std::fs::create_dir(at("bad")).expect("mkdir");
        symlink(at("bad"), at("good/out")).expect("a link");
        symlink("good", at("in")).expect("a link");
        let uid = nix::unistd::geteuid().as_raw();
        let roots = [at("good")];
        let open = |path: &str, walk| open_dir(path, uid, walk, &roots).map(|dir| dir.is_some());
        assert_eq!(open(&at("good"), Walk::Create), Ok(true));
        assert_eq!(open(&at("in/new/newer"), Walk::Create), Ok(true));
        assert!(base.join("good/new/newer").is_dir());
        for out in [
            "bad",
            "bad/new",
            "good/out",
            "good/out/new",
            "good2",
            "good2/new",
            "good/../bad",
        ] {
            let error = open(&at(out), Walk::Create).expect_err(out);
            assert!(
                error.contains("allowed_script_dirs") || error.contains("\"..\""),
                "{error}"
            );
        }
        assert!(open(&at("good/out"), Walk::Create).is_err_and(|e| e.contains(&at("bad"))));
        for made in ["bad/new", "good2"] {
            assert!(!base.join(made).exists(), "{made}");
        }
    }
}
