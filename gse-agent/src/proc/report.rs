//! What goes to the servers about processes, and when: changes soon and together, everything after a connect and then rarely, one report at a
//! time, each again until it is acknowledged. An agent without registrations says nothing. What a report says of a process is put together by
//! whoever asks for one.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use gse_proto::proc::{MAX_REPORTED, ProcReport, Process};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::config::ProcConfig;
use super::registry::Key;

/// See the module.
#[derive(Debug)]
pub(super) struct Reporter {
    inner: Mutex<Inner>,
    wake: Notify,
    changes: Duration,
    all: Duration,
    again: Duration,
}

#[derive(Debug, Default)]
struct Inner {
    attached: bool,
    sequence: u64,
    snapshots: u64,
    changed: BTreeSet<Arc<Key>>,
    gone: BTreeSet<Arc<Key>>,
    changed_since: Option<Instant>,
    /// A snapshot under way, and what it has still to name.
    snapshot: Option<(u64, VecDeque<Arc<Key>>)>,
    /// When the next one is due.
    snapshot_at: Option<Instant>,
    under_way: Option<UnderWay>,
    rebuilt: bool,
    /// Something was told once, so the store has something.
    spoken: bool,
}

#[derive(Debug)]
struct UnderWay {
    report: ProcReport,
    sent: Instant,
}

/// What there is to do.
enum Next {
    Send(Box<ProcReport>),
    Build {
        snapshot: u64,
        keys: Vec<Arc<Key>>,
        gone: Vec<Arc<Key>>,
        last: bool,
    },
    WaitUntil(Option<Instant>),
}

impl Reporter {
    /// Nothing is reported before a session is there. `rebuilt`: the memory of registrations began anew.
    pub(super) fn new(config: &ProcConfig, rebuilt: bool) -> Self {
        Self {
            inner: Mutex::new(Inner {
                rebuilt,
                // Numbers of one life are above those of the one before, as far as clocks go forward.
                sequence: crate::proc::unix_ms(),
                snapshots: crate::proc::unix_ms(),
                ..Inner::default()
            }),
            wake: Notify::new(),
            changes: Duration::from_millis(config.report_changes_ms),
            all: Duration::from_secs(config.report_all_s),
            again: Duration::from_millis(config.report_again_ms),
        }
    }

    /// A new session: everything is told anew. `any`: whether anything is registered.
    pub(super) fn attach(&self, any: bool) {
        let mut inner = self.inner.lock();
        inner.attached = true;
        inner.under_way = None;
        inner.snapshot = None;
        inner.snapshot_at = (any || inner.rebuilt || inner.spoken).then(Instant::now);
        drop(inner);
        self.wake.notify_one();
    }

    /// This one is not as it was.
    pub(super) fn changed(&self, key: &Arc<Key>) {
        let mut inner = self.inner.lock();
        inner.changed.insert(Arc::clone(key));
        inner.gone.remove(key);
        inner.changed_since.get_or_insert_with(Instant::now);
        drop(inner);
        self.wake.notify_one();
    }

    /// This one is no longer known.
    pub(super) fn gone(&self, key: &Arc<Key>) {
        let mut inner = self.inner.lock();
        inner.changed.remove(key);
        inner.gone.insert(Arc::clone(key));
        inner.changed_since.get_or_insert_with(Instant::now);
        drop(inner);
        self.wake.notify_one();
    }

    /// The store has a report. True when with that it knows that the memory of registrations began anew.
    pub(super) fn acknowledged(&self, sequence: u64) -> bool {
        let mut inner = self.inner.lock();
        let Some(under_way) = inner.under_way.take_if(|u| u.report.sequence == sequence) else {
            return false;
        };
        inner.spoken = true;
        let told = under_way.report.rebuilt && under_way.report.last;
        inner.rebuilt &= !told;
        drop(inner);
        self.wake.notify_one();
        told
    }

    /// The next report, as soon as one is due. `all` names everything, `of` says what there is to say about some. Dropped half-way, it
    /// loses nothing.
    pub(super) async fn next(
        &self,
        all: impl Fn() -> Vec<Arc<Key>>,
        of: impl Fn(&[Arc<Key>]) -> Vec<Process>,
    ) -> ProcReport {
        loop {
            match self.look(&all) {
                Next::Send(report) => return *report,
                Next::Build {
                    snapshot,
                    keys,
                    gone,
                    last,
                } => {
                    // Nothing waits in here, so nobody can be in between.
                    let processes = of(&keys);
                    let mut inner = self.inner.lock();
                    inner.sequence += 1;
                    let report = ProcReport {
                        sequence: inner.sequence,
                        snapshot,
                        last,
                        processes,
                        gone: gone.iter().map(|key| key.to_wire()).collect(),
                        rebuilt: inner.rebuilt,
                    };
                    inner.under_way = Some(UnderWay {
                        report: report.clone(),
                        sent: Instant::now(),
                    });
                    return report;
                }
                Next::WaitUntil(at) => {
                    let asleep = async {
                        match at {
                            Some(at) => tokio::time::sleep_until(at).await,
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        () = asleep => {}
                        () = self.wake.notified() => {}
                    }
                }
            }
        }
    }

    fn look(&self, all: &impl Fn() -> Vec<Arc<Key>>) -> Next {
        let now = Instant::now();
        let mut inner = self.inner.lock();
        if !inner.attached {
            return Next::WaitUntil(None);
        }
        if let Some(under_way) = &mut inner.under_way {
            let due = under_way.sent + self.again;
            if now < due {
                return Next::WaitUntil(Some(due));
            }
            under_way.sent = now;
            return Next::Send(Box::new(under_way.report.clone()));
        }
        if inner.snapshot.is_none() && inner.snapshot_at.is_some_and(|at| at <= now) {
            drop(inner);
            let keys: VecDeque<Arc<Key>> = all().into();
            inner = self.inner.lock();
            inner.snapshots += 1;
            let any = !keys.is_empty();
            inner.snapshot = Some((inner.snapshots, keys));
            // About so often: hosts that connected together do not go on together.
            let spread = self.all.mul_f64(rand::random_range(0.8..1.2));
            inner.snapshot_at = any.then_some(now + spread);
        }
        if let Some((snapshot, rest)) = &mut inner.snapshot {
            let snapshot = *snapshot;
            let keys: Vec<Arc<Key>> = rest.drain(..rest.len().min(MAX_REPORTED)).collect();
            let last = rest.is_empty();
            if last {
                inner.snapshot = None;
            }
            for key in &keys {
                inner.changed.remove(key);
            }
            if inner.changed.is_empty() && inner.gone.is_empty() {
                inner.changed_since = None;
            }
            return Next::Build {
                snapshot,
                keys,
                gone: Vec::new(),
                last,
            };
        }
        let Some(since) = inner.changed_since else {
            return Next::WaitUntil(inner.snapshot_at);
        };
        let due = since + self.changes;
        if now < due {
            return Next::WaitUntil(Some(inner.snapshot_at.map_or(due, |at| at.min(due))));
        }
        let mut keys = Vec::new();
        while keys.len() < MAX_REPORTED
            && let Some(key) = inner.changed.pop_first()
        {
            keys.push(key);
        }
        if inner.changed.is_empty() {
            inner.changed_since = None;
        }
        if inner.snapshot_at.is_none() {
            inner.snapshot_at = Some(now + self.all);
        }
        // Whoever has come back since is told of with the others.
        let gone = std::mem::take(&mut inner.gone);
        let gone = gone.into_iter().filter(|key| !keys.contains(key)).collect();
        Next::Build {
            snapshot: 0,
            keys,
            gone,
            last: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> Arc<Key> {
        Arc::new(Key {
            namespace: "n".to_owned(),
            name: format!("{n:05}"),
        })
    }

    async fn next(reporter: &Reporter, count: usize) -> Option<ProcReport> {
        let all = || (0..count).map(key).collect();
        let of = |keys: &[Arc<Key>]| {
            let of = |key: &Arc<Key>| Process {
                key: Some(key.to_wire()),
                ..Process::default()
            };
            keys.iter().map(of).collect()
        };
        tokio::time::timeout(Duration::from_secs(10), reporter.next(all, of))
            .await
            .ok()
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_said_of_nothing() {
        let reporter = Reporter::new(&ProcConfig::default(), false);
        assert!(next(&reporter, 5).await.is_none(), "there is no session");
        reporter.attach(false);
        assert!(next(&reporter, 0).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_memory_is_told_once() {
        let reporter = Reporter::new(&ProcConfig::default(), true);
        reporter.attach(false);
        let report = next(&reporter, 0).await.unwrap();
        assert!(report.rebuilt && report.last && report.processes.is_empty());
        assert!(reporter.acknowledged(report.sequence));
        assert!(next(&reporter, 0).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn everything_in_parts_then_changes_together() {
        let reporter = Reporter::new(&ProcConfig::default(), false);
        reporter.changed(&key(1));
        reporter.attach(true);
        let first = next(&reporter, 501).await.unwrap();
        assert_eq!((first.processes.len(), first.last), (500, false));
        assert!(next(&reporter, 501).await.is_none(), "one at a time");
        reporter.acknowledged(first.sequence);
        let second = next(&reporter, 501).await.unwrap();
        assert_eq!((second.processes.len(), second.last), (1, true));
        assert_eq!(second.snapshot, first.snapshot);
        reporter.acknowledged(second.sequence);
        assert!(next(&reporter, 501).await.is_none(), "the snapshot has told the change");
        reporter.changed(&key(7));
        reporter.changed(&key(3));
        reporter.changed(&key(7));
        let changes = next(&reporter, 501).await.unwrap();
        assert_eq!((changes.snapshot, changes.processes.len()), (0, 2));
        reporter.acknowledged(changes.sequence);
        reporter.changed(&key(4));
        reporter.gone(&key(4));
        let gone = next(&reporter, 501).await.unwrap();
        assert_eq!((gone.processes.len(), gone.gone.len()), (0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn said_again_until_it_is_acknowledged() {
        let config = ProcConfig {
            report_again_ms: 3_000,
            ..ProcConfig::default()
        };
        let reporter = Reporter::new(&config, false);
        reporter.attach(true);
        let report = next(&reporter, 2).await.unwrap();
        assert_eq!(next(&reporter, 2).await.unwrap(), report);
        reporter.acknowledged(report.sequence + 1);
        assert_eq!(next(&reporter, 2).await.unwrap(), report);
        reporter.attach(true);
        let anew = next(&reporter, 2).await.unwrap();
        assert!(anew.sequence > report.sequence && anew.snapshot > report.snapshot);
    }
}
