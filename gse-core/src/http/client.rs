//! The HTTP client for calls between our own servers, and for the operator's command.
//!
//! It never sends a request twice: whether one that failed may be tried elsewhere is for its user to decide, who is told whether it can
//! have been sent ([`ClientError::not_sent`]).

use std::path::PathBuf;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{HttpConnector, capture_connection};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::{Deserialize, Serialize};

use super::{BoxError, RawBody, full};
use crate::tls::{self, Role, TlsError, TlsFiles};

/// Bytes of an answer that may be under way before its reader has taken any.
const STREAM_WINDOW: u32 = 256 * 1024;
/// The same for all answers on one connection: more than all streams together have.
const CONNECTION_WINDOW: u32 = 1 << 30;

/// Settings of a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClientConfig {
    /// Files for mutual TLS with our own servers.
    pub tls: Option<TlsFiles>,
    /// Without `tls`: certificates of the authorities that servers are checked against, PEM. The system's are never used.
    pub ca: Option<PathBuf>,
    /// For a connection, with its TLS handshake, milliseconds.
    pub connect_timeout_ms: u64,
    /// Idle connections kept for each server.
    pub max_idle_per_host: usize,
    /// How long they are kept, milliseconds. Below the servers' idle time, so that a connection is not used as it is being closed.
    pub idle_timeout_ms: u64,
    /// Largest body that [`HttpClient::post_json`] takes, bytes.
    pub max_response_bytes: usize,
}

impl Default for ClientConfig {
    fn default() -> Self {
        ClientConfig {
            tls: None,
            ca: None,
            connect_timeout_ms: 3_000,
            max_idle_per_host: 64,
            idle_timeout_ms: 50_000,
            max_response_bytes: 128 * 1024 * 1024,
        }
    }
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no connection to the server; nothing was sent.
    #[error("cannot connect to {server}: {reason}")]
    Connect {
        /// Scheme and address.
        server: String,
        /// Why.
        reason: String,
    },
    /// The server has said that it did not begin with it: it is closing the connection, say.
    #[error("{server} does not take the request: {reason}")]
    NotTaken {
        /// Scheme and address.
        server: String,
        /// Why.
        reason: String,
    },
    /// It failed after it may have been sent.
    #[error("request to {server} failed: {reason}")]
    Failed {
        /// Scheme and address.
        server: String,
        /// Why.
        reason: String,
    },
    /// No answer in time; it may have been sent.
    #[error("no answer from {server} within {waited:?}")]
    Timeout {
        /// Scheme and address.
        server: String,
        /// The time given.
        waited: Duration,
    },
    /// The answer is larger than allowed.
    #[error("the answer of {server} is larger than {limit} bytes")]
    TooLarge {
        /// Scheme and address.
        server: String,
        /// The limit.
        limit: usize,
    },
    /// The request itself is not possible.
    #[error("bad request: {0}")]
    Request(String),
}

impl ClientError {
    /// Whether it is certain that the server has done nothing with the request, so that it may be sent to another one.
    pub fn not_sent(&self) -> bool {
        matches!(
            self,
            ClientError::Connect { .. } | ClientError::NotTaken { .. } | ClientError::Request(_)
        )
    }
}

/// An answer with its body.
#[derive(Debug, Clone)]
pub struct ClientReply {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

/// A client with its pool of connections. Cheap to clone.
#[derive(Clone)]
pub struct HttpClient {
    client: Client<HttpsConnector<HttpConnector>, RawBody>,
    connect_timeout: Duration,
    max_response: usize,
}

impl HttpClient {
    /// Makes a client; reads certificate files (blocking, small).
    pub fn new(config: &ClientConfig) -> Result<Self, TlsError> {
        let connect_timeout = Duration::from_millis(config.connect_timeout_ms.max(1));
        let tls_config = match (&config.tls, &config.ca) {
            (Some(files), _) => rustls::ClientConfig::clone(&*tls::client_config(files, Role::Server, &[])?),
            (None, Some(ca)) => tls::https_client_config(ca)?,
            (None, None) => rustls::ClientConfig::builder_with_provider(tls::provider())
                .with_safe_default_protocol_versions()?
                .with_root_certificates(rustls::RootCertStore::empty()) // trusts nobody: plain HTTP only
                .with_no_client_auth(),
        };
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(connect_timeout));
        tcp.set_keepalive(Some(Duration::from_secs(30)));
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls_config)
            .https_or_http()
            .enable_all_versions()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_millis(config.idle_timeout_ms))
            .pool_max_idle_per_host(config.max_idle_per_host)
            .retry_canceled_requests(false)
            // Without these a connection that has silently died is used until the kernel gives it up, many minutes later.
            .http2_keep_alive_interval(Duration::from_secs(10))
            .http2_keep_alive_timeout(Duration::from_secs(10))
            .http2_keep_alive_while_idle(true)
            // Each call has a window of its own; the connection's is never the narrow place, or a few callers that do not read
            // their answers would stop everybody's.
            .http2_initial_stream_window_size(STREAM_WINDOW)
            .http2_initial_connection_window_size(CONNECTION_WINDOW)
            .build(connector);
        Ok(HttpClient {
            client,
            connect_timeout,
            max_response: config.max_response_bytes,
        })
    }

    /// Sends a request and returns when the head of the answer is there, at most `deadline` later; the body comes as a stream, which its
    /// reader has to bound in size and time.
    pub async fn request(
        &self,
        mut request: Request<RawBody>,
        deadline: Duration,
    ) -> Result<Response<Incoming>, ClientError> {
        let server = server_of(request.uri());
        let mut connection = capture_connection(&mut request);
        // A server that hangs may accept a connection and then say nothing, not even its part of the TLS handshake.
        let unconnected = async {
            let waiting = connection.wait_for_connection_metadata();
            if tokio::time::timeout(self.connect_timeout, waiting).await.is_ok() {
                std::future::pending::<()>().await;
            }
        };
        let outcome = tokio::select! {
            biased;
            outcome = tokio::time::timeout(deadline, self.client.request(request)) => outcome,
            () = unconnected => {
                let reason = format!("no connection within {:?}", self.connect_timeout);
                return Err(ClientError::Connect { server, reason });
            }
        };
        match outcome {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => {
                let reason = reasons(&error);
                Err(if error.is_connect() {
                    ClientError::Connect { server, reason }
                } else if is_not_taken(&error) {
                    ClientError::NotTaken { server, reason }
                } else {
                    ClientError::Failed { server, reason }
                })
            }
            Err(_) => Err(ClientError::Timeout {
                server,
                waited: deadline,
            }),
        }
    }

    /// Posts JSON and reads the whole answer, all within `deadline`.
    pub async fn post_json(
        &self,
        url: &str,
        headers: HeaderMap,
        body: Bytes,
        deadline: Duration,
    ) -> Result<ClientReply, ClientError> {
        let uri: Uri = url
            .parse()
            .map_err(|error| ClientError::Request(format!("{url:?} is not a URL: {error}")))?;
        let server = server_of(&uri);
        let mut request = Request::new(full(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        request
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let started = tokio::time::Instant::now();
        let (head, body) = self.request(request, deadline).await?.into_parts();
        let left = deadline.saturating_sub(started.elapsed());
        match tokio::time::timeout(left, self.read(body, &server)).await {
            Ok(body) => Ok(ClientReply {
                status: head.status,
                headers: head.headers,
                body: body?,
            }),
            Err(_) => Err(ClientError::Timeout {
                server,
                waited: deadline,
            }),
        }
    }

    /// How long a connection may take.
    pub fn connect_timeout(&self) -> Duration {
        self.connect_timeout
    }

    async fn read(&self, mut body: Incoming, server: &str) -> Result<Bytes, ClientError> {
        let too_large = || ClientError::TooLarge {
            server: server.to_owned(),
            limit: self.max_response,
        };
        let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        if announced > self.max_response {
            return Err(too_large());
        }
        let mut whole = BytesMut::with_capacity(announced.min(1024 * 1024));
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| ClientError::Failed {
                server: server.to_owned(),
                reason: reasons(&error),
            })?;
            if let Ok(data) = frame.into_data() {
                if data.len() > self.max_response - whole.len() {
                    return Err(too_large());
                }
                whole.extend_from_slice(&data);
            }
        }
        Ok(whole.freeze())
    }
}

/// An answer's body as one that can be passed on.
pub fn forward(body: Incoming) -> RawBody {
    body.map_err(BoxError::from).boxed_unsync()
}

/// Scheme and address of a URL: paths and queries do not belong in errors.
fn server_of(uri: &Uri) -> String {
    let host = uri
        .authority()
        .map_or("", |authority| authority.as_str().rsplit('@').next().unwrap_or(""));
    format!("{}://{host}", uri.scheme_str().unwrap_or("http"))
}

/// Whether HTTP/2 says that the server has not begun with a request: it came after the last one that the server takes on a connection
/// that it closes, or was refused.
fn is_not_taken(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            let left_out = error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
            let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
            return error.is_remote() && (left_out || refused);
        }
        next = error.source();
    }
    false
}

/// An error with its causes, which is where the reason is.
fn reasons(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
