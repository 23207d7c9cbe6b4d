//! A simulation of many hosts that run the scheduler: what it would do with a thousand of them, in seconds on one. Links have rates and
//! latencies; everything else (sockets, disks, processors) is taken to be fast.
//!
//! An uplink serves its requests in turn, one chunk a neighbour, as TCP connections share a link; a downlink takes chunks as they come.
//! Same seed, same run. The figures are read by the tests and by the example `swarm_sim`.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

use crate::Bitmap;
use crate::plan::{Action, PeerKey, Plan, PlanConfig};

/// A host's link, in bytes per second.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    /// Out.
    pub up: f64,
    /// In.
    pub down: f64,
}

/// What is simulated.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Name, for the table.
    pub name: String,
    /// Bytes of the content.
    pub bytes: u64,
    /// Bytes of a piece.
    pub piece: u32,
    /// Link of the source.
    pub source: Link,
    /// Links of the targets.
    pub targets: Vec<Link>,
    /// Neighbours of a host, about; all hosts know each other if there are fewer.
    pub neighbours: usize,
    /// Seconds a message takes.
    pub latency: f64,
    /// Bytes an uplink sends for one neighbour before it turns to the next.
    pub chunk: u32,
    /// Targets start within so many seconds.
    pub spread: f64,
    /// The source stops when it has sent so many copies.
    pub source_leaves_after: Option<f64>,
    /// What the schedulers go by.
    pub plan: PlanConfig,
    /// Repeats the run.
    pub seed: u64,
}

/// What came out.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Wire bound: no schedule is faster than this, in seconds.
    pub bound: f64,
    /// When each target had everything; infinite for those that never had.
    pub done: Vec<f64>,
    /// Copies of the content that the source has sent.
    pub source_copies: f64,
    /// Part of what was sent that nobody needed.
    pub waste: f64,
}

impl Outcome {
    /// Time by which this part of the targets is done, in units of the bound.
    #[must_use]
    pub fn quantile(&self, part: f64) -> f64 {
        let mut done = self.done.clone();
        done.sort_by(f64::total_cmp);
        let at = (part * done.len() as f64).ceil() as usize;
        done.get(at.saturating_sub(1)).copied().unwrap_or(f64::INFINITY) / self.bound
    }

    /// When the last one is done, in units of the bound.
    #[must_use]
    pub fn last(&self) -> f64 {
        self.quantile(1.0)
    }
}

/// No schedule is faster: the source's link for one copy, the slowest downlink, and all uplinks for all copies.
#[must_use]
pub fn bound(scenario: &Scenario) -> f64 {
    let bytes = scenario.bytes as f64;
    let up: f64 = scenario.targets.iter().map(|link| link.up).sum();
    let slowest = scenario
        .targets
        .iter()
        .map(|link| link.down)
        .fold(f64::INFINITY, f64::min);
    let all = bytes * scenario.targets.len() as f64 / (scenario.source.up + up);
    (bytes / scenario.source.up).max(bytes / slowest).max(all)
}

#[derive(Debug, Clone, Copy)]
enum What {
    Start {
        host: u32,
    },
    Tick {
        host: u32,
    },
    /// A host's announcement reaches its neighbours.
    Have {
        host: u32,
        piece: u32,
    },
    /// A piece is shown to one neighbour.
    Shown {
        host: u32,
        edge: u32,
        piece: u32,
    },
    /// A request reaches the host that is asked.
    Asked {
        host: u32,
        edge: u32,
        piece: u32,
    },
    Cancelled {
        host: u32,
        edge: u32,
        piece: u32,
    },
    /// The first bytes of a piece reach the one who asked.
    Started {
        host: u32,
        edge: u32,
        piece: u32,
    },
    /// The uplink has sent its chunk.
    Sent {
        host: u32,
    },
    /// A whole piece has come in.
    Arrived {
        host: u32,
        edge: u32,
        piece: u32,
    },
}

#[derive(Debug, Clone, Copy)]
struct Event {
    at: f64,
    order: u64,
    what: What,
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Event {}
impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Event {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives the greatest: that is to be the earliest.
        other.at.total_cmp(&self.at).then(other.order.cmp(&self.order))
    }
}

/// One end of a connection.
struct Edge {
    other: u32,
    /// Index of the other end among the other's edges.
    back: u32,
    key: Option<PeerKey>,
    /// Asked for by the other: piece, bytes left.
    queue: VecDeque<(u32, u32)>,
}

struct Host {
    link: Link,
    plan: Plan,
    edges: Vec<Edge>,
    /// Edges that have something to send, in turn.
    turn: VecDeque<u32>,
    sending: Option<(u32, u32, u32, bool)>,
    down_free: f64,
    started: bool,
    gone: bool,
    /// By slot of the plan's keys: the edge. Keys are given in the order of edges here.
    of_key: std::collections::HashMap<PeerKey, u32, ahash::RandomState>,
    done: f64,
}

struct World<'a> {
    scenario: &'a Scenario,
    hosts: Vec<Host>,
    events: BinaryHeap<Event>,
    order: u64,
    sent: u64,
    used: u64,
    source_sent: u64,
    left: usize,
    scratch: Vec<Action>,
}

/// Runs a scenario to its end, or for `limit` simulated seconds.
#[must_use]
pub fn run(scenario: &Scenario, limit: f64) -> Outcome {
    let mut world = World::new(scenario);
    while let Some(event) = world.events.pop() {
        if event.at > limit || world.left == 0 {
            break;
        }
        world.step(event.at, event.what);
    }
    Outcome {
        bound: bound(scenario),
        done: world.hosts.iter().skip(1).map(|host| host.done).collect(),
        source_copies: world.source_sent as f64 / scenario.bytes as f64,
        waste: 1.0 - world.used as f64 / (world.sent.max(1)) as f64,
    }
}

fn index(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario) -> Self {
        let pieces = u32::try_from(scenario.bytes.div_ceil(u64::from(scenario.piece))).unwrap_or(u32::MAX);
        let mut draw = scenario.seed;
        let mut random = move |end: usize| {
            draw = draw
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((draw >> 33) as usize) % end.max(1)
        };
        let links = std::iter::once(&scenario.source).chain(&scenario.targets);
        let mut hosts: Vec<Host> = links
            .zip(0u64..)
            .map(|(link, at)| {
                let have = if at == 0 {
                    Bitmap::full(pieces)
                } else {
                    Bitmap::new(pieces)
                };
                let seed = scenario.seed ^ (at + 1).wrapping_mul(0x2545_f491_4f6c_dd1d);
                Host {
                    link: *link,
                    plan: Plan::new(scenario.plan.clone(), pieces, scenario.piece, &have, at == 0, seed),
                    edges: Vec::new(),
                    turn: VecDeque::new(),
                    sending: None,
                    down_free: 0.0,
                    started: false,
                    gone: false,
                    of_key: std::collections::HashMap::default(),
                    done: f64::INFINITY,
                }
            })
            .collect();
        let count = hosts.len();
        let connect = |hosts: &mut Vec<Host>, one: usize, two: usize| {
            if one == two || hosts[one].edges.iter().any(|edge| edge.other as usize == two) {
                return;
            }
            let ends = (index(hosts[one].edges.len()), index(hosts[two].edges.len()));
            let edge = |other: usize, back| Edge {
                other: index(other),
                back,
                key: None,
                queue: VecDeque::new(),
            };
            hosts[one].edges.push(edge(two, ends.1));
            hosts[two].edges.push(edge(one, ends.0));
        };
        if count <= scenario.neighbours + 1 {
            for one in 0..count {
                for two in 0..one {
                    connect(&mut hosts, one, two);
                }
            }
        } else {
            // The source has as many neighbours as anybody; it is among nobody else's.
            for _ in 0..scenario.neighbours {
                let other = 1 + random(count - 1);
                connect(&mut hosts, 0, other);
            }
            for one in 1..count {
                for _ in 0..scenario.neighbours / 2 {
                    let other = 1 + random(count - 1);
                    connect(&mut hosts, one, other);
                }
            }
        }
        let mut world = World {
            scenario,
            left: count - 1,
            hosts,
            events: BinaryHeap::new(),
            order: 0,
            sent: 0,
            used: 0,
            source_sent: 0,
            scratch: Vec::new(),
        };
        for host in 0..count {
            let part = random(1000) as f64 / 1000.0;
            let at = if host == 0 { 0.0 } else { part * scenario.spread };
            world.push(at, What::Start { host: index(host) });
            world.push(at + 0.05 * part, What::Tick { host: index(host) });
        }
        world
    }

    fn push(&mut self, at: f64, what: What) {
        self.order += 1;
        self.events.push(Event {
            at,
            order: self.order,
            what,
        });
    }

    fn step(&mut self, now: f64, what: What) {
        match what {
            What::Start { host } => self.start(now, host),
            What::Tick { host } => {
                let at = host as usize;
                if self.hosts[at].gone {
                    return;
                }
                self.hosts[at].plan.tick(now);
                self.act(now, host);
                if self.hosts[at].done.is_infinite() || host == 0 {
                    self.push(now + 0.1, What::Tick { host });
                }
            }
            What::Have { host, piece } => {
                for edge in 0..self.hosts[host as usize].edges.len() {
                    let (other, back) = self.far(host, index(edge));
                    self.have(now, other, back, piece);
                }
            }
            What::Shown { host, edge, piece } => self.have(now, host, edge, piece),
            What::Asked { host, edge, piece } => {
                let at = host as usize;
                if self.hosts[at].gone || !self.hosts[at].plan.has(piece) {
                    return;
                }
                if let Some(key) = self.hosts[at].edges[edge as usize].key {
                    self.hosts[at].plan.piece_asked(key, piece);
                }
                let bytes = self.piece_bytes(piece);
                let queue = &mut self.hosts[at].edges[edge as usize].queue;
                queue.push_back((piece, bytes));
                if queue.len() == 1 {
                    self.hosts[at].turn.push_back(edge);
                }
                self.send(now, host);
            }
            What::Cancelled { host, edge, piece } => {
                let at = host as usize;
                let full = self.piece_bytes(piece);
                self.hosts[at].edges[edge as usize]
                    .queue
                    .retain(|(other, left)| *other != piece || *left != full);
            }
            What::Started { host, edge, piece } => {
                let near = &mut self.hosts[host as usize];
                if let Some(key) = near.edges[edge as usize].key {
                    near.plan.piece_started(key, piece);
                }
            }
            What::Sent { host } => self.sent(now, host),
            What::Arrived { host, edge, piece } => {
                let at = host as usize;
                let Some(key) = self.hosts[at].edges[edge as usize].key else {
                    return;
                };
                if self.hosts[at].plan.piece_arrived(now, key, piece) {
                    self.used += u64::from(self.piece_bytes(piece));
                    self.hosts[at].plan.piece_verified(now, piece);
                }
                self.act(now, host);
            }
        }
    }

    fn piece_bytes(&self, piece: u32) -> u32 {
        let left = self.scenario.bytes - u64::from(piece) * u64::from(self.scenario.piece);
        u32::try_from(left.min(u64::from(self.scenario.piece))).unwrap_or(u32::MAX)
    }

    fn far(&self, host: u32, edge: u32) -> (u32, u32) {
        let edge = &self.hosts[host as usize].edges[edge as usize];
        (edge.other, edge.back)
    }

    fn start(&mut self, now: f64, host: u32) {
        self.hosts[host as usize].started = true;
        for edge in 0..self.hosts[host as usize].edges.len() {
            let edge = index(edge);
            let (other, back) = self.far(host, edge);
            if !self.hosts[other as usize].started || self.hosts[other as usize].gone {
                continue;
            }
            for (one, edge) in [(host, edge), (other, back)] {
                let one = &mut self.hosts[one as usize];
                let key = one.plan.add_peer(now);
                one.edges[edge as usize].key = Some(key);
                one.of_key.insert(key, edge);
            }
            for (one, edge, other, back) in [(host, edge, other, back), (other, back, host, edge)] {
                let far = &self.hosts[other as usize];
                let has = (!far.plan.gives_first_copy()).then(|| {
                    let mut has = Bitmap::new(
                        u32::try_from(self.scenario.bytes.div_ceil(u64::from(self.scenario.piece))).unwrap_or(0),
                    );
                    for piece in 0..has.len() {
                        if far.plan.has(piece) {
                            has.set(piece);
                        }
                    }
                    has
                });
                let _ = back;
                let near = &mut self.hosts[one as usize];
                let Some(key) = near.edges[edge as usize].key else {
                    continue;
                };
                near.plan.peer_choking(now, key, false);
                if let Some(has) = has {
                    near.plan.peer_bitfield(now, key, &has);
                }
                near.plan.peer_ready(now, key);
            }
            self.act(now, other);
        }
        self.act(now, host);
    }

    fn have(&mut self, now: f64, host: u32, edge: u32, piece: u32) {
        let near = &mut self.hosts[host as usize];
        if near.gone {
            return;
        }
        let Some(key) = near.edges[edge as usize].key else {
            return;
        };
        near.plan.peer_have(now, key, piece);
        self.act(now, host);
    }

    fn act(&mut self, now: f64, host: u32) {
        let mut actions = std::mem::take(&mut self.scratch);
        self.hosts[host as usize].plan.take_actions(&mut actions);
        let later = now + self.scenario.latency;
        for action in actions.drain(..) {
            let edge_of = |world: &Self, peer: &PeerKey| world.hosts[host as usize].of_key.get(peer).copied();
            match action {
                Action::Request { peer, piece } => {
                    let Some(edge) = edge_of(self, &peer) else { continue };
                    let (host, edge) = self.far(host, edge);
                    self.push(later, What::Asked { host, edge, piece });
                }
                Action::Cancel { peer, piece } => {
                    let Some(edge) = edge_of(self, &peer) else { continue };
                    let (host, edge) = self.far(host, edge);
                    self.push(later, What::Cancelled { host, edge, piece });
                }
                Action::Announce { piece } => self.push(later, What::Have { host, piece }),
                Action::Show { peer, piece } => {
                    let Some(edge) = edge_of(self, &peer) else { continue };
                    let (host, edge) = self.far(host, edge);
                    self.push(later, What::Shown { host, edge, piece });
                }
                Action::Complete => {
                    self.hosts[host as usize].done = now;
                    self.left -= 1;
                }
                Action::Ban { .. } => {}
            }
        }
        self.scratch = actions;
    }

    /// Begins to send the next chunk, if the uplink is idle.
    fn send(&mut self, now: f64, host: u32) {
        let chunk = self.scenario.chunk;
        let near = &mut self.hosts[host as usize];
        if near.sending.is_some() || near.gone {
            return;
        }
        while let Some(edge) = near.turn.pop_front() {
            let queue = &mut near.edges[edge as usize].queue;
            let Some((piece, left)) = queue.front_mut() else {
                continue;
            };
            let piece = *piece;
            let first = *left == self.scenario.piece;
            let bytes = chunk.min(*left);
            *left -= bytes;
            let last = *left == 0;
            if last {
                queue.pop_front();
            }
            if !queue.is_empty() {
                near.turn.push_back(edge);
            }
            near.sending = Some((edge, piece, bytes, last));
            let at = now + f64::from(bytes) / near.link.up;
            self.push(at, What::Sent { host });
            if first {
                let (host, edge) = self.far(host, edge);
                self.push(now + self.scenario.latency, What::Started { host, edge, piece });
            }
            return;
        }
    }

    fn sent(&mut self, now: f64, host: u32) {
        let Some((edge, piece, bytes, last)) = self.hosts[host as usize].sending.take() else {
            return;
        };
        self.sent += u64::from(bytes);
        let (other, back) = self.far(host, edge);
        let far = &mut self.hosts[other as usize];
        let time = f64::from(bytes) / far.link.down;
        // What comes in has been coming in while it was sent; only a slower or busy downlink adds to it.
        let came = (now + self.scenario.latency).max(far.down_free + time);
        far.down_free = came;
        if last {
            self.push(
                came,
                What::Arrived {
                    host: other,
                    edge: back,
                    piece,
                },
            );
        }
        if host == 0 {
            self.source_sent += u64::from(bytes);
        }
        let near = &mut self.hosts[host as usize];
        if let Some(key) = near.edges[edge as usize].key {
            near.plan.bytes_sent(now, key, piece, u64::from(bytes));
        }
        self.act(now, host);
        let limit = self.scenario.source_leaves_after;
        if host == 0 && limit.is_some_and(|limit| self.source_sent as f64 >= limit * self.scenario.bytes as f64) {
            self.leave(now, host);
        }
        self.send(now, host);
    }

    fn leave(&mut self, now: f64, host: u32) {
        self.hosts[host as usize].gone = true;
        for edge in 0..self.hosts[host as usize].edges.len() {
            let (other, back) = self.far(host, index(edge));
            let far = &mut self.hosts[other as usize];
            if let Some(key) = far.edges[back as usize].key.take() {
                far.plan.peer_gone(now, key);
            }
            self.act(now, other);
        }
    }
}

/// Bytes per second of a link of so many megabits, less what headers take.
#[must_use]
pub fn mbit(rate: f64) -> f64 {
    rate * 1e6 / 8.0 * 0.956
}

impl Scenario {
    /// `targets` hosts with links of `rate` megabits both ways, and a source like them.
    #[must_use]
    pub fn even(name: &str, bytes: u64, targets: usize, rate: f64) -> Self {
        let link = Link {
            up: mbit(rate),
            down: mbit(rate),
        };
        let piece = u32::try_from((bytes / 1024).next_power_of_two().clamp(64 << 10, 4 << 20)).unwrap_or(4 << 20);
        Self {
            name: name.to_owned(),
            bytes,
            piece,
            source: link,
            targets: vec![link; targets],
            neighbours: 40,
            latency: 0.001,
            chunk: 32 << 10,
            spread: 0.1,
            source_leaves_after: None,
            plan: PlanConfig::default(),
            seed: 1,
        }
    }

    /// Links as a fleet has them: every tenth has an uplink of a tenth, every fifth one of a half, every tenth is five times as fast.
    #[must_use]
    pub fn mixed(mut self) -> Self {
        for (at, link) in self.targets.iter_mut().enumerate() {
            match at % 10 {
                0 => link.up /= 10.0,
                3 | 7 => link.up /= 2.0,
                5 => {
                    link.up *= 5.0;
                    link.down *= 5.0;
                }
                _ => {}
            }
        }
        self
    }

    /// The uplink of one target at a tenth.
    #[must_use]
    pub fn one_slow(mut self) -> Self {
        if let Some(link) = self.targets.get_mut(3) {
            link.up /= 10.0;
        }
        self
    }

    /// For many hosts: whole pieces a turn, and larger ones, so that a run takes seconds.
    #[must_use]
    pub fn coarse(mut self, pieces: u64) -> Self {
        self.piece = u32::try_from(self.bytes.div_ceil(pieces)).unwrap_or(u32::MAX);
        self.chunk = self.piece;
        self
    }
}
