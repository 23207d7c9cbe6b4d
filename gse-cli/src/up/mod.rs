//! `gse up`: the whole control plane in this process, the local agent as its child.

pub mod data;
pub mod ports;
