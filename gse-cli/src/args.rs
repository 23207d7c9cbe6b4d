//! The command line of `gse`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::duration;

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
    #[command(after_help = UP_EXAMPLES)]
    Up(UpArgs),
    /// Make the certificate authority and certificates
    #[command(after_help = CERTS_EXAMPLES)]
    Certs(CertsArgs),
    /// List agents, or show one
    #[command(after_help = AGENTS_EXAMPLES)]
    Agents(AgentsArgs),
    /// Run a command or a script on agents and show what it prints
    #[command(after_help = RUN_EXAMPLES)]
    Run(RunArgs),
    /// Show a task: states, failures, outputs
    Task(TaskArgs),
    /// Stop a task on some or all of its targets
    Stop(StopArgs),
    /// Copy files to agents, from this machine or from other agents
    #[command(after_help = CP_EXAMPLES)]
    Cp(CpArgs),
    /// Files that are on their way: list, show, stop
    Xfer(XferArgs),
    /// Which data id goes where: list, show, add, remove
    #[command(after_help = ROUTE_EXAMPLES)]
    Route(RouteArgs),
    /// What became of records, by data id; and send one by hand
    #[command(after_help = DATA_EXAMPLES)]
    Data(DataArgs),
    /// The identity of a host: what CMDB says, what was put there, and whether they agree
    #[command(after_help = HOSTID_EXAMPLES)]
    Hostid(HostIdArgs),
    /// Read the audit trail: who asked for what, and what was decided
    #[command(after_help = AUDIT_EXAMPLES, args_conflicts_with_subcommands = true)]
    Audit(AuditArgs),
    /// The agent itself; `gse up` starts it
    #[command(hide = true, disable_help_flag = true)]
    Agent,
}

const UP_EXAMPLES: &str = "Examples:
  gse up
  gse up --data /var/lib/gse --durability always
  gse up --any-port                  on free ports, beside another instance
  gse up --listen 10.0.0.5           let other hosts in (loopback only, otherwise)

Everything it needs is made in the data directory on the first start and reused later: certificates, one application, the
identity of the local agent. Press Ctrl-C or send SIGTERM to stop it; a second signal leaves at once.";

/// `gse up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Where to find and keep everything
    #[command(flatten)]
    pub data: DataDir,
    /// Address to listen on for agents and platforms
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1")]
    pub listen: std::net::IpAddr,
    /// Use fourteen ports from this one on, in place of the usual ones
    #[arg(long, value_name = "PORT", conflicts_with = "any_port", value_parser = clap::value_parser!(u16).range(1..=65522))]
    pub port_base: Option<u16>,
    /// Use any free ports; where they are is printed and kept for the other commands
    #[arg(long)]
    pub any_port: bool,
    /// What an acknowledged write survives: "write": the death of this process; "always": a power cut too
    #[arg(long, value_enum, default_value_t = Durability::Write)]
    pub durability: Durability,
    /// Start no agent on this machine
    #[arg(long)]
    pub no_agent: bool,
    /// Stay in the foreground (there is no other mode)
    #[arg(long)]
    pub foreground: bool,
    /// Log lines to standard error in place of the files below the data directory
    #[arg(short, long)]
    pub verbose: bool,
}

/// When the embedded store writes to disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Durability {
    /// Written to the file before the reply.
    Write,
    /// Synced to the disk before the reply.
    Always,
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

const CERTS_EXAMPLES: &str = "Examples:
  gse certs --dir /etc/gse/tls init                  the authority: gseca.crt, gseca.key
  gse certs --dir /etc/gse/tls server --name gse1    gse_server.crt, gse_server.key
  gse certs --dir /etc/gse/tls agent 0:10.0.0.1      a directory to copy to that host
  gse certs --dir /etc/gse/tls api-client            gse_api_client.crt, gse_api_client.key";

/// `gse certs`.
#[derive(Debug, Args)]
pub struct CertsArgs {
    /// Directory of the authority and of what it issues [default: tls in the data directory of gse up]
    #[arg(long, value_name = "DIR", global = true)]
    pub dir: Option<PathBuf>,
    /// Days a new certificate is valid
    #[arg(long, value_name = "N", global = true)]
    pub days: Option<u32>,
    /// Replace files that exist
    #[arg(long, global = true)]
    pub force: bool,
    /// What to make.
    #[command(subcommand)]
    pub what: CertsCommand,
}

/// What `gse certs` makes.
#[derive(Debug, Subcommand)]
pub enum CertsCommand {
    /// The authority that issues all the others
    Init,
    /// The certificate of one agent, in a directory of its own with the authority's certificate
    Agent {
        /// Id of the agent, in either form
        #[arg(required_unless_present = "shared")]
        id: Option<String>,
        /// One certificate for a whole fleet; servers take it only when told so
        #[arg(long, conflicts_with = "id")]
        shared: bool,
    },
    /// The certificate of servers
    Server {
        /// Host name or address to put into it, for HTTPS; repeatable
        #[arg(long, value_name = "NAME")]
        name: Vec<String>,
    },
    /// The certificate of a client of the internal API
    ApiClient {
        /// Name of the client
        name: Option<String>,
    },
    /// The certificate of an operator
    Operator {
        /// Name of the operator
        name: Option<String>,
    },
}

const AGENTS_EXAMPLES: &str = "Examples:
  gse agents --online
  gse agents --lost
  gse agents 0:10.0.0.1
  gse agents --output json | jq -r '.[].bk_agent_id'";

/// `gse agents`.
#[derive(Debug, Args)]
pub struct AgentsArgs {
    /// Show this one in detail (an id, or cloud:ip)
    pub id: Option<String>,
    /// Only agents that are connected
    #[arg(long, conflicts_with = "id")]
    pub online: bool,
    /// Only agents about which alarms are sent, because they are not heard any more
    #[arg(long, conflicts_with_all = ["id", "online"])]
    pub lost: bool,
    /// Form of the list
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub output: ListFormat,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

const RUN_EXAMPLES: &str = "Examples:
  gse run 'uname -a'                         on every agent that is connected
  gse run -t 0:10.0.0.1,0:10.0.0.2 df -h /
  gse run -t all --user app --script check.sh one two
  gse run --detach 'sleep 600'               prints the task id and leaves

Words of COMMAND are joined with blanks and run as a shell script. What is printed at the end goes to standard output, equal
outputs once; what happens meanwhile goes to standard error.

Exit status: 0 all succeeded; with one target the exit code of the script; 1 something failed; 2 wrong usage or the call was
refused; 124 nothing but time-outs failed.";

/// `gse run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Agent id, cloud:ip, or "all" for every connected agent; repeatable, or separated by commas [default: all]
    #[arg(short, long = "target", value_name = "ID", value_delimiter = ',')]
    pub targets: Vec<String>,
    /// Account to run as [default: what gse up has noted down, else root]
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,
    /// How long it may take on each target: 90, 60s, 5m, 2h; 0 is the longest the servers allow
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration::seconds)]
    pub timeout: u32,
    /// Print the task id and leave
    #[arg(long)]
    pub detach: bool,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub output: Format,
    /// Run this file ("-": standard input); words of COMMAND become its arguments
    #[arg(long, value_name = "FILE")]
    pub script: Option<PathBuf>,
    /// Print each line with its target as it comes, and do not fold equal outputs at the end
    #[arg(long)]
    pub no_fold: bool,
    /// Print no lines before the end when there are several targets
    #[arg(short, long)]
    pub quiet: bool,
    /// Let colours in the output through to a terminal
    #[arg(long)]
    pub color: bool,
    /// The command
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true,
        required_unless_present = "script"
    )]
    pub command: Vec<String>,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse task`.
#[derive(Debug, Args)]
pub struct TaskArgs {
    /// Id of the task
    pub id: String,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub output: Format,
    /// Only the summary and the failures
    #[arg(long)]
    pub no_output: bool,
    /// Let colours in the output through to a terminal
    #[arg(long)]
    pub color: bool,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Id of the task
    pub id: String,
    /// Only on this target; repeatable, or separated by commas [default: all]
    #[arg(short, long = "target", value_name = "ID", value_delimiter = ',')]
    pub targets: Vec<String>,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

const CP_EXAMPLES: &str = "Examples:
  gse cp app.conf 0:10.0.0.1,0:10.0.0.2:/etc/app
  gse cp --owner app --mode 640 app.conf all:/etc/app
  gse cp 0:10.0.0.1:/data/release.tar all:/opt/release     from one agent to all
  gse cp '0:10.0.0.1:/var/log/*.log' 0:10.0.0.9:/srv/logs  a pattern; it is looked at there
  gse cp 0:10.0.0.1:/data/www/ all:/srv                    a directory: makes /srv/www

Text files of this machine up to 100 KiB go inside the call. Anything else an agent sends: the one that gse up runs on this machine,
the one that --from names, or the one before the path. Directories at the targets are made if they are missing.

Ctrl-C once asks the servers to stop it, twice leaves; gse xfer shows and stops it from anywhere.

Exit status: 0 all copies were made; 1 some were not; 2 wrong usage or the call was refused; 124 nothing but time-outs went wrong.";

/// `gse cp`.
#[derive(Debug, Args)]
pub struct CpArgs {
    /// FILE or AGENT:/PATH, as many as you like, and at last TARGETS:DIR: ids separated by commas, or "all"
    #[arg(value_name = "SRC... TARGETS:DIR", required = true, num_args = 2..)]
    pub words: Vec<String>,
    /// Account that reads at the source and writes at the targets [default: what gse up has noted down, else root]
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,
    /// Account that the copies are to belong to [default: the one that writes]
    #[arg(long, value_name = "USER")]
    pub owner: Option<String>,
    /// Mode of the copies, octal [default: that of the source]
    #[arg(long, value_name = "MODE", value_parser = crate::xfer::place::mode)]
    pub mode: Option<i64>,
    /// Agent on this machine, to send files that are too large for the call [default: that of gse up]
    #[arg(long, value_name = "AGENT", value_parser = crate::xfer::place::agent)]
    pub from: Option<String>,
    /// MB/s that each source sends and each target takes at most; 0: no limit
    #[arg(long, value_name = "MB/S", default_value_t = 0)]
    pub limit: u32,
    /// How long it may take: 90, 60s, 5m, 2h; 0 is the longest the servers allow
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration::seconds)]
    pub timeout: u32,
    /// Fail where the directory is missing
    #[arg(long)]
    pub no_mkdir: bool,
    /// Print the task ids and leave
    #[arg(long)]
    pub detach: bool,
    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub output: Format,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse xfer`.
#[derive(Debug, Args)]
pub struct XferArgs {
    /// What to do.
    #[command(subcommand)]
    pub what: XferCommand,
}

/// What `gse xfer` does.
#[derive(Debug, Subcommand)]
pub enum XferCommand {
    /// List the file tasks that are under way
    Ls(XferListArgs),
    /// Show how far a file task is, row by row
    Show(XferShowArgs),
    /// Stop a file task, or the part of some hosts
    Stop(XferStopArgs),
}

/// `gse xfer ls`.
#[derive(Debug, Args)]
pub struct XferListArgs {
    /// Show the newest N
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100)]
    pub last: u32,
    /// Form of the list
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub output: ListFormat,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse xfer show`.
#[derive(Debug, Args)]
pub struct XferShowArgs {
    /// Id of the task
    pub id: String,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub output: Format,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse xfer stop`.
#[derive(Debug, Args)]
pub struct XferStopArgs {
    /// Id of the task
    pub id: String,
    /// Only on this host; repeatable, or separated by commas [default: all]
    #[arg(short, long = "target", value_name = "ID", value_delimiter = ',')]
    pub targets: Vec<String>,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

const ROUTE_EXAMPLES: &str = "Examples:
  gse route ls
  gse route show 1001
  gse route stream '{\"name\": \"mq\", \"report_mode\": \"kafka\",
      \"kafka\": {\"storage_address\": [{\"ip\": \"10.0.0.9\", \"port\": 9092}]}}'      prints the number of the stream
  gse route add 1001 --stream 1001 --target 0bkmonitor_10010
  gse route add --stream 1001 --target events                      a new data id, which is printed
  gse route rm 1001 base                                           one route; without a name, all of 1001";

/// `gse route`.
#[derive(Debug, Args)]
pub struct RouteArgs {
    /// What to do.
    #[command(subcommand)]
    pub what: RouteCommand,
}

/// What `gse route` does.
#[derive(Debug, Subcommand)]
pub enum RouteCommand {
    /// List all data ids with their routes, and the streams they lead to
    Ls(RouteListArgs),
    /// Show the routes of a data id, as they were written
    Show(RouteShowArgs),
    /// Add a route, or change the one of the same name
    Add(RouteAddArgs),
    /// Remove a data id, or some of its routes
    Rm(RouteRemoveArgs),
    /// Add a stream, a place that routes lead to
    Stream(RouteStreamArgs),
}

/// `gse route ls`.
#[derive(Debug, Args)]
pub struct RouteListArgs {
    /// Form of the list
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub output: ListFormat,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse route show`.
#[derive(Debug, Args)]
pub struct RouteShowArgs {
    /// The data id
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub id: u32,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse route add`.
#[derive(Debug, Args)]
pub struct RouteAddArgs {
    /// The data id [default: a new one]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub id: Option<u32>,
    /// Number of the stream
    #[arg(long, value_name = "N")]
    pub stream: u64,
    /// Topic or channel there; files need none
    #[arg(long, value_name = "NAME")]
    pub target: Option<String>,
    /// Name of the route
    #[arg(long, default_value = "gse")]
    pub name: String,
    /// Platform that the data id belongs to
    #[arg(long, default_value = "bkmonitor")]
    pub plat: String,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse route rm`.
#[derive(Debug, Args)]
pub struct RouteRemoveArgs {
    /// The data id
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub id: u32,
    /// Names of routes [default: all, and the data id itself]
    pub names: Vec<String>,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse route stream`.
#[derive(Debug, Args)]
pub struct RouteStreamArgs {
    /// The stream as JSON, as stream_to of the call; "-": from standard input
    pub json: String,
    /// Number it is to have [default: a new one]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub id: Option<u64>,
    /// Platform that it belongs to
    #[arg(long, default_value = "bkmonitor")]
    pub plat: String,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

const DATA_EXAMPLES: &str = "Examples:
  gse data ls                     records, drops and what waits, by data id
  gse data tail 1430              live records, until Ctrl-C
  gse data tail -n 1 -o json 1430 the next one, with its time and type
  gse data send 1430 hello        hand a record to the agent on this machine
  gse data send 1430 - < file

Exit status: 0 done; 2 wrong usage, or the servers or the agent cannot be asked.";

/// `gse data`.
#[derive(Debug, Args)]
pub struct DataArgs {
    /// What to do.
    #[command(subcommand)]
    pub what: DataCommand,
}

/// What `gse data` does.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// List what became of records, by data id
    Ls(DataListArgs),
    /// Show the records of a data id as they come in
    Tail(DataTailArgs),
    /// Hand a record to the agent on this machine, as a plugin would
    Send(DataSendArgs),
}

/// `gse data ls`.
#[derive(Debug, Args)]
pub struct DataListArgs {
    /// Form of the list
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub output: ListFormat,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse data tail`.
#[derive(Debug, Args)]
pub struct DataTailArgs {
    /// The data id
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub id: u32,
    /// End after so many records [default: go on until Ctrl-C]
    #[arg(short = 'n', long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Form of the records
    #[arg(short, long, value_enum, default_value_t = TailFormat::Text)]
    pub output: TailFormat,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Form of the records of a tail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TailFormat {
    /// The records alone; JSON is set out over several lines, bytes that are no text are base64
    Text,
    /// One JSON object a line, with id, time and type, as the servers give it
    Json,
}

/// `gse data send`.
#[derive(Debug, Args)]
pub struct DataSendArgs {
    /// The data id
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub id: u32,
    /// The record; "-", or nothing: from standard input
    pub text: Option<String>,
    /// Data socket of the agent [default: that of the agent of gse up]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Whose agent it is.
    #[command(flatten)]
    pub data: DataDir,
}

const HOSTID_EXAMPLES: &str = "Examples:
  gse hostid 0:10.0.0.1              what the host is to have, what it has, and since when
  gse hostid 0:10.0.0.1 --push       put it there again
  gse hostid 0:10.0.0.1 --set FILE   say what it is, on a site without CMDB";

/// `gse hostid`.
#[derive(Debug, Args)]
pub struct HostIdArgs {
    /// Id of the host's agent, or cloud:ip
    pub host: String,
    /// Push what is known again, whether the host has it or not
    #[arg(long)]
    pub push: bool,
    /// Say what the identity is: the content of this file; "-": of standard input
    #[arg(long, value_name = "FILE", conflicts_with = "push")]
    pub set: Option<PathBuf>,
    /// Form of what is shown
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub output: ListFormat,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

const AUDIT_EXAMPLES: &str = "Examples:
  gse audit --refused --since 1d               what was refused since this time yesterday
  gse audit --app bk-job --agent 0:10.0.0.1
  gse audit --follow
  gse audit -o json --last 0 | jq .operation
  gse audit verify                             whether every line stands as it was written
  gse audit verify /var/log/gse                all trails of a directory

Works on files alone, [default: log in the data directory of gse up]; a directory stands for all trails in it, a file for itself and the
files put aside when it became too large. Names are compared whole.

Exit status of verify: 0 everything is in order, 1 a line is missing or was changed (it says which), 2 it cannot be read.";

/// `gse audit`.
#[derive(Debug, Args)]
pub struct AuditArgs {
    /// Another thing to do than to show lines.
    #[command(subcommand)]
    pub what: Option<AuditCommand>,
    /// Files or directories
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Only calls of this application; repeatable, or separated by commas
    #[arg(long = "app", value_name = "CODE", value_delimiter = ',')]
    pub apps: Vec<String>,
    /// Only about this task; repeatable, or separated by commas
    #[arg(long = "task", value_name = "ID", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Only about this agent, by the id that the caller used; a line names the first eight of its targets
    #[arg(long = "agent", value_name = "ID", value_delimiter = ',')]
    pub agents: Vec<String>,
    /// Only this operation, such as script.execute; repeatable, or separated by commas
    #[arg(long = "operation", value_name = "NAME", value_delimiter = ',')]
    pub operations: Vec<String>,
    /// Only what was refused
    #[arg(long)]
    pub refused: bool,
    /// Only from this time on: 2026-01-31T12:00:00Z, "2026-01-31 12:00" (UTC), or how long ago: 2h
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Only before this time
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// Go on with what is written from now on
    #[arg(short, long)]
    pub follow: bool,
    /// Show the last N lines that fit; 0: all
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1000)]
    pub last: usize,
    /// Form of the lines; json: as they stand in the file, one on a line
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub output: ListFormat,
    /// Where gse up keeps its files.
    #[command(flatten)]
    pub data: DataDir,
}

/// What else `gse audit` does.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Check the chain of hashes of every trail
    Verify {
        /// Files or directories
        #[arg(value_name = "PATH")]
        paths: Vec<PathBuf>,
        /// Where gse up keeps its files.
        #[command(flatten)]
        data: DataDir,
    },
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
