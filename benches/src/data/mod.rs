//! `data`: records from a plugin's connection to a sink, through the real agent and the real gse_data; or either of them alone.
//!
//! Everything runs on one machine, the plugin too: what it takes is taken from what is measured.

mod direct;
mod own;
mod plugin;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::agent::agent_id;
use crate::proc::{self, Usage};
use crate::report::{self, ReportOptions, Section, one, whole};
use crate::site::{Program, Site, SiteOptions};

/// What is at the end of the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SinkKind {
    /// A server inside this program that counts and acknowledges: the agent alone.
    Own,
    /// gse_data, which throws the records away.
    Discard,
    /// gse_data, which writes them to a file.
    File,
}

/// Options of `data`.
#[derive(Args)]
pub(crate) struct DataArgs {
    /// Where the records end.
    #[arg(long, value_enum, default_value = "file")]
    sink: SinkKind,
    /// No agent: so many links of this program's own send to gse_data as agents do.
    #[arg(long, default_value_t = 0)]
    direct: u32,
    /// Connections of plugins.
    #[arg(long, default_value_t = 1)]
    connections: u32,
    /// Bytes of a payload.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(32..=10_485_760))]
    bytes: u32,
    /// Records a second, all connections together; 0: as many as go through.
    #[arg(long, default_value_t = 0)]
    rate: u64,
    /// Seconds of load before anything is measured.
    #[arg(long, default_value_t = 2)]
    warm_s: u64,
    /// Seconds that are measured.
    #[arg(long, default_value_t = 10)]
    window_s: u64,
    /// More settings for gse_agent, as for its own --set.
    #[arg(long, value_name = "KEY=VALUE")]
    set_agent: Vec<String>,
    /// More settings for gse_data.
    #[arg(long, value_name = "KEY=VALUE")]
    set_data: Vec<String>,
    #[command(flatten)]
    site: SiteOptions,
    #[command(flatten)]
    report: ReportOptions,
}

#[derive(Serialize)]
struct Outcome {
    load: String,
    sink: SinkKind,
    direct: u32,
    connections: u32,
    bytes: u32,
    window_s: f64,
    /// Acknowledged by the server, a second.
    records_s: f64,
    /// Written by the plugins, a second.
    written_s: f64,
    /// CPU of each, microseconds for a record; and how busy a core each was.
    agent_us: f64,
    agent_cores: f64,
    server_us: f64,
    server_cores: f64,
    /// Most that the agent had resident while it was measured, KiB.
    agent_rss_kib: u64,
    server_rss_kib: u64,
    /// Dropped by the agent for any reason since the start.
    dropped: f64,
    /// From the plugin's write to the sink, microseconds; only where a rate was given.
    latency_us: Option<Latency>,
    complaints: Vec<String>,
}

/// Of single records.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Latency {
    records: usize,
    p50: u64,
    p99: u64,
    max: u64,
}

impl Latency {
    fn of(mut all: Vec<u64>) -> Option<Self> {
        all.sort_unstable();
        let at = |part: f64| {
            all.get(((all.len() as f64 * part) as usize).min(all.len().checked_sub(1)?))
                .copied()
        };
        Some(Self {
            records: all.len(),
            p50: at(0.5)?,
            p99: at(0.99)?,
            max: at(1.0)?,
        })
    }
}

/// Data id of all records.
const ID: u32 = 1_500_000;

/// Runs it.
///
/// # Errors
/// When something does not start, or records are lost.
pub(crate) async fn run(args: DataArgs) -> Result<()> {
    let site = Site::start(&args.site, false).await?;
    let files = site.path().join("sink");
    let server = if args.sink == SinkKind::Own {
        ensure!(args.direct == 0, "--direct needs gse_data: --sink discard or file");
        None
    } else {
        Some(start_server(&site, &args, &files).await?)
    };
    if args.direct > 0 {
        let server = server.context("no server")?;
        return direct(&args, &site, &server).await;
    }
    let own = Arc::new(own::Counts::default());
    let address = match &server {
        Some(server) => data_address(server)?,
        None => own::serve(&site.certs(), Arc::clone(&own))?,
    };
    let socket = site.path().join("report");
    let mut sets = vec![
        format!("data.servers=[\"{address}\"]"),
        format!("data.socket.paths=[\"{}\"]", socket.display()),
    ];
    sets.extend(args.set_agent.iter().cloned());
    let agent = site.real_agent(&agent_id(0), &sets).await?;
    let plugins = plugin::start(&socket, args.connections, args.bytes, args.rate)?;
    tokio::time::sleep(Duration::from_secs(args.warm_s)).await;

    let tail = (args.rate > 0 && args.sink == SinkKind::File).then(|| plugin::Tail::begin(&files));
    own.latencies.lock().clear();
    let begin = Moment::take(&agent, server.as_ref(), &plugins).await?;
    let mut agent_rss_kib = 0;
    while begin.at.elapsed() < Duration::from_secs(args.window_s) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        agent_rss_kib = agent_rss_kib.max(agent.usage()?.rss_kib);
    }
    let end = Moment::take(&agent, server.as_ref(), &plugins).await?;
    let latencies = match tail {
        Some(tail) => tail.end()?,
        None if args.rate > 0 => std::mem::take(&mut *own.latencies.lock()),
        None => Vec::new(),
    };
    plugins.stop();
    let seconds = (end.at - begin.at).as_secs_f64();
    let records = end.acknowledged - begin.acknowledged;
    ensure!(records > 0.0, "nothing was acknowledged: {:?}", agent.complaints());
    let cores = |from: Usage, to: Usage| (to.cpu_us - from.cpu_us) as f64 / 1e6 / seconds;
    let each = |from: Usage, to: Usage| (to.cpu_us - from.cpu_us) as f64 / records;
    let mut complaints = site.complaints();
    complaints.extend(agent.complaints());
    complaints.extend(server.iter().flat_map(Program::complaints));
    let outcome = Outcome {
        load: proc::load(),
        sink: args.sink,
        direct: 0,
        connections: args.connections,
        bytes: args.bytes,
        window_s: seconds,
        records_s: records / seconds,
        written_s: (end.written - begin.written) as f64 / seconds,
        agent_us: each(begin.agent, end.agent),
        agent_cores: cores(begin.agent, end.agent),
        server_us: each(begin.server, end.server),
        server_cores: cores(begin.server, end.server),
        agent_rss_kib,
        server_rss_kib: end.server.rss_kib,
        dropped: end.dropped,
        latency_us: Latency::of(latencies),
        complaints,
    };
    report::print(&args.report, &outcome, &[section(&outcome)], &outcome.complaints)
}

/// gse_data alone.
async fn direct(args: &DataArgs, site: &Site, server: &Program) -> Result<()> {
    let links = direct::start(site, &data_address(server)?, args.direct, args.bytes).await?;
    tokio::time::sleep(Duration::from_secs(args.warm_s)).await;
    let (at, before, used) = (Instant::now(), links.acknowledged.load(Relaxed), server.usage()?);
    tokio::time::sleep(Duration::from_secs(args.window_s)).await;
    let (seconds, after, now) = (
        at.elapsed().as_secs_f64(),
        links.acknowledged.load(Relaxed),
        server.usage()?,
    );
    let records = (after - before) as f64;
    ensure!(records > 0.0, "nothing was acknowledged: {:?}", server.complaints());
    let cpu = (now.cpu_us - used.cpu_us) as f64;
    let outcome = Outcome {
        load: proc::load(),
        sink: args.sink,
        direct: args.direct,
        connections: 0,
        bytes: args.bytes,
        window_s: seconds,
        records_s: records / seconds,
        written_s: records / seconds,
        agent_us: 0.0,
        agent_cores: 0.0,
        server_us: cpu / records,
        server_cores: cpu / 1e6 / seconds,
        agent_rss_kib: 0,
        server_rss_kib: now.rss_kib,
        dropped: 0.0,
        latency_us: None,
        complaints: server.complaints(),
    };
    report::print(&args.report, &outcome, &[section(&outcome)], &outcome.complaints)
}

async fn start_server(site: &Site, args: &DataArgs, files: &PathBuf) -> Result<Program> {
    std::fs::create_dir_all(files)?;
    let sink = match args.sink {
        SinkKind::Discard => "discard".to_owned(),
        SinkKind::File => format!("file:{}", files.display()),
        SinkKind::Own => bail!("the own sink is no gse_data"),
    };
    let mut sets = vec![format!("default_sink={sink}")];
    sets.extend(args.set_data.iter().cloned());
    site.data(&sets).await
}

/// Where gse_data takes links.
fn data_address(server: &Program) -> Result<String> {
    Ok(server.address("link")?.to_owned())
}

/// Everything at one moment.
struct Moment {
    at: Instant,
    agent: Usage,
    server: Usage,
    acknowledged: f64,
    dropped: f64,
    written: u64,
}

impl Moment {
    async fn take(agent: &Program, server: Option<&Program>, plugins: &plugin::Plugins) -> Result<Self> {
        let metrics = agent.metrics().await?;
        let of = |name: &str| {
            metrics
                .get(name)
                .copied()
                .with_context(|| format!("the agent has no figure {name}"))
        };
        Ok(Self {
            at: Instant::now(),
            agent: agent.usage()?,
            server: server.map(Program::usage).transpose()?.unwrap_or_default(),
            acknowledged: of("gse_agent_data_acknowledged_total")?,
            dropped: of("gse_agent_data_dropped_total")?,
            written: plugins.written(),
        })
    }
}

fn section(outcome: &Outcome) -> Section {
    let title = format!(
        "{} connections, {} links, records of {} bytes to {:?}, {:.0} s, load {}",
        outcome.connections, outcome.direct, outcome.bytes, outcome.sink, outcome.window_s, outcome.load
    );
    let mut table = Section::new(title, &["what", "value"]);
    table.row("acknowledged, records/s", [whole(outcome.records_s)]);
    table.row("written by plugins, records/s", [whole(outcome.written_s)]);
    table.row("dropped by the agent", [whole(outcome.dropped)]);
    table.row("agent, us CPU a record", [format!("{:.2}", outcome.agent_us)]);
    table.row("agent, cores", [format!("{:.2}", outcome.agent_cores)]);
    table.row(
        "agent, MiB resident at most",
        [one(outcome.agent_rss_kib as f64 / 1024.0)],
    );
    table.row("gse_data, us CPU a record", [format!("{:.2}", outcome.server_us)]);
    table.row("gse_data, cores", [format!("{:.2}", outcome.server_cores)]);
    if outcome.server_us > 0.0 {
        table.row("gse_data, records/s and core", [whole(1e6 / outcome.server_us)]);
    }
    table.row("gse_data, MiB resident", [one(outcome.server_rss_kib as f64 / 1024.0)]);
    if let Some(latency) = &outcome.latency_us {
        table.row("latency p50, ms", [format!("{:.2}", latency.p50 as f64 / 1e3)]);
        table.row("latency p99, ms", [format!("{:.2}", latency.p99 as f64 / 1e3)]);
        table.row("latency most, ms", [format!("{:.2}", latency.max as f64 / 1e3)]);
    }
    table
}
