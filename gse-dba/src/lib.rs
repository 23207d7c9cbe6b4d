//! The front of the store over RESP: one server, three back ends (an embedded store that is durable in a directory, one Redis by URL, and several groups of Redis).
//!
//! Everything that knows RESP, the commands and where the data is lives here. Process life (signals, configuration files, logging) is gse-core's.

mod acl;
mod admin;
mod args;
mod behind;
mod blocking;
mod client;
mod clients;
mod cluster;
mod commands;
pub mod config;
mod conn;
mod copy;
mod durable;
mod embed;
mod engine;
mod hotkeys;
mod local;
mod metrics;
#[doc(hidden)]
pub mod micro;
mod migrate;
mod resp;
mod resubscribe;
mod server;
mod sharded;
mod single;
mod slowlog;
mod subscriber;
mod sums;
mod timing;
mod tls;
mod users;
mod view;
mod watch;
mod workers;

pub use config::Config;
pub use embed::Embed;
pub use server::run;
