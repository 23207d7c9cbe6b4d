//! What is known of the rows of file tasks, and what they add up to. Pure; asking and printing are left to [`super`].

use std::collections::HashMap;

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use gse_proto::codes::Inner;
use gse_proto::http::TransferRow;
use serde::Serialize;

use crate::ids;
use crate::outcome::{EXIT_OK, EXIT_SOME_FAILED, EXIT_TIMEOUT};
use crate::text::one_line;

/// Rows that a table lists.
const MAX_ROWS: usize = 1000;
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

impl Totals {
    /// Adds a download.
    fn add(&mut self, row: &TransferRow) {
        let content = &row.content;
        self.rows += 1;
        if is_over(row) {
            self.over += 1;
            self.failed += u64::from(row.error_code != 0);
        } else {
            self.rate = self.rate.saturating_add(content.speed.saturating_mul(1024));
        }
        if row.error_code == 0 || !is_over(row) {
            self.bytes = self.bytes.saturating_add(content.size);
            let moved = u128::from(content.size) * u128::from(content.progress.min(100)) / 100;
            self.moved = self.moved.saturating_add(u64::try_from(moved).unwrap_or(u64::MAX));
        }
    }
}

/// Adds downloads up; uploads say nothing that they do not.
#[must_use]
pub fn totals(rows: &[TransferRow]) -> Totals {
    let mut totals = Totals::default();
    downloads(rows).for_each(|row| totals.add(row));
    totals
}

/// The same for each target, in the order in which they first appear.
#[must_use]
pub fn by_target(rows: &[TransferRow]) -> Vec<(&str, Totals)> {
    let mut targets: Vec<(&str, Totals)> = Vec::new();
    let mut known: HashMap<&str, usize> = HashMap::new();
    for row in downloads(rows) {
        let id = row.content.dest_agent_id.as_str();
        let at = *known.entry(id).or_insert_with(|| {
            targets.push((id, Totals::default()));
            targets.len() - 1
        });
        targets[at].1.add(row);
    }
    targets
}

fn downloads(rows: &[TransferRow]) -> impl Iterator<Item = &TransferRow> {
    rows.iter().filter(|row| row.content.mode == 1)
}

/// A length of time for people, in two units at most.
#[must_use]
pub fn time(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// Copies made, rate and time left.
#[must_use]
pub fn progress(totals: &Totals) -> String {
    let mut text = format!("{}/{} copies", totals.over, totals.rows);
    if totals.failed > 0 {
        text += &format!(", {} failed", totals.failed);
    }
    if totals.rate > 0 {
        let left_s = totals.bytes.saturating_sub(totals.moved).div_ceil(totals.rate);
        text += &format!(", {}/s, {} left", bytes(totals.rate), time(left_s));
    }
    text
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

/// What a row says now, in a few words.
fn state(row: &TransferRow) -> String {
    match row.error_code {
        0 => "done".to_owned(),
        _ if is_over(row) => why(row),
        _ if row.content.status_info.is_empty() => "under way".to_owned(),
        _ => one_line(&row.content.status_info),
    }
}

/// The rows as a table; true when there are more than it holds.
#[must_use]
pub fn table(rows: &[TransferRow]) -> (Table, bool) {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .force_no_tty()
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(["", "AGENT", "FILE", "SIZE", "DONE", "RATE", "STATE"]);
    for row in rows.iter().take(MAX_ROWS) {
        let content = &row.content;
        let (kind, agent, dir, name) = match content.mode {
            0 => (
                "from",
                &content.source_agent_id,
                &content.source_file_dir,
                &content.source_file_name,
            ),
            _ => (
                "to",
                &content.dest_agent_id,
                &content.dest_file_dir,
                &content.dest_file_name,
            ),
        };
        let rate = match content.speed {
            _ if is_over(row) => String::new(),
            speed => format!("{}/s", bytes(speed.saturating_mul(1024))),
        };
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        table.add_row([
            Cell::new(kind),
            Cell::new(one_line(agent)),
            Cell::new(one_line(&format!("{}/{name}", dir.trim_end_matches('/')))),
            right(bytes(content.size)),
            right(format!("{}%", content.progress)),
            right(rate),
            Cell::new(state(row)),
        ]);
    }
    (table, rows.len() > MAX_ROWS)
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
    fn progress_says_how_long_it_takes() {
        let totals = Totals {
            rows: 4,
            over: 1,
            failed: 1,
            bytes: 10 << 20,
            moved: 4 << 20,
            rate: 2 << 20,
        };
        assert_eq!(progress(&totals), "1/4 copies, 1 failed, 2.0 MiB/s, 3 s left");
        assert_eq!(progress(&Totals::default()), "0/0 copies");
        assert_eq!(
            [time(59), time(60), time(3599), time(3660)],
            ["59 s", "1 min 0 s", "59 min 59 s", "1 h 1 min"]
        );
    }

    #[test]
    fn targets_add_up_each_on_its_own() {
        let rows = [
            row(0, "", 115, 50),
            row(1, "b", 115, 50),
            row(1, "a", 0, 100),
            row(1, "b", 0, 100),
        ];
        let targets = by_target(&rows);
        let moved: Vec<_> = targets.iter().map(|(id, t)| (*id, t.rows, t.over, t.moved)).collect();
        assert_eq!(moved, [("b", 2, 1, 3072), ("a", 1, 1, 2048)]);
    }

    #[test]
    fn rows_stand_in_a_table() {
        let mut to = row(1, "0:10.0.0.1", 115, 50);
        to.content.dest_file_dir = "/to/".into();
        to.content.dest_file_name = "f\n".into();
        let rows = [row(0, "", 0, 100), to, row(1, "b", 705, 0)];
        let (table, more) = table(&rows);
        let text = crate::agents::trimmed(&table);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["AGENT", "FILE", "SIZE", "DONE", "RATE", "STATE"]);
        assert_eq!(lines[1], ["from", "src", "/d/f", "2.0", "KiB", "100%", "done"]);
        assert_eq!(
            lines[2],
            [
                "to",
                "0:10.0.0.1",
                "/to/f",
                "2.0",
                "KiB",
                "50%",
                "3.0",
                "KiB/s",
                "under",
                "way"
            ]
        );
        assert!(text.contains("error 705: no; room") && !more, "{text}");
        let many = vec![row(1, "b", 0, 100); MAX_ROWS + 1];
        assert!(super::table(&many).1);
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
