//! Which call goes where, and the answers that gse_api gives itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use gse_core::http::{ApiError, ContractRequest, Reply, Service};
use gse_core::store::StoreError;
use gse_proto::codes::Code;
use gse_proto::http::{AgentIdList, AgentListReply, AgentListRequest, HostQuery, Owner, Route};
use serde::Serialize;

use crate::agents::{self, Agents, Cursor, Known, Liveness};
use crate::config::Limits;
use crate::proxy::Proxy;

/// Agents of a page when the caller does not say.
const DEFAULT_PAGE: usize = 1_000;
/// Answers with more rows than this are written off the runtime's threads.
const MANY_ROWS: usize = 2_000;

pub(crate) struct Api {
    pub(crate) agents: Agents,
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) limits: Limits,
    pub(crate) heartbeat: Duration,
}

impl Service for Api {
    fn serves(&self, _route: Route) -> bool {
        // Those of a service that is not installed are answered too: with the advice to install it.
        true
    }

    fn streams(&self, route: Route) -> bool {
        // Whose task it is stands in the body.
        route.owner() != Owner::Api && route != Route::TaskState
    }

    async fn call(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        match request.route {
            Route::ListAgentState => self.by_ids(&request, agents::state, false).await,
            Route::ListAgentInfo => self.by_ids(&request, agents::info, true).await,
            Route::V1AgentStatus => self.by_hosts(&request, agents::v1_status).await,
            Route::V1AgentInfo => {
                self.by_hosts(&request, |host, known, _| agents::v1_info(host, known))
                    .await
            }
            Route::AgentList => self.page(&request).await,
            _ => self.proxy.pass(request).await,
        }
    }
}

impl Api {
    fn live(&self) -> Result<Liveness, ApiError> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_err(|_| {
            tracing::error!("this host's clock stands before 1970");
            ApiError::from(Code::System)
        })?;
        Ok(Liveness {
            now_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            heartbeat: self.heartbeat,
        })
    }

    fn check_count(&self, count: usize, what: &str) -> Result<(), ApiError> {
        let max = self.limits.max_ids;
        if count > max {
            return Err(ApiError::new(
                Code::Limit,
                format!("{count} {what} in one call, at most {max} are allowed; ask in parts"),
            ));
        }
        Ok(())
    }

    /// One row for each id, in the order asked, repetitions included.
    async fn by_ids<R: Serialize + Send + 'static>(
        &self,
        request: &ContractRequest,
        row: fn(&str, Option<&Known>, Liveness) -> R,
        loads: bool,
    ) -> Result<Reply, ApiError> {
        let ids = request.decode::<AgentIdList>().await?.agent_id_list;
        self.check_count(ids.len(), "ids")?;
        let found = self
            .agents
            .find(ids.iter().map(String::as_str), loads)
            .await
            .map_err(|error| unavailable(&error))?;
        let live = self.live()?;
        let rows: Vec<R> = ids.iter().map(|id| row(id, found.get(id.as_str()), live)).collect();
        let many = rows.len() > MANY_ROWS;
        write(rows, many).await
    }

    /// One value for each host, under `cloud:ip`.
    async fn by_hosts<R: Serialize + Send + 'static>(
        &self,
        request: &ContractRequest,
        row: impl Fn(&gse_proto::http::HostRef, Option<&Known>, Liveness) -> R + Send,
    ) -> Result<Reply, ApiError> {
        let hosts = request.decode::<HostQuery>().await?.hosts;
        self.check_count(hosts.len(), "hosts")?;
        let keys: Vec<String> = hosts
            .iter()
            .map(|host| format!("{}:{}", host.bk_cloud_id, host.ip))
            .collect();
        let found = self
            .agents
            .find(keys.iter().map(String::as_str), false)
            .await
            .map_err(|error| unavailable(&error))?;
        let live = self.live()?;
        let rows: BTreeMap<String, R> = keys
            .iter()
            .zip(&hosts)
            .map(|(key, host)| (key.clone(), row(host, found.get(key.as_str()), live)))
            .collect();
        let many = rows.len() > MANY_ROWS;
        write(rows, many).await
    }

    async fn page(&self, request: &ContractRequest) -> Result<Reply, ApiError> {
        let asked: AgentListRequest = request.decode().await?;
        let start = Cursor::parse(&asked.cursor).ok_or_else(|| {
            ApiError::arguments("cursor is not one that this call has given; begin with an empty one")
        })?;
        let limit = match asked.limit as usize {
            0 => DEFAULT_PAGE,
            limit => limit,
        };
        let (page, next) = self
            .agents
            .page(&start, limit.min(self.limits.max_page))
            .await
            .map_err(|error| unavailable(&error))?;
        let live = self.live()?;
        let mut agents: Vec<_> = page
            .iter()
            .filter(|known| !asked.online || live.is_running(known))
            .map(|known| agents::detail(known, live))
            .collect();
        let mut watch = None;
        if asked.lost {
            let ids: Vec<&str> = agents.iter().map(|agent| agent.info.bk_agent_id.as_str()).collect();
            let (alarms, report) = self.agents.lost(&ids).await.map_err(|error| unavailable(&error))?;
            for (agent, alarms) in agents.iter_mut().zip(alarms) {
                agent.alarms = alarms;
            }
            agents.retain(|agent| agent.alarms > 0);
            watch = report;
        }
        let many = agents.len() > MANY_ROWS;
        write(
            AgentListReply {
                agents,
                next: next.map(|cursor| cursor.text()).unwrap_or_default(),
                watch,
            },
            many,
        )
        .await
    }
}

async fn write<T: Serialize + Send + 'static>(data: T, large: bool) -> Result<Reply, ApiError> {
    if !large {
        return Reply::json(&data);
    }
    match tokio::task::spawn_blocking(move || Reply::json(&data)).await {
        Ok(reply) => reply,
        Err(error) => {
            tracing::error!(%error, "writing an answer panicked");
            Err(Code::System.into())
        }
    }
}

fn unavailable(error: &StoreError) -> ApiError {
    tracing::warn!("agents cannot be looked up: {error}");
    let code = if error.is_retryable() {
        Code::StoreUnavailable
    } else {
        Code::System
    };
    code.into()
}
