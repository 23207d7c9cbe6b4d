//! The agent: one session to the servers, scripts run on the host, results that survive the agent.

pub mod config;
pub mod exec;
pub mod host;
mod run;
pub mod session;

pub use config::Config;
pub use run::{INFO, main, run};
