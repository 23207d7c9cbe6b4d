//! The application table as it is asked at run time, built from the configuration and the applications file. All problems are found at
//! once.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use serde::Deserialize;
use subtle::ConstantTimeEq;

use super::jwt::Gateways;
use super::{AppEntry, AuthzConfig, OPERATOR_APP, Operation, OthersTasks, Quota};

/// Larger than any sensible table; keeps a wrong path from being read into memory.
const MAX_APPS_FILE: u64 = 16 * 1024 * 1024;
const MAX_CODE: usize = 128;

/// Why the authorisation settings cannot be used: every problem found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthzError(pub Vec<String>);

impl fmt::Display for AuthzError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "authorisation settings: {}", self.0.join("; "))
    }
}

impl std::error::Error for AuthzError {}

/// A set of names, or all of them.
#[derive(Debug, Clone)]
pub(super) enum Allowed<T> {
    All,
    Only(HashSet<T>),
}

impl<T: std::hash::Hash + Eq> Allowed<T> {
    pub(super) fn has<Q: std::hash::Hash + Eq + ?Sized>(&self, name: &Q) -> bool
    where
        T: std::borrow::Borrow<Q>,
    {
        match self {
            Allowed::All => true,
            Allowed::Only(names) => names.contains(name),
        }
    }
}

pub(super) struct App {
    secret: Option<[u8; 32]>,
    pub(super) disabled: bool,
    pub(super) operations: Allowed<Operation>,
    pub(super) accounts: Allowed<String>,
    pub(super) agents: Allowed<String>,
    pub(super) clouds: HashSet<i32>,
    pub(super) others_tasks: OthersTasks,
    pub(super) quota: Quota,
}

impl App {
    /// Compares digests in constant time. `None` (no such application) takes as long and is never equal.
    pub(super) fn secret_matches(app: Option<&App>, digest: &[u8; 32]) -> bool {
        let stored = app.and_then(|app| app.secret);
        let equal = bool::from(stored.unwrap_or([0; 32]).ct_eq(digest));
        equal && stored.is_some()
    }
}

pub(super) struct Table {
    apps: HashMap<String, App>,
    networks: Vec<(IpNet, String)>,
    pub(super) gateways: Gateways,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AppsFile {
    #[serde(default)]
    app: Vec<AppEntry>,
}

impl Table {
    pub(super) fn build(config: &AuthzConfig) -> Result<Self, AuthzError> {
        let mut problems = Vec::new();
        let mut apps = HashMap::new();
        let mut add = |entries: &[AppEntry], from: &str, problems: &mut Vec<String>| {
            for entry in entries {
                let app = parse_app(entry, from, problems);
                if apps.insert(entry.code.clone(), app).is_some() {
                    problems.push(format!("{from}: application {:?} is there twice", entry.code));
                }
            }
        };
        add(&config.apps, "apps", &mut problems);
        if let Some(path) = &config.apps_file {
            match read_apps(path) {
                Ok(entries) => add(&entries, &path.display().to_string(), &mut problems),
                Err(problem) => problems.push(problem),
            }
        }
        let mut networks = Vec::new();
        for network in &config.trusted_networks {
            if !apps.contains_key(&network.app) {
                problems.push(format!(
                    "trusted_networks: {} belongs to {:?}, which is no application",
                    network.cidr, network.app
                ));
            }
            networks.push((network.cidr.trunc(), network.app.clone()));
        }
        // The most specific network decides.
        networks.sort_by_key(|(net, _)| std::cmp::Reverse(net.prefix_len()));
        let gateways = Gateways::load(&config.gateway_keys, &mut problems);
        if problems.is_empty() {
            Ok(Table {
                apps,
                networks,
                gateways,
            })
        } else {
            Err(AuthzError(problems))
        }
    }

    pub(super) fn app(&self, code: &str) -> Option<&App> {
        self.apps.get(code)
    }

    pub(super) fn network(&self, address: IpAddr) -> Option<(IpNet, &str)> {
        let address = address.to_canonical();
        self.networks
            .iter()
            .find(|(net, _)| net.contains(&address))
            .map(|(net, app)| (*net, app.as_str()))
    }

    pub(super) fn len(&self) -> usize {
        self.apps.len()
    }
}

fn read_apps(path: &Path) -> Result<Vec<AppEntry>, String> {
    let fail = |reason: &dyn fmt::Display| format!("apps_file {}: {reason}", path.display());
    let size = std::fs::metadata(path).map_err(|error| fail(&error))?.len();
    if size > MAX_APPS_FILE {
        return Err(fail(&format_args!(
            "{size} bytes is too large for a table of applications"
        )));
    }
    let text = std::fs::read_to_string(path).map_err(|error| fail(&error))?;
    toml::from_str::<AppsFile>(&text).map(|file| file.app).map_err(|error| {
        // The library's own rendering quotes the line, which may hold a digest.
        let line = error
            .span()
            .map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
        fail(&format_args!("{place}{}", error.message()))
    })
}

fn parse_app(entry: &AppEntry, from: &str, problems: &mut Vec<String>) -> App {
    let mut problem = |text: String| problems.push(format!("{from}: application {:?}: {text}", entry.code));
    if entry.code.is_empty()
        || entry.code.len() > MAX_CODE
        || entry.code.chars().any(|c| c.is_control() || c.is_whitespace())
    {
        problem(format!("code has to be 1 to {MAX_CODE} bytes without spaces"));
    }
    if entry.code == OPERATOR_APP {
        problem("this code is reserved for operators' certificates".to_owned());
    }
    let secret = entry.secret_sha256.as_ref().and_then(|text| {
        let mut digest = [0; 32];
        match hex::decode_to_slice(text, &mut digest) {
            Ok(()) => Some(digest),
            Err(_) => {
                problem("secret_sha256 is not the hex of a SHA-256 digest (64 digits)".to_owned());
                None
            }
        }
    });
    let mut operations = HashSet::new();
    let mut all_operations = false;
    for name in &entry.operations {
        match name.as_str() {
            "*" => all_operations = true,
            name => match name.parse() {
                Ok(operation) => drop(operations.insert(operation)),
                Err(error) => problem(format!("operations: {error}")),
            },
        }
    }
    let mut agents = HashSet::new();
    let mut clouds = HashSet::new();
    let mut all_targets = false;
    for name in &entry.targets {
        match (name.as_str(), name.strip_prefix("cloud:")) {
            ("*", _) => all_targets = true,
            ("", _) => problem("targets: an empty name".to_owned()),
            (_, Some(cloud)) => match cloud.parse() {
                Ok(cloud) => drop(clouds.insert(cloud)),
                Err(_) => problem(format!("targets: {name:?} is not cloud:<number>")),
            },
            (id, None) if id.contains('*') => {
                problem(format!("targets: {id:?}: patterns are not supported, only \"*\" alone"))
            }
            (id, None) => drop(agents.insert(id.to_owned())),
        }
    }
    let mut accounts = HashSet::new();
    let mut all_accounts = false;
    for name in &entry.accounts {
        match name.as_str() {
            "*" => all_accounts = true,
            "" => problem("accounts: an empty name".to_owned()),
            name if name.contains('*') => problem(format!(
                "accounts: {name:?}: patterns are not supported, only \"*\" alone"
            )),
            name => drop(accounts.insert(name.to_owned())),
        }
    }
    for (name, value) in [
        ("max_running_tasks", entry.max_running_tasks),
        ("max_targets_per_minute", entry.max_targets_per_minute),
    ] {
        if value == Some(0) {
            problem(format!(
                "{name} is 0, which would refuse everything; leave it out for no limit, or take operations away"
            ));
        }
    }
    App {
        secret,
        disabled: entry.disabled,
        operations: if all_operations {
            Allowed::All
        } else {
            Allowed::Only(operations)
        },
        accounts: if all_accounts {
            Allowed::All
        } else {
            Allowed::Only(accounts)
        },
        agents: if all_targets {
            Allowed::All
        } else {
            Allowed::Only(agents)
        },
        clouds,
        others_tasks: entry.others_tasks,
        quota: Quota {
            running_tasks: entry.max_running_tasks,
            targets_per_minute: entry.max_targets_per_minute,
        },
    }
}
