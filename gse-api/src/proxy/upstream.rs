//! The servers of one service: whose turn it is, and who is left alone for a while because the last try failed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A server that failed is asked last for this long; it doubles with every further failure.
const FIRST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(16);

/// One server.
#[derive(Debug)]
pub(super) struct Server {
    address: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    rests_until: Option<Instant>,
}

impl Server {
    /// `host:port`.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn answered(&self) {
        let mut state = self.state.lock();
        if state.failures > 0 {
            tracing::info!(server = self.address, "answers again");
        }
        *state = State::default();
    }

    pub(super) fn failed(&self) {
        let mut state = self.state.lock();
        let rest = FIRST_REST.saturating_mul(1 << state.failures.min(4)).min(LONGEST_REST);
        state.failures = state.failures.saturating_add(1);
        state.rests_until = Some(Instant::now() + rest);
    }

    fn rests(&self, now: Instant) -> bool {
        self.state.lock().rests_until.is_some_and(|until| now < until)
    }
}

/// All servers of a service.
#[derive(Debug)]
pub(super) struct Pool {
    servers: Vec<Server>,
    turn: AtomicUsize,
}

impl Pool {
    pub(super) fn new(addresses: &[String]) -> Self {
        let servers = addresses
            .iter()
            .map(|address| Server {
                address: address.clone(),
                state: Mutex::default(),
            })
            .collect();
        Self {
            servers,
            turn: AtomicUsize::new(0),
        }
    }

    /// All of them, in the order in which this call should try: round robin, those that failed lately last. They are tried all the
    /// same when there is no other, so that nobody waits for a rest to end.
    pub(super) fn in_turn(&self) -> Vec<&Server> {
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let len = self.servers.len();
        let rotated = (0..len).map(|n| &self.servers[first.wrapping_add(n) % len]);
        let (resting, fit): (Vec<&Server>, Vec<&Server>) = rotated.partition(|server| server.rests(now));
        fit.into_iter().chain(resting).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(pool: &Pool) -> Vec<&str> {
        pool.in_turn().into_iter().map(Server::address).collect()
    }

    #[test]
    fn in_turn_and_the_failed_ones_last() {
        let pool = Pool::new(&["a".into(), "b".into(), "c".into()]);
        assert_eq!(order(&pool), ["a", "b", "c"]);
        assert_eq!(order(&pool), ["b", "c", "a"]);
        pool.servers[2].failed();
        assert_eq!(order(&pool), ["a", "b", "c"]);
        assert_eq!(order(&pool), ["a", "b", "c"]);
        pool.servers[2].answered();
        pool.servers[1].failed();
        assert_eq!(order(&pool), ["c", "a", "b"]);
    }

    #[test]
    fn a_rest_grows_but_not_for_ever() {
        let pool = Pool::new(&["a".into()]);
        for _ in 0..100 {
            pool.servers[0].failed();
        }
        let until = pool.servers[0].state.lock().rests_until.unwrap();
        assert!(until <= Instant::now() + LONGEST_REST);
        assert_eq!(order(&pool), ["a"]);
    }
}
