//! Live tails: the records of one data id, shown to an operator as they come in.
//!
//! Nobody waits for a tail. A batch looks once whether there is any; a record that is looked for is copied into the queue of each of its
//! tails, or counted as lost there if that is full, at the place where it is missing. A tail is not delivery: it shows what came to this
//! instance since it was opened, and acknowledges nothing. Who may look is [`crate::routes::calls`]'s.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwapOption, Guard};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::stream;
use gse_core::http::Reply;
use gse_core::random::HashMap;
use gse_proto::http::{TailLine, TailRecord};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::config::TailConfig;
use crate::metrics::Metrics;
use crate::routes::table::Fields;

/// So often a tail says that it is alive.
const ALIVE: Duration = Duration::from_secs(5);
/// Payload bytes that are written as lines in one go, about; more than that (one long record) off the runtime's threads.
const PIECE: usize = 128 << 10;
/// What a waiting record takes beside its payload.
const RECORD: usize = size_of::<Entry>();

/// All tails of an instance.
#[derive(Default)]
pub struct Tails {
    /// None when nobody looks.
    watched: ArcSwapOption<Watched>,
    feeds: Mutex<Vec<Arc<Feed>>>,
    config: TailConfig,
    metrics: Metrics,
}

/// The tails of the moment, by data id.
#[derive(Default)]
pub struct Watched(HashMap<u32, Vec<Arc<Feed>>>);

impl Watched {
    /// Gives records of `data_id` to its tails, if it has any.
    pub fn show<'a, I: Iterator<Item = Fields<'a>>>(&self, data_id: u32, records: impl Fn() -> I) {
        for feed in self.0.get(&data_id).into_iter().flatten() {
            feed.offer(records());
        }
    }
}

/// The queue of one tail.
struct Feed {
    data_id: u32,
    queue: Mutex<Queue>,
    more: Notify,
    most_records: usize,
    most_bytes: usize,
    metrics: Metrics,
}

#[derive(Default)]
struct Queue {
    entries: VecDeque<Entry>,
    records: usize,
    bytes: usize,
}

enum Entry {
    Record { utctime: u32, kind: u16, payload: Vec<u8> },
    Lost(u64),
}

impl Feed {
    /// Takes what there is room for.
    fn offer<'a>(&self, records: impl Iterator<Item = Fields<'a>>) {
        let mut lost = 0;
        {
            let mut queue = self.queue.lock();
            for record in records {
                // A record of its own is always taken: the longest is as long as the smallest queue.
                let fits = queue.bytes + record.payload.len() <= self.most_bytes && queue.records < self.most_records;
                if fits {
                    queue.records += 1;
                    queue.bytes += record.payload.len();
                    queue.entries.push_back(Entry::Record {
                        utctime: record.utctime,
                        kind: record.kind,
                        payload: record.payload.to_vec(),
                    });
                } else {
                    lost += 1;
                    match queue.entries.back_mut() {
                        Some(Entry::Lost(count)) => *count += 1,
                        _ => queue.entries.push_back(Entry::Lost(1)),
                    }
                }
            }
        }
        self.metrics.tail_lost.inc_by(lost);
        self.more.notify_one();
    }

    /// What is waiting, up to about [`PIECE`] bytes of it; how many bytes the payloads have.
    fn take(&self) -> (Vec<Entry>, usize) {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        let mut queue = self.queue.lock();
        while let Some(entry) = queue.entries.front() {
            let size = match entry {
                Entry::Record { payload, .. } => payload.len(),
                Entry::Lost(_) => 0,
            };
            if !taken.is_empty() && bytes + taken.len() * RECORD + size > PIECE {
                break;
            }
            bytes += size;
            queue.bytes -= size;
            if let Some(entry) = queue.entries.pop_front() {
                queue.records -= usize::from(matches!(entry, Entry::Record { .. }));
                taken.push(entry);
            }
        }
        (taken, bytes)
    }
}

impl Tails {
    /// No tail yet.
    #[must_use]
    pub fn new(config: &TailConfig, metrics: &Metrics) -> Self {
        Self {
            config: config.clone(),
            metrics: metrics.clone(),
            ..Self::default()
        }
    }

    /// Who looks at this moment; none at all is the usual, and costs one load.
    #[must_use]
    pub fn watched(&self) -> Guard<Option<Arc<Watched>>> {
        self.watched.load()
    }

    /// Begins to look at a data id.
    ///
    /// # Errors
    /// There are as many tails as there may be; says so.
    pub fn open(self: &Arc<Self>, data_id: u32) -> Result<Tail, String> {
        let feed = Arc::new(Feed {
            data_id,
            queue: Mutex::default(),
            more: Notify::new(),
            most_records: self.config.queue_records,
            most_bytes: self.config.queue_bytes,
            metrics: self.metrics.clone(),
        });
        let mut feeds = self.feeds.lock();
        if feeds.len() >= self.config.max {
            return Err(format!(
                "{} tails are open already, as many as may be (tail.max of gse_data); end one, or try again later",
                feeds.len()
            ));
        }
        feeds.push(Arc::clone(&feed));
        self.publish(&feeds);
        Ok(Tail {
            tails: Arc::clone(self),
            feed,
            ends: Instant::now() + Duration::from_secs(self.config.max_s),
            begun: false,
        })
    }

    fn publish(&self, feeds: &[Arc<Feed>]) {
        let mut watched = Watched::default();
        for feed in feeds {
            watched.0.entry(feed.data_id).or_default().push(Arc::clone(feed));
        }
        self.watched.store((!feeds.is_empty()).then(|| Arc::new(watched)));
        self.metrics.tails.set(i64::try_from(feeds.len()).unwrap_or(i64::MAX));
    }
}

/// One look at a data id; ends when it is dropped.
pub struct Tail {
    tails: Arc<Tails>,
    feed: Arc<Feed>,
    ends: Instant,
    begun: bool,
}

impl Drop for Tail {
    fn drop(&mut self) {
        let mut feeds = self.tails.feeds.lock();
        feeds.retain(|feed| !Arc::ptr_eq(feed, &self.feed));
        self.tails.publish(&feeds);
    }
}

impl Tail {
    /// Lines of JSON, as they come. Ends when whoever reads them goes, or after the longest time for a tail.
    #[must_use]
    pub fn reply(self) -> Reply {
        let lines = stream::unfold(self, |mut tail| async move { Some((tail.next().await?, tail)) });
        let mut response = Response::new(gse_core::http::stream(lines));
        let kind = HeaderValue::from_static("application/x-ndjson");
        response.headers_mut().insert(CONTENT_TYPE, kind);
        Reply::Raw(response)
    }

    /// The next lines; an empty one when there is nothing to say for a while, and at the very beginning, so that a reader knows that
    /// whatever comes from now on is shown. None at the end.
    pub async fn next(&mut self) -> Option<Bytes> {
        if !std::mem::replace(&mut self.begun, true) {
            return Some(Bytes::from_static(b"\n"));
        }
        let alive = Instant::now() + ALIVE;
        loop {
            if Instant::now() >= self.ends {
                return None;
            }
            let (entries, bytes) = self.feed.take();
            if !entries.is_empty() {
                let data_id = self.feed.data_id;
                if bytes <= PIECE {
                    return Some(lines(data_id, entries));
                }
                return tokio::task::spawn_blocking(move || lines(data_id, entries)).await.ok();
            }
            tokio::select! {
                biased;
                () = self.feed.more.notified() => {}
                () = tokio::time::sleep_until(self.ends) => return None,
                () = tokio::time::sleep_until(alive) => return Some(Bytes::from_static(b"\n")),
            }
        }
    }
}

fn lines(data_id: u32, entries: Vec<Entry>) -> Bytes {
    let mut text = Vec::new();
    for entry in entries {
        let line = match entry {
            Entry::Lost(lost) => TailLine::Lost { lost },
            Entry::Record { utctime, kind, payload } => {
                let (text, base64) = match String::from_utf8(payload) {
                    Ok(text) => (Some(text), None),
                    Err(other) => (None, Some(STANDARD.encode(other.as_bytes()))),
                };
                TailLine::Record(TailRecord {
                    data_id,
                    utctime,
                    kind,
                    text,
                    base64,
                })
            }
        };
        let whole = text.len();
        match serde_json::to_writer(&mut text, &line) {
            Ok(()) => text.push(b'\n'),
            Err(error) => {
                tracing::error!(%error, "a record cannot be written as JSON");
                text.truncate(whole);
            }
        }
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tails(max: usize, queue_records: usize, queue_bytes: usize) -> Arc<Tails> {
        let config = TailConfig {
            max,
            queue_records,
            queue_bytes,
            ..TailConfig::default()
        };
        Arc::new(Tails::new(&config, &Metrics::default()))
    }

    fn show(tails: &Tails, data_id: u32, payloads: &[&[u8]]) {
        let record = |payload| Fields {
            kind: 2,
            data_id,
            utctime: 7,
            payload,
        };
        if let Some(watched) = &*tails.watched() {
            watched.show(data_id, || payloads.iter().map(|payload| record(*payload)));
        }
    }

    async fn next(tail: &mut Tail) -> String {
        let piece = tokio::time::timeout(Duration::from_secs(20), tail.next()).await;
        String::from_utf8(piece.unwrap().unwrap().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_tail_shows_its_id_alone_as_text_or_base64() {
        let tails = tails(2, 10, 100);
        let mut tail = tails.open(5).unwrap();
        assert_eq!(next(&mut tail).await, "\n");
        show(&tails, 6, &[b"other"]);
        show(&tails, 5, &[b"a\"\n\x1b", b"\xff\x00"]);
        assert_eq!(
            next(&mut tail).await,
            "{\"data_id\":5,\"utctime\":7,\"type\":2,\"text\":\"a\\\"\\n\\u001b\"}\n\
             {\"data_id\":5,\"utctime\":7,\"type\":2,\"base64\":\"/wA=\"}\n"
        );
    }

    #[tokio::test]
    async fn a_slow_reader_is_told_how_many_it_has_missed_and_where() {
        let tails = tails(2, 3, 10);
        let mut tail = tails.open(5).unwrap();
        assert_eq!(next(&mut tail).await, "\n");
        show(&tails, 5, &[b"1", b"2", b"3", b"4", b"5"]);
        show(&tails, 5, &[b"6"]);
        let first = next(&mut tail).await;
        assert!(first.ends_with("\"text\":\"3\"}\n{\"lost\":3}\n"), "{first}");
        // By bytes: what comes next still fits behind one that does not.
        show(&tails, 5, &[b"12345678", b"1234", b"12"]);
        let second = next(&mut tail).await;
        let lines: Vec<&str> = second.lines().collect();
        assert!(lines[0].contains("12345678") && lines[1] == "{\"lost\":1}", "{second}");
        assert!(lines[2].contains("\"12\"") && lines.len() == 3, "{second}");
        assert_eq!(tails.metrics.tail_lost.get(), 4);
        assert!(tail.feed.queue.lock().bytes == 0 && tail.feed.queue.lock().records == 0);
    }

    #[tokio::test]
    async fn tails_are_so_many_and_the_last_to_go_leaves_nothing_behind() {
        let tails = tails(2, 10, 100);
        assert!(tails.watched().is_none());
        let (one, two) = (tails.open(5).unwrap(), tails.open(5).unwrap());
        let full = tails.open(6).err().unwrap();
        assert!(full.contains("tail.max"), "{full}");
        assert_eq!(tails.metrics.tails.get(), 2);
        drop(one);
        let three = tails.open(6).unwrap();
        drop((two, three));
        assert!(tails.watched().is_none());
        assert_eq!(tails.metrics.tails.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_tail_says_that_it_lives_and_ends_in_time() {
        let tails = tails(1, 10, 100);
        let begun = Instant::now();
        let mut tail = tails.open(5).unwrap();
        let mut lines = 0;
        while let Some(line) = tail.next().await {
            assert_eq!(line, "\n");
            lines += 1;
        }
        assert_eq!(begun.elapsed().as_secs(), TailConfig::default().max_s);
        assert_eq!(lines, TailConfig::default().max_s / ALIVE.as_secs());
    }
}
