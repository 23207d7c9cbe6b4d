//! What is common to all sinks: a worker takes what waits, hands it on in groups, one at a time and in order.
//!
//! A group that is not taken within `sinks.spool_after_ms`, or behind which the queue is full, is written to the spool, and
//! acknowledged; from then on everything goes through the spool, until that is empty. A failed group is tried again after a pause,
//! for ever.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use gse_core::random::Random;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::spool::Backlog;
use super::{Chunk, Dropped, Failure, Group, Load, Shared, Writer};
use crate::config::Config;
use crate::ingest::book::Ticket;
use crate::metrics::SinkName;
use crate::routes::table::{SinkSpec, StreamTo};

/// Between two attempts to find room for what is held.
const LOOK: Duration = Duration::from_millis(100);
/// A stopping server still hands on for so long.
const STOPPING: Duration = Duration::from_secs(3);

/// A group that is being handed on, or will be again.
struct Attempt {
    group: Arc<Group>,
    /// Who waits for it; nobody when it is in the spool.
    tickets: Vec<Ticket>,
    /// The spool has it, up to this entry.
    upto: Option<u64>,
    begun: Instant,
    /// It was tried to put it in the spool.
    asked: bool,
    /// Loads of it, from the first, that are there.
    kept: usize,
}

/// An attempt's writer, if it can go on, and what it says.
type Done = (Option<Box<dyn Writer>>, Result<Dropped, Failure>);

/// See the module.
pub(super) struct Worker {
    name: String,
    config: Config,
    shared: Arc<Shared>,
    chunks: mpsc::Receiver<Chunk>,
    specs: watch::Receiver<Arc<StreamTo>>,
    stop: watch::Receiver<bool>,
    /// The queue is full, and has been for a while.
    full: Arc<Notify>,
    backlog: Backlog,
    writer: Option<Box<dyn Writer>>,
    held: VecDeque<Chunk>,
    /// Since when there has been neither room on disk nor progress.
    stuck: Option<Instant>,
    failing: bool,
}

impl Worker {
    pub(super) fn new(
        name: String,
        config: Config,
        shared: Arc<Shared>,
        (chunks, full): (mpsc::Receiver<Chunk>, Arc<Notify>),
        specs: watch::Receiver<Arc<StreamTo>>,
        stop: watch::Receiver<bool>,
        backlog: Backlog,
    ) -> Self {
        Self {
            name,
            config,
            shared,
            chunks,
            specs,
            stop,
            full,
            backlog,
            writer: None,
            held: VecDeque::new(),
            stuck: None,
            failing: false,
        }
    }

    pub(super) async fn run(mut self) {
        let limits = self.config.sinks.clone();
        let spool_after = Duration::from_millis(limits.spool_after_ms);
        let mut attempt: Option<Attempt> = None;
        let mut under_way: Option<BoxFuture<'static, Done>> = None;
        let mut pause = Duration::from_millis(limits.retry_min_ms);
        let mut again = Instant::now();
        let mut end: Option<Instant> = None;
        let random = Random::system();
        if self.specs.borrow().sink == SinkSpec::Relay {
            // Its link is there before the first record.
            self.writer = Some(self.make());
        }
        loop {
            if under_way.is_none() && Instant::now() >= again {
                if attempt.is_none() && !self.backlog.is_empty() {
                    attempt = self.next_spooled().await;
                    if attempt.is_none() {
                        again = Instant::now() + pause;
                    }
                }
                under_way = attempt.as_ref().map(|attempt| self.begin(Arc::clone(&attempt.group)));
            }
            self.figures();
            if let Some(end) = end {
                let done =
                    attempt.is_none() && self.backlog.is_empty() && self.chunks.is_empty() && self.held.is_empty();
                if done || Instant::now() >= end || self.failing {
                    break;
                }
            }
            let late = attempt.as_ref().is_some_and(|one| one.asked);
            let spooling = late || !self.backlog.is_empty();
            let spool_at = attempt.as_ref().map_or(again, |one| one.begun + spool_after);
            let ask = attempt.as_ref().is_some_and(|one| !one.asked);
            let idle = under_way.is_none() && (attempt.is_some() || !self.backlog.is_empty());
            tokio::select! {
                (writer, result) = async { match &mut under_way { Some(one) => one.await, None => std::future::pending().await } } => {
                    under_way = None;
                    self.writer = writer;
                    match result {
                        Ok(dropped) => {
                            pause = Duration::from_millis(limits.retry_min_ms);
                            if let Some(one) = attempt.take() {
                                self.done(one, dropped).await;
                            }
                        }
                        Err(failure) => {
                            self.failed(&failure);
                            self.give_up(&mut attempt).await;
                            // Spread, for whatever many proxies or sinks lost at one time.
                            again = Instant::now() + random.jittered(pause);
                            pause = (pause * 2).min(Duration::from_millis(limits.retry_max_ms));
                        }
                    }
                }
                Some(chunk) = self.chunks.recv(), if self.held.is_empty() && (spooling || attempt.is_none()) => {
                    let chunks = self.gather(chunk);
                    if spooling {
                        self.held.extend(chunks);
                        self.make_room().await;
                    } else {
                        attempt = Some(Attempt::of(chunks));
                    }
                }
                () = sleep_until(spool_at), if ask => {
                    if let Some(one) = &mut attempt {
                        self.keep_attempt(one).await;
                    }
                }
                () = self.full.notified(), if ask => {
                    if let Some(one) = &mut attempt {
                        self.keep_attempt(one).await;
                    }
                }
                () = sleep_until(again), if idle => {}
                () = async { match &mut self.writer { Some(writer) => writer.idle().await, None => std::future::pending().await } }, if under_way.is_none() => {}
                () = sleep(LOOK), if !self.held.is_empty() || end.is_some() => self.make_room().await,
                Ok(()) = self.specs.changed() => {
                    self.specs.mark_unchanged();
                    tracing::info!(sink = self.name, "a stream was changed; records go where it leads now");
                    under_way = None;
                    self.writer = None;
                    again = Instant::now();
                }
                Ok(()) = self.stop.changed() => end = Some(Instant::now() + STOPPING),
            }
        }
        drop(under_way);
        self.leave(attempt).await;
    }

    /// What waits, up to the size of a group.
    fn gather(&mut self, first: Chunk) -> Vec<Chunk> {
        let mut size = first.load.size;
        let mut chunks = vec![first];
        while size < self.config.sinks.group_bytes
            && let Ok(next) = self.chunks.try_recv()
        {
            size += next.load.size;
            chunks.push(next);
        }
        chunks
    }

    fn make(&mut self) -> Box<dyn Writer> {
        let spec = Arc::clone(&self.specs.borrow_and_update());
        make(&spec, &self.config, &self.shared.metrics.upstream_links)
    }

    fn begin(&mut self, group: Arc<Group>) -> BoxFuture<'static, Done> {
        let mut writer = match self.writer.take() {
            Some(writer) => writer,
            None => self.make(),
        };
        let limit = Duration::from_millis(self.config.sinks.attempt_timeout_ms);
        async move {
            if writer.patient() {
                let result = writer.write(&group).await;
                return (Some(writer), result);
            }
            match timeout(limit, writer.write(&group)).await {
                Ok(Ok(dropped)) => (Some(writer), Ok(dropped)),
                // What it was connected to is not trusted any more.
                Ok(Err(failure)) => (None, Err(failure)),
                Err(_) => (None, Err(format!("not taken within {limit:?}"))),
            }
        }
        .boxed()
    }

    async fn next_spooled(&mut self) -> Option<Attempt> {
        match self.backlog.oldest(self.config.sinks.group_bytes).await {
            Ok((loads, upto)) if upto > 0 => Some(Attempt {
                group: Arc::new(Group { loads }),
                tickets: vec![],
                upto: Some(upto),
                begun: Instant::now(),
                asked: true,
                kept: 0,
            }),
            Ok(_) => None,
            Err(error) => {
                tracing::error!(sink = self.name, error, "a spool can't be read");
                None
            }
        }
    }

    async fn done(&mut self, attempt: Attempt, dropped: Dropped) {
        if self.failing {
            tracing::info!(
                sink = self.name,
                backlog = self.backlog.records(),
                "a sink takes records again"
            );
            self.failing = false;
        }
        self.stuck = None;
        self.shared.delivered(&self.name, &attempt.group.loads);
        self.shared.not_delivered(&self.name, dropped);
        for ticket in attempt.tickets {
            ticket.settle();
        }
        if let Some(upto) = attempt.upto
            && let Err(error) = self.backlog.release(upto).await
        {
            tracing::error!(
                sink = self.name,
                error,
                "a spool can't let go of what was handed on; it may come twice"
            );
        }
    }

    fn failed(&mut self, failure: &str) {
        let sink = self.name.clone();
        self.shared.metrics.failures.get_or_create(&SinkName { sink }).inc();
        if self.failing {
            tracing::debug!(sink = self.name, failure, "a sink still does not take records");
        } else {
            tracing::warn!(
                sink = self.name,
                failure,
                "a sink does not take records; they wait in its spool"
            );
            self.failing = true;
        }
    }

    /// Writes a group that takes long to the spool, in front of all that follows.
    async fn keep_attempt(&mut self, attempt: &mut Attempt) {
        attempt.asked = true;
        let loads = attempt.group.loads.clone();
        let wanted = loads.len();
        let written = self.keep(loads).await;
        attempt.kept = written;
        if written > 0 {
            attempt.upto = Some(self.backlog.last());
        }
        if written == wanted {
            for ticket in attempt.tickets.drain(..) {
                ticket.settle();
            }
        }
    }

    /// A group that found no room on disk is put there when there is some, or dropped when its senders have been held for long: they
    /// have records for other sinks too.
    async fn give_up(&mut self, attempt: &mut Option<Attempt>) {
        let Some(one) = attempt.as_mut().filter(|one| one.asked && !one.tickets.is_empty()) else {
            return;
        };
        // In the spool nothing may stand between the parts of a group, or be released with it.
        if one.upto.is_none() && self.backlog.is_empty() {
            self.keep_attempt(one).await;
        }
        if one.tickets.is_empty() || !self.is_stuck(one.begun) {
            return;
        }
        for load in one.group.loads.iter().skip(one.kept) {
            self.shared.dropped(&self.name, load, self.no_room());
        }
        for ticket in one.tickets.drain(..) {
            ticket.settle();
        }
        *attempt = None;
    }

    /// Whether senders were held, since `now` or longer, for as long as they may be. From then on they are not held again until
    /// something moves: a dead sink slows the others' records for a moment, not for as long as it is dead.
    fn is_stuck(&mut self, now: Instant) -> bool {
        let since = *self.stuck.get_or_insert(now);
        since.elapsed() >= Duration::from_millis(self.config.sinks.hold_ms)
    }

    fn no_room(&self) -> &'static str {
        if self.backlog.exists() {
            "spool_full"
        } else {
            "no_spool"
        }
    }

    /// How many of them are in the spool now, from the first.
    async fn keep(&mut self, loads: Vec<Load>) -> usize {
        if !self.backlog.exists() {
            return 0;
        }
        let counts: Vec<u64> = loads.iter().map(|load| load.records).collect();
        match self.backlog.keep(loads).await {
            Ok(kept) => {
                if let Some(error) = kept.failed {
                    tracing::debug!(sink = self.name, %error, "a sink's spool takes no more");
                }
                let sink = self.name.clone();
                let records = counts.iter().take(kept.written).sum();
                self.shared
                    .metrics
                    .spooled
                    .get_or_create(&SinkName { sink })
                    .inc_by(records);
                if kept.written > 0 {
                    self.stuck = None;
                }
                kept.written
            }
            Err(error) => {
                tracing::error!(sink = self.name, error, "a sink's spool can't be written");
                0
            }
        }
    }

    /// Puts what is held into the spool. When that has no room and the sink has been still for long, what is held is dropped.
    async fn make_room(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let loads = self.held.iter().map(|chunk| chunk.load.clone()).collect();
        let written = self.keep(loads).await;
        for chunk in self.held.drain(..written.min(self.held.len())) {
            chunk.ticket.settle();
        }
        if !self.held.is_empty() && self.is_stuck(Instant::now()) {
            let reason = self.no_room();
            for chunk in self.held.drain(..) {
                self.shared.dropped(&self.name, &chunk.load, reason);
                chunk.ticket.settle();
            }
        }
    }

    fn figures(&mut self) {
        let damaged = self.backlog.take_damaged();
        if damaged > 0 {
            self.shared.metrics.dropped(&self.name, "damaged", damaged);
        }
        let label = || SinkName {
            sink: self.name.clone(),
        };
        let metrics = &self.shared.metrics;
        let backlog = i64::try_from(self.backlog.records()).unwrap_or(i64::MAX);
        metrics.backlog.get_or_create(&label()).set(backlog);
        let queued = self.chunks.len() + self.held.len();
        metrics
            .queued
            .get_or_create(&label())
            .set(i64::try_from(queued).unwrap_or(i64::MAX));
    }

    /// Writes what could not be handed on to the spool; what does not fit there is not acknowledged, and comes again.
    async fn leave(&mut self, attempt: Option<Attempt>) {
        if let Some(mut one) = attempt
            && !one.tickets.is_empty()
            && !one.asked
        {
            self.keep_attempt(&mut one).await;
        }
        while let Ok(chunk) = self.chunks.try_recv() {
            self.held.push_back(chunk);
        }
        let loads: Vec<Load> = self.held.iter().map(|chunk| chunk.load.clone()).collect();
        if !loads.is_empty() {
            let written = self.keep(loads).await;
            for chunk in self.held.drain(..written.min(self.held.len())) {
                chunk.ticket.settle();
            }
        }
        if !self.backlog.is_empty() {
            tracing::info!(
                sink = self.name,
                records = self.backlog.records(),
                "records wait in the spool for the next start"
            );
        }
    }
}

impl Attempt {
    fn of(chunks: Vec<Chunk>) -> Self {
        let (loads, tickets) = chunks.into_iter().map(|chunk| (chunk.load, chunk.ticket)).unzip();
        Self {
            group: Arc::new(Group { loads }),
            tickets,
            upto: None,
            begun: Instant::now(),
            asked: false,
            kept: 0,
        }
    }
}

/// What leads where a stream says.
fn make(stream: &StreamTo, config: &Config, upstream_links: &Gauge) -> Box<dyn Writer> {
    match &stream.sink {
        SinkSpec::File(spec) => match super::file::Files::new(spec, config, stream.id == 0) {
            Ok(files) => Box::new(files),
            Err(reason) => unusable(stream, "bad_directory", reason),
        },
        SinkSpec::Redis(spec) => Box::new(super::redis::Publisher::new(spec.clone())),
        SinkSpec::Relay => Box::new(super::relay::Relay::new(
            config.upstream.clone(),
            upstream_links.clone(),
        )),
        #[cfg(feature = "kafka")]
        SinkSpec::Kafka(spec) => Box::new(super::kafka::Producer::new(spec)),
        #[cfg(not(feature = "kafka"))]
        SinkSpec::Kafka(_) => unusable(
            stream,
            "unsupported",
            "this gse_data was built without Kafka (cargo feature kafka)".into(),
        ),
        SinkSpec::Pulsar(_) => unusable(stream, "unsupported", "Pulsar is not supported".into()),
    }
}

fn unusable(stream: &StreamTo, reason: &'static str, text: String) -> Box<dyn Writer> {
    tracing::error!(
        stream = stream.id,
        name = stream.name,
        text,
        "records for this stream are dropped and counted"
    );
    Box::new(Unusable(reason))
}

/// Where nothing can ever go.
struct Unusable(&'static str);

impl Writer for Unusable {
    fn write<'a>(&'a mut self, group: &'a Group) -> super::Attempted<'a> {
        let parts = group.loads.iter().flat_map(|load| &load.parts);
        let dropped = parts.map(|part| (part.data_id, self.0, part.records.into())).collect();
        async { Ok(dropped) }.boxed()
    }
}
