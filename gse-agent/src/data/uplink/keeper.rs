//! The keeper of the spool: the only one who writes to it, reads from it and releases in it, and the one who keeps the counters on disk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::{Buf, BufMut, Bytes};
use futures::FutureExt;
use gse_core::spool::{Entry, Put, Recovery, Spool, SpoolConfig, SpoolError, SyncPolicy, WhenFull};
use gse_proto::datalink::MAX_BODY;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot, watch};

use super::Shared;
use crate::data::counts::{Counts, Reason};
use crate::data::flow::{Batch, Found, Kept};

/// Bytes that are written to the spool in one go.
const WRITE: usize = 2 << 20;
/// Before a disk that refused is asked again.
const RETRY: Duration = Duration::from_secs(1);
/// What a disk does wrong is spoken of this often.
const SAY_EVERY: Duration = Duration::from_secs(30);
/// Numbers set apart each time the counters are kept: those above the last one kept may be in use when the agent is killed.
const RESERVE: u64 = 1_000_000;

/// A wish of the link: what stands in the spool after `after`.
pub(super) struct Ask {
    pub(super) after: u64,
    pub(super) most: usize,
    pub(super) answer: oneshot::Sender<Vec<Entry>>,
}

/// See the module.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    spool: Arc<Mutex<Spool>>,
    asked: mpsc::Receiver<Ask>,
    link_left: watch::Receiver<bool>,
    spool_id: [u8; 16],
    committed: Option<Kept>,
    committed_at: Instant,
    retry_at: Option<Instant>,
    said: Option<Instant>,
}

/// The note that is kept with the spool.
struct Note {
    kept: Kept,
    reserved: u64,
    clean: bool,
    spool_id: [u8; 16],
}

impl Note {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        out.put_u8(1);
        out.put_u8(u8::from(self.clean));
        out.put_slice(&self.spool_id);
        out.put_u64(self.kept.last_seq);
        out.put_u64(self.reserved);
        self.kept.counts.encode(&mut out);
        out
    }

    fn decode(mut from: &[u8]) -> Option<Self> {
        if from.try_get_u8().ok()? != 1 {
            return None;
        }
        let clean = from.try_get_u8().ok()? == 1;
        let mut spool_id = [0; 16];
        from.try_copy_to_slice(&mut spool_id).ok()?;
        let last_seq = from.try_get_u64().ok()?;
        let reserved = from.try_get_u64().ok()?;
        let counts = Counts::decode(from)?;
        Some(Self {
            kept: Kept { counts, last_seq },
            reserved,
            clean,
            spool_id,
        })
    }
}

impl Keeper {
    /// Opens the spool, and tells the flow what was found there.
    pub(super) async fn open(
        shared: Arc<Shared>,
        asked: mpsc::Receiver<Ask>,
        link_left: watch::Receiver<bool>,
    ) -> anyhow::Result<Self> {
        let config = &shared.config;
        let spool_config = SpoolConfig {
            dir: config.data_dir.clone(),
            segment_bytes: config.spool_segment_bytes,
            max_bytes: config.spool_bytes,
            max_entry_bytes: MAX_BODY,
            when_full: WhenFull::DropOldest,
            sync: SyncPolicy::Never,
        };
        let opened = tokio::task::spawn_blocking(move || {
            let (spool, recovery) = Spool::open(spool_config)?;
            let note = Note::decode(spool.note());
            let last_kept = note.as_ref().map_or(0, |note| note.kept.last_seq);
            let newer = spool.after(last_kept)?.records;
            Ok::<_, SpoolError>((spool, recovery, note, newer))
        });
        let (spool, recovery, note, newer) = opened.await.context("opening the spool")??;
        let spool_id = note.as_ref().map_or_else(rand::random, |note| note.spool_id);
        let reserved = note.as_ref().map_or(0, |note| note.reserved);
        let was_clean = note.as_ref().is_none_or(|note| note.clean);
        let kept = note.map_or(
            Kept {
                counts: Counts::default(),
                last_seq: 0,
            },
            |note| note.kept,
        );
        let found = Found {
            records: spool.records(),
            newer,
            last_seq: spool.last_index(),
            acked: spool.released(),
        };
        let missing = if was_clean || !recovery.is_clean() {
            Reason::Damaged
        } else {
            Reason::Killed
        };
        shared.intake.flow.lock().restore(&kept, found, reserved + 1, missing);
        tell(&recovery, &spool);
        let mut keeper = Self {
            shared,
            spool: Arc::new(Mutex::new(spool)),
            asked,
            link_left,
            spool_id,
            committed: None,
            committed_at: Instant::now(),
            retry_at: None,
            said: None,
        };
        keeper.commit(false).await;
        Ok(keeper)
    }

    /// Names the sequence of this spool's batches. A copy of the directory on another host (an image of a disk) is another sequence.
    pub(super) fn spool_id(&self) -> Bytes {
        let mut hash = Sha256::new();
        hash.update(self.spool_id);
        hash.update(self.shared.identity.agent_id.as_bytes());
        Bytes::copy_from_slice(&hash.finalize()[..16])
    }

    /// Does what is due, until the lifecycle closes; then everything is in the spool.
    pub(super) async fn run(mut self) {
        let life = self.shared.life.clone();
        loop {
            let closing = life.closing().now_or_never().is_some();
            // Once nobody sends any more there is only the disk.
            let everything = closing || *self.link_left.borrow();
            let wait = self.step(everything).await;
            if closing {
                self.leave().await;
                return;
            }
            let Some(wait) = wait else {
                // There is more to do; the link is not to wait for the end of it.
                if let Ok(ask) = self.asked.try_recv() {
                    self.answer(ask).await;
                }
                continue;
            };
            let due = async {
                match wait {
                    Wait::Until(at) => tokio::time::sleep_until(at.into()).await,
                    Wait::Long => std::future::pending().await,
                }
            };
            let left = *self.link_left.borrow();
            tokio::select! {
                () = life.closing() => {}
                () = self.shared.intake.to_keep.notified() => {}
                () = due => {}
                changed = self.link_left.changed(), if !left => {
                    if changed.is_err() {
                        // It has panicked, and the agent ends.
                        life.closing().await;
                    }
                }
                Some(ask) = self.asked.recv() => self.answer(ask).await,
            }
        }
    }

    /// Does what is due; none: there is more. Otherwise how long there is nothing.
    async fn step(&mut self, everything: bool) -> Option<Wait> {
        let now = Instant::now();
        let acked = {
            let flow = self.shared.intake.flow.lock();
            flow.on_disk().then(|| flow.acked_seq())
        };
        if let Some(acked) = acked {
            self.release(acked).await;
        }
        let mut wait = self.retry_at.filter(|at| *at > now);
        let mut wrote = false;
        if wait.is_none() {
            let due = self.shared.intake.flow.lock().overdue(now, everything, WRITE);
            match due {
                Ok(batches) => {
                    self.write(batches).await;
                    wrote = true;
                }
                Err(at) => wait = at,
            }
        }
        let kept = self.shared.intake.flow.lock().kept();
        if self.committed != Some(kept) {
            let due = self.committed_at + Duration::from_millis(self.shared.config.keep_counts_ms);
            if due <= now {
                self.commit(false).await;
            } else {
                wait = Some(wait.map_or(due, |at| at.min(due)));
            }
        }
        if wrote {
            return None;
        }
        Some(wait.map_or(Wait::Long, Wait::Until))
    }

    /// Something to be done with the spool, on a thread that may block.
    async fn on_disk<T: Send + 'static>(&self, job: impl FnOnce(&mut Spool) -> T + Send + 'static) -> Option<T> {
        let spool = Arc::clone(&self.spool);
        let done = tokio::task::spawn_blocking(move || job(&mut spool.lock())).await;
        match done {
            Ok(done) => Some(done),
            Err(error) => {
                self.shared.life.fail(format!("the spool of data: {error}"));
                None
            }
        }
    }

    async fn write(&mut self, batches: Vec<Batch>) {
        let last: Vec<u64> = batches.iter().map(|batch| batch.seq).collect();
        let appended = self
            .on_disk(move |spool| {
                let puts: Vec<Put<'_>> = batches
                    .iter()
                    .map(|batch| Put {
                        index: batch.seq,
                        records: batch.records,
                        body: &batch.body,
                    })
                    .collect();
                spool.append(&puts)
            })
            .await;
        let Some(appended) = appended else {
            self.shared.intake.flow.lock().spooled(0);
            self.retry_at = Some(Instant::now() + RETRY);
            return;
        };
        let upto = appended.written.checked_sub(1).and_then(|at| last.get(at)).copied();
        {
            let mut flow = self.shared.intake.flow.lock();
            flow.spooled(upto.unwrap_or(0));
            flow.lost(Reason::SpoolFull, appended.dropped.records);
        }
        self.shared.metrics.spooled.inc_by(appended.written as u64);
        self.shared.intake.to_send.notify_one();
        self.retry_at = None;
        match appended.failed {
            None => self.shared.health.set("data spool", Ok(())),
            Some(error) => {
                self.shared.metrics.spool_failures.inc();
                self.retry_at = Some(Instant::now() + RETRY);
                self.shared.health.set("data spool", Err(error.to_string()));
                self.say(
                    &error,
                    "records wait in memory; past its bound they are dropped and counted",
                );
            }
        }
    }

    /// Lets go of what is acknowledged.
    async fn release(&mut self, upto: u64) {
        let released = self
            .on_disk(move |spool| (spool.released() < upto).then(|| spool.release(upto)))
            .await;
        match released {
            None | Some(None) => {}
            Some(Some(Ok(released))) => {
                let mut flow = self.shared.intake.flow.lock();
                flow.released(released.released.records);
                flow.lost(Reason::Damaged, released.damaged.records);
            }
            Some(Some(Err(error))) => self.say(&error, "acknowledged records stay in the spool for now"),
        }
    }

    async fn answer(&mut self, ask: Ask) {
        let Ask { after, most, answer } = ask;
        let found = match self.on_disk(move |spool| spool.read(after, most)).await {
            None => return,
            Some(Ok(found)) => found,
            Some(Err(error)) => {
                self.say(&error, "records wait in the spool");
                tokio::time::sleep(RETRY).await;
                return;
            }
        };
        self.shared
            .intake
            .flow
            .lock()
            .lost(Reason::Damaged, found.damaged.records);
        if answer.send(found.entries).is_err() {
            tracing::debug!("the data link did not wait for what it asked of the spool");
        }
    }

    /// Keeps the counters, and takes files away that are of no more use.
    async fn commit(&mut self, clean: bool) {
        let (kept, next_seq) = {
            let flow = self.shared.intake.flow.lock();
            (flow.kept(), flow.next_seq())
        };
        let note = Note {
            kept,
            reserved: if clean { next_seq } else { next_seq + RESERVE },
            clean,
            spool_id: self.spool_id,
        }
        .encode();
        self.committed_at = Instant::now();
        let done = self
            .on_disk(move |spool| {
                spool.commit(&note)?;
                if clean { spool.sync() } else { Ok(()) }
            })
            .await;
        match done {
            None => {}
            Some(Ok(())) => self.committed = Some(kept),
            Some(Err(error)) => self.say(&error, "the counters are not kept for now"),
        }
    }

    /// The last thing: everything that is not acknowledged is on disk, and the counters say so.
    async fn leave(&mut self) {
        for _ in 0..64 {
            let due = self.shared.intake.flow.lock().overdue(Instant::now(), true, WRITE);
            let Ok(batches) = due else { break };
            self.write(batches).await;
            if self.retry_at.is_some() {
                break;
            }
        }
        let acked = self.shared.intake.flow.lock().acked_seq();
        self.release(acked).await;
        self.commit(true).await;
        let snapshot = self.shared.intake.flow.lock().snapshot();
        if snapshot.in_memory > 0 {
            tracing::error!(
                records = snapshot.in_memory,
                "records could not be written to the spool and are lost"
            );
        }
        tracing::info!(
            records = snapshot.on_disk,
            "records stay in the spool until the agent runs again"
        );
    }

    fn say(&mut self, error: &SpoolError, what: &'static str) {
        let now = Instant::now();
        if self.said.is_none_or(|at| now - at >= SAY_EVERY) {
            self.said = Some(now);
            tracing::error!("{error}; {what}");
        }
    }
}

/// How long there is nothing to do, unless somebody says something.
enum Wait {
    Until(Instant),
    Long,
}

fn tell(recovery: &Recovery, spool: &Spool) {
    if spool.entries() > 0 || !recovery.is_clean() {
        tracing::info!(
            records = recovery.found.records,
            cut_bytes = recovery.cut_bytes,
            damaged_records = recovery.damaged.records,
            set_aside = ?recovery.set_aside,
            "the spool has records from before"
        );
    }
}
