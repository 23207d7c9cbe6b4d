//! The `gse` program: picks the sub-command and turns its outcome into an exit status.

use std::process::ExitCode;

use clap::Parser;
use gse_cli::args::{Cli, Command};
use gse_cli::outcome::{EXIT_ERROR, EXIT_OK, EXIT_SOME_FAILED};
use gse_cli::{agents, certs, out, run, task};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match &cli.command {
        Command::Certs(args) => certs::run(args).map(|()| EXIT_OK),
        Command::Agents(args) => asking(agents::run(args)).map(|()| EXIT_OK),
        Command::Run(args) => asking(run::run(args)),
        Command::Task(args) => asking(task::show(args)).map(|()| EXIT_OK),
        Command::Stop(args) => asking(task::stop(args)).map(|()| EXIT_OK),
        Command::Up(_) => Ok(EXIT_ERROR),
        Command::Agent => Ok(EXIT_ERROR),
    };
    match outcome {
        Ok(status) => status.into(),
        // The reader of our output has gone, and with it the interest.
        Err(error) if out::is_broken_pipe(&error) => EXIT_SOME_FAILED.into(),
        Err(error) => {
            out::note(&format!("gse: {}", gse_core::process::one_line(&error)));
            EXIT_ERROR.into()
        }
    }
}

/// Runs a command that only asks the servers.
fn asking<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_background();
    outcome
}
