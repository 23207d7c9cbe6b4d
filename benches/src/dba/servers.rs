//! What is measured: Redis servers with their copies, twemproxy, and gse_dba before them, all on free ports of loopback.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use super::Kind;
use crate::site::{self, Program};

/// What clients of gse_dba show.
pub(crate) const PASSWORD: &str = "password-of-the-benches";
/// For a server to be there.
const START: Duration = Duration::from_secs(20);

/// Where a load can be put.
pub(crate) struct Target {
    pub(crate) kind: Kind,
    /// Which build of gse_dba, when it is not the one beside this program.
    pub(crate) build: String,
    pub(crate) port: u16,
    pub(crate) password: Option<&'static str>,
    /// What stands between.
    program: Option<Program>,
}

impl Target {
    /// The process whose CPU counts.
    pub(crate) fn process(&self) -> Result<Option<u32>> {
        self.program.as_ref().map(Program::pid).transpose()
    }
}

/// Everything; killed when dropped.
pub(crate) struct Servers {
    pub(crate) targets: Vec<Target>,
    /// What could not be measured, and why.
    pub(crate) missing: Vec<String>,
    programs: PathBuf,
    sets: Vec<String>,
    redis: Vec<Redis>,
    single: u16,
    dir: TempDir,
}

impl Servers {
    /// # Errors
    /// When something does not start, except twemproxy, which may be missing.
    pub(crate) async fn start(kinds: &[Kind], beside: &[(String, PathBuf)], sets: &[String]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("gse-benches-dba-").tempdir()?;
        let alone = Redis::start(dir.path(), None, &[]).await?;
        let mut servers = Self {
            targets: Vec::new(),
            missing: Vec::new(),
            programs: site::beside_us()?,
            sets: sets.to_vec(),
            single: alone.port,
            redis: vec![alone],
            dir,
        };
        let mut builds = vec![(String::new(), servers.programs.join("gse_dba"))];
        builds.extend(beside.iter().cloned());
        for kind in kinds {
            match kind {
                Kind::Direct => servers.targets.push(Target {
                    kind: *kind,
                    build: String::new(),
                    port: servers.single,
                    password: None,
                    program: None,
                }),
                Kind::Twemproxy => servers.twemproxy().await?,
                Kind::Single => {
                    let sets = vec![
                        "backend=single".to_owned(),
                        format!("single.url=redis://127.0.0.1:{}", servers.single),
                    ];
                    servers.gse_dba(*kind, &builds, &sets).await?;
                }
                Kind::Sharded => servers.groups(*kind, &builds, 3, 0).await?,
                Kind::Group => servers.groups(*kind, &builds, 1, 2).await?,
                Kind::Quorum => servers.groups(*kind, &builds, 3, 2).await?,
            }
        }
        for target in &servers.targets {
            fill(target).await?;
        }
        Ok(servers)
    }

    /// Groups of a primary and its copies.
    async fn groups(&mut self, kind: Kind, builds: &[(String, PathBuf)], groups: usize, copies: usize) -> Result<()> {
        let mut named = Vec::new();
        for g in 0..groups {
            let primary = Redis::start(self.dir.path(), None, &[]).await?;
            let mut all = vec![primary];
            for _ in 0..copies {
                let of = all.first().map(|p| p.port);
                all.push(Redis::start(self.dir.path(), of, &[]).await?);
            }
            if let Some(primary) = all.first() {
                primary.copied(copies).await?;
            }
            let places: Vec<String> = all.iter().map(|r| format!("\"127.0.0.1:{}\"", r.port)).collect();
            named.push(format!("{{name=\"g{g}\",servers=[{}]}}", places.join(",")));
            self.redis.extend(all);
        }
        let sets = sharded(&named, copies);
        self.gse_dba(kind, builds, &sets).await
    }

    async fn gse_dba(&mut self, kind: Kind, builds: &[(String, PathBuf)], more: &[String]) -> Result<()> {
        for (build, path) in builds {
            let mut sets = more.to_vec();
            sets.extend(self.sets.iter().cloned());
            let name = format!("gse_dba {kind:?} {build}");
            let (port, program) = gse_dba(self.dir.path(), path, &name, &sets).await?;
            self.targets.push(Target {
                kind,
                build: build.clone(),
                port,
                password: Some(PASSWORD),
                program: Some(program),
            });
        }
        Ok(())
    }

    async fn twemproxy(&mut self) -> Result<()> {
        let port = free_port()?;
        let file = self.dir.path().join("twemproxy.yml");
        let text = format!(
            "bench:\n  listen: 127.0.0.1:{port}\n  redis: true\n  hash: fnv1a_64\n  hash_tag: \"{{}}\"\n  distribution: ketama\n  preconnect: true\n  auto_eject_hosts: false\n  servers:\n   - 127.0.0.1:{}:1\n",
            self.single
        );
        std::fs::write(&file, text)?;
        let mut command = Command::new("nutcracker");
        command
            .arg("-c")
            .arg(&file)
            .args(["-s", &free_port()?.to_string(), "-a", "127.0.0.1"]);
        let log = self.dir.path().join("twemproxy.log");
        match Program::spawn("twemproxy", command, &log) {
            Ok(program) => {
                listens(port).await.context("twemproxy")?;
                self.targets.push(Target {
                    kind: Kind::Twemproxy,
                    build: String::new(),
                    port,
                    password: None,
                    program: Some(program),
                });
            }
            Err(_) => self.missing.push(
                "twemproxy is not installed (Debian: apt-get install nutcracker, with /usr/sbin/policy-rc.d ending in exit 101 so that it is not started)"
                    .into(),
            ),
        }
        Ok(())
    }

    /// Another gse_dba before the one Redis.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn another(&self, name: &str, more: &[String]) -> Result<(u16, Program)> {
        let mut sets = vec![
            "backend=single".to_owned(),
            format!("single.url=redis://127.0.0.1:{}", self.single),
        ];
        sets.extend(more.iter().cloned());
        sets.extend(self.sets.iter().cloned());
        gse_dba(self.dir.path(), &self.programs.join("gse_dba"), name, &sets).await
    }

    /// Warnings of everything that was started.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let programs = self.targets.iter().filter_map(|t| t.program.as_ref());
        programs
            .flat_map(Program::complaints)
            // It is what the set-up asks for: data in memory, on one host.
            .filter(|c| !c.contains("breaks the promise"))
            .collect()
    }
}

/// Settings of the sharded back end.
pub(crate) fn sharded(groups: &[String], copies: usize) -> Vec<String> {
    vec![
        "backend=sharded".to_owned(),
        format!("sharded.groups=[{}]", groups.join(",")),
        format!("sharded.copies={}", copies + 1),
        format!("sharded.acknowledged={}", copies / 2 + 1),
        "sharded.checks=warn".to_owned(),
        "sharded.one_host=true".to_owned(),
    ]
}

/// gse_dba on a free port.
///
/// # Errors
/// When it does not start.
pub(crate) async fn gse_dba(dir: &Path, path: &Path, name: &str, more: &[String]) -> Result<(u16, Program)> {
    let mut sets = vec!["listen=127.0.0.1:0".to_owned(), format!("password={PASSWORD}")];
    sets.extend(more.iter().cloned());
    let program = site::start_program(dir, path, name, &sets).await?;
    let address = program.address("resp")?;
    let port = address.rsplit_once(':').and_then(|(_, p)| p.parse().ok());
    Ok((port.with_context(|| format!("{address} has no port"))?, program))
}

/// Data that reads find, and warm servers.
async fn fill(target: &Target) -> Result<()> {
    let mut command = Command::new("redis-benchmark");
    command.args(["-h", "127.0.0.1", "-p", &target.port.to_string()]).args([
        "-t", "set", "-n", "200000", "-P", "16", "-c", "50", "-d", "64", "-r", "100000", "--csv",
    ]);
    if let Some(password) = target.password {
        command.args(["-a", password]);
    }
    let output = command.kill_on_drop(true).output().await?;
    ensure!(
        output.status.success(),
        "{} does not take data: {}",
        target.kind.what(),
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(())
}

/// One redis-server that keeps its data in memory.
pub(crate) struct Redis {
    pub(crate) port: u16,
    pub(crate) program: Program,
}

impl Redis {
    /// # Errors
    /// When it does not start.
    pub(crate) async fn start(dir: &Path, of: Option<u16>, more: &[&str]) -> Result<Self> {
        let port = free_port()?;
        let data = dir.join(format!("redis-{port}"));
        std::fs::create_dir_all(&data)?;
        let mut command = Command::new("redis-server");
        command
            .args(["--bind", "127.0.0.1", "--save", "", "--port", &port.to_string()])
            .args([
                "--repl-diskless-sync-delay",
                "0",
                "--min-replicas-max-lag",
                "5",
                "--dir",
            ])
            .arg(&data)
            .args(more);
        if let Some(of) = of {
            command.args(["--replicaof", "127.0.0.1", &of.to_string()]);
        }
        let program = Program::spawn(&format!("redis {port}"), command, &data.join("log"))
            .context("redis-server does not start: apt-get install redis-server")?;
        listens(port).await.context("redis-server")?;
        Ok(Self { port, program })
    }

    /// Waits until so many copies follow it.
    ///
    /// # Errors
    /// When they do not.
    pub(crate) async fn copied(&self, copies: usize) -> Result<()> {
        let started = Instant::now();
        loop {
            let told = ask(self.port, "INFO replication").await?;
            if told.matches("state=online").count() >= copies {
                return Ok(());
            }
            ensure!(
                started.elapsed() < START,
                "the copies of {} do not follow it: {told}",
                self.port
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What a server says to a line; as much as comes at once.
///
/// # Errors
/// When it does not answer.
pub(crate) async fn ask(port: u16, line: &str) -> Result<String> {
    let talk = async {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
        stream.write_all(format!("{line}\r\n").as_bytes()).await?;
        let mut buf = vec![0; 64 * 1024];
        let n = stream.read(&mut buf).await?;
        anyhow::Ok(String::from_utf8_lossy(buf.get(..n).unwrap_or_default()).into_owned())
    };
    match tokio::time::timeout(START, talk).await {
        Ok(answer) => answer,
        Err(_) => bail!("{port} does not answer {line:?}"),
    }
}

/// # Errors
/// When there is none.
pub(crate) fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Waits until somebody takes connections.
///
/// # Errors
/// When nobody does.
pub(crate) async fn listens(port: u16) -> Result<()> {
    let started = Instant::now();
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        ensure!(started.elapsed() < START, "nothing listens on port {port}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}
