//! The other nodes of the site: which there are, how they are reached, and what is told to them.
//!
//! Nodes find each other through the store: each renews its lease and says where it is reached; one whose lease is gone is dead, and
//! [`takeover`] sees to its tasks. Calls that come in are answered by [`serve`]; [`balance`] keeps the load even. What is decided
//! about a task is in [`crate::task`].

pub mod balance;
mod link;
pub mod serve;
pub mod takeover;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use gse_core::rpc::Dialler;
use gse_proto::peer as p;
use gse_proto::peer::task_peer_client::TaskPeerClient;
use gse_proto::session as s;
use gse_proto::state::NodeInfo;
use moka::sync::Cache;
use tokio::sync::{Notify, mpsc, watch as watch_value};
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Response, Status};

pub use self::watch::keep;
use crate::Node;
use crate::session::registry::Session;
use crate::task::store::RowPlace;

/// Tasks of other nodes whose owner is remembered.
const OWNERS: u64 = 20_000;

/// Another living node.
#[derive(Debug)]
pub struct Peer {
    /// Its id.
    pub node_id: String,
    /// Which life of it.
    pub life: u64,
    info: ArcSwap<NodeInfo>,
    client: TaskPeerClient<Channel>,
    opened: mpsc::Sender<(p::OpenedSession, Instant)>,
    stored: mpsc::Sender<link::StoredRow>,
}

impl Peer {
    /// What it last said of itself.
    #[must_use]
    pub fn info(&self) -> Arc<NodeInfo> {
        self.info.load_full()
    }

    /// Hands frames over for agents that are connected there.
    ///
    /// # Errors
    /// What the connection or the other node says; whether the frames were passed on is then not known.
    pub async fn deliver(&self, request: p::DeliverRequest) -> Result<p::DeliverReply, Status> {
        self.client.clone().deliver(request).await.map(Response::into_inner)
    }

    /// Tells that the end of targets was asked for. Whether the other node owns the task.
    ///
    /// # Errors
    /// As before.
    pub async fn stop(&self, request: p::StopRequest) -> Result<bool, Status> {
        Ok(self.client.clone().stop(request).await?.into_inner().owner)
    }

    /// Asks the other node to own tasks from now on; returns those that it owns now.
    ///
    /// # Errors
    /// As before.
    pub async fn adopt(&self, request: p::AdoptRequest) -> Result<Vec<String>, Status> {
        Ok(self.client.clone().adopt(request).await?.into_inner().taken)
    }

    /// Whether a session there is alive.
    ///
    /// # Errors
    /// As before.
    pub async fn probe(&self, request: p::ProbeRequest) -> Result<bool, Status> {
        Ok(self.client.clone().probe(request).await?.into_inner().alive)
    }
}

/// The other living nodes.
pub struct Peers {
    table: ArcSwap<BTreeMap<String, Arc<Peer>>>,
    /// Owner of tasks that this node stores results for, where it is known.
    owners: Cache<Arc<str>, Arc<str>>,
    dialler: Option<Dialler>,
    /// Somebody who is not in the table has called.
    poked: Notify,
    /// Whether the table has been read once.
    looked: watch_value::Sender<bool>,
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peers")
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
}

impl Peers {
    /// An empty table. Without a dialler it stays empty: the node is the only one.
    #[must_use]
    pub fn new(dialler: Option<Dialler>) -> Self {
        Self {
            table: ArcSwap::default(),
            owners: Cache::new(OWNERS),
            dialler,
            poked: Notify::new(),
            looked: watch_value::Sender::new(false),
        }
    }

    /// Whether there may be other nodes.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.dialler.is_some()
    }

    /// Waits until the other nodes have been looked for once, or for so long.
    pub async fn looked(&self, limit: Duration) {
        let mut looked = self.looked.subscribe();
        if self.is_on()
            && tokio::time::timeout(limit, looked.wait_for(|looked| *looked))
                .await
                .is_err()
        {
            tracing::warn!("the other nodes could not be looked for yet; starting without them");
        }
    }

    /// A node has called; one that is not known yet is looked for at once.
    pub fn called_by(&self, node_id: &str) {
        if self.get(node_id).is_none() {
            self.poked.notify_one();
        }
    }

    /// What this node says of itself has changed: it is said now, not only when the lease is renewed next.
    pub fn say_again(&self) {
        self.poked.notify_one();
    }

    /// A living node.
    #[must_use]
    pub fn get(&self, node_id: &str) -> Option<Arc<Peer>> {
        self.table.load().get(node_id).cloned()
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Peer>> {
        self.table.load().values().cloned().collect()
    }

    /// Whether this node is alone.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.load().is_empty()
    }

    /// Those that take new work, the least loaded first.
    #[must_use]
    pub fn open(&self) -> Vec<Arc<Peer>> {
        let mut open = self.all();
        open.retain(|peer| !peer.info().draining);
        open.sort_by_key(|peer| peer.info().sessions);
        open
    }

    /// Addresses under which all of them take agents, except those that are stopping.
    #[must_use]
    pub fn agent_addresses(&self) -> Vec<String> {
        let open = self.all().into_iter().map(|peer| peer.info());
        open.filter(|info| !info.draining)
            .flat_map(|info| info.agents.clone())
            .collect()
    }

    /// Notes who owns a task.
    pub fn set_owner(&self, task: &str, node_id: &str) {
        let known = self.owners.get(task);
        if known.is_none_or(|known| *known != *node_id) {
            self.owners.insert(task.into(), node_id.into());
        }
    }

    /// Tells everybody that an agent is connected here.
    pub fn opened(&self, node: &Node, session: &Session, held: &[s::TargetRef]) {
        let table = self.table.load();
        if table.is_empty() {
            return;
        }
        let told = p::OpenedSession {
            agent_id: session.agent.as_str().to_owned(),
            session_id: session.id,
            journal_epoch: session.epoch.clone(),
            epoch_since_ms: node.presence.epoch_since(session).unwrap_or(0),
            held: held
                .iter()
                .map(|target| p::Held {
                    task_id: target.task_id.clone(),
                    place: Some(p::Place {
                        bucket: target.bucket,
                        index: target.index,
                    }),
                })
                .collect(),
            age_ms: 0,
        };
        for peer in table.values() {
            if peer.opened.try_send((told.clone(), Instant::now())).is_err() {
                // The owner of a task finds the agent in the store, a little later.
                node.metrics.peer_notices_dropped.inc();
            }
        }
    }

    /// Tells the owner of a task that a terminal row of it is stored; `submitted_to` is the node that took the submit.
    pub fn stored(&self, node: &Node, task: &Arc<str>, submitted_to: &str, place: RowPlace) {
        let table = self.table.load();
        let owner = self.owners.get(task);
        let owner = owner.as_deref().unwrap_or(submitted_to);
        let row = link::StoredRow {
            task: Arc::clone(task),
            place,
            again: false,
        };
        match table.get(owner) {
            Some(peer) => {
                if peer.stored.try_send(row).is_err() {
                    // The owner finds the row in the store, a little later.
                    node.metrics.peer_notices_dropped.inc();
                }
            }
            // Somebody has taken it over, or will.
            None => self.stored_anywhere(node, &row, None),
        }
    }

    /// Tells everybody, except one.
    fn stored_anywhere(&self, node: &Node, row: &link::StoredRow, except: Option<&str>) {
        for peer in self
            .table
            .load()
            .values()
            .filter(|peer| Some(peer.node_id.as_str()) != except)
        {
            if peer
                .stored
                .try_send(link::StoredRow {
                    again: true,
                    ..row.clone()
                })
                .is_err()
            {
                node.metrics.peer_notices_dropped.inc();
            }
        }
    }

    /// The node that had a task does not own it.
    fn not_owner(&self, task: &str) {
        self.owners.invalidate(task);
    }
}
