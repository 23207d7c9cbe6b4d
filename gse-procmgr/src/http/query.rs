//! What is read from the store and never from hosts: last known states, by host and page by page.

use gse_core::fleet::find;
use gse_core::http::{ApiError, ContractRequest, Reply};
use gse_core::random::HashMap;
use gse_core::store::StoreError;
use gse_proto::http::{
    ProcInfo, ProcInfoHost, ProcInfoMeta, ProcStatusQuery, ProcStatusReply, ProcSyncQuery, ProcSyncReply,
};
use gse_proto::ids::{AgentId, split_cloud_ip};
use gse_proto::proc::{Label, Process};

use super::{ProcService, forbidden, off_thread, store_error};
use crate::registry::{self, Entry};
use crate::task::content::{clean_version, finite};
use crate::task::spec::check_name;

/// Answers with more rows are written off the runtime's threads.
const MANY_ROWS: usize = 500;
/// Entries of a page when the caller does not say.
const DEFAULT_PAGE: i64 = 1_000;
/// The contract's status numbers.
const UNREGISTERED: i32 = 0;
const RUNNING: i32 = 1;
const STOPPED: i32 = 2;

impl ProcService {
    /// Last known states of a process (or of all of a namespace) on hosts.
    pub(super) async fn status(&self, request: &ContractRequest) -> Result<Reply, ApiError> {
        let mut query: ProcStatusQuery = request.decode().await?;
        let ids = query.take_ids();
        let most = self.node.config.query.max_ids;
        if ids.len() > most {
            return Err(ApiError::arguments(format!(
                "{} hosts in one call, at most {most} are allowed; ask in parts",
                ids.len()
            )));
        }
        let namespace = named(query.namespace())?.to_owned();
        check_name(&query.meta.name).map_err(|why| ApiError::arguments(format!("meta.name {why}")))?;
        let names = || ids.iter().map(String::as_str);
        if let Err(denied) = self.targets_allowed(request, std::iter::empty, names).await? {
            self.audit(request.audit_entry().with_targets(names()).refused(denied.to_string()))
                .await?;
            return Err(forbidden(&denied));
        }
        let found = self
            .states(&ids, &namespace, &query.meta.name)
            .await
            .map_err(|error| store_error(&error))?;
        let labels = query.meta.labels;
        off_thread(ids.len() > MANY_ROWS, move || {
            let proc_infos = found
                .into_iter()
                .map(|(id, host, name, entry)| {
                    let mut info = info(&id, host, &namespace, &name, &entry);
                    if info.meta.labels.is_empty() {
                        info.meta.labels.clone_from(&labels);
                    }
                    info
                })
                .collect();
            Reply::json(&ProcStatusReply { proc_infos })
        })
        .await
    }

    /// What is known of each id, in the order asked: the id, its host, the name of a process, and how that is.
    async fn states(
        &self,
        ids: &[String],
        namespace: &str,
        name: &str,
    ) -> Result<Vec<(String, ProcInfoHost, String, Entry)>, StoreError> {
        let store = self.node.store.raw();
        // What can't be an id has no processes.
        let parsed: Vec<(usize, AgentId)> = ids
            .iter()
            .enumerate()
            .filter_map(|(n, id)| Some((n, AgentId::parse(id).ok()?)))
            .collect();
        let asked: Vec<AgentId> = parsed.iter().map(|(_, id)| id.clone()).collect();
        let agents = find::resolve(store, &asked).await?;
        let hosts = self.addresses(ids, &asked).await?;
        let mut entries: Vec<Vec<(String, Entry)>> = vec![vec![]; ids.len()];
        if name.is_empty() {
            let names: Vec<&str> = agents.iter().map(AgentId::as_str).collect();
            for ((n, _), host) in parsed.iter().zip(registry::hosts(store, &names).await?) {
                let of_namespace = host.entries.into_iter().filter(|((of, _), _)| of == namespace);
                entries[*n] = of_namespace.map(|((_, name), entry)| (name, entry)).collect();
            }
        } else {
            let names: Vec<(&str, &str, &str)> = agents.iter().map(|agent| (agent.as_str(), namespace, name)).collect();
            let mut found = registry::entries(store, &names).await?;
            // Registered by address before the host had an id.
            let missing: Vec<usize> = (0..found.len())
                .filter(|at| found[*at].is_empty() && agents[*at] != asked[*at])
                .collect();
            let names: Vec<(&str, &str, &str)> = missing
                .iter()
                .map(|at| (asked[*at].as_str(), namespace, name))
                .collect();
            for (at, entry) in missing.iter().zip(registry::entries(store, &names).await?) {
                found[*at] = entry;
            }
            for ((n, _), entry) in parsed.iter().zip(found) {
                entries[*n] = vec![(name.to_owned(), entry)];
            }
            for rest in entries.iter_mut().filter(|entries| entries.is_empty()) {
                rest.push((name.to_owned(), Entry::default()));
            }
        }
        let mut all = Vec::with_capacity(ids.len());
        for ((id, host), entries) in ids.iter().zip(hosts).zip(entries) {
            for (name, entry) in entries {
                all.push((id.clone(), host.clone(), name, entry));
            }
        }
        Ok(all)
    }

    /// Address and cloud area of each id: as it says itself, or as its agent has said.
    async fn addresses(&self, ids: &[String], parsed: &[AgentId]) -> Result<Vec<ProcInfoHost>, StoreError> {
        let mut opaque: Vec<AgentId> = parsed.iter().filter(|id| id.cloud_ip().is_none()).cloned().collect();
        opaque.sort_unstable();
        opaque.dedup();
        let records = find::records(self.node.store.raw(), &opaque).await?;
        let known: HashMap<&str, ProcInfoHost> = opaque
            .iter()
            .zip(records)
            .filter_map(|(id, record)| {
                let record = record?;
                let host = ProcInfoHost {
                    ip: record.addresses.into_iter().next().unwrap_or_default(),
                    bk_cloud_id: record.cloud_id,
                };
                Some((id.as_str(), host))
            })
            .collect();
        let host = |id: &String| match split_cloud_ip(id) {
            Some((cloud, _)) => ProcInfoHost {
                // As it was written.
                ip: id.split_once(':').map_or("", |(_, ip)| ip).to_owned(),
                bk_cloud_id: cloud.0,
            },
            None => known.get(id.as_str()).cloned().unwrap_or_default(),
        };
        Ok(ids.iter().map(host).collect())
    }

    /// A part of all processes of a namespace, in the order in which they were first seen (contract procmgr-agent-lifecycle#56).
    pub(super) async fn sync(&self, request: &ContractRequest) -> Result<Reply, ApiError> {
        let query: ProcSyncQuery = request.decode().await?;
        let namespace = if query.meta.namespace.is_empty() {
            query.namespace.as_str()
        } else {
            query.meta.namespace.as_str()
        };
        let namespace = named(namespace)?.to_owned();
        let start = query.page.start.unwrap_or(0);
        let limit = query.page.limit.unwrap_or(DEFAULT_PAGE);
        let (Ok(start), Ok(limit)) = (u64::try_from(start), usize::try_from(limit)) else {
            return Err(ApiError::arguments(format!(
                "page: start {start} and limit {limit} must not be negative"
            )));
        };
        let limit = limit.min(self.node.config.query.max_page);
        let store = self.node.store.raw();
        let page = async {
            let (count, members) = registry::page(store, &namespace, start, limit).await?;
            let names: Vec<(&str, &str, &str)> = members
                .iter()
                .map(|(agent, name)| (agent.as_str(), namespace.as_str(), name.as_str()))
                .collect();
            let entries = registry::entries(store, &names).await?;
            let ids: Vec<String> = members.iter().map(|(agent, _)| agent.clone()).collect();
            let parsed: Vec<AgentId> = ids.iter().filter_map(|id| AgentId::parse(id).ok()).collect();
            let hosts = self.addresses(&ids, &parsed).await?;
            Ok::<_, StoreError>((count, members, entries, hosts))
        };
        let (count, members, entries, hosts) = page.await.map_err(|error| store_error(&error))?;
        // A caller that may not see every host sees those that it may; the places of the others stay, so that pages do not shift.
        let visible = |agent: &str, host: &ProcInfoHost| {
            // Who has no address is not known, and its cloud area neither.
            let cloud = (!host.ip.is_empty()).then_some(host.bk_cloud_id);
            let target = std::iter::once((agent, cloud));
            let checked = self
                .policy
                .check(&request.caller, request.operation, std::iter::empty(), target);
            checked.is_ok()
        };
        let proc_infos: Vec<ProcInfo> = members
            .iter()
            .zip(&entries)
            .zip(hosts)
            .filter(|(((agent, _), _), host)| visible(agent, host))
            .map(|(((agent, name), entry), host)| info(agent, host, &namespace, name, entry))
            .collect();
        off_thread(proc_infos.len() > MANY_ROWS, move || {
            Reply::json(&ProcSyncReply { count, proc_infos })
        })
        .await
    }
}

impl ProcService {
    /// The namespaces, sorted. Their names are no secret of the hosts that have processes of them.
    pub(super) async fn namespaces(&self) -> Result<Reply, ApiError> {
        let found = registry::namespaces(self.node.store.raw()).await;
        let mut namespaces = found.map_err(|error| store_error(&error))?;
        namespaces.sort_unstable();
        Reply::json(&serde_json::json!({ "namespaces": namespaces }))
    }
}

fn named(namespace: &str) -> Result<&str, ApiError> {
    if namespace.is_empty() {
        return Err(ApiError::arguments("meta.namespace is missing"));
    }
    check_name(namespace).map_err(|why| ApiError::arguments(format!("meta.namespace {why}")))?;
    Ok(namespace)
}

/// What clients get of a process (contract procmgr-agent-lifecycle#31).
fn info(id: &str, host: ProcInfoHost, namespace: &str, name: &str, entry: &Entry) -> ProcInfo {
    let mut info = ProcInfo {
        meta: ProcInfoMeta {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            labels: labels(entry)
                .map(|label| (label.key.clone(), label.value.clone()))
                .collect(),
        },
        host,
        bk_agent_id: id.to_owned(),
        status: UNREGISTERED,
        pid: -1,
        ..ProcInfo::default()
    };
    let unknown = Process::default();
    let state = entry.state.as_ref().unwrap_or(&unknown);
    if state.known {
        info.status = if state.pid > 0 { RUNNING } else { STOPPED };
        info.isauto = state.hosted;
        if state.pid > 0 {
            info.pid = state.pid;
        }
        info.version = clean_version(&state.version);
        info.register_time = state.register_time;
        info.last_start_time = state.last_start_time;
        info.report_time = state.report_time;
        info.cpu_usage = finite(state.cpu_usage);
        info.mem_usage = finite(state.mem_usage);
        info.message.clone_from(&state.trouble);
    } else if let Some(registration) = &entry.registration {
        // Its host has not told of it since it was registered.
        info.status = STOPPED;
        info.isauto = registration.hosted;
        info.register_time = registration.register_time;
        info.message = "not reported by its host yet".into();
    }
    info
}

fn labels(entry: &Entry) -> impl Iterator<Item = &Label> {
    let told = entry.state.iter().flat_map(|state| &state.labels);
    let registered = entry.registration.iter().flat_map(|registration| &registration.labels);
    // Those of the state, if there is one.
    told.chain(registered.filter(|_| entry.state.is_none()))
}
