//! Settings of the message socket, the `[messages]` table.

use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User};
use serde::{Deserialize, Serialize};

use crate::local::{Binding, Peer, Place};

/// The socket's name in the agent's own directory.
pub const NAME: &str = "ipc.state.message";

/// Where plugins wait for messages, and which of them may.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MessageConfig {
    /// Whether plugins are listened to at all.
    pub enabled: bool,
    /// Absolute paths of sockets, or ports of 127.0.0.1. Empty: `ipc.state.message` in `data_dir`.
    pub paths: Vec<String>,
    /// How the sockets' files are made and kept.
    pub file: Binding,
    /// Accounts, by name or number, whose programs may be plugins, beside root's and the agent's own; `*` is every account. Whoever may
    /// can take the name of any plugin, and with it the messages for it.
    pub accounts: Vec<String>,
    /// Connections at most.
    pub max_connections: usize,
    /// Bytes that wait for one plugin to read at most.
    pub outbound_bytes: usize,
    /// A plugin that reads nothing for so long, while something waits for it, is disconnected.
    pub write_timeout_ms: u64,
    /// Longest content of a message that a plugin says.
    pub max_content: usize,
    /// Messages of plugins that wait for a server at most; beyond, they are dropped and counted.
    pub queue: usize,
    /// Bytes of them.
    pub queue_bytes: usize,
}

impl Default for MessageConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            paths: Vec::new(),
            file: Binding::default(),
            accounts: Vec::new(),
            max_connections: 256,
            outbound_bytes: 8 << 20,
            write_timeout_ms: 10_000,
            max_content: gse_proto::message::MAX_SAID,
            queue: 256,
            queue_bytes: 8 << 20,
        }
    }
}

impl MessageConfig {
    pub(super) fn places(&self, data_dir: &Path) -> Vec<Place> {
        if self.paths.is_empty() {
            let path: PathBuf = data_dir.join(NAME);
            return vec![Place::Path(path)];
        }
        // Those that are none were refused with the configuration.
        let mut places: Vec<Place> = self.paths.iter().filter_map(|path| Place::parse(path).ok()).collect();
        places.dedup();
        places
    }

    /// Every value that cannot work, as a sentence that begins with the setting's name.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self
            .file
            .problems()
            .into_iter()
            .map(|problem| format!("file.{problem}"))
            .collect();
        for path in &self.paths {
            if let Err(error) = Place::parse(path) {
                problems.push(format!("paths {error}"));
            }
        }
        for (name, value, low, high) in [
            ("max_connections", self.max_connections, 1, 1 << 20),
            ("outbound_bytes", self.outbound_bytes, 64 << 10, 1 << 30),
            ("max_content", self.max_content, 1, gse_proto::message::MAX_SAID),
            ("queue", self.queue, 1, 1 << 20),
            ("queue_bytes", self.queue_bytes, 1 << 20, 1 << 32),
        ] {
            if !(low..=high).contains(&value) {
                problems.push(format!("{name} is {value}; it must be between {low} and {high}"));
            }
        }
        if !(100..=3_600_000).contains(&self.write_timeout_ms) {
            problems.push("write_timeout_ms must be between 100 and 3600000".to_owned());
        }
        problems
    }
}

/// Whose programs may be plugins.
#[derive(Debug)]
pub(super) struct Accounts {
    everybody: bool,
    uids: Vec<u32>,
}

impl Accounts {
    /// Looks them up. Blocking.
    pub(super) fn resolve(names: &[String]) -> Self {
        let mut uids = vec![0, Uid::effective().as_raw()];
        for name in names.iter().filter(|name| *name != "*") {
            match name.parse::<u32>() {
                Ok(uid) => uids.push(uid),
                Err(_) => match User::from_name(name) {
                    Ok(Some(user)) => uids.push(user.uid.as_raw()),
                    Ok(None) => tracing::warn!("messages.accounts names {name}, which is no account of this host"),
                    Err(error) => tracing::warn!(%error, "account {name} of messages.accounts cannot be looked up"),
                },
            }
        }
        Self {
            everybody: names.iter().any(|name| name == "*"),
            uids,
        }
    }

    pub(super) fn may(&self, peer: Peer) -> bool {
        self.everybody || peer.uid.is_some_and(|uid| self.uids.contains(&uid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_some_accounts_are_plugins() {
        let by = |uid| Peer { uid, pid: None };
        let some = Accounts::resolve(&["4711".to_owned(), "nobody-of-this-name".to_owned()]);
        assert!(some.may(by(Some(0))) && some.may(by(Some(4711))));
        assert!(!some.may(by(Some(4712))) && !some.may(by(None)));
        let all = Accounts::resolve(&["*".to_owned()]);
        assert!(all.may(by(Some(4712))) && all.may(by(None)));
    }
}
