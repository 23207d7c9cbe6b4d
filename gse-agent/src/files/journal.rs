//! The orders on disk: what was taken, and how it ended. One file an order; everything in here blocks and belongs on a blocking thread.
//!
//! An order is written down before it is begun and its end before it is reported, so that after a crash it is taken up again, and its end
//! is reported until the server has it.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use gse_proto::file::{Order, Report};
use prost::Message;
use sha2::{Digest, Sha256};

use super::cell::Key;
use crate::exec::{Record, sync_dir};

/// What is found at a start.
#[derive(Debug)]
pub(super) struct Kept {
    /// The order.
    pub(super) order: Order,
    /// How it ended, if it did.
    pub(super) end: Option<Report>,
}

/// The directory of orders.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
}

impl Journal {
    /// Opens or begins the journal below `root`, and reads what is in it.
    ///
    /// # Errors
    /// When the directory cannot be used.
    pub(super) fn open(root: &Path) -> anyhow::Result<(Self, Vec<Kept>)> {
        let dir = root.join("orders");
        let what = || format!("the agent's directory of file orders {} cannot be used", dir.display());
        fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(&dir)
            .with_context(what)?;
        let mut kept = Vec::new();
        for entry in fs::read_dir(&dir).with_context(what)? {
            let path = entry.with_context(what)?.path();
            if path.extension().is_none_or(|ending| ending != "order") {
                continue;
            }
            match Self::read(&path) {
                Ok(one) => kept.push(one),
                Err(error) => {
                    // The server gives it again, or closes its row when the time is up.
                    tracing::error!(file = %path.display(), %error, "an order on disk cannot be read; it is set aside");
                    fs::rename(&path, path.with_extension("damaged")).with_context(what)?;
                }
            }
        }
        Ok((Self { dir }, kept))
    }

    fn read(path: &Path) -> io::Result<Kept> {
        let record = Record::read(path)?;
        let order = Order::decode(record.need("order")?).map_err(io::Error::other)?;
        let end = record.get("end").map(Report::decode).transpose();
        Ok(Kept {
            order,
            end: end.map_err(io::Error::other)?,
        })
    }

    fn path(&self, key: &Key, ending: &str) -> PathBuf {
        // Task ids are the servers' and may hold anything.
        let hash = hex::encode(&Sha256::digest(key.task_id.as_bytes())[..16]);
        self.dir.join(format!("{hash}-{}.{ending}", key.order))
    }

    /// Writes down that an order was taken.
    ///
    /// # Errors
    /// What the system says; then it must not be begun.
    pub(super) fn take(&self, key: &Key, order: &Order) -> io::Result<()> {
        let mut record = Record::default();
        record.set("order", order.encode_to_vec());
        record.write(&self.path(key, "order"))?;
        sync_dir(&self.dir)
    }

    /// Writes down how it ended; `order` without its content, which is not needed any more.
    ///
    /// # Errors
    /// What the system says; then it is taken up again after a restart.
    pub(super) fn end(&self, key: &Key, order: &Order, end: &Report) -> io::Result<()> {
        let mut record = Record::default();
        record.set("order", order.encode_to_vec());
        record.set("end", end.encode_to_vec());
        record.write(&self.path(key, "order"))
    }

    /// Where the pieces of an unfinished target are written down.
    pub(super) fn resume_map(&self, key: &Key) -> PathBuf {
        self.path(key, "resume")
    }

    /// Removes every trace of an order.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn forget(&self, key: &Key) -> io::Result<()> {
        for ending in ["order", "resume"] {
            match fs::remove_file(self.path(key, ending)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let key = |order| Key {
            task_id: "GSETASK:F:/../x".to_owned(),
            order,
        };
        let order = |n| Order {
            task_id: key(n).task_id,
            order: n,
            not_after_ms: 7,
            ..Order::default()
        };
        let (journal, kept) = Journal::open(dir.path()).unwrap();
        assert!(kept.is_empty());
        journal.take(&key(1), &order(1)).unwrap();
        journal.take(&key(2), &order(2)).unwrap();
        journal.take(&key(3), &order(3)).unwrap();
        let end = Report {
            code: 126,
            ..Report::default()
        };
        journal.end(&key(2), &order(2), &end).unwrap();
        journal.forget(&key(3)).unwrap();
        fs::write(journal.dir.join("half.order"), "gse-record 1\n").unwrap();
        drop(journal);
        let (journal, mut kept) = Journal::open(dir.path()).unwrap();
        kept.sort_by_key(|one| one.order.order);
        assert_eq!(kept.len(), 2, "a damaged one is dropped, a forgotten one is gone");
        assert_eq!((kept[0].order.order, kept[0].end.is_none()), (1, true));
        assert_eq!(kept[1].end.as_ref().map(|end| end.code), Some(126));
        assert!(!journal.dir.join("half.order").exists() && journal.dir.join("half.damaged").exists());
        journal.forget(&key(9)).unwrap();
    }

    #[test]
    fn a_damaged_order_is_set_aside_and_the_others_are_kept() {
        // contract: reliability#F11
        let dir = tempfile::tempdir().unwrap();
        let order = |n| Order {
            task_id: "GSETASK:F:1".to_owned(),
            order: n,
            servers: vec!["10.0.0.1:28925".to_owned()],
            not_after_ms: 1_700_000_000_000,
            ..Order::default()
        };
        let key = |n| Key {
            task_id: order(n).task_id,
            order: n,
        };
        let (journal, _) = Journal::open(dir.path()).unwrap();
        journal.take(&key(1), &order(1)).unwrap();
        journal.take(&key(2), &order(2)).unwrap();
        let path = journal.path(&key(1), "order");
        let whole = fs::read(&path).unwrap();
        let cut = (0..whole.len()).map(|len| whole[..len].to_vec());
        let flipped = (0..whole.len() * 8).map(|bit| {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            bytes
        });
        for bytes in cut.chain(flipped) {
            fs::write(&path, &bytes).unwrap();
            let (_, kept) = Journal::open(dir.path()).unwrap();
            assert_eq!(kept.iter().map(|one| &one.order).collect::<Vec<_>>(), [&order(2)]);
            assert!(!path.exists() && fs::read(path.with_extension("damaged")).unwrap() == bytes);
        }
        fs::write(&path, &whole).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().1.len(), 2);
    }
}
