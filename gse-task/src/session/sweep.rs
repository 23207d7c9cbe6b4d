//! Finds agents that have fallen silent: one pass over the stamps each second, no timer per agent.
//!
//! After this process itself was stalled (paused, swapped, starved) nobody is expired until everybody has had a whole interval to be
//! heard again: the silence may have been ours.

use std::sync::Arc;
use std::time::Duration;

use super::outbox::CloseReason;
use crate::Node;

/// A tick later than this means that we were stalled.
const STALL_S: u32 = 3;

/// When the sweep may next expire agents.
#[derive(Debug, Clone, Copy, Default)]
struct Grace {
    last_tick: u32,
    expire_from: u32,
}

impl Grace {
    /// Notes a tick at `now`; true when agents may be expired in it. All in seconds.
    fn tick(&mut self, now: u32, interval: u32) -> bool {
        if now.saturating_sub(self.last_tick) > STALL_S {
            self.expire_from = now + interval;
        }
        self.last_tick = now;
        now >= self.expire_from
    }
}

/// Runs until the node drains.
pub async fn sweep(node: Arc<Node>) {
    let interval = u32::try_from(node.config.session.heartbeat_interval_ms.div_ceil(1000)).unwrap_or(u32::MAX);
    let silent_after = interval.saturating_mul(node.config.session.missed_heartbeats);
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut grace = Grace {
        last_tick: node.ticks.now(),
        expire_from: 0,
    };
    loop {
        tokio::select! {
            () = node.life.draining() => break,
            _ = tick.tick() => {}
        }
        let now = node.ticks.now();
        let may_expire = grace.tick(now, interval);
        if !may_expire && grace.expire_from == now + interval {
            tracing::warn!("this process was stalled; no agent is expired for {interval} s");
        }
        node.metrics
            .sessions
            .set(i64::try_from(node.registry.len()).unwrap_or(i64::MAX));
        if may_expire {
            node.registry.each(|session| {
                if now.saturating_sub(session.last_seen()) > silent_after {
                    session.outbox.close(CloseReason::Silent);
                }
            });
        }
    }
    // Whoever gets the tasks should have them before their agents arrive there.
    node.handed_over.cancelled().await;
    // Agents are told to go elsewhere; the connections end by themselves.
    let bye = gse_proto::session::Goodbye {
        reason: "the server is stopping".into(),
        stopping: true,
        ..Default::default()
    };
    let bye = bye.into();
    node.registry.each(|session| {
        if session.outbox.control(&bye).is_ok() {
            session.outbox.close(CloseReason::Draining);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_mass_expiry_after_a_stall() {
        let mut grace = Grace {
            last_tick: 100,
            expire_from: 0,
        };
        assert!(grace.tick(101, 30));
        assert!(!grace.tick(161, 30), "we were away for a minute");
        assert!(!grace.tick(162, 30));
        assert!(grace.tick(164, 1) || grace.expire_from == 191);
        for now in 165..191 {
            assert!(!grace.tick(now, 30), "{now}");
        }
        assert!(grace.tick(191, 30));
    }
}
