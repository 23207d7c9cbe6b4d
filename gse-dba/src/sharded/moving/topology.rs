//! The document on which all gse_dba in front of the same groups agree: which groups there are, which serves which slot, and which slots are on the way from one
//! group to another. Plain values: how it is kept and read is `keeper`'s.

use serde::{Deserialize, Serialize};

use crate::config::sharded::Group;
use crate::sharded::slots::{MOVING, SLOTS};

/// More legs than that at once are refused: each is a pass over a whole group.
const MAX_LEGS: usize = 4096;

/// One version of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Topology {
    /// Made up once; groups of another installation have another.
    pub(crate) id: String,
    /// Rises with every change.
    pub(crate) epoch: u64,
    /// How often slots have changed their group: an iteration that has begun before may have missed what has moved since.
    #[serde(default)]
    pub(crate) switches: u64,
    /// The group in which a change is decided; the others have copies of the document.
    pub(crate) home: String,
    pub(crate) groups: Vec<Member>,
    /// What is to move, in this order; the first is on its way when it has a mover.
    #[serde(default)]
    pub(crate) legs: Vec<Leg>,
    /// How fast it may go.
    #[serde(default)]
    pub(crate) speed: Speed,
    /// Milliseconds for which a gse_dba may serve a group without having read this there again. The same for all.
    pub(crate) lease_ms: u64,
}

/// How fast slots may move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Speed {
    #[serde(default)]
    pub(crate) paused: bool,
    /// Bytes a second; 0 is no bound.
    #[serde(default)]
    pub(crate) bytes: u64,
    /// Keys a second; 0 is no bound.
    #[serde(default)]
    pub(crate) keys: u64,
}

/// A group in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) sentinels: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) servers: Vec<String>,
    /// Ranges such as `0-5460`.
    pub(crate) slots: Vec<String>,
    /// What the configuration said of its slots when this was first made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) configured: Vec<String>,
    /// Slots are being taken from it, or all have been.
    #[serde(default)]
    pub(crate) drained: bool,
}

/// Slots on the way from one group to another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Leg {
    /// What was asked for, as one number for all its legs.
    pub(crate) job: u64,
    pub(crate) slots: Vec<String>,
    pub(crate) from: String,
    pub(crate) to: String,
    /// Who moves it; nobody yet when there is none.
    #[serde(default)]
    pub(crate) mover: Option<Mover>,
    /// The slots have arrived, or will not: what is left of them in this group is being deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cleaning: Option<String>,
}

/// The gse_dba through which all commands for moving slots go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mover {
    pub(crate) id: String,
    /// Where the others reach it.
    pub(crate) address: String,
}

/// A set of slots.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct SlotSet(Box<[bool]>);

impl std::fmt::Debug for SlotSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.ranges())
    }
}

impl SlotSet {
    pub(crate) fn none() -> Self {
        Self(vec![false; SLOTS].into())
    }

    /// Reads ranges such as `0-5460`, `7`.
    pub(crate) fn of(ranges: &[String]) -> Result<Self, String> {
        let mut set = Self::none();
        for range in ranges {
            let (from, to) = range.split_once('-').unwrap_or((range, range));
            let number = |t: &str| t.trim().parse::<usize>().ok().filter(|n| *n < SLOTS);
            match (number(from), number(to)) {
                (Some(from), Some(to)) if from <= to => {
                    if let Some(part) = set.0.get_mut(from..=to) {
                        part.fill(true);
                    }
                }
                _ => {
                    return Err(format!(
                        "{range:?} is no range of slots: give numbers from 0 to 16383, as 7 or 0-5460, several with commas"
                    ));
                }
            }
        }
        Ok(set)
    }

    /// Reads a list with commas.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let parts: Vec<String> = text.split(',').map(|p| p.trim().to_owned()).collect();
        Self::of(&parts)
    }

    pub(crate) fn contains(&self, slot: u16) -> bool {
        self.0.get(usize::from(slot)).copied().unwrap_or(false)
    }

    fn insert(&mut self, slot: u16) {
        if let Some(s) = self.0.get_mut(usize::from(slot)) {
            *s = true;
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.0.iter().filter(|s| **s).count()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u16> {
        self.0.iter().enumerate().filter(|(_, s)| **s).map(|(i, _)| i as u16)
    }

    /// The shortest list of ranges that says the same.
    pub(crate) fn ranges(&self) -> Vec<String> {
        let (mut out, mut open) = (Vec::new(), None::<(u16, u16)>);
        let say = |(from, to): (u16, u16)| {
            if from == to {
                from.to_string()
            } else {
                format!("{from}-{to}")
            }
        };
        for s in self.iter() {
            open = match open {
                Some((from, to)) if to + 1 == s => Some((from, s)),
                before => {
                    out.extend(before.map(say));
                    Some((s, s))
                }
            };
        }
        out.extend(open.map(say));
        out
    }
}

impl Topology {
    /// The first one, by the configuration.
    pub(crate) fn first(id: String, groups: &[Group], lease_ms: u64, speed: Speed) -> Result<Self, String> {
        let map = crate::sharded::slots::SlotMap::of(groups)?;
        let mut sets = vec![SlotSet::none(); groups.len()];
        for s in 0..SLOTS as u16 {
            if let Some(set) = sets.get_mut(map.group(s)) {
                set.insert(s);
            }
        }
        Ok(Self {
            id,
            epoch: 1,
            switches: 0,
            home: home(groups),
            groups: groups
                .iter()
                .zip(&sets)
                .map(|(g, set)| Member {
                    name: g.name.clone(),
                    sentinels: g.sentinels.clone(),
                    servers: g.servers.clone(),
                    slots: set.ranges(),
                    configured: g.slots.clone(),
                    drained: false,
                })
                .collect(),
            legs: Vec::new(),
            speed,
            lease_ms,
        })
    }

    pub(crate) fn member(&self, name: &str) -> Option<&Member> {
        self.groups.iter().find(|m| m.name == name)
    }

    fn place(&self, name: &str) -> Option<usize> {
        self.groups.iter().position(|m| m.name == name)
    }

    /// Which group serves each slot.
    pub(crate) fn owners(&self) -> Result<Vec<u16>, String> {
        let mut owners = vec![None; SLOTS];
        for (i, m) in self.groups.iter().enumerate() {
            for s in SlotSet::of(&m.slots)?.iter() {
                if let Some(o) = owners.get_mut(usize::from(s))
                    && o.replace(i as u16).is_some()
                {
                    return Err(format!("slot {s} is given to several groups"));
                }
            }
        }
        match owners.iter().position(Option::is_none) {
            Some(s) => Err(format!("slot {s} is given to no group")),
            None => Ok(owners.into_iter().flatten().collect()),
        }
    }

    /// The leg that is on its way.
    pub(crate) fn running(&self) -> Option<(&Leg, &Mover)> {
        let leg = self.legs.first().filter(|l| l.cleaning.is_none())?;
        leg.mover.as_ref().map(|m| (leg, m))
    }

    /// As commands go: like [`Self::owners`], with slots on their way at [`MOVING`].
    pub(crate) fn routes(&self) -> Result<Vec<u16>, String> {
        let mut routes = self.owners()?;
        if let Some((leg, _)) = self.running() {
            for s in SlotSet::of(&leg.slots)?.iter() {
                if let Some(r) = routes.get_mut(usize::from(s)) {
                    *r = MOVING as u16;
                }
            }
        }
        Ok(routes)
    }

    /// What a configuration says against it, if anything.
    pub(crate) fn contradicted(&self, groups: &[Group]) -> Result<(), String> {
        for g in groups {
            let Some(m) = self.member(&g.name) else {
                return Err(format!(
                    "the configuration names a group {:?}, which the groups themselves do not know; they know {}. Take it out of sharded.groups and add it with DBA ADD, so that no slot changes its group silently",
                    g.name,
                    self.groups
                        .iter()
                        .map(|m| m.name.as_str())
                        .collect::<Vec<_>>()
                        .join(", ")
                ));
            };
            if g.slots.is_empty() {
                continue;
            }
            let told = SlotSet::of(&g.slots)?;
            if told != SlotSet::of(&m.slots)? && g.slots != m.configured {
                return Err(format!(
                    "the configuration gives slots {} to group {:?}, which serves {}: slots are moved with DBA MOVE, the configuration only makes the first table",
                    g.slots.join(","),
                    g.name,
                    if m.slots.is_empty() {
                        "none".to_owned()
                    } else {
                        m.slots.join(",")
                    }
                ));
            }
        }
        Ok(())
    }

    fn next(&self) -> Self {
        Self {
            epoch: self.epoch + 1,
            ..self.clone()
        }
    }

    fn job(&self) -> u64 {
        // Any number that no leg at hand has; the epoch of its birth says when it came.
        self.epoch + 1
    }

    fn receiving(&self, name: &str) -> Result<(), String> {
        match self.member(name) {
            None => Err(format!("there is no group called {name:?}; DBA SLOTS shows them")),
            Some(m) if m.drained => Err(format!("group {name:?} is drained or being drained: it takes no slots")),
            Some(_) => Ok(()),
        }
    }

    /// With slots to be moved to a group.
    pub(crate) fn with_move(&self, slots: &SlotSet, to: &str) -> Result<Self, String> {
        self.receiving(to)?;
        let target = self.place(to).unwrap_or(0);
        let pairs: Vec<(u16, usize)> = slots.iter().map(|s| (s, target)).collect();
        self.with_pairs(&pairs)
    }

    /// With each slot to be moved where the pairs say.
    fn with_pairs(&self, pairs: &[(u16, usize)]) -> Result<Self, String> {
        let owners = self.owners()?;
        for leg in &self.legs {
            let taken = SlotSet::of(&leg.slots)?;
            if let Some((s, _)) = pairs.iter().find(|(s, _)| taken.contains(*s)) {
                return Err(format!(
                    "slot {s} is already to be moved from {} to {} (job {}): wait for it, or DBA ABORT it first",
                    leg.from, leg.to, leg.job
                ));
            }
        }
        let mut legs: Vec<((usize, usize), SlotSet)> = Vec::new();
        for (s, to) in pairs {
            let from = owners.get(usize::from(*s)).copied().map_or(0, usize::from);
            if from == *to {
                continue;
            }
            match legs.iter_mut().find(|(of, _)| *of == (from, *to)) {
                Some((_, set)) => set.insert(*s),
                None => {
                    let mut set = SlotSet::none();
                    set.insert(*s);
                    legs.push(((from, *to), set));
                }
            }
        }
        if legs.is_empty() {
            return Err("nothing is to be moved: these slots are there already".into());
        }
        let mut next = self.next();
        let job = self.job();
        let name = |i: usize| self.groups.get(i).map_or(String::new(), |m| m.name.clone());
        next.legs.extend(legs.into_iter().map(|((from, to), set)| Leg {
            job,
            slots: set.ranges(),
            from: name(from),
            to: name(to),
            ..Leg::default()
        }));
        if next.legs.len() > MAX_LEGS {
            return Err("too much is to be moved at once: wait for some of it".into());
        }
        Ok(next)
    }

    /// With a further group, which has no slots yet.
    pub(crate) fn with_group(&self, group: &Group) -> Result<Self, String> {
        if self.member(&group.name).is_some() {
            return Err(format!("there is a group called {:?} already", group.name));
        }
        if self.groups.len() >= 1000 {
            return Err("there are a thousand groups already".into());
        }
        let mut next = self.next();
        next.groups.push(Member {
            name: group.name.clone(),
            sentinels: group.sentinels.clone(),
            servers: group.servers.clone(),
            ..Member::default()
        });
        Ok(next)
    }

    /// With an equal part moved to a group that has less than that, the same from each that has more.
    pub(crate) fn with_share(&self, to: &str) -> Result<Self, String> {
        self.receiving(to)?;
        let target = self.place(to).unwrap_or(0);
        let owners = self.owners()?;
        let active: Vec<usize> = (0..self.groups.len()).filter(|i| !self.groups[*i].drained).collect();
        let share = SLOTS / active.len().max(1);
        let mut counts = vec![0usize; self.groups.len()];
        owners.iter().for_each(|o| counts[usize::from(*o)] += 1);
        let mut pairs = Vec::new();
        let mut missing = share.saturating_sub(counts[target]);
        // Taken from the end of each, so that what stays is in one piece.
        for s in (0..SLOTS as u16).rev() {
            let from = usize::from(owners[usize::from(s)]);
            if missing > 0 && from != target && counts[from] > share {
                counts[from] -= 1;
                missing -= 1;
                pairs.push((s, target));
            }
        }
        self.with_pairs(&pairs)
    }

    /// With all slots of a group moved to the others, evenly.
    pub(crate) fn with_drain(&self, name: &str) -> Result<Self, String> {
        let Some(source) = self.place(name) else {
            return Err(format!("there is no group called {name:?}; DBA SLOTS shows them"));
        };
        let owners = self.owners()?;
        let mut counts = vec![0usize; self.groups.len()];
        owners.iter().for_each(|o| counts[usize::from(*o)] += 1);
        let others: Vec<usize> = (0..self.groups.len())
            .filter(|i| *i != source && !self.groups[*i].drained)
            .collect();
        if others.is_empty() {
            return Err(format!("{name:?} is the last group: there is none to take its slots"));
        }
        if let Some(leg) = self.legs.iter().find(|l| l.to == name && l.cleaning.is_none()) {
            return Err(format!(
                "slots are on their way to group {name:?} (job {}): wait for them, or DBA ABORT that first",
                leg.job
            ));
        }
        let mut pairs = Vec::new();
        for (s, owner) in owners.iter().enumerate() {
            if usize::from(*owner) == source
                && let Some(least) = others.iter().copied().min_by_key(|i| counts[*i])
            {
                counts[least] += 1;
                pairs.push((s as u16, least));
            }
        }
        // One piece for each of the others reads better than every third slot.
        let mut takers: Vec<usize> = pairs.iter().map(|(_, t)| *t).collect();
        takers.sort_unstable();
        pairs.iter_mut().zip(takers).for_each(|(p, t)| p.1 = t);
        let mut next = if pairs.is_empty() {
            self.next()
        } else {
            self.with_pairs(&pairs)?
        };
        if let Some(m) = next.groups.get_mut(source) {
            m.drained = true;
        }
        next.leave_home();
        Ok(next)
    }

    /// Another group decides once the deciding one is drained and empty.
    fn leave_home(&mut self) {
        let empty = |m: &Member| m.drained && m.slots.is_empty();
        if self.member(&self.home).is_none_or(empty)
            && let Some(m) = self
                .groups
                .iter()
                .filter(|m| !m.drained)
                .min_by(|a, b| a.name.cmp(&b.name))
        {
            self.home = m.name.clone();
        }
    }

    /// With the first leg taken on, by whom.
    pub(crate) fn with_mover(&self, mover: Mover) -> Option<Self> {
        let mut next = self.next();
        next.legs.first_mut()?.mover = Some(mover);
        Some(next)
    }

    /// With the first leg done: its slots are the other group's.
    pub(crate) fn switched(&self) -> Result<Self, String> {
        let mut next = self.next();
        let leg = match next.legs.first_mut() {
            Some(leg) if leg.cleaning.is_none() => {
                leg.cleaning = Some(leg.from.clone());
                leg.clone()
            }
            _ => return Err("nothing is on its way".into()),
        };
        let gone = SlotSet::of(&leg.slots)?;
        for m in &mut next.groups {
            let mut set = SlotSet::none();
            let had = SlotSet::of(&m.slots)?;
            for s in 0..SLOTS as u16 {
                let keeps = had.contains(s) && !gone.contains(s);
                if keeps || (m.name == leg.to && gone.contains(s)) {
                    set.insert(s);
                }
            }
            m.slots = set.ranges();
        }
        next.switches += 1;
        next.owners()?;
        Ok(next)
    }

    /// With the first leg over, and the next one begun by the same.
    pub(crate) fn cleaned(&self) -> Option<Self> {
        let mut next = self.next();
        next.legs.first()?.cleaning.as_ref()?;
        let leg = next.legs.remove(0);
        if let Some(following) = next.legs.first_mut() {
            following.mover = leg.mover;
        }
        next.leave_home();
        Some(next)
    }

    /// Without the legs of a job (or of all); what has arrived already stays where it is.
    pub(crate) fn aborted(&self, job: Option<u64>) -> Result<Self, String> {
        let mut next = self.next();
        let meant = |l: &Leg| job.is_none_or(|j| j == l.job) && l.cleaning.is_none();
        for leg in next.legs.iter_mut().filter(|l| meant(l) && l.mover.is_some()) {
            leg.cleaning = Some(leg.to.clone());
        }
        next.legs.retain(|l| !meant(l));
        if next.legs == self.legs {
            return Err(match job {
                Some(j) => format!("there is no job {j} under way; DBA MOVES shows what is"),
                None => "nothing is under way".into(),
            });
        }
        for m in &mut next.groups {
            // Not drained after all, unless nothing of it is left.
            let leaves = |l: &Leg| l.from == m.name && l.cleaning.is_none();
            if m.drained && !m.slots.is_empty() && !next.legs.iter().any(leaves) {
                m.drained = false;
            }
        }
        Ok(next)
    }
}

/// Where the document is first made: the same group whatever the order in the configuration.
pub(crate) fn home(groups: &[Group]) -> String {
    groups.iter().map(|g| g.name.clone()).min().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(n: usize) -> Vec<Group> {
        (0..n)
            .map(|i| Group {
                name: format!("g{i}"),
                servers: vec![format!("h:{i}")],
                ..Group::default()
            })
            .collect()
    }

    fn first(groups: &[Group]) -> Topology {
        Topology::first("i".into(), groups, 1000, Speed::default()).unwrap()
    }

    fn counts(t: &Topology) -> Vec<usize> {
        t.groups.iter().map(|m| SlotSet::of(&m.slots).unwrap().len()).collect()
    }

    fn done(mut t: Topology) -> Topology {
        while !t.legs.is_empty() {
            t = t.with_mover(Mover::default()).unwrap();
            t = t.switched().unwrap();
            t = t.cleaned().unwrap();
        }
        t
    }

    #[test]
    fn ranges_are_read_and_said() {
        let set = SlotSet::parse("0-2, 7,5-6").unwrap();
        assert_eq!(set.ranges(), ["0-2", "5-7"]);
        assert_eq!((set.len(), set.contains(6), set.contains(3)), (6, true, false));
        for bad in ["", "x", "3-1", "16384", "1-", "-1"] {
            assert!(SlotSet::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_further_group_changes_nothing_until_it_is_given_slots() {
        let t = first(&groups(3));
        let more = t
            .with_group(&Group {
                name: "g3".into(),
                ..Group::default()
            })
            .unwrap();
        assert_eq!(more.owners(), t.owners());
        let shared = more.with_share("g3").unwrap();
        assert_eq!(shared.owners(), t.owners());
        assert_eq!(shared.legs.len(), 3);
        let end = done(shared);
        assert_eq!(counts(&end), [4096; 4]);
        assert_eq!(end.switches, 3);
        assert!(t.with_group(&groups(1)[0]).is_err());
    }

    #[test]
    fn a_drained_group_ends_with_nothing_and_takes_nothing() {
        let t = first(&groups(3));
        assert_eq!(t.home, "g0");
        let draining = t.with_drain("g0").unwrap();
        assert_eq!(draining.home, "g0", "it decides as long as it has slots");
        let end = done(draining);
        assert_eq!(counts(&end), [0, 8192, 8192]);
        assert_eq!(end.home, "g1");
        assert!(end.with_move(&SlotSet::parse("1").unwrap(), "g0").is_err());
        let last = done(end.with_drain("g1").unwrap());
        assert!(last.with_drain("g2").is_err());
    }

    #[test]
    fn a_move_is_in_the_table_only_when_it_is_done() {
        let t = first(&groups(2));
        let moving = t.with_move(&SlotSet::parse("8000-8400").unwrap(), "g1").unwrap();
        assert_eq!(moving.legs[0].slots, ["8000-8191"]);
        assert_eq!(moving.routes(), t.owners(), "nobody has taken it on");
        let taken = moving.with_mover(Mover::default()).unwrap();
        let routes = taken.routes().unwrap();
        assert_eq!(usize::from(routes[8000]), MOVING);
        assert_eq!((routes[7999], routes[8192]), (0, 1));
        assert!(moving.with_move(&SlotSet::parse("8001").unwrap(), "g1").is_err());
        let back = taken.aborted(None).unwrap();
        assert_eq!(back.owners(), t.owners());
        assert_eq!(back.routes(), t.routes());
        assert!(back.aborted(None).is_err());
        assert_eq!(back.legs[0].cleaning.as_deref(), Some("g1"));
        assert!(back.cleaned().unwrap().legs.is_empty());
        assert_eq!(taken.switched().unwrap().owners().unwrap()[8000], 1);
        assert!(t.with_move(&SlotSet::parse("0").unwrap(), "g0").is_err());
        assert!(t.with_move(&SlotSet::parse("0").unwrap(), "nobody").is_err());
    }

    // contract: redis-proxy#26
    #[test]
    fn a_configuration_can_not_move_slots() {
        let mut config = groups(2);
        let t = first(&config);
        assert_eq!(t.contradicted(&config), Ok(()));
        // Equal parts of three are others than of two: said, not done.
        assert!(t.contradicted(&groups(3)).is_err_and(|e| e.contains("DBA ADD")));
        config[0].slots = vec!["0-99".into()];
        assert!(t.contradicted(&config).is_err_and(|e| e.contains("DBA MOVE")));
        config[0].slots = vec!["0-8191".into()];
        assert_eq!(t.contradicted(&config), Ok(()));
        config.remove(1);
        assert_eq!(t.contradicted(&config), Ok(()), "less is known, nothing else");
    }
}
