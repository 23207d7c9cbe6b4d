//! The rules in virtual time: a small fleet, nodes whose clocks are anything, and faults of ours.

use std::collections::BTreeMap;

use gse_proto::keys;
use proptest::prelude::*;

use super::*;
use crate::config::Config;

const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;

/// A site in virtual time: what the store holds, and whoever writes to it.
struct Sim {
    now: u64,
    watch: Watch,
    /// Nodes: by how much their clocks are off, and whether they are stalled (since when).
    nodes: BTreeMap<String, (u64, bool)>,
    /// In the store: the last renewals, the last signs of life, the records.
    stamps: BTreeMap<String, u64>,
    seen: BTreeMap<String, u64>,
    records: BTreeMap<String, AgentRecord>,
    /// Hosts: their node, and whether they are alive.
    hosts: BTreeMap<String, (String, bool)>,
    store_up: bool,
    looking: bool,
    failed: bool,
    /// Every alarm: when, about whom.
    alarms: Vec<(u64, String)>,
    held: usize,
    news: Vec<News>,
}

fn rules() -> Rules {
    Rules::of(&Config::default())
}

impl Sim {
    fn new(hosts: usize, nodes: &[(&str, u64)]) -> Self {
        let mut sim = Sim {
            now: 40 * 86_400 * SECOND,
            watch: Watch::new(rules()),
            nodes: nodes
                .iter()
                .map(|(name, off)| ((*name).to_owned(), (*off, false)))
                .collect(),
            stamps: BTreeMap::new(),
            seen: BTreeMap::new(),
            records: BTreeMap::new(),
            hosts: BTreeMap::new(),
            store_up: true,
            looking: true,
            failed: false,
            alarms: vec![],
            held: 0,
            news: vec![],
        };
        let names: Vec<String> = sim.nodes.keys().cloned().collect();
        for n in 0..hosts {
            let node = names[n % names.len()].clone();
            sim.hosts.insert(format!("host-{n}"), (node, true));
        }
        sim.watch.restore(sim.now, 0, Why::Start, None, std::iter::empty());
        sim.run(3 * MINUTE);
        sim
    }

    fn clock(&self, node: &str) -> u64 {
        self.nodes[node].0 + self.now
    }

    fn beat(&mut self, id: &str) {
        let (node, _) = self.hosts[id].clone();
        let at = self.clock(&node);
        self.seen.insert(id.to_owned(), at);
        let record = AgentRecord {
            agent_id: id.to_owned(),
            node_id: node,
            cloud_id: 7,
            ..AgentRecord::default()
        };
        self.records.insert(id.to_owned(), record);
    }

    /// One second.
    fn tick(&mut self) {
        self.now += SECOND;
        if self.store_up {
            for (name, (_, stalled)) in self.nodes.clone() {
                if !stalled {
                    let at = self.clock(&name);
                    self.stamps.insert(name, at);
                }
            }
            let ids: Vec<String> = self.hosts.keys().cloned().collect();
            for (n, id) in ids.iter().enumerate() {
                let (node, alive) = &self.hosts[id];
                // Each beats every 30 seconds, at a second of its own.
                if *alive && !self.nodes[node].1 && (self.now / SECOND + n as u64).is_multiple_of(30) {
                    self.beat(&id.clone());
                }
            }
        }
        if !self.looking {
            return;
        }
        if !self.store_up {
            self.failed = true;
            return;
        }
        self.pass();
    }

    fn count(&self, span: Span) -> u64 {
        self.seen
            .values()
            .filter(|at| (span.from..=span.to).contains(*at))
            .count() as u64
    }

    fn pass(&mut self) {
        let now = self.now;
        let stamps: Vec<(String, u64)> = self.stamps.iter().map(|(n, at)| (n.clone(), *at)).collect();
        let failed = std::mem::take(&mut self.failed);
        let look = self.watch.begin(now, 1, &stamps, failed);
        let heard = self.seen.values().filter(|at| **at > look.recent.to).count() as u64;
        let recent = self.count(look.recent);
        let masses: Vec<u64> = look.masses.iter().map(|span| self.count(*span)).collect();
        if self.watch.count(now, heard, recent, &masses) {
            let span = look.recent;
            let silent = self
                .seen
                .values()
                .copied()
                .filter(|at| (span.from..=span.to).contains(at));
            self.watch.silent(now, heard, silent.collect());
        }
        let mut shards: BTreeMap<u16, Vec<(Box<str>, u64)>> = BTreeMap::new();
        let overdue = look.overdue.from..=look.overdue.to;
        for (id, at) in self.seen.iter().filter(|(_, at)| overdue.contains(*at)) {
            let found = shards.entry(keys::agent_shard(id)).or_default();
            found.push((id.as_str().into(), *at));
        }
        for shard in 0..keys::AGENT_SHARDS {
            let found = shards.remove(&shard).unwrap_or_default();
            self.watch.shard(now, shard, found.into_iter());
        }
        for round in 0.. {
            let wanted = self.watch.wanted(now, 10);
            if wanted.is_empty() {
                break;
            }
            assert!(round < 1_000, "records are wanted again and again");
            for id in wanted {
                self.watch.learn(now, &id, self.records.get(&*id));
            }
        }
        for id in self.watch.due(now, usize::MAX) {
            assert_eq!(self.watch.named(&id).expect("a name").0, 7);
            let kept = self.watch.sent(now, now, &id).expect("something to keep");
            assert!(kept.sent > 0);
            self.alarms.push((now, id.into()));
        }
        let (sum, news) = self.watch.end(now);
        self.held = sum.held.values().sum();
        self.news.extend(news);
    }

    fn run(&mut self, time: u64) {
        for _ in 0..time / SECOND {
            self.tick();
        }
    }

    fn stop(&mut self, ids: impl Iterator<Item = usize>) {
        for n in ids {
            if let Some(host) = self.hosts.get_mut(&format!("host-{n}")) {
                host.1 = false;
            }
        }
    }

    fn revive(&mut self) {
        self.hosts.values_mut().for_each(|host| host.1 = true);
    }

    fn about(&self, id: &str) -> Vec<u64> {
        let about = self.alarms.iter().filter(|(_, host)| host == id);
        about.map(|(at, _)| *at).collect()
    }
}

// contract: data-plane#31, data-plane#32
#[test]
fn a_lost_host_is_named_every_minute_for_a_day_and_never_after_it_is_back() {
    let mut sim = Sim::new(10, &[("a", 0)]);
    sim.stop(3..4);
    let (stopped, last) = (sim.now, sim.seen["host-3"]);
    sim.run(10 * MINUTE);
    let at = sim.about("host-3");
    assert!(
        at[0] - last >= 90 * SECOND && at[0] - last <= 92 * SECOND,
        "{}",
        at[0] - last
    );
    assert!(at[0] > stopped);
    assert!(at.windows(2).all(|two| two[1] - two[0] == 60 * SECOND), "{at:?}");
    assert_eq!(sim.alarms.len(), at.len(), "nobody else");
    sim.run(25 * 60 * MINUTE);
    let at = sim.about("host-3");
    let age = at.last().unwrap() - last;
    assert!(age <= 86_400 * SECOND && age > 86_000 * SECOND, "{age}");
    let count = sim.alarms.len();
    sim.revive();
    sim.run(10 * MINUTE);
    assert_eq!(sim.alarms.len(), count);
    assert!(sim.watch.take_gone().contains(&"host-3".into()));
    // And again, as if nothing had been.
    sim.stop(3..4);
    sim.run(4 * MINUTE);
    assert!(sim.alarms.len() > count);
}

#[test]
fn stopped_on_purpose() {
    let mut sim = Sim::new(3, &[("a", 0)]);
    sim.stop(0..3);
    let stopped = sim.clock("a");
    for (id, purpose) in [("host-0", 0), ("host-1", 1), ("host-2", 2)] {
        let record = sim.records.get_mut(id).unwrap();
        record.stopped = true;
        record.disconnected_at_ms = stopped;
        record.purpose = purpose;
    }
    sim.run(9 * MINUTE + 50 * SECOND);
    assert_eq!(sim.alarms, []);
    sim.run(2 * MINUTE);
    assert!(!sim.about("host-0").is_empty(), "it has not come back in ten minutes");
    assert!(!sim.about("host-1").is_empty());
    sim.run(600 * MINUTE);
    assert!(sim.about("host-2").is_empty(), "it was uninstalled");
}

#[test]
fn half_of_the_fleet_in_one_minute_waits_and_one_host_does_not() {
    let mut sim = Sim::new(50, &[("a", 0)]);
    sim.stop(40..41);
    sim.run(3 * MINUTE);
    let early = sim.alarms.len();
    assert!(early > 0);
    sim.stop(0..30);
    let cut = sim.now;
    sim.run(5 * MINUTE);
    assert!(sim.held == 30, "{}", sim.held);
    assert!(sim.alarms.iter().all(|(_, id)| id == "host-40"), "{:?}", sim.alarms);
    assert!(sim.alarms.len() > early, "what was lost before is not held back");
    assert!(
        matches!(sim.news.last(), Some(News::Holding { why: Why::Mass, .. })),
        "{:?}",
        sim.news
    );
    sim.run(5 * MINUTE);
    let first = sim.about("host-0")[0];
    assert!(first - cut <= 90 * SECOND + 5 * MINUTE + 2 * SECOND, "{}", first - cut);
    assert!(
        matches!(
            sim.news.last(),
            Some(News::Released {
                hosts: 30,
                returned: 0,
                ..
            })
        ),
        "{:?}",
        sim.news
    );
    assert_eq!(
        sim.news.len(),
        2,
        "one line at the begin and one at the end: {:?}",
        sim.news
    );
}

#[test]
fn most_of_them_come_back_and_the_rest_is_lost() {
    let mut sim = Sim::new(50, &[("a", 0)]);
    sim.stop(0..30);
    sim.run(150 * SECOND);
    sim.revive();
    sim.stop(0..2);
    sim.run(2 * MINUTE);
    let named: std::collections::BTreeSet<&str> = sim.alarms.iter().map(|(_, id)| id.as_str()).collect();
    assert_eq!(named.into_iter().collect::<Vec<_>>(), ["host-0", "host-1"]);
}

#[test]
fn another_instance_goes_on_where_this_one_was() {
    let mut sim = Sim::new(50, &[("a", 0), ("b", 3_000)]);
    sim.stop(0..1);
    sim.run(5 * MINUTE);
    sim.stop(20..49);
    sim.run(2 * MINUTE);
    assert!(sim.held > 0);
    let state = sim.watch.state(sim.now, sim.now);
    let last = *sim.about("host-0").last().unwrap();
    let kept = LostHost {
        seen_ms: sim.seen["host-0"],
        first_ms: 1,
        last_ms: last,
        sent: 9,
        cloud_id: 7,
        ..LostHost::default()
    };
    sim.watch = Watch::new(rules());
    sim.now += 6 * SECOND;
    sim.watch.restore(
        sim.now,
        sim.now,
        Why::Start,
        Some(&state),
        [("host-0".into(), kept)].into_iter(),
    );
    sim.run(3 * MINUTE);
    let at = sim.about("host-0");
    assert!(
        at.windows(2)
            .all(|two| (60 * SECOND..=68 * SECOND).contains(&(two[1] - two[0]))),
        "no missed minute and nothing twice: {at:?}"
    );
    assert!(
        sim.alarms.iter().all(|(_, id)| id == "host-0"),
        "the mass is still held back"
    );
    sim.run(5 * MINUTE);
    assert!(!sim.about("host-30").is_empty(), "not anew for five minutes");
}

/// What may happen to us.
#[derive(Debug, Clone)]
enum Fault {
    Store,
    Task,
    Alarm,
    Clock(u64),
    Move,
}

fn faults() -> impl Strategy<Value = Vec<(Fault, u64, u64)>> {
    let fault = prop_oneof![
        Just(Fault::Store),
        Just(Fault::Task),
        Just(Fault::Alarm),
        (0..7_200_000_u64).prop_map(Fault::Clock),
        Just(Fault::Move),
    ];
    // What, for how many seconds, and how many seconds until the next.
    proptest::collection::vec((fault, 1..280_u64, 1..300_u64), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    /// Whatever happens to nodes, store and gse_alarm for less than five minutes at a time: no host that is alive is ever named, and one
    /// that is lost is named in the end.
    #[test]
    fn no_false_alarms(faults in faults(), off in 0..100_000_000_u64) {
        let mut sim = Sim::new(25, &[("a", off), ("b", 0)]);
        let mut lost_at = None;
        for (n, (fault, length, pause)) in faults.iter().enumerate() {
            match fault {
                Fault::Store => {
                    sim.store_up = false;
                    sim.run(length * SECOND);
                    sim.store_up = true;
                }
                Fault::Task => {
                    sim.nodes.get_mut("a").unwrap().1 = true;
                    sim.run(length * SECOND);
                    sim.nodes.get_mut("a").unwrap().1 = false;
                }
                Fault::Alarm => {
                    sim.looking = false;
                    sim.run(length * SECOND);
                    sim.looking = true;
                }
                Fault::Clock(to) => {
                    // A node is restarted with its clock set.
                    sim.nodes.get_mut("b").unwrap().1 = true;
                    sim.run(12 * SECOND);
                    *sim.nodes.get_mut("b").unwrap() = (*to, false);
                    let there: Vec<String> = sim.hosts.iter().filter(|(_, host)| host.0 == "b" && host.1)
                        .map(|(id, _)| id.clone()).collect();
                    for id in there {
                        sim.beat(&id);
                    }
                }
                Fault::Move => {
                    for (id, host) in sim.hosts.clone() {
                        if host.1 {
                            sim.hosts.get_mut(&id).unwrap().0 = "b".into();
                            sim.beat(&id);
                        }
                    }
                }
            }
            if n == 0 {
                sim.stop(5..6);
                lost_at = Some(sim.now);
            }
            sim.run(pause * SECOND);
        }
        for (_, id) in &sim.alarms {
            prop_assert_eq!(id.as_str(), "host-5", "{:?}", faults);
        }
        sim.run(12 * MINUTE);
        prop_assert!(!sim.about("host-5").is_empty(), "lost at {:?}", lost_at);
        for (_, id) in &sim.alarms {
            prop_assert_eq!(id.as_str(), "host-5", "{:?}", faults);
        }
    }

    /// One that is silent is named at last, however often something of ours fails: nobody is held back for more than five minutes of the
    /// time in which somebody could look.
    #[test]
    fn nobody_is_held_back_for_long(gaps in proptest::collection::vec((11..40_u64, 5..30_u64), 30)) {
        let mut sim = Sim::new(5, &[("a", 0)]);
        sim.stop(2..3);
        sim.run(91 * SECOND);
        let mut looked = 0;
        for (away, up) in gaps {
            sim.store_up = false;
            sim.run(away * SECOND);
            sim.store_up = true;
            sim.run(up * SECOND);
            looked += up.saturating_sub(BREATH_MS / SECOND);
            if !sim.about("host-2").is_empty() {
                break;
            }
            prop_assert!(looked <= 330, "looked for {} s in all", looked);
        }
    }
}
