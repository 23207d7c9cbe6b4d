//! The command lines about records: `gse route` and `gse data`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{DataDir, ListFormat, ServerArgs};

pub(super) const ROUTE_EXAMPLES: &str = "Examples:
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

pub(super) const DATA_EXAMPLES: &str = "Examples:
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
