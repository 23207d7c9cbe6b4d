//! Runners whose script is over and left a daemon that holds its output: they stay to read that pipe. How many may is bounded here.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::job::Running;
use super::stuck;

/// A runner that is just leaving is not one that stays.
const SETTLED: Duration = Duration::from_secs(2);

/// Runners whose script is over, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Lingering(Mutex<VecDeque<(Running, Instant)>>);

impl Lingering {
    /// The script of this runner is over.
    pub(super) fn add(&self, running: Running) {
        self.0.lock().push_back((running, Instant::now()));
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    /// Forgets those that have left; tells the oldest beyond `most` to leave. Blocking.
    pub(super) fn trim(&self, most: usize) {
        let all = std::mem::take(&mut *self.0.lock());
        let mut left: VecDeque<_> = all
            .into_iter()
            .filter(|(running, _)| stuck::keep_going(running))
            .collect();
        let stay = left.iter().filter(|(_, since)| since.elapsed() >= SETTLED).count();
        let surplus = stay.saturating_sub(most);
        let told = left
            .drain(..surplus)
            .filter(|(running, _)| stuck::ask_to_end(running))
            .count();
        if told > 0 {
            tracing::warn!(
                told,
                most,
                "more runners stayed for daemons of finished scripts than exec.max_lingering; the oldest were told to leave"
            );
        }
        // Those that came meanwhile are younger.
        let mut list = self.0.lock();
        left.append(&mut list);
        *list = left;
    }
}
