//! Ours: host identities, for operators and for sites without CMDB.

use serde::{Deserialize, Serialize};

/// Which host is meant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostIdShow {
    /// Id of its agent, or `cloud:ip`.
    pub host: String,
}

/// What is to be on a host, and what was put there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostIdView {
    /// Whether the source has told of it.
    pub known: bool,
    /// What it is called here.
    pub host: String,
    /// Names of its agent.
    pub agents: Vec<String>,
    /// `bk_host_id`; 0 if the source does not say it.
    pub bk_host_id: u64,
    /// Kind of system; empty if the source does not say it.
    pub os: String,
    /// Where identities come from.
    pub source: String,
    /// What is to be there.
    pub wanted: HostIdContent,
    /// What was put there last.
    pub pushed: Option<HostIdPushed>,
    /// Whether the two are the same.
    pub agree: bool,
    /// Whether its agent is connected.
    pub connected: bool,
    /// The last try that did not bring it there; none after one that did.
    pub failure: Option<HostIdFailure>,
}

/// A content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostIdContent {
    /// What is compared, hex.
    pub digest: String,
    /// Its length.
    pub bytes: u64,
    /// Since when that is what the source says, unix milliseconds.
    pub since: u64,
    /// The content itself; what is no text is replaced. None when it has just been replaced by another one.
    pub content: Option<String>,
}

/// What was put there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostIdPushed {
    /// What is compared, hex.
    pub digest: String,
    /// When, unix milliseconds.
    pub at: u64,
    /// By which agent.
    pub agent: String,
    /// Where.
    pub path: String,
}

/// A try that failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostIdFailure {
    /// When, unix milliseconds.
    pub at: u64,
    /// Inner code.
    pub code: i32,
    /// Why.
    pub message: String,
    /// Tries so far.
    pub tries: u32,
}

/// Identities of hosts, where CMDB is not the source.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostIdPut {
    /// The hosts.
    pub hosts: Vec<HostIdOne>,
}

/// One of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostIdOne {
    /// Id of its agent, or `cloud:ip`.
    pub bk_agent_id: String,
    /// What is to be in the file, as it is.
    pub content: String,
}

/// Hosts to which what is known is to be pushed again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostIdPush {
    /// Ids of their agents, or `cloud:ip`.
    pub hosts: Vec<String>,
}

/// How many hosts were taken.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostIdTaken {
    /// So many.
    pub taken: u64,
}
