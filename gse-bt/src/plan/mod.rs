//! Which piece is asked for from whom, and which piece is offered to whom: the scheduler of one swarm on one host. No sockets, no
//! clock, no randomness of its own: time is passed in (seconds from any origin), and so is the seed of its choices.
//!
//! What it rests on, each measured:
//! * a source hands every piece out once before it repeats any (`give`), so that its uplink carries one copy;
//! * targets ask for the rarest of some random pieces, at once when a neighbour reports one, a few at a time (`fetch`);
//! * the last pieces are asked for twice, narrowly, so that one slow neighbour holds up nobody;
//! * a relay carries each piece across the border of its zone once (`border`).
//!
//! Whoever owns a [`Plan`] tells it what happens and carries out the [`Action`]s it leaves. Blocks within a piece, verification and
//! limits are left to the owner.

mod bits;
mod border;
mod fetch;
mod give;
#[cfg(test)]
mod tests;

use crate::Bitmap;
use bits::{Bits, Rng};

/// What the scheduler goes by; all of it has defaults that the simulation was made with.
#[derive(Debug, Clone)]
pub struct PlanConfig {
    /// Pieces that a source offers to one peer alone, at least, before the peer has fetched one of them.
    pub window: u32,
    /// Seconds of a peer's present rate that are kept offered or asked for.
    pub horizon: f64,
    /// Candidates the rarest is taken from.
    pub candidates: u32,
    /// Pieces that are asked for at a time, of all peers.
    pub outstanding: u32,
    /// The most pieces that are asked for from one peer at a time.
    pub per_peer: u32,
    /// The most bytes that are asked for at a time; two pieces always may.
    pub outstanding_bytes: u64,
    /// The end game begins when this many pieces are missing ...
    pub endgame_pieces: u32,
    /// ... or this part of all.
    pub endgame_part: f64,
    /// A piece is asked for again in the end game when it takes this many times the usual time, ...
    pub endgame_patience: f64,
    /// ... and these seconds.
    pub endgame_slack: f64,
    /// A peer that makes no progress for so long is offered everything.
    pub stall: f64,
    /// So many bad pieces and a peer is banned.
    pub bad_pieces: u32,
}

impl Default for PlanConfig {
    fn default() -> Self {
        Self {
            window: 4,
            horizon: 0.1,
            candidates: 64,
            outstanding: 16,
            per_peer: 64,
            outstanding_bytes: 16 << 20,
            endgame_pieces: 24,
            endgame_part: 0.04,
            endgame_patience: 3.0,
            endgame_slack: 0.1,
            stall: 2.0,
            bad_pieces: 2,
        }
    }
}

/// Names a connected peer; never given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerKey {
    slot: u32,
    generation: u32,
}

/// What the owner of the plan has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Ask this peer for this piece.
    Request {
        /// Whom.
        peer: PeerKey,
        /// For what.
        piece: u32,
    },
    /// What was asked for is not wanted any more.
    Cancel {
        /// By whom.
        peer: PeerKey,
        /// What.
        piece: u32,
    },
    /// Say to every peer that this piece is here.
    Announce {
        /// Which.
        piece: u32,
    },
    /// Say to this peer that this piece is here.
    Show {
        /// To whom.
        peer: PeerKey,
        /// Which.
        piece: u32,
    },
    /// Have nothing more to do with this peer.
    Ban {
        /// Whom.
        peer: PeerKey,
    },
    /// Everything is here.
    Complete,
}

/// A piece that was asked for.
#[derive(Debug, Clone, Copy)]
struct Flight {
    piece: u32,
    slot: u32,
    since: f64,
    /// Something of it has come.
    started: bool,
    /// All of it came and is being verified.
    arrived: bool,
}

#[derive(Debug)]
struct Peer {
    generation: u32,
    /// What it says it has, but for what it gave us wrongly.
    theirs: Bits,
    theirs_count: u32,
    choking: bool,
    banned: bool,
    bad: u32,
    /// Pieces of it that were as they should be.
    good: u32,
    /// Pieces asked for that have not come.
    outstanding: u32,
    /// Seconds between two pieces of it while it is busy, smoothed; 0 while unknown.
    service: f64,
    /// Seconds from asking to arrival, smoothed; 0 while unknown.
    latency: f64,
    /// The least of those, lately: what it takes when nothing waits there.
    least: f64,
    /// Pieces that it is worth asking for at a time: more as long as more do not take longer.
    useful: f64,
    last_arrival: f64,
    /// It is across the border of the zone: what it has counts for nothing as to how rare a piece is here.
    upstream: bool,
    /// Until then it is passed over: it owed something when nothing got on.
    stuck: Option<f64>,
    /// Seconds that it was last passed over.
    stuck_for: f64,
    gift: give::Gift,
}

impl Peer {
    /// Whether what it has counts as being in the zone.
    fn is_near(&self) -> bool {
        !self.upstream && self.stuck.is_none()
    }
}

/// The scheduler of one swarm.
#[derive(Debug)]
pub struct Plan {
    config: PlanConfig,
    rng: Rng,
    pieces: u32,
    piece_length: u64,
    have: Bits,
    missing: u32,
    /// Asked for, or being verified.
    busy: Bits,
    /// How many peers have each piece.
    holders: Vec<u16>,
    peers: Vec<Option<Box<Peer>>>,
    free: Vec<u32>,
    generation: u32,
    live: u32,
    flights: Vec<Flight>,
    /// Seconds a piece takes from asking to arrival, smoothed.
    usual: f64,
    /// Seconds between two arrivals of pieces from anybody, smoothed; 0 while unknown.
    service: f64,
    last_arrival: f64,
    /// The most that it was worth asking of one peer, lately.
    deepest: f64,
    /// Where the search for somebody to ask goes on.
    turn: u32,
    give: Option<give::Give>,
    /// Of a relay.
    border: Option<border::Border>,
    /// When content came last, from anybody.
    moved: f64,
    actions: Vec<Action>,
}

impl Plan {
    /// A plan for content of `pieces` pieces of `piece_length` bytes, of which `have` are here already.
    ///
    /// With `first_copy` this host is a source: it offers each piece to one peer before it offers any to two.
    #[must_use]
    pub fn new(config: PlanConfig, pieces: u32, piece_length: u32, have: &Bitmap, first_copy: bool, seed: u64) -> Self {
        let mut own = Bits::new(pieces);
        for piece in have.ones().filter(|piece| *piece < pieces) {
            own.set(piece);
        }
        let mut rng = Rng::new(seed);
        let missing = pieces - own.count();
        let give = (first_copy && missing == 0).then(|| give::Give::new(pieces, &mut rng));
        Self {
            config,
            rng,
            pieces,
            piece_length: u64::from(piece_length.max(1)),
            have: own,
            missing,
            busy: Bits::new(pieces),
            holders: vec![0; pieces as usize],
            peers: Vec::new(),
            free: Vec::new(),
            generation: 0,
            live: 0,
            flights: Vec::new(),
            usual: 0.3,
            service: 0.0,
            last_arrival: 0.0,
            deepest: 0.0,
            turn: 0,
            give,
            border: None,
            moved: 0.0,
            actions: Vec::new(),
        }
    }

    /// What is to be done since this was last asked for, in order.
    pub fn take_actions(&mut self, into: &mut Vec<Action>) {
        into.append(&mut self.actions);
    }

    /// Whether every piece is here and verified.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// Pieces that are not here yet.
    #[must_use]
    pub fn missing(&self) -> u32 {
        self.missing
    }

    /// Whether a piece is here and verified.
    #[must_use]
    pub fn has(&self, piece: u32) -> bool {
        self.have.get(piece)
    }

    /// Whether what is here is shown to peers piece by piece ([`Action::Show`]), and not said when they connect.
    #[must_use]
    pub fn gives_first_copy(&self) -> bool {
        self.give.is_some()
    }

    /// Whether every piece was fully sent to somebody, or is reported by somebody: the swarm can go on without us.
    #[must_use]
    pub fn first_copy_is_out(&self) -> bool {
        self.give.as_ref().is_none_or(|give| give.is_out(self))
    }

    /// How many connected peers there are.
    #[must_use]
    pub fn peers(&self) -> u32 {
        self.live
    }

    /// How many connected peers have everything.
    #[must_use]
    pub fn seeds(&self) -> u32 {
        let all = self.peers.iter().flatten();
        u32::try_from(all.filter(|peer| peer.theirs_count == self.pieces).count()).unwrap_or(u32::MAX)
    }

    /// Whether a connected peer has everything.
    #[must_use]
    pub fn peer_is_seed(&self, key: PeerKey) -> bool {
        self.peer(key).is_some_and(|peer| peer.theirs_count == self.pieces)
    }

    /// A peer has connected. It has nothing and asks for nothing until it says so.
    pub fn add_peer(&mut self, now: f64) -> PeerKey {
        let generation = self.generation;
        self.generation = self.generation.wrapping_add(1);
        let peer = Box::new(Peer {
            generation,
            theirs: Bits::new(self.pieces),
            theirs_count: 0,
            choking: true,
            banned: false,
            bad: 0,
            good: 0,
            outstanding: 0,
            service: 0.0,
            latency: 0.0,
            least: 0.0,
            useful: 1.0,
            last_arrival: now,
            upstream: false,
            stuck: None,
            stuck_for: 0.0,
            gift: give::Gift::new(now),
        });
        self.live += 1;
        let slot = match self.free.pop() {
            Some(slot) => {
                self.peers[slot as usize] = Some(peer);
                slot
            }
            None => {
                self.peers.push(Some(peer));
                u32::try_from(self.peers.len() - 1).unwrap_or(u32::MAX)
            }
        };
        self.give_more(now);
        PeerKey { slot, generation }
    }

    /// A peer is gone; what it was asked for is asked for elsewhere, what was offered to it alone is offered to others.
    pub fn peer_gone(&mut self, now: f64, key: PeerKey) {
        if self.peer(key).is_none() {
            return;
        }
        let Some(peer) = self.peers.get_mut(key.slot as usize).and_then(Option::take) else {
            return;
        };
        self.free.push(key.slot);
        self.live -= 1;
        if peer.theirs_count == self.pieces
            && let Some(give) = &mut self.give
        {
            give.goes_on_elsewhere();
        }
        if peer.is_near() {
            for piece in peer.theirs.ones() {
                self.lose_holder(piece);
            }
        }
        self.drop_flights(key.slot);
        self.take_back(key.slot);
        self.ask_everybody(now);
        self.give_more(now);
    }

    /// A peer said at once what it has.
    pub fn peer_bitfield(&mut self, now: f64, key: PeerKey, has: &Bitmap) {
        let pieces = self.pieces;
        for piece in has.ones().filter(|piece| *piece < pieces) {
            self.note_have(now, key, piece);
        }
        self.ask(now, key.slot);
        self.give_more(now);
    }

    /// A peer has got a piece.
    pub fn peer_have(&mut self, now: f64, key: PeerKey, piece: u32) {
        if piece >= self.pieces || !self.note_have(now, key, piece) {
            return;
        }
        if self.missing > 0 && !self.have.get(piece) {
            self.wake(now, key.slot, piece);
        }
        if self.give.is_some() {
            self.give_more(now);
        }
    }

    /// A peer answers requests, or does not any more; what it was asked for is then void.
    pub fn peer_choking(&mut self, now: f64, key: PeerKey, choking: bool) {
        let Some(peer) = self.peer_mut(key) else { return };
        peer.choking = choking;
        if choking {
            self.drop_flights(key.slot);
            self.ask_everybody(now);
        } else {
            self.ask(now, key.slot);
        }
    }

    /// Time has passed; call it some ten times a second.
    pub fn tick(&mut self, now: f64) {
        self.look_at_border(now);
        if self.missing > 0 {
            self.ask_everybody(now);
        }
        self.give_to_stalled(now);
    }

    fn peer(&self, key: PeerKey) -> Option<&Peer> {
        self.peers
            .get(key.slot as usize)?
            .as_deref()
            .filter(|peer| peer.generation == key.generation)
    }

    fn peer_mut(&mut self, key: PeerKey) -> Option<&mut Peer> {
        self.peers
            .get_mut(key.slot as usize)?
            .as_deref_mut()
            .filter(|peer| peer.generation == key.generation)
    }

    fn at(&self, slot: u32) -> Option<&Peer> {
        self.peers.get(slot as usize)?.as_deref()
    }

    fn at_mut(&mut self, slot: u32) -> Option<&mut Peer> {
        self.peers.get_mut(slot as usize)?.as_deref_mut()
    }

    fn key(&self, slot: u32) -> Option<PeerKey> {
        let generation = self.at(slot)?.generation;
        Some(PeerKey { slot, generation })
    }

    /// Notes that a peer has a piece; false if that was known, or the peer is not.
    fn note_have(&mut self, now: f64, key: PeerKey, piece: u32) -> bool {
        if self.peer(key).is_some() {
            self.is_alive(key.slot);
        }
        let Some(peer) = self.peer_mut(key) else { return false };
        if !peer.theirs.set(piece) {
            return false;
        }
        peer.theirs_count += 1;
        if peer.upstream {
            return true;
        }
        if let Some(count) = self.holders.get_mut(piece as usize) {
            *count = count.saturating_add(1);
        }
        self.note_spread(now, key.slot, piece);
        true
    }

    fn lose_holder(&mut self, piece: u32) {
        if let Some(count) = self.holders.get_mut(piece as usize) {
            *count = count.saturating_sub(1);
        }
    }

    fn in_end_game(&self, missing: u32) -> bool {
        let part = f64::from(self.pieces) * self.config.endgame_part;
        f64::from(missing) <= part.max(f64::from(self.config.endgame_pieces))
    }
}
