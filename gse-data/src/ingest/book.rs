//! What each sender was told: which of its batches are acknowledged, and which are on their way to sinks.
//!
//! A book belongs to a sender's sequence (its agent id and spool id) and outlives its links: a batch that comes again over a new link,
//! while its first copy is still on its way, is not handed over twice. Books of senders that have been quiet for long are forgotten.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use moka::sync::Cache;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit};

/// Names a sequence of batches.
type Name = (String, Bytes);

/// All books.
pub struct Books {
    books: Cache<Name, Arc<Book>>,
}

impl Books {
    /// None yet; at most `most`.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            books: Cache::builder().max_capacity(most as u64).build(),
        }
    }

    /// The book of a sequence.
    #[must_use]
    pub fn open(&self, agent: &str, spool_id: &Bytes) -> Arc<Book> {
        // The id is a slice of what was read; keeping that would keep the whole of it.
        let name = (agent.to_owned(), Bytes::copy_from_slice(spool_id));
        self.books.get_with(name, Arc::default)
    }
}

/// One sender's book.
#[derive(Debug, Default)]
pub struct Book {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    acked: u64,
    /// Batches on their way in the order of their numbers, and whether they have arrived.
    pending: VecDeque<(u64, bool)>,
    /// Which link the book is with; what an older one began and lost does not count any more.
    link: u64,
    /// A batch was lost on its way: it must come again.
    broken: bool,
}

/// What to do with a batch that has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Arrived {
    /// Hand it over.
    New,
    /// It was here before; its acknowledgement follows, or is repeated.
    Known,
    /// The link's place was taken by a newer one, or must begin anew.
    Over,
}

impl Book {
    /// A new link takes the book; returns its number and what is acknowledged.
    pub fn take(&self) -> (u64, u64) {
        let mut state = self.state.lock();
        state.link += 1;
        if state.broken {
            state.pending.clear();
            state.broken = false;
        }
        self.changed.notify_waiters();
        (state.link, state.acked)
    }

    /// A batch has come over link `link`.
    #[must_use]
    pub fn arrived(&self, link: u64, seq: u64) -> Arrived {
        let mut state = self.state.lock();
        if state.link != link || state.broken {
            return Arrived::Over;
        }
        let last = state.pending.back().map_or(state.acked, |(last, _)| *last);
        if seq <= last {
            return Arrived::Known;
        }
        state.pending.push_back((seq, false));
        Arrived::New
    }

    fn ended(&self, seq: u64, lost: bool) {
        let mut state = self.state.lock();
        if let Ok(at) = state.pending.binary_search_by_key(&seq, |(seq, _)| *seq) {
            if lost {
                state.broken = true;
            } else {
                state.pending[at].1 = true;
            }
        }
        while let Some((seq, true)) = state.pending.front().copied() {
            state.acked = seq;
            state.pending.pop_front();
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Waits until more than `told` is acknowledged; `None` when link `link` is over.
    pub async fn next(&self, link: u64, told: u64) -> Option<u64> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let state = self.state.lock();
                if state.link != link || state.broken {
                    return None;
                }
                if state.acked > told {
                    return Some(state.acked);
                }
            }
            changed.await;
        }
    }

    /// Whether nothing is on its way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.state.lock().pending.is_empty()
    }

    /// What is acknowledged.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.state.lock().acked
    }
}

/// A batch on its way: when every part of it has said that it has arrived, it is acknowledged. A part that is dropped without that is
/// lost, and the sender has to send the batch again.
#[derive(Debug)]
pub struct Ticket {
    batch: Arc<Batch>,
    settled: bool,
}

#[derive(Debug)]
struct Batch {
    book: Arc<Book>,
    seq: u64,
    lost: AtomicBool,
    /// Its memory.
    room: Mutex<Vec<OwnedSemaphorePermit>>,
}

impl Ticket {
    /// For a batch that is new.
    #[must_use]
    pub fn new(book: Arc<Book>, seq: u64) -> Self {
        Self {
            batch: Arc::new(Batch {
                book,
                seq,
                lost: AtomicBool::new(false),
                room: Mutex::default(),
            }),
            settled: false,
        }
    }

    /// Keeps its memory taken until the batch has arrived.
    pub fn hold(&self, room: OwnedSemaphorePermit) {
        self.batch.room.lock().push(room);
    }

    /// For one more part of the batch.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            batch: Arc::clone(&self.batch),
            settled: false,
        }
    }

    /// This part has arrived, is safe on disk, or was dropped and counted.
    pub fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.settled {
            self.batch.lost.store(true, Ordering::Release);
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.book.ended(self.seq, self.lost.load(Ordering::Acquire));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(book: &Arc<Book>, link: u64, seq: u64) -> Ticket {
        assert_eq!(book.arrived(link, seq), Arrived::New);
        Ticket::new(Arc::clone(book), seq)
    }

    #[test]
    fn acknowledged_in_order_when_every_part_is_there() {
        let book = Books::new(10).open("a", &Bytes::from_static(b"spool"));
        let (link, acked) = book.take();
        assert_eq!(acked, 0);
        let (one, two, five) = (ticket(&book, link, 1), ticket(&book, link, 2), ticket(&book, link, 5));
        let part = one.share();
        one.settle();
        two.settle();
        assert_eq!(book.acked(), 0);
        part.settle();
        assert_eq!(book.acked(), 2);
        five.settle();
        assert_eq!(book.acked(), 5, "what the sender has dropped leaves a gap");
    }

    #[test]
    fn a_copy_over_a_new_link_is_not_handed_over_again() {
        let books = Books::new(10);
        let book = books.open("a", &Bytes::from_static(b"spool"));
        let (old, _) = book.take();
        let under_way = ticket(&book, old, 1);
        let (new, _) = books.open("a", &Bytes::from_static(b"spool")).take();
        assert_eq!(book.arrived(new, 1), Arrived::Known);
        assert_eq!(book.arrived(old, 2), Arrived::Over);
        under_way.settle();
        assert_eq!(book.acked(), 1);
        assert_eq!(books.open("b", &Bytes::from_static(b"spool")).acked(), 0);
    }

    #[test]
    fn what_was_lost_comes_again() {
        let book = Books::new(10).open("a", &Bytes::from_static(b"spool"));
        let (link, _) = book.take();
        drop(ticket(&book, link, 1));
        assert_eq!(book.arrived(link, 2), Arrived::Over);
        let (link, acked) = book.take();
        assert_eq!(acked, 0);
        ticket(&book, link, 1).settle();
        assert_eq!(book.acked(), 1);
    }
}
