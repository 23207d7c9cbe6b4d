//! `gse up`: the whole control plane in this process, the local agent as its child.
//!
//! Which servers there are, how they find each other, the order in which they start and stop. What each of them does is its own
//! business; here they are functions from a configuration and a lifecycle to a future.

mod agent;
mod data;
mod lock;
mod ports;
mod server;
mod table;

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use gse_core::config::LogConfig;
use gse_core::lifecycle::Lifecycle;
use gse_core::log;
use gse_core::process::{Signals, handle_signals};
use gse_core::tls::{Role, TlsFiles};
use gse_proto::http::{AgentIdList, AgentState, Route};
use tokio_util::sync::CancellationToken;
use toml::Value;

use self::agent::Agent;
use self::data::Data;
use self::lock::Lock;
use self::ports::{Ports, reachable};
use self::server::{Server, Sets};
use crate::args::{Durability, UpArgs};
use crate::client::{Api, Settings, data_dir};
use crate::out;

/// How long a server may take to finish what it holds when all is stopped.
const GRACE: Duration = Duration::from_secs(10);
/// How long the start waits for the local agent to be connected, before it says that it is not.
const AGENT_START: Duration = Duration::from_secs(8);
/// Pause between two looks at that.
const AGENT_POLL: Duration = Duration::from_millis(100);
/// How long the threads may take to let go of blocking work once everything has stopped.
const RUNTIME_SHUTDOWN: Duration = Duration::from_secs(1);
/// Longest path of a Unix socket that every system takes.
const MAX_SOCKET_PATH: usize = 100;
/// `status_code` of a connected agent.
const STATUS_RUNNING: i32 = 2;

/// Runs everything until told to stop.
///
/// # Errors
/// Why it did not start, or what went wrong later.
pub fn run(args: &UpArgs) -> anyhow::Result<()> {
    let dir = Data::make_dir(&data_dir(&args.data)?)?;
    let lock = Lock::take(&dir)?;
    let ports = Ports::of(args);
    ports.check()?;
    let data = Data::open(dir)?;
    agent::stop_leftover(&data)?;
    let file = (!args.verbose).then(|| data.path("log/gse.log"));
    log::init(&LogConfig {
        file,
        ..LogConfig::default()
    })?;

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("gse")
        .build()
        .context("cannot start the threads of the runtime")?;
    let outcome = runtime.block_on(Box::pin(supervise(args, data, ports)));
    runtime.shutdown_timeout(RUNTIME_SHUTDOWN);
    drop(lock);
    outcome
}

/// The servers, in the order in which they start.
struct Plane {
    dba: Server,
    task: Server,
    file: Server,
    records: Server,
    processes: Server,
    sync: Server,
    alarm: Server,
    api: Server,
    /// Whether the API's own configuration has a certificate.
    https: bool,
}

async fn supervise(args: &UpArgs, mut data: Data, ports: Ports) -> anyhow::Result<()> {
    let life = Lifecycle::new("gse_up");
    let signals = Signals::listen().context("cannot listen for signals")?;
    tokio::spawn(handle_signals(signals, life.clone()));
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
        "starting"
    );

    let mut plane = tokio::select! {
        biased;
        () = life.draining() => {
            out::note("gse: stopped before everything was up");
            return Ok(());
        }
        plane = Box::pin(start(args, &data, &ports)) => plane?,
    };
    data.publish(&reachable(&plane.api.address("http")?), plane.https)?;

    let stop_agent = CancellationToken::new();
    let local = if args.no_agent {
        None
    } else {
        let server = reachable(&plane.task.address("agents")?);
        let records = reachable(&plane.records.address("link")?);
        let agent = Agent::prepare(&data, &server, &records, args.verbose)?;
        Some(tokio::spawn(agent.keep(stop_agent.clone(), life.reloads())))
    };
    let connected = match &local {
        Some(_) => Some(wait_for_agent(&data, &life).await),
        None => None,
    };
    if !life.is_draining() {
        out::print(&table::text(&data, &plane.addresses(&data)?, connected))?;
    }

    let failure = watch(&mut plane, &life).await;
    if failure.is_none() {
        out::note("gse: stopping; a second signal leaves at once");
    }
    let stopped = tokio::select! {
        biased;
        () = life.aborted() => Err(anyhow::anyhow!("left at once on the second signal")),
        stopped = Box::pin(stop(plane, local, stop_agent)) => stopped,
    };
    match failure {
        Some(failure) => Err(anyhow::anyhow!("{failure}")),
        None => stopped,
    }
}

/// Starts the servers, each when the one that it needs is there.
async fn start(args: &UpArgs, data: &Data, ports: &Ports) -> anyhow::Result<Plane> {
    let password = data.path("store.password");
    let socket = data.path("store/gse_dba.sock");
    let sets = Sets::default()
        .with("backend", "embedded")
        .path("embedded.dir", &data.path("store/data"))
        .with(
            "embedded.durability",
            if args.durability == Durability::Always {
                "always"
            } else {
                "write"
            },
        )
        .path("password_file", &password)
        .with("ops.listen", "");
    let by_socket = is_plain(&socket);
    let sets = if by_socket {
        sets.with("listen", "").path("unix_socket", &socket)
    } else {
        sets.with("listen", "127.0.0.1:0")
    };
    let config = sets.load::<gse_dba::Config>("gse_dba", &data.path("gse_dba.toml"))?;
    let dba = Server::start("gse_dba", config, GRACE, gse_dba::run).await?;
    let url = if by_socket {
        format!("redis+unix://{}", socket.display())
    } else {
        format!("redis://{}", dba.address("resp")?)
    };
    // Where gse dba finds it.
    crate::client::write_private(&data.path(crate::dba::URL_FILE), format!("{url}\n").as_bytes())?;

    let common = |name: &str| {
        Sets::default()
            .path("authz.apps_file", &data.path("apps.toml"))
            .path("audit.file", &data.path(&format!("log/audit-{name}.jsonl")))
            .with("store.url", url.clone())
            .path("store.password_file", &password)
    };
    let server_tls = data.tls(Role::Server);
    let advertised = ports::advertised(ports.agents).context("cannot find a port for agents")?;
    // The port that was told must be the one that is listened on.
    let agents = advertised.map_or(ports.agents, |told| SocketAddr::new(ports.agents.ip(), told.port()));
    let told: Vec<Value> = advertised.iter().map(|told| told.to_string().into()).collect();
    let config = common("task")
        .with("agents.advertise", Value::Array(told))
        .with("node_id", data.identity.node_id.clone())
        .with("http.listen", ports.task_http.to_string())
        .with("agents.listen", agents.to_string())
        .tls("agents.tls", &server_tls)
        .with("internal.listen", ports.internal.to_string())
        .tls("internal.tls", &server_tls)
        // Other services reach the agents through it; they find it in the store.
        .with("rpc.listen", "127.0.0.1:0".to_owned())
        .with("ops.listen", ports.task_ops.to_string())
        .load::<gse_task::Config>("gse_task", &data.path("gse_task.toml"))?;
    let heartbeat_s = config.session.heartbeat_interval_ms.div_ceil(1000);
    let task = Server::start("gse_task", config, GRACE, gse_task::run).await?;

    let file = Box::pin(start_files(data, ports, common("file"), &server_tls, heartbeat_s)).await?;

    let records = Box::pin(start_data(data, ports, common("data"), &server_tls)).await?;

    let processes = Box::pin(start_processes(data, ports, common("proc"), &server_tls, heartbeat_s)).await?;
    let sync = Box::pin(start_sync(data, common("sync"), &server_tls, heartbeat_s)).await?;

    let alarm = Box::pin(start_alarm(data, &records, &url, &password, &server_tls, heartbeat_s)).await?;

    let config = common("api")
        .with("http.listen", ports.api_http.to_string())
        .with("upstreams.task", Value::Array(vec![task.address("internal")?.into()]))
        .with("upstreams.file", Value::Array(vec![file.address("internal")?.into()]))
        .with(
            "upstreams.data",
            Value::Array(vec![records.address("internal")?.into()]),
        )
        .with(
            "upstreams.proc",
            Value::Array(vec![processes.address("internal")?.into()]),
        )
        .with("upstreams.sync", Value::Array(vec![sync.address("internal")?.into()]))
        .tls("tls", &server_tls)
        .with("heartbeat_interval_s", i64::try_from(heartbeat_s)?)
        .with("ops.listen", ports.api_ops.to_string())
        .load::<gse_api::Config>("gse_api", &data.path("gse_api.toml"))?;
    let https = config.http.cert.is_some();
    let api = Server::start("gse_api", config, GRACE, gse_api::run).await?;
    Ok(Plane {
        dba,
        task,
        file,
        records,
        processes,
        sync,
        alarm,
        api,
        https,
    })
}

async fn start_files(
    data: &Data,
    ports: &Ports,
    common: Sets,
    server_tls: &TlsFiles,
    heartbeat_s: u64,
) -> anyhow::Result<Server> {
    let advertised = ports::advertised(ports.file_link).context("cannot find a port for agents that move files")?;
    let link = advertised.map_or(ports.file_link, |told| {
        SocketAddr::new(ports.file_link.ip(), told.port())
    });
    let told: Vec<Value> = advertised.iter().map(|told| told.to_string().into()).collect();
    let advertised = ports::advertised(ports.file_peer).context("cannot find a port for gse_btsvr's peers")?;
    let peer = advertised.map_or(ports.file_peer, |told| {
        SocketAddr::new(ports.file_peer.ip(), told.port())
    });
    let peers: Vec<Value> = advertised.iter().map(|told| told.to_string().into()).collect();
    let cache = data.path("files");
    let mut config = common
        .path("cache.dir", &cache)
        .with("peer.listen", peer.to_string())
        .with("peer.advertise", Value::Array(peers))
        .with("node_id", data.identity.node_id.clone())
        .with("http.listen", ports.file_http.to_string())
        .with("link.listen", link.to_string())
        .with("link.advertise", Value::Array(told))
        .tls("link.tls", server_tls)
        .with("internal.listen", ports.file_internal.to_string())
        .tls("internal.tls", server_tls)
        .with(
            "fleet.heartbeat_interval_ms",
            i64::try_from(heartbeat_s.saturating_mul(1000))?,
        )
        .with("ops.listen", ports.file_ops.to_string())
        .load::<gse_btsvr::Config>("gse_btsvr", &data.path("gse_btsvr.toml"))?;
    config.cache.quota_bytes = config.cache.quota_bytes.min(share_of_disk(&cache).await?);
    Server::start("gse_btsvr", config, GRACE, gse_btsvr::run).await
}

/// What the cache may have of a disk that others need too: a tenth of what is free.
async fn share_of_disk(dir: &Path) -> anyhow::Result<u64> {
    let dir = dir.to_owned();
    let look = move || {
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let free = nix::sys::statvfs::statvfs(&dir).with_context(|| format!("cannot look at {}", dir.display()))?;
        let bytes = free.blocks_available().saturating_mul(free.fragment_size());
        anyhow::Ok((bytes / 10).max(1 << 20))
    };
    tokio::task::spawn_blocking(look).await.context("looking at the disk")?
}

async fn start_data(data: &Data, ports: &Ports, common: Sets, server_tls: &TlsFiles) -> anyhow::Result<Server> {
    let dir = data.path("data");
    let config = common
        .with("node_id", data.identity.node_id.clone())
        .path("data_dir", &dir)
        // Without any route, records can be looked at.
        .with("default_sink", format!("file:{}", dir.join("files").display()))
        .with("http.listen", ports.data_http.to_string())
        .with("link.listen", ports.data_link.to_string())
        .tls("link.tls", server_tls)
        .with("internal.listen", ports.data_internal.to_string())
        .tls("internal.tls", server_tls)
        .with("rpc.listen", "127.0.0.1:0")
        .with("ops.listen", ports.data_ops.to_string())
        .load::<gse_data::Config>("gse_data", &data.path("gse_data.toml"))?;
    Server::start("gse_data", config, GRACE, gse_data::run).await
}

async fn start_processes(
    data: &Data,
    ports: &Ports,
    common: Sets,
    server_tls: &TlsFiles,
    heartbeat_s: u64,
) -> anyhow::Result<Server> {
    let config = common
        .with("node_id", data.identity.node_id.clone())
        .with("http.listen", ports.proc_http.to_string())
        .with("internal.listen", ports.proc_internal.to_string())
        .tls("internal.tls", server_tls)
        .with(
            "fleet.heartbeat_interval_ms",
            i64::try_from(heartbeat_s.saturating_mul(1000))?,
        )
        .with("ops.listen", ports.proc_ops.to_string())
        .load::<gse_procmgr::Config>("gse_procmgr", &data.path("gse_procmgr.toml"))?;
    Server::start("gse_procmgr", config, GRACE, gse_procmgr::run).await
}

async fn start_alarm(
    data: &Data,
    records: &Server,
    store: &str,
    password: &Path,
    server_tls: &TlsFiles,
    heartbeat_s: u64,
) -> anyhow::Result<Server> {
    let config = Sets::default()
        .with("node_id", data.identity.node_id.clone())
        .with("store.url", store)
        .path("store.password_file", password)
        .with(
            "heartbeat_interval_ms",
            i64::try_from(heartbeat_s.saturating_mul(1000))?,
        )
        .with("data.servers", Value::Array(vec![records.address("rpc")?.into()]))
        .tls("data.tls", server_tls)
        .with("ops.listen", "127.0.0.1:0")
        .load::<gse_alarm::Config>("gse_alarm", &data.path("gse_alarm.toml"))?;
    Server::start("gse_alarm", config, GRACE, gse_alarm::run).await
}

async fn start_sync(data: &Data, common: Sets, server_tls: &TlsFiles, heartbeat_s: u64) -> anyhow::Result<Server> {
    let mut sets = common
        .with("node_id", data.identity.node_id.clone())
        .with("internal.listen", "127.0.0.1:0")
        .tls("internal.tls", server_tls)
        .with(
            "fleet.heartbeat_interval_ms",
            i64::try_from(heartbeat_s.saturating_mul(1000))?,
        )
        .with("ops.listen", "127.0.0.1:0");
    if !nix::unistd::geteuid().is_root() {
        // The usual place is root's; the local agent, without root, writes only what is its own.
        sets = sets
            .path("file.linux.dir", &data.path("agent/host"))
            .with("file.linux.account", data.cli.user.clone())
            .with("file.linux.owner", data.cli.user.clone());
    }
    let config = sets.load::<gse_syncdata::Config>("gse_syncdata", &data.path("gse_syncdata.toml"))?;
    Server::start("gse_syncdata", config, GRACE, gse_syncdata::run).await
}

/// Whether a path can be a Unix socket's and stand in a URL as it is.
fn is_plain(path: &Path) -> bool {
    let text = path.to_string_lossy();
    text.len() <= MAX_SOCKET_PATH && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-".contains(&b))
}

impl Plane {
    fn addresses(&self, data: &Data) -> anyhow::Result<table::Addresses> {
        Ok(table::Addresses {
            api: data.cli.api.clone(),
            task_http: self.task.address("http")?,
            agents: self.task.address("agents")?,
            internal: self.task.address("internal")?,
            store: self
                .dba
                .address("resp")
                .unwrap_or_else(|_| data.path("store/gse_dba.sock").display().to_string()),
            file_http: self.file.address("http")?,
            file_link: self.file.address("link")?,
            data_http: self.records.address("http")?,
            data_link: self.records.address("link")?,
            proc_http: self.processes.address("http")?,
            ops: [
                ("gse_task", &self.task),
                ("gse_api", &self.api),
                ("gse_btsvr", &self.file),
                ("gse_data", &self.records),
                ("gse_procmgr", &self.processes),
                ("gse_syncdata", &self.sync),
                ("gse_alarm", &self.alarm),
            ]
            .into_iter()
            .filter_map(|(name, server)| Some((name, server.address("ops").ok()?)))
            .collect(),
        })
    }
}

/// Asks the API, as any other command would, whether the local agent is connected.
async fn wait_for_agent(data: &Data, life: &Lifecycle) -> bool {
    let settings = Settings {
        api: data.cli.api.clone(),
        api_from: "gse up".to_owned(),
        credentials: Some((data.cli.app.clone(), data.cli.secret.clone())),
        user: data.cli.user.clone(),
        ca: data.cli.ca.clone(),
    };
    let asked = AgentIdList {
        agent_id_list: vec![data.identity.agent_id.clone()],
    };
    let look = async {
        let api = Api::new(&settings)?;
        loop {
            match api.call::<Vec<AgentState>>(Route::ListAgentState, &asked).await {
                Ok(states) if states.iter().any(|state| state.status_code == STATUS_RUNNING) => return anyhow::Ok(()),
                Ok(_) => {}
                Err(error) => tracing::debug!("looking for the local agent: {error:#}"),
            }
            tokio::time::sleep(AGENT_POLL).await;
        }
    };
    tokio::select! {
        biased;
        () = life.draining() => false,
        looked = tokio::time::timeout(AGENT_START, look) => match looked {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::warn!("cannot look for the local agent: {error:#}");
                false
            }
            Err(_) => false,
        },
    }
}

/// Passes reloads on until a stop is asked for or a server ends by itself; then says which and why.
async fn watch(plane: &mut Plane, life: &Lifecycle) -> Option<String> {
    let mut reloads = life.reloads();
    loop {
        tokio::select! {
            biased;
            () = life.draining() => return None,
            reason = plane.dba.ended() => return Some(format!("gse_dba: {reason}")),
            reason = plane.task.ended() => return Some(format!("gse_task: {reason}")),
            reason = plane.file.ended() => return Some(format!("gse_btsvr: {reason}")),
            reason = plane.records.ended() => return Some(format!("gse_data: {reason}")),
            reason = plane.processes.ended() => return Some(format!("gse_procmgr: {reason}")),
            reason = plane.sync.ended() => return Some(format!("gse_syncdata: {reason}")),
            reason = plane.alarm.ended() => return Some(format!("gse_alarm: {reason}")),
            reason = plane.api.ended() => return Some(format!("gse_api: {reason}")),
            Ok(()) = reloads.changed() => {
                let others = [&plane.file, &plane.records, &plane.processes, &plane.sync, &plane.alarm, &plane.api];
                for server in [&plane.dba, &plane.task].into_iter().chain(others) {
                    server.life.reload();
                }
            }
        }
    }
}

/// Stops the servers in the order that lets each finish: nothing new comes in, the agent says good-bye, what is known is stored.
async fn stop(
    plane: Plane,
    local: Option<tokio::task::JoinHandle<()>>,
    stop_agent: CancellationToken,
) -> anyhow::Result<()> {
    stop_agent.cancel();
    let agent_left = async {
        match local {
            Some(local) => local.await.context("the keeper of the local agent has crashed"),
            None => Ok(()),
        }
    };
    let (api, agent) = tokio::join!(plane.api.stop(GRACE), agent_left);
    let sync = plane.sync.stop(GRACE).await;
    // Before the agents' servers, whose end is no reason for alarms.
    let alarm = plane.alarm.stop(GRACE).await;
    let file = plane.file.stop(GRACE).await;
    let processes = plane.processes.stop(GRACE).await;
    // After the agent, whose last records it still takes.
    let records = plane.records.stop(GRACE).await;
    let task = plane.task.stop(GRACE).await;
    let dba = plane.dba.stop(GRACE).await;
    let left = api.and(agent).and(sync).and(alarm).and(file);
    left.and(processes).and(records).and(task).and(dba)
}
