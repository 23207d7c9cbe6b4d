//! Calls about registrations that are answered with what came of them, and about names of hosts and groups of processes.

use std::collections::BTreeMap;
use std::time::Duration;

use gse_core::http::{ApiError, ContractRequest, Reply};
use gse_core::store::{Batch, as_bytes, command};
use gse_proto::http::{ProcGroupQuery, ProcObject, ProcRow, ProcUpgrade, ProcUpgradeReply, Route};
use gse_proto::ids::AgentId;
use gse_proto::keys;
use gse_proto::proc::OpType;
use serde_json::Value;

use super::{ProcService, forbidden, store_error};
use crate::registry;
use crate::task::spec::check_name;

/// Longest text that is kept of groups of one namespace on one host.
const MAX_GROUPS: usize = 64 << 10;

impl ProcService {
    /// Registers or unregisters, and waits for what comes of it: agents that take longer have 115, and take it in all the same.
    pub(super) async fn info(&self, request: &ContractRequest, op: OpType, only_new: bool) -> Result<Reply, ApiError> {
        let mut object: ProcObject = request.decode().await?;
        object.op_type = Some(i64::from(op as i32));
        let cell = self.submit(request, vec![object], only_new).await?;
        cell.finished_within(Duration::from_millis(self.node.config.task.sync_wait_ms))
            .await;
        let old_keys = matches!(
            request.route,
            Route::V1UpdateProcInfo | Route::V1RegisterProcInfo | Route::V1UnregisterProcInfo
        );
        self.rows(cell.known.clone(), old_keys).await
    }

    /// What is known of hosts under `cloud:ip` is theirs under their new ids (contract procmgr-agent-lifecycle#50).
    pub(super) async fn upgrade(&self, request: &ContractRequest) -> Result<Reply, ApiError> {
        let node = &self.node;
        let body: ProcUpgrade = request.decode().await?;
        if body.hosts.len() > node.config.query.max_ids {
            return Err(ApiError::arguments(format!(
                "{} hosts in one call, at most {} are allowed; send them in parts",
                body.hosts.len(),
                node.config.query.max_ids
            )));
        }
        let names: Vec<String> = body.hosts.iter().map(gse_proto::http::ProcHost::id).collect();
        let entry = request.audit_entry().with_targets(names.iter().map(String::as_str));
        let ids = || {
            let old = names.iter().map(String::as_str);
            old.chain(body.hosts.iter().map(|host| host.bk_agent_id.as_str()))
        };
        if let Err(denied) = self.targets_allowed(request, std::iter::empty, ids).await? {
            self.audit(entry.refused(denied.to_string())).await?;
            return Err(forbidden(&denied));
        }
        self.audit(entry).await?;
        let mut reply = ProcUpgradeReply::default();
        for (name, host) in names.into_iter().zip(&body.hosts) {
            let fits = AgentId::parse(&name).is_ok_and(|old| old.cloud_ip().is_some());
            let agent = AgentId::parse(&host.bk_agent_id).ok().filter(|_| fits);
            let Some(agent) = agent else {
                reply.failed.push(name);
                continue;
            };
            if agent.as_str() != name {
                let moved = registry::rename(node.store.raw(), &name, agent.as_str(), node.clock.unix_ms()).await;
                match moved {
                    Ok(count) if count > 0 => {
                        tracing::info!(from = name, %agent, processes = count, "registrations were moved")
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!(from = name, %agent, %error, "registrations can't be moved");
                        reply.failed.push(name);
                        continue;
                    }
                }
            }
            reply.success.push(name);
        }
        Reply::json(&reply)
    }

    /// Keeps what is said of groups as it is said: nothing here acts on it.
    pub(super) async fn set_groups(&self, request: &ContractRequest) -> Result<Reply, ApiError> {
        let node = &self.node;
        let mut query: ProcGroupQuery = request.decode().await?;
        let mut said: BTreeMap<String, Value> = request.decode().await?;
        let (namespace, ids) = self.group_names(&mut query)?;
        for key in ["hosts", "agent_id_list", "bk_app_secret", "bk_app_code", "bk_username"] {
            said.remove(key);
        }
        let text = serde_json::to_string(&said).map_err(|_| ApiError::arguments("body: can't be kept as JSON"))?;
        if text.len() > MAX_GROUPS {
            return Err(ApiError::arguments(format!(
                "{} bytes about groups, at most {MAX_GROUPS} are kept",
                text.len()
            )));
        }
        let entry = request.audit_entry().with_targets(ids.iter().map(AgentId::as_str));
        let names = || ids.iter().map(AgentId::as_str);
        if let Err(denied) = self.targets_allowed(request, std::iter::empty, names).await? {
            self.audit(entry.refused(denied.to_string())).await?;
            return Err(forbidden(&denied));
        }
        self.audit(entry).await?;
        let mut batch = Batch::new();
        for id in &ids {
            let key = keys::proc_groups(id.as_str());
            let mut set = command("HSET", &key);
            set.arg(&namespace).arg(&text);
            batch.push(&key, set);
        }
        node.store.raw().run(batch).await.map_err(|error| store_error(&error))?;
        Self::group_rows(&namespace, &ids, |_| Some(String::new()))
    }

    /// Shows what was said of groups.
    pub(super) async fn groups(&self, request: &ContractRequest) -> Result<Reply, ApiError> {
        let mut query: ProcGroupQuery = request.decode().await?;
        let (namespace, ids) = self.group_names(&mut query)?;
        let mut batch = Batch::new();
        for id in &ids {
            let key = keys::proc_groups(id.as_str());
            let mut get = command("HGET", &key);
            get.arg(&namespace);
            batch.push(&key, get);
        }
        let replies = self.node.store.raw().run(batch).await;
        let mut texts = Vec::with_capacity(ids.len());
        for reply in replies.map_err(|error| store_error(&error))? {
            let bytes = as_bytes(reply).map_err(|error| store_error(&error))?;
            texts.push(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()));
        }
        Self::group_rows(&namespace, &ids, |n| texts.get(n).cloned().flatten())
    }

    fn group_names(&self, query: &mut ProcGroupQuery) -> Result<(String, Vec<AgentId>), ApiError> {
        let namespace = query.meta.namespace.clone();
        if namespace.is_empty() {
            return Err(ApiError::arguments("meta.namespace is missing"));
        }
        check_name(&namespace).map_err(|why| ApiError::arguments(format!("meta.namespace {why}")))?;
        let ids = query.take_ids();
        let most = self.node.config.query.max_ids;
        if ids.is_empty() || ids.len() > most {
            return Err(ApiError::arguments(format!(
                "{} hosts; give from 1 to {most} in agent_id_list or hosts",
                ids.len()
            )));
        }
        let parsed: Result<Vec<AgentId>, _> = ids.iter().map(|id| AgentId::parse(id)).collect();
        let ids = parsed.map_err(|error| ApiError::arguments(format!("agent_id_list: {error}")))?;
        Ok((namespace, ids))
    }

    fn group_rows(namespace: &str, ids: &[AgentId], text: impl Fn(usize) -> Option<String>) -> Result<Reply, ApiError> {
        let rows: BTreeMap<String, ProcRow> = ids
            .iter()
            .enumerate()
            .map(|(n, id)| {
                let row = ProcRow {
                    error_code: 0,
                    error_msg: "success".into(),
                    content: text(n).unwrap_or_default(),
                };
                (format!("{id}:{namespace}"), row)
            })
            .collect();
        Reply::json(&rows)
    }
}
