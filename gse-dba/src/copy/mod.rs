//! Copies keys from one store to another while writes go on. It knows two ends that take commands, a tracker that is told of every write, and how each type of
//! value is read and written; who is served from where, and when that changes, is left to those who use it (moves of slots, `DBA MIGRATE`).
//!
//! The rule that makes a copy right: a key's mark is cleared, then the key is read, then it is written to the target. A write that takes effect after the reading
//! is answered after the clearing, and marks the key again when it is answered. So when commands are held, none is under way and no mark is left, both ends are equal.
//!
//! Use, in this order: [`Copier::copy_all`], [`Copier::converge`] (as often as wanted), [`Copier::verify`], then hold what concerns the keys, wait until nothing
//! is under way, and [`Copier::finish`].

mod big;
mod compare;
mod digest;
mod ends;
mod engine;
pub(crate) mod reply;
mod streams;
mod talk;
mod touch;
mod track;
mod values;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(crate) use ends::{StoreEnd, answered, encode};
pub(crate) use engine::Copier;
pub(crate) use reply::Reply;
pub(crate) use talk::purge;
pub(crate) use track::{Touches, Tracker, Writes};

use crate::sharded::slots::{SLOTS, slot};

/// Keys that begin so are gse_dba's own. They are never copied, and a value under way to its place has such a name for a while.
pub(crate) const RESERVED: &[u8] = b"gse_dba:reserved:";

/// A command as its words.
pub(crate) type Words = Vec<Bytes>;

/// One side of a copy.
pub(crate) trait End: Send + Sync {
    /// What people call it; no password in it.
    fn name(&self) -> String;

    /// Sends commands and gives a reply for each, in order. Writes are acknowledged by the end's own rule. What could not be executed, or may not have been, is
    /// [`Trouble::Later`] for all of them: everything that is sent here can be sent again.
    fn call<'a>(&'a self, commands: &'a [Words]) -> BoxFuture<'a, Result<Vec<Reply>, Trouble>>;
}

/// Why a copy does not go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Trouble {
    /// For now; it is tried again for a while.
    #[error("{0}")]
    Later(String),
    /// It can't be done.
    #[error("{0}")]
    Unfit(String),
    /// It was told to stop.
    #[error("it was stopped")]
    Stopped,
    /// The time for it was over before its end. Nothing is lost: it can be tried again.
    #[error("it takes longer than the time there is for it")]
    Late,
}

/// Which keys are meant. Reserved names never are.
#[derive(Clone, Default)]
pub(crate) struct Filter {
    /// None: every slot.
    slots: Option<Arc<[bool]>>,
}

impl Filter {
    /// Every key.
    pub(crate) fn all() -> Self {
        Self::default()
    }

    /// The keys of these slots.
    pub(crate) fn slots(wanted: impl IntoIterator<Item = u16>) -> Self {
        let mut slots = vec![false; SLOTS];
        for s in wanted {
            if let Some(at) = slots.get_mut(usize::from(s)) {
                *at = true;
            }
        }
        Self {
            slots: Some(slots.into()),
        }
    }

    /// Whether this key is meant.
    pub(crate) fn has(&self, key: &[u8]) -> bool {
        !key.starts_with(RESERVED) && self.covers(key)
    }

    /// Whether this name is in the slots that are meant, reserved or not: what is removed with them.
    pub(crate) fn covers(&self, key: &[u8]) -> bool {
        self.slots
            .as_ref()
            .is_none_or(|s| s.get(usize::from(slot(key))).copied().unwrap_or(false))
    }

    /// Whether every key is meant.
    pub(crate) fn is_all(&self) -> bool {
        self.slots.is_none()
    }
}

/// Sizes and waits.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Keys copied together.
    pub(crate) batch: usize,
    /// A value of more elements is copied in parts.
    pub(crate) big_elements: u64,
    /// A value of more bytes is copied in parts; no part is much larger.
    pub(crate) part_bytes: u64,
    /// How long an end may be out of reach before the copy is given up.
    pub(crate) patience: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            batch: 128,
            big_elements: 2000,
            part_bytes: 1 << 20,
            patience: Duration::from_secs(30),
        }
    }
}

/// How fast a copy may go. May be changed while it goes.
#[derive(Default)]
pub(crate) struct Pace {
    /// Per second; 0 is no bound.
    bytes: AtomicU64,
    keys: AtomicU64,
    paused: AtomicBool,
    next: Mutex<Option<Instant>>,
}

impl Pace {
    /// Bytes and keys a second; 0 is no bound.
    pub(crate) fn new(bytes: u64, keys: u64) -> Self {
        let pace = Self::default();
        pace.set(bytes, keys);
        pace
    }

    pub(crate) fn set(&self, bytes: u64, keys: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
        self.keys.store(keys, Ordering::Relaxed);
    }

    /// Bytes and keys a second.
    pub(crate) fn get(&self) -> (u64, u64) {
        (self.bytes.load(Ordering::Relaxed), self.keys.load(Ordering::Relaxed))
    }

    pub(crate) fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Waits for as long as this much should have taken, and while it is paused.
    async fn spent(&self, bytes: u64, keys: u64, stop: &CancellationToken) -> Result<(), Trouble> {
        let (per_bytes, per_keys) = self.get();
        let share = |n: u64, per: u64| if per == 0 { 0.0 } else { n as f64 / per as f64 };
        let cost = Duration::from_secs_f64(share(bytes, per_bytes).max(share(keys, per_keys)));
        let until = {
            let mut next = self.next.lock();
            let now = Instant::now();
            let until = next.map_or(now, |n| n.max(now)) + cost;
            *next = Some(until);
            until
        };
        let wait = async {
            if cost > Duration::ZERO {
                tokio::time::sleep_until(until).await;
            }
            while self.is_paused() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            () = wait => Ok(()),
            () = stop.cancelled() => Err(Trouble::Stopped),
        }
    }
}

/// What has been done so far.
#[derive(Default, Debug)]
pub(crate) struct Progress {
    /// Keys the source said it has when the copy began.
    pub(crate) expected: AtomicU64,
    /// Keys looked at by the first pass.
    pub(crate) scanned: AtomicU64,
    /// Keys written, those written again included.
    pub(crate) copied: AtomicU64,
    pub(crate) bytes: AtomicU64,
    /// Parts of large values written.
    pub(crate) parts: AtomicU64,
    /// Keys and elements copied again because they had changed.
    pub(crate) again: AtomicU64,
    /// Keys compared on both ends.
    pub(crate) compared: AtomicU64,
    /// Keys found different that nobody had said were changed.
    pub(crate) mismatched: AtomicU64,
    /// Times that all was begun anew because everything had been deleted.
    pub(crate) restarts: AtomicU64,
}

impl Progress {
    pub(crate) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

/// What a copy is made of.
#[derive(Clone)]
pub(crate) struct Job {
    pub(crate) source: Arc<dyn End>,
    pub(crate) target: Arc<dyn End>,
    pub(crate) filter: Filter,
    pub(crate) tracker: Arc<Tracker>,
    pub(crate) pace: Arc<Pace>,
    pub(crate) progress: Arc<Progress>,
    pub(crate) settings: Settings,
    /// Cancelled: the copy ends with [`Trouble::Stopped`] at its next step. What it has written to the target stays there.
    pub(crate) stop: CancellationToken,
}

/// A command of words.
pub(crate) fn words<W: AsRef<[u8]>>(list: impl IntoIterator<Item = W>) -> Words {
    list.into_iter().map(|w| Bytes::copy_from_slice(w.as_ref())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_means_its_slots_and_never_what_is_reserved() {
        let all = Filter::all();
        assert!(all.has(b"a") && all.is_all());
        assert!(!all.has(b"gse_dba:reserved:topology"));
        let some = Filter::slots([slot(b"a")]);
        assert!(some.has(b"a") && some.has(b"{a}b") && !some.has(b"b"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pace_is_kept_and_a_pause_ends_with_the_stop() {
        let (pace, stop) = (Pace::new(1000, 0), CancellationToken::new());
        let start = Instant::now();
        for _ in 0..10 {
            pace.spent(500, 1, &stop).await.unwrap();
        }
        let took = start.elapsed();
        assert!(
            took >= Duration::from_millis(4900) && took < Duration::from_millis(5200),
            "{took:?}"
        );
        pace.pause(true);
        stop.cancel();
        assert_eq!(pace.spent(0, 1, &stop).await, Err(Trouble::Stopped));
    }
}
