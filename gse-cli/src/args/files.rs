//! The command lines about files: `gse cp` and `gse xfer`.

use clap::{Args, Subcommand};

use super::{Format, ListFormat, ServerArgs};
use crate::duration;

pub(super) const CP_EXAMPLES: &str = "Examples:
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
    /// Open a file task's content to foreign BitTorrent clients, for a time
    Open(XferOpenArgs),
    /// Let foreign clients in no more
    Close(XferCloseArgs),
    /// Write the .torrent file of an opened file task to standard output
    Torrent(XferTorrentArgs),
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

const XFER_OPEN_HELP: &str = "Whoever reaches the servers' front gets the content then, without any credential. It is open when it is in the cache of the
server that controls the task, which the command waits for; gse xfer torrent writes the .torrent file.

Exit status: 0 all of it is open; 1 some is not.";

/// `gse xfer open`.
#[derive(Debug, Args)]
#[command(after_help = XFER_OPEN_HELP)]
pub struct XferOpenArgs {
    /// Id of the task
    pub id: String,
    /// How long: 90, 60s, 5m, 2h; 0 is the longest the servers allow
    #[arg(long = "for", value_name = "TIME", default_value = "0", value_parser = duration::seconds)]
    pub lasts: u32,
    /// How long to wait until it is open; 0: not at all
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration::seconds)]
    pub wait: u32,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub output: Format,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse xfer close`.
#[derive(Debug, Args)]
pub struct XferCloseArgs {
    /// Id of the task
    pub id: String,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `gse xfer torrent`.
#[derive(Debug, Args)]
pub struct XferTorrentArgs {
    /// Id of the task
    pub id: String,
    /// Number of the source or file, where the task has several
    #[arg(long, value_name = "N")]
    pub part: Option<u32>,
    /// Where the servers are.
    #[command(flatten)]
    pub server: ServerArgs,
}
