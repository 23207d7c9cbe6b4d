//! Settings of the data socket, the `[data.socket]` table.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::rule::{IdRule, Rules};
use crate::local::{Binding, Place};

/// Where programs that know no configuration look for the agent (contract data-plane, 1.1).
pub const COMPILED_IN: &str = "/usr/local/gse/gseagent/ipc.state.report";
/// The socket's name in the agent's own directory.
pub const NAME: &str = "ipc.state.report";

/// Where plugins connect, and what they may.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SocketConfig {
    /// Whether plugins are listened to at all.
    pub enabled: bool,
    /// Absolute paths of sockets, or ports of 127.0.0.1. Empty: `ipc.state.report` in `data_dir`, where an agent for a trial disturbs
    /// nobody; an agent for all plugins of a host says `/var/run/ipc.state.report`.
    pub paths: Vec<String>,
    /// Whether `/usr/local/gse/gseagent/ipc.state.report` is listened on too: some plugins send there whatever they are configured with.
    pub compiled_in: bool,
    /// How the sockets' files are made and kept.
    pub file: Binding,
    /// Connections at most.
    pub max_connections: usize,
    /// Connections of one account but root at most.
    pub max_per_account: usize,
    /// Bytes of records that have not come whole yet, all connections together; a longer record that finds no room is dropped and counted.
    pub pending_bytes: usize,
    /// Ids that not everybody may write. What no rule names is everybody's.
    pub reserved: Vec<IdRule>,
    /// `bizid` of the answer to plugins.
    pub bizid: i32,
    /// `bk_biz_id` of it.
    pub bk_biz_id: i32,
    /// `bk_tenant_id` of it.
    pub bk_tenant_id: String,
    /// `static_dataid` of it; not 0: takes the place of the id that bkmonitorbeat sends static data with.
    pub static_dataid: i32,
}

impl Default for SocketConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            paths: Vec::new(),
            compiled_in: false,
            file: Binding::default(),
            max_connections: 1_024,
            max_per_account: 512,
            pending_bytes: 48 << 20,
            reserved: vec![IdRule {
                ids: vec!["1000".to_owned(), "1100008".to_owned()],
                accounts: Vec::new(),
            }],
            bizid: 0,
            bk_biz_id: 0,
            bk_tenant_id: String::new(),
            static_dataid: 0,
        }
    }
}

impl SocketConfig {
    /// Every place that is to be listened on, each once.
    pub(super) fn places(&self, data_dir: &Path) -> Vec<Place> {
        let mut places: Vec<Place> = if self.paths.is_empty() {
            vec![Place::Path(data_dir.join(NAME))]
        } else {
            // Those that are none were refused with the configuration.
            self.paths.iter().filter_map(|path| Place::parse(path).ok()).collect()
        };
        if self.compiled_in {
            places.push(Place::Path(COMPILED_IN.into()));
        }
        let mut once = Vec::new();
        for place in places {
            if !once.contains(&place) {
                once.push(place);
            }
        }
        once
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
            ("max_per_account", self.max_per_account, 1, 1 << 20),
            ("pending_bytes", self.pending_bytes, 11 << 20, 1 << 40),
        ] {
            if !(low..=high).contains(&value) {
                problems.push(format!("{name} is {value}; it must be between {low} and {high}"));
            }
        }
        for rule in &self.reserved {
            if let Err(error) = Rules::ranges(rule) {
                problems.push(format!("reserved {error}"));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_once() {
        let mut config = SocketConfig::default();
        let here = Path::new("/d");
        assert_eq!(config.places(here), [Place::Path("/d/ipc.state.report".into())]);
        config.paths = vec![COMPILED_IN.to_owned(), "47000".to_owned(), "47000".to_owned()];
        config.compiled_in = true;
        assert_eq!(
            config.places(here),
            [Place::Path(COMPILED_IN.into()), Place::Port(47000)]
        );
        assert!(config.problems().is_empty());
    }

    #[test]
    fn what_cannot_work_is_said() {
        let config = SocketConfig {
            paths: vec!["ipc".to_owned()],
            max_connections: 0,
            reserved: vec![IdRule {
                ids: vec!["9-1".to_owned()],
                accounts: vec![],
            }],
            ..SocketConfig::default()
        };
        let problems = config.problems();
        assert_eq!(problems.len(), 3, "{problems:?}");
    }
}
