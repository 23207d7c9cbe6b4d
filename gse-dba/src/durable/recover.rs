//! Recovery: from what is in the directory to the state, at start and whenever the engine must forget what the disk refused.
//!
//! A log that merely ends in the middle of a record (the process or the machine died while writing) is cut there and that is reported. A file that is damaged with good records after
//! the damage has lost acknowledged writes: by default the store refuses to start and says so; with `on_corruption = "salvage"` the good beginning is kept, the damaged file and all that
//! came after it are set aside under another name, and the store starts with a loud line.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};

use super::format::{self, Kind, Read1};
use super::log::{Journal, Position};
use super::{Settings, compact, list, log_path, snapshot, snapshot_path, sync_dir};
use crate::args::{Args, Span};
use crate::commands::{self, Run};
use crate::engine::db::{Db, Effects, Exec};
use crate::resp::write::Writer;

/// What reading one file came to.
struct Replayed {
    /// Bytes of header and whole records.
    good: u64,
    size: u64,
    records: u64,
    epoch: u32,
    /// The end mark of a snapshot was there.
    ended: bool,
}

/// Applies effects to a state.
struct Replay<'a> {
    db: &'a mut Db,
    effects: Effects,
    out: Writer,
    spans: Vec<Span>,
}

impl<'a> Replay<'a> {
    fn new(db: &'a mut Db) -> Self {
        Self {
            db,
            effects: Effects {
                off: true,
                ..Effects::default()
            },
            out: Writer::new(false),
            spans: Vec::new(),
        }
    }

    /// Applies a record's payload; `Ok(true)` when it held a snapshot's end mark. An effect that cannot be applied is damage.
    fn apply(&mut self, payload: &[u8]) -> Result<bool, String> {
        let mut at = 0;
        let mut ended = false;
        let word = |at: &mut usize| {
            let n = payload
                .get(*at..*at + 4)
                .map(|b| format::u32_at(b, 0) as usize)
                .ok_or("an effect is cut short");
            *at += 4;
            n
        };
        while at < payload.len() {
            let argc = word(&mut at)?;
            self.spans.clear();
            for _ in 0..argc {
                let len = word(&mut at)?;
                if at + len > payload.len() {
                    return Err("an argument is cut short".into());
                }
                self.spans.push(Span {
                    start: at as u32,
                    end: (at + len) as u32,
                });
                at += len;
            }
            let args = Args::new(payload, &self.spans);
            if args.at(0) == snapshot::END {
                let keys = self.db.map.len().to_string();
                if args.at(1) != keys.as_bytes() {
                    return Err(format!(
                        "the snapshot says {} keys and holds {keys}",
                        String::from_utf8_lossy(args.at(1))
                    ));
                }
                ended = true;
                continue;
            }
            let name = || String::from_utf8_lossy(args.at(0)).into_owned();
            let Some(Run::Engine(handler)) = commands::find(args.at(0)).filter(|s| s.arity_fits(argc)).map(|s| s.run)
            else {
                return Err(format!("the effect {:?} is unknown to this version", name()));
            };
            self.out.buf.clear();
            let mut x = Exec {
                db: self.db,
                log: &mut self.effects,
                now: 0,
            };
            handler(&mut x, args, &mut self.out)
                .map_err(|e| format!("the effect {:?} cannot be applied: {}", name(), e.0))?;
        }
        Ok(ended)
    }
}

/// Reads a file's records into the state, up to `limit` bytes of the file, until its end or until something is wrong with it.
fn replay(path: &Path, kind: Kind, generation: u64, limit: u64, db: &mut Db) -> anyhow::Result<Replayed> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let size = file.metadata()?.len().min(limit);
    let mut result = Replayed {
        good: 0,
        size,
        records: 0,
        epoch: 0,
        ended: false,
    };
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut header = [0; format::HEADER];
    if size < format::HEADER as u64 {
        return Ok(result);
    }
    reader.read_exact(&mut header)?;
    match format::check_header(&header, kind, generation) {
        Ok(()) => result.good = format::HEADER as u64,
        Err(format::HeaderError::Damaged) => return Ok(result),
        Err(e) => bail!("{} cannot be read: {e}", path.display()),
    }
    let mut replay = Replay::new(db);
    let mut payload = Vec::new();
    loop {
        match format::read_record(&mut reader, size - result.good, result.records, &mut payload)? {
            Read1::Record { epoch } => {
                result.ended |= replay.apply(&payload).map_err(|e| {
                    anyhow::anyhow!(
                        "{} holds a record that this version cannot apply ({e}): it was written by another version",
                        path.display()
                    )
                })?;
                result.epoch = result.epoch.max(epoch);
                result.good += format::RECORD as u64 + payload.len() as u64;
                result.records += 1;
            }
            Read1::End | Read1::Bad => return Ok(result),
        }
    }
}

/// Whether a file is damaged rather than cut short: good records stand after the first bad place.
fn damaged_inside(path: &Path, r: &Replayed) -> io::Result<bool> {
    if r.good < format::HEADER as u64 {
        // Without a header: cut short only if there was no time to write one.
        return Ok(r.size >= format::HEADER as u64);
    }
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(r.good))?;
    let mut rest = Vec::new();
    file.read_to_end(&mut rest)?;
    Ok(format::holds_later_record(&rest, r.records))
}

fn set_aside(path: &Path) -> anyhow::Result<PathBuf> {
    let stamp = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis());
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".corrupt-{stamp}"));
    let aside = PathBuf::from(name);
    std::fs::rename(path, &aside).with_context(|| format!("cannot set {} aside", path.display()))?;
    Ok(aside)
}

fn refuse_or_salvage(settings: &Settings, path: &Path, r: &Replayed) -> anyhow::Result<()> {
    if settings.salvage {
        return Ok(());
    }
    bail!(
        "{} is damaged at byte {} of {}: acknowledged writes after that place are lost. Restore the directory from a copy, or start once with embedded.on_corruption = \"salvage\" to keep what is before it",
        path.display(),
        r.good,
        r.size
    )
}

/// Opens the store's directory for this process alone and loads it.
pub(crate) fn open(settings: &Arc<Settings>) -> anyhow::Result<(Db, Journal)> {
    let dir = &settings.dir;
    std::os::unix::fs::DirBuilderExt::mode(std::fs::DirBuilder::new().recursive(true), 0o700)
        .create(dir)
        .with_context(|| format!("cannot make the store's directory {}", dir.display()))?;
    let lock_path = dir.join("LOCK");
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock_path)
        .with_context(|| format!("cannot open {}", lock_path.display()))?;
    lock.try_lock().map_err(|e| {
        anyhow::anyhow!(
            "the store's directory {} is in use by another process ({e}): two can never share it",
            dir.display()
        )
    })?;
    let listing = list(dir)?;
    for leftover in &listing.leftovers {
        std::fs::remove_file(leftover)?;
    }
    let mut db = Db::default();
    let mut epoch = 0;
    let base = listing.snapshots.last().copied();
    let mut salvaged = false;
    let mut snapshot_bytes = 0;
    if let Some(generation) = base {
        let path = snapshot_path(dir, generation);
        let r = replay(&path, Kind::Snapshot, generation, u64::MAX, &mut db)?;
        snapshot_bytes = r.size;
        if !r.ended {
            refuse_or_salvage(settings, &path, &r)?;
            salvaged = true;
            let aside = set_aside(&path)?;
            tracing::error!(file = %aside.display(), kept_bytes = r.good, of = r.size, keys = db.map.len(), "THE SNAPSHOT IS DAMAGED: its good beginning is kept, everything after it is lost");
        }
    }
    let first = base.unwrap_or(0);
    let mut logs: Vec<u64> = listing.logs.iter().copied().filter(|g| *g >= first).collect();
    let gap = logs.iter().enumerate().any(|(i, g)| *g != first + i as u64)
        && !(base.is_none() && logs.first() == Some(&1) && logs.windows(2).all(|w| w[1] == w[0] + 1));
    if gap && !salvaged && !settings.salvage {
        bail!(
            "a log is missing in {}: present are {logs:?}, wanted are all from {first} on. Restore the directory from a copy, or start once with embedded.on_corruption = \"salvage\"",
            dir.display()
        );
    }
    if salvaged {
        // Changes to a state that is not whole would make something that never was.
        for g in logs.drain(..) {
            let aside = set_aside(&log_path(dir, g))?;
            tracing::error!(file = %aside.display(), "a log after the damage is set aside");
        }
    }
    let mut open: Option<(u64, u64, u64)> = None;
    let mut below = snapshot_bytes;
    let count = logs.len();
    for (i, generation) in logs.iter().copied().enumerate() {
        let path = log_path(dir, generation);
        if salvaged {
            let aside = set_aside(&path)?;
            tracing::error!(file = %aside.display(), "a log after the damage is set aside");
            continue;
        }
        let r = replay(&path, Kind::Log, generation, u64::MAX, &mut db)?;
        epoch = epoch.max(r.epoch);
        if r.good < r.size || r.good < format::HEADER as u64 {
            // A log that is not the last was closed whole, so any wrong place in it is damage.
            if i + 1 < count || damaged_inside(&path, &r)? {
                refuse_or_salvage(settings, &path, &r)?;
                salvaged = true;
                let aside = set_aside(&path)?;
                tracing::error!(file = %aside.display(), kept_bytes = r.good, of = r.size, records = r.records, "THE LOG IS DAMAGED: its good beginning is kept, everything after it is lost");
                continue;
            }
            tracing::warn!(file = %path.display(), kept_bytes = r.good, cut_bytes = r.size - r.good, records = r.records, "the log ended in the middle of a record, which is cut off: what was in it was never acknowledged, unless the machine lost power");
        }
        if let Some((_, len, _)) = open {
            below += len;
        }
        open = Some((generation, r.good, r.records));
    }
    let next_free = listing
        .logs
        .last()
        .copied()
        .unwrap_or(0)
        .max(first)
        .max(base.unwrap_or(0))
        + 1;
    let (file, generation, len, seq) = match open {
        Some((generation, good, records)) if !salvaged && good >= format::HEADER as u64 => {
            let path = log_path(dir, generation);
            let file = File::options()
                .read(true)
                .write(true)
                .open(&path)
                .with_context(|| format!("cannot write {}", path.display()))?;
            file.set_len(good)?;
            file.sync_all()?;
            (file, generation, good, records)
        }
        Some((generation, ..)) if !salvaged => {
            (Journal::create(dir, generation)?, generation, format::HEADER as u64, 0)
        }
        _ if salvaged => {
            // What was kept becomes a snapshot of its own, so that the next start does not meet the damage again.
            snapshot_bytes = snapshot::write(dir, next_free, &db)?;
            below = snapshot_bytes;
            compact::remove_below(settings, next_free)?;
            (Journal::create(dir, next_free)?, next_free, format::HEADER as u64, 0)
        }
        _ => {
            let generation = base.unwrap_or(1);
            (Journal::create(dir, generation)?, generation, format::HEADER as u64, 0)
        }
    };
    sync_dir(dir)?;
    if let Some(base) = base.filter(|_| !salvaged) {
        compact::remove_below(settings, base)?;
    }
    tracing::info!(dir = %dir.display(), keys = db.map.len(), generation, log_bytes = len, snapshot_bytes, "the store is loaded");
    let at = Position {
        generation,
        epoch: epoch + 1,
        seq,
        len,
        below,
        snapshot: snapshot_bytes,
    };
    let journal = Journal::new(Arc::clone(settings), file, at, Arc::new(lock));
    Ok((db, journal))
}

/// The state as the files below generation `upto` have it: the newest snapshot and the logs after it.
pub(crate) fn load_below(settings: &Settings, upto: u64) -> io::Result<Db> {
    load(settings, upto, None)
}

/// The state as the disk has it while the store is open.
pub(crate) fn reload(settings: &Settings, journal: &Journal) -> anyhow::Result<Db> {
    // A compaction that ends meanwhile removes files that were just listed: then there is a new snapshot to begin from.
    let mut last = None;
    for _ in 0..5 {
        match load(settings, journal.generation, Some(journal.len)) {
            Ok(db) => return Ok(db),
            Err(e) => last = Some(e),
        }
    }
    Err(last.map_or_else(|| anyhow::anyhow!("no reason known"), Into::into))
        .context("the store cannot read its own files back after the disk refused a write")
}

fn load(settings: &Settings, upto: u64, open_len: Option<u64>) -> io::Result<Db> {
    let listing = list(&settings.dir)?;
    let mut db = Db::default();
    let base = listing.snapshots.iter().copied().rfind(|g| *g <= upto);
    if let Some(g) = base {
        let path = snapshot_path(&settings.dir, g);
        let r = replay(&path, Kind::Snapshot, g, u64::MAX, &mut db).map_err(io::Error::other)?;
        if !r.ended {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} is damaged at byte {}", path.display(), r.good),
            ));
        }
    }
    let first = base.unwrap_or(0);
    let last = if open_len.is_some() { upto + 1 } else { upto };
    for g in listing.logs.iter().copied().filter(|g| *g >= first && *g < last) {
        let limit = open_len.filter(|_| g == upto).unwrap_or(u64::MAX);
        let path = log_path(&settings.dir, g);
        let r = replay(&path, Kind::Log, g, limit, &mut db).map_err(io::Error::other)?;
        if r.good < r.size {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} is damaged at byte {}", path.display(), r.good),
            ));
        }
    }
    Ok(db)
}
