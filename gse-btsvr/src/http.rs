//! The file calls: submits, results, terminations.
//!
//! A call about a task of another instance is passed on to that one, which knows how far each row is; if it is gone, the answer is what
//! the store has.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::audit::Entry;
use gse_core::authz::{Denied, Policy};
use gse_core::fleet::find;
use gse_core::http::{ApiError, ContractRequest, Reply, Service, full};
use gse_core::quota::{QuotaError, Share, Wanted};
use gse_core::random::HashMap;
use gse_core::store::StoreError;
use gse_proto::codes::{Code, Inner};
use gse_proto::http::{
    PushFile, Route, TaskIdReply, TaskIdResult, TaskStateQuery, TaskStateReply, TerminateTask, TransferFile,
    TransferResultQuery, TransferSummary, XferListReply, XferListRequest,
};
use gse_proto::ids::{AgentId, TaskId, split_cloud_ip};
use gse_proto::xfer::{Endpoint, XferHeader};
use http::{HeaderMap, HeaderName, HeaderValue, Response};

use crate::Node;
use crate::task::engine::{self, Transfers};
use crate::task::results::{self, Filter};
use crate::task::run::View;
use crate::task::spec;
use crate::task::store::{CreateError, Known, Stopped, endpoint_name};

/// How long another instance may take to answer what is passed on to it.
const PASS_ON: Duration = Duration::from_secs(20);
/// Set on what is passed on: how often it was.
const PASSED_ON: HeaderName = HeaderName::from_static("x-gse-passed-on");
/// It is answered then in any case.
const HOPS: u32 = 2;
/// Answers with more rows are written off the runtime's threads.
const MANY_ROWS: u32 = 1_000;
/// A task whose instance is gone is given up so long after its deadline.
const GIVEN_UP_MS: u64 = 60_000;
/// Tasks of one list at most.
const MOST_LISTED: usize = 1_000;

/// Answers the file calls.
pub struct FileService {
    /// The instance.
    pub node: Arc<Node>,
    /// Who may do what.
    pub policy: Policy,
}

impl Service for FileService {
    fn serves(&self, route: Route) -> bool {
        matches!(
            route,
            Route::TransferFile
                | Route::TransferResult
                | Route::TerminateTransfer
                | Route::PushFile
                | Route::TaskState
                | Route::XferList
                | Route::XferOpen
                | Route::XferClose
                | Route::XferTorrent
        )
    }

    async fn call(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        match request.route {
            Route::TransferFile | Route::PushFile => self.submit(request).await,
            Route::TransferResult => self.result(request).await,
            Route::TerminateTransfer => self.terminate(request).await,
            Route::TaskState => self.state(request).await,
            Route::XferList => self.list(request).await,
            Route::XferOpen => self.open(request).await,
            Route::XferClose => self.close(request).await,
            Route::XferTorrent => self.torrent(request).await,
            _ => Err(Code::NoSuchCall.into()),
        }
    }
}

/// Rows of a task that is not under way here.
type Ends = HashMap<u32, gse_proto::xfer::StoredEnd>;

impl FileService {
    async fn submit(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let node = &self.node;
        let now_ms = node.clock.unix_ms();
        let stamp = jiff::Timestamp::from_millisecond(i64::try_from(now_ms).unwrap_or(0))
            .map_or_else(|_| String::new(), |at| at.strftime("%Y%m%d%H%M%S").to_string());
        let id = TaskId::file(&stamp, node.random.u64(), &node.config.node_id);
        let origin = spec::Origin {
            app: request.caller.app.clone(),
            tenant: request.tenant.clone(),
            request_id: request.request_id.clone(),
            now_ms,
            node_id: node.config.node_id.clone(),
        };
        let limits = &node.config.task;
        let header = if request.route == Route::PushFile {
            spec::push(request.decode::<PushFile>().await?, &id, origin, limits)
        } else {
            spec::transfer(request.decode::<TransferFile>().await?, &id, origin, limits)
        }
        .map_err(ApiError::arguments)?;

        let share = self.allow(&request, &header).await?;
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
                tracing::warn!(task = header.task_id, %error, "the store has not confirmed a file task; it is withdrawn");
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
            sources = header.uploads.len(),
            files = header.groups.len(),
            "file task accepted"
        );
        let reply = task_id(&header.task_id);
        // Before anything moves, so that it is seen however short the task is.
        self.open_by_rule(&request, &header).await;
        Transfers::start(node, header, HashMap::default(), None);
        Reply::json(&reply)
    }

    /// Asks the policy and the limits, and writes down what they say; gives the share of its application's quota that the task takes.
    async fn allow(&self, request: &ContractRequest, header: &XferHeader) -> Result<Option<Share>, ApiError> {
        let node = &self.node;
        let endpoints = || endpoints(header);
        let owners = header.groups.iter().map(|group| group.owner.as_str());
        let accounts = || {
            endpoints()
                .map(|endpoint| endpoint.user.as_str())
                .chain(owners.clone().filter(|owner| !owner.is_empty()))
        };
        let entry = request
            .audit_entry()
            .with_targets(endpoints().map(|endpoint| endpoint.agent_id.as_str()))
            .with_accounts(accounts());
        let entry = Entry {
            task_id: Some(header.task_id.clone()),
            digest: Some(spec::digest(header)),
            ..entry
        };
        let check = |clouds: &HashMap<String, i32>| {
            let targets = endpoints().map(|endpoint| {
                let id = endpoint.agent_id.as_str();
                let cloud = split_cloud_ip(id).map(|(cloud, _)| cloud.0);
                (id, cloud.or_else(|| clouds.get(id).copied()))
            });
            self.policy
                .check(&request.caller, request.operation, accounts(), targets)
        };
        let mut allowed = check(&HashMap::default());
        if matches!(allowed, Err(Denied::Target { .. })) {
            // Perhaps by the cloud area of an agent whose id does not say it.
            let clouds = self.clouds(header).await.map_err(|error| store_error(&error))?;
            allowed = check(&clouds);
        }
        if let Err(denied) = allowed {
            self.audit(entry.refused(denied.to_string())).await?;
            return Err(forbidden(&denied));
        }
        if node.transfers.len() >= node.config.task.max_running {
            let text = format!(
                "{} file tasks are under way, no more are taken; try again later",
                node.transfers.len()
            );
            self.audit(entry.refused(text.clone())).await?;
            return Err(ApiError::new(Code::Limit, text));
        }
        let share = self.share(request, header, &entry).await?;
        if let Err(error) = self.audit(entry).await {
            self.not_needed(share).await;
            return Err(error);
        }
        Ok(share)
    }

    /// The share of its application's quota that a task takes; a refusal is written down.
    async fn share(
        &self,
        request: &ContractRequest,
        header: &XferHeader,
        entry: &Entry,
    ) -> Result<Option<Share>, ApiError> {
        let node = &self.node;
        let wanted = Wanted {
            task: &header.task_id,
            // A list that several files share is one fan-out.
            targets: header.lists.iter().map(|list| list.endpoints.len() as u64).sum(),
            deadline_ms: header.deadline_ms,
        };
        let wait = Duration::from_millis(node.config.task.submit_wait_ms);
        let taken = node
            .quotas
            .take(&request.caller, wanted, node.clock.unix_ms(), wait)
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

    /// Cloud areas of agents with opaque ids.
    pub(crate) async fn clouds(&self, header: &XferHeader) -> Result<HashMap<String, i32>, StoreError> {
        let mut ids: Vec<AgentId> = endpoints(header)
            .filter(|endpoint| split_cloud_ip(&endpoint.agent_id).is_none())
            .filter_map(|endpoint| AgentId::parse(&endpoint.agent_id).ok())
            .collect();
        ids.sort_unstable();
        ids.dedup();
        let records = find::records(self.node.store.raw(), &ids).await?;
        let known = ids.iter().zip(records);
        Ok(known
            .filter_map(|(id, record)| Some((id.as_str().to_owned(), record?.cloud_id)))
            .collect())
    }

    async fn result(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let query: TransferResultQuery = request.decode().await?;
        let known = self.readable(&request, &query.task_id).await?;
        if let Some(reply) = self.pass_on(&request, &known).await {
            return Ok(reply);
        }
        let filter = Filter::of(&query);
        let many = known.layout.rows() > MANY_ROWS;
        let view = self.view(&known).await?;
        let write = move || {
            results::json(&known, &filter, view).map_err(|error| {
                tracing::error!(%error, "rows can't be written as JSON");
                ApiError::from(Code::System)
            })
        };
        let json = if many {
            // Some 50 MB for the largest tasks: nothing for the runtime's threads.
            tokio::task::spawn_blocking(write)
                .await
                .map_err(|error| ApiError::new(Code::System, format!("the answer could not be written: {error}")))??
        } else {
            write()?
        };
        Ok(Reply::Data(Bytes::from(json)))
    }

    /// How each row stands: from memory if the task is under way here, or else from the store.
    async fn view(&self, known: &Known) -> Result<impl Fn(u32) -> View + Send + 'static, ApiError> {
        let task = &known.header.task_id;
        let cell = self.node.transfers.get(task);
        let ends: Ends = match &cell {
            Some(_) => Ends::default(),
            None => self
                .node
                .store
                .ends(task, &known.layout)
                .await
                .map_err(|error| store_error(&error))?,
        };
        let uploads = known.layout.uploads();
        let now = self.node.clock.unix_ms();
        let deadline_ms = known.header.deadline_ms;
        let given_up = now > deadline_ms + GIVEN_UP_MS;
        let created_ms = known.header.created_at_ms;
        Ok(move |row: u32| match &cell {
            Some(cell) => cell.run.lock().view(row),
            None => match ends.get(&row) {
                Some(end) => View::of_end(end, row < uploads),
                None if given_up => View {
                    code: Inner::Timeout.code(),
                    message: "not finished in time; the server that controlled it is gone".into(),
                    status: if row < uploads { 590 } else { 592 },
                    start_ms: created_ms,
                    end_ms: deadline_ms,
                    ..View::open()
                },
                None => View::open(),
            },
        })
    }

    async fn terminate(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let node = &self.node;
        let body: TerminateTask = request.decode().await?;
        let known = self.known(&body.task_id).await?;
        let entry = Entry {
            task_id: Some(body.task_id.clone()),
            ..request
                .audit_entry()
                .with_targets(body.agents.iter().map(|agent| agent.bk_agent_id.as_str()))
        };
        if !self.policy.may_stop(&request.caller, &known.header.app) {
            self.audit(entry.refused("the task belongs to another application"))
                .await?;
            return Err(no_such_task(&body.task_id));
        }
        self.audit(entry).await?;
        let stopped = if body.agents.is_empty() {
            Stopped::All
        } else {
            let names = body
                .agents
                .iter()
                .map(|agent| endpoint_name(&agent.bk_agent_id, agent.container().unwrap_or_default()));
            Stopped::Of(names.collect())
        };
        // In the store first: if its instance is gone, its next life finds it there.
        let left_s = known.header.deadline_ms.saturating_sub(node.clock.unix_ms()) / 1000;
        node.store
            .mark_stopped(&body.task_id, &stopped, left_s + node.config.task.result_ttl_s)
            .await
            .map_err(|error| store_error(&error))?;
        match node.transfers.get(&body.task_id) {
            Some(cell) => engine::stop(node, &cell, &stopped),
            None => {
                if let Some(reply) = self.pass_on(&request, &known).await {
                    return Ok(reply);
                }
            }
        }
        Reply::json(&task_id(&body.task_id))
    }

    async fn state(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let query: TaskStateQuery = request.decode().await?;
        let known = self.readable(&request, &query.task_id).await?;
        if let Some(reply) = self.pass_on(&request, &known).await {
            return Ok(reply);
        }
        let view = self.view(&known).await?;
        let result = results::state(&known, &query.agent_id_list, view);
        Reply::json(&TaskStateReply { result })
    }

    /// File tasks under way, of all instances.
    async fn list(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let query: XferListRequest = request.decode().await?;
        let limit = match query.limit as usize {
            0 => 100,
            limit => limit.min(MOST_LISTED),
        };
        let node = &self.node;
        let others = node
            .others
            .all(node.store.raw())
            .await
            .map_err(|error| store_error(&error))?;
        let mut names: Vec<&str> = others.values().map(|info| info.node_id.as_str()).collect();
        if !names.contains(&node.config.node_id.as_str()) {
            names.push(&node.config.node_id);
        }
        let mut ids = Vec::new();
        for name in names {
            ids.extend(node.store.unfinished(name).await.map_err(|error| store_error(&error))?);
        }
        // Their ids begin with the time of their submit.
        ids.sort_unstable_by(|a, b| b.cmp(a));
        let mut tasks = Vec::new();
        for id in ids {
            if tasks.len() >= limit {
                break;
            }
            let found = node.store.known(&id).await.map_err(|error| store_error(&error))?;
            let Some(known) = found.filter(|known| self.policy.may_read(&request.caller, &known.header.app)) else {
                continue;
            };
            tasks.push(self.summary(&known).await?);
        }
        Reply::json(&XferListReply { tasks })
    }

    async fn summary(&self, known: &Known) -> Result<TransferSummary, ApiError> {
        let header = &known.header;
        let over = match self.node.transfers.get(&header.task_id) {
            Some(cell) => known.layout.rows() - cell.run.lock().open_rows(),
            None => {
                let ends = self.node.store.ends(&header.task_id, &known.layout).await;
                u32::try_from(ends.map_err(|error| store_error(&error))?.len()).unwrap_or(u32::MAX)
            }
        };
        let first = match (header.uploads.first(), header.groups.first()) {
            (Some(upload), _) => format!("{}/{}", upload.dir.trim_end_matches('/'), upload.name),
            (None, Some(group)) => group.name.clone(),
            (None, None) => String::new(),
        };
        Ok(TransferSummary {
            task_id: header.task_id.clone(),
            app: header.app.clone(),
            created_at: header.created_at_ms,
            deadline: header.deadline_ms,
            push: header.push,
            first,
            uploads: known.layout.uploads(),
            downloads: known.layout.rows() - known.layout.uploads(),
            over,
            instance: header.node_id.clone(),
        })
    }

    /// A task that the caller may read. One that it may not read looks like one that does not exist.
    pub(crate) async fn readable(&self, request: &ContractRequest, task: &str) -> Result<Known, ApiError> {
        let known = self.known(task).await?;
        if self.policy.may_read(&request.caller, &known.header.app) {
            Ok(known)
        } else {
            Err(no_such_task(task))
        }
    }

    pub(crate) async fn known(&self, task: &str) -> Result<Known, ApiError> {
        // Anything that is not an id would only be a strange key.
        TaskId::parse(task).map_err(|error| ApiError::arguments(format!("task_id: {error}")))?;
        if let Some(cell) = self.node.transfers.get(task) {
            return Ok(cell.known.clone());
        }
        let found = self.node.store.known(task).await;
        found
            .map_err(|error| store_error(&error))?
            .ok_or_else(|| no_such_task(task))
    }

    /// The answer of the instance that controls a task, if that is another one and it answers.
    pub(crate) async fn pass_on(&self, request: &ContractRequest, known: &Known) -> Option<Reply> {
        let node = &self.node;
        let mut owner = known.header.node_id.clone();
        let hops = request
            .headers
            .get(&PASSED_ON)
            .map_or(0, |hops| if hops == "1" { 1 } else { HOPS });
        if owner == node.config.node_id || hops >= HOPS {
            return None;
        }
        let others = match node.others.all(node.store.raw()).await {
            Ok(others) => others,
            Err(error) => {
                tracing::debug!(%error, "other instances can't be looked up");
                return None;
            }
        };
        let find = |owner: &str| {
            let info = others
                .get(&TaskId::instance_tag(owner))
                .filter(|info| !info.calls.is_empty());
            info.cloned()
        };
        let info = match find(&owner).filter(|_| hops == 0) {
            Some(info) => info,
            None => {
                // Its instance is gone, or it is not its task any more: another one may have taken it over since the header was read.
                let now = node.store.known_now(&known.header.task_id).await.ok()??;
                owner.clone_from(&now.header.node_id);
                find(&owner).filter(|_| owner != node.config.node_id)?
            }
        };
        let mut headers = HeaderMap::new();
        request.caller.assert_into(&mut headers);
        headers.insert(PASSED_ON, HeaderValue::from(hops + 1));
        for (name, text) in [
            ("x-bk-tenant-id", &request.tenant),
            ("x-bkapi-request-id", &request.request_id),
        ] {
            if let Ok(value) = HeaderValue::from_str(text) {
                headers.insert(name, value);
            }
        }
        let url = format!("https://{}{}", info.calls, request.route.path());
        match node
            .client
            .post_json(&url, headers, request.body.clone(), PASS_ON)
            .await
        {
            Ok(reply) => {
                let mut response = Response::new(full(reply.body));
                *response.status_mut() = reply.status;
                let json = HeaderValue::from_static("application/json");
                response.headers_mut().insert(http::header::CONTENT_TYPE, json);
                Some(Reply::Raw(response))
            }
            Err(error) => {
                tracing::info!(task = known.header.task_id, owner, %error, "the instance of a task does not answer; the store does");
                None
            }
        }
    }

    pub(crate) async fn audit(&self, entry: Entry) -> Result<(), ApiError> {
        self.node.front.audit.record(entry).await.map_err(|error| {
            tracing::error!(%error, "the audit trail can't be written; the call is refused");
            ApiError::new(Code::System, "the audit trail can't be written; nothing was done")
        })
    }
}

/// Everybody that a task touches, lists that several files share once.
fn endpoints(header: &XferHeader) -> impl Iterator<Item = &Endpoint> {
    let sources = header.uploads.iter().filter_map(|upload| upload.source.as_ref());
    sources.chain(header.lists.iter().flat_map(|list| &list.endpoints))
}

/// Takes a task back that the store has not confirmed, for as long as that takes.
async fn withdraw(node: Arc<Node>, task: String) {
    let mut wait = Duration::from_millis(200);
    while let Err(error) = node.store.withdraw(&node.config.node_id, &task).await {
        tracing::warn!(task, %error, "a file task can't be withdrawn yet");
        tokio::select! {
            () = node.life.draining() => return,
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(Duration::from_secs(5));
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

pub(crate) fn no_such_task(task: &str) -> ApiError {
    ApiError::new(
        Code::NoSuchTask,
        format!("there is no task {task:?}, or its results have expired"),
    )
}

pub(crate) fn store_error(error: &StoreError) -> ApiError {
    tracing::warn!(%error, "a call failed for want of the store");
    ApiError::from(Code::StoreUnavailable)
}
