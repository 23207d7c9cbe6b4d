//! Scripts that leave a mark on the host each time they are run, so that a test can tell how often that was.

use std::collections::BTreeMap;
use std::path::Path;

/// A script that adds a line to `file`, says "begun", takes `seconds`, says "end" and exits with `exit`.
///
/// The line names who ran it: the command line of the agent's runner above it, which holds the agent's data directory and the target.
/// So one file counts the runs of many agents on this one host.
#[must_use]
pub fn counting(file: &Path, seconds: f64, exit: i32) -> String {
    format!(
        r#"#!/bin/bash
who=$$ line=nobody
for _ in 1 2 3 4; do
    who=$(awk '{{print $4}}' /proc/$who/stat)
    line=$(tr '\0' ' ' < /proc/$who/cmdline)
    case "$line" in *" run "*) break ;; esac
done
echo "$line" >> {}
echo begun
sleep {seconds}
echo end
exit {exit}
"#,
        file.display()
    )
}

/// How many runs are noted in `file`.
#[must_use]
pub fn runs(file: &Path) -> usize {
    std::fs::read_to_string(file).map_or(0, |text| text.lines().count())
}

/// Who has run it, and how often.
#[must_use]
pub fn runs_by_target(file: &Path) -> BTreeMap<String, usize> {
    let mut runs = BTreeMap::new();
    for line in std::fs::read_to_string(file).unwrap_or_default().lines() {
        *runs.entry(line.to_owned()).or_default() += 1;
    }
    runs
}
