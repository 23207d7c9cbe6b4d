//! Bodies of the process calls. Unknown fields are ignored everywhere, optional ones may be `null`, and numbers may come as texts:
//! callers send labels with numbers and policies with nulls (contract procmgr-agent-lifecycle 0.4).

use std::collections::BTreeMap;

use serde::de::{Deserializer, Error};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::null_default;

/// A text; numbers and truth values are taken as they are written, `null` as empty.
fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    as_text(Value::deserialize(deserializer)?).ok_or_else(|| D::Error::custom("expected a string"))
}

fn as_text(value: Value) -> Option<String> {
    match value {
        Value::Null => Some(String::new()),
        Value::String(text) => Some(text),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(truth) => Some(truth.to_string()),
        Value::Array(_) | Value::Object(_) => None,
    }
}

/// Labels: values of any simple kind.
fn labels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    let map = Option::<BTreeMap<String, Value>>::deserialize(deserializer)?.unwrap_or_default();
    let simple = map.into_iter().map(|(key, value)| {
        // A label of a kind that is none is kept as its JSON: nobody here looks into it.
        let text = as_text(value.clone()).unwrap_or_else(|| value.to_string());
        (key, text)
    });
    Ok(simple.collect())
}

/// A whole number that may be absent, `null`, a text, or a fraction without meaning.
fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    let number = match Value::deserialize(deserializer)? {
        Value::Null => return Ok(None),
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::String(text) => text.trim().parse().ok(),
        // Casts of floats stop at the ends of the range.
        Value::Number(number) => number.as_i64().or_else(|| number.as_f64().map(|number| number as i64)),
        _ => None,
    };
    number
        .map(Some)
        .ok_or_else(|| D::Error::custom("expected a whole number"))
}

/// A number that may be absent, `null` or a text.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    let number = match Value::deserialize(deserializer)? {
        Value::Null => return Ok(None),
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::String(text) => text.trim().parse().ok(),
        Value::Number(number) => number.as_f64(),
        _ => None,
    };
    number
        .filter(|number: &f64| number.is_finite())
        .map(Some)
        .ok_or_else(|| D::Error::custom("expected a number"))
}

/// What a process is called.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcMeta {
    /// Whose it is.
    #[serde(default, deserialize_with = "text")]
    pub namespace: String,
    /// Its name there.
    #[serde(default, deserialize_with = "text")]
    pub name: String,
    /// What its owner has to say.
    #[serde(default, deserialize_with = "labels")]
    pub labels: BTreeMap<String, String>,
}

/// A host as old callers name it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcHost {
    /// Address.
    #[serde(default, deserialize_with = "text")]
    pub ip: String,
    /// Cloud area.
    #[serde(default, deserialize_with = "whole")]
    pub bk_cloud_id: Option<i64>,
    /// Only in `upgrade_to_agent_id`.
    #[serde(default, deserialize_with = "text", skip_serializing_if = "String::is_empty")]
    pub bk_agent_id: String,
}

impl ProcHost {
    /// `cloud:ip`.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{}:{}", self.bk_cloud_id.unwrap_or(0), self.ip)
    }
}

/// Paths and account of a process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ProcIdentity {
    #[serde(default, deserialize_with = "text")]
    pub proc_name: String,
    #[serde(default, deserialize_with = "text")]
    pub setup_path: String,
    #[serde(default, deserialize_with = "text")]
    pub pid_path: String,
    #[serde(default, deserialize_with = "text")]
    pub config_path: String,
    #[serde(default, deserialize_with = "text")]
    pub log_path: String,
    #[serde(default, deserialize_with = "text")]
    pub user: String,
}

/// Control commands of a process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ProcControl {
    #[serde(default, deserialize_with = "text")]
    pub start_cmd: String,
    #[serde(default, deserialize_with = "text")]
    pub stop_cmd: String,
    #[serde(default, deserialize_with = "text")]
    pub restart_cmd: String,
    #[serde(default, deserialize_with = "text")]
    pub reload_cmd: String,
    #[serde(default, deserialize_with = "text")]
    pub kill_cmd: String,
    #[serde(default, deserialize_with = "text")]
    pub version_cmd: String,
    #[serde(default, deserialize_with = "text")]
    pub health_cmd: String,
}

/// What a process may use, in per cent of the whole machine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ProcResource {
    #[serde(default, deserialize_with = "number")]
    pub cpu: Option<f64>,
    #[serde(default, deserialize_with = "number")]
    pub mem: Option<f64>,
}

/// How a process is kept alive; all times in seconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ProcPolicy {
    #[serde(default, deserialize_with = "whole")]
    pub auto_type: Option<i64>,
    #[serde(default, deserialize_with = "whole")]
    pub start_check_secs: Option<i64>,
    #[serde(default, deserialize_with = "whole")]
    pub stop_check_secs: Option<i64>,
    #[serde(default, deserialize_with = "whole")]
    pub start_retries: Option<i64>,
    #[serde(default, deserialize_with = "whole")]
    pub start_interval: Option<i64>,
    #[serde(default, deserialize_with = "whole")]
    pub op_timeout: Option<i64>,
    #[serde(default, deserialize_with = "text")]
    pub crontab_rule: String,
}

/// What a process is and how it is handled.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcSpec {
    /// Paths and account.
    #[serde(default, deserialize_with = "null_default")]
    pub identity: ProcIdentity,
    /// Commands.
    #[serde(default, deserialize_with = "null_default")]
    pub control: ProcControl,
    /// Limits; absent: none.
    #[serde(default, deserialize_with = "null_default")]
    pub resource: ProcResource,
    /// Policy, by the name that is preferred.
    #[serde(default)]
    pub alive_monitor_policy: Option<ProcPolicy>,
    /// The same by its other name.
    #[serde(default)]
    pub monitor_policy: Option<ProcPolicy>,
}

impl ProcSpec {
    /// The policy, by either name (contract procmgr-agent-lifecycle#8).
    #[must_use]
    pub fn policy(&self) -> ProcPolicy {
        self.alive_monitor_policy
            .as_ref()
            .or(self.monitor_policy.as_ref())
            .cloned()
            .unwrap_or_default()
    }
}

/// One operation on one process of many hosts: body of `operate_proc_v2`, element of `operate_proc_multi`, and, without `op_type`, body of
/// the calls about registrations.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcObject {
    /// Which process.
    #[serde(default, deserialize_with = "null_default")]
    pub meta: ProcMeta,
    /// What is done.
    #[serde(default, deserialize_with = "whole")]
    pub op_type: Option<i64>,
    /// Where, as old callers say it; ignored when there is an `agent_id_list`.
    #[serde(default, deserialize_with = "null_default")]
    pub hosts: Vec<ProcHost>,
    /// Where.
    #[serde(default, deserialize_with = "null_default")]
    pub agent_id_list: Vec<String>,
    /// Absent: as it is registered.
    #[serde(default)]
    pub spec: Option<ProcSpec>,
}

/// The ids that a caller means: `agent_id_list`, or `cloud:ip` of its hosts when that is empty (contract procmgr-agent-lifecycle#4).
fn ids(agent_id_list: Vec<String>, hosts: &[ProcHost]) -> Vec<String> {
    if agent_id_list.is_empty() {
        hosts.iter().map(ProcHost::id).collect()
    } else {
        agent_id_list
    }
}

impl ProcObject {
    /// Takes out whom it means.
    #[must_use]
    pub fn take_ids(&mut self) -> Vec<String> {
        ids(std::mem::take(&mut self.agent_id_list), &self.hosts)
    }
}

/// Body of `operate_proc_multi`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcMulti {
    /// What is done.
    #[serde(default, deserialize_with = "null_default")]
    pub proc_operate_req: Vec<ProcObject>,
}

/// Answer to a submit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcTaskReply {
    /// Opaque.
    pub task_id: String,
}

/// Body of `get_proc_operate_result_v2`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcTaskQuery {
    /// As the submit answered.
    #[serde(default, deserialize_with = "text")]
    pub task_id: String,
}

/// Value of a result map.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcRow {
    /// See the contract's table; 115: not finished.
    pub error_code: i32,
    /// For people.
    pub error_msg: String,
    /// JSON text; empty while not finished.
    pub content: String,
}

/// `content` of a control operation, as JSON text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcContent {
    /// Exactly one.
    pub value: Vec<ProcValue>,
}

/// What came of a control operation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(non_snake_case, missing_docs)]
pub struct ProcValue {
    pub procName: String,
    pub setupPath: String,
    pub funcID: String,
    pub instanceID: String,
    pub result: String,
    pub isAuto: bool,
    pub bk_agent_id: String,
}

/// `content` of a status operation, as JSON text; every number of the type that clients decode (contract procmgr-agent-lifecycle#11).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ProcStatusContent {
    pub ip: String,
    pub bk_agent_id: String,
    pub utctime: String,
    pub utctime2: String,
    pub timezone: i32,
    /// Exactly one.
    pub process: Vec<ProcContentReply>,
}

/// A process in the content of a status operation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcContentReply {
    /// Its executable.
    pub procname: String,
    /// Exactly one.
    pub instance: Vec<ProcInstance>,
}

/// How a process is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(non_snake_case, missing_docs)]
pub struct ProcInstance {
    pub cmdline: String,
    pub processName: String,
    pub version: String,
    pub health: String,
    pub isAuto: bool,
    pub cpuUsage: f64,
    pub cpuUsageAve: f64,
    pub phyMemUsage: f64,
    pub usePhyMem: i64,
    pub diskSize: i64,
    pub pid: i32,
    pub startTime: String,
    pub stat: String,
    pub utime: String,
    pub stime: String,
    pub threadCount: i64,
    pub elapsedTime: i64,
    pub register_time: i64,
    pub last_start_time: i64,
    pub report_time: i64,
}

/// Body of `get_proc_status_v2`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcStatusQuery {
    /// Which process; without a name all of the namespace.
    #[serde(default, deserialize_with = "null_default")]
    pub meta: ProcMeta,
    /// Where very old callers put it.
    #[serde(default, deserialize_with = "text")]
    pub namespace: String,
    /// Where; ignored when there is an `agent_id_list`.
    #[serde(default, deserialize_with = "null_default")]
    pub hosts: Vec<ProcHost>,
    /// Where.
    #[serde(default, deserialize_with = "null_default")]
    pub agent_id_list: Vec<String>,
}

impl ProcStatusQuery {
    /// Takes out whom it means.
    #[must_use]
    pub fn take_ids(&mut self) -> Vec<String> {
        ids(std::mem::take(&mut self.agent_id_list), &self.hosts)
    }

    /// The namespace, wherever it stands.
    #[must_use]
    pub fn namespace(&self) -> &str {
        if self.meta.namespace.is_empty() {
            &self.namespace
        } else {
            &self.meta.namespace
        }
    }
}

/// Last known state of a process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ProcInfo {
    pub meta: ProcInfoMeta,
    pub host: ProcInfoHost,
    pub bk_agent_id: String,
    /// 0 not registered, 1 running, 2 not running.
    pub status: i32,
    pub isauto: bool,
    pub pid: i32,
    pub version: String,
    pub register_time: u64,
    pub last_start_time: u64,
    pub report_time: u64,
    pub cpu_usage: f64,
    pub mem_usage: f64,
    pub fd: i32,
    pub disk: i32,
    pub net: i32,
    pub flag: i32,
    pub message: String,
}

/// What a process is called, in an answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ProcInfoMeta {
    pub namespace: String,
    pub name: String,
    pub labels: BTreeMap<String, String>,
}

/// Where a process is, in an answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ProcInfoHost {
    pub ip: String,
    pub bk_cloud_id: i32,
}

/// Answer of `get_proc_status_v2`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcStatusReply {
    /// In the order asked.
    pub proc_infos: Vec<ProcInfo>,
}

/// A part of a list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcPage {
    /// First one, from 0.
    #[serde(default, deserialize_with = "whole")]
    pub start: Option<i64>,
    /// How many at most.
    #[serde(default, deserialize_with = "whole")]
    pub limit: Option<i64>,
}

/// Body of `sync_proc_status`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcSyncQuery {
    /// Which namespace.
    #[serde(default, deserialize_with = "null_default")]
    pub meta: ProcMeta,
    /// Where very old callers put it.
    #[serde(default, deserialize_with = "text")]
    pub namespace: String,
    /// Which part.
    #[serde(default, deserialize_with = "null_default")]
    pub page: ProcPage,
}

/// Answer of `sync_proc_status`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcSyncReply {
    /// Of the whole list.
    pub count: u64,
    /// This part.
    pub proc_infos: Vec<ProcInfo>,
}

/// Body of `upgrade_to_agent_id`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcUpgrade {
    /// Old and new names.
    #[serde(default, deserialize_with = "null_default")]
    pub hosts: Vec<ProcHost>,
}

/// Answer of `upgrade_to_agent_id`: `cloud:ip` texts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ProcUpgradeReply {
    pub success: Vec<String>,
    pub failed: Vec<String>,
}

/// Whose groups are meant, in the calls about groups of processes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcGroupQuery {
    /// Which namespace.
    #[serde(default, deserialize_with = "null_default")]
    pub meta: ProcMeta,
    /// Where; ignored when there is an `agent_id_list`.
    #[serde(default, deserialize_with = "null_default")]
    pub hosts: Vec<ProcHost>,
    /// Where.
    #[serde(default, deserialize_with = "null_default")]
    pub agent_id_list: Vec<String>,
}

impl ProcGroupQuery {
    /// Takes out whom it means.
    #[must_use]
    pub fn take_ids(&mut self) -> Vec<String> {
        ids(std::mem::take(&mut self.agent_id_list), &self.hosts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_send_beyond_the_contract() {
        // contract: procmgr-agent-lifecycle#8, procmgr-agent-lifecycle#33
        let body = r#"{"meta":{"namespace":"GSEKIT_BIZ_3","name":"n_1","labels":{"bk_process_id":77,"x":null,"y":[1]}},
            "op_type":3,"hosts":[{"ip":"10.0.0.1","bk_cloud_id":"0","bk_supplier_id":0}],"agent_id_list":null,"no_request":true,
            "nodeman_spec":{"process_status_id":1},
            "spec":{"identity":{"index_key":"","proc_name":"x","setup_path":"/s","pid_path":"/p","user":"root"},
                "control":{"start_cmd":"./s","kill_cmd":null},
                "resource":{"cpu":10,"mem":10.5,"fd":1},
                "monitor_policy":{"auto_type":1,"start_check_secs":null,"op_timeout":null,"start_retries":"4"}}}"#;
        let mut object: ProcObject = serde_json::from_str(body).unwrap();
        assert_eq!(object.take_ids(), ["0:10.0.0.1"]);
        assert_eq!(object.meta.labels["bk_process_id"], "77");
        assert_eq!(object.op_type, Some(3));
        let spec = object.spec.unwrap();
        let policy = spec.policy();
        assert_eq!(
            (
                policy.auto_type,
                policy.start_check_secs,
                policy.op_timeout,
                policy.start_retries
            ),
            (Some(1), None, None, Some(4))
        );
        assert_eq!((spec.resource.cpu, spec.resource.mem), (Some(10.0), Some(10.5)));
        assert!(spec.control.kill_cmd.is_empty());
        let other = body.replace("monitor_policy", "alive_monitor_policy");
        let other: ProcObject = serde_json::from_str(&other).unwrap();
        assert_eq!(other.spec.unwrap().policy(), policy);
        for bad in [
            r#"{"op_type":"start"}"#,
            r#"{"op_type":true}"#,
            r#"{"hosts":{}}"#,
            r#"{"meta":{"name":[1]}}"#,
        ] {
            assert!(serde_json::from_str::<ProcObject>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_come_before_hosts() {
        // contract: procmgr-agent-lifecycle#4
        let body = r#"{"hosts":[{"ip":"10.0.0.1","bk_cloud_id":2}],"agent_id_list":["a","2:10.0.0.9"]}"#;
        let mut object: ProcObject = serde_json::from_str(body).unwrap();
        assert_eq!(object.take_ids(), ["a", "2:10.0.0.9"]);
    }
}
