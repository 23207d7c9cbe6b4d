//! The agent: one session to the servers, scripts run on the host, results that survive the agent.

pub mod config;
pub mod exec;
pub mod session;
