//! The script calls of the contract: decode, ask the policy, write the audit line, call [`crate::task`], answer.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::authz::{Denied, Policy};
use gse_core::http::{ApiError, ContractRequest, Reply, Service};
use gse_core::quota::{QuotaError, Share, Wanted};
use gse_core::store::StoreError;
use gse_proto::codes::Code;
use gse_proto::http::{
    ExecuteScript, Route, RowsReply, ScriptResultQuery, TaskDescribeRequest, TaskIdReply, TaskIdResult, TaskStateQuery,
    TaskStateReply, TerminateTask,
};
use gse_proto::ids::{TaskId, split_cloud_ip};
use gse_proto::keys;
use gse_proto::state::TaskHeader;
use tokio::sync::OwnedSemaphorePermit;

use crate::Node;
use crate::message;
use crate::task::cell::shared_dispatch;
use crate::task::results::{QueryError, script_rows};
use crate::task::run::Run;
use crate::task::store::CreateError;
use crate::task::{spec, stop, summary};

/// An answer and the room that was set aside for it.
struct Answer {
    json: Vec<u8>,
    _room: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.json
    }
}

/// Answers the script calls.
pub struct ScriptService {
    /// The node.
    pub node: Arc<Node>,
    /// Who may do what.
    pub policy: Policy,
}

impl Service for ScriptService {
    fn serves(&self, route: Route) -> bool {
        matches!(
            route,
            Route::ExecuteScript
                | Route::ScriptResult
                | Route::TerminateScript
                | Route::TaskState
                | Route::TaskDescribe
                | Route::DispatchMessage
                | Route::DispatchMultiMessage
        )
    }

    async fn call(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        match request.route {
            Route::ExecuteScript => self.execute(request).await,
            Route::ScriptResult => self.result(request).await,
            Route::TerminateScript => self.terminate(request).await,
            Route::TaskState => self.state(request).await,
            Route::TaskDescribe => self.describe(request).await,
            Route::DispatchMessage | Route::DispatchMultiMessage => message::call(self, request).await,
            _ => Err(Code::NoSuchCall.into()),
        }
    }
}

impl ScriptService {
    async fn execute(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let node = &self.node;
        let body: ExecuteScript = request.decode().await?;
        let now_ms = node.clock.unix_ms();
        let stamp = jiff::Timestamp::from_millisecond(i64::try_from(now_ms).unwrap_or(0))
            .map_or_else(|_| String::new(), |at| at.strftime("%Y%m%d%H%M%S").to_string());
        let id = TaskId::script(&stamp, node.random.u64());
        let origin = spec::Origin {
            app: request.caller.app.clone(),
            tenant: request.tenant.clone(),
            request_id: request.request_id.clone(),
            now_ms,
            node_id: node.config.node_id.clone(),
        };
        let plan = spec::plan(body, &id, origin, &node.config.task).map_err(ApiError::arguments)?;

        let targets = || plan.buckets.iter().flat_map(|bucket| &bucket.targets);
        let accounts = || targets().map(|target| target.user.as_str());
        let entry = request
            .audit_entry()
            .with_targets(targets().map(|target| target.agent_id.as_str()))
            .with_accounts(accounts());
        let mut entry = gse_core::audit::Entry {
            task_id: Some(id.as_str().to_owned()),
            digest: Some(spec::digest(&plan.header)),
            ..entry
        };
        let allowed = self.policy.check(
            &request.caller,
            request.operation,
            accounts(),
            targets().map(|target| (target.agent_id.as_str(), self.cloud_of(&target.agent_id))),
        );
        if let Err(denied) = allowed {
            entry = entry.refused(denied.to_string());
            self.audit(entry).await?;
            return Err(forbidden(&denied));
        }
        if node.tasks.len() >= node.config.task.max_running {
            let text = format!(
                "{} tasks are under way, no more are taken; try again later",
                node.tasks.len()
            );
            self.audit(entry.refused(text.clone())).await?;
            return Err(ApiError::new(Code::Limit, text));
        }
        let share = self.share(&request, &plan, &entry, now_ms).await?;
        if let Err(error) = self.audit(entry).await {
            self.not_needed(share).await;
            return Err(error);
        }
        fail::fail_point!("submit-audited");

        let shared = shared_dispatch(&plan.header);
        let ttl_s = plan.header.deadline_ms.saturating_sub(now_ms) / 1000 + node.config.task.result_ttl_s + 600;
        let bucket_count = plan.header.buckets;
        // A large submit takes its time; a usual one is answered while its caller still waits.
        let limit = Duration::from_millis(node.config.task.submit_wait_ms + 20 * u64::from(bucket_count));
        let created = node.task_store.create(&node.config.node_id, plan, ttl_s, limit).await;
        let (header, buckets) = match created {
            Ok(created) => created,
            Err(CreateError::Not(error)) => {
                self.not_needed(share).await;
                return Err(store_error(&error));
            }
            Err(CreateError::Unconfirmed(error)) => {
                self.not_needed(share).await;
                tracing::warn!(task = id.as_str(), %error, "the store has not confirmed a task; it is withdrawn");
                let withdrawal = stop::withdraw(Arc::clone(node), id.as_str().to_owned(), bucket_count);
                node.life.spawn("withdrawal", withdrawal);
                let text = "the state store has not confirmed the task in time; it is being withdrawn and is not started by this server. \
                            Only if this server died right now could it still run, within a minute";
                return Err(ApiError::new(Code::Timeout, text));
            }
        };
        tracing::info!(
            task = header.task_id,
            app = header.app,
            request = header.request_id,
            targets = header.targets,
            "task accepted"
        );
        fail::fail_point!("submit-stored");
        node.tasks.start(Run::new(header, buckets), shared);
        fail::fail_point!("submit-started");
        Reply::json(&task_id(id.as_str()))
    }

    /// The share of its application's quota that a task takes; a refusal is written down.
    async fn share(
        &self,
        request: &ContractRequest,
        plan: &spec::Plan,
        entry: &gse_core::audit::Entry,
        now_ms: u64,
    ) -> Result<Option<Share>, ApiError> {
        let taken = self
            .node
            .quotas
            .take(
                &request.caller,
                Wanted {
                    task: &plan.header.task_id,
                    targets: u64::from(plan.header.targets),
                    deadline_ms: plan.header.deadline_ms,
                },
                now_ms,
                Duration::from_millis(self.node.config.task.submit_wait_ms),
            )
            .await;
        match taken {
            Ok(share) => Ok(share),
            Err(QuotaError::Refused(text)) => {
                self.audit(entry.clone().refused(text.clone())).await?;
                Err(ApiError::new(Code::Limit, text))
            }
            Err(QuotaError::Store(error)) => Err(store_error(&error)),
        }
    }

    async fn not_needed(&self, share: Option<Share>) {
        if let Some(share) = share {
            self.node.quotas.give_back(share).await;
        }
    }

    async fn result(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let query: ScriptResultQuery = request.decode().await?;
        let header = self.readable(&request, &query.task_id).await?;
        let node = &self.node;
        let (rows, room) = script_rows(&node.task_store, &header, query, &node.config.task, &node.answer_room)
            .await
            .map_err(|error| match error {
                QueryError::Refused(code, text) => ApiError::new(code, text),
                QueryError::Store(error) => store_error(&error),
            })?;
        let bytes: usize = rows.iter().map(|row| row.screen.len() + 256).sum();
        let write = move || {
            let json = serde_json::to_vec(&RowsReply { result: rows })
                .map_err(|error| ApiError::new(Code::System, format!("the answer could not be written: {error}")))?;
            // The room that the answer takes is given back when it has been sent.
            Ok(Reply::Data(Bytes::from_owner(Answer { json, _room: room })))
        };
        if bytes < 1 << 20 {
            return write();
        }
        // Tens of milliseconds of escaping do not belong on the runtime's threads.
        tokio::task::spawn_blocking(write)
            .await
            .map_err(|error| ApiError::new(Code::System, format!("the answer could not be written: {error}")))?
    }

    async fn terminate(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let node = &self.node;
        let body: TerminateTask = request.decode().await?;
        let header = self.header(&body.task_id).await?;
        let entry = gse_core::audit::Entry {
            task_id: Some(body.task_id.clone()),
            ..request
                .audit_entry()
                .with_targets(body.agents.iter().map(|agent| agent.bk_agent_id.as_str()))
        };
        if !self.policy.may_stop(&request.caller, &header.app) {
            self.audit(entry.refused("the task belongs to another application"))
                .await?;
            return Err(no_such_task(&body.task_id));
        }
        self.audit(entry).await?;
        let places = self.places(&header, &body).await?;
        let ours = node.tasks.run(&body.task_id).is_some();
        if ours || !node.peers.is_empty() {
            node.task_store
                .mark_stopped(&header.task_id, &places, None)
                .await
                .map_err(|error| store_error(&error))?;
        }
        if ours {
            node.tasks.terminate(&header.task_id, &places).await;
        } else {
            stop::stop_at_owner(node, &header, &places).await;
        }
        stop::stop_given_up(node, &header, &places)
            .await
            .map_err(|error| store_error(&error))?;
        Reply::json(&task_id(&body.task_id))
    }

    /// Places of the targets that a termination names: all of them if it names none. Unknown ones are left out.
    async fn places(&self, header: &TaskHeader, body: &TerminateTask) -> Result<Vec<(u32, u32)>, ApiError> {
        let mut places = Vec::new();
        for n in 0..header.buckets {
            let named: Vec<_> = body
                .agents
                .iter()
                .filter(|agent| keys::bucket_of(&agent.bk_agent_id, header.buckets) == n)
                .collect();
            if named.is_empty() && !body.agents.is_empty() {
                continue;
            }
            let bucket = self.node.task_store.bucket(&header.task_id, n).await;
            let Some(bucket) = bucket.map_err(|error| store_error(&error))? else {
                continue;
            };
            if body.agents.is_empty() {
                places.extend((0..).take(bucket.len()).map(|index| (n, index)));
            }
            let found = named
                .into_iter()
                .filter_map(|agent| bucket.place(&agent.bk_agent_id, agent.container().unwrap_or_default()));
            places.extend(found.map(|index| (n, index)));
        }
        Ok(places)
    }

    async fn state(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let query: TaskStateQuery = request.decode().await?;
        let header = self.readable(&request, &query.task_id).await?;
        let result = summary::task_state(&self.node.task_store, &header, &query.agent_id_list)
            .await
            .map_err(|error| store_error(&error))?;
        Reply::json(&TaskStateReply { result })
    }

    async fn describe(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let query: TaskDescribeRequest = request.decode().await?;
        let header = self.readable(&request, &query.task_id).await?;
        let reply = summary::describe(&self.node.task_store, &header, query.start, query.limit.min(10_000))
            .await
            .map_err(|error| store_error(&error))?;
        Reply::json(&reply)
    }

    /// Header of a task that the caller may read. One that it may not read looks like one that does not exist.
    async fn readable(&self, request: &ContractRequest, task: &str) -> Result<Arc<TaskHeader>, ApiError> {
        let header = self.header(task).await?;
        if self.policy.may_read(&request.caller, &header.app) {
            Ok(header)
        } else {
            Err(no_such_task(task))
        }
    }

    async fn header(&self, task: &str) -> Result<Arc<TaskHeader>, ApiError> {
        // Anything that is not an id would only be a strange key.
        TaskId::parse(task).map_err(|error| ApiError::arguments(format!("task_id: {error}")))?;
        let found = self.node.task_store.header(task).await;
        found
            .map_err(|error| store_error(&error))?
            .ok_or_else(|| no_such_task(task))
    }

    pub(crate) fn cloud_of(&self, asked: &str) -> Option<i32> {
        if let Some((cloud, _)) = split_cloud_ip(asked) {
            return Some(cloud.0);
        }
        let agent = gse_proto::ids::AgentId::parse(asked).ok()?;
        Some(self.node.registry.get(&agent)?.cloud.0)
    }

    pub(crate) async fn audit(&self, entry: gse_core::audit::Entry) -> Result<(), ApiError> {
        self.node.front.audit.record(entry).await.map_err(|error| {
            tracing::error!(%error, "the audit trail can't be written; the call is refused");
            ApiError::new(Code::System, "the audit trail can't be written; nothing was done")
        })
    }
}

fn task_id(id: &str) -> TaskIdReply {
    TaskIdReply {
        result: TaskIdResult { task_id: id.to_owned() },
    }
}

pub(crate) fn forbidden(denied: &Denied) -> ApiError {
    ApiError::new(Code::Forbidden, denied.to_string())
}

fn no_such_task(task: &str) -> ApiError {
    ApiError::new(
        Code::NoSuchTask,
        format!("there is no task {task:?}, or its results have expired"),
    )
}

fn store_error(error: &StoreError) -> ApiError {
    tracing::warn!(%error, "a call failed for want of the store");
    ApiError::from(Code::StoreUnavailable)
}
