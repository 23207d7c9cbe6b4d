//! Moving content between many hosts. The wire is BitTorrent's (BEP 3, 6, 7, 10, 15, 23, 27), so that foreign clients can take part
//! where a swarm is opened to them; what is sent when, and to whom, is decided by a scheduler of our own.
//!
//! * [`bencode`], [`metainfo`]: the encoding, and `.torrent` files;
//! * [`manifest`]: what a swarm moves: building, checking, naming it;
//! * [`bitmap`], [`geometry`]: sets of pieces, and how content is cut into them;
//! * [`wire`]: what peers say to each other;
//! * [`tracker`]: how foreign clients find peers;
//! * [`plan`], [`sim`]: which piece is asked for from whom and offered to whom, and a simulation of it;
//! * [`storage`], [`resume`]: content on disk, and what is known of it after a restart;
//! * [`engine`]: listeners, connections and swarms.
//!
//! Who may take part in which swarm, and where files lie on a host, is left to gse_btsvr and the agent.

pub mod bencode;
pub mod bitmap;
pub mod engine;
pub mod geometry;
mod limit;
pub mod manifest;
pub mod metainfo;
mod metrics;
mod peer;
pub mod plan;
pub mod resume;
pub mod sim;
pub mod storage;
mod swarm;
pub mod tracker;
pub mod wire;

pub use bitmap::Bitmap;
pub use engine::{ALPN, Engine, EngineConfig, EngineError, PeerTls};
pub use geometry::{Block, Geometry};
pub use metrics::Metrics;
pub use peer::{LinkConfig, ticket};
pub use plan::PlanConfig;
pub use resume::ResumeFile;
pub use storage::{FilePool, OpenFiles, Storage, StorageError};
pub use swarm::{Failure, Limits, Progress, Swarm, SwarmSpec};
