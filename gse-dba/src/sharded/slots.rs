//! Keys to slots to groups, as plain values: nothing here knows a connection.

pub(crate) use gse_core::store::slot;

use crate::config::sharded::Group;

/// As many as Redis Cluster has, so that data can move there.
pub(crate) const SLOTS: usize = 16_384;

/// Which group serves which slot. Every slot is served by exactly one.
#[derive(Clone, Debug)]
pub(crate) struct SlotMap {
    owners: Box<[u16]>,
    groups: usize,
    /// Servers refuse a command whose keys are in several slots, whether they serve them all or not.
    strict: bool,
}

impl SlotMap {
    /// By what the groups say, or equal parts when none says anything.
    pub(crate) fn of(groups: &[Group]) -> Result<Self, String> {
        if groups.is_empty() || groups.len() > 1000 {
            return Err("must name at least one group and at most a thousand".into());
        }
        if groups.iter().all(|g| g.slots.is_empty()) {
            let owners = (0..SLOTS).map(|s| (s * groups.len() / SLOTS) as u16).collect();
            return Ok(Self {
                owners,
                groups: groups.len(),
                strict: false,
            });
        }
        let mut owners = vec![None; SLOTS];
        for (i, g) in groups.iter().enumerate() {
            for range in &g.slots {
                let (from, to) = range.split_once('-').unwrap_or((range, range));
                let number = |t: &str| t.trim().parse::<usize>().ok().filter(|n| *n < SLOTS);
                let (Some(from), Some(to)) = (number(from), number(to)) else {
                    return Err(format!(
                        "group {:?}: {range:?} is no range of slots from 0 to 16383",
                        g.name
                    ));
                };
                if from > to {
                    return Err(format!("group {:?}: {range:?} ends before it begins", g.name));
                }
                for (slot, owner) in owners.iter_mut().enumerate().take(to + 1).skip(from) {
                    if let Some(other) = owner.replace(i as u16) {
                        let other = groups.get(usize::from(other)).map_or("", |o| &o.name);
                        return Err(format!("slot {slot} is given to {other:?} and to {:?}", g.name));
                    }
                }
            }
        }
        match owners.iter().position(Option::is_none) {
            Some(slot) => Err(format!("slot {slot} is given to no group")),
            None => Ok(Self {
                owners: owners.into_iter().flatten().collect(),
                groups: groups.len(),
                strict: false,
            }),
        }
    }

    /// The slots of a cluster, by the group that serves each.
    pub(crate) fn of_cluster(owners: Vec<u16>, groups: usize) -> Self {
        Self {
            owners: owners.into(),
            groups,
            strict: true,
        }
    }

    /// A copy in which one slot has another owner.
    pub(crate) fn with(&self, slot: u16, owner: u16) -> Self {
        let mut map = self.clone();
        if let Some(o) = map.owners.get_mut(usize::from(slot)) {
            *o = owner;
        }
        map
    }

    /// Whether a server takes only commands whose keys are in one slot.
    pub(crate) fn is_strict(&self) -> bool {
        self.strict
    }

    /// Slots of which a command of several keys may have the same part: a group's, or each for itself.
    pub(crate) fn part(&self, slot: u16) -> usize {
        if self.strict {
            usize::from(slot)
        } else {
            self.group(slot)
        }
    }

    /// The group that serves a slot.
    pub(crate) fn group(&self, slot: u16) -> usize {
        self.owners.get(usize::from(slot)).copied().map_or(0, usize::from)
    }

    pub(crate) fn groups(&self) -> usize {
        self.groups
    }

    /// Slots of each group, as counts.
    pub(crate) fn counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.groups];
        for owner in &self.owners {
            if let Some(c) = counts.get_mut(usize::from(*owner)) {
                *c += 1;
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(slots: &[&[&str]]) -> Vec<Group> {
        slots
            .iter()
            .enumerate()
            .map(|(i, s)| Group {
                name: format!("g{i}"),
                slots: s.iter().map(|s| (*s).to_owned()).collect(),
                ..Group::default()
            })
            .collect()
    }

    #[test]
    fn slots_are_those_of_redis() {
        // Checked against CLUSTER KEYSLOT of a real server; a real one is asked for many more in the tests over sockets.
        assert_eq!(slot(b"123456789"), 12739);
        assert_eq!(slot(b"foo"), 12182);
        assert_eq!(slot(b"{foo}.bar"), slot(b"foo"));
        assert_eq!(slot(b"x{foo}.{bar}"), slot(b"foo"));
        assert_eq!(slot(b"{{foo}}"), slot(b"{foo"));
        assert_eq!(slot(b""), 0);
    }

    #[test]
    fn equal_parts_cover_every_slot() {
        for n in 1..20 {
            let map = SlotMap::of(&groups(&vec![&[][..]; n])).unwrap();
            let counts = map.counts();
            assert_eq!(counts.iter().sum::<usize>(), SLOTS);
            assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
            assert!((0..SLOTS as u16).all(|s| map.group(s) < n));
        }
    }

    #[test]
    fn ranges_must_cover_every_slot_once() {
        let map = SlotMap::of(&groups(&[&["0-99", "200-16383"], &["100-199"]])).unwrap();
        assert_eq!(
            (map.group(99), map.group(100), map.group(199), map.group(200)),
            (0, 1, 1, 0)
        );
        for bad in [
            &[&["0-99"][..], &["100-16382"]][..],
            &[&["0-100"], &["100-16383"]],
            &[&["0-16384"]],
            &[&["5-4", "0-16383"]],
            &[&["x"]],
        ] {
            assert!(SlotMap::of(&groups(bad)).is_err(), "{bad:?}");
        }
    }
}
