//! The data directory of `gse up`: made on the first start, reused on every other. Certificates, the store's password, one
//! application, and who the local agent is.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use gse_core::authz::{AppEntry, OthersTasks};
use gse_core::certs::{Authority, LEAF_DAYS, names};
use gse_core::tls::{Role, TlsFiles};
use rand::RngExt;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::client::{CliFile, write_private};

/// Code of the application that is made on the first start.
pub(super) const APP: &str = "gse-local";

/// Paths below the data directory, and what was found or made there.
pub(super) struct Data {
    dir: PathBuf,
    /// Who the local agent and node are.
    pub(super) identity: Identity,
    /// Settings of the other commands; the address in it is not known yet.
    pub(super) cli: CliFile,
    /// Whether the application was made just now, so that its secret is shown this once.
    pub(super) fresh: bool,
}

/// What must stay the same from start to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    /// Id of the local agent.
    pub(super) agent_id: String,
    /// Name of the node in the servers' records.
    pub(super) node_id: String,
}

#[derive(Serialize)]
struct AppsFile<'a> {
    app: [&'a AppEntry; 1],
}

impl Data {
    /// Makes the directory itself, readable by its owner only, so that it can be locked before anything is written into it.
    ///
    /// # Errors
    /// It cannot be made, or belongs to somebody else.
    pub(super) fn make_dir(dir: &Path) -> anyhow::Result<PathBuf> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.with_context(|| format!("cannot make the data directory {}", dir.display()))?;
        let dir = dir
            .canonicalize()
            .with_context(|| format!("cannot use the data directory {}", dir.display()))?;
        let meta =
            fs::metadata(&dir).with_context(|| format!("cannot look at the data directory {}", dir.display()))?;
        if meta.uid() != nix::unistd::geteuid().as_raw() {
            bail!(
                "the data directory {} belongs to another account; say --data DIR",
                dir.display()
            );
        }
        if meta.permissions().mode() & 0o077 != 0 {
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))
                .with_context(|| format!("cannot make the data directory {} private", dir.display()))?;
        }
        Ok(dir)
    }

    /// Opens what is there and makes what is not.
    ///
    /// # Errors
    /// Something cannot be written, or what is there is not usable.
    pub(super) fn open(dir: PathBuf) -> anyhow::Result<Self> {
        for sub in ["tls", "store", "agent", "log"] {
            let path = dir.join(sub);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .with_context(|| format!("cannot make {}", path.display()))?;
        }
        let identity = identity(&dir.join("up.toml"))?;
        certificates(&dir.join("tls"), &identity.agent_id)?;
        if !dir.join("store.password").exists() {
            write_private(&dir.join("store.password"), random_secret().as_bytes())?;
        }
        let (cli, fresh) = application(&dir)?;
        Ok(Self {
            dir,
            identity,
            cli,
            fresh,
        })
    }

    /// A path below the directory.
    #[must_use]
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The directory.
    #[must_use]
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Files of a role's certificate.
    #[must_use]
    pub(super) fn tls(&self, role: Role) -> TlsFiles {
        let tls = self.dir.join("tls");
        let (cert, key) = names::pair(role);
        TlsFiles {
            ca: tls.join(names::CA_CERT),
            cert: tls.join(cert),
            key: tls.join(key),
        }
    }

    /// Writes `cli.toml` with the address the API has this time.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn publish(&mut self, address: &str, https: bool) -> anyhow::Result<()> {
        self.cli.api = format!("{}://{address}", if https { "https" } else { "http" });
        // Right when the certificate was made with gse certs; any other needs --ca.
        self.cli.ca = https.then(|| self.tls(Role::Server).ca);
        self.cli.write(&self.dir.join(crate::client::FILE))
    }
}

fn identity(path: &Path) -> anyhow::Result<Identity> {
    match fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text)
            .map_err(|error| anyhow::anyhow!("{} is not usable: {}", path.display(), error.message())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let identity = Identity {
                agent_id: agent_id(),
                node_id: node_id(),
            };
            let body = toml::to_string(&identity).context("cannot express the identity as TOML")?;
            let text = format!(
                "# Who this agent and node are. Without this file they would be strangers to the store.\n{body}"
            );
            write_private(path, text.as_bytes())?;
            Ok(identity)
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// An id of the look of the contract: `0200`, and digits and letters up to 36 in all.
fn agent_id() -> String {
    let bytes: [u8; 16] = rand::rng().random();
    format!("0200{}", hex::encode(bytes))
}

fn node_id() -> String {
    let host = nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_default();
    let plain: String = host
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || ".-".contains(*c))
        .take(40)
        .collect();
    let tail: [u8; 3] = rand::rng().random();
    if plain.is_empty() {
        format!("node-{}", hex::encode(tail))
    } else {
        format!("{plain}-{}", hex::encode(tail))
    }
}

fn random_secret() -> String {
    let bytes: [u8; 24] = rand::rng().random();
    hex::encode(bytes)
}

fn certificates(dir: &Path, agent_id: &str) -> anyhow::Result<()> {
    let authority = Authority::open_or_create(dir)?;
    let local = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    for (role, id, host_names) in [
        (Role::Server, None, &local[..]),
        (Role::Agent, Some(agent_id), &[]),
        (Role::ApiClient, Some(APP), &[]),
        (Role::Operator, Some("local"), &[]),
    ] {
        let (cert, key) = names::pair(role);
        let (cert, key) = (dir.join(cert), dir.join(key));
        match (cert.exists(), key.exists()) {
            (true, true) => {}
            // Half a pair is what a start that was killed leaves behind.
            _ => authority.reissue(role, id, host_names, &cert, &key, LEAF_DAYS)?,
        }
    }
    Ok(())
}

/// The application, from `cli.toml` and `apps.toml` when both are there.
fn application(dir: &Path) -> anyhow::Result<(CliFile, bool)> {
    let (cli_path, apps_path) = (dir.join(crate::client::FILE), dir.join("apps.toml"));
    let known = CliFile::read(&cli_path)?.filter(|cli| !cli.app.is_empty() && !cli.secret.is_empty());
    match known {
        Some(cli) if apps_path.exists() => Ok((cli, false)),
        None if apps_path.exists() => bail!(
            "{} is missing or holds no secret, and the secret cannot be read back from {}; remove the latter to get a new application",
            cli_path.display(),
            apps_path.display()
        ),
        known => {
            let fresh = known.is_none();
            let cli = known.unwrap_or_else(|| CliFile {
                app: APP.to_owned(),
                secret: random_secret(),
                ..Default::default()
            });
            let cli = CliFile {
                user: own_account(),
                ..cli
            };
            // The secret first: a table without it would lock everybody out after a kill in between.
            cli.write(&cli_path)?;
            let all = || vec!["*".to_owned()];
            let entry = AppEntry {
                code: cli.app.clone(),
                secret_sha256: Some(hex::encode(Sha256::digest(cli.secret.as_bytes()))),
                operations: all(),
                accounts: all(),
                targets: all(),
                others_tasks: OthersTasks::All,
                ..AppEntry::default()
            };
            let body =
                toml::to_string(&AppsFile { app: [&entry] }).context("cannot express the application as TOML")?;
            let text = format!("# Who may call, and what they may do. Read again on SIGHUP.\n{body}");
            write_private(&apps_path, text.as_bytes())?;
            Ok((cli, fresh))
        }
    }
}

/// The account the local agent runs as: without root it can run scripts as no other.
fn own_account() -> String {
    nix::unistd::User::from_uid(nix::unistd::geteuid())
        .ok()
        .flatten()
        .map_or_else(|| "root".to_owned(), |user| user.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn the_first_start_makes_everything_and_the_second_reuses_it() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Data::make_dir(&temp.path().join("a/b")).unwrap();
        assert_eq!(mode(&dir), 0o700);
        let first = Data::open(dir.clone()).unwrap();
        assert!(first.fresh);
        assert_eq!(first.identity.agent_id.len(), 36);
        assert!(gse_proto::ids::AgentId::parse(&first.identity.agent_id).is_ok());
        assert_eq!(
            first.tls(Role::Agent).identity().unwrap().id.as_deref(),
            Some(first.identity.agent_id.as_str())
        );
        for private in [
            "store.password",
            "cli.toml",
            "apps.toml",
            "up.toml",
            "tls/gseca.key",
            "tls/gse_agent.key",
        ] {
            assert_eq!(mode(&dir.join(private)), 0o600, "{private}");
        }
        let apps = fs::read_to_string(dir.join("apps.toml")).unwrap();
        assert!(!apps.contains(&first.cli.secret), "the secret itself is in the table");

        let before = fs::read(dir.join("tls/gse_agent.crt")).unwrap();
        let password = fs::read(dir.join("store.password")).unwrap();
        let second = Data::open(dir.clone()).unwrap();
        assert!(!second.fresh);
        assert_eq!(second.identity, first.identity);
        assert!(second.cli == first.cli);
        assert_eq!(fs::read(dir.join("tls/gse_agent.crt")).unwrap(), before);
        assert_eq!(fs::read(dir.join("store.password")).unwrap(), password);
    }

    #[test]
    fn the_table_admits_the_application_and_nobody_else() {
        let temp = tempfile::tempdir().unwrap();
        let data = Data::open(Data::make_dir(temp.path()).unwrap()).unwrap();
        let config = gse_core::authz::AuthzConfig {
            apps_file: Some(data.path("apps.toml")),
            ..Default::default()
        };
        let authenticator = gse_core::authz::Authenticator::new(&config).unwrap();
        let ask = |secret: &str| {
            let mut headers = http::HeaderMap::new();
            let value = serde_json::json!({ "bk_app_code": APP, "bk_app_secret": secret }).to_string();
            headers.insert("x-bkapi-authorization", value.parse().unwrap());
            authenticator.authenticate(&headers, std::net::Ipv4Addr::LOCALHOST.into(), None)
        };
        assert!(ask(&data.cli.secret).is_ok());
        assert!(ask("something else").is_err());
    }

    #[test]
    fn a_lost_secret_is_said_and_not_papered_over() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Data::make_dir(temp.path()).unwrap();
        Data::open(dir.clone()).unwrap();
        fs::remove_file(dir.join("cli.toml")).unwrap();
        let error = Data::open(dir.clone()).err().unwrap().to_string();
        assert!(error.contains("cli.toml") && error.contains("apps.toml"), "{error}");
        fs::remove_file(dir.join("apps.toml")).unwrap();
        assert!(Data::open(dir).unwrap().fresh);
    }

    #[test]
    fn an_open_directory_is_made_private() {
        let temp = tempfile::tempdir().unwrap();
        fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let dir = Data::make_dir(temp.path()).unwrap();
        assert_eq!(mode(&dir), 0o700);
    }
}
