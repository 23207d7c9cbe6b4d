//! What can be set of the sharded back end, and which sets of copies are allowed.

use std::path::PathBuf;

use gse_core::config::Problems;
use serde::{Deserialize, Serialize};

use crate::sharded::slots::SlotMap;
use crate::single::dial::Place;

/// Several groups of Redis as one: keys are spread over the groups by slot, writes are acknowledged by several copies.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sharded {
    /// The groups. Without `slots` each serves an equal part, in the order given.
    pub groups: Vec<Group>,
    /// User on every Redis of the groups.
    pub user: String,
    /// Password on every Redis of the groups.
    pub password: Option<String>,
    /// A file that holds that password.
    pub password_file: Option<PathBuf>,
    /// User on the Sentinels.
    pub sentinel_user: String,
    /// Password on the Sentinels, when they have one.
    pub sentinel_password: Option<String>,
    /// A file that holds that password.
    pub sentinel_password_file: Option<PathBuf>,
    /// TLS to every server that is not spoken to over a socket.
    pub tls: Option<BackTls>,
    /// Redis servers of each group, the primary included (N).
    pub copies: usize,
    /// How many of them must have a write before it is acknowledged, the primary included (W).
    pub acknowledged: usize,
    /// Permits fewer acknowledging copies than a majority, with which a fail-over can lose acknowledged writes.
    pub accept_loss: bool,
    /// Which reads may be answered.
    pub reads: Reads,
    /// What to do when a Redis is set up in a way that breaks the promise.
    pub checks: Checks,
    /// Accepts that several servers of a group are on one host.
    pub one_host: bool,
    /// Permits `MSET` over several slots, which is not atomic then.
    pub split_mset: bool,
    /// Permits commands over several slots as long as there is one group only. With a second group they are refused: then nothing may be left that needs them.
    pub any_slots: bool,
    /// Milliseconds a write waits for its copies after it was executed.
    pub wait_ms: u64,
    /// Milliseconds for which commands are held back while a group has no primary; a fail-over shorter than that is only a delay.
    pub hold_ms: u64,
    /// Milliseconds between looks at Sentinels and primaries. News from a Sentinel are acted on at once.
    pub poll_ms: u64,
    /// Seconds for which a copy may be silent and still count as reachable.
    pub max_lag_s: u64,
    /// Shared connections to each group, for each of RESP2 and RESP3; rounded up to a multiple of the workers.
    pub connections: usize,
    /// Private connections (transactions, blocking commands, subscriptions) to each group at once.
    pub max_private: usize,
    /// Batches of commands waiting for one shared connection.
    pub max_inflight: usize,
    pub connect_timeout_ms: u64,
    /// A reply that takes longer counts as a dead connection. Must be longer than `wait_ms`.
    pub reply_timeout_ms: u64,
    /// Longest wait between attempts to connect again; the wait is random up to a bound that doubles.
    pub reconnect_max_ms: u64,
}

/// TLS files for the servers behind.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackTls {
    /// The authority of their certificates.
    pub ca: PathBuf,
    /// What we show them, when they ask for it.
    #[serde(default)]
    pub cert: Option<PathBuf>,
    #[serde(default)]
    pub key: Option<PathBuf>,
    /// Whether the Sentinels speak TLS too.
    #[serde(default = "yes")]
    pub sentinels: bool,
}

fn yes() -> bool {
    true
}

/// One group: a primary and its copies. Either under Sentinel (`sentinels`) or a plain list (`servers`).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Group {
    /// What it is called; for Sentinel also what the Sentinels call it.
    pub name: String,
    /// `host:port` of the Sentinels that watch it.
    pub sentinels: Vec<String>,
    /// `host:port` of its servers, when no Sentinel watches them. A server beside gse_dba may be `/path/of/its/socket=host:port`: it is spoken to over the
    /// socket, and the other servers copy from `host:port`. A server that is alone may be the path only.
    pub servers: Vec<String>,
    /// Under Sentinel: servers beside gse_dba that are spoken to over their sockets, as `/path/of/its/socket=host:port`.
    pub sockets: Vec<String>,
    /// Slots it serves, as `"0-5460"` or `"7"`.
    pub slots: Vec<String>,
}

/// A server of a group: how it is spoken to from here, and what the others know it by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) place: Place,
    pub(crate) known: String,
}

impl Member {
    /// Reads `host:port`, `/path` or `/path=host:port`.
    pub(crate) fn read(text: &str) -> anyhow::Result<Self> {
        match text.split_once('=') {
            Some((path, known)) if path.starts_with('/') => {
                let known = crate::sharded::control::place(known)?;
                anyhow::ensure!(
                    matches!(known, Place::Tcp(..)),
                    "after the = in {text:?} comes host:port"
                );
                Ok(Self {
                    place: Place::Unix(path.into()),
                    known: known.to_string(),
                })
            }
            _ => {
                let place = crate::sharded::control::place(text)?;
                Ok(Self {
                    known: place.to_string(),
                    place,
                })
            }
        }
    }

    fn place_is_path(&self) -> bool {
        matches!(self.place, Place::Unix(_))
    }

    fn is_nameless(&self) -> bool {
        self.known.starts_with('/')
    }
}

/// Which reads may be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reads {
    /// What is read is on W copies too: no read shows a write that a fail-over then takes back.
    Confirmed,
    /// What the primary has, at once.
    Primary,
}

/// What to do when a Redis is set up in a way that breaks the promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Checks {
    /// Do not start; on a primary that comes later, take no writes.
    Refuse,
    /// Say so in the log and in `INFO`.
    Warn,
}

impl Default for Sharded {
    fn default() -> Self {
        Self {
            groups: Vec::new(),
            user: "default".into(),
            password: None,
            password_file: None,
            sentinel_user: "default".into(),
            sentinel_password: None,
            sentinel_password_file: None,
            tls: None,
            copies: 3,
            acknowledged: 2,
            accept_loss: false,
            reads: Reads::Confirmed,
            checks: Checks::Refuse,
            one_host: false,
            split_mset: false,
            any_slots: false,
            wait_ms: 1000,
            hold_ms: 5000,
            poll_ms: 500,
            max_lag_s: 3,
            connections: 2,
            max_private: 1000,
            max_inflight: 4096,
            connect_timeout_ms: 2000,
            reply_timeout_ms: 10_000,
            reconnect_max_ms: 500,
        }
    }
}

impl Sharded {
    /// What an acknowledged write survives, in words.
    #[must_use]
    pub fn durability(&self) -> String {
        let (n, w) = (self.copies, self.acknowledged);
        let lost = w.saturating_sub(1);
        match (n, w) {
            (1, _) => "1 of 1: an acknowledged write is on one server; it survives what that server's own log survives, and there is no fail-over".into(),
            _ if 2 * w <= n => format!(
                "{w} of {n}: NOT SAFE: a fail-over may promote a copy without an acknowledged write (sharded.accept_loss)"
            ),
            _ if w == n => format!(
                "{w} of {n}: an acknowledged write is on every copy and survives the loss of any {lost}; writes stop while any copy is unreachable"
            ),
            _ => format!(
                "{w} of {n}: an acknowledged write is on at least {w} copies and survives the loss of any {lost} of them; writes go on while {} of the {n} are unreachable",
                n - w
            ),
        }
    }

    /// What one is let in with, on the servers and on the Sentinels. Blocking: it may read files.
    pub(crate) fn resolve_passwords(&self) -> anyhow::Result<[Option<String>; 2]> {
        let one = |name: &str, password: &Option<String>, file: &Option<PathBuf>| match (password, file) {
            (Some(p), None) => Ok(Some(p.clone())),
            (None, Some(file)) => super::first_line(file).map(Some),
            (Some(_), Some(_)) => anyhow::bail!("both sharded.{name} and sharded.{name}_file are set; keep one"),
            (None, None) => Ok(None),
        };
        Ok([
            one("password", &self.password, &self.password_file)?,
            one(
                "sentinel_password",
                &self.sentinel_password,
                &self.sentinel_password_file,
            )?,
        ])
    }

    pub(super) fn validate(&self, problems: &mut Problems) {
        if let Err(e) = SlotMap::of(&self.groups) {
            problems.push("sharded.groups", e);
        }
        for (i, g) in self.groups.iter().enumerate() {
            let key = format!("sharded.groups[{i}]");
            if g.name.is_empty() || self.groups.iter().filter(|o| o.name == g.name).count() > 1 {
                problems.push(&key, "needs a name that no other group has");
            }
            match (g.sentinels.is_empty(), g.servers.is_empty()) {
                (true, true) => problems.push(&key, "names neither sentinels nor servers: where is it?"),
                (false, false) => problems.push(&key, "names both sentinels and servers; keep one"),
                (true, false) if g.servers.len() != self.copies => problems.push(
                    &key,
                    format!(
                        "lists {} servers, but sharded.copies is {}",
                        g.servers.len(),
                        self.copies
                    ),
                ),
                _ => {}
            }
            for address in &g.sentinels {
                if let Err(e) = crate::sharded::control::place(address) {
                    problems.push(&key, format!("{e:#}"));
                }
            }
            if !g.sockets.is_empty() && g.sentinels.is_empty() {
                problems.push(
                    &key,
                    "has sockets, which are for groups under Sentinel: name them in servers",
                );
            }
            let mut known = std::collections::BTreeSet::new();
            for address in g.servers.iter().chain(&g.sockets) {
                match Member::read(address) {
                    Ok(m) if m.place_is_path() && m.is_nameless() && (g.servers.len() > 1 || !g.sockets.is_empty()) => {
                        problems.push(
                            &key,
                            format!(
                                "{address} is a socket on this host: say how others reach it, as \"{address}=host:port\""
                            ),
                        );
                    }
                    Ok(m) if !known.insert(m.known.clone()) => {
                        problems.push(&key, format!("names {} twice", m.known));
                    }
                    Ok(_) => {}
                    Err(e) => problems.push(&key, format!("{e:#}")),
                }
            }
        }
        if let Some(tls) = &self.tls
            && tls.cert.is_some() != tls.key.is_some()
        {
            problems.push("sharded.tls", "names only one of cert and key");
        }
        problems.check_range("sharded.copies", self.copies as u64, 1, 7);
        let (n, w) = (self.copies, self.acknowledged);
        if w == 0 || w > n {
            problems.push(
                "sharded.acknowledged",
                format!("is {w}, but there are {n} copies: it must be from 1 to {n}"),
            );
        } else if 2 * w <= n && !self.accept_loss {
            problems.push(
                "sharded.acknowledged",
                format!(
                    "is {w} of {n} copies, which is no majority: a fail-over could promote a copy that lacks an acknowledged write. Allowed are 1 of 1, 2 of 2, 2 or 3 of 3, 3 or 4 of 4, 3 to 5 of 5 and so on; set sharded.accept_loss when losing writes is acceptable"
                ),
            );
        }
        problems.check_range("sharded.wait_ms", self.wait_ms, 10, 600_000);
        problems.check_range("sharded.hold_ms", self.hold_ms, 0, 600_000);
        problems.check_range("sharded.poll_ms", self.poll_ms, 20, 60_000);
        problems.check_range("sharded.max_lag_s", self.max_lag_s, 2, 3600);
        problems.check_range("sharded.connections", self.connections as u64, 1, 256);
        problems.check_range("sharded.max_private", self.max_private as u64, 1, 100_000);
        problems.check_range("sharded.max_inflight", self.max_inflight as u64, 1, 1 << 20);
        problems.check_range("sharded.connect_timeout_ms", self.connect_timeout_ms, 10, 600_000);
        problems.check_range(
            "sharded.reply_timeout_ms",
            self.reply_timeout_ms,
            self.wait_ms.saturating_add(1),
            3_600_000,
        );
        problems.check_range("sharded.reconnect_max_ms", self.reconnect_max_ms, 20, 600_000);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(n: usize, w: usize, accept_loss: bool) -> bool {
        let c = Sharded {
            groups: vec![Group {
                name: "a".into(),
                sentinels: vec!["h:26379".into()],
                ..Group::default()
            }],
            copies: n,
            acknowledged: w,
            accept_loss,
            ..Sharded::default()
        };
        let mut p = Problems::default();
        c.validate(&mut p);
        !p.is_empty()
    }

    #[test]
    fn only_majorities_are_allowed_unless_loss_is_accepted() {
        for (n, w) in [(1, 1), (2, 2), (3, 2), (3, 3), (4, 3), (5, 3)] {
            assert!(!problems(n, w, false), "{w} of {n}");
        }
        for (n, w) in [(2, 1), (3, 1), (4, 2), (3, 4), (3, 0)] {
            assert!(problems(n, w, false), "{w} of {n}");
        }
        assert!(!problems(3, 1, true));
        assert!(problems(3, 0, true));
        let unsafe_one = Sharded {
            acknowledged: 1,
            ..Sharded::default()
        };
        assert!(unsafe_one.durability().contains("NOT SAFE"));
        assert!(!Sharded::default().durability().contains("NOT SAFE"));
    }
}
