//! `agent`: what a real, idle agent costs its host, with default settings.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;

use crate::agent::agent_id;
use crate::api::{Api, PollOptions};
use crate::proc;
use crate::report::{self, ReportOptions, Section, whole};
use crate::site::{Site, SiteOptions};

/// After the start, and after a script.
const SETTLE: Duration = Duration::from_secs(2);
/// Length of "done\n", which the script prints.
const OUTPUT: u32 = 5;

/// Options of `agent`.
#[derive(Args)]
pub(crate) struct RealArgs {
    /// Seconds over which its CPU is measured; heartbeats come every 30 s.
    #[arg(long, default_value_t = 60)]
    window_s: u64,
    /// More settings for gse_agent, as for its own --set.
    #[arg(long, value_name = "KEY=VALUE")]
    set_agent: Vec<String>,
    #[command(flatten)]
    site: SiteOptions,
    #[command(flatten)]
    poll: PollOptions,
    #[command(flatten)]
    report: ReportOptions,
}

#[derive(Serialize)]
struct Outcome {
    load: String,
    window_s: u64,
    /// KiB: connected and idle; after scripts (0 of them without root).
    idle_kib: u64,
    worked_kib: u64,
    scripts: u32,
    /// Of one core.
    cpu_percent: f64,
    complaints: Vec<String>,
}

/// Runs it.
///
/// # Errors
/// When the agent does not connect, or a script fails.
pub(crate) async fn run(args: RealArgs) -> Result<()> {
    let site = Site::start(&args.site, false).await?;
    let agent = site.real_agent(&agent_id(0), &args.set_agent).await?;
    let api = Api::new(&site)?;
    api.all_known(1)
        .await
        .with_context(|| format!("the agent does not connect: {:?}", agent.complaints()))?;
    tokio::time::sleep(SETTLE).await;
    let idle = agent.usage()?;
    tokio::time::sleep(Duration::from_secs(args.window_s)).await;
    let used = agent.usage()?.cpu_us - idle.cpu_us;
    let mut scripts = 0;
    // Scripts run as root here, and only root can do that.
    if nix::unistd::geteuid().is_root() {
        for _ in 0..10 {
            let round = api.round(1, OUTPUT, &args.poll).await?;
            ensure!(round.wrong_rows == 0, "the script failed: {}", round.wrong_example);
            scripts += 1;
        }
        tokio::time::sleep(SETTLE).await;
    }
    let mut complaints = site.complaints();
    complaints.extend(agent.complaints());
    let outcome = Outcome {
        load: proc::load(),
        window_s: args.window_s,
        idle_kib: idle.rss_kib,
        worked_kib: agent.usage()?.rss_kib,
        scripts,
        cpu_percent: used as f64 / (args.window_s.max(1) as f64 * 1e6) * 100.0,
        complaints,
    };
    report::print(&args.report, &outcome, &[section(&outcome)], &outcome.complaints)
}

fn section(outcome: &Outcome) -> Section {
    let mut table = Section::new(format!("A real agent, load {}", outcome.load), &["what", "value"]);
    table.row("idle, KiB (RSS)", [outcome.idle_kib.to_string()]);
    table.row(
        &format!("after {} scripts, KiB (RSS)", outcome.scripts),
        [outcome.worked_kib.to_string()],
    );
    table.row(
        &format!("idle, % of a core over {} s", outcome.window_s),
        [format!("{:.4}", outcome.cpu_percent)],
    );
    table.row("warnings and errors in logs", [whole(outcome.complaints.len() as f64)]);
    table
}
