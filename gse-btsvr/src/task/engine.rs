//! Tasks under way, and what touches them from outside: reports of agents, terminations, the start of this instance.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dashmap::DashMap;
use gse_bt::manifest::{self, Bounds};
use gse_core::random::HashMap;
use gse_core::store::StoreError;
use gse_proto::codes::Inner;
use gse_proto::file::{Manifest, Phase, Report};
use gse_proto::ids::AgentId;
use gse_proto::xfer::{StoredEnd, XferHeader};
use parking_lot::Mutex;
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::drive;
use super::layout::{Layout, Subject, subject, without_content};
use super::orders::Content;
use super::run::{Patience, Run};
use super::store::{Known, Stopped};
use crate::Node;
use crate::instance;
use crate::swarm::{self, ManifestId};
use crate::takeover;

/// Between two looks at whether another instance is still taking this one's tasks over.
const CLAIMED_ELSEWHERE: Duration = Duration::from_millis(250);
/// A manifest up to this length goes in the order of each target.
const SHORT_MANIFEST: usize = 64 << 10;

/// A task under way.
#[derive(Debug)]
pub struct Cell {
    /// What polls need of it.
    pub known: Known,
    /// With what was pushed.
    pub header: Arc<XferHeader>,
    /// What is known of its rows.
    pub run: Mutex<Run>,
    /// Something has happened.
    pub wake: Notify,
    /// Agents that were named by another name than their own.
    pub names: Mutex<HashMap<String, AgentId>>,
    /// What is known of the content of uploads.
    contents: Mutex<HashMap<u32, Content>>,
    /// Another instance has it now.
    gone: CancellationToken,
}

impl Cell {
    /// A task; `ends`: what an earlier life has brought to its end.
    #[must_use]
    pub fn new(header: XferHeader, patience: Patience, ends: HashMap<u32, StoredEnd>) -> Self {
        let layout = Arc::new(Layout::new(&header));
        let header = Arc::new(header);
        let shown = if header.push {
            Arc::new(without_content((*header).clone()))
        } else {
            Arc::clone(&header)
        };
        Self {
            run: Mutex::new(Run::new(Arc::clone(&header), Arc::clone(&layout), patience, ends)),
            known: Known { header: shown, layout },
            header,
            wake: Notify::new(),
            names: Mutex::default(),
            contents: Mutex::default(),
            gone: CancellationToken::new(),
        }
    }

    /// Resolves when another instance has the task.
    pub async fn gone(&self) {
        self.gone.cancelled().await;
    }

    /// Id of the task.
    #[must_use]
    pub fn task(&self) -> &str {
        &self.header.task_id
    }

    /// What a row means.
    #[must_use]
    pub fn subject(&self, row: u32) -> Option<Subject<'_>> {
        subject(&self.header, &self.known.layout, row)
    }

    /// The agent of a row; `None` when it can't be one.
    #[must_use]
    pub fn agent(&self, row: u32) -> Option<AgentId> {
        let asked = &self.subject(row)?.endpoint.agent_id;
        if let Some(agent) = self.names.lock().get(asked) {
            return Some(agent.clone());
        }
        AgentId::parse(asked).ok()
    }

    /// What is known of the content of an upload.
    #[must_use]
    pub fn content(&self, upload: u32) -> Option<Content> {
        self.contents.lock().get(&upload).cloned()
    }
}

/// All tasks under way.
#[derive(Debug, Default)]
pub struct Transfers {
    cells: DashMap<String, Arc<Cell>>,
}

impl Transfers {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// A task under way.
    #[must_use]
    pub fn get(&self, task: &str) -> Option<Arc<Cell>> {
        self.cells.get(task).map(|cell| Arc::clone(&cell))
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Cell>> {
        self.cells.iter().map(|cell| Arc::clone(&cell)).collect()
    }

    /// One is finished.
    pub fn remove(&self, task: &str) {
        self.cells.remove(task);
    }

    /// Takes a task up.
    pub fn start(node: &Arc<Node>, header: XferHeader, ends: HashMap<u32, StoredEnd>, stopped: Option<Stopped>) {
        let cell = Arc::new(Cell::new(header, patience(node), ends));
        if let Some(stopped) = stopped {
            // Nothing was asked in this life, but agents may hold orders of the last one, or of another instance: they are told.
            cell.run
                .lock()
                .stop_held(|endpoint| stopped.has(endpoint), node.clock.unix_ms());
        }
        node.transfers.cells.insert(cell.task().to_owned(), Arc::clone(&cell));
        node.metrics.tasks_started.inc();
        node.life.spawn("file task", drive::drive(Arc::clone(node), cell));
    }
}

fn patience(node: &Node) -> Patience {
    Patience {
        lost_ms: node.config.task.lost_grace_ms,
        stop_ms: node.config.task.stop_grace_ms,
        tries: node.config.task.call_tries,
    }
}

/// Takes up the unfinished tasks of this instance's last life. False when the instance drains before that.
pub async fn recover(node: &Arc<Node>) -> bool {
    let mut wait = Duration::from_millis(100);
    loop {
        match take_up(node).await {
            Ok(count) => {
                if count > 0 {
                    tracing::info!(tasks = count, "unfinished file tasks taken up");
                }
                return true;
            }
            Err(error) => {
                tracing::warn!(%error, "unfinished file tasks can't be read yet; agents are let in after that")
            }
        }
        tokio::select! {
            () = node.life.draining() => return false,
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(Duration::from_secs(2));
    }
}

async fn take_up(node: &Arc<Node>) -> Result<usize, StoreError> {
    let own = &node.config.node_id;
    // Another instance may be at it: it is waited for, and what it has taken is not on the list any more. The claim is kept until the
    // others can see that this instance is there.
    while !takeover::claim(node, own).await? {
        tokio::select! {
            () = node.life.draining() => return Ok(0),
            () = tokio::time::sleep(CLAIMED_ELSEWHERE) => {}
        }
    }
    let mut count = 0;
    for task in node.store.unfinished(own).await? {
        if node.transfers.get(&task).is_some() {
            continue;
        }
        let Some(mut header) = node.store.header(&task).await? else {
            // Never committed, or expired.
            node.store.forget(own, &task).await?;
            continue;
        };
        if header.node_id != *own {
            // Another one had taken it over, and died or was cut off before it took it off this list.
            if instance::is_there(node.store.raw(), &header.node_id).await? {
                node.store.forget(own, &task).await?;
                continue;
            }
            adopt(node, &mut header).await?;
        }
        let ends = node.store.ends(&task, &Layout::new(&header)).await?;
        let stopped = node.store.stopped(&task).await?;
        Transfers::start(node, header, ends, stopped);
        count += 1;
    }
    Ok(count)
}

/// Makes a task one of this instance.
async fn adopt(node: &Node, header: &mut XferHeader) -> Result<(), StoreError> {
    header.node_id.clone_from(&node.config.node_id);
    let left_s = header.deadline_ms.saturating_sub(node.clock.unix_ms()) / 1000;
    let ttl_s = left_s + node.config.task.result_ttl_s + 600;
    node.store.adopt(header, ttl_s).await
}

/// Goes on with an unfinished task of an instance that is gone; false when there is no such task any more.
///
/// # Errors
/// When the store does not answer; to be tried again.
pub async fn take_over(node: &Arc<Node>, dead: &str, task: &str) -> Result<bool, StoreError> {
    let store = &node.store;
    if node.transfers.get(task).is_none() {
        let Some(mut header) = store.header(task).await? else {
            // Never committed, finished, or expired.
            store.forget(dead, task).await?;
            return Ok(false);
        };
        adopt(node, &mut header).await?;
        let ends = store.ends(task, &Layout::new(&header)).await?;
        let stopped = store.stopped(task).await?;
        Transfers::start(node, header, ends, stopped);
        node.metrics.tasks_taken_over.inc();
        // Whoever asked for an end a moment ago has not met the task here yet.
        if let (Some(stopped), Some(cell)) = (store.stopped(task).await?, node.transfers.get(task)) {
            stop(node, &cell, &stopped);
        }
    }
    store.forget(dead, task).await?;
    Ok(true)
}

/// Another instance has the task: nothing more is done for it here.
pub fn let_go(node: &Node, cell: &Cell) {
    cell.gone.cancel();
    node.transfers.remove(cell.task());
    for part in 0..cell
        .known
        .layout
        .uploads()
        .max(u32::try_from(cell.header.groups.len()).unwrap_or(u32::MAX))
    {
        // Members are told of its end by the other one.
        for (id, _) in node.swarms.close(cell.task(), part) {
            if let Some(peer) = &node.peer {
                peer.over(&id);
            }
        }
    }
}

/// What an agent is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Nothing; it goes on.
    Noted,
    /// The final report is stored, or of no use to anybody: it may be forgotten.
    Stored,
    /// What it does is not wanted any more.
    Unwanted,
    /// The manifest that it names has not come.
    ManifestMissing,
}

/// Takes what an agent says about one of its orders.
pub fn report(node: &Node, agent: &AgentId, report: &Report) -> Answer {
    let Some(cell) = node.transfers.get(&report.task_id) else {
        // Finished and stored, or expired. An agent that was away when its row was closed is still at it.
        let is_final = matches!(report.phase(), Phase::Done | Phase::Failed);
        return if is_final { Answer::Stored } else { Answer::Unwanted };
    };
    if cell.agent(report.order).as_ref() != Some(agent) {
        tracing::warn!(%agent, task = report.task_id, order = report.order, "an agent reports on an order that is not its own");
        return Answer::Stored;
    }
    take_report(node, &cell, report.order, report)
}

/// The same for a row whose agent is known to be the one that speaks.
pub fn take_report(node: &Node, cell: &Cell, row: u32, report: &Report) -> Answer {
    let is_final = matches!(report.phase(), Phase::Done | Phase::Failed);
    let now = node.clock.unix_ms();
    let names_content =
        !report.manifest_id.is_empty() && row < cell.known.layout.uploads() && report.phase() != Phase::Failed;
    let is_news = {
        let run = cell.run.lock();
        names_content && !run.is_ready(row) && run.is_wanted(row)
    };
    // Large manifests take a while to look at: not under the lock.
    let offered = is_news.then(|| content(node, report));
    if let (Some(front), Some(Ok(Some((content, _))))) = (&node.foreign, &offered) {
        front.content_known(node, cell.task(), row, content);
    }
    let mut missing = false;
    {
        let mut run = cell.run.lock();
        run.report(row, report, now);
        match offered {
            None => {}
            Some(Ok(Some((content, size)))) => {
                let apart = content.inline.is_some();
                cell.contents.lock().insert(row, content);
                run.ready(row, size, apart);
                node.metrics.path(if apart { "inline" } else { "swarm" });
            }
            Some(Ok(None)) => missing = true,
            Some(Err(text)) => {
                tracing::warn!(
                    task = cell.task(),
                    row,
                    text,
                    "what a source says of its content is not acceptable"
                );
                run.fail(row, Inner::System.code(), &text, now);
            }
        }
    }
    cell.wake.notify_one();
    let run = cell.run.lock();
    if is_final && run.is_stored(row) {
        Answer::Stored
    } else if missing {
        Answer::ManifestMissing
    } else if !is_final && !run.is_wanted(row) {
        Answer::Unwanted
    } else {
        Answer::Noted
    }
}

/// What a ready source offers; `None` while its manifest has not come.
fn content(node: &Node, report: &Report) -> Result<Option<(Content, u64)>, String> {
    let id = swarm::manifest_id(&report.manifest_id).ok_or("the id of the manifest has not 32 bytes")?;
    let manifest = if report.inline_manifest.is_empty() {
        match node.manifests.get(&id) {
            Some(manifest) => manifest,
            None => return Ok(None),
        }
    } else {
        if <[u8; 32]>::from(Sha256::digest(&report.inline_manifest)) != id {
            return Err("the manifest is not the one that its id names".into());
        }
        node.manifests.insert(id, report.inline_manifest.clone());
        report.inline_manifest.clone()
    };
    let read = Manifest::decode(manifest.clone()).map_err(|error| format!("the manifest does not decode: {error}"))?;
    let limits = &node.config.task;
    let bounds = Bounds {
        total: limits.max_bytes,
        entries: limits.max_entries,
        ..Bounds::default()
    };
    manifest::check(&read, &bounds).map_err(|error| format!("the manifest is not acceptable: {error}"))?;
    let inline = (!report.inline_content.is_empty() || read.total == 0).then(|| report.inline_content.clone());
    if inline.as_ref().is_some_and(|inline| inline.len() as u64 != read.total) {
        return Err("the content is not as long as the manifest says".into());
    }
    let in_order = manifest.len() <= SHORT_MANIFEST || inline.is_some();
    let content = Content {
        manifest_id: report.manifest_id.clone(),
        manifest: if in_order { manifest } else { Bytes::new() },
        inline,
    };
    Ok(Some((content, read.total)))
}

/// The manifest of an upload whose content goes through a swarm.
#[must_use]
pub fn swarm_of(node: &Node, content: &Content) -> Option<(ManifestId, Bytes)> {
    let id = swarm::manifest_id(&content.manifest_id).filter(|_| content.inline.is_none())?;
    let manifest = if content.manifest.is_empty() {
        node.manifests.get(&id)?
    } else {
        content.manifest.clone()
    };
    Some((id, manifest))
}

/// The end of parts of a task is asked for. The caller has noted it in the store.
pub fn stop(node: &Node, cell: &Cell, stopped: &Stopped) {
    cell.run
        .lock()
        .stop(|endpoint| stopped.has(endpoint), node.clock.unix_ms());
    cell.wake.notify_one();
}
