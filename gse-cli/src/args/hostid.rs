//! The command line of `gse hostid`.

use std::path::PathBuf;

use clap::Args;

use super::{ListFormat, ServerArgs};

pub(super) const HOSTID_EXAMPLES: &str = "Examples:
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
