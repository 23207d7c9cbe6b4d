//! Typed identifiers: agent ids in their two forms, cloud ids, task ids. Parsed at the edge, so that the inside never wonders.

use std::fmt;
use std::net::IpAddr;

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Nothing there.
    #[error("the id is empty")]
    Empty,
    /// Longer than the contract allows.
    #[error("the id has {0} bytes, at most {1} are allowed")]
    TooLong(usize, usize),
    /// Control characters, blanks or braces would end up in log lines and store keys.
    #[error("the id holds a character that is not allowed: {0:?}")]
    BadCharacter(char),
}

/// Number of a cloud area; 0 is the directly reachable one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct CloudId(pub i32);

impl fmt::Display for CloudId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An agent's id as callers and agents write it: opaque (`020000…`, at most 64 bytes) or `cloud:ip`.
///
/// Kept byte for byte: answers must echo what was asked (contract v2-http-task#10).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AgentId(Box<str>);

impl AgentId {
    /// Longest id in bytes.
    pub const MAX_LEN: usize = 64;

    /// Checks and takes an id.
    ///
    /// # Errors
    /// When it is empty, too long, or holds white space, control characters or `{}` (which would break store keys).
    pub fn parse(text: &str) -> Result<Self, IdError> {
        check(text, Self::MAX_LEN)?;
        Ok(Self(text.into()))
    }

    /// The id as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The two parts of the `cloud:ip` form; `None` for an opaque id.
    #[must_use]
    pub fn cloud_ip(&self) -> Option<(CloudId, IpAddr)> {
        split_cloud_ip(&self.0)
    }

    /// Writes the `cloud:ip` form.
    #[must_use]
    pub fn from_cloud_ip(cloud: CloudId, ip: IpAddr) -> Self {
        Self(format!("{cloud}:{ip}").into())
    }
}

impl fmt::Display for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The two parts of a `cloud:ip` text; `None` when it is anything else.
#[must_use]
pub fn split_cloud_ip(text: &str) -> Option<(CloudId, IpAddr)> {
    let (cloud, ip) = text.split_once(':')?;
    Some((CloudId(cloud.parse().ok()?), ip.parse().ok()?))
}

/// A task's id: opaque to clients, at most 64 bytes. Ours read `GSETASK:S:<utc time>:<16 hex>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(Box<str>);

impl TaskId {
    /// Longest id in bytes (a client keeps it in a column of that width).
    pub const MAX_LEN: usize = 64;

    /// Checks and takes an id.
    ///
    /// # Errors
    /// As [`AgentId::parse`].
    pub fn parse(text: &str) -> Result<Self, IdError> {
        check(text, Self::MAX_LEN)?;
        Ok(Self(text.into()))
    }

    /// Makes the id of a script task from its UTC time (`yyyymmddHHMMSS`) and 64 random bits.
    #[must_use]
    pub fn script(utc_stamp: &str, random: u64) -> Self {
        Self(format!("GSETASK:S:{utc_stamp}:{random:016X}").into())
    }

    /// Makes the id of a file task, as [`TaskId::script`]; its last part names the instance that controls it (see
    /// [`TaskId::instance_tag`]).
    #[must_use]
    pub fn file(utc_stamp: &str, random: u64, instance: &str) -> Self {
        let tag = Self::instance_tag(instance);
        Self(format!("GSETASK:F:{utc_stamp}:{random:016X}:{tag}").into())
    }

    /// Makes the id of a process task, as [`TaskId::script`].
    #[must_use]
    pub fn process(utc_stamp: &str, random: u64) -> Self {
        Self(format!("GSETASK:P:{utc_stamp}:{random:016X}").into())
    }

    /// What stands for an instance of gse_btsvr in the ids of its tasks.
    #[must_use]
    pub fn instance_tag(instance: &str) -> String {
        // FNV-1a: part of stored ids, so it must never change with a library's version.
        let hash = instance.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        format!("{hash:08x}")
    }

    /// The instance part of a file task's id; `None` for any other task.
    #[must_use]
    pub fn file_instance(&self) -> Option<&str> {
        self.0.strip_prefix("GSETASK:F:")?.rsplit_once(':').map(|(_, tag)| tag)
    }

    /// The id as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check(text: &str, max: usize) -> Result<(), IdError> {
    if text.is_empty() {
        return Err(IdError::Empty);
    }
    if text.len() > max {
        return Err(IdError::TooLong(text.len(), max));
    }
    match text
        .chars()
        .find(|c| c.is_control() || c.is_whitespace() || matches!(c, '{' | '}'))
    {
        Some(c) => Err(IdError::BadCharacter(c)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_agent_ids() {
        // contract: v2-http-task#10
        let opaque = AgentId::parse("02000000005254003dd2ea1700473962076n").unwrap();
        assert_eq!(opaque.cloud_ip(), None);
        let old = AgentId::parse("0:10.0.0.1").unwrap();
        assert_eq!(old.cloud_ip(), Some((CloudId(0), "10.0.0.1".parse().unwrap())));
        assert_eq!(old.as_str(), "0:10.0.0.1");
        let v6 = AgentId::parse("3:fe80::1").unwrap();
        assert_eq!(v6.cloud_ip(), Some((CloudId(3), "fe80::1".parse().unwrap())));
    }

    #[test]
    fn ids_that_would_break_keys_are_refused() {
        assert_eq!(AgentId::parse(""), Err(IdError::Empty));
        assert_eq!(AgentId::parse(&"x".repeat(65)), Err(IdError::TooLong(65, 64)));
        for bad in ["a b", "a\nb", "a{b", "a}b", "\u{7f}"] {
            assert!(matches!(AgentId::parse(bad), Err(IdError::BadCharacter(_))), "{bad:?}");
        }
    }

    #[test]
    fn script_task_ids_fit_the_clients_column() {
        // contract: v2-http-task#1
        let id = TaskId::script("20261122233412", u64::MAX);
        assert!(id.as_str().len() <= TaskId::MAX_LEN);
        assert_eq!(TaskId::parse(id.as_str()), Ok(id));
        let file = TaskId::file("20261122233412", u64::MAX, "local");
        assert!(file.as_str().len() <= TaskId::MAX_LEN);
        assert_eq!(file.file_instance(), Some(TaskId::instance_tag("local").as_str()));
        assert_eq!(TaskId::script("20261122233412", 1).file_instance(), None);
    }
}
