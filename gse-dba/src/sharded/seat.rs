//! What is known of a group at this moment: who its primary is, how many copies follow it, and whether writes must be kept away. Its follower writes it,
//! connections read it.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;

use super::control::{Lag, Login};
use super::gate::Gate;
use super::link;
use super::moving::lease::Lease;
use super::mutants::{self, Mutant};
use super::returned::Returned;
use super::trust::Trust;
use crate::config::Sharded as Config;
use crate::config::sharded::Group;
use crate::metrics::Metrics;
use crate::single::dial::{Place, Target};
use crate::timing::Timing;

/// Who is primary.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) place: Option<Place>,
    /// Rises with every change.
    pub(crate) generation: u64,
    pub(crate) since: Instant,
}

/// How many copies follow, and since when they are too few.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copies {
    count: usize,
    short_since: Option<Instant>,
}

pub(crate) struct Seat {
    pub(crate) name: String,
    pub(crate) config: Config,
    /// Copies besides the primary that a write needs.
    pub(crate) need: usize,
    pub(crate) max_reply: usize,
    pub(crate) login: Login,
    pub(crate) metrics: Metrics,
    /// How long batches take there.
    pub(crate) backend: Timing,
    head: watch::Sender<Head>,
    copies: watch::Sender<Copies>,
    /// What is on its way to the primary, and whether more may set out.
    pub(crate) gate: Arc<Gate>,
    /// Whoever changes or judges who is primary has it: two at once would undo each other's work.
    pub(crate) turn: Semaphore,
    barred: Mutex<Option<String>>,
    problems: Mutex<Vec<String>>,
    /// What a person has to decide.
    troubles: Mutex<Vec<String>>,
    /// The copy that a Sentinel is making the primary.
    chosen: Mutex<Option<(String, Instant)>>,
    /// What the configuration says of it, once it is followed.
    group: Mutex<Group>,
    /// Copies by name and how far they are behind, as the primary said last.
    lags: Mutex<Vec<Lag>>,
    looked: watch::Sender<bool>,
    pub(crate) nudge: Notify,
    /// A Sentinel has announced a switch: a look that is under way asks the wrong server.
    pub(crate) news: Notify,
    /// Whether the primary may still be one.
    pub(crate) trust: Trust,
    /// Whether the primary still has what it had.
    pub(crate) returned: Returned,
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
        let mut need = config.acknowledged.saturating_sub(1);
        if mutants::is(Mutant::OneCopy) {
            need = 0;
        }
        let limit = Duration::from_millis(config.wait_ms);
        Self {
            name: name.to_owned(),
            need,
            max_reply,
            login,
            backend: metrics.backend(name),
            metrics,
            head: watch::Sender::new(Head {
                place: None,
                generation: 0,
                since: Instant::now(),
            }),
            copies: watch::Sender::new(Copies {
                count: 0,
                short_since: (need > 0).then(Instant::now),
            }),
            gate: Arc::default(),
            turn: Semaphore::new(1),
            barred: Mutex::default(),
            problems: Mutex::default(),
            troubles: Mutex::default(),
            chosen: Mutex::default(),
            group: Mutex::default(),
            lags: Mutex::default(),
            looked: watch::Sender::new(false),
            nudge: Notify::new(),
            news: Notify::new(),
            trust: Trust::default(),
            returned: Returned::default(),
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
        .over(self.login.tls.clone())
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

    /// Which primary it is, by number.
    pub(crate) fn generation(&self) -> u64 {
        self.head.borrow().generation
    }

    pub(crate) fn copies(&self) -> usize {
        self.copies.borrow().count
    }

    pub(crate) fn watch_copies(&self) -> watch::Receiver<Copies> {
        self.copies.subscribe()
    }

    /// Makes the follower look at once.
    pub(crate) fn nudge(&self) {
        self.nudge.notify_one();
    }

    /// Takes in how far the copies are behind.
    pub(crate) fn set_lags(&self, lags: Vec<Lag>) {
        let mut known = self.lags.lock();
        let gone = known.iter().filter(|k| !lags.iter().any(|l| l.address == k.address));
        self.metrics
            .copies_behind(&self.name, &lags, gone.map(|l| l.address.as_str()));
        *known = lags;
    }

    /// How far the copies are behind, as the primary said last.
    pub(crate) fn lags(&self) -> Vec<Lag> {
        self.lags.lock().clone()
    }

    /// Takes in how many copies follow the primary.
    pub(crate) fn set_copies(&self, n: usize) {
        if n == 0 {
            self.set_lags(Vec::new());
        }
        self.copies.send_if_modified(|c| {
            let since = if n >= self.need {
                None
            } else {
                Some(c.short_since.unwrap_or_else(Instant::now))
            };
            let new = c.count != n || c.short_since != since;
            *c = Copies {
                count: n,
                short_since: since,
            };
            new
        });
    }

    /// Takes in who is primary; true when that is new.
    pub(crate) fn set_head(&self, place: Option<Place>) -> bool {
        let renewed = place.is_some();
        let changed = self.head.send_if_modified(|h| {
            if h.place == place {
                return false;
            }
            *h = Head {
                place,
                generation: h.generation + 1,
                since: Instant::now(),
            };
            true
        });
        if changed && renewed {
            // A new primary gets its time until its copies follow.
            self.copies.send_if_modified(|c| {
                c.short_since = c.short_since.map(|_| Instant::now());
                c.short_since.is_some()
            });
        }
        changed
    }

    pub(crate) fn set_problems(&self, problems: Vec<String>, bar: bool) {
        *self.barred.lock() = problems.first().filter(|_| bar).cloned();
        *self.problems.lock() = problems;
    }

    pub(crate) fn problems(&self) -> Vec<String> {
        self.problems.lock().clone()
    }

    /// What only a person can decide, in words that say how.
    pub(crate) fn troubles(&self) -> Vec<String> {
        self.troubles.lock().clone()
    }

    pub(crate) fn set_troubles(&self, troubles: Vec<String>) {
        *self.troubles.lock() = troubles;
    }

    /// Who makes another server the primary when this one is lost, in words.
    pub(crate) fn failover(&self) -> &'static str {
        let group = self.group.lock();
        if !group.sentinels.is_empty() {
            "by Sentinel; DBA FAILOVER as planned"
        } else if group.servers.len() > 1 {
            "by hand: DBA PROMOTE when the primary is lost, DBA FAILOVER as planned"
        } else {
            "none: there is one server"
        }
    }

    pub(crate) fn set_chosen(&self, copy: Option<String>) {
        *self.chosen.lock() = copy.map(|c| (c, Instant::now()));
    }

    /// The copy that was chosen lately.
    pub(crate) fn chosen(&self, lately: Duration) -> Option<String> {
        let chosen = self.chosen.lock();
        chosen
            .as_ref()
            .filter(|(_, at)| at.elapsed() < lately)
            .map(|(c, _)| c.clone())
    }

    pub(crate) fn group(&self) -> Group {
        self.group.lock().clone()
    }

    pub(crate) fn set_group(&self, group: Group) {
        *self.group.lock() = group;
    }

    /// How the Sentinels let one in.
    pub(crate) fn sentinel_login(&self) -> Login {
        Login {
            user: self.config.sentinel_user.clone(),
            password: self.login.sentinel_password.clone(),
            timeout: self.login.timeout,
            tls: self
                .login
                .tls
                .clone()
                .filter(|_| self.config.tls.as_ref().is_some_and(|t| t.sentinels)),
            sentinel_password: None,
        }
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
        if self.is_doubtful() {
            return Some(format!(
                "most Sentinels of group '{}' were not heard lately, or take its primary for dead: another may be primary by now",
                self.name
            ));
        }
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

    /// Whether the one that was primary may have been replaced: then it is neither written nor read.
    pub(crate) fn is_doubtful(&self) -> bool {
        self.need > 0 && !self.trust.holds() && !mutants::is(Mutant::NoDemotionCheck)
    }

    /// Whether what a primary of this generation says now is worth nothing any more.
    pub(crate) fn is_past(&self, generation: u64) -> bool {
        self.is_doubtful()
            || self.need > 0 && self.head.borrow().generation != generation && !mutants::is(Mutant::NoDemotionCheck)
    }

    /// The Sentinels were asked at `asked`: with `fine`, most of them have nothing against the primary.
    pub(super) fn heard(&self, asked: Instant, fine: bool, span: Duration) {
        let was = self.trust.holds();
        if fine {
            self.trust.extend(asked, span);
        } else {
            self.trust.end();
        }
        if was != self.trust.holds() {
            // Whoever waits for copies waits for this, too.
            self.copies.send_modify(|_| {});
        }
    }

    /// Since when writes have to wait, for whatever reason.
    fn waits_since(&self) -> Option<Instant> {
        let short = self.copies.borrow().short_since;
        let doubt = if self.is_doubtful() { self.trust.ended() } else { None };
        match (short, doubt) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (a, b) => a.or(b),
        }
    }

    /// Whether writes that can't be executed for want of copies are better held back than refused: it is so for a short time only, and a fail-over may be under way.
    pub(crate) fn is_patient(&self) -> bool {
        let since = self.waits_since();
        since.is_some_and(|s| s.elapsed() < self.config.hold()) && self.barred.lock().is_none()
    }

    /// Waits until there are enough copies again, or it has taken too long.
    pub(crate) async fn patience_ends(&self) {
        let mut copies = self.copies.subscribe();
        loop {
            copies.borrow_and_update();
            let Some(since) = self.waits_since() else { return };
            tokio::select! {
                _ = copies.changed() => {}
                () = tokio::time::sleep_until(since + self.config.hold()) => return,
            }
        }
    }

    /// Waits until a new primary has its copies: in a fail-over they need a moment to follow it. Bounded by `hold_ms` from the change on.
    pub(crate) async fn settle(&self, head: &Head) {
        let mut copies = self.copies.subscribe();
        let mut heads = self.heads();
        tokio::select! {
            _ = copies.wait_for(|c| c.count >= self.need) => {}
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
