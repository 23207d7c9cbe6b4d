//! The progress of a copy on a terminal: a bar for all of it, and one for each target that is not done. What the rows mean is left to
//! [`super::board`].

use std::io::IsTerminal;

use gse_proto::http::TransferRow;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::board::{Totals, by_target, progress, totals};
use crate::out;
use crate::text::one_line;

/// Targets with a bar of their own.
const MAX_BARS: usize = 10;

/// The progress of a command, on standard error; none where that is no terminal.
pub(super) struct Show {
    bars: Option<Bars>,
}

struct Bars {
    multi: MultiProgress,
    all: ProgressBar,
    each: Vec<ProgressBar>,
}

impl Show {
    pub(super) fn new(quiet: bool) -> Self {
        let bars = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let multi = MultiProgress::new();
            let all = multi.add(bar("{elapsed_precise} [{bar:30}] {percent:>3}% {msg}"));
            Bars {
                multi,
                all,
                each: Vec::new(),
            }
        });
        Self { bars }
    }

    /// Shows how far the rows are.
    pub(super) fn rows(&mut self, rows: &[TransferRow]) {
        if let Some(bars) = &mut self.bars {
            bars.rows(rows);
        }
    }

    /// A line above the bars.
    pub(super) fn note(&self, line: &str) {
        match &self.bars {
            Some(bars) => bars.multi.suspend(|| out::note(line)),
            None => out::note(line),
        }
    }

    /// Takes the bars away.
    pub(super) fn clear(&mut self) {
        if let Some(bars) = self.bars.take() {
            for bar in bars.each.iter().chain([&bars.all]) {
                bar.finish_and_clear();
            }
        }
    }
}

impl Bars {
    fn rows(&mut self, rows: &[TransferRow]) {
        let now = totals(rows);
        let targets = by_target(rows);
        let (shown, more) = match targets.len() {
            // The bar of all is that of the one.
            1 => (Vec::new(), 0),
            _ => unfinished(&targets),
        };
        while self.each.len() > shown.len() {
            if let Some(gone) = self.each.pop() {
                gone.finish_and_clear();
                self.multi.remove(&gone);
            }
        }
        while self.each.len() < shown.len() {
            self.each
                .push(self.multi.add(bar("         [{bar:30}] {percent:>3}% {msg}")));
        }
        let mut text = progress(&now);
        if more > 0 {
            text += &format!("; {more} more targets");
        }
        set(&self.all, &now, text);
        for (bar, (id, totals)) in self.each.iter().zip(shown) {
            set(bar, totals, format!("{}: {}", one_line(id), progress(totals)));
        }
    }
}

/// The first targets that are not done, and the number of the others that are not.
fn unfinished<'a>(targets: &'a [(&'a str, Totals)]) -> (Vec<&'a (&'a str, Totals)>, usize) {
    let mut left = targets.iter().filter(|(_, totals)| totals.over < totals.rows);
    let shown = left.by_ref().take(MAX_BARS).collect();
    (shown, left.count())
}

fn set(bar: &ProgressBar, totals: &Totals, text: String) {
    bar.set_length(totals.bytes.max(1));
    bar.set_position(totals.moved);
    bar.set_message(text);
}

fn bar(template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(1).with_style(style.progress_chars("=> "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(targets: usize, done: usize) -> Vec<TransferRow> {
        let row = |at: usize| {
            let mut row = TransferRow::default();
            row.content.mode = 1;
            row.content.size = 100;
            row.content.dest_agent_id = format!("a{at}");
            (row.error_code, row.content.progress) = if at < done { (0, 100) } else { (115, 50) };
            row
        };
        (0..targets).map(row).collect()
    }

    #[test]
    fn every_target_that_is_not_done_has_a_bar_up_to_a_number() {
        let rows = rows(15, 2);
        let targets = by_target(&rows);
        let (shown, more) = unfinished(&targets);
        assert_eq!((shown.len(), more), (MAX_BARS, 3));
        assert_eq!(shown[0].0, "a2");
    }

    #[test]
    fn bars_come_and_go_with_the_targets() {
        let multi = MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden());
        let all = multi.add(bar("{bar} {msg}"));
        let mut bars = Bars {
            multi,
            all,
            each: Vec::new(),
        };
        bars.rows(&rows(4, 1));
        assert_eq!(bars.each.len(), 3);
        assert_eq!(bars.each[0].message(), "a1: 0/1 copies");
        assert_eq!((bars.all.position(), bars.all.length()), (250, Some(400)));
        bars.rows(&rows(4, 3));
        assert_eq!(
            (bars.each.len(), bars.each[0].message().as_str()),
            (1, "a3: 0/1 copies")
        );
        bars.rows(&rows(4, 4));
        assert!(bars.each.is_empty());
        bars.rows(&rows(1, 0));
        assert!(bars.each.is_empty(), "one target is all there is");
    }
}
