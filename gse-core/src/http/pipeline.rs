//! One request, from its head to the envelope.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use gse_proto::codes::Code;
use gse_proto::http::{Envelope, Route, by_method, envelope, normalise};
use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, EXPECT};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tracing::Instrument;

use super::body::{Answer, BodyError, BodyStream, Budget, PIECE, Share, discard, read_whole, until};
use super::connection::{Activity, Clock};
use super::metrics::{Held, class};
use super::strangers::Guest;
use super::{ApiError, ContractRequest, Front, HttpConfig, Reply, Service};
use crate::audit::{Decision, Entry};
use crate::authz::Operation;
use crate::lifecycle::Lifecycle;
use crate::tls::PeerIdentity;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-bkapi-request-id");
const REQUEST_ID_OTHER: HeaderName = HeaderName::from_static("x-request-id");
const TENANT: HeaderName = HeaderName::from_static("x-bk-tenant-id");
/// What a service has no business with.
const CREDENTIALS: [&str; 5] = [
    "x-bkapi-authorization",
    "x-bkapi-jwt",
    "x-bkapi-app-secret",
    "authorization",
    "proxy-authorization",
];
/// How long the rest of a refused body is read to nowhere.
const LINGER: Duration = Duration::from_secs(5);

/// What all connections of a listener share.
pub(super) struct Shared<S> {
    pub(super) service: Arc<S>,
    pub(super) front: Front,
    pub(super) config: HttpConfig,
    pub(super) name: &'static str,
    pub(super) life: Lifecycle,
    pub(super) inflight: Arc<Semaphore>,
    pub(super) budget: Budget,
}

/// What the requests of one connection share.
pub(super) struct Connection {
    pub(super) peer: SocketAddr,
    pub(super) identity: Option<PeerIdentity>,
    pub(super) seat: Seat,
    pub(super) clock: Arc<Clock>,
}

/// A connection's place in its listener.
pub(super) enum Seat {
    /// One of those that are served.
    Regular(Guest),
    /// There were too many connections already when it came, so that it is only told so.
    Surplus(#[expect(dead_code, reason = "held until the connection ends")] OwnedSemaphorePermit),
}

/// A failure, and whether the connection is of further use.
struct Failure {
    error: ApiError,
    close: bool,
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Failure { error, close: false }
    }
}

impl From<Code> for Failure {
    fn from(code: Code) -> Self {
        ApiError::from(code).into()
    }
}

/// Answers a request, whatever it is.
pub(super) async fn handle<S: Service>(
    shared: Arc<Shared<S>>,
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Response<Answer>, Infallible> {
    let started = Instant::now();
    let activity = connection.clock.request();
    let (mut head, body) = request.into_parts();
    let request_id = request_id(&head.headers);
    let mut path = normalise(head.uri.path()).into_owned();
    if let Some(other) = by_method(head.method.as_str(), &path) {
        // Said by the path from here on.
        path = other.to_owned();
        head.method = Method::POST;
    }
    let route = Route::lookup(&path);
    let version = head.version;
    let tunnel = head.method == Method::CONNECT;
    // The rest of a body that is not wanted is read away, unless the caller waits to be told to send it.
    let linger = version < Version::HTTP_2 && !head.headers.contains_key(EXPECT);
    let mut body = Some(body);
    let exchange = Exchange {
        shared: &shared,
        connection: &connection,
        request_id: &request_id,
        activity: &activity,
    };
    let outcome = match AssertUnwindSafe(exchange.run(head, path, route, &mut body))
        .catch_unwind()
        .await
    {
        Ok(outcome) => outcome,
        Err(_) => {
            tracing::error!(%request_id, "the HTTP pipeline panicked");
            Err(Failure {
                error: Code::System.into(),
                close: true,
            })
        }
    };
    if let Some(rest) = body
        .take()
        .filter(|rest| linger && !hyper::body::Body::is_end_stream(rest))
    {
        shared
            .life
            .spawn_contained("http-linger", discard(rest, activity.clone(), LINGER));
    }
    let label = route.map_or("unknown", Route::path);
    let (class, mut response, close) = match outcome {
        Ok(Reply::Raw(raw)) => {
            let (mut parts, raw) = raw.into_parts();
            parts.headers = super::end_to_end(&parts.headers);
            let raw = if route.is_some_and(Route::is_endless) {
                until(raw, shared.life.drain_token())
            } else {
                raw
            };
            ("raw", Response::from_parts(parts, Answer::stream(raw, activity)), false)
        }
        Ok(Reply::Data(data)) => {
            let answer = enveloped(Code::Ok.code(), "", data, &request_id, activity);
            ("ok", answer, false)
        }
        Err(Failure { error, close }) => {
            tracing::debug!(%request_id, route = label, code = error.code, "answered with an error");
            let shape = route.map_or(&b"{}"[..], |route| route.shape().empty());
            let data = error.data.unwrap_or(Bytes::from_static(shape));
            let answer = enveloped(error.code, &error.message, data, &request_id, activity);
            (class(error.code), answer, close)
        }
    };
    if tunnel {
        // Any 2xx would say that the tunnel is open, and would have no body.
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
    }
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    if (close || matches!(connection.seat, Seat::Surplus(_))) && version < Version::HTTP_2 {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    shared
        .front
        .metrics
        .answered(shared.name, label, class, started.elapsed());
    Ok(response)
}

/// HTTP 200 whatever the envelope says: some clients look no further than a status they do not like.
fn enveloped(code: i64, message: &str, data: Bytes, request_id: &str, activity: Activity) -> Response<Answer> {
    let answer = if data.len() > PIECE {
        // Not copied, so that it does not take its memory twice, and so that a service can tell by its `Bytes` when it has gone out.
        let (head, tail) = Envelope::parts(code, message, request_id);
        Answer::around(head.into(), data, tail.into(), activity)
    } else {
        // One piece is one packet, and cheaper than three.
        Answer::whole(envelope(code, message, &data, request_id), activity)
    };
    let mut response = Response::new(answer);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

struct Exchange<'a, S> {
    shared: &'a Arc<Shared<S>>,
    connection: &'a Connection,
    request_id: &'a str,
    activity: &'a Activity,
}

impl<S: Service> Exchange<'_, S> {
    async fn run(
        &self,
        head: http::request::Parts,
        path: String,
        route: Option<Route>,
        body: &mut Option<Incoming>,
    ) -> Result<Reply, Failure> {
        let shared = self.shared;
        if shared.life.is_draining() {
            return Err(Failure {
                error: Code::Draining.into(),
                close: true,
            });
        }
        if matches!(self.connection.seat, Seat::Surplus(_)) {
            let error = ApiError::new(Code::Limit, "too many connections, try again later");
            return Err(Failure { error, close: true });
        }
        if head.method == Method::CONNECT {
            let error = ApiError::new(
                Code::Method,
                "this is not a proxy: method CONNECT is not allowed, use POST",
            );
            return Err(Failure { error, close: true });
        }
        let route = route.filter(|route| shared.service.serves(*route)).ok_or_else(|| {
            ApiError::new(
                Code::NoSuchCall,
                format!(
                    "no such call: {}",
                    path.chars().take(128).collect::<String>().escape_debug()
                ),
            )
        })?;
        if head.method != Method::POST && !(head.method == Method::GET && route.allows_get(&path)) {
            return Err(ApiError::new(
                Code::Method,
                format!("method {} is not allowed here, use POST", clip(head.method.as_str())),
            )
            .into());
        }
        let (caller, operation) = self.admit(&head.headers, route).await?;
        let permit = Arc::clone(&shared.inflight)
            .try_acquire_owned()
            .map_err(|_| ApiError::new(Code::Limit, "too many requests at once, try again later"))?;
        let counted = shared.front.metrics.inflight(shared.name);

        let mut share = Share::none(&shared.budget);
        let limit = shared.config.max_body_bytes;
        let allowed = Duration::from_millis(shared.config.body_timeout_ms);
        let (whole, stream) = if shared.service.streams(route) {
            let incoming = body.take().ok_or(Code::System)?;
            let stream = BodyStream::new(incoming, limit, allowed, self.activity).map_err(|(error, rest)| {
                *body = Some(rest);
                self.refuse_body(error)
            })?;
            (Bytes::new(), Some(stream))
        } else {
            let incoming = body.as_mut().ok_or(Code::System)?;
            let whole = read_whole(incoming, limit, allowed, &mut share, self.activity)
                .await
                .map_err(|error| self.refuse_body(error))?;
            (whole, None)
        };
        let mut headers = head.headers;
        for name in CREDENTIALS {
            headers.remove(name);
        }
        let request = ContractRequest {
            route,
            path,
            operation,
            caller,
            request_id: self.request_id.to_owned(),
            tenant: tenant(&headers),
            peer: self.connection.peer,
            headers,
            body: whole,
            stream,
        };
        self.dispatch(
            request,
            Load {
                _permit: permit,
                _counted: counted,
                _share: share,
            },
        )
        .await
        .map_err(Failure::from)
    }

    /// Who calls, and whether this call is open to them at all. Refusals leave a line in the audit trail.
    async fn admit(&self, headers: &HeaderMap, route: Route) -> Result<(crate::authz::Caller, Operation), ApiError> {
        let front = &self.shared.front;
        let operation: Operation = route.operation_name().parse().map_err(|error| {
            tracing::error!(%error, ?route, "a call without an operation");
            ApiError::from(Code::System)
        })?;
        let entry = Entry {
            request_id: self.request_id.to_owned(),
            peer: self.connection.peer.to_string(),
            operation: operation.to_string(),
            ..Entry::default()
        };
        let caller = match front.authenticator.authenticate(
            headers,
            self.connection.peer.ip(),
            self.connection.identity.as_ref(),
        ) {
            Ok(caller) => {
                if let Seat::Regular(guest) = &self.connection.seat {
                    guest.known();
                }
                caller
            }
            Err(error) => {
                let reason = error.detail();
                let app = error.claimed_app().unwrap_or_default();
                tracing::info!(request_id = self.request_id, peer = %self.connection.peer, app, reason, "refused an unauthenticated call");
                let entry = Entry {
                    app: app.to_owned(),
                    decision: Decision::Unauthenticated,
                    reason: Some(reason),
                    ..entry
                };
                self.note(entry).await;
                return Err(ApiError::new(Code::Unauthenticated, error.to_string()));
            }
        };
        if let Err(denied) = front.authenticator.policy().check_operation(&caller, operation) {
            tracing::info!(request_id = self.request_id, peer = %self.connection.peer, reason = %denied, "refused a call");
            let entry = Entry {
                app: caller.app,
                username: caller.username,
                via: caller.via.to_string(),
                ..entry
            };
            self.note(entry.refused(denied.to_string())).await;
            return Err(ApiError::new(Code::Forbidden, denied.to_string()));
        }
        Ok((caller, operation))
    }

    /// Writes down a refusal. If that fails the call is refused all the same, so the failure is only logged (by the trail itself).
    async fn note(&self, entry: Entry) {
        if let Err(error) = self.shared.front.audit.record(entry).await {
            tracing::debug!(request_id = self.request_id, %error, "a refusal is not in the audit trail");
        }
    }

    fn refuse_body(&self, error: BodyError) -> Failure {
        let (code, reason, close) = match &error {
            BodyError::TooLarge(_) => (Code::BodyTooLarge, "too_large", true),
            BodyError::Budget => (Code::Limit, "budget", true),
            BodyError::Slow(_) => (Code::Timeout, "slow", true),
            BodyError::Incomplete(_) => (Code::Arguments, "incomplete", true),
        };
        self.shared.front.metrics.refused_body(self.shared.name, reason);
        Failure {
            error: ApiError::new(code, error.to_string()),
            close,
        }
    }

    /// Runs the call in a task of its own, so that a caller who goes away does not stop it half-way.
    async fn dispatch(&self, request: ContractRequest, load: Load) -> Result<Reply, ApiError> {
        let service = Arc::clone(&self.shared.service);
        let limit = if request.stream.is_some() {
            // The body arrives while the call runs.
            self.shared.config.request_timeout() + Duration::from_millis(self.shared.config.body_timeout_ms)
        } else {
            self.shared.config.request_timeout()
        };
        let span = tracing::info_span!("call", request_id = self.request_id, route = request.route.path());
        let activity = self.activity.clone();
        let (answer, answered) = oneshot::channel();
        let call = async move {
            let call = AssertUnwindSafe(async { service.call(request).await }).catch_unwind();
            let outcome = match tokio::time::timeout(limit, call).await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(payload)) => {
                    tracing::error!("a call panicked: {}", crate::lifecycle::panic_text(payload.as_ref()));
                    Err(Code::System.into())
                }
                Err(_) => Err(ApiError::new(
                    Code::Timeout,
                    format!("not answered within {limit:?}; it is not known what was done"),
                )),
            };
            drop(load);
            activity.touch();
            // Nobody listens when the caller has gone away.
            drop(answer.send(outcome));
        };
        self.shared.life.spawn_contained("http-call", call.instrument(span));
        // Not `Draining`: that says that nothing was done.
        answered.await.unwrap_or_else(|_| {
            let text = "the server left before the call was answered; it is not known what was done";
            Err(ApiError::new(Code::Timeout, text))
        })
    }
}

/// What a call takes of the listener's limits, until it has ended.
struct Load {
    _permit: OwnedSemaphorePermit,
    _counted: Held,
    _share: Share,
}

/// The caller's name for the request if it is a sane one, otherwise a new one.
fn request_id(headers: &HeaderMap) -> String {
    let sane = |id: &str| {
        (1..=64).contains(&id.len())
            && id
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte))
    };
    [REQUEST_ID, REQUEST_ID_OTHER]
        .iter()
        .filter_map(|name| headers.get(name)?.to_str().ok())
        .find(|id| sane(id))
        .map_or_else(|| uuid::Uuid::new_v4().simple().to_string(), str::to_owned)
}

fn tenant(headers: &HeaderMap) -> String {
    let tenant = headers
        .get(TENANT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .trim();
    if tenant.len() <= 64 {
        tenant.to_owned()
    } else {
        String::new()
    }
}

fn clip(text: &str) -> &str {
    text.get(..16).unwrap_or(text)
}
