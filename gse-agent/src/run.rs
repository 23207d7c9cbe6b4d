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
use gse_proto::proc::{ProcReport, ProcReported};
use gse_proto::session::{Call, CallFailure, CallReply, Dispatch, Hello, PluginMessage, Stored, TargetRef};
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;

use crate::cmdline;
use crate::config::{Config, RunMode};
use crate::data::{DataConfig, Intake, socket, uplink};
use crate::exec::{self, ExecConfig, Executor};
use crate::files::{self, Files, FilesConfig};
use crate::host::HostFacts;
use crate::message::{self, Messages};
use crate::proc::{self, ProcConfig, Procs};
use crate::session::{Keeper, Link, Metrics, Report, Work, refused};

/// What the program is called.
pub const INFO: ServiceInfo = ServiceInfo {
    name: "gse_agent",
    version: env!("CARGO_PKG_VERSION"),
    about: "The agent of a host: one session to the servers, scripts run here, results that survive the agent",
};

/// First argument of the processes that carry scripts out.
const RUNNER: &str = "runner";
/// First argument of the processes that touch files on an account's behalf.
const FILE_WORKER: &str = "file-worker";

/// The whole program. `args` begin with its name; `self_exec` is how this executable is started again as an agent: program and, when
/// it is part of a larger one, the words that lead here. The processes that carry scripts out are started that way too, with the
/// word `runner`, and those that touch files with `file-worker`; they must not have a second thread, so the words are looked for before
/// anything else is done.
pub fn main(args: impl IntoIterator<Item = OsString>, self_exec: Vec<OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if args.get(1).is_some_and(|word| word == RUNNER) {
        return exec::runner_main(args.into_iter().skip(2));
    }
    if args.get(1).is_some_and(|word| word == FILE_WORKER) {
        return files::worker_main();
    }
    let called = args.first().map(Path::new).and_then(Path::file_name);
    if called.is_some_and(|name| name == cmdline::NAME) {
        return cmdline::main(args);
    }
    if args.get(1).is_some_and(|word| word == cmdline::WORD) {
        return cmdline::main(args.into_iter().skip(1));
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
    let files_metrics = files::Metrics::default();
    files_metrics.register(&mut registry);
    let intake = Intake::new(&config.data);
    let uplink_metrics = uplink::Metrics::default();
    uplink_metrics.register(&intake, &mut registry);
    let socket_metrics = socket::Metrics::default();
    socket_metrics.register(&mut registry);
    let message_metrics = message::Metrics::default();
    message_metrics.register(&mut registry);
    let proc_metrics = proc::Metrics::default();
    proc_metrics.register(&mut registry);
    let health = Health::new();
    health.set_if_absent("session", Err("not connected yet".to_owned()));
    ops::serve(&config.ops, Arc::new(registry), health.clone(), &life).await?;

    let files_exec: Vec<OsString> = self_exec.iter().cloned().chain([FILE_WORKER.into()]).collect();
    let exec_config = ExecConfig {
        data_dir: config.data_dir.join("exec"),
        self_exec: self_exec.into_iter().chain([RUNNER.into()]).collect(),
        machine_id: facts.machine_id.clone(),
        ..config.exec.clone()
    };
    let proc_config = ProcConfig {
        data_dir: config.data_dir.join("proc"),
        self_exec: exec_config.self_exec.clone(),
        ..config.proc.clone()
    };
    let proc_identity = proc::Identity {
        agent_id: hello.agent_id.clone(),
        ip: plugin_address(&facts),
        cloud_id: config.cloud_id,
    };
    let executor = Executor::start(exec_config, &life)
        .await
        .context("cannot start the executor")?;
    let files_config = FilesConfig {
        data_dir: config.data_dir.join("files"),
        self_exec: files_exec,
        ..config.files.clone()
    };
    let identity = files::Identity {
        agent_id: hello.agent_id.clone(),
        tls: config.tls.clone(),
        addresses: facts.addresses.clone(),
        cloud_id: config.cloud_id,
    };
    let files = Files::start(files_config, identity, files_metrics, &life)
        .await
        .context("cannot start file transfers")?;
    let data_identity = uplink::Identity {
        agent_id: hello.agent_id.clone(),
        tls: config.tls.clone(),
    };
    let data_config = DataConfig {
        data_dir: config.data_dir.join("data"),
        ..config.data.clone()
    };
    uplink::start(data_config, data_identity, &intake, uplink_metrics, &health, &life)
        .await
        .context("cannot open the spool of data")?;
    let counted = (proc_metrics, &health);
    let procs = Procs::start(
        proc_config,
        config.exec.clone(),
        proc_identity,
        intake.clone(),
        counted,
        &life,
    )
    .await
    .context("cannot take up the processes of this host")?;
    let plugin_identity = socket::Identity {
        agent_id: hello.agent_id.clone(),
        cloud_id: config.cloud_id,
        ip: plugin_address(&facts),
    };
    socket::start(
        &config.data.socket,
        &config.data_dir,
        &plugin_identity,
        intake,
        socket_metrics,
        &health,
        &life,
    )
    .await
    .context("cannot listen to plugins")?;
    let message_identity = message::Identity {
        agent_id: hello.agent_id.clone(),
        version: INFO.version,
        cloud_id: config.cloud_id,
        run_mode: hello.run_mode,
    };
    let messages = Messages::start(
        &config.messages,
        &config.data_dir,
        message_identity,
        message_metrics,
        &health,
        &life,
    )
    .await
    .context("cannot listen to plugins")?;
    let work = Host {
        executor,
        files,
        messages,
        procs,
    };
    let keeper_life = life.clone();
    let keeper =
        tokio::task::spawn_blocking(move || Keeper::new(&config, hello, Arc::new(work), metrics, health, &keeper_life))
            .await
            .context("reading the certificates")??;
    life.ready();
    keeper.run().await;
    drop(lock);
    Ok(())
}

/// Everything that this host does for the servers.
struct Host {
    executor: Executor,
    files: Files,
    messages: Messages,
    procs: Procs,
}

impl Work for Host {
    fn epoch(&self) -> Bytes {
        self.executor.epoch()
    }

    fn held(&self) -> Vec<TargetRef> {
        self.executor.held()
    }

    fn counts(&self) -> (u32, u32) {
        self.executor.counts()
    }

    async fn dispatch(&self, order: Dispatch) {
        self.executor.dispatch(order).await;
    }

    async fn terminate(&self, target: TargetRef) {
        self.executor.terminate(target).await;
    }

    fn stored(&self, stored: Stored) {
        self.executor.stored(stored);
    }

    fn attach(&self, link: Link) -> mpsc::Receiver<Report> {
        self.files.server_time(link.server_time_ms);
        self.procs.attach(link.server_time_ms);
        self.executor.attach(link)
    }

    async fn call(&self, call: Call) -> CallReply {
        let payload = match call.service.as_str() {
            files::SERVICE => self.files.call(call.payload).await,
            message::SERVICE => self.messages.call(call.payload),
            proc::SERVICE => self.procs.call(call.payload).await,
            _ => return refused(call.call_id, CallFailure::Unsupported),
        };
        CallReply {
            call_id: call.call_id,
            failure: CallFailure::None.into(),
            payload,
        }
    }

    async fn process_report(&self) -> ProcReport {
        self.procs.report().await
    }

    fn processes_stored(&self, stored: ProcReported) {
        self.procs.reported(stored.sequence);
    }

    async fn said(&self) -> PluginMessage {
        self.messages.next().await
    }
}

/// The address that plugins are told: one that every client understands, if the host has such a one.
fn plugin_address(facts: &HostFacts) -> String {
    let first = facts.addresses.iter().find(|address| address.is_ipv4());
    first
        .or(facts.addresses.first())
        .map(ToString::to_string)
        .unwrap_or_default()
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
