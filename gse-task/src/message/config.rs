//! Settings of messages to and from plugins, the `[messages]` table.

use std::path::PathBuf;

use gse_core::config::Problems;
use gse_proto::message::MAX_PLUGIN;
use serde::{Deserialize, Serialize};

/// Who may send messages to which plugins, and where what plugins say is brought.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MessagesConfig {
    /// Registrations of plugins.
    pub slots: Vec<Slot>,
    /// Agents in one call at most.
    pub max_agents: usize,
    /// Bytes of one message at most.
    pub max_content_bytes: usize,
    /// How long agents have to say that their plugin has it.
    pub dispatch_timeout_ms: u64,
    /// Certificates of the authorities that call-backs by HTTPS are checked against, PEM; the system's are never used.
    pub ca: Option<PathBuf>,
    /// How long one try of a call-back may take.
    pub callback_timeout_ms: u64,
    /// Tries of one call-back at most.
    pub callback_tries: usize,
    /// The first pause between two of them; it doubles.
    pub callback_retry_ms: u64,
    /// Call-backs of one slot under way at once.
    pub callback_at_once: usize,
    /// Messages of plugins that wait for the call-back of one slot at most; beyond, they are dropped and counted.
    pub callback_queue: usize,
    /// Bytes of all that wait, of all slots.
    pub callback_queue_bytes: usize,
}

/// One registration: a plugin, who may send to it, and where what it says is brought.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Slot {
    /// What the platform names it by.
    pub slot_id: i64,
    /// What it proves its right with.
    pub token: String,
    /// The plugin's name, as it says it to its agent.
    pub plugin: String,
    /// Where what the plugin says is posted, a URL; empty: nowhere.
    pub callback: String,
}

impl Default for MessagesConfig {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            max_agents: 10_000,
            max_content_bytes: 2 << 20,
            dispatch_timeout_ms: 5_000,
            ca: None,
            callback_timeout_ms: 5_000,
            callback_tries: 4,
            callback_retry_ms: 200,
            callback_at_once: 8,
            callback_queue: 1_024,
            callback_queue_bytes: 64 << 20,
        }
    }
}

impl MessagesConfig {
    /// Adds what cannot work.
    pub(crate) fn validate(&self, problems: &mut Problems) {
        for (name, value, low, high) in [
            ("max_agents", self.max_agents as u64, 1, 1 << 20),
            ("max_content_bytes", self.max_content_bytes as u64, 1, 7 << 20),
            ("dispatch_timeout_ms", self.dispatch_timeout_ms, 100, 120_000),
            ("callback_timeout_ms", self.callback_timeout_ms, 10, 120_000),
            ("callback_tries", self.callback_tries as u64, 1, 100),
            ("callback_retry_ms", self.callback_retry_ms, 1, 60_000),
            ("callback_at_once", self.callback_at_once as u64, 1, 1_024),
            ("callback_queue", self.callback_queue as u64, 1, 1 << 20),
            (
                "callback_queue_bytes",
                self.callback_queue_bytes as u64,
                1 << 20,
                1 << 32,
            ),
        ] {
            problems.check_range(&format!("messages.{name}"), value, low, high);
        }
        let key = "messages.slots";
        for (n, slot) in self.slots.iter().enumerate() {
            let id = slot.slot_id;
            if self.slots.iter().take(n).any(|other| other.slot_id == id) {
                problems.push(key, format!("names slot {id} twice"));
            }
            if slot.token.len() < 8 {
                problems.push(key, format!("gives slot {id} a token of fewer than 8 characters"));
            }
            if slot.plugin.is_empty() || slot.plugin.len() > MAX_PLUGIN {
                problems.push(
                    key,
                    format!("must name the plugin of slot {id}, with 1 to {MAX_PLUGIN} bytes"),
                );
            }
            let url = slot.callback.parse::<http::Uri>().ok();
            let good =
                url.is_some_and(|url| matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some());
            if !slot.callback.is_empty() && !good {
                problems.push(
                    key,
                    format!("has a callback of slot {id} that is no URL; write http://host:port/path"),
                );
            }
            if slot.callback.starts_with("https:") && self.ca.is_none() {
                problems.push(
                    "messages.ca",
                    format!("is not set; the callback of slot {id} is by HTTPS and could not be checked"),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_said() {
        let slot = |slot_id, callback: &str| Slot {
            slot_id,
            token: "long enough".to_owned(),
            plugin: "bkmonitorbeat".to_owned(),
            callback: callback.to_owned(),
        };
        let problems = |slots| {
            let mut problems = Problems::default();
            let config = MessagesConfig {
                slots,
                ..MessagesConfig::default()
            };
            config.validate(&mut problems);
            problems.into_inner().len()
        };
        assert_eq!(
            problems(vec![slot(1, "http://127.0.0.1:8080/callback"), slot(2, "")]),
            0
        );
        assert_eq!(problems(vec![slot(1, ""), slot(1, "")]), 1);
        assert_eq!(problems(vec![slot(1, "127.0.0.1/callback")]), 1);
        assert_eq!(problems(vec![slot(1, "https://host/callback")]), 1, "nobody to trust");
        assert_eq!(problems(vec![Slot::default()]), 2);
    }
}
