//! Connections on which nobody has proven yet who they are.
//!
//! One address may have only so many of them, and when the listener is full the oldest makes room for a newcomer: somebody who opens
//! connections and leaves them idle keeps nobody out. The first authenticated call takes a connection out of here for good.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use crate::per_address::{PerAddress, Place};

/// A caller that means it has sent its first request by then.
const PATIENCE: Duration = Duration::from_secs(1);

/// Those of one listener. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Strangers {
    addresses: PerAddress,
    /// By number, so the oldest is first.
    waiting: Arc<Mutex<Waiting>>,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    oldest_first: BTreeMap<u64, Stranger>,
}

#[derive(Debug)]
struct Stranger {
    since: Instant,
    permit: OwnedSemaphorePermit,
    leave: CancellationToken,
}

/// The connection's end of it: its place among the strangers until it is known, its place in the listener until it ends.
#[derive(Debug)]
pub(super) struct Guest {
    strangers: Strangers,
    number: u64,
    state: Mutex<State>,
    /// Cancelled when it has to make room.
    pub(super) leave: CancellationToken,
}

#[derive(Debug)]
enum State {
    Stranger(#[expect(dead_code, reason = "held while it is one")] Place),
    Known(#[expect(dead_code, reason = "held until the connection ends")] Option<OwnedSemaphorePermit>),
}

impl Strangers {
    pub(super) fn new(per_address: usize) -> Self {
        Strangers {
            addresses: PerAddress::new(per_address),
            waiting: Arc::default(),
        }
    }

    /// A place for one more stranger from this address, if it has not too many.
    pub(super) fn place(&self, address: IpAddr) -> Option<Place> {
        self.addresses.take(address)
    }

    /// Sends the oldest stranger away if it had its time; its place in the listener is free then.
    pub(super) fn make_room(&self) -> Option<OwnedSemaphorePermit> {
        let mut waiting = self.waiting.lock();
        let oldest = waiting.oldest_first.first_entry()?;
        if oldest.get().since.elapsed() < PATIENCE {
            return None;
        }
        let stranger = oldest.remove();
        stranger.leave.cancel();
        Some(stranger.permit)
    }

    /// A new connection.
    pub(super) fn enter(&self, place: Place, permit: OwnedSemaphorePermit) -> Guest {
        let leave = CancellationToken::new();
        let mut waiting = self.waiting.lock();
        let number = waiting.next;
        waiting.next += 1;
        let stranger = Stranger {
            since: Instant::now(),
            permit,
            leave: leave.clone(),
        };
        waiting.oldest_first.insert(number, stranger);
        Guest {
            strangers: self.clone(),
            number,
            state: Mutex::new(State::Stranger(place)),
            leave,
        }
    }
}

impl Guest {
    /// An authenticated call has come on this connection.
    pub(super) fn known(&self) {
        let mut state = self.state.lock();
        if matches!(*state, State::Stranger(_)) {
            let stranger = self.strangers.waiting.lock().oldest_first.remove(&self.number);
            *state = State::Known(stranger.map(|stranger| stranger.permit));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.strangers.waiting.lock().oldest_first.remove(&self.number);
    }
}
