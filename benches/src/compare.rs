//! `compare`: one shape of a fan-out (256 bytes down, 64 bytes back, from every agent) over ours, over a tonic stream with the same TLS, and
//! over nats-server; all three are up at once and take turns in one run, so that whatever else the machine does meets all of them.
//!
//! They do not do the same. What each leaves out is printed with the figures.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::api::{Api, PollOptions, percentile};
use crate::measure::kib_per_agent;
use crate::proc::{self, Usage};
use crate::report::{self, ReportOptions, Section, one};
use crate::rival::grpc::Said;
use crate::rival::nats::Connection;
use crate::site::{Site, SiteOptions};
use crate::swarm::raise_files;
use crate::swarm_child::{SwarmChild, SwarmOptions};

const START: Duration = Duration::from_secs(20);
/// What is still under way when the last reply has been seen.
const SETTLE: Duration = Duration::from_millis(150);
const INBOX: &str = "inbox.bench";

/// Options of `compare`.
#[derive(Args)]
pub(crate) struct CompareArgs {
    /// Agents of each of the three.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=18_000))]
    agents: u32,
    /// Rounds of each that count; one before them does not.
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// Go on without nats-server where it is not installed, and say so.
    #[arg(long)]
    allow_missing: bool,
    #[command(flatten)]
    poll: PollOptions,
    #[command(flatten)]
    site: SiteOptions,
    #[command(flatten)]
    report: ReportOptions,
}

#[derive(Serialize)]
struct Figures {
    name: &'static str,
    /// KiB of the server for each agent, connected and after the rounds.
    connected_kib: f64,
    after_kib: f64,
    /// Microseconds per agent-task: of the server that holds the connections, and of every server that the result needs.
    server_cpu_us: f64,
    all_servers_cpu_us: f64,
    swarm_cpu_us: f64,
    /// Milliseconds until every result was there; median and best round.
    all_ms: f64,
    best_ms: f64,
    leaves_out: &'static str,
}

#[derive(Serialize)]
struct Outcome {
    agents: u32,
    rounds: u32,
    load: String,
    results: Vec<Figures>,
    missing: Option<String>,
    complaints: Vec<String>,
}

/// CPU and memory of the parts of one contestant.
#[derive(Clone, Copy, Default)]
struct Parts {
    server: Usage,
    others_cpu_us: u64,
    swarm_cpu_us: u64,
}

/// One of the three, connected.
struct Contestant {
    kind: Kind,
    swarm: SwarmChild,
    empty_kib: u64,
    connected_kib: u64,
    spent: Parts,
    times: Vec<f64>,
}

enum Kind {
    Ours(Box<Site>, Box<Api>),
    Tonic(Box<Tonic>),
    Nats(Box<Nats>),
}

impl Contestant {
    async fn new(kind: Kind, empty_kib: u64, mut swarm: SwarmChild) -> Result<Self> {
        swarm.all_connected().await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut new = Self {
            kind,
            swarm,
            empty_kib,
            connected_kib: 0,
            spent: Parts::default(),
            times: vec![],
        };
        new.connected_kib = new.parts()?.server.rss_kib;
        Ok(new)
    }

    fn parts(&self) -> Result<Parts> {
        let (server, others_cpu_us) = match &self.kind {
            Kind::Ours(site, _) => {
                let mut parts = (Usage::default(), 0);
                for server in site.servers() {
                    let usage = server.usage()?;
                    if server.name.starts_with("gse_task") {
                        parts.0.cpu_us += usage.cpu_us;
                        parts.0.rss_kib += usage.rss_kib;
                    } else {
                        parts.1 += usage.cpu_us;
                    }
                }
                parts
            }
            Kind::Tonic(tonic) => (proc::usage(tonic.child.id().context("tonic-server has ended")?)?, 0),
            Kind::Nats(nats) => (proc::usage(nats.child.id().context("nats-server has ended")?)?, 0),
        };
        Ok(Parts {
            server,
            others_cpu_us,
            swarm_cpu_us: proc::usage(self.swarm.pid()?)?.cpu_us,
        })
    }

    async fn round(&mut self, agents: u32, poll: &PollOptions) -> Result<f64> {
        match &mut self.kind {
            Kind::Ours(_, api) => {
                let output = u32::try_from(crate::rival::REPLY)?;
                let round = api.round(agents, output, poll).await?;
                ensure!(round.wrong_rows == 0, "wrong rows, such as {}", round.wrong_example);
                Ok(round.all_ms)
            }
            Kind::Tonic(tonic) => tonic.round(agents).await,
            Kind::Nats(nats) => {
                let started = Instant::now();
                let asked = nats.connection.fan_out(INBOX, agents);
                tokio::time::timeout(Duration::from_secs(poll.round_limit_s), asked)
                    .await
                    .context("not all replied over nats-server")??;
                Ok(started.elapsed().as_secs_f64() * 1000.0)
            }
        }
    }

    /// A round that counts.
    async fn measured(&mut self, agents: u32, poll: &PollOptions) -> Result<()> {
        let before = self.parts()?;
        let all_ms = self.round(agents, poll).await?;
        tokio::time::sleep(SETTLE).await;
        let after = self.parts()?;
        self.times.push(all_ms);
        self.spent.server.cpu_us += after.server.cpu_us - before.server.cpu_us;
        self.spent.server.rss_kib = after.server.rss_kib;
        self.spent.others_cpu_us += after.others_cpu_us - before.others_cpu_us;
        self.spent.swarm_cpu_us += after.swarm_cpu_us - before.swarm_cpu_us;
        Ok(())
    }

    fn figures(&self, agents: u32) -> Figures {
        let tasks = self.times.len().max(1) as f64 * f64::from(agents);
        let mut times = self.times.clone();
        times.sort_by(f64::total_cmp);
        let spent = &self.spent;
        let (name, leaves_out) = match &self.kind {
            Kind::Ours(..) => (
                "gse (mutual TLS)",
                "nothing: rows and output stored, audited, read over HTTP",
            ),
            Kind::Tonic(_) => ("tonic stream (mutual TLS)", "stores nothing, checks no caller, no HTTP"),
            Kind::Nats(_) => (
                "nats-server (plaintext)",
                "no TLS, stores nothing, checks nobody, no HTTP",
            ),
        };
        Figures {
            name,
            connected_kib: kib_per_agent(self.empty_kib, self.connected_kib, agents),
            after_kib: kib_per_agent(self.empty_kib, spent.server.rss_kib, agents),
            server_cpu_us: spent.server.cpu_us as f64 / tasks,
            all_servers_cpu_us: (spent.server.cpu_us + spent.others_cpu_us) as f64 / tasks,
            swarm_cpu_us: spent.swarm_cpu_us as f64 / tasks,
            all_ms: percentile(&times, 50.0),
            best_ms: times.first().copied().unwrap_or(0.0),
            leaves_out,
        }
    }
}

/// Runs it.
///
/// # Errors
/// When a contestant does not start or a reply is missing.
pub(crate) async fn run(args: CompareArgs) -> Result<()> {
    raise_files(0)?;
    let agents = args.agents;
    let site = Site::start(&args.site, false).await?;
    let certs = site.certs();
    let dir = tempfile::tempdir()?;
    let mut contestants = vec![];
    let mut missing = None;

    let empty = site
        .tasks
        .iter()
        .map(crate::site::Program::usage)
        .sum::<Result<Usage>>()?;
    let options = SwarmOptions {
        agents,
        delay_ms: 0,
        output_bytes: u32::try_from(crate::rival::REPLY)?,
        shared_certificate: false,
    };
    let swarm = SwarmChild::start(&site, &options, &[])?;
    let api = Box::new(Api::new(&site)?);
    let ours = Contestant::new(Kind::Ours(Box::new(site), api), empty.rss_kib, swarm).await?;
    if let Kind::Ours(_, api) = &ours.kind {
        api.all_known(agents).await?;
    }
    contestants.push(ours);

    let tonic = Tonic::start(&certs).await?;
    let empty = proc::usage(tonic.child.id().context("tonic-server has ended")?)?;
    let certs = certs.display().to_string();
    let swarm = rival_swarm("tonic", agents, &tonic.address, &["--certs", &certs])?;
    contestants.push(Contestant::new(Kind::Tonic(Box::new(tonic)), empty.rss_kib, swarm).await?);

    match Nats::start(dir.path()).await? {
        Some(nats) => {
            let empty = proc::usage(nats.child.id().context("nats-server has ended")?)?;
            let swarm = rival_swarm("nats", agents, &nats.address, &[])?;
            contestants.push(Contestant::new(Kind::Nats(Box::new(nats)), empty.rss_kib, swarm).await?);
        }
        None => {
            let text = "nats-server is not installed (Debian: apt-get install --no-install-recommends nats-server)";
            ensure!(args.allow_missing, "{text}; --allow-missing goes on without it");
            eprintln!("{text}; compared without it");
            missing = Some(text.to_owned());
        }
    }

    for contestant in &mut contestants {
        contestant.round(agents, &args.poll).await?;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    for _ in 0..args.rounds {
        for contestant in &mut contestants {
            contestant.measured(agents, &args.poll).await?;
        }
    }
    let complaints = contestants.iter().flat_map(|contestant| match &contestant.kind {
        Kind::Ours(site, _) => site.complaints(),
        Kind::Tonic(_) | Kind::Nats(_) => vec![],
    });
    let outcome = Outcome {
        agents,
        rounds: args.rounds,
        load: proc::load(),
        complaints: complaints.collect(),
        results: contestants
            .iter()
            .map(|contestant| contestant.figures(agents))
            .collect(),
        missing,
    };
    report::print(&args.report, &outcome, &[section(&outcome)], &outcome.complaints)
}

fn section(outcome: &Outcome) -> Section {
    let mut table = Section::new(
        format!(
            "The same fan-out, {} agents, {} rounds of each in turn, load {}",
            outcome.agents, outcome.rounds, outcome.load
        ),
        &[
            "over",
            "server, CPU us per agent-task",
            "all servers",
            "its agents",
            "idle KiB per agent",
            "after the rounds",
            "all replies, ms (median)",
            "best",
            "leaves out",
        ],
    );
    for result in &outcome.results {
        let figures = [
            result.server_cpu_us,
            result.all_servers_cpu_us,
            result.swarm_cpu_us,
            result.connected_kib,
            result.after_kib,
            result.all_ms,
            result.best_ms,
        ];
        let cells = figures.into_iter().map(one);
        table.row(result.name, cells.chain([result.leaves_out.to_owned()]));
    }
    table
}

fn rival_swarm(rival: &str, agents: u32, server: &str, more: &[&str]) -> Result<SwarmChild> {
    let mut command = Command::new(std::env::current_exe().context("path of this program")?);
    command
        .args(["rival-swarm", "--rival", rival, "--agents", &agents.to_string()])
        .args(["--server", server])
        .args(more);
    SwarmChild::spawn(command)
}

/// The tonic server as a child.
struct Tonic {
    child: Child,
    stdin: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
    address: String,
}

impl Tonic {
    async fn start(certs: &Path) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe().context("path of this program")?);
        command
            .arg("tonic-server")
            .arg("--certs")
            .arg(certs)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().context("starting the tonic server")?;
        let stdin = child.stdin.take().context("its input")?;
        let mut said = BufReader::new(child.stdout.take().context("its output")?).lines();
        let address = match tokio::time::timeout(START, next(&mut said)).await?? {
            Said::Listening(address) => address,
            other => bail!("the tonic server begins with {other:?}"),
        };
        Ok(Self {
            child,
            stdin,
            said,
            address,
        })
    }

    async fn round(&mut self, wanted: u32) -> Result<f64> {
        self.stdin.write_all(b"fanout\n").await?;
        self.stdin.flush().await?;
        match next(&mut self.said).await? {
            Said::Round { agents, all_ms } if agents == u64::from(wanted) => Ok(all_ms),
            other => bail!("the tonic server has not reached {wanted} agents: {other:?}"),
        }
    }
}

async fn next(said: &mut Lines<BufReader<ChildStdout>>) -> Result<Said> {
    let line = said.next_line().await?.context("the tonic server has ended")?;
    serde_json::from_str(&line).with_context(|| format!("the tonic server says {line}"))
}

/// nats-server as a child, and the connection of the one who asks.
struct Nats {
    child: Child,
    connection: Connection,
    address: String,
}

impl Nats {
    /// `None` where it is not installed.
    async fn start(dir: &Path) -> Result<Option<Self>> {
        let mut command = Command::new("nats-server");
        command
            .args(["--addr", "127.0.0.1", "--port", "-1", "--ports_file_dir"])
            .arg(dir)
            .arg("--log")
            .arg(dir.join("nats.log"))
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("starting nats-server"),
        };
        let pid = child.id().context("nats-server has ended")?;
        let file = dir.join(format!("nats-server_{pid}.ports"));
        let started = Instant::now();
        let address = loop {
            if let Some(address) = std::fs::read(&file).ok().and_then(|text| listed(&text)) {
                break address;
            }
            if let Some(status) = child.try_wait()? {
                let log = std::fs::read_to_string(dir.join("nats.log")).unwrap_or_default();
                bail!("nats-server ended with {status}: {log}");
            }
            ensure!(started.elapsed() < START, "nats-server does not say where it listens");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let stream = TcpStream::connect(&address).await.context("nats-server")?;
        stream.set_nodelay(true)?;
        Ok(Some(Self {
            child,
            connection: Connection::begin(stream, &[INBOX]).await?,
            address,
        }))
    }
}

/// The first address in nats-server's file of ports.
fn listed(text: &[u8]) -> Option<String> {
    let ports: serde_json::Value = serde_json::from_slice(text).ok()?;
    let url = ports.get("nats")?.get(0)?.as_str()?;
    Some(url.strip_prefix("nats://")?.to_owned())
}
