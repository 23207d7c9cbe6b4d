//! Zones: which one an agent is in, and which instances relay for it.
//!
//! A zone is made of cloud areas. Instances say in the store which zone they serve, of which areas it is made, and whether they relay for
//! it; an agent says its area when it opens its link. Areas that no instance names belong to the default zone, whose name is empty. A
//! zone counts as having relays for as long as one says so, so that nobody goes round one that is just being started again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use gse_core::config::Problems;
use gse_proto::state::NodeInfo;
use serde::{Deserialize, Serialize};

use crate::Node;

/// Name of a zone; empty: the default one.
pub type Zone = Arc<str>;

/// Longest name.
const MAX_NAME: usize = 64;

/// The zone that this instance serves.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ZoneConfig {
    /// Its name, the same for all instances that serve it; empty: the default one, in which are all agents that no other zone has.
    pub name: String,
    /// Cloud areas that it is made of.
    pub cloud_areas: Vec<i32>,
    /// Whether this instance carries content across the border of its zone, once for all agents in it. Needs a cache.
    pub relay: bool,
    /// `host:port` where relays of other zones reach the peer listener; empty: as agents do.
    pub advertise: Vec<String>,
}

impl ZoneConfig {
    /// Says what can't be.
    pub fn validate(&self, has_cache: bool, problems: &mut Problems) {
        if self.name.len() > MAX_NAME || self.name.contains(char::is_control) {
            problems.push(
                "zone.name",
                "must have at most 64 characters, none of them a control character",
            );
        }
        if self.name.is_empty() && !self.cloud_areas.is_empty() {
            problems.push(
                "zone.cloud_areas",
                "the default zone has the areas that no other zone names: give the zone a name (zone.name)",
            );
        }
        if self.relay && !has_cache {
            problems.push(
                "zone.relay",
                "a relay keeps what it carries for a while: say where (cache.dir)",
            );
        }
    }
}

/// What is known of all zones.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Zones {
    areas: BTreeMap<i32, Zone>,
    relayed: BTreeSet<Zone>,
}

impl Zones {
    /// Of what instances say of themselves. Of two that claim an area, the zone that comes first by its name has it.
    pub fn new<'a>(infos: impl Iterator<Item = &'a NodeInfo>) -> Self {
        let mut zones = Self::default();
        for info in infos {
            let zone: Zone = info.zone.as_str().into();
            for area in &info.cloud_areas {
                let has = zones.areas.entry(*area).or_insert_with(|| Arc::clone(&zone));
                if *has > zone {
                    *has = Arc::clone(&zone);
                }
            }
            if info.relay && !info.draining {
                zones.relayed.insert(zone);
            }
        }
        zones
    }

    /// The zone of a cloud area.
    #[must_use]
    pub fn of_area(&self, area: i32) -> Zone {
        self.areas.get(&area).cloned().unwrap_or_default()
    }

    /// Whether content gets into this zone through relays.
    #[must_use]
    pub fn has_relays(&self, zone: &str) -> bool {
        self.relayed.contains(zone)
    }

    /// Whether there is any zone with relays.
    #[must_use]
    pub fn is_divided(&self) -> bool {
        !self.relayed.is_empty()
    }
}

/// Where a member of swarms is, and how it is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reach {
    /// Its zone.
    pub zone: Zone,
    /// For members of its zone.
    pub inner: Vec<String>,
    /// For members of others, if that is another address.
    pub outer: Vec<String>,
}

impl Reach {
    /// Where somebody in a zone reaches it.
    #[must_use]
    pub fn from_zone(&self, zone: &str) -> &[String] {
        if *self.zone == *zone || self.outer.is_empty() {
            &self.inner
        } else {
            &self.outer
        }
    }
}

/// Reads anew what instances say; false when the store does not answer.
pub async fn look(node: &Node) -> bool {
    match node.others.all(node.store.raw()).await {
        Ok(table) => {
            let zones = Zones::new(table.values());
            let mut known = node.zones.lock();
            if **known != zones {
                *known = Arc::new(zones);
            }
            true
        }
        Err(error) => {
            tracing::debug!(%error, "zones can't be read; those that are known count");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(zone: &str, areas: &[i32], relay: bool) -> NodeInfo {
        NodeInfo {
            zone: zone.into(),
            cloud_areas: areas.to_vec(),
            relay,
            ..NodeInfo::default()
        }
    }

    #[test]
    fn an_area_belongs_to_the_zone_that_names_it() {
        let infos = [
            info("", &[], true),
            info("south", &[7, 8], true),
            info("north", &[8, 9], false),
        ];
        let zones = Zones::new(infos.iter());
        let of = |area| zones.of_area(area).to_string();
        assert_eq!(
            (of(0), of(7), of(8), of(9)),
            ("".into(), "south".into(), "north".into(), "north".into())
        );
        assert!(zones.has_relays("") && zones.has_relays("south") && !zones.has_relays("north"));
        assert!(zones.is_divided() && !Zones::default().is_divided());
        let stopping = NodeInfo {
            draining: true,
            ..info("south", &[7], true)
        };
        assert!(!Zones::new([stopping].iter()).is_divided());
    }

    #[test]
    fn who_is_in_another_zone_uses_the_other_address() {
        let reach = Reach {
            zone: "south".into(),
            inner: vec!["in:1".into()],
            outer: vec!["out:1".into()],
        };
        assert_eq!(
            (reach.from_zone("south"), reach.from_zone("")),
            (&["in:1".into()][..], &["out:1".into()][..])
        );
        let plain = Reach { outer: vec![], ..reach };
        assert_eq!(plain.from_zone(""), ["in:1"]);
    }
}
