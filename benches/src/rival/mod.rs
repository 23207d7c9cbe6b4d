//! The same shape of a fan-out over what others would take: a tonic stream over mutual TLS, and nats-server in plaintext.
//!
//! [`agents`] is the many in one process, [`grpc`] the server of the one kind, [`nats`] the wire protocol of the other; what is
//! compared with what is `compare`'s business.

pub(crate) mod agents;
pub(crate) mod grpc;
pub(crate) mod nats;

/// The generated service.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub(crate) mod wire {
    tonic::include_proto!("gse.bench.rival.v1");
}

/// Bytes of a task and of a reply.
pub(crate) const TASK: usize = 256;
pub(crate) const REPLY: usize = 64;
