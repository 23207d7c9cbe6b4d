//! The HTTP contract pipeline: everything between a platform's socket and a call of one of our services.
//!
//! A listener ([`serve`]) takes connections within its limits, reads a request head, finds the call, authenticates the caller, asks the
//! policy, reads the body within its limits, runs the [`Service`] and puts the envelope around what comes back. Whatever goes wrong on
//! the way, the caller gets HTTP 200 and an envelope whose `data` has the shape of the call (405 and an envelope for CONNECT, where 200
//! would open a tunnel); only what is not HTTP at all, or has a head over the limits, gets hyper's own 400 or 431. What calls mean is left to the services, shapes and paths to `gse_proto::http`. [`HttpClient`] is the other end, for calls
//! between our own servers.

mod body;
mod client;
mod connection;
mod decode;
mod headers;
mod linger;
mod metrics;
mod pipeline;
mod server;
mod strangers;

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_proto::codes::Code;
use gse_proto::http::Route;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::audit::{Audit, Entry};
use crate::authz::{Authenticator, Caller, Operation};
use crate::tls::{Role, TlsFiles};

pub use body::{BodyError, BodyStream, BoxError, RawBody, empty, full, stream};
pub use client::{ClientConfig, ClientError, ClientReply, HttpClient, forward};
pub use decode::{decode, decode_large};
pub use headers::end_to_end;
pub use metrics::HttpMetrics;
pub use server::serve;

/// Settings of one listener. Every wait and every buffer of it is bounded here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: String,
    /// Certificate for HTTPS, PEM; with `key`.
    pub cert: Option<PathBuf>,
    /// Its private key, PEM.
    pub key: Option<PathBuf>,
    /// Largest body of a request, bytes.
    pub max_body_bytes: usize,
    /// Connections served at once; a few more are told that there are too many, the rest is closed.
    pub max_connections: usize,
    /// Connections from one address that no authenticated call has come on; more are treated like too many connections. 0: any number.
    pub max_strangers_per_address: usize,
    /// Requests worked on at once; more are told to come again.
    pub max_inflight_requests: usize,
    /// Memory for bodies of all requests at once, bytes; what does not fit is told to come again.
    pub max_inflight_body_bytes: usize,
    /// From the connection (or the end of the TLS handshake, which has as long) to the first whole request head, milliseconds.
    pub header_timeout_ms: u64,
    /// For a whole body, milliseconds.
    pub body_timeout_ms: u64,
    /// For a call once its body is there, milliseconds.
    pub request_timeout_ms: u64,
    /// How long a connection may do nothing between requests, milliseconds.
    pub idle_timeout_ms: u64,
}

impl Default for HttpConfig {
    fn default() -> Self {
        HttpConfig {
            listen: "127.0.0.1:0".to_owned(),
            cert: None,
            key: None,
            max_body_bytes: 96 * 1024 * 1024,
            max_connections: 2048,
            max_strangers_per_address: 256,
            max_inflight_requests: 4096,
            max_inflight_body_bytes: 512 * 1024 * 1024,
            header_timeout_ms: 10_000,
            body_timeout_ms: 60_000,
            request_timeout_ms: 30_000,
            idle_timeout_ms: 75_000,
        }
    }
}

impl HttpConfig {
    /// What is wrong with the settings, in words; empty when nothing is.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.cert.is_some() != self.key.is_some() {
            problems.push("cert and key have to be set together".to_owned());
        }
        if self.listen.is_empty() {
            problems.push("listen is empty; give an address and a port, such as 127.0.0.1:28863".to_owned());
        }
        let positive = [
            ("max_body_bytes", self.max_body_bytes as u64),
            ("max_connections", self.max_connections as u64),
            ("max_inflight_requests", self.max_inflight_requests as u64),
            ("header_timeout_ms", self.header_timeout_ms),
            ("body_timeout_ms", self.body_timeout_ms),
            ("request_timeout_ms", self.request_timeout_ms),
            ("idle_timeout_ms", self.idle_timeout_ms),
        ];
        problems.extend(
            positive
                .iter()
                .filter(|(_, value)| *value == 0)
                .map(|(name, _)| format!("{name} has to be positive")),
        );
        if self.max_inflight_body_bytes < self.max_body_bytes {
            problems.push(
                "max_inflight_body_bytes has to be at least max_body_bytes, or no large body ever fits".to_owned(),
            );
        }
        problems
    }

    fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.request_timeout_ms)
    }
}

/// Mutual TLS for a listener of our own servers.
#[derive(Debug, Clone)]
pub struct InternalTls {
    /// Own files.
    pub files: TlsFiles,
    /// Who may connect. A [`Role::Server`] among them may say on whose behalf it calls.
    pub accept: Vec<Role>,
}

/// What the pipeline needs besides the service; one for all listeners of a process.
#[derive(Debug, Clone)]
pub struct Front {
    /// Finds the caller.
    pub authenticator: Authenticator,
    /// Gets a line for every refusal.
    pub audit: Audit,
    /// Counts.
    pub metrics: Arc<HttpMetrics>,
}

/// One call of the contract, authenticated and allowed as far as can be said without looking into the body.
pub struct ContractRequest {
    /// Which call.
    pub route: Route,
    /// The path it came by, normalised.
    pub path: String,
    /// What it needs to be allowed.
    pub operation: Operation,
    /// Who calls.
    pub caller: Caller,
    /// Names the request in logs, the audit trail and the answer.
    pub request_id: String,
    /// `X-Bk-Tenant-Id`; empty when there is none.
    pub tenant: String,
    /// Where it comes from.
    pub peer: SocketAddr,
    /// Its headers, without the credentials.
    pub headers: http::HeaderMap,
    /// The whole body; empty if the service asked for a stream.
    pub body: Bytes,
    /// The body as it arrives, if the service asked for that (see [`Service::streams`]).
    pub stream: Option<BodyStream>,
}

// Bodies and headers may hold passwords.
impl fmt::Debug for ContractRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContractRequest")
            .field("route", &self.route)
            .field("request_id", &self.request_id)
            .field("caller", &self.caller)
            .field("peer", &self.peer)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

impl ContractRequest {
    /// The body as a value; a large one is parsed off the runtime's threads.
    pub async fn decode<T: DeserializeOwned + Send + 'static>(&self) -> Result<T, ApiError> {
        decode_large(&self.body).await
    }

    /// An audit line about this request, to be completed with task, targets and accounts.
    pub fn audit_entry(&self) -> Entry {
        Entry {
            request_id: self.request_id.clone(),
            app: self.caller.app.clone(),
            username: self.caller.username.clone(),
            via: self.caller.via.to_string(),
            peer: self.peer.to_string(),
            operation: self.operation.to_string(),
            ..Entry::default()
        }
    }
}

/// What a service answers.
pub enum Reply {
    /// JSON of `data`; the envelope is put around it. A large one (more than 64 KiB) is not copied: it lives until its last byte has
    /// been handed to the connection or the answer is given up, so that [`Bytes::from_owner`] can tie a share of a budget to it.
    Data(Bytes),
    /// A whole answer from somewhere else, passed on as it is.
    Raw(http::Response<RawBody>),
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reply::Data(data) => write!(f, "Data({} bytes)", data.len()),
            Reply::Raw(response) => write!(f, "Raw({})", response.status()),
        }
    }
}

impl Reply {
    /// `data` from a value.
    pub fn json<T: Serialize>(data: &T) -> Result<Self, ApiError> {
        serde_json::to_vec(data)
            .map(|json| Reply::Data(json.into()))
            .map_err(|error| {
                tracing::error!(%error, "an answer cannot be written as JSON");
                ApiError::from(Code::System)
            })
    }
}

/// Why a call fails: the envelope's code and message, and `data` if it is not the empty shape of the call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// `code` of the envelope.
    pub code: i64,
    /// `message` of the envelope, for people.
    pub message: String,
    /// JSON of `data`; none: the empty shape of the call.
    pub data: Option<Bytes>,
}

impl ApiError {
    /// With a code of the table.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        ApiError {
            code: code.code(),
            message: message.into(),
            data: None,
        }
    }

    /// The body, or something in it, is not acceptable.
    pub fn arguments(message: impl Into<String>) -> Self {
        ApiError::new(Code::Arguments, message)
    }
}

impl From<Code> for ApiError {
    fn from(code: Code) -> Self {
        ApiError::new(code, code.text())
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

impl std::error::Error for ApiError {}

/// What answers calls.
///
/// A call runs in a task of its own: it is not cancelled when its caller goes away, only by `request_timeout_ms`.
pub trait Service: Send + Sync + 'static {
    /// Whether it answers this call.
    fn serves(&self, route: Route) -> bool;

    /// Whether it wants the body of this call as a stream rather than whole.
    fn streams(&self, route: Route) -> bool {
        let _ = route;
        false
    }

    /// Answers a call.
    fn call(&self, request: ContractRequest) -> impl Future<Output = Result<Reply, ApiError>> + Send;
}

#[cfg(test)]
mod tests;
