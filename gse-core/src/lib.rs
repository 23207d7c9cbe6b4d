//! What every process of the system needs and none should write twice: configuration, logging and metrics, TLS and certificates,
//! lifecycle and signals, the HTTP contract pipeline with authorisation and audit, and the store client.
//!
//! It knows nothing of tasks, agents or files; those belong to the servers.

pub mod audit;
pub mod authz;
pub mod certs;
pub mod clock;
pub mod config;
pub mod http;
pub mod lifecycle;
pub mod log;
pub mod net;
pub mod ops;
pub mod per_address;
pub mod process;
pub mod random;
pub mod rpc;
pub mod store;
pub mod tls;
