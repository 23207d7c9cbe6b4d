//! The command line of `gse up`.

use clap::{Args, ValueEnum};

use super::DataDir;

pub(super) const UP_EXAMPLES: &str = "Examples:
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
    /// Use seventeen ports from this one on, and the one 40 above it, in place of the usual ones
    #[arg(long, value_name = "PORT", conflicts_with = "any_port", value_parser = clap::value_parser!(u16).range(1..=65495))]
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
