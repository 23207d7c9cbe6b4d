//! The agent: one session to the servers, scripts run on the host, files brought to it and taken from it, results that survive the agent.

mod account;
pub mod cmdline;
mod conf;
pub mod config;
pub mod data;
pub mod exec;
pub mod files;
pub mod host;
pub mod local;
pub mod message;
pub mod proc;
mod run;
pub mod session;

pub use config::Config;
pub use run::{INFO, main, run};
