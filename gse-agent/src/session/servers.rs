//! The addresses the agent may connect to: those of its configuration for ever, those the servers told of until they tell of others.
//! Order of the tries, and how long a server that refused is left alone. What was learned is kept in the data directory, so that an
//! agent whose configured servers have all moved still finds the new ones.

use std::path::{Path, PathBuf};
use std::time::Duration;

use gse_core::random::Random;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// Addresses a server may teach; more are ignored.
const MAX_LEARNED: usize = 64;
/// Longest `host:port` taken from a server.
const MAX_ADDRESS: usize = 260;

#[derive(Debug)]
struct Entry {
    address: String,
    configured: bool,
    not_before: Option<Instant>,
}

/// What is kept on disk.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    servers: Vec<String>,
}

/// The list, and the place in it.
#[derive(Debug)]
pub(crate) struct Servers {
    entries: Vec<Entry>,
    /// Where the next round starts.
    next: usize,
    /// Where what was learned is kept; if anywhere.
    file: Option<PathBuf>,
}

/// What to do next.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    /// Try these, one after the other.
    Try(Vec<String>),
    /// All have asked to be left alone until then.
    Wait(Instant),
}

impl Servers {
    /// The list from the configuration and the file. Blocking.
    pub(crate) fn load(configured: &[String], data_dir: &Path) -> Self {
        let file = data_dir.join("servers.json");
        let mut servers = Self::configured(configured);
        let kept = match std::fs::read(&file) {
            Ok(bytes) => serde_json::from_slice::<Kept>(&bytes).unwrap_or_else(|error| {
                tracing::warn!(
                    "{} is damaged ({error}); only the configured servers are known",
                    file.display()
                );
                Kept::default()
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Kept::default(),
            Err(error) => {
                tracing::warn!("cannot read {}: {error}", file.display());
                Kept::default()
            }
        };
        for address in kept.servers.iter().take(MAX_LEARNED) {
            servers.add(address, false);
        }
        servers.file = Some(file);
        servers
    }

    /// The list from the configuration alone; what is learned is not kept.
    pub(crate) fn configured(configured: &[String]) -> Self {
        let mut servers = Self {
            entries: Vec::new(),
            next: 0,
            file: None,
        };
        for address in configured {
            servers.add(address, true);
        }
        servers
    }

    fn add(&mut self, address: &str, configured: bool) -> bool {
        if !well_formed(address) {
            tracing::warn!(address, "ignored: not the address of a server (host:port)");
            return false;
        }
        if self.entries.iter().any(|entry| entry.address == address) {
            return false;
        }
        self.entries.push(Entry {
            address: address.to_owned(),
            configured,
            not_before: None,
        });
        true
    }

    /// Starts anywhere in the list.
    pub(crate) fn start_anywhere(&mut self, random: &Random) {
        let at = random.below(self.entries.len() as u64);
        self.next = usize::try_from(at).unwrap_or(0);
    }

    /// The addresses of one round, those left out that asked for patience.
    pub(crate) fn round(&self, now: Instant) -> Next {
        let len = self.entries.len();
        let in_turn = || (0..len).map(|n| &self.entries[(self.next + n) % len]);
        let due: Vec<String> = in_turn()
            .filter(|entry| entry.not_before.is_none_or(|at| at <= now))
            .map(|entry| entry.address.clone())
            .collect();
        if !due.is_empty() {
            return Next::Try(due);
        }
        match in_turn().filter_map(|entry| entry.not_before).min() {
            Some(at) => Next::Wait(at),
            None => Next::Try(due),
        }
    }

    /// The server asked to be left alone for `time`.
    pub(crate) fn leave_alone(&mut self, address: &str, time: Duration, now: Instant) {
        if let Some(entry) = self.entry(address) {
            entry.not_before = Some(now + time);
        }
    }

    /// A session with this server has begun: the next round starts with it.
    pub(crate) fn connected(&mut self, address: &str) {
        if let Some(at) = self.entries.iter().position(|entry| entry.address == address) {
            self.next = at;
            self.entries[at].not_before = None;
        }
    }

    /// The next round starts with the server after `address`.
    pub(crate) fn prefer_others(&mut self, address: &str) {
        if let Some(at) = self.entries.iter().position(|entry| entry.address == address) {
            self.next = (at + 1) % self.entries.len();
        }
    }

    fn entry(&mut self, address: &str) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.address == address)
    }

    /// Takes a server's word for which servers there are: `all` replaces what was learned before. True if something has changed.
    pub(crate) fn learn(&mut self, all: &[String]) -> bool {
        if all.is_empty() {
            return false;
        }
        let current = self.entries.get(self.next).map(|entry| entry.address.clone());
        let before = self.entries.len();
        self.entries
            .retain(|entry| entry.configured || all.contains(&entry.address));
        let mut changed = self.entries.len() != before;
        let mut learned = self.entries.iter().filter(|entry| !entry.configured).count();
        for address in all {
            if learned >= MAX_LEARNED {
                tracing::warn!("the server names more than {MAX_LEARNED} servers; the rest is ignored");
                break;
            }
            if self.add(address, false) {
                learned += 1;
                changed = true;
            }
        }
        self.next = current
            .and_then(|address| self.entries.iter().position(|entry| entry.address == address))
            .unwrap_or(0);
        changed
    }

    /// Adds addresses without forgetting any. True if something has changed.
    pub(crate) fn learn_more(&mut self, more: &[String]) -> bool {
        let all: Vec<String> = self
            .entries
            .iter()
            .filter(|entry| !entry.configured)
            .map(|entry| entry.address.clone())
            .chain(more.iter().cloned())
            .collect();
        !more.is_empty() && self.learn(&all)
    }

    /// Path and content of the file that keeps what was learned, for a caller that may block; if it is kept.
    pub(crate) fn to_keep(&self) -> Option<(PathBuf, Vec<u8>)> {
        let file = self.file.clone()?;
        let kept = Kept {
            servers: self
                .entries
                .iter()
                .filter(|entry| !entry.configured)
                .map(|entry| entry.address.clone())
                .collect(),
        };
        // A list of texts always has a JSON form.
        Some((file, serde_json::to_vec(&kept).unwrap_or_default()))
    }
}

/// Whether a text has the form `host:port`.
pub(crate) fn well_formed(address: &str) -> bool {
    address.len() <= MAX_ADDRESS
        && address.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty()
                && !host.chars().any(|c| c.is_whitespace() || c.is_control() || c == '/')
                && port.parse::<u16>().is_ok_and(|port| port != 0)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn tried(servers: &Servers) -> Vec<String> {
        match servers.round(Instant::now()) {
            Next::Try(addresses) => addresses,
            Next::Wait(_) => panic!("nothing to try"),
        }
    }

    #[test]
    fn in_turn_from_the_last_good_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut servers = Servers::load(&list(&["a:1", "b:1", "c:1"]), dir.path());
        assert_eq!(tried(&servers), list(&["a:1", "b:1", "c:1"]));
        servers.connected("b:1");
        assert_eq!(tried(&servers), list(&["b:1", "c:1", "a:1"]));
        servers.prefer_others("b:1");
        assert_eq!(tried(&servers), list(&["c:1", "a:1", "b:1"]));
    }

    #[test]
    fn refused_ones_are_left_alone_as_long_as_they_asked() {
        let dir = tempfile::tempdir().unwrap();
        let mut servers = Servers::load(&list(&["a:1", "b:1"]), dir.path());
        let now = Instant::now();
        servers.leave_alone("a:1", Duration::from_secs(5), now);
        assert_eq!(servers.round(now), Next::Try(list(&["b:1"])));
        servers.leave_alone("b:1", Duration::from_secs(3), now);
        assert_eq!(servers.round(now), Next::Wait(now + Duration::from_secs(3)));
        assert_eq!(servers.round(now + Duration::from_secs(4)), Next::Try(list(&["b:1"])));
    }

    #[test]
    fn learned_ones_survive_a_restart_and_configured_ones_everything() {
        let dir = tempfile::tempdir().unwrap();
        let configured = list(&["a:1"]);
        let mut servers = Servers::load(&configured, dir.path());
        assert!(servers.learn(&list(&["a:1", "b:1", "nonsense", "c:0", "d e:1"])));
        assert!(!servers.learn(&list(&["a:1", "b:1"])));
        let (path, bytes) = servers.to_keep().unwrap();
        std::fs::write(path, bytes).unwrap();

        let mut servers = Servers::load(&configured, dir.path());
        assert_eq!(tried(&servers), list(&["a:1", "b:1"]));
        assert!(servers.learn_more(&list(&["c:1"])));
        assert_eq!(tried(&servers), list(&["a:1", "b:1", "c:1"]));
        assert!(servers.learn(&list(&["c:1"])));
        assert_eq!(tried(&servers), list(&["a:1", "c:1"]));

        std::fs::write(dir.path().join("servers.json"), b"{").unwrap();
        assert_eq!(tried(&Servers::load(&configured, dir.path())), configured);
    }

    #[test]
    fn no_server_can_teach_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut servers = Servers::load(&list(&["a:1"]), dir.path());
        let many: Vec<String> = (0..10_000).map(|n| format!("h{n}:1")).collect();
        servers.learn(&many);
        servers.learn_more(&list(&["x:1"]));
        assert_eq!(tried(&servers).len(), 1 + MAX_LEARNED);
    }
}
