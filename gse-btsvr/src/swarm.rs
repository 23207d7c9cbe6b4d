//! Who takes part in which swarm, and whom each of them is told of.
//!
//! Members are told of some others, at random and not of too many: a sparse random graph, in which nobody is far from anybody and no
//! one has everybody as a peer, a source least of all. Members of a zone are told of members of their zone alone, its relays first; only
//! relays are told of some across the border ([`crate::relay`]). A zone without relays counts as part of the one that content is in.
//!
//! A swarm has a secret, drawn for it alone and shared through the store with instances that move the same content at the same time
//! ([`crate::secret`]). Each member has a key that follows from it, and for each peer that it is told of a ticket made with that peer's
//! key: nobody can speak for another member, and what was told for one transfer is of no use in the next.

mod relays;

use std::collections::BTreeSet;

use bytes::Bytes;
use gse_core::random::{HashMap, HashSet, Random};
use gse_proto::file::{PeerAddress, SwarmPeers};
use parking_lot::Mutex;
use ring::hmac;
use tokio::sync::{Notify, watch};

use relays::Asked;
pub use relays::Part;

use crate::zone::{Reach, Zone, Zones};

/// SHA-256 over an encoded manifest.
pub type ManifestId = [u8; 32];

/// A member with fewer peers than this is told of more.
const FEW: usize = 8;

/// What keys are made for; a key for something else can't be one of these.
const PURPOSE: &[u8] = b"gse swarm member";

/// What the keys of a swarm's members are made from.
pub type Secret = [u8; 32];

/// Reads an id.
#[must_use]
pub fn manifest_id(bytes: &[u8]) -> Option<ManifestId> {
    bytes.try_into().ok()
}

/// The key of a member.
#[must_use]
pub fn member_key(secret: &Secret, name: &str) -> [u8; 32] {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, secret));
    context.update(PURPOSE);
    context.update(name.as_bytes());
    let mut key = [0; 32];
    key.copy_from_slice(context.sign().as_ref());
    key
}

#[derive(Debug, Default)]
struct Member {
    /// It has everything.
    seed: bool,
    /// It had everything from the start: content is where it is.
    origin: bool,
    /// It is an instance of gse_btsvr.
    server: bool,
    /// It relays for its zone.
    relay: bool,
    /// Where it is, once it has been seen.
    zone: Option<Zone>,
    /// Whom it was told of, or who was told of it.
    peers: HashSet<String>,
}

#[derive(Debug)]
struct Swarm {
    manifest: Bytes,
    /// Once the store has said so.
    secret: watch::Sender<Option<Secret>>,
    members: HashMap<String, Member>,
    /// Relays that were asked to take part.
    asked: HashMap<String, Asked>,
    /// Something has changed by which other relays may be needed.
    unsettled: bool,
    /// Uploads that need it.
    uses: HashSet<(String, u32)>,
}

impl Swarm {
    /// Zones that the content is in without any relay.
    fn homes(&self) -> BTreeSet<Zone> {
        let origins = self.members.values().filter(|member| member.origin);
        origins.filter_map(|member| member.zone.clone()).collect()
    }

    /// The zone that a member counts as part of.
    fn group(member: &Member, homes: &BTreeSet<Zone>, zones: &Zones) -> Zone {
        let zone = member.zone.clone().unwrap_or_default();
        if member.relay || homes.contains(&zone) || zones.has_relays(&zone) {
            return zone;
        }
        homes.first().cloned().unwrap_or_default()
    }

    fn remove(&mut self, name: &str) {
        self.members.remove(name);
        for member in self.members.values_mut() {
            member.peers.remove(name);
        }
    }

    /// Whom a relay that works for another zone takes content from: relays where it is, else who has it there.
    fn upstream<'a>(&'a self, homes: &'a BTreeSet<Zone>) -> Vec<(&'a String, &'a Member)> {
        let at_home = |member: &Member| member.zone.as_ref().is_some_and(|zone| homes.contains(zone));
        let find = |is: &dyn Fn(&Member) -> bool| -> Vec<(&'a String, &'a Member)> {
            let all = self.members.iter();
            all.filter(|(_, member)| at_home(member) && is(member)).collect()
        };
        let relays = find(&|member| member.relay);
        if !relays.is_empty() {
            return relays;
        }
        if self
            .asked
            .values()
            .any(|asked| !asked.failed && homes.contains(&asked.zone))
        {
            // They are on their way.
            return vec![];
        }
        let servers = find(&|member| member.server && member.seed);
        if servers.is_empty() {
            find(&|member| member.seed)
        } else {
            servers
        }
    }
}

/// All swarms under way.
#[derive(Debug)]
pub struct Swarms {
    most_peers: usize,
    random: Random,
    table: Mutex<HashMap<ManifestId, Swarm>>,
    /// There may be swarms without a secret.
    opened: Notify,
}

impl Swarms {
    /// None yet.
    #[must_use]
    pub fn new(most_peers: usize, random: Random) -> Self {
        Self {
            most_peers,
            random,
            table: Mutex::default(),
            opened: Notify::new(),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.lock().len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them.
    #[must_use]
    pub fn ids(&self) -> Vec<ManifestId> {
        self.table.lock().keys().copied().collect()
    }

    /// An upload moves this content through a swarm; others may do so, too.
    pub fn open(&self, id: ManifestId, manifest: &Bytes, task: &str, upload: u32) {
        let mut table = self.table.lock();
        let swarm = table.entry(id).or_insert_with(|| {
            self.opened.notify_one();
            Swarm {
                manifest: manifest.clone(),
                secret: watch::Sender::new(None),
                members: HashMap::default(),
                asked: HashMap::default(),
                unsettled: true,
                uses: HashSet::default(),
            }
        });
        swarm.uses.insert((task.to_owned(), upload));
    }

    /// Waits until a swarm was opened.
    pub async fn opened(&self) {
        self.opened.notified().await;
    }

    /// Swarms that have no secret yet.
    #[must_use]
    pub fn without_secret(&self) -> Vec<ManifestId> {
        let table = self.table.lock();
        let open = table.iter().filter(|(_, swarm)| swarm.secret.borrow().is_none());
        open.map(|(id, _)| *id).collect()
    }

    /// This is what the keys of its members are made from; who is in it is returned, because they can be told now.
    pub fn set_secret(&self, id: &ManifestId, secret: Secret) -> Vec<String> {
        let mut table = self.table.lock();
        let Some(swarm) = table.get_mut(id) else { return vec![] };
        swarm.secret.send_replace(Some(secret));
        swarm.unsettled = true;
        swarm.members.keys().cloned().collect()
    }

    /// The key of a member, once there is one; `None` when there is no such swarm any more.
    pub async fn key(&self, id: &ManifestId, name: &str) -> Option<[u8; 32]> {
        let mut known = self.table.lock().get(id)?.secret.subscribe();
        let secret = (*known.wait_for(Option::is_some).await.ok()?)?;
        Some(member_key(&secret, name))
    }

    /// The key of a member, if there is one already.
    #[must_use]
    pub fn key_now(&self, id: &ManifestId, name: &str) -> Option<[u8; 32]> {
        let table = self.table.lock();
        let secret = (*table.get(id)?.secret.borrow())?;
        Some(member_key(&secret, name))
    }

    /// The manifest, for a member of the swarm, or a relay that was asked to be one.
    #[must_use]
    pub fn manifest(&self, id: &ManifestId, name: &str) -> Option<Bytes> {
        let table = self.table.lock();
        let swarm = table.get(id)?;
        let may = swarm.members.contains_key(name) || swarm.asked.contains_key(name);
        may.then(|| swarm.manifest.clone())
    }

    /// An agent takes part; `seed`: it is a source.
    pub fn join(&self, id: &ManifestId, agent: &str, seed: bool) {
        if let Some(swarm) = self.table.lock().get_mut(id) {
            let member = swarm.members.entry(agent.to_owned()).or_default();
            swarm.unsettled |= seed && !member.seed && member.zone.is_some();
            member.seed |= seed;
            member.origin |= seed;
        }
    }

    /// An instance of gse_btsvr is the source.
    pub fn join_origin(&self, id: &ManifestId, name: &str, zone: &Zone) {
        if let Some(swarm) = self.table.lock().get_mut(id) {
            let member = swarm.members.entry(name.to_owned()).or_default();
            (member.server, member.seed, member.origin) = (true, true, true);
            member.zone = Some(Zone::clone(zone));
            swarm.unsettled = true;
        }
    }

    /// An instance of gse_btsvr takes part; false when there is no such swarm.
    pub fn join_server(&self, id: &ManifestId, name: &str, seed: bool) -> bool {
        let mut table = self.table.lock();
        let Some(swarm) = table.get_mut(id) else { return false };
        let relay = swarm.asked.get(name).map(|asked| Zone::clone(&asked.zone));
        let member = swarm.members.entry(name.to_owned()).or_default();
        member.server = true;
        member.seed |= seed;
        if relay.is_some() {
            (member.relay, member.zone) = (true, relay);
        }
        true
    }

    /// A member takes no part any more.
    pub fn leave(&self, id: &ManifestId, name: &str) {
        if let Some(swarm) = self.table.lock().get_mut(id) {
            swarm.remove(name);
        }
    }

    /// Swarms that an agent takes part in.
    #[must_use]
    pub fn of(&self, agent: &str) -> Vec<ManifestId> {
        let table = self.table.lock();
        let members = table.iter().filter(|(_, swarm)| swarm.members.contains_key(agent));
        members.map(|(id, _)| *id).collect()
    }

    /// Whether somebody takes part.
    #[must_use]
    pub fn is_member(&self, id: &ManifestId, name: &str) -> bool {
        let table = self.table.lock();
        table.get(id).is_some_and(|swarm| swarm.members.contains_key(name))
    }

    /// Chooses peers for a member that has just come, or that has few; `reach` says where a member is, and how it is reached. What it is
    /// told always has its key; `None` when it takes no part, or there is no key yet.
    #[must_use]
    pub fn deal(
        &self,
        id: &ManifestId,
        name: &str,
        zones: &Zones,
        reach: impl Fn(&str) -> Option<Reach>,
    ) -> Option<SwarmPeers> {
        let mut table = self.table.lock();
        let swarm = table.get_mut(id)?;
        let secret = (*swarm.secret.borrow())?;
        if let Some(at) = reach(name) {
            let is_new = zones.is_divided()
                && swarm
                    .members
                    .values()
                    .all(|member| member.zone.as_ref() != Some(&at.zone));
            let member = swarm.members.get_mut(name)?;
            swarm.unsettled |= is_new || (member.origin && member.zone.as_ref() != Some(&at.zone));
            member.zone = Some(at.zone);
        }
        let own = swarm.members.get(name)?;
        let own_zone = own.zone.clone().unwrap_or_default();
        let homes = swarm.homes();
        let group = Swarm::group(own, &homes, zones);
        let address = |other: &str, member: &Member, upstream: bool| -> Option<Vec<PeerAddress>> {
            let ticket = gse_bt::ticket(&member_key(&secret, other), name);
            let peer = |address: &String| PeerAddress {
                address: address.clone(),
                agent_id: other.to_owned(),
                seed: member.seed,
                server: member.server,
                upstream,
                ticket: Bytes::copy_from_slice(&ticket),
            };
            Some(reach(other)?.from_zone(&own_zone).iter().map(peer).collect())
        };
        // Those of before, for one that has lost its link and comes again.
        let mut peers: Vec<PeerAddress> = own
            .peers
            .iter()
            .filter_map(|other| address(other, swarm.members.get(other)?, false))
            .flatten()
            .collect();
        if own.relay && !homes.contains(&own_zone) {
            let upstream = swarm.upstream(&homes);
            peers.extend(
                upstream
                    .into_iter()
                    .filter_map(|(other, member)| address(other, member, true))
                    .flatten(),
            );
        }
        let mut candidates: Vec<(&String, &Member)> = swarm
            .members
            .iter()
            .filter(|(other, member)| {
                // Two that have everything have nothing to say to each other.
                other.as_str() != name
                    && !own.peers.contains(*other)
                    && member.peers.len() < self.most_peers
                    && !(own.seed && member.seed)
                    && (!zones.is_divided() || member.zone.is_some() && Swarm::group(member, &homes, zones) == group)
            })
            .collect();
        self.random.shuffle(&mut candidates);
        candidates.sort_by_key(|(_, member)| !member.relay);
        // Fewer than a member may have: would each newcomer fill those before it, only the latest would have room, and the graph
        // would be a band.
        let room = (self.most_peers * 3 / 10).max(1).saturating_sub(own.peers.len());
        let mut chosen = Vec::new();
        for (other, member) in candidates {
            if chosen.len() >= room {
                break;
            }
            if let Some(addresses) = address(other, member, false) {
                peers.extend(addresses);
                chosen.push(other.clone());
            }
        }
        for other in chosen {
            if let Some(member) = swarm.members.get_mut(&other) {
                member.peers.insert(name.to_owned());
            }
            if let Some(own) = swarm.members.get_mut(name) {
                own.peers.insert(other);
            }
        }
        Some(SwarmPeers {
            manifest_id: Bytes::copy_from_slice(id),
            key: Bytes::copy_from_slice(&member_key(&secret, name)),
            peers,
            ..SwarmPeers::default()
        })
    }

    /// Members that should be told of more: those that have few peers that are there, and relays that carry something.
    #[must_use]
    pub fn lonely(&self, zones: &Zones, is_there: impl Fn(&str) -> bool) -> Vec<(ManifestId, String)> {
        let mut table = self.table.lock();
        let mut lonely = Vec::new();
        for (id, swarm) in table.iter_mut() {
            let homes = swarm.homes();
            let mut sizes: HashMap<Zone, usize> = HashMap::default();
            if zones.is_divided() {
                for member in swarm.members.values() {
                    *sizes.entry(Swarm::group(member, &homes, zones)).or_default() += 1;
                }
            }
            let all = swarm.members.len();
            for (name, member) in &mut swarm.members {
                if member.seed || !is_there(name) {
                    continue;
                }
                // Those that have gone make room for others.
                member.peers.retain(|peer| is_there(peer));
                let near = sizes.get(&Swarm::group(member, &homes, zones)).copied().unwrap_or(all);
                if member.relay || member.peers.len() < FEW.min(near.saturating_sub(1)) {
                    lonely.push((*id, name.clone()));
                }
            }
        }
        lonely
    }

    /// An upload needs its swarm no more. Those that nobody needs end; who was in them, or asked to be, is returned.
    pub fn close(&self, task: &str, upload: u32) -> Vec<(ManifestId, Vec<String>)> {
        let mut table = self.table.lock();
        let mut over = Vec::new();
        table.retain(|id, swarm| {
            let was_used = swarm.uses.remove(&(task.to_owned(), upload));
            if was_used && swarm.uses.is_empty() {
                let mut names: BTreeSet<String> = swarm.members.drain().map(|(name, _)| name).collect();
                names.extend(swarm.asked.drain().map(|(name, _)| name));
                over.push((*id, names.into_iter().collect()));
                return false;
            }
            true
        });
        over
    }
}

#[cfg(test)]
mod tests;
