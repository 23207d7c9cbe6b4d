//! The copy itself: one pass over all keys, rounds over what has changed, a comparison, and the last step while commands are held.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::talk::{insist, purge, scan, scanned};
use super::track::Mark;
use super::values::{self, Head, Kind, cmd, with};
use super::{End, Job, Progress, Reply, Trouble, Words};

/// Rounds over what has changed before the copy says that it does not get nearer.
const ROUNDS: u32 = 60;
/// Marks taken at once.
const TAKE: usize = 20_000;

/// Copies the keys of one job.
pub(crate) struct Copier {
    pub(super) job: Job,
    /// Values go over as the servers' own serialization, as long as both understand it.
    dump: bool,
    memory: bool,
    /// Whether each end says when a key expires, or only how long it still lives.
    pub(super) exact: [bool; 2],
    probed: bool,
    flushes: u64,
    unknown: u64,
    pub(super) deadline: Option<Instant>,
}

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source = 0,
    Target = 1,
}

fn is_unknown(r: &Reply) -> bool {
    r.error().is_some_and(|e| {
        let e = e.to_ascii_lowercase();
        e.contains("unknown command")
            || e.contains("not supported")
            || e.contains("not allowed")
            || e.contains("unknown subcommand")
    })
}

impl Copier {
    pub(crate) fn new(job: Job) -> Self {
        Self {
            flushes: job.tracker.flushes(),
            unknown: job.tracker.unknown(),
            job,
            dump: true,
            memory: true,
            exact: [true; 2],
            probed: false,
            deadline: None,
        }
    }

    pub(super) fn end(&self, side: Side) -> Arc<dyn End> {
        Arc::clone(match side {
            Side::Source => &self.job.source,
            Side::Target => &self.job.target,
        })
    }

    /// Sends commands until they are answered, as long as there is patience; what is sent here may be sent twice.
    pub(super) async fn ask(&self, side: Side, commands: &[Words]) -> Result<Vec<Reply>, Trouble> {
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        let end = self.end(side);
        insist(
            &*end,
            commands,
            self.job.settings.patience,
            self.deadline,
            &self.job.stop,
        )
        .await
    }

    /// Sends commands that must not be sent twice.
    pub(super) async fn ask_once(&self, side: Side, commands: &[Words]) -> Result<Vec<Reply>, Trouble> {
        let end = self.end(side);
        insist(&*end, commands, Duration::ZERO, self.deadline, &self.job.stop).await
    }

    /// Finds out what both ends can do.
    pub(super) async fn probe(&mut self) -> Result<(), Trouble> {
        if std::mem::replace(&mut self.probed, true) {
            return Ok(());
        }
        let nobody = super::words([&[super::RESERVED, b"nobody"].concat()]).remove(0);
        for side in [Side::Source, Side::Target] {
            let got = self
                .ask(
                    side,
                    &[
                        cmd(&[b"PEXPIRETIME", &nobody]),
                        cmd(&[b"DUMP", &nobody]),
                        cmd(&[b"MEMORY", b"USAGE", &nobody]),
                    ],
                )
                .await?;
            self.exact[side as usize] = got.first().is_some_and(|r| !is_unknown(r));
            self.dump &= got.get(1).is_some_and(|r| r.error().is_none());
            if side == Side::Source {
                self.memory = got.get(2).is_some_and(|r| r.error().is_none());
            }
        }
        let size = self.ask(Side::Source, &[cmd(&[b"DBSIZE"])]).await?;
        let size = size.first().and_then(Reply::int).unwrap_or(0).max(0) as u64;
        self.job.progress.expected.store(size, Ordering::Relaxed);
        Ok(())
    }

    /// Copies every key once. What changes meanwhile is marked for [`Copier::converge`].
    pub(crate) async fn copy_all(&mut self) -> Result<(), Trouble> {
        self.probe().await?;
        loop {
            if self.pass().await? {
                return Ok(());
            }
            Progress::add(&self.job.progress.restarts, 1);
            self.empty_target().await?;
        }
    }

    async fn empty_target(&mut self) -> Result<(), Trouble> {
        self.flushes = self.job.tracker.flushes();
        let end = self.end(Side::Target);
        purge(
            &*end,
            &self.job.filter,
            &self.job.pace,
            &self.job.stop,
            self.job.settings.patience,
        )
        .await
    }

    /// One pass over the source; false when all keys were deleted meanwhile, so that what is at the target may be of before.
    async fn pass(&mut self) -> Result<bool, Trouble> {
        let mut cursor = Bytes::from_static(b"0");
        loop {
            let (next, keys) = self.page(Side::Source, &cursor).await?;
            for part in keys.chunks(self.job.settings.batch) {
                if self.job.tracker.flushes() != self.flushes {
                    return Ok(false);
                }
                let bytes = self.copy(part).await?;
                Progress::add(&self.job.progress.scanned, part.len() as u64);
                self.pause(bytes, part.len() as u64).await?;
            }
            cursor = next;
            if cursor == "0" {
                return Ok(self.job.tracker.flushes() == self.flushes);
            }
        }
    }

    pub(super) async fn pause(&self, bytes: u64, keys: u64) -> Result<(), Trouble> {
        // While commands are held there is no time to be gentle.
        if self.deadline.is_some() {
            return Ok(());
        }
        self.job.pace.spent(bytes, keys, &self.job.stop).await
    }

    /// One step of an iteration over the keys that are meant.
    pub(super) async fn page(&self, side: Side, cursor: &Bytes) -> Result<(Bytes, Vec<Bytes>), Trouble> {
        let got = self.ask(side, &[scan(cursor)]).await?;
        let (next, mut keys) = scanned(&got)?;
        keys.retain(|k| self.job.filter.has(k));
        Ok((next, keys))
    }

    /// Copies these keys as they are now. Gives the bytes that went over.
    pub(super) async fn copy(&mut self, keys: &[Bytes]) -> Result<u64, Trouble> {
        match self.try_copy(keys).await {
            Ok(bytes) => {
                Progress::add(&self.job.progress.copied, keys.len() as u64);
                Progress::add(&self.job.progress.bytes, bytes);
                Ok(bytes)
            }
            Err(e) => {
                // None of them is known to be right now.
                self.job.tracker.again(keys.iter());
                Err(e)
            }
        }
    }

    /// Type, expiry and size of keys; None for one that is not there, or is changing.
    pub(super) async fn heads(&self, side: Side, keys: &[Bytes]) -> Result<Vec<Option<Head>>, Trouble> {
        let exact = self.exact[side as usize];
        let asked: Vec<Words> = keys.iter().flat_map(|k| values::ask_head(k, exact)).collect();
        let got = self.ask(side, &asked).await?;
        let mut heads: Vec<Option<Head>> = Vec::with_capacity(keys.len());
        for pair in got.chunks(2) {
            let [kind, expires] = pair else { continue };
            heads.push(match (Kind::of(kind), values::expiry(expires, exact)?) {
                (Some(kind), Some(expires)) => Some(Head {
                    kind,
                    expires,
                    len: 0,
                    bytes: 0,
                }),
                _ => None,
            });
        }
        let there: Vec<(usize, Kind)> = heads
            .iter()
            .enumerate()
            .filter_map(|(i, h)| h.map(|h| (i, h.kind)))
            .collect();
        let memory = side == Side::Source && self.memory;
        let mut asked = Vec::new();
        for (i, kind) in &there {
            let Some(key) = keys.get(*i) else { continue };
            asked.push(cmd(&[kind.length(), key]));
            if memory && *kind != Kind::String {
                asked.push(cmd(&[b"MEMORY", b"USAGE", key]));
            }
        }
        let mut got = self.ask(side, &asked).await?.into_iter();
        for (i, kind) in there {
            let len = got.next().and_then(|r| r.int()).unwrap_or(0).max(0) as u64;
            let bytes = match kind {
                Kind::String => len,
                _ if memory => got.next().and_then(|r| r.int()).unwrap_or(0).max(0) as u64,
                _ => len * 64,
            };
            if let Some(Some(h)) = heads.get_mut(i) {
                (h.len, h.bytes) = (len, bytes);
            }
        }
        Ok(heads)
    }

    pub(super) fn is_big(&self, h: &Head) -> bool {
        let s = &self.job.settings;
        h.bytes > s.part_bytes || (h.kind != Kind::String && h.kind != Kind::Other && h.len > s.big_elements)
    }

    async fn try_copy(&mut self, keys: &[Bytes]) -> Result<u64, Trouble> {
        self.job.tracker.clear(keys.iter());
        let heads = self.heads(Side::Source, keys).await?;
        let (mut total, mut gone) = (0, Vec::new());
        let mut small: Vec<(&Bytes, Head)> = Vec::new();
        let mut waiting = 0;
        for (key, head) in keys.iter().zip(heads) {
            match head {
                None => gone.push(cmd(&[b"UNLINK", key])),
                Some(h) if h.kind == Kind::Other && !self.dump => {
                    return Err(Trouble::Unfit(format!(
                        "key {:?} is of a module's type, which can only go to a server with that module",
                        String::from_utf8_lossy(key)
                    )));
                }
                Some(h) if h.kind != Kind::Other && (self.is_big(&h) || (h.kind == Kind::Stream && !self.dump)) => {
                    total += self.copy_big(key, h).await?;
                }
                Some(h) => {
                    small.push((key, h));
                    waiting += h.bytes;
                    if waiting > self.job.settings.part_bytes {
                        total += self.copy_small(&small).await?;
                        small.clear();
                        waiting = 0;
                    }
                }
            }
        }
        self.ask(Side::Target, &gone).await?;
        Ok(total + self.copy_small(&small).await?)
    }

    /// Values that go over in one piece each.
    async fn copy_small(&mut self, keys: &[(&Bytes, Head)]) -> Result<u64, Trouble> {
        if keys.is_empty() {
            return Ok(0);
        }
        if self.dump {
            let read: Vec<Words> = keys.iter().map(|(k, _)| cmd(&[b"DUMP", k])).collect();
            let got = self.ask(Side::Source, &read).await?;
            let (mut write, mut bytes) = (Vec::new(), 0);
            for ((key, h), r) in keys.iter().zip(&got) {
                let Some(value) = r.bytes() else {
                    write.push(cmd(&[b"UNLINK", key]));
                    continue;
                };
                bytes += value.len() as u64;
                let at = Bytes::from(h.expires.max(0).to_string());
                let options = [
                    value.clone(),
                    Bytes::from_static(b"REPLACE"),
                    Bytes::from_static(b"ABSTTL"),
                ];
                write.push(with("RESTORE", key, std::iter::once(at).chain(options)));
            }
            let done = self.ask(Side::Target, &write).await?;
            let Some(e) = done.iter().find_map(Reply::error) else {
                return Ok(bytes);
            };
            // Another version's serialization, or a store that has none: by type then, from here on.
            tracing::info!(reason = e, target = %self.job.target.name(), "values are copied by their types");
            self.dump = false;
            for (key, h) in keys {
                if h.kind == Kind::Stream {
                    self.copy_big(key, *h).await?;
                } else if h.kind == Kind::Other {
                    return Err(Trouble::Unfit(format!(
                        "key {:?} is of a module's type and the target does not take it: {e}",
                        String::from_utf8_lossy(key)
                    )));
                }
            }
        }
        let keys: Vec<&(&Bytes, Head)> = keys.iter().filter(|(_, h)| h.kind != Kind::Stream).collect();
        let read: Vec<Words> = keys.iter().map(|(k, h)| values::read(h.kind, k)).collect();
        let got = self.ask(Side::Source, &read).await?;
        let (mut write, mut bytes) = (Vec::new(), 0);
        for ((key, h), r) in keys.iter().zip(&got) {
            write.push(cmd(&[b"UNLINK", key]));
            match values::add(h.kind, key, r, 500) {
                Some(add) => {
                    bytes += add.iter().flatten().map(|w| w.len() as u64).sum::<u64>();
                    let any = !add.is_empty();
                    write.extend(add);
                    if any && h.expires >= 0 {
                        write.push(cmd(&[b"PEXPIREAT", key, h.expires.to_string().as_bytes()]));
                    }
                }
                // It was deleted, or became something else, between the questions: whoever did so marks it, or has already.
                None => self.job.tracker.again(std::iter::once(*key)),
            }
        }
        let done = self.ask(Side::Target, &write).await?;
        match done.iter().find_map(Reply::error) {
            None => Ok(bytes),
            Some(e) => Err(Trouble::Unfit(format!(
                "{} does not take a value: {e}",
                self.job.target.name()
            ))),
        }
    }

    /// Copies what has changed until little is left or it does not become less. Gives how many keys are marked then.
    pub(crate) async fn converge(&mut self) -> Result<usize, Trouble> {
        self.probe().await?;
        let (mut best, mut worse) = (usize::MAX, 0);
        for _ in 0..ROUNDS {
            self.catch_up().await?;
            let left = self.job.tracker.len();
            if left < best {
                (best, worse) = (left, 0);
            } else {
                worse += 1;
            }
            if left <= 8 || worse >= 3 {
                return Ok(left);
            }
            self.round().await?;
        }
        Ok(self.job.tracker.len())
    }

    /// What concerns all keys, when there was such.
    async fn catch_up(&mut self) -> Result<(), Trouble> {
        if self.job.tracker.flushes() != self.flushes {
            Progress::add(&self.job.progress.restarts, 1);
            self.empty_target().await?;
            self.copy_all().await?;
        }
        if self.job.tracker.unknown() != self.unknown {
            self.unknown = self.job.tracker.unknown();
            self.compare(false).await?;
        }
        Ok(())
    }

    /// Copies what is marked now.
    async fn round(&mut self) -> Result<usize, Trouble> {
        let marks = self.job.tracker.take(TAKE);
        let n = marks.len();
        let (mut whole, mut parts) = (Vec::new(), Vec::new());
        for (key, mark) in marks {
            match mark {
                Mark::Whole => whole.push(key),
                Mark::Elements(of) => parts.push((key, of)),
            }
        }
        Progress::add(&self.job.progress.again, n as u64);
        let result = self.round_of(&whole, &parts).await;
        if result.is_err() {
            self.job.tracker.again(whole.iter().chain(parts.iter().map(|(k, _)| k)));
        }
        result.map(|()| n)
    }

    async fn round_of(
        &mut self,
        whole: &[Bytes],
        parts: &[(Bytes, std::collections::HashSet<Bytes>)],
    ) -> Result<(), Trouble> {
        for (key, of) in parts {
            let bytes = self.patch(key, of).await?;
            self.pause(bytes, 1).await?;
        }
        for part in whole.chunks(self.job.settings.batch) {
            let bytes = self.copy(part).await?;
            self.pause(bytes, part.len() as u64).await?;
        }
        Ok(())
    }

    /// The last step, while nothing that concerns these keys is under way or comes. True: the target has all. False: it takes longer than `limit`; what is left is
    /// marked, and it can go on with [`Copier::converge`] and be tried again.
    pub(crate) async fn finish(&mut self, limit: Duration) -> Result<bool, Trouble> {
        self.deadline = Some(Instant::now() + limit);
        let result = self.rest().await;
        self.deadline = None;
        match result {
            Ok(()) => Ok(true),
            Err(Trouble::Late) => Ok(false),
            Err(e) => Err(e),
        }
    }

    async fn rest(&mut self) -> Result<(), Trouble> {
        self.probe().await?;
        loop {
            self.catch_up().await?;
            if self.round().await? == 0 {
                return Ok(());
            }
        }
    }
}
