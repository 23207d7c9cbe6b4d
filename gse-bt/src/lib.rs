//! Moving content between many hosts. The wire is BitTorrent's (BEP 3, 6, 7, 10, 15, 23, 27), so that foreign clients can take part
//! where a swarm is opened to them; what is sent when, and to whom, is decided by a scheduler of our own.
//!
//! * [`bencode`], [`metainfo`]: the encoding, and `.torrent` files;
//! * [`manifest`]: what a swarm moves: building, checking, naming it;
//! * [`bitmap`], [`geometry`]: sets of pieces, and how content is cut into them;
//! * [`wire`]: what peers say to each other;
//! * [`tracker`]: how foreign clients find peers.
//!
//! Who may take part in which swarm, and where files lie on a host, is left to gse_btsvr and the agent.

pub mod bencode;
pub mod bitmap;
pub mod geometry;
pub mod manifest;
pub mod metainfo;
pub mod tracker;
pub mod wire;

pub use bitmap::Bitmap;
pub use geometry::{Block, Geometry};
