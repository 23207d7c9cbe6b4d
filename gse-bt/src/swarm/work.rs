//! The task of a swarm.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::peers::Book;
use super::{Failure, Order, Progress, SwarmSpec};
use crate::Bitmap;
use crate::engine::Shared;
use crate::limit::Limit;
use crate::peer::link::{self, Counters, Link};
use crate::peer::{Command, Established, Event, Place, Who, handshake};
use crate::plan::{Action, PeerKey, Plan};
use crate::storage::{Storage, StorageError};

/// Commands that may wait for a link; a link that does not take them is closed.
const COMMANDS: usize = 4096;
const TICK: Duration = Duration::from_millis(25);
/// Progress is told this often.
const TELL: Duration = Duration::from_millis(200);
/// Dials that are under way at a time.
const DIALS: usize = 16;
/// Rates are means over about this time.
const RATE_OVER: f64 = 2.0;

struct Connected {
    who: Arc<Who>,
    commands: mpsc::Sender<Command>,
    stop: CancellationToken,
}

enum Ended {
    Link(PeerKey),
    Dial {
        address: String,
        outcome: Result<Box<Established>, String>,
    },
    Kept {
        key: PeerKey,
        piece: u32,
        outcome: Result<(), StorageError>,
    },
}

/// All that a swarm's task owns.
pub(crate) struct Work {
    id: [u8; 20],
    spec: SwarmSpec,
    peer_id: [u8; 20],
    shared: Arc<Shared>,
    storage: Storage,
    plan: Plan,
    have: Bitmap,
    origin: Instant,
    links: HashMap<PeerKey, Connected>,
    book: Book,
    tasks: JoinSet<Ended>,
    dials: usize,
    keeping: usize,
    events: mpsc::Receiver<(PeerKey, Event)>,
    events_in: mpsc::Sender<(PeerKey, Event)>,
    connections: mpsc::Receiver<Established>,
    orders: mpsc::Receiver<Order>,
    progress: watch::Sender<Progress>,
    limits: [Limit; 2],
    counters: Arc<Counters>,
    stop: CancellationToken,
    actions: Vec<Action>,
    told: Instant,
    tell_now: bool,
    before: (u64, u64),
    seen_down: u64,
    rates: (f64, f64),
    bad_pieces: u64,
    have_bytes: u64,
    failed: Option<Arc<Failure>>,
}

/// What a swarm's task is started with.
pub(crate) struct Parts {
    pub(crate) id: [u8; 20],
    pub(crate) spec: SwarmSpec,
    pub(crate) peer_id: [u8; 20],
    pub(crate) shared: Arc<Shared>,
    pub(crate) storage: Storage,
    pub(crate) have: Bitmap,
    pub(crate) first_copy: bool,
    pub(crate) connections: mpsc::Receiver<Established>,
    pub(crate) orders: mpsc::Receiver<Order>,
    pub(crate) progress: watch::Sender<Progress>,
    pub(crate) up: Limit,
    pub(crate) down: Limit,
    pub(crate) stop: CancellationToken,
}

impl Work {
    pub(crate) fn new(parts: Parts) -> Self {
        let geometry = parts.storage.geometry();
        let plan = Plan::new(
            parts.shared.config.plan.clone(),
            geometry.pieces(),
            geometry.piece_length(),
            &parts.have,
            parts.first_copy,
            rand::random(),
        );
        let (events_in, events) = mpsc::channel(1024);
        let have_bytes = parts
            .have
            .ones()
            .map(|piece| u64::from(geometry.piece_len(piece)))
            .sum();
        Self {
            id: parts.id,
            book: Book::new(parts.spec.own_id.clone()),
            spec: parts.spec,
            peer_id: parts.peer_id,
            shared: parts.shared,
            storage: parts.storage,
            plan,
            have: parts.have,
            origin: Instant::now(),
            links: HashMap::new(),
            tasks: JoinSet::new(),
            dials: 0,
            keeping: 0,
            events,
            events_in,
            connections: parts.connections,
            orders: parts.orders,
            progress: parts.progress,
            limits: [parts.up, parts.down],
            counters: Arc::new(Counters::default()),
            stop: parts.stop,
            actions: Vec::new(),
            told: Instant::now(),
            tell_now: false,
            before: (0, 0),
            seen_down: 0,
            rates: (0.0, 0.0),
            bad_pieces: 0,
            have_bytes,
            failed: None,
        }
    }

    /// Runs until it is stopped.
    pub(crate) async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut waiting: Option<oneshot::Sender<()>> = None;
        self.tell();
        loop {
            tokio::select! {
                () = self.stop.cancelled() => break,
                order = self.orders.recv() => match order {
                    None => break,
                    Some(Order::Stop(done)) => {
                        waiting = Some(done);
                        break;
                    }
                    Some(Order::Add(peers)) => {
                        let now = Instant::now();
                        peers.iter().for_each(|peer| self.book.add(now, peer));
                        self.dial();
                    }
                    Some(Order::Drop(gone)) => self.drop_peers(&gone),
                    Some(Order::Share(share, shares)) => {
                        let now = self.now();
                        self.plan.set_share(now, share, shares);
                    }
                },
                Some(connection) = self.connections.recv() => self.connected(connection),
                Some((key, event)) = self.events.recv() => {
                    self.event(key, event);
                    // What has come meanwhile is dealt with before anybody is asked for more.
                    for _ in 0..64 {
                        let Ok((key, event)) = self.events.try_recv() else { break };
                        self.event(key, event);
                    }
                }
                Some(ended) = self.tasks.join_next() => self.ended(ended),
                _ = tick.tick() => {
                    let now = self.now();
                    let down = self.counters.down.load(Ordering::Relaxed);
                    if down != self.seen_down {
                        self.seen_down = down;
                        self.plan.something_came(now);
                    }
                    self.plan.tick(now);
                    self.dial();
                }
            }
            self.act();
            if self.tell_now || self.told.elapsed() >= TELL {
                self.tell_now = false;
                self.tell();
            }
        }
        self.close().await;
        if let Some(done) = waiting {
            // Whoever asked may have gone.
            let _asked = done.send(());
        }
    }

    async fn close(&mut self) {
        for link in self.links.values() {
            link.stop.cancel();
        }
        self.links.clear();
        // What is being written to disk cannot be cut off; it takes a moment at most. Everything else ends where it waits.
        self.connections.close();
        self.events.close();
        let grace = Instant::now() + Duration::from_secs(10);
        while self.keeping > 0 {
            match tokio::time::timeout_at(grace, self.tasks.join_next()).await {
                Ok(Some(Ok(Ended::Kept { .. }))) => self.keeping -= 1,
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        self.tasks.shutdown().await;
        self.tell();
    }

    fn now(&self) -> f64 {
        self.origin.elapsed().as_secs_f64()
    }

    fn dial(&mut self) {
        let room = self
            .shared
            .config
            .max_peers
            .saturating_sub(self.links.len() + self.dials);
        let most = room.min(DIALS - self.dials.min(DIALS));
        if most == 0 || self.failed.is_some() {
            return;
        }
        let links = &self.links;
        let connected = |address: &str, id: Option<&str>| {
            links.values().any(|link| match id {
                Some(id) => link.who.id.as_deref() == Some(id),
                None => link.who.dialled && link.who.address.to_string() == address,
            })
        };
        let due = self.book.due(Instant::now(), most, self.plan.is_complete(), connected);
        for (address, expected) in due {
            self.dials += 1;
            let (shared, spec, id, peer_id) = (Arc::clone(&self.shared), self.spec.clone(), self.id, self.peer_id);
            let bytes = address.clone();
            self.tasks.spawn(async move {
                let outcome = handshake::dial(&shared, &spec, &id, &peer_id, &address, expected.as_ref()).await;
                Ended::Dial {
                    address: bytes,
                    outcome: outcome.map(Box::new).map_err(|error| error.to_string()),
                }
            });
        }
    }

    fn ended(&mut self, ended: Result<Ended, tokio::task::JoinError>) {
        let now = self.now();
        match ended {
            Ok(Ended::Link(key)) => self.gone(key),
            Ok(Ended::Dial { address, outcome }) => {
                self.dials -= 1;
                self.book.dialled(Instant::now(), &address, outcome.is_ok());
                match outcome {
                    Ok(connection) => self.connected(*connection),
                    Err(reason) => tracing::debug!(%address, %reason, "peer not reached"),
                }
            }
            Ok(Ended::Kept { key, piece, outcome }) => {
                self.keeping -= 1;
                match outcome {
                    Ok(()) => {
                        if self.have.set(piece) {
                            self.have_bytes += u64::from(self.storage.geometry().piece_len(piece));
                        }
                        self.plan.piece_verified(now, piece);
                    }
                    Err(StorageError::Mismatch(_)) => {
                        self.bad_pieces += 1;
                        self.shared.metrics.bad_pieces.inc();
                        let peer = self.links.get(&key).map(|link| link.who.name());
                        tracing::warn!(
                            piece,
                            peer,
                            "a piece is not what the manifest says; it is fetched from somebody else"
                        );
                        self.plan.piece_bad(now, key, piece);
                    }
                    Err(error) => {
                        self.plan.piece_lost(now, key, piece);
                        self.fail(&error);
                    }
                }
            }
            Err(error) if error.is_cancelled() => {}
            // A link that panicked is not told apart from others: all that are closed are looked for.
            Err(error) => {
                tracing::error!(%error, "a task of a swarm panicked");
                let closed: Vec<PeerKey> = self
                    .links
                    .iter()
                    .filter(|(_, link)| link.commands.is_closed())
                    .map(|(key, _)| *key)
                    .collect();
                closed.into_iter().for_each(|key| self.gone(key));
            }
        }
    }

    fn fail(&mut self, error: &StorageError) {
        if self.failed.is_some() {
            return;
        }
        let changed = self.plan.gives_first_copy();
        let message = if changed {
            format!("the source can no longer be read as it was: {error}")
        } else {
            format!("what came cannot be kept: {error}")
        };
        tracing::error!(%error, "a swarm has failed");
        self.failed = Some(Arc::new(Failure {
            message,
            disk_full: error.is_full(),
            changed,
        }));
        for link in self.links.values() {
            link.stop.cancel();
        }
        self.tell();
    }

    fn connected(&mut self, connection: Established) {
        let who = Arc::new(connection.who.clone());
        let id = who.id.as_deref();
        let refused = self.failed.is_some()
            || self.links.len() >= self.shared.config.max_peers
            || self.book.is_banned(id, who.address.ip())
            || id == Some(self.spec.own_id.as_str())
            || who.peer_id == self.peer_id;
        if refused {
            return;
        }
        let same = |other: &Who| match (&other.id, &who.id) {
            (Some(one), Some(two)) => one == two,
            (None, None) => other.peer_id == who.peer_id,
            _ => false,
        };
        let twin = self
            .links
            .iter()
            .find(|(_, link)| same(&link.who))
            .map(|(key, link)| (*key, Arc::clone(&link.who)));
        if let Some((key, other)) = twin {
            // Both ends have to keep the same one: that which the lesser of the two has dialled. A peer that was started anew has a
            // new peer id, and its old connection is dead.
            let ours_is_less = match id {
                Some(id) => self.spec.own_id.as_str() < id,
                None => self.peer_id < who.peer_id,
            };
            if other.peer_id == who.peer_id && who.dialled != ours_is_less {
                return;
            }
            self.gone(key);
        }
        let now = self.now();
        let key = self.plan.add_peer(now);
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let stop = self.stop.child_token();
        match who.place {
            Place::Here => {}
            Place::Upstream => self.plan.set_upstream(now, key),
            Place::Relay => self.plan.set_relay(key),
        }
        let shows = match who.place {
            Place::Here => !self.plan.gives_first_copy(),
            // Nothing is asked of us from there.
            Place::Upstream => false,
            Place::Relay => true,
        };
        let begin = Command::Begin {
            have: shows.then(|| self.have.clone()),
            interested: !self.plan.is_complete(),
        };
        let link = Link {
            key,
            who: Arc::clone(&who),
            storage: self.storage.clone(),
            config: self.shared.config.link.clone(),
            commands: inbox,
            events: self.events_in.clone(),
            up: [self.limits[0].clone(), self.shared.up.clone()],
            down: [self.limits[1].clone(), self.shared.down.clone()],
            counters: Arc::clone(&self.counters),
            engine: self.shared.metrics.clone(),
            report_sent: self.plan.gives_first_copy(),
        };
        // A queue that was just made has room.
        if commands.try_send(begin).is_err() {
            return;
        }
        self.shared.metrics.connections.inc();
        let (shared, token, name) = (Arc::clone(&self.shared), stop.clone(), who.name());
        self.tasks.spawn(async move {
            tokio::select! {
                () = token.cancelled() => {}
                ended = link::run(link, connection) => match ended {
                    Ok(()) => tracing::debug!(peer = %name, "peer has left"),
                    Err(error) => tracing::debug!(peer = %name, %error, "connection ended"),
                },
            }
            shared.metrics.connections.dec();
            Ended::Link(key)
        });
        self.links.insert(key, Connected { who, commands, stop });
        self.plan.peer_ready(now, key);
    }

    fn gone(&mut self, key: PeerKey) {
        if let Some(link) = self.links.remove(&key) {
            link.stop.cancel();
            let now = self.now();
            self.plan.peer_gone(now, key);
        }
    }

    fn drop_peers(&mut self, gone: &[String]) {
        self.book.drop(gone);
        let keys: Vec<PeerKey> = self
            .links
            .iter()
            .filter(|(_, link)| {
                let address = link.who.address.to_string();
                gone.iter()
                    .any(|gone| link.who.id.as_ref() == Some(gone) || *gone == address)
            })
            .map(|(key, _)| *key)
            .collect();
        keys.into_iter().for_each(|key| self.gone(key));
    }

    fn event(&mut self, key: PeerKey, event: Event) {
        let now = self.now();
        match event {
            Event::Bitfield(has) => {
                self.plan.peer_bitfield(now, key, &has);
                self.part_with_seed(key);
            }
            Event::Have(piece) => {
                self.plan.peer_have(now, key, piece);
                self.part_with_seed(key);
            }
            Event::Choking(choking) => self.plan.peer_choking(now, key, choking),
            Event::Started(piece) => self.plan.piece_started(key, piece),
            Event::Piece { piece, parts } => {
                if self.plan.piece_arrived(now, key, piece) {
                    self.keep(key, piece, parts);
                }
            }
            Event::Refused(piece) => self.plan.piece_refused(now, key, piece),
            Event::Asked(piece) => self.plan.piece_asked(key, piece),
            Event::Sent { piece, bytes } => self.plan.bytes_sent(now, key, piece, bytes),
            Event::Unreadable(error) => self.fail(&error),
        }
    }

    fn keep(&mut self, key: PeerKey, piece: u32, parts: Vec<Bytes>) {
        self.keeping += 1;
        let storage = self.storage.clone();
        self.tasks.spawn(async move {
            let outcome = storage.keep(piece, parts).await;
            Ended::Kept { key, piece, outcome }
        });
    }

    /// Two that have everything have nothing to say to each other.
    fn part_with_seed(&mut self, key: PeerKey) {
        if !self.plan.peer_is_seed(key) {
            return;
        }
        let Some(link) = self.links.get(&key) else { return };
        if let Some(id) = &link.who.id {
            let id = id.clone();
            self.book.is_seed(&id);
        }
        if self.plan.is_complete() {
            self.gone(key);
        }
    }

    fn act(&mut self) {
        let mut actions = std::mem::take(&mut self.actions);
        self.plan.take_actions(&mut actions);
        let mut lost = Vec::new();
        let mut shown: Vec<(PeerKey, Vec<u32>)> = Vec::new();
        for action in actions.drain(..) {
            let mut command = |key: &PeerKey, command: Command| {
                let full = self
                    .links
                    .get(key)
                    .is_some_and(|link| link.commands.try_send(command).is_err());
                if full {
                    lost.push(*key);
                }
            };
            match action {
                Action::Request { peer, piece } => command(&peer, Command::Request(piece)),
                Action::Cancel { peer, piece } => command(&peer, Command::Cancel(piece)),
                Action::Announce { piece } => {
                    for (key, link) in &self.links {
                        if link.who.place != Place::Upstream {
                            command(key, Command::Have(piece));
                        }
                    }
                }
                Action::Show { peer, piece } => match shown.last_mut().filter(|last| last.0 == peer) {
                    Some((_, pieces)) => pieces.push(piece),
                    None => shown.push((peer, vec![piece])),
                },
                Action::Ban { peer } => {
                    if let Some(link) = self.links.get(&peer) {
                        tracing::warn!(peer = %link.who.name(), "peer banned: it sends what is not in the manifest");
                        self.book.ban(link.who.id.as_deref(), link.who.address.ip());
                        self.shared.metrics.banned.inc();
                        lost.push(peer);
                    }
                }
                Action::Complete => {
                    for key in self.links.keys() {
                        command(key, Command::NotInterested);
                    }
                    let done: Vec<PeerKey> = self
                        .links
                        .keys()
                        .copied()
                        .filter(|key| self.plan.peer_is_seed(*key))
                        .collect();
                    lost.extend(done);
                    let across = self.links.iter().filter(|(_, link)| link.who.place == Place::Upstream);
                    lost.extend(across.map(|(key, _)| *key));
                    self.tell_now = true;
                }
            }
        }
        for (key, pieces) in shown {
            if self
                .links
                .get(&key)
                .is_some_and(|link| link.commands.try_send(Command::Show(pieces)).is_err())
            {
                lost.push(key);
            }
        }
        self.actions = actions;
        let any = !lost.is_empty();
        lost.into_iter().for_each(|key| self.gone(key));
        if any {
            // What was asked of them is asked of others at once.
            self.act();
        }
    }

    fn tell(&mut self) {
        let passed = self.told.elapsed().as_secs_f64().max(1e-3);
        self.told = Instant::now();
        let up = self.counters.up.load(Ordering::Relaxed);
        let down = self.counters.down.load(Ordering::Relaxed);
        let weight = (passed / RATE_OVER).min(1.0);
        let smooth = |old: f64, bytes: u64| old + (bytes as f64 / passed - old) * weight;
        self.rates = (
            smooth(self.rates.0, up - self.before.0),
            smooth(self.rates.1, down - self.before.1),
        );
        self.before = (up, down);
        let first_copy_out = self.plan.first_copy_is_out();
        let peers = self.plan.peers();
        let pieces = {
            let told = self.progress.borrow();
            if told.pieces.count() == self.have.count() && told.pieces.len() == self.have.len() {
                Arc::clone(&told.pieces)
            } else {
                Arc::new(self.have.clone())
            }
        };
        self.progress.send_replace(Progress {
            have_bytes: self.have_bytes,
            total: self.storage.geometry().total(),
            uploaded: up,
            downloaded: down,
            rate_up: self.rates.0 as u64,
            rate_down: self.rates.1 as u64,
            pieces,
            complete: self.plan.is_complete(),
            first_copy_out,
            peers,
            crossed: self.counters.crossed.load(Ordering::Relaxed),
            bad_pieces: self.bad_pieces,
            failed: self.failed.clone(),
        });
    }
}
