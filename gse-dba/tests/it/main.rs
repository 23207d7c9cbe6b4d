//! The server over real sockets: against a real Redis, against a killed process, against broken files and against odd clients.
#![allow(clippy::unwrap_used)] // Helpers of tests fail as tests do.

mod admin;
mod cluster;
mod durability;
mod endpoint;
mod faults;
mod migrate;
mod moving;
mod ordinary;
mod plain;
mod pubsub;
mod rig;
mod same_as_redis;
mod serving;
mod sharded;
mod single;
mod site;
mod templates;
