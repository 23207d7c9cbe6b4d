//! The rules of the house, and what goes into a pass and comes out of it.

use std::collections::BTreeMap;

use super::Why;
use crate::config::Config;

/// The rules of the house, all in milliseconds.
#[derive(Debug, Clone)]
pub struct Rules {
    /// A sign of life that is older makes its host overdue.
    pub overdue_ms: u64,
    /// An agent is quiet when it has missed a heartbeat and a half.
    pub quiet_ms: u64,
    /// See the configuration.
    pub stop_grace_ms: u64,
    /// See the configuration.
    pub repeat_ms: u64,
    /// See the configuration.
    pub give_up_ms: u64,
    /// See the configuration.
    pub hold_ms: u64,
    /// See the configuration.
    pub stall_ms: u64,
    /// See the configuration.
    pub mass_hosts: u64,
    /// See the configuration.
    pub mass_percent: u64,
    /// See the configuration.
    pub mass_window_ms: u64,
}

impl Rules {
    /// As configured.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let hold = &config.hold;
        Self {
            overdue_ms: config.overdue_ms(),
            quiet_ms: (config.heartbeat_interval_ms * 3 / 2 + 1_000).min(config.overdue_ms()),
            stop_grace_ms: config.stop_grace_s * 1_000,
            repeat_ms: config.repeat_ms,
            give_up_ms: config.give_up_s * 1_000,
            hold_ms: hold.most_ms,
            stall_ms: hold.stall_ms,
            mass_hosts: hold.mass_hosts,
            mass_percent: hold.mass_percent,
            mass_window_ms: hold.mass_window_ms,
        }
    }

    /// After a fault every agent had time to be heard when so long has passed.
    #[must_use]
    pub fn settle_ms(&self) -> u64 {
        self.overdue_ms.min(self.hold_ms)
    }
}

/// Stamps that are asked for, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First.
    pub from: u64,
    /// Last.
    pub to: u64,
}

/// What is to be counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    /// Hosts that may be overdue.
    pub overdue: Span,
    /// Hosts that went silent lately.
    pub recent: Span,
    /// Minutes in which much of the fleet went silent: how many of it are still silent.
    pub masses: Vec<Span>,
}

/// Something to be said in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// Hosts are held back.
    Holding {
        /// How many so far.
        hosts: usize,
        /// Why.
        why: Why,
    },
    /// None are held back any more.
    Released {
        /// How many were, for how long, and why at first.
        hosts: usize,
        /// See above.
        for_ms: u64,
        /// See above.
        why: Why,
        /// How many of them came back; about the others there are alarms.
        returned: usize,
    },
}

/// Figures of one pass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sum {
    /// Hosts about which there are alarms.
    pub lost: usize,
    /// Hosts that are held back.
    pub held: BTreeMap<Why, usize>,
    /// Hosts that are held back since this pass.
    pub newly_held: BTreeMap<Why, usize>,
    /// Hosts that came back after an alarm, and those that were given up.
    pub returned: usize,
    /// See above.
    pub given_up: usize,
}
