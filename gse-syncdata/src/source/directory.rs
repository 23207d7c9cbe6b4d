//! A directory as a source: one file for each host, called by its agent's id or `cloud:ip`. Files are best put there by a rename; one that
//! changes while it is read is read again.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_proto::ids::AgentId;
use parking_lot::Mutex;

use super::Source;
use crate::config::DirectoryConfig;
use crate::desk::Desk;
use crate::identity::Identity;

/// An ending that does not count.
const ENDING: &str = ".json";
/// Contents read before they are handed over, bytes.
const READ: usize = 4 << 20;

/// A directory of identities.
pub struct Directory {
    path: PathBuf,
    every: Duration,
}

/// By what a change of a file shows.
type Stamp = (u64, u64, i64, i64);

fn stamp(meta: &Metadata) -> Stamp {
    (meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec())
}

type Known = BTreeMap<AgentId, Stamp>;

/// Some of what has changed.
#[derive(Default)]
struct Changes {
    identities: Vec<Identity>,
    malformed: u64,
    too_large: u64,
    /// There is more.
    more: bool,
    gone: Vec<AgentId>,
}

impl Directory {
    /// This directory.
    #[must_use]
    pub fn new(config: &DirectoryConfig) -> Self {
        Self {
            path: config.path.clone(),
            every: Duration::from_millis(config.look_ms),
        }
    }
}

impl Source for Directory {
    async fn follow(&self, desk: &Desk) {
        let known = Arc::new(Mutex::new(Known::new()));
        let most = desk.node.config.push.max_content_bytes;
        let mut said = String::new();
        let mut first = true;
        loop {
            if first {
                desk.begin_pass();
            }
            let whole = loop {
                let (path, known) = (self.path.clone(), Arc::clone(&known));
                let looked = tokio::task::spawn_blocking(move || look(&path, &mut known.lock(), most)).await;
                match looked.unwrap_or_else(|error| Err(io::Error::other(error))) {
                    Ok(changes) => {
                        said.clear();
                        (0..changes.malformed).for_each(|_| desk.node.metrics.skipped("malformed"));
                        (0..changes.too_large).for_each(|_| desk.node.metrics.skipped("too_large"));
                        desk.put(&changes.identities, None).await;
                        let gone: Vec<&str> = changes.gone.iter().map(AgentId::as_str).collect();
                        desk.forget(0, &gone).await;
                        if !changes.more {
                            break true;
                        }
                    }
                    Err(error) => {
                        // The same again and again is said once.
                        let text = error.to_string();
                        if text != said {
                            tracing::warn!(directory = %self.path.display(), "the directory of identities can't be read: {text}");
                            said = text;
                        }
                        break false;
                    }
                }
            };
            if first {
                // Hosts whose files went while nobody looked.
                desk.end_pass(whole, true).await;
                first = !whole;
                if first {
                    known.lock().clear();
                }
            }
            tokio::time::sleep(self.every).await;
        }
    }
}

/// Finds what is not as it is known.
fn look(path: &Path, known: &mut Known, most: usize) -> io::Result<Changes> {
    let mut changes = Changes::default();
    let (mut seen, mut bytes) = (Known::new(), 0);
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else {
            continue;
        };
        let Ok(agent) = AgentId::parse(name.strip_suffix(ENDING).unwrap_or(name)) else {
            changes.malformed += 1;
            continue;
        };
        let meta = match entry.metadata() {
            Ok(meta) if meta.is_file() => meta,
            Ok(_) => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let now = stamp(&meta);
        let before = known.get(&agent);
        if before == Some(&now) {
            seen.insert(agent, now);
            continue;
        }
        if bytes >= READ {
            // Not read yet: known as it was, if it was.
            if let Some(before) = before {
                seen.insert(agent, *before);
            }
            changes.more = true;
            continue;
        }
        if meta.size() > most as u64 {
            changes.too_large += 1;
            seen.insert(agent, now);
            continue;
        }
        match read(&entry.path(), now, most)? {
            Some(content) => {
                bytes += content.len();
                changes.identities.push(Identity::of_bytes(agent.clone(), content));
                seen.insert(agent, now);
            }
            // It is being written; the next look finds it.
            None => {
                if let Some(before) = before {
                    seen.insert(agent, *before);
                }
            }
        }
    }
    changes.gone = known
        .keys()
        .filter(|agent| !seen.contains_key(*agent))
        .cloned()
        .collect();
    *known = seen;
    Ok(changes)
}

/// The content, if it did not change while it was read.
fn read(path: &Path, before: Stamp, most: usize) -> io::Result<Option<Bytes>> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut content = Vec::new();
    Read::by_ref(&mut file)
        .take(most as u64 + 1)
        .read_to_end(&mut content)?;
    let same = stamp(&file.metadata()?) == before && content.len() as u64 == before.1;
    Ok(same.then(|| content.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("0:10.0.0.1", "one");
        write("0200a.json", "two");
        write(".hidden", "x");
        write("a b", "x");
        write("large", "0123456789");
        fs::create_dir(dir.path().join("sub")).unwrap();
        let mut known = Known::new();
        let found = |known: &mut Known| {
            let changes = look(dir.path(), known, 9).unwrap();
            let mut texts: Vec<(String, Bytes)> = changes
                .identities
                .iter()
                .map(|one| (one.key().to_owned(), one.content.clone()))
                .collect();
            texts.sort();
            (texts, changes.gone, (changes.malformed, changes.too_large))
        };
        let (texts, gone, odd) = found(&mut known);
        assert_eq!(
            texts,
            [
                ("0200a".to_owned(), "two".into()),
                ("0:10.0.0.1".to_owned(), "one".into())
            ]
        );
        assert!(gone.is_empty());
        assert_eq!(odd, (1, 1));
        assert!(found(&mut known).0.is_empty());
        let staged = dir.path().join(".new");
        fs::write(&staged, "three").unwrap();
        fs::rename(&staged, dir.path().join("0:10.0.0.1")).unwrap();
        fs::remove_file(dir.path().join("0200a.json")).unwrap();
        let (texts, gone, _) = found(&mut known);
        assert_eq!(texts, [("0:10.0.0.1".to_owned(), "three".into())]);
        assert_eq!(gone, [AgentId::parse("0200a").unwrap()]);
        fs::remove_dir_all(dir.path()).unwrap();
        assert!(look(dir.path(), &mut known, 9).is_err());
        assert_eq!(known.len(), 2, "a directory that is away takes nothing with it");
    }
}
