//! A whole site: certificates, application table, store, servers, agents.
//!
//! The store is in `stores`, gse_task in `nodes`, gse_btsvr in `files`, gse_data in `data`, gse_procmgr in `procs`.

mod alarm;
mod data;
mod files;
mod groups;
mod nodes;
mod procs;
mod stores;
mod sync;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use gse_core::certs::Authority;
use gse_core::tls::Role;
use sha2::Digest;
use tempfile::TempDir;

use crate::api::Api;
use crate::eventually;
use crate::process::{Child, binary};
use crate::proxy::Proxy;

/// Code of the application that may do everything.
pub const APP: &str = "bk_job";
/// Its secret.
pub const SECRET: &str = "a-secret-of-the-tests";
/// Code of an application that may only run as `nobody`, and only see its own tasks.
pub const SMALL_APP: &str = "bk_small";

const STORE_PASSWORD: &str = "store-password-of-the-tests";

/// Listeners by name.
type Places = BTreeMap<String, String>;

/// What the state is kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreKind {
    /// gse_dba with its own store.
    Embedded,
    /// gse_dba in front of one Redis.
    Single,
    /// One Redis.
    Redis,
    /// A Redis Cluster of three.
    Cluster,
}

/// How an agent is to be set up.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// Its id.
    pub id: String,
    /// Its addresses; these make its `cloud:ip` names.
    pub addresses: Vec<String>,
    /// More settings (`key=value`, as on the command line).
    pub sets: Vec<String>,
    /// Runs it on another host, as far as it can see: with a machine id and a boot id of its own.
    pub other_host: bool,
    /// Directories that it sees at other places, and these places.
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// Which nodes it is told of; `None`: all there are.
    pub nodes: Option<Vec<u32>>,
}

impl AgentOptions {
    /// An agent with an id of its own and one address.
    #[must_use]
    pub fn new(id: &str, address: &str) -> Self {
        Self {
            id: id.into(),
            addresses: vec![address.into()],
            sets: vec![],
            other_host: false,
            binds: vec![],
            nodes: None,
        }
    }
}

/// The site. Everything is killed and removed when dropped.
#[derive(Debug)]
pub struct Site {
    /// Processes of the store, first in, last out.
    pub store: Vec<Child>,
    /// gse_task, where there is one of it.
    pub task: Option<Child>,
    /// gse_task, where there are several: by their number.
    pub nodes: BTreeMap<u32, Child>,
    /// gse_api.
    pub api: Option<Child>,
    /// gse_btsvr, by the number of the instance.
    pub btsvr: BTreeMap<u32, Child>,
    /// More settings for gse_btsvr, every instance of it.
    pub btsvr_sets: Vec<String>,
    /// Where each instance of it listened.
    btsvr_places: BTreeMap<u32, Places>,
    /// gse_procmgr, by the number of the instance.
    pub procmgr: BTreeMap<u32, Child>,
    /// More settings for gse_procmgr, every instance of it.
    pub procmgr_sets: Vec<String>,
    /// Where each instance of it listened.
    procmgr_places: BTreeMap<u32, Places>,
    /// More settings for gse_task, every node of it.
    pub task_sets: Vec<String>,
    /// More settings for single nodes of it.
    pub node_sets: BTreeMap<u32, Vec<String>>,
    /// More settings for gse_api.
    pub api_sets: Vec<String>,
    /// Between the servers and the store, if asked for; what it does to them can be changed at any time.
    pub store_proxy: Option<Proxy>,
    store_url: String,
    /// What is behind gse_dba, when that is groups of Redis.
    groups: Option<groups::Groups>,
    /// Where each node listened, so that it comes back there.
    places: BTreeMap<u32, Places>,
    authority: Authority,
    dir: TempDir,
}

impl Site {
    /// Certificates and a running store; no servers yet.
    ///
    /// # Errors
    /// When the store does not start.
    pub async fn with_store(kind: StoreKind) -> Result<Self> {
        let mut dir = tempfile::Builder::new().prefix("gse-site-").tempdir()?;
        // To look at the logs afterwards.
        dir.disable_cleanup(std::env::var_os("GSE_TESTS_KEEP").is_some());
        let certs = dir.path().join("certs");
        let authority = Authority::create(&certs)?;
        authority.issue(
            Role::Server,
            None,
            &["localhost".into()],
            &certs.join("gse_server.crt"),
            &certs.join("gse_server.key"),
            365,
        )?;
        let mut site = Self {
            store: vec![],
            task: None,
            nodes: BTreeMap::new(),
            node_sets: BTreeMap::new(),
            api: None,
            btsvr: BTreeMap::new(),
            btsvr_sets: vec!["fleet.heartbeat_interval_ms=1000".into()],
            btsvr_places: BTreeMap::new(),
            procmgr: BTreeMap::new(),
            procmgr_sets: vec!["fleet.heartbeat_interval_ms=1000".into()],
            procmgr_places: BTreeMap::new(),
            // Short enough that tests of silence do not take minutes.
            task_sets: vec!["session.heartbeat_interval_ms=1000".into()],
            api_sets: vec!["heartbeat_interval_s=1".into()],
            store_proxy: None,
            store_url: String::new(),
            groups: None,
            places: BTreeMap::new(),
            authority,
            dir,
        };
        site.write_apps()?;
        site.start_store(kind).await?;
        Ok(site)
    }

    /// The usual site: a store, gse_task and gse_api.
    ///
    /// # Errors
    /// When something does not start.
    pub async fn start(kind: StoreKind) -> Result<Self> {
        let mut site = Self::with_store(kind).await?;
        site.start_task().await?;
        site.start_api().await?;
        Ok(site)
    }

    /// The usual site with the store that is built in, and one agent.
    ///
    /// # Panics
    /// When something does not start.
    pub async fn with_agent(id: &str) -> (Self, Child) {
        let site = Self::start(StoreKind::Embedded).await.expect("a site");
        let agent = site.agent(id, "10.11.12.13").await.expect("an agent");
        (site, agent)
    }

    /// Directory of the site.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    fn write_apps(&self) -> Result<()> {
        let hash = hex::encode(sha2::Sha256::digest(SECRET.as_bytes()));
        let apps = format!(
            r#"
[[app]]
code = "{APP}"
secret_sha256 = "{hash}"
operations = ["*"]
accounts = ["*"]
targets = ["*"]
others_tasks = "none"

[[app]]
code = "{SMALL_APP}"
secret_sha256 = "{hash}"
operations = ["script.execute", "script.read", "script.terminate", "agent.state"]
accounts = ["nobody"]
targets = ["*"]
others_tasks = "none"
"#
        );
        std::fs::write(self.path().join("apps.toml"), apps)?;
        Ok(())
    }

    /// Starts gse_api (again).
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start_api(&mut self) -> Result<()> {
        let certs = self.path().join("certs");
        let previous = self.api.as_ref().map_or("127.0.0.1:0", |api| api.address("http"));
        let mut sets = vec![
            format!("http.listen={previous}"),
            format!("audit.file={}", self.path().join("api-audit.log").display()),
            format!("tls.ca={}", certs.join("gseca.crt").display()),
            format!("tls.cert={}", certs.join("gse_server.crt").display()),
            format!("tls.key={}", certs.join("gse_server.key").display()),
        ];
        // Several nodes are found through the store.
        if let Some(task) = &self.task {
            sets.push(format!("upstreams.task=[\"{}\"]", task.address("internal")));
        }
        if !self.procmgr.is_empty() {
            let all = self.procmgr.values();
            let all: Vec<String> = all.map(|child| format!("\"{}\"", child.address("internal"))).collect();
            sets.push(format!("upstreams.proc=[{}]", all.join(",")));
        }
        sets.extend(self.common_sets());
        sets.extend(self.api_sets.iter().cloned());
        self.api = Some(self.server("gse_api", &sets).await?);
        Ok(())
    }

    fn common_sets(&self) -> Vec<String> {
        vec![
            format!("authz.apps_file={}", self.path().join("apps.toml").display()),
            format!("store.url={}", self.server_store_url()),
        ]
    }

    async fn server(&self, name: &str, sets: &[String]) -> Result<Child> {
        self.run_server(Command::new(binary(name)?), name, sets).await
    }

    /// Starts a server whose log is called `name` and waits until it is ready.
    async fn run_server(&self, mut command: Command, name: &str, sets: &[String]) -> Result<Child> {
        let addresses = self
            .path()
            .join(format!("{name}-{:08x}.addresses", rand::random::<u32>()));
        for set in sets {
            command.args(["--set", set]);
        }
        command.args(["--set", "ops.listen=127.0.0.1:0"]);
        command.args(["--set", &format!("runtime.addresses_file={}", addresses.display())]);
        let mut child = Child::spawn(name, command, &self.path().join(format!("{name}.log")))?;
        child.ready(&addresses).await?;
        Ok(child)
    }

    /// Certificate and key for an agent, made if need be.
    ///
    /// # Errors
    /// When they can't be made.
    pub fn agent_certificate(&self, id: &str) -> Result<(PathBuf, PathBuf)> {
        let dir = self.path().join("certs").join(hex::encode(id));
        let pair = (dir.join("gse_agent.crt"), dir.join("gse_agent.key"));
        if !pair.0.exists() {
            std::fs::create_dir_all(&dir)?;
            self.authority
                .issue(Role::Agent, Some(id), &[], &pair.0, &pair.1, 365)?;
        }
        Ok(pair)
    }

    /// Starts an agent whose data is kept under its id, so that it can be started again; `suffix` tells clones apart.
    ///
    /// # Errors
    /// When it does not start.
    pub fn spawn_agent(&self, options: &AgentOptions, suffix: &str) -> Result<Child> {
        let (cert, key) = self.agent_certificate(&options.id)?;
        let data = self.path().join(format!("agent-{}{suffix}", hex::encode(&options.id)));
        std::fs::create_dir_all(&data)?;
        let servers = match &options.nodes {
            Some(nodes) => nodes.iter().map(|n| self.agents_address(*n)).collect(),
            None => self.agents_addresses(),
        };
        let servers: Vec<String> = servers.iter().map(|a| format!("\"{a}\"")).collect();
        anyhow::ensure!(!servers.is_empty(), "gse_task is not running");
        let addresses: Vec<String> = options.addresses.iter().map(|a| format!("\"{a}\"")).collect();
        let mut sets = vec![
            format!("agent_id=\"{}\"", options.id),
            "cloud_id=0".into(),
            format!("servers=[{}]", servers.join(",")),
            format!("addresses=[{}]", addresses.join(",")),
            format!("data_dir={}", data.display()),
            format!("tls.ca={}", self.path().join("certs/gseca.crt").display()),
            format!("tls.cert={}", cert.display()),
            format!("tls.key={}", key.display()),
            "reconnect.min_ms=50".into(),
            "reconnect.max_ms=500".into(),
            "ops.listen=".into(),
            // Their addresses are made up.
            "files.peer_address=127.0.0.1".into(),
            "files.peer_port_first=0".into(),
            "files.peer_port_last=0".into(),
            format!(
                "data.socket.paths=[\"{}\"]",
                self.socket(&options.id, suffix, "report").display()
            ),
            format!(
                "messages.paths=[\"{}\"]",
                self.socket(&options.id, suffix, "message").display()
            ),
        ];
        sets.extend(options.sets.iter().cloned());
        let mut command = if options.other_host || !options.binds.is_empty() {
            self.on_another_host(&data, options)?
        } else {
            Command::new(binary("gse_agent")?)
        };
        for set in &sets {
            command.args(["--set", set]);
        }
        // An environment that no script may see.
        command.env("GSE_TEST_AGENT_ENVIRONMENT", "leaked");
        let name = format!("gse_agent {}{suffix}", options.id);
        Child::spawn(&name, command, &self.path().join("gse_agent.log"))
    }

    /// Where an agent's plugins connect: in the site's directory under a short name, because the path of a socket may not be long.
    #[must_use]
    pub fn data_socket(&self, id: &str) -> PathBuf {
        self.socket(id, "", "report")
    }

    /// Where its plugins wait for messages, likewise.
    #[must_use]
    pub fn message_socket(&self, id: &str) -> PathBuf {
        self.socket(id, "", "message")
    }

    fn socket(&self, id: &str, suffix: &str, kind: &str) -> PathBuf {
        let name = hex::encode(sha2::Sha256::digest(format!("{id}{suffix}")));
        self.path().join(format!("{}.{kind}", &name[..12]))
    }

    /// The agent's program in a mount namespace in which the files that identify the host are other ones.
    fn on_another_host(&self, data: &Path, options: &AgentOptions) -> Result<Command> {
        let mut mounts = String::new();
        for (from, to) in &options.binds {
            mounts.push_str(&format!("mount --bind {} {} && ", from.display(), to.display()));
        }
        let files = [
            ("/etc/machine-id", "0123456789abcdef0123456789ab0bad\n"),
            (
                "/proc/sys/kernel/random/boot_id",
                "01234567-89ab-cdef-0123-456789ab0bad\n",
            ),
        ];
        for (file, id) in files.into_iter().filter(|_| options.other_host) {
            if Path::new(file).exists() {
                let other = data.join(file.replace('/', "_"));
                std::fs::write(&other, id)?;
                mounts.push_str(&format!("mount --bind {} {file} && ", other.display()));
            }
        }
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &format!("{mounts} exec \"$@\""), "sh"]);
        command.arg(binary("gse_agent")?);
        Ok(command)
    }

    /// Starts an agent and waits until it is reported as running.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn agent(&self, id: &str, address: &str) -> Result<Child> {
        let child = self.spawn_agent(&AgentOptions::new(id, address), "")?;
        self.wait_state(id, 2).await;
        Ok(child)
    }

    /// Waits until an agent has a state.
    ///
    /// # Panics
    /// When it does not within 15 s.
    pub async fn wait_state(&self, id: &str, status: i64) {
        let api = self.api();
        eventually(
            &format!("agent {id} in state {status}"),
            Duration::from_secs(15),
            || async { (api.agent_state(id).await["status_code"] == status).then_some(()) },
        )
        .await;
    }

    /// The site's front door, as the application that may do everything.
    ///
    /// # Panics
    /// When gse_api is not running.
    #[must_use]
    pub fn api(&self) -> Api {
        Api::new(
            self.api.as_ref().expect("gse_api is running").address("http"),
            APP,
            SECRET,
        )
    }

    /// gse_task's own port.
    ///
    /// # Panics
    /// When gse_task is not running.
    #[must_use]
    pub fn task_api(&self) -> Api {
        Api::new(
            self.task.as_ref().expect("gse_task is running").address("http"),
            APP,
            SECRET,
        )
    }
}
