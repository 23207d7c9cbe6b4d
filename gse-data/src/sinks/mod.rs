//! Where records go: each stream has a queue with a bound, a worker, and a spool on disk for what it can't hand on now.
//!
//! * [`worker`]: what is common to all: groups, attempts, the spool, order;
//! * [`file`](mod@file): rotated files;
//! * `kafka` (cargo feature `kafka`): librdkafka;
//! * [`redis`](mod@redis): `PUBLISH`, to one Redis or one that sentinels name;
//! * `relay`: another gse_data, for a proxy.
//!
//! One sink that is slow or gone holds no other up: what it does not take goes to its spool and is acknowledged. Only when that is full
//! do its senders wait, for `sinks.hold_ms`; then what comes for it is dropped and counted.

pub mod file;
#[cfg(feature = "kafka")]
pub mod kafka;
pub mod load;
pub mod redis;
mod relay;
mod spool;
pub mod worker;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::Context;
use futures::future::BoxFuture;
use gse_core::random::HashMap;
use parking_lot::Mutex;
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::task::TaskTracker;

use crate::config::{Config, DefaultSink, RunMode};
use crate::metrics::{Metrics, SinkName};
use crate::router::Unrouted;
use crate::routes::table::{RouteTable, SinkSpec, StreamTo};
use crate::stats::Stats;

pub use load::{Chunk, Load, Part};

/// Why an attempt did not succeed; it is made again.
pub type Failure = String;

/// Records that can never be handed on: id, reason, how many.
pub type Dropped = Vec<(u32, &'static str, u64)>;

/// An attempt under way.
pub type Attempted<'a> = Pin<Box<dyn Future<Output = Result<Dropped, Failure>> + Send + 'a>>;

/// Hands groups of records on. A group that failed is given again.
pub trait Writer: Send {
    /// Hands everything in `group` on, in its order.
    fn write<'a>(&'a mut self, group: &'a Group) -> Attempted<'a>;

    /// Whether it has deadlines of its own, so that an attempt is never cut short from outside, and it is kept after a failed one.
    fn patient(&self) -> bool {
        false
    }

    /// What it does while there is nothing to write; never ends by itself, and may be left off at any time.
    fn idle<'a>(&'a mut self) -> BoxFuture<'a, ()> {
        Box::pin(std::future::pending())
    }
}

/// What is handed on in one go.
#[derive(Debug, Default)]
pub struct Group {
    /// In order.
    pub loads: Vec<Load>,
}

/// The way into a sink.
#[derive(Debug)]
pub struct SinkHandle {
    name: String,
    /// None: everything is counted as delivered, and that is all.
    queue: Option<mpsc::Sender<Chunk>>,
    /// A full queue is waited for so long before the worker is told to write to its spool.
    full_after: Duration,
    full: Arc<Notify>,
    shared: Arc<Shared>,
}

/// What a worker and its handle share.
#[derive(Debug)]
pub(crate) struct Shared {
    stats: Arc<Stats>,
    metrics: Metrics,
}

impl Shared {
    pub(crate) fn delivered(&self, sink: &str, loads: &[Load]) {
        let mut sum = 0;
        for part in loads.iter().flat_map(|load| &load.parts) {
            self.stats
                .id(part.data_id)
                .delivered
                .fetch_add(part.records.into(), Relaxed);
            sum += u64::from(part.records);
        }
        let sink = sink.to_owned();
        self.metrics.delivered.get_or_create(&SinkName { sink }).inc_by(sum);
    }

    /// Of what was counted as delivered some was not.
    pub(crate) fn not_delivered(&self, sink: &str, dropped: Dropped) {
        for (data_id, reason, records) in dropped {
            let id = self.stats.id(data_id);
            id.delivered.fetch_sub(records, Relaxed);
            id.drop_copies(reason, records);
            self.metrics.dropped(sink, reason, records);
        }
    }

    pub(crate) fn dropped(&self, sink: &str, load: &Load, reason: &'static str) {
        for part in &load.parts {
            self.stats.id(part.data_id).drop_copies(reason, part.records.into());
        }
        self.metrics.dropped(sink, reason, load.records);
    }
}

impl SinkHandle {
    /// Hands over a chunk; waits while the queue is full. A sink that takes records, but slower than they come, is told to put them on
    /// its disk, so that it does not hold up the others.
    pub async fn give(&self, chunk: Chunk) {
        match &self.queue {
            None => {
                self.shared.delivered(&self.name, std::slice::from_ref(&chunk.load));
                chunk.ticket.settle();
            }
            // Refused only when the sink is gone: then the batch is not acknowledged and comes again.
            Some(queue) => {
                let sent = match queue.send_timeout(chunk, self.full_after).await {
                    Err(SendTimeoutError::Timeout(chunk)) => {
                        self.full.notify_one();
                        queue.send(chunk).await.is_ok()
                    }
                    sent => sent.is_ok(),
                };
                if !sent {
                    tracing::debug!(sink = self.name, "a sink has stopped; the batch will come again");
                }
            }
        }
    }
}

struct Running {
    spec: watch::Sender<Arc<StreamTo>>,
    handle: Arc<SinkHandle>,
}

/// All sinks.
pub struct Sinks {
    config: Config,
    shared: Arc<Shared>,
    running: Mutex<HashMap<u64, Running>>,
    unrouted: Mutex<Option<Arc<SinkHandle>>>,
    tasks: TaskTracker,
    stop: watch::Sender<bool>,
}

impl Sinks {
    /// The default sink, and none beside it.
    ///
    /// # Errors
    /// When directories can't be made.
    pub async fn new(config: &Config, stats: Arc<Stats>, metrics: Metrics) -> anyhow::Result<Self> {
        let sinks = Self {
            config: config.clone(),
            shared: Arc::new(Shared { stats, metrics }),
            running: Mutex::default(),
            unrouted: Mutex::default(),
            tasks: TaskTracker::new(),
            stop: watch::Sender::new(false),
        };
        let spools = sinks.spools();
        tokio::fs::create_dir_all(&spools)
            .await
            .with_context(|| format!("cannot make {} (data_dir)", spools.display()))?;
        if config.run_mode == RunMode::Proxy {
            let spec = StreamTo {
                id: 0,
                name: "upstream".into(),
                sink: SinkSpec::Relay,
            };
            let upstream = sinks.start(Arc::new(spec)).await.handle;
            *sinks.unrouted.lock() = Some(upstream);
            return Ok(sinks);
        }
        let unrouted = match config.unrouted().map_err(anyhow::Error::msg)? {
            DefaultSink::Drop => None,
            DefaultSink::Discard => Some(Arc::new(SinkHandle {
                name: "discard".into(),
                queue: None,
                full_after: Duration::ZERO,
                full: Arc::default(),
                shared: Arc::clone(&sinks.shared),
            })),
            DefaultSink::File(dir) => {
                let spec = StreamTo {
                    id: 0,
                    name: "default".into(),
                    sink: SinkSpec::File(crate::routes::table::FileSpec {
                        directory: dir.to_string_lossy().into_owned(),
                    }),
                };
                Some(sinks.start(Arc::new(spec)).await.handle)
            }
        };
        *sinks.unrouted.lock() = unrouted;
        Ok(sinks)
    }

    fn spools(&self) -> PathBuf {
        self.config.data_dir.join("spools")
    }

    /// Where records without a route go.
    #[must_use]
    pub fn unrouted(&self) -> Unrouted {
        let way = match self.config.run_mode {
            RunMode::Server => Unrouted::Sink,
            RunMode::Proxy => Unrouted::Upstream,
        };
        self.unrouted.lock().clone().map_or(Unrouted::Drop, way)
    }

    /// Starts and changes sinks as a new table says. A sink that is not in it any more gets nothing new; what it holds it hands on as
    /// it did.
    pub async fn follow(&self, table: &RouteTable) -> HashMap<u64, Arc<SinkHandle>> {
        let mut handles = HashMap::default();
        for (id, spec) in table.streams() {
            let known = {
                let running = self.running.lock();
                running.get(id).map(|one| {
                    one.spec.send_if_modified(|now| {
                        let new = now != spec;
                        *now = Arc::clone(spec);
                        new
                    });
                    Arc::clone(&one.handle)
                })
            };
            let handle = match known {
                Some(handle) => handle,
                None => {
                    let new = self.start(Arc::clone(spec)).await;
                    let handle = Arc::clone(&new.handle);
                    self.running.lock().insert(*id, new);
                    handle
                }
            };
            handles.insert(*id, handle);
        }
        handles
    }

    async fn start(&self, spec: Arc<StreamTo>) -> Running {
        let name = match spec.id {
            0 => spec.name.clone(),
            id => format!("stream {id}"),
        };
        let (queue, chunks) = mpsc::channel(self.config.sinks.queue);
        let (spec, specs) = watch::channel(spec);
        let dir = self.spools().join(name.replace(' ', "-"));
        let spool = spool::Backlog::open(dir, self.config.sinks.spool_max_bytes).await;
        let full = Arc::new(Notify::new());
        let worker = worker::Worker::new(
            name.clone(),
            self.config.clone(),
            Arc::clone(&self.shared),
            (chunks, Arc::clone(&full)),
            specs,
            self.stop.subscribe(),
            spool,
        );
        self.tasks.spawn(worker.run());
        Running {
            spec,
            handle: Arc::new(SinkHandle {
                name,
                queue: Some(queue),
                full_after: Duration::from_millis(self.config.sinks.full_after_ms),
                full,
                shared: Arc::clone(&self.shared),
            }),
        }
    }

    /// Has every sink hand on, or put on disk, what it holds.
    pub async fn finish(&self) {
        self.stop.send_replace(true);
        self.tasks.close();
        self.tasks.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::book::{Arrived, Books, Ticket};
    use crate::routes::table::{Endpoint, RedisSpec};
    use bytes::{Bytes, BytesMut};

    fn chunk(data_id: u32, ticket: Ticket) -> Chunk {
        let mut body = BytesMut::new();
        gse_proto::datalink::put_record(&mut body, data_id, 0, 9, b"record");
        let to = body.len();
        let mut load = Load::new(body.freeze());
        load.push(Part {
            data_id,
            target: "channel".into(),
            from: 0,
            to,
            records: 1,
        });
        Chunk { load, ticket }
    }

    // contract: reliability#F15
    #[tokio::test]
    async fn a_sink_slower_than_what_comes_spools_long_before_an_attempt_counts_as_late() {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config {
            data_dir: dir.path().into(),
            ..Config::default()
        };
        config.sinks.queue = 1;
        config.sinks.spool_after_ms = 60_000;
        config.sinks.attempt_timeout_ms = 60_000;
        config.sinks.full_after_ms = 20;
        let metrics = Metrics::new(&mut prometheus_client::registry::Registry::default());
        let sinks = Sinks::new(&config, Arc::new(Stats::new(10)), metrics).await.unwrap();
        let stream = StreamTo {
            id: 7,
            name: "slow".into(),
            sink: SinkSpec::Redis(RedisSpec {
                addresses: vec![Endpoint {
                    host: "127.0.0.1".into(),
                    port: server.local_addr().unwrap().port(),
                }],
                ..RedisSpec::default()
            }),
        };
        let handle = sinks.start(Arc::new(stream)).await.handle;
        let book = Books::new(1).open("agent", &Bytes::from_static(b"spool"));
        let (link, _) = book.take();
        let giving = async {
            for seq in 1..=20 {
                assert_eq!(book.arrived(link, seq), Arrived::New);
                handle.give(chunk(1001, Ticket::new(Arc::clone(&book), seq))).await;
            }
            // The server takes connections and never answers: what is acknowledged is on disk.
            while book.acked() < 20 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), giving)
            .await
            .expect("acknowledged from the spool");
    }
}
