//! `procs`: what gse_procmgr answers from the store, and status operations that ask every host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::agent::procs::{NAMESPACE, name};
use crate::agent::{agent_id, unix_ms};
use crate::api::Api;
use crate::proc;
use crate::report::{self, ReportOptions, Section, one};
use crate::site::{Program, Site, SiteOptions};
use crate::swarm::raise_files;
use crate::swarm_child::{SwarmChild, SwarmOptions};

const PROC: &str = "/api/v2/proc";
/// For everything to be reported, and for a status task.
const LIMIT: Duration = Duration::from_secs(120);
/// Entries of a page, as the contract has it.
const PAGE: u64 = 1_000;

/// Options of `procs`.
#[derive(Args)]
pub(crate) struct ProcsArgs {
    #[command(flatten)]
    swarm: SwarmOptions,
    /// Processes of every agent.
    #[arg(long, default_value_t = 5)]
    processes: u32,
    /// Rounds of each measurement.
    #[arg(long, default_value_t = 7)]
    rounds: u32,
    /// Between two polls of a task.
    #[arg(long, default_value_t = 50, value_name = "MS")]
    poll_ms: u64,
    /// More settings for gse_procmgr, as for its own --set.
    #[arg(long, value_name = "KEY=VALUE")]
    set_procmgr: Vec<String>,
    #[command(flatten)]
    site: SiteOptions,
    #[command(flatten)]
    report: ReportOptions,
}

/// Times of the rounds of one measurement, milliseconds.
#[derive(Debug, Default, Serialize)]
struct Times {
    best: f64,
    median: f64,
    worst: f64,
    /// Bytes of one answer (of the last one, where there are several).
    bytes: usize,
}

impl Times {
    fn of(mut ms: Vec<f64>, bytes: usize) -> Self {
        ms.sort_by(f64::total_cmp);
        let at = |n: usize| ms.get(n).copied().unwrap_or_default();
        Self {
            best: at(0),
            median: at(ms.len() / 2),
            worst: at(ms.len().saturating_sub(1)),
            bytes,
        }
    }
}

#[derive(Serialize)]
struct Outcome {
    agents: u32,
    processes: u32,
    load: String,
    /// From the last connect until every process is in the store and every registration taken up.
    reported_ms: f64,
    taken_up_ms: f64,
    /// get_proc_status_v2 of one process on all agents, through gse_api and on gse_procmgr's own port.
    status: Times,
    status_direct: Times,
    /// sync_proc_status, a page at the beginning and one at the end.
    first_page: Times,
    last_page: Times,
    /// A status operation on one process of all agents: until all entries were seen as over.
    operation: Times,
    operation_submit: Times,
    /// CPU seconds of each program during the status operations, and memory at their end.
    programs: Vec<Cost>,
    complaints: Vec<String>,
}

#[derive(Serialize)]
struct Cost {
    name: String,
    cpu_ms_per_round: f64,
    rss_kib: u64,
}

#[derive(Deserialize)]
struct Envelope {
    code: i64,
    message: String,
    data: serde_json::Value,
}

fn read(bytes: &[u8]) -> Result<serde_json::Value> {
    let envelope: Envelope = serde_json::from_slice(bytes)?;
    ensure!(envelope.code == 0, "{} {}", envelope.code, envelope.message);
    Ok(envelope.data)
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// Runs it.
///
/// # Errors
/// When the site does not start, or an answer is not what it should be.
pub(crate) async fn run(mut args: ProcsArgs) -> Result<()> {
    raise_files(0)?;
    let agents = args.swarm.agents;
    args.site.set_task.push("rpc.listen=127.0.0.1:0".into());
    args.site.set_api.push("limits.read_timeout_ms=60000".into());
    let site = Site::start(&args.site, args.swarm.shared_certificate).await?;
    let procmgr = site.procmgr(&args.set_procmgr).await?;
    let count = args.processes.to_string();
    let mut swarm = SwarmChild::start(&site, &args.swarm, &["--processes", &count])?;
    let connected = swarm.all_connected().await?;
    let api = Api::new(&site)?;
    let direct = Api::at(procmgr.address("http")?)?;
    api.all_known(agents).await?;

    let all = u64::from(agents) * u64::from(args.processes);
    until("gse_api has found gse_procmgr", || async {
        Ok(read(&post(&api, "sync_proc_status", &page(0)).await?).is_ok())
    })
    .await?;
    until("every process reported", || async {
        let page = read(&post(&api, "sync_proc_status", &page(0)).await?)?;
        Ok(page["count"].as_u64() == Some(all))
    })
    .await?;
    let reported_ms = ms(connected);
    until("every registration taken up", || async {
        let metrics = procmgr.metrics().await?;
        let taken = metrics.get("gse_procmgr_registrations_taken_up_total").copied();
        Ok(taken.unwrap_or_default() as u64 >= all)
    })
    .await?;
    let taken_up_ms = ms(connected);

    let ids: Vec<String> = (0..agents).map(agent_id).collect();
    let query = json!({"meta": {"namespace": NAMESPACE, "name": name(0)}, "agent_id_list": ids});
    let is_whole = |data: &serde_json::Value| {
        let infos = data["proc_infos"].as_array();
        infos.is_some_and(|infos| infos.len() == ids.len() && infos.iter().all(|info| info["status"] == 1))
    };
    let status = times(args.rounds, &api, "get_proc_status_v2", &query, is_whole).await?;
    let status_direct = times(args.rounds, &direct, "get_proc_status_v2", &query, is_whole).await?;
    let is_page = |data: &serde_json::Value| {
        let infos = data["proc_infos"].as_array().map_or(0, Vec::len) as u64;
        infos == PAGE.min(all)
    };
    let first_page = times(args.rounds, &direct, "sync_proc_status", &page(0), is_page).await?;
    let last = page(all.saturating_sub(PAGE));
    let last_page = times(args.rounds, &direct, "sync_proc_status", &last, is_page).await?;

    // Both sides of gse_task are counted: the agents are programs of this machine, too.
    let programs: Vec<&Program> = site.servers().chain([&procmgr]).collect();
    let before: Vec<u64> = usages(&programs)?;
    let swarm_before = proc::usage(swarm.pid()?)?.cpu_us;
    let (mut over, mut submits, mut bytes) = (vec![], vec![], 0);
    let body = json!({"proc_operate_req": [{"meta": {"namespace": NAMESPACE, "name": name(0)}, "op_type": 2, "agent_id_list": ids,
                      "spec": {"identity": {"proc_name": "bench_process"}}}]});
    for _ in 0..args.rounds {
        let started = Instant::now();
        let task = read(&post(&api, "operate_proc_multi", &body).await?)?["task_id"]
            .as_str()
            .context("no task id")?
            .to_owned();
        submits.push(ms(started));
        let poll = json!({ "task_id": task });
        loop {
            let reply = post(&api, "get_proc_operate_result_v2", &poll).await?;
            bytes = reply.len();
            // Most polls say that some are still under way: that is found out without taking the answer apart.
            if !contains(&reply, b"\"error_code\":115") {
                let data = read(&reply)?;
                let rows = data.as_object().context("no map of entries")?;
                let good = rows.values().filter(|row| row["error_code"] == 0).count();
                ensure!(good == ids.len(), "{good} of {} entries are good", ids.len());
                break;
            }
            ensure!(
                started.elapsed() < LIMIT,
                "the status task is not over within {LIMIT:?}"
            );
            tokio::time::sleep(Duration::from_millis(args.poll_ms)).await;
        }
        over.push(ms(started));
    }
    let rounds = f64::from(args.rounds.max(1));
    let mut costs = Vec::new();
    for (program, before) in programs.iter().zip(before) {
        let usage = program.usage()?;
        costs.push(Cost {
            name: program.name.clone(),
            cpu_ms_per_round: (usage.cpu_us.saturating_sub(before)) as f64 / 1000.0 / rounds,
            rss_kib: usage.rss_kib,
        });
    }
    let usage = proc::usage(swarm.pid()?)?;
    costs.push(Cost {
        name: "simulated agents".into(),
        cpu_ms_per_round: (usage.cpu_us.saturating_sub(swarm_before)) as f64 / 1000.0 / rounds,
        rss_kib: usage.rss_kib,
    });
    let mut complaints = site.complaints();
    complaints.extend(procmgr.complaints());
    let outcome = Outcome {
        agents,
        processes: args.processes,
        load: proc::load(),
        reported_ms,
        taken_up_ms,
        status,
        status_direct,
        first_page,
        last_page,
        operation: Times::of(over, bytes),
        operation_submit: Times::of(submits, 0),
        programs: costs,
        complaints,
    };
    report::print(&args.report, &outcome, &sections(&outcome), &outcome.complaints)
}

fn page(start: u64) -> serde_json::Value {
    json!({"meta": {"namespace": NAMESPACE}, "page": {"start": start, "limit": PAGE}})
}

async fn post(api: &Api, call: &str, body: &serde_json::Value) -> Result<bytes::Bytes> {
    api.post(&format!("{PROC}/{call}"), serde_json::to_vec(body)?).await
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn usages(programs: &[&Program]) -> Result<Vec<u64>> {
    programs.iter().map(|program| Ok(program.usage()?.cpu_us)).collect()
}

async fn until<F: Future<Output = Result<bool>>>(what: &str, mut probe: impl FnMut() -> F) -> Result<()> {
    let started = Instant::now();
    while !probe().await? {
        ensure!(
            started.elapsed() < LIMIT,
            "not within {LIMIT:?}: {what} (at {})",
            unix_ms()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn times(
    rounds: u32,
    api: &Api,
    call: &str,
    body: &serde_json::Value,
    is_right: impl Fn(&serde_json::Value) -> bool,
) -> Result<Times> {
    let (mut all, mut bytes) = (vec![], 0);
    for _ in 0..rounds {
        let started = Instant::now();
        let reply = post(api, call, body).await?;
        all.push(ms(started));
        bytes = reply.len();
        ensure!(is_right(&read(&reply)?), "{call}: the answer is not what it should be");
    }
    Ok(Times::of(all, bytes))
}

fn sections(outcome: &Outcome) -> Vec<Section> {
    let mut times = Section::new(
        format!(
            "{} agents with {} processes each, milliseconds",
            outcome.agents, outcome.processes
        ),
        &["what", "best", "median", "worst", "KiB of an answer"],
    );
    for (name, of) in [
        ("get_proc_status_v2 of all agents, through gse_api", &outcome.status),
        ("the same on gse_procmgr's own port", &outcome.status_direct),
        ("sync_proc_status, the first 1,000", &outcome.first_page),
        ("sync_proc_status, the last 1,000", &outcome.last_page),
        ("status operation on all agents: submit", &outcome.operation_submit),
        ("status operation on all agents: all entries over", &outcome.operation),
    ] {
        let figures = [of.best, of.median, of.worst, of.bytes as f64 / 1024.0];
        times.row(name, figures.map(one));
    }
    let mut first = Section::new("From the last connect, milliseconds", &["what", "ms"]);
    first.row("every process is in the store", [one(outcome.reported_ms)]);
    first.row("every registration is taken up", [one(outcome.taken_up_ms)]);
    let mut costs = Section::new(
        "A status operation on all agents",
        &["program", "CPU ms", "RSS KiB after"],
    );
    for cost in &outcome.programs {
        costs.row(&cost.name, [one(cost.cpu_ms_per_round), cost.rss_kib.to_string()]);
    }
    vec![first, times, costs]
}
