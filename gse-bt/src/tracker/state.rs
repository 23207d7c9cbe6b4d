//! Swarms and their peers.

use std::net::{IpAddr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use gse_core::random::{HashMap, Random};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};

use super::peers::{Ask, Family};
use super::{Announce, Event, Peers, Refusal, Scrape};

/// Parts of the state with a lock each; a power of two.
const SHARDS: usize = 64;
/// Peers that are looked at in one go while those that are gone are searched; others wait for so long.
const EXPIRE_AT_ONCE: usize = 2048;

/// Bounds and times of a tracker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrackerConfig {
    /// Seconds between announces of a peer, as it is told.
    pub interval_s: u32,
    /// Seconds after which a peer that was not heard is gone.
    pub peer_ttl_s: u32,
    /// Peers in an answer to who does not say how many it wants.
    pub peers_default: u32,
    /// Peers in an answer at most.
    pub peers_max: u32,
    /// Peers of one swarm; more are told of others and not told to others.
    pub max_peers_per_swarm: usize,
    /// Peers of all swarms.
    pub max_peers: usize,
    /// Swarms; more can't be allowed.
    pub max_swarms: usize,
}

impl Default for TrackerConfig {
    fn default() -> Self {
        Self {
            interval_s: 60,
            peer_ttl_s: 150,
            peers_default: 40,
            peers_max: 200,
            max_peers_per_swarm: 100_000,
            max_peers: 2_000_000,
            max_swarms: 100_000,
        }
    }
}

impl TrackerConfig {
    /// What is wrong with the settings, in words.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.interval_s == 0 {
            problems.push("interval_s has to be positive".to_owned());
        }
        if self.peer_ttl_s <= self.interval_s {
            problems.push(
                "peer_ttl_s has to be longer than interval_s, or peers are forgotten before they come again".to_owned(),
            );
        }
        // 200 peers over IPv6 are 3.6 KB in a datagram that may be cut into pieces on its way; many more would be lost too often.
        if self.peers_default > self.peers_max || self.peers_max > 500 {
            problems.push("peers_default can be peers_max at most, and that 500".to_owned());
        }
        problems
    }
}

/// Says of a swarm, by its info-hash, whether it may be announced.
pub type Check = Arc<dyn Fn(&[u8; 20]) -> bool + Send + Sync>;

/// Which swarms there are.
#[derive(Clone)]
pub enum Access {
    /// Those of [`Tracker::allow`].
    Listed,
    /// Those that this says yes to; also those of [`Tracker::allow`].
    Check(Check),
}

/// The tracker's figures. Cheap to clone; every clone is the same.
#[derive(Debug, Clone, Default)]
pub struct TrackerMetrics {
    pub(super) announces: Counter,
    pub(super) scrapes: Counter,
    pub(super) refused: Counter,
    pub(super) malformed: Counter,
    pub(super) strangers: Counter,
    pub(super) unsent: Counter,
    peers: Gauge,
    swarms: Gauge,
}

impl TrackerMetrics {
    /// Makes the figures known to `registry`, which should give them a prefix of the service.
    pub fn register(&self, registry: &mut Registry) {
        let counters = [
            ("tracker_announces", "Announces that were answered", &self.announces),
            ("tracker_scrapes", "Scrapes that were answered", &self.scrapes),
            (
                "tracker_refused",
                "Announces for swarms that are not allowed, or that make no sense",
                &self.refused,
            ),
            ("tracker_malformed", "Requests that could not be read", &self.malformed),
            (
                "tracker_strangers",
                "Datagrams without a valid connection id",
                &self.strangers,
            ),
            (
                "tracker_unsent",
                "Answers that the socket had no room for",
                &self.unsent,
            ),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
        registry.register("tracker_peers", "Peers that are known", self.peers.clone());
        registry.register("tracker_swarms", "Swarms that are known", self.swarms.clone());
    }
}

#[derive(Default)]
struct Swarm {
    v4: Family<([u8; 4], u16)>,
    v6: Family<([u8; 16], u16)>,
    completed: u32,
    /// Allowed by name; others go with their last peer.
    listed: bool,
}

impl Swarm {
    fn figures(&self) -> Scrape {
        Scrape {
            seeds: self.v4.seeds() + self.v6.seeds(),
            completed: self.completed,
            leechers: self.v4.leechers() + self.v6.leechers(),
        }
    }

    fn peers(&self) -> usize {
        let figures = self.figures();
        figures.seeds as usize + figures.leechers as usize
    }
}

/// Swarms and their peers. All times are seconds of one clock that begins at 0 and does not go back.
pub struct Tracker {
    config: TrackerConfig,
    access: Access,
    metrics: TrackerMetrics,
    random: Random,
    shards: Vec<Mutex<HashMap<[u8; 20], Swarm>>>,
    peers: AtomicUsize,
    swarms: AtomicUsize,
}

impl Tracker {
    /// Without swarms.
    #[must_use]
    pub fn new(config: TrackerConfig, access: Access, metrics: TrackerMetrics, random: Random) -> Self {
        Self {
            config,
            access,
            metrics,
            random,
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            peers: AtomicUsize::new(0),
            swarms: AtomicUsize::new(0),
        }
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &TrackerConfig {
        &self.config
    }

    /// The figures.
    #[must_use]
    pub fn metrics(&self) -> &TrackerMetrics {
        &self.metrics
    }

    /// Lets a swarm be announced; false if there are too many already.
    pub fn allow(&self, swarm: [u8; 20]) -> bool {
        let mut shard = self.shard(&swarm).lock();
        if let Some(known) = shard.get_mut(&swarm) {
            known.listed = true;
            return true;
        }
        self.add(&mut shard, swarm, true).is_some()
    }

    /// Forgets a swarm and its peers. Where it was allowed by [`Access::Check`], that goes on counting.
    pub fn withdraw(&self, swarm: &[u8; 20]) {
        let removed = self.shard(swarm).lock().remove(swarm);
        if let Some(removed) = removed {
            self.forget_peers(removed.peers());
            self.forget_swarms(1);
        }
    }

    /// Peers that are known, of all swarms.
    #[must_use]
    pub fn peers(&self) -> usize {
        self.peers.load(Ordering::Relaxed)
    }

    /// Swarms that are known.
    #[must_use]
    pub fn swarms(&self) -> usize {
        self.swarms.load(Ordering::Relaxed)
    }

    /// Takes an announce that came from `from`, and puts the answer into `out`, whose lists are used again.
    pub fn announce(&self, from: IpAddr, announce: &Announce, now: u32, out: &mut Peers) -> Result<(), Refusal> {
        let answered = self.answer(from, announce, now, out);
        match answered {
            Ok(()) => self.metrics.announces.inc(),
            Err(_) => self.metrics.refused.inc(),
        };
        answered
    }

    fn answer(&self, from: IpAddr, announce: &Announce, now: u32, out: &mut Peers) -> Result<(), Refusal> {
        out.v4.clear();
        out.v6.clear();
        if announce.port == 0 && announce.event != Event::Stopped {
            return Err(Refusal::Port);
        }
        let mut shard = self.shard(&announce.swarm).lock();
        let swarm = match shard.get_mut(&announce.swarm) {
            Some(swarm) => swarm,
            None if self.may_begin(&announce.swarm) => self
                .add(&mut shard, announce.swarm, false)
                .ok_or(Refusal::UnknownSwarm)?,
            None => return Err(Refusal::UnknownSwarm),
        };
        let id = short_id(&announce.peer_id);
        let seed = announce.left == 0;
        let room = swarm.peers() < self.config.max_peers_per_swarm && self.peers() < self.config.max_peers;
        let mut wanted = announce
            .wanted
            .unwrap_or(self.config.peers_default)
            .min(self.config.peers_max) as usize;
        if announce.event == Event::Completed {
            swarm.completed = swarm.completed.saturating_add(1);
        }
        let from = from.to_canonical();
        let (mut more, mut fewer) = (0, 0);
        if announce.event == Event::Stopped {
            wanted = 0;
            fewer += usize::from(match from {
                IpAddr::V4(ip) => swarm.v4.gone(&(ip.octets(), announce.port), id),
                IpAddr::V6(ip) => swarm.v6.gone(&(ip.octets(), announce.port), id),
            });
        } else {
            more += match from {
                IpAddr::V4(ip) => swarm.v4.heard((ip.octets(), announce.port), id, seed, now, room),
                IpAddr::V6(ip) => swarm.v6.heard((ip.octets(), announce.port), id, seed, now, room),
            };
        }
        self.tell(swarm, from, announce, Telling { id, seed, wanted, now }, out);
        let figures = swarm.figures();
        // Before anyone else can forget them: the number must never come to be below zero.
        self.peers.fetch_add(more, Ordering::Relaxed);
        self.metrics.peers.inc_by(more as i64);
        drop(shard);
        self.forget_peers(fewer);
        out.seeds = figures.seeds;
        out.leechers = figures.leechers;
        // Peers that came at once do not come again at once.
        out.interval = self.config.interval_s + self.random.below(u64::from(self.config.interval_s / 10) + 1) as u32;
        out.min_interval = self.config.interval_s / 2;
        Ok(())
    }

    /// Peers of the asker's own address family first: it can reach those for certain.
    fn tell(&self, swarm: &Swarm, from: IpAddr, announce: &Announce, telling: Telling, out: &mut Peers) {
        let alive_since = telling.now.saturating_sub(self.config.peer_ttl_s);
        let (v4, v6) = match from {
            IpAddr::V4(ip) => (Some((ip.octets(), announce.port)), None),
            IpAddr::V6(ip) => (None, Some((ip.octets(), announce.port))),
        };
        let Peers { v4: out4, v6: out6, .. } = out;
        let mut tell4 = |wanted| {
            let ask = Ask {
                from: v4.as_ref(),
                id: telling.id,
                seed: telling.seed,
                wanted,
                alive_since,
            };
            swarm.v4.choose(ask, &self.random, |(ip, port)| {
                out4.push(SocketAddrV4::new(ip.into(), port))
            });
            out4.len()
        };
        let mut tell6 = |wanted| {
            let ask = Ask {
                from: v6.as_ref(),
                id: telling.id,
                seed: telling.seed,
                wanted,
                alive_since,
            };
            swarm.v6.choose(ask, &self.random, |(ip, port)| {
                out6.push(SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, 0));
            });
            out6.len()
        };
        if from.is_ipv4() {
            let told = tell4(telling.wanted);
            tell6(telling.wanted - told);
        } else {
            let told = tell6(telling.wanted);
            tell4(telling.wanted - told);
        }
    }

    /// Figures of a swarm; `None` if it is not known.
    #[must_use]
    pub fn scrape(&self, swarm: &[u8; 20]) -> Option<Scrape> {
        self.shard(swarm).lock().get(swarm).map(Swarm::figures)
    }

    /// Forgets peers that were not heard for too long, and swarms that nothing holds any more. Never has a lock for long.
    pub fn expire(&self, now: u32) {
        let alive_since = now.saturating_sub(self.config.peer_ttl_s);
        for shard in &self.shards {
            let names: Vec<[u8; 20]> = shard.lock().keys().copied().collect();
            for name in names {
                self.expire_swarm(shard, &name, alive_since);
            }
        }
    }

    fn expire_swarm(&self, shard: &Mutex<HashMap<[u8; 20], Swarm>>, name: &[u8; 20], alive_since: u32) {
        loop {
            let mut shard = shard.lock();
            let Some(swarm) = shard.get_mut(name) else {
                return;
            };
            let mut looks = EXPIRE_AT_ONCE;
            let (mut gone, mut all) = swarm.v4.expire(alive_since, &mut looks);
            if all {
                let (more, done) = swarm.v6.expire(alive_since, &mut looks);
                gone += more;
                all = done;
            }
            let over = all && !swarm.listed && swarm.peers() == 0;
            if over {
                shard.remove(name);
            }
            drop(shard);
            self.forget_peers(gone);
            if over {
                self.forget_swarms(1);
            }
            if all {
                return;
            }
        }
    }

    fn may_begin(&self, swarm: &[u8; 20]) -> bool {
        match &self.access {
            Access::Listed => false,
            Access::Check(check) => check(swarm),
        }
    }

    fn add<'s>(&self, shard: &'s mut HashMap<[u8; 20], Swarm>, name: [u8; 20], listed: bool) -> Option<&'s mut Swarm> {
        // Two at once may both find room for one; the bound is against many.
        if self.swarms() >= self.config.max_swarms {
            return None;
        }
        self.swarms.fetch_add(1, Ordering::Relaxed);
        self.metrics.swarms.inc();
        Some(shard.entry(name).or_insert(Swarm {
            listed,
            ..Swarm::default()
        }))
    }

    fn forget_peers(&self, count: usize) {
        self.peers.fetch_sub(count, Ordering::Relaxed);
        self.metrics.peers.dec_by(count as i64);
    }

    fn forget_swarms(&self, count: usize) {
        self.swarms.fetch_sub(count, Ordering::Relaxed);
        self.metrics.swarms.dec_by(count as i64);
    }

    fn shard(&self, swarm: &[u8; 20]) -> &Mutex<HashMap<[u8; 20], Swarm>> {
        &self.shards[usize::from(swarm[0]) % SHARDS]
    }
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tracker({} peers in {} swarms)", self.peers(), self.swarms())
    }
}

struct Telling {
    id: u64,
    seed: bool,
    wanted: usize,
    now: u32,
}

/// The end of a peer's id; clients begin it with their name and version.
fn short_id(id: &[u8; 20]) -> u64 {
    let mut short = [0; 8];
    short.copy_from_slice(&id[12..]);
    u64::from_be_bytes(short)
}
