//! The command line of `gse`: the sub-commands and what they have in common; what each of them takes is in a module of its own.

mod agents;
mod audit;
mod certs;
mod dba;
mod files;
mod hostid;
mod proc;
mod records;
mod run;
mod up;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use self::agents::AgentsArgs;
pub use self::audit::{AuditArgs, AuditCommand};
pub use self::certs::{CertsArgs, CertsCommand};
pub use self::dba::{
    DbaAbortArgs, DbaAcceptArgs, DbaAddArgs, DbaArgs, DbaChange, DbaCommand, DbaFailoverArgs, DbaGroupArgs,
    DbaLookArgs, DbaMigrateArgs, DbaMoveArgs, DbaMovesArgs, DbaPlace, DbaPromoteArgs, DbaSlotsArgs, DbaSlowlogArgs,
    DbaTopArgs, DbaWork,
};
pub use self::files::{
    CpArgs, XferArgs, XferCloseArgs, XferCommand, XferListArgs, XferOpenArgs, XferShowArgs, XferStopArgs,
    XferTorrentArgs,
};
pub use self::hostid::HostIdArgs;
pub use self::proc::{AutoType, ProcArgs, ProcCommand, ProcListArgs, ProcOperateArgs, ProcPickArgs, SpecArgs};
pub use self::records::{
    DataArgs, DataCommand, DataListArgs, DataSendArgs, DataTailArgs, RouteAddArgs, RouteArgs, RouteCommand,
    RouteListArgs, RouteRemoveArgs, RouteShowArgs, RouteStreamArgs, TailFormat,
};
pub use self::run::{RunArgs, StopArgs, TaskArgs};
pub use self::up::{Durability, UpArgs};

/// Runs and operates a GSE control plane.
#[derive(Debug, Parser)]
#[command(name = "gse", version, propagate_version = true, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "Examples:
  gse up                             start everything on this machine and stay
  gse agents                         who is connected
  gse run 'uname -a'                 run a command on all of them
  gse run -t 0:10.0.0.1 --script deploy.sh --user app --timeout 10m
  gse task GSETASK:S:...             what became of a task";

/// The sub-commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the control plane with the embedded store and one local agent, and stay until told to stop
    #[command(after_help = up::UP_EXAMPLES)]
    Up(UpArgs),
    /// Make the certificate authority and certificates
    #[command(after_help = certs::CERTS_EXAMPLES)]
    Certs(CertsArgs),
    /// List agents, or show one
    #[command(after_help = agents::AGENTS_EXAMPLES)]
    Agents(AgentsArgs),
    /// Run a command or a script on agents and show what it prints
    #[command(after_help = run::RUN_EXAMPLES)]
    Run(RunArgs),
    /// Show a task: states, failures, outputs
    Task(TaskArgs),
    /// Stop a task on some or all of its targets
    Stop(StopArgs),
    /// Copy files to agents, from this machine or from other agents
    #[command(after_help = files::CP_EXAMPLES)]
    Cp(CpArgs),
    /// Files that are on their way: list, show, stop
    Xfer(XferArgs),
    /// Processes on hosts: list, start, stop, restart, reload, kill, register, unregister, status
    #[command(after_help = proc::PROC_EXAMPLES)]
    Proc(Box<ProcArgs>),
    /// Which data id goes where: list, show, add, remove
    #[command(after_help = records::ROUTE_EXAMPLES)]
    Route(RouteArgs),
    /// What became of records, by data id; and send one by hand
    #[command(after_help = records::DATA_EXAMPLES)]
    Data(DataArgs),
    /// The store's front, gse_dba: status, slots, moves, fail-over, migration, slow and hot keys
    #[command(after_help = dba::DBA_EXAMPLES)]
    Dba(Box<DbaArgs>),
    /// The identity of a host: what CMDB says, what was put there, and whether they agree
    #[command(after_help = hostid::HOSTID_EXAMPLES)]
    Hostid(HostIdArgs),
    /// Read the audit trail: who asked for what, and what was decided
    #[command(after_help = audit::AUDIT_EXAMPLES, args_conflicts_with_subcommands = true)]
    Audit(AuditArgs),
    /// The agent itself; `gse up` starts it
    #[command(hide = true, disable_help_flag = true)]
    Agent,
}

/// The data directory of `gse up`.
#[derive(Debug, Clone, Args)]
pub struct DataDir {
    /// Data directory of gse up [default: $XDG_DATA_HOME/gse or ~/.local/share/gse]
    #[arg(long, value_name = "DIR", env = "GSE_DATA")]
    pub data: Option<PathBuf>,
}

/// How a command that asks the servers finds them.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Servers")]
pub struct ServerArgs {
    /// The data directory whose cli.toml names the servers and the application
    #[command(flatten)]
    pub data: DataDir,
    /// Address of the HTTP API, such as http://127.0.0.1:28808
    #[arg(long, value_name = "URL", env = "GSE_API")]
    pub api: Option<String>,
    /// Code of the application; its secret is taken from GSE_APP_SECRET or from cli.toml
    #[arg(long, value_name = "CODE", env = "GSE_APP_CODE")]
    pub app: Option<String>,
    /// PEM file of the authority to trust, when the API is https
    #[arg(long, value_name = "FILE", env = "GSE_CA")]
    pub ca: Option<PathBuf>,
}

/// Form of what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON document.
    Json,
}

/// Form of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ListFormat {
    /// For people.
    Table,
    /// One JSON document.
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn words_of_a_command_are_taken_as_they_are() {
        let cli = Cli::try_parse_from(["gse", "run", "-t", "a,b", "-t", "c", "ls", "-l", "--all"]).unwrap();
        let Command::Run(run) = cli.command else {
            panic!("not run")
        };
        assert_eq!(run.targets, ["a", "b", "c"]);
        assert_eq!(run.command, ["ls", "-l", "--all"]);
        assert_eq!(run.timeout, 60);
        assert!(Cli::try_parse_from(["gse", "run"]).is_err());
        assert!(Cli::try_parse_from(["gse", "run", "--timeout", "soon", "ls"]).is_err());
        assert!(Cli::try_parse_from(["gse", "certs", "agent"]).is_err());
    }

    #[test]
    fn words_of_a_copy() {
        let words = [
            "gse",
            "cp",
            "--mode",
            "0640",
            "--from",
            "0:10.0.0.9",
            "a",
            "b",
            "x,y:/to",
            "--limit",
            "5",
        ];
        let Command::Cp(copy) = Cli::try_parse_from(words).unwrap().command else {
            panic!("not cp")
        };
        assert_eq!(copy.words, ["a", "b", "x,y:/to"]);
        assert_eq!((copy.mode, copy.limit, copy.timeout), (Some(640), 5, 3600));
        assert_eq!(copy.from.as_deref(), Some("0:10.0.0.9"));
        for wrong in [
            &["gse", "cp", "a"][..],
            &["gse", "cp", "--mode", "9", "a", "x:/to"],
            &["gse", "cp", "--limit", "-1", "a", "x:/to"],
            &["gse", "cp", "--from", "a b", "a", "x:/to"],
            &["gse", "xfer"],
            &["gse", "xfer", "show"],
        ] {
            assert!(Cli::try_parse_from(wrong).is_err(), "{wrong:?}");
        }
    }
}
