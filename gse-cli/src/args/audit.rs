//! The command line of `gse audit`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{DataDir, ListFormat};

pub(super) const AUDIT_EXAMPLES: &str = "Examples:
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
