//! `idle`: what a connected agent costs that does nothing, before and after it has worked, and what its heartbeat costs.

use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;

use crate::api::{Api, PollOptions};
use crate::measure::kib_per_agent;
use crate::proc;
use crate::report::{self, ReportOptions, Section, one};
use crate::site::{Site, SiteOptions};
use crate::swarm::raise_files;
use crate::swarm_child::{SwarmChild, SwarmOptions};

/// Long enough that nobody beats while the floor is measured, short enough that nobody counts as silent.
const NO_BEAT_MS: u64 = 3_600_000;

/// Options of `idle`.
#[derive(Args)]
pub(crate) struct IdleArgs {
    #[command(flatten)]
    swarm: SwarmOptions,
    /// Fan-outs between the readings of memory.
    #[arg(long, default_value_t = 60)]
    rounds: u32,
    /// Heartbeats a second, of all agents together, while their CPU is measured.
    #[arg(long, default_value_t = 2_000)]
    beats_per_s: u64,
    /// Seconds of each measurement of CPU; less than the time after which silent agents are given up.
    #[arg(long, default_value_t = 10)]
    window_s: u64,
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
    /// gse_task's memory: before the first agent, 2 s after the last was connected, 2 s after the fan-outs.
    empty_kib: u64,
    connected_kib: u64,
    worked_kib: u64,
    kib_per_session: f64,
    kib_per_session_after: f64,
    store_connected_kib: u64,
    store_worked_kib: u64,
    rounds: u32,
    beats: u64,
    /// Of gse_task and of the store, microseconds, what they use without heartbeats taken off.
    cpu_us_per_beat: f64,
    store_cpu_us_per_beat: f64,
    /// Percent of a core that gse_task uses with everybody silent.
    floor_percent: f64,
    rows_wrong: u32,
    complaints: Vec<String>,
}

/// Runs it.
///
/// # Errors
/// When the site does not start, an agent is lost, or rows are missing or wrong.
pub(crate) async fn run(args: IdleArgs) -> Result<()> {
    raise_files(0)?;
    let agents = args.swarm.agents;
    let settle = Duration::from_secs(2);
    let site = Site::start(&args.site, args.swarm.shared_certificate).await?;
    tokio::time::sleep(settle).await;
    let empty = site.task.usage()?;
    let mut swarm = SwarmChild::start(&site, &args.swarm, &[])?;
    swarm.all_connected().await?;
    tokio::time::sleep(settle).await;
    let (connected, store_connected) = (site.task.usage()?, site.store.usage()?);
    let api = Api::new(&site)?;
    let mut rows_wrong = 0;
    for _ in 0..args.rounds {
        let round = api.round(agents, args.swarm.output_bytes, &args.poll).await?;
        rows_wrong += round.wrong_rows;
    }
    tokio::time::sleep(settle).await;
    let (worked, store_worked) = (site.task.usage()?, site.store.usage()?);

    let window = Duration::from_secs(args.window_s);
    swarm.beat_every(NO_BEAT_MS).await?;
    tokio::time::sleep(settle).await;
    let floor = cpu_over(&site, window).await?;
    let period_ms = (u64::from(agents) * 1000 / args.beats_per_s.max(1)).max(10);
    swarm.beat_every(period_ms).await?;
    tokio::time::sleep(settle).await;
    let before = swarm.now();
    let beating = cpu_over(&site, window).await?;
    let after = swarm.now();
    let beats = after.beats - before.beats;
    let per_beat = |with: u64, without: u64| (with as f64 - without as f64) / beats.max(1) as f64;
    let outcome = Outcome {
        agents,
        load: proc::load(),
        empty_kib: empty.rss_kib,
        connected_kib: connected.rss_kib,
        worked_kib: worked.rss_kib,
        kib_per_session: kib_per_agent(empty.rss_kib, connected.rss_kib, agents),
        kib_per_session_after: kib_per_agent(empty.rss_kib, worked.rss_kib, agents),
        store_connected_kib: store_connected.rss_kib,
        store_worked_kib: store_worked.rss_kib,
        rounds: args.rounds,
        beats,
        cpu_us_per_beat: per_beat(beating.0, floor.0),
        store_cpu_us_per_beat: per_beat(beating.1, floor.1),
        floor_percent: floor.0 as f64 / window.as_micros() as f64 * 100.0,
        rows_wrong,
        complaints: site.complaints(),
    };
    report::print(&args.report, &outcome, &sections(&outcome), &outcome.complaints)?;
    ensure!(rows_wrong == 0, "{rows_wrong} rows are not what they should be");
    ensure!(beats > 0, "no heartbeat within {window:?}");
    ensure!(
        after.connected == u64::from(agents) && after.connects == u64::from(agents),
        "agents were lost: {after:?}"
    );
    Ok(())
}

/// CPU of gse_task and of the store while nothing is asked of them.
async fn cpu_over(site: &Site, window: Duration) -> Result<(u64, u64)> {
    let (task, store) = (site.task.usage()?, site.store.usage()?);
    tokio::time::sleep(window).await;
    let (task_then, store_then) = (site.task.usage()?, site.store.usage()?);
    Ok((task_then.cpu_us - task.cpu_us, store_then.cpu_us - store.cpu_us))
}

fn sections(outcome: &Outcome) -> Vec<Section> {
    let mut memory = Section::new(
        format!("Memory (RSS), {} agents, load {}", outcome.agents, outcome.load),
        &["when", "gse_task KiB", "KiB per session", "store KiB"],
    );
    memory.row(
        "before the first agent",
        [outcome.empty_kib.to_string(), String::new(), String::new()],
    );
    memory.row(
        "2 s after the last connect",
        [
            outcome.connected_kib.to_string(),
            one(outcome.kib_per_session),
            outcome.store_connected_kib.to_string(),
        ],
    );
    memory.row(
        &format!("2 s after {} fan-outs", outcome.rounds),
        [
            outcome.worked_kib.to_string(),
            one(outcome.kib_per_session_after),
            outcome.store_worked_kib.to_string(),
        ],
    );
    let mut cpu = Section::new("CPU of heartbeats", &["what", "value"]);
    cpu.row("heartbeats", [outcome.beats.to_string()]);
    cpu.row("gse_task, us per heartbeat", [one(outcome.cpu_us_per_beat)]);
    cpu.row("store, us per heartbeat", [one(outcome.store_cpu_us_per_beat)]);
    cpu.row(
        "gse_task with everybody silent, % of a core",
        [one(outcome.floor_percent)],
    );
    cpu.row("warnings and errors in logs", [outcome.complaints.len().to_string()]);
    vec![memory, cpu]
}
