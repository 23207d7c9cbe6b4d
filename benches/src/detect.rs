//! `detect`: how soon it is known that an agent is dead. One in a hundred is frozen (its process stopped, its connection open) while
//! all others beat and work; then as many end with a reset.
//!
//! What is measured is what a platform sees: `list_agent_state`. Healthy agents are asked for as well, and not one may ever be missing.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use nix::sys::signal::Signal;
use serde::Serialize;
use tokio::sync::watch;

use crate::agent::unix_ms;
use crate::api::{Api, PollOptions, percentile};
use crate::proc;
use crate::report::{self, ReportOptions, Section, whole};
use crate::site::{Site, SiteOptions};
use crate::swarm::raise_files;
use crate::swarm_child::{SwarmChild, SwarmOptions};

/// `status_code` of an agent that is there.
const RUNNING: i64 = 2;
/// Between two looks at the dead.
const LOOK: Duration = Duration::from_millis(50);
/// Between two looks at the living.
const LOOK_AT_ALL: Duration = Duration::from_secs(1);
/// Beyond what is configured; then it has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Options of `detect`.
#[derive(Args)]
pub(crate) struct DetectArgs {
    #[command(flatten)]
    swarm: SwarmOptions,
    /// Time between heartbeats.
    #[arg(long, default_value_t = 2, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=600))]
    heartbeat_s: u64,
    /// How many may be missing.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    missed: u64,
    #[command(flatten)]
    poll: PollOptions,
    #[command(flatten)]
    site: SiteOptions,
    #[command(flatten)]
    report: ReportOptions,
}

/// Milliseconds.
#[derive(Debug, Clone, Serialize)]
struct Distribution {
    agents: usize,
    min: f64,
    p50: f64,
    p99: f64,
    max: f64,
}

impl Distribution {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self {
            agents: values.len(),
            min: values.first().copied().unwrap_or(0.0),
            p50: percentile(&values, 50.0),
            p99: percentile(&values, 99.0),
            max: percentile(&values, 100.0),
        }
    }
}

#[derive(Serialize)]
struct Outcome {
    agents: u32,
    load: String,
    /// After so long without a sign of life an agent is given up, by the configuration.
    configured_ms: u64,
    /// From the last sign of life of a frozen agent until it was reported as gone.
    frozen: Distribution,
    /// From the end of the process of agents whose connections are reset.
    reset: Distribution,
    /// Healthy agents that were ever reported as gone, lost their session, or were ended as silent.
    false_positives: u64,
    /// Fan-outs to the healthy meanwhile, and their wrong rows.
    rounds: u32,
    rows_wrong: u32,
    /// From waking the frozen up until all of them had a session again.
    back_ms: f64,
    complaints: Vec<String>,
}

/// What goes on beside the measurement.
#[derive(Default)]
struct Load {
    rounds: u32,
    rows_wrong: u32,
}

/// Runs it.
///
/// # Errors
/// When a death is not noticed, or a healthy agent counted as dead.
pub(crate) async fn run(args: DetectArgs) -> Result<()> {
    raise_files(0)?;
    let agents = args.swarm.agents;
    ensure!(agents >= 3, "at least three agents are needed");
    let few = (agents / 100).max(1);
    let healthy = agents - 2 * few;
    let mut options = args.site.clone();
    let interval_ms = args.heartbeat_s * 1000;
    options
        .set_task
        .push(format!("session.heartbeat_interval_ms={interval_ms}"));
    options
        .set_task
        .push(format!("session.missed_heartbeats={}", args.missed));
    options
        .set_api
        .push(format!("heartbeat_interval_s={}", args.heartbeat_s));
    let site = Site::start(&options, args.swarm.shared_certificate).await?;
    let dir = tempfile::tempdir()?;
    let signs = dir.path().join("signs");
    let part = |agents| SwarmOptions {
        agents,
        ..args.swarm.clone()
    };
    let mut many = SwarmChild::start(&site, &part(healthy), &[])?;
    let (first, file) = (healthy.to_string(), signs.display().to_string());
    let mut frozen = SwarmChild::start(&site, &part(few), &["--first", &first, "--signs", &file])?;
    let first = (healthy + few).to_string();
    let mut resetting = SwarmChild::start(&site, &part(few), &["--first", &first, "--reset-on-close"])?;
    for swarm in [&mut many, &mut frozen, &mut resetting] {
        swarm.all_connected().await?;
    }
    let api = Api::new(&site)?;
    api.all_known(agents).await?;
    tokio::time::sleep(Duration::from_secs(2 * args.heartbeat_s)).await;

    let stop = watch::Sender::new(false);
    let ids = |from: u32| (from..from + few).collect::<Vec<u32>>();
    let limit = Duration::from_secs(args.heartbeat_s * args.missed) + PATIENCE;
    let measured = async {
        let done = async {
            frozen.signal(Signal::SIGSTOP)?;
            let gone = until_gone(&api, &ids(healthy), limit).await?;
            let last = last_signs(&signs)?;
            let silence = |(index, at): (u32, u64)| {
                let from = last
                    .get(&index)
                    .with_context(|| format!("agent {index} never gave a sign of life"))?;
                Ok(at as f64 - *from as f64)
            };
            let frozen_ms = gone.into_iter().map(silence).collect::<Result<Vec<f64>>>()?;
            let killed = unix_ms();
            resetting.kill_9().await?;
            let gone = until_gone(&api, &ids(healthy + few), limit).await?;
            let reset_ms = gone.into_values().map(|at| at.saturating_sub(killed) as f64).collect();
            let woken = Instant::now();
            frozen.signal(Signal::SIGCONT)?;
            let twice = u64::from(few) * 2;
            let back = frozen
                .until("the frozen have sessions again", PATIENCE, |now| {
                    now.connects >= twice && now.connected == now.agents
                })
                .await?;
            anyhow::Ok((frozen_ms, reset_ms, (back - woken).as_secs_f64() * 1000.0))
        }
        .await;
        stop.send_replace(true);
        done
    };
    let (measured, load, missing) = tokio::join!(
        measured,
        load(&api, healthy, &args, stop.subscribe()),
        look_at_all(&api, healthy, stop.subscribe())
    );
    let ((frozen_ms, reset_ms, back_ms), load, missing) = (measured?, load?, missing?);
    let after = many.settled().await?;
    let metrics = site.metrics().await?;
    let silent = metrics
        .iter()
        .find(|(name, _)| name.contains("sessions_closed") && name.contains("silent"));
    let silent = silent.map_or(0, |(_, count)| *count as u64);
    let outcome = Outcome {
        agents,
        load: proc::load(),
        configured_ms: interval_ms * args.missed,
        frozen: Distribution::of(frozen_ms),
        reset: Distribution::of(reset_ms),
        false_positives: missing
            + (after.connects - after.moves - u64::from(healthy))
            + silent.saturating_sub(u64::from(few)),
        rounds: load.rounds,
        rows_wrong: load.rows_wrong,
        back_ms,
        complaints: site.complaints(),
    };
    report::print(&args.report, &outcome, &sections(&outcome), &outcome.complaints)?;
    ensure!(
        outcome.false_positives == 0,
        "healthy agents were taken for dead: {after:?}"
    );
    ensure!(
        silent == u64::from(few),
        "{silent} of {few} frozen agents were ended as silent"
    );
    ensure!(
        outcome.rows_wrong == 0,
        "{} rows are not what they should be",
        outcome.rows_wrong
    );
    // Stamps are whole seconds on both sides.
    ensure!(
        outcome.frozen.min >= outcome.configured_ms as f64 - 1_000.0,
        "an agent was given up {:.0} ms after its last sign of life, before its time",
        outcome.frozen.min
    );
    Ok(())
}

/// Watches agents until none of them is running; when each was first seen as gone, in unix milliseconds.
async fn until_gone(api: &Api, agents: &[u32], limit: Duration) -> Result<HashMap<u32, u64>> {
    let (started, mut gone) = (Instant::now(), HashMap::new());
    while gone.len() < agents.len() {
        ensure!(
            started.elapsed() < limit,
            "{} of {} dead agents are still reported as running after {limit:?}",
            agents.len() - gone.len(),
            agents.len()
        );
        let left: Vec<u32> = agents
            .iter()
            .copied()
            .filter(|index| !gone.contains_key(index))
            .collect();
        for (index, status) in api.states(&left).await? {
            if status != RUNNING {
                gone.insert(index, unix_ms());
            }
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(gone)
}

/// Fan-outs to the healthy until told to stop.
async fn load(api: &Api, healthy: u32, args: &DetectArgs, stop: watch::Receiver<bool>) -> Result<Load> {
    let mut load = Load::default();
    while !*stop.borrow() {
        let round = api.round(healthy, args.swarm.output_bytes, &args.poll).await?;
        load.rounds += 1;
        load.rows_wrong += round.wrong_rows;
    }
    Ok(load)
}

/// How many times a healthy agent was not reported as running.
async fn look_at_all(api: &Api, healthy: u32, stop: watch::Receiver<bool>) -> Result<u64> {
    let all: Vec<u32> = (0..healthy).collect();
    let mut missing = 0;
    while !*stop.borrow() {
        let states = api.states(&all).await?;
        missing += states.iter().filter(|(_, status)| *status != RUNNING).count() as u64;
        tokio::time::sleep(LOOK_AT_ALL).await;
    }
    Ok(missing)
}

/// The last sign of life of each agent.
fn last_signs(file: &Path) -> Result<HashMap<u32, u64>> {
    let text = std::fs::read_to_string(file).context("signs of life")?;
    let sign = |line: &str| {
        let (index, at) = line.split_once(' ')?;
        Some((index.parse().ok()?, at.parse().ok()?))
    };
    Ok(text.lines().filter_map(sign).collect())
}

fn sections(outcome: &Outcome) -> Vec<Section> {
    let mut table = Section::new(
        format!(
            "Until a death is seen, {} agents, {} ms configured, load {}",
            outcome.agents, outcome.configured_ms, outcome.load
        ),
        &["how they died", "agents", "min ms", "p50", "p99", "max"],
    );
    for (what, d) in [
        ("frozen, since the last sign of life", &outcome.frozen),
        ("connection reset", &outcome.reset),
    ] {
        let figures = [d.min, d.p50, d.p99, d.max].map(whole);
        table.row(what, [d.agents.to_string()].into_iter().chain(figures));
    }
    let mut what = Section::new("Meanwhile", &["what", "value"]);
    what.row("healthy agents taken for dead", [outcome.false_positives.to_string()]);
    what.row("fan-outs to the healthy", [outcome.rounds.to_string()]);
    what.row("rows that were wrong", [outcome.rows_wrong.to_string()]);
    what.row("the frozen, woken up, all back, ms", [whole(outcome.back_ms)]);
    what.row("warnings and errors in logs", [outcome.complaints.len().to_string()]);
    vec![table, what]
}
