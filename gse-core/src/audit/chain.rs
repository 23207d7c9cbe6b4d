//! The chain of hashes: how a line is sealed, and how a file is checked.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Entry;

/// `prev` of the very first line.
pub(super) const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// A sealed line is a few KiB at most; a longer one was not written by us.
pub(super) const MAX_LINE: u64 = 64 * 1024;
const SEAL: &str = ",\"hash\":\"";

/// What stands in a line besides the entry.
#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    time: &'a str,
    #[serde(flatten)]
    entry: &'a Entry,
    prev: &'a str,
}

#[derive(Deserialize)]
struct Link {
    seq: u64,
    prev: String,
}

/// Where a chain stands after a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) seq: u64,
    pub(super) hash: String,
}

impl Head {
    pub(super) fn start() -> Self {
        Head {
            seq: 0,
            hash: GENESIS.to_owned(),
        }
    }
}

/// Appends the sealed line to `out` and moves the head on.
pub(super) fn seal(head: &mut Head, time: &str, entry: &Entry, out: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    let line = Line {
        seq: head.seq + 1,
        time,
        entry,
        prev: &head.hash,
    };
    let mut text = serde_json::to_vec(&line)?;
    let hash = hex::encode(Sha256::digest(&text));
    text.pop(); // the closing brace comes after the hash
    out.extend_from_slice(&text);
    out.extend_from_slice(SEAL.as_bytes());
    out.extend_from_slice(hash.as_bytes());
    out.extend_from_slice(b"\"}\n");
    *head = Head {
        seq: head.seq + 1,
        hash,
    };
    Ok(())
}

/// Checks one line by itself; returns its place in the chain and the hash it builds upon.
pub(super) fn open(line: &str) -> Result<(Head, String), &'static str> {
    let (body, rest) = line.rsplit_once(SEAL).ok_or("it carries no hash")?;
    let hash = rest.strip_suffix("\"}").ok_or("it does not end with its hash")?;
    let body = format!("{body}}}");
    if hex::encode(Sha256::digest(body.as_bytes())) != hash {
        return Err("its hash is wrong: the line was changed");
    }
    let link: Link = serde_json::from_str(&body).map_err(|_| "it is not a line of the audit trail")?;
    Ok((
        Head {
            seq: link.seq,
            hash: hash.to_owned(),
        },
        link.prev,
    ))
}

/// What a check has found to be in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Lines.
    pub lines: u64,
    /// Number of the first line; 0 if there is none.
    pub first_seq: u64,
    /// Number of the last line.
    pub last_seq: u64,
    /// The hash the first line builds upon.
    pub prev: String,
    /// The hash of the last line.
    pub last_hash: String,
}

/// What a check has found not to be in order.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}", path = .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line does not stand as it was written.
    #[error("{path} line {line}: {reason}", path = .path.display())]
    Broken {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: u64,
        /// What is wrong.
        reason: String,
    },
}

/// Walks the chain of one file (blocking).
pub fn verify(path: &Path) -> Result<Report, VerifyError> {
    walk(path, None)
}

/// Walks the chain through all files put aside and the current one (blocking). The oldest may have been removed.
pub fn verify_all(path: &Path) -> Result<Report, VerifyError> {
    let read = |source| VerifyError::Read {
        path: path.to_path_buf(),
        source,
    };
    let mut whole: Option<Report> = None;
    for file in aside(path)
        .map_err(read)?
        .into_iter()
        .map(|(_, file)| file)
        .chain([path.to_path_buf()])
    {
        let report = walk(
            &file,
            whole.as_ref().map(|report| (report.last_seq, report.last_hash.clone())),
        )?;
        whole = Some(match whole {
            None => report,
            Some(before) if report.lines == 0 => before,
            Some(before) => Report {
                lines: before.lines + report.lines,
                first_seq: before.first_seq,
                prev: before.prev,
                ..report
            },
        });
    }
    whole.ok_or_else(|| read(std::io::ErrorKind::NotFound.into()))
}

fn walk(path: &Path, after: Option<(u64, String)>) -> Result<Report, VerifyError> {
    let read = |source| VerifyError::Read {
        path: path.to_path_buf(),
        source,
    };
    let mut lines = BufReader::new(File::open(path).map_err(read)?);
    let mut report: Option<Report> = None;
    let mut text = Vec::new();
    let mut number = 0;
    loop {
        text.clear();
        let size = std::io::Read::take(&mut lines, MAX_LINE)
            .read_until(b'\n', &mut text)
            .map_err(read)?;
        if size == 0 {
            break;
        }
        number += 1;
        let broken = |reason: &str| VerifyError::Broken {
            path: path.to_path_buf(),
            line: number,
            reason: reason.to_owned(),
        };
        let line = text
            .strip_suffix(b"\n")
            .ok_or_else(|| broken("it does not end: cut off, or too long"))?;
        let line = std::str::from_utf8(line).map_err(|_| broken("it is not UTF-8"))?;
        let (head, prev) = open(line).map_err(broken)?;
        if (head.seq == 1) != (prev == GENESIS) {
            return Err(broken(&format!(
                "it is number {} but builds upon {}",
                head.seq,
                if prev == GENESIS { "nothing" } else { "another line" }
            )));
        }
        let expected = report.as_ref().map(|report| (report.last_seq, &report.last_hash));
        if let Some((seq, hash)) = expected.or(after.as_ref().map(|(seq, hash)| (*seq, hash)))
            && (prev != *hash || head.seq != seq + 1)
        {
            return Err(broken(&format!(
                "it is number {} and does not follow line number {seq}: lines are missing or were moved",
                head.seq
            )));
        }
        let (first_seq, first_prev) = report.as_ref().map_or((head.seq, prev.clone()), |report| {
            (report.first_seq, report.prev.clone())
        });
        report = Some(Report {
            lines: number,
            first_seq,
            last_seq: head.seq,
            prev: first_prev,
            last_hash: head.hash,
        });
    }
    let (seq, hash) = after.unwrap_or((0, GENESIS.to_owned()));
    Ok(report.unwrap_or(Report {
        lines: 0,
        first_seq: 0,
        last_seq: seq,
        prev: hash.clone(),
        last_hash: hash,
    }))
}

/// Name of the file put aside after line `seq`.
pub(super) fn aside_name(path: &Path, seq: u64) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{seq:016}"));
    PathBuf::from(name)
}

/// The files put aside, oldest first, with the number of their last line.
pub(super) fn aside(path: &Path) -> std::io::Result<Vec<(u64, PathBuf)>> {
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let prefix = path
        .file_name()
        .map(|name| format!("{}.", name.to_string_lossy()))
        .unwrap_or_default();
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let digits = name
            .to_string_lossy()
            .strip_prefix(&prefix)
            .filter(|rest| rest.len() == 16)
            .and_then(|rest| rest.parse().ok());
        if let Some(seq) = digits {
            found.push((seq, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}
