//! The orders of this agent: taken once however often they come, carried out a few at a time, ended once, reported until that is known.
//!
//! What an order does is the business of [`super::place`], [`super::source`] and [`super::target`]; how reports travel, of
//! [`super::link`].

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use gse_bt::FilePool;
use gse_core::clock::Clock;
use gse_core::lifecycle::Lifecycle;
use gse_proto::codes::Inner;
use gse_proto::file::order::What;
use gse_proto::file::{Order, Phase, Placing, Push, Report};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, sleep, timeout};

use super::cell::{Cell, Done, Key, failed, is_final, is_telling};
use super::config::FilesConfig;
use super::journal::{Journal, Kept};
use super::link::{Identity, Links};
use super::metrics::Metrics;
use super::swarm::Swarms;
use super::worker::Failed;
use super::{place, source, target};

/// Longest report that is given as the answer of a call; longer ones take the link.
const ANSWER_BYTES: usize = 192 << 10;
/// How long something that was stopped may take to notice it.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// An order that is over is remembered for so long after the moment from which nobody may begin it.
const MARGIN_MS: u64 = 60_000;
/// Between two looks for what can be forgotten.
const SWEEP: Duration = Duration::from_secs(30);

/// File transfers of this agent.
#[derive(Debug, Clone)]
pub struct Files {
    inner: Arc<Shared>,
}

/// What all orders share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: FilesConfig,
    pub(super) life: Lifecycle,
    pub(super) metrics: Metrics,
    pub(super) links: Links,
    pub(super) swarms: Swarms,
    /// Files of all swarms that are open.
    pub(super) open_files: FilePool,
    /// How many may fetch at once.
    pub(super) fetching: Semaphore,
    orders: Mutex<HashMap<Key, Arc<Cell>>>,
    journal: Journal,
    slots: Semaphore,
    clock: Clock,
    /// What the server's clock is ahead, in ms.
    ahead: AtomicI64,
    /// Something is to be told over a link.
    pub(super) changed: Notify,
}

impl Files {
    /// Takes up what an earlier life of the agent left.
    ///
    /// # Errors
    /// When the journal cannot be used.
    pub async fn start(
        config: FilesConfig,
        identity: Identity,
        metrics: Metrics,
        life: &Lifecycle,
    ) -> anyhow::Result<Self> {
        let root = config.data_dir.clone();
        let opened = tokio::task::spawn_blocking(move || Journal::open(&root)).await;
        let (journal, kept) = opened.context("reading the journal of file orders")??;
        let inner = Arc::new(Shared {
            slots: Semaphore::new(config.transfers),
            orders: Mutex::default(),
            journal,
            links: Links::new(identity),
            swarms: Swarms::default(),
            open_files: FilePool::new(config.open_files, metrics.peers.open_files.clone()),
            fetching: Semaphore::new(config.swarms),
            metrics,
            clock: Clock::system(),
            ahead: AtomicI64::new(0),
            changed: Notify::new(),
            life: life.clone(),
            config,
        });
        for one in kept {
            Shared::restore(&inner, one);
        }
        life.spawn_contained("file orders", Shared::sweep(Arc::clone(&inner)));
        Ok(Self { inner })
    }

    /// The server's clock, as a session's welcome told it.
    pub fn server_time(&self, server_ms: u64) {
        let ahead = i128::from(server_ms) - i128::from(self.inner.clock.unix_ms());
        let ahead = i64::try_from(ahead).unwrap_or(0);
        self.inner.ahead.store(ahead, Ordering::Relaxed);
    }

    /// Answers a call of the service "file": takes an order, or says what has become of it.
    pub async fn call(&self, payload: Bytes) -> Bytes {
        let report = match Order::decode(payload) {
            Ok(order) => self.inner.order(order).await,
            Err(error) => failed(
                &Order::default(),
                Failed::new(Inner::Arguments, format!("not an order: {error}")),
            ),
        };
        report.encode_to_vec().into()
    }
}

impl Shared {
    /// Unix milliseconds on the server's clock.
    fn now_ms(&self) -> u64 {
        self.clock
            .unix_ms()
            .saturating_add_signed(self.ahead.load(Ordering::Relaxed))
    }

    /// Orders whose reports travel to `server`.
    pub(super) fn linked_to(&self, server: &str) -> Vec<Arc<Cell>> {
        let orders = self.orders.lock();
        let linked = orders
            .values()
            .filter(|cell| cell.wants_link() && cell.server().as_deref() == Some(server));
        linked.cloned().collect()
    }

    /// Reports of the order travel over the link from now on.
    pub(super) fn link_now(self: &Arc<Self>, cell: &Cell) {
        cell.linked.store(true, Ordering::Release);
        Links::need(self, cell);
    }

    fn restore(shared: &Arc<Self>, kept: Kept) {
        let cell = Arc::new(Cell::new(&kept.order));
        cell.linked.store(true, Ordering::Release);
        shared.orders.lock().insert(cell.key.clone(), Arc::clone(&cell));
        match kept.end {
            Some(end) => {
                cell.report.send_replace(Some(end));
                *cell.ended.lock() = Some(Instant::now());
            }
            None => {
                let run = Self::run(Arc::clone(shared), Arc::clone(&cell), kept.order, true);
                shared.life.spawn_contained("file order", run);
            }
        }
        Links::need(shared, &cell);
    }

    /// Takes an order, or says what has become of it.
    pub(super) async fn order(self: &Arc<Self>, order: Order) -> Report {
        let key = Key {
            task_id: order.task_id.clone(),
            order: order.order,
        };
        let cancels = matches!(order.what, Some(What::Cancel(_)));
        let (cell, fresh) = {
            let mut orders = self.orders.lock();
            match orders.get(&key) {
                Some(cell) => (Arc::clone(cell), false),
                None if orders.len() >= self.config.max_orders => {
                    return failed(
                        &order,
                        Failed::new(
                            Inner::Limit,
                            format!("this agent has {} orders already (files.max_orders)", orders.len()),
                        ),
                    );
                }
                None => {
                    let cell = Arc::new(Cell::new(&order));
                    orders.insert(key, Arc::clone(&cell));
                    (cell, true)
                }
            }
        };
        if cancels {
            cell.stop.terminate();
            cell.cancel.cancel();
        }
        if fresh {
            let run = Self::run(Arc::clone(self), Arc::clone(&cell), order, false);
            self.life.spawn_contained("file order", run);
        } else if let Some(before) = cell.move_to(&order.servers) {
            // Another instance of the server has the task now.
            self.links.ask_too(&before, &cell.server().unwrap_or_default());
            if cell.linked.load(Ordering::Acquire) {
                Links::need(self, &cell);
            }
        }
        let mut reports = cell.report.subscribe();
        // It is written down first; if it can't be, that is its end.
        let taken = reports.wait_for(Option::is_some).await;
        drop(taken);
        let over = reports.wait_for(|report| report.as_ref().is_some_and(is_telling));
        // Over or not: what there is to say is said.
        drop(timeout(self.config.answer(), over).await);
        let report = cell.report().unwrap_or_default();
        if is_final(&report) && report.encoded_len() <= ANSWER_BYTES {
            cell.answered.store(true, Ordering::Release);
            return report;
        }
        self.link_now(&cell);
        if !is_final(&report) && report.encoded_len() <= ANSWER_BYTES {
            return report;
        }
        // It is too long for an answer.
        Report {
            phase: Phase::Moving.into(),
            manifest_id: Bytes::new(),
            inline_manifest: Bytes::new(),
            inline_content: Bytes::new(),
            ended_ms: 0,
            ..report
        }
    }

    /// The whole life of an order.
    async fn run(self: Arc<Self>, cell: Arc<Cell>, order: Order, again: bool) {
        if !again {
            let (shared, key, copy) = (Arc::clone(&self), cell.key.clone(), order.clone());
            let taken = tokio::task::spawn_blocking(move || shared.journal.take(&key, &copy)).await;
            if let Err(error) = taken.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
                let why = Failed::new(Inner::Write, format!("the order can't be written down: {error}"));
                self.metrics.ended(why.code);
                cell.report.send_replace(Some(failed(&order, why)));
                self.over(&cell);
                return;
            }
        }
        self.metrics.taken.inc();
        let started_ms = self.now_ms();
        cell.report.send_replace(Some(Report {
            task_id: order.task_id.clone(),
            order: order.order,
            phase: Phase::Queued.into(),
            started_ms,
            ..Report::default()
        }));
        let placing = match &order.what {
            Some(What::Push(push)) => push.placing.clone(),
            Some(What::Target(target)) => target.placing.clone(),
            _ => None,
        };
        let outcome = self.carry_out(&cell, order, again).await;
        if cell.stop.is_paused() {
            return;
        }
        if outcome.is_err()
            && let Some(placing) = placing
        {
            self.clear(&cell, placing, again).await;
        }
        let mut end = cell.report().unwrap_or_default();
        end.ended_ms = self.now_ms().max(started_ms);
        match outcome {
            Ok(done) => {
                end.phase = Phase::Done.into();
                end.code = 0;
                done.put(&mut end);
            }
            Err(why) => {
                tracing::info!(
                    task = end.task_id,
                    order = end.order,
                    code = why.code,
                    "file order failed: {why}"
                );
                end.phase = Phase::Failed.into();
                end.code = why.code;
                end.message = why.message;
            }
        }
        self.metrics.ended(end.code);
        let (shared, at, kept) = (Arc::clone(&self), Arc::clone(&cell), end.clone());
        let noted = tokio::task::spawn_blocking(move || shared.journal.end(&at.key, &at.order, &kept)).await;
        if let Err(error) = noted.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
            tracing::warn!(%error, "the end of a file order can't be written down; after a restart it is carried out again");
        }
        cell.report.send_replace(Some(end));
        self.over(&cell);
    }

    /// An order has come to nothing: its resume map goes, and what an earlier life of the agent has left at the target. Whatever this
    /// life has made, its own work has removed already.
    async fn clear(self: &Arc<Self>, cell: &Arc<Cell>, placing: Placing, again: bool) {
        let clearing = self.blocking_always(cell, move |shared, cell| {
            match std::fs::remove_file(shared.journal.resume_map(&cell.key)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(%error, "the resume map of an order that is over can't be removed");
                }
                _ => {}
            }
            if again {
                return place::sweep(&shared.config, &cell.key, &placing);
            }
            Ok(())
        });
        let task = &cell.key.task_id;
        // A directory that hangs must not keep the row.
        match timeout(STOP_GRACE, clearing).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(task, %error, "what an earlier life of the agent has left of a file order could not be removed");
            }
            Err(_) => tracing::warn!(
                task,
                "removing what is left of a file order takes long; its end does not wait"
            ),
        }
    }

    fn over(&self, cell: &Cell) {
        *cell.ended.lock() = Some(Instant::now());
        self.changed.notify_waiters();
    }

    async fn carry_out(self: &Arc<Self>, cell: &Arc<Cell>, order: Order, again: bool) -> Result<Done, Failed> {
        cell.stop.check()?;
        let now = self.now_ms();
        let left = Duration::from_millis(order.not_after_ms.saturating_sub(now));
        if left.is_zero() {
            cell.stop.time_out();
        }
        cell.stop.check()?;
        let watch = async {
            tokio::select! {
                () = sleep(left) => cell.stop.time_out(),
                () = cell.cancel.cancelled() => cell.stop.terminate(),
                () = self.life.draining() => cell.stop.pause(),
            }
            cell.cancel.cancel();
        };
        let work = async {
            match order.what.clone() {
                Some(What::Push(push)) => self.push(cell, push).await,
                Some(What::Source(what)) => source::offer(self, cell, what).await,
                Some(What::Target(what)) => target::fetch(self, cell, what, again).await,
                Some(What::Cancel(_)) => cell.stop.check().map(|()| Done::default()),
                None => Err(Failed::new(
                    Inner::Arguments,
                    "the agent does not know what this order asks for; it is older than the server",
                )),
            }
        };
        tokio::pin!(work);
        tokio::select! {
            done = &mut work => return done,
            () = watch => {}
        }
        // Everything that takes time looks at the flag; what hangs in the system is left behind.
        match timeout(STOP_GRACE, work).await {
            Ok(Err(why)) if cell.stop.check().is_ok() => Err(why),
            // It was finished at the last moment.
            Ok(Ok(done)) if !cell.stop.is_paused() => Ok(done),
            Ok(_) | Err(_) => Err(cell
                .stop
                .check()
                .err()
                .unwrap_or_else(|| Failed::new(Inner::System, "stopped"))),
        }
    }

    async fn push(self: &Arc<Self>, cell: &Arc<Cell>, push: Push) -> Result<Done, Failed> {
        let size = push.content.len() as u64;
        cell.tell(|report| report.size = size);
        let placing = push.placing.clone().unwrap_or_default();
        self.blocking(cell, move |shared, cell| {
            place::push(
                &shared.config,
                &cell.key,
                &placing,
                &push.content,
                &push.sha256,
                &cell.stop,
            )
        })
        .await?;
        cell.moved.store(size, Ordering::Relaxed);
        self.metrics.bytes_in.inc_by(size);
        Ok(Done::of(size))
    }

    /// Does something that blocks.
    pub(super) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        work: impl FnOnce(&Shared, &Cell) -> Result<T, Failed> + Send + 'static,
    ) -> Result<T, Failed> {
        let slot = tokio::select! {
            slot = self.slots.acquire() => slot.map_err(|_| Failed::new(Inner::System, "the agent is being stopped"))?,
            () = cell.cancelled() => return Err(cell.stop.check().err().unwrap_or_else(|| Failed::new(Inner::System, "stopped"))),
        };
        cell.tell(|report| {
            if report.phase() == Phase::Queued {
                report.phase = Phase::Moving.into();
            }
        });
        let done = self.blocking_always(cell, work).await;
        drop(slot);
        done
    }

    /// As [`Shared::blocking`], without waiting for a turn, and also when the order is to end.
    pub(super) async fn blocking_always<T: Send + 'static>(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        work: impl FnOnce(&Shared, &Cell) -> Result<T, Failed> + Send + 'static,
    ) -> Result<T, Failed> {
        let (shared, at) = (Arc::clone(self), Arc::clone(cell));
        let done = tokio::task::spawn_blocking(move || work(&shared, &at)).await;
        done.unwrap_or_else(|error| {
            Err(Failed::new(
                Inner::System,
                format!("the agent's own work failed: {error}"),
            ))
        })
    }

    /// The server has the final report of an order.
    pub(super) fn stored(&self, key: &Key) {
        if let Some(cell) = self.orders.lock().get(key) {
            cell.stored.store(true, Ordering::Release);
            // The server has it; here it is not needed any more.
            cell.manifest.lock().take();
            cell.report.send_modify(|report| {
                if let Some(report) = report {
                    report.inline_content = Bytes::new();
                    report.inline_manifest = Bytes::new();
                }
            });
        }
    }

    /// Where the pieces of an unfinished target are written down.
    pub(super) fn resume_map(&self, key: &Key) -> std::path::PathBuf {
        self.journal.resume_map(key)
    }

    /// Forgets orders that nobody can ask for any more.
    async fn sweep(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.life.draining() => return,
                () = sleep(SWEEP) => {}
            }
            let now = self.now_ms();
            let keep = Duration::from_millis(self.config.keep_ms);
            let old: Vec<Key> = {
                let orders = self.orders.lock();
                let forgettable = orders.values().filter(|cell| {
                    let Some(ended) = *cell.ended.lock() else { return false };
                    let late = now > cell.order.not_after_ms.saturating_add(MARGIN_MS);
                    late && (cell.is_settled() || ended.elapsed() > keep)
                });
                forgettable.map(|cell| cell.key.clone()).collect()
            };
            if old.is_empty() {
                continue;
            }
            let shared = Arc::clone(&self);
            let forgotten = tokio::task::spawn_blocking(move || {
                for key in old {
                    if let Err(error) = shared.journal.forget(&key) {
                        tracing::warn!(%error, "a file order can't be removed from the disk");
                    }
                    shared.orders.lock().remove(&key);
                }
            });
            if let Err(error) = forgotten.await {
                tracing::warn!(%error, "old file orders could not be forgotten");
            }
        }
    }
}
