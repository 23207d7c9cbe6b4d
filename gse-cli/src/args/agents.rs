//! The command line of `gse agents`.

use clap::Args;

use super::{ListFormat, ServerArgs};

pub(super) const AGENTS_EXAMPLES: &str = "Examples:
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
