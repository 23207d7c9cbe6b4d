//! What a running task looks like: live lines, the progress bar, and the result at the end.
//!
//! Standard output carries the result and standard error what happens meanwhile, so that a pipe gets each output once. With one
//! target its output is the result and is printed as it comes.

use std::collections::HashMap;
use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::board::{Board, News};
use crate::outcome::Outcome;
use crate::text::{Escaper, escape};
use crate::{fold, ids, out};

/// A line that does not end is printed in pieces of this size.
const MAX_LINE: usize = 64 * 1024;

/// How to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One target: its output as it comes.
    Single,
    /// Several targets: lines on standard error as they come, folded outputs at the end.
    Fold {
        /// Whether there are lines before the end.
        live: bool,
    },
    /// Several targets: lines on standard output as they come.
    Lines,
    /// Nothing before the end, then one JSON document.
    Json,
}

/// Shows one task.
pub struct Show {
    mode: Mode,
    colour: bool,
    bar: Option<ProgressBar>,
    /// Beginnings of lines that are not complete, by target.
    held: HashMap<usize, String>,
    /// For the one target.
    escaper: Escaper,
    ends_with_newline: bool,
    failed: u64,
}

impl Show {
    /// Nothing has happened yet.
    #[must_use]
    pub fn new(mode: Mode, colour: bool, targets: usize) -> Self {
        let wants_bar = mode != Mode::Single && targets > 1 && std::io::stderr().is_terminal();
        let bar = wants_bar.then(|| {
            let bar = ProgressBar::new(targets as u64);
            let style = ProgressStyle::with_template("{elapsed_precise} [{bar:30}] {pos}/{len} {msg}");
            bar.with_style(
                style
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .progress_chars("=> "),
            )
        });
        Self {
            mode,
            colour,
            bar,
            held: HashMap::new(),
            escaper: Escaper::new(out::stdout_escape(colour)),
            ends_with_newline: true,
            failed: 0,
        }
    }

    /// Shows what a row has changed.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn news(&mut self, board: &Board, news: &News) -> std::io::Result<()> {
        let target = &board.targets()[news.target];
        match self.mode {
            Mode::Single => {
                let text = self.escaper.push(&news.piece);
                if let Some(last) = text.chars().next_back() {
                    self.ends_with_newline = last == '\n';
                    out::print(&text)?;
                }
            }
            Mode::Fold { live: true } | Mode::Lines => {
                let mut line = self.held.remove(&news.target).unwrap_or_default();
                line.push_str(&news.piece);
                let whole = match line.rfind('\n') {
                    Some(at) => at + 1,
                    None if news.ended || line.len() > MAX_LINE => line.len(),
                    None => 0,
                };
                let rest = line.split_off(if news.ended { line.len() } else { whole });
                if !rest.is_empty() {
                    self.held.insert(news.target, rest);
                }
                let id = crate::text::one_line(&target.id);
                let text: String = line.lines().map(|line| format!("{id}: {line}\n")).collect();
                self.lines(&text)?;
            }
            Mode::Fold { live: false } | Mode::Json => {}
        }
        if news.ended {
            self.failed += u64::from(!target.outcome.is_success());
            if let Some(bar) = &self.bar {
                bar.inc(1);
                if self.failed > 0 {
                    bar.set_message(format!("done, {} failed", self.failed));
                }
            }
        }
        Ok(())
    }

    fn lines(&self, text: &str) -> std::io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let print = || match self.mode {
            Mode::Lines => out::print(&escape(text, out::stdout_escape(self.colour))),
            _ => {
                out::note(escape(text, out::stderr_escape(self.colour)).trim_end_matches('\n'));
                Ok(())
            }
        };
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Tells the user something, beside the bar.
    pub fn note(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| out::note(line)),
            None => out::note(line),
        }
    }

    /// Shows the result.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn end(mut self, task_id: &str, board: &Board, exit_status: u8) -> anyhow::Result<()> {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        match self.mode {
            Mode::Json => return out::print_json(&Report::new(task_id, board, exit_status)),
            Mode::Single => {
                let rest = self.escaper.finish();
                let line_feed = self.ends_with_newline && (rest.is_empty() || rest.ends_with('\n'));
                // On a terminal the prompt or the summary would go on in the middle of the last line.
                let line_feed = if line_feed || !std::io::stdout().is_terminal() {
                    ""
                } else {
                    "\n"
                };
                out::print(&(rest + line_feed))?;
            }
            Mode::Fold { .. } => print_folded(board, self.colour)?,
            Mode::Lines => {}
        }
        for line in summary(board) {
            out::note(&line);
        }
        Ok(())
    }
}

/// Prints the outputs, equal ones once.
///
/// # Errors
/// The output cannot be written.
pub fn print_folded(board: &Board, colour: bool) -> std::io::Result<()> {
    let how = out::stdout_escape(colour);
    for group in fold::groups(
        board
            .targets()
            .iter()
            .map(|target| (target.id.as_str(), target.output.as_str())),
    ) {
        out::print(&escape(&group.heading(), how))?;
        out::print(&escape(group.output, how))?;
        out::print("\n")?;
    }
    Ok(())
}

/// Lines that say what went wrong, and with several targets how it went on the whole; none when one target succeeded.
#[must_use]
pub fn summary(board: &Board) -> Vec<String> {
    let targets = board.targets();
    let mut lines = Vec::new();
    if let [only] = targets {
        if !only.outcome.is_success() {
            lines.push(format!(
                "gse: {}: {}",
                crate::text::one_line(&only.id),
                only.outcome.describe()
            ));
        }
        return lines;
    }
    let succeeded = targets.iter().filter(|target| target.outcome.is_success()).count();
    let running = targets.iter().filter(|target| !target.outcome.is_over()).count();
    let failed = targets.len() - succeeded - running;
    let mut text = format!("gse: {succeeded} of {} targets succeeded", targets.len());
    if failed > 0 {
        text += &format!(", {failed} failed");
    }
    if running > 0 {
        text += &format!(", {running} still running");
    }
    lines.push(text);
    let mut reasons: Vec<(String, Vec<&str>)> = Vec::new();
    for target in targets
        .iter()
        .filter(|target| target.outcome.is_over() && !target.outcome.is_success())
    {
        let mut why = target.outcome.describe();
        let known = |reasons: &[(String, Vec<&str>)], why: &str| reasons.iter().position(|(reason, _)| reason == why);
        if reasons.len() >= MAX_REASONS && known(&reasons, &why).is_none() {
            // Every message may be another; a list that long says nothing.
            OTHER_REASONS.clone_into(&mut why);
        }
        match known(&reasons, &why) {
            Some(at) => reasons[at].1.push(&target.id),
            None => reasons.push((why, vec![&target.id])),
        }
    }
    reasons.sort_by_key(|(_, ids)| std::cmp::Reverse(ids.len()));
    for (why, failed) in reasons {
        let list = crate::text::one_line(&ids::fold(failed.iter().copied()));
        let count = if failed.len() > 1 {
            format!(" ({})", failed.len())
        } else {
            String::new()
        };
        lines.push(format!("  {list}{count}: {why}"));
    }
    lines
}

/// Different reasons that a summary lists.
const MAX_REASONS: usize = 100;
const OTHER_REASONS: &str = "other reasons; --output json has them all";

/// The result as JSON.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    task_id: &'a str,
    exit_status: u8,
    results: Vec<Row<'a>>,
}

#[derive(Debug, Serialize)]
struct Row<'a> {
    id: &'a str,
    state: &'static str,
    error_code: i32,
    error_msg: &'a str,
    exit_code: Option<i32>,
    start_time: u64,
    end_time: u64,
    tag: &'a str,
    output: &'a str,
}

impl<'a> Report<'a> {
    /// The rows as they stand.
    #[must_use]
    pub fn new(task_id: &'a str, board: &'a Board, exit_status: u8) -> Self {
        let results = board.targets().iter().map(|target| Row {
            id: &target.id,
            state: target.outcome.word(),
            error_code: target.row.error_code,
            error_msg: &target.row.error_msg,
            exit_code: matches!(target.outcome, Outcome::Succeeded | Outcome::Exited(_))
                .then_some(target.row.script_exit_code),
            start_time: target.row.start_time,
            end_time: target.row.end_time,
            tag: &target.row.tag,
            output: &target.output,
        });
        Self {
            task_id,
            exit_status,
            results: results.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::http::ScriptRow;

    fn board(rows: &[(&str, i32, i32, i32)]) -> Board {
        let mut board = Board::new(0, rows.iter().map(|row| row.0.to_owned()));
        for (id, error_code, status, exit) in rows {
            let row = ScriptRow {
                bk_agent_id: (*id).to_owned(),
                error_code: *error_code,
                status: *status,
                script_exit_code: *exit,
                error_msg: if *error_code == 117 {
                    "no\nsuch \x1b agent".into()
                } else {
                    String::new()
                },
                ..Default::default()
            };
            board.take(row);
        }
        board
    }

    #[test]
    fn failures_are_grouped_by_reason_and_made_harmless() {
        let board = board(&[
            ("0:10.0.0.1", 0, 2, 0),
            ("0:10.0.0.2", 117, 5, 1),
            ("0:10.0.0.3", 117, 5, 1),
            ("0:10.0.0.4", 0, 5, 3),
            ("0:10.0.0.5", 115, 1, 0),
        ]);
        assert_eq!(
            summary(&board),
            [
                "gse: 1 of 5 targets succeeded, 3 failed, 1 still running",
                "  0:10.0.0.[2-3] (2): error 117: no; such \\x1b agent",
                "  0:10.0.0.4: exit code 3",
            ]
        );
    }

    #[test]
    fn one_target_is_silent_on_success() {
        assert!(summary(&board(&[("a", 0, 2, 0)])).is_empty());
        assert_eq!(summary(&board(&[("a", 0, 5, 3)])), ["gse: a: exit code 3"]);
    }

    #[test]
    fn the_report_has_an_exit_code_only_where_something_ran_to_its_end() {
        let board = board(&[("a", 0, 5, 3), ("b", 117, 5, 1)]);
        let report = serde_json::to_value(Report::new("t", &board, 1)).unwrap();
        assert_eq!(report["results"][0]["exit_code"], 3);
        assert!(report["results"][1]["exit_code"].is_null());
        assert_eq!(report["results"][1]["state"], "failed");
        assert_eq!(report["exit_status"], 1);
    }
}
