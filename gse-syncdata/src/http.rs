//! The calls of gse_syncdata: what is known of a host, identities where calls are the source, and a push by hand. Any instance answers:
//! what is asked is read from the store, what is to be done is left there for the active instance.

use std::sync::Arc;

use gse_core::audit::Entry;
use gse_core::authz::{Denied, Policy};
use gse_core::fleet::find;
use gse_core::http::{ApiError, ContractRequest, Reply, Service};
use gse_core::store::StoreError;
use gse_proto::codes::Code;
use gse_proto::http::{
    HostIdContent, HostIdFailure, HostIdPush, HostIdPushed, HostIdPut, HostIdShow, HostIdTaken, HostIdView, Owner,
    Route,
};
use gse_proto::ids::{AgentId, CloudId, split_cloud_ip};
use gse_proto::sync::{HostState, InboxItem};

use crate::Node;
use crate::agents;
use crate::config::SourceKind;
use crate::identity::MAX_NAMES;
use crate::source;

/// Answers the calls.
pub struct HostIdService {
    /// The instance.
    pub node: Arc<Node>,
    /// Who may do what.
    pub policy: Policy,
}

impl Service for HostIdService {
    fn serves(&self, route: Route) -> bool {
        route.owner() == Owner::Sync
    }

    async fn call(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        match request.route {
            Route::HostIdShow => self.show(&request).await,
            Route::HostIdPut => self.put(&request).await,
            Route::HostIdPush => self.push(&request).await,
            _ => Err(Code::NoSuchCall.into()),
        }
    }
}

/// A URL without credentials and query, for people.
#[must_use]
pub fn shown(url: &str) -> String {
    match url.parse::<http::Uri>() {
        Ok(uri) => {
            let host = uri.authority().map_or("", |authority| {
                authority.as_str().rsplit('@').next().unwrap_or_default()
            });
            format!("{}://{host}{}", uri.scheme_str().unwrap_or("http"), uri.path())
        }
        Err(_) => "an address that is none".to_owned(),
    }
}

fn agent_id(field: &str, text: &str) -> Result<AgentId, ApiError> {
    AgentId::parse(text)
        .map_err(|error| ApiError::arguments(format!("{field} is not the id of an agent, nor cloud:ip: {error}")))
}

fn store_error(error: &StoreError) -> ApiError {
    tracing::warn!(%error, "a call failed for want of the store");
    ApiError::from(Code::StoreUnavailable)
}

impl HostIdService {
    async fn show(&self, request: &ContractRequest) -> Result<Reply, ApiError> {
        let asked: HostIdShow = request.decode().await?;
        let host = agent_id("host", &asked.host)?;
        let targets = [&host];
        self.allowed(request, &targets).map_err(|denied| forbidden(&denied))?;
        let view = self.view(&host).await.map_err(|error| store_error(&error))?;
        Reply::json(&view)
    }

    async fn view(&self, host: &AgentId) -> Result<HostIdView, StoreError> {
        let node = &self.node;
        let source = source::name(node);
        let asked = self.names(host).await?;
        let others = node.store.keys_of(&asked).await?;
        for name in asked.iter().chain(&others) {
            let Some((state, content)) = node.store.host(name.as_str()).await? else {
                continue;
            };
            let names: Vec<AgentId> = state.agents.iter().filter_map(|id| AgentId::parse(id).ok()).collect();
            // A name may have gone to another host since.
            if !names.iter().any(|name| asked.contains(name)) {
                continue;
            }
            let present = agents::present(node.store.raw(), &[&names]).await?;
            let content = content.map(|content| String::from_utf8_lossy(&content).into_owned());
            return Ok(HostIdView {
                source,
                connected: present.into_iter().any(|present| present.is_some()),
                ..view_of(name.as_str(), state, content)
            });
        }
        Ok(HostIdView {
            host: host.as_str().to_owned(),
            source,
            ..HostIdView::default()
        })
    }

    /// What the host may be called in the store: as asked, as its agent says, or by its addresses.
    async fn names(&self, host: &AgentId) -> Result<Vec<AgentId>, StoreError> {
        let store = self.node.store.raw();
        let mut names = vec![host.clone()];
        let agents = find::resolve(store, std::slice::from_ref(host)).await?;
        let records = find::records(store, &agents).await?;
        names.extend(agents);
        for record in records.into_iter().flatten() {
            let addresses = record.addresses.iter().filter_map(|text| text.parse().ok());
            let of = |ip| AgentId::from_cloud_ip(CloudId(record.cloud_id), ip);
            names.extend(addresses.take(MAX_NAMES).map(of));
        }
        names.dedup();
        Ok(names)
    }

    async fn put(&self, request: &ContractRequest) -> Result<Reply, ApiError> {
        let body: HostIdPut = request.decode().await?;
        if self.node.config.source != SourceKind::Push {
            return Err(ApiError::arguments(format!(
                "identities come from {}; calls are taken only where source is \"push\"",
                source::name(&self.node)
            )));
        }
        let most = self.node.config.push.max_content_bytes;
        let mut items = Vec::with_capacity(body.hosts.len());
        let mut hosts = Vec::with_capacity(body.hosts.len());
        for (n, host) in body.hosts.into_iter().enumerate() {
            let agent = agent_id(&format!("hosts[{n}].bk_agent_id"), &host.bk_agent_id)?;
            if host.content.len() > most {
                return Err(ApiError::arguments(format!(
                    "hosts[{n}].content has {} bytes, at most {most} are allowed",
                    host.content.len()
                )));
            }
            items.push(InboxItem {
                agents: vec![agent.as_str().to_owned()],
                content: Some(host.content.into()),
            });
            hosts.push(agent);
        }
        self.post(request, &hosts, &items).await
    }

    async fn push(&self, request: &ContractRequest) -> Result<Reply, ApiError> {
        let body: HostIdPush = request.decode().await?;
        let (mut items, mut hosts) = (Vec::new(), Vec::new());
        self.check_count(body.hosts.len())?;
        for (n, host) in body.hosts.iter().enumerate() {
            let host = agent_id(&format!("hosts[{n}]"), host)?;
            let view = self.view(&host).await.map_err(|error| store_error(&error))?;
            if view.known {
                items.push(InboxItem {
                    agents: vec![view.host],
                    content: None,
                });
            }
            hosts.push(host);
        }
        self.post(request, &hosts, &items).await
    }

    fn check_count(&self, hosts: usize) -> Result<(), ApiError> {
        let most = self.node.config.inbox.max_hosts;
        if hosts == 0 || hosts > most {
            return Err(ApiError::arguments(format!(
                "hosts has {hosts} entries, 1 to {most} are allowed"
            )));
        }
        Ok(())
    }

    /// Leaves items for the active instance.
    async fn post(&self, request: &ContractRequest, hosts: &[AgentId], items: &[InboxItem]) -> Result<Reply, ApiError> {
        self.check_count(hosts.len())?;
        let entry = request.audit_entry().with_targets(hosts.iter().map(AgentId::as_str));
        let targets: Vec<&AgentId> = hosts.iter().collect();
        if let Err(denied) = self.allowed(request, &targets) {
            self.audit(entry.refused(denied.to_string())).await?;
            return Err(forbidden(&denied));
        }
        let store = &self.node.store;
        let waiting = store.waiting().await.map_err(|error| store_error(&error))?;
        if waiting + items.len() > self.node.config.inbox.max_waiting {
            let text = format!("{waiting} hosts wait to be taken, no more fit (inbox.max_waiting); try again later");
            self.audit(entry.refused(text.clone())).await?;
            return Err(ApiError::new(Code::Limit, text));
        }
        self.audit(entry).await?;
        if !items.is_empty() {
            store.post(items).await.map_err(|error| store_error(&error))?;
        }
        Reply::json(&HostIdTaken {
            taken: items.len() as u64,
        })
    }

    fn allowed(&self, request: &ContractRequest, hosts: &[&AgentId]) -> Result<(), Denied> {
        let targets = hosts.iter().map(|host| {
            let cloud = split_cloud_ip(host.as_str()).map(|(cloud, _)| cloud.0);
            (host.as_str(), cloud)
        });
        self.policy
            .check(&request.caller, request.operation, std::iter::empty(), targets)
    }

    async fn audit(&self, entry: Entry) -> Result<(), ApiError> {
        self.node.front.audit.record(entry).await.map_err(|error| {
            tracing::error!(%error, "the audit trail can't be written; the call is refused");
            ApiError::new(Code::System, "the audit trail can't be written; nothing was done")
        })
    }
}

fn forbidden(denied: &Denied) -> ApiError {
    ApiError::new(Code::Forbidden, denied.to_string())
}

fn view_of(key: &str, state: HostState, content: Option<String>) -> HostIdView {
    let failed = state.code != 0 || !state.message.is_empty();
    HostIdView {
        known: true,
        host: key.to_owned(),
        agents: state.agents,
        bk_host_id: state.host_id,
        os: state.os,
        agree: state.pushed_digest == state.digest,
        wanted: HostIdContent {
            digest: hex::encode(&state.digest),
            bytes: state.size.into(),
            since: state.changed_ms,
            content,
        },
        pushed: (!state.pushed_digest.is_empty()).then(|| HostIdPushed {
            digest: hex::encode(&state.pushed_digest),
            at: state.pushed_ms,
            agent: state.pushed_to,
            path: state.path,
        }),
        failure: failed.then_some(HostIdFailure {
            at: state.tried_ms,
            code: state.code,
            message: state.message,
            tries: state.tries,
        }),
        ..HostIdView::default()
    }
}
