//! Which relays a swarm needs, and which were asked.

use std::collections::BTreeSet;

use super::{ManifestId, Swarms, member_key};
use crate::zone::{Zone, Zones};

/// Relays that work for one zone in one swarm at most.
const RELAYS: usize = 2;

/// A relay that was asked to take part.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) zone: Zone,
    /// It can't.
    pub(super) failed: bool,
    /// What it was told.
    pub(super) told: Option<(u32, u32)>,
}

/// What a relay is to carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its name.
    pub relay: String,
    /// Which pieces are its own, see [`gse_bt::Swarm::set_share`].
    pub share: u32,
    /// How many share them; 0: nothing is to be carried, it only offers.
    pub shares: u32,
}

impl Swarms {
    /// A relay says that it can't take part: another one is asked.
    pub fn relay_failed(&self, id: &ManifestId, name: &str) {
        if let Some(swarm) = self.table.lock().get_mut(id) {
            if let Some(asked) = swarm.asked.get_mut(name) {
                asked.failed = true;
            }
            swarm.unsettled = true;
            swarm.remove(name);
        }
    }

    /// A relay has come, or come again: it has to be asked anew.
    pub fn relay_came(&self, name: &str) {
        for swarm in self.table.lock().values_mut() {
            swarm.unsettled = true;
            if let Some(asked) = swarm.asked.get_mut(name) {
                asked.told = None;
            }
        }
    }

    /// A relay is not there any more.
    pub fn relay_gone(&self, name: &str) {
        for swarm in self.table.lock().values_mut() {
            if swarm.asked.remove(name).is_some() {
                swarm.unsettled = true;
                swarm.remove(name);
            }
        }
    }

    /// Which relays a swarm needs, of those that are there (name and zone): some of each zone that the content has to get into, and of
    /// those where it is, unless it stays there. Those that have been told so are left out unless all are to be told `again`.
    #[must_use]
    pub fn relays(&self, id: &ManifestId, zones: &Zones, there: &[(String, Zone)], again: bool) -> Vec<Part> {
        let mut table = self.table.lock();
        let Some(swarm) = table.get_mut(id) else { return vec![] };
        if !again && !std::mem::take(&mut swarm.unsettled) {
            return vec![];
        }
        let homes = swarm.homes();
        if homes.is_empty() || swarm.secret.borrow().is_none() {
            return vec![];
        }
        let members = swarm.members.values().filter(|member| !member.relay);
        let far: BTreeSet<Zone> = members
            .filter_map(|member| member.zone.clone())
            .filter(|zone| !homes.contains(zone) && zones.has_relays(zone))
            .collect();
        if far.is_empty() {
            return vec![];
        }
        let mut parts = Vec::new();
        for zone in far.iter().chain(&homes) {
            let usable = there
                .iter()
                .filter(|(name, of)| of == zone && swarm.asked.get(name).is_none_or(|asked| !asked.failed));
            // Each swarm has its own order of them, so that all of them have work.
            let mut names: Vec<([u8; 32], &String)> = usable.map(|(name, _)| (member_key(id, name), name)).collect();
            names.sort_unstable();
            names.truncate(RELAYS);
            let count = u32::try_from(names.len()).unwrap_or(u32::MAX);
            for (share, (_, name)) in (0..).zip(names) {
                let shares = if homes.contains(zone) { 0 } else { count };
                let asked = swarm.asked.entry(name.clone()).or_insert_with(|| Asked {
                    zone: Zone::clone(zone),
                    failed: false,
                    told: None,
                });
                if again || asked.told != Some((share, shares)) {
                    asked.told = Some((share, shares));
                    let relay = name.clone();
                    parts.push(Part { relay, share, shares });
                }
            }
        }
        parts
    }

    /// Whether other relays may be needed than those that were asked.
    #[must_use]
    pub fn is_unsettled(&self, id: &ManifestId) -> bool {
        self.table.lock().get(id).is_some_and(|swarm| swarm.unsettled)
    }

    /// Relays that were asked to take part in a swarm.
    #[must_use]
    pub fn asked(&self, id: &ManifestId) -> Vec<String> {
        let table = self.table.lock();
        table
            .get(id)
            .map_or_else(Vec::new, |swarm| swarm.asked.keys().cloned().collect())
    }
}
