//! The active instance at work: looks at all agents, again and again, and sends what is due.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use gse_core::store::StoreError;
use gse_proto::alarm::LostHost;
use gse_proto::intake::IntakeRecord;
use jiff::tz::TimeZone;
use tokio::time::{Instant, sleep};

use crate::Node;
use crate::metrics::Why as Label;
use crate::record::{self, LostRef};
use crate::watch::{News, Rules, Sum, Watch, Why};

/// Records of agents read in one go.
const RECORDS: usize = 1_000;
/// This server's clock begins here, so that what was before its start has a time too.
const ORIGIN_MS: u64 = 30 * 86_400_000;
/// A look may take this part of the time at most.
const SHARE: u32 = 5;
/// Clocks that differ by more are worth a word.
const SPREAD_MS: u64 = 5_000;

/// An instance's time as the active one.
struct Lead<'a> {
    node: &'a Node,
    watch: Watch,
    began: Instant,
    zone: TimeZone,
    events: u64,
    /// What was sent and could not be kept yet.
    unkept: Vec<(Box<str>, LostHost)>,
    /// Whether it was said that nobody takes alarms, and that clocks differ.
    said_unsent: bool,
    said_spread: bool,
}

/// Leads until it is dropped: then another instance is active, or this one stops.
pub async fn lead(node: Arc<Node>) {
    let _active = Active::new(&node);
    let began = Instant::now();
    let mut pause = Duration::from_millis(node.config.look_ms);
    let left = loop {
        match node.state.left().await {
            Ok(left) => break left,
            Err(error) => {
                node.metrics.looks_failed.inc();
                node.store_failed.store(true, Relaxed);
                tracing::warn!(%error, "what is known of lost hosts can't be read; waiting for the store");
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    };
    let mut watch = Watch::new(Rules::of(&node.config));
    let events = left.state.as_ref().map_or(0, |state| state.events);
    tracing::info!(
        lost = left.lost.len(),
        before = left
            .state
            .as_ref()
            .map(|state| state.node_id.as_str())
            .unwrap_or_default(),
        "looking for agents that are not heard any more"
    );
    // Without the store this instance was not the active one for a while.
    let why = if node.store_failed.swap(false, Relaxed) {
        Why::Store
    } else {
        Why::Start
    };
    watch.restore(
        ORIGIN_MS + millis(began.elapsed()),
        left.store_ms,
        why,
        left.state.as_ref(),
        left.lost.into_iter(),
    );
    let lead = Lead {
        node: &node,
        watch,
        began,
        zone: TimeZone::system(),
        events,
        unkept: vec![],
        said_unsent: false,
        said_spread: false,
    };
    Box::pin(lead.run()).await;
}

/// The gauge that says who is active.
struct Active<'a>(&'a Node);

impl<'a> Active<'a> {
    fn new(node: &'a Node) -> Self {
        node.metrics.active.set(1);
        Self(node)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        let metrics = &self.0.metrics;
        metrics.active.set(0);
        metrics.overdue.set(0);
        for why in ALL {
            metrics.held.get_or_create(&label(why)).set(0);
        }
    }
}

const ALL: [Why; 5] = [Why::Start, Why::Alarm, Why::Store, Why::Task, Why::Mass];

fn label(why: Why) -> Label {
    Label { why: why.word() }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn gauge(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

impl Lead<'_> {
    fn now(&self) -> u64 {
        ORIGIN_MS + millis(self.began.elapsed())
    }

    async fn run(mut self) {
        let every = Duration::from_millis(self.node.config.look_ms);
        loop {
            let started = Instant::now();
            match self.look().await {
                Ok(sum) => {
                    if self.node.store_failed.swap(false, Relaxed) {
                        tracing::info!("the store answers again");
                    }
                    self.figures(&sum);
                }
                Err(error) => {
                    self.node.metrics.looks_failed.inc();
                    if !self.node.store_failed.swap(true, Relaxed) {
                        tracing::warn!(%error, "agents can't be looked at; alarms wait for the store");
                    }
                }
            }
            let took = started.elapsed();
            self.node.metrics.looks.inc();
            self.node.metrics.look_seconds.set(took.as_secs_f64());
            sleep(every.saturating_sub(took).max(took * (SHARE - 1))).await;
        }
    }

    /// One look at all agents, and what follows from it.
    async fn look(&mut self) -> Result<Sum, StoreError> {
        let state = self.node.state.clone();
        let asked = Instant::now();
        let (store_ms, stamps) = state.nodes().await?;
        let now = self.now();
        let failed = self.node.store_failed.load(Relaxed);
        let look = self.watch.begin(now, self.node.clock.unix_ms(), &stamps, failed);
        let counts = state.counts(&look).await?;
        if self.watch.count(now, counts.heard, counts.recent, &counts.masses) {
            let stamps = state.stamps(look.recent).await?;
            self.watch.silent(now, counts.heard, stamps);
        }
        // All of it, or nothing: a shard that is not read says nothing about its hosts.
        let watch = &mut self.watch;
        state
            .seen(look.overdue, |shard, found| watch.shard(now, shard, found.into_iter()))
            .await?;
        loop {
            let wanted = self.watch.wanted(now, RECORDS);
            if wanted.is_empty() {
                break;
            }
            let records = state.records(&wanted).await?;
            for (id, record) in wanted.iter().zip(&records) {
                self.watch.learn(now, id, record.as_ref());
            }
        }
        let due = self.watch.due(now, usize::MAX);
        self.send(due, store_ms, asked).await;
        let now = self.now();
        let (sum, news) = self.watch.end(now);
        self.say(news);
        self.keep(store_ms + millis(asked.elapsed())).await?;
        Ok(sum)
    }

    /// Sends what is due, as far as somebody takes it; the rest is due again with the next look.
    async fn send(&mut self, due: Vec<Box<str>>, store_ms: u64, asked: Instant) {
        let node = self.node;
        let data = &node.config.data;
        for hosts in due.chunks(data.hosts_per_record * data.records_per_call) {
            // Another instance may be active by now.
            if !node.lease.is_held() {
                return;
            }
            let (unix_ms, server) = (node.clock.unix_ms(), &data.server);
            let mut records = Vec::new();
            for some in hosts.chunks(data.hosts_per_record) {
                let named: Vec<LostRef> = some
                    .iter()
                    .filter_map(|id| {
                        let (cloud_id, _) = self.watch.named(id)?;
                        Some(LostRef {
                            agent_id: id.to_string(),
                            cloud_id,
                        })
                    })
                    .collect();
                match record::alarm(server, self.events, unix_ms, &self.zone, &named) {
                    Ok(payload) => records.push(IntakeRecord {
                        data_id: data.data_id,
                        utctime: u32::try_from(unix_ms / 1_000).unwrap_or(u32::MAX),
                        payload: payload.into(),
                    }),
                    Err(error) => return tracing::error!(error = %format!("{error:#}"), "an alarm can't be written"),
                }
                self.events += 1;
            }
            let count = records.len() as u64;
            match node.sender.lock().await.put(records).await {
                Ok(()) => {
                    if std::mem::take(&mut self.said_unsent) {
                        tracing::info!("alarms are taken again");
                    }
                }
                Err(error) => {
                    node.metrics.failures.inc();
                    if !std::mem::replace(&mut self.said_unsent, true) {
                        tracing::warn!(error = %format!("{error:#}"), hosts = due.len(), "nobody takes alarms; they are tried again and again");
                    }
                    return;
                }
            }
            node.metrics.records.inc_by(count);
            node.metrics.sent.inc_by(hosts.len() as u64);
            let (now, sent_ms) = (self.now(), store_ms + millis(asked.elapsed()));
            for id in hosts {
                if let Some(kept) = self.watch.sent(now, sent_ms, id) {
                    if kept.sent == 1 {
                        tracing::info!(agent = %id, cloud = kept.cloud_id, ip = kept.ip, "the agent is lost");
                    }
                    self.unkept.push((id.clone(), kept));
                }
            }
            // At once, so that whoever goes on after a crash repeats as little as can be.
            if let Err(error) = node.state.keep(&self.unkept).await {
                tracing::debug!(%error, "what was sent can't be kept yet");
            } else {
                self.unkept.clear();
            }
        }
    }

    async fn keep(&mut self, store_ms: u64) -> Result<(), StoreError> {
        if !self.node.lease.is_held() {
            return Ok(());
        }
        let mut state = self.watch.state(self.now(), store_ms);
        state.node_id.clone_from(&self.node.config.node_id);
        state.events = self.events;
        let gone = self.watch.take_gone();
        // A host that came back is kept no more, also if it could not be kept before.
        self.unkept.retain(|(id, _)| !gone.contains(id));
        if !self.unkept.is_empty() {
            self.node.state.keep(&self.unkept).await?;
            self.unkept.clear();
        }
        match self.node.state.close(&state, &gone).await {
            Ok(()) => Ok(()),
            Err(error) => {
                self.watch.keep_gone(gone);
                Err(error)
            }
        }
    }

    fn say(&self, news: Vec<News>) {
        for one in news {
            match one {
                News::Holding { hosts, why } => tracing::warn!(
                    hosts,
                    why = why.word(),
                    "alarms are held back, because {}; for {} s at most",
                    why.text(),
                    self.node.config.hold.most_ms / 1_000
                ),
                News::Released {
                    hosts,
                    for_ms,
                    why,
                    returned,
                } => tracing::warn!(
                    hosts,
                    returned,
                    lost = hosts.saturating_sub(returned),
                    for_s = for_ms / 1_000,
                    why = why.word(),
                    "alarms are no longer held back"
                ),
            }
        }
    }

    fn figures(&mut self, sum: &Sum) {
        let metrics = &self.node.metrics;
        let held: usize = sum.held.values().sum();
        metrics.overdue.set(gauge(sum.lost + held));
        for why in ALL {
            let count = sum.held.get(&why).copied().unwrap_or(0);
            metrics.held.get_or_create(&label(why)).set(gauge(count));
            if let Some(new) = sum.newly_held.get(&why) {
                metrics.held_total.get_or_create(&label(why)).inc_by(*new as u64);
            }
        }
        metrics.returned.inc_by(sum.returned as u64);
        metrics.given_up.inc_by(sum.given_up as u64);
        let (nodes, spread) = self.watch.nodes(self.now());
        metrics.nodes.set(gauge(nodes));
        metrics.clock_spread_ms.set(i64::try_from(spread).unwrap_or(i64::MAX));
        let differ = spread > SPREAD_MS;
        if differ && !self.said_spread {
            tracing::warn!(
                spread_ms = spread,
                "the clocks of the nodes of gse_task differ; alarms are right all the same, but much is read in vain"
            );
        }
        self.said_spread = differ;
    }
}
