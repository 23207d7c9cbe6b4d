//! What is written down in the data directory: which store is the one since data was moved, and which copy was begun and is not finished.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::{Value, json};

use super::Place;

/// The store to use, and the one before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Note {
    pub(super) store: Place,
    pub(super) before: Place,
}

pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join("moved-to.json")
}

fn begun_path(dir: &Path) -> PathBuf {
    dir.join("moving-to.json")
}

/// Writes a file so that it is there whole or not at all, and stays. It may hold a password, so only its owner reads it.
fn write(file: &Path, value: &Value) -> anyhow::Result<()> {
    let dir = file.parent().unwrap_or(Path::new("/"));
    let attempt = || -> std::io::Result<()> {
        std::fs::create_dir_all(dir)?;
        let temp = file.with_extension("tmp");
        let mut f = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temp)?;
        f.write_all(format!("{value:#}\n").as_bytes())?;
        f.sync_all()?;
        std::fs::rename(&temp, file)?;
        crate::durable::sync_dir(dir)
    };
    attempt().with_context(|| format!("cannot write {}", file.display()))
}

fn read(file: &Path) -> anyhow::Result<Option<Value>> {
    match std::fs::read(file) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).with_context(|| {
            format!(
                "{} can't be understood; it says which store has the data: repair it by hand",
                file.display()
            )
        })?)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", file.display())),
    }
}

fn remove(file: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(file) {
        Ok(()) => {
            let dir = file.parent().unwrap_or(Path::new("/"));
            crate::durable::sync_dir(dir).with_context(|| format!("cannot sync {}", dir.display()))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("cannot remove {}", file.display())),
    }
}

impl Note {
    /// What is written down; None: the configuration holds. Blocking.
    pub(super) fn read(dir: &Path) -> anyhow::Result<Option<Self>> {
        let file = path(dir);
        let Some(v) = read(&file)? else { return Ok(None) };
        let place = |k: &str| {
            Place::from_json(v.get(k).unwrap_or(&Value::Null)).with_context(|| format!("{}: {k}", file.display()))
        };
        Ok(Some(Self {
            store: place("store")?,
            before: place("before")?,
        }))
    }

    /// Writes it down, or removes the note when the configuration holds again. Blocking.
    pub(super) fn write(&self, dir: &Path) -> anyhow::Result<()> {
        if self.store == Place::Configured {
            return remove(&path(dir));
        }
        write(
            &path(dir),
            &json!({"store": self.store.to_json(), "before": self.before.to_json()}),
        )
    }
}

/// A copy that was begun: the target then has a key with this id until it is finished. Blocking.
pub(super) fn begin(dir: &Path, to: &Place, id: &str) -> anyhow::Result<()> {
    write(&begun_path(dir), &json!({"to": to.to_json(), "id": id}))
}

/// The id of an unfinished copy to this place. Blocking.
pub(super) fn begun(dir: &Path, to: &Place) -> Option<String> {
    let v = read(&begun_path(dir)).ok().flatten()?;
    let same = Place::from_json(v.get("to")?).ok()? == *to;
    same.then(|| v.get("id").and_then(Value::as_str).map(str::to_owned))?
}

/// Nothing is unfinished any more. Blocking.
pub(super) fn end(dir: &Path) -> anyhow::Result<()> {
    remove(&begun_path(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_is_read_again_and_only_by_its_owner() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Note::read(dir.path()).unwrap(), None);
        let to = Place::Single("redis://:p@h:1".into());
        let note = Note {
            store: to.clone(),
            before: Place::Configured,
        };
        note.write(dir.path()).unwrap();
        assert_eq!(Note::read(dir.path()).unwrap(), Some(note));
        let mode = std::fs::metadata(path(dir.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        begin(dir.path(), &to, "7").unwrap();
        assert_eq!(begun(dir.path(), &to).as_deref(), Some("7"));
        assert_eq!(begun(dir.path(), &Place::Configured), None);
        end(dir.path()).unwrap();
        assert_eq!(begun(dir.path(), &to), None);
        std::fs::write(path(dir.path()), "{").unwrap();
        assert!(Note::read(dir.path()).is_err(), "a broken note must stop the start");
        let back = Note {
            store: Place::Configured,
            before: to,
        };
        back.write(dir.path()).unwrap();
        assert_eq!(Note::read(dir.path()).unwrap(), None);
    }
}
