//! `storm`: gse_task (every node of it) is killed with everybody connected and started again at once.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;

use crate::api::{Api, PollOptions};
use crate::measure::{self, Snapshot, cpu_each};
use crate::proc;
use crate::report::{self, ReportOptions, Section, one, whole};
use crate::site::{Site, SiteOptions};
use crate::swarm::raise_files;
use crate::swarm_child::{SwarmChild, SwarmOptions};

/// Until the last agent has to be back.
const BACK: Duration = Duration::from_secs(300);

/// Options of `storm`.
#[derive(Args)]
pub(crate) struct StormArgs {
    #[command(flatten)]
    swarm: SwarmOptions,
    /// First bound of the agents' random wait; it doubles. The default is that of gse_agent.
    #[arg(long, default_value_t = 500, value_name = "MS")]
    reconnect_min_ms: u64,
    /// Last bound of that wait.
    #[arg(long, default_value_t = 30_000, value_name = "MS")]
    reconnect_max_ms: u64,
    /// The first try comes within this time.
    #[arg(long, default_value_t = 3_000, value_name = "MS")]
    reconnect_spread_ms: u64,
    #[command(flatten)]
    poll: PollOptions,
    #[command(flatten)]
    site: SiteOptions,
    #[command(flatten)]
    report: ReportOptions,
}

#[derive(Serialize)]
struct Outcome {
    agents: u32,
    load: String,
    /// From the kill, milliseconds: until gse_task was ready again, and until so many were back.
    ready_ms: f64,
    half_ms: f64,
    p99_ms: f64,
    all_ms: f64,
    /// Microseconds of CPU for each agent, from ready to everybody being back, by process.
    cpu_us_per_connect: Vec<(String, f64)>,
    processes: Vec<Snapshot>,
    failed_connects: u64,
    refused: u64,
    listen_drops: u64,
    /// A fan-out right after.
    round_all_ms: f64,
    rows_wrong: u32,
    complaints: Vec<String>,
}

/// Runs it.
///
/// # Errors
/// When somebody does not come back, or the fan-out after it fails.
pub(crate) async fn run(args: StormArgs) -> Result<()> {
    raise_files(0)?;
    let agents = args.swarm.agents;
    let wanted = u64::from(agents);
    let mut site = Site::start(&args.site, args.swarm.shared_certificate).await?;
    let (min, max) = (args.reconnect_min_ms.to_string(), args.reconnect_max_ms.to_string());
    // No bound of the swarm's own on handshakes: how the server takes it is what is measured.
    let unbounded = agents.to_string();
    let spread = args.reconnect_spread_ms.to_string();
    let more = [
        "--reconnect-spread-ms",
        &spread,
        "--reconnect-min-ms",
        &min,
        "--reconnect-max-ms",
        &max,
        "--connecting",
        &unbounded,
    ];
    let mut swarm = SwarmChild::start(&site, &args.swarm, &more)?;
    swarm.all_connected().await?;
    tokio::time::sleep(Duration::from_secs(2)).await;

    let (before, drops) = (swarm.now(), proc::listen_drops()?);
    let connected = Snapshot::take("all connected", &site, &[("swarm", &swarm)])?;
    let killed = Instant::now();
    site.kill_tasks().await?;
    swarm
        .until("everybody has noticed", Duration::from_secs(30), |now| {
            now.connected == 0
        })
        .await?;
    let base = swarm.now().connects;
    site.restart_tasks().await?;
    let since = |at: Instant| (at - killed).as_secs_f64() * 1000.0;
    let ready_ms = since(Instant::now());
    let fresh = Snapshot::take("ready again", &site, &[("swarm", &swarm)])?;
    let half = swarm
        .until("half of the agents back", BACK, |now| {
            now.connects - base >= wanted.div_ceil(2)
        })
        .await?;
    let most = swarm
        .until("99 % of the agents back", BACK, |now| {
            now.connects - base >= (wanted * 99).div_ceil(100)
        })
        .await?;
    let all = swarm.all_connected().await?;
    let back = Snapshot::take("all back", &site, &[("swarm", &swarm)])?;
    let after = swarm.settled().await?;
    let listen_drops = proc::listen_drops()? - drops;
    let api = Api::new(&site)?;
    api.all_known(agents).await?;
    let round = api.round(agents, args.swarm.output_bytes, &args.poll).await?;
    let outcome = Outcome {
        agents,
        load: proc::load(),
        ready_ms,
        half_ms: since(half),
        p99_ms: since(most),
        all_ms: since(all),
        cpu_us_per_connect: cpu_each(&fresh, &back, wanted),
        processes: vec![connected, fresh, back],
        failed_connects: after.failures - before.failures,
        refused: after.refused - before.refused,
        listen_drops,
        round_all_ms: round.all_ms,
        rows_wrong: round.wrong_rows,
        complaints: site.complaints(),
    };
    report::print(&args.report, &outcome, &sections(&outcome), &outcome.complaints)?;
    ensure!(
        round.wrong_rows == 0,
        "{} rows are not what they should be, such as {}",
        round.wrong_rows,
        round.wrong_example
    );
    Ok(())
}

fn sections(outcome: &Outcome) -> Vec<Section> {
    let mut back = Section::new(
        format!("kill -9 of gse_task, {} agents, load {}", outcome.agents, outcome.load),
        &["what", "value"],
    );
    back.row("gse_task ready again, ms after the kill", [whole(outcome.ready_ms)]);
    back.row("50 % back, ms", [whole(outcome.half_ms)]);
    back.row("99 % back, ms", [whole(outcome.p99_ms)]);
    back.row("100 % back, ms", [whole(outcome.all_ms)]);
    back.row("failed connects", [outcome.failed_connects.to_string()]);
    back.row("refused", [outcome.refused.to_string()]);
    back.row("accept queue full (whole machine)", [outcome.listen_drops.to_string()]);
    back.row("fan-out right after, all rows, ms", [one(outcome.round_all_ms)]);
    back.row("warnings and errors in logs", [outcome.complaints.len().to_string()]);
    let cpu = measure::cpu_table("CPU of a connect", "us", &outcome.cpu_us_per_connect);
    let memory = measure::memory("Memory of every process, KiB (RSS)", &outcome.processes);
    vec![back, cpu, memory]
}
