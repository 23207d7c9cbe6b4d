//! gse-benches: what the system costs under load. It starts real programs on free ports of loopback, a swarm of simulated agents that
//! speak the real session over mutual TLS, and asks over HTTP the way a platform does; then it reports CPU, memory, bytes and times.
//!
//! The command line is here; [`swarm`] and [`agent`] are the load, [`site`] the programs under it; [`fanout`], [`idle`], [`storm`],
//! [`detect`], [`files`], [`procs`], [`hostid`], [`dba`], [`compare`] (with [`rival`]), [`real`] and [`micro`] are the measurements. No judgement about the
//! figures is made here, only whether everything that was asked for came back.

mod agent;
mod api;
mod compare;
mod counted;
mod data;
mod dba;
mod detect;
mod dial;
mod fanout;
mod files;
mod hostid;
mod idle;
mod measure;
mod micro;
mod proc;
mod procs;
mod real;
mod report;
mod rival;
mod servers;
mod site;
mod storm;
mod swarm;
mod swarm_child;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "gse-benches",
    version,
    about = "Load harness: simulated agents against the real programs"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Simulated agents in one process, against any server; progress as JSON lines.
    Swarm(swarm::SwarmArgs),
    /// Scripts to all agents of a private site: times, CPU and bytes of an agent-task.
    Fanout(fanout::FanoutArgs),
    /// Memory of an idle session, before and after fan-outs; CPU of a heartbeat.
    Idle(idle::IdleArgs),
    /// Kill gse_task, start it again: time until everybody is back, CPU of a connect.
    Storm(storm::StormArgs),
    /// Freeze some agents, reset others: time until that is known, and whether anybody else is taken for dead.
    Detect(detect::DetectArgs),
    /// Processes of all agents: states from the store, and status operations that ask every host.
    Procs(procs::ProcsArgs),
    /// The same fan-out over ours, over tonic and over nats-server, in turn.
    Compare(compare::CompareArgs),
    /// Records from a plugin's connection through a real agent and gse_data to a sink; or one of them alone.
    Data(data::DataArgs),
    /// Memory and CPU of real agents while a file goes from one of them to the others.
    Files(files::FilesArgs),
    /// The first pass over all hosts of a CMDB: until every simulated agent has its host's identity.
    Hostid(hostid::HostIdArgs),
    /// gse_dba between clients and Redis, beside direct Redis and twemproxy: rates, times, CPU by operation, memory of idle clients.
    Dba(dba::DbaArgs),
    /// Memory and CPU of a real agent that does nothing.
    Agent(real::RealArgs),
    /// Instructions of the frame codec, the row store and the RESP parser, counted by valgrind.
    Micro(micro::MicroArgs),
    /// A part of `compare`: a server of nothing but tonic streams.
    #[command(hide = true)]
    TonicServer(rival::grpc::ServerArgs),
    /// A part of `compare`: the agents of a rival.
    #[command(hide = true)]
    RivalSwarm(rival::agents::RivalSwarmArgs),
    /// A part of `micro`: one case, so many times.
    #[command(hide = true)]
    MicroCase(micro::CaseArgs),
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Swarm(args) => swarm::run(args).await,
        Command::Fanout(args) => fanout::run(args).await,
        Command::Idle(args) => idle::run(args).await,
        Command::Storm(args) => storm::run(args).await,
        Command::Detect(args) => detect::run(args).await,
        Command::Procs(args) => Box::pin(procs::run(args)).await,
        Command::Compare(args) => Box::pin(compare::run(args)).await,
        Command::Data(args) => Box::pin(data::run(args)).await,
        Command::Files(args) => files::run(args).await,
        Command::Hostid(args) => Box::pin(hostid::run(args)).await,
        Command::Dba(args) => Box::pin(dba::run(args)).await,
        Command::Agent(args) => real::run(args).await,
        Command::Micro(args) => micro::run(args).await,
        Command::TonicServer(args) => rival::grpc::run(args).await,
        Command::RivalSwarm(args) => rival::agents::run(args).await,
        Command::MicroCase(args) => micro::case(&args),
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // What is counted instruction by instruction has no other threads beside it.
    let done = match cli.command {
        Command::MicroCase(args) => micro::case(&args),
        command => threads(command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gse-benches: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn threads(command: Command) -> anyhow::Result<()> {
    // Leaving by a return is what kills the children and removes the directory.
    let stop = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut term) => {
                tokio::select! {
                    _ = term.recv() => {}
                    _ = tokio::signal::ctrl_c() => {}
                }
            }
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        done = Box::pin(run(command)) => done,
        () = stop => Err(anyhow::anyhow!("stopped by a signal")),
    }
}
