//! The front for foreign BitTorrent clients: a tracker over HTTP and UDP, `.torrent` files, and a listener for plain peers, all of its
//! own, and all for opened tasks alone. What nobody has opened does not exist here, whoever asks for it and however.
//!
//! A task is opened by a call (`calls`) or by a rule of the configuration, for a time. Its content is then taken into the cache (or is
//! there), and offered from there by an engine that knows neither our own peers nor their keys; our agents never meet a foreign client.
//! How that comes about is `open`'s, what is kept on the disk [`crate::cache`]'s.

mod calls;
mod config;
mod open;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use gse_bt::tracker::{self, Access, Announce, Event, Listening, Peers, Tracker, TrackerConfig, TrackerMetrics};
use gse_bt::{Engine, EngineConfig, Limits, Swarm};
use gse_core::lifecycle::Lifecycle;
use gse_core::random::{HashMap, Random};
use gse_proto::http::{XferOpened, XferPart};
use moka::sync::Cache as Seen;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::Node;
use crate::cache::Shared;
use crate::swarm::{self, ManifestId};
use crate::task::orders::Content;

pub use config::FrontConfig;
pub use open::{OpenError, open, restore};

/// Contents of tasks that are remembered, so that a task can be opened after its end.
const REMEMBERED: u64 = 100_000;
/// Between two looks at what has expired, and two announces of what is offered here.
const LOOK: Duration = Duration::from_secs(5);
/// Before every path of a `.torrent` file.
const TORRENTS: &str = "/torrent/";

/// Content that is offered to foreign clients until this is dropped.
#[derive(Debug)]
struct Seed {
    info_hash: [u8; 20],
    torrent: Bytes,
    size: u64,
    tracker: Tracking,
    _swarm: Swarm,
    _content: Shared,
}

/// The tracker, for what only needs to have one.
#[derive(Clone)]
struct Tracking(Arc<Tracker>);

impl std::fmt::Debug for Tracking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tracking")
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        self.tracker.0.withdraw(&self.info_hash);
    }
}

/// How a part of an opened task stands.
#[derive(Debug)]
enum State {
    Waiting(&'static str),
    Open(Arc<Seed>),
    Failed(String),
}

/// A swarm of an opened task: a source, or a pushed file.
#[derive(Debug)]
struct Part {
    name: String,
    /// Its content, once that is known.
    id: Option<ManifestId>,
    /// Where to take it from, if that was noted before the task could end.
    found: Option<open::Found>,
    state: State,
}

/// A task that is open.
#[derive(Debug)]
struct Opening {
    app: String,
    expires_ms: u64,
    over: CancellationToken,
    parts: BTreeMap<u32, Part>,
}

/// All of them, by task.
type Openings = Arc<Mutex<HashMap<String, Opening>>>;

#[derive(Debug, Clone, Default)]
struct Metrics {
    tasks: Gauge,
    swarms: Gauge,
    torrents: Counter,
}

/// What foreign clients see of this instance.
#[derive(Debug)]
pub struct Front {
    config: FrontConfig,
    engine: Engine,
    tracker: Tracking,
    listening: Listening,
    /// Where foreign clients find the engine.
    peer: SocketAddr,
    /// Where they find the tracker.
    announce: Vec<Vec<String>>,
    /// Where they find `.torrent` files.
    base: String,
    openings: Openings,
    seeds: Mutex<HashMap<ManifestId, Weak<Seed>>>,
    /// Contents of tasks, also of those that are over.
    contents: Seen<(String, u32), ManifestId>,
    metrics: Metrics,
}

/// Binds what foreign clients need; `None` when they are to have nothing.
///
/// # Errors
/// When an address can't be bound or found.
pub async fn start(
    config: &FrontConfig,
    registry: &mut Registry,
    random: &Random,
    life: &Lifecycle,
) -> anyhow::Result<Option<Front>> {
    if !config.enabled {
        return Ok(None);
    }
    let sub = registry.sub_registry_with_prefix("gse_btsvr_front");
    let metrics = Metrics::default();
    sub.register(
        "tasks",
        "File tasks that are open to foreign clients",
        metrics.tasks.clone(),
    );
    sub.register(
        "swarms",
        "Swarms that are offered to foreign clients",
        metrics.swarms.clone(),
    );
    sub.register(
        "torrents",
        "Torrent files that were handed out",
        metrics.torrents.clone(),
    );
    let figures = TrackerMetrics::default();
    figures.register(sub);
    let peers = gse_bt::Metrics::default();
    peers.register(sub);

    let listen: SocketAddr = tokio::net::lookup_host(&config.peer_listen)
        .await
        .context("front.peer_listen")?
        .next()
        .context("front.peer_listen is no address")?;
    let engine = EngineConfig {
        plain_listen: Some(listen),
        limits: Limits {
            up: config.upload_bytes_per_s,
            down: 0,
        },
        max_connections: config.max_connections,
        max_peers: config.max_peers,
        ..EngineConfig::default()
    };
    let engine = Engine::start(engine, peers).await.context("front.peer_listen")?;
    let plain = engine.plain_listening().context("front.peer_listen is not bound")?;
    let limits = TrackerConfig {
        interval_s: config.interval_s,
        peer_ttl_s: config.interval_s * 5 / 2,
        max_peers_per_swarm: config.max_tracked_peers,
        max_peers: config.max_tracked_peers,
        max_swarms: config.max_open * config.max_parts,
        ..TrackerConfig::default()
    };
    let tracker = Arc::new(Tracker::new(limits, Access::Listed, figures, random.clone()));
    let openings = Openings::default();
    let (offered, count) = (Arc::clone(&openings), metrics.torrents.clone());
    let torrents: tracker::Torrents = Arc::new(move |path| {
        let torrent = torrent_at(&offered, path)?;
        count.inc();
        Some(torrent)
    });
    let mut key = [0; 32];
    for part in key.chunks_mut(8) {
        part.copy_from_slice(&random.u64().to_be_bytes());
    }
    let sockets = tracker::FrontConfig {
        http_listen: config.http_listen.clone(),
        udp_listen: config.udp_listen.clone(),
        max_connections: config.max_requests,
        request_timeout_ms: config.request_timeout_ms,
    };
    let listening = tracker::serve_with(&sockets, Arc::clone(&tracker), &key, Some(torrents), life).await?;
    life.announce("front_peer", plain.to_string());
    let host = Host::find(&config.advertise, plain.ip()).await?;
    let http = listening.http.context("front.http_listen is not bound")?;
    let base = format!("http://{}:{}", host.text, http.port());
    let mut announce = vec![vec![format!("{base}/announce")]];
    if let Some(udp) = listening.udp {
        announce.push(vec![format!("udp://{}:{}/announce", host.text, udp.port())]);
    }
    Ok(Some(Front {
        config: config.clone(),
        engine,
        tracker: Tracking(tracker),
        listening,
        peer: SocketAddr::new(host.ip, plain.port()),
        announce,
        base,
        openings,
        seeds: Mutex::default(),
        contents: Seen::builder().max_capacity(REMEMBERED).build(),
        metrics,
    }))
}

/// How foreign clients are told to reach this host.
struct Host {
    text: String,
    ip: IpAddr,
}

impl Host {
    async fn find(advertise: &str, listened: IpAddr) -> anyhow::Result<Self> {
        let text = match (advertise, listened) {
            ("", IpAddr::V6(ip)) => format!("[{ip}]"),
            ("", IpAddr::V4(ip)) => ip.to_string(),
            (host, _) => host.to_owned(),
        };
        let found = tokio::net::lookup_host(format!("{text}:0")).await;
        let found = found.with_context(|| format!("front.advertise: \"{text}\" is not the name of a host"))?;
        let ip = found.map(|address| address.ip()).next();
        let ip = ip.with_context(|| format!("front.advertise: \"{text}\" has no address"))?;
        Ok(Self { text, ip })
    }
}

/// The `.torrent` file of a path, `/torrent/<task>/<part>.torrent`, if that part is open.
fn torrent_at(openings: &Openings, path: &str) -> Option<Bytes> {
    let (task, part) = path
        .strip_prefix(TORRENTS)?
        .strip_suffix(".torrent")?
        .rsplit_once('/')?;
    let part: u32 = part.parse().ok()?;
    match &openings.lock().get(task)?.parts.get(&part)?.state {
        State::Open(seed) => Some(seed.torrent.clone()),
        State::Waiting(_) | State::Failed(_) => None,
    }
}

impl Front {
    /// Whether tasks of an application are opened as soon as they are made.
    #[must_use]
    pub fn opens_always(&self, app: &str) -> bool {
        self.config.open_apps.iter().any(|open| open == app || open == "*")
    }

    /// How long a task stays open if nobody says how long; milliseconds.
    #[must_use]
    pub fn expiry_ms(&self) -> u64 {
        self.config.expire_s * 1000
    }

    /// What a part of a task consists of is known. If it is open, its swarm is kept until it was fetched, however soon the task ends.
    pub fn content_known(&self, node: &Node, task: &str, part: u32, content: &Content) {
        let Some(id) = swarm::manifest_id(&content.manifest_id) else {
            return;
        };
        self.contents.insert((task.to_owned(), part), id);
        let mut openings = self.openings.lock();
        let known = openings.get_mut(task).and_then(|opening| opening.parts.get_mut(&part));
        if let Some(known) = known.filter(|known| matches!(known.state, State::Waiting(_))) {
            known.found = open::found(node, content);
            if let Some(open::Found::Swarm(id, manifest)) = &known.found {
                node.swarms.open(*id, manifest, &open::use_name(task), part);
            }
        }
    }

    /// How a task is open; with its `.torrent` files where `content`.
    #[must_use]
    pub fn describe(&self, task: &str, content: bool) -> XferOpened {
        let openings = self.openings.lock();
        let Some(opening) = openings.get(task) else {
            return XferOpened {
                task_id: task.to_owned(),
                ..XferOpened::default()
            };
        };
        let parts = opening
            .parts
            .iter()
            .map(|(part, what)| self.part(task, *part, what, content));
        XferOpened {
            task_id: task.to_owned(),
            expires_at: opening.expires_ms,
            parts: parts.collect(),
        }
    }

    fn part(&self, task: &str, part: u32, what: &Part, content: bool) -> XferPart {
        use base64::Engine as _;
        let shown = XferPart {
            part,
            name: what.name.clone(),
            ..XferPart::default()
        };
        match &what.state {
            State::Waiting(why) => XferPart {
                state: "waiting".into(),
                message: (*why).to_owned(),
                ..shown
            },
            State::Failed(why) => XferPart {
                state: "failed".into(),
                message: why.clone(),
                ..shown
            },
            State::Open(seed) => XferPart {
                state: "open".into(),
                size: seed.size,
                info_hash: hex::encode(seed.info_hash),
                url: format!("{}{TORRENTS}{task}/{part}.torrent", self.base),
                torrent: if content {
                    base64::engine::general_purpose::STANDARD.encode(&seed.torrent)
                } else {
                    String::new()
                },
                ..shown
            },
        }
    }

    /// Lets nobody in any more; false when the task was not open.
    pub fn close(&self, task: &str) -> bool {
        // Seeds go under the lock, so that who opens the same content at this moment makes a new one after that.
        let mut seeds = self.seeds.lock();
        let Some(opening) = self.openings.lock().remove(task) else {
            return false;
        };
        opening.over.cancel();
        drop(opening);
        seeds.retain(|_, seed| seed.strong_count() > 0);
        true
    }

    /// Tasks whose time is up.
    fn expired(&self, now: u64) -> Vec<String> {
        let openings = self.openings.lock();
        let old = openings.iter().filter(|(_, opening)| opening.expires_ms <= now);
        old.map(|(task, _)| task.clone()).collect()
    }

    /// Says in the tracker that this instance has something.
    fn announce(&self, info_hash: [u8; 20]) {
        let announce = Announce {
            swarm: info_hash,
            peer_id: *b"-GS0100-gse-btsvr-00",
            port: self.peer.port(),
            left: 0,
            event: Event::None,
            wanted: Some(0),
        };
        let now = self.listening.now();
        let answered = self
            .tracker
            .0
            .announce(self.peer.ip(), &announce, now, &mut Peers::default());
        if let Err(refusal) = answered {
            tracing::debug!(%refusal, "a swarm that was open is not any more");
        }
    }
}

/// Closes what has expired and keeps the rest in the tracker, until the instance drains.
pub async fn keep(node: Arc<Node>) {
    let Some(front) = &node.foreign else { return };
    loop {
        tokio::select! {
            () = node.life.draining() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        for task in front.expired(node.clock.unix_ms()) {
            tracing::info!(task, "a file task is closed to foreign clients: its time is up");
            open::close(&node, front, &task).await;
        }
        let seeds: Vec<Arc<Seed>> = front.seeds.lock().values().filter_map(Weak::upgrade).collect();
        for seed in &seeds {
            front.announce(seed.info_hash);
        }
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        front.metrics.tasks.set(count(front.openings.lock().len()));
        front.metrics.swarms.set(count(seeds.len()));
    }
}
