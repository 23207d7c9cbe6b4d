//! Bodies of the agent calls, new and old. Numbers are integers and never negative where clients decode them as unsigned.

use serde::{Deserialize, Serialize};

use super::null_default;

/// Body of `list_agent_state` and `list_agent_info`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentIdList {
    /// Ids in either form.
    #[serde(default, deserialize_with = "null_default")]
    pub agent_id_list: Vec<String>,
}

/// One row of `list_agent_state`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentState {
    /// As asked.
    pub bk_agent_id: String,
    /// 0 when unknown.
    pub bk_cloud_id: i32,
    /// Empty when unknown.
    pub version: String,
    /// 0 proxy, 1 agent.
    pub run_mode: i32,
    /// -2 not found, -1 lost, 2 running, 6 stopped on purpose.
    pub status_code: i32,
    /// Unix milliseconds of the last sign of life; 0 when there was none.
    pub report_time: u64,
}

/// One row of `list_agent_info`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentInfo {
    /// As asked.
    pub bk_agent_id: String,
    /// 0 when unknown.
    pub bk_cloud_id: i32,
    /// First address of the host.
    pub bk_host_ip: String,
    /// `linux`.
    pub bk_os_type: String,
    /// `x86_64`.
    pub bk_cpu_architecture: String,
    /// Host of the node that takes the agent's session.
    pub parent_ip: String,
    /// The port it takes agents on.
    pub parent_port: u32,
    /// Unix milliseconds of the last sign of life.
    pub report_time: u64,
    /// Agent version.
    pub version: String,
    /// Per cent.
    pub cpu_rate: f64,
    /// Per cent.
    pub mem_rate: f64,
    /// Processors.
    pub cpu_num: u32,
    /// MiB.
    pub mem_size: u64,
    /// Unix **seconds** when the agent process started.
    pub start_time: u64,
    /// Unix seconds of the last sign of life.
    pub last_work_time: u64,
    /// Milliseconds that the present session has lasted, as text.
    pub conn_cycle_time: String,
    /// 0 proxy, 1 agent.
    pub run_mode: i32,
    /// As in [`AgentState`].
    pub status_code: i32,
    /// The same in a word: `running`, `lost`, `stopped`, `not_found`.
    pub status: String,
    /// The state before this one.
    pub last_status_code: i32,
    /// The same in a word.
    pub last_status: String,
    /// Anything an operator should know, such as a clone of the id.
    pub remark: String,
}

/// Body of the old calls.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HostQuery {
    /// Hosts by address.
    #[serde(default, deserialize_with = "null_default")]
    pub hosts: Vec<HostRef>,
}

/// A host of the old calls.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HostRef {
    /// Address.
    pub ip: String,
    /// Cloud area.
    #[serde(default, deserialize_with = "null_default")]
    pub bk_cloud_id: i32,
}

/// Value of the old `get_agent_status`, under the key `cloud:ip`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct V1AgentStatus {
    /// As asked.
    pub ip: String,
    /// As asked.
    pub bk_cloud_id: i32,
    /// 1 or 0.
    pub bk_agent_alive: i32,
}

/// Value of the old `get_agent_info`, under the key `cloud:ip`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct V1AgentInfo {
    /// As asked.
    pub ip: String,
    /// Empty when unknown.
    pub version: String,
    /// As asked.
    pub bk_cloud_id: i32,
    /// Host of the node that takes the agent's session.
    pub parent_ip: String,
    /// The port it takes agents on.
    pub parent_port: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_agent_rows() {
        // contract: procmgr-agent-lifecycle#27, procmgr-agent-lifecycle#30
        let state = AgentState {
            bk_agent_id: "0:10.0.0.1".into(),
            version: "0.1.0".into(),
            run_mode: 1,
            status_code: 2,
            report_time: 1_632_830_304_777,
            ..Default::default()
        };
        assert_eq!(
            serde_json::to_string(&state).unwrap(),
            include_str!("../../golden/agent_state.v1.json").trim_end()
        );
        let info = AgentInfo {
            bk_agent_id: "a".into(),
            report_time: 1_632_830_304_777,
            start_time: 1_632_830_300,
            ..Default::default()
        };
        let value = serde_json::to_value(&info).unwrap();
        for unsigned in [
            "parent_port",
            "report_time",
            "cpu_num",
            "mem_size",
            "start_time",
            "last_work_time",
        ] {
            assert!(value[unsigned].is_u64(), "{unsigned}");
        }
        assert!(value["conn_cycle_time"].is_string());
        assert_eq!(
            serde_json::to_string(&info).unwrap(),
            include_str!("../../golden/agent_info.v1.json").trim_end()
        );
    }
}
