//! From the body of a submit to what is stored: checks, limits, what is the same thing said twice.
//!
//! What is wrong with the whole request is an error of the call. What is wrong with one host is a row of its own and never spoils
//! the others.

use std::collections::HashMap;
use std::collections::HashSet;
use std::collections::hash_map::Entry;

use bytes::Bytes;
use gse_proto::codes::Inner;
use gse_proto::http::{AgentEndpoint, PushFile, TransferFile};
use gse_proto::ids::{AgentId, TaskId};
use gse_proto::xfer::{Endpoint, Group, Targets, Upload, XferHeader};

use crate::config::TaskConfig;

/// Longest id, container id or account that is echoed; far longer than any real one, so that a wrong one is a row and not an error.
const MAX_ASKED: usize = 4096;
/// Longest directory.
const MAX_DIR: usize = 4096;
/// Longest file name or pattern.
const MAX_NAME: usize = 1024;
/// Bytes in a megabyte, as speeds mean it.
const MEGABYTE: u64 = 1 << 20;

/// Who asks, and when.
#[derive(Debug, Clone)]
pub struct Origin {
    /// Application.
    pub app: String,
    /// `X-Bk-Tenant-Id`, any value.
    pub tenant: String,
    /// Of the HTTP request.
    pub request_id: String,
    /// Unix ms.
    pub now_ms: u64,
    /// Instance that takes it.
    pub node_id: String,
}

/// Lays a distribution out.
///
/// # Errors
/// What is wrong with it, for the caller to read.
pub fn transfer(body: TransferFile, id: &TaskId, origin: Origin, limits: &TaskConfig) -> Result<XferHeader, String> {
    check_count("tasks", body.tasks.len(), limits.max_files)?;
    let upload_limit = speed("upload_speed", body.upload_speed)?;
    let download_limit = speed("download_speed", body.download_speed)?;
    let mut plan = Plan::new(limits);
    for (n, task) in body.tasks.into_iter().enumerate() {
        let (source, target) = (task.source, task.target);
        let at = |field: &str| format!("tasks[{n}].{field}");
        check_dir(&at("source.store_dir"), &source.store_dir)?;
        if source.file_name.len() > MAX_NAME || source.file_name.contains(['/', '\0']) {
            return Err(format!(
                "{} must be a file name or a pattern for one, without a slash, of at most {MAX_NAME} bytes, not {:?}",
                at("source.file_name"),
                clip(&source.file_name)
            ));
        }
        if matches!(source.file_name.as_str(), "." | "..") {
            return Err(format!(
                "{} must name a file; leave it empty to send the directory",
                at("source.file_name")
            ));
        }
        check_endpoint(&at("source.agent"), &source.agent)?;
        check_dir(&at("target.store_dir"), &target.store_dir)?;
        if !target.file_name.is_empty() {
            check_name(&at("target.file_name"), &target.file_name)?;
        }
        let owner = check_owner(&at("target.owner"), target.owner)?;
        let mode = mode(&at("target.permission"), target.permission)?;
        let upload = plan.upload(endpoint(source.agent), source.store_dir, source.file_name);
        let list = plan.targets(&at("target.agents"), target.agents, endpoint)?;
        plan.add(Group {
            upload,
            dir: target.store_dir,
            name: target.file_name,
            owner,
            mode,
            list,
            content: Bytes::new(),
        });
    }
    let mut header = plan.finish(id, origin, body.timeout_seconds)?;
    header.make_dirs = body.auto_mkdir;
    header.upload_limit = upload_limit;
    header.download_limit = download_limit;
    Ok(header)
}

/// Lays a push out.
///
/// # Errors
/// As [`transfer`].
pub fn push(body: PushFile, id: &TaskId, origin: Origin, limits: &TaskConfig) -> Result<XferHeader, String> {
    check_count("tasks", body.tasks.len(), limits.max_files)?;
    let total: usize = body.tasks.iter().map(|task| task.file_content.len()).sum();
    if total > limits.max_push_total_bytes {
        return Err(format!(
            "the contents have {total} bytes together, at most {} are allowed",
            limits.max_push_total_bytes
        ));
    }
    let mut plan = Plan::new(limits);
    for (n, task) in body.tasks.into_iter().enumerate() {
        let at = |field: &str| format!("tasks[{n}].{field}");
        check_name(&at("file_name"), &task.file_name)?;
        check_dir(&at("store_dir"), &task.store_dir)?;
        if task.file_content.len() > limits.max_push_bytes {
            return Err(format!(
                "{} has {} bytes, at most {} are allowed; distribute larger files with async_transfer_file",
                at("file_content"),
                task.file_content.len(),
                limits.max_push_bytes
            ));
        }
        let owner = check_owner(&at("owner"), task.owner)?;
        let mode = mode(&at("right"), task.right)?;
        let mut agents = task.agents;
        agents.extend(task.agent_id_list.into_iter().map(|bk_agent_id| AgentEndpoint {
            bk_agent_id,
            ..AgentEndpoint::default()
        }));
        // This call needs no account: without one it is root that writes.
        let writer = |mut agent: AgentEndpoint| {
            if agent.user.is_empty() {
                agent.user = ROOT.into();
            }
            endpoint(agent)
        };
        let list = plan.targets(&at("agents"), agents, writer)?;
        plan.add(Group {
            upload: 0,
            dir: task.store_dir,
            name: task.file_name,
            owner,
            mode,
            list,
            content: Bytes::from(task.file_content),
        });
    }
    let mut header = plan.finish(id, origin, body.timeout_seconds)?;
    header.push = true;
    header.make_dirs = body.auto_mkdir;
    Ok(header)
}

/// The account that writes what is pushed without naming one.
const ROOT: &str = "root";

/// SHA-256 over what is sent, from where and to where, for the audit trail.
#[must_use]
pub fn digest(header: &XferHeader) -> String {
    use sha2::Digest;
    let mut hash = sha2::Sha256::new();
    // Lengths in between, so that no two submits have the same text.
    let mut add = |part: &[u8]| {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    };
    for upload in &header.uploads {
        add(upload.dir.as_bytes());
        add(upload.name.as_bytes());
    }
    for group in &header.groups {
        add(group.dir.as_bytes());
        add(group.name.as_bytes());
        add(&group.content);
    }
    hex::encode(hash.finalize())
}

/// A task as it grows.
struct Plan<'a> {
    limits: &'a TaskConfig,
    uploads: Vec<Upload>,
    upload_at: HashMap<(String, String, String, String), u32>,
    groups: Vec<Group>,
    /// Which groups put the same thing to the same place, by all but their targets.
    group_at: HashMap<(u32, String, String), usize>,
    lists: Vec<Targets>,
    /// Callers repeat the whole list of targets for each file.
    list_at: HashMap<Vec<AgentEndpoint>, u32>,
}

fn index(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl<'a> Plan<'a> {
    fn new(limits: &'a TaskConfig) -> Self {
        Self {
            limits,
            uploads: vec![],
            upload_at: HashMap::new(),
            groups: vec![],
            group_at: HashMap::new(),
            lists: vec![],
            list_at: HashMap::new(),
        }
    }

    /// The same thing of the same source is one upload, however often it is named.
    fn upload(&mut self, source: Endpoint, dir: String, name: String) -> u32 {
        let key = (
            source.agent_id.clone(),
            source.container_id.clone(),
            dir.clone(),
            name.clone(),
        );
        let next = index(self.uploads.len());
        match self.upload_at.entry(key) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                new.insert(next);
                self.uploads.push(Upload {
                    source: Some(source),
                    dir,
                    name,
                });
                next
            }
        }
    }

    fn targets(
        &mut self,
        at: &str,
        agents: Vec<AgentEndpoint>,
        endpoint: impl Fn(AgentEndpoint) -> Endpoint,
    ) -> Result<u32, String> {
        if agents.is_empty() {
            return Err(format!("{at} must not be empty"));
        }
        if let Some(known) = self.list_at.get(&agents) {
            return Ok(*known);
        }
        for (n, agent) in agents.iter().enumerate() {
            check_endpoint(&format!("{at}[{n}]"), agent)?;
        }
        let mut seen = HashSet::with_capacity(agents.len());
        let mut endpoints = Vec::with_capacity(agents.len());
        for agent in agents.iter().cloned().map(endpoint) {
            // The same host twice is one target: it has one row.
            if seen.insert((agent.agent_id.clone(), agent.container_id.clone())) {
                endpoints.push(agent);
            }
        }
        if endpoints.len() > self.limits.max_targets {
            return Err(format!(
                "{at} has {} entries, at most {} are allowed",
                endpoints.len(),
                self.limits.max_targets
            ));
        }
        let next = index(self.lists.len());
        self.lists.push(Targets { endpoints });
        self.list_at.insert(agents, next);
        Ok(next)
    }

    /// Adds a group, without the targets that have the same thing at the same place already.
    fn add(&mut self, mut group: Group) {
        let key = (group.upload, group.dir.clone(), group.name.clone());
        // Two contents that are pushed to one place are two files, the later one wins on the host, and both have their row.
        if group.content.is_empty()
            && let Some(first) = self.group_at.get(&key).and_then(|at| self.groups.get(*at))
        {
            let of = |list: u32| self.lists.get(list as usize).map_or(&[][..], |list| &list.endpoints);
            let known: HashSet<(&str, &str)> = of(first.list)
                .iter()
                .map(|one| (one.agent_id.as_str(), one.container_id.as_str()))
                .collect();
            let rest: Vec<Endpoint> = of(group.list)
                .iter()
                .filter(|one| !known.contains(&(one.agent_id.as_str(), one.container_id.as_str())))
                .cloned()
                .collect();
            if rest.is_empty() {
                return;
            }
            group.list = index(self.lists.len());
            self.lists.push(Targets { endpoints: rest });
        } else {
            self.group_at.insert(key, self.groups.len());
        }
        self.groups.push(group);
    }

    fn finish(self, id: &TaskId, origin: Origin, timeout_s: i64) -> Result<XferHeader, String> {
        let rows: usize = self.uploads.len()
            + self
                .groups
                .iter()
                .filter_map(|group| Some(self.lists.get(group.list as usize)?.endpoints.len()))
                .sum::<usize>();
        if rows > self.limits.max_rows {
            return Err(format!(
                "files times targets make {rows} rows, at most {} are allowed in one task; send fewer at a time",
                self.limits.max_rows
            ));
        }
        let most = self.limits.max_timeout_s;
        let timeout_s = u64::try_from(timeout_s)
            .ok()
            .filter(|seconds| (1..=most).contains(seconds))
            .unwrap_or(most);
        Ok(XferHeader {
            task_id: id.as_str().to_owned(),
            created_at_ms: origin.now_ms,
            app: origin.app,
            tenant: origin.tenant,
            request_id: origin.request_id,
            node_id: origin.node_id,
            deadline_ms: origin.now_ms + timeout_s * 1000,
            uploads: self.uploads,
            groups: self.groups,
            lists: self.lists,
            ..XferHeader::default()
        })
    }
}

fn check_count(what: &str, count: usize, most: usize) -> Result<(), String> {
    match count {
        0 => Err(format!("{what} must not be empty")),
        count if count > most => Err(format!("{what} has {count} entries, at most {most} are allowed")),
        _ => Ok(()),
    }
}

fn check_dir(at: &str, dir: &str) -> Result<(), String> {
    if dir.is_empty() {
        return Err(format!("{at} is empty; it must be an absolute directory"));
    }
    if !dir.starts_with('/') || dir.contains('\0') || dir.len() > MAX_DIR || dir.split('/').any(|part| part == "..") {
        return Err(format!(
            "{at} must be an absolute directory without \"..\", not {:?}",
            clip(dir)
        ));
    }
    Ok(())
}

fn check_name(at: &str, name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > 255 || matches!(name, "." | "..") || name.contains(['/', '\0']) {
        return Err(format!("{at} must be a plain file name, not {:?}", clip(name)));
    }
    Ok(())
}

fn check_owner(at: &str, owner: String) -> Result<String, String> {
    if owner.len() > 255 || owner.contains(['\0', ':', '/']) {
        return Err(format!("{at} must be the name of an account, not {:?}", clip(&owner)));
    }
    Ok(owner)
}

fn check_endpoint(at: &str, agent: &AgentEndpoint) -> Result<(), String> {
    let longest = agent
        .bk_agent_id
        .len()
        .max(agent.bk_container_id.len())
        .max(agent.user.len());
    if longest > MAX_ASKED {
        return Err(format!(
            "{at}: bk_agent_id, bk_container_id and user have at most {MAX_ASKED} bytes"
        ));
    }
    Ok(())
}

/// Decimal digits that mean octal ones: 644 is 0o644.
fn mode(at: &str, digits: i64) -> Result<u32, String> {
    let wrong = || format!("{at} is {digits}; write the octal mode with decimal digits, such as 644 or 755");
    if !(0..=7777).contains(&digits) {
        return Err(wrong());
    }
    u32::from_str_radix(&digits.to_string(), 8).map_err(|_| wrong())
}

fn speed(at: &str, megabytes: i64) -> Result<u64, String> {
    u64::try_from(megabytes)
        .ok()
        .and_then(|megabytes| megabytes.checked_mul(MEGABYTE))
        .ok_or_else(|| format!("{at} is {megabytes}; it is in MB/s, and 0 means no limit"))
}

fn clip(text: &str) -> String {
    text.chars().take(200).collect()
}

fn endpoint(agent: AgentEndpoint) -> Endpoint {
    let (refused_code, refused_msg) = refusal(&agent);
    let container_id = agent.container().unwrap_or_default().to_owned();
    Endpoint {
        agent_id: agent.bk_agent_id,
        container_id,
        user: agent.user,
        refused_code,
        refused_msg,
    }
}

/// Why a host can't take part whatever its agent says; code 0: it can.
fn refusal(agent: &AgentEndpoint) -> (i32, String) {
    if let Err(error) = AgentId::parse(&agent.bk_agent_id) {
        return (
            Inner::AgentOffline.code(),
            format!("no agent has the id {:?}: {error}", clip(&agent.bk_agent_id)),
        );
    }
    if agent.container().is_some() {
        let text = "files of containers are not supported; leave bk_container_id empty to mean the host";
        return (Inner::Arguments.code(), text.into());
    }
    if !agent.pwd.is_empty() {
        let text = "passwords are for Windows accounts, and Windows agents are not supported; leave pwd empty";
        return (Inner::WindowsPassword.code(), text.into());
    }
    if agent.user.is_empty() || agent.user.contains('\0') {
        return (Inner::NoSuchUser.code(), "no OS account was given; set user".into());
    }
    (0, String::new())
}

#[cfg(test)]
mod tests;
