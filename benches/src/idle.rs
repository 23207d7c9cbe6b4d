//! `idle`: what a connected agent costs that does nothing, before and after it has worked, and what its heartbeat costs.
//!
//! Memory is the process's own (RSS) and the kernel's for its sockets. Both ends of a connection are on this machine, so that the
//! kernel's growth is halved to get that of one end.

use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;

use crate::api::{Api, PollOptions, percentile};
use crate::measure::{self, Snapshot, cpu_each, kib_per_agent};
use crate::proc::{self, KernelMemory};
use crate::report::{self, ReportOptions, Section, one};
use crate::site::{Site, SiteOptions};
use crate::swarm::{Progress, raise_files};
use crate::swarm_child::{SwarmChild, SwarmOptions};

/// Long enough that nobody beats while the floor is measured, short enough that nobody counts as silent.
const NO_BEAT_MS: u64 = 3_600_000;
const SETTLE: Duration = Duration::from_secs(2);

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

/// Memory for each session, KiB.
#[derive(Serialize)]
struct PerSession {
    when: &'static str,
    /// gse_task's own.
    user: f64,
    /// The kernel's buffers for one end of the connection.
    tcp_buffers: f64,
    /// The kernel's objects for one end of it; not known without root.
    slabs: Option<f64>,
    sum: f64,
}

impl PerSession {
    fn between(when: &'static str, from: &Moment, to: &Moment, agents: u32) -> Self {
        let user = kib_per_agent(from.processes.task().rss_kib, to.processes.task().rss_kib, agents);
        let end = |before, after| kib_per_agent(before, after, agents) / 2.0;
        let tcp_buffers = end(from.kernel.tcp_buffers_kib, to.kernel.tcp_buffers_kib);
        let slabs = from.kernel.slabs_kib.zip(to.kernel.slabs_kib);
        let file = to.kernel.file_bytes.map(|bytes| bytes as f64 / 1024.0);
        let slabs = slabs.zip(file).map(|((before, after), file)| end(before, after) + file);
        Self {
            when,
            user,
            tcp_buffers,
            slabs,
            sum: user + tcp_buffers + slabs.unwrap_or(0.0),
        }
    }
}

#[derive(Serialize)]
struct Beats {
    seconds: f64,
    beats: u64,
    per_s: f64,
    /// Microseconds for each heartbeat, by process, what they use without heartbeats taken off.
    cpu_us_per_beat: Vec<(String, f64)>,
    /// Percent of a core that all nodes of gse_task use while everybody beats, the floor included; and the floor.
    task_percent: f64,
    floor_percent: f64,
}

#[derive(Serialize)]
struct Outcome {
    agents: u32,
    load: String,
    sessions: Vec<PerSession>,
    rounds: u32,
    /// Of the fan-outs: microseconds per agent-task by process, and milliseconds until all rows were there (median).
    fan_out_cpu_us: Vec<(String, f64)>,
    fan_out_all_ms: f64,
    beats: Beats,
    processes: Vec<Snapshot>,
    kernel: Vec<KernelMemory>,
    rows_wrong: u32,
    complaints: Vec<String>,
}

struct Moment {
    processes: Snapshot,
    kernel: KernelMemory,
}

impl Moment {
    async fn take(when: &str, site: &Site, swarms: &[(&str, &SwarmChild)]) -> Result<Self> {
        tokio::time::sleep(SETTLE).await;
        Ok(Self {
            processes: Snapshot::take(when, site, swarms)?,
            kernel: proc::kernel_memory()?,
        })
    }
}

/// Runs it.
///
/// # Errors
/// When the site does not start, an agent is lost, or rows are missing or wrong.
pub(crate) async fn run(args: IdleArgs) -> Result<()> {
    raise_files(0)?;
    let agents = args.swarm.agents;
    let site = Site::start(&args.site, args.swarm.shared_certificate).await?;
    let empty = Moment::take("before the first agent", &site, &[]).await?;
    let mut swarm = SwarmChild::start(&site, &args.swarm, &[])?;
    swarm.all_connected().await?;
    let connected = Moment::take("all connected", &site, &[("swarm", &swarm)]).await?;
    let api = Api::new(&site)?;
    api.all_known(agents).await?;
    let (mut rows_wrong, mut times) = (0, vec![]);
    for _ in 0..args.rounds {
        let round = api.round(agents, args.swarm.output_bytes, &args.poll).await?;
        rows_wrong += round.wrong_rows;
        times.push(round.all_ms);
    }
    times.sort_by(f64::total_cmp);
    let worked = Moment::take("after the fan-outs", &site, &[("swarm", &swarm)]).await?;
    let (beats, after) = beats(&args, &site, &mut swarm).await?;
    let sessions = vec![
        PerSession::between("all connected", &empty, &connected, agents),
        PerSession::between("after the fan-outs", &empty, &worked, agents),
    ];
    let outcome = Outcome {
        agents,
        load: proc::load(),
        sessions,
        rounds: args.rounds,
        fan_out_cpu_us: cpu_each(
            &connected.processes,
            &worked.processes,
            u64::from(agents) * u64::from(args.rounds),
        ),
        fan_out_all_ms: percentile(&times, 50.0),
        beats,
        kernel: vec![empty.kernel, connected.kernel, worked.kernel],
        processes: vec![empty.processes, connected.processes, worked.processes],
        rows_wrong,
        complaints: site.complaints(),
    };
    report::print(&args.report, &outcome, &sections(&outcome), &outcome.complaints)?;
    ensure!(rows_wrong == 0, "{rows_wrong} rows are not what they should be");
    ensure!(
        outcome.beats.beats > 0,
        "no heartbeat within {} s",
        outcome.beats.seconds
    );
    ensure!(
        after.connected == u64::from(agents) && after.connects == u64::from(agents) + after.moves,
        "agents were lost: {after:?}"
    );
    Ok(())
}

/// CPU with nobody beating, then with everybody.
async fn beats(args: &IdleArgs, site: &Site, swarm: &mut SwarmChild) -> Result<(Beats, Progress)> {
    let window = Duration::from_secs(args.window_s);
    swarm.beat_every(NO_BEAT_MS).await?;
    tokio::time::sleep(SETTLE).await;
    let silent = over(site, swarm, window).await?;
    let period_ms = (u64::from(args.swarm.agents) * 1000 / args.beats_per_s.max(1)).max(10);
    swarm.beat_every(period_ms).await?;
    tokio::time::sleep(SETTLE).await;
    let (before, started) = (swarm.now(), std::time::Instant::now());
    let beating = over(site, swarm, window).await?;
    let (after, seconds) = (swarm.now(), started.elapsed().as_secs_f64());
    let beats = after.beats - before.beats;
    let percent = |cpu: &[(String, f64)]| {
        let task = cpu.iter().filter(|(name, _)| name.starts_with("gse_task"));
        task.map(|(_, us)| us).sum::<f64>() / window.as_micros() as f64 * 100.0
    };
    let without = |name: &str| {
        silent
            .iter()
            .find(|(other, _)| other == name)
            .map_or(0.0, |(_, us)| *us)
    };
    let each = |(name, us): &(String, f64)| (name.clone(), (us - without(name)) / beats.max(1) as f64);
    let beats = Beats {
        seconds,
        beats,
        per_s: beats as f64 / seconds,
        cpu_us_per_beat: beating.iter().map(each).collect(),
        task_percent: percent(&beating),
        floor_percent: percent(&silent),
    };
    Ok((beats, after))
}

/// CPU of every process while nothing is asked of them, microseconds.
async fn over(site: &Site, swarm: &SwarmChild, window: Duration) -> Result<Vec<(String, f64)>> {
    let from = Snapshot::take("", site, &[("swarm", swarm)])?;
    tokio::time::sleep(window).await;
    let to = Snapshot::take("", site, &[("swarm", swarm)])?;
    Ok(cpu_each(&from, &to, 1))
}

fn sections(outcome: &Outcome) -> Vec<Section> {
    let mut memory = Section::new(
        format!(
            "KiB per session, {} agents, {} fan-outs, load {}",
            outcome.agents, outcome.rounds, outcome.load
        ),
        &["when", "gse_task (RSS)", "kernel, TCP buffers", "kernel, slabs", "sum"],
    );
    for at in &outcome.sessions {
        let slabs = at.slabs.map_or_else(|| "only root may read it".to_owned(), one);
        memory.row(at.when, [one(at.user), one(at.tcp_buffers), slabs, one(at.sum)]);
    }
    let all = measure::memory("Memory of every process, KiB (RSS)", &outcome.processes);
    let title = format!(
        "CPU per agent-task of the fan-outs; all rows after {:.1} ms (median)",
        outcome.fan_out_all_ms
    );
    let fan_outs = measure::cpu_table(title, "us", &outcome.fan_out_cpu_us);
    let beats = &outcome.beats;
    let per_beat = measure::cpu_table("CPU of a heartbeat", "us", &beats.cpu_us_per_beat);
    let mut cpu = Section::new("Heartbeats", &["what", "value"]);
    cpu.row("heartbeats a second", [one(beats.per_s)]);
    cpu.row("gse_task, % of a core", [one(beats.task_percent)]);
    cpu.row(
        "gse_task with everybody silent, % of a core",
        [one(beats.floor_percent)],
    );
    cpu.row("warnings and errors in logs", [outcome.complaints.len().to_string()]);
    vec![memory, all, fan_outs, per_beat, cpu]
}
