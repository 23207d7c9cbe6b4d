//! What every process of the system needs and none should write twice: configuration, logging and metrics, TLS and certificates,
//! lifecycle and signals, the HTTP contract pipeline with authorisation, quotas and audit, the store client, and calls to agents.
//!
//! It knows nothing of tasks, files or what agents do; those belong to the servers.

pub mod audit;
pub mod authz;
pub mod certs;
pub mod clock;
pub mod config;
pub mod fleet;
pub mod http;
pub mod lease;
pub mod lifecycle;
pub mod links;
pub mod log;
pub mod net;
pub mod ops;
pub mod per_address;
pub mod process;
pub mod quota;
pub mod random;
pub mod rpc;
pub mod spool;
pub mod store;
pub mod tls;
