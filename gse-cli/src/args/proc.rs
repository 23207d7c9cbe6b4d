//! The command line of `gse proc`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{ListFormat, ServerArgs};
use crate::duration;

pub(super) const PROC_EXAMPLES: &str = "Examples:
  gse proc ls
  gse proc register web -t 0:10.0.0.1 --spec web.json      keep it alive from now on
  gse proc start web --proc-name nginx --setup-path /opt/web --pid-path /run/web.pid --start-cmd ./start.sh
  gse proc status web                                       asks the hosts
  gse proc restart web db -t 0:10.0.0.1,0:10.0.0.2          as it was registered
  gse proc status -n nodeman bkmonitorbeat -o json

A process is known by its namespace and its name. Without a specification, what was registered holds. FILE has the JSON of a call's
spec: {\"identity\": {...}, \"control\": {...}, \"resource\": {...}, \"alive_monitor_policy\": {...}}; options stand above it.

Exit status: 0 all is as was asked for (status: all run); 1 it is not on some host; 2 wrong usage, or the call was refused; 124 it was
not over in time; 130 left with Ctrl-C.";

/// `gse proc`.
#[derive(Debug, Args)]
pub struct ProcArgs {
    /// What to do.
    #[command(subcommand)]
    pub what: ProcCommand,
}

/// What `gse proc` does.
#[derive(Debug, Subcommand)]
pub enum ProcCommand {
    /// List processes as the servers last heard of them
    Ls(ProcListArgs),
    /// Ask the hosts whether processes run
    Status(ProcOperateArgs),
    /// Start processes and keep them alive
    Start(ProcOperateArgs),
    /// Stop processes, and keep them alive no longer
    Stop(ProcOperateArgs),
    /// Run their restart commands
    Restart(ProcOperateArgs),
    /// Run their reload commands
    Reload(ProcOperateArgs),
    /// Run their kill commands, and keep them alive no longer
    Kill(ProcOperateArgs),
    /// Keep processes alive from now on; it starts none
    Register(ProcOperateArgs),
    /// Keep processes alive no longer; it stops none
    Unregister(ProcOperateArgs),
}

/// `gse proc ls`.
#[derive(Debug, Args)]
pub struct ProcListArgs {
    /// Only on this host: agent id or cloud:ip; repeatable, or separated by commas [default: all]
    #[arg(short, long = "target", value_name = "ID", value_delimiter = ',')]
    pub targets: Vec<String>,
    /// Only of this namespace [default: all]
    #[arg(short, long, value_name = "NAME")]
    pub namespace: Option<String>,
    /// Form of the list
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub output: ListFormat,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Which processes are meant, and how to say how it went.
#[derive(Debug, Args)]
pub struct ProcPickArgs {
    /// Names of processes
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Agent id, cloud:ip, or "all" for every connected agent; repeatable, or separated by commas [default: all]
    #[arg(short, long = "target", value_name = "ID", value_delimiter = ',')]
    pub targets: Vec<String>,
    /// Namespace of the processes
    #[arg(short, long, value_name = "NAME", default_value = "gse")]
    pub namespace: String,
    /// How long to wait for the end: 90, 60s, 5m, 2h
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration::seconds)]
    pub timeout: u32,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub output: ListFormat,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse proc start` and its like; for `status` the specification says how to find what is not registered.
#[derive(Debug, Args)]
pub struct ProcOperateArgs {
    /// Which processes.
    #[command(flatten)]
    pub pick: ProcPickArgs,
    /// What they are.
    #[command(flatten)]
    pub spec: SpecArgs,
}

/// Whether a process is kept alive, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AutoType {
    /// Runs now and then
    Periodic,
    /// Always runs; is started again when it ends
    Resident,
    /// Runs once; is not started again
    Once,
}

/// The specification of processes: what the options say stands above what the file says.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Specification")]
pub struct SpecArgs {
    /// JSON of the specification; "-": from standard input
    #[arg(long, value_name = "FILE")]
    pub spec: Option<PathBuf>,
    /// Name of the executable to look for
    #[arg(long, value_name = "NAME")]
    pub proc_name: Option<String>,
    /// Directory that commands run in
    #[arg(long, value_name = "DIR")]
    pub setup_path: Option<String>,
    /// Pid file
    #[arg(long, value_name = "FILE")]
    pub pid_path: Option<String>,
    /// Account that commands run as [default: what gse up has noted down, else root]
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,
    /// Command that starts it
    #[arg(long, value_name = "COMMAND")]
    pub start_cmd: Option<String>,
    /// Command that stops it
    #[arg(long, value_name = "COMMAND")]
    pub stop_cmd: Option<String>,
    /// Command that restarts it
    #[arg(long, value_name = "COMMAND")]
    pub restart_cmd: Option<String>,
    /// Command that has it read its configuration again
    #[arg(long, value_name = "COMMAND")]
    pub reload_cmd: Option<String>,
    /// Command that kills it
    #[arg(long, value_name = "COMMAND")]
    pub kill_cmd: Option<String>,
    /// Command that prints its version
    #[arg(long, value_name = "COMMAND")]
    pub version_cmd: Option<String>,
    /// Command that prints how it is
    #[arg(long, value_name = "COMMAND")]
    pub health_cmd: Option<String>,
    /// Per cent of all processors of the host that it may use; 0: no limit
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub cpu: Option<f64>,
    /// Per cent of the memory of the host that it may use; 0: no limit
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub mem: Option<f64>,
    /// Whether it is kept alive
    #[arg(long, value_enum, value_name = "TYPE")]
    pub auto_type: Option<AutoType>,
    /// How long after the start command to look whether it lives
    #[arg(long, value_name = "TIME", value_parser = duration::seconds)]
    pub start_check: Option<u32>,
    /// How long after the stop command to look whether it is gone
    #[arg(long, value_name = "TIME", value_parser = duration::seconds)]
    pub stop_check: Option<u32>,
    /// How often to start it again before giving up
    #[arg(long, value_name = "N")]
    pub start_retries: Option<u32>,
    /// How long to wait before each of these
    #[arg(long, value_name = "TIME", value_parser = duration::seconds)]
    pub start_interval: Option<u32>,
    /// How long a command may take
    #[arg(long, value_name = "TIME", value_parser = duration::seconds)]
    pub op_timeout: Option<u32>,
}

fn percent(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=100.0).contains(&value) => Ok(value),
        _ => Err("not a number from 0 to 100".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::Parser;

    fn parse(words: &[&str]) -> Result<ProcCommand, clap::Error> {
        let all = ["gse", "proc"].iter().chain(words).copied();
        match Cli::try_parse_from(all)?.command {
            Command::Proc(args) => Ok(args.what),
            other => panic!("not proc: {other:?}"),
        }
    }

    #[test]
    fn words_of_process_commands() {
        let words = [
            "start",
            "web",
            "db",
            "-t",
            "a,b",
            "-n",
            "shop",
            "--cpu",
            "12.5",
            "--start-cmd",
            "./start.sh -x",
        ];
        let ProcCommand::Start(start) = parse(&words).unwrap() else {
            panic!("not start")
        };
        assert_eq!(start.pick.names, ["web", "db"]);
        assert_eq!(start.pick.targets, ["a", "b"]);
        assert_eq!((start.pick.namespace.as_str(), start.spec.cpu), ("shop", Some(12.5)));
        assert_eq!(start.spec.start_cmd.as_deref(), Some("./start.sh -x"));
        for wrong in [
            &["start"][..],
            &["stop", "-t", "a"],
            &["start", "web", "--cpu", "101"],
            &["start", "web", "--cpu", "NaN"],
            &["start", "web", "--start-retries", "-1"],
            &["start", "web", "--auto-type", "3"],
            &["sleep", "web"],
            &[],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
