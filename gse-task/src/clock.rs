//! The node's clock for code that has no node at hand. What has one asks `node.clock`.
//!
//! Deadlines are kept in the store as Unix milliseconds; they are decided on a clock that a step of the wall clock does not move
//! (see [`gse_core::clock`]).

use std::cell::RefCell;

use gse_core::clock::Clock;

thread_local! {
    static HERE: RefCell<Option<Clock>> = const { RefCell::new(None) };
}

/// Unix milliseconds now.
#[must_use]
pub fn unix_ms() -> u64 {
    HERE.with_borrow(|here| here.as_ref().map(Clock::unix_ms))
        .unwrap_or_else(|| Clock::system().unix_ms())
}

/// Has [`unix_ms`] ask this clock on this thread. For simulations, in which a node has one thread.
pub fn use_on_this_thread(clock: Option<Clock>) {
    HERE.set(clock);
}
