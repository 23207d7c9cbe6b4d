//! Renews this node's lease and watches those of the others.
//!
//! Everything is by the store's own expiry, so that no two clocks are compared. A node is only taken for dead after it was missing in
//! several looks that the store has answered while this node's own lease was in order: a store that was away for longer than a lease
//! makes everybody's lapse at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use gse_core::store::{Batch, StoreError, as_array, as_bytes, as_string, command};
use gse_proto::keys;
use gse_proto::peer::task_peer_client::TaskPeerClient;
use gse_proto::state::NodeInfo;
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Peer, link, takeover};
use crate::Node;
use crate::clock::unix_ms;

/// Between a call of an unknown node and looking for it, so that strange calls do not keep the store busy.
const POKED: Duration = Duration::from_millis(50);

/// What this node says of itself.
fn info(node: &Node) -> NodeInfo {
    NodeInfo {
        node_id: node.config.node_id.clone(),
        life: node.life_id,
        calls: node.address("internal"),
        rpc: node.address("rpc"),
        agents: node.own_addresses(),
        sessions: u32::try_from(node.registry.len()).unwrap_or(u32::MAX),
        max_sessions: u32::try_from(node.config.session.max_sessions).unwrap_or(u32::MAX),
        draining: node.life.is_draining(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..NodeInfo::default()
    }
}

async fn renew(node: &Node) -> Result<(), StoreError> {
    let id = &node.config.node_id;
    let lease_ms = node.config.peers.lease_ms;
    let mut batch = Batch::new();
    let key = keys::node_lease(id);
    let mut cmd = command("SET", &key);
    cmd.arg(node.life_id).arg("PX").arg(lease_ms);
    batch.push(&key, cmd);
    let key = keys::node_info(id);
    let mut cmd = command("SET", &key);
    cmd.arg(info(node).encode_to_vec()).arg("PX").arg(lease_ms);
    batch.push(&key, cmd);
    let mut cmd = command("ZADD", keys::nodes());
    cmd.arg(unix_ms()).arg(id);
    batch.push(keys::nodes(), cmd);
    node.task_store.raw().run(batch).await.map(|_| ())
}

/// Gives the lease up: nobody has to wait for it to lapse. A node with unfinished tasks stays on the list, so that they are found.
async fn leave(node: &Node) -> Result<(), StoreError> {
    let id = &node.config.node_id;
    let unfinished = node.task_store.unfinished(id).await?;
    let mut batch = Batch::new();
    for key in [keys::node_lease(id), keys::node_info(id)] {
        batch.push(&key, command("DEL", &key));
    }
    if unfinished.is_empty() {
        let mut cmd = command("ZREM", keys::nodes());
        cmd.arg(id);
        batch.push(keys::nodes(), cmd);
    }
    node.task_store.raw().run(batch).await.map(|_| ())
}

/// Keeps the lease until the node's sessions have ended, and the table of peers up to date.
pub async fn keep(node: Arc<Node>) {
    let lease = Duration::from_millis(node.config.peers.lease_ms);
    let mut renewed: Option<Instant> = None;
    let mut watch = Watch::default();
    let mut drained = false;
    loop {
        let wait = match renew(&node).await {
            Ok(()) => {
                let gap = renewed.map_or(Duration::ZERO, |at| at.elapsed());
                renewed = Some(Instant::now());
                if gap > lease {
                    tracing::warn!(gap_ms = gap.as_millis() as u64, "this node's lease had lapsed");
                    watch.missing.clear();
                    takeover::after_gap(&node).await;
                }
                lease / 4
            }
            Err(error) => {
                tracing::debug!(%error, "the node's lease can't be renewed");
                lease / 32
            }
        };
        let in_order = renewed.is_some_and(|at| at.elapsed() < lease / 2);
        if in_order {
            match watch.look(&node).await {
                Ok(()) => {
                    node.peers.looked.send_replace(true);
                }
                Err(error) => tracing::debug!(%error, "the other nodes can't be read"),
            }
        }
        tokio::select! {
            () = node.sessions_gone() => break,
            // What others may know of the drain they should know at once.
            () = node.life.draining(), if !drained => drained = true,
            () = node.peers.poked.notified() => tokio::time::sleep(POKED).await,
            () = tokio::time::sleep(wait) => {}
        }
    }
    if let Err(error) = leave(&node).await {
        tracing::warn!(%error, "this node's lease could not be given up; it lapses by itself");
    }
    watch.clear(&node);
}

#[derive(Debug, Default)]
struct Watch {
    /// Nodes without a lease: since when, and in how many looks.
    missing: BTreeMap<String, (Instant, u32)>,
    links: BTreeMap<String, (u64, CancellationToken)>,
    /// Nodes that take no calls; said once of each.
    unreachable: BTreeSet<String>,
}

impl Watch {
    /// Reads who is there.
    async fn look(&mut self, node: &Arc<Node>) -> Result<(), StoreError> {
        if node.peers.dialler.is_none() {
            return Ok(());
        }
        let store = node.task_store.raw();
        let mut cmd = command("ZRANGE", keys::nodes());
        cmd.arg(0).arg(-1);
        let mut batch = Batch::new();
        batch.push(keys::nodes(), cmd);
        let listed = store.run(batch).await?.into_iter().next();
        let mut others = Vec::new();
        for member in listed.map_or(Ok(vec![]), as_array)? {
            if let Some(id) = as_string(member)?.filter(|id| *id != node.config.node_id) {
                others.push(id);
            }
        }
        let mut batch = Batch::new();
        for id in &others {
            for key in [keys::node_lease(id), keys::node_info(id)] {
                batch.push(&key, command("GET", &key));
            }
        }
        let mut replies = if others.is_empty() {
            vec![]
        } else {
            store.run(batch).await?
        }
        .into_iter();
        let mut alive = Vec::new();
        let mut dead = Vec::new();
        for id in others {
            let lease = replies.next().map_or(Ok(None), as_bytes)?;
            let info = replies.next().map_or(Ok(None), as_bytes)?;
            if lease.is_none() {
                dead.push(id);
            } else if let Some(info) = info.and_then(|bytes| NodeInfo::decode(bytes).ok()) {
                alive.push(info);
            }
        }
        self.update(node, alive);
        self.bury(node, dead).await;
        Ok(())
    }

    /// Makes the table what was read.
    fn update(&mut self, node: &Arc<Node>, alive: Vec<NodeInfo>) {
        let before = node.peers.table.load_full();
        let mut table = BTreeMap::new();
        let mut changed = false;
        for info in alive {
            self.missing.remove(&info.node_id);
            match before.get(&info.node_id) {
                Some(peer) if peer.life == info.life && peer.info().rpc == info.rpc => {
                    peer.info.store(Arc::new(info));
                    table.insert(peer.node_id.clone(), Arc::clone(peer));
                }
                _ => {
                    if let Some(peer) = self.connect(node, info) {
                        changed = true;
                        table.insert(peer.node_id.clone(), peer);
                    }
                }
            }
        }
        for (id, (life, gone)) in &self.links {
            let there = table.get(id).is_some_and(|peer: &Arc<Peer>| peer.life == *life);
            if !there && !gone.is_cancelled() {
                changed = true;
                tracing::info!(peer = id, "a node is gone");
                gone.cancel();
            }
        }
        self.links.retain(|_, (_, gone)| !gone.is_cancelled());
        node.metrics.peers.set(i64::try_from(table.len()).unwrap_or(i64::MAX));
        node.peers.table.store(Arc::new(table));
        if changed {
            node.tasks.check_soon();
        }
    }

    /// Begins the links to a node that was found.
    fn connect(&mut self, node: &Arc<Node>, info: NodeInfo) -> Option<Arc<Peer>> {
        let dialler = node.peers.dialler.as_ref()?;
        if info.rpc.is_empty() {
            // It is just starting, or it never will be reached.
            if !info.agents.is_empty() && self.unreachable.insert(info.node_id.clone()) {
                tracing::warn!(
                    peer = info.node_id,
                    "a node shares the store but takes no calls of other nodes (rpc.listen); its agents can't be reached from here"
                );
            }
            return None;
        }
        let channel = match dialler.channel(&info.rpc) {
            Ok(channel) => channel,
            Err(error) => {
                tracing::warn!(peer = info.node_id, error = %format!("{error:#}"), "a node can't be called");
                return None;
            }
        };
        let most = dialler.max_message_bytes();
        let client = TaskPeerClient::new(channel)
            .max_decoding_message_size(most)
            .max_encoding_message_size(most);
        let gone = CancellationToken::new();
        if let Some((_, old)) = self.links.insert(info.node_id.clone(), (info.life, gone.clone())) {
            old.cancel();
        }
        let (opened, opened_queue) = mpsc::channel(link::OPENED_QUEUE);
        let (stored, stored_queue) = mpsc::channel(link::STORED_QUEUE);
        node.life.spawn(
            "peer: opened sessions",
            link::tell_opened(Arc::clone(node), client.clone(), opened_queue, gone.clone()),
        );
        let (id, rows) = (info.node_id.clone(), client.clone());
        node.life.spawn(
            "peer: stored rows",
            link::tell_stored(Arc::clone(node), id, rows, stored_queue, gone),
        );
        tracing::info!(
            peer = info.node_id,
            address = info.rpc,
            life = info.life,
            "a node was found"
        );
        Some(Arc::new(Peer {
            node_id: info.node_id.clone(),
            life: info.life,
            info: ArcSwap::from_pointee(info),
            client,
            opened,
            stored,
        }))
    }

    /// Sees to nodes without a lease.
    async fn bury(&mut self, node: &Arc<Node>, dead: Vec<String>) {
        self.missing.retain(|id, _| dead.contains(id));
        let patience = Duration::from_millis(node.config.peers.lease_ms / 4);
        for id in dead {
            let (since, looks) = self.missing.entry(id.clone()).or_insert((Instant::now(), 0));
            *looks += 1;
            if *looks < 2 || since.elapsed() < patience || node.life.is_draining() || !node.tasks.recovered() {
                continue;
            }
            match takeover::take_all(node, &id).await {
                Ok(0) => {}
                Ok(count) => tracing::warn!(dead = id, tasks = count, "tasks of a dead node were taken over"),
                Err(error) => tracing::warn!(dead = id, %error, "tasks of a dead node can't be taken over yet"),
            }
        }
    }

    fn clear(&mut self, node: &Node) {
        for (_, gone) in self.links.values() {
            gone.cancel();
        }
        node.peers.table.store(Arc::default());
    }
}
