//! How content gets from one zone into another: relays of a zone carry it across the border once, each its share, and give it to each
//! other and to the agents inside as it arrives.
//!
//! The instance that controls a transfer orders them: those of each zone in which it has targets to carry, those of the zone where the
//! content is to take part as plain members, so that they can be reached from outside. Orders are repeated, and answered with how far
//! the relay is; nothing depends on a single one. Which pieces a relay asks for across the border is [`gse_bt`]'s matter, who is told of
//! whom [`crate::swarm`]'s. [`uplink`] is the relay's connection to the instances that it works for.

pub mod uplink;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_proto::file::{ManifestWanted, RelayOrder, RelayState};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::peer::{self, OWN, Word};
use crate::swarm::{self, ManifestId};
use crate::{Node, zone};

/// Between two repetitions of all orders.
const AGAIN: Duration = Duration::from_secs(3);
/// What has changed is gathered for so long.
const GATHER: Duration = Duration::from_millis(20);
/// An order that was not repeated for so long is over: the instance that gave it is gone, or has forgotten it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Relays that work for this instance, and those that this one works for.
#[derive(Debug, Default)]
pub struct Relays {
    /// Who is where has changed.
    changed: Notify,
    uplinks: uplink::Uplinks,
}

/// Who is where, or which relays are there, may have changed.
pub fn changed(node: &Node) {
    node.relays.changed.notify_one();
}

/// Sees to it that each swarm has the relays that it needs.
pub async fn keep(node: Arc<Node>) {
    let mut repeated = Instant::now();
    loop {
        tokio::select! {
            () = node.life.draining() => return,
            () = node.relays.changed.notified() => tokio::time::sleep(GATHER).await,
            () = tokio::time::sleep_until(repeated + AGAIN) => {}
        }
        zone::look(&node).await;
        if let Some(peer) = &node.peer {
            peer.expire(PATIENCE);
        }
        let again = repeated.elapsed() >= AGAIN;
        if again {
            repeated = Instant::now();
        }
        let zones = node.zones();
        if !zones.is_divided() {
            continue;
        }
        let mut there = node.links.relays();
        if let Some(peer) = node.peer.as_ref().filter(|_| node.config.zone.relay) {
            there.push((peer.name().to_owned(), node.config.zone.name.as_str().into()));
        }
        for id in node.swarms.ids() {
            for part in node.swarms.relays(&id, &zones, &there, again) {
                let Some(key) = node.swarms.key_now(&id, &part.relay) else {
                    continue;
                };
                let order = RelayOrder {
                    manifest_id: Bytes::copy_from_slice(&id),
                    key: Bytes::copy_from_slice(&key),
                    share: part.share,
                    shares: part.shares,
                };
                if node.peer.as_ref().is_some_and(|peer| peer.name() == part.relay) {
                    ordered(&node, OWN, &order);
                } else {
                    node.links.send_to(&part.relay, order.into());
                }
            }
        }
    }
}

/// Tells a relay, or this instance itself, of its peers.
pub fn tell(node: &Node, id: &ManifestId, name: &str) {
    if node.peer.as_ref().is_some_and(|peer| peer.name() == name) {
        return peer::tell(node, id);
    }
    let zones = node.zones();
    if let Some(told) = node.swarms.deal(id, name, &zones, |name| node.reach(name, &zones)) {
        node.links.send_to(name, told.into());
    }
}

/// An instance takes part in a swarm of this one's.
pub(crate) fn joined(node: &Node, id: &ManifestId, name: &str, whole: bool) {
    let is_new = !node.swarms.is_member(id, name);
    if node.swarms.join_server(id, name, whole) && is_new {
        // Those across the border may have waited for it.
        for relay in node.swarms.asked(id) {
            tell(node, id, &relay);
        }
    }
}

/// What a relay says of itself.
pub(crate) fn heard(node: &Node, name: &str, state: &RelayState) {
    let Some(id) = swarm::manifest_id(&state.manifest_id) else {
        return;
    };
    if !node.swarms.asked(&id).iter().any(|asked| asked == name) {
        // It ended while this was on its way.
        return;
    }
    if !state.failed.is_empty() {
        tracing::warn!(
            relay = name,
            content = hex::encode(id),
            reason = state.failed,
            "a relay can't take part in a swarm"
        );
        node.swarms.relay_failed(&id, name);
        changed(node);
    } else if state.joined {
        joined(node, &id, name, state.complete);
    }
}

/// Answers an instance that this one works for; `failed`: why it can't.
pub(crate) fn say(node: &Node, owner: &str, id: &ManifestId, failed: Option<&str>) {
    let (joined, complete) = node.peer.as_ref().map_or((false, false), |peer| peer.state(id));
    let state = RelayState {
        manifest_id: Bytes::copy_from_slice(id),
        joined,
        complete,
        failed: failed.unwrap_or_default().to_owned(),
    };
    node.relays.uplinks.send(owner, state.into());
}

/// An order of the instance that controls a transfer, perhaps this one.
pub(crate) fn ordered(node: &Arc<Node>, owner: &str, order: &RelayOrder) {
    let (Some(id), Ok(key)) = (
        swarm::manifest_id(&order.manifest_id),
        <[u8; 32]>::try_from(&order.key[..]),
    ) else {
        return tracing::warn!(owner, "an order for a relay that is none");
    };
    let Some(peer) = &node.peer else {
        return say(node, owner, &id, Some("it has no cache (cache.dir)"));
    };
    let share = || Word::Share(order.share, order.shares);
    if peer.want(&id, owner, Some(share())) {
        match (owner, peer.state(&id)) {
            (OWN, (true, whole)) => joined(node, &id, peer.name(), whole),
            (OWN, _) => {}
            (owner, _) => say(node, owner, &id, None),
        }
        return;
    }
    let manifest = match owner {
        OWN => node.swarms.manifest(&id, peer.name()),
        _ => node.manifests.get(&id),
    };
    match manifest {
        Some(manifest) => peer::carry(node, id, manifest, owner, key, share()),
        None => {
            let manifest_id = order.manifest_id.clone();
            node.relays.uplinks.send(owner, ManifestWanted { manifest_id }.into());
        }
    }
}
