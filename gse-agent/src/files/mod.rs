//! File transfers on this host: what an order asks for is found, read and offered, or fetched and put at its place.
//!
//! Paths are touched by a child process only, which has become the asked account (`worker`); the agent moves bytes through the files
//! that it opens. Orders come as calls of the service "file" over the session, reports go back as their answers or over a link of their
//! own (`link`) to the server that controls the transfer. Which host gets what from whom is the servers' business.

mod cell;
mod config;
mod journal;
mod link;
mod metrics;
mod names;
mod open;
mod orders;
mod place;
mod source;
mod stop;
mod swarm;
mod talk;
mod target;
mod worker;

pub use config::FilesConfig;
pub use link::Identity;
pub use metrics::Metrics;
pub use orders::Files;
pub(crate) use worker::worker_main;

/// The service that orders are calls of.
pub const SERVICE: &str = "file";
