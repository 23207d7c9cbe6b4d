//! Which hosts are lost, which are held back and why, and when the next alarm about each is due. No I/O: times come in as numbers.
//!
//! `now` is this server's monotonic clock, milliseconds; stamps of signs of life are by the clock of the node that heard the agent (see
//! [`crate::nodes`]). One pass goes: [`Watch::begin`], [`Watch::count`] and perhaps [`Watch::silent`], [`Watch::shard`] for each of the
//! shards, [`Watch::wanted`] and [`Watch::learn`], [`Watch::due`] and [`Watch::sent`], [`Watch::end`].
//!
//! * A host is overdue when its last sign of life is older than some intervals, or when it was stopped and has not come back.
//! * It is held back while the fault may be ours; no longer than [`Rules::hold_ms`] of the time in which the store could be read.
//! * An alarm is due at once and then every [`Rules::repeat_ms`], until the host is heard again or was away for [`Rules::give_up_ms`].

mod hold;
mod rules;

use gse_core::random::HashMap;
use gse_proto::alarm::{LostHost, WatchState};
use gse_proto::keys::AGENT_SHARDS;
use gse_proto::session::Purpose;
use gse_proto::state::AgentRecord;

use crate::nodes::Nodes;

use hold::Holds;
pub use hold::Why;
pub use rules::{Look, News, Rules, Span, Sum};

/// What a record said so long ago is asked for again before the first alarm.
const STALE_MS: u64 = 2_000;
/// After the store was away, or this server was, nothing at all is sent for so long: what was heard meanwhile is being written.
const BREATH_MS: u64 = 5_000;
/// The same after a gap that is none of ours to speak of, as when another instance takes over.
const SHORT_BREATH_MS: u64 = 2_000;
/// Clocks of nodes may differ by so much without a host being taken for one that has returned.
const SLACK_MS: u64 = 60_000;

/// What a record says, as far as it matters here.
#[derive(Debug, Clone, Default)]
struct Facts {
    node: Box<str>,
    cloud_id: i32,
    ip: Box<str>,
    /// When it was stopped on purpose (by its node's clock), and whether for good.
    stopped_at: Option<u64>,
    removed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Alarm {
    /// By the store's clock.
    first_ms: u64,
    last_ms: u64,
    /// By this server's.
    last: u64,
    sent: u32,
}

#[derive(Debug)]
struct Host {
    seen: u64,
    facts: Option<Facts>,
    /// When the facts were read, and when they are looked at again.
    read_at: u64,
    look_at: u64,
    /// Since when it has been overdue here, while it has had no alarm.
    since: Option<u64>,
    held: Option<Why>,
    alarm: Option<Alarm>,
    /// The pass in which it was found.
    pass: u64,
}

#[derive(Debug)]
struct Holding {
    began: u64,
    why: Why,
    hosts: usize,
    returned: usize,
}

/// Everything that is known.
#[derive(Debug)]
pub struct Watch {
    rules: Rules,
    nodes: Nodes,
    holds: Holds,
    shards: Vec<HashMap<Box<str>, Host>>,
    wall: u64,
    pass: u64,
    /// When (monotonic) the last pass began.
    looked: Option<u64>,
    span: Span,
    /// Hosts that were found overdue by the instance before, and held back, have been since then.
    carried: Option<u64>,
    trusted: Vec<String>,
    holding: Option<Holding>,
    sum: Sum,
    news: Vec<News>,
    gone: Vec<Box<str>>,
}

impl Watch {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self {
            nodes: Nodes::new(rules.stall_ms, rules.settle_ms()),
            holds: Holds::new(&rules),
            shards: (0..AGENT_SHARDS).map(|_| HashMap::default()).collect(),
            wall: 0,
            pass: 0,
            looked: None,
            span: Span { from: 0, to: 0 },
            carried: None,
            trusted: vec![],
            holding: None,
            sum: Sum::default(),
            news: vec![],
            gone: vec![],
            rules,
        }
    }

    /// Takes up what another instance, or an earlier life of this one, has left. `store_ms` is the store's clock; `why` is the reason if
    /// nobody has looked for long.
    pub fn restore(
        &mut self,
        now: u64,
        store_ms: u64,
        why: Why,
        state: Option<&WatchState>,
        lost: impl Iterator<Item = (Box<str>, LostHost)>,
    ) {
        let ago = |ms: u64| now.saturating_sub(store_ms.saturating_sub(ms));
        match state {
            Some(state) if store_ms.saturating_sub(state.looked_ms) <= self.rules.stall_ms => {
                if store_ms.saturating_sub(state.looked_ms) > SHORT_BREATH_MS {
                    self.holds.breathe(now, SHORT_BREATH_MS);
                }
                self.trusted.clone_from(&state.steady);
                self.carried = (state.held_since_ms != 0).then(|| ago(state.held_since_ms));
                self.holds.restore(&state.masses, ago);
            }
            _ => self.holds.fault(now, why),
        }
        for (id, host) in lost {
            let since_last = store_ms.saturating_sub(host.last_ms).min(self.rules.repeat_ms);
            let known = Host {
                seen: host.seen_ms,
                facts: Some(Facts {
                    node: host.node.into(),
                    cloud_id: host.cloud_id,
                    ip: host.ip.into(),
                    ..Facts::default()
                }),
                read_at: now,
                look_at: now,
                since: None,
                held: None,
                alarm: Some(Alarm {
                    first_ms: host.first_ms,
                    last_ms: host.last_ms,
                    // Before this server's clock began, if need be.
                    last: now.saturating_sub(since_last),
                    sent: host.sent,
                }),
                pass: 0,
            };
            let shard = usize::from(gse_proto::keys::agent_shard(&id));
            self.shards[shard].insert(id, known);
        }
    }

    /// A pass begins: `stamps` are those of the nodes, `failed` says whether the store refused to answer since the last one.
    pub fn begin(&mut self, now: u64, wall_ms: u64, stamps: &[(String, u64)], failed: bool) -> Look {
        self.pass += 1;
        self.wall = wall_ms;
        self.sum = Sum::default();
        if let Some(looked) = self.looked.replace(now)
            && now.saturating_sub(looked) > self.rules.stall_ms
        {
            let gap = now - looked;
            self.holds.fault(now, if failed { Why::Store } else { Why::Alarm });
            self.holds.shift(gap);
            // Nobody is held back for the time in which nobody could look.
            for host in self.shards.iter_mut().flat_map(HashMap::values_mut) {
                host.since = host.since.map(|since| since + gap);
            }
            if let Some(holding) = &mut self.holding {
                holding.began += gap;
            }
        }
        let trusted = std::mem::take(&mut self.trusted);
        self.nodes.look(now, stamps, &trusted);
        let latest = self.nodes.latest(now, wall_ms);
        let rules = &self.rules;
        let mut to = latest.saturating_sub(rules.overdue_ms);
        if self.span.to > to && self.span.to - to <= SLACK_MS {
            to = self.span.to;
        }
        self.span = Span {
            from: self.nodes.earliest(now, wall_ms).saturating_sub(rules.give_up_ms),
            to,
        };
        Look {
            overdue: self.span,
            recent: Span {
                from: latest.saturating_sub(rules.overdue_ms + rules.mass_window_ms),
                to: latest.saturating_sub(rules.quiet_ms),
            },
            masses: self.holds.spans(),
        }
    }

    /// Takes in the counts: hosts that are heard, that went silent lately, and that are silent of each of the masses. True if the stamps
    /// of those that went silent lately are needed.
    pub fn count(&mut self, now: u64, heard: u64, recent: u64, masses: &[u64]) -> bool {
        self.holds.count(now, heard, recent, masses)
    }

    /// The stamps of all that went silent lately.
    pub fn silent(&mut self, now: u64, heard: u64, stamps: Vec<u64>) {
        self.holds.silent(now, heard, stamps);
    }

    /// Takes in the hosts of a shard that may be overdue: all of them.
    pub fn shard(&mut self, now: u64, shard: u16, found: impl Iterator<Item = (Box<str>, u64)>) {
        let pass = self.pass;
        let hosts = &mut self.shards[usize::from(shard)];
        for (id, seen) in found {
            if let Some(host) = hosts.get_mut(&id) {
                if host.seen == seen {
                    host.pass = pass;
                    continue;
                }
                // It was back, if only for a moment.
                if host.alarm.is_some() {
                    self.sum.returned += 1;
                    self.gone.push(id.clone());
                }
                if let (Some(_), Some(holding)) = (host.held, &mut self.holding) {
                    holding.returned += 1;
                }
            }
            let host = Host {
                seen,
                facts: None,
                read_at: 0,
                look_at: now,
                since: None,
                held: None,
                alarm: None,
                pass,
            };
            hosts.insert(id, host);
        }
        let (from, sum, gone, holding) = (self.span.from, &mut self.sum, &mut self.gone, &mut self.holding);
        hosts.retain(|id, host| {
            if host.pass == pass {
                return true;
            }
            if host.alarm.is_some() {
                if host.seen < from {
                    sum.given_up += 1;
                } else {
                    sum.returned += 1;
                }
                gone.push(id.clone());
            }
            if let (Some(_), Some(holding)) = (host.held, holding.as_mut()) {
                holding.returned += 1;
            }
            false
        });
    }

    /// Hosts whose records are needed, `most` at a time.
    #[must_use]
    pub fn wanted(&self, now: u64, most: usize) -> Vec<Box<str>> {
        let all = self.shards.iter().flatten();
        let wanted = all.filter(|(_, host)| {
            host.alarm.is_none() && now >= host.look_at && (host.facts.is_none() || self.is_stale(host, now))
        });
        wanted.map(|(id, _)| id.clone()).take(most).collect()
    }

    /// Whether an alarm would be due, but for its record that was read a while ago.
    fn is_stale(&self, host: &Host, now: u64) -> bool {
        host.read_at + STALE_MS < now
            && self.verdict(host, now).is_ok()
            && self.held_back(host, host.since.unwrap_or(now), now).is_none()
    }

    /// Why a host that has been overdue since then is held back, if it is.
    fn held_back(&self, host: &Host, since: u64, now: u64) -> Option<Why> {
        if now.saturating_sub(since) >= self.rules.hold_ms {
            return None;
        }
        let node = host.facts.as_ref().map(|facts| &*facts.node).unwrap_or_default();
        self.holds.why(now, host.seen, self.nodes.is_steady(node, now))
    }

    /// What the record of a host says. One without a record is nobody's.
    pub fn learn(&mut self, now: u64, id: &str, record: Option<&AgentRecord>) {
        let shard = usize::from(gse_proto::keys::agent_shard(id));
        let Some(host) = self.shards[shard].get_mut(id) else {
            return;
        };
        host.read_at = now;
        let Some(record) = record else {
            host.look_at = now + self.rules.overdue_ms;
            return;
        };
        let stopped = record.stopped && record.disconnected_at_ms != 0;
        let address = record.addresses.first().cloned().unwrap_or_default();
        host.facts = Some(Facts {
            node: record.node_id.as_str().into(),
            cloud_id: record.cloud_id,
            ip: address.into(),
            stopped_at: stopped.then_some(record.disconnected_at_ms),
            removed: stopped && record.purpose == i32::from(Purpose::Uninstall),
        });
    }

    /// Whether a host without an alarm is overdue; if not, when that is to be looked at again.
    fn verdict(&self, host: &Host, now: u64) -> Result<(), u64> {
        let again = now + self.rules.overdue_ms;
        let Some(facts) = &host.facts else { return Err(again) };
        let shows = self.nodes.now_of(&facts.node, now, self.wall);
        if facts.removed || shows.saturating_sub(host.seen) > self.rules.give_up_ms {
            return Err(again);
        }
        let (since, most) = match facts.stopped_at {
            Some(stopped) => (stopped.max(host.seen), self.rules.stop_grace_ms),
            None => (host.seen, self.rules.overdue_ms),
        };
        let age = shows.saturating_sub(since);
        // The clock of a node may be set meanwhile, so that it is not left alone for long.
        (age >= most)
            .then_some(())
            .ok_or(now + (most - age.min(most)).min(60_000))
    }

    /// Hosts about which an alarm is due: a host is named once, at most `most` of them.
    pub fn due(&mut self, now: u64, most: usize) -> Vec<Box<str>> {
        let mut due = Vec::new();
        let mut shards = std::mem::take(&mut self.shards);
        for (id, host) in shards.iter_mut().flatten() {
            if self.is_due(id, host, now) && due.len() < most {
                due.push(id.clone());
            }
        }
        self.shards = shards;
        due
    }

    fn is_due(&mut self, id: &str, host: &mut Host, now: u64) -> bool {
        if let Some(alarm) = host.alarm {
            let node = host.facts.as_ref().map(|facts| &*facts.node).unwrap_or_default();
            if self.nodes.now_of(node, now, self.wall).saturating_sub(host.seen) > self.rules.give_up_ms {
                host.alarm = None;
                host.look_at = now + self.rules.overdue_ms;
                self.sum.given_up += 1;
                self.gone.push(id.into());
                return false;
            }
            return now.saturating_sub(alarm.last) >= self.rules.repeat_ms && now >= self.holds.breath_until();
        }
        if host.facts.is_none() || (now < host.look_at && host.since.is_none()) {
            return false;
        }
        if let Err(again) = self.verdict(host, now) {
            host.look_at = again;
            host.since = None;
            host.held = None;
            return false;
        }
        host.look_at = now;
        let since = *host.since.get_or_insert(self.carried.unwrap_or(now));
        match self.held_back(host, since, now) {
            Some(why) => {
                if host.held.is_none() {
                    *self.sum.newly_held.entry(why).or_default() += 1;
                    self.note_held(now, why);
                }
                host.held = Some(why);
                *self.sum.held.entry(why).or_default() += 1;
                false
            }
            // Its record may say something else by now.
            None => host.read_at + STALE_MS >= now && now >= self.holds.breath_until(),
        }
    }

    fn note_held(&mut self, now: u64, why: Why) {
        let holding = self.holding.get_or_insert(Holding {
            began: now,
            why,
            hosts: 0,
            returned: 0,
        });
        holding.hosts += 1;
    }

    /// How a host is named in an alarm.
    #[must_use]
    pub fn named(&self, id: &str) -> Option<(i32, &str)> {
        let shard = usize::from(gse_proto::keys::agent_shard(id));
        let facts = self.shards[shard].get(id)?.facts.as_ref()?;
        Some((facts.cloud_id, &facts.ip))
    }

    /// An alarm about a host was sent; what is to be kept of it.
    pub fn sent(&mut self, now: u64, store_ms: u64, id: &str) -> Option<LostHost> {
        let shard = usize::from(gse_proto::keys::agent_shard(id));
        let host = self.shards[shard].get_mut(id)?;
        let alarm = host.alarm.get_or_insert(Alarm {
            first_ms: store_ms,
            last_ms: store_ms,
            last: now,
            sent: 0,
        });
        alarm.last = now;
        alarm.last_ms = store_ms;
        alarm.sent = alarm.sent.saturating_add(1);
        host.held = None;
        let facts = host.facts.as_ref()?;
        Some(LostHost {
            seen_ms: host.seen,
            first_ms: alarm.first_ms,
            last_ms: alarm.last_ms,
            sent: alarm.sent,
            cloud_id: facts.cloud_id,
            ip: facts.ip.to_string(),
            node: facts.node.to_string(),
        })
    }

    /// The pass is over; says what it came to.
    pub fn end(&mut self, now: u64) -> (Sum, Vec<News>) {
        self.carried = None;
        self.sum.lost = self
            .shards
            .iter()
            .flat_map(HashMap::values)
            .filter(|host| host.alarm.is_some())
            .count();
        let newly: usize = self.sum.newly_held.values().sum();
        let held: usize = self.sum.held.values().sum();
        if let Some(holding) = &self.holding {
            if newly > 0 && holding.hosts == newly {
                self.news.push(News::Holding {
                    hosts: newly,
                    why: holding.why,
                });
            }
            if held == 0 {
                self.news.push(News::Released {
                    hosts: holding.hosts,
                    for_ms: now.saturating_sub(holding.began),
                    why: holding.why,
                    returned: holding.returned,
                });
                self.holding = None;
            }
        }
        (self.sum.clone(), std::mem::take(&mut self.news))
    }

    /// Hosts that are not lost any more: what is kept of them can go.
    pub fn take_gone(&mut self) -> Vec<Box<str>> {
        std::mem::take(&mut self.gone)
    }

    /// Puts back what could not be removed.
    pub fn keep_gone(&mut self, gone: Vec<Box<str>>) {
        self.gone.extend(gone);
    }

    /// What the next active instance needs. `store_ms` is the store's clock.
    #[must_use]
    pub fn state(&self, now: u64, store_ms: u64) -> WatchState {
        let stored = |at: u64| store_ms.saturating_sub(now.saturating_sub(at));
        let held: usize = self.sum.held.values().sum();
        let holding = self.holding.as_ref();
        WatchState {
            looked_ms: store_ms,
            held_since_ms: holding.map_or(0, |holding| stored(holding.began)),
            held: u32::try_from(held).unwrap_or(u32::MAX),
            held_why: holding.map(|holding| holding.why.text().to_owned()).unwrap_or_default(),
            lost: u32::try_from(self.sum.lost).unwrap_or(u32::MAX),
            steady: self.nodes.steady(now),
            masses: self.holds.state(stored),
            ..WatchState::default()
        }
    }

    /// Nodes of gse_task that are there, and by how much their clocks differ.
    #[must_use]
    pub fn nodes(&self, now: u64) -> (usize, u64) {
        self.nodes.alive(now)
    }
}

#[cfg(test)]
mod tests;
