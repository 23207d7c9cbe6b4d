//! Snapshots: the whole state as effects, ended by a record that says how many keys there were, so that a cut one is never taken for whole.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::{format, snapshot_path, sync_dir};
use crate::engine::db::{Db, Effects};
use crate::engine::numbers::format_double;
use crate::engine::value::Value;

/// The last effect of a snapshot. No command has this name.
pub(crate) const END: &[u8] = b"\0end";

/// Bytes of effects after which a record is written.
const CHUNK: usize = 256 << 10;
/// Elements in one effect.
const ELEMENTS: usize = 256;

struct Out {
    file: BufWriter<File>,
    effects: Effects,
    seq: u64,
    bytes: u64,
    buf: Vec<u8>,
}

impl Out {
    fn flush_if(&mut self, limit: usize) -> io::Result<()> {
        if self.effects.buf.len() >= limit && !self.effects.buf.is_empty() {
            self.buf.clear();
            format::push_record(&mut self.buf, 0, self.seq, &self.effects.buf);
            self.file.write_all(&self.buf)?;
            self.bytes += self.buf.len() as u64;
            self.seq += 1;
            self.effects.clear();
        }
        Ok(())
    }

    fn many(&mut self, name: &[u8], key: &[u8], parts: &[&[u8]], step: usize) -> io::Result<()> {
        for chunk in parts.chunks(ELEMENTS * step) {
            self.effects.push_many(name, key, chunk.iter().copied());
            self.flush_if(CHUNK)?;
        }
        Ok(())
    }
}

/// Writes the state as the snapshot of a generation: under another name first, synced, then renamed. Returns its size.
pub(crate) fn write(dir: &Path, generation: u64, db: &Db) -> io::Result<u64> {
    let path = snapshot_path(dir, generation);
    let temporary = path.with_extension("tmp");
    let result = write_to(&temporary, generation, db);
    match result {
        Ok(bytes) => {
            std::fs::rename(&temporary, &path)?;
            sync_dir(dir)?;
            Ok(bytes)
        }
        Err(e) => {
            // Gives the space back at once: it may be what the disk lacks.
            if let Err(e) = std::fs::remove_file(&temporary) {
                tracing::warn!(error = %e, file = %temporary.display(), "an unfinished snapshot could not be removed");
            }
            Err(e)
        }
    }
}

fn write_to(path: &Path, generation: u64, db: &Db) -> io::Result<u64> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    let mut out = Out {
        file: BufWriter::with_capacity(1 << 20, file),
        effects: Effects::default(),
        seq: 0,
        bytes: format::HEADER as u64,
        buf: Vec::new(),
    };
    out.file
        .write_all(&format::header(format::Kind::Snapshot, generation))?;
    for (key, entry) in &db.map {
        match &entry.value {
            Value::Str(s) => out.effects.push(&[b"SET", key, s]),
            Value::Hash(h) => out.many(
                b"HSET",
                key,
                &h.map
                    .iter()
                    .flat_map(|(f, v)| [f.as_ref(), v.as_ref()])
                    .collect::<Vec<_>>(),
                2,
            )?,
            Value::List(l) => out.many(b"RPUSH", key, &l.items.iter().map(AsRef::as_ref).collect::<Vec<_>>(), 1)?,
            Value::Set(s) => out.many(b"SADD", key, &s.set.iter().map(AsRef::as_ref).collect::<Vec<_>>(), 1)?,
            Value::Zset(z) => {
                let scores: Vec<String> = z.scores.values().map(|s| format_double(*s)).collect();
                let parts: Vec<&[u8]> = scores
                    .iter()
                    .zip(z.scores.keys())
                    .flat_map(|(s, m)| [s.as_bytes(), m.as_ref()])
                    .collect();
                out.many(b"ZADD", key, &parts, 2)?;
            }
        }
        if entry.expires > 0 {
            out.effects
                .push(&[b"PEXPIREAT", key, entry.expires.to_string().as_bytes()]);
        }
        out.flush_if(CHUNK)?;
    }
    out.flush_if(1)?;
    out.effects.push(&[END, db.map.len().to_string().as_bytes()]);
    out.flush_if(1)?;
    out.file.flush()?;
    out.file.get_ref().sync_all()?;
    Ok(out.bytes)
}
