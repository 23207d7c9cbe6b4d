//! The front door: every HTTP path of the contract at one address.
//!
//! What is known of agents it answers itself, from the store ([`agents`]); every other call goes through to the service that owns it
//! ([`proxy`]). Who may call what is decided by the pipeline of gse-core before either is reached.

pub mod agents;
mod config;
pub mod proxy;
mod run;
mod service;

pub use config::{Config, Limits, Upstreams};
pub use run::{INFO, run};
