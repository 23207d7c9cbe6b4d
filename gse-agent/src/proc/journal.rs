//! Operations: which are known, how they ended, and what of that is on disk. One that runs a command is written down before the command can
//! start, in a directory of its own where its runner leaves the command's end too; so it is taken up, and never begun twice, whatever
//! becomes of the agent. How an operation is carried out is left to [`super::operate`].

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use gse_proto::proc::{OP_ID, Operation, Outcome};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::watch;

use super::unix_ms;
use crate::exec::{Record, sync_dir};

/// An operation's id.
pub(super) type OpId = [u8; OP_ID];

/// Written when the operation is known.
const ORDER: &str = "op";
/// Written when it is over.
const DONE: &str = "done";

/// One operation.
#[derive(Debug)]
pub(super) struct Op {
    /// Its id.
    pub(super) id: OpId,
    /// What is to be done.
    pub(super) order: Operation,
    /// The supervisor's own: a start of what has ended.
    pub(super) respawn: bool,
    /// Its own directory; there only for one that runs a command.
    pub(super) dir: PathBuf,
    /// How it ended, and when (unix milliseconds).
    pub(super) outcome: watch::Sender<Option<(Arc<Outcome>, u64)>>,
}

/// All that are known.
#[derive(Debug)]
pub(super) struct Ops {
    dir: PathBuf,
    most: usize,
    kept: Duration,
    all: Mutex<HashMap<OpId, Arc<Op>>>,
}

/// What becomes of an order.
#[derive(Debug)]
pub(super) enum Admitted {
    /// It is known already.
    Known(Arc<Op>),
    /// It is to be carried out.
    New(Arc<Op>),
    /// There are too many.
    Full,
}

impl Ops {
    pub(super) fn new(dir: PathBuf, most: usize, kept: Duration) -> Self {
        Self {
            dir,
            most,
            kept,
            all: Mutex::new(HashMap::new()),
        }
    }

    fn op(&self, id: OpId, order: Operation, respawn: bool, outcome: Option<(Arc<Outcome>, u64)>) -> Arc<Op> {
        Arc::new(Op {
            id,
            order,
            respawn,
            dir: self.dir.join(hex::encode(id)),
            outcome: watch::Sender::new(outcome),
        })
    }

    /// The one of this id.
    pub(super) fn get(&self, id: &OpId) -> Option<Arc<Op>> {
        self.all.lock().get(id).cloned()
    }

    /// Takes an order, once.
    pub(super) fn admit(&self, id: OpId, order: Operation) -> Admitted {
        let mut all = self.all.lock();
        if let Some(op) = all.get(&id) {
            return Admitted::Known(Arc::clone(op));
        }
        if all.len() >= self.most {
            return Admitted::Full;
        }
        let op = self.op(id, order, false, None);
        all.insert(id, Arc::clone(&op));
        Admitted::New(op)
    }

    /// A start of the supervisor's own.
    pub(super) fn respawn(&self, order: Operation) -> Arc<Op> {
        self.op(rand::random(), order, true, None)
    }

    /// A directory for a command that is no operation.
    pub(super) fn scratch(&self) -> PathBuf {
        self.dir.join(format!("tmp-{}", hex::encode(rand::random::<[u8; 8]>())))
    }

    /// What an earlier agent process has left: operations that are not over. Those that are over are known from now on. Blocking.
    ///
    /// # Errors
    /// When the directory can't be made or read.
    pub(super) fn load(&self) -> io::Result<Vec<Arc<Op>>> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let mut open = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            match self.load_one(&path) {
                Ok(Some(op)) => {
                    if !op.respawn {
                        self.all.lock().insert(op.id, Arc::clone(&op));
                    }
                    if op.outcome.borrow().is_none() {
                        open.push(op);
                    }
                }
                Ok(None) => remove(&path),
                Err(error) => {
                    tracing::warn!(
                        "the operation in {} is damaged and was dropped: {error}",
                        path.display()
                    );
                    remove(&path);
                }
            }
        }
        Ok(open)
    }

    fn load_one(&self, path: &Path) -> io::Result<Option<Arc<Op>>> {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let Some(id) = hex::decode(name).ok().and_then(|id| OpId::try_from(id).ok()) else {
            return Ok(None);
        };
        let record = match Record::read(&path.join(ORDER)) {
            Ok(record) => record,
            // Killed before it was written: nothing was begun.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let order = Operation::decode(record.need("order")?).map_err(|_| bad("the order does not decode"))?;
        let respawn = record.number::<u8>("respawn")? != 0;
        let outcome = match Record::read(&path.join(DONE)) {
            Ok(record) => {
                let outcome =
                    Outcome::decode(record.need("outcome")?).map_err(|_| bad("the outcome does not decode"))?;
                Some((Arc::new(outcome), record.number("at")?))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Some(self.op(id, order, respawn, outcome)))
    }

    /// Forgets those that are over for long enough; blocking for what is on disk.
    pub(super) fn sweep(&self) {
        let now = unix_ms();
        let kept = u64::try_from(self.kept.as_millis()).unwrap_or(u64::MAX);
        let mut all = self.all.lock();
        let mut over: Vec<(u64, OpId)> = all
            .values()
            .filter_map(|op| op.outcome.borrow().as_ref().map(|(_, at)| (*at, op.id)))
            .collect();
        over.sort_unstable();
        // Room for new ones comes before old results.
        let surplus = all.len().saturating_sub(self.most - self.most / 8);
        let old: Vec<Arc<Op>> = over
            .iter()
            .enumerate()
            .filter(|(place, (at, _))| *place < surplus || now.saturating_sub(*at) >= kept)
            .filter_map(|(_, (_, id))| all.remove(id))
            .collect();
        drop(all);
        for op in old {
            remove(&op.dir);
        }
    }
}

impl Op {
    /// Writes it down, for good, before its command can start. Blocking.
    ///
    /// # Errors
    /// What the system says; then nothing of it may be begun.
    pub(super) fn write(&self) -> io::Result<()> {
        if self.dir.join(ORDER).exists() {
            return Ok(());
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let mut record = Record::default();
        record.set("order", self.order.encode_to_vec());
        record.set_number("respawn", i128::from(self.respawn));
        record.write(&self.dir.join(ORDER))?;
        sync_dir(&self.dir)?;
        self.dir.parent().map_or(Ok(()), sync_dir)
    }

    /// Writes how it ended, if it was written down, and keeps nothing else of it. Blocking.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn write_end(&self, outcome: &Outcome, at: u64) -> io::Result<()> {
        if !self.dir.join(ORDER).exists() {
            return Ok(());
        }
        if self.respawn {
            remove(&self.dir);
            return Ok(());
        }
        let mut record = Record::default();
        record.set("outcome", outcome.encode_to_vec()).set_number("at", at);
        record.write(&self.dir.join(DONE))?;
        sync_dir(&self.dir)?;
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_some() {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Ends it for those who wait.
    pub(super) fn end(&self, outcome: Outcome, at: u64) {
        self.outcome.send_replace(Some((Arc::new(outcome), at)));
    }
}

/// Takes a directory away with all that is in it. What is left is tried again at the next start.
pub(super) fn remove(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!("{} cannot be removed: {error}", dir.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ops(dir: &Path) -> Ops {
        Ops::new(dir.join("ops"), 16, Duration::from_secs(3600))
    }

    fn order(n: u8) -> Operation {
        Operation {
            op_id: vec![n; OP_ID].into(),
            op_type: 1,
            ..Operation::default()
        }
    }

    #[test]
    fn known_ones_are_not_begun_again() {
        let dir = tempfile::tempdir().unwrap();
        let first = ops(dir.path());
        assert!(first.load().unwrap().is_empty());
        let Admitted::New(op) = first.admit([1; OP_ID], order(1)) else {
            panic!("not new")
        };
        assert!(matches!(first.admit([1; OP_ID], order(1)), Admitted::Known(_)));
        op.write().unwrap();
        let Admitted::New(done) = first.admit([2; OP_ID], order(2)) else {
            panic!("not new")
        };
        done.write().unwrap();
        fs::write(done.dir.join("0.out"), b"x").unwrap();
        let outcome = Outcome {
            code: 7,
            ..Outcome::default()
        };
        done.write_end(&outcome, unix_ms()).unwrap();
        assert!(!done.dir.join("0.out").exists());
        // One that never got to disk may be begun by whoever asks again.
        assert!(matches!(first.admit([3; OP_ID], order(3)), Admitted::New(_)));

        let second = ops(dir.path());
        let open = second.load().unwrap();
        assert_eq!(open.len(), 1);
        assert_eq!(open[0].order, order(1));
        let Admitted::Known(known) = second.admit([2; OP_ID], order(2)) else {
            panic!("not known")
        };
        assert_eq!(known.outcome.borrow().as_ref().unwrap().0.code, 7);
        assert!(matches!(second.admit([3; OP_ID], order(3)), Admitted::New(_)));
    }

    #[test]
    fn bounded_and_the_oldest_results_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let ops = ops(dir.path());
        ops.load().unwrap();
        for n in 0..16u8 {
            let Admitted::New(op) = ops.admit([n; OP_ID], order(n)) else {
                panic!("{n} is not new")
            };
            if n < 8 {
                op.end(Outcome::default(), unix_ms() + u64::from(n));
            }
        }
        assert!(matches!(ops.admit([99; OP_ID], order(99)), Admitted::Full));
        ops.sweep();
        assert!(ops.get(&[0; OP_ID]).is_none() && ops.get(&[7; OP_ID]).is_some());
        assert!(matches!(ops.admit([99; OP_ID], order(99)), Admitted::New(_)));
    }

    #[test]
    fn damaged_ones_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let first = ops(dir.path());
        first.load().unwrap();
        let Admitted::New(op) = first.admit([1; OP_ID], order(1)) else {
            panic!("not new")
        };
        op.write().unwrap();
        fs::write(op.dir.join(ORDER), b"x").unwrap();
        fs::create_dir(dir.path().join("ops/tmp-1")).unwrap();
        assert!(ops(dir.path()).load().unwrap().is_empty());
        assert_eq!(fs::read_dir(dir.path().join("ops")).unwrap().count(), 0);
    }
}
