//! The shared protocol: what goes over every link of the system and how it is spelt.
//!
//! * [`session`]: messages between an agent and `gse_task`, carried in the frames of [`frame`];
//! * [`state`]: what the servers keep in the store;
//! * [`peer`]: calls between nodes of `gse_task` (gRPC);
//! * [`calls`]: calls of other services to agents, through `gse_task` (gRPC and the session);
//! * [`mod@file`]: file transfers, between `gse_btsvr` and agents, and [`link`], what carries them;
//! * [`xfer`]: what `gse_btsvr` keeps in the store;
//! * [`mod@data`]: records of plugins on their way to `gse_data`, and [`datalink`], what carries them;
//! * [`message`]: messages to plugins;
//! * [`mod@proc`]: processes of hosts, between `gse_procmgr` and agents, and their reports;
//! * [`procstore`]: what `gse_procmgr` keeps in the store;
//! * [`intake`]: records that servers hand to `gse_data` (gRPC);
//! * [`alarm`]: what `gse_alarm` keeps in the store;
//! * [`sync`]: what `gse_syncdata` keeps in the store;
//! * [`http`]: calls, paths, bodies and envelope of the platforms' HTTP API;
//! * [`codes`]: every error code, in one table;
//! * [`ids`]: typed identifiers.
//!
//! No I/O and no runtime: a test can drive all of it without a socket.

pub mod codes;
pub mod datalink;
pub mod frame;
pub mod http;
pub mod ids;
pub mod keys;
pub mod link;
pub mod proc;

/// Messages of the agent session, generated from `session.proto`.
#[allow(missing_docs)]
pub mod session {
    include!(concat!(env!("OUT_DIR"), "/gse.session.v1.rs"));

    /// Highest session protocol version of this build.
    pub const PROTOCOL: u32 = 1;
    /// Lowest session protocol version that this build still speaks.
    pub const PROTOCOL_MIN: u32 = 1;
}

/// Values kept in the store, generated from `state.proto`.
#[allow(missing_docs)]
pub mod state {
    include!(concat!(env!("OUT_DIR"), "/gse.state.v1.rs"));
}

/// Calls between nodes, generated from `peer.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod peer {
    tonic::include_proto!("gse.peer.v1");
}

/// Calls of other services to agents, generated from `calls.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod calls {
    tonic::include_proto!("gse.calls.v1");
}

/// Hosts and what was put on them, generated from `sync.proto`.
#[allow(missing_docs)]
pub mod sync {
    include!(concat!(env!("OUT_DIR"), "/gse.sync.v1.rs"));
}

/// Orders and reports of file transfers, generated from `file.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod file {
    include!(concat!(env!("OUT_DIR"), "/gse.file.v1.rs"));
}

/// What `gse_btsvr` keeps in the store, generated from `xfer.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod xfer {
    include!(concat!(env!("OUT_DIR"), "/gse.xfer.v1.rs"));
}

/// What `gse_procmgr` keeps in the store, generated from `procstore.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod procstore {
    include!(concat!(env!("OUT_DIR"), "/gse.procstore.v1.rs"));
}

/// Records on their way to `gse_data`, generated from `data.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod data {
    include!(concat!(env!("OUT_DIR"), "/gse.data.v1.rs"));
}

/// Messages to plugins, generated from `message.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod message {
    include!(concat!(env!("OUT_DIR"), "/gse.message.v1.rs"));

    /// The service of calls that deliver messages.
    pub const SERVICE: &str = "message";
    /// Longest name of a plugin, bytes.
    pub const MAX_PLUGIN: usize = 128;
    /// Longest id of a message, bytes: 64 characters of any kind.
    pub const MAX_MESSAGE_ID: usize = 256;
    /// Longest content of a message that a plugin says: with its frame it stays below what a session takes.
    pub const MAX_SAID: usize = 768 << 10;
}

/// Records that servers hand to `gse_data`, generated from `intake.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod intake {
    tonic::include_proto!("gse.intake.v1");
}

/// What `gse_alarm` keeps in the store, generated from `alarm.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod alarm {
    include!(concat!(env!("OUT_DIR"), "/gse.alarm.v1.rs"));
}

/// Descriptors of everything that is generated here, encoded; what a test enumerates calls from.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

pub use bytes;
pub use prost;
