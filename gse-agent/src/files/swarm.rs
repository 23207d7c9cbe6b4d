//! The agent's part in swarms: one engine for all of them, started when the first link is made; what a swarm's members are comes over
//! the link. How pieces move is [`gse_bt`]'s business.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use gse_bt::{
    ALPN, Engine, EngineConfig, Limits, PeerTls, PlanConfig, Progress, ResumeFile, Storage, Swarm, SwarmSpec,
};
use gse_core::tls::{self, Role, TlsFiles};
use gse_proto::codes::Inner;
use gse_proto::file::{Manifest, SwarmPeers};
use parking_lot::Mutex;
use tokio::sync::{OnceCell, broadcast, watch};
use tokio::time::{Instant, sleep};

use super::cell::Cell;
use super::config::FilesConfig;
use super::link::SwarmNews;
use super::orders::Shared;
use super::worker::Failed;

/// Between two looks at how far a swarm is.
const LOOK: Duration = Duration::from_millis(100);
/// The resume map is written so often, and once for so many bytes.
const MAP_EVERY: Duration = Duration::from_secs(5);
const MAP_BYTES: u64 = 64 << 20;
/// Between two tries to tell a busy swarm of peers.
const AGAIN: Duration = Duration::from_millis(50);

/// A swarm that some order of this agent takes part in.
#[derive(Debug, Clone)]
pub(super) struct Running {
    /// Its content on this host.
    pub(super) storage: Storage,
    /// How far it is.
    pub(super) progress: watch::Receiver<Progress>,
    /// Gone when the last order has left.
    swarm: Weak<Swarm>,
}

/// The engine and what runs in it.
#[derive(Debug, Default)]
pub(super) struct Swarms {
    engine: OnceCell<Option<Engine>>,
    running: Mutex<HashMap<Bytes, Running>>,
    /// Manifests that an order is about to fetch.
    begun: Mutex<HashSet<Bytes>>,
}

/// The right to be the one order that fetches a manifest.
pub(super) struct Begun {
    shared: Arc<Shared>,
    id: Bytes,
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.shared.swarms.begun.lock().remove(&self.id);
    }
}

/// Waits until this order may fetch, or until another one of this agent takes part in the swarm already.
pub(super) async fn begin(shared: &Arc<Shared>, id: &Bytes) -> Result<Begun, Running> {
    loop {
        if let Some(running) = shared.swarms.running(id) {
            return Err(running);
        }
        if shared.swarms.begun.lock().insert(id.clone()) {
            return Ok(Begun {
                shared: Arc::clone(shared),
                id: id.clone(),
            });
        }
        sleep(LOOK).await;
    }
}

fn failed(text: impl Into<String>) -> Failed {
    Failed::new(Inner::System, text)
}

async fn start(config: &FilesConfig, files: TlsFiles, metrics: &gse_bt::Metrics) -> anyhow::Result<Engine> {
    let (server, client) =
        tokio::task::spawn_blocking(move || tls::peer_configs(&files, &[Role::Agent, Role::Server], &[ALPN]))
            .await
            .context("reading certificates")??;
    let mut last = None;
    for port in config.peer_port_first..=config.peer_port_last {
        let engine = EngineConfig {
            listen: vec![SocketAddr::new(config.peer_address, port)],
            tls: Some(PeerTls {
                server: Arc::clone(&server),
                client: Arc::clone(&client),
            }),
            limits: Limits {
                up: config.upload_bytes_per_s,
                down: config.download_bytes_per_s,
            },
            max_connections: config.peer_connections,
            plan: PlanConfig {
                outstanding_bytes: config.swarm_bytes,
                ..PlanConfig::default()
            },
            ..EngineConfig::default()
        };
        match Engine::start(engine, metrics.clone()).await {
            Ok(engine) => return Ok(engine),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(error).context("no port of files.peer_port_first to files.peer_port_last is free"),
        None => anyhow::bail!("files.peer_port_first is after files.peer_port_last"),
    }
}

impl Swarms {
    /// The engine, started if need be; `None` if it can't be.
    async fn engine(&self, shared: &Shared) -> Option<&Engine> {
        let made = self
            .engine
            .get_or_init(|| async {
                let files = shared.links.identity().tls.clone();
                match start(&shared.config, files, &shared.metrics.peers).await {
                    Ok(engine) => Some(engine),
                    Err(error) => {
                        tracing::error!("this agent takes part in no swarms: {error:#}");
                        None
                    }
                }
            })
            .await;
        made.as_ref()
    }

    /// Where other agents reach this one.
    pub(super) async fn addresses(&self, shared: &Shared) -> Vec<String> {
        let own: &[IpAddr] = &shared.links.identity().addresses;
        let Some(engine) = self.engine(shared).await else {
            return vec![];
        };
        let mut addresses = Vec::new();
        for listening in engine.listening() {
            if listening.ip().is_unspecified() {
                addresses.extend(own.iter().map(|ip| SocketAddr::new(*ip, listening.port()).to_string()));
            } else {
                addresses.push(listening.to_string());
            }
        }
        addresses
    }

    /// The swarm of a manifest, if an order of this agent takes part in it.
    pub(super) fn running(&self, manifest_id: &Bytes) -> Option<Running> {
        let running = self.running.lock().get(manifest_id).cloned()?;
        running.swarm.strong_count().gt(&0).then_some(running)
    }
}

/// Taking part in one swarm, until this is dropped. Orders for the same content share it.
pub(super) struct Member {
    shared: Arc<Shared>,
    id: Bytes,
    cell: Arc<Cell>,
    swarm: Option<Arc<Swarm>>,
    news: broadcast::Receiver<SwarmNews>,
    pub(super) progress: watch::Receiver<Progress>,
    pub(super) storage: Storage,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.swarm = None;
        let mut running = self.shared.swarms.running.lock();
        if running.get(&self.id).is_some_and(|one| one.swarm.strong_count() == 0) {
            running.remove(&self.id);
            self.shared.links.forget(&self.id);
        }
    }
}

/// Waits until the server has told of the swarm.
async fn told(shared: &Shared, id: &Bytes, news: &mut broadcast::Receiver<SwarmNews>) -> Result<SwarmPeers, Failed> {
    loop {
        if let Some(peers) = shared.links.peers_of(id) {
            return Ok(peers);
        }
        if let Err(broadcast::error::RecvError::Closed) = news.recv().await {
            return Err(failed("the agent's links are gone"));
        }
    }
}

/// What is said to an order that wants to fetch what another one of this agent moves already.
pub(super) fn taken() -> Failed {
    failed("another order of this agent has to do with this content already")
}

/// Joins the swarm of a manifest. `resume`: pieces that are there; `None` for a source.
pub(super) async fn join(
    shared: &Arc<Shared>,
    cell: &Arc<Cell>,
    id: &Bytes,
    manifest: &Arc<Manifest>,
    storage: Storage,
    fetch: Option<Option<gse_bt::Bitmap>>,
    limits: Limits,
) -> Result<Member, Failed> {
    let mut news = shared.links.news();
    // What ended before was another transfer of the same content.
    shared.links.begin(&cell.server().unwrap_or_default(), id);
    shared.link_now(cell);
    let peers = told(shared, id, &mut news).await?;
    let swarm_key: [u8; 32] = peers.key[..]
        .try_into()
        .map_err(|_| failed("the server's key of the swarm has not 32 bytes"))?;
    let identity = shared.links.identity();
    let engine = shared.swarms.engine(shared).await;
    let engine = engine.ok_or_else(|| failed("this agent can take part in no swarms; its log says why"))?;
    let spec = SwarmSpec {
        manifest: Arc::clone(manifest),
        swarm_key,
        own_id: identity.agent_id.clone(),
        foreign: false,
    };
    let (swarm, storage) = {
        let mut running = shared.swarms.running.lock();
        let there = running
            .get(id)
            .and_then(|one| Some((one.swarm.upgrade()?, one.storage.clone())));
        match (there, fetch) {
            // Its content is in other files than those that are to be filled.
            (Some(_), Some(_)) => return Err(taken()),
            (Some(there), None) => there,
            (None, fetch) => {
                let swarm = match fetch {
                    None => engine.seed(spec, storage.clone()),
                    Some(resume) => engine.fetch(spec, storage.clone(), resume),
                };
                let swarm = swarm.map_err(|error| failed(format!("the swarm can't be joined: {error}")))?;
                let swarm = Arc::new(swarm);
                let one = Running {
                    storage: storage.clone(),
                    progress: swarm.progress(),
                    swarm: Arc::downgrade(&swarm),
                };
                running.insert(id.clone(), one);
                (swarm, storage)
            }
        }
    };
    swarm.set_limits(limits);
    let progress = swarm.progress();
    let member = Member {
        shared: Arc::clone(shared),
        id: id.clone(),
        cell: Arc::clone(cell),
        swarm: Some(swarm),
        news,
        progress,
        storage,
    };
    member.tell(&peers).await;
    Ok(member)
}

/// What a step of a swarm was.
pub(super) enum Step {
    /// Look at the progress.
    Look,
    /// Nothing of it is needed any more.
    Over,
}

impl Member {
    async fn tell(&self, peers: &SwarmPeers) {
        let Some(swarm) = &self.swarm else { return };
        let others: Vec<_> = peers
            .peers
            .iter()
            .filter(|peer| peer.agent_id != self.shared.links.identity().agent_id)
            .cloned()
            .collect();
        for some in others.chunks(1000) {
            while !swarm.add_peers(some) {
                if swarm.progress().borrow().failed.is_some() {
                    return;
                }
                sleep(AGAIN).await;
            }
        }
        if !peers.gone.is_empty() {
            while !swarm.drop_peers(&peers.gone) {
                if swarm.progress().borrow().failed.is_some() {
                    return;
                }
                sleep(AGAIN).await;
            }
        }
    }

    /// Goes on until there is something to look at.
    pub(super) async fn step(&mut self) -> Step {
        let server = self.cell.server().unwrap_or_default();
        if self.shared.links.is_over(&server, &self.id) {
            return Step::Over;
        }
        tokio::select! {
            news = self.news.recv() => match news {
                Ok(SwarmNews::Peers(peers)) if peers.manifest_id == self.id => self.tell(&peers).await,
                Ok(SwarmNews::Over(by, id)) if id == self.id && by == server => return Step::Over,
                Ok(_) => {}
                // What was missed is among what is known.
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    if let Some(peers) = self.shared.links.peers_of(&self.id) {
                        self.tell(&peers).await;
                    }
                }
                Err(broadcast::error::RecvError::Closed) => return Step::Over,
            },
            () = sleep(LOOK) => {}
        }
        Step::Look
    }

    /// Leaves; the last one ends the swarm here, and nothing is written any more when this returns.
    pub(super) async fn leave(mut self) {
        if let Some(swarm) = self.swarm.take().and_then(Arc::into_inner) {
            swarm.stop().await;
        }
    }
}

/// What a swarm that failed means for a row.
pub(super) fn failure(progress: &Progress, changed: Inner) -> Option<Failed> {
    let failure = progress.failed.as_ref()?;
    let code = match () {
        () if failure.disk_full => Inner::NoSpace,
        () if failure.changed => changed,
        () => Inner::Fetch,
    };
    Some(Failed::new(code, failure.message.clone()))
}

/// Seeds a source until the server says that it is over.
pub(super) async fn seed(cell: &Cell, mut member: Member) -> Result<(), Failed> {
    loop {
        let step = tokio::select! {
            step = member.step() => step,
            () = cell.cancelled() => {
                member.leave().await;
                return cell.stop.check();
            }
        };
        let progress = member.progress.borrow_and_update().clone();
        let sent = progress.uploaded.min(progress.total);
        cell.moved.fetch_max(sent, Ordering::Relaxed);
        if let Some(failed) = failure(&progress, Inner::Changed) {
            member.leave().await;
            return Err(failed);
        }
        if matches!(step, Step::Over) {
            member.leave().await;
            return Ok(());
        }
    }
}

/// Fetches until everything is here; writes the resume map down on the way.
pub(super) async fn fetch(cell: &Cell, member: &mut Member, map: Option<ResumeFile>) -> Result<(), Failed> {
    let mut map = map;
    let mut saved = Instant::now();
    let mut saved_bytes = 0;
    loop {
        let step = tokio::select! {
            step = member.step() => step,
            () = cell.cancelled() => {
                if cell.stop.is_paused() {
                    let progress = member.progress.borrow().clone();
                    save(&mut map, &member.storage, &progress).await;
                }
                return cell.stop.check();
            }
        };
        let progress = member.progress.borrow_and_update().clone();
        cell.moved.fetch_max(progress.have_bytes, Ordering::Relaxed);
        if progress.complete {
            return Ok(());
        }
        if let Some(failed) = failure(&progress, Inner::Place) {
            return Err(failed);
        }
        if matches!(step, Step::Over) {
            return Err(Failed::new(
                Inner::Fetch,
                "the server ended the transfer before everything was here",
            ));
        }
        let much = progress.have_bytes.saturating_sub(saved_bytes) >= MAP_BYTES;
        if progress.have_bytes > saved_bytes && (much || saved.elapsed() >= MAP_EVERY) {
            save(&mut map, &member.storage, &progress).await;
            saved = Instant::now();
            saved_bytes = progress.have_bytes;
        }
    }
}

/// What is lost with a map that can't be written is time: pieces are fetched again after a restart.
async fn save(map: &mut Option<ResumeFile>, storage: &Storage, progress: &Progress) {
    let Some(mut file) = map.take() else { return };
    if let Err(error) = storage.sync().await {
        tracing::warn!(%error, "pieces can't be synced; the resume map is not written");
        *map = Some(file);
        return;
    }
    let pieces = Arc::clone(&progress.pieces);
    let written = tokio::task::spawn_blocking(move || {
        let written = file.save(&pieces).and_then(|()| file.sync());
        (file, written)
    });
    match written.await {
        Ok((file, written)) => {
            if let Err(error) = written {
                tracing::warn!(%error, "the resume map can't be written");
            }
            *map = Some(file);
        }
        Err(error) => tracing::warn!(%error, "the resume map can't be written"),
    }
}

/// Opens the resume map of an order. Blocking.
pub(super) fn open_map(
    path: &std::path::Path,
    id: &Bytes,
    pieces: u32,
) -> Result<(ResumeFile, Option<gse_bt::Bitmap>), Failed> {
    use std::os::unix::fs::OpenOptionsExt;
    let opened = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path);
    let id: [u8; 32] = id[..].try_into().map_err(|_| failed("a manifest id has 32 bytes"))?;
    opened
        .and_then(|file| ResumeFile::open(file, id, pieces))
        .map_err(|error| Failed::new(Inner::Write, format!("the resume map {}: {error}", path.display())))
}
