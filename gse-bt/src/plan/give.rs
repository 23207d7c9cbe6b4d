//! The offering side of a source: every piece is offered to one peer before any is offered to two, so that the first copy of all
//! leaves the source in the time of one, and the peers give the rest to each other.
//!
//! Each peer is shown a few pieces that nobody else is shown; when it has them, it is shown more. Who spreads what it gets (others
//! report it) is given more than who does not, so that a slow uplink holds little that nobody else has.

use super::bits::{Bits, Rng};
use super::{Action, PeerKey, Plan};

const NOBODY: u32 = u32::MAX;
/// Pieces that are not sent yet, in all: below this, a peer that spreads slowly is given pieces, too.
const BUSY: usize = 4;

/// What a source knows of what it has offered.
#[derive(Debug)]
pub(super) struct Give {
    /// Never offered, or lost with whom they were offered to; the last one is next.
    pool: Vec<u32>,
    in_pool: Bits,
    /// Slot of the peer each piece was first offered to.
    owner: Vec<u32>,
    /// Reported by another than the owner.
    spread: Bits,
    /// Pieces offered in the first pass and not sent yet.
    unsent: usize,
    /// Somebody got everything and has parted from us, being of no more use to us than we to it: the others have it still.
    lives_elsewhere: bool,
}

/// What was offered to one peer.
#[derive(Debug)]
pub(super) struct Gift {
    /// Offered and not fully sent: piece, bytes that are left, whether it was asked for.
    unsent: Vec<(u32, u64, bool)>,
    shown: Option<Bits>,
    /// First offered to it, and reported by nobody else.
    kept: u32,
    /// It is offered everything.
    full: bool,
    interested: bool,
    /// When it last got on.
    moved: f64,
    /// Seconds between two pieces sent to it, smoothed; 0 while unknown.
    service: f64,
    last_sent: f64,
}

impl Gift {
    pub(super) fn new(now: f64) -> Self {
        Self {
            unsent: Vec::new(),
            shown: None,
            kept: 0,
            full: false,
            interested: false,
            moved: now,
            service: 0.0,
            last_sent: now,
        }
    }

    /// Its owner shows it everything; it takes no part in the first pass.
    pub(super) fn show_all(&mut self) {
        self.full = true;
    }
}

impl Give {
    pub(super) fn new(pieces: u32, rng: &mut Rng) -> Self {
        let mut pool: Vec<u32> = (0..pieces).collect();
        rng.shuffle(&mut pool);
        Self {
            pool,
            in_pool: Bits::full(pieces),
            owner: vec![NOBODY; pieces as usize],
            spread: Bits::new(pieces),
            unsent: 0,
            lives_elsewhere: false,
        }
    }

    pub(super) fn is_out(&self, plan: &Plan) -> bool {
        self.lives_elsewhere || self.pool.is_empty() && plan.holders.iter().all(|count| *count > 0)
    }

    /// Somebody who has everything goes its own way.
    pub(super) fn goes_on_elsewhere(&mut self) {
        self.lives_elsewhere = true;
        for piece in self.pool.drain(..) {
            self.in_pool.clear(piece);
        }
    }
}

impl Plan {
    /// A peer can be offered pieces: it is through its handshake.
    pub fn peer_ready(&mut self, now: f64, key: PeerKey) {
        if let Some(peer) = self.peer_mut(key) {
            peer.gift.interested = true;
            peer.gift.moved = now;
        }
        self.give_more(now);
    }

    /// A peer has asked for (a part of) a piece.
    pub fn piece_asked(&mut self, key: PeerKey, piece: u32) {
        let Some(peer) = self.peer_mut(key) else { return };
        if let Some(entry) = peer.gift.unsent.iter_mut().find(|entry| entry.0 == piece) {
            entry.2 = true;
        }
    }

    /// Bytes of a piece have been sent to a peer.
    pub fn bytes_sent(&mut self, now: f64, key: PeerKey, piece: u32, bytes: u64) {
        if self.give.is_none() {
            return;
        }
        let Some(peer) = self.peer_mut(key) else { return };
        let gift = &mut peer.gift;
        gift.moved = now;
        let Some(at) = gift.unsent.iter().position(|entry| entry.0 == piece) else {
            return;
        };
        let entry = &mut gift.unsent[at];
        entry.1 = entry.1.saturating_sub(bytes);
        if entry.1 > 0 {
            return;
        }
        let taken = (now - gift.last_sent).max(1e-6);
        gift.service = if gift.service == 0.0 {
            taken
        } else {
            gift.service * 0.8 + taken * 0.2
        };
        gift.last_sent = now;
        self.is_sent(key.slot, piece);
        self.give_more(now);
    }

    /// A piece leaves the window of a peer.
    fn is_sent(&mut self, slot: u32, piece: u32) {
        let Some(peer) = self.at_mut(slot) else { return };
        let before = peer.gift.unsent.len();
        peer.gift.unsent.retain(|entry| entry.0 != piece);
        let left = before - peer.gift.unsent.len();
        if let Some(give) = &mut self.give {
            give.unsent = give.unsent.saturating_sub(left);
        }
    }

    /// A peer reports a piece.
    pub(super) fn note_spread(&mut self, now: f64, slot: u32, piece: u32) {
        let Some(give) = &mut self.give else { return };
        let owner = give.owner.get(piece as usize).copied().unwrap_or(NOBODY);
        let newly = owner != NOBODY && owner != slot && give.spread.set(piece);
        if newly && let Some(peer) = self.at_mut(owner) {
            peer.gift.kept = peer.gift.kept.saturating_sub(1);
        }
        if let Some(peer) = self.at_mut(slot) {
            peer.gift.moved = now;
        }
        self.is_sent(slot, piece);
        if newly {
            self.is_sent(owner, piece);
        }
    }

    /// What was offered to a peer that is gone, and what only it had, is offered again.
    pub(super) fn take_back(&mut self, slot: u32) {
        let Some(mut give) = self.give.take() else { return };
        let mut back = Vec::new();
        for piece in 0..self.pieces {
            let owner = give.owner[piece as usize];
            let gone = owner == slot || owner != NOBODY && self.at(owner).is_none();
            if owner == slot {
                give.owner[piece as usize] = NOBODY;
            }
            if gone && self.holders[piece as usize] == 0 && !give.lives_elsewhere {
                give.owner[piece as usize] = NOBODY;
                give.spread.clear(piece);
                if give.in_pool.set(piece) {
                    back.push(piece);
                }
            }
        }
        self.rng.shuffle(&mut back);
        give.pool.extend(back);
        give.unsent = self.peers.iter().flatten().map(|peer| peer.gift.unsent.len()).sum();
        self.give = Some(give);
    }

    /// Offers what can be offered now.
    pub(super) fn give_more(&mut self, now: f64) {
        if self.give.is_none() {
            return;
        }
        while let Some(slot) = self.next_to_give() {
            let Some(piece) = self.next_of_pool() else { break };
            let Some(give) = &mut self.give else { return };
            give.owner[piece as usize] = slot;
            give.unsent += 1;
            if let Some(peer) = self.at_mut(slot) {
                peer.gift.kept += 1;
            }
            self.show(now, slot, piece, true);
        }
        if self.give.as_ref().is_some_and(|give| give.pool.is_empty()) {
            self.help_to_end(now);
        }
    }

    /// Takes a piece that no live peer has out of the pool; what others have given meanwhile is passed over.
    fn next_of_pool(&mut self) -> Option<u32> {
        let give = self.give.as_mut()?;
        while let Some(piece) = give.pool.pop() {
            give.in_pool.clear(piece);
            if self.holders[piece as usize] == 0 {
                return Some(piece);
            }
        }
        None
    }

    fn window(&self, service: f64) -> usize {
        let by_rate = match service {
            0.0 => 0.0,
            service => (self.config.horizon / service).min(256.0),
        };
        (self.config.window as usize).max(1 + by_rate as usize)
    }

    /// The peer that is to be offered the next piece, if any has room: whoever keeps least to itself.
    fn next_to_give(&mut self) -> Option<u32> {
        let give = self.give.as_ref()?;
        if give.pool.is_empty() {
            return None;
        }
        let mut best: Option<(u32, usize, u32, u32)> = None;
        let mut least_held = u32::MAX;
        for (slot, peer) in (0u32..).zip(&self.peers) {
            let Some(peer) = peer else { continue };
            let gift = &peer.gift;
            if !gift.interested || gift.full || peer.banned || peer.theirs_count == self.pieces {
                continue;
            }
            // What it is still being sent it cannot have passed on.
            let held = gift
                .kept
                .saturating_sub(u32::try_from(gift.unsent.len()).unwrap_or(u32::MAX));
            least_held = least_held.min(held);
            if gift.unsent.len() >= self.window(gift.service) {
                continue;
            }
            let rank = (gift.kept, gift.unsent.len(), slot, held);
            if best.is_none_or(|best| (rank.0, rank.1) < (best.0, best.1)) {
                best = Some(rank);
            }
        }
        let (_, _, slot, held) = best?;
        let patience = least_held.saturating_mul(2).saturating_add(self.config.window);
        (held <= patience || give.unsent < BUSY).then_some(slot)
    }

    fn show(&mut self, now: f64, slot: u32, piece: u32, window: bool) {
        let (pieces, length) = (self.pieces, self.piece_length);
        let Some(key) = self.key(slot) else { return };
        let Some(peer) = self.at_mut(slot) else { return };
        if !peer.gift.shown.get_or_insert_with(|| Bits::new(pieces)).set(piece) {
            return;
        }
        if window {
            if peer.gift.unsent.is_empty() {
                peer.gift.last_sent = now;
            }
            peer.gift.unsent.push((piece, length, false));
        }
        self.actions.push(Action::Show { peer: key, piece });
    }

    /// After the first pass: who misses only a little is shown that, the rarest first, a window at a time.
    fn help_to_end(&mut self, now: f64) {
        let slots = u32::try_from(self.peers.len()).unwrap_or(u32::MAX);
        for slot in 0..slots {
            while let Some(peer) = self.at(slot) {
                let missing = self.pieces - peer.theirs_count;
                let busy = peer.gift.unsent.len() >= self.window(peer.gift.service);
                if !peer.gift.interested
                    || peer.gift.full
                    || peer.banned
                    || missing == 0
                    || busy
                    || !self.in_end_game(missing)
                {
                    break;
                }
                let Some(piece) = self.rarest_unshown(slot) else { break };
                if let Some(give) = &mut self.give {
                    give.unsent += 1;
                }
                self.show(now, slot, piece, true);
            }
        }
    }

    fn rarest_unshown(&mut self, slot: u32) -> Option<u32> {
        let start = self.rng.below(self.pieces);
        let none = Bits::new(0);
        let peer = self.at(slot)?;
        let shown = peer.gift.shown.as_ref().unwrap_or(&none);
        let mut best: Option<(u16, u32)> = None;
        let mut looked = 0;
        self.have.walk_without([&peer.theirs, shown], start, |piece| {
            let count = self.holders[piece as usize];
            if best.is_none_or(|(least, _)| count < least) {
                best = Some((count, piece));
            }
            looked += 1;
            looked < self.config.candidates
        });
        best.map(|(_, piece)| piece)
    }

    /// Whoever does not get on is shown everything: perhaps it can reach nobody but us.
    pub(super) fn give_to_stalled(&mut self, now: f64) {
        if self.give.is_none() {
            return;
        }
        let slots = u32::try_from(self.peers.len()).unwrap_or(u32::MAX);
        for slot in 0..slots {
            let Some(peer) = self.at(slot) else { continue };
            let gift = &peer.gift;
            let owed = gift.unsent.iter().any(|entry| entry.2);
            let done = peer.theirs_count == self.pieces;
            if !gift.interested || gift.full || owed || done || now - gift.moved < self.config.stall {
                continue;
            }
            let theirs = peer.theirs.clone();
            let unsent = gift.unsent.len();
            if let Some(peer) = self.at_mut(slot) {
                peer.gift.full = true;
                peer.gift.unsent.clear();
            }
            if let Some(give) = &mut self.give {
                give.unsent = give.unsent.saturating_sub(unsent);
            }
            for piece in 0..self.pieces {
                if self.have.get(piece) && !theirs.get(piece) {
                    self.show(now, slot, piece, false);
                }
            }
        }
        self.give_more(now);
    }
}
