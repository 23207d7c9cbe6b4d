//! Unix signals as calls on the [`Lifecycle`]: SIGTERM and SIGINT drain, a second one leaves at once, SIGHUP and signal 36 reload.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::lifecycle::Lifecycle;
use crate::log;

/// The real-time signal (SIGRTMIN+2 where the C library keeps two for itself) that existing tools send to reload.
const RELOAD_REALTIME: i32 = 36;

/// The signals of the process, caught from the moment this is made.
pub struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
    realtime: Signal,
}

impl Signals {
    /// Starts to catch signals; must be called within a Tokio runtime.
    ///
    /// # Errors
    /// The system refuses a handler.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            hup: signal(SignalKind::hangup())?,
            realtime: signal(SignalKind::from_raw(RELOAD_REALTIME))?,
        })
    }
}

impl std::fmt::Debug for Signals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signals")
    }
}

/// Translates signals for as long as it is polled; ends after the one that aborts.
pub async fn handle_signals(mut signals: Signals, life: Lifecycle) {
    loop {
        let stop = tokio::select! {
            _ = signals.term.recv() => true,
            _ = signals.int.recv() => true,
            _ = signals.hup.recv() => false,
            _ = signals.realtime.recv() => false,
        };
        if !stop {
            if let Err(error) = log::reopen() {
                tracing::error!("{error:#}; logging goes on into the old file");
            }
            life.reload();
        } else if life.is_draining() {
            tracing::warn!("told to stop again: leaving at once");
            life.abort();
            return;
        } else {
            life.drain();
        }
    }
}
