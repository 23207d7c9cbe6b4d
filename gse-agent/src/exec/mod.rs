//! Running scripts on this host: at most once, ended as a whole, with a true result that survives the agent.
//!
//! The agent ([`Executor`]) records what it is told to run, and starts one small process per script: this executable again, as a
//! *runner*. The runner starts a *stage*, which becomes the asked account and then the script; the runner itself keeps the output, holds
//! the time limit, ends the whole tree when it must, and leaves the true end on disk whether or not the agent is still there.
//!
//! Talking to the servers is left to [`crate::session`], which hands in messages and takes [`Report`]s.

mod capture;
mod cgroup;
mod clean;
pub(crate) mod command;
mod config;
mod drive;
mod environment;
mod executor;
mod interpreter;
mod job;
mod journal;
mod limits;
mod linger;
mod names;
mod order;
mod orphans;
mod proc;
mod pump;
mod record;
mod restore;
mod room;
mod runner;
mod scripts;
mod stage;
mod state;
mod stuck;
mod sweep;
mod tag;
mod tree;
mod utf8;
mod watch;
mod window;

pub use config::ExecConfig;
pub use executor::{Executor, Link};
pub(crate) use orphans::collect_dead;
pub(crate) use proc::{boot_id, close_inherited};
pub use pump::Report;
pub(crate) use record::{Record, sync_dir};
pub use runner::runner_main;
