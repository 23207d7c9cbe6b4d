//! Publish and subscribe for all clients of this process: who wants which channel, and what is sent to whom. To the groups there is one subscription for each channel or
//! pattern however many clients want it; that is `feed`'s. A subscriber that does not take its messages is dropped, and holds up nobody.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ahash::RandomState;
use arc_swap::ArcSwapOption;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::slots::{SlotMap, slot};
use crate::engine::glob;
use crate::metrics::Metrics;

/// Ended subscriptions kept in mind for the counts that `PUBLISH` answers.
const MAX_LEAVING: usize = 1000;

/// What a subscription is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Channel,
    Pattern,
    Shard,
}

impl Kind {
    pub(crate) const ALL: [Kind; 3] = [Kind::Channel, Kind::Pattern, Kind::Shard];

    pub(crate) fn subscribe(self) -> &'static str {
        match self {
            Kind::Channel => "subscribe",
            Kind::Pattern => "psubscribe",
            Kind::Shard => "ssubscribe",
        }
    }

    pub(crate) fn unsubscribe(self) -> &'static str {
        match self {
            Kind::Channel => "unsubscribe",
            Kind::Pattern => "punsubscribe",
            Kind::Shard => "sunsubscribe",
        }
    }
}

/// One channel or pattern.
pub(crate) type Key = (Kind, Bytes);

/// A client as the hub knows it.
pub(crate) struct Subscriber {
    id: u64,
    messages: mpsc::Sender<Bytes>,
    /// Bytes that wait in `messages`.
    waiting: AtomicUsize,
    /// It did not take its messages: it gets no more, and is to be disconnected.
    dropped: AtomicBool,
}

/// A client's own end: what it is subscribed to and the messages for it.
pub(crate) struct Inbox {
    me: Arc<Subscriber>,
    messages: mpsc::Receiver<Bytes>,
    wants: HashMap<Key, (), RandomState>,
    counts: [usize; 3],
    hub: Hub,
}

#[derive(Default)]
struct Book {
    entries: HashMap<Key, Vec<Arc<Subscriber>>, RandomState>,
    patterns: Vec<Bytes>,
    /// What nobody here wants any more, and the groups may not have been told yet.
    leaving: Vec<Key>,
}

struct Inner {
    book: Mutex<Book>,
    feeds: Mutex<Vec<Arc<super::feed::Wanted>>>,
    /// In front of a cluster.
    carriers: ArcSwapOption<Carriers>,
    metrics: Metrics,
    max_messages: usize,
    max_bytes: usize,
}

/// Whose feed has what in a cluster, where every node gets the messages to all channels, and those of a shard belong to a slot.
pub(crate) struct Carriers {
    pub(crate) map: SlotMap,
    pub(crate) home: usize,
}

/// A handle on the hub.
#[derive(Clone)]
pub(crate) struct Hub(Arc<Inner>);

const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_millis(200);

impl Hub {
    pub(crate) fn new(metrics: Metrics, max_messages: usize, max_bytes: usize) -> Self {
        Self(Arc::new(Inner {
            book: Mutex::default(),
            feeds: Mutex::default(),
            carriers: ArcSwapOption::empty(),
            metrics,
            max_messages,
            max_bytes,
        }))
    }

    /// From now on a group's feed is told what is wanted.
    pub(super) fn attach(&self, wanted: Arc<super::feed::Wanted>) {
        self.0.feeds.lock().push(wanted);
    }

    /// Feeds there are.
    pub(super) fn feeds(&self) -> usize {
        self.0.feeds.lock().len()
    }

    /// Whether the feed of a group is the one, or one of those, for a channel.
    pub(super) fn carries(&self, feed: usize, (kind, name): &Key) -> bool {
        match &*self.0.carriers.load() {
            None => true,
            Some(c) if *kind == Kind::Shard => c.map.group(slot(name)) == feed,
            Some(c) => c.home == feed,
        }
    }

    /// The cluster has changed: feeds that have something of it begin anew.
    pub(crate) fn carry(&self, carriers: Carriers) {
        let book = self.0.book.lock();
        let moved = self.0.carriers.load().as_ref().is_none_or(|old| {
            old.home != carriers.home
                || book
                    .entries
                    .keys()
                    .any(|(k, n)| *k == Kind::Shard && old.map.group(slot(n)) != carriers.map.group(slot(n)))
        });
        self.0.carriers.store(Some(Arc::new(carriers)));
        if moved && !book.entries.is_empty() {
            for f in self.0.feeds.lock().iter() {
                f.begin_anew();
            }
        }
    }

    /// Everything that is wanted now. `with` runs before anything can change.
    pub(super) fn snapshot(&self, with: impl FnOnce(Vec<Key>)) {
        let book = self.0.book.lock();
        with(book.entries.keys().cloned().collect());
    }

    /// A client that has no subscription yet.
    pub(crate) fn join(&self, id: u64) -> Inbox {
        let (messages, inbox) = mpsc::channel(self.0.max_messages);
        Inbox {
            me: Arc::new(Subscriber {
                id,
                messages,
                waiting: AtomicUsize::new(0),
                dropped: AtomicBool::new(false),
            }),
            messages: inbox,
            wants: HashMap::default(),
            counts: [0; 3],
            hub: self.clone(),
        }
    }

    /// Gives a message to everybody who has asked for `key`; `frame` is what they get, in RESP2.
    pub(super) fn deliver(&self, key: &Key, frame: &Bytes) {
        let book = self.0.book.lock();
        let Some(all) = book.entries.get(key) else { return };
        for s in all {
            if s.dropped.load(Ordering::Relaxed) {
                continue;
            }
            let waiting = s.waiting.fetch_add(frame.len(), Ordering::Relaxed) + frame.len();
            if waiting > self.0.max_bytes || s.messages.try_send(frame.clone()).is_err() {
                s.dropped.store(true, Ordering::Relaxed);
                // Wakes it, when its queue has a place: it looks at `dropped` after everything it takes.
                let _ = s.messages.try_send(Bytes::new());
                self.0.metrics.subscriber_dropped();
            }
        }
    }

    /// How many clients here get a message to this channel, and how many subscriptions of ours at a group it meets.
    pub(crate) fn reach(&self, kind: Kind, channel: &[u8]) -> (usize, usize) {
        let mut book = self.0.book.lock();
        let key = (kind, Bytes::copy_from_slice(channel));
        if !book.leaving.is_empty() {
            let feeds = self.0.feeds.lock();
            book.leaving.retain(|k| feeds.iter().any(|f| f.knows(k)));
        }
        let (mut clients, mut ours) = book.entries.get(&key).map_or((0, 0), |all| (all.len(), 1));
        if kind == Kind::Channel {
            for p in &book.patterns {
                if glob::matches(p, channel)
                    && let Some(all) = book.entries.get(&(Kind::Pattern, p.clone()))
                {
                    clients += all.len();
                    ours += 1;
                }
            }
        }
        let meets = |k: &&Key| match k.0 {
            Kind::Pattern => kind == Kind::Channel && glob::matches(&k.1, channel),
            _ => **k == key,
        };
        ours += book.leaving.iter().filter(meets).count();
        (clients, ours)
    }

    /// Clients subscribed to exactly this channel here.
    pub(crate) fn here(&self, kind: Kind, channel: &[u8]) -> usize {
        let key = (kind, Bytes::copy_from_slice(channel));
        self.0.book.lock().entries.get(&key).map_or(0, Vec::len)
    }

    fn add(&self, key: &Key, who: &Arc<Subscriber>) {
        let mut book = self.0.book.lock();
        book.leaving.retain(|k| k != key);
        let all = book.entries.entry(key.clone()).or_default();
        all.push(Arc::clone(who));
        if all.len() == 1 {
            if key.0 == Kind::Pattern {
                book.patterns.push(key.1.clone());
            }
            self.tell(key, true);
        }
    }

    fn remove(&self, key: &Key, who: u64) {
        let mut book = self.0.book.lock();
        let Some(all) = book.entries.get_mut(key) else { return };
        all.retain(|s| s.id != who);
        if all.is_empty() {
            book.entries.remove(key);
            if key.0 == Kind::Pattern {
                book.patterns.retain(|p| *p != key.1);
            }
            if book.leaving.len() < MAX_LEAVING {
                book.leaving.push(key.clone());
            }
            self.tell(key, false);
        }
    }

    /// Called with the book locked, so that every feed learns of changes in one order.
    fn tell(&self, key: &Key, on: bool) {
        for f in self.0.feeds.lock().iter() {
            f.change(self, key, on);
        }
    }

    /// Waits until every group has confirmed the subscription.
    pub(crate) async fn confirmed(&self, key: &Key, limit: std::time::Duration) -> Result<(), String> {
        let feeds = self.0.feeds.lock().clone();
        let all = async {
            for f in &feeds {
                // Which it is may change meanwhile.
                while self.carries(f.index, key) {
                    if tokio::time::timeout(LOOK_AGAIN, f.confirmed(key)).await.is_ok() {
                        break;
                    }
                }
            }
        };
        match tokio::time::timeout(limit, all).await {
            Ok(()) => Ok(()),
            Err(_) => {
                let missing: Vec<&str> = feeds
                    .iter()
                    .filter(|f| self.carries(f.index, key) && !f.has(key))
                    .map(|f| f.name.as_str())
                    .collect();
                Err(format!(
                    "UNAVAILABLE group '{}' has not confirmed the subscription in time; try again",
                    missing.join("', '")
                ))
            }
        }
    }
}

impl Hub {
    /// Waits until the groups have done what was last asked about these, or the time is up.
    pub(crate) async fn settled(&self, keys: impl Iterator<Item = &Key>, limit: std::time::Duration) {
        let feeds = self.0.feeds.lock().clone();
        let all = async {
            for key in keys {
                for f in &feeds {
                    f.settled(key).await;
                }
            }
        };
        if tokio::time::timeout(limit, all).await.is_err() {
            tracing::debug!("a group did not confirm the end of a subscription in time");
        }
    }
}

impl Inbox {
    /// Subscriptions in all, as replies count them: those of shards apart.
    pub(crate) fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Shard => self.counts[2],
            _ => self.counts[0] + self.counts[1],
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.wants.is_empty()
    }

    /// Of each kind.
    pub(crate) fn counts(&self) -> [usize; 3] {
        self.counts
    }

    /// Subscribes; false when that was done before.
    pub(crate) fn add(&mut self, key: &Key) -> bool {
        let new = self.wants.insert(key.clone(), ()).is_none();
        if new {
            self.counts[key.0 as usize] += 1;
            self.hub.add(key, &self.me);
        }
        new
    }

    pub(crate) fn remove(&mut self, key: &Key) {
        if self.wants.remove(key).is_some() {
            self.counts[key.0 as usize] -= 1;
            self.hub.remove(key, self.me.id);
        }
    }

    /// What it is subscribed to.
    pub(crate) fn all(&self, kind: Kind) -> Vec<Bytes> {
        self.wants.keys().filter(|k| k.0 == kind).map(|k| k.1.clone()).collect()
    }

    fn took(&self, frame: Bytes) -> Option<Bytes> {
        self.me.waiting.fetch_sub(frame.len(), Ordering::Relaxed);
        (!self.me.dropped.load(Ordering::Relaxed)).then_some(frame)
    }

    /// The next message; `None` when the client was too slow and must go. It can be dropped without losing a message.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        let frame = self.messages.recv().await?;
        self.took(frame)
    }

    /// A message that is there already.
    pub(crate) fn ready(&mut self) -> Option<Bytes> {
        let frame = self.messages.try_recv().ok()?;
        self.took(frame)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        for key in self.wants.keys() {
            self.hub.remove(key, self.me.id);
        }
    }
}
