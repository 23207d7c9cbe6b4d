//! Opening a task: what it moves is found out, taken into the cache, and offered to foreign clients, each part by itself and as soon as
//! it can be. That a task is open is noted in the store, so that it holds over a restart.

use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use gse_bt::{Bitmap, EngineError, SwarmSpec, manifest};
use gse_core::store::{Batch, StoreError, as_pairs};
use gse_proto::keys;
use gse_proto::xfer::{Opened, OpenedPart, XferHeader};
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Front, Opening, Part, Seed, State};
use crate::Node;
use crate::cache::{Cache, CacheError};
use crate::peer;
use crate::swarm::{self, ManifestId};
use crate::task::orders::Content;
use crate::task::{drive, engine};

/// Between two looks at whether what is waited for is there.
const LOOK: Duration = Duration::from_millis(250);
/// How often a swarm that is still being closed is tried again.
const TRIES: u32 = 20;
/// The list of an instance that never comes back is forgotten after so long; no task is open longer.
const LIST_TTL_S: u64 = 40 * 24 * 3600;

/// Why a task is not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no front.
    #[error("gse_btsvr lets no foreign clients in here (front.enabled)")]
    Off,
    /// More than this instance has open at a time.
    #[error("{0} file tasks are open already, no more are opened; close some (front.max_open)")]
    Full(usize),
    /// More than is opened of one task.
    #[error("the task has {parts} sources or files, at most {most} are opened (front.max_parts)")]
    Parts {
        /// So many.
        parts: usize,
        /// May be opened.
        most: usize,
    },
    /// It can't be noted down.
    #[error("the store does not take it: {0}")]
    Store(#[from] StoreError),
}

/// Opens a task until `expires_ms`; one that is open already stays so at least as long, and what had failed is tried again.
///
/// # Errors
/// [`OpenError`]: it is not opened, or no longer than it was.
pub async fn open(node: &Arc<Node>, header: &XferHeader, expires_ms: u64) -> Result<(), OpenError> {
    let front = node.foreign.as_ref().ok_or(OpenError::Off)?;
    let names = names(header);
    if names.len() > front.config.max_parts {
        return Err(OpenError::Parts {
            parts: names.len(),
            most: front.config.max_parts,
        });
    }
    let task = header.task_id.as_str();
    let (is_new, begin, over) = {
        let mut openings = front.openings.lock();
        let count = openings.len();
        let is_new = !openings.contains_key(task);
        if is_new && count >= front.config.max_open {
            return Err(OpenError::Full(count));
        }
        let opening = openings.entry(task.to_owned()).or_insert_with(|| Opening {
            app: header.app.clone(),
            expires_ms,
            over: node.life.drain_token().child_token(),
            parts: Default::default(),
        });
        opening.expires_ms = opening.expires_ms.max(expires_ms);
        let mut begin = Vec::new();
        for (number, name) in (0..).zip(names) {
            let part = opening.parts.entry(number).or_insert(Part {
                name,
                id: None,
                found: None,
                state: State::Failed(String::new()),
            });
            if let Some(group) = header
                .groups
                .get(number as usize)
                .filter(|group| !group.content.is_empty())
            {
                part.found = Some(Found::Pushed(group.name.clone(), group.content.clone()));
            }
            if matches!(part.state, State::Failed(_)) {
                part.state = State::Waiting("its content is not known yet");
                begin.push(number);
            }
        }
        (is_new, begin, opening.over.clone())
    };
    let saved = save(node, front, task).await;
    if saved.is_err() && is_new {
        front.close(task);
    } else {
        begin_parts(node, task, begin, over);
    }
    saved?;
    tracing::info!(task, expires_ms, "a file task is opened to foreign clients");
    Ok(())
}

/// What the parts of a task are called.
fn names(header: &XferHeader) -> Vec<String> {
    let at = |dir: &str, name: &str| format!("{}/{name}", dir.trim_end_matches('/'));
    if header.push {
        header.groups.iter().map(|group| at(&group.dir, &group.name)).collect()
    } else {
        header
            .uploads
            .iter()
            .map(|upload| at(&upload.dir, &upload.name))
            .collect()
    }
}

/// Opens again what was open in this instance's last life and has not expired. What can't be offered any more says so.
///
/// # Errors
/// When the store does not answer.
pub async fn restore(node: &Arc<Node>) -> Result<(), StoreError> {
    let Some(front) = &node.foreign else { return Ok(()) };
    let key = keys::file_opened(&node.config.node_id);
    let mut list = redis::cmd("HGETALL");
    list.arg(&key);
    let mut batch = Batch::new();
    batch.push(&key, list);
    let reply = node.store.raw().run(batch).await?.into_iter().next();
    let now = node.clock.unix_ms();
    for (task, noted) in reply.map_or(Ok(vec![]), as_pairs)? {
        let (Ok(task), Ok(noted)) = (String::from_utf8(task.to_vec()), Opened::decode(noted)) else {
            tracing::error!("what is noted of an opened file task is damaged and left out");
            continue;
        };
        if noted.expires_ms <= now {
            forget(node, &task).await?;
            continue;
        }
        let parts = noted.parts.into_iter().map(|part| {
            let what = Part {
                name: part.name,
                id: swarm::manifest_id(&part.manifest_id),
                found: None,
                state: State::Waiting("its content is being verified"),
            };
            (part.part, what)
        });
        let opening = Opening {
            app: noted.app,
            expires_ms: noted.expires_ms,
            over: node.life.drain_token().child_token(),
            parts: parts.collect(),
        };
        let (begin, over) = (opening.parts.keys().copied().collect(), opening.over.clone());
        front.openings.lock().insert(task.clone(), opening);
        begin_parts(node, &task, begin, over);
    }
    Ok(())
}

/// Closes a task, here and for the next life.
pub(super) async fn close(node: &Node, front: &Front, task: &str) -> bool {
    let was_open = front.close(task);
    if let Err(error) = forget(node, task).await {
        tracing::warn!(task, %error, "the store does not take it that a file task is closed; its time will be up anyway");
    }
    was_open
}

async fn forget(node: &Node, task: &str) -> Result<(), StoreError> {
    let key = keys::file_opened(&node.config.node_id);
    let mut remove = redis::cmd("HDEL");
    remove.arg(&key).arg(task);
    let mut batch = Batch::new();
    batch.push(&key, remove);
    node.store.raw().run(batch).await.map(|_| ())
}

async fn save(node: &Node, front: &Front, task: &str) -> Result<(), StoreError> {
    let noted = {
        let openings = front.openings.lock();
        let Some(opening) = openings.get(task) else {
            return Ok(());
        };
        let parts = opening.parts.iter().map(|(number, part)| OpenedPart {
            part: *number,
            name: part.name.clone(),
            manifest_id: part.id.map(|id| Bytes::copy_from_slice(&id)).unwrap_or_default(),
        });
        Opened {
            expires_ms: opening.expires_ms,
            app: opening.app.clone(),
            parts: parts.collect(),
        }
    };
    let key = keys::file_opened(&node.config.node_id);
    let mut set = redis::cmd("HSET");
    set.arg(&key).arg(task).arg(noted.encode_to_vec());
    let mut expire = redis::cmd("EXPIRE");
    expire.arg(&key).arg(LIST_TTL_S);
    let mut batch = Batch::new();
    batch.push(&key, set);
    batch.push(&key, expire);
    node.store.raw().run(batch).await.map(|_| ())
}

fn begin_parts(node: &Arc<Node>, task: &str, parts: Vec<u32>, over: CancellationToken) {
    let (owner, task) = (Arc::clone(node), task.to_owned());
    node.life.spawn_contained("opened file task", async move {
        let mut all = JoinSet::new();
        for part in parts {
            let (node, task, over) = (Arc::clone(&owner), task.clone(), over.clone());
            all.spawn(async move {
                let end = over.run_until_cancelled(bring(&node, &task, part)).await;
                // What was begun for the task's sake is not needed any more, however it ended.
                drive::close_swarms(&node, &use_name(&task), part);
                if let (Some(Err(error)), Some(front)) = (end, &node.foreign) {
                    let text = format!("{error:#}");
                    tracing::warn!(
                        task,
                        part,
                        error = text,
                        "a part of a file task can't be opened to foreign clients"
                    );
                    front.set(&task, part, State::Failed(text));
                }
            });
        }
        while all.join_next().await.is_some() {}
    });
}

/// What the swarms of an opened task are held by.
pub(super) fn use_name(task: &str) -> String {
    format!("{task} opened")
}

/// What is known of the content of a part.
#[derive(Debug, Clone)]
pub(super) enum Found {
    /// It goes through a swarm of ours.
    Swarm(ManifestId, Bytes),
    /// It is at hand.
    Here(ManifestId, Bytes, Bytes),
    /// It came in the call, under this name.
    Pushed(String, Bytes),
    /// It will be known.
    Later,
    /// The task is over; perhaps this is what it was.
    Over(Option<ManifestId>),
}

/// Where the content of a source comes from.
pub(super) fn found(node: &Node, content: &Content) -> Option<Found> {
    let id = swarm::manifest_id(&content.manifest_id)?;
    match &content.inline {
        Some(inline) => Some(Found::Here(id, content.manifest.clone(), inline.clone())),
        None => engine::swarm_of(node, content).map(|(id, manifest)| Found::Swarm(id, manifest)),
    }
}

async fn find(node: &Arc<Node>, front: &Front, task: &str, part: u32) -> anyhow::Result<Found> {
    let noted = {
        let openings = front.openings.lock();
        let part = openings.get(task).and_then(|opening| opening.parts.get(&part));
        part.and_then(|part| part.found.clone())
    };
    if let Some(Found::Pushed(name, content)) = noted {
        return pushed(name, content).await;
    }
    if let Some(noted) = noted {
        return Ok(noted);
    }
    let Some(cell) = node.transfers.get(task) else {
        return Ok(Found::Over(front.contents.get(&(task.to_owned(), part))));
    };
    if cell.header.push {
        let group = cell.header.groups.get(part as usize).context("there is no such file")?;
        return pushed(group.name.clone(), group.content.clone()).await;
    }
    Ok(match cell.content(part) {
        Some(content) => found(node, &content).unwrap_or_else(|| Found::Over(swarm::manifest_id(&content.manifest_id))),
        None => Found::Later,
    })
}

async fn pushed(name: String, content: Bytes) -> anyhow::Result<Found> {
    let bytes = content.clone();
    let built = tokio::task::spawn_blocking(move || peer::manifest_of(&name, &bytes)).await;
    let manifest = Bytes::from(built.context("reading it")??.encode_to_vec());
    Ok(Found::Here(Sha256::digest(&manifest).into(), manifest, content))
}

/// Takes the content of a part into the cache and offers it.
async fn bring(node: &Arc<Node>, task: &str, part: u32) -> anyhow::Result<()> {
    let front = node.foreign.as_ref().context("there is no front")?;
    let cache = node.peer.as_ref().context("there is no cache")?.cache();
    let known = front
        .openings
        .lock()
        .get(task)
        .and_then(|opening| opening.parts.get(&part)?.id);
    let id = match known.filter(|id| cache.has(id)) {
        Some(id) => id,
        None => fetch(node, front, cache, task, part).await?,
    };
    front.note(task, part, id);
    save(node, front, task).await.context("noting it in the store")?;
    drive::close_swarms(node, &use_name(task), part);
    let seed = seed(front, cache, id).await?;
    front.announce(seed.info_hash);
    front.set(task, part, State::Open(seed));
    Ok(())
}

async fn fetch(
    node: &Arc<Node>,
    front: &Front,
    cache: &Arc<Cache>,
    task: &str,
    part: u32,
) -> anyhow::Result<ManifestId> {
    let mut taking: Option<ManifestId> = None;
    let mut ended: Option<Instant> = None;
    let patience = Duration::from_secs(front.config.fetch_wait_s);
    loop {
        if let Some(id) = taking.filter(|id| cache.has(id)) {
            return Ok(id);
        }
        let found = find(node, front, task, part).await?;
        match found {
            Found::Here(id, ..) | Found::Swarm(id, _) | Found::Over(Some(id)) if cache.has(&id) => return Ok(id),
            Found::Here(id, manifest, content) => match cache.put(id, &manifest, &content).await {
                // Somebody is at it.
                Ok(()) | Err(CacheError::InUse) => taking = Some(id),
                Err(error) => return Err(error).context("it can't be taken into the cache"),
            },
            Found::Swarm(id, manifest) => {
                if taking.is_none() {
                    node.swarms.open(id, &manifest, &use_name(task), part);
                    front.set(task, part, State::Waiting("it is being fetched"));
                    taking = Some(id);
                } else if !node.has_copy(&id) {
                    bail!("this instance can't take a copy of it into its cache, see its log");
                }
                peer::take(node, id, &manifest);
            }
            Found::Later | Found::Pushed(..) => {}
            Found::Over(_) => {
                if taking.is_none() {
                    bail!(
                        "the task is over, and its content is not in the cache of this instance (cache.take, cache.expire_s)"
                    );
                }
            }
        }
        if node.transfers.get(task).is_some() {
            ended = None;
        } else if ended.get_or_insert_with(Instant::now).elapsed() > patience {
            bail!("the task has ended before its content was here (front.fetch_wait_s)");
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Offers what is in the cache.
async fn seed(front: &Front, cache: &Arc<Cache>, id: ManifestId) -> anyhow::Result<Arc<Seed>> {
    let reading = Arc::clone(cache);
    let shared = tokio::task::spawn_blocking(move || reading.share(&id))
        .await
        .context("opening it")??;
    let shared = shared.context("it is not in the cache any more (cache.quota_bytes)")?;
    let of = Arc::clone(&shared.manifest);
    if of.total == 0 {
        bail!("there is nothing in it that could be fetched");
    }
    let all = Bitmap::full(shared.storage.geometry().pieces());
    if !shared.storage.verify(all).await?.is_full() {
        bail!("it was spoilt on the disk of the cache");
    }
    let info_hash = manifest::swarm_id(&of);
    let torrent = manifest::torrent_file(&of, &front.announce);
    for _ in 0..TRIES {
        {
            let mut seeds = front.seeds.lock();
            if let Some(known) = seeds.get(&id).and_then(Weak::upgrade) {
                return Ok(known);
            }
            let spec = SwarmSpec {
                manifest: Arc::clone(&of),
                // Nobody of ours is met there.
                swarm_key: [0; 32],
                own_id: "gse_btsvr".to_owned(),
                foreign: true,
            };
            match front.engine.seed(spec, shared.storage.clone()) {
                Ok(swarm) => {
                    if !front.tracker.0.allow(info_hash) {
                        bail!("the tracker has no room for one more swarm (front.max_open, front.max_parts)");
                    }
                    let seed = Arc::new(Seed {
                        info_hash,
                        torrent,
                        size: of.total,
                        tracker: front.tracker.clone(),
                        _swarm: swarm,
                        _content: shared,
                    });
                    seeds.insert(id, Arc::downgrade(&seed));
                    return Ok(seed);
                }
                // One that was closed just now.
                Err(EngineError::Twice(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        tokio::time::sleep(LOOK).await;
    }
    bail!("the same content is still being closed");
}

impl Front {
    fn set(&self, task: &str, part: u32, state: State) {
        // In this order, see `close`.
        let _seeds = self.seeds.lock();
        let mut openings = self.openings.lock();
        if let Some(known) = openings.get_mut(task).and_then(|opening| opening.parts.get_mut(&part)) {
            known.state = state;
        }
    }

    fn note(&self, task: &str, part: u32, id: ManifestId) {
        let mut openings = self.openings.lock();
        if let Some(known) = openings.get_mut(task).and_then(|opening| opening.parts.get_mut(&part)) {
            known.id = Some(id);
            known.found = None;
        }
    }
}
