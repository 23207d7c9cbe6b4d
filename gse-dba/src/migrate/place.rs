//! Where data can be: a URL, and the configuration that it means.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::config::{Backend, Config};

/// Where data is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Where the configuration says.
    Configured,
    /// In an embedded store in this directory.
    Embedded(PathBuf),
    /// In one Redis, by its URL.
    Single(String),
    /// In a Redis or Valkey Cluster, by some of its nodes.
    Cluster(String),
    /// In the groups of a configuration file's `[sharded]`.
    Sharded(PathBuf),
}

impl Place {
    /// Reads what follows `MIGRATE TO`.
    pub(crate) fn parse(url: &str) -> Result<Self, String> {
        if let Some(dir) = url.strip_prefix("embedded://") {
            return path(dir).map(Self::Embedded);
        }
        if let Some(file) = url.strip_prefix("sharded://") {
            return path(file).map(Self::Sharded);
        }
        if let Some(rest) = url.strip_prefix("cluster://") {
            login(rest)?;
            return Ok(Self::Cluster(url.to_owned()));
        }
        if url.starts_with("sentinel://") {
            return Err("groups under Sentinel are given by a configuration file: sharded:///path/to/file.toml, whose [sharded] names them".into());
        }
        let schemes = ["redis://", "rediss://", "redis+unix://", "unix://"];
        if schemes.iter().any(|s| url.starts_with(s)) {
            return Ok(Self::Single(url.to_owned()));
        }
        Err("it must be redis://[user:password@]host:port, redis+unix:///socket, cluster://[user:password@]host:port,host:port, sharded:///file.toml (a configuration file with [sharded]) or embedded:///directory".into())
    }

    /// For people: without a password.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Configured => "the configured store".into(),
            Self::Embedded(dir) => format!("embedded://{}", dir.display()),
            Self::Single(url) | Self::Cluster(url) => match url
                .split_once("://")
                .and_then(|(s, r)| Some((s, r.rsplit_once('@')?.1)))
            {
                Some((scheme, address)) => format!("{scheme}://{address}"),
                None => url.clone(),
            },
            Self::Sharded(file) => format!("sharded://{}", file.display()),
        }
    }

    /// The configuration with which that store is started.
    pub(crate) async fn config(&self, base: &Config) -> anyhow::Result<Config> {
        let mut config = base.clone();
        match self {
            Self::Configured => {}
            Self::Embedded(dir) => {
                config.backend = Backend::Embedded;
                config.embedded.dir.clone_from(dir);
            }
            Self::Single(url) => {
                config.backend = Backend::Single;
                config.single.url.clone_from(url);
                // The configured password is the configured Redis's; this one's is in its URL.
                (config.single.password, config.single.password_file) = (None, None);
            }
            Self::Cluster(url) => {
                // Copies, acknowledgement and checks are as [cluster] of the configuration has them.
                let (user, password, seeds) =
                    login(url.strip_prefix("cluster://").unwrap_or_default()).map_err(anyhow::Error::msg)?;
                config.backend = Backend::Cluster;
                config.cluster.seeds = seeds;
                if let Some(password) = password {
                    config.cluster.user = user.unwrap_or_else(|| "default".into());
                    (config.cluster.password, config.cluster.password_file) = (Some(password), None);
                }
            }
            Self::Sharded(file) => {
                let file = file.clone();
                let loaded = tokio::task::spawn_blocking(move || {
                    // What it says of listeners and passwords of clients is not used, but it must be whole.
                    let sets = ["password=unused".to_owned(), "backend=sharded".to_owned()];
                    gse_core::config::load_with::<Config>("gse_dba", Some(&file), &sets, [])
                        .map_err(|e| anyhow::anyhow!("{}: {e}", file.display()))
                })
                .await??;
                config.backend = Backend::Sharded;
                config.sharded = loaded.config.sharded;
            }
        }
        if config.backend == Backend::Single {
            crate::single::dial::Target::parse(&config.single, None).context("its URL")?;
        }
        Ok(config)
    }

    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Configured => json!({"kind": "configured"}),
            Self::Embedded(dir) => json!({"kind": "embedded", "dir": dir}),
            Self::Single(url) => json!({"kind": "single", "url": url}),
            Self::Cluster(url) => json!({"kind": "cluster", "url": url}),
            Self::Sharded(file) => json!({"kind": "sharded", "file": file}),
        }
    }

    pub(super) fn from_json(v: &Value) -> anyhow::Result<Self> {
        let text = |k: &str| {
            v.get(k)
                .and_then(Value::as_str)
                .map(str::to_owned)
                .with_context(|| format!("it lacks {k:?}"))
        };
        Ok(match text("kind")?.as_str() {
            "configured" => Self::Configured,
            "embedded" => Self::Embedded(text("dir")?.into()),
            "single" => Self::Single(text("url")?),
            "cluster" => Self::Cluster(text("url")?),
            "sharded" => Self::Sharded(text("file")?.into()),
            other => bail!("it names a store of the unknown kind {other:?}"),
        })
    }
}

/// User, password and nodes.
type Nodes = (Option<String>, Option<String>, Vec<String>);

/// Reads `[user:password@]host:port,host:port`.
fn login(rest: &str) -> Result<Nodes, String> {
    let (login, nodes) = rest.rsplit_once('@').map_or((None, rest), |(l, n)| (Some(l), n));
    let plain = |t: &str| {
        crate::single::dial::decode(t)
            .map_err(|e| format!("the user or password of the cluster's URL can't be read: {e:#}"))
    };
    let (mut user, mut password) = (None, None);
    if let Some(login) = login {
        let (u, p) = login.split_once(':').unwrap_or((login, ""));
        (user, password) = (Some(plain(u)?).filter(|u| !u.is_empty()), Some(plain(p)?));
    }
    let nodes: Vec<String> = nodes.trim_end_matches('/').split(',').map(str::to_owned).collect();
    for n in &nodes {
        crate::sharded::control::place(n).map_err(|e| format!("{e:#}"))?;
    }
    Ok((user, password, nodes))
}

fn path(text: &str) -> Result<PathBuf, String> {
    if text.starts_with('/') {
        Ok(text.into())
    } else {
        Err(format!("{text:?} is no absolute path"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_written_and_named_without_passwords() {
        for (url, name) in [
            ("redis://:secret@h:1/", "redis://h:1/"),
            ("redis://h:1", "redis://h:1"),
            ("redis+unix:///run/r.sock", "redis+unix:///run/r.sock"),
            ("sharded:///etc/a.toml", "sharded:///etc/a.toml"),
            ("embedded:///var/x", "embedded:///var/x"),
            ("cluster://u:p%40@h:1,i:2", "cluster://h:1,i:2"),
            ("cluster://h:1", "cluster://h:1"),
        ] {
            let place = Place::parse(url).unwrap();
            assert_eq!(place.name(), name);
            assert_eq!(Place::from_json(&place.to_json()).unwrap(), place);
        }
        for bad in [
            "",
            "h:1",
            "http://x",
            "sharded://relative.toml",
            "sentinel://h:1/g",
            "cluster://h",
            "cluster://",
        ] {
            assert!(Place::parse(bad).is_err(), "{bad}");
        }
    }
}
