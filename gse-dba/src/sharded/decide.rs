//! Who should be primary of a plain list, by what its servers say of themselves. No server is asked here and nothing is changed: the same answers give the same
//! decision, whoever takes it. A server with data is never made a copy of what has another history, unless its record says that it belongs here.

use super::control::Whole;
use super::record::Record;

/// Whom a copy follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Follows {
    /// It is a primary.
    Nobody,
    /// A server of the list.
    Listed(usize),
    /// Somebody else, by address.
    Elsewhere(String),
}

/// One server of the list, as far as it answered.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) whole: Whole,
    pub(super) follows: Follows,
    /// Its record as it is written, and as it is understood.
    pub(super) text: Option<String>,
    pub(super) record: Option<Record>,
}

impl View {
    pub(super) fn epoch(&self) -> u64 {
        self.record.as_ref().map_or(0, |r| r.epoch)
    }

    /// What decides which of two copies has more: the change it knows of, whether its history has begun anew since, and how far it is in that history.
    pub(super) fn rank(&self) -> (u64, bool, u64) {
        let newer = self.record.as_ref().is_some_and(|r| r.history != self.whole.history);
        (self.epoch(), newer, self.whole.offset)
    }

    pub(super) fn is_primary(&self) -> bool {
        self.follows == Follows::Nobody
    }
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// The server that is, or is to be, primary.
    pub(super) head: Option<usize>,
    /// Its record does not say so yet.
    pub(super) renew: bool,
    /// These become its copies.
    pub(super) attach: Vec<usize>,
    /// What a person has to decide, in words that say how.
    pub(super) problems: Vec<String>,
    /// Copies that have another primary.
    pub(super) strangers: Vec<String>,
}

/// The list and what it promises.
pub(super) struct Rules<'a> {
    pub(super) group: &'a str,
    pub(super) names: &'a [String],
    /// How many servers have an acknowledged write.
    pub(super) acknowledged: usize,
    /// The server that was the primary at the last look.
    pub(super) current: Option<usize>,
    /// The newest change that was ever seen: what is older is not gone back to.
    pub(super) floor: u64,
}

pub(super) type Seen<'a> = Vec<(usize, &'a View)>;

/// The copy that has most, of those given; an error when that can't be known.
pub(super) fn furthest(rules: &Rules<'_>, seen: &[(usize, &View)]) -> Result<usize, String> {
    let best = seen
        .iter()
        .max_by_key(|(i, v)| (v.rank(), std::cmp::Reverse(&rules.names[*i])));
    let Some((best, top)) = best else {
        return Err("none of its servers answers".into());
    };
    let (epoch, newer, _) = top.rank();
    let rival = seen.iter().find(|(_, v)| {
        let (e, n, _) = v.rank();
        (e, n) == (epoch, newer) && v.whole.history != top.whole.history && !v.whole.empty
    });
    match rival {
        Some((i, _)) if newer || top.record.is_none() => Err(format!(
            "{} and {} have different histories, and nothing says which is the newer one: look at their data and use DBA PROMOTE {} <address> FORCE (what only the other has is lost)",
            rules.names[*best], rules.names[*i], rules.group
        )),
        _ => Ok(*best),
    }
}

/// Decides.
pub(super) fn decide(rules: &Rules<'_>, servers: &[Option<View>]) -> Plan {
    let seen: Seen<'_> = servers
        .iter()
        .enumerate()
        .filter_map(|(i, v)| v.as_ref().map(|v| (i, v)))
        .collect();
    let mut plan = Plan::default();
    match primary(rules, servers, &seen) {
        Ok((head, renew)) => {
            plan.head = Some(head);
            plan.renew = renew;
            attach(rules, &seen, head, &mut plan);
        }
        Err(why) => plan.problems.push(why),
    }
    plan
}

fn primary(rules: &Rules<'_>, servers: &[Option<View>], seen: &Seen<'_>) -> Result<(usize, bool), String> {
    let (n, group) = (servers.len(), rules.group);
    let name = |i: usize| rules.names[i].as_str();
    let all = seen.len() == n;
    let enough = n + 1 - rules.acknowledged.min(n);
    let followers = |i: usize| seen.iter().filter(|(_, v)| v.follows == Follows::Listed(i)).count();
    // By hand or by an operator's command that was cut short, another server may have become the primary: the one that copies follow.
    let followed = |epoch: u64| -> Option<usize> {
        let mut best: Vec<(usize, usize)> = seen
            .iter()
            .filter(|(i, v)| v.is_primary() && v.epoch() == epoch && followers(*i) > 0)
            .map(|(i, _)| (followers(*i), *i))
            .collect();
        best.sort_unstable();
        match best.as_slice() {
            [.., (a, _), (b, i)] if b > a => Some(*i),
            [(_, i)] => Some(*i),
            _ => None,
        }
    };
    let newest = seen
        .iter()
        .filter_map(|(_, v)| v.record.as_ref())
        .max_by_key(|r| r.epoch);
    let Some(newest) = newest else {
        return first(rules, servers, seen, followed(0));
    };
    if newest.epoch < rules.floor {
        return Err(format!(
            "who answers knows of change {} of the primary, and change {} was seen: waiting for the others",
            newest.epoch, rules.floor
        ));
    }
    if let Some((i, r)) = seen
        .iter()
        .filter_map(|(i, v)| Some((*i, v.record.as_ref()?)))
        .find(|(_, r)| r.id != newest.id)
    {
        return Err(format!(
            "{} belongs to another group ('{}'): take it out of the list, or empty it with FLUSHALL",
            name(i),
            r.group
        ));
    }
    let named = rules.names.iter().position(|s| *s == newest.primary);
    let named_view = named.and_then(|i| servers[i].as_ref().map(|v| (i, v)));
    let few = || {
        format!(
            "{} of its {n} servers answer; {enough} must, for it to be known who is primary (DBA PROMOTE {group} <address> FORCE decides without)",
            seen.len()
        )
    };
    match named_view {
        Some((i, v)) if v.is_primary() => {
            if seen.len() < enough && rules.current != Some(i) {
                return Err(few());
            }
            let stranger = v.whole.empty
                && v.record.is_none()
                && seen
                    .iter()
                    .find(|(_, o)| !o.whole.empty && o.follows != Follows::Listed(i))
                    .is_some_and(|(_, o)| o.epoch() == newest.epoch);
            if stranger {
                return Err(format!(
                    "{} was the primary and has come back empty: DBA PROMOTE {group} makes the copy that has most the primary",
                    name(i)
                ));
            }
            let told = v.record.as_ref() == Some(newest) && newest.history == v.whole.history;
            return Ok((i, !told));
        }
        _ => {}
    }
    if seen.len() < enough {
        return Err(few());
    }
    if let Some(i) = followed(newest.epoch) {
        return Ok((i, true));
    }
    let is_primary = seen.iter().any(|(_, v)| v.is_primary());
    if all && !is_primary {
        elsewhere(rules, seen)?;
        return furthest(rules, seen).map(|i| (i, true));
    }
    Err(format!(
        "its primary {} does not answer: when it does not come back, DBA PROMOTE {group} makes the copy that has most the primary",
        newest.primary
    ))
}

/// A copy that gets its data from outside the list.
fn elsewhere(rules: &Rules<'_>, seen: &Seen<'_>) -> Result<(), String> {
    for (i, v) in seen {
        if let Follows::Elsewhere(whom) = &v.follows
            && v.whole.link_up
        {
            return Err(format!(
                "{} copies from {whom}, which is not in its list: put it into the list, or use REPLICAOF NO ONE",
                rules.names[*i]
            ));
        }
    }
    Ok(())
}

/// Nothing is written down yet.
fn first(
    rules: &Rules<'_>,
    servers: &[Option<View>],
    seen: &Seen<'_>,
    followed: Option<usize>,
) -> Result<(usize, bool), String> {
    let n = servers.len();
    let primaries: Vec<usize> = seen.iter().filter(|(_, v)| v.is_primary()).map(|(i, _)| *i).collect();
    if let Some(i) = followed {
        return Ok((i, true));
    }
    if let ([only], 1) = (primaries.as_slice(), n) {
        return Ok((*only, true));
    }
    if seen.len() < n {
        return Err(format!(
            "{} of its {n} servers answer; all must when it is first put together",
            seen.len()
        ));
    }
    elsewhere(rules, seen)?;
    let with_data: Vec<usize> = seen.iter().filter(|(_, v)| !v.whole.empty).map(|(i, _)| *i).collect();
    let first = |of: &mut dyn Iterator<Item = usize>| of.min_by_key(|i| &rules.names[*i]);
    match with_data.as_slice() {
        [] => first(&mut primaries.iter().copied())
            .or_else(|| first(&mut (0..n)))
            .map(|i| (i, true))
            .ok_or_else(|| "it has no servers".into()),
        [one] => Ok((*one, true)),
        several => {
            let views: Vec<(usize, &View)> = seen
                .iter()
                .filter(|(i, _)| several.contains(i))
                .map(|(i, v)| (*i, *v))
                .collect();
            let same = views.windows(2).all(|w| w[0].1.whole.history == w[1].1.whole.history);
            if same && primaries.iter().all(|p| !several.contains(p)) {
                return furthest(rules, &views).map(|i| (i, true));
            }
            let names: Vec<&str> = several.iter().map(|i| rules.names[*i].as_str()).collect();
            Err(format!(
                "several of its servers are primaries or copies with data of their own ({}): none is thrown away unasked. Empty all but one with FLUSHALL, or use DBA PROMOTE {} <address> FORCE and then FLUSHALL on the others",
                names.join(", "),
                rules.group
            ))
        }
    }
}

/// Who else becomes a copy of the head, and who must not.
fn attach(rules: &Rules<'_>, seen: &Seen<'_>, head: usize, plan: &mut Plan) {
    let Some((_, h)) = seen.iter().find(|(i, _)| *i == head) else {
        return;
    };
    for (i, v) in seen {
        if *i == head || v.follows == Follows::Listed(head) {
            continue;
        }
        let at = &rules.names[*i];
        if let Follows::Elsewhere(whom) = &v.follows
            && v.whole.link_up
        {
            plan.strangers.push(format!(
                "{at} copies from {whom} and not from the primary {}: use REPLICAOF there, or take it out of the list",
                rules.names[head]
            ));
            continue;
        }
        let same_history = v.whole.history == h.whole.history || v.whole.history == h.whole.history_before;
        let own = match (&v.record, &h.record) {
            (Some(a), Some(b)) => a.id == b.id && a.epoch <= b.epoch,
            _ => false,
        };
        if v.whole.empty || ((own || same_history) && !h.whole.empty) {
            plan.attach.push(*i);
        } else {
            plan.problems.push(format!(
                "{at} has data that the primary {} may not have, and is not made its copy unasked: empty it with FLUSHALL (what it has is lost), and it becomes one",
                rules.names[head]
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sharded::control::Replication;

    const NAMES: [&str; 3] = ["a:1", "b:1", "c:1"];

    fn view(follows: Follows, record: Option<(u64, &str, &str)>, history: &str, offset: u64) -> Option<View> {
        let record = record.map(|(epoch, primary, history)| Record {
            group: "g".into(),
            id: "1".into(),
            epoch,
            primary: primary.into(),
            history: history.into(),
        });
        let primary = follows == Follows::Nobody;
        Some(View {
            whole: Whole {
                replication: Replication {
                    is_primary: primary,
                    copies_from: None,
                    lags: Default::default(),
                    copies: Vec::new(),
                },
                history: history.into(),
                history_before: String::new(),
                offset,
                link_up: matches!(follows, Follows::Listed(_)),
                empty: record.is_none() && offset == 0,
            },
            follows,
            text: None,
            record,
        })
    }

    fn plan(servers: &[Option<View>], current: Option<usize>, floor: u64) -> Plan {
        let names = NAMES.map(str::to_owned);
        let rules = Rules {
            group: "g",
            names: &names,
            acknowledged: 2,
            current,
            floor,
        };
        decide(&rules, servers)
    }

    use Follows::{Elsewhere, Listed, Nobody};

    #[test]
    fn empty_servers_get_the_same_primary_whoever_asks() {
        let all = [
            view(Nobody, None, "x", 0),
            view(Nobody, None, "y", 0),
            view(Nobody, None, "z", 0),
        ];
        let p = plan(&all, None, 0);
        assert_eq!((p.head, p.renew, p.attach), (Some(0), true, vec![1, 2]));
        // One that does not answer may have data.
        let p = plan(&[all[0].clone(), all[1].clone(), None], None, 0);
        assert_eq!(p.head, None);
        // The one with data is it; two with data are for a person.
        let mut one = all.clone();
        one[2] = view(Nobody, None, "z", 9);
        assert_eq!(plan(&one, None, 0).head, Some(2));
        one[1] = view(Nobody, None, "y", 9);
        let p = plan(&one, None, 0);
        assert!(p.head.is_none() && p.problems[0].contains("thrown away"), "{p:?}");
        // A copy that follows nobody any more.
        let lone = [
            view(Nobody, None, "x", 0),
            view(Nobody, None, "y", 0),
            view(Elsewhere("q:1".into()), None, "z", 9),
        ];
        assert_eq!(plan(&lone, None, 0).head, Some(2));
    }

    #[test]
    fn the_newest_record_wins_and_the_old_primary_follows() {
        let old = view(Nobody, Some((1, "a:1", "x")), "x", 90);
        let new = view(Nobody, Some((2, "b:1", "y")), "y", 50);
        let copy = view(Listed(1), Some((2, "b:1", "y")), "y", 50);
        let p = plan(&[old.clone(), new.clone(), copy.clone()], Some(0), 0);
        assert_eq!((p.head, p.renew, p.attach), (Some(1), false, vec![0]));
        // Alone it is not believed, whether newer was seen or too few are there.
        assert_eq!(plan(&[old.clone(), None, None], None, 0).head, None);
        assert_eq!(plan(&[old.clone(), None, None], Some(0), 2).head, None);
        assert_eq!(plan(&[old.clone(), None, None], Some(0), 1).head, Some(0));
        assert_eq!(plan(&[old, None, copy], None, 0).head, None, "a copy knows better");
    }

    #[test]
    fn a_change_that_was_cut_short_ends_in_one_primary() {
        let record = Some((1, "a:1", "x"));
        // Promoted and followed, not written down; the old one is gone.
        let p = plan(
            &[None, view(Nobody, record, "y", 50), view(Listed(1), record, "y", 50)],
            None,
            0,
        );
        assert_eq!((p.head, p.renew), (Some(1), true));
        // Promoted and not followed: the old one stays.
        let p = plan(
            &[
                view(Nobody, record, "x", 50),
                view(Nobody, record, "y", 50),
                view(Listed(0), record, "x", 50),
            ],
            None,
            0,
        );
        assert_eq!((p.head, p.attach), (Some(0), vec![1]));
        // All are copies: the one that has most, when all are there.
        let lost = |at| {
            view(Elsewhere("z:1".into()), record, "x", at).map(|mut v| {
                v.whole.link_up = false;
                v
            })
        };
        assert_eq!(plan(&[lost(5), lost(7), lost(6)], None, 0).head, Some(1));
        assert_eq!(plan(&[lost(5), lost(7), None], None, 0).head, None);
    }

    #[test]
    fn of_two_histories_the_newer_one_has_more() {
        let names = NAMES.map(str::to_owned);
        let rules = Rules {
            group: "g",
            names: &names,
            acknowledged: 2,
            current: None,
            floor: 0,
        };
        let record = Some((3, "a:1", "x"));
        // The primary began anew after the record: what is small in its new history is newer than what is large in the old one.
        let (new, old) = (
            view(Listed(0), record, "y", 10).unwrap(),
            view(Listed(0), record, "x", 900).unwrap(),
        );
        assert_eq!(furthest(&rules, &[(1, &old), (2, &new)]), Ok(2));
        let other = view(Listed(0), record, "z", 5).unwrap();
        assert!(furthest(&rules, &[(1, &other), (2, &new)]).is_err(), "nobody can know");
    }

    #[test]
    fn data_of_another_history_is_not_overwritten() {
        let record = Some((1, "a:1", "x"));
        let p = plan(
            &[
                view(Nobody, record, "x", 50),
                view(Listed(0), record, "x", 50),
                view(Nobody, None, "q", 7),
            ],
            None,
            0,
        );
        assert_eq!((p.head, p.attach.len()), (Some(0), 0));
        assert!(p.problems[0].contains("FLUSHALL"), "{p:?}");
        // Nor does a primary that came back empty overwrite what its copies have.
        let mut empty = view(Nobody, None, "n", 0);
        if let Some(v) = &mut empty {
            v.whole.empty = true;
        }
        let lost = view(Elsewhere("q".into()), record, "x", 50);
        let p = plan(&[empty, lost.clone(), lost], Some(0), 0);
        assert!(p.head.is_none() && p.problems[0].contains("empty"), "{p:?}");
    }
}
