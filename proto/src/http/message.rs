//! Bodies of the calls that send messages to plugins, and of the call-back that brings what plugins say.

use serde::{Deserialize, Serialize};

use super::null_default;

/// Body of `dispatch_message`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DispatchMessage {
    /// Which registration is meant.
    pub slot_id: i64,
    /// Its secret.
    #[serde(default, deserialize_with = "null_default")]
    pub token: String,
    /// The caller's name for the message; it comes back with the plugin's answer.
    #[serde(default, deserialize_with = "null_default")]
    pub message_id: String,
    /// Whose plugins are meant, ids in either form.
    #[serde(default, deserialize_with = "null_default")]
    pub agent_id_list: Vec<String>,
    /// What the plugins get.
    #[serde(default, deserialize_with = "null_default")]
    pub content: String,
}

/// Body of `dispatch_multi_message`: each agent's plugin gets front, its own content and back as one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DispatchMultiMessage {
    /// Which registration is meant.
    pub slot_id: i64,
    /// Its secret.
    #[serde(default, deserialize_with = "null_default")]
    pub token: String,
    /// The caller's name for the message.
    #[serde(default, deserialize_with = "null_default")]
    pub message_id: String,
    /// Whose plugins are meant, with what is each one's own.
    #[serde(default, deserialize_with = "null_default")]
    pub agent_message_list: Vec<AgentMessage>,
    /// What stands before that.
    #[serde(default, deserialize_with = "null_default")]
    pub front_content: String,
    /// What stands behind it.
    #[serde(default, deserialize_with = "null_default")]
    pub back_content: String,
}

/// One agent's part of a [`DispatchMultiMessage`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentMessage {
    /// The agent, in either form.
    pub bk_agent_id: String,
    /// Its own content.
    #[serde(default, deserialize_with = "null_default")]
    pub content: String,
}

/// `data` of both answers: agents whose plugin has not got the message; those that are not named have.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DispatchReply {
    /// Failures only.
    pub results: Vec<AgentFailure>,
}

/// Why an agent's plugin has not got a message.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentFailure {
    /// As asked.
    pub bk_agent_id: String,
    /// An inner code.
    pub code: i32,
    /// For people.
    pub message: String,
}

/// What a platform is told when a plugin says something.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PluginSaid {
    /// As the plugin wrote it.
    pub message_id: String,
    /// The agent of the plugin.
    pub bk_agent_id: String,
    /// What it says.
    pub content: String,
}
