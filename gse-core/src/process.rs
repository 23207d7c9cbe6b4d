//! The few lines of every `main.rs`: command line, configuration, logging, runtime, signals, pid file, exit status.
//!
//! A server is a function from its [`Config`] and a [`Lifecycle`] to a future; everything around it is here, in pieces, so that the
//! `gse` command can use them too. What draining means is left to the server.
//!
//! Exit status: 0 done, 1 the start or the run failed, 64 the command line or the configuration is wrong.

mod pid;
mod signals;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::future::Future;
use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use futures::FutureExt;

use crate::config::{self, Config, RuntimeConfig};
use crate::lifecycle::{Lifecycle, panic_text};
use crate::log;

pub use pid::{PidFile, Quit, quit};
pub use signals::{Signals, handle_signals};

/// Exit status of a wrong command line or configuration (`EX_USAGE`).
pub const EXIT_USAGE: u8 = 64;
/// Exit status of a start or run that failed.
pub const EXIT_FAILED: u8 = 1;

/// How long the runtime may take to let go of blocking work once everything else has ended.
const RUNTIME_SHUTDOWN: Duration = Duration::from_millis(300);

/// What a program is called.
#[derive(Debug, Clone, Copy)]
pub struct ServiceInfo {
    /// The program's name, `gse_task`; environment variables begin with it in capitals.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// One line for `--help`.
    pub about: &'static str,
}

/// The options every program has.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// `key=value`, in the order given.
    pub sets: Vec<String>,
    /// What to do instead of running.
    pub action: Action,
}

/// What a program was asked to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Action {
    /// To run.
    #[default]
    Run,
    /// To say whether the configuration is right.
    Check,
    /// To print the configuration that is in force.
    PrintConfig,
    /// To stop the instance that runs with this configuration.
    Quit,
}

impl Options {
    /// The command that reads these options.
    pub fn command(info: ServiceInfo) -> Command {
        let prefix = info.name.to_uppercase().replace('-', "_");
        let flag =
            |name: &'static str, help: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue).help(help);
        Command::new(info.name)
            .version(info.version)
            .about(info.about)
            .after_help(format!(
                "Every key can also be set in the environment: http.listen is {prefix}__HTTP__LISTEN."
            ))
            .arg(
                Arg::new("config")
                    .short('f')
                    .long("config")
                    .value_name("FILE")
                    .value_parser(value_parser!(PathBuf))
                    .help("Configuration file (TOML); defaults are in force without one"),
            )
            .arg(
                Arg::new("set")
                    .long("set")
                    .value_name("KEY=VALUE")
                    .action(ArgAction::Append)
                    .help("Set one key, over the file and the environment; repeatable"),
            )
            .arg(flag("check", "Check the configuration and exit").conflicts_with_all(["print-config", "quit"]))
            .arg(
                flag(
                    "print-config",
                    "Print the configuration in force, with where each value came from",
                )
                .conflicts_with("quit"),
            )
            .arg(flag(
                "quit",
                "Stop the running instance of this configuration and wait for it to go",
            ))
    }

    /// Reads what `command` matched.
    pub fn of(matches: &ArgMatches) -> Self {
        let action = if matches.get_flag("check") {
            Action::Check
        } else if matches.get_flag("print-config") {
            Action::PrintConfig
        } else if matches.get_flag("quit") {
            Action::Quit
        } else {
            Action::Run
        };
        Self {
            config: matches.get_one::<PathBuf>("config").cloned(),
            sets: matches
                .get_many::<String>("set")
                .map(|sets| sets.cloned().collect())
                .unwrap_or_default(),
            action,
        }
    }
}

/// Runs a program with the arguments of the process.
pub fn main<C, F, Fut>(info: ServiceInfo, run: F) -> ExitCode
where
    C: Config,
    F: FnOnce(C, Lifecycle) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send,
{
    run_with(info, std::env::args_os(), run)
}

/// Runs a program with `args`, the first of which is its own name.
pub fn run_with<C, F, Fut>(info: ServiceInfo, args: impl IntoIterator<Item = OsString>, run: F) -> ExitCode
where
    C: Config,
    F: FnOnce(C, Lifecycle) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send,
{
    let matches = match Options::command(info).try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => {
            // Nobody is left to tell when the terminal is gone.
            let _ = error.print();
            return if error.use_stderr() {
                EXIT_USAGE.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    act(info, Options::of(&matches), run)
}

/// Does what the options ask for.
pub fn act<C, F, Fut>(info: ServiceInfo, options: Options, run: F) -> ExitCode
where
    C: Config,
    F: FnOnce(C, Lifecycle) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send,
{
    let loaded = match config::load::<C>(info.name, options.config.as_deref(), &options.sets) {
        Ok(loaded) => loaded,
        Err(errors) => {
            complain(&errors.to_string());
            return EXIT_USAGE.into();
        }
    };
    match options.action {
        Action::Check => {
            say(&format!(
                "{}: ok\n",
                options.config.as_deref().unwrap_or(Path::new("defaults")).display()
            ));
            for note in loaded.notes() {
                say(&format!("  {note}\n"));
            }
            ExitCode::SUCCESS
        }
        Action::PrintConfig => match loaded.print() {
            Ok(text) => {
                say(&text);
                ExitCode::SUCCESS
            }
            Err(error) => failed(info, &error),
        },
        Action::Quit => stop_running(info, loaded.config.runtime()),
        Action::Run => match serve(info, loaded.config, run) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(info, &error),
        },
    }
}

/// Prints why the program failed, on one line, and gives the exit status for it.
pub fn failed(info: ServiceInfo, error: &anyhow::Error) -> ExitCode {
    complain(&format!("{}: {}", info.name, one_line(error)));
    EXIT_FAILED.into()
}

/// Writes to standard output. Whoever reads it may have gone (`--print-config | head`), which is no failure of ours.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Writes a line to standard error; nobody can be told when that fails.
fn complain(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// The whole chain of an error on one line.
pub fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}")
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

fn stop_running(info: ServiceInfo, runtime: &RuntimeConfig) -> ExitCode {
    let Some(path) = &runtime.pid_file else {
        complain(&format!(
            "{}: --quit needs runtime.pid_file, which is not set",
            info.name
        ));
        return EXIT_USAGE.into();
    };
    match quit(path, Duration::from_millis(runtime.drain_timeout_ms)) {
        Ok(Quit::NotRunning) => {
            say(&format!("{}: nothing runs with {}\n", info.name, path.display()));
            ExitCode::SUCCESS
        }
        Ok(Quit::Stopped { pid }) => {
            say(&format!("{}: process {pid} has stopped\n", info.name));
            ExitCode::SUCCESS
        }
        Err(error) => failed(info, &error),
    }
}

/// Runs a server in this process until it ends or is told to: logging, pid file, runtime, signals, addresses file, drain.
///
/// # Errors
/// Why the start or the run failed, or that the drain was cut short.
pub fn serve<C, F, Fut>(info: ServiceInfo, config: C, run: F) -> anyhow::Result<()>
where
    C: Config,
    F: FnOnce(C, Lifecycle) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send,
{
    log::init(config.log())?;
    let runtime_config = config.runtime().clone();
    let _pid_file = runtime_config.pid_file.as_deref().map(PidFile::acquire).transpose()?;

    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.enable_all().thread_name(info.name);
    if let Some(threads) = runtime_config.worker_threads {
        builder.worker_threads(threads);
    }
    let runtime = builder.build().context("cannot start the threads of the runtime")?;
    let outcome = runtime.block_on(supervise(info, config, &runtime_config, run));
    runtime.shutdown_timeout(RUNTIME_SHUTDOWN);
    outcome
}

/// Runs `run` under signals and drains what it leaves behind.
async fn supervise<C, F, Fut>(info: ServiceInfo, config: C, runtime: &RuntimeConfig, run: F) -> anyhow::Result<()>
where
    C: Config,
    F: FnOnce(C, Lifecycle) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send,
{
    let life = Lifecycle::new(info.name);
    // Signals count from here on: one that comes while the server starts is a drain too.
    let signals = Signals::listen().context("cannot listen for signals")?;
    tokio::spawn(handle_signals(signals, life.clone()));
    tracing::info!(
        version = info.version,
        pid = std::process::id(),
        "starting {}",
        info.name
    );

    let addresses = runtime.addresses_file.as_deref().map(AddressesFile::new).transpose()?;
    if let Some(file) = &addresses {
        life.spawn_critical("addresses file", file.write_when_ready(life.clone()));
    }

    let grace = Duration::from_millis(runtime.drain_timeout_ms);
    let ended = tokio::select! {
        biased;
        () = life.aborted() => Err(anyhow::anyhow!("left at once on the second signal")),
        ended = guarded(run(config, life.clone())) => ended,
        () = overdue(&life, grace) => Err(anyhow::anyhow!("did not stop within {} ms (runtime.drain_timeout_ms)", grace.as_millis())),
    };
    life.drain();
    // One grace for all of it: what the server took of it is gone.
    let in_time = life.finished(grace.saturating_sub(life.draining_for())).await;
    ended?;
    if let Some(reason) = life.failure() {
        anyhow::bail!("{reason}");
    }
    if life.is_aborted() {
        anyhow::bail!("left at once on the second signal");
    }
    anyhow::ensure!(
        in_time,
        "did not finish what it held within {} ms (runtime.drain_timeout_ms)",
        grace.as_millis()
    );
    tracing::info!("{} has stopped", info.name);
    Ok(())
}

/// Resolves when a drain has taken longer than `grace`.
async fn overdue(life: &Lifecycle, grace: Duration) {
    life.draining().await;
    tokio::time::sleep(grace).await;
}

/// The outcome of `run`, a panic being an error.
async fn guarded(run: impl Future<Output = anyhow::Result<()>> + Send) -> anyhow::Result<()> {
    match AssertUnwindSafe(run).catch_unwind().await {
        Ok(outcome) => outcome,
        Err(payload) => Err(anyhow::anyhow!("panicked: {}", panic_text(payload.as_ref()))),
    }
}

/// The file that says where the listeners are. It is there only while they are.
struct AddressesFile {
    path: PathBuf,
}

impl AddressesFile {
    fn new(path: &Path) -> anyhow::Result<Self> {
        // One left by a process that was killed would send readers to the wrong place until this one is ready.
        match std::fs::remove_file(path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot remove the old {} (runtime.addresses_file)", path.display()));
            }
        }
        Ok(Self { path: path.to_owned() })
    }

    fn write_when_ready(&self, life: Lifecycle) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
        let path = self.path.clone();
        async move {
            let addresses = life.wait_ready().await;
            if life.is_draining() {
                return Ok(());
            }
            tokio::task::spawn_blocking(move || write_addresses(&path, &addresses)).await?
        }
    }
}

impl Drop for AddressesFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn write_addresses(path: &Path, addresses: &BTreeMap<String, String>) -> anyhow::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(name);
    let text = serde_json::to_string(addresses)?;
    std::fs::write(&temporary, text + "\n")
        .and_then(|()| std::fs::rename(&temporary, path))
        .with_context(|| format!("cannot write {} (runtime.addresses_file)", path.display()))
}
