//! Bodies of our own calls for operators; no client of the original knows them.

use serde::{Deserialize, Serialize};

use super::{AgentInfo, null_default};

/// Body of `/gse/v1/agents/list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentListRequest {
    /// Empty for the first page, then `next` of the page before.
    #[serde(default, deserialize_with = "null_default")]
    pub cursor: String,
    /// Most rows of a page; 0: 1000. A page may hold fewer (and more by a little) before the last.
    #[serde(default, deserialize_with = "null_default")]
    pub limit: u32,
    /// Only agents that are connected.
    #[serde(default, deserialize_with = "null_default")]
    pub online: bool,
    /// Only agents about which alarms are sent because they are not heard any more.
    #[serde(default, deserialize_with = "null_default")]
    pub lost: bool,
}

/// Answer of `/gse/v1/agents/list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentListReply {
    /// One entry an agent.
    pub agents: Vec<AgentDetail>,
    /// Cursor of the next page; empty after the last.
    pub next: String,
    /// What gse_alarm says of itself, when lost agents were asked for; absent: no gse_alarm has ever looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watch: Option<WatchReport>,
}

/// Where gse_alarm is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchReport {
    /// The active instance.
    pub node_id: String,
    /// Seconds since it has looked at every agent.
    pub looked_ago_s: u64,
    /// Overdue agents about which no alarms are sent for the time being ...
    pub held: u32,
    /// ... and why.
    pub held_why: String,
}

/// What the servers know of one agent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentDetail {
    /// The part that `list_agent_info` shows.
    #[serde(flatten)]
    pub info: AgentInfo,
    /// Name of the host.
    pub hostname: String,
    /// All addresses.
    pub addresses: Vec<String>,
    /// Node that holds or held the session.
    pub node_id: String,
    /// Unix milliseconds.
    pub connected_at: u64,
    /// Unix milliseconds; 0 while connected.
    pub disconnected_at: u64,
    /// Why the last session ended.
    pub disconnect_reason: String,
    /// Scripts running on the host at the last heartbeat.
    pub running: u32,
    /// Scripts waiting on the host at the last heartbeat.
    pub queued: u32,
    /// The last other host that claimed the id, and when (unix milliseconds).
    pub clone_of: String,
    /// See `clone_of`; 0: never.
    pub clone_at: u64,
    /// Alarms sent since it is not heard any more; only when lost agents were asked for.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub alarms: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Body of `/gse/v1/task/describe`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskDescribeRequest {
    /// The task.
    pub task_id: String,
    /// Index of the first target wanted.
    #[serde(default, deserialize_with = "null_default")]
    pub start: u32,
    /// Most targets; 0: none, only the summary.
    #[serde(default, deserialize_with = "null_default")]
    pub limit: u32,
}

/// Answer of `/gse/v1/task/describe`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskDescribeReply {
    /// The task.
    pub task_id: String,
    /// Application that submitted it.
    pub app: String,
    /// Unix milliseconds.
    pub created_at: u64,
    /// Unix milliseconds by which every row is terminal.
    pub deadline: u64,
    /// Ids of its atomic tasks.
    pub atomic_task_ids: Vec<u32>,
    /// How many targets it has.
    pub target_count: u32,
    /// Rows by `error_code` and `status`.
    pub states: Vec<StateCount>,
    /// The targets asked for.
    pub targets: Vec<TaskTarget>,
}

/// How many rows are in one state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateCount {
    /// As in a script row.
    pub error_code: i32,
    /// As in a script row.
    pub status: i32,
    /// Rows.
    pub count: u64,
}

/// One target of a task.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskTarget {
    /// As submitted.
    pub bk_agent_id: String,
    /// As submitted.
    pub bk_container_id: String,
    /// OS account.
    pub user: String,
}

/// Body of `/gse/v1/data/tail`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataTailRequest {
    /// Whose records.
    pub data_id: u32,
}

/// A line of the answer of `/gse/v1/data/tail`. Empty lines between them say that the tail is alive; the first comes at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TailLine {
    /// A record that came in.
    Record(TailRecord),
    /// Records that came in here, between the lines around this one, and were too many for this reader.
    Lost {
        /// How many.
        lost: u64,
    },
}

/// A record, as a tail shows it: `text` or `base64` is there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TailRecord {
    /// Its data id.
    pub data_id: u32,
    /// Its time, as whoever sent it says; Unix seconds.
    pub utctime: u32,
    /// Its message type.
    #[serde(rename = "type")]
    pub kind: u16,
    /// The payload, if it is UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The payload, if it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
}
