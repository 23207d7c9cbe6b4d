//! This instance as a member of swarms: it offers content of calls that would otherwise go to each target in a message of its own, and
//! what it has kept of earlier transfers, takes copies of what is likely to be moved again, and of what it is to carry into its zone or
//! out of it ([`crate::relay`]), for itself or for another instance that controls the transfer.
//!
//! What is kept on the disk is [`crate::cache`]'s matter, who else takes part [`crate::swarm`]'s.

mod copies;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use bytes::Bytes;
use gse_bt::manifest::{BuildError, ManifestBuilder};
use gse_bt::{ALPN, Bitmap, Engine, EngineConfig, Limits, PeerTls, Swarm, SwarmSpec};
use gse_core::random::HashMap;
use gse_core::tls::{self, Role};
use gse_proto::file::Manifest;
use moka::sync::Cache as Seen;
use parking_lot::Mutex;
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use copies::Copy;
pub(crate) use copies::Word;

use crate::cache::{Cache, Kept};
use crate::config::{Config, Take};
use crate::metrics::Metrics;
use crate::swarm::ManifestId;
use crate::{Node, relay};

/// Contents that are remembered as having been moved.
const SEEN: u64 = 100_000;
/// Between two looks at how far a copy is.
const LOOK: Duration = Duration::from_millis(250);
/// The map of pieces is written so often.
const MAP_EVERY: Duration = Duration::from_secs(5);
/// Between two searches for what has expired.
const SWEEP: Duration = Duration::from_secs(30);

/// Stands for this instance among those that want a copy.
pub const OWN: &str = "";
/// What the name of an instance as a member of swarms begins with; an agent's id has no blank.
const NAME: &str = "gse_btsvr ";

/// The instance that has this name as a member of swarms.
#[must_use]
pub fn instance_of(name: &str) -> Option<&str> {
    name.strip_prefix(NAME).filter(|id| !id.is_empty() && id.len() <= 64)
}

/// This instance among the peers.
#[derive(Debug)]
pub struct Peer {
    name: String,
    engine: Engine,
    cache: Arc<Cache>,
    advertise: Vec<String>,
    take: Take,
    seen: Seen<ManifestId, ()>,
    copies: Mutex<HashMap<ManifestId, Copy>>,
}

/// The manifest of content that came in a call. It is the same for the same content and name, so that it outlives a restart.
///
/// # Errors
/// When there is more than can be cut into pieces.
pub fn manifest_of(name: &str, content: &[u8]) -> Result<Manifest, BuildError> {
    let size = content.len() as u64;
    let mut builder = ManifestBuilder::new(name, size)?;
    builder.begin_file(vec![Bytes::copy_from_slice(name.as_bytes())], size, 0o644, 0)?;
    builder.data(content)?;
    builder.end_file()?;
    builder.finish()
}

/// Opens the cache and listens for peers; `None` when there is to be no cache.
///
/// # Errors
/// When the directory or the address can't be used.
pub async fn start(config: &Config, metrics: &Metrics, peers: gse_bt::Metrics) -> anyhow::Result<Option<Peer>> {
    if config.cache.dir.is_empty() {
        return Ok(None);
    }
    let (dir, quota) = (config.cache.dir.clone(), config.cache.quota_bytes);
    let expiry = Duration::from_secs(config.cache.expire_s);
    let (counts, files) = (metrics.clone(), config.link.tls.clone().context("link.tls is not set")?);
    let made = tokio::task::spawn_blocking(move || {
        let cache = Cache::open(Path::new(&dir), quota, expiry, counts).context("cache.dir")?;
        let tls = tls::peer_configs(&files, &[Role::Agent, Role::Server], &[ALPN]).context("link.tls")?;
        anyhow::Ok((cache, tls))
    });
    let (cache, (server, client)) = made.await.context("opening the cache")??;
    let listen: SocketAddr = tokio::net::lookup_host(&config.peer.listen)
        .await
        .context("peer.listen")?
        .next()
        .context("peer.listen is no address")?;
    let engine = EngineConfig {
        listen: vec![listen],
        tls: Some(PeerTls { server, client }),
        limits: Limits {
            up: config.peer.upload_bytes_per_s,
            down: config.peer.download_bytes_per_s,
        },
        max_connections: config.peer.max_connections,
        max_peers: config.peer.max_peers,
        ..EngineConfig::default()
    };
    let engine = Engine::start(engine, peers).await.context("peer.listen")?;
    let advertise = if config.peer.advertise.is_empty() {
        engine.listening().iter().map(ToString::to_string).collect()
    } else {
        config.peer.advertise.clone()
    };
    Ok(Some(Peer {
        name: format!("{NAME}{}", config.node_id),
        engine,
        cache,
        advertise,
        take: config.cache.take,
        seen: Seen::builder().max_capacity(SEEN).time_to_live(expiry).build(),
        copies: Mutex::default(),
    }))
}

impl Peer {
    /// What the others call it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where peers reach it.
    #[must_use]
    pub fn addresses(&self) -> &[String] {
        &self.advertise
    }

    /// Where it listens for peers.
    #[must_use]
    pub fn listening(&self) -> Option<SocketAddr> {
        self.engine.listening().first().copied()
    }

    /// Content on the disk.
    #[must_use]
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// Whether this instance should take part in a swarm that has an agent as its source.
    fn wants(&self, id: &ManifestId) -> bool {
        let moved_before = self.seen.contains_key(id);
        self.seen.insert(*id, ());
        self.cache.has(id) || self.take == Take::Always || (self.take == Take::Again && moved_before)
    }
}

/// Tells this instance's own part in a swarm of its peers.
pub fn tell(node: &Node, id: &ManifestId) {
    let Some(peer) = &node.peer else { return };
    let Some(words) = peer.copies.lock().get(id).map(|copy| copy.words.clone()) else {
        return;
    };
    let zones = node.zones();
    if let Some(told) = node
        .swarms
        .deal(id, &peer.name, &zones, |name| node.reach(name, &zones))
        && words.try_send(Word::Peers(told)).is_err()
    {
        tracing::debug!("a copy is too busy to be told of peers; it is told again");
    }
}

/// A swarm with an agent as its source is open: takes part in it if that is worth it.
pub fn consider(node: &Arc<Node>, id: ManifestId, manifest: &Bytes) {
    let Some(peer) = &node.peer else { return };
    if peer.wants(&id) {
        take(node, id, manifest);
    }
}

/// Takes part in an open swarm in any case.
pub fn take(node: &Arc<Node>, id: ManifestId, manifest: &Bytes) {
    let Some(peer) = &node.peer else { return };
    let Some((inbox, over)) = peer.begin(&id, OWN) else {
        if let (true, whole) = peer.state(&id) {
            node.swarms.join_server(&id, peer.name(), whole);
        }
        return;
    };
    let (owner, manifest) = (Arc::clone(node), manifest.clone());
    node.life.spawn_contained("copy of a swarm", async move {
        let Some(peer) = &owner.peer else { return };
        let Some(key) = owner.swarms.key(&id, peer.name()).await else {
            // It has ended before it began.
            return peer.over(&id);
        };
        let ready = prepare(&owner, id, &manifest, None, key).await;
        take_part(&owner, id, ready, inbox, over).await;
    });
}

/// Takes part in a swarm as a relay, for `owner`, whose order it is.
pub(crate) fn carry(node: &Arc<Node>, id: ManifestId, manifest: Bytes, owner: &str, key: [u8; 32], share: Word) {
    let Some(peer) = &node.peer else { return };
    let Some((inbox, over)) = peer.begin(&id, owner) else {
        peer.want(&id, owner, Some(share));
        return;
    };
    peer.want(&id, owner, Some(share));
    let node = Arc::clone(node);
    Arc::clone(&node).life.spawn_contained("copy of a swarm", async move {
        let ready = prepare(&node, id, &manifest, None, key).await;
        take_part(&node, id, ready, inbox, over).await;
    });
}

/// Makes content of a call ready to be fetched from here. `None` when it can't be: it goes in messages then.
pub async fn offer(
    node: &Arc<Node>,
    task: &str,
    group: u32,
    name: &str,
    content: Bytes,
) -> Option<(ManifestId, Bytes)> {
    let peer = node.peer.as_ref()?;
    let (name, bytes) = (name.to_owned(), content.clone());
    let built = tokio::task::spawn_blocking(move || manifest_of(&name, &bytes)).await;
    let manifest = match built {
        Ok(Ok(manifest)) => Bytes::from(manifest.encode_to_vec()),
        Ok(Err(error)) => {
            tracing::warn!(task, %error, "pushed content can't be offered to a swarm");
            return None;
        }
        Err(error) => {
            tracing::error!(task, %error, "pushed content can't be offered to a swarm");
            return None;
        }
    };
    let id: ManifestId = Sha256::digest(&manifest).into();
    node.swarms.open(id, &manifest, task, group);
    let zone = node.config.zone.name.as_str().into();
    let offered = peer.is_wanted_by(&id, OWN);
    let begun = peer.begin(&id, OWN);
    if begun.is_none() && !offered {
        // It is here for another instance's sake.
        if peer.state(&id) != (true, true) {
            peer.over(&id);
            node.swarms.close(task, group);
            return None;
        }
        node.swarms.join_origin(&id, &peer.name, &zone);
    }
    if let Some((inbox, over)) = begun {
        let ready = match node.swarms.key(&id, peer.name()).await {
            Some(key) => prepare(node, id, &manifest, Some(content), key).await,
            None => Err(anyhow::Error::msg("the swarm has ended before it began")),
        };
        if ready.is_err() {
            peer.over(&id);
            node.swarms.close(task, group);
            node.metrics.copy("refused");
            if let Err(error) = ready {
                tracing::warn!(task, error = %format!("{error:#}"), "pushed content can't be kept; it goes in messages");
            }
            return None;
        }
        node.swarms.join_origin(&id, &peer.name, &zone);
        let owner = Arc::clone(node);
        node.life.spawn_contained("copy of a swarm", async move {
            take_part(&owner, id, ready, inbox, over).await;
        });
    }
    Some((id, manifest))
}

/// What is needed to take part.
struct Ready {
    kept: Kept,
    swarm: Swarm,
}

async fn prepare(
    node: &Node,
    id: ManifestId,
    encoded: &Bytes,
    content: Option<Bytes>,
    key: [u8; 32],
) -> anyhow::Result<Ready> {
    let peer = node.peer.as_ref().context("this instance has no cache")?;
    let manifest = Arc::new(Manifest::decode(encoded.clone()).context("the manifest does not decode")?);
    let (cache, encoded, of_entry) = (Arc::clone(&peer.cache), encoded.clone(), Arc::clone(&manifest));
    let entered = tokio::task::spawn_blocking(move || cache.enter(id, &encoded, of_entry)).await;
    let mut kept = entered.context("opening an entry of the cache")??;
    // What an earlier life has written is looked at before anybody is offered it.
    let mut have = kept.storage.verify(kept.claimed.clone()).await?;
    let pushed = content.is_some();
    if let Some(content) = content.filter(|_| !have.is_full()) {
        let length = manifest.piece_length as usize;
        for (piece, at) in (0..).zip((0..content.len()).step_by(length)) {
            let part = content.slice(at..content.len().min(at + length));
            kept.storage.keep(piece, vec![part]).await?;
        }
        have = Bitmap::full(have.len());
        kept = save(kept, have.clone()).await?;
    }
    let spec = SwarmSpec {
        manifest,
        swarm_key: key,
        own_id: peer.name.clone(),
        foreign: false,
    };
    let whole = have.is_full();
    let swarm = if whole {
        peer.engine.seed(spec, kept.storage.clone())?
    } else {
        peer.engine.fetch(spec, kept.storage.clone(), Some(have))?
    };
    node.metrics.copy(match (pushed, whole) {
        (true, _) => "push",
        (false, true) => "cached",
        (false, false) => "fetched",
    });
    Ok(Ready { kept, swarm })
}

async fn save(mut kept: Kept, pieces: Bitmap) -> anyhow::Result<Kept> {
    let saving = tokio::task::spawn_blocking(move || kept.save(&pieces).map(|()| kept));
    Ok(saving.await.context("writing the map of an entry of the cache")??)
}

/// Takes part until the swarm is over.
async fn take_part(
    node: &Arc<Node>,
    id: ManifestId,
    ready: anyhow::Result<Ready>,
    inbox: mpsc::Receiver<Word>,
    over: CancellationToken,
) {
    let Some(peer) = &node.peer else { return };
    let ended = match ready {
        Ok(ready) => {
            let whole = ready.swarm.progress().borrow().complete;
            got_on(node, &id, whole);
            tell(node, &id);
            node.metrics.copies.inc();
            let ended = move_pieces(node, &id, ready, inbox, &over).await;
            node.metrics.copies.dec();
            ended
        }
        Err(error) => {
            node.metrics.copy("refused");
            Err(error)
        }
    };
    let why = ended.err().map(|error| format!("{error:#}"));
    if let Some(error) = &why {
        tracing::warn!(
            content = hex::encode(id),
            error,
            "this instance takes no part in a swarm"
        );
    }
    if !over.is_cancelled() {
        let wanted = peer
            .copies
            .lock()
            .remove(&id)
            .map(|copy| copy.wanted)
            .unwrap_or_default();
        for owner in wanted.keys() {
            match owner.as_str() {
                OWN => node.swarms.relay_failed(&id, peer.name()),
                other => relay::say(node, other, &id, why.as_deref()),
            }
        }
    }
}

/// Says to all that want a copy that it takes part, and whether it is whole.
fn got_on(node: &Arc<Node>, id: &ManifestId, whole: bool) {
    let Some(peer) = &node.peer else { return };
    for owner in peer.note(id, whole) {
        if owner == OWN {
            relay::joined(node, id, peer.name(), whole);
        } else {
            relay::say(node, &owner, id, None);
        }
    }
}

async fn move_pieces(
    node: &Arc<Node>,
    id: &ManifestId,
    ready: Ready,
    mut inbox: mpsc::Receiver<Word>,
    over: &CancellationToken,
) -> anyhow::Result<()> {
    let Ready { mut kept, swarm } = ready;
    let progress = swarm.progress();
    let mut noted = progress.borrow().complete;
    let mut saved = (Instant::now(), progress.borrow().have_bytes);
    let failed = loop {
        tokio::select! {
            () = over.cancelled() => break None,
            () = node.life.draining() => break None,
            Some(word) = inbox.recv() => match word {
                // What it is too busy for it is told again with the next look at who has few peers.
                Word::Peers(told) => {
                    swarm.add_peers(&told.peers);
                }
                Word::Share(share, shares) => {
                    swarm.set_share(share, shares);
                }
            },
            () = tokio::time::sleep(LOOK) => {}
        }
        let now = progress.borrow().clone();
        if let Some(failure) = &now.failed {
            break Some(failure.message.clone());
        }
        let done = now.complete && !noted;
        if done {
            noted = true;
            got_on(node, id, true);
        }
        if done || (now.have_bytes > saved.1 && saved.0.elapsed() >= MAP_EVERY) {
            kept = save(kept, (*now.pieces).clone()).await?;
            saved = (Instant::now(), now.have_bytes);
        }
    };
    swarm.stop().await;
    let last = progress.borrow().clone();
    node.metrics.border_bytes.inc_by(last.crossed);
    if failed.is_none() && last.have_bytes > saved.1 {
        kept = save(kept, (*last.pieces).clone()).await?;
    }
    drop(kept);
    match failed {
        Some(message) => Err(anyhow::Error::msg(message)),
        None => Ok(()),
    }
}

/// Removes what has expired.
pub async fn sweep(node: Arc<Node>) {
    let Some(cache) = node.peer.as_ref().map(|peer| Arc::clone(&peer.cache)) else {
        return;
    };
    loop {
        tokio::select! {
            () = node.life.draining() => return,
            () = tokio::time::sleep(SWEEP) => {}
        }
        let cache = Arc::clone(&cache);
        if let Err(error) = tokio::task::spawn_blocking(move || cache.sweep(SystemTime::now())).await {
            tracing::error!(%error, "the cache could not be swept");
        }
    }
}
