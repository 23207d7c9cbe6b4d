//! The `gse` program: picks the sub-command and turns its outcome into an exit status.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use gse_cli::args::{Cli, Command};
use gse_cli::outcome::{EXIT_ERROR, EXIT_OK, EXIT_SOME_FAILED};
use gse_cli::{agents, audit, certs, data, dba, hostid, out, proc, route, run, task, up, xfer};

fn main() -> ExitCode {
    // Before anything else: the agent's script runners come this way, and they must not have a second thread.
    let mut words = std::env::args_os();
    if words.nth(1).is_some_and(|word| word == "agent") {
        return agent(words);
    }
    let cli = Cli::parse();
    let outcome = match &cli.command {
        Command::Certs(args) => certs::run(args).map(|()| EXIT_OK),
        Command::Agents(args) => asking(agents::run(args)).map(|()| EXIT_OK),
        Command::Run(args) => asking(run::run(args)),
        Command::Task(args) => asking(task::show(args)).map(|()| EXIT_OK),
        Command::Stop(args) => asking(task::stop(args)).map(|()| EXIT_OK),
        Command::Cp(args) => asking(xfer::copy(args)),
        Command::Xfer(args) => asking(xfer::run(args)),
        Command::Proc(args) => asking(proc::run(args)),
        Command::Route(args) => asking(route::run(args)).map(|()| EXIT_OK),
        Command::Data(args) => asking(data::run(args)).map(|()| EXIT_OK),
        Command::Dba(args) => asking(dba::run(args)),
        Command::Hostid(args) => asking(hostid::run(args)).map(|()| EXIT_OK),
        Command::Audit(args) => asking(audit::run(args)),
        Command::Up(args) => match up::run(args) {
            Ok(()) => Ok(EXIT_OK),
            Err(error) => return failed(&error, EXIT_SOME_FAILED),
        },
        Command::Agent => Err(anyhow::anyhow!("agent has to be the first word")),
    };
    match outcome {
        Ok(status) => status.into(),
        // The reader of our output has gone, and with it the interest.
        Err(error) if out::is_broken_pipe(&error) => EXIT_SOME_FAILED.into(),
        Err(error) => failed(&error, EXIT_ERROR),
    }
}

fn failed(error: &anyhow::Error, status: u8) -> ExitCode {
    out::note(&format!("gse: {}", gse_core::process::one_line(error)));
    status.into()
}

/// The agent, which takes over the rest of the command line.
fn agent(words: impl Iterator<Item = OsString>) -> ExitCode {
    match std::env::current_exe() {
        Ok(exe) => {
            let itself = vec![exe.into_os_string(), OsString::from("agent")];
            gse_agent::main(std::iter::once(OsString::from("gse_agent")).chain(words), itself)
        }
        Err(error) => failed(
            &anyhow::Error::new(error).context("cannot find the program itself"),
            EXIT_SOME_FAILED,
        ),
    }
}

/// Runs a command that only asks the servers.
fn asking<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_background();
    outcome
}
