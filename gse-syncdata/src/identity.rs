//! What is to be on one host: its identity as the source gives it, byte for byte, and whose it is.
//!
//! Of CMDB's JSON only what says whose it is gets read; what else is in it is the readers' business.

use bytes::Bytes;
use gse_proto::ids::AgentId;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// SHA-256.
pub type Hash = [u8; 32];

/// Names of one host's agent at most.
pub const MAX_NAMES: usize = 16;

/// One host's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Names of its agent, at least one; the first is the host's key.
    pub agents: Vec<AgentId>,
    /// The kind of system, as far as the source says it.
    pub os: Os,
    /// `bk_host_id`; 0 if the source does not say it.
    pub host_id: u64,
    /// Changes when the content means something else.
    pub digest: Hash,
    /// The file, byte for byte.
    pub content: Bytes,
}

/// Kinds of systems, as far as the file's place depends on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Os {
    /// The source does not say it; the agent does.
    #[default]
    Unknown,
    /// Linux, AIX and the like.
    Unix,
    /// Windows.
    Windows,
}

impl Os {
    /// As it is stored.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Os::Unknown => "",
            Os::Unix => "linux",
            Os::Windows => "windows",
        }
    }

    /// From its name, or from CMDB's number for it.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text.to_ascii_lowercase().as_str() {
            "" => Os::Unknown,
            "2" | "windows" => Os::Windows,
            _ => Os::Unix,
        }
    }
}

/// Why there is no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// It is not what it should be.
    #[error("{0}")]
    Malformed(String),
    /// It names no agent: a host with addresses that change, on which no agent is registered yet.
    #[error("host {0} has no agent id, and its addresses may change")]
    NoAgent(u64),
}

#[derive(Deserialize)]
struct Fields {
    bk_host_id: u64,
    #[serde(default)]
    bk_cloud_id: i64,
    #[serde(default)]
    bk_host_innerip: Option<String>,
    #[serde(default)]
    bk_os_type: Option<String>,
    #[serde(default)]
    bk_agent_id: Option<String>,
    #[serde(default)]
    bk_addressing: Option<String>,
}

impl Identity {
    /// Of a host as CMDB describes it; `json` is kept as it is.
    ///
    /// # Errors
    /// It names no host, or no agent.
    pub fn of_cmdb(json: &str) -> Result<Self, Unusable> {
        let malformed = |error: serde_json::Error| Unusable::Malformed(format!("not a host's identity: {error}"));
        let fields: Fields = serde_json::from_str(json).map_err(malformed)?;
        let agents = fields.agents()?;
        Ok(Self {
            agents,
            os: Os::parse(fields.bk_os_type.as_deref().unwrap_or_default()),
            host_id: fields.bk_host_id,
            digest: canonical(&serde_json::from_str(json).map_err(malformed)?),
            content: Bytes::copy_from_slice(json.as_bytes()),
        })
    }

    /// Of the host with this agent; any content.
    #[must_use]
    pub fn of_bytes(agent: AgentId, content: Bytes) -> Self {
        Self {
            digest: Sha256::digest(&content).into(),
            agents: vec![agent],
            os: Os::Unknown,
            host_id: 0,
            content,
        }
    }

    /// What the host is called here.
    #[must_use]
    pub fn key(&self) -> &str {
        self.agents.first().map_or("", AgentId::as_str)
    }
}

impl Fields {
    /// The agent's own id, or else `cloud:ip` for each of the host's addresses.
    fn agents(&self) -> Result<Vec<AgentId>, Unusable> {
        let id = self.bk_agent_id.as_deref().unwrap_or_default().trim();
        if !id.is_empty() {
            let id = AgentId::parse(id).map_err(|error| {
                Unusable::Malformed(format!(
                    "host {}: the agent id is not possible: {error}",
                    self.bk_host_id
                ))
            })?;
            return Ok(vec![id]);
        }
        if self.bk_addressing.as_deref() == Some("dynamic") {
            return Err(Unusable::NoAgent(self.bk_host_id));
        }
        let addresses = self.bk_host_innerip.as_deref().unwrap_or_default();
        let names: Vec<AgentId> = addresses
            .split(',')
            .map(str::trim)
            .filter(|ip| !ip.is_empty())
            .filter_map(|ip| AgentId::parse(&format!("{}:{ip}", self.bk_cloud_id)).ok())
            .take(MAX_NAMES)
            .collect();
        if names.is_empty() {
            return Err(Unusable::NoAgent(self.bk_host_id));
        }
        Ok(names)
    }
}

/// Over what a JSON value means: neither the order of keys nor blanks count. CMDB's watch and its search need not write alike.
fn canonical(value: &Value) -> Hash {
    let mut hash = Sha256::new();
    add(&mut hash, value);
    hash.finalize().into()
}

fn add(hash: &mut Sha256, value: &Value) {
    let mut text = |kind: u8, bytes: &[u8]| {
        hash.update([kind]);
        hash.update((bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    };
    match value {
        Value::Null => text(b'n', b""),
        Value::Bool(yes) => text(b'b', &[u8::from(*yes)]),
        Value::Number(number) => text(b'd', number.to_string().as_bytes()),
        Value::String(string) => text(b's', string.as_bytes()),
        Value::Array(items) => {
            text(b'a', &(items.len() as u64).to_be_bytes());
            for item in items {
                add(hash, item);
            }
        }
        Value::Object(fields) => {
            text(b'o', &(fields.len() as u64).to_be_bytes());
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_unstable_by_key(|(name, _)| name.as_str());
            for (name, field) in fields {
                add(hash, &Value::String(name.clone()));
                add(hash, field);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(json: &str) -> Vec<String> {
        let identity = Identity::of_cmdb(json).unwrap();
        identity.agents.iter().map(|id| id.as_str().to_owned()).collect()
    }

    #[test]
    fn whose_it_is() {
        let real =
            r#"{"bk_host_id":7,"bk_agent_id":"020000000242010a00002f17521298676503","bk_host_innerip":"10.0.0.1"}"#;
        assert_eq!(names(real), ["020000000242010a00002f17521298676503"]);
        let old = r#"{"bk_host_id":7,"bk_cloud_id":3,"bk_host_innerip":"10.0.0.1, 10.0.1.1","bk_agent_id":"","bk_os_type":"2"}"#;
        assert_eq!(names(old), ["3:10.0.0.1", "3:10.0.1.1"]);
        let identity = Identity::of_cmdb(old).unwrap();
        assert_eq!(
            (identity.key(), identity.os, identity.host_id),
            ("3:10.0.0.1", Os::Windows, 7)
        );
        // contract: procmgr-agent-lifecycle#49
        assert_eq!(identity.content, old);
        let moving = r#"{"bk_host_id":8,"bk_host_innerip":"10.0.0.1","bk_addressing":"dynamic"}"#;
        assert_eq!(Identity::of_cmdb(moving), Err(Unusable::NoAgent(8)));
        for broken in ["", "[]", "{}", r#"{"bk_host_id":"x"}"#, r#"{"bk_host_id":-1}"#] {
            assert!(
                matches!(Identity::of_cmdb(broken), Err(Unusable::Malformed(_))),
                "{broken}"
            );
        }
    }

    #[test]
    fn writing_it_otherwise_is_no_change() {
        let digest = |json: &str| Identity::of_cmdb(json).unwrap().digest;
        let one = digest(r#"{"bk_host_id":1,"bk_host_innerip":"10.0.0.1","process":[1,2],"a":null}"#);
        assert_eq!(
            one,
            digest(r#"{ "a":null, "process":[1, 2], "bk_host_innerip":"10.0.0.1", "bk_host_id":1 }"#)
        );
        for other in [
            r#"{"bk_host_id":1,"bk_host_innerip":"10.0.0.1","process":[2,1],"a":null}"#,
            r#"{"bk_host_id":1,"bk_host_innerip":"10.0.0.1","process":[1,2]}"#,
            r#"{"bk_host_id":1,"bk_host_innerip":"10.0.0.1","process":[1,2],"a":"null"}"#,
        ] {
            assert_ne!(one, digest(other), "{other}");
        }
    }
}
