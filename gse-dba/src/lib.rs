//! The front of the store over RESP: one server, two back ends (an embedded store that is durable in a directory, and one Redis by URL).
//!
//! Everything that knows RESP, the commands and where the data is lives here. Process life (signals, configuration files, logging) is gse-core's.

mod args;
mod commands;
pub mod config;
mod conn;
mod durable;
mod embed;
mod engine;
mod local;
mod metrics;
#[doc(hidden)]
pub mod micro;
mod resp;
mod server;
mod single;
mod tls;

pub use config::Config;
pub use embed::Embed;
pub use server::run;
