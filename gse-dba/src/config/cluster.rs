//! What can be set of the back end that is a Redis Cluster or a Valkey Cluster as it is.

use std::path::PathBuf;

use gse_core::config::Problems;
use serde::{Deserialize, Serialize};

use super::sharded::{BackTls, Checks, Reads as Confirmation, Sharded};

/// A cluster that spreads its slots and replaces its primaries itself; it is found from any of its nodes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cluster {
    /// `host:port` of some of its nodes. The others are learnt from them.
    pub seeds: Vec<String>,
    /// User on every node.
    pub user: String,
    /// Password on every node.
    pub password: Option<String>,
    /// A file that holds that password.
    pub password_file: Option<PathBuf>,
    /// TLS to every node.
    pub tls: Option<BackTls>,
    /// Servers of each shard, the primary included (N).
    pub copies: usize,
    /// How many of them must have a write before it is acknowledged, the primary included (W).
    pub acknowledged: usize,
    /// Permits fewer acknowledging copies than a majority.
    pub accept_loss: bool,
    /// Which reads may be answered, and by whom.
    pub reads: Reads,
    /// With `reads = "replica"`: milliseconds that what a copy shows may be old.
    pub max_read_lag_ms: u64,
    /// What to do when a node is set up in a way that breaks the promise.
    pub checks: Checks,
    /// Accepts that several servers of a shard are on one host.
    pub one_host: bool,
    /// Permits `MSET` over several slots, which is not atomic then.
    pub split_mset: bool,
    /// Milliseconds a write waits for its copies after it was executed.
    pub wait_ms: u64,
    /// Milliseconds for which a command is held back and tried again while its slot is on its way or its shard has no primary.
    pub hold_ms: u64,
    /// Milliseconds between looks at the cluster. A redirection or a lost connection makes it look at once.
    pub poll_ms: u64,
    /// Seconds for which a copy may be silent and still count as reachable.
    pub max_lag_s: u64,
    /// Bytes of commands that one transaction may hold until `EXEC`.
    pub max_transaction_bytes: usize,
    /// Shared connections to each shard, for each of RESP2 and RESP3.
    pub connections: usize,
    /// Private connections (transactions, blocking commands, subscriptions) to each shard at once.
    pub max_private: usize,
    /// Batches of commands waiting for one shared connection.
    pub max_inflight: usize,
    pub connect_timeout_ms: u64,
    /// A reply that takes longer counts as a dead connection. Must be longer than `wait_ms`.
    pub reply_timeout_ms: u64,
    /// Longest wait between attempts to connect again.
    pub reconnect_max_ms: u64,
}

/// Which reads may be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reads {
    /// What is read is on W copies too.
    Confirmed,
    /// What the primary has, at once.
    Primary,
    /// What a copy has, as long as it is known to be no older than `max_read_lag_ms`; else what the primary has.
    Replica,
}

impl Default for Cluster {
    fn default() -> Self {
        let s = Sharded::default();
        Self {
            seeds: Vec::new(),
            user: s.user,
            password: None,
            password_file: None,
            tls: None,
            copies: 2,
            acknowledged: 2,
            accept_loss: false,
            reads: Reads::Confirmed,
            max_read_lag_ms: 2000,
            checks: Checks::Refuse,
            one_host: false,
            split_mset: false,
            wait_ms: s.wait_ms,
            // A cluster needs its node time-out (15 s unless it is set) and an election to replace a primary.
            hold_ms: 20_000,
            poll_ms: s.poll_ms,
            max_lag_s: s.max_lag_s,
            max_transaction_bytes: 64 << 20,
            connections: s.connections,
            max_private: s.max_private,
            max_inflight: s.max_inflight,
            connect_timeout_ms: s.connect_timeout_ms,
            reply_timeout_ms: s.reply_timeout_ms,
            reconnect_max_ms: s.reconnect_max_ms,
        }
    }
}

impl Cluster {
    /// What an acknowledged write survives, in words.
    #[must_use]
    pub fn durability(&self) -> String {
        let (n, w) = (self.copies, self.acknowledged);
        let lost = w.saturating_sub(1);
        match (n, w) {
            (1, _) => "cluster, 1 of 1: an acknowledged write is on one server; it survives what that server's own log survives, and there is no fail-over".into(),
            _ if w == n => format!(
                "cluster, {w} of {n}: an acknowledged write is on every copy of its shard, so whichever copy the cluster promotes has it; it survives the loss of any {lost}, and writes to a shard stop while any of its copies is unreachable"
            ),
            _ if 2 * w <= n => format!(
                "cluster, {w} of {n}: NOT SAFE: the cluster may promote a copy without an acknowledged write (cluster.accept_loss)"
            ),
            _ => format!(
                "cluster, {w} of {n}: an acknowledged write is on at least {w} copies of its shard; the cluster prefers the copy that has most when it promotes one, but does not promise it: a fail-over may lose the last writes in rare races. Only {n} of {n} excludes that"
            ),
        }
    }

    /// The same settings as a group of the sharded back end has them.
    pub(crate) fn of_a_shard(&self) -> Sharded {
        Sharded {
            user: self.user.clone(),
            password: self.password.clone(),
            password_file: self.password_file.clone(),
            tls: self.tls.clone(),
            copies: self.copies,
            acknowledged: self.acknowledged,
            accept_loss: self.accept_loss,
            reads: match self.reads {
                Reads::Confirmed => Confirmation::Confirmed,
                Reads::Primary | Reads::Replica => Confirmation::Primary,
            },
            checks: self.checks,
            one_host: self.one_host,
            split_mset: self.split_mset,
            wait_ms: self.wait_ms,
            hold_ms: self.hold_ms,
            poll_ms: self.poll_ms,
            max_lag_s: self.max_lag_s,
            connections: self.connections,
            max_private: self.max_private,
            max_inflight: self.max_inflight,
            connect_timeout_ms: self.connect_timeout_ms,
            reply_timeout_ms: self.reply_timeout_ms,
            reconnect_max_ms: self.reconnect_max_ms,
            ..Sharded::default()
        }
    }

    pub(super) fn validate(&self, problems: &mut Problems) {
        if self.seeds.is_empty() {
            problems.push(
                "cluster.seeds",
                "names no node: at least one is needed to find the cluster",
            );
        }
        for seed in &self.seeds {
            if let Err(e) = crate::sharded::control::place(seed) {
                problems.push("cluster.seeds", format!("{e:#}"));
            }
        }
        if self.password.is_some() && self.password_file.is_some() {
            problems.push("cluster.password", "and password_file are both set; keep one");
        }
        if self.tls.as_ref().is_some_and(|t| t.cert.is_some() != t.key.is_some()) {
            problems.push("cluster.tls", "names only one of cert and key");
        }
        let (n, w) = (self.copies, self.acknowledged);
        problems.check_range("cluster.copies", n as u64, 1, 7);
        if w == 0 || w > n {
            problems.push(
                "cluster.acknowledged",
                format!("is {w}, but a shard has {n} copies: it must be from 1 to {n}"),
            );
        } else if 2 * w <= n && !self.accept_loss {
            problems.push(
                "cluster.acknowledged",
                format!("is {w} of {n} copies, which is no majority: a fail-over could promote a copy that lacks an acknowledged write; set cluster.accept_loss when losing writes is acceptable"),
            );
        }
        for (name, value, from, to) in [
            ("cluster.wait_ms", self.wait_ms, 10, 600_000),
            ("cluster.hold_ms", self.hold_ms, 0, 600_000),
            ("cluster.poll_ms", self.poll_ms, 20, 60_000),
            ("cluster.max_lag_s", self.max_lag_s, 2, 3600),
            ("cluster.max_read_lag_ms", self.max_read_lag_ms, 1, 3_600_000),
            (
                "cluster.max_transaction_bytes",
                self.max_transaction_bytes as u64,
                1024,
                1 << 30,
            ),
            ("cluster.connections", self.connections as u64, 1, 256),
            ("cluster.max_private", self.max_private as u64, 1, 100_000),
            ("cluster.max_inflight", self.max_inflight as u64, 1, 1 << 20),
            ("cluster.connect_timeout_ms", self.connect_timeout_ms, 10, 600_000),
            ("cluster.reconnect_max_ms", self.reconnect_max_ms, 20, 600_000),
        ] {
            problems.check_range(name, value, from, to);
        }
        if self.reads == Reads::Replica && self.max_read_lag_ms < self.poll_ms.saturating_mul(2) {
            problems.push(
                "cluster.max_read_lag_ms",
                format!("is {}, but primaries are looked at every {} ms (cluster.poll_ms): copies could hardly ever be shown to be young enough; make it at least twice that", self.max_read_lag_ms, self.poll_ms),
            );
        }
        problems.check_range(
            "cluster.reply_timeout_ms",
            self.reply_timeout_ms,
            self.wait_ms.saturating_add(1),
            3_600_000,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_promised_depends_on_how_many_copies_acknowledge() {
        let with = |copies, acknowledged| Cluster {
            copies,
            acknowledged,
            ..Cluster::default()
        };
        assert!(
            with(2, 2)
                .durability()
                .contains("whichever copy the cluster promotes has it")
        );
        assert!(with(3, 2).durability().contains("does not promise it"));
        assert!(with(3, 1).durability().contains("NOT SAFE"));
        let refused = |c: &Cluster| {
            let mut p = Problems::default();
            c.validate(&mut p);
            !p.is_empty()
        };
        let good = Cluster {
            seeds: vec!["h:7000".into()],
            ..Cluster::default()
        };
        assert!(!refused(&good));
        assert!(refused(&Cluster::default()), "no seeds");
        for bad in [
            Cluster {
                seeds: vec!["h".into()],
                ..good.clone()
            },
            Cluster {
                copies: 3,
                acknowledged: 1,
                ..good.clone()
            },
            Cluster {
                acknowledged: 3,
                ..good.clone()
            },
            Cluster {
                reply_timeout_ms: 1,
                ..good.clone()
            },
        ] {
            assert!(refused(&bad), "{bad:?}");
        }
    }
}
