//! `files`: what it costs real agents to move a file, with default settings: memory and CPU of the source and of the targets, all on this
//! host, through gse_btsvr and over mutual TLS.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use rand::Rng;
use serde::Serialize;
use serde_json::json;

use crate::agent::agent_id;
use crate::api::Api;
use crate::proc::{self, Usage};
use crate::report::{self, ReportOptions, Section, one, whole};
use crate::site::{Program, Site, SiteOptions};

/// After the start.
const SETTLE: Duration = Duration::from_secs(2);
/// For a transfer.
const LIMIT: Duration = Duration::from_secs(600);
const GIB: f64 = (1 << 30) as f64;

/// Options of `files`.
#[derive(Args)]
pub(crate) struct FilesArgs {
    /// Agents that get it.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    targets: u32,
    /// Size of the file.
    #[arg(long, default_value_t = 256)]
    mib: u64,
    /// How often, each time another file; memory is the most that there was in all of them.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// MB/s that each target may fetch; 0: no limit.
    #[arg(long, default_value_t = 0)]
    download_speed: u32,
    /// More settings for gse_agent, as for its own --set.
    #[arg(long, value_name = "KEY=VALUE")]
    set_agent: Vec<String>,
    /// More settings for gse_btsvr.
    #[arg(long, value_name = "KEY=VALUE")]
    set_btsvr: Vec<String>,
    #[command(flatten)]
    site: SiteOptions,
    #[command(flatten)]
    report: ReportOptions,
}

/// What one agent has spent.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Spent {
    /// KiB before the first transfer, and the most ever.
    idle_kib: u64,
    peak_kib: u64,
    /// Seconds of a core.
    cpu_s: f64,
    /// GiB of content over the wire.
    received_gib: f64,
    sent_gib: f64,
    /// GiB that it was to read or to write.
    content_gib: f64,
}

impl Spent {
    /// Cores for a GiB of the file a second.
    fn cores(&self) -> f64 {
        self.cpu_s / self.content_gib.max(1e-9)
    }

    /// Cores for a GiB on the wire a second.
    fn cores_on_wire(&self) -> f64 {
        self.cpu_s / (self.received_gib + self.sent_gib).max(1e-9)
    }
}

#[derive(Serialize)]
struct Outcome {
    load: String,
    mib: u64,
    /// Milliseconds of each round, until all rows were seen as over.
    rounds_ms: Vec<f64>,
    source: Spent,
    /// Of each target.
    targets: Vec<Spent>,
    complaints: Vec<String>,
}

/// Runs it.
///
/// # Errors
/// When something does not start, or a row is not 0.
pub(crate) async fn run(args: FilesArgs) -> Result<()> {
    ensure!(args.rounds > 0 && args.mib > 0, "there is nothing to measure");
    let mut options = args.site.clone();
    if options.nodes == 1 {
        // One node alone listens for no other servers; gse_btsvr is one.
        options.set_task.insert(0, "rpc.listen=127.0.0.1:0".to_owned());
    }
    let site = Site::start(&options, false).await?;
    let btsvr = site.btsvr(&args.set_btsvr).await?;
    let mut agents = Vec::new();
    for n in 0..=args.targets {
        let mut sets = vec![
            format!("addresses=[\"10.0.0.{}\"]", n + 1),
            "files.peer_address=127.0.0.1".to_owned(),
            "files.peer_port_first=0".to_owned(),
            "files.peer_port_last=0".to_owned(),
            "ops.listen=127.0.0.1:0".to_owned(),
        ];
        sets.extend(args.set_agent.iter().cloned());
        agents.push(site.named_agent(&format!("gse_agent-{n}"), &agent_id(n), &sets).await?);
    }
    Api::new(&site)?.all_known(args.targets + 1).await?;
    tokio::time::sleep(SETTLE).await;
    let files = Api::at(btsvr.address("http")?)?;
    let before: Vec<Usage> = agents.iter().map(Program::usage).collect::<Result<_>>()?;
    let mut rounds_ms = Vec::new();
    for round in 0..args.rounds {
        let name = format!("content-{round}");
        let path = site.path().join(&name);
        let bytes = args.mib << 20;
        tokio::task::spawn_blocking(move || make(&path, bytes)).await??;
        rounds_ms.push(transfer(&files, site.path(), &name, &args).await?);
        std::fs::remove_file(site.path().join(&name))?;
        for n in 1..=args.targets {
            std::fs::remove_file(site.path().join(format!("t{n}")).join(&name))?;
        }
    }
    let mut spent = Vec::new();
    for (agent, before) in agents.iter().zip(before) {
        let metrics = agent.metrics().await?;
        let gib = |name: &str| {
            let name = format!("gse_agent_files_gse_bt_{name}_bytes_total");
            metrics.get(&name).copied().unwrap_or(0.0) / GIB
        };
        spent.push(Spent {
            idle_kib: before.rss_kib,
            peak_kib: proc::peak_kib(agent.pid()?)?,
            cpu_s: (agent.usage()?.cpu_us - before.cpu_us) as f64 / 1e6,
            received_gib: gib("received"),
            sent_gib: gib("sent"),
            content_gib: (args.mib << 20) as f64 * f64::from(args.rounds) / GIB,
        });
    }
    let mut complaints = site.complaints();
    complaints.extend(agents.iter().chain([&btsvr]).flat_map(Program::complaints));
    let outcome = Outcome {
        load: proc::load(),
        mib: args.mib,
        rounds_ms,
        source: spent.remove(0),
        targets: spent,
        complaints,
    };
    report::print(&args.report, &outcome, &[section(&outcome)], &outcome.complaints)
}

/// A file of bytes that are like no others.
fn make(path: &Path, bytes: u64) -> Result<()> {
    use std::io::Write;
    let mut file = std::fs::File::create(path).with_context(|| path.display().to_string())?;
    let mut part = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        rand::rng().fill_bytes(&mut part);
        file.write_all(&part)?;
    }
    Ok(())
}

/// Has it moved; how long that took.
async fn transfer(files: &Api, dir: &Path, name: &str, args: &FilesArgs) -> Result<f64> {
    let host = |n: u32| json!({"bk_agent_id": agent_id(n), "user": "root"});
    let tasks: Vec<_> = (1..=args.targets)
        .map(|n| {
            json!({
                "source": {"file_name": name, "store_dir": dir, "agent": host(0)},
                "target": {"file_name": "", "store_dir": dir.join(format!("t{n}")), "agents": [host(n)]},
            })
        })
        .collect();
    let body = json!({"timeout_seconds": LIMIT.as_secs(), "auto_mkdir": true, "upload_speed": 0,
        "download_speed": args.download_speed, "tasks": tasks});
    let begun = Instant::now();
    let submitted = files.ask("async_transfer_file", &body).await?;
    let task = submitted["task_id"].as_str().context("no task id")?.to_owned();
    loop {
        let rows = files.ask("get_transfer_file_result", &json!({"task_id": task})).await?;
        let rows = rows.as_array().context("no rows")?;
        if rows.iter().all(|row| row["error_code"] != 115) {
            let bad = rows.iter().find(|row| row["error_code"] != 0);
            ensure!(bad.is_none(), "a row is not what it should be: {bad:?}");
            return Ok(begun.elapsed().as_secs_f64() * 1e3);
        }
        ensure!(begun.elapsed() < LIMIT, "task {task} is not over: {rows:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn section(outcome: &Outcome) -> Section {
    let title = format!(
        "{} MiB from an agent to {}, all on this host, load {}; rounds of {} ms",
        outcome.mib,
        outcome.targets.len(),
        outcome.load,
        outcome
            .rounds_ms
            .iter()
            .map(|ms| whole(*ms))
            .collect::<Vec<_>>()
            .join(", ")
    );
    let mut table = Section::new(title, &["what", "source", "target, mean", "target, most"]);
    let targets = &outcome.targets;
    let mut row = |name: &str, show: fn(f64) -> String, of: fn(&Spent) -> f64| {
        let all: Vec<f64> = targets.iter().map(of).collect();
        let mean = all.iter().sum::<f64>() / all.len().max(1) as f64;
        let most = all.iter().copied().fold(0.0, f64::max);
        table.row(name, [show(of(&outcome.source)), show(mean), show(most)]);
    };
    let two: fn(f64) -> String = |value| format!("{value:.2}");
    row("idle, MiB (RSS)", one, |spent| spent.idle_kib as f64 / 1024.0);
    row("most ever, MiB (RSS)", one, |spent| spent.peak_kib as f64 / 1024.0);
    row("CPU, s", two, |spent| spent.cpu_s);
    row("received, GiB", two, |spent| spent.received_gib);
    row("sent, GiB", two, |spent| spent.sent_gib);
    row("cores for a GiB/s of the file", two, Spent::cores);
    row("cores for a GiB/s on the wire", two, Spent::cores_on_wire);
    table.row(
        "warnings and errors in logs",
        [whole(outcome.complaints.len() as f64), String::new(), String::new()],
    );
    table
}
