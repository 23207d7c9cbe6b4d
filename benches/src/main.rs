//! gse-benches: what the system costs under load. It starts real programs on free ports of loopback, a swarm of simulated agents that
//! speak the real session over mutual TLS, and asks over HTTP the way a platform does; then it reports CPU, memory, bytes and times.
//!
//! The command line is here; [`swarm`] and [`agent`] are the load, [`site`] the programs under it, [`fanout`], [`idle`] and [`storm`]
//! the measurements. No judgement about the figures is made here, only whether everything that was asked for came back.

mod agent;
mod api;
mod counted;
mod dial;
mod fanout;
mod idle;
mod measure;
mod proc;
mod report;
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
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Swarm(args) => swarm::run(args).await,
        Command::Fanout(args) => fanout::run(args).await,
        Command::Idle(args) => idle::run(args).await,
        Command::Storm(args) => storm::run(args).await,
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
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
    let done = tokio::select! {
        done = Box::pin(run(cli)) => done,
        () = stop => Err(anyhow::anyhow!("stopped by a signal")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gse-benches: {error:#}");
            ExitCode::FAILURE
        }
    }
}
