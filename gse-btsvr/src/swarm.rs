//! Who takes part in which swarm, and whom each of them is told of.
//!
//! Members are told of some others, at random and not of too many: a sparse random graph, in which nobody is far from anybody and no
//! one has everybody as a peer, a source least of all. A member dials those it was told of; they know it by the swarm's key. The key
//! follows from the manifest and a secret that all instances share, so that it outlives a restart and is the same whichever instance
//! has the task.

use bytes::Bytes;
use gse_core::random::{HashMap, HashSet, Random};
use gse_proto::file::{PeerAddress, SwarmPeers};
use parking_lot::Mutex;
use ring::hmac;

/// SHA-256 over an encoded manifest.
pub type ManifestId = [u8; 32];

/// A member with fewer peers than this is told of more.
const FEW: usize = 8;

/// What keys are made for; a key for something else can't be one of these.
const PURPOSE: &[u8] = b"gse swarm key";

/// Reads an id.
#[must_use]
pub fn manifest_id(bytes: &[u8]) -> Option<ManifestId> {
    bytes.try_into().ok()
}

#[derive(Debug, Default)]
struct Member {
    /// It has everything.
    seed: bool,
    /// It is an instance of gse_btsvr.
    server: bool,
    /// Whom it was told of, or who was told of it.
    peers: HashSet<String>,
}

#[derive(Debug)]
struct Swarm {
    manifest: Bytes,
    members: HashMap<String, Member>,
    /// Uploads that need it.
    uses: HashSet<(String, u32)>,
}

/// All swarms under way.
pub struct Swarms {
    secret: hmac::Key,
    most_peers: usize,
    random: Random,
    table: Mutex<HashMap<ManifestId, Swarm>>,
}

impl std::fmt::Debug for Swarms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Swarms").finish_non_exhaustive()
    }
}

impl Swarms {
    /// None yet.
    #[must_use]
    pub fn new(secret: &[u8], most_peers: usize, random: Random) -> Self {
        Self {
            secret: hmac::Key::new(hmac::HMAC_SHA256, secret),
            most_peers,
            random,
            table: Mutex::default(),
        }
    }

    /// What members of a swarm know each other by.
    #[must_use]
    pub fn key(&self, id: &ManifestId) -> Bytes {
        let mut context = hmac::Context::with_key(&self.secret);
        context.update(PURPOSE);
        context.update(id);
        Bytes::copy_from_slice(context.sign().as_ref())
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

    /// An upload moves this content through a swarm; others may do so, too.
    pub fn open(&self, id: ManifestId, manifest: &Bytes, task: &str, upload: u32) {
        let mut table = self.table.lock();
        let swarm = table.entry(id).or_insert_with(|| Swarm {
            manifest: manifest.clone(),
            members: HashMap::default(),
            uses: HashSet::default(),
        });
        swarm.uses.insert((task.to_owned(), upload));
    }

    /// The manifest, for a member of the swarm.
    #[must_use]
    pub fn manifest(&self, id: &ManifestId, agent: &str) -> Option<Bytes> {
        let table = self.table.lock();
        let swarm = table.get(id)?;
        swarm.members.contains_key(agent).then(|| swarm.manifest.clone())
    }

    /// An agent takes part; `seed`: it has everything.
    pub fn join(&self, id: &ManifestId, agent: &str, seed: bool) {
        if let Some(swarm) = self.table.lock().get_mut(id) {
            let member = swarm.members.entry(agent.to_owned()).or_default();
            member.seed |= seed;
        }
    }

    /// An instance of gse_btsvr takes part; false when there is no such swarm.
    pub fn join_server(&self, id: &ManifestId, name: &str, seed: bool) -> bool {
        let mut table = self.table.lock();
        let Some(swarm) = table.get_mut(id) else { return false };
        let member = swarm.members.entry(name.to_owned()).or_default();
        member.server = true;
        member.seed |= seed;
        true
    }

    /// A member takes no part any more.
    pub fn leave(&self, id: &ManifestId, name: &str) {
        if let Some(swarm) = self.table.lock().get_mut(id) {
            swarm.members.remove(name);
            for member in swarm.members.values_mut() {
                member.peers.remove(name);
            }
        }
    }

    /// Swarms that an agent takes part in.
    #[must_use]
    pub fn of(&self, agent: &str) -> Vec<ManifestId> {
        let table = self.table.lock();
        let members = table.iter().filter(|(_, swarm)| swarm.members.contains_key(agent));
        members.map(|(id, _)| *id).collect()
    }

    /// Chooses peers for a member that has just come, or that has few; `reach` says where a member is reached, if it is there. What it
    /// is told always has the key; `None` when it takes no part.
    #[must_use]
    pub fn deal(
        &self,
        id: &ManifestId,
        agent: &str,
        reach: impl Fn(&str) -> Option<Vec<String>>,
    ) -> Option<SwarmPeers> {
        let mut table = self.table.lock();
        let swarm = table.get_mut(id)?;
        let own = swarm.members.get(agent)?;
        let mut told = SwarmPeers {
            manifest_id: Bytes::copy_from_slice(id),
            key: self.key(id),
            ..SwarmPeers::default()
        };
        let address = |name: &str, member: &Member| -> Option<Vec<PeerAddress>> {
            let peer = |address| PeerAddress {
                address,
                agent_id: name.to_owned(),
                seed: member.seed,
                server: member.server,
            };
            Some(reach(name)?.into_iter().map(peer).collect())
        };
        // Those of before, for one that has lost its link and comes again.
        let mut peers: Vec<PeerAddress> = own
            .peers
            .iter()
            .filter_map(|name| address(name, swarm.members.get(name)?))
            .flatten()
            .collect();
        let mut candidates: Vec<&String> = swarm
            .members
            .iter()
            .filter(|(name, member)| {
                // Two that have everything have nothing to say to each other.
                name.as_str() != agent
                    && !own.peers.contains(*name)
                    && member.peers.len() < self.most_peers
                    && !(own.seed && member.seed)
            })
            .map(|(name, _)| name)
            .collect();
        self.random.shuffle(&mut candidates);
        // Fewer than a member may have: would each newcomer fill those before it, only the latest would have room, and the graph
        // would be a band.
        let room = (self.most_peers * 3 / 10).max(1).saturating_sub(own.peers.len());
        let mut chosen = Vec::new();
        for name in candidates {
            if chosen.len() >= room {
                break;
            }
            if let Some(addresses) = swarm.members.get(name).and_then(|member| address(name, member)) {
                peers.extend(addresses);
                chosen.push(name.clone());
            }
        }
        for name in chosen {
            if let Some(other) = swarm.members.get_mut(&name) {
                other.peers.insert(agent.to_owned());
            }
            if let Some(own) = swarm.members.get_mut(agent) {
                own.peers.insert(name);
            }
        }
        told.peers = peers;
        Some(told)
    }

    /// Members that have few peers that are there, so that they should be told of more.
    #[must_use]
    pub fn lonely(&self, is_there: impl Fn(&str) -> bool) -> Vec<(ManifestId, String)> {
        let mut table = self.table.lock();
        let mut lonely = Vec::new();
        for (id, swarm) in table.iter_mut() {
            let others = swarm.members.len().saturating_sub(1);
            for (name, member) in &mut swarm.members {
                if member.seed || !is_there(name) {
                    continue;
                }
                // Those that have gone make room for others.
                member.peers.retain(|peer| is_there(peer));
                if member.peers.len() < FEW.min(others) {
                    lonely.push((*id, name.clone()));
                }
            }
        }
        lonely
    }

    /// An upload needs its swarm no more. Those that nobody needs end; who was in them is returned.
    pub fn close(&self, task: &str, upload: u32) -> Vec<(ManifestId, Vec<String>)> {
        let mut table = self.table.lock();
        let mut over = Vec::new();
        table.retain(|id, swarm| {
            let was_used = swarm.uses.remove(&(task.to_owned(), upload));
            if was_used && swarm.uses.is_empty() {
                over.push((*id, swarm.members.drain().map(|(name, _)| name).collect()));
                return false;
            }
            true
        });
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: ManifestId = [7; 32];

    fn swarms() -> Swarms {
        let swarms = Swarms::new(&[1; 32], 40, Random::seeded(1));
        swarms.open(ID, &Bytes::from_static(b"manifest"), "T", 0);
        swarms
    }

    fn there(name: &str) -> Option<Vec<String>> {
        Some(vec![format!("{name}:60020")])
    }

    #[test]
    fn the_graph_is_sparse_and_whole() {
        let swarms = swarms();
        swarms.join(&ID, "source", true);
        assert!(swarms.deal(&ID, "source", there).unwrap().peers.is_empty());
        let names: Vec<String> = (0..1_000).map(|n| format!("a{n}")).collect();
        let mut edges: HashMap<String, HashSet<String>> = HashMap::default();
        for name in &names {
            swarms.join(&ID, name, false);
            let told = swarms.deal(&ID, name, there).unwrap();
            assert!(!told.peers.is_empty() && told.peers.len() <= 12, "{}", told.peers.len());
            assert_eq!(told.key, swarms.key(&ID));
            for peer in told.peers {
                edges.entry(name.clone()).or_default().insert(peer.agent_id.clone());
                edges.entry(peer.agent_id).or_default().insert(name.clone());
            }
        }
        assert!(edges.values().all(|peers| peers.len() <= 40));
        // Everybody is a few steps from the source.
        let mut near: HashSet<String> = std::iter::once("source".to_owned()).collect();
        for _ in 0..5 {
            near = near
                .iter()
                .flat_map(|name| &edges[name])
                .cloned()
                .chain(near.iter().cloned())
                .collect();
        }
        assert_eq!(near.len(), 1_001);
    }

    #[test]
    fn who_is_left_alone_is_told_of_others() {
        let swarms = swarms();
        swarms.join(&ID, "source", true);
        for name in ["a", "b", "c"] {
            swarms.join(&ID, name, false);
        }
        assert_eq!(
            swarms
                .deal(&ID, "a", |name| (name == "source").then(|| vec!["s:1".into()]))
                .unwrap()
                .peers
                .len(),
            1
        );
        let lonely = swarms.lonely(|name| name == "a" || name == "b");
        let mut names: Vec<&str> = lonely.iter().map(|(_, name)| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(swarms.deal(&ID, "a", there).unwrap().peers.len(), 3);
    }

    #[test]
    fn only_members_learn_anything_and_it_ends_with_its_last_use() {
        // contract: p2p#16
        let swarms = swarms();
        swarms.join(&ID, "a", false);
        assert_eq!(swarms.manifest(&ID, "a").unwrap(), "manifest");
        assert!(swarms.manifest(&ID, "b").is_none() && swarms.deal(&ID, "b", there).is_none());
        swarms.open(ID, &Bytes::new(), "U", 3);
        assert!(swarms.close("T", 0).is_empty());
        assert!(swarms.close("T", 0).is_empty());
        assert_eq!(swarms.close("U", 3), [(ID, vec!["a".to_owned()])]);
        assert!(swarms.is_empty());
        assert_ne!(swarms.key(&ID), swarms.key(&[8; 32]));
    }
}
