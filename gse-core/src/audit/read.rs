//! Reading a trail back: which files belong together, line after line, also while it is being written.
//!
//! Nothing is proven here; that the lines stand as they were written is for [`super::verify_all`] to say.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::Entry;
use super::chain::{MAX_LINE, aside};

/// Digits at the end of the name of a file put aside.
const ASIDE_DIGITS: usize = 16;

/// A line as it stands in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its number in the chain.
    pub seq: u64,
    /// When it was written, RFC 3339 in UTC.
    pub time: String,
    /// What it says.
    pub entry: Entry,
    /// The line itself, without its end.
    pub line: String,
}

/// A line that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file} line {line}: not a line of an audit trail", file = .file.display())]
pub struct BadLine {
    /// Which file.
    pub file: PathBuf,
    /// Which line, from 1.
    pub line: u64,
}

#[derive(Deserialize)]
struct Stored {
    seq: u64,
    time: String,
    #[serde(flatten)]
    entry: Entry,
}

/// The trails at a path, each by the file that is or was written to: the path itself for a file, all that are in it for a directory
/// (blocking). A file counts when its name says "audit" or its first line looks like one of ours, so that a damaged one is not passed
/// over.
///
/// # Errors
/// The path or a file in it cannot be read.
pub fn find(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !std::fs::metadata(path)?.is_dir() {
        return Ok(vec![base(path)]);
    }
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(path)? {
        let file = entry?.path();
        if file.is_file() && is_trail(&file)? {
            found.insert(base(&file));
        }
    }
    Ok(found.into_iter().collect())
}

/// The file that one put aside belongs to; any other is its own.
fn base(file: &Path) -> PathBuf {
    let name = file.as_os_str().to_string_lossy();
    let digits = |tail: &str| tail.len() == ASIDE_DIGITS && tail.bytes().all(|byte| byte.is_ascii_digit());
    match name.rsplit_once('.') {
        Some((base, tail)) if digits(tail) => PathBuf::from(base),
        _ => file.to_owned(),
    }
}

fn is_trail(file: &Path) -> io::Result<bool> {
    if file
        .file_name()
        .is_some_and(|name| name.to_string_lossy().contains("audit"))
    {
        return Ok(true);
    }
    let mut first = Vec::new();
    BufReader::new(File::open(file)?.take(MAX_LINE)).read_until(b'\n', &mut first)?;
    let has = |part: &[u8]| first.windows(part.len()).any(|window| window == part);
    Ok(has(b"\"seq\":") && has(b"\"prev\":\"") && has(b"\"hash\":\""))
}

/// One trail from its oldest file to its newest line (blocking). At the end it can be asked again for what has come meanwhile.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    /// Files still to be read; the one that is being written is the last.
    files: VecDeque<PathBuf>,
    open: Option<Open>,
    last_seq: u64,
}

#[derive(Debug)]
struct Open {
    path: PathBuf,
    file: BufReader<File>,
    /// Identifies it after it was renamed.
    id: (u64, u64),
    lines: u64,
    /// Bytes taken out of it.
    taken: u64,
    /// A line that has not ended yet.
    partial: Vec<u8>,
}

impl Open {
    fn new(path: PathBuf) -> io::Result<Self> {
        let file = File::open(&path)?;
        let meta = file.metadata()?;
        Ok(Open {
            path,
            id: (meta.dev(), meta.ino()),
            file: BufReader::new(file),
            lines: 0,
            taken: 0,
            partial: Vec::new(),
        })
    }

    /// The next whole line with its end, or as much as the longest line may have; none at the end of the file.
    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let length = self.file.get_ref().metadata()?.len();
        if length < self.taken {
            // What a failed write had left was taken away again.
            self.taken -= self.partial.len() as u64;
            self.partial.clear();
            self.file.seek(SeekFrom::Start(self.taken.min(length)))?;
            self.taken = self.taken.min(length);
        }
        let room = MAX_LINE.saturating_sub(self.partial.len() as u64);
        let read = (&mut self.file).take(room).read_until(b'\n', &mut self.partial)?;
        self.taken += read as u64;
        if self.partial.ends_with(b"\n") || self.partial.len() as u64 >= MAX_LINE {
            self.lines += 1;
            return Ok(Some(std::mem::take(&mut self.partial)));
        }
        Ok(None)
    }
}

impl Reader {
    /// A reader of the trail whose current file is `path`.
    ///
    /// # Errors
    /// The directory cannot be read, or there is no such trail.
    pub fn new(path: &Path) -> io::Result<Self> {
        let mut files: VecDeque<PathBuf> = aside(path)?.into_iter().map(|(_, file)| file).collect();
        if path.exists() {
            files.push_back(path.to_owned());
        }
        if files.is_empty() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Reader {
            path: path.to_owned(),
            files,
            open: None,
            last_seq: 0,
        })
    }

    /// The next line, or none when there is none yet.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn next_line(&mut self) -> io::Result<Option<Result<Record, BadLine>>> {
        loop {
            let Some(open) = &mut self.open else {
                let Some(next) = self.files.pop_front() else {
                    return Ok(None);
                };
                match Open::new(next) {
                    Ok(open) => self.open = Some(open),
                    // The oldest may be removed at any time.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
                continue;
            };
            if let Some(line) = open.line()? {
                return Ok(Some(self.parse(&line)));
            }
            if self.files.is_empty() && !self.put_aside()? {
                return Ok(None);
            }
            // Nothing is written to a file that was put aside, so a line without an end will never have one.
            let rest = self.open.take().filter(|open| !open.partial.is_empty());
            if let Some(open) = rest {
                return Ok(Some(Err(BadLine {
                    line: open.lines + 1,
                    file: open.path,
                })));
            }
        }
    }

    fn parse(&mut self, line: &[u8]) -> Result<Record, BadLine> {
        let text = std::str::from_utf8(line).ok().and_then(|text| text.strip_suffix('\n'));
        match text.and_then(|text| Some((serde_json::from_str::<Stored>(text).ok()?, text))) {
            Some((stored, text)) => {
                self.last_seq = stored.seq;
                Ok(Record {
                    seq: stored.seq,
                    time: stored.time,
                    entry: stored.entry,
                    line: text.to_owned(),
                })
            }
            None => {
                let (file, line) = self
                    .open
                    .as_ref()
                    .map_or_else(|| (self.path.clone(), 0), |open| (open.path.clone(), open.lines));
                Err(BadLine { file, line })
            }
        }
    }

    /// Whether the file that is read to its end is no longer the one that is written; notes which ones come next.
    fn put_aside(&mut self) -> io::Result<bool> {
        let now = match std::fs::metadata(&self.path) {
            Ok(meta) => (meta.dev(), meta.ino()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let Some(open) = &mut self.open else { return Ok(false) };
        if open.id == now {
            return Ok(false);
        }
        // It may have been written between the last look and its renaming.
        if open.file.fill_buf()?.is_empty() {
            let newer = aside(&self.path)?.into_iter().filter(|(seq, _)| *seq > self.last_seq);
            self.files.extend(newer.map(|(_, file)| file));
            self.files.push_back(self.path.clone());
            return Ok(true);
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::super::{Audit, AuditConfig};
    use super::*;

    fn rest(reader: &mut Reader) -> Vec<u64> {
        let mut seen = Vec::new();
        while let Some(line) = reader.next_line().unwrap() {
            seen.push(line.unwrap().seq);
        }
        seen
    }

    #[tokio::test]
    async fn a_reader_follows_the_trail_through_its_files() {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("trail");
        let config = AuditConfig {
            file: Some(file.clone()),
            max_file_bytes: 1_500,
            ..AuditConfig::default()
        };
        let audit = Audit::open(&config).unwrap();
        let write = async |count: usize| {
            for number in 0..count {
                let request_id = format!("r{number}");
                let entry = Entry {
                    request_id,
                    ..Entry::default()
                };
                audit.record(entry).await.unwrap();
            }
        };
        write(20).await;
        assert!(aside(&file).unwrap().len() > 1);
        let mut reader = Reader::new(&file).unwrap();
        assert_eq!(rest(&mut reader), (1..=20).collect::<Vec<_>>());
        assert_eq!(rest(&mut reader), Vec::<u64>::new());
        write(30).await;
        assert_eq!(rest(&mut reader), (21..=50).collect::<Vec<_>>());
        write(1).await;
        assert_eq!(rest(&mut reader), [51]);
        // Found by what is in it, and by its name when that is damaged; never twice for its files put aside.
        std::fs::write(dir.path().join("audit-x"), "garbage\n").unwrap();
        std::fs::write(dir.path().join("other.log"), "{}\n").unwrap();
        assert_eq!(find(dir.path()).unwrap(), [dir.path().join("audit-x"), file.clone()]);
        assert_eq!(find(&aside(&file).unwrap()[0].1).unwrap(), [file]);
    }

    #[test]
    fn lines_that_are_not_ours_are_named() {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("audit");
        std::fs::write(&file, "{}\n\u{1}\n{\"seq\"").unwrap();
        let mut reader = Reader::new(&file).unwrap();
        for line in [1, 2] {
            assert_eq!(reader.next_line().unwrap().unwrap().unwrap_err().line, line);
        }
        // Perhaps it is being written right now.
        assert!(reader.next_line().unwrap().is_none());
        assert!(Reader::new(&dir.path().join("none")).is_err());
    }
}
