//! `dba`: what gse_dba costs between clients and Redis, beside the same Redis without it and beside twemproxy.
//!
//! Each round measures every target once, in an order of its own, so that each figure has one of direct Redis from the same minute; what is
//! compared is their ratio, and CPU by operation, which hardly depends on what else the machine does. The load is redis-benchmark's.
//!
//! [`servers`] starts what is measured, [`load`] runs redis-benchmark, [`idle`] counts the memory of clients that do nothing, [`failover`] how
//! long a switch of the primary is felt, [`gate`] says whether a figure is far worse than it was.

mod failover;
mod gate;
mod idle;
mod load;
mod servers;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use rand::seq::SliceRandom;
use serde::Serialize;

use crate::proc;
use crate::report::{self, ReportOptions, Section};
use load::{Cell, Load, Run};
use servers::Servers;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// Redis, with nothing before it.
    Direct,
    /// twemproxy before one Redis.
    Twemproxy,
    /// gse_dba before one Redis, backend = "single".
    Single,
    /// gse_dba before three groups of one Redis each.
    Sharded,
    /// gse_dba before one group of a primary and two copies, two of three acknowledge.
    Group,
    /// gse_dba before three such groups.
    Quorum,
}

impl Kind {
    fn what(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Twemproxy => "twemproxy, 1 Redis",
            Self::Single => "single",
            Self::Sharded => "sharded, 3 groups of 1",
            Self::Group => "1 group of 3, W=2",
            Self::Quorum => "3 groups of 3, W=2",
        }
    }
}

/// Options of `dba`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DbaArgs {
    /// Rounds; each measures everything once.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// What to measure; direct Redis is always there to compare with.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Kind::Direct, Kind::Twemproxy, Kind::Single, Kind::Sharded, Kind::Group, Kind::Quorum])]
    targets: Vec<Kind>,
    /// Commands in a measurement without pipelining; with a pipeline of 16 it is four times as many.
    #[arg(long, default_value_t = 60_000)]
    requests: u64,
    /// Another build of gse_dba to measure beside the one here.
    #[arg(long, value_name = "NAME=PROGRAM", value_parser = named)]
    beside: Vec<(String, PathBuf)>,
    /// More settings for gse_dba, as for its own --set.
    #[arg(long, value_name = "KEY=VALUE")]
    set_dba: Vec<String>,
    /// Idle clients whose memory is measured; 0: none.
    #[arg(long, default_value_t = 10_000)]
    idle: u32,
    /// Also kill the primary of a group under Sentinel, and switch it as planned, while clients write.
    #[arg(long)]
    failover: bool,
    /// Milliseconds after which the Sentinels take a primary for dead.
    #[arg(long, default_value_t = 1000)]
    detection_ms: u64,
    /// A short run whose figures must keep within the bounds that are part of this program; ends with an error when they do not.
    #[arg(long)]
    quick: bool,
    /// Locked while something is measured, round by round: for a machine on which others measure too.
    #[arg(long, value_name = "FILE")]
    lock: Option<PathBuf>,
    #[command(flatten)]
    report: ReportOptions,
}

fn named(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("must be NAME=PROGRAM")?;
    Ok((name.to_owned(), path.into()))
}

/// The middle of what was measured, and from where to where it went.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Middle {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Middle {
    fn of(mut all: Vec<f64>) -> Option<Self> {
        all.sort_by(f64::total_cmp);
        let n = all.len();
        let median = (all.get(n / 2)? + all.get(n.checked_sub(1)? / 2)?) / 2.0;
        Some(Self {
            median,
            least: *all.first()?,
            most: *all.last()?,
        })
    }
}

/// One target under one load, over all rounds.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) kind: Kind,
    pub(crate) build: String,
    pub(crate) cell: Cell,
    pub(crate) rounds: usize,
    pub(crate) per_s: Middle,
    /// To direct Redis in the same round.
    pub(crate) ratio: Middle,
    /// CPU of the process in between alone, microseconds an operation.
    pub(crate) cpu_us: Option<Middle>,
    pub(crate) p50_ms: Middle,
    pub(crate) p99_ms: Middle,
    /// Above direct Redis in the same round.
    pub(crate) p99_over_ms: Middle,
}

#[derive(Serialize)]
struct Outcome {
    load: String,
    rounds: u32,
    figures: Vec<Figure>,
    missing: Vec<String>,
    idle: Option<idle::Idle>,
    failover: Option<failover::Failover>,
    bounds: Vec<gate::Bound>,
    complaints: Vec<String>,
}

/// Runs it.
///
/// # Errors
/// When something does not start, a reply is an error, or (with `quick`) a figure is out of its bounds.
pub(crate) async fn run(mut args: DbaArgs) -> Result<()> {
    if args.quick {
        args.targets = vec![Kind::Single, Kind::Sharded, Kind::Group];
        args.rounds = args.rounds.min(3);
        args.requests = args.requests.min(20_000);
        args.idle = args.idle.min(1_000);
    }
    if !args.targets.contains(&Kind::Direct) {
        args.targets.insert(0, Kind::Direct);
    }
    ensure!(args.rounds > 0, "--rounds must be at least 1");
    let load = Load::find(args.requests)?;
    let mut servers = Servers::start(&args.targets, &args.beside, &args.set_dba).await?;
    let mut runs: Vec<Run> = Vec::new();
    for round in 0..args.rounds {
        let locked = Lock::take(args.lock.as_ref()).await?;
        let mut order: Vec<(usize, Cell)> = (0..servers.targets.len())
            .flat_map(|t| Cell::ALL.map(|c| (t, c)))
            .collect();
        order.shuffle(&mut rand::rng());
        for (at, cell) in order {
            if let Some(target) = servers.targets.get(at) {
                runs.push(load.run(target, cell, round).await?);
            }
        }
        drop(locked);
    }
    let figures = figures(&runs);
    let idle = if args.idle == 0 {
        None
    } else {
        Some(idle::measure(&mut servers, args.idle).await?)
    };
    let complaints = servers.complaints();
    let missing = std::mem::take(&mut servers.missing);
    drop(servers);
    let failover = if args.failover {
        let _locked = Lock::take(args.lock.as_ref()).await?;
        Some(failover::measure(args.detection_ms, &args.set_dba).await?)
    } else {
        None
    };
    let bounds = if args.quick {
        gate::judge(&figures, idle.as_ref())
    } else {
        Vec::new()
    };
    let outcome = Outcome {
        load: proc::load(),
        rounds: args.rounds,
        figures,
        missing,
        idle,
        failover,
        bounds,
        complaints,
    };
    report::print(&args.report, &outcome, &sections(&outcome), &outcome.complaints)?;
    let broken: Vec<String> = outcome
        .bounds
        .iter()
        .filter(|b| !b.kept())
        .map(|b| b.to_string())
        .collect();
    ensure!(broken.is_empty(), "out of bounds: {}", broken.join("; "));
    Ok(())
}

/// Middles of all rounds by target and load, ratios taken within each round.
fn figures(runs: &[Run]) -> Vec<Figure> {
    let mut direct: BTreeMap<(u32, Cell), &Run> = BTreeMap::new();
    let mut groups: BTreeMap<(Kind, &str, Cell), Vec<&Run>> = BTreeMap::new();
    for run in runs {
        if run.kind == Kind::Direct {
            direct.insert((run.round, run.cell), run);
        }
        groups.entry((run.kind, &run.build, run.cell)).or_default().push(run);
    }
    let mut figures = Vec::new();
    for ((kind, build, cell), all) in groups {
        let each = |f: &dyn Fn(&Run) -> Option<f64>| Middle::of(all.iter().filter_map(|r| f(r)).collect());
        let beside = |r: &Run| direct.get(&(r.round, cell)).copied();
        let made = || {
            Some(Figure {
                kind,
                build: build.to_owned(),
                cell,
                rounds: all.len(),
                per_s: each(&|r| Some(r.per_s))?,
                ratio: each(&|r| Some(r.per_s / beside(r)?.per_s))?,
                cpu_us: each(&|r| r.cpu_us),
                p50_ms: each(&|r| Some(r.p50_ms))?,
                p99_ms: each(&|r| Some(r.p99_ms))?,
                p99_over_ms: each(&|r| Some(r.p99_ms - beside(r)?.p99_ms))?,
            })
        };
        figures.extend(made());
    }
    figures
}

fn sections(outcome: &Outcome) -> Vec<Section> {
    let mut sections = Vec::new();
    let span =
        |m: &Middle, digits: usize| format!("{:.*} ({:.*}-{:.*})", digits, m.median, digits, m.least, digits, m.most);
    for cell in Cell::ALL {
        let mut table = Section::new(
            format!(
                "{cell}: medians (ranges) of {} rounds, load {}",
                outcome.rounds, outcome.load
            ),
            &[
                "target",
                "k/s",
                "of direct",
                "CPU us/op",
                "p50 ms",
                "p99 ms",
                "p99 over direct, ms",
            ],
        );
        for f in outcome.figures.iter().filter(|f| f.cell == cell) {
            let name = if f.build.is_empty() {
                f.kind.what().to_owned()
            } else {
                format!("{} [{}]", f.kind.what(), f.build)
            };
            table.row(
                &name,
                [
                    format!("{:.1}", f.per_s.median / 1000.0),
                    span(&f.ratio, 2),
                    f.cpu_us.as_ref().map_or("-".into(), |c| span(c, 2)),
                    format!("{:.2}", f.p50_ms.median),
                    span(&f.p99_ms, 2),
                    format!("{:+.2}", f.p99_over_ms.median),
                ],
            );
        }
        sections.push(table);
    }
    if let Some(idle) = &outcome.idle {
        sections.push(idle.section());
    }
    if let Some(failover) = &outcome.failover {
        sections.push(failover.section());
    }
    if !outcome.bounds.is_empty() {
        sections.push(gate::section(&outcome.bounds));
    }
    for missing in &outcome.missing {
        sections.push(Section::new(missing.clone(), &["not measured"]));
    }
    sections
}

/// A file lock, as `flock(1)` takes it.
struct Lock(#[expect(dead_code, reason = "held, and let go of when dropped")] nix::fcntl::Flock<std::fs::File>);

impl Lock {
    async fn take(path: Option<&PathBuf>) -> Result<Option<Self>> {
        let Some(path) = path.cloned() else { return Ok(None) };
        let lock = tokio::task::spawn_blocking(move || {
            let file = std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(&path)
                .with_context(|| path.display().to_string())?;
            nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive)
                .map_err(|(_, e)| anyhow::anyhow!("{} can't be locked: {e}", path.display()))
        })
        .await??;
        Ok(Some(Self(lock)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(kind: Kind, round: u32, per_s: f64, p99_ms: f64) -> Run {
        Run {
            kind,
            build: String::new(),
            cell: Cell {
                write: true,
                pipeline: 16,
            },
            round,
            per_s,
            p50_ms: 1.0,
            p99_ms,
            cpu_us: (kind != Kind::Direct).then_some(1.0),
        }
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let runs = [
            run(Kind::Direct, 0, 100.0, 1.0),
            run(Kind::Single, 0, 90.0, 1.5),
            run(Kind::Direct, 1, 50.0, 4.0),
            run(Kind::Single, 1, 40.0, 5.0),
        ];
        let all = figures(&runs);
        let single = all.iter().find(|f| f.kind == Kind::Single).unwrap();
        assert_eq!((single.ratio.least, single.ratio.most), (0.8, 0.9));
        assert_eq!(single.p99_over_ms.median, 0.75);
        assert!(all.iter().find(|f| f.kind == Kind::Direct).unwrap().cpu_us.is_none());
    }

    #[test]
    fn the_middle_of_an_even_number_is_between_two() {
        assert_eq!(Middle::of(vec![4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert_eq!(Middle::of(vec![3.0, 1.0, 2.0]).unwrap().median, 2.0);
        assert!(Middle::of(vec![]).is_none());
    }
}
