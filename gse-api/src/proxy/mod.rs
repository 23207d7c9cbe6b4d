//! Calls of other services, passed through: body in and answer out as streams, over mutual TLS, on behalf of the caller.
//!
//! A call is offered to one server of a service after the other as long as it is certain that none of them has done anything: none
//! could be connected to, or had taken a byte, or each said that it was stopping and had not begun. What may have been carried out is
//! never sent again, and the caller is told what is known; except for calls that may be made any number of times (reads, and asking
//! for an end), which get one more chance elsewhere. Which call belongs to which service is gse-proto's; what it does there is the
//! service's.

mod answer;
mod body;
mod metrics;
mod nodes;
mod upstream;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use gse_core::http::{
    ApiError, BodyError, ClientConfig, ClientError, ContractRequest, HttpClient, RawBody, Reply, full,
};
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use gse_core::store::Store;
use gse_core::tls::{TlsError, TlsFiles};
use gse_proto::codes::Code;
use gse_proto::http::{Owner, Route, TaskStateQuery};
use gse_proto::ids::TaskId;
use http::header::{ACCEPT_LANGUAGE, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri};
use prometheus_client::registry::Registry;
use tokio::time::Instant;

use self::answer::Answer;
use self::body::{Replay, Upload};
use self::metrics::NodeMetrics;
use self::nodes::Nodes;
use self::upstream::{InFlight, Pool, Server, ServerId};
use crate::config::{Config, Limits};

const TENANT: HeaderName = HeaderName::from_static("x-bk-tenant-id");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-bkapi-request-id");
const LANGUAGE: HeaderName = HeaderName::from_static("blueking-language");

/// How often a call is offered anew because a connection ended just then; the pool may hold some that have.
const STALE: usize = 3;

/// How long a call that waits for its turn at a server still gets when it turns out that the server is gone. Its connection may have
/// ended without the call being told.
const GONE: Duration = Duration::from_millis(250);

/// Why a server has not answered.
enum Unanswered {
    /// The request failed.
    Failed(ClientError),
    /// For this long the server has not asked for any of the body.
    Ignored(Duration),
    /// The server has gone, and has not asked for any of the body.
    Gone,
}

/// What became of one attempt.
enum Attempt {
    /// There is an answer, or none that another server could give.
    Over(Result<Reply, ApiError>),
    /// Nothing was done: it could not be reached, or said that it is stopping.
    Unreachable,
    /// Nothing was done: the connection ended just then. The server may be there all the same.
    Stale,
    /// Nothing was done: it has no room.
    Busy,
    /// It was lost on the way and may have been carried out; what to tell the caller.
    Lost(ApiError),
}

/// A service and its servers.
struct Upstream {
    owner: Owner,
    name: &'static str,
    pool: Arc<Pool>,
    /// Where the servers are found; none for a fixed list.
    nodes: Option<Arc<Nodes>>,
}

/// The way to the other services.
pub struct Proxy {
    upstreams: Vec<Upstream>,
    client: ArcSwap<HttpClient>,
    tls: TlsFiles,
    limits: Limits,
    /// How long a call waits for a node when none is alive.
    wait: Duration,
    upload_timeout: Duration,
    replay: Replay,
    metrics: NodeMetrics,
}

impl Proxy {
    /// Reads the certificates (blocking, small) if there is any service to reach.
    ///
    /// # Errors
    /// The certificate files are not usable.
    pub fn new(config: &Config, registry: &mut Registry) -> Result<Self, TlsError> {
        let metrics = NodeMetrics::default();
        metrics.register(registry);
        let upstreams: Vec<Upstream> = [Owner::Task, Owner::File, Owner::Proc, Owner::Data, Owner::Sync]
            .into_iter()
            .filter_map(|owner| {
                let (name, addresses) = config.upstreams.of(owner)?;
                let pool = Arc::new(Pool::default());
                let kind = match owner {
                    Owner::Task => Some(nodes::TASK),
                    Owner::File => Some(nodes::FILE),
                    Owner::Proc => Some(nodes::PROC),
                    _ => None,
                };
                let kind = kind.filter(|_| config.finds_nodes(addresses));
                let nodes = kind.map(|kind| {
                    let every = Duration::from_millis(config.upstreams.discover_ms);
                    Arc::new(Nodes::new(kind, Arc::clone(&pool), metrics.clone(), every))
                });
                let found = nodes.is_some();
                let fixed = |address: &String| ServerId {
                    node: address.clone(),
                    life: 0,
                    address: address.clone(),
                };
                pool.set(addresses.iter().map(fixed).collect(), |id| metrics.of(name, &id.node));
                (found || !addresses.is_empty()).then_some(Upstream {
                    owner,
                    name,
                    pool,
                    nodes,
                })
            })
            .collect();
        let client = client(&config.tls, &config.limits, !upstreams.is_empty())?;
        Ok(Self {
            upstreams,
            client: ArcSwap::from_pointee(client),
            tls: config.tls.clone(),
            limits: config.limits.clone(),
            wait: Duration::from_millis(config.upstreams.wait_ms),
            upload_timeout: Duration::from_millis(config.http.body_timeout_ms),
            replay: Replay::new(config.limits.replay_bytes, config.limits.replay_total_bytes),
            metrics,
        })
    }

    /// Finds the nodes of the services that are found through the store, and goes on doing so.
    pub async fn find_nodes(&self, store: &Store, health: &Health, life: &Lifecycle) {
        for nodes in self.upstreams.iter().filter_map(|upstream| upstream.nodes.clone()) {
            nodes.watch(store.clone(), health.clone(), life).await;
        }
    }

    /// Takes new certificate files into use whenever a reload is asked for.
    pub fn follow_reloads(self: &Arc<Self>, life: &Lifecycle) {
        if self.upstreams.is_empty() {
            return;
        }
        let (this, owner, mut reloads) = (self.clone(), life.clone(), life.reloads());
        life.spawn("upstream certificates", async move {
            loop {
                tokio::select! {
                    () = owner.draining() => return,
                    Ok(()) = reloads.changed() => {}
                }
                let proxy = this.clone();
                let read = tokio::task::spawn_blocking(move || client(&proxy.tls, &proxy.limits, true)).await;
                match read.context("reading them") {
                    Ok(Ok(client)) => this.client.store(Arc::new(client)),
                    Ok(Err(error)) => tracing::error!("the certificates in use stay: {error}"),
                    Err(error) => tracing::error!("the certificates in use stay: {error:#}"),
                }
            }
        });
    }

    /// Passes a call to the service that owns it.
    ///
    /// # Errors
    /// The service is not installed or not reachable, does not answer in time, or the caller's body did not arrive.
    pub async fn pass(&self, mut request: ContractRequest) -> Result<Reply, ApiError> {
        let owner = owner_of(&request);
        let Some(upstream) = self.upstreams.iter().find(|upstream| upstream.owner == owner) else {
            return Err(not_installed(owner));
        };
        let upload = match request.stream.take() {
            None => Ok(Upload::new(full(request.body.clone()), &self.replay)),
            Some(stream) => Upload::begun(stream, &self.replay).await.map_err(refuse_body),
        };
        let outcome = match upload {
            Ok(upload) => self.offer(&request, upstream, &upload).await,
            Err(error) => Err(error),
        };
        let word = match &outcome {
            Ok(_) => "answered",
            Err(error) if error.code == Code::ServiceUnavailable.code() => "unavailable",
            Err(error) if error.code == Code::StoreUnavailable.code() => "unavailable",
            Err(error) if error.code == Code::Timeout.code() => "timeout",
            Err(_) => "caller",
        };
        self.metrics.outcome(upstream.name, word);
        outcome
    }

    /// Offers the call to one server after the other; when none is left, waits a moment for new ones if they are looked for.
    async fn offer(&self, request: &ContractRequest, upstream: &Upstream, upload: &Upload) -> Result<Reply, ApiError> {
        let client = self.client.load_full();
        let service = upstream.name;
        let deadline = Instant::now() + self.wait;
        let mut tried: Vec<Arc<Server>> = Vec::new();
        let (mut unreachable, mut busy) = (Vec::new(), Vec::new());
        let mut lost: Option<ApiError> = None;
        let mut stale = 0;
        loop {
            let order = upstream.pool.order();
            let next = order
                .iter()
                .find(|server| !tried.iter().any(|tried| Arc::ptr_eq(tried, server)));
            let Some(server) = next else {
                match &upstream.nodes {
                    Some(nodes) if Instant::now() < deadline && nodes.may_come() => nodes.look_soon(deadline).await,
                    _ => break,
                }
                continue;
            };
            // None: it was given out, and is too large to have been kept.
            let Some(body) = upload.offer() else {
                if unreachable.is_empty() {
                    unreachable.push(server.address().to_owned());
                }
                break;
            };
            tried.push(Arc::clone(server));
            let others = order.len() > 1 && lost.is_none();
            let held = upstream.pool.begin(server);
            match self
                .attempt(&client, request, service, held, server, body, upload, others)
                .await?
            {
                Attempt::Over(outcome) => return outcome,
                Attempt::Stale if stale < STALE => {
                    stale += 1;
                    tried.pop();
                }
                Attempt::Busy => busy.push(server.address().to_owned()),
                Attempt::Unreachable | Attempt::Stale => {
                    unreachable.push(server.address().to_owned());
                    // What the list says of it is no longer true.
                    if let Some(nodes) = &upstream.nodes {
                        nodes.nudge();
                    }
                }
                Attempt::Lost(error) => {
                    if lost.is_some() || !repeatable(request.route) {
                        return Err(error);
                    }
                    lost = Some(error);
                }
            }
        }
        if let Some(error) = lost {
            return Err(error);
        }
        if let (Some(nodes), true) = (&upstream.nodes, tried.is_empty()) {
            let (text, store) = nodes.nobody();
            let code = if store {
                Code::StoreUnavailable
            } else {
                Code::ServiceUnavailable
            };
            return Err(ApiError::new(code, text));
        }
        let mut reasons = Vec::new();
        for (what, servers) in [("cannot be reached", &unreachable), ("takes no more calls", &busy)] {
            if !servers.is_empty() {
                reasons.push(format!("{what} at {}", servers.join(", ")));
            }
        }
        Err(ApiError::new(
            Code::ServiceUnavailable,
            format!(
                "gse_{service} {}; nothing was done, try again later",
                reasons.join(" and ")
            ),
        ))
    }

    /// Offers the call to one server.
    #[expect(
        clippy::too_many_arguments,
        reason = "all of one attempt; a struct would only name them twice"
    )]
    async fn attempt(
        &self,
        client: &HttpClient,
        request: &ContractRequest,
        service: &'static str,
        held: InFlight,
        server: &Server,
        body: RawBody,
        upload: &Upload,
        others: bool,
    ) -> Result<Attempt, ApiError> {
        let repeat = repeatable(request.route);
        let full = Duration::from_millis(self.limits.upstream_timeout_ms);
        let patience = if repeat && others {
            full.min(Duration::from_millis(self.limits.read_timeout_ms))
        } else {
            full
        };
        let outgoing = outgoing(server.address(), request, body)?;
        let error = match self.send(client, outgoing, upload, server, patience).await {
            Ok(response) => {
                let whole = if repeat { answer::SMALL } else { answer::TINY };
                let idle = Duration::from_millis(self.limits.upstream_idle_timeout_ms);
                match answer::take(service, server.address(), response, idle, whole, held).await {
                    Answer::Passed(outcome) => {
                        server.answered();
                        return Ok(Attempt::Over(outcome));
                    }
                    Answer::Stopping => {
                        upload.withdraw();
                        server.leaves();
                        tracing::info!(service, node = server.node(), "is stopping; the call goes elsewhere");
                        return Ok(Attempt::Unreachable);
                    }
                    Answer::Broken(error) => error,
                }
            }
            Err(Unanswered::Failed(error)) => error,
            Err(Unanswered::Gone) => {
                tracing::info!(service, node = server.node(), "is gone; the call goes elsewhere");
                return Ok(Attempt::Unreachable);
            }
            Err(Unanswered::Ignored(waited)) => ClientError::Timeout {
                server: server.address().to_owned(),
                waited,
            },
        };
        let untouched = upload.withdraw();
        if let Some(error) = upload.failure() {
            // The caller's fault, not the server's.
            return Err(refuse_body(error));
        }
        if untouched && !upload.is_empty() && matches!(error, ClientError::Timeout { .. }) {
            // Its connection is there and full of other calls, which says nothing against the server.
            tracing::warn!(service, server = server.address(), "takes no more calls");
            return Ok(Attempt::Busy);
        }
        let untaken = matches!(error, ClientError::NotTaken { .. });
        if untaken || (untouched && !upload.is_empty() && matches!(error, ClientError::Failed { .. })) {
            tracing::debug!(service, node = server.node(), "{error}; the call is offered again");
            return Ok(Attempt::Stale);
        }
        server.failed();
        // A server that has not been given the first byte of a body cannot have carried the call out, whatever it has of the head.
        if untouched && (error.not_sent() || !upload.is_empty()) {
            tracing::warn!(service, node = server.node(), "{error}");
            return Ok(Attempt::Unreachable);
        }
        let (code, text) = match error {
            ClientError::Timeout { .. } => (Code::Timeout, "did not answer in time"),
            _ => (Code::ServiceUnavailable, "was lost before it answered"),
        };
        tracing::warn!(
            service,
            node = server.node(),
            "{error}; the call may have been carried out"
        );
        let text = format!(
            "gse_{service} at {} {text}; the call may have been carried out",
            server.address()
        );
        Ok(Attempt::Lost(ApiError::new(code, text)))
    }

    /// Sends the request; the time for an answer begins when the whole body has gone out.
    async fn send(
        &self,
        client: &HttpClient,
        request: Request<RawBody>,
        upload: &Upload,
        to: &Server,
        patience: Duration,
    ) -> Result<Response<hyper::body::Incoming>, Unanswered> {
        let server = request.uri().authority().map(ToString::to_string).unwrap_or_default();
        let sending = client.request(request, self.upload_timeout + patience);
        // The connection has a time limit of its own; what then keeps the call is a connection that is full of other calls.
        let queueing = client.connect_timeout() + patience;
        let gone = async {
            to.gone().await;
            upload.ignored_for(GONE).await;
        };
        tokio::select! {
            response = sending => response.map_err(Unanswered::Failed),
            () = upload.sent_and(patience) => Err(Unanswered::Failed(ClientError::Timeout { server, waited: patience })),
            () = upload.ignored_for(queueing) => Err(Unanswered::Ignored(queueing)),
            () = gone => Err(Unanswered::Gone),
        }
    }
}

/// The service that owns a call. The state of a task is asked of whoever has tasks of its kind.
fn owner_of(request: &ContractRequest) -> Owner {
    let of_files = || {
        let query: TaskStateQuery = serde_json::from_slice(&request.body).ok()?;
        TaskId::parse(&query.task_id).ok()?.file_instance().map(drop)
    };
    if request.route == Route::TaskState && of_files().is_some() {
        return Owner::File;
    }
    request.route.owner()
}

/// Whether a call may be made twice: what it does the second time is the same, or nothing.
fn repeatable(route: Route) -> bool {
    matches!(route, Route::TerminateScript | Route::TerminateTransfer) || route.operation_name().ends_with(".read")
}

fn client(tls: &TlsFiles, limits: &Limits, needed: bool) -> Result<HttpClient, TlsError> {
    HttpClient::new(&ClientConfig {
        tls: needed.then(|| tls.clone()),
        connect_timeout_ms: limits.connect_timeout_ms,
        ..ClientConfig::default()
    })
}

fn not_installed(owner: Owner) -> ApiError {
    let (what, key) = match owner {
        Owner::Api => ("this call", "api"),
        // Its nodes are found through the store once there is a certificate to call them with.
        Owner::Task => ("the task service", "task, or tls"),
        Owner::File => ("file transfer", "file, or tls"),
        Owner::Proc => ("process management", "proc, or tls"),
        Owner::Data => ("the data service", "data"),
        Owner::Sync => ("the host identity service", "sync"),
    };
    ApiError::new(
        Code::ServiceUnavailable,
        format!("{what} is not installed here (set upstreams.{key})"),
    )
}

fn refuse_body(error: BodyError) -> ApiError {
    let code = match &error {
        BodyError::TooLarge(_) => Code::BodyTooLarge,
        BodyError::Budget => Code::Limit,
        BodyError::Slow(_) => Code::Timeout,
        BodyError::Incomplete(_) => Code::Arguments,
    };
    ApiError::new(code, error.to_string())
}

fn outgoing(server: &str, request: &ContractRequest, body: RawBody) -> Result<Request<RawBody>, ApiError> {
    let uri: Uri = format!("https://{server}{}", request.path).parse().map_err(|error| {
        tracing::error!(server, "not the address of a server: {error}");
        ApiError::from(Code::System)
    })?;
    let mut outgoing = Request::new(body);
    *outgoing.method_mut() = Method::POST;
    *outgoing.uri_mut() = uri;
    let headers = outgoing.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    copy(&request.headers, headers, &[LANGUAGE, ACCEPT_LANGUAGE]);
    for (name, text) in [(TENANT, &request.tenant), (REQUEST_ID, &request.request_id)] {
        if let Ok(value) = HeaderValue::from_str(text)
            && !text.is_empty()
        {
            headers.insert(name, value);
        }
    }
    request.caller.assert_into(headers);
    Ok(outgoing)
}

fn copy(from: &HeaderMap, to: &mut HeaderMap, names: &[HeaderName]) {
    for name in names {
        if let Some(value) = from.get(name) {
            to.insert(name.clone(), value.clone());
        }
    }
}
