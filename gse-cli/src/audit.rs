//! `gse audit`: what was asked for, by whom, and what was decided; and whether the lines still stand as they were written.
//!
//! Works on files, without any server: a trail is evidence about the servers too. How a trail is written and chained is `gse-core`'s.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use gse_core::audit::{BadLine, Decision, Reader, Record, Report, VerifyError, find, verify_all};

use crate::args::{AuditArgs, AuditCommand, DataDir, ListFormat};
use crate::outcome::{EXIT_OK, EXIT_SOME_FAILED};
use crate::text::one_line;
use crate::{audit_filter::Filter, client, out};

/// How often new lines are looked for.
const FOLLOW_EVERY: Duration = Duration::from_millis(300);
/// Pause before a trail is checked again that was put aside while it was read.
const SECOND_LOOK: Duration = Duration::from_millis(300);
/// Ids in the column of targets.
const SHOWN_TARGETS: usize = 2;

const HEADER: &str =
    "TIME                 DECISION         APPLICATION       OPERATION           TASK AND TARGETS, ACCOUNTS, FROM, WHY";

/// Shows or checks trails; gives the exit status.
///
/// # Errors
/// A path cannot be read, or nothing can be printed.
pub async fn run(args: &AuditArgs) -> anyhow::Result<u8> {
    match &args.what {
        Some(AuditCommand::Verify { paths, data }) => verify(data, paths).await,
        None => show(args).await,
    }
}

/// The trails that are meant.
fn trails(data: &DataDir, paths: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let default = match paths {
        [] => vec![client::data_dir(data)?.join("log")],
        _ => vec![],
    };
    let paths = if paths.is_empty() { &default[..] } else { paths };
    let mut found = Vec::new();
    for path in paths {
        let trails = find(path).with_context(|| format!("cannot read {}", path.display()))?;
        if trails.is_empty() {
            bail!("{} holds no audit trail", path.display());
        }
        for trail in trails {
            if !found.contains(&trail) {
                found.push(trail);
            }
        }
    }
    Ok(found)
}

/// Checks every trail and says what was found.
///
/// # Errors
/// A path cannot be read.
async fn verify(data: &DataDir, paths: &[PathBuf]) -> anyhow::Result<u8> {
    let mut reports: Vec<(PathBuf, Result<Report, VerifyError>)> = Vec::new();
    for trail in trails(data, paths)? {
        let mut report = check(&trail).await?;
        if report.is_err() {
            // A running process may have been in the middle of a line, or have put its file aside between two of ours.
            tokio::time::sleep(SECOND_LOOK).await;
            report = check(&trail).await?;
        }
        reports.push((trail, report));
    }
    let mut status = EXIT_OK;
    let mut text = String::new();
    for (trail, report) in &reports {
        match report {
            Ok(report) => text.push_str(&format!("{}: {}\n", trail.display(), in_order(report, trail, &reports))),
            Err(error) => {
                status = EXIT_SOME_FAILED;
                text.push_str(&format!("{}: BROKEN: {error}\n", trail.display()));
            }
        }
    }
    out::print(&text)?;
    Ok(status)
}

async fn check(trail: &Path) -> anyhow::Result<Result<Report, VerifyError>> {
    let trail = trail.to_owned();
    Ok(tokio::task::spawn_blocking(move || verify_all(&trail)).await?)
}

fn in_order(report: &Report, trail: &Path, all: &[(PathBuf, Result<Report, VerifyError>)]) -> String {
    if report.lines == 0 {
        return "in order, no line yet".to_owned();
    }
    let mut text = format!(
        "in order, {} line{}, number {} to {}, last hash {}",
        report.lines,
        if report.lines == 1 { "" } else { "s" },
        report.first_seq,
        report.last_seq,
        report.last_hash
    );
    if report.first_seq > 1 {
        let before = all.iter().find(|(other, found)| {
            other != trail
                && found
                    .as_ref()
                    .is_ok_and(|found| found.last_hash == report.prev && found.last_seq + 1 == report.first_seq)
        });
        match before {
            Some((other, _)) => text.push_str(&format!("; goes on from {}", other.display())),
            None => text.push_str("; what was before is not here"),
        }
    }
    text
}

/// Shows the lines that are asked for.
///
/// # Errors
/// A file cannot be read, or nothing can be printed.
async fn show(args: &AuditArgs) -> anyhow::Result<u8> {
    let filter = Filter::new(args)?;
    let mut readers = Vec::new();
    for trail in trails(&args.data, &args.paths)? {
        let reader = Reader::new(&trail).with_context(|| format!("cannot read {}", trail.display()))?;
        readers.push(reader);
    }
    let keep = args.last;
    let (mut read, mut found) = gather(readers, filter.clone(), keep).await?;
    if found.left_out > 0 {
        out::note(&format!(
            "gse: {} older lines are not shown; --last 0 shows all",
            found.left_out
        ));
    }
    if args.output == ListFormat::Table && (args.follow || !found.lines.is_empty()) {
        out::print(&format!("{HEADER}\n"))?;
    } else if args.output == ListFormat::Table {
        out::note("gse: no such line");
    }
    let mut status = EXIT_OK;
    loop {
        let mut text = String::new();
        for (_, record) in &found.lines {
            match args.output {
                ListFormat::Json => text.push_str(&record.line),
                ListFormat::Table => text.push_str(&row(record)),
            }
            text.push('\n');
        }
        out::print(&text)?;
        for bad in &found.bad {
            status = EXIT_SOME_FAILED;
            out::note(&format!("gse: {bad}; gse audit verify says more"));
        }
        if found.unsure > 0 {
            out::note(&format!(
                "gse: {} more calls went to so many targets that their lines do not name all; any of them may concern the agent (see gse task)",
                found.unsure
            ));
        }
        if !args.follow {
            return Ok(status);
        }
        tokio::select! {
            () = tokio::time::sleep(FOLLOW_EVERY) => {}
            _ = tokio::signal::ctrl_c() => return Ok(status),
        }
        (read, found) = gather(read, filter.clone(), 0).await?;
    }
}

/// What one look at the trails has given.
#[derive(Default)]
struct Found {
    /// In the order of their times.
    lines: VecDeque<(jiff::Timestamp, Record)>,
    left_out: u64,
    bad: Vec<BadLine>,
    /// Lines that cannot tell whether they are about an agent that was asked for.
    unsure: u64,
}

/// More bad lines than anybody reads.
const MAX_BAD: usize = 20;

async fn gather(mut readers: Vec<Reader>, filter: Filter, keep: usize) -> anyhow::Result<(Vec<Reader>, Found)> {
    let work = move || -> anyhow::Result<_> {
        let mut found = Found::default();
        let mut heads: Vec<Option<(jiff::Timestamp, Record)>> = Vec::new();
        for reader in &mut readers {
            heads.push(next(reader, &filter, &mut found)?);
        }
        // Each trail is in order by itself; the oldest of all heads is next.
        while let Some(at) = (0..heads.len())
            .filter(|at| heads[*at].is_some())
            .min_by_key(|at| heads[*at].as_ref().map(|(time, _)| *time))
        {
            found.lines.extend(heads[at].take());
            if keep > 0 && found.lines.len() > keep {
                found.lines.pop_front();
                found.left_out += 1;
            }
            heads[at] = next(&mut readers[at], &filter, &mut found)?;
        }
        Ok((readers, found))
    };
    tokio::task::spawn_blocking(work).await?
}

fn next(reader: &mut Reader, filter: &Filter, found: &mut Found) -> anyhow::Result<Option<(jiff::Timestamp, Record)>> {
    while let Some(line) = reader.next_line().context("cannot read an audit file")? {
        match line {
            Ok(record) => {
                let time = record.time.parse().unwrap_or(jiff::Timestamp::UNIX_EPOCH);
                if !filter.matches(&record, time) {
                    continue;
                }
                match filter.names_agent(&record) {
                    Some(true) => return Ok(Some((time, record))),
                    Some(false) => {}
                    None => found.unsure += 1,
                }
            }
            Err(bad) if found.bad.len() < MAX_BAD => found.bad.push(bad),
            Err(_) => {}
        }
    }
    Ok(None)
}

/// A line for people.
fn row(record: &Record) -> String {
    let entry = &record.entry;
    let time = record.time.get(..19).unwrap_or(&record.time).replace('T', " ");
    let decision = match entry.decision {
        Decision::Allowed => "allowed",
        Decision::Refused => "REFUSED",
        Decision::Unauthenticated => "UNAUTHENTICATED",
    };
    let app = match &entry.username {
        Some(user) => format!("{} ({user})", entry.app),
        None => entry.app.clone(),
    };
    let mut parts = Vec::new();
    parts.extend(entry.task_id.clone());
    if entry.targets > 0 {
        let mut targets = entry
            .first_targets
            .iter()
            .take(SHOWN_TARGETS)
            .cloned()
            .collect::<Vec<_>>();
        let more = entry.targets.saturating_sub(targets.len() as u64);
        if more > 0 {
            targets.push(format!("and {more} more"));
        }
        parts.push(format!("on {}", targets.join(" ")));
    }
    if !entry.accounts.is_empty() {
        parts.push(format!("as {}", entry.accounts.join(" ")));
    }
    if !entry.peer.is_empty() {
        parts.push(format!("from {} by {}", entry.peer, entry.via));
    }
    if let Some(reason) = &entry.reason {
        parts.push(format!("because: {reason}"));
    }
    format!(
        "{:<20} {decision:<16} {:<17} {:<19} {}",
        one_line(&time),
        one_line(&app),
        one_line(&entry.operation),
        one_line(&parts.join(", "))
    )
}
