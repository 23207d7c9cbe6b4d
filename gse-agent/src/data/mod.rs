//! Data on its way from a plugin to the servers: taken on this host's sockets, batched in memory, kept on disk while the servers are slow
//! or gone, acknowledged by them. Every record is delivered, buffered, or counted as dropped with a reason.
//!
//! What a record means and where it goes is left to gse_data; nothing here looks into a payload.

mod config;
mod counts;
mod flow;
mod intake;
pub mod socket;
pub mod uplink;

pub use config::DataConfig;
pub use counts::{Counts, Reason, Snapshot};
pub use intake::{Fill, Intake};
