//! Keeps the number of sessions even among nodes, gently: a node with clearly more agents than the average asks a few of them a
//! second, and only those without work under way, to go to a node that has fewer. Agents are also told when there are other nodes than
//! those of their welcome, so that they know where to go when this one is gone.

use std::sync::{Arc, Weak};
use std::time::Duration;

use gse_proto::session::{Move, Servers};

use crate::Node;
use crate::session::registry::Session;

/// How often the load is looked at.
const EVERY: Duration = Duration::from_secs(1);
/// What other nodes say of themselves is at most so many seconds old. Nothing is decided anew before all that was moved is counted.
const SEEN_AFTER: u32 = 6;

/// A change among the nodes is told when it has lasted so long: a restart is none.
const SETTLED: u32 = 10;
/// All agents are told of a change within so many seconds.
const TOLD_WITHIN: usize = 30;

/// Tells agents which nodes there are.
#[derive(Default)]
struct News {
    /// What new agents are told in their welcome, and for how many looks it has been the same.
    current: Vec<String>,
    same_for: u32,
    told: Option<Vec<String>>,
    waiting: Vec<Weak<Session>>,
    a_second: usize,
}

impl News {
    fn look(&mut self, node: &Node) {
        let mut now = node.advertised();
        now.sort_unstable();
        if now == self.current {
            self.same_for = self.same_for.saturating_add(1);
        } else {
            self.current = now;
            self.same_for = 0;
        }
        if self.told.is_none() {
            // Nobody has been told anything else yet.
            self.told = Some(self.current.clone());
        }
        if self.same_for == SETTLED && self.told.as_ref() != Some(&self.current) {
            self.told = Some(self.current.clone());
            self.waiting.clear();
            node.registry.each(|session| self.waiting.push(Arc::downgrade(session)));
            self.a_second = self.waiting.len().div_ceil(TOLD_WITHIN);
            tracing::info!(servers = ?self.current, agents = self.waiting.len(), "the nodes have changed; agents are told");
        }
        let from = self.waiting.len().saturating_sub(self.a_second);
        let news = Servers {
            servers: self.current.clone(),
        };
        for session in self.waiting.drain(from..).filter_map(|session| session.upgrade()) {
            if session.outbox.control(&news.clone().into()).is_err() {
                tracing::debug!(agent = %session.agent, "session ended before it was told of other nodes");
            }
        }
    }
}

/// How many agents of a node with `own` sessions should go, and to how many each of `others` should then come; pure.
///
/// Only what is above the average by more than `slack_percent` (and by more than 8 sessions) is too much.
fn excess(own: usize, others: &[usize], slack_percent: usize) -> usize {
    let all = own + others.iter().sum::<usize>();
    let average = all.div_ceil(others.len() + 1);
    let slack = (average * slack_percent / 100).max(8);
    if own > average + slack { own - average } else { 0 }
}

/// Runs until the node drains.
pub async fn run(node: Arc<Node>) {
    let per_second = node.config.peers.moves_per_s;
    let mut news = News::default();
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut credit = 0_usize;
    let mut quiet_for = 0;
    loop {
        tokio::select! {
            () = node.life.draining() => return,
            _ = tick.tick() => {}
        }
        news.look(&node);
        let peers = node.peers.open();
        if peers.is_empty() {
            credit = 0;
            continue;
        }
        quiet_for = if credit > 0 { 0 } else { quiet_for + 1 };
        if quiet_for >= SEEN_AFTER {
            let others: Vec<usize> = peers.iter().map(|peer| peer.info().sessions as usize).collect();
            credit = excess(node.registry.len(), &others, node.config.peers.slack_percent);
        }
        let count = credit.min(per_second);
        credit -= count;
        if count > 0 {
            ask_to_move(&node, &peers[0], count);
        }
    }
}

/// Asks some agents without work to go to the node with the fewest.
fn ask_to_move(node: &Arc<Node>, to: &super::Peer, count: usize) {
    let servers = to.info().agents.clone();
    if servers.is_empty() {
        return;
    }
    let mut idle = Vec::new();
    node.registry.each(|session| idle.push(Arc::clone(session)));
    node.random.shuffle(&mut idle);
    let idle = idle
        .into_iter()
        .filter(|session| !node.tasks.concerns(&session.agent))
        .take(count);
    let wish = Move {
        servers,
        reason: "another node has fewer agents".into(),
    };
    let mut asked = 0;
    for session in idle {
        if session.outbox.control(&wish.clone().into()).is_ok() {
            asked += 1;
        }
    }
    node.metrics.moves_asked.inc_by(asked);
    tracing::info!(agents = asked, to = to.node_id, "agents were asked to move");
}

#[cfg(test)]
mod tests {
    use super::excess;

    #[test]
    fn only_a_clear_excess_is_moved() {
        assert_eq!(excess(1000, &[1000], 10), 0);
        assert_eq!(excess(1080, &[1000], 10), 0, "within the slack");
        assert_eq!(excess(2000, &[0], 10), 1000);
        assert_eq!(excess(0, &[2000], 10), 0);
        assert_eq!(excess(3000, &[0, 0], 10), 2000);
        assert_eq!(excess(5, &[0], 10), 0, "a handful is not worth it");
    }
}
