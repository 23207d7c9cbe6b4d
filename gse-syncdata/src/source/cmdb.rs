//! CMDB: its watch tells of changes, full passes find what the watch has missed.
//!
//! The cursor of the watch is stored after what it stands behind is. Where there is none, or CMDB does not know it any more, the watch
//! begins with what happens from now on, and a full pass follows, which finds what happened before. A full pass does not hold up the watch;
//! what a page says is older than an event that came after the page was asked for.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures::stream::{self, StreamExt, TryStreamExt};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::Source;
use super::api::{Api, CallError, CmdbApi, Event};
use crate::Node;
use crate::desk::{Backoff, Desk};
use crate::identity::{Identity, Unusable};

/// A watch that brings nothing and does not wait for anything is not made more often.
const AT_LEAST: Duration = Duration::from_millis(500);
/// Longest cursor that is kept.
const MAX_CURSOR: usize = 4_096;

/// CMDB as a source.
pub struct Cmdb {
    api: Api,
    /// Names this CMDB, so that no cursor of another one is used.
    scope: String,
}

/// What the two parts have to say to each other.
struct Talk {
    /// The watch has begun, or can't.
    anchored: watch::Sender<bool>,
    /// A full pass is needed now.
    needed: Notify,
}

impl Source for Cmdb {
    async fn follow(&self, desk: &Desk) {
        let talk = Talk {
            anchored: watch::Sender::new(false),
            needed: Notify::new(),
        };
        tokio::join!(self.events(desk, &talk), self.passes(desk, &talk));
    }
}

impl Cmdb {
    /// As configured.
    ///
    /// # Errors
    /// A file of the configuration can't be used.
    pub async fn new(node: &Arc<Node>) -> anyhow::Result<Self> {
        let config = &node.config.cmdb;
        let api = CmdbApi::new(config, node.metrics.clone()).await.context("cmdb")?;
        Ok(Self {
            api: Arc::new(api),
            scope: format!("{} {} {}", config.url, config.tenant, config.supplier),
        })
    }

    fn backoff(desk: &Desk) -> Backoff {
        let config = &desk.node.config.cmdb;
        Backoff::of_ms(config.retry_min_ms, config.retry_max_ms)
    }

    /// Follows the watch.
    async fn events(&self, desk: &Desk, talk: &Talk) {
        let store = &desk.node.store;
        let mut backoff = Self::backoff(desk);
        let mut cursor = loop {
            match store.place().await {
                Ok(place) if place.scope == self.scope => break place.cursor,
                Ok(_) => break String::new(),
                Err(error) => tracing::warn!(%error, "the cursor of CMDB's watch can't be read yet"),
            }
            backoff.wait(&desk.node).await;
        };
        backoff.reset();
        let mut failures = 0;
        loop {
            let begun = Instant::now();
            let from_now = cursor.is_empty();
            match self.api.watch(&cursor).await {
                Ok(watched) => {
                    (failures, _) = (0, backoff.reset());
                    let count = watched.events.len();
                    self.take(desk, watched.events).await;
                    if !watched.cursor.is_empty() && watched.cursor.len() <= MAX_CURSOR && watched.cursor != cursor {
                        cursor = watched.cursor;
                        self.keep(desk, &cursor).await;
                    }
                    if from_now && !cursor.is_empty() {
                        // What happened before is for a full pass to find.
                        talk.needed.notify_one();
                    }
                    talk.anchored.send_replace(true);
                    if count == 0 && begun.elapsed() < AT_LEAST {
                        tokio::time::sleep(AT_LEAST).await;
                    }
                }
                Err(error) => {
                    failures += u32::from(error.is_said());
                    let lost = error.is_cursor_lost() || failures >= desk.node.config.cmdb.watch_tries;
                    if lost && !cursor.is_empty() {
                        tracing::warn!(%error, "CMDB's watch begins anew; a full pass finds what was missed");
                        desk.node.metrics.cursors_lost.inc();
                        cursor = String::new();
                        failures = 0;
                        self.keep(desk, "").await;
                        continue;
                    }
                    tracing::warn!(%error, "CMDB's watch fails; it is tried again");
                    talk.anchored.send_replace(true);
                    backoff.wait(&desk.node).await;
                }
            }
        }
    }

    async fn keep(&self, desk: &Desk, cursor: &str) {
        let mut backoff = Backoff::of_ms(200, 2_000);
        while let Err(error) = desk.node.store.set_cursor(&self.scope, cursor).await {
            tracing::warn!(%error, "the cursor of CMDB's watch can't be stored yet");
            backoff.wait(&desk.node).await;
        }
    }

    async fn take(&self, desk: &Desk, events: Vec<Event>) {
        desk.node.metrics.events.inc_by(events.len() as u64);
        let mut news: Vec<Identity> = Vec::new();
        for event in events {
            if event.host.is_empty() {
                continue;
            }
            let identity = usable(desk, &event.host);
            if event.is_delete {
                if let Some(identity) = identity {
                    // What came before it must not come after it.
                    desk.put(&std::mem::take(&mut news), None).await;
                    desk.forget(identity.host_id, &[identity.key()]).await;
                }
                continue;
            }
            news.extend(identity);
        }
        desk.put(&news, None).await;
    }

    /// Makes full passes, now and then, and when one is needed.
    async fn passes(&self, desk: &Desk, talk: &Talk) {
        let (node, config) = (&desk.node, &desk.node.config.cmdb);
        let mut anchored = talk.anchored.subscribe();
        // Otherwise what changes while it is under way could be missed.
        if anchored.wait_for(|anchored| *anchored).await.is_err() {
            return;
        }
        let interval = Duration::from_secs(config.full_interval_s);
        let mut backoff = Self::backoff(desk);
        let mut last = loop {
            match node.store.place().await {
                Ok(place) if place.scope == self.scope => break place.full_ms,
                Ok(_) => break 0,
                Err(error) => tracing::warn!(%error, "when the last full pass was can't be read yet"),
            }
            backoff.wait(node).await;
        };
        backoff.reset();
        loop {
            let ago = Duration::from_millis(node.clock.unix_ms().saturating_sub(last));
            tokio::select! {
                // One pass is enough where both are so.
                biased;
                () = talk.needed.notified() => {}
                () = tokio::time::sleep(interval.saturating_sub(ago)) => {}
            }
            loop {
                let begun = Instant::now();
                match self.pass(desk).await {
                    Ok(hosts) => {
                        let took_ms = begun.elapsed().as_millis();
                        tracing::info!(hosts, took_ms, "a full pass over CMDB's hosts has ended");
                        node.metrics.pass("whole");
                        break;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a full pass over CMDB's hosts has failed; it is tried again");
                        node.metrics.pass("failed");
                    }
                }
                backoff.wait(node).await;
            }
            backoff.reset();
            last = node.clock.unix_ms();
            node.metrics
                .full_pass
                .set(i64::try_from(last / 1000).unwrap_or(i64::MAX));
            while let Err(error) = node.store.set_full(&self.scope, last).await {
                tracing::warn!(%error, "the end of a full pass can't be stored yet");
                backoff.wait(node).await;
            }
            backoff.reset();
        }
    }

    /// One pass over all hosts; how many there were.
    async fn pass(&self, desk: &Desk) -> Result<u64, CallError> {
        desk.begin_pass();
        let outcome = self.pages(desk).await;
        desk.end_pass(outcome.is_ok(), false).await;
        outcome
    }

    async fn pages(&self, desk: &Desk) -> Result<u64, CallError> {
        let config = &desk.node.config.cmdb;
        let size = u64::from(config.page);
        let (mut hosts, count) = self.page(desk, 0).await?;
        let starts = (size..count).step_by(config.page as usize);
        let mut rest = stream::iter(starts.map(|start| self.page(desk, start))).buffer_unordered(config.pages_at_once);
        let mut last = (size..count).step_by(config.page as usize).last().unwrap_or(0);
        let mut full = hosts == size;
        while let Some((found, _)) = rest.try_next().await? {
            hosts += found;
            full &= found == size;
        }
        // Hosts that were added meanwhile are at the end.
        while full {
            last += size;
            let (found, _) = self.page(desk, last).await?;
            hosts += found;
            full = found == size;
        }
        Ok(hosts)
    }

    /// One page, however often it has to be asked for; how many hosts are in it, and how many there are in all.
    async fn page(&self, desk: &Desk, start: u64) -> Result<(u64, u64), CallError> {
        let mut backoff = Self::backoff(desk);
        let mut tries = desk.node.config.cmdb.page_tries;
        loop {
            let asked = desk.ask();
            match self.api.page(start).await {
                Ok(page) => {
                    let found = page.hosts.len() as u64;
                    let identities: Vec<Identity> = page.hosts.iter().filter_map(|host| usable(desk, host)).collect();
                    desk.put(&identities, Some(asked)).await;
                    return Ok((found, page.count));
                }
                Err(error) => {
                    tries -= 1;
                    if tries == 0 {
                        return Err(error);
                    }
                    tracing::warn!(start, %error, "a page of CMDB's hosts can't be had; it is asked for again");
                    backoff.wait(&desk.node).await;
                }
            }
        }
    }
}

fn usable(desk: &Desk, json: &str) -> Option<Identity> {
    match Identity::of_cmdb(json) {
        Ok(identity) => Some(identity),
        Err(error @ Unusable::NoAgent(_)) => {
            tracing::debug!("{error}");
            desk.node.metrics.skipped("no_agent");
            None
        }
        Err(error) => {
            tracing::warn!("{error}");
            desk.node.metrics.skipped("malformed");
            None
        }
    }
}
