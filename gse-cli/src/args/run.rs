//! The command lines about scripts: `gse run`, `gse task` and `gse stop`.

use std::path::PathBuf;

use clap::Args;

use super::{Format, ServerArgs};
use crate::duration;

pub(super) const RUN_EXAMPLES: &str = "Examples:
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
