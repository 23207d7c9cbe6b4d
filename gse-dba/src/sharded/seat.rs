//! What is known of a group at this moment: who its primary is, how many copies follow it, and whether writes must be kept away. Its follower writes it,
//! connections read it.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::control::Login;
use super::link;
use super::moving::lease::Lease;
use crate::config::Sharded as Config;
use crate::metrics::Metrics;
use crate::single::dial::{Place, Target};

/// Who is primary.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) place: Option<Place>,
    /// Rises with every change.
    pub(crate) generation: u64,
    pub(crate) since: Instant,
}

pub(crate) struct Seat {
    pub(crate) name: String,
    pub(crate) config: Config,
    /// Copies besides the primary that a write needs.
    pub(crate) need: usize,
    pub(crate) max_reply: usize,
    pub(crate) login: Login,
    pub(crate) metrics: Metrics,
    head: watch::Sender<Head>,
    copies: watch::Sender<usize>,
    barred: Mutex<Option<String>>,
    problems: Mutex<Vec<String>>,
    looked: watch::Sender<bool>,
    pub(crate) nudge: Notify,
    /// A Sentinel has announced a switch: a look that is under way asks the wrong server.
    pub(crate) news: Notify,
    seals: [Vec<u8>; 2],
    /// For how long commands may be sent without having asked again who serves which slots.
    pub(crate) lease: Lease,
}

impl Config {
    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(crate) fn hold(&self) -> Duration {
        Duration::from_millis(self.hold_ms)
    }
}

impl Seat {
    pub(crate) fn new(name: &str, config: Config, login: Login, max_reply: usize, metrics: Metrics) -> Self {
        let need = config.acknowledged.saturating_sub(1);
        let limit = Duration::from_millis(config.wait_ms);
        Self {
            name: name.to_owned(),
            need,
            max_reply,
            login,
            metrics,
            head: watch::Sender::new(Head {
                place: None,
                generation: 0,
                since: Instant::now(),
            }),
            copies: watch::Sender::new(0),
            barred: Mutex::default(),
            problems: Mutex::default(),
            looked: watch::Sender::new(false),
            nudge: Notify::new(),
            news: Notify::new(),
            seals: [link::seal(None).0, link::seal(Some((need, limit))).0],
            lease: Lease::unbounded(),
            config,
        }
    }

    pub(crate) fn target(&self, place: Place) -> Target {
        Target::at(
            place,
            &self.login.user,
            self.login.password.clone(),
            self.config.connect_timeout(),
        )
    }

    /// The commands that end a batch.
    pub(crate) fn seal(&self, waits: bool) -> &[u8] {
        &self.seals[usize::from(waits)]
    }

    pub(crate) fn heads(&self) -> watch::Receiver<Head> {
        self.head.subscribe()
    }

    pub(crate) fn head(&self) -> Head {
        self.head.borrow().clone()
    }

    pub(crate) fn copies(&self) -> usize {
        *self.copies.borrow()
    }

    /// Makes the follower look at once.
    pub(crate) fn nudge(&self) {
        self.nudge.notify_one();
    }

    /// Takes in how many copies follow the primary.
    pub(crate) fn set_copies(&self, n: usize) {
        self.copies.send_if_modified(|c| std::mem::replace(c, n) != n);
    }

    /// Takes in who is primary; true when that is new.
    pub(crate) fn set_head(&self, place: Option<Place>) -> bool {
        self.head.send_if_modified(|h| {
            if h.place == place {
                return false;
            }
            *h = Head {
                place,
                generation: h.generation + 1,
                since: Instant::now(),
            };
            true
        })
    }

    pub(crate) fn set_problems(&self, problems: Vec<String>, bar: bool) {
        *self.barred.lock() = problems.first().filter(|_| bar).cloned();
        *self.problems.lock() = problems;
    }

    pub(crate) fn problems(&self) -> Vec<String> {
        self.problems.lock().clone()
    }

    /// The first look is over, whatever it showed.
    pub(crate) fn set_looked(&self) {
        self.looked.send_replace(true);
    }

    pub(crate) async fn wait_looked(&self) {
        // The sender is ours: it can't be gone.
        let _ = self.looked.subscribe().wait_for(|l| *l).await;
    }

    /// Why no write may be executed now, if so.
    pub(crate) fn short(&self) -> Option<String> {
        let copies = self.copies();
        if copies < self.need {
            return Some(format!(
                "group '{}' has {copies} of the {} other copies that a write needs",
                self.name, self.need
            ));
        }
        self.barred
            .lock()
            .as_ref()
            .map(|why| format!("group '{}' takes no writes: {why}", self.name))
    }

    /// Waits until a new primary has its copies: in a fail-over they need a moment to follow it. Bounded by `hold_ms` from the change on.
    pub(crate) async fn settle(&self, head: &Head) {
        let mut copies = self.copies.subscribe();
        let mut heads = self.heads();
        tokio::select! {
            _ = copies.wait_for(|n| *n >= self.need) => {}
            _ = heads.wait_for(|h| h.generation != head.generation) => {}
            () = tokio::time::sleep_until(head.since + self.config.hold()) => {}
        }
    }

    /// Who is primary, waiting a while for there to be one.
    pub(crate) async fn wait_head(&self) -> Head {
        let mut heads = self.heads();
        let limit = self.config.hold();
        match tokio::time::timeout(limit, heads.wait_for(|h| h.place.is_some())).await {
            Ok(Ok(head)) => head.clone(),
            _ => self.head(),
        }
    }
}
