//! Times for people.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix milliseconds.
#[must_use]
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|past| u64::try_from(past.as_millis()).ok())
        .unwrap_or_default()
}

/// A time in UTC, to the second.
#[must_use]
pub fn utc(ms: u64) -> String {
    i64::try_from(ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(
            || format!("{ms} ms"),
            |time| time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
        )
}

/// How long ago `ms` was, in one unit.
#[must_use]
pub fn ago(ms: u64, now: u64) -> String {
    if ms == 0 {
        return "never".to_owned();
    }
    let seconds = now.saturating_sub(ms) / 1000;
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86_400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_people_say_it() {
        let now = 1_700_000_000_000;
        assert_eq!(ago(0, now), "never");
        assert_eq!(ago(now + 5, now), "0 s ago");
        assert_eq!(ago(now - 59_999, now), "59 s ago");
        assert_eq!(ago(now - 3_600_000, now), "1 h ago");
        assert_eq!(ago(now - 200_000_000, now), "2 d ago");
        assert_eq!(utc(now), "2023-11-14 22:13:20 UTC");
        assert_eq!(utc(u64::MAX), format!("{} ms", u64::MAX));
    }
}
