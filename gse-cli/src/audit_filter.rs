//! Which lines of the audit trail are asked for.

use anyhow::bail;
use gse_core::audit::{Decision, Record};

use crate::args::AuditArgs;
use crate::duration;

/// What a line has to be like. Names are compared whole.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    apps: Vec<String>,
    tasks: Vec<String>,
    agents: Vec<String>,
    operations: Vec<String>,
    refused: bool,
    since: Option<jiff::Timestamp>,
    until: Option<jiff::Timestamp>,
}

impl Filter {
    /// From the command line.
    ///
    /// # Errors
    /// A time is not one.
    pub(crate) fn new(args: &AuditArgs) -> anyhow::Result<Self> {
        let now = jiff::Timestamp::now();
        Ok(Filter {
            apps: args.apps.clone(),
            tasks: args.tasks.clone(),
            agents: args.agents.clone(),
            operations: args.operations.clone(),
            refused: args.refused,
            since: args.since.as_deref().map(|text| time(text, now)).transpose()?,
            until: args.until.as_deref().map(|text| time(text, now)).transpose()?,
        })
    }

    /// Everything but the agents, see [`Filter::names_agent`].
    #[must_use]
    pub(crate) fn matches(&self, record: &Record, at: jiff::Timestamp) -> bool {
        let entry = &record.entry;
        let one_of = |wanted: &[String], value: &str| wanted.is_empty() || wanted.iter().any(|name| name == value);
        one_of(&self.apps, &entry.app)
            && one_of(&self.operations, &entry.operation)
            && one_of(&self.tasks, entry.task_id.as_deref().unwrap_or_default())
            && (!self.refused || entry.decision != Decision::Allowed)
            && self.since.is_none_or(|since| at >= since)
            && self.until.is_none_or(|until| at < until)
    }

    /// Whether the line is about one of the agents that are asked for; none when it does not name all its targets and so cannot tell.
    #[must_use]
    pub(crate) fn names_agent(&self, record: &Record) -> Option<bool> {
        let entry = &record.entry;
        let named = |agent: &String| entry.first_targets.contains(agent);
        if self.agents.is_empty() || self.agents.iter().any(named) {
            Some(true)
        } else if entry.targets > entry.first_targets.len() as u64 {
            None
        } else {
            Some(false)
        }
    }
}

/// A time as people write it: RFC 3339, a date with or without a time in UTC, or how long ago.
fn time(text: &str, now: jiff::Timestamp) -> anyhow::Result<jiff::Timestamp> {
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(time);
    }
    if let Ok(time) = text.parse::<jiff::civil::DateTime>()
        && let Ok(zoned) = time.to_zoned(jiff::tz::TimeZone::UTC)
    {
        return Ok(zoned.timestamp());
    }
    if let Ok(seconds) = duration::seconds(text)
        && let Ok(time) = now.checked_sub(jiff::SignedDuration::from_secs(i64::from(seconds)))
    {
        return Ok(time);
    }
    bail!("\"{text}\" is no time; write 2026-01-31T12:00:00Z, 2026-01-31 12:00 (UTC), or how long ago: 90s, 2h, 1d")
}

#[cfg(test)]
mod tests {
    use gse_core::audit::Entry;

    use super::*;

    #[test]
    fn times_as_people_write_them() {
        let now: jiff::Timestamp = "2026-02-01T00:00:00Z".parse().unwrap();
        for (text, wanted) in [
            ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z"),
            ("2026-01-31T12:00:00+08:00", "2026-01-31T04:00:00Z"),
            ("2026-01-31 12:00", "2026-01-31T12:00:00Z"),
            ("2026-01-31", "2026-01-31T00:00:00Z"),
            ("2h", "2026-01-31T22:00:00Z"),
        ] {
            assert_eq!(time(text, now).unwrap().to_string(), wanted, "{text}");
        }
        for wrong in ["", "yesterday", "2026-13-01", "-5m"] {
            assert!(time(wrong, now).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_are_compared_whole_and_what_a_line_does_not_say_is_not_guessed() {
        let record = |targets: usize| Record {
            seq: 1,
            time: String::new(),
            line: String::new(),
            entry: Entry {
                app: "job".into(),
                operation: "script.execute".into(),
                ..Entry::default()
            }
            .with_targets((0..targets).map(|n| ["a", "b", "c"][n % 3])),
        };
        let filter = |apps: &[&str], agents: &[&str]| Filter {
            apps: apps.iter().map(|app| (*app).to_owned()).collect(),
            agents: agents.iter().map(|agent| (*agent).to_owned()).collect(),
            ..Filter::default()
        };
        let at = jiff::Timestamp::UNIX_EPOCH;
        assert!(filter(&["job"], &[]).matches(&record(1), at));
        assert!(!filter(&["jo", "jobs"], &[]).matches(&record(1), at));
        assert_eq!(filter(&[], &["b"]).names_agent(&record(2)), Some(true));
        assert_eq!(filter(&[], &["z"]).names_agent(&record(2)), Some(false));
        assert_eq!(filter(&[], &["z"]).names_agent(&record(20)), None);
    }
}
