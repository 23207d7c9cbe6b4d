//! `swarm`: many simulated agents in one process, and what they do as JSON lines.
//!
//! Certificates are issued here, in bulk, by the authority in the given directory, and kept there for the next run. Commands come on
//! standard input when asked for: `beat MS` sets the time between heartbeats (0: what the server says), `mark N` is echoed in the next line
//! of progress; its end is the end of the swarm.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Args;
use gse_core::certs::{Authority, Leaf, names};
use gse_core::tls::{Role, TlsFiles, client_config};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_rustls::rustls::ClientConfig;

use crate::agent::{Agent, Fleet, Stats, agent_id};
use crate::servers::Known;

/// Descriptors that a process needs besides one for each agent.
const SPARE_FILES: u64 = 100;
/// A row of the session's protocol carries this much output in its tail.
const MAX_OUTPUT: u32 = 65_536;

/// Options of `swarm`.
#[derive(Args)]
pub(crate) struct SwarmArgs {
    /// Agents.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    agents: u32,
    /// Number of the first one, so that several swarms make one fleet.
    #[arg(long, default_value_t = 0)]
    first: u32,
    /// The agents listener of gse_task; several times for several nodes, over which the agents are spread.
    #[arg(long, value_name = "HOST:PORT", required = true)]
    server: Vec<String>,
    /// Directory with gseca.crt and gseca.key.
    #[arg(long, value_name = "DIR")]
    certs: PathBuf,
    /// All agents use DIR/gse_agent.crt (gse_task: agents.allow_shared_certificate=true).
    #[arg(long)]
    shared_certificate: bool,
    /// Between a dispatch and its rows.
    #[arg(long, default_value_t = 0, value_name = "MS")]
    delay_ms: u64,
    /// Output of every atomic task.
    #[arg(long, default_value_t = 64, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(0..=i64::from(MAX_OUTPUT)))]
    output_bytes: u32,
    /// Processes of every agent, reported once in each session.
    #[arg(long, default_value_t = 0)]
    processes: u32,
    /// Handshakes at once.
    #[arg(long, default_value_t = 256)]
    connecting: usize,
    /// First bound of the random wait before connecting again; it doubles.
    #[arg(long, default_value_t = 500, value_name = "MS")]
    reconnect_min_ms: u64,
    /// Last bound of that wait.
    #[arg(long, default_value_t = 30_000, value_name = "MS")]
    reconnect_max_ms: u64,
    /// The first try after the loss of a session comes within this time.
    #[arg(long, default_value_t = 3_000, value_name = "MS")]
    reconnect_spread_ms: u64,
    /// Connections end with a reset in place of a proper close.
    #[arg(long)]
    reset_on_close: bool,
    /// Note each sign of life in this file: number of the agent, unix milliseconds.
    #[arg(long, value_name = "FILE")]
    signs: Option<PathBuf>,
    /// How often progress is printed (when there is any).
    #[arg(long, default_value_t = 500, value_name = "MS", value_parser = clap::value_parser!(u64).range(5..))]
    report_ms: u64,
    /// Take commands on standard input and end with it.
    #[arg(long)]
    stdin_commands: bool,
}

/// One line of progress; everything but `connected` counts from the start of the swarm.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    pub(crate) agents: u64,
    pub(crate) connected: u64,
    pub(crate) connects: u64,
    pub(crate) failures: u64,
    pub(crate) refused: u64,
    /// Sessions that went to another server because theirs had asked for it.
    pub(crate) moves: u64,
    pub(crate) beats: u64,
    pub(crate) dispatches: u64,
    /// Dispatches of a target that had been dispatched to this agent before.
    pub(crate) repeated: u64,
    /// Dispatches for another journal, or for nobody.
    pub(crate) foreign: u64,
    pub(crate) rows_sent: u64,
    pub(crate) rows_resent: u64,
    pub(crate) rows_acknowledged: u64,
    /// TCP payload from and to the server.
    pub(crate) wire_read: u64,
    pub(crate) wire_written: u64,
    /// The last `mark` command: everything that had happened before it is in this line.
    pub(crate) mark: u64,
    pub(crate) last_failure: String,
}

impl Progress {
    fn of(stats: &Stats, agents: u64) -> Self {
        Self {
            // First, so that nothing counted before the mark is missing.
            mark: stats.mark.load(Relaxed),
            agents,
            connected: stats.connected.load(Relaxed),
            connects: stats.connects.load(Relaxed),
            failures: stats.failures.load(Relaxed),
            refused: stats.refused.load(Relaxed),
            moves: stats.moves.load(Relaxed),
            beats: stats.beats.load(Relaxed),
            dispatches: stats.dispatches.load(Relaxed),
            repeated: stats.repeated.load(Relaxed),
            foreign: stats.foreign.load(Relaxed),
            rows_sent: stats.rows_sent.load(Relaxed),
            rows_resent: stats.rows_resent.load(Relaxed),
            rows_acknowledged: stats.rows_acknowledged.load(Relaxed),
            wire_read: stats.wire.read.load(Relaxed),
            wire_written: stats.wire.written.load(Relaxed),
            last_failure: stats.last_failure.lock().map(|text| text.clone()).unwrap_or_default(),
        }
    }
}

/// Runs until it is killed or its standard input ends.
pub(crate) async fn run(args: SwarmArgs) -> Result<()> {
    raise_files(u64::from(args.agents))?;
    let mut servers = vec![];
    for server in &args.server {
        let mut found = tokio::net::lookup_host(server)
            .await
            .with_context(|| format!("address of {server}"))?;
        servers.push(found.next().with_context(|| format!("{server} has no address"))?);
    }
    let (certs, shared) = (args.certs.clone(), args.shared_certificate);
    let range = args.first..args.first + args.agents;
    let identities = tokio::task::spawn_blocking(move || identities(&certs, shared, range)).await??;
    let stats = Arc::new(Stats::default());
    let (beat, beat_ms) = watch::channel(0);
    let fleet = fleet(&args, servers, beat_ms, Arc::clone(&stats))?;
    let mut agents = tokio::task::JoinSet::new();
    for (index, tls) in (args.first..).zip(identities) {
        agents.spawn(Agent::new(index, tls, Arc::clone(&fleet)).run());
    }
    let work = async {
        tokio::select! {
            ended = report(&stats, u64::from(args.agents), Duration::from_millis(args.report_ms)) => ended,
            ended = agents.join_next() => anyhow::bail!("an agent of the swarm has ended: {ended:?}"),
        }
    };
    if args.stdin_commands {
        tokio::select! {
            ended = work => ended,
            ended = commands(&beat, &stats) => ended,
        }
    } else {
        work.await
    }
}

fn fleet(
    args: &SwarmArgs,
    servers: Vec<SocketAddr>,
    beat_ms: watch::Receiver<u64>,
    stats: Arc<Stats>,
) -> Result<Arc<Fleet>> {
    let mut output = vec![b'x'; args.output_bytes as usize];
    if let Some(last) = output.last_mut() {
        *last = b'\n';
    }
    let signs = args.signs.as_deref().map(|path| {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        file.with_context(|| format!("cannot write {}", path.display()))
    });
    Ok(Arc::new(Fleet {
        servers: Known::new(servers),
        delay: Duration::from_millis(args.delay_ms),
        output: Bytes::from(output),
        reconnect: (
            Duration::from_millis(args.reconnect_min_ms),
            Duration::from_millis(args.reconnect_max_ms),
        ),
        spread: Duration::from_millis(args.reconnect_spread_ms),
        reset: args.reset_on_close,
        signs: signs.transpose()?,
        connecting: Semaphore::new(args.connecting),
        beat_ms,
        processes: args.processes,
        stats,
    }))
}

/// Raises the soft limit of open files and says so early when it does not do.
pub(crate) fn raise_files(agents: u64) -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    anyhow::ensure!(
        agents + SPARE_FILES <= hard,
        "{agents} agents need more than the {hard} open files that a process may have; use several swarms (--first)"
    );
    Ok(())
}

/// TLS identities of agents, issued if need be. Blocking: a tenth of a millisecond each.
pub(crate) fn identities(dir: &Path, shared: bool, range: std::ops::Range<u32>) -> Result<Vec<Arc<ClientConfig>>> {
    let authority = Authority::open(dir)?;
    let files = |cert: PathBuf, key: PathBuf| TlsFiles {
        ca: authority.ca_path(),
        cert,
        key,
    };
    if shared {
        let (cert, key) = names::pair(Role::Agent);
        let (cert, key) = (dir.join(cert), dir.join(key));
        if !cert.exists() {
            authority.issue(Role::Agent, None, &[], &cert, &key, 365)?;
        }
        let config = client_config(&files(cert, key), Role::Server, &[])?;
        return Ok(range.map(|_| Arc::clone(&config)).collect());
    }
    let pairs = dir.join("swarm");
    std::fs::create_dir_all(&pairs)?;
    let now = SystemTime::now();
    range
        .map(|index| {
            let id = agent_id(index);
            let (cert, key) = (pairs.join(format!("{id}.crt")), pairs.join(format!("{id}.key")));
            // The certificate is written last: where it is, the key is.
            if !cert.exists() {
                let pair = authority.sign(&Leaf {
                    role: Role::Agent,
                    id: Some(&id),
                    names: &[],
                    not_before: now - Duration::from_secs(3600),
                    not_after: now + Duration::from_secs(365 * 24 * 3600),
                })?;
                write(&key, &pair.key_pem)?;
                write(&cert, &pair.cert_pem)?;
            }
            Ok(client_config(&files(cert, key), Role::Server, &[])?)
        })
        .collect()
}

fn write(path: &Path, text: &str) -> Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.create(true).truncate(true).write(true).mode(0o600);
    let mut file = options
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Prints progress when there is any.
pub(crate) async fn report(stats: &Stats, agents: u64, every: Duration) -> Result<()> {
    let mut tick = tokio::time::interval(every);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut printed, mut quiet_since) = (Progress::default(), Instant::now());
    loop {
        tick.tick().await;
        let now = Progress::of(stats, agents);
        if now == printed && quiet_since.elapsed() < Duration::from_secs(5) {
            continue;
        }
        let line = serde_json::to_string(&now)? + "\n";
        let mut out = std::io::stdout().lock();
        out.write_all(line.as_bytes())
            .and_then(|()| out.flush())
            .context("nobody reads the progress any more")?;
        (printed, quiet_since) = (now, Instant::now());
    }
}

/// Lines of standard input, by a thread of its own: a read of it can't be called off, and must not keep the process.
pub(crate) fn stdin_lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, lines) = mpsc::channel(16);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            let end = line.is_err();
            if sender.blocking_send(line).is_err() || end {
                return;
            }
        }
    });
    lines
}

async fn commands(beat: &watch::Sender<u64>, stats: &Stats) -> Result<()> {
    let mut lines = stdin_lines();
    while let Some(line) = lines.recv().await {
        let line = line.context("standard input")?;
        let command = line.trim().split_once(' ');
        match command.map(|(name, value)| (name, value.parse::<u64>())) {
            Some(("beat", Ok(ms))) => beat.send(ms).context("no agents")?,
            Some(("mark", Ok(mark))) => stats.mark.store(mark, Relaxed),
            _ => anyhow::bail!("not a command of the swarm: {line:?} (beat MS, mark N)"),
        }
    }
    Ok(())
}
