//! The calls that open a file task to foreign clients, close it, and tell of its `.torrent` files.

use gse_core::audit::Entry;
use gse_core::authz::Denied;
use gse_core::http::{ApiError, ContractRequest, Reply};
use gse_core::random::HashMap;
use gse_proto::codes::Code;
use gse_proto::http::{XferOpenRequest, XferTaskRequest, XferTorrentRequest};
use gse_proto::ids::split_cloud_ip;
use gse_proto::xfer::XferHeader;

use super::open::{self, OpenError};
use crate::http::{FileService, forbidden, no_such_task, store_error};

fn refused(error: &OpenError) -> ApiError {
    match error {
        OpenError::Off => ApiError::new(Code::ServiceUnavailable, error.to_string()),
        OpenError::Full(_) | OpenError::Parts { .. } => ApiError::new(Code::Limit, error.to_string()),
        OpenError::Store(error) => store_error(error),
    }
}

impl FileService {
    /// Opens a task. Who asks for it must be allowed to read from its sources itself: what is opened anybody can have.
    pub(crate) async fn open(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let query: XferOpenRequest = request.decode().await?;
        let known = self.known(&query.task_id).await?;
        if let Some(reply) = self.pass_on(&request, &known).await {
            return Ok(reply);
        }
        let node = &self.node;
        let header = &known.header;
        let sources = || header.uploads.iter().filter_map(|upload| upload.source.as_ref());
        let accounts = || sources().map(|source| source.user.as_str());
        let entry = request
            .audit_entry()
            .with_targets(sources().map(|source| source.agent_id.as_str()))
            .with_accounts(accounts());
        let entry = Entry {
            task_id: Some(query.task_id.clone()),
            ..entry
        };
        if !self.policy.may_stop(&request.caller, &header.app) {
            self.audit(entry.refused("the task belongs to another application"))
                .await?;
            return Err(no_such_task(&query.task_id));
        }
        let check = |clouds: &HashMap<String, i32>| {
            let targets = sources().map(|source| {
                let id = source.agent_id.as_str();
                let cloud = split_cloud_ip(id).map(|(cloud, _)| cloud.0);
                (id, cloud.or_else(|| clouds.get(id).copied()))
            });
            self.policy
                .check(&request.caller, request.operation, accounts(), targets)
        };
        let mut allowed = check(&HashMap::default());
        if matches!(allowed, Err(Denied::Target { .. })) {
            allowed = check(&self.clouds(header).await.map_err(|error| store_error(&error))?);
        }
        if let Err(denied) = allowed {
            self.audit(entry.refused(denied.to_string())).await?;
            return Err(forbidden(&denied));
        }
        let Some(front) = &node.foreign else {
            let error = OpenError::Off;
            self.audit(entry.refused(error.to_string())).await?;
            return Err(refused(&error));
        };
        self.audit(entry).await?;
        let asked = query.expire_seconds.saturating_mul(1000);
        let lasts = if asked == 0 {
            front.expiry_ms()
        } else {
            asked.min(front.expiry_ms())
        };
        open::open(node, header, node.clock.unix_ms() + lasts)
            .await
            .map_err(|error| refused(&error))?;
        Reply::json(&front.describe(&query.task_id, false))
    }

    /// Opens a new task if a rule says so; that is written down like a call. A failure spoils nothing but this.
    pub(crate) async fn open_by_rule(&self, request: &ContractRequest, header: &XferHeader) {
        let Some(front) = self
            .node
            .foreign
            .as_ref()
            .filter(|front| front.opens_always(&header.app))
        else {
            return;
        };
        let entry = Entry {
            operation: gse_core::authz::Operation::FileOpen.as_str().to_owned(),
            task_id: Some(header.task_id.clone()),
            reason: Some("front.open_apps".to_owned()),
            ..request.audit_entry()
        };
        if self.audit(entry).await.is_err() {
            return;
        }
        let until = self.node.clock.unix_ms() + front.expiry_ms();
        if let Err(error) = open::open(&self.node, header, until).await {
            tracing::warn!(task = header.task_id, %error, "a file task is not opened to foreign clients, although a rule says so");
        }
    }

    /// Closes a task.
    pub(crate) async fn close(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let query: XferTaskRequest = request.decode().await?;
        let known = self.known(&query.task_id).await?;
        if let Some(reply) = self.pass_on(&request, &known).await {
            return Ok(reply);
        }
        let entry = Entry {
            task_id: Some(query.task_id.clone()),
            ..request.audit_entry()
        };
        if !self.policy.may_stop(&request.caller, &known.header.app) {
            self.audit(entry.refused("the task belongs to another application"))
                .await?;
            return Err(no_such_task(&query.task_id));
        }
        self.audit(entry).await?;
        let front = self.node.foreign.as_ref().ok_or_else(|| refused(&OpenError::Off))?;
        open::close(&self.node, front, &query.task_id).await;
        Reply::json(&front.describe(&query.task_id, false))
    }

    /// How a task is open.
    pub(crate) async fn torrent(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let query: XferTorrentRequest = request.decode().await?;
        let known = self.readable(&request, &query.task_id).await?;
        if let Some(reply) = self.pass_on(&request, &known).await {
            return Ok(reply);
        }
        let front = self.node.foreign.as_ref().ok_or_else(|| refused(&OpenError::Off))?;
        Reply::json(&front.describe(&query.task_id, query.content))
    }
}
