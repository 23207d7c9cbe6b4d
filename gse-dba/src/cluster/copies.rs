//! Reads that copies answer. Of a primary it is known how far it was at a moment (its offset when it was asked); a copy that says with its replies that it is as far shows
//! nothing older than that moment. What can't be shown to be young enough is asked of the primary.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use redis::Value;
use tokio::sync::Semaphore;

use super::redirect;
use crate::sharded::seat::Seat;
use crate::sharded::{Answer, Fate, merge};
use crate::single::dial::{Place, Private};

const ROLE: &[u8] = b"*1\r\n$4\r\nROLE\r\n";
const READONLY: &[u8] = b"*1\r\n$8\r\nREADONLY\r\n";
/// Idle connections kept for each copy and protocol.
const IDLE: usize = 16;
/// Moments kept of each primary.
const MOMENTS: usize = 256;

#[derive(Default)]
struct Known {
    /// Offsets of another primary say nothing.
    generation: u64,
    copies: Vec<Place>,
    moments: VecDeque<(Instant, u64)>,
}

/// Who may answer reads, and how old they may be.
pub(crate) struct Readers {
    bound: Duration,
    known: Mutex<HashMap<usize, Known>>,
    idle: Mutex<HashMap<(String, bool), Vec<Private>>>,
    places: Arc<Semaphore>,
    next: AtomicUsize,
}

impl Readers {
    pub(super) fn new(bound: Duration, connections: usize) -> Self {
        Self {
            bound,
            known: Mutex::default(),
            idle: Mutex::default(),
            places: Arc::new(Semaphore::new(connections)),
            next: AtomicUsize::new(0),
        }
    }

    /// Takes in that a primary was at `offset` when it was asked, or later, and who follows it.
    pub(super) fn note(&self, group: usize, generation: u64, copies: Vec<Place>, asked: Instant, offset: u64) {
        let mut known = self.known.lock();
        let k = known.entry(group).or_default();
        if k.generation != generation {
            *k = Known {
                generation,
                ..Known::default()
            };
        }
        k.copies = copies;
        k.moments.push_back((asked, offset));
        while k.moments.len() > MOMENTS || k.moments.front().is_some_and(|(t, _)| t.elapsed() > self.bound) {
            k.moments.pop_front();
        }
    }

    fn pick(&self, group: usize, generation: u64) -> Option<Place> {
        let known = self.known.lock();
        let k = known.get(&group).filter(|k| k.generation == generation)?;
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        k.copies.get(n.checked_rem(k.copies.len())?).cloned()
    }

    /// Whether who is as far as `offset` shows nothing that is too old.
    fn is_young(&self, group: usize, generation: u64, offset: u64) -> bool {
        let known = self.known.lock();
        known.get(&group).is_some_and(|k| {
            let reached = |(t, o): &(Instant, u64)| *o <= offset && t.elapsed() <= self.bound;
            k.generation == generation && k.moments.iter().any(reached)
        })
    }

    /// Asks a copy. None: the primary is to be asked.
    pub(crate) async fn read(
        &self,
        group: usize,
        seat: &Seat,
        resp3: bool,
        bytes: &Bytes,
        count: usize,
    ) -> Option<Answer> {
        let generation = seat.generation();
        let place = self.pick(group, generation)?;
        let key = (place.to_string(), resp3);
        let idle = loop {
            // The lock is not held while a connection is looked at.
            let next = self.idle.lock().get_mut(&key).and_then(Vec::pop);
            match next {
                Some(p) if p.is_usable() => break Some(p),
                Some(_) => {}
                None => break None,
            }
        };
        let mut private = match idle {
            Some(private) => private,
            None => {
                let permit = Arc::clone(&self.places).try_acquire_owned().ok()?;
                let stream = seat.target(place).connect(resp3).await.ok()?;
                let limit = Duration::from_millis(seat.config.reply_timeout_ms);
                let mut private = Private::new(stream, resp3, permit, limit, seat.max_reply);
                let passed = private.pass(Bytes::from_static(READONLY), 1, false).await;
                if !passed.replies.starts_with(b"+") {
                    return None;
                }
                private
            }
        };
        let mut all = BytesMut::with_capacity(bytes.len() + ROLE.len());
        all.extend_from_slice(bytes);
        all.extend_from_slice(ROLE);
        let passed = private.pass(all.freeze(), count + 1, false).await;
        if passed.lost.is_some() {
            return None;
        }
        {
            let mut idle = self.idle.lock();
            let kept = idle.entry(key).or_default();
            if kept.len() < IDLE && private.is_usable() {
                kept.push(private);
            }
        }
        let mut replies = passed.replies;
        let ends = merge::ends(&replies, count);
        let role = replies.split_off(ends.last().copied()?);
        let offset = offset_of(&role)?;
        if !self.is_young(group, generation, offset) {
            return None;
        }
        let mut from = 0;
        for end in ends {
            if redirect::turn(replies.get(from..end)?, &Fate::Sealed, false).is_some() {
                return None;
            }
            from = end;
        }
        Some(Answer {
            replies,
            fate: Fate::Sealed,
        })
    }
}

/// How far a copy is, when it follows its primary.
fn offset_of(role: &[u8]) -> Option<u64> {
    let Ok(Value::Array(parts)) = redis::parse_redis_value(role) else {
        return None;
    };
    let is = |i: usize, text: &[u8]| matches!(parts.get(i), Some(Value::BulkString(b)) if b == text);
    match parts.get(4) {
        Some(Value::Int(n)) if is(0, b"slave") && is(3, b"connected") => u64::try_from(*n).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_copy_that_follows_says_how_far_it_is() {
        let role = |state: &str| {
            format!(
                "*5\r\n$5\r\nslave\r\n$1\r\nh\r\n:1\r\n${}\r\n{state}\r\n:42\r\n",
                state.len()
            )
        };
        assert_eq!(offset_of(role("connected").as_bytes()), Some(42));
        assert_eq!(offset_of(role("connect").as_bytes()), None);
        assert_eq!(offset_of(b"*3\r\n$6\r\nmaster\r\n:42\r\n*0\r\n"), None);
    }

    #[test]
    fn what_a_copy_shows_is_as_young_as_the_moment_it_has_reached() {
        let r = Readers::new(Duration::from_secs(60), 1);
        let now = Instant::now();
        let copies = || vec![Place::Tcp("h".into(), 1)];
        r.note(0, 1, copies(), now, 100);
        assert!(r.is_young(0, 1, 100) && r.is_young(0, 1, 101));
        assert!(!r.is_young(0, 1, 99), "it lacks something that is too old to be lacked");
        assert!(!r.is_young(0, 2, 100) && !r.is_young(1, 1, 100), "of another primary");
        r.note(0, 2, copies(), now, 500);
        assert!(!r.is_young(0, 2, 100), "offsets of the old primary are forgotten");
        assert!(r.pick(0, 2).is_some() && r.pick(0, 1).is_none());
        let strict = Readers::new(Duration::ZERO, 1);
        strict.note(0, 1, copies(), now, 1);
        assert!(!strict.is_young(0, 1, 100));
    }
}
