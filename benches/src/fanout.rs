//! `fanout`: rounds of one script to all agents of a private site.

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;

use crate::api::{Api, PollOptions, Round};
use crate::measure::{self, Costs, Reading, Snapshot, costs, kib_per_agent};
use crate::proc;
use crate::report::{self, ReportOptions, Section, one, whole};
use crate::site::{Site, SiteOptions};
use crate::swarm::{Progress, raise_files};
use crate::swarm_child::{SwarmChild, SwarmOptions};

/// Options of `fanout`.
#[derive(Args)]
pub(crate) struct FanoutArgs {
    #[command(flatten)]
    swarm: SwarmOptions,
    /// Rounds that count; one before them does not.
    #[arg(long, default_value_t = 10)]
    rounds: u32,
    #[command(flatten)]
    poll: PollOptions,
    #[command(flatten)]
    site: SiteOptions,
    #[command(flatten)]
    report: ReportOptions,
}

#[derive(Serialize)]
struct Memory {
    /// gse_task before the first agent, with all connected, and after the rounds; KiB.
    empty_kib: u64,
    connected_kib: u64,
    after_kib: u64,
    /// The same for each agent.
    connected_kib_per_agent: f64,
    after_kib_per_agent: f64,
}

/// Everything that `fanout` finds out.
#[derive(Serialize)]
struct Outcome {
    agents: u32,
    connect_ms: f64,
    load: String,
    costs: Costs,
    agent_tasks_per_s: f64,
    memory: Memory,
    /// Every process: before the first agent, with all connected, after the rounds.
    processes: Vec<Snapshot>,
    rounds: Vec<Round>,
    rows_wrong: u32,
    swarm: Progress,
    ingest_dropped: f64,
    ingest_retries: f64,
    complaints: Vec<String>,
}

/// Runs it.
///
/// # Errors
/// When the site does not start, or rows are missing or wrong.
pub(crate) async fn run(args: FanoutArgs) -> Result<()> {
    raise_files(0)?;
    let agents = args.swarm.agents;
    let site = Site::start(&args.site, args.swarm.shared_certificate).await?;
    let nobody = Snapshot::take("before the first agent", &site, &[])?;
    let started = std::time::Instant::now();
    let mut swarm = SwarmChild::start(&site, &args.swarm, &[])?;
    let connect_ms = (swarm.all_connected().await? - started).as_secs_f64() * 1000.0;
    let api = Api::new(&site)?;
    api.all_known(agents).await?;
    let first = api.round(agents, args.swarm.output_bytes, &args.poll).await?;
    ensure!(
        first.wrong_rows == 0,
        "{} rows of the first round are not what they should be, such as {}",
        first.wrong_rows,
        first.wrong_example
    );
    swarm.all_acknowledged(u64::from(agents)).await?;
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let before = Reading::take("all connected, one round", &site, &mut swarm).await?;
    let mut rounds = Vec::new();
    let measured = std::time::Instant::now();
    for _ in 0..args.rounds {
        rounds.push(api.round(agents, args.swarm.output_bytes, &args.poll).await?);
    }
    let wall_s = measured.elapsed().as_secs_f64();
    swarm
        .all_acknowledged(u64::from(agents) * u64::from(args.rounds + 1))
        .await?;
    let after = Reading::take("after the rounds", &site, &mut swarm).await?;
    let metrics = site.metrics().await?;
    let metric = |name: &str| {
        metrics
            .iter()
            .filter(|(key, _)| key.contains(name))
            .map(|(_, v)| v)
            .sum()
    };
    let tasks = u64::from(agents) * u64::from(args.rounds);
    let kib = [&nobody, &before.processes, &after.processes].map(|at| at.task().rss_kib);
    let [empty_kib, connected_kib, after_kib] = kib;
    let outcome = Outcome {
        agents,
        connect_ms,
        load: proc::load(),
        costs: costs(
            &before,
            &after,
            tasks,
            rounds.iter().map(|round| round.http_bytes).sum(),
        ),
        agent_tasks_per_s: tasks as f64 / wall_s,
        memory: Memory {
            empty_kib,
            connected_kib,
            after_kib,
            connected_kib_per_agent: kib_per_agent(empty_kib, connected_kib, agents),
            after_kib_per_agent: kib_per_agent(empty_kib, after_kib, agents),
        },
        processes: vec![nobody, before.processes, after.processes],
        rows_wrong: rounds.iter().map(|round| round.wrong_rows).sum(),
        rounds,
        swarm: after.swarm,
        ingest_dropped: metric("ingest_dropped"),
        ingest_retries: metric("ingest_retries"),
        complaints: site.complaints(),
    };
    report::print(&args.report, &outcome, &sections(&outcome), &outcome.complaints)?;
    ensure!(
        outcome.rows_wrong == 0,
        "{} rows are not what they should be, such as {}",
        outcome.rows_wrong,
        outcome
            .rounds
            .iter()
            .map(|r| r.wrong_example.as_str())
            .find(|e| !e.is_empty())
            .unwrap_or_default()
    );
    ensure!(
        outcome.swarm.repeated == 0,
        "{} dispatches came twice",
        outcome.swarm.repeated
    );
    Ok(())
}

fn sections(outcome: &Outcome) -> Vec<Section> {
    let costs = &outcome.costs;
    let title = format!("CPU per agent-task, {} agents, load {}", outcome.agents, outcome.load);
    let cpu = measure::cpu_table(title, "us", &costs.cpu_us);
    let mut bytes = Section::new("Bytes per agent-task", &["what", "bytes"]);
    bytes.row("wire, to the agent (with TLS)", [whole(costs.wire_down)]);
    bytes.row("wire, from the agent (with TLS)", [whole(costs.wire_up)]);
    bytes.row("store, growth of its files", [whole(costs.store_bytes)]);
    bytes.row("HTTP bodies, submit and polls", [whole(costs.http_bytes)]);
    bytes.row("audit trail", [one(costs.audit_bytes)]);
    bytes.row("log of gse_task", [one(costs.log_bytes)]);
    let memory = &outcome.memory;
    let mut rss = Section::new("Memory of gse_task (RSS)", &["when", "KiB", "KiB per agent"]);
    rss.row("before the first agent", [memory.empty_kib.to_string(), String::new()]);
    rss.row(
        "all connected",
        [memory.connected_kib.to_string(), one(memory.connected_kib_per_agent)],
    );
    rss.row(
        "after the rounds",
        [memory.after_kib.to_string(), one(memory.after_kib_per_agent)],
    );
    let mut times = Section::new(
        format!(
            "Rounds, milliseconds from the submit; {:.0} agent-tasks/s",
            outcome.agent_tasks_per_s
        ),
        &["round", "submit", "p50", "p99", "all", "queries"],
    );
    for (nth, round) in outcome.rounds.iter().enumerate() {
        let figures = [round.submit_ms, round.p50_ms, round.p99_ms, round.all_ms].map(one);
        times.row(
            &(nth + 1).to_string(),
            figures.into_iter().chain([round.queries.to_string()]),
        );
    }
    if let Some(median) = median(&outcome.rounds) {
        times.row("median", median.map(one).into_iter().chain([String::new()]));
    }
    let swarm = &outcome.swarm;
    let mut what = Section::new("What happened", &["what", "count"]);
    for (name, count) in [
        ("dispatches", swarm.dispatches),
        ("dispatches that came twice", swarm.repeated),
        ("rows sent", swarm.rows_sent),
        ("rows sent again", swarm.rows_resent),
        ("rows acknowledged", swarm.rows_acknowledged),
        ("failed connects", swarm.failures),
        ("rows that were wrong", u64::from(outcome.rows_wrong)),
        ("warnings and errors in logs", outcome.complaints.len() as u64),
    ] {
        what.row(name, [count.to_string()]);
    }
    what.row("frames dropped by the server", [whole(outcome.ingest_dropped)]);
    what.row("writes repeated by the server", [whole(outcome.ingest_retries)]);
    what.row("first connect to last, ms", [whole(outcome.connect_ms)]);
    let all = measure::memory("Memory of every process, KiB (RSS)", &outcome.processes);
    vec![cpu, bytes, rss, all, times, what]
}

/// Median of each figure over the rounds.
fn median(rounds: &[Round]) -> Option<[f64; 4]> {
    let of = |pick: fn(&Round) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(pick).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len().checked_sub(1)? / 2).copied()
    };
    Some([
        of(|r| r.submit_ms)?,
        of(|r| r.p50_ms)?,
        of(|r| r.p99_ms)?,
        of(|r| r.all_ms)?,
    ])
}
