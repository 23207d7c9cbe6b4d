//! The asking side: rarest first, woken by what neighbours report, bounded in all and per peer, with a narrow end game.

use super::{Action, Flight, Peer, PeerKey, Plan};

/// How many pieces that only one peer has may be asked for from it beyond its share.
const EXCLUSIVE: u32 = 8;
/// How many times a piece is asked for at once in the end game.
const COPIES: usize = 3;
/// Weight of the newest measure.
const NEW: f64 = 0.2;
/// A peer is taken to have nothing waiting when a piece takes less than this many times the least, ...
const QUIET: f64 = 1.5;
/// ... and to have much waiting when it takes more than this many times.
const BUSY: f64 = 3.0;
/// What was least is forgotten so slowly.
const LEAST_GROWS: f64 = 1.01;
/// A peer is slow when its pieces take this many times the usual time ...
const SLOW: f64 = 3.0;
/// ... and then one in so many of the pieces asked for may be asked of such peers.
const SLOW_SHARE: u32 = 4;

/// How much is asked of a peer at a time, by what it has sent as it should be: who sends rubbish is found out with little of it.
fn trusted(good: u32) -> u32 {
    good.saturating_mul(2).saturating_add(4)
}

impl Plan {
    /// All of a piece has come from a peer. True if it is worth verifying; false if it is had, or being verified, already.
    #[must_use]
    pub fn piece_arrived(&mut self, now: f64, key: PeerKey, piece: u32) -> bool {
        if self.peer(key).is_some() {
            self.is_alive(key.slot);
        }
        let Some(at) = self.flight(key, piece) else {
            return false;
        };
        let since = self.flights[at].since;
        self.measure(now, key, since);
        let taken = self.have.get(piece) || self.flights.iter().any(|other| other.piece == piece && other.arrived);
        if taken {
            self.flights.swap_remove(at);
        } else {
            self.flights[at].arrived = true;
        }
        if let Some(peer) = self.peer_mut(key) {
            peer.outstanding = peer.outstanding.saturating_sub(1);
        }
        self.ask(now, key.slot);
        !taken
    }

    /// The first bytes of a piece have come from a peer.
    pub fn piece_started(&mut self, key: PeerKey, piece: u32) {
        if let Some(at) = self.flight(key, piece) {
            self.flights[at].started = true;
        }
    }

    /// A piece that has arrived is what it should be, and is kept. Counts a piece once, however often it comes.
    pub fn piece_verified(&mut self, now: f64, piece: u32) {
        if piece >= self.pieces {
            return;
        }
        let mut at = 0;
        while let Some(flight) = self.flights.get(at).copied() {
            if flight.piece != piece {
                at += 1;
                continue;
            }
            self.flights.swap_remove(at);
            if flight.arrived {
                if let Some(peer) = self.at_mut(flight.slot) {
                    peer.good = peer.good.saturating_add(1);
                }
                continue;
            }
            if let Some(key) = self.key(flight.slot) {
                self.actions.push(Action::Cancel { peer: key, piece });
            }
            if let Some(peer) = self.at_mut(flight.slot) {
                peer.outstanding = peer.outstanding.saturating_sub(1);
            }
        }
        self.busy.clear(piece);
        if !self.have.set(piece) {
            return;
        }
        self.missing -= 1;
        self.actions.push(Action::Announce { piece });
        if self.missing == 0 {
            self.actions.push(Action::Complete);
        } else {
            self.ask_idle(now);
        }
    }

    /// A piece that has arrived from this peer is not what it should be: it is asked for once more, from somebody else.
    pub fn piece_bad(&mut self, now: f64, key: PeerKey, piece: u32) {
        self.forget(key, piece);
        self.not_theirs(key.slot, key, piece);
        let limit = self.config.bad_pieces;
        if let Some(peer) = self.peer_mut(key) {
            peer.bad += 1;
            if peer.bad >= limit && !peer.banned {
                peer.banned = true;
                self.actions.push(Action::Ban { peer: key });
            }
        }
        self.ask_everybody(now);
    }

    /// A piece that has arrived cannot be kept (a full disk); it may be asked for again.
    pub fn piece_lost(&mut self, now: f64, key: PeerKey, piece: u32) {
        self.forget(key, piece);
        self.ask_everybody(now);
    }

    /// A peer will not send what it was asked for.
    pub fn piece_refused(&mut self, now: f64, key: PeerKey, piece: u32) {
        if self.flight(key, piece).is_none() {
            return;
        }
        self.forget(key, piece);
        if let Some(peer) = self.peer_mut(key) {
            peer.outstanding = peer.outstanding.saturating_sub(1);
        }
        self.not_theirs(key.slot, key, piece);
        self.ask_everybody(now);
    }

    /// Pieces that this peer was asked for and that have not come.
    #[must_use]
    pub fn asked_of(&self, key: PeerKey) -> u32 {
        self.peer(key).map_or(0, |peer| peer.outstanding)
    }

    fn flight(&self, key: PeerKey, piece: u32) -> Option<usize> {
        self.peer(key)?;
        self.flights
            .iter()
            .position(|flight| flight.slot == key.slot && flight.piece == piece && !flight.arrived)
    }

    /// Removes what one peer was asked for, arrived or not.
    fn forget(&mut self, key: PeerKey, piece: u32) {
        self.flights
            .retain(|flight| flight.piece != piece || flight.slot != key.slot);
        if self.flights.iter().all(|flight| flight.piece != piece) {
            self.busy.clear(piece);
        }
    }

    fn not_theirs(&mut self, slot: u32, key: PeerKey, piece: u32) {
        let Some(peer) = self.peer_mut(key) else { return };
        debug_assert_eq!(slot, key.slot);
        if peer.theirs.clear(piece) {
            peer.theirs_count -= 1;
            if peer.is_near() {
                self.lose_holder(piece);
            }
        }
    }

    /// Drops whatever a peer was asked for and has not sent. What has arrived stays: it is being verified.
    pub(super) fn drop_flights(&mut self, slot: u32) {
        let mut at = 0;
        while let Some(flight) = self.flights.get(at).copied() {
            if flight.slot != slot || flight.arrived {
                at += 1;
                continue;
            }
            self.flights.swap_remove(at);
            if self.flights.iter().all(|other| other.piece != flight.piece) {
                self.busy.clear(flight.piece);
            }
        }
        if let Some(peer) = self.at_mut(slot) {
            peer.outstanding = 0;
        }
    }

    fn measure(&mut self, now: f64, key: PeerKey, since: f64) {
        let smooth = |old: f64, new: f64| {
            if old == 0.0 { new } else { old * (1.0 - NEW) + new * NEW }
        };
        self.usual = self.usual * (1.0 - NEW / 2.0) + (now - since) * NEW / 2.0;
        self.service = smooth(self.service, (now - self.last_arrival.max(since)).max(1e-6));
        self.last_arrival = now;
        let most = f64::from(self.config.per_peer);
        let mut deepest = 1.0;
        if let Some(peer) = self.peer_mut(key) {
            let latency = now - since;
            peer.latency = smooth(peer.latency, latency);
            // Some peers answer in beats, others are far away: they are asked for more as long as that does not take longer.
            peer.least = if peer.least == 0.0 {
                latency
            } else {
                latency.min(peer.least * LEAST_GROWS)
            };
            if latency > peer.least * BUSY + 0.01 {
                peer.useful = (peer.useful - (peer.useful / 4.0).max(0.5)).max(1.0);
            } else if latency < peer.least * QUIET + 0.005 && f64::from(peer.outstanding) + 1.0 > peer.useful {
                peer.useful = (peer.useful + (peer.useful / 2.0).max(0.5)).min(most);
            }
            deepest = peer.useful;
            peer.service = smooth(peer.service, (now - peer.last_arrival.max(since)).max(1e-6));
            peer.last_arrival = now;
        }
        self.deepest = deepest.max(self.deepest * 0.99);
    }

    /// How many pieces may be asked for in all.
    fn bound(&self) -> u32 {
        let most = u32::try_from(self.config.outstanding_bytes / self.piece_length)
            .unwrap_or(u32::MAX)
            .max(2);
        let by_rate = match self.service {
            0.0 => 0,
            service => (self.config.horizon * 1.5 / service).min(f64::from(most)) as u32,
        };
        let by_depth = (self.deepest * 1.5) as u32;
        self.config.outstanding.max(by_rate).max(by_depth).min(most)
    }

    /// How many pieces may be asked for from a peer: what it sends within the horizon, and one.
    fn depth(&self, slot: u32) -> u32 {
        let (service, useful, good) = self
            .at(slot)
            .map_or((0.0, 1.0, 0), |peer| (peer.service, peer.useful, peer.good));
        let by_rate = match service {
            0.0 => 2,
            service if service > self.config.horizon => 1,
            service => {
                1 + (self.config.horizon / service)
                    .ceil()
                    .min(f64::from(self.config.per_peer)) as u32
            }
        };
        by_rate
            .max(useful as u32)
            .min(self.config.per_peer)
            .min(self.credit(slot, good))
    }

    /// How many pieces that only this peer has may be asked for from it.
    fn exclusive(&self, slot: u32) -> u32 {
        let good = self.at(slot).map_or(0, |peer| peer.good);
        EXCLUSIVE.max(self.depth(slot)).min(self.credit(slot, good))
    }

    /// What a peer may owe, by what it has sent rightly: pieces that have come from it and are not verified yet count, so that one who sends
    /// wrong ones faster than they are looked at gets no more of them in.
    fn credit(&self, slot: u32, good: u32) -> u32 {
        let trusted = trusted(good);
        if trusted >= self.config.per_peer.max(EXCLUSIVE) {
            return trusted;
        }
        let unseen = self
            .flights
            .iter()
            .filter(|flight| flight.arrived && flight.slot == slot);
        trusted.saturating_sub(unseen.count() as u32)
    }

    fn is_slow(&self, slot: u32) -> bool {
        self.at(slot).is_some_and(|peer| peer.latency > SLOW * self.usual)
    }

    /// Whether enough is asked of slow peers already: they must not take all the room there is.
    fn slow_ones_have_enough(&self) -> bool {
        let most = (self.bound() / SLOW_SHARE).max(1);
        let of_slow = self
            .flights
            .iter()
            .filter(|flight| !flight.arrived && !self.is_upstream(flight.slot) && self.is_slow(flight.slot));
        of_slow.count() >= most as usize
    }

    fn may_ask(&self, slot: u32) -> bool {
        let may = |peer: &Peer| !peer.choking && !peer.banned && peer.stuck.is_none();
        self.missing > 0 && self.at(slot).is_some_and(may)
    }

    fn is_upstream(&self, slot: u32) -> bool {
        self.at(slot).is_some_and(|peer| peer.upstream)
    }

    fn in_flight(&self) -> u32 {
        u32::try_from(self.flights.len()).unwrap_or(u32::MAX)
    }

    fn send(&mut self, now: f64, slot: u32, piece: u32) {
        let Some(key) = self.key(slot) else { return };
        self.busy.set(piece);
        self.flights.push(Flight {
            piece,
            slot,
            since: now,
            started: false,
            arrived: false,
        });
        if let Some(peer) = self.at_mut(slot) {
            peer.outstanding += 1;
        }
        self.actions.push(Action::Request { peer: key, piece });
    }

    /// A peer has got a piece that is missing here.
    pub(super) fn wake(&mut self, now: f64, slot: u32, piece: u32) {
        if !self.may_ask(slot) {
            return;
        }
        let outstanding = self.at(slot).map_or(0, |peer| peer.outstanding);
        let upstream = self.is_upstream(slot);
        let only = match upstream {
            true => self.may_cross(piece),
            false => self.holders.get(piece as usize) == Some(&1),
        };
        if only && !self.busy.get(piece) && outstanding < self.exclusive(slot) && self.room_in_bytes() {
            // Shown to us alone, as far as we know: the sooner it is here, the sooner others get it from us.
            self.send(now, slot, piece);
        } else if self.busy.get(piece) && !upstream {
            self.reroute(now, slot, piece);
        } else if outstanding < self.depth(slot) {
            self.ask(now, slot);
        }
    }

    /// One more peer has a piece that another was asked for and has not begun to send: the wait is moved to the newcomer as often as makes
    /// all who wait spread evenly over all who have it. So a piece spreads like a rumour, and not out of one uplink.
    fn reroute(&mut self, now: f64, slot: u32, piece: u32) {
        let mut of_it = self
            .flights
            .iter()
            .enumerate()
            .filter(|(_, flight)| flight.piece == piece);
        let (Some((at, flight)), None) = (of_it.next(), of_it.next()) else {
            return;
        };
        let flight = *flight;
        if flight.started || flight.arrived || flight.slot == slot {
            return;
        }
        let outstanding = self.at(slot).map_or(0, |peer| peer.outstanding);
        if outstanding >= self.depth(slot) {
            return;
        }
        let speed = |slot| match self.at(slot).map_or(0.0, |peer: &Peer| peer.latency) {
            0.0 => 1.0 / self.usual.max(1e-6),
            latency => 1.0 / latency.max(1e-6),
        };
        let others = f64::from(self.holders.get(piece as usize).copied().unwrap_or(1)) - 1.0;
        let (new, old) = (speed(slot), speed(flight.slot));
        let chance = new / (new + old * others.max(1.0));
        if f64::from(self.rng.below(1 << 16)) >= chance * f64::from(1u32 << 16) {
            return;
        }
        self.flights.swap_remove(at);
        if let Some(key) = self.key(flight.slot) {
            self.actions.push(Action::Cancel { peer: key, piece });
        }
        if let Some(peer) = self.at_mut(flight.slot) {
            peer.outstanding = peer.outstanding.saturating_sub(1);
        }
        self.send(now, slot, piece);
    }

    fn room_in_bytes(&self) -> bool {
        let most = self.config.outstanding_bytes / self.piece_length;
        u64::from(self.in_flight()) < most.max(2)
    }

    /// Asks a peer for as much as it may be asked for.
    pub(super) fn ask(&mut self, now: f64, slot: u32) {
        while self.may_ask(slot) {
            let upstream = self.is_upstream(slot);
            if !upstream && self.is_slow(slot) && self.slow_ones_have_enough() {
                return;
            }
            let outstanding = self.at(slot).map_or(0, |peer| peer.outstanding);
            if outstanding >= self.depth(slot) || self.in_flight() >= self.bound() {
                return;
            }
            let next = if upstream {
                self.next_to_carry(slot)
            } else {
                self.rarest(slot)
            };
            let piece = match next {
                Some(piece) => piece,
                // Nothing is carried across the border twice.
                None if upstream => return,
                None => match self.again(now, slot) {
                    Some(piece) if outstanding == 0 => piece,
                    _ => return,
                },
            };
            self.send(now, slot, piece);
        }
    }

    /// Asks peers in turn, for as long as there is room.
    pub(super) fn ask_everybody(&mut self, now: f64) {
        let slots = u32::try_from(self.peers.len()).unwrap_or(u32::MAX);
        for step in 0..slots {
            if self.missing == 0 || self.in_flight() >= self.bound() {
                return;
            }
            self.ask(now, (self.turn + step) % slots);
        }
        if slots > 0 {
            self.turn = (self.turn + 1) % slots;
        }
    }

    /// Room has become free: somebody who is asked for nothing gets it.
    fn ask_idle(&mut self, now: f64) {
        let slots = u32::try_from(self.peers.len()).unwrap_or(u32::MAX);
        for step in 0..slots {
            if self.in_flight() >= self.bound() {
                return;
            }
            let slot = (self.turn + step) % slots;
            if self.at(slot).is_some_and(|peer| peer.outstanding == 0 && !peer.choking) {
                self.turn = (slot + 1) % slots;
                self.ask(now, slot);
            }
        }
    }

    /// The rarest of some random pieces that a peer has and we lack.
    fn rarest(&mut self, slot: u32) -> Option<u32> {
        let start = self.rng.below(self.pieces);
        let peer = self.at(slot)?;
        let mut best: Option<(u16, u32)> = None;
        let mut looked = 0;
        let holders = &self.holders;
        peer.theirs.walk_without([&self.have, &self.busy], start, |piece| {
            let count = holders.get(piece as usize).copied().unwrap_or(u16::MAX);
            if best.is_none_or(|(least, _)| count < least) {
                best = Some((count, piece));
            }
            looked += 1;
            looked < self.config.candidates && count > 1
        });
        best.map(|(_, piece)| piece)
    }

    /// In the end game: a piece that somebody else takes long to send, asked for least often of those.
    fn again(&mut self, now: f64, slot: u32) -> Option<u32> {
        if !self.in_end_game(self.missing) {
            return None;
        }
        let patience = self.config.endgame_patience * self.usual + self.config.endgame_slack;
        let theirs = &self.at(slot)?.theirs;
        let mut late: Vec<(usize, u32)> = Vec::new();
        for flight in &self.flights {
            let known = late.iter().any(|(_, piece)| *piece == flight.piece);
            if known || flight.arrived || now - flight.since <= patience || !theirs.get(flight.piece) {
                continue;
            }
            let mut copies = 0;
            let mut open = true;
            let mut newest = flight.since;
            for other in self.flights.iter().filter(|other| other.piece == flight.piece) {
                copies += 1;
                open &= other.slot != slot && !other.arrived;
                newest = newest.max(other.since);
            }
            // Whoever it is asked of gets the usual time; beyond some copies, much more than that.
            let waits = if copies < COPIES { patience } else { patience * 10.0 };
            if open && now - newest > waits {
                late.push((copies, flight.piece));
            }
        }
        let least = late.iter().map(|(copies, _)| *copies).min()?;
        late.retain(|(copies, _)| *copies == least);
        let pick = self.rng.below(u32::try_from(late.len()).unwrap_or(u32::MAX));
        late.get(pick as usize).map(|(_, piece)| *piece)
    }
}
