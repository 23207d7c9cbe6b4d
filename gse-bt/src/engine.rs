//! The engine of one process: its listeners, its limits, and the swarms it takes part in.
//!
//! Two kinds of listener: one for our own peers (TLS with certificates on both sides, then a proof of membership), one for foreign
//! clients (plain, only for swarms that are opened to them). Who asks for a swarm that is not here, or cannot prove that it belongs to
//! it, is closed in the same way.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustls::{ClientConfig, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::limit::Limit;
use crate::metrics::Metrics;
use crate::peer::{LinkConfig, handshake};
use crate::plan::PlanConfig;
use crate::storage::{Storage, StorageError};
use crate::swarm::{Entry, Limits, Order, Parts, Progress, Swarm, SwarmSpec, Work};
use crate::{Bitmap, manifest};

/// Name of the peer protocol in TLS.
pub const ALPN: &[u8] = b"gse-bt/1";
/// Connections that have not said who they are yet.
const STRANGERS: usize = 256;

/// Both ends of TLS between our own peers, see [`gse_core::tls::peer_configs`].
#[derive(Debug, Clone)]
pub struct PeerTls {
    /// As a listener.
    pub server: Arc<ServerConfig>,
    /// As a dialler.
    pub client: Arc<ClientConfig>,
}

/// How an engine is set up.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Where our own peers connect.
    pub listen: Vec<SocketAddr>,
    /// Without it, our own peers speak plainly, too: for tests only, proof of membership is then bound to nothing.
    pub tls: Option<PeerTls>,
    /// Where foreign clients connect.
    pub plain_listen: Option<SocketAddr>,
    /// Of all swarms together.
    pub limits: Limits,
    /// Connections of all swarms together.
    pub max_connections: usize,
    /// Connections of a swarm.
    pub max_peers: usize,
    /// Deadlines of a connection.
    pub link: LinkConfig,
    /// What the scheduler goes by.
    pub plan: PlanConfig,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            tls: None,
            plain_listen: None,
            limits: Limits::default(),
            max_connections: 200,
            max_peers: 48,
            link: LinkConfig::default(),
            plan: PlanConfig::default(),
        }
    }
}

/// Why an engine cannot start, or a swarm not be taken part in.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// An address is taken, or not ours.
    #[error("cannot listen for peers at {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// There is such a swarm already.
    #[error("swarm {0} is here already")]
    Twice(String),
    /// The manifest and the files do not fit.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The engine is being stopped.
    #[error("the engine is being stopped")]
    Stopped,
}

/// What the parts of an engine share.
pub(crate) struct Shared {
    pub(crate) config: EngineConfig,
    pub(crate) metrics: Metrics,
    pub(crate) up: Limit,
    pub(crate) down: Limit,
    pub(crate) permits: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    swarms: Mutex<HashMap<[u8; 20], Entry>>,
    stop: CancellationToken,
    tasks: TaskTracker,
    peer_nonce: [u8; 12],
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Engine")
    }
}

impl Shared {
    /// The swarm of this name, if it is here.
    pub(crate) fn find(&self, id: &[u8; 20]) -> Option<Entry> {
        self.swarms.lock().get(id).cloned()
    }

    /// Forgets a swarm, unless another one has taken its name.
    pub(crate) fn forget(&self, id: &[u8; 20], orders: &mpsc::Sender<Order>) {
        let mut swarms = self.swarms.lock();
        if swarms.get(id).is_some_and(|entry| entry.orders.same_channel(orders)) {
            swarms.remove(id);
            self.metrics.swarms.dec();
        }
    }
}

/// An engine that runs. It stops when it is dropped; [`Engine::stop`] waits for that.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    listening: Vec<SocketAddr>,
    plain: Option<SocketAddr>,
}

impl Engine {
    /// Binds the listeners and serves them.
    pub async fn start(config: EngineConfig, metrics: Metrics) -> Result<Self, EngineError> {
        let mut own = Vec::new();
        for address in &config.listen {
            own.push(bind(*address).await?);
        }
        let plain = match config.plain_listen {
            Some(address) => Some(bind(address).await?),
            None => None,
        };
        let stop = CancellationToken::new();
        let listening: Vec<SocketAddr> = own.iter().map(|(_, address)| *address).collect();
        let shared = Arc::new(Shared {
            up: Limit::new(config.limits.up),
            down: Limit::new(config.limits.down),
            permits: Arc::new(Semaphore::new(config.max_connections)),
            strangers: Arc::new(Semaphore::new(STRANGERS)),
            swarms: Mutex::new(HashMap::new()),
            stop: stop.clone(),
            tasks: TaskTracker::new(),
            peer_nonce: rand::random(),
            config,
            metrics,
        });
        for (listener, _) in own {
            shared.tasks.spawn(serve(Arc::clone(&shared), listener, false));
        }
        let plain_at = plain.as_ref().map(|(_, address)| *address);
        if let Some((listener, _)) = plain {
            shared.tasks.spawn(serve(Arc::clone(&shared), listener, true));
        }
        Ok(Self {
            shared,
            listening,
            plain: plain_at,
        })
    }

    /// Where our own peers reach it.
    #[must_use]
    pub fn listening(&self) -> &[SocketAddr] {
        &self.listening
    }

    /// Where foreign clients reach it.
    #[must_use]
    pub fn plain_listening(&self) -> Option<SocketAddr> {
        self.plain
    }

    /// Changes the limits of all swarms together.
    pub fn set_limits(&self, limits: Limits) {
        self.shared.up.set(limits.up);
        self.shared.down.set(limits.down);
    }

    /// Offers content that is all here, each piece once before any is offered twice.
    pub fn seed(&self, spec: SwarmSpec, storage: Storage) -> Result<Swarm, EngineError> {
        let have = Bitmap::full(storage.geometry().pieces());
        self.join(spec, storage, have, true)
    }

    /// Fetches content, and offers what is here of it. `resume` are the pieces that are known to be in the files already. Goes on as a
    /// seed when everything is here.
    pub fn fetch(&self, spec: SwarmSpec, storage: Storage, resume: Option<Bitmap>) -> Result<Swarm, EngineError> {
        let pieces = storage.geometry().pieces();
        let have = resume
            .filter(|map| map.len() == pieces)
            .unwrap_or_else(|| Bitmap::new(pieces));
        self.join(spec, storage, have, false)
    }

    fn join(&self, spec: SwarmSpec, storage: Storage, have: Bitmap, first_copy: bool) -> Result<Swarm, EngineError> {
        if self.shared.stop.is_cancelled() {
            return Err(EngineError::Stopped);
        }
        let id = manifest::swarm_id(&spec.manifest);
        let (connections_in, connections) = mpsc::channel(64);
        let (orders_in, orders) = mpsc::channel(64);
        let (progress_in, progress) = watch::channel(Progress::default());
        let stop = self.shared.stop.child_token();
        let mut peer_id = *b"-GS0100-000000000000";
        peer_id[8..].copy_from_slice(&self.shared.peer_nonce);
        let entry = Entry {
            spec: spec.clone(),
            peer_id,
            connections: connections_in,
            orders: orders_in.clone(),
        };
        {
            let mut swarms = self.shared.swarms.lock();
            if swarms.contains_key(&id) {
                return Err(EngineError::Twice(hex::encode(id)));
            }
            swarms.insert(id, entry);
        }
        self.shared.metrics.swarms.inc();
        let (up, down) = (Limit::new(0), Limit::new(0));
        let work = Work::new(Parts {
            id,
            spec,
            peer_id,
            shared: Arc::clone(&self.shared),
            storage,
            have,
            first_copy,
            connections,
            orders,
            progress: progress_in,
            up: up.clone(),
            down: down.clone(),
            stop: stop.clone(),
        });
        self.shared.tasks.spawn(work.run());
        Ok(Swarm {
            id,
            orders: orders_in,
            progress,
            up,
            down,
            stop,
            shared: Arc::clone(&self.shared),
        })
    }

    /// Closes everything, at once, and waits for it.
    pub async fn stop(self) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), EngineError> {
    let failed = |source| EngineError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Takes connections until the engine stops.
async fn serve(shared: Arc<Shared>, listener: TcpListener, plain: bool) {
    let stop = shared.stop.clone();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, from)) => {
                let permits = (
                    Arc::clone(&shared.strangers).try_acquire_owned(),
                    Arc::clone(&shared.permits).try_acquire_owned(),
                );
                let (Ok(stranger), Ok(permit)) = permits else {
                    shared.metrics.refused.inc();
                    continue;
                };
                let (shared, stop) = (Arc::clone(&shared), stop.clone());
                let tasks = shared.tasks.clone();
                tasks.spawn(async move {
                    let welcome = welcome(&shared, stream, from, plain, permit);
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = welcome => {}
                    }
                    drop(stranger);
                });
            }
            Err(error) => {
                // Out of descriptors, mostly: that passes, and a loop without a pause would make it worse.
                tracing::warn!(%error, "cannot take a connection of a peer");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn welcome(
    shared: &Arc<Shared>,
    stream: TcpStream,
    from: SocketAddr,
    plain: bool,
    permit: tokio::sync::OwnedSemaphorePermit,
) {
    match handshake::accept(shared, stream, from, plain, permit).await {
        Ok((entry, connection)) => {
            if entry.connections.try_send(connection).is_err() {
                tracing::debug!(%from, "a swarm is too busy for one more peer");
            }
        }
        Err(reason) => {
            shared.metrics.refused.inc();
            tracing::debug!(%from, %reason, "connection refused");
        }
    }
}
