//! The agent as a whole: its data directory, its identity, the executor, and the session that connects it.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, bail};
use bytes::Bytes;
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::{self, Health};
use gse_core::process::{self, ServiceInfo};
use gse_proto::ids::{AgentId, CloudId};
use gse_proto::session::{Dispatch, Hello, Stored, TargetRef};
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;

use crate::config::{Config, RunMode};
use crate::exec::{self, ExecConfig, Executor};
use crate::host::HostFacts;
use crate::session::{Keeper, Link, Metrics, Report, Work};

/// What the program is called.
pub const INFO: ServiceInfo = ServiceInfo {
    name: "gse_agent",
    version: env!("CARGO_PKG_VERSION"),
    about: "The agent of a host: one session to the servers, scripts run here, results that survive the agent",
};

/// First argument of the processes that carry scripts out.
const RUNNER: &str = "runner";

/// The whole program. `args` begin with its name; `self_exec` is how this executable is started again as an agent: program and, when
/// it is part of a larger one, the words that lead here. The processes that carry scripts out are started that way too, with the
/// word `runner`; they must not have a second thread, so the word is looked for before anything else is done.
pub fn main(args: impl IntoIterator<Item = OsString>, self_exec: Vec<OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if args.get(1).is_some_and(|word| word == RUNNER) {
        return exec::runner_main(args.into_iter().skip(2));
    }
    process::run_with(INFO, args, |config, life| run(config, self_exec, life))
}

/// Runs an agent until its lifecycle drains.
///
/// # Errors
/// Why it cannot start: the data directory is not usable or another agent has it, the certificates are not usable, or the executor
/// cannot take up its journal.
pub async fn run(config: Config, self_exec: Vec<OsString>, life: Lifecycle) -> anyhow::Result<()> {
    let dir = config.data_dir.clone();
    let addresses = config.addresses.clone();
    let (lock, facts) = tokio::task::spawn_blocking(move || {
        let lock = DataDir::lock(&dir)?;
        anyhow::Ok((lock, HostFacts::read(&dir, &addresses)?))
    })
    .await
    .context("reading the host's facts")??;

    let agent_id = agent_id(&config, &facts)?;
    let hello = hello(&config, agent_id, &facts)?;
    tracing::info!(agent_id = hello.agent_id, machine_id = hello.machine_id, addresses = ?hello.addresses, "this agent");

    let metrics = Metrics::default();
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    let health = Health::new();
    health.set_if_absent("session", Err("not connected yet".to_owned()));
    ops::serve(&config.ops, Arc::new(registry), health.clone(), &life).await?;

    let exec_config = ExecConfig {
        data_dir: config.data_dir.join("exec"),
        self_exec: self_exec.into_iter().chain([RUNNER.into()]).collect(),
        machine_id: facts.machine_id.clone(),
        ..config.exec.clone()
    };
    let executor = Executor::start(exec_config, &life)
        .await
        .context("cannot start the executor")?;
    let keeper_life = life.clone();
    let keeper = tokio::task::spawn_blocking(move || {
        Keeper::new(&config, hello, Arc::new(executor), metrics, health, &keeper_life)
    })
    .await
    .context("reading the certificates")??;
    life.ready();
    keeper.run().await;
    drop(lock);
    Ok(())
}

impl Work for Executor {
    fn epoch(&self) -> Bytes {
        Executor::epoch(self)
    }

    fn held(&self) -> Vec<TargetRef> {
        Executor::held(self)
    }

    fn counts(&self) -> (u32, u32) {
        Executor::counts(self)
    }

    async fn dispatch(&self, order: Dispatch) {
        Executor::dispatch(self, order).await;
    }

    async fn terminate(&self, target: TargetRef) {
        Executor::terminate(self, target).await;
    }

    fn stored(&self, stored: Stored) {
        Executor::stored(self, stored);
    }

    fn attach(&self, link: Link) -> mpsc::Receiver<Report> {
        Executor::attach(self, link)
    }
}

/// The configured id, else the one in the certificate, else `cloud:first address`.
fn agent_id(config: &Config, facts: &HostFacts) -> anyhow::Result<AgentId> {
    let certified = config.tls.identity().context("own certificate")?.id;
    let id = if !config.agent_id.is_empty() {
        config.agent_id.clone()
    } else if let Some(id) = &certified {
        id.clone()
    } else if let Some(ip) = facts.addresses.first() {
        AgentId::from_cloud_ip(CloudId(config.cloud_id), *ip).to_string()
    } else {
        bail!("this host has no address to make an agent id of; set agent_id or addresses");
    };
    if let Some(certified) = certified
        && certified != id
    {
        tracing::error!(
            agent_id = id,
            "{} was issued for agent {certified}; servers will refuse this agent",
            config.tls.cert.display()
        );
    }
    AgentId::parse(&id).with_context(|| format!("\"{id}\" is not an agent id"))
}

fn hello(config: &Config, agent_id: AgentId, facts: &HostFacts) -> anyhow::Result<Hello> {
    let started = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .context("the host's clock stands before 1970; set it")?;
    Ok(Hello {
        agent_id: agent_id.to_string(),
        cloud_id: config.cloud_id,
        machine_id: facts.machine_id.clone(),
        boot_id: facts.boot_id.clone(),
        instance: Bytes::copy_from_slice(&rand::random::<[u8; 16]>()),
        addresses: facts.addresses.iter().map(ToString::to_string).collect(),
        hostname: facts.hostname.clone(),
        version: INFO.version.to_owned(),
        os: facts.os.to_owned(),
        arch: facts.arch.to_owned(),
        run_mode: match config.run_mode {
            RunMode::Agent => gse_proto::session::RunMode::Agent,
            RunMode::Proxy => gse_proto::session::RunMode::Proxy,
        }
        .into(),
        started_at_ms: u64::try_from(started.as_millis()).unwrap_or(u64::MAX),
        cpu_num: facts.cpu_num,
        mem_size_mb: facts.mem_size_mb,
        ..Hello::default()
    })
}

/// The right to a data directory: two agents in one would take each other's results.
#[derive(Debug)]
struct DataDir {
    _file: File,
}

impl DataDir {
    /// Makes the directory, readable by its owner only, and locks it. Blocking.
    fn lock(dir: &Path) -> anyhow::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("cannot make the data directory {} (data_dir)", dir.display()))?;
        let path: PathBuf = dir.join("agent.lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(std::fs::TryLockError::WouldBlock) => {
                bail!("another agent uses {}; give each its own data_dir", dir.display())
            }
            Err(std::fs::TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("cannot lock {}", path.display()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_agent_per_data_directory() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("a/b");
        let first = DataDir::lock(&data).unwrap();
        let error = DataDir::lock(&data).unwrap_err();
        assert!(error.to_string().contains("another agent"), "{error}");
        drop(first);
        DataDir::lock(&data).unwrap();
    }

    #[test]
    fn the_version_suits_every_client() {
        // contract: v2-http-task#49
        assert!(!INFO.version.is_empty());
        assert!(
            INFO.version
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '.' || c == '-')
        );
    }
}
