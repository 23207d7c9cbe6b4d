//! Where the servers are and which application this command is: from options, the environment and the `cli.toml` that `gse up`
//! keeps in its data directory. The secret never comes from the command line, where everybody on the host could read it.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use crate::args::{DataDir, ServerArgs};

/// Name of the file in the data directory.
pub const FILE: &str = "cli.toml";
/// Environment variable with the application's secret.
pub const SECRET_VARIABLE: &str = "GSE_APP_SECRET";

/// Settings of the commands that ask the servers, as `cli.toml` holds them.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CliFile {
    /// Address of the HTTP API.
    pub api: String,
    /// Code of the application.
    pub app: String,
    /// Its secret.
    pub secret: String,
    /// Account to run scripts as when nobody says which.
    pub user: String,
    /// Authority to trust, when the API is https.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
}

impl CliFile {
    /// Reads the file at `path`; `None` when there is none.
    ///
    /// # Errors
    /// It cannot be read, or does not hold what it should.
    pub fn read(path: &Path) -> anyhow::Result<Option<Self>> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        match toml::from_str(&text) {
            Ok(file) => Ok(Some(file)),
            // The library would show the line, and with it the secret.
            Err(error) => bail!("{} is not usable: {}", path.display(), error.message()),
        }
    }

    /// Writes the file, readable by its owner only, in one step.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let body = toml::to_string(self).context("cannot express the settings as TOML")?;
        let text =
            format!("# Written by gse up at each start; read by the other gse commands. Holds a secret.\n{body}");
        write_private(path, text.as_bytes())
    }
}

/// Writes a file of mode 0600 beside and renames it into place.
///
/// # Errors
/// It cannot be written.
pub fn write_private(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(name);
    let write = || -> io::Result<()> {
        // One left by a process that was killed could have another mode.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    let written = write();
    if written.is_err() {
        // On a full disk each try would leave one. That nothing could be written is the trouble to tell, not this.
        fs::remove_file(&temporary).ok();
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// The data directory meant by `--data`, the environment or neither.
///
/// # Errors
/// Nothing says where it could be.
pub fn data_dir(args: &DataDir) -> anyhow::Result<PathBuf> {
    if let Some(dir) = args.data.as_ref().filter(|dir| !dir.as_os_str().is_empty()) {
        return Ok(dir.clone());
    }
    default_data_dir(std::env::var_os("XDG_DATA_HOME"), std::env::var_os("HOME"))
        .context("cannot tell where the data directory is: HOME is not set; say --data DIR")
}

fn default_data_dir(xdg: Option<std::ffi::OsString>, home: Option<std::ffi::OsString>) -> Option<PathBuf> {
    let absolute = |text: Option<std::ffi::OsString>| text.map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(xdg)
        .map(|xdg| xdg.join("gse"))
        .or_else(|| absolute(home).map(|home| home.join(".local/share/gse")))
}

/// What a command needs to ask the servers.
pub struct Settings {
    /// Address of the HTTP API.
    pub api: String,
    /// Where that address came from, for messages.
    pub api_from: String,
    /// Code and secret of the application; none: whatever the servers allow to this address.
    pub credentials: Option<(String, String)>,
    /// Account to run scripts as when nobody says which.
    pub user: String,
    /// Authority to trust, when the API is https.
    pub ca: Option<PathBuf>,
}

impl Settings {
    /// Puts the settings together.
    ///
    /// # Errors
    /// Nothing says where the servers are, or an application is named whose secret is not known.
    pub fn load(args: &ServerArgs) -> anyhow::Result<Self> {
        let path = data_dir(&args.data).map(|dir| dir.join(FILE));
        let file = match &path {
            Ok(path) => {
                let file = CliFile::read(path)?;
                if file.is_some() {
                    warn_if_open(path);
                }
                file
            }
            Err(_) => None,
        };
        let place = match path {
            Ok(path) => path.display().to_string(),
            Err(error) => format!("{error:#}"),
        };
        Self::combine(args, file, &place, std::env::var(SECRET_VARIABLE).ok())
    }

    fn combine(args: &ServerArgs, file: Option<CliFile>, place: &str, secret: Option<String>) -> anyhow::Result<Self> {
        let known = file.is_some();
        let file = file.unwrap_or_default();
        let (api, api_from, ca) = match args.api.clone().filter(|api| !api.is_empty()) {
            Some(api) => (api, "--api or GSE_API".to_owned(), None),
            None if !file.api.is_empty() => (file.api.clone(), place.to_owned(), file.ca.clone()),
            None => bail!(
                "no servers known: {}; start them with gse up, or say --api URL",
                if known {
                    format!("{place} names none")
                } else {
                    format!("there is no {place}")
                }
            ),
        };
        let secret = secret.filter(|secret| !secret.is_empty());
        let app = args.app.clone().filter(|app| !app.is_empty());
        let credentials = match (app, secret) {
            (Some(app), Some(secret)) => Some((app, secret)),
            (Some(app), None) if app == file.app && !file.secret.is_empty() => Some((app, file.secret)),
            (Some(app), None) => bail!("no secret for application {app}: set {SECRET_VARIABLE}"),
            (None, Some(secret)) if !file.app.is_empty() => Some((file.app, secret)),
            (None, Some(_)) => bail!("{SECRET_VARIABLE} is set but no application is named: say --app CODE"),
            (None, None) if !file.app.is_empty() && !file.secret.is_empty() => Some((file.app, file.secret)),
            (None, None) => None,
        };
        let user = if file.user.is_empty() {
            "root".to_owned()
        } else {
            file.user
        };
        Ok(Self {
            api,
            api_from,
            credentials,
            user,
            ca: args.ca.clone().or(ca),
        })
    }
}

fn warn_if_open(path: &Path) {
    if let Ok(meta) = fs::metadata(path)
        && meta.mode() & 0o077 != 0
    {
        crate::out::note(&format!(
            "gse: warning: {} holds a secret and others may read it; chmod 600 it",
            path.display()
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(api: &str, app: &str) -> ServerArgs {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        ServerArgs {
            data: DataDir { data: None },
            api: some(api),
            app: some(app),
            ca: None,
        }
    }

    fn file() -> CliFile {
        CliFile {
            api: "http://a".into(),
            app: "local".into(),
            secret: "s1".into(),
            user: "me".into(),
            ca: Some("ca.crt".into()),
        }
    }

    fn load(args: &ServerArgs, file: Option<CliFile>, secret: Option<&str>) -> anyhow::Result<Settings> {
        Settings::combine(args, file, "d/cli.toml", secret.map(str::to_owned))
    }

    #[test]
    fn options_win_over_the_file() {
        let plain = load(&args("", ""), Some(file()), None).unwrap();
        assert_eq!(plain.api, "http://a");
        assert_eq!(plain.credentials, Some(("local".into(), "s1".into())));
        assert_eq!((plain.user.as_str(), plain.ca.is_some()), ("me", true));
        let other = load(&args("http://b", "job"), Some(file()), Some("s2")).unwrap();
        assert_eq!(
            (other.api.as_str(), other.ca),
            ("http://b", None),
            "the file's authority is for the file's address"
        );
        assert_eq!(other.credentials, Some(("job".into(), "s2".into())));
        let bare = load(&args("http://b", ""), None, None).unwrap();
        assert_eq!((bare.credentials, bare.user.as_str()), (None, "root"));
    }

    #[test]
    fn a_secret_is_never_sent_for_another_application() {
        let error = load(&args("", "job"), Some(file()), None).err().unwrap().to_string();
        assert!(error.contains("job") && error.contains("GSE_APP_SECRET"), "{error}");
        assert!(load(&args("http://b", ""), None, Some("s2")).is_err());
        let error = load(&args("", ""), None, None).err().unwrap().to_string();
        assert!(error.contains("d/cli.toml") && error.contains("gse up"), "{error}");
    }

    #[test]
    fn the_file_is_private_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        assert_eq!(CliFile::read(&path).unwrap().map(|f| f.app), None);
        for _ in 0..2 {
            file().write(&path).unwrap();
        }
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(CliFile::read(&path).unwrap() == Some(file()));
        fs::write(&path, "secret = 's3cret\n").unwrap();
        let error = format!("{:#}", CliFile::read(&path).err().unwrap());
        assert!(error.contains("cli.toml") && !error.contains("s3cret"), "{error}");
    }

    #[test]
    fn a_write_that_fails_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        // Nothing can be renamed over a directory.
        fs::create_dir(&path).unwrap();
        let error = format!("{:#}", file().write(&path).err().unwrap());
        assert!(error.contains("cannot write") && error.contains("cli.toml"), "{error}");
        let left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, [FILE]);
    }

    #[test]
    fn the_data_directory_is_in_the_users_home() {
        let os = |text: &str| Some(std::ffi::OsString::from(text));
        assert_eq!(default_data_dir(os("/x"), os("/h")), Some("/x/gse".into()));
        assert_eq!(
            default_data_dir(os("relative"), os("/h")),
            Some("/h/.local/share/gse".into())
        );
        assert_eq!(default_data_dir(None, os("")), None);
    }
}
