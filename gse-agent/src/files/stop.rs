//! Whether a transfer that is under way on a blocking thread is to go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use gse_proto::codes::Inner;

use super::worker::Failed;

const GO_ON: u8 = 0;
const TERMINATED: u8 = 1;
const TIMED_OUT: u8 = 2;
const PAUSED: u8 = 3;

/// Looked at between two steps; the first reason stays.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(Arc<AtomicU8>);

impl Stop {
    fn set(&self, why: u8) {
        // Somebody else was first: that is the reason then.
        self.0
            .compare_exchange(GO_ON, why, Ordering::AcqRel, Ordering::Acquire)
            .ok();
    }

    /// It was asked for.
    pub(super) fn terminate(&self) {
        self.set(TERMINATED);
    }

    /// The time is up.
    pub(super) fn time_out(&self) {
        self.set(TIMED_OUT);
    }

    /// The agent is being stopped; what is under way is taken up by its next life.
    pub(super) fn pause(&self) {
        self.set(PAUSED);
    }

    /// Whether it is to be taken up later: then there is no end to report.
    pub(super) fn is_paused(&self) -> bool {
        self.0.load(Ordering::Acquire) == PAUSED
    }

    /// Goes on, or says why not.
    ///
    /// # Errors
    /// What the row is to say.
    pub(super) fn check(&self) -> Result<(), Failed> {
        match self.0.load(Ordering::Acquire) {
            GO_ON => Ok(()),
            PAUSED => Err(Failed::new(Inner::System, "the agent is being stopped")),
            TERMINATED => Err(Failed::new(Inner::Terminated, "stopped on request")),
            _ => Err(Failed::new(Inner::Timeout, "not finished in the time that was given")),
        }
    }
}
