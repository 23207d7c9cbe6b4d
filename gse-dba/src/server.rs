//! The listeners and what all connections share. One connection's life is `conn`'s.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use gse_core::clock::Clock;
use gse_core::lifecycle::Lifecycle;
use gse_core::ops::{self, Health};
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_rustls::TlsAcceptor;

use crate::client::{Client, Pause};
use crate::cluster;
use crate::config::{Backend, Config, Durability, OnCorruption};
use crate::conn;
use crate::durable::Settings;
use crate::engine::{Engine, Message};
use crate::metrics::Metrics;
use crate::migrate::Office;
use crate::sharded::Sharded;
use crate::single::Single;
use crate::tls;
use crate::users::Users;
use crate::watch::Watch;
use crate::workers::Workers;

/// Where commands go.
pub(crate) enum Store {
    Embedded(mpsc::Sender<Message>),
    Single(Single),
    Sharded(Sharded),
}

impl Store {
    /// Through which clients subscribe, unless they do so at the Redis behind.
    pub(crate) fn hub(&self) -> Option<&crate::sharded::hub::Hub> {
        match self {
            Store::Sharded(s) => Some(s.hub()),
            Store::Embedded(_) | Store::Single(_) => None,
        }
    }

    /// Whether clients may speak RESP3.
    pub(crate) fn speaks_resp3(&self) -> bool {
        match self {
            Store::Single(s) => s.capabilities().is_none_or(|c| c.resp3),
            Store::Embedded(_) | Store::Sharded(_) => true,
        }
    }
}

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) users: Users,
    pub(crate) pause: Pause,
    /// Which store serves, and what changes that.
    pub(crate) office: Arc<Office>,
    pub(crate) metrics: Metrics,
    pub(crate) clients: Mutex<HashMap<u64, Arc<Client>>>,
    pub(crate) started: Instant,
    pub(crate) port: AtomicU16,
    pub(crate) life: Lifecycle,
    pub(crate) watch: Watch,
    /// KiB of replies that wait for clients to take them.
    pub(crate) untaken: Arc<Semaphore>,
    workers: Workers,
    next_client: AtomicU64,
    places: Arc<Semaphore>,
}

impl Shared {
    /// A client's number. It also says which worker serves it, and which of the connections there it uses.
    fn next_id(&self) -> u64 {
        self.next_client.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn new(
        config: Config,
        users: Users,
        office: Arc<Office>,
        metrics: Metrics,
        life: Lifecycle,
        workers: Workers,
    ) -> Self {
        Self {
            places: Arc::new(Semaphore::new(config.limits.max_clients)),
            watch: Watch::new(&config.admin),
            untaken: Arc::new(Semaphore::new(config.limits.all_output_bytes >> 10)),
            config,
            users,
            pause: Pause::default(),
            office,
            metrics,
            clients: Mutex::default(),
            started: Instant::now(),
            port: AtomicU16::new(0),
            life,
            workers,
            next_client: AtomicU64::new(1),
        }
    }

    /// The store that serves now, for a look at it: a batch of commands has its own view.
    pub(crate) fn store(&self) -> Arc<Store> {
        Arc::clone(&self.office.views.now().store)
    }
}

pub(crate) const TICK: Duration = Duration::from_millis(100);
/// TLS handshakes at a time; they have a deadline each.
const HANDSHAKES: usize = 1024;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until the lifecycle drains and every connection has ended.
///
/// # Errors
/// When the store cannot be started: no password, a directory in use or damaged, an address taken.
pub async fn run(config: Config, life: Lifecycle) -> anyhow::Result<()> {
    let users = {
        let config = config.clone();
        tokio::task::spawn_blocking(move || config.resolve_users()).await??
    };
    let mut registry = Registry::with_prefix("gse");
    let metrics = Metrics::new(&mut registry);
    let health = Health::new();
    let workers = match config.backend {
        // The engine is one thread, to which every command is handed anyhow.
        Backend::Embedded => Workers::default(),
        _ => Workers::start(config.workers, &life)?,
    };
    let office = Office::open(&config, &workers, metrics.clone(), &life, &health).await?;
    let acceptor = match &config.tls {
        Some(files) => {
            let files = files.clone();
            Some(TlsAcceptor::from(
                tokio::task::spawn_blocking(move || tls::server(&files)).await??,
            ))
        }
        None => None,
    };
    ops::serve(&config.ops, Arc::new(registry), health, &life).await?;
    let shared = Arc::new(Shared::new(config, users, office, metrics, life.clone(), workers));
    listen(&shared, acceptor, &life).await?;
    life.ready();
    life.draining().await;
    // Connections end by themselves once they see the drain; the engine ends when the last of them has let go of it.
    let grace = Duration::from_millis(shared.config.runtime.drain_timeout_ms);
    let all = shared.config.limits.max_clients as u32;
    let places = Arc::clone(&shared.places);
    if tokio::time::timeout(grace, places.acquire_many(all)).await.is_err() {
        tracing::warn!("some connections did not end in time and are cut");
    }
    let engines = shared.office.engines();
    drop(shared);
    for ended in engines {
        match tokio::time::timeout(grace, ended).await {
            Ok(_) => {}
            Err(_) => {
                tracing::warn!("the engine did not end in time; what was acknowledged is in the log all the same")
            }
        }
    }
    Ok(())
}

/// Starts what a configuration has as its store. The end of an embedded engine is told by what comes beside.
pub(crate) async fn start_store(
    config: &Config,
    workers: &Workers,
    metrics: Metrics,
    life: &Lifecycle,
    health: &Health,
) -> anyhow::Result<(Store, Option<oneshot::Receiver<()>>)> {
    Ok(match config.backend {
        Backend::Embedded => {
            let (inbox, ended) = start_engine(config, metrics, life, health).await?;
            (Store::Embedded(inbox), Some(ended))
        }
        Backend::Single => (
            Store::Single(Single::start(config, workers, metrics, life, health).await?),
            None,
        ),
        Backend::Sharded => (
            Store::Sharded(Sharded::start(config, workers, metrics, life, health).await?),
            None,
        ),
        Backend::Cluster => (
            Store::Sharded(cluster::start(config, workers, metrics, life, health).await?),
            None,
        ),
    })
}

/// What an acknowledged write survives in front of this store, in words.
pub(crate) fn durability(config: &Config) -> String {
    match (config.backend, config.embedded.durability) {
        (Backend::Embedded, Durability::Always) => {
            "an acknowledged write is on this machine's disk; there is no copy on another".to_owned()
        }
        (Backend::Embedded, Durability::Write) => "an acknowledged write is with the operating system of this machine: it survives this process, not the machine".to_owned(),
        (Backend::Single, _) => "as the Redis behind keeps it: nothing is added here".to_owned(),
        (Backend::Sharded, _) => config.sharded.durability(),
        (Backend::Cluster, _) => config.cluster.durability(),
    }
}

pub(crate) fn settings(config: &Config) -> (Settings, usize) {
    let e = &config.embedded;
    let settings = Settings {
        dir: e.dir.clone(),
        always: e.durability == Durability::Always,
        salvage: e.on_corruption == OnCorruption::Salvage,
        compact_min: e.compact_min_kb << 10,
        compact_factor: e.compact_factor,
        max_disk: e.max_disk_mb << 20,
    };
    let max_memory = usize::try_from(e.max_memory_mb << 20).unwrap_or(usize::MAX);
    (settings, max_memory)
}

async fn start_engine(
    config: &Config,
    metrics: Metrics,
    life: &Lifecycle,
    health: &Health,
) -> anyhow::Result<(mpsc::Sender<Message>, oneshot::Receiver<()>)> {
    let (settings, max_memory) = settings(config);
    let (inbox, outbox) = mpsc::channel(config.limits.engine_queue);
    let (opened, is_open) = oneshot::channel();
    let (ended, has_ended) = oneshot::channel();
    let keep = life.clone();
    let engine_metrics = metrics.clone();
    std::thread::Builder::new()
        .name("gse_dba-engine".into())
        .spawn(move || {
            match Engine::open(settings, max_memory, engine_metrics, Clock::system()) {
                Ok(engine) => {
                    // Whoever started us may have given up; then the inbox is closed too and the engine ends at once.
                    let _ = opened.send(Ok(()));
                    if let Err(e) = engine.run(outbox) {
                        keep.fail(format!("the embedded store stopped: {e:#}"));
                    }
                }
                Err(e) => {
                    let _ = opened.send(Err(e));
                }
            }
            let _ = ended.send(());
        })?;
    is_open
        .await
        .context("the engine's thread died while opening the store")??;
    let (ticks, health, weak) = (inbox.downgrade(), health.clone(), metrics);
    health.set("store", Ok(()));
    life.spawn_until_closed("dba-ticks", async move {
        let mut every = tokio::time::interval(TICK);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            every.tick().await;
            let Some(inbox) = ticks.upgrade() else { return };
            // A full queue is work enough: the tick may be left out.
            let _ = inbox.try_send(Message::Tick);
            drop(inbox);
            health.set(
                "store",
                weak.outage_reason()
                    .map_or(Ok(()), |r| Err(format!("writes are refused: {r}"))),
            );
        }
    });
    Ok((inbox, has_ended))
}

async fn listen(shared: &Arc<Shared>, acceptor: Option<TlsAcceptor>, life: &Lifecycle) -> anyhow::Result<()> {
    if !shared.config.listen.is_empty() {
        let listener = TcpListener::bind(&shared.config.listen)
            .await
            .with_context(|| format!("cannot listen on {}: is another process there?", shared.config.listen))?;
        let addr = listener.local_addr()?;
        shared.port.store(addr.port(), Ordering::Relaxed);
        life.announce("resp", addr.to_string());
        let (shared, weak_life) = (Arc::clone(shared), life.clone());
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        life.spawn("dba-listener", async move {
            loop {
                let accepted = tokio::select! {
                    () = weak_life.draining() => return,
                    accepted = listener.accept() => accepted,
                };
                let (stream, peer) = match accepted {
                    Ok(a) => a,
                    Err(e) => {
                        tracing::warn!(error = %e, "a connection could not be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                };
                if let Err(e) = stream.set_nodelay(true) {
                    tracing::debug!(error = %e, %peer, "no TCP_NODELAY on this connection");
                }
                keep_alive(&stream, shared.config.limits.keepalive_s);
                let id = shared.next_id();
                // What it is registered with is the loop of the thread that it stays on.
                let _on = shared.workers.enter(id as usize);
                let stream = match stream.into_std().and_then(TcpStream::from_std) {
                    Ok(s) => s,
                    Err(e) => {
                        tracing::warn!(error = %e, %peer, "a connection could not be taken over");
                        continue;
                    }
                };
                match &acceptor {
                    None => serve(&shared, id, stream, peer.to_string(), addr.to_string()),
                    Some(acceptor) => {
                        let Ok(place) = Arc::clone(&handshakes).try_acquire_owned() else {
                            shared.metrics.client_refused();
                            continue;
                        };
                        let (acceptor, shared) = (acceptor.clone(), Arc::clone(&shared));
                        let limit = Duration::from_millis(shared.config.limits.handshake_timeout_ms);
                        let life = shared.life.clone();
                        // Before the handshake it takes no place among the clients, but it has a deadline.
                        life.spawn_contained("dba-tls", async move {
                            match tokio::time::timeout(limit, acceptor.accept(stream)).await {
                                Ok(Ok(stream)) => serve(&shared, id, stream, peer.to_string(), addr.to_string()),
                                Ok(Err(e)) => tracing::debug!(error = %e, %peer, "TLS handshake failed"),
                                Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
                            }
                            drop(place);
                        });
                    }
                }
            }
        });
    }
    if let Some(path) = &shared.config.unix_socket {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            anyhow::bail!("cannot listen on {}: another process does", path.display());
        }
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                anyhow::bail!("cannot remove the old socket {}: {e}", path.display())
            }
            _ => {}
        }
        let listener = UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
        life.announce("unix", path.display().to_string());
        let (shared, weak_life, name) = (Arc::clone(shared), life.clone(), path.display().to_string());
        life.spawn("dba-unix-listener", async move {
            loop {
                let accepted = tokio::select! {
                    () = weak_life.draining() => return,
                    accepted = listener.accept() => accepted,
                };
                match accepted {
                    Ok((stream, _)) => {
                        let id = shared.next_id();
                        let _on = shared.workers.enter(id as usize);
                        match stream.into_std().and_then(UnixStream::from_std) {
                            Ok(stream) => serve(&shared, id, stream, format!("{name}:0"), format!("{name}:0")),
                            Err(e) => tracing::warn!(error = %e, "a connection could not be taken over"),
                        }
                    }
                    Err(e) => {
                        tracing::warn!(error = %e, "a connection could not be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        });
    }
    Ok(())
}

/// Has the system find out about clients that went without a word.
fn keep_alive(stream: &tokio::net::TcpStream, seconds: u64) {
    if seconds == 0 {
        return;
    }
    let every = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(seconds))
        .with_interval(Duration::from_secs((seconds / 3).max(1)));
    if let Err(e) = socket2::SockRef::from(stream).set_tcp_keepalive(&every) {
        tracing::debug!(error = %e, "no keepalive on this connection");
    }
}

/// Takes a client's stream, or turns it away. Embedded hosts and TLS come here with streams of the runtime that they are on.
pub(crate) fn admit(
    shared: &Arc<Shared>,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    addr: String,
    laddr: String,
) {
    serve(shared, shared.next_id(), stream, addr, laddr);
}

fn serve(
    shared: &Arc<Shared>,
    id: u64,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    addr: String,
    laddr: String,
) {
    let Ok(place) = Arc::clone(&shared.places).try_acquire_owned() else {
        shared.metrics.client_refused();
        let life = shared.life.clone();
        life.spawn_contained("dba-refused", conn::turn_away(stream));
        return;
    };
    let client = Arc::new(Client::new(id, addr, laddr));
    shared.clients.lock().insert(id, Arc::clone(&client));
    shared.metrics.client_opened();
    let shared = Arc::clone(shared);
    let life = shared.life.clone();
    life.spawn_contained("dba-connection", async move {
        conn::serve(stream, Arc::clone(&shared), Arc::clone(&client)).await;
        shared.clients.lock().remove(&id);
        shared.metrics.client_closed();
        drop(shared);
        drop(place);
    });
}
