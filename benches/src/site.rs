//! A private site in a temporary directory: the real programs beside this one, with real certificates and a real store, on free ports.
//!
//! Settings are the defaults unless the command line says otherwise, because the defaults are what is to be measured.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use gse_core::certs::Authority;
use gse_core::tls::Role;
use sha2::Digest;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::proc::{self, Usage};

/// Code of the application that asks.
pub(crate) const APP: &str = "bk_job";
/// Its secret.
pub(crate) const SECRET: &str = "a-secret-of-the-benches";
const STORE_PASSWORD: &str = "store-password-of-the-benches";
/// For a program to be ready.
const START: Duration = Duration::from_secs(30);

/// What site is wanted.
#[derive(Debug, Clone, Args)]
pub(crate) struct SiteOptions {
    /// A real redis-server (appendonly) in place of gse_dba.
    #[arg(long)]
    pub(crate) redis: bool,
    /// Nodes of gse_task.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=9))]
    pub(crate) nodes: u32,
    /// More settings for gse_task, as for its own --set.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set_task: Vec<String>,
    /// More settings for gse_dba.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set_dba: Vec<String>,
    /// More settings for gse_api.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set_api: Vec<String>,
    /// Keep the directory with logs and data, and say where it is.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Where the programs are; beside this one when not given.
    #[arg(long, value_name = "DIR")]
    pub(crate) programs: Option<PathBuf>,
}

/// A running program; killed when dropped.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) name: String,
    child: Child,
    log: PathBuf,
    addresses: BTreeMap<String, String>,
}

impl Program {
    /// Starts one that says nothing of its addresses.
    ///
    /// # Errors
    /// When it can't be started.
    pub(crate) fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .kill_on_drop(true);
        let program = command.as_std().get_program().to_owned();
        let child = command.spawn().with_context(|| {
            let path = Path::new(&program).display();
            format!("cannot start {path}; build it first, in the profile of this program: cargo build -p gse-task -p gse-dba -p gse-api -p gse-agent")
        })?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
            addresses: BTreeMap::new(),
        })
    }

    async fn ready(&mut self, addresses: &Path) -> Result<()> {
        let started = Instant::now();
        loop {
            if let Ok(text) = std::fs::read_to_string(addresses)
                && let Ok(read) = serde_json::from_str(&text)
            {
                self.addresses = read;
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status}: {}", self.name, self.log_tail());
            }
            if started.elapsed() > START {
                bail!("{} is not ready: {}", self.name, self.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Where a listener is.
    pub(crate) fn address(&self, listener: &str) -> Result<&str> {
        let address = self.addresses.get(listener).map(String::as_str);
        address.with_context(|| format!("{} has no listener {listener}", self.name))
    }

    /// Its process.
    pub(crate) fn pid(&self) -> Result<u32> {
        let id = self.child.id();
        id.with_context(|| format!("{} has ended: {}", self.name, self.log_tail()))
    }

    /// CPU and memory so far.
    pub(crate) fn usage(&self) -> Result<Usage> {
        proc::usage(self.pid()?).with_context(|| format!("{}: {}", self.name, self.log_tail()))
    }

    /// SIGKILL, and waits for the end.
    pub(crate) async fn kill_9(&mut self) -> Result<()> {
        self.child
            .kill()
            .await
            .with_context(|| format!("killing {}", self.name))
    }

    fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let log = self.log_text();
        let lines: Vec<&str> = log.lines().rev().take(20).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Lines of the log that are warnings or errors.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let log = self.log_text();
        let bad = |line: &&str| line.contains(" WARN ") || line.contains("ERROR ") || line.contains("panicked");
        log.lines()
            .filter(bad)
            .map(|line| format!("{}: {line}", self.name))
            .collect()
    }

    /// What its operations listener answers, status line first.
    async fn operations(&self, path: &str) -> Result<String> {
        let mut stream = tokio::net::TcpStream::connect(self.address("ops")?).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer))
            .await
            .with_context(|| format!("{path} of {}", self.name))??;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Waits until it says that it has all that it needs.
    async fn healthy(&self) -> Result<()> {
        let started = Instant::now();
        loop {
            let answer = self.operations("/readyz").await?;
            if answer.starts_with("HTTP/1.1 200") {
                return Ok(());
            }
            ensure!(started.elapsed() < START, "{} is not ready: {answer}", self.name);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Counters and gauges of its operations listener: each by its name with labels, and the sums of all of one name.
    pub(crate) async fn metrics(&self) -> Result<BTreeMap<String, f64>> {
        let answer = self.operations("/metrics").await?;
        let mut sums = BTreeMap::new();
        for line in answer.lines().filter(|line| !line.starts_with('#')) {
            if let Some((name, value)) = line.rsplit_once(' ')
                && let Ok(value) = value.trim().parse::<f64>()
            {
                let plain = name.split('{').next().unwrap_or(name);
                *sums.entry(plain.to_owned()).or_insert(0.0) += value;
                if plain != name {
                    *sums.entry(name.to_owned()).or_insert(0.0) += value;
                }
            }
        }
        Ok(sums)
    }
}

/// The site. Programs are killed and the directory removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Site {
    api: Option<Program>,
    /// The nodes of gse_task.
    pub(crate) tasks: Vec<Program>,
    pub(crate) store: Program,
    options: SiteOptions,
    shared_certificate: bool,
    store_url: String,
    programs: PathBuf,
    dir: TempDir,
}

impl Site {
    /// Starts everything.
    ///
    /// # Errors
    /// When something does not start; the end of its log is in the text.
    pub(crate) async fn start(options: &SiteOptions, shared_certificate: bool) -> Result<Self> {
        let mut dir = tempfile::Builder::new().prefix("gse-benches-").tempdir()?;
        dir.disable_cleanup(options.keep);
        if options.keep {
            eprintln!("logs and data: {}", dir.path().display());
        }
        let programs = match &options.programs {
            Some(dir) => dir.clone(),
            None => beside_us()?,
        };
        let certs = dir.path().join("certs");
        let authority = Authority::create(&certs)?;
        let (cert, key) = (certs.join("gse_server.crt"), certs.join("gse_server.key"));
        authority.issue(Role::Server, None, &["localhost".into()], &cert, &key, 365)?;
        let hash = hex::encode(sha2::Sha256::digest(SECRET.as_bytes()));
        let apps = format!(
            "[[app]]\ncode = \"{APP}\"\nsecret_sha256 = \"{hash}\"\noperations = [\"*\"]\naccounts = [\"*\"]\ntargets = [\"*\"]\n"
        );
        std::fs::write(dir.path().join("apps.toml"), apps)?;
        let (store, store_url) = if options.redis {
            start_redis(dir.path()).await?
        } else {
            let mut sets = vec![
                format!("password={STORE_PASSWORD}"),
                format!("embedded.dir={}", dir.path().join("store").display()),
                "listen=127.0.0.1:0".into(),
                "backend=embedded".into(),
            ];
            sets.extend(options.set_dba.iter().cloned());
            let dba = start(dir.path(), &programs, "gse_dba", &sets).await?;
            let url = format!("redis://:{STORE_PASSWORD}@{}", dba.address("resp")?);
            (dba, url)
        };
        let mut site = Self {
            api: None,
            tasks: vec![],
            store,
            options: options.clone(),
            shared_certificate,
            store_url,
            programs,
            dir,
        };
        for node in 0..options.nodes {
            let task = site.start_node(node, None).await?;
            site.tasks.push(task);
        }
        let mut sets = common_sets(site.dir.path(), &site.store_url);
        sets.extend(tls_sets("tls", &certs));
        sets.push("http.listen=127.0.0.1:0".into());
        let audit = site.dir.path().join("api-audit.log");
        sets.push(format!("audit.file={}", audit.display()));
        if let [task] = &site.tasks[..] {
            sets.push(format!("upstreams.task=[\"{}\"]", task.address("internal")?));
        }
        sets.extend(options.set_api.iter().cloned());
        let api = start(site.dir.path(), &site.programs, "gse_api", &sets).await?;
        // It looks for the nodes by itself.
        api.healthy().await?;
        site.api = Some(api);
        Ok(site)
    }

    async fn start_node(&self, node: u32, before: Option<&Program>) -> Result<Program> {
        let sets = self.task_sets(node, before);
        let name = if self.options.nodes == 1 {
            "gse_task".to_owned()
        } else {
            format!("gse_task {}", node + 1)
        };
        start_as(self.dir.path(), &self.programs, "gse_task", &name, &sets).await
    }

    fn task_sets(&self, node: u32, before: Option<&Program>) -> Vec<String> {
        let dir = self.dir.path();
        let mut sets = common_sets(dir, &self.store_url);
        let several = self.options.nodes > 1;
        let mut listeners = vec!["agents", "http", "internal"];
        if several {
            sets.push(format!("node_id=bench-{}", node + 1));
            listeners.push("rpc");
        }
        for listener in listeners {
            let address = before
                .and_then(|task| task.address(listener).ok())
                .unwrap_or("127.0.0.1:0");
            sets.push(format!("{listener}.listen={address}"));
        }
        for table in ["agents.tls", "internal.tls"] {
            sets.extend(tls_sets(table, &dir.join("certs")));
        }
        sets.push(format!("audit.file={}", dir.join(audit_name(node)).display()));
        sets.push(format!("agents.allow_shared_certificate={}", self.shared_certificate));
        sets.extend(self.options.set_task.iter().cloned());
        sets
    }

    /// gse_api.
    pub(crate) fn api(&self) -> Result<&Program> {
        self.api.as_ref().context("gse_api is not running")
    }

    /// Where agents connect, on every node.
    pub(crate) fn agents(&self) -> Result<Vec<&str>> {
        self.tasks.iter().map(|task| task.address("agents")).collect()
    }

    /// All servers: nodes of gse_task, the store, gse_api.
    pub(crate) fn servers(&self) -> impl Iterator<Item = &Program> {
        self.tasks.iter().chain([&self.store]).chain(&self.api)
    }

    /// Sum of the counters of all nodes of gse_task.
    pub(crate) async fn metrics(&self) -> Result<BTreeMap<String, f64>> {
        let mut sums = BTreeMap::new();
        for task in &self.tasks {
            for (name, value) in task.metrics().await? {
                *sums.entry(name).or_insert(0.0) += value;
            }
        }
        Ok(sums)
    }

    /// A real agent with its default settings.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn real_agent(&self, id: &str, more: &[String]) -> Result<Program> {
        self.named_agent("gse_agent", id, more).await
    }

    /// One of several.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn named_agent(&self, name: &str, id: &str, more: &[String]) -> Result<Program> {
        let dir = self.dir.path();
        let data = dir.join(format!("{name}-data"));
        std::fs::create_dir_all(&data)?;
        let (cert, key) = (data.join("gse_agent.crt"), data.join("gse_agent.key"));
        let authority = Authority::open(self.certs())?;
        authority.issue(Role::Agent, Some(id), &[], &cert, &key, 365)?;
        let servers: Vec<String> = self.agents()?.iter().map(|a| format!("\"{a}\"")).collect();
        let mut sets = vec![
            format!("agent_id=\"{id}\""),
            format!("servers=[{}]", servers.join(",")),
            "addresses=[\"10.0.0.1\"]".into(),
            format!("data_dir={}", data.display()),
            format!("tls.ca={}", self.certs().join("gseca.crt").display()),
            format!("tls.cert={}", cert.display()),
            format!("tls.key={}", key.display()),
        ];
        sets.extend(more.iter().cloned());
        start_as(dir, &self.programs, "gse_agent", name, &sets).await
    }

    /// gse_btsvr, on free ports.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn btsvr(&self, more: &[String]) -> Result<Program> {
        let dir = self.dir.path();
        let mut sets = common_sets(dir, &self.store_url);
        for table in ["link.tls", "internal.tls"] {
            sets.extend(tls_sets(table, &self.certs()));
        }
        for listener in ["link", "http", "internal"] {
            sets.push(format!("{listener}.listen=127.0.0.1:0"));
        }
        sets.push("node_id=files-1".into());
        sets.push(format!("audit.file={}", dir.join("files-audit.log").display()));
        sets.extend(more.iter().cloned());
        start(dir, &self.programs, "gse_btsvr", &sets).await
    }

    /// gse_procmgr, on free ports; gse_api finds it by itself.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn procmgr(&self, more: &[String]) -> Result<Program> {
        let dir = self.dir.path();
        let mut sets = common_sets(dir, &self.store_url);
        sets.extend(tls_sets("internal.tls", &self.certs()));
        sets.extend([
            "http.listen=127.0.0.1:0".into(),
            "internal.listen=127.0.0.1:0".into(),
            format!("audit.file={}", dir.join("procmgr-audit.log").display()),
        ]);
        sets.extend(more.iter().cloned());
        start(dir, &self.programs, "gse_procmgr", &sets).await
    }

    /// gse_data, on free ports, with no listener for other servers.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn data(&self, more: &[String]) -> Result<Program> {
        let dir = self.dir.path();
        let mut sets = common_sets(dir, &self.store_url);
        sets.extend(tls_sets("link.tls", &self.certs()));
        sets.extend([
            "link.listen=127.0.0.1:0".into(),
            "http.listen=127.0.0.1:0".into(),
            "internal.listen=".into(),
            format!("audit.file={}", dir.join("data-audit.log").display()),
            format!("data_dir={}", dir.join("gse_data").display()),
        ]);
        sets.extend(more.iter().cloned());
        start(dir, &self.programs, "gse_data", &sets).await
    }

    /// gse_syncdata, on free ports.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn sync(&self, more: &[String]) -> Result<Program> {
        let dir = self.dir.path();
        let mut sets = common_sets(dir, &self.store_url);
        sets.extend(tls_sets("internal.tls", &self.certs()));
        sets.extend([
            "internal.listen=127.0.0.1:0".into(),
            format!("audit.file={}", dir.join("sync-audit.log").display()),
        ]);
        sets.extend(more.iter().cloned());
        start(dir, &self.programs, "gse_syncdata", &sets).await
    }

    /// Directory of the site.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Directory with the authority and the certificates.
    pub(crate) fn certs(&self) -> PathBuf {
        self.dir.path().join("certs")
    }

    /// Bytes that the store has on the disk.
    pub(crate) fn store_bytes(&self) -> Result<u64> {
        proc::dir_bytes(&self.dir.path().join("store"))
    }

    /// Bytes that gse_task has written to its audit trail and its log.
    pub(crate) fn trail_bytes(&self) -> Result<(u64, u64)> {
        let size = |path: &Path| -> Result<u64> {
            let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
            Ok(meta.len())
        };
        let (mut audit, mut log) = (0, 0);
        for (node, task) in (0..).zip(&self.tasks) {
            audit += size(&self.dir.path().join(audit_name(node)))?;
            log += size(&task.log)?;
        }
        Ok((audit, log))
    }

    /// SIGKILL to every node of gse_task.
    ///
    /// # Errors
    /// When one was not running.
    pub(crate) async fn kill_tasks(&mut self) -> Result<()> {
        for task in &mut self.tasks {
            task.kill_9().await?;
        }
        Ok(())
    }

    /// Starts them again, at the same addresses.
    ///
    /// # Errors
    /// When one does not start.
    pub(crate) async fn restart_tasks(&mut self) -> Result<()> {
        for node in 0..self.options.nodes {
            let place = node as usize;
            let task = self.start_node(node, self.tasks.get(place)).await?;
            if let Some(old) = self.tasks.get_mut(place) {
                *old = task;
            }
        }
        Ok(())
    }

    /// Warnings and errors in all logs.
    pub(crate) fn complaints(&self) -> Vec<String> {
        self.servers().flat_map(Program::complaints).collect()
    }
}

fn audit_name(node: u32) -> String {
    format!("task-audit-{node}.log")
}

/// The directory of this program, where the others are built too.
///
/// # Errors
/// When the system does not say where that is.
pub(crate) fn beside_us() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("path of this program")?;
    Ok(exe.parent().context("this program is in no directory")?.to_owned())
}

fn common_sets(dir: &Path, store_url: &str) -> Vec<String> {
    vec![
        format!("authz.apps_file={}", dir.join("apps.toml").display()),
        format!("store.url={store_url}"),
    ]
}

fn tls_sets(table: &str, certs: &Path) -> Vec<String> {
    [
        ("ca", "gseca.crt"),
        ("cert", "gse_server.crt"),
        ("key", "gse_server.key"),
    ]
    .iter()
    .map(|(key, file)| format!("{table}.{key}={}", certs.join(file).display()))
    .collect()
}

async fn start(dir: &Path, programs: &Path, binary: &str, sets: &[String]) -> Result<Program> {
    start_as(dir, programs, binary, binary, sets).await
}

async fn start_as(dir: &Path, programs: &Path, binary: &str, name: &str, sets: &[String]) -> Result<Program> {
    start_program(dir, &programs.join(binary), name, sets).await
}

/// Starts one of ours by its path, on a free port for operations.
///
/// # Errors
/// When it does not start.
pub(crate) async fn start_program(dir: &Path, path: &Path, name: &str, sets: &[String]) -> Result<Program> {
    let file = name.trim_end().replace(' ', "-");
    let addresses = dir.join(format!("{file}-{:08x}.addresses", rand::random::<u32>()));
    let mut command = Command::new(path);
    for set in sets {
        command.args(["--set", set]);
    }
    command.args(["--set", "ops.listen=127.0.0.1:0"]);
    command.args(["--set", &format!("runtime.addresses_file={}", addresses.display())]);
    let mut program = Program::spawn(name, command, &dir.join(format!("{file}.log")))?;
    program.ready(&addresses).await?;
    Ok(program)
}

async fn start_redis(dir: &Path) -> Result<(Program, String)> {
    let data = dir.join("store");
    std::fs::create_dir_all(&data)?;
    let mut last = String::new();
    for _ in 0..20 {
        let port = rand::random_range(20_000..30_000_u16);
        let mut command = Command::new("redis-server");
        command
            .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"])
            .args(["--requirepass", STORE_PASSWORD, "--port", &port.to_string(), "--dir"])
            .arg(&data);
        let mut redis = Program::spawn("redis-server", command, &dir.join("redis.log"))?;
        let started = Instant::now();
        while started.elapsed() < START && redis.child.try_wait()?.is_none() {
            if tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() && redis.child.try_wait()?.is_none() {
                return Ok((redis, format!("redis://:{STORE_PASSWORD}@127.0.0.1:{port}")));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        last = redis.log_tail();
    }
    bail!("redis-server does not start (Debian package redis-server): {last}")
}
