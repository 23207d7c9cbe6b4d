//! The clocks of the nodes of gse_task. No I/O.
//!
//! Signs of life are stamped by the node that hears them, and each node stamps the renewal of its lease by the same clock. How long a host
//! has been silent is the difference of the two: stamps of one clock are compared with nothing but stamps of that clock, and neither this
//! server's wall clock nor a step of anybody's matters. Between two renewals this server's monotonic clock goes on. A node whose stamp stands
//! still is stalled, or gone, or can't write; what it has not heard says nothing then.

use std::collections::BTreeMap;

/// What is known of one node.
#[derive(Debug, Clone)]
struct Clock {
    /// Its last stamp (unix ms, by its own clock) and when it was new here (monotonic ms).
    stamp: u64,
    at: u64,
    /// Since when (monotonic ms) its stamps have come in time; `None`: from before anybody here looked.
    since: Option<u64>,
}

/// All nodes that there are, or were while this instance looked.
#[derive(Debug)]
pub struct Nodes {
    stall_ms: u64,
    settle_ms: u64,
    clocks: BTreeMap<String, Clock>,
}

/// Nodes that are remembered.
const MOST: usize = 10_000;

impl Nodes {
    /// None yet. A node is away when its stamp is older than `stall_ms`, and is believed again when it was back for `settle_ms`.
    #[must_use]
    pub fn new(stall_ms: u64, settle_ms: u64) -> Self {
        Self {
            stall_ms,
            settle_ms,
            clocks: BTreeMap::new(),
        }
    }

    /// Takes in the stamps as they are in the store. `trusted`: nodes that were believed by the instance before this one.
    pub fn look(&mut self, now: u64, stamps: &[(String, u64)], trusted: &[String]) {
        for (name, stamp) in stamps {
            match self.clocks.get_mut(name) {
                None => {
                    let since = (!trusted.contains(name)).then_some(now);
                    let (stamp, at) = (*stamp, now);
                    self.clocks.insert(name.clone(), Clock { stamp, at, since });
                }
                Some(clock) if clock.stamp != *stamp => {
                    let passed = now.saturating_sub(clock.at);
                    let advanced = i128::from(*stamp) - i128::from(clock.stamp);
                    let jump = (advanced - i128::from(passed)).unsigned_abs();
                    if passed > self.stall_ms || jump > u128::from(self.stall_ms) {
                        clock.since = Some(now);
                    }
                    (clock.stamp, clock.at) = (*stamp, now);
                }
                Some(_) => {}
            }
        }
        if self.clocks.len() > MOST {
            let listed = |name: &String| stamps.iter().any(|(listed, _)| listed == name);
            self.clocks.retain(|name, _| listed(name));
        }
    }

    fn is_alive(&self, clock: &Clock, now: u64) -> bool {
        now.saturating_sub(clock.at) <= self.stall_ms
    }

    /// Whether what a node has not heard can be believed.
    #[must_use]
    pub fn is_steady(&self, name: &str, now: u64) -> bool {
        self.clocks.get(name).is_some_and(|clock| {
            let settled = clock.since.is_none_or(|since| now >= since + self.settle_ms);
            self.is_alive(clock, now) && settled
        })
    }

    /// All nodes of which that holds.
    #[must_use]
    pub fn steady(&self, now: u64) -> Vec<String> {
        let names = self.clocks.keys();
        names.filter(|name| self.is_steady(name, now)).cloned().collect()
    }

    fn shows(clock: &Clock, now: u64) -> u64 {
        clock.stamp + now.saturating_sub(clock.at)
    }

    /// The latest that the clock of a living node shows now; with none alive the latest of all, or `wall`.
    #[must_use]
    pub fn latest(&self, now: u64, wall: u64) -> u64 {
        let all = || self.clocks.values();
        let alive = all().filter(|clock| self.is_alive(clock, now));
        let latest = alive.map(|clock| Self::shows(clock, now)).max();
        latest
            .or_else(|| all().map(|clock| Self::shows(clock, now)).max())
            .unwrap_or(wall)
    }

    /// The earliest that the clock of a living node shows now; with none alive as [`Nodes::latest`].
    #[must_use]
    pub fn earliest(&self, now: u64, wall: u64) -> u64 {
        let alive = self.clocks.values().filter(|clock| self.is_alive(clock, now));
        let earliest = alive.map(|clock| Self::shows(clock, now)).min();
        earliest.unwrap_or_else(|| self.latest(now, wall))
    }

    /// What a node's clock shows now. Of one that is not there the others' have to do, if they show more.
    #[must_use]
    pub fn now_of(&self, name: &str, now: u64, wall: u64) -> u64 {
        match self.clocks.get(name) {
            Some(clock) if self.is_alive(clock, now) => Self::shows(clock, now),
            Some(clock) => Self::shows(clock, now).max(self.latest(now, wall)),
            None => self.latest(now, wall),
        }
    }

    /// How many are there, and by how much (ms) their clocks differ.
    #[must_use]
    pub fn alive(&self, now: u64) -> (usize, u64) {
        let shown = self.clocks.values().filter(|clock| self.is_alive(clock, now));
        let shown: Vec<u64> = shown.map(|clock| Self::shows(clock, now)).collect();
        let spread = match (shown.iter().min(), shown.iter().max()) {
            (Some(least), Some(most)) => most - least,
            _ => 0,
        };
        (shown.len(), spread)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamps(all: &[(&str, u64)]) -> Vec<(String, u64)> {
        all.iter().map(|(name, stamp)| ((*name).to_owned(), *stamp)).collect()
    }

    #[test]
    fn each_clock_by_itself_whatever_the_others_show() {
        let mut nodes = Nodes::new(10_000, 90_000);
        const HOUR: u64 = 3_600_000;
        for second in 0..=100 {
            let at = second * 1_000;
            nodes.look(at, &stamps(&[("a", 5 * HOUR + at), ("b", 9 * HOUR + at)]), &[]);
        }
        assert_eq!(nodes.now_of("a", 100_500, 1), 5 * HOUR + 100_500);
        assert_eq!(nodes.now_of("b", 100_500, 1), 9 * HOUR + 100_500);
        assert!(nodes.is_steady("a", 100_500) && !nodes.is_steady("c", 100_500));
        assert_eq!(nodes.alive(100_500), (2, 4 * HOUR));
    }

    #[test]
    fn a_node_that_stood_still_has_to_settle() {
        let mut nodes = Nodes::new(10_000, 90_000);
        nodes.look(0, &stamps(&[("a", 1_000_000)]), &["a".to_owned()]);
        assert!(nodes.is_steady("a", 10_000));
        assert!(!nodes.is_steady("a", 10_001), "its stamp stands still");
        nodes.look(30_000, &stamps(&[("a", 1_030_000)]), &[]);
        assert!(!nodes.is_steady("a", 30_000));
        for at in (31_000..120_000).step_by(1_000) {
            nodes.look(at, &stamps(&[("a", 1_000_000 + at)]), &[]);
            assert!(!nodes.is_steady("a", at));
        }
        nodes.look(120_000, &stamps(&[("a", 1_120_000)]), &[]);
        assert!(nodes.is_steady("a", 120_000));
        // Its clock was set.
        nodes.look(121_000, &stamps(&[("a", 5_000_000)]), &[]);
        assert!(!nodes.is_steady("a", 121_000));
    }
}
