//! The command line of `gse dba`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{DataDir, ListFormat};
use crate::duration;

pub(super) const DBA_EXAMPLES: &str = "Examples:
  gse dba status                                    mode, promise, groups, what is wrong
  gse dba slots --key task:7                        where a key is
  gse dba move 0-99,200 g2                          slots to another group, while clients go on
  gse dba add g4 --sentinels h1:26379,h2:26379,h3:26379 --share
  gse dba drain g1                                  all its slots to the others
  gse dba promote g2 10.0.0.7:6379                  a group without Sentinel has lost its primary
  gse dba failover g2                               hand over as planned
  gse dba migrate --to redis://10.0.0.9:6379        the whole store to another one, and --back
  gse dba status --url redis://10.0.0.5:58817 --password-file dba.password

Without --url the gse_dba of gse up is asked. What changes something prints a plan and asks; --yes does without.

Exit status: 0 done (status: all is well); 1 refused, failed or aborted (status: something is wrong); 2 wrong usage; 3 gse_dba does not
answer: whether a change was made must be looked up then.";

/// `gse dba`.
#[derive(Debug, Args)]
pub struct DbaArgs {
    /// What to do.
    #[command(subcommand)]
    pub what: DbaCommand,
}

/// What `gse dba` does.
#[derive(Debug, Subcommand)]
pub enum DbaCommand {
    /// Show mode, promise, groups and what is wrong
    Status(DbaLookArgs),
    /// Show which group serves which slots, or one key
    Slots(DbaSlotsArgs),
    /// Show the clients that are busiest
    Clients(DbaTopArgs),
    /// Show the latest slow batches of commands
    Slowlog(DbaSlowlogArgs),
    /// Show the keys that are used most, by a sample
    Hotkeys(DbaTopArgs),
    /// Move slots to a group
    Move(DbaMoveArgs),
    /// Add a group, which must be empty
    Add(DbaAddArgs),
    /// Move all slots of a group to the others
    Drain(DbaGroupArgs),
    /// Show the moves that are under way; pause, resume, slow down
    Moves(DbaMovesArgs),
    /// Take back the moves that are under way
    Abort(DbaAbortArgs),
    /// Make a copy the primary of a group without Sentinel whose primary is lost
    Promote(DbaPromoteArgs),
    /// Serve a group again whose primary came back without acknowledged writes, as it is
    Accept(DbaAcceptArgs),
    /// Hand over to a copy as planned, without losing anything
    Failover(DbaFailoverArgs),
    /// Copy everything to another store, verify, switch; or go back
    Migrate(DbaMigrateArgs),
}

/// How gse_dba is found.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "gse_dba")]
pub struct DbaPlace {
    /// The data directory whose gse up is asked.
    #[command(flatten)]
    pub data: DataDir,
    /// Address of a gse_dba: redis://HOST:PORT, rediss://HOST:PORT or redis+unix:///PATH
    #[arg(long, value_name = "URL", env = "GSE_DBA_URL", hide_env_values = true)]
    pub url: Option<String>,
    /// User [default: default]
    #[arg(long, value_name = "NAME", env = "GSE_DBA_USER")]
    pub user: Option<String>,
    /// File that holds the password; it may be in GSE_DBA_PASSWORD, too
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// PEM file of the authority to trust, for rediss
    #[arg(long, value_name = "FILE", env = "GSE_CA")]
    pub ca: Option<PathBuf>,
    /// How long to wait for an answer: 90, 60s, 5m
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration::seconds)]
    pub timeout: u32,
    /// Form of the answer
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub output: ListFormat,
    /// The same as --output json
    #[arg(long)]
    pub json: bool,
}

/// How changes are made.
#[derive(Debug, Clone, Args)]
pub struct DbaChange {
    /// Do it without asking
    #[arg(short, long)]
    pub yes: bool,
    /// Where gse_dba is.
    #[command(flatten)]
    pub place: DbaPlace,
}

/// How long changes are made.
#[derive(Debug, Clone, Args)]
pub struct DbaWork {
    /// Do not wait for the end; it goes on without this command in any case
    #[arg(long)]
    pub no_wait: bool,
    /// As for every change.
    #[command(flatten)]
    pub change: DbaChange,
}

/// `gse dba status`.
#[derive(Debug, Args)]
pub struct DbaLookArgs {
    /// Where gse_dba is.
    #[command(flatten)]
    pub place: DbaPlace,
}

/// `gse dba slots`.
#[derive(Debug, Args)]
pub struct DbaSlotsArgs {
    /// Only where this key is
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
    /// Where gse_dba is.
    #[command(flatten)]
    pub place: DbaPlace,
}

/// `gse dba clients`, `gse dba hotkeys`.
#[derive(Debug, Args)]
pub struct DbaTopArgs {
    /// How many are shown
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10)]
    pub count: u32,
    /// Where gse_dba is.
    #[command(flatten)]
    pub place: DbaPlace,
}

/// `gse dba slowlog`.
#[derive(Debug, Args)]
pub struct DbaSlowlogArgs {
    /// How many are shown
    #[arg(short = 'n', long, value_name = "N", default_value_t = 32)]
    pub count: u32,
    /// Forget them instead
    #[arg(long)]
    pub reset: bool,
    /// Where gse_dba is.
    #[command(flatten)]
    pub place: DbaPlace,
}

/// `gse dba move`.
#[derive(Debug, Args)]
pub struct DbaMoveArgs {
    /// Slots: 7, 0-99, several with commas
    pub slots: String,
    /// The group they go to
    #[arg(value_name = "GROUP")]
    pub to: String,
    /// How it is done.
    #[command(flatten)]
    pub work: DbaWork,
}

/// `gse dba add`.
#[derive(Debug, Args)]
#[group(id = "members", required = true, multiple = false, args = ["sentinels", "servers"])]
pub struct DbaAddArgs {
    /// Name of the group; the Sentinels must know it by that
    #[arg(value_name = "GROUP")]
    pub group: String,
    /// The Sentinels that watch it
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    pub sentinels: Vec<String>,
    /// Its servers, when no Sentinel watches them: HOST:PORT or the path of a socket
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
    pub servers: Vec<String>,
    /// Move an equal part of the slots to it at once
    #[arg(long)]
    pub share: bool,
    /// How it is done.
    #[command(flatten)]
    pub work: DbaWork,
}

/// `gse dba drain`.
#[derive(Debug, Args)]
pub struct DbaGroupArgs {
    /// The group
    pub group: String,
    /// How it is done.
    #[command(flatten)]
    pub work: DbaWork,
}

/// `gse dba moves`.
#[derive(Debug, Args)]
#[group(id = "speed", multiple = false, args = ["pause", "resume", "rate"])]
pub struct DbaMovesArgs {
    /// Copy nothing more until --resume
    #[arg(long)]
    pub pause: bool,
    /// Go on
    #[arg(long)]
    pub resume: bool,
    /// Copy so many bytes and keys a second at most; 0 is no bound
    #[arg(long, num_args = 2, value_names = ["BYTES", "KEYS"])]
    pub rate: Vec<u64>,
    /// Where gse_dba is.
    #[command(flatten)]
    pub place: DbaPlace,
}

/// `gse dba abort`.
#[derive(Debug, Args)]
pub struct DbaAbortArgs {
    /// Only this one, as gse dba moves numbers it [default: all]
    pub job: Option<u64>,
    /// How it is done.
    #[command(flatten)]
    pub change: DbaChange,
}

/// `gse dba promote`.
#[derive(Debug, Args)]
pub struct DbaPromoteArgs {
    /// The group
    pub group: String,
    /// The copy [default: the one that is furthest ahead]
    pub address: Option<String>,
    /// Even when it lacks what another server has: acknowledged writes may be lost
    #[arg(long)]
    pub force: bool,
    /// How it is done.
    #[command(flatten)]
    pub change: DbaChange,
}

/// `gse dba accept`.
#[derive(Debug, Args)]
pub struct DbaAcceptArgs {
    /// The group
    pub group: String,
    /// How it is done.
    #[command(flatten)]
    pub change: DbaChange,
}

/// `gse dba failover`.
#[derive(Debug, Args)]
pub struct DbaFailoverArgs {
    /// The group
    pub group: String,
    /// The copy that takes over [default: any]
    #[arg(long, value_name = "ADDRESS")]
    pub to: Option<String>,
    /// How it is done.
    #[command(flatten)]
    pub change: DbaChange,
}

/// `gse dba migrate`.
#[derive(Debug, Args)]
#[group(id = "migration", required = true, multiple = false, args = ["to", "back", "status", "abort", "rate"])]
pub struct DbaMigrateArgs {
    /// Copy everything there, verify, and serve from there: redis://, rediss://, redis+unix://, embedded:///DIR, or sharded:///FILE
    /// (a file with a table `[sharded]`)
    #[arg(long, value_name = "URL")]
    pub to: Option<String>,
    /// With --to: delete what is there already
    #[arg(long, requires = "to")]
    pub replace: bool,
    /// Go back to the store that was left
    #[arg(long)]
    pub back: bool,
    /// Show how far it is
    #[arg(long)]
    pub status: bool,
    /// Stop copying; what is served from stays
    #[arg(long)]
    pub abort: bool,
    /// Copy so many bytes and keys a second at most; 0 is no bound
    #[arg(long, num_args = 2, value_names = ["BYTES", "KEYS"])]
    pub rate: Vec<u64>,
    /// How it is done.
    #[command(flatten)]
    pub work: DbaWork,
}
