//! Which agents have opened sessions on other nodes a moment ago.
//!
//! A task looks in the store where an agent is before it is known by the agent's id. A notice that comes in between finds nothing to
//! decide about, and the task goes on with where the agent was. So the notices of the last seconds are kept for it.

use std::time::Duration;

use gse_core::random::HashMap;
use gse_proto::ids::AgentId;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::remote::There;

/// Longer than a look into the store takes.
const KEPT: Duration = Duration::from_secs(10);
/// At most so many; without one that does not fit the comparison of the task with the store comes later, but comes.
const MOST: usize = 50_000;

/// The notices of the last seconds.
#[derive(Debug, Default)]
pub(super) struct Lately(Mutex<HashMap<AgentId, (Instant, There)>>);

impl Lately {
    /// An agent has opened a session.
    pub(super) fn note(&self, there: &There) {
        let mut kept = self.0.lock();
        if kept.len() < MOST || kept.contains_key(&there.agent) {
            kept.insert(there.agent.clone(), (Instant::now(), there.clone()));
        }
    }

    /// Its session, if it was opened lately.
    pub(super) fn get(&self, agent: &AgentId) -> Option<There> {
        self.0.lock().get(agent).map(|(_, there)| there.clone())
    }

    /// Forgets what is no longer of use.
    pub(super) fn tidy(&self) {
        let mut kept = self.0.lock();
        kept.retain(|_, (at, _)| at.elapsed() < KEPT);
        if kept.is_empty() {
            kept.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there(agent: &str, session: u64) -> There {
        There {
            agent: AgentId::parse(agent).unwrap(),
            node: "b".into(),
            session,
            epoch: bytes::Bytes::new(),
            since_ms: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_session_is_known_for_a_while() {
        let lately = Lately::default();
        let agent = AgentId::parse("0:10.0.0.1").unwrap();
        lately.note(&there("0:10.0.0.1", 1));
        lately.note(&there("0:10.0.0.1", 2));
        assert_eq!(lately.get(&agent).map(|there| there.session), Some(2));
        tokio::time::advance(KEPT / 2).await;
        lately.tidy();
        assert!(lately.get(&agent).is_some());
        tokio::time::advance(KEPT).await;
        lately.tidy();
        assert!(lately.get(&agent).is_none());
    }
}
