//! The servers of one service: which one a call should try, how much each has under way, and who is left alone for a while because
//! the last try failed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::metrics::NodeFigures;

/// A server that failed is asked last for this long; it doubles with every further failure.
const FIRST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(10);

/// Which server it is. One that was started again is another one, about whom nothing bad is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServerId {
    /// Name of the node, or its address where that is all that is known.
    pub(super) node: String,
    /// Which life of the node; 0 where nobody says.
    pub(super) life: u64,
    /// `host:port`.
    pub(super) address: String,
}

/// One server.
#[derive(Debug)]
pub(super) struct Server {
    id: ServerId,
    figures: NodeFigures,
    state: Mutex<State>,
    /// Calls under way.
    inflight: AtomicUsize,
    /// The pool's clock at the last call; 0 before the first.
    used: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    rests_until: Option<Instant>,
    /// Cancelled when it turns out that the server is not there, or is to get no more calls.
    gone: CancellationToken,
}

/// A call under way at a server.
#[derive(Debug)]
pub(super) struct InFlight(Arc<Server>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.inflight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Server {
    /// `host:port`.
    pub(super) fn address(&self) -> &str {
        &self.id.address
    }

    /// Name for people.
    pub(super) fn node(&self) -> &str {
        &self.id.node
    }

    pub(super) fn answered(&self) {
        let mut state = self.state.lock();
        if state.rests_until.is_some() {
            tracing::info!(node = self.node(), server = self.address(), "answers again");
            self.figures.set_up(true);
        }
        *state = State::default();
    }

    /// It cannot be reached, or has lost a call.
    pub(super) fn failed(&self) {
        self.figures.failed();
        self.figures.set_up(false);
        let mut state = self.state.lock();
        let rest = FIRST_REST.saturating_mul(1 << state.failures.min(4)).min(LONGEST_REST);
        state.failures = state.failures.saturating_add(1);
        state.rests_until = Some(Instant::now() + rest);
        state.gone.cancel();
    }

    /// It says that it is stopping.
    pub(super) fn leaves(&self) {
        self.figures.set_up(false);
        let mut state = self.state.lock();
        state.rests_until = Some(Instant::now() + FIRST_REST);
        state.gone.cancel();
    }

    /// Resolves when it turns out, from now on, that the server is not there.
    pub(super) async fn gone(&self) {
        let gone = self.state.lock().gone.clone();
        if gone.is_cancelled() {
            // That is old; this call tries all the same.
            std::future::pending::<()>().await;
        }
        gone.cancelled().await;
    }

    fn rests_until(&self, now: Instant) -> Option<Instant> {
        self.state.lock().rests_until.filter(|until| now < *until)
    }
}

/// All servers of a service.
#[derive(Debug, Default)]
pub(super) struct Pool {
    servers: ArcSwap<Vec<Arc<Server>>>,
    clock: AtomicU64,
}

impl Pool {
    /// From now on these and no others, in this order. What is known of those that stay is kept. `figures` are asked for for new ones.
    pub(super) fn set(&self, ids: Vec<ServerId>, figures: impl Fn(&ServerId) -> NodeFigures) {
        let before = self.servers.load();
        let servers: Vec<Arc<Server>> = ids
            .into_iter()
            .map(|id| match before.iter().find(|server| server.id == id) {
                Some(known) => Arc::clone(known),
                None => {
                    let figures = figures(&id);
                    figures.set_up(true);
                    Arc::new(Server {
                        id,
                        figures,
                        state: Mutex::default(),
                        inflight: AtomicUsize::new(0),
                        used: AtomicU64::new(0),
                    })
                }
            })
            .collect();
        for server in before
            .iter()
            .filter(|server| !servers.iter().any(|kept| Arc::ptr_eq(kept, server)))
        {
            server.state.lock().gone.cancel();
        }
        self.servers.store(Arc::new(servers));
    }

    pub(super) fn ids(&self) -> Vec<ServerId> {
        self.servers.load().iter().map(|server| server.id.clone()).collect()
    }

    /// The servers in the order in which a call should try them: of two that are picked by chance the one with less under way, then
    /// the others, at last those that failed lately. These are tried all the same when there is no other, so that nobody waits for a
    /// rest to end.
    pub(super) fn order(&self) -> Vec<Arc<Server>> {
        let now = Instant::now();
        let servers = self.servers.load();
        let (mut resting, mut fit) = (Vec::new(), Vec::new());
        for server in servers.iter() {
            match server.rests_until(now) {
                Some(until) => resting.push((until, Arc::clone(server))),
                None => fit.push(Arc::clone(server)),
            }
        }
        // Of two with equally much the one that was used longer ago.
        let weight = |server: &Arc<Server>| {
            (
                server.inflight.load(Ordering::Relaxed),
                server.used.load(Ordering::Relaxed),
            )
        };
        if fit.len() > 2 {
            let first = rand::random_range(0..fit.len());
            fit.swap(0, first);
            let second = rand::random_range(1..fit.len());
            fit.swap(1, second);
        }
        if fit.len() > 1 && weight(&fit[1]) < weight(&fit[0]) {
            fit.swap(0, 1);
        }
        if fit.len() > 2 {
            fit[1..].sort_by_key(weight);
        }
        resting.sort_by_key(|(until, _)| *until);
        fit.extend(resting.into_iter().map(|(_, server)| server));
        fit
    }

    /// Counts a call that `server` is about to get.
    pub(super) fn begin(&self, server: &Arc<Server>) -> InFlight {
        server.figures.called();
        server.inflight.fetch_add(1, Ordering::Relaxed);
        let now = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
        server.used.store(now, Ordering::Relaxed);
        InFlight(Arc::clone(server))
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::NodeMetrics;
    use super::*;

    fn id(node: &str, life: u64) -> ServerId {
        ServerId {
            node: node.to_owned(),
            life,
            address: format!("{node}:1"),
        }
    }

    fn pool(nodes: &[&str]) -> Pool {
        let pool = Pool::default();
        set(&pool, nodes.iter().map(|node| id(node, 1)).collect());
        pool
    }

    fn set(pool: &Pool, ids: Vec<ServerId>) {
        let metrics = NodeMetrics::default();
        pool.set(ids, |id| metrics.of("task", &id.node));
    }

    fn nodes(pool: &Pool) -> Vec<String> {
        pool.order().iter().map(|server| server.node().to_owned()).collect()
    }

    fn named(pool: &Pool, node: &str) -> Arc<Server> {
        pool.order().into_iter().find(|server| server.node() == node).unwrap()
    }

    #[test]
    fn less_under_way_comes_first_and_equals_take_turns() {
        let pool = pool(&["a", "b"]);
        assert_eq!(nodes(&pool), ["a", "b"]);
        let held = pool.begin(&named(&pool, "a"));
        assert_eq!(nodes(&pool), ["b", "a"]);
        let (one, two) = (pool.begin(&named(&pool, "b")), pool.begin(&named(&pool, "b")));
        assert_eq!(nodes(&pool), ["a", "b"]);
        drop((held, one, two));
        // b was used last.
        assert_eq!(nodes(&pool), ["a", "b"]);
        drop(pool.begin(&named(&pool, "a")));
        assert_eq!(nodes(&pool), ["b", "a"]);
    }

    #[test]
    fn the_busiest_of_many_is_never_first() {
        let pool = pool(&["a", "b", "c", "d"]);
        let _busy: Vec<InFlight> = (0..5).map(|_| pool.begin(&named(&pool, "c"))).collect();
        let mut first = std::collections::BTreeSet::new();
        for _ in 0..200 {
            let order = nodes(&pool);
            assert_eq!(order.len(), 4);
            first.insert(order[0].clone());
        }
        assert_eq!(first.into_iter().collect::<Vec<_>>(), ["a", "b", "d"]);
    }

    #[test]
    fn those_that_failed_come_last_and_a_new_life_begins_anew() {
        let pool = pool(&["a", "b", "c"]);
        named(&pool, "a").failed();
        named(&pool, "b").failed();
        named(&pool, "b").failed();
        assert_eq!(nodes(&pool), ["c", "a", "b"]);
        named(&pool, "a").answered();
        named(&pool, "c").leaves();
        assert_eq!(nodes(&pool), ["a", "c", "b"]);
        let kept = named(&pool, "c");
        set(&pool, vec![id("b", 2), id("c", 1)]);
        assert_eq!(nodes(&pool), ["b", "c"]);
        assert!(Arc::ptr_eq(&kept, &named(&pool, "c")));
    }

    #[tokio::test]
    async fn calls_under_way_hear_of_an_end_and_later_ones_do_not_hear_of_it_again() {
        let pool = pool(&["a", "b"]);
        let (a, b) = (named(&pool, "a"), named(&pool, "b"));
        let both = async { tokio::join!(a.gone(), b.gone()) };
        let told = async {
            tokio::task::yield_now().await;
            a.leaves();
            set(&pool, vec![id("a", 1)]);
        };
        tokio::time::timeout(Duration::from_secs(5), async { tokio::join!(both, told) })
            .await
            .unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(20), a.gone()).await.is_err());
        a.answered();
        let again = async { tokio::join!(a.gone(), async { a.failed() }) };
        tokio::time::timeout(Duration::from_secs(5), again).await.unwrap();
    }

    #[test]
    fn a_rest_grows_but_not_for_ever() {
        let pool = pool(&["a"]);
        for _ in 0..100 {
            named(&pool, "a").failed();
        }
        let until = named(&pool, "a").state.lock().rests_until.unwrap();
        assert!(until <= Instant::now() + LONGEST_REST);
        assert_eq!(nodes(&pool), ["a"]);
    }
}
