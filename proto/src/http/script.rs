//! Bodies of the script calls. Unknown fields are ignored everywhere; optional ones may be `null`.

use serde::{Deserialize, Serialize};

use super::null_default;

/// One host or container as callers name it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AgentEndpoint {
    /// Echoed byte for byte.
    pub bk_agent_id: String,
    /// Empty or all zeros: the host.
    #[serde(default, deserialize_with = "null_default")]
    pub bk_container_id: String,
    /// OS account.
    #[serde(default, deserialize_with = "null_default", skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Windows account password; never stored, never logged.
    #[serde(default, deserialize_with = "null_default", skip_serializing_if = "String::is_empty")]
    pub pwd: String,
}

impl AgentEndpoint {
    /// The container meant; `None` for the host.
    #[must_use]
    pub fn container(&self) -> Option<&str> {
        let id = self.bk_container_id.as_str();
        (!id.is_empty() && id.bytes().any(|b| b != b'0')).then_some(id)
    }
}

/// A script file to be written before anything runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ScriptFile {
    /// Plain file name.
    pub script_name: String,
    /// Absolute directory.
    pub script_store_dir: String,
    /// Plain text.
    pub script_content: String,
}

/// A command.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AtomicTaskSpec {
    /// Unique in the request.
    pub atomic_task_id: u32,
    /// Run by the account's shell.
    pub command: String,
    /// 0 or less: the configured maximum.
    #[serde(default, deserialize_with = "null_default")]
    pub timeout_seconds: i64,
}

/// What must have succeeded before an atomic task runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Relation {
    /// The dependent one.
    pub atomic_task_id: u32,
    /// Ids (not indexes, in spite of the name) of the ones before it.
    #[serde(default, deserialize_with = "null_default")]
    pub atomic_task_id_idx: Vec<u32>,
}

/// Body of `async_execute_script`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ExecuteScript {
    /// Targets.
    #[serde(default, deserialize_with = "null_default")]
    pub agents: Vec<AgentEndpoint>,
    /// Files.
    #[serde(default, deserialize_with = "null_default")]
    pub scripts: Vec<ScriptFile>,
    /// Commands.
    #[serde(default, deserialize_with = "null_default")]
    pub atomic_tasks: Vec<AtomicTaskSpec>,
    /// Order of the commands.
    #[serde(default, deserialize_with = "null_default")]
    pub atomic_tasks_relations: Vec<Relation>,
}

/// `data` of every submit and termination.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskIdReply {
    /// Never absent.
    pub result: TaskIdResult,
}

/// Inner part of [`TaskIdReply`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskIdResult {
    /// Opaque, at most 64 bytes.
    #[serde(default)]
    pub task_id: String,
}

/// Body of `get_execute_script_result`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ScriptResultQuery {
    /// The task.
    #[serde(default, deserialize_with = "null_default")]
    pub task_id: String,
    /// Which rows.
    #[serde(default, deserialize_with = "null_default")]
    pub agent_tasks: Vec<AgentTaskQuery>,
}

/// Rows asked of one endpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentTaskQuery {
    /// The endpoint.
    pub bk_agent_id: String,
    /// Its container, if any.
    #[serde(default, deserialize_with = "null_default")]
    pub bk_container_id: String,
    /// Which atomic tasks.
    #[serde(default, deserialize_with = "null_default")]
    pub atomic_tasks: Vec<AtomicQuery>,
}

/// A slice of one atomic task's output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtomicQuery {
    /// Which one.
    pub atomic_task_id: u32,
    /// UTF-8 bytes that the caller has already; negative ones count as 0.
    #[serde(default, deserialize_with = "null_default")]
    pub offset: i64,
    /// Most bytes of `screen`; absent, 0 or negative: no limit.
    #[serde(default, deserialize_with = "null_default")]
    pub limit: i64,
}

/// `data` of a result query.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RowsReply<R> {
    /// One row for each pair asked.
    pub result: Vec<R>,
}

/// One row of a script result. All fields are always there (contract v2-http-task#9).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ScriptRow {
    /// As asked.
    pub bk_agent_id: String,
    /// As asked; empty for hosts.
    pub bk_container_id: String,
    /// As asked.
    pub atomic_task_id: u32,
    /// 0 queued, 1 running, 2 succeeded, 3 timed out, 4 stopped, 5 failed, 6 outcome lost with the agent.
    pub status: i32,
    /// See [`crate::codes::Inner`].
    pub error_code: i32,
    /// For people.
    pub error_msg: String,
    /// Unix milliseconds; 0 while there is none.
    pub start_time: u64,
    /// Unix milliseconds; 0 while there is none.
    pub end_time: u64,
    /// Non-zero on everything but success.
    pub script_exit_code: i32,
    /// Last `job_success:[…]` or `job_fail:[…]` marker.
    pub tag: String,
    /// Output from the asked offset.
    pub screen: String,
}

/// Body of the terminate calls.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TerminateTask {
    /// The task.
    #[serde(default, deserialize_with = "null_default")]
    pub task_id: String,
    /// Which targets; none: all.
    #[serde(default, deserialize_with = "null_default")]
    pub agents: Vec<AgentEndpoint>,
}

/// Body of `get_task_state`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskStateQuery {
    /// The task.
    #[serde(default, deserialize_with = "null_default")]
    pub task_id: String,
    /// Which targets; none: all.
    #[serde(default, deserialize_with = "null_default")]
    pub agent_id_list: Vec<String>,
}

/// `data` of `get_task_state`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskStateReply {
    /// The state.
    pub result: TaskStateResult,
}

/// State of a task as a whole; spelt as clients expect it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskStateResult {
    /// `pending`, `executing`, `timeout`, `failed` or `successed`.
    pub state: String,
    /// Ids whose rows all succeeded.
    pub successed_agents: Vec<String>,
    /// Ids with a row that timed out.
    pub timeout_agents: Vec<String>,
    /// Ids with a row that failed otherwise.
    pub failed_agents: Vec<String>,
    /// Ids that are not done.
    pub pending_agents: Vec<String>,
    /// Ids that were offline.
    pub offline_agents: Vec<String>,
    /// Ids whose agent lost the script.
    pub restarted_agents: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_as_clients_send_them() {
        // contract: v2-http-task#7, v2-http-task#28
        let job = r#"{"agents":[{"bk_agent_id":"020000000242010a00002f17521298676503","user":"root"}],"atomicTaskNum":0,
            "scripts":[{"script_name":"bk_gse_script_1_2.sh","script_store_dir":"/tmp/bkjob/root","script_content":"echo 1"}],
            "atomic_tasks":[{"atomic_task_id":0,"command":"/tmp/bkjob/root/bk_gse_script_1_2.sh","timeout_seconds":7200}]}"#;
        let body: ExecuteScript = serde_json::from_str(job).unwrap();
        assert!(body.atomic_tasks_relations.is_empty());
        let bscp = r#"{"no_request":true,"bk_username":"admin","agents":[{"bk_agent_id":"0:10.0.0.1","bk_container_id":"","user":"root","pwd":""}],
            "scripts":null,"atomic_tasks":[{"command":"true","atomic_task_id":0,"timeout_seconds":180}],
            "atomic_tasks_relations":[{"atomic_task_id":0,"atomic_task_id_idx":[]}]}"#;
        let body: ExecuteScript = serde_json::from_str(bscp).unwrap();
        assert_eq!(body.atomic_tasks_relations.len(), 1);
        let nulls = r#"{"agents":[{"bk_agent_id":"a","bk_container_id":null,"user":null,"pwd":null}],"atomic_tasks":[{"atomic_task_id":0,
            "command":"x","timeout_seconds":null}],"atomic_tasks_relations":[{"atomic_task_id":0,"atomic_task_id_idx":null}]}"#;
        assert!(serde_json::from_str::<ExecuteScript>(nulls).is_ok());
        for wrong in [
            r#"{"agents":"x"}"#,
            r#"{"agents":[{}]}"#,
            r#""text""#,
            r#"{"atomic_tasks":[{"atomic_task_id":-1,"command":"x"}]}"#,
        ] {
            assert!(serde_json::from_str::<ExecuteScript>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn limit_absent_null_and_zero_are_the_same() {
        // contract: v2-http-task#21
        for text in [
            r#"{"atomic_task_id":0,"offset":0}"#,
            r#"{"atomic_task_id":0,"offset":0,"limit":0}"#,
            r#"{"atomic_task_id":0,"offset":null,"limit":null}"#,
        ] {
            assert_eq!(
                serde_json::from_str::<AtomicQuery>(text).unwrap(),
                AtomicQuery::default()
            );
        }
    }

    #[test]
    fn an_all_zero_container_is_the_host() {
        // contract: v2-http-task#11
        let mut endpoint = AgentEndpoint::default();
        assert_eq!(endpoint.container(), None);
        endpoint.bk_container_id = "0".repeat(64);
        assert_eq!(endpoint.container(), None);
        endpoint.bk_container_id = "0a".into();
        assert_eq!(endpoint.container(), Some("0a"));
    }

    #[test]
    fn golden_row() {
        // contract: v2-http-task#9
        let row = ScriptRow {
            bk_agent_id: "0:10.0.0.1".into(),
            status: 2,
            screen: "hé\n".into(),
            ..Default::default()
        };
        assert_eq!(
            serde_json::to_string(&row).unwrap(),
            include_str!("../../golden/script_row.v1.json").trim_end()
        );
    }
}
