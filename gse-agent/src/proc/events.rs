//! Events about processes, as records on the agent's own data path (contract procmgr-agent-lifecycle, 1.11; data-plane, 36). When one is due
//! is decided elsewhere; that it arrives is the data path's business.

use serde::Serialize;

use super::machine::Told;
use super::registry::Key;
use crate::data::Intake;

/// Message type of the plugins' frame for records of this form.
const KIND: u16 = 9;

/// Who the host is, as events have it.
#[derive(Debug, Clone)]
pub(super) struct Source {
    /// Data id.
    pub(super) data_id: u32,
    /// First address.
    pub(super) ip: String,
    /// Cloud area.
    pub(super) cloud_id: i32,
    /// The agent's id.
    pub(super) agent_id: String,
}

#[derive(Serialize)]
struct Message<'a> {
    data_id: u32,
    data: [Event<'a>; 1],
}

#[derive(Serialize)]
struct Event<'a> {
    event_name: &'static str,
    event: Content<'a>,
    target: String,
    dimension: Dimension<'a>,
    timestamp: u64,
}

#[derive(Serialize)]
struct Content<'a> {
    content: &'a str,
}

#[derive(Serialize)]
struct Dimension<'a> {
    bk_target_cloud_id: String,
    bk_target_ip: &'a str,
    bk_agent_id: &'a str,
    process_group_id: &'a str,
    process_index: String,
    process_name: &'a str,
}

/// Names of events.
pub(super) fn name(told: Told) -> &'static str {
    match told {
        Told::Restarted => "process_restart_success",
        Told::RestartFailed => "process_restart_failed",
        Told::GivenUp => "process_cancel_restart",
        Told::OverLimit => "process_resource_limit_exceed",
    }
}

/// Name of the event about a whole namespace.
pub(super) const GROUP_OVER_LIMIT: &str = "process_group_resource_limit_exceed";

impl Source {
    /// The record of one event.
    pub(super) fn record(&self, event_name: &'static str, key: &Key, content: &str, now_ms: u64) -> Vec<u8> {
        let message = Message {
            data_id: self.data_id,
            data: [Event {
                event_name,
                event: Content { content },
                target: format!("{}|{}", self.ip, self.cloud_id),
                dimension: Dimension {
                    bk_target_cloud_id: self.cloud_id.to_string(),
                    bk_target_ip: &self.ip,
                    bk_agent_id: &self.agent_id,
                    process_group_id: &key.namespace,
                    process_index: key.to_string(),
                    process_name: &key.name,
                },
                timestamp: now_ms,
            }],
        };
        // Texts and numbers alone: there is nothing in it that could not be written.
        serde_json::to_vec(&message).unwrap_or_default()
    }

    /// Hands one over.
    pub(super) fn send(&self, intake: &Intake, event_name: &'static str, key: &Key, content: &str, now_ms: u64) {
        tracing::info!(process = %key, event = event_name, "{content}");
        let record = self.record(event_name, key, content, now_ms);
        let seconds = u32::try_from(now_ms / 1000).unwrap_or(u32::MAX);
        if let Err(reason) = intake.offer(self.data_id, seconds, KIND, &record) {
            tracing::warn!(process = %key, event = event_name, ?reason, "an event was dropped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_that_readers_know() {
        // contract: procmgr-agent-lifecycle#51
        // contract: data-plane#36
        let source = Source {
            data_id: 1_100_008,
            ip: "10.0.0.1".to_owned(),
            cloud_id: 3,
            agent_id: "0200".to_owned(),
        };
        let key = Key {
            namespace: "nodeman".to_owned(),
            name: "bkmonitorbeat".to_owned(),
        };
        let text = "check bkmonitorbeat not running, and restart it success";
        let record = source.record(name(Told::Restarted), &key, text, 1_700_000_000_123);
        let value: serde_json::Value = serde_json::from_slice(&record).unwrap();
        assert_eq!(
            value,
            serde_json::json!({"data_id": 1_100_008, "data": [{
                "event_name": "process_restart_success",
                "event": {"content": text},
                "target": "10.0.0.1|3",
                "dimension": {"bk_target_cloud_id": "3", "bk_target_ip": "10.0.0.1", "bk_agent_id": "0200",
                    "process_group_id": "nodeman", "process_index": "nodeman:bkmonitorbeat", "process_name": "bkmonitorbeat"},
                "timestamp": 1_700_000_000_123u64,
            }]})
        );
    }
}
