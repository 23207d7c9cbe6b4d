//! Slots move between groups while several gse_dba serve: nothing acknowledged is lost, nothing is refused, and everybody agrees on who serves what.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gse_core::store::slot;
use gse_dba::config::Config;
use serde_json::Value as Json;

use crate::rig::{Process, Raw, Value, pause};
use crate::site::{Site, sharded_list};

/// As the tests need it: leases that end soon.
fn config(site: &Site) -> Config {
    let mut config = sharded_list(site);
    config.sharded.lease_ms = 3000;
    config.sharded.checks = gse_dba::config::sharded::Checks::Warn;
    config
}

struct Front {
    process: Process,
    dir: tempfile::TempDir,
    config: Config,
}

impl Front {
    fn start(config: &Config) -> Front {
        let dir = tempfile::tempdir().unwrap();
        Front {
            process: Process::sharded(dir.path(), config),
            dir,
            config: config.clone(),
        }
    }

    fn client(&self) -> Raw {
        self.process.client()
    }

    /// SIGKILL, and started again where it was.
    fn again(self) -> Front {
        let Front {
            process,
            dir,
            mut config,
        } = self;
        config.listen = process.addr.to_string();
        process.kill();
        Front {
            process: Process::sharded(dir.path(), &config),
            dir,
            config,
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log.txt")).unwrap_or_default()
    }
}

fn dba(c: &mut Raw, line: &str) -> Json {
    match c.say(&format!("DBA {line}")) {
        Value::Bulk(b) => serde_json::from_slice(&b).unwrap(),
        other => panic!("DBA {line}: {other:?}"),
    }
}

fn refused(c: &mut Raw, line: &str) -> String {
    match c.say(&format!("DBA {line}")) {
        Value::Error(e) => e,
        other => panic!("DBA {line} was not refused: {other:?}"),
    }
}

/// Waits until nothing is to be moved any more.
fn moved(c: &mut Raw, fronts: &[&Front]) -> Duration {
    let begun = Instant::now();
    loop {
        let moves = dba(c, "MOVES");
        if moves["legs"].as_array().unwrap().is_empty() {
            return begun.elapsed();
        }
        if begun.elapsed() > Duration::from_secs(60) {
            let logs: Vec<String> = fronts.iter().map(|f| f.log()).collect();
            panic!("the move does not end: {moves:#}\n{}", logs.join("\n=====\n"));
        }
        pause();
    }
}

fn slots_of(c: &mut Raw, group: &str) -> usize {
    let t = dba(c, "TOPOLOGY");
    let groups = t["groups"].as_array().unwrap();
    let of = groups.iter().find(|g| g["name"] == group).unwrap();
    of["slots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| {
            let r = r.as_str().unwrap();
            let (a, b) = r.split_once('-').unwrap_or((r, r));
            b.parse::<usize>().unwrap() - a.parse::<usize>().unwrap() + 1
        })
        .sum()
}

/// Clients that write all the while and know what was acknowledged.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<Told>>,
}

#[derive(Default)]
struct Told {
    /// Of each key of ours, what its value must be.
    counters: Vec<(String, i64)>,
    lists: Vec<(String, Vec<String>)>,
    hashes: Vec<(String, i64)>,
    errors: Vec<String>,
    slowest: Duration,
    requests: usize,
}

impl Load {
    fn start(fronts: &[&Front], threads: usize, keys: usize) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..threads)
            .map(|t| {
                let mut c = fronts[t % fronts.len()].client();
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || {
                    let mut told = Told {
                        counters: (0..keys).map(|k| (format!("c{t}:{k}"), 0)).collect(),
                        lists: (0..keys / 4).map(|k| (format!("l{t}:{k}"), Vec::new())).collect(),
                        hashes: (0..keys / 4).map(|k| (format!("h{t}:{k}"), 0)).collect(),
                        ..Told::default()
                    };
                    let mut n = 0;
                    while !stop.load(Ordering::Relaxed) {
                        n += 1;
                        told.round(&mut c, n);
                    }
                    told
                })
            })
            .collect();
        Load { stop, threads }
    }

    fn stop(self) -> Vec<Told> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().map(|t| t.join().unwrap()).collect()
    }
}

impl Told {
    fn ask(&mut self, c: &mut Raw, words: &[&str]) -> Option<Value> {
        let begun = Instant::now();
        let got = c.call(words);
        self.slowest = self.slowest.max(begun.elapsed());
        self.requests += 1;
        match got {
            Value::Error(e) => {
                self.errors.push(format!("{}: {e}", words.join(" ")));
                None
            }
            other => Some(other),
        }
    }

    fn round(&mut self, c: &mut Raw, n: usize) {
        for i in 0..self.counters.len() {
            let (key, value) = self.counters[i].clone();
            if let Some(got) = self.ask(c, &["INCR", &key]) {
                assert_eq!(got, Value::Int(value + 1), "{key}");
                self.counters[i].1 += 1;
            }
        }
        for i in 0..self.lists.len() {
            let (key, element) = (self.lists[i].0.clone(), format!("e{n}"));
            if self.ask(c, &["RPUSH", &key, &element]).is_some() {
                self.lists[i].1.push(element);
                if self.lists[i].1.len() > 20 {
                    let got = self.ask(c, &["LPOP", &key]);
                    let first = self.lists[i].1.remove(0);
                    assert_eq!(got, Some(Value::bulk(&first)), "{key}");
                }
            }
        }
        for i in 0..self.hashes.len() {
            let (key, value) = self.hashes[i].clone();
            if let Some(got) = self.ask(c, &["HINCRBY", &key, "f", "1"]) {
                assert_eq!(got, Value::Int(value + 1), "{key}");
                self.hashes[i].1 += 1;
            }
        }
    }

    /// Everything that was acknowledged is there, and nothing else.
    fn check(&self, c: &mut Raw) {
        for (key, value) in &self.counters {
            assert_eq!(c.call(&["GET", key]), Value::bulk(&value.to_string()), "{key}");
        }
        for (key, list) in &self.lists {
            let want: Vec<Value> = list.iter().map(|e| Value::bulk(e)).collect();
            assert_eq!(c.call(&["LRANGE", key, "0", "-1"]), Value::Array(want), "{key}");
        }
        for (key, value) in &self.hashes {
            assert_eq!(c.call(&["HGET", key, "f"]), Value::bulk(&value.to_string()), "{key}");
        }
    }
}

fn all_right(told: &[Told], c: &mut Raw) {
    for t in told {
        assert_eq!(t.errors, Vec::<String>::new());
        t.check(c);
    }
    let slowest = told.iter().map(|t| t.slowest).max().unwrap_or_default();
    let requests: usize = told.iter().map(|t| t.requests).sum();
    println!("{requests} requests, the slowest {slowest:?}");
}

// contract: redis-proxy#26
#[test]
fn slots_move_while_two_gse_dba_serve_and_nobody_notices() {
    let site = Site::start(3, 0, false);
    let config = config(&site);
    let (a, b) = (Front::start(&config), Front::start(&config));
    let mut c = a.client();
    for i in 0..3000 {
        let got = c.call(&["SET", &format!("k{i}"), &i.to_string()]);
        assert_eq!(got, Value::ok(), "{}\n====\n{}", a.log(), b.log());
    }
    let load = Load::start(&[&a, &b], 4, 40);
    std::thread::park_timeout(Duration::from_millis(300));
    let before = (slots_of(&mut c, "g0"), slots_of(&mut c, "g2"));
    let plan = dba(&mut c, "MOVE 0-2999 TO g2");
    assert_eq!(plan["legs"][0]["count"], 3000, "{plan}");
    let took = moved(&mut c, &[&a, &b]);
    std::thread::park_timeout(Duration::from_millis(200));
    let told = load.stop();
    println!("the move took {took:?}");
    let mut d = b.client();
    all_right(&told, &mut d);
    all_right(&told, &mut c);
    crate::rig::wait_for("the other to know", || {
        (slots_of(&mut d, "g0"), slots_of(&mut d, "g2")) == (before.0 - 3000, before.1 + 3000)
    });
    for i in 0..3000 {
        assert_eq!(d.call(&["GET", &format!("k{i}")]), Value::bulk(&i.to_string()));
    }
    // Each key is in one group, and in the right one.
    let keys = |g: usize| -> Vec<String> {
        site.groups[g].servers[0]
            .client()
            .say("KEYS *")
            .items()
            .iter()
            .map(Value::text)
            .collect()
    };
    assert!(keys(0).iter().all(|k| slot(k.as_bytes()) >= 3000));
    assert!(keys(2).iter().any(|k| slot(k.as_bytes()) < 3000));
    let total: usize = (0..3).map(|g| keys(g).len()).sum();
    assert_eq!(c.say("DBSIZE"), Value::Int(total as i64));
    assert_eq!(c.say("KEYS *").items().len(), total);
    // What is gse_dba's own is not shown, and survives.
    assert_eq!(c.say("FLUSHALL"), Value::ok());
    assert_eq!(c.say("DBSIZE"), Value::Int(0));
    assert_eq!(slots_of(&mut c, "g2"), before.1 + 3000);
    assert!(refused(&mut c, "MOVE 0-1 TO g2").contains("there already"));
    assert!(refused(&mut c, "MOVE 0-1 TO g9").contains("no group called"));
}

/// Words at random places of the groups.
fn fill(c: &mut Raw, n: usize) {
    for i in 0..n {
        assert_eq!(c.call(&["SET", &format!("k{i}"), &i.to_string()]), Value::ok());
    }
}

fn filled(c: &mut Raw, n: usize) {
    for i in 0..n {
        assert_eq!(c.call(&["GET", &format!("k{i}")]), Value::bulk(&i.to_string()), "k{i}");
    }
}

// contract: redis-proxy#26
#[test]
fn a_move_goes_on_when_the_gse_dba_that_moves_is_killed() {
    let site = Site::start(3, 0, false);
    let config = config(&site);
    let (a, b) = (Front::start(&config), Front::start(&config));
    let mut c = b.client();
    fill(&mut c, 3000);
    dba(&mut c, "RATE 0 400");
    dba(&mut a.client(), "MOVE 0-5461 TO g1");
    crate::rig::wait_for("half of it", || {
        let told = dba(&mut c, "MOVES");
        told["legs"][0]["progress"]["keys_copied"].as_u64().unwrap_or(0) > 300
    });
    // Those that had clients of the killed one are lost with it; the others are only held back.
    let load = Load::start(&[&b], 2, 20);
    std::thread::park_timeout(Duration::from_millis(200));
    let a = a.again();
    dba(&mut c, "RATE 0 0");
    let took = moved(&mut c, &[&a, &b]);
    std::thread::park_timeout(Duration::from_millis(300));
    let told = load.stop();
    println!("it went on, and took {took:?}");
    for t in &told {
        // What was under way in the killed one may have happened or not, and is said to be so.
        assert!(t.errors.iter().all(|e| e.contains("UNCERTAIN")), "{:?}", t.errors);
    }
    filled(&mut c, 3000);
    filled(&mut a.client(), 3000);
    assert_eq!(slots_of(&mut c, "g0"), 0, "all of it has moved");
    let left = site.groups[0].servers[0].client().say("DBSIZE");
    assert_eq!(left, Value::Int(0), "nothing is left in the old group");
}

// contract: redis-proxy#26
#[test]
fn an_aborted_move_gives_the_old_table_back() {
    let site = Site::start(3, 0, false);
    let config = config(&site);
    let (a, b) = (Front::start(&config), Front::start(&config));
    let mut c = a.client();
    fill(&mut c, 2000);
    let table = dba(&mut c, "TOPOLOGY")["groups"].clone();
    let load = Load::start(&[&a, &b], 2, 20);
    dba(&mut c, "RATE 0 300");
    let job = dba(&mut c, "MOVE 0-5461 TO g1")["job"].as_u64().unwrap();
    crate::rig::wait_for("some of it", || {
        dba(&mut c, "MOVES")["legs"][0]["progress"]["keys_copied"]
            .as_u64()
            .unwrap_or(0)
            > 100
    });
    assert!(refused(&mut c, "MOVE 5 TO g2").contains("already to be moved"));
    let paused = dba(&mut b.client(), "PAUSE");
    assert_eq!(paused["paused"], true);
    // Nothing that was copied shows.
    assert!(c.say("DBSIZE").int() >= 2000);
    let keys: Vec<String> = c.say("KEYS k*").items().iter().map(Value::text).collect();
    assert_eq!(keys.len(), 2000);
    dba(&mut c, "RESUME");
    dba(&mut b.client(), &format!("ABORT {job}"));
    dba(&mut c, "RATE 0 0");
    moved(&mut c, &[&a, &b]);
    assert_eq!(dba(&mut c, "TOPOLOGY")["groups"], table);
    let told = load.stop();
    all_right(&told, &mut c);
    all_right(&told, &mut b.client());
    filled(&mut b.client(), 2000);
    let here: Vec<String> = site.groups[1].servers[0]
        .client()
        .say("KEYS *")
        .items()
        .iter()
        .map(Value::text)
        .collect();
    assert!(
        here.iter().all(|k| (5462..=10922).contains(&slot(k.as_bytes()))),
        "what was copied is gone again"
    );
    assert!(refused(&mut c, "ABORT").contains("nothing is under way"));
}

// contract: redis-proxy#26
#[test]
fn groups_are_added_and_drained_under_load() {
    let mut site = Site::start(3, 0, false);
    let mut config = config(&site);
    let last = config.sharded.groups.pop().unwrap();
    let (a, b) = (Front::start(&config), Front::start(&config));
    let mut c = a.client();
    fill(&mut c, 2000);
    let load = Load::start(&[&a, &b], 3, 20);
    // A group with data of its own would be shown to nobody.
    let mut third = site.groups[2].servers[0].client();
    third.say("SET alien 1");
    let add = format!("ADD g2 SERVERS {} SHARE", last.servers.join(","));
    assert!(refused(&mut c, &add).contains("must be empty"));
    third.say("DEL alien");
    let plan = dba(&mut c, &add);
    assert_eq!(plan["legs"].as_array().unwrap().len(), 2, "{plan}");
    moved(&mut c, &[&a, &b]);
    crate::rig::wait_for("the other to know", || slots_of(&mut b.client(), "g2") == 16384 / 3);
    dba(&mut b.client(), "DRAIN g0");
    moved(&mut b.client(), &[&a, &b]);
    std::thread::park_timeout(Duration::from_millis(300));
    let told = load.stop();
    all_right(&told, &mut c);
    crate::rig::wait_for("both to know", || slots_of(&mut c, "g0") == 0);
    assert_eq!(site.groups[0].servers[0].client().say("DBSIZE"), Value::Int(0));
    // The drained group, which has decided until then, can go; what is left agrees without it.
    let gone = site.groups.remove(0);
    drop(gone);
    filled(&mut c, 2000);
    all_right(&told, &mut b.client());
    // It was also the one for what belongs to no key.
    assert_eq!(c.say("EVAL return(7) 0"), Value::Int(7));
    assert!(matches!(c.say("TIME"), Value::Array(_)));
    assert_eq!(c.say("DBSIZE").int() as usize, c.say("KEYS *").items().len());
    // A configuration that says something else does not change where data is.
    let mut other = config.clone();
    other.sharded.groups[1].slots = vec!["0-16383".into()];
    other.sharded.groups.remove(0);
    let wrong = crate::rig::Ours::try_start(other)
        .err()
        .map(|e| format!("{e:#}"))
        .unwrap_or_default();
    assert!(wrong.contains("DBA MOVE"), "{wrong}");
    let mut fresh = config;
    fresh.sharded.groups.remove(0);
    let d = Front::start(&fresh);
    filled(&mut d.client(), 2000);
    assert_eq!(d.client().say("EVAL return(7) 0"), Value::Int(7));
    let told = dba(&mut d.client(), "STATUS");
    assert_eq!(told["health"]["ok"], true, "{told:#}");
}

// contract: redis-proxy#8, redis-proxy#9, redis-proxy#10
#[test]
fn transactions_and_waits_outlive_a_move() {
    let site = Site::start(3, 0, false);
    let config = config(&site);
    let (a, b) = (Front::start(&config), Front::start(&config));
    let mut c = a.client();
    let s = slot(b"t");
    let owner = ["g0", "g1", "g2"]
        .into_iter()
        .find(|g| *g != "g2" && slots_of(&mut c, g) > 0 && owns(&mut c, g, s));
    let to = if owner.is_some() { "g2" } else { "g0" };
    // One of each on each gse_dba: begun before the move, ended after it.
    let fronts = [&a, &b];
    let mut waiting: Vec<Raw> = fronts.iter().map(|f| f.client()).collect();
    for (i, w) in waiting.iter_mut().enumerate() {
        w.send(&crate::rig::encode(&["BLPOP", &format!("{{t}}list{i}"), "30"]));
    }
    let mut short = a.client();
    short.send(&crate::rig::encode(&["BLPOP", "{t}nothing", "5"]));
    let begun = Instant::now();
    let mut queued: Vec<Raw> = fronts.iter().map(|f| f.client()).collect();
    for q in &mut queued {
        assert_eq!(q.say("MULTI"), Value::ok());
        assert_eq!(q.say("INCR {t}n"), Value::Simple("QUEUED".into()));
    }
    let mut watching: Vec<Raw> = fronts.iter().map(|f| f.client()).collect();
    for w in &mut watching {
        assert_eq!(w.say("WATCH {t}n"), Value::ok());
        assert_eq!(w.say("MULTI"), Value::ok());
        assert_eq!(w.say("SET {t}n 1000"), Value::Simple("QUEUED".into()));
    }
    pause();
    dba(&mut c, &format!("MOVE {s} TO {to}"));
    moved(&mut c, &[&a, &b]);
    for (i, w) in waiting.iter_mut().enumerate() {
        let list = format!("{{t}}list{i}");
        assert_eq!(
            c.call(&["RPUSH", &list, "x"]),
            Value::Int(1),
            "it waits where the list is now"
        );
        assert_eq!(w.reply(), Value::Array(vec![Value::bulk(&list), Value::bulk("x")]));
        assert_eq!(c.call(&["LLEN", &list]), Value::Int(0));
    }
    for (n, q) in queued.iter_mut().enumerate() {
        assert_eq!(q.say("INCR {t}n"), Value::Simple("QUEUED".into()));
        let n = 2 * n as i64;
        assert_eq!(q.say("EXEC"), Value::Array(vec![Value::Int(n + 1), Value::Int(n + 2)]));
    }
    for w in &mut watching {
        assert_eq!(
            w.say("EXEC"),
            Value::NullArray,
            "a watched key that has moved counts as changed"
        );
    }
    assert_eq!(c.say("GET {t}n"), Value::bulk("4"));
    assert_eq!(short.reply(), Value::NullArray);
    let waited = begun.elapsed();
    assert!(
        waited > Duration::from_millis(4900) && waited < Duration::from_secs(12),
        "{waited:?}"
    );
}

fn owns(c: &mut Raw, group: &str, slot: u16) -> bool {
    let t = dba(c, "TOPOLOGY");
    let groups = t["groups"].as_array().unwrap();
    let of = groups.iter().find(|g| g["name"] == group).unwrap();
    of["slots"].as_array().unwrap().iter().any(|r| {
        let r = r.as_str().unwrap();
        let (a, b) = r.split_once('-').unwrap_or((r, r));
        (a.parse::<u16>().unwrap()..=b.parse::<u16>().unwrap()).contains(&slot)
    })
}

/// Everything is deleted while it is copied: nothing comes back.
#[test]
fn what_is_flushed_while_it_moves_stays_away() {
    let site = Site::start(3, 0, false);
    let config = config(&site);
    let (a, b) = (Front::start(&config), Front::start(&config));
    let mut c = a.client();
    fill(&mut c, 2000);
    dba(&mut c, "RATE 0 300");
    dba(&mut c, "MOVE 0-5461 TO g1");
    crate::rig::wait_for("some of it", || {
        dba(&mut c, "MOVES")["legs"][0]["progress"]["keys_copied"]
            .as_u64()
            .unwrap_or(0)
            > 50
    });
    let mut d = b.client();
    assert_eq!(d.say("FLUSHALL"), Value::ok());
    assert_eq!(d.say("DBSIZE"), Value::Int(0));
    assert_eq!(d.say("SET k1 new"), Value::ok());
    dba(&mut c, "RATE 0 0");
    moved(&mut c, &[&a, &b]);
    for front in [&mut c, &mut d] {
        assert_eq!(front.say("DBSIZE"), Value::Int(1));
        assert_eq!(front.say("GET k1"), Value::bulk("new"));
    }
    let keys: i64 = site
        .groups
        .iter()
        .map(|g| g.servers[0].client().say("DBSIZE").int())
        .sum();
    assert_eq!(keys, 1);
}

fn big_hash(mebibytes: usize) {
    let site = Site::start(2, 0, false);
    let config = config(&site);
    let (a, b) = (Front::start(&config), Front::start(&config));
    let mut c = a.client();
    let value = "v".repeat(1000);
    let fields = mebibytes * 1024;
    for from in (0..fields).step_by(500) {
        let mut words = vec!["HSET".to_owned(), "{big}hash".to_owned()];
        for f in from..(from + 500).min(fields) {
            words.extend([format!("f{f}"), value.clone()]);
        }
        assert!(matches!(c.call(&words), Value::Int(_)));
    }
    // Others read and write it, and its slot, all the while.
    let stop = Arc::new(AtomicBool::new(false));
    let others: Vec<_> = [&a, &b]
        .into_iter()
        .enumerate()
        .map(|(t, f)| {
            let (mut c, stop) = (f.client(), Arc::clone(&stop));
            std::thread::spawn(move || {
                let (mut n, mut waits) = (0i64, Vec::new());
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    let begun = Instant::now();
                    assert_eq!(c.call(&["HINCRBY", "{big}hash", &format!("n{t}"), "1"]), Value::Int(n));
                    waits.push(begun.elapsed());
                    let begun = Instant::now();
                    assert_eq!(c.call(&["SET", &format!("{{big}}{t}"), &n.to_string()]), Value::ok());
                    waits.push(begun.elapsed());
                }
                waits.sort();
                (n, waits)
            })
        })
        .collect();
    std::thread::park_timeout(Duration::from_millis(500));
    let s = slot(b"big");
    let to = if owns(&mut c, "g0", s) { "g1" } else { "g0" };
    dba(&mut c, "RATE 0 0");
    dba(&mut c, &format!("MOVE {s} TO {to}"));
    let mut took = None;
    let begun = Instant::now();
    while took.is_none() {
        assert!(begun.elapsed() < Duration::from_secs(600), "{:#}", dba(&mut c, "MOVES"));
        if dba(&mut c, "MOVES")["legs"].as_array().unwrap().is_empty() {
            took = Some(begun.elapsed());
        }
        std::thread::park_timeout(Duration::from_millis(100));
    }
    stop.store(true, Ordering::Relaxed);
    let mut slowest = Duration::ZERO;
    for (t, o) in others.into_iter().enumerate() {
        let (n, waits) = o.join().unwrap();
        assert_eq!(
            c.call(&["HGET", "{big}hash", &format!("n{t}")]),
            Value::bulk(&n.to_string())
        );
        assert_eq!(c.call(&["GET", &format!("{{big}}{t}")]), Value::bulk(&n.to_string()));
        slowest = slowest.max(*waits.last().unwrap());
        println!("{} requests, median {:?}", waits.len(), waits[waits.len() / 2]);
    }
    assert_eq!(c.say("HLEN {big}hash"), Value::Int(fields as i64 + 2));
    for f in (0..fields).step_by(997) {
        assert_eq!(c.call(&["HGET", "{big}hash", &format!("f{f}")]), Value::bulk(&value));
    }
    println!("a hash of {mebibytes} MiB moved in {took:?}; the slowest request on its slot {slowest:?}");
    // On a machine that does other things too, a wait may be the machine's.
    assert!(
        slowest < Duration::from_millis(if mebibytes > 100 { 1000 } else { 500 }),
        "{slowest:?}"
    );
}

// contract: redis-proxy#27
#[test]
fn a_large_hash_moves_in_parts() {
    big_hash(50);
}

// contract: redis-proxy#27
#[test]
#[ignore = "full tier: a hash of a gigabyte"]
fn a_hash_of_a_gigabyte_moves_in_parts() {
    big_hash(1024);
}

// contract: redis-proxy#15, redis-proxy#26
#[test]
#[ignore = "full tier: three groups of three under Sentinel, and a primary killed in a move"]
fn a_move_outlives_the_fail_over_of_its_groups() {
    let mut site = Site::start(3, 2, true);
    let mut config = crate::site::sharded(&site);
    config.sharded.lease_ms = 3000;
    let (a, b) = (Front::start(&config), Front::start(&config));
    let mut c = a.client();
    fill(&mut c, 3000);
    dba(&mut c, "RATE 0 200");
    dba(&mut c, "MOVE 0-5461 TO g1");
    crate::rig::wait_for("some of it", || {
        dba(&mut c, "MOVES")["legs"][0]["progress"]["keys_copied"]
            .as_u64()
            .unwrap_or(0)
            > 200
    });
    // First where it comes from, then where it goes to.
    for group in [0, 1] {
        site.groups[group].servers.remove(0).kill();
        std::thread::park_timeout(Duration::from_secs(6));
    }
    dba(&mut b.client(), "RATE 0 0");
    moved(&mut c, &[&a, &b]);
    filled(&mut c, 3000);
    filled(&mut b.client(), 3000);
    assert_eq!(slots_of(&mut c, "g0"), 0);
}
