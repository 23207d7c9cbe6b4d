//! Wall-clock reading in one place. Deadlines that matter are kept on the store's side as unix milliseconds of the servers'
//! clock; anything measured inside the process uses `Instant`.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix milliseconds now.
#[must_use]
pub fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}
