//! `hostid`: the first pass over all hosts of a CMDB: from the start of gse_syncdata until every simulated agent has its identity and the
//! store knows it. CMDB is one over real HTTP, in this program.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use gse_tests::cmdb::{Cmdb, SEARCH, WATCH, identity};
use serde::Serialize;

use crate::agent::agent_id;
use crate::api::Api;
use crate::measure::{self, Snapshot};
use crate::proc::{self, Usage};
use crate::report::{self, ReportOptions, Section, one, whole};
use crate::site::{Site, SiteOptions};
use crate::swarm::raise_files;
use crate::swarm_child::{SwarmChild, SwarmOptions};

/// Longest time for a pass.
const LIMIT: Duration = Duration::from_secs(300);
/// Between two looks at the figures.
const LOOK: Duration = Duration::from_millis(50);

/// Options of `hostid`.
#[derive(Args)]
pub(crate) struct HostIdArgs {
    #[command(flatten)]
    swarm: SwarmOptions,
    /// Bytes that an identity has, about.
    #[arg(long, default_value_t = 2_000, value_name = "BYTES")]
    size: usize,
    /// More settings for gse_syncdata.
    #[arg(long, value_name = "KEY=VALUE")]
    set_sync: Vec<String>,
    #[command(flatten)]
    site: SiteOptions,
    #[command(flatten)]
    report: ReportOptions,
}

#[derive(Serialize)]
struct Outcome {
    agents: u32,
    identity_bytes: usize,
    load: String,
    /// From the start of gse_syncdata until all hosts had been placed, and until all of that was stored.
    pass_ms: f64,
    pages: usize,
    watches: usize,
    /// Of the change of every host by events.
    events_ms: f64,
    /// gse_syncdata after both.
    sync: Usage,
    /// CPU of the other processes for each host of the first pass, microseconds.
    cpu_us: Vec<(String, f64)>,
    complaints: Vec<String>,
}

/// Runs it.
///
/// # Errors
/// When the site does not start, or a host does not get its identity.
pub(crate) async fn run(args: HostIdArgs) -> Result<()> {
    raise_files(0)?;
    let agents = args.swarm.agents;
    let mut options = args.site.clone();
    options.set_task.push("rpc.listen=127.0.0.1:0".into());
    let site = Site::start(&options, args.swarm.shared_certificate).await?;
    let mut swarm = SwarmChild::start(&site, &args.swarm, &[])?;
    swarm.all_connected().await?;
    Api::new(&site)?.all_known(agents).await?;

    let cmdb = Cmdb::start(Duration::from_secs(1)).await?;
    let note = "n".repeat(args.size.saturating_sub(450));
    let text = |n: u32, note: &str| identity(u64::from(n) + 1, &agent_id(n), "10.0.0.1", note);
    for n in 0..agents {
        cmdb.set_silently(u64::from(n) + 1, &text(n, &note));
    }
    let before = Snapshot::take("before", &site, &[("swarm", &swarm)])?;
    let mut sets = vec![
        "source=cmdb".to_owned(),
        format!("cmdb.url={}", cmdb.url()),
        format!("push.retry_min_ms={}", 500),
    ];
    sets.extend(args.set_sync.iter().cloned());
    let began = Instant::now();
    let sync = site.sync(&sets).await?;
    let done = |figures: &std::collections::BTreeMap<String, f64>, times: f64| {
        let figure = |name: &str| figures.get(name).copied().unwrap_or_default();
        let placed = figure("gse_syncdata_pushes_total{kind=\"placed\"}");
        placed >= f64::from(agents) * times && figure("gse_syncdata_hosts_open") == 0.0
    };
    let wait = async |times: f64| -> Result<()> {
        loop {
            let figures = sync.metrics().await?;
            if done(&figures, times) {
                return Ok(());
            }
            ensure!(
                began.elapsed() < LIMIT,
                "not all hosts have their identity: {figures:?}"
            );
            tokio::time::sleep(LOOK).await;
        }
    };
    wait(1.0).await?;
    let pass_ms = began.elapsed().as_secs_f64() * 1000.0;
    let after = Snapshot::take("after", &site, &[("swarm", &swarm)])?;
    let (pages, watches) = (cmdb.calls(SEARCH).len(), cmdb.calls(WATCH).len());

    let changed = Instant::now();
    for n in 0..agents {
        cmdb.set(u64::from(n) + 1, &text(n, "changed"));
    }
    wait(2.0).await?;
    let outcome = Outcome {
        agents,
        identity_bytes: text(0, &note).len(),
        load: proc::load(),
        pass_ms,
        pages,
        watches,
        events_ms: changed.elapsed().as_secs_f64() * 1000.0,
        sync: sync.usage()?,
        cpu_us: measure::cpu_each(&before, &after, u64::from(agents)),
        complaints: site.complaints().into_iter().chain(sync.complaints()).collect(),
    };
    let title = format!("First pass over {agents} hosts, load {}", outcome.load);
    let mut pass = Section::new(title, &["what", "value"]);
    pass.row("bytes of an identity", [outcome.identity_bytes.to_string()]);
    pass.row("first pass, ms", [whole(outcome.pass_ms)]);
    pass.row("hosts a second", [whole(f64::from(agents) / outcome.pass_ms * 1000.0)]);
    pass.row("pages asked of CMDB", [outcome.pages.to_string()]);
    pass.row("every host changed, by events, ms", [whole(outcome.events_ms)]);
    pass.row(
        "gse_syncdata, CPU ms (both)",
        [one(outcome.sync.cpu_us as f64 / 1000.0)],
    );
    pass.row("gse_syncdata, RSS KiB", [outcome.sync.rss_kib.to_string()]);
    let cpu = measure::cpu_table(
        "CPU per host of the first pass (without gse_syncdata)",
        "us",
        &outcome.cpu_us,
    );
    report::print(&args.report, &outcome, &[pass, cpu], &outcome.complaints)
}
