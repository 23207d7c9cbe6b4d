//! Results for people (tables) and for programs (JSON).

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// Warnings of the programs' logs that are shown with tables; JSON has all.
const COMPLAINTS: usize = 8;

/// How results are wanted, on every measurement's command line.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ReportOptions {
    /// One JSON object in place of tables.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A table of a name and its values.
pub(crate) struct Section {
    title: String,
    table: Table,
}

impl Section {
    pub(crate) fn new(title: impl Into<String>, columns: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN).set_header(columns);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        Self {
            title: title.into(),
            table,
        }
    }

    pub(crate) fn row(&mut self, name: &str, values: impl IntoIterator<Item = String>) {
        let mut row = vec![name.to_owned()];
        row.extend(values);
        self.table.add_row(row);
    }
}

/// Prints the result in the form asked for.
///
/// # Errors
/// When it can't be written as JSON.
pub(crate) fn print(
    options: &ReportOptions,
    result: &impl Serialize,
    sections: &[Section],
    complaints: &[String],
) -> Result<()> {
    if options.json {
        println!("{}", serde_json::to_string_pretty(result)?);
    } else {
        for section in sections {
            println!("{}\n\n{}\n", section.title, section.table);
        }
        for complaint in complaints.iter().take(COMPLAINTS) {
            println!("{complaint}");
        }
    }
    Ok(())
}

/// A figure with one digit behind the point.
pub(crate) fn one(value: f64) -> String {
    format!("{value:.1}")
}

/// A whole figure.
pub(crate) fn whole(value: f64) -> String {
    format!("{value:.0}")
}
