//! The process calls: submits, results, and what is read from the store.
//!
//! Any instance answers any of them: what is shown is what is stored.

mod info;
mod query;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::audit::Entry;
use gse_core::authz::{Denied, Policy};
use gse_core::fleet::find;
use gse_core::http::{ApiError, ContractRequest, Reply, Service};
use gse_core::quota::{QuotaError, Share, Wanted};
use gse_core::random::HashMap;
use gse_core::store::StoreError;
use gse_proto::codes::Code;
use gse_proto::http::{ProcMulti, ProcObject, ProcRow, ProcTaskQuery, ProcTaskReply, Route};
use gse_proto::ids::{AgentId, TaskId, split_cloud_ip};
use gse_proto::proc::{OpType, Spec, code};
use gse_proto::procstore::{ProcHeader, StoredResult};
use prost::Message;
use serde::Serializer;

use crate::Node;
use crate::registry;
use crate::task::engine::{Cell, Tasks};
use crate::task::layout::Layout;
use crate::task::spec;
use crate::task::store::{CreateError, Known};

/// Answers with more rows are written off the runtime's threads.
const MANY_ROWS: usize = 1_000;
/// The account of commands for which nobody names one.
const ROOT: &str = "root";

/// Answers the process calls.
pub struct ProcService {
    /// The instance.
    pub node: Arc<Node>,
    /// Who may do what.
    pub policy: Policy,
}

impl Service for ProcService {
    fn serves(&self, route: Route) -> bool {
        route.owner() == gse_proto::http::Owner::Proc
    }

    async fn call(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        match request.route {
            Route::OperateProcMulti => {
                let body: ProcMulti = request.decode().await?;
                let cell = self.submit(&request, body.proc_operate_req, false).await?;
                task_id(cell.task())
            }
            Route::OperateProc => {
                let object: ProcObject = request.decode().await?;
                let cell = self.submit(&request, vec![object], false).await?;
                task_id(cell.task())
            }
            Route::ProcResult | Route::V1ProcResult => self.result(&request).await,
            Route::ProcStatus => self.status(&request).await,
            Route::SyncProcStatus => self.sync(&request).await,
            Route::ProcNamespaces => self.namespaces().await,
            Route::UpdateProcInfo | Route::V1UpdateProcInfo => self.info(&request, OpType::Register, false).await,
            Route::RegisterProcInfo | Route::V1RegisterProcInfo => self.info(&request, OpType::Register, true).await,
            Route::UnregisterProcInfo | Route::V1UnregisterProcInfo => {
                self.info(&request, OpType::Unregister, false).await
            }
            Route::UpgradeToAgentId => self.upgrade(&request).await,
            Route::SetProcGroup => self.set_groups(&request).await,
            Route::GetProcGroup => self.groups(&request).await,
            _ => Err(Code::NoSuchCall.into()),
        }
    }
}

impl ProcService {
    /// Takes a task up.
    async fn submit(
        &self,
        request: &ContractRequest,
        objects: Vec<ProcObject>,
        only_new: bool,
    ) -> Result<Arc<Cell>, ApiError> {
        let node = &self.node;
        let now_ms = node.clock.unix_ms();
        let stamp = jiff::Timestamp::from_millisecond(i64::try_from(now_ms).unwrap_or(0))
            .map_or_else(|_| String::new(), |at| at.strftime("%Y%m%d%H%M%S").to_string());
        let mut seed = [0; 16];
        seed[..8].copy_from_slice(&node.random.u64().to_be_bytes());
        seed[8..].copy_from_slice(&node.random.u64().to_be_bytes());
        let limits = &node.config.task;
        let origin = spec::Origin {
            id: TaskId::process(&stamp, node.random.u64()),
            app: request.caller.app.clone(),
            tenant: request.tenant.clone(),
            request_id: request.request_id.clone(),
            now_ms,
            node_id: node.config.node_id.clone(),
            seed,
        };
        let header = if objects
            .iter()
            .map(|object| object.agent_id_list.len() + object.hosts.len())
            .sum::<usize>()
            > MANY_ROWS
        {
            let limits = limits.clone();
            tokio::task::spawn_blocking(move || spec::header(objects, origin, only_new, &limits))
                .await
                .map_err(|error| ApiError::new(Code::System, format!("the call could not be read: {error}")))?
        } else {
            spec::header(objects, origin, only_new, limits)
        }
        .map_err(ApiError::arguments)?;
        let share = self.allow(request, &header).await?;
        let ttl_s = header.deadline_ms.saturating_sub(now_ms) / 1000 + limits.result_ttl_s + 600;
        let wait = Duration::from_millis(limits.submit_wait_ms);
        match node.store.create(&header, ttl_s, wait).await {
            Ok(()) => {}
            Err(CreateError::Not(error)) => {
                self.not_needed(share).await;
                return Err(store_error(&error));
            }
            Err(CreateError::Unconfirmed(error)) => {
                self.not_needed(share).await;
                tracing::warn!(task = header.task_id, %error, "the store has not confirmed a process task; it is withdrawn");
                node.life
                    .spawn("withdrawal", withdraw(Arc::clone(node), header.task_id));
                let text =
                    "the state store has not confirmed the task in time; it is being withdrawn and is not started";
                return Err(ApiError::new(Code::Timeout, text));
            }
        }
        tracing::info!(
            task = header.task_id,
            app = header.app,
            request = header.request_id,
            elements = header.groups.len(),
            "process task accepted"
        );
        Ok(Tasks::start(node, header, &HashMap::default()))
    }

    /// Asks the policy and the limits, and writes down what they say; gives the share of its application's quota that the task takes.
    async fn allow(&self, request: &ContractRequest, header: &ProcHeader) -> Result<Option<Share>, ApiError> {
        let node = &self.node;
        let accounts = self.accounts(header).await.map_err(|error| store_error(&error))?;
        let accounts = || accounts.iter().map(String::as_str);
        let ids = || {
            header
                .groups
                .iter()
                .flat_map(|group| group.ids.iter().map(String::as_str))
        };
        let entry = Entry {
            task_id: Some(header.task_id.clone()),
            ..request.audit_entry().with_targets(ids()).with_accounts(accounts())
        };
        let allowed = self.targets_allowed(request, accounts, ids).await?;
        if let Err(denied) = allowed {
            self.audit(entry.refused(denied.to_string())).await?;
            return Err(forbidden(&denied));
        }
        if node.tasks.len() >= node.config.task.max_running {
            let text = format!(
                "{} process tasks are under way, no more are taken; try again later",
                node.tasks.len()
            );
            self.audit(entry.refused(text.clone())).await?;
            return Err(ApiError::new(Code::Limit, text));
        }
        let wanted = Wanted {
            task: &header.task_id,
            targets: u64::from(Layout::new(header).rows()),
            deadline_ms: header.deadline_ms,
        };
        let wait = Duration::from_millis(node.config.task.submit_wait_ms);
        let taken = node
            .quotas
            .take(&request.caller, wanted, node.clock.unix_ms(), wait)
            .await;
        let share = match taken {
            Ok(share) => share,
            Err(QuotaError::Refused(text)) => {
                self.audit(entry.refused(text.clone())).await?;
                return Err(ApiError::new(Code::Limit, text));
            }
            Err(QuotaError::Store(error)) => return Err(store_error(&error)),
        };
        if let Err(error) = self.audit(entry).await {
            self.not_needed(share).await;
            return Err(error);
        }
        Ok(share)
    }

    /// Whether the caller may do its operation as these accounts on these hosts.
    async fn targets_allowed<'a, A, I>(
        &self,
        request: &ContractRequest,
        accounts: impl Fn() -> A,
        ids: impl Fn() -> I,
    ) -> Result<Result<(), Denied>, ApiError>
    where
        A: Iterator<Item = &'a str>,
        I: Iterator<Item = &'a str>,
    {
        let check = |clouds: &HashMap<AgentId, i32>| {
            let targets = ids().map(|id| {
                let cloud = split_cloud_ip(id).map(|(cloud, _)| cloud.0);
                let stored = || clouds.get(&AgentId::parse(id).ok()?).copied();
                (id, cloud.or_else(stored))
            });
            self.policy
                .check(&request.caller, request.operation, accounts(), targets)
        };
        let allowed = check(&HashMap::default());
        if !matches!(allowed, Err(Denied::Target { .. })) {
            return Ok(allowed);
        }
        // Perhaps by the cloud area of an agent whose id does not say it.
        let mut agents: Vec<AgentId> = ids()
            .filter(|id| split_cloud_ip(id).is_none())
            .filter_map(|id| AgentId::parse(id).ok())
            .collect();
        agents.sort_unstable();
        agents.dedup();
        let records = find::records(self.node.store.raw(), &agents)
            .await
            .map_err(|error| store_error(&error))?;
        let known = agents.into_iter().zip(records);
        let clouds = known.filter_map(|(id, record)| Some((id, record?.cloud_id))).collect();
        Ok(check(&clouds))
    }

    /// The accounts that commands of a task run as. Where the host's own spec counts, the account is that of the registration, or, if that
    /// is not known here, any: the greatest.
    async fn accounts(&self, header: &ProcHeader) -> Result<Vec<String>, StoreError> {
        let mut accounts: Vec<String> = Vec::new();
        let mut add = |account: &str| {
            let account = if account.is_empty() { ROOT } else { account };
            if !accounts.iter().any(|known| known == account) {
                accounts.push(account.to_owned());
            }
        };
        let specs: Vec<Spec> = header
            .specs
            .iter()
            .map(|spec| Spec::decode(spec.clone()).unwrap_or_default())
            .collect();
        let mut stored: Vec<(AgentId, &str, &str)> = Vec::new();
        for group in &header.groups {
            let is_status = group.op_type == OpType::Status as i32;
            match specs.get((group.spec as usize).wrapping_sub(1)) {
                Some(spec) if is_status && spec.version_cmd.is_empty() && spec.health_cmd.is_empty() => {}
                Some(spec) => add(&spec.user),
                // Looks only, as the host has been told to; nothing is run for the rest.
                None if is_status || group.op_type == OpType::Unregister as i32 => {}
                None => {
                    let ids = group.ids.iter().filter_map(|id| AgentId::parse(id).ok());
                    stored.extend(ids.map(|id| (id, group.namespace.as_str(), group.name.as_str())));
                }
            }
        }
        if !stored.is_empty() {
            let asked: Vec<AgentId> = stored.iter().map(|(id, ..)| id.clone()).collect();
            let agents = find::resolve(self.node.store.raw(), &asked).await?;
            let names: Vec<(&str, &str, &str)> = agents
                .iter()
                .zip(&stored)
                .map(|(agent, (_, namespace, name))| (agent.as_str(), *namespace, *name))
                .collect();
            for entry in registry::entries(self.node.store.raw(), &names).await? {
                let spec = entry.registration.and_then(|registration| registration.spec);
                add(spec.as_ref().map_or(ROOT, |spec| spec.user.as_str()));
            }
        }
        Ok(accounts)
    }

    async fn not_needed(&self, share: Option<Share>) {
        if let Some(share) = share {
            self.node.quotas.give_back(share).await;
        }
    }

    async fn result(&self, request: &ContractRequest) -> Result<Reply, ApiError> {
        let query: ProcTaskQuery = request.decode().await?;
        let known = self.known(&query.task_id).await?;
        if !self.policy.may_read(&request.caller, &known.header.app) {
            return Err(no_such_task(&query.task_id));
        }
        self.rows(known, request.route == Route::V1ProcResult).await
    }

    /// The result map of a task: one entry for each row, from the first poll on (contract procmgr-agent-lifecycle#2, #5).
    async fn rows(&self, known: Known, old_keys: bool) -> Result<Reply, ApiError> {
        let results = self
            .node
            .store
            .results(&known.header.task_id, &known.layout)
            .await
            .map_err(|error| store_error(&error))?;
        let many = known.layout.rows() as usize > MANY_ROWS;
        off_thread(many, move || map(&known, results, old_keys)).await
    }

    async fn known(&self, task: &str) -> Result<Known, ApiError> {
        // contract: procmgr-agent-lifecycle#25
        if TaskId::parse(task).is_err() {
            return Err(no_such_task(task));
        }
        if let Some(cell) = self.node.tasks.get(task) {
            return Ok(cell.known.clone());
        }
        let found = self.node.store.known(task).await;
        found
            .map_err(|error| store_error(&error))?
            .ok_or_else(|| no_such_task(task))
    }

    async fn audit(&self, entry: Entry) -> Result<(), ApiError> {
        self.node.front.audit.record(entry).await.map_err(|error| {
            tracing::error!(%error, "the audit trail can't be written; the call is refused");
            ApiError::new(Code::System, "the audit trail can't be written; nothing was done")
        })
    }
}

/// JSON of a result map.
fn map(known: &Known, mut results: HashMap<u32, StoredResult>, old_keys: bool) -> Result<Reply, ApiError> {
    let rows = known.layout.subjects(&known.header).map(|(row, subject)| {
        let key = if old_keys { subject.old_key() } else { subject.key() };
        let row = match results.remove(&row) {
            Some(result) => ProcRow {
                error_code: result.code,
                error_msg: result.message,
                content: result.content,
            },
            None => ProcRow {
                error_code: code::RUNNING,
                error_msg: "handling".into(),
                content: String::new(),
            },
        };
        (key, row)
    });
    let mut json = Vec::with_capacity(1024);
    serde_json::Serializer::new(&mut json)
        .collect_map(rows)
        .map_err(|error| {
            tracing::error!(%error, "rows can't be written as JSON");
            ApiError::from(Code::System)
        })?;
    Ok(Reply::Data(Bytes::from(json)))
}

/// Large answers are nothing for the runtime's threads.
async fn off_thread(
    many: bool,
    write: impl FnOnce() -> Result<Reply, ApiError> + Send + 'static,
) -> Result<Reply, ApiError> {
    if !many {
        return write();
    }
    tokio::task::spawn_blocking(write)
        .await
        .map_err(|error| ApiError::new(Code::System, format!("the answer could not be written: {error}")))?
}

/// Takes a task back that the store has not confirmed, for as long as that takes.
async fn withdraw(node: Arc<Node>, task: String) {
    let mut wait = Duration::from_millis(200);
    while let Err(error) = node.store.withdraw(&node.config.node_id, &task).await {
        tracing::warn!(task, %error, "a process task can't be withdrawn yet");
        tokio::select! {
            () = node.life.draining() => return,
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(Duration::from_secs(5));
    }
}

fn task_id(id: &str) -> Result<Reply, ApiError> {
    Reply::json(&ProcTaskReply { task_id: id.to_owned() })
}

fn forbidden(denied: &Denied) -> ApiError {
    ApiError::new(Code::Forbidden, denied.to_string())
}

fn no_such_task(task: &str) -> ApiError {
    let task: String = task.chars().take(80).collect();
    ApiError::new(
        Code::NoSuchTask,
        format!("there is no task {task:?}, or its results have expired"),
    )
}

fn store_error(error: &StoreError) -> ApiError {
    tracing::warn!(%error, "a call failed for want of the store");
    ApiError::from(Code::StoreUnavailable)
}
