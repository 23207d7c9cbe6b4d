//! What a relay asks for across the border of its zone: each piece once for the whole zone. Relays that work for one zone share the
//! pieces by number and give them to each other inside; when nothing gets on, because another one has hung or cannot reach the other
//! side, each takes whatever the zone lacks.
//!
//! A relay shows the other side nothing of what it has, so that nothing is asked of it from there; that is left to the swarm.

use super::bits::Bits;
use super::{Action, PeerKey, Plan};

/// A peer that has not answered when nothing got on is asked for nothing for so many times the stall, at first, ...
const STUCK: f64 = 2.0;
/// ... and at most.
const LONGEST_STUCK: f64 = 16.0;

/// What a relay goes by.
#[derive(Debug)]
pub(super) struct Border {
    /// Pieces that are another relay's to carry.
    not_ours: Bits,
    /// Nothing got on: whatever the zone lacks is taken.
    takes_all: bool,
    /// What is to be had across the border: lately, and at least a stall ago.
    seen: [Bits; 2],
    looked: f64,
}

impl Plan {
    /// This peer is across the border. To be said before it says what it has.
    pub fn set_upstream(&mut self, now: f64, key: PeerKey) {
        let Some(peer) = self.peer_mut(key) else { return };
        peer.upstream = true;
        if self.border.is_none() {
            self.set_share(now, 0, 1);
            self.moved = now;
        }
    }

    /// This peer is a relay of another zone: its owner shows it everything, and it passes nothing on to those that are here.
    pub fn set_relay(&mut self, key: PeerKey) {
        if let Some(peer) = self.peer_mut(key) {
            peer.gift.show_all();
        }
    }

    /// Of `shares` relays this is number `share`: it carries those pieces whose numbers leave that remainder.
    pub fn set_share(&mut self, now: f64, share: u32, shares: u32) {
        let mut not_ours = Bits::new(self.pieces);
        if shares > 1 {
            for piece in (0..self.pieces).filter(|piece| piece % shares != share % shares) {
                not_ours.set(piece);
            }
        }
        if self.border.as_ref().is_some_and(|border| border.not_ours == not_ours) {
            return;
        }
        let none = || Bits::new(self.pieces);
        let seen = self
            .border
            .take()
            .map_or_else(|| [none(), none()], |border| border.seen);
        self.border = Some(Border {
            not_ours,
            takes_all: false,
            seen,
            looked: now,
        });
        self.ask_everybody(now);
    }

    /// Content has come from somebody.
    pub fn something_came(&mut self, now: f64) {
        self.moved = now;
    }

    /// Whether a piece may be asked for across the border.
    pub(super) fn may_cross(&self, piece: u32) -> bool {
        let near = self.holders.get(piece as usize).copied().unwrap_or(0) > 0;
        let Some(border) = &self.border else { return !near };
        !near && (!border.not_ours.get(piece) || border.takes_all && border.seen[1].get(piece))
    }

    /// A piece to ask of a peer across the border: of the own share, then of what nobody carries.
    pub(super) fn next_to_carry(&mut self, slot: u32) -> Option<u32> {
        let start = self.rng.below(self.pieces);
        let theirs = &self.at(slot)?.theirs;
        let border = self.border.as_ref()?;
        let mut found = None;
        let mut look = |piece| {
            if self.may_cross(piece) {
                found = Some(piece);
            }
            found.is_none()
        };
        theirs.walk_without([&self.have, &self.busy, &border.not_ours], start, &mut look);
        if found.is_none() && border.takes_all {
            let mut look = |piece| {
                if self.may_cross(piece) {
                    found = Some(piece);
                }
                found.is_none()
            };
            theirs.walk_without([&self.have, &self.busy], start, &mut look);
        }
        found
    }

    /// Finds out whether a relay gets on.
    pub(super) fn look_at_border(&mut self, now: f64) {
        let stall = self.config.stall;
        let crossing = |plan: &Self| plan.peers.iter().flatten().any(|peer| peer.upstream);
        if self.border.is_none() || self.missing == 0 || !crossing(self) {
            self.moved = now;
            return;
        }
        self.forgive(now);
        let due = self.border.as_ref().is_some_and(|border| now - border.looked >= stall);
        if due {
            let mut seen = Bits::new(self.pieces);
            for peer in self.peers.iter().flatten().filter(|peer| peer.upstream) {
                peer.theirs.ones().for_each(|piece| {
                    seen.set(piece);
                });
            }
            if let Some(border) = &mut self.border {
                border.seen.swap(0, 1);
                border.seen[0] = seen;
                border.looked = now;
            }
        }
        if now - self.moved < stall {
            return;
        }
        self.moved = now;
        if let Some(border) = &mut self.border {
            border.takes_all = true;
        }
        self.pass_over_silent(now);
        self.ask_everybody(now);
    }

    /// Nothing has come although much was asked for: those that owe something are passed over for a while, as long as there is somebody
    /// else across the border.
    fn pass_over_silent(&mut self, now: f64) {
        let slots = u32::try_from(self.peers.len()).unwrap_or(u32::MAX);
        for slot in 0..slots {
            let is_free = |peer: &super::Peer| peer.upstream && peer.stuck.is_none() && peer.outstanding == 0;
            let others = self.peers.iter().flatten().any(|peer| is_free(peer));
            let stall = self.config.stall;
            let Some(peer) = self.at_mut(slot) else { continue };
            if peer.outstanding == 0 || peer.stuck.is_some() || (peer.upstream && !others) {
                continue;
            }
            let wait = (peer.stuck_for * 2.0).clamp(stall * STUCK, stall * LONGEST_STUCK);
            (peer.stuck, peer.stuck_for) = (Some(now + wait), wait);
            let (upstream, theirs) = (peer.upstream, peer.theirs.clone());
            let asked: Vec<u32> = self
                .flights
                .iter()
                .filter(|flight| flight.slot == slot && !flight.arrived)
                .map(|flight| flight.piece)
                .collect();
            if let Some(key) = self.key(slot) {
                self.actions
                    .extend(asked.into_iter().map(|piece| Action::Cancel { peer: key, piece }));
            }
            self.drop_flights(slot);
            if !upstream {
                theirs.ones().for_each(|piece| self.lose_holder(piece));
            }
        }
    }

    /// Those that were passed over long enough are asked again.
    fn forgive(&mut self, now: f64) {
        let slots = u32::try_from(self.peers.len()).unwrap_or(u32::MAX);
        for slot in 0..slots {
            if self
                .at(slot)
                .and_then(|peer| peer.stuck)
                .is_some_and(|until| until <= now)
            {
                self.is_alive(slot);
            }
        }
    }

    /// A peer that was passed over counts again.
    pub(super) fn is_alive(&mut self, slot: u32) {
        let Some(peer) = self.at_mut(slot) else { return };
        if peer.stuck.take().is_none() || peer.upstream {
            return;
        }
        let theirs = peer.theirs.clone();
        for piece in theirs.ones() {
            if let Some(count) = self.holders.get_mut(piece as usize) {
                *count = count.saturating_add(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::Bitmap;
    use crate::plan::PlanConfig;

    const PIECES: u32 = 200;

    fn relay() -> Plan {
        Plan::new(PlanConfig::default(), PIECES, 1000, &Bitmap::new(PIECES), false, 7)
    }

    fn peer(plan: &mut Plan, now: f64, has: &Bitmap, upstream: bool) -> PeerKey {
        let key = plan.add_peer(now);
        if upstream {
            plan.set_upstream(now, key);
        }
        plan.peer_bitfield(now, key, has);
        plan.peer_choking(now, key, false);
        key
    }

    /// Answers whatever is asked of those who answer; what was asked of each.
    fn serve(plan: &mut Plan, now: f64, who: &[PeerKey]) -> Vec<(PeerKey, u32)> {
        let mut asked = Vec::new();
        loop {
            let mut actions = Vec::new();
            plan.take_actions(&mut actions);
            let requests: Vec<(PeerKey, u32)> = actions
                .into_iter()
                .filter_map(|action| match action {
                    Action::Request { peer, piece } => Some((peer, piece)),
                    _ => None,
                })
                .collect();
            if requests.is_empty() {
                return asked;
            }
            asked.extend(&requests);
            for (peer, piece) in requests.into_iter().filter(|(peer, _)| who.contains(peer)) {
                plan.something_came(now);
                assert!(plan.piece_arrived(now, peer, piece));
                plan.piece_verified(now, piece);
            }
        }
    }

    fn of(asked: &[(PeerKey, u32)], key: PeerKey) -> BTreeSet<u32> {
        let pieces: Vec<u32> = asked
            .iter()
            .filter(|(peer, _)| *peer == key)
            .map(|(_, piece)| *piece)
            .collect();
        let once: BTreeSet<u32> = pieces.iter().copied().collect();
        assert_eq!(pieces.len(), once.len(), "nothing is carried twice");
        once
    }

    #[test]
    fn each_relay_carries_its_share_and_leaves_the_rest_to_the_other() {
        // contract: p2p#22
        let mut plan = relay();
        let up = peer(&mut plan, 0.0, &Bitmap::full(PIECES), true);
        plan.set_share(0.0, 1, 2);
        let mut asked = of(&serve(&mut plan, 0.0, &[up]), up);
        // The first requests were made before it had heard of the other one.
        asked.retain(|piece| piece % 2 == 0);
        assert!(asked.len() <= 16, "{asked:?}");
        // What the other one brings is taken from there, and not carried once more.
        let other = peer(&mut plan, 0.5, &Bitmap::new(PIECES), false);
        for piece in (0..PIECES).filter(|piece| piece % 2 == 0 && !asked.contains(piece)) {
            plan.peer_have(0.5, other, piece);
        }
        let rest = serve(&mut plan, 0.5, &[other]);
        assert!(of(&rest, up).is_empty() && plan.is_complete());
    }

    #[test]
    fn when_the_other_is_gone_everything_is_carried() {
        // contract: p2p#21
        let mut plan = relay();
        let up = peer(&mut plan, 0.0, &Bitmap::new(PIECES), true);
        plan.set_share(0.0, 0, 2);
        for piece in 0..PIECES {
            plan.peer_have(0.1, up, piece);
        }
        let asked = of(&serve(&mut plan, 0.1, &[up]), up);
        assert!(
            asked.len() == 100 && asked.iter().all(|piece| piece % 2 == 0),
            "{asked:?}"
        );
        plan.set_share(0.2, 0, 1);
        assert_eq!(of(&serve(&mut plan, 0.2, &[up]), up).len(), 100);
        assert!(plan.is_complete());
    }

    #[test]
    fn when_the_other_hangs_its_share_is_carried_after_a_while() {
        // contract: p2p#21
        let mut plan = relay();
        let up = peer(&mut plan, 0.0, &Bitmap::new(PIECES), true);
        plan.set_share(0.0, 0, 2);
        let other = peer(&mut plan, 0.0, &Bitmap::new(PIECES), false);
        for piece in 0..PIECES {
            plan.peer_have(0.1, up, piece);
        }
        // It has said that it has some, and then says nothing.
        for piece in (1..41).step_by(2) {
            plan.peer_have(0.1, other, piece);
        }
        serve(&mut plan, 0.1, &[up]);
        let mut at = 0.2;
        while at < 2.0 {
            plan.tick(at);
            assert!(of(&serve(&mut plan, at, &[up]), up).is_empty(), "too early: {at}");
            at += 0.1;
        }
        let mut carried = BTreeSet::new();
        while at < 4.5 && !plan.is_complete() {
            plan.tick(at);
            carried.extend(of(&serve(&mut plan, at, &[up]), up));
            at += 0.1;
        }
        assert!(
            plan.is_complete() && carried.len() == 100,
            "{at}: {} left",
            plan.missing()
        );
        // It goes on: what it says counts again.
        plan.peer_have(5.0, other, 51);
        assert!(plan.at(other.slot).is_some_and(|peer| peer.stuck.is_none()));
    }

    #[test]
    fn a_relay_of_another_zone_is_no_part_of_the_first_copy() {
        let mut plan = Plan::new(PlanConfig::default(), PIECES, 1000, &Bitmap::full(PIECES), true, 7);
        let relay = plan.add_peer(0.0);
        plan.set_relay(relay);
        plan.peer_ready(0.0, relay);
        let own = plan.add_peer(0.0);
        plan.peer_ready(0.0, own);
        let mut actions = Vec::new();
        plan.take_actions(&mut actions);
        assert!(!actions.is_empty());
        assert!(
            actions
                .iter()
                .all(|action| matches!(action, Action::Show { peer, .. } if *peer == own))
        );
    }
}
