//! Binding a socket where something may be in the way: a file that a dead agent left is replaced, a living one's is not.
//!
//! The file is left where it is when the agent stops: plugins in containers give up for good when it is missing, and only try again when
//! nobody listens.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Gid, Group, Uid, User};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, UnixListener, UnixStream};

use super::Stream;

/// A path of a socket may be so long at most; the system's own bound.
const LONGEST_PATH: usize = 107;
/// So long is waited for whoever may listen already.
const PROBE: Duration = Duration::from_secs(1);

/// Where programs connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A socket of the file system.
    Path(PathBuf),
    /// A port of 127.0.0.1.
    Port(u16),
}

impl Place {
    /// Reads a place as configurations write it: an absolute path, or a port.
    ///
    /// # Errors
    /// A sentence that goes on from the setting's name.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Ok(port) = text.parse::<u16>()
            && port > 0
        {
            return Ok(Self::Port(port));
        }
        if !text.starts_with('/') || text.ends_with('/') {
            return Err(format!(
                "is {text:?}; it must be the absolute path of a socket, or a port of 127.0.0.1"
            ));
        }
        Ok(Self::Path(PathBuf::from(text)))
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Port(port) => write!(f, "127.0.0.1:{port}"),
        }
    }
}

/// How sockets are made and kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Binding {
    /// Permissions of the socket's file, octal: 0666 lets plugins of every account in.
    pub mode: String,
    /// Whom the file belongs to, `account` or `account:group`; empty: the agent's account.
    pub owner: String,
    /// A place that is not to be had is tried again after so long.
    pub retry_ms: u64,
    /// So often it is looked whether the file is still there and still ours.
    pub check_ms: u64,
}

impl Default for Binding {
    fn default() -> Self {
        Self {
            mode: "0666".to_owned(),
            owner: String::new(),
            retry_ms: 2_000,
            check_ms: 15_000,
        }
    }
}

impl Binding {
    /// Every value that cannot work, as a sentence that begins with the setting's name.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.mode().is_none() {
            problems.push(format!(
                "mode is {:?}; it must be octal permissions such as \"0666\"",
                self.mode
            ));
        }
        for (name, value) in [("retry_ms", self.retry_ms), ("check_ms", self.check_ms)] {
            if !(10..=3_600_000).contains(&value) {
                problems.push(format!("{name} must be between 10 and 3600000"));
            }
        }
        problems
    }

    fn mode(&self) -> Option<u32> {
        u32::from_str_radix(&self.mode, 8).ok().filter(|mode| *mode <= 0o777)
    }

    /// Uid and gid of the owner. Blocking.
    fn owner(&self) -> Result<(Option<Uid>, Option<Gid>), String> {
        let (account, group) = self.owner.split_once(':').unwrap_or((&self.owner, ""));
        let uid = if account.is_empty() {
            None
        } else if let Ok(uid) = account.parse::<u32>() {
            Some(Uid::from_raw(uid))
        } else {
            let found = User::from_name(account).map_err(|error| format!("account {account}: {}", error.desc()))?;
            Some(found.ok_or(format!("there is no account {account} on this host"))?.uid)
        };
        let gid = if group.is_empty() {
            None
        } else if let Ok(gid) = group.parse::<u32>() {
            Some(Gid::from_raw(gid))
        } else {
            let found = Group::from_name(group).map_err(|error| format!("group {group}: {}", error.desc()))?;
            Some(found.ok_or(format!("there is no group {group} on this host"))?.gid)
        };
        Ok((uid, gid))
    }
}

/// A bound socket.
#[derive(Debug)]
pub(super) enum Bound {
    /// With the file that makes it reachable.
    Path(UnixListener, FileId),
    /// By a port.
    Port(TcpListener),
}

/// Which file it is, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    fn of(path: &Path) -> io::Result<Self> {
        let meta = fs::symlink_metadata(path)?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
        })
    }
}

/// What stands where a socket is wanted.
enum Found {
    Nothing,
    Socket,
    /// A symbolic link to a socket.
    Link(PathBuf),
}

/// Binds a place.
///
/// # Errors
/// Why it is not to be had, and what a person may do.
pub(super) async fn bind(place: &Place, binding: &Binding) -> Result<Bound, String> {
    match place {
        Place::Port(port) => match TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).await {
            Ok(listener) => Ok(Bound::Port(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(format!(
                "another program listens on {place}; stop it, or configure another port"
            )),
            Err(error) => Err(format!("{place} cannot be listened on: {error}")),
        },
        Place::Path(path) => {
            if path.as_os_str().len() > LONGEST_PATH {
                return Err(format!(
                    "{place} is longer than the {LONGEST_PATH} bytes that the path of a socket may have; configure a shorter one"
                ));
            }
            let found = blocking(path.clone(), |path| look(&path)).await?;
            let leftover = match found {
                Found::Nothing => false,
                Found::Socket => probe(path).await.map(|()| true)?,
                Found::Link(to) => {
                    return Err(format!(
                        "{place} is a symbolic link to {}; configure that path, or remove the link",
                        to.display()
                    ));
                }
            };
            let binding = binding.clone();
            let (listener, file) = blocking(path.clone(), move |path| make(&path, leftover, &binding)).await?;
            let listener = UnixListener::from_std(listener)
                .map_err(|error| format!("{} cannot be listened on: {error}", path.display()))?;
            Ok(Bound::Path(listener, file))
        }
    }
}

async fn blocking<T: Send + 'static>(
    path: PathBuf,
    work: impl FnOnce(PathBuf) -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(move || work(path)).await {
        Ok(outcome) => outcome,
        Err(error) => Err(format!("looking for the socket failed: {error}")),
    }
}

/// Makes the parent and removes what may be removed: an empty directory (a container runtime makes one in place of a file that was not
/// there), an empty file. Blocking.
fn look(path: &Path) -> Result<Found, String> {
    let shown = path.display();
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(|error| format!("the directory {} cannot be made: {error}", parent.display()))?;
    }
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(format!("{shown} cannot be looked at: {error}")),
    };
    let kind = meta.file_type();
    if kind.is_socket() {
        return Ok(Found::Socket);
    }
    if kind.is_symlink() {
        return fs::read_link(path)
            .map(Found::Link)
            .map_err(|error| format!("{shown} cannot be looked at: {error}"));
    }
    let removed = if kind.is_dir() {
        fs::remove_dir(path)
    } else if kind.is_file() && meta.len() == 0 {
        fs::remove_file(path)
    } else {
        return Err(format!("{shown} is in the way and is no socket; move it away"));
    };
    match removed {
        Ok(()) => {
            tracing::warn!("{shown} was no socket but empty; it was removed to make room for one");
            Ok(Found::Nothing)
        }
        Err(error) => Err(format!(
            "{shown} is in the way, is no socket and cannot be removed ({error}); move it away"
        )),
    }
}

/// Whether a socket's file is left over: nobody listens.
async fn probe(path: &Path) -> Result<(), String> {
    let shown = path.display();
    match tokio::time::timeout(PROBE, UnixStream::connect(path)).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        // It went in between.
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(Ok(_)) | Err(_) => Err(format!(
            "another program, probably another agent, listens on {shown}; it is left alone. Stop it, or configure another path"
        )),
        Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => Err(format!(
            "another program listens on {shown} and takes no connections; stop it, or configure another path"
        )),
        Ok(Err(error)) => Err(format!("it is not known whether anybody listens on {shown}: {error}")),
    }
}

/// Makes the socket. Blocking.
fn make(path: &Path, leftover: bool, binding: &Binding) -> Result<(std::os::unix::net::UnixListener, FileId), String> {
    let shown = path.display();
    if leftover
        && let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(format!("{shown} is left over and cannot be removed: {error}"));
    }
    let listener = std::os::unix::net::UnixListener::bind(path)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|error| format!("{shown} cannot be made: {error}"))?;
    let (uid, gid) = binding.owner().map_err(|error| format!("owner of {shown}: {error}"))?;
    if uid.is_some() || gid.is_some() {
        nix::unistd::chown(path, uid, gid)
            .map_err(|error| format!("{shown} cannot be given to {}: {}", binding.owner, error.desc()))?;
    }
    let mode = binding.mode().unwrap_or(0o600);
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|error| format!("the permissions of {shown} cannot be set: {error}"))?;
    if mode & 0o006 != 0
        && let Some(closed) = closed_directory(path)
    {
        tracing::info!(
            "plugins of other accounts do not get to {shown}: {} is closed to them",
            closed.display()
        );
    }
    let file = FileId::of(path).map_err(|error| format!("{shown} cannot be looked at: {error}"))?;
    Ok((listener, file))
}

/// A directory on the way that not everybody may pass.
fn closed_directory(path: &Path) -> Option<&Path> {
    path.ancestors()
        .skip(1)
        .find(|dir| fs::metadata(dir).is_ok_and(|meta| meta.mode() & 0o001 == 0))
}

impl Bound {
    /// The next connection.
    pub(super) async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Path(listener, _) => listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
            Self::Port(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }

    /// Whether programs that connect to the place still get here.
    pub(super) async fn is_ours(&self, place: &Place) -> bool {
        let (Self::Path(_, file), Place::Path(path)) = (self, place) else {
            return true;
        };
        let (file, path) = (*file, path.clone());
        // What cannot be looked at is looked at again later.
        match tokio::task::spawn_blocking(move || FileId::of(&path)).await {
            Ok(Ok(now)) => now == file,
            Ok(Err(error)) => error.kind() != io::ErrorKind::NotFound,
            Err(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn at(path: &Path) -> Result<Bound, String> {
        bind(&Place::Path(path.to_owned()), &Binding::default()).await
    }

    #[tokio::test]
    async fn what_is_left_over_is_replaced_and_what_lives_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/ipc.state.report");
        let first = at(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o666);
        let error = at(&path).await.unwrap_err();
        assert!(error.contains("left alone"), "{error}");
        assert!(first.is_ours(&Place::Path(path.clone())).await);
        drop(first);
        assert!(path.exists(), "plugins find the file while no agent runs");
        let second = at(&path).await.unwrap();
        UnixStream::connect(&path).await.unwrap();
        fs::remove_file(&path).unwrap();
        assert!(!second.is_ours(&Place::Path(path.clone())).await);
    }

    #[tokio::test]
    async fn things_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ipc");
        fs::create_dir(&path).unwrap();
        drop(at(&path).await.unwrap());
        fs::remove_file(&path).unwrap();

        fs::create_dir(&path).unwrap();
        fs::write(path.join("something"), "of somebody").unwrap();
        let error = at(&path).await.unwrap_err();
        assert!(error.contains("move it away"), "{error}");
        assert!(path.join("something").exists());

        let file = dir.path().join("file");
        fs::write(&file, "of somebody").unwrap();
        let error = at(&file).await.unwrap_err();
        assert!(error.contains("move it away"), "{error}");
        assert_eq!(fs::read(&file).unwrap(), b"of somebody");

        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/nowhere", &link).unwrap();
        let error = at(&link).await.unwrap_err();
        assert!(error.contains("/nowhere"), "{error}");

        let long = dir.path().join("l".repeat(120));
        let error = at(&long).await.unwrap_err();
        assert!(error.contains("shorter"), "{error}");
    }

    #[tokio::test]
    async fn permissions_are_as_configured() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ipc");
        let binding = Binding {
            mode: "0660".to_owned(),
            owner: format!("{}:{}", Uid::current(), Gid::current()),
            ..Binding::default()
        };
        assert!(binding.problems().is_empty());
        let _bound = bind(&Place::Path(path.clone()), &binding).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        for mode in ["", "rw", "1777", "99"] {
            let wrong = Binding {
                mode: mode.to_owned(),
                ..Binding::default()
            };
            assert_eq!(wrong.problems().len(), 1, "{mode}");
        }
    }

    #[test]
    fn places() {
        assert_eq!(Place::parse("47000"), Ok(Place::Port(47000)));
        assert_eq!(Place::parse("/a/b"), Ok(Place::Path("/a/b".into())));
        for wrong in ["", "a/b", "/a/", "0", "70000"] {
            assert!(Place::parse(wrong).is_err(), "{wrong}");
        }
    }
}
