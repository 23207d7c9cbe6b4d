//! One swarm on one host: connections, content and scheduler brought together. One task owns the [`Plan`] and all that is decided with
//! it; each connection is a task of its own that hears of it by commands; verification and disk are off the runtime.
//!
//! A swarm ends when it is stopped, dropped with its engine, or when its content can no longer be kept; what is told of it is its
//! [`Progress`].

mod peers;
mod work;

use std::sync::Arc;

use gse_proto::file::{Manifest, PeerAddress};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::Bitmap;
use crate::engine::Shared;
use crate::limit::Limit;
use crate::peer::Established;

pub(crate) use work::{Parts, Work};

/// What a swarm is, and who we are in it.
#[derive(Clone)]
pub struct SwarmSpec {
    /// What it moves.
    pub manifest: Arc<Manifest>,
    /// Our own key as a member, from the server; or one that all members have, and nobody else.
    pub swarm_key: [u8; 32],
    /// Our id, as other members know it.
    pub own_id: String,
    /// Foreign clients may take part, without proof, over the plain listener.
    pub foreign: bool,
}

impl std::fmt::Debug for SwarmSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SwarmSpec")
            .field("own_id", &self.own_id)
            .field("foreign", &self.foreign)
            .finish_non_exhaustive()
    }
}

/// Bytes per second; 0: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Sent to peers.
    pub up: u64,
    /// Received from peers.
    pub down: u64,
}

/// Why a swarm has come to its end before its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What failed, for people.
    pub message: String,
    /// The disk or a quota is full.
    pub disk_full: bool,
    /// The source's content is no longer what the manifest says.
    pub changed: bool,
}

/// How far a swarm is.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// Bytes that are here and verified.
    pub have_bytes: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes of content sent to peers.
    pub uploaded: u64,
    /// Bytes of content received from peers, what was not needed included.
    pub downloaded: u64,
    /// Bytes per second received, lately.
    pub rate_down: u64,
    /// Bytes per second sent, lately.
    pub rate_up: u64,
    /// Which pieces are here.
    pub pieces: Arc<Bitmap>,
    /// Everything is here.
    pub complete: bool,
    /// Of a source: every piece was sent to somebody, or is with somebody.
    pub first_copy_out: bool,
    /// Peers that are connected.
    pub peers: u32,
    /// Of the bytes received, those that came across the border of the zone.
    pub crossed: u64,
    /// Pieces that peers sent wrongly.
    pub bad_pieces: u64,
    /// Why nothing more will come.
    pub failed: Option<Arc<Failure>>,
}

/// One of ours that is dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Callee {
    /// Who it has to be.
    pub(crate) id: String,
    /// What it lets us in with, if we were given that.
    pub(crate) ticket: Option<[u8; 32]>,
    /// It is across the border of our zone.
    pub(crate) upstream: bool,
}

/// What the owner of a swarm tells it.
pub(crate) enum Order {
    Add(Vec<PeerAddress>),
    Drop(Vec<String>),
    /// Number of this relay among those that work for its zone, and how many these are.
    Share(u32, u32),
    Stop(oneshot::Sender<()>),
}

/// What the engine keeps of a swarm, to hand connections to it.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) spec: SwarmSpec,
    pub(crate) peer_id: [u8; 20],
    pub(crate) connections: mpsc::Sender<Established>,
    pub(crate) orders: mpsc::Sender<Order>,
}

/// A swarm that runs. It is stopped when this is dropped.
#[derive(Debug)]
pub struct Swarm {
    pub(crate) id: [u8; 20],
    pub(crate) orders: mpsc::Sender<Order>,
    pub(crate) progress: watch::Receiver<Progress>,
    pub(crate) up: Limit,
    pub(crate) down: Limit,
    pub(crate) stop: CancellationToken,
    pub(crate) shared: Arc<Shared>,
}

impl Swarm {
    /// What its peers call it.
    #[must_use]
    pub fn id(&self) -> [u8; 20] {
        self.id
    }

    /// Tells of peers. Those that are known already are not added again. Must not be called with more than some thousands at once; what
    /// the swarm is too busy to take is false, and is to be told again.
    pub fn add_peers(&self, peers: &[PeerAddress]) -> bool {
        self.orders.try_send(Order::Add(peers.to_vec())).is_ok()
    }

    /// Peers that are members no longer, by agent id or address: their connections are closed.
    pub fn drop_peers(&self, gone: &[String]) -> bool {
        self.orders.try_send(Order::Drop(gone.to_vec())).is_ok()
    }

    /// Of `shares` relays that work for this zone, this one is number `share`: what it asks of peers across the border (those that are
    /// told of as upstream) is its part. What the swarm is too busy to take is false, and is to be told again.
    pub fn set_share(&self, share: u32, shares: u32) -> bool {
        self.orders.try_send(Order::Share(share, shares)).is_ok()
    }

    /// Changes the limits; at once, for what is waiting, too.
    pub fn set_limits(&self, limits: Limits) {
        self.up.set(limits.up);
        self.down.set(limits.down);
    }

    /// How far it is; changes a few times a second.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Closes all connections and lets go of the files. Nothing is written after this returns.
    pub async fn stop(self) {
        let (done, wait) = oneshot::channel();
        if self.orders.send(Order::Stop(done)).await.is_ok() {
            // An error means that it has ended by itself.
            let _ended = wait.await;
        }
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        self.stop.cancel();
        self.shared.forget(&self.id, &self.orders);
    }
}
