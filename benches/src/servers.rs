//! Which servers a swarm knows, and in which order one of its agents tries them: the real agent's rules in simple form.
//!
//! The list is one for the whole swarm (fifteen thousand agents are told the same); the place in it, and which servers have asked for
//! patience, is each agent's own.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::time::Instant;

/// Servers that can be learned of; more are ignored.
const MAX_LEARNED: usize = 64;

/// The servers of a command line, and those that a server has told of last.
#[derive(Debug)]
pub(crate) struct Known {
    configured: Vec<SocketAddr>,
    told: RwLock<(Vec<String>, Arc<[SocketAddr]>)>,
}

impl Known {
    pub(crate) fn new(configured: Vec<SocketAddr>) -> Self {
        let all = Arc::from(configured.as_slice());
        Self {
            configured,
            told: RwLock::new((vec![], all)),
        }
    }

    /// All of them.
    pub(crate) fn all(&self) -> Arc<[SocketAddr]> {
        Arc::clone(&self.told.read().unwrap_or_else(PoisonError::into_inner).1)
    }

    /// Takes a server's word for which servers there are. A name that is no address is left out.
    pub(crate) fn learn(&self, servers: &[String]) {
        let same = self.told.read().unwrap_or_else(PoisonError::into_inner).0 == servers;
        if same || servers.is_empty() {
            return;
        }
        let mut all = self.configured.clone();
        for server in addresses(servers).into_iter().take(MAX_LEARNED) {
            if !all.contains(&server) {
                all.push(server);
            }
        }
        *self.told.write().unwrap_or_else(PoisonError::into_inner) = (servers.to_vec(), all.into());
    }
}

/// Those of some texts that are addresses.
pub(crate) fn addresses(servers: &[String]) -> Vec<SocketAddr> {
    servers.iter().filter_map(|server| server.parse().ok()).collect()
}

/// One agent's place among the servers.
#[derive(Debug)]
pub(crate) struct Place {
    next: usize,
    /// Who has asked to be left alone, and until when.
    patient: Vec<(SocketAddr, Instant)>,
}

/// What to do next.
#[derive(Debug, PartialEq)]
pub(crate) enum Round {
    /// Try these, one after the other.
    Try(Vec<SocketAddr>),
    /// All have asked for patience until then.
    Wait(Instant),
}

impl Place {
    /// Agents are spread over the servers by their number.
    pub(crate) fn new(index: u32) -> Self {
        Self {
            next: index as usize,
            patient: vec![],
        }
    }

    /// The next round: every server that may be asked, beginning with the preferred one.
    pub(crate) fn round(&mut self, all: &[SocketAddr], now: Instant) -> Round {
        self.patient.retain(|(_, until)| *until > now);
        let in_turn = (0..all.len()).map(|n| all[(self.next + n) % all.len()]);
        let due: Vec<SocketAddr> = in_turn
            .filter(|server| !self.patient.iter().any(|(other, _)| other == server))
            .collect();
        match self.patient.iter().map(|(_, until)| *until).min() {
            Some(first) if due.is_empty() => Round::Wait(first),
            _ => Round::Try(due),
        }
    }

    /// A session with it has begun: the next round starts there.
    pub(crate) fn connected(&mut self, all: &[SocketAddr], server: SocketAddr) {
        if let Some(at) = all.iter().position(|other| *other == server) {
            self.next = at;
        }
    }

    /// The next round starts behind it.
    pub(crate) fn prefer_others(&mut self, all: &[SocketAddr], server: SocketAddr) {
        if let Some(at) = all.iter().position(|other| *other == server) {
            self.next = at + 1;
        }
    }

    /// It has asked to be left alone.
    pub(crate) fn leave_alone(&mut self, server: SocketAddr, time: Duration, now: Instant) {
        self.patient.retain(|(other, _)| *other != server);
        self.patient.push((server, now + time));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[test]
    fn told_ones_come_to_the_configured_ones_and_go_again() {
        let known = Known::new(vec![server(1)]);
        known.learn(&["127.0.0.1:2".into(), "a.name:3".into(), "127.0.0.1:1".into()]);
        assert_eq!(known.all()[..], [server(1), server(2)]);
        known.learn(&[]);
        assert_eq!(known.all()[..], [server(1), server(2)]);
        known.learn(&["127.0.0.1:4".into()]);
        assert_eq!(known.all()[..], [server(1), server(4)]);
        let many: Vec<String> = (1000..2000).map(|port| format!("127.0.0.1:{port}")).collect();
        known.learn(&many);
        assert_eq!(known.all().len(), 1 + MAX_LEARNED);
    }

    #[test]
    fn rounds_start_at_the_preferred_one_and_leave_out_the_patient() {
        let all = [server(1), server(2), server(3)];
        let now = Instant::now();
        let mut place = Place::new(4);
        assert_eq!(
            place.round(&all, now),
            Round::Try(vec![server(2), server(3), server(1)])
        );
        place.connected(&all, server(1));
        place.leave_alone(server(2), Duration::from_secs(5), now);
        assert_eq!(place.round(&all, now), Round::Try(vec![server(1), server(3)]));
        place.prefer_others(&all, server(3));
        place.leave_alone(server(1), Duration::from_secs(9), now);
        place.leave_alone(server(3), Duration::from_secs(7), now);
        assert_eq!(place.round(&all, now), Round::Wait(now + Duration::from_secs(5)));
        let later = now + Duration::from_secs(6);
        assert_eq!(place.round(&all, later), Round::Try(vec![server(2)]));
        assert_eq!(
            place.round(&all, now + Duration::from_secs(10)),
            Round::Try(vec![server(1), server(2), server(3)])
        );
    }
}
