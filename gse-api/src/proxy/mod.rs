//! Calls of other services, passed through: body in and answer out as streams, over mutual TLS, on behalf of the caller.
//!
//! A call is offered to the servers of a service in turn only as long as it is certain that none of them has seen any of it; once a
//! byte may have gone out it is never sent again, and the caller is told what is known. Which call belongs to which service is
//! gse-proto's; what it does there is the service's.

mod body;
mod upstream;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use gse_core::http::{
    ApiError, BodyError, ClientConfig, ClientError, ContractRequest, HttpClient, RawBody, Reply, forward, full,
};
use gse_core::lifecycle::Lifecycle;
use gse_core::tls::{TlsError, TlsFiles};
use gse_proto::codes::Code;
use gse_proto::http::Owner;
use http::header::{ACCEPT_LANGUAGE, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use self::body::{Impatient, Upload};
use self::upstream::Pool;
use crate::config::{Limits, Upstreams};

const TENANT: HeaderName = HeaderName::from_static("x-bk-tenant-id");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-bkapi-request-id");
const LANGUAGE: HeaderName = HeaderName::from_static("blueking-language");

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    service: &'static str,
    outcome: &'static str,
}

/// Why a server has not answered.
enum Unanswered {
    /// The request failed.
    Failed(ClientError),
    /// For this long the server has not asked for any of the body.
    Ignored(Duration),
}

/// The way to the other services.
pub struct Proxy {
    pools: Vec<(Owner, &'static str, Pool)>,
    client: ArcSwap<HttpClient>,
    tls: TlsFiles,
    limits: Limits,
    upload_timeout: Duration,
    outcomes: Family<Outcome, Counter>,
}

impl Proxy {
    /// Reads the certificates (blocking, small) if there is any service to reach. `upload_timeout` is the listener's limit for a body.
    ///
    /// # Errors
    /// The certificate files are not usable.
    pub fn new(
        upstreams: &Upstreams,
        tls: &TlsFiles,
        limits: &Limits,
        upload_timeout: Duration,
        registry: &mut Registry,
    ) -> Result<Self, TlsError> {
        let outcomes = Family::default();
        registry.register(
            "gse_api_upstream_calls",
            "Calls passed to other services, by how they went",
            outcomes.clone(),
        );
        let pools: Vec<_> = [Owner::Task, Owner::File, Owner::Proc, Owner::Data]
            .into_iter()
            .filter_map(|owner| {
                let (name, addresses) = upstreams.of(owner)?;
                (!addresses.is_empty()).then(|| (owner, name, Pool::new(addresses)))
            })
            .collect();
        let client = client(tls, limits, !pools.is_empty())?;
        Ok(Self {
            pools,
            client: ArcSwap::from_pointee(client),
            tls: tls.clone(),
            limits: limits.clone(),
            upload_timeout,
            outcomes,
        })
    }

    /// Takes new certificate files into use whenever a reload is asked for.
    pub fn follow_reloads(self: &Arc<Self>, life: &Lifecycle) {
        if self.pools.is_empty() {
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
                match read {
                    Ok(Ok(client)) => this.client.store(Arc::new(client)),
                    Ok(Err(error)) => tracing::error!("the certificates in use stay: {error}"),
                    Err(error) => tracing::error!("the certificates in use stay: {error}"),
                }
            }
        });
    }

    /// Passes a call to the service that owns it.
    ///
    /// # Errors
    /// The service is not installed or not reachable, does not answer in time, or the caller's body did not arrive.
    pub async fn pass(&self, mut request: ContractRequest) -> Result<Reply, ApiError> {
        let owner = request.route.owner();
        let Some((_, service, pool)) = self.pools.iter().find(|(of, ..)| *of == owner) else {
            return Err(not_installed(owner));
        };
        let upload = match request.stream.take() {
            None => Ok(Upload::new(full(request.body.clone()))),
            Some(stream) => Upload::begun(stream).await.map_err(refuse_body),
        };
        let outcome = match upload {
            Ok(upload) => self.offer(&request, service, pool, &upload).await,
            Err(error) => Err(error),
        };
        let word = match &outcome {
            Ok(_) => "answered",
            Err(error) if error.code == Code::ServiceUnavailable.code() => "unavailable",
            Err(error) if error.code == Code::Timeout.code() => "timeout",
            Err(_) => "caller",
        };
        self.outcomes.get_or_create(&Outcome { service, outcome: word }).inc();
        outcome
    }

    async fn offer(
        &self,
        request: &ContractRequest,
        service: &str,
        pool: &Pool,
        upload: &Upload,
    ) -> Result<Reply, ApiError> {
        let client = self.client.load_full();
        let (mut unreachable, mut busy) = (Vec::new(), Vec::new());
        for server in pool.in_turn() {
            let Some(body) = upload.offer() else {
                break;
            };
            let outgoing = outgoing(server.address(), request, body)?;
            let error = match self.send(&client, outgoing, upload).await {
                Ok(response) => {
                    server.answered();
                    return self.answer(service, server.address(), response);
                }
                Err(error) => error,
            };
            let untouched = upload.withdraw();
            if let Some(error) = upload.failure() {
                // The caller's fault, not the server's.
                return Err(refuse_body(error));
            }
            let error = match error {
                Unanswered::Failed(error) => error,
                Unanswered::Ignored(waited) if untouched => {
                    // Its connection is there and full of other calls, which says nothing against the server.
                    tracing::warn!(service, server = server.address(), ?waited, "takes no more calls");
                    busy.push(server.address().to_owned());
                    continue;
                }
                Unanswered::Ignored(waited) => ClientError::Timeout {
                    server: server.address().to_owned(),
                    waited,
                },
            };
            server.failed();
            // A server that has not been given the first byte of a body cannot have carried the call out, whatever it has of the head.
            let nothing_done = untouched && (error.not_sent() || !upload.is_empty());
            if nothing_done {
                tracing::warn!(service, "{error}");
                unreachable.push(server.address().to_owned());
                continue;
            }
            tracing::warn!(
                service,
                "{error}; the call may have been carried out and is not repeated"
            );
            return Err(match error {
                ClientError::Timeout { .. } => ApiError::new(
                    Code::Timeout,
                    format!(
                        "gse_{service} at {} did not answer in time; the call may have been carried out",
                        server.address()
                    ),
                ),
                _ => ApiError::new(
                    Code::ServiceUnavailable,
                    format!(
                        "the connection to gse_{service} at {} was lost; the call may have been carried out",
                        server.address()
                    ),
                ),
            });
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

    /// Sends the request; the time for an answer begins when the whole body has gone out.
    async fn send(
        &self,
        client: &HttpClient,
        request: Request<RawBody>,
        upload: &Upload,
    ) -> Result<Response<hyper::body::Incoming>, Unanswered> {
        let patience = Duration::from_millis(self.limits.upstream_timeout_ms);
        let server = request.uri().authority().map(ToString::to_string).unwrap_or_default();
        let sending = client.request(request, self.upload_timeout + patience);
        // The connection has a time limit of its own; what then keeps the call is a connection that is full of other calls.
        let queueing = client.connect_timeout() + patience;
        tokio::select! {
            response = sending => response.map_err(Unanswered::Failed),
            () = upload.sent_and(patience) => Err(Unanswered::Failed(ClientError::Timeout { server, waited: patience })),
            () = upload.ignored_for(queueing) => Err(Unanswered::Ignored(queueing)),
        }
    }

    fn answer(
        &self,
        service: &str,
        server: &str,
        response: Response<hyper::body::Incoming>,
    ) -> Result<Reply, ApiError> {
        let (head, body) = response.into_parts();
        if head.status != StatusCode::OK {
            tracing::error!(
                service,
                server,
                status = head.status.as_u16(),
                "not an answer of the contract"
            );
            return Err(ApiError::new(
                Code::ServiceUnavailable,
                format!(
                    "gse_{service} at {server} answered with HTTP status {}; it is not known what was done",
                    head.status.as_u16()
                ),
            ));
        }
        let idle = Duration::from_millis(self.limits.upstream_idle_timeout_ms);
        let mut response = Response::new(Impatient::boxed(forward(body), idle));
        for name in [CONTENT_TYPE, CONTENT_LENGTH] {
            if let Some(value) = head.headers.get(&name) {
                response.headers_mut().insert(name, value.clone());
            }
        }
        Ok(Reply::Raw(response))
    }
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
        Owner::Task => ("the task service", "task"),
        Owner::File => ("file transfer", "file"),
        Owner::Proc => ("process management", "proc"),
        Owner::Data => ("the data service", "data"),
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
