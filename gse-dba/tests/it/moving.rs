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
    config.sharded.lease_ms = 600;
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
        let Front { process, dir, mut config } = self;
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
    assert_eq!((slots_of(&mut d, "g0"), slots_of(&mut d, "g2")), (before.0 - 3000, before.1 + 3000));
    for i in 0..3000 {
        assert_eq!(d.call(&["GET", &format!("k{i}")]), Value::bulk(&i.to_string()));
    }
    // Each key is in one group, and in the right one.
    let keys = |g: usize| -> Vec<String> {
        site.groups[g].servers[0].client().say("KEYS *").items().iter().map(Value::text).collect()
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
