//! What is known of the rows of file tasks, and what they add up to. Pure; asking and printing are left to [`super`].

use gse_proto::codes::Inner;
use gse_proto::http::TransferRow;
use serde::Serialize;

use crate::ids;
use crate::outcome::{EXIT_OK, EXIT_SOME_FAILED, EXIT_TIMEOUT};
use crate::text::one_line;

/// Different reasons that a summary lists.
const MAX_REASONS: usize = 100;
const OTHER_REASONS: &str = "other reasons; --output json has them all";

/// Whether a row will not change any more.
#[must_use]
pub fn is_over(row: &TransferRow) -> bool {
    row.error_code != Inner::Running.code()
}

/// How far everything is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Downloads.
    pub rows: u64,
    /// Those that are over.
    pub over: u64,
    /// Those that are over and failed.
    pub failed: u64,
    /// Bytes that all of them are to have.
    pub bytes: u64,
    /// Bytes that they have.
    pub moved: u64,
    /// Bytes a second, those under way together.
    pub rate: u64,
}

/// Adds downloads up; uploads say nothing that they do not.
#[must_use]
pub fn totals(rows: &[TransferRow]) -> Totals {
    let mut totals = Totals::default();
    for row in rows.iter().filter(|row| row.content.mode == 1) {
        let content = &row.content;
        totals.rows += 1;
        if is_over(row) {
            totals.over += 1;
            totals.failed += u64::from(row.error_code != 0);
        } else {
            totals.rate = totals.rate.saturating_add(content.speed.saturating_mul(1024));
        }
        if row.error_code == 0 || !is_over(row) {
            totals.bytes = totals.bytes.saturating_add(content.size);
            let moved = u128::from(content.size) * u128::from(content.progress.min(100)) / 100;
            totals.moved = totals.moved.saturating_add(u64::try_from(moved).unwrap_or(u64::MAX));
        }
    }
    totals
}

/// A number of bytes for people.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// What a row is about, for a person: the file, and where it goes if there is more than one.
fn file(row: &TransferRow) -> String {
    let content = &row.content;
    let (dir, name) = if content.source_file_dir.is_empty() {
        (&content.dest_file_dir, &content.dest_file_name)
    } else {
        (&content.source_file_dir, &content.source_file_name)
    };
    format!("{}/{name}", dir.trim_end_matches('/'))
}

fn why(row: &TransferRow) -> String {
    let message = if row.error_msg.is_empty() {
        Inner::ALL
            .iter()
            .find(|inner| inner.code() == row.error_code)
            .map_or("no message", |inner| inner.text())
            .to_owned()
    } else {
        one_line(&row.error_msg)
    };
    format!("error {}: {message}", row.error_code)
}

/// Lines that say how it went, and what went wrong where.
#[must_use]
pub fn summary(rows: &[TransferRow]) -> Vec<String> {
    let all = totals(rows);
    let succeeded = all.over - all.failed;
    let mut text = format!("gse: {succeeded} of {} copies made", all.rows);
    if all.failed > 0 {
        text += &format!(", {} failed", all.failed);
    }
    if all.over < all.rows {
        text += &format!(", {} still under way", all.rows - all.over);
    }
    let mut lines = vec![text];
    let mut reasons: Vec<(String, Vec<&str>)> = Vec::new();
    for row in rows.iter().filter(|row| is_over(row) && row.error_code != 0) {
        let who = match row.content.mode {
            0 => &row.content.source_agent_id,
            _ => &row.content.dest_agent_id,
        };
        let mut reason = format!("{}: {}", one_line(&file(row)), why(row));
        let known =
            |reasons: &[(String, Vec<&str>)], reason: &str| reasons.iter().position(|(other, _)| other == reason);
        if reasons.len() >= MAX_REASONS && known(&reasons, &reason).is_none() {
            OTHER_REASONS.clone_into(&mut reason);
        }
        match known(&reasons, &reason) {
            Some(at) => reasons[at].1.push(who),
            None => reasons.push((reason, vec![who])),
        }
    }
    reasons.sort_by_key(|(_, ids)| std::cmp::Reverse(ids.len()));
    for (reason, who) in reasons {
        let list = one_line(&ids::fold(who.iter().copied()));
        let count = if who.len() > 1 {
            format!(" ({})", who.len())
        } else {
            String::new()
        };
        lines.push(format!("  {list}{count}: {reason}"));
    }
    lines
}

/// 0 when all copies were made, 124 when nothing but time-outs went wrong, 1 otherwise.
#[must_use]
pub fn exit_status(rows: &[TransferRow]) -> u8 {
    let mut bad = rows.iter().filter(|row| row.error_code != 0).peekable();
    if bad.peek().is_none() {
        EXIT_OK
    } else if bad.all(|row| row.error_code == Inner::Timeout.code()) {
        EXIT_TIMEOUT
    } else {
        EXIT_SOME_FAILED
    }
}

/// The result as JSON.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    /// The tasks.
    pub task_ids: &'a [String],
    /// What the command ends with.
    pub exit_status: u8,
    /// All rows.
    pub rows: &'a [TransferRow],
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::http::TransferContent;

    fn row(mode: u8, to: &str, code: i32, progress: u32) -> TransferRow {
        TransferRow {
            error_code: code,
            error_msg: if code == 705 { "no\nroom".into() } else { String::new() },
            content: TransferContent {
                mode,
                source_agent_id: "src".into(),
                source_file_dir: "/d".into(),
                source_file_name: "f".into(),
                dest_agent_id: to.into(),
                progress,
                size: 2048,
                speed: 3,
                ..TransferContent::default()
            },
        }
    }

    #[test]
    fn rows_add_up() {
        let rows = [
            row(0, "", 115, 50),
            row(1, "a", 0, 100),
            row(1, "b", 115, 50),
            row(1, "c", 705, 10),
        ];
        assert_eq!(
            totals(&rows),
            Totals {
                rows: 3,
                over: 2,
                failed: 1,
                bytes: 4096,
                moved: 3072,
                rate: 3072
            }
        );
        assert_eq!(exit_status(&rows), 1);
        assert_eq!(exit_status(&[row(1, "a", 0, 100)]), 0);
        assert_eq!(exit_status(&[row(1, "a", 0, 100), row(1, "b", 120, 1)]), 124);
        assert_eq!((bytes(1000).as_str(), bytes(1536).as_str()), ("1000 B", "1.5 KiB"));
    }

    #[test]
    fn failures_are_grouped() {
        let rows = [
            row(1, "0:10.0.0.1", 117, 0),
            row(1, "0:10.0.0.2", 117, 0),
            row(1, "0:10.0.0.3", 705, 0),
            row(1, "0:10.0.0.4", 0, 100),
        ];
        assert_eq!(
            summary(&rows),
            [
                "gse: 1 of 4 copies made, 3 failed",
                "  0:10.0.0.[1-2] (2): /d/f: error 117: agent offline or unknown",
                "  0:10.0.0.3: /d/f: error 705: no; room",
            ]
        );
    }
}
