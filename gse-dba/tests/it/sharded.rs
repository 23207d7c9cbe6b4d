//! Several groups of real Redis under real Sentinels: every command reaches its group, nothing acknowledged is lost when a primary is killed, and too few copies
//! refuse writes before they are executed.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::rig::{Ours, Raw, Value, pause, wait_for};
use crate::site::{Site, sharded, sharded_list};

/// Writes until told otherwise and keeps what was acknowledged: `INCR`-like values, so that a lost write shows as an older one.
pub(crate) struct Ledger {
    pub(crate) acknowledged: HashMap<String, u64>,
    /// What may or may not have happened.
    attempted: HashMap<String, u64>,
    pub(crate) errors: Vec<String>,
}

impl Ledger {
    pub(crate) fn new() -> Self {
        Self {
            acknowledged: HashMap::new(),
            attempted: HashMap::new(),
            errors: Vec::new(),
        }
    }

    pub(crate) fn write(&mut self, c: &mut Raw, key: &str, n: u64) {
        self.attempted.insert(key.to_owned(), n);
        match c.call(&["SET", key, &n.to_string()]) {
            Value::Simple(ok) if ok == "OK" => {
                self.acknowledged.insert(key.to_owned(), n);
            }
            Value::Error(e) => self.errors.push(e),
            other => panic!("{other:?}"),
        }
    }

    /// Every key has what was acknowledged, or something newer that was attempted.
    pub(crate) fn check(&self, c: &mut Raw) {
        for (key, n) in &self.acknowledged {
            let got = match c.call(&["GET", key]) {
                Value::Bulk(b) => String::from_utf8(b).unwrap().parse::<u64>().unwrap(),
                other => panic!("{key}: acknowledged {n}, read {other:?}"),
            };
            assert!(
                got >= *n && got <= self.attempted[key],
                "{key}: acknowledged {n}, read {got}"
            );
        }
    }
}

// contract: redis-proxy#6, redis-proxy#7, redis-proxy#8, redis-proxy#12, redis-proxy#14
#[test]
fn commands_reach_all_groups_and_come_back_as_one() {
    let site = Site::start(3, 2, true);
    let ours = Ours::start(sharded(&site));
    let mut c = ours.client();
    let keys: Vec<String> = (0..300).map(|i| format!("key{i}")).collect();
    for (i, k) in keys.iter().enumerate() {
        assert_eq!(c.call(&["SET", k, &i.to_string()]), Value::ok(), "{k}");
    }
    let with = |name: &str| -> Vec<String> { std::iter::once(name.to_owned()).chain(keys.clone()).collect() };
    let got = c.call(&with("MGET"));
    let want: Vec<Value> = (0..300).map(|i: usize| Value::bulk(&i.to_string())).collect();
    assert_eq!(got, Value::Array(want));
    assert_eq!(c.say("DBSIZE"), Value::Int(300));
    assert_eq!(c.call(&with("EXISTS")), Value::Int(300));
    // Each group has its part, on every copy.
    let sizes: Vec<i64> = site
        .groups
        .iter()
        .map(|g| g.servers[0].client().say("DBSIZE").int())
        .collect();
    assert!(
        sizes.iter().all(|n| *n > 50) && sizes.iter().sum::<i64>() == 300,
        "{sizes:?}"
    );
    let (mut cursor, mut seen) = ("0".to_owned(), Vec::new());
    loop {
        let page = c.call(&["SCAN", &cursor, "COUNT", "20"]);
        seen.extend(page.items()[1].items().iter().map(Value::text));
        cursor = page.items()[0].text();
        if cursor == "0" {
            break;
        }
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 300);
    assert_eq!(c.say("KEYS key1*").items().len(), 111);
    let mut wrong = 0;
    for i in 0..20 {
        for line in [
            format!("RENAME a{i} b{i}"),
            format!("SINTER a{i} b{i}"),
            format!("MSET a{i} 1 b{i} 2"),
            format!("SUNIONSTORE a{i} b{i} c{i}"),
        ] {
            wrong += usize::from(!matches!(c.say(&line), Value::Error(e) if e.starts_with("CROSSSLOT")));
        }
        assert_eq!(c.say(&format!("SET {{t{i}}}a {i}")), Value::ok());
        assert_eq!(c.say(&format!("RENAME {{t{i}}}a {{t{i}}}b")), Value::ok());
    }
    assert_eq!(wrong, 0);
    // A transaction is in one slot, and nothing of it shows before its end.
    let mut other = ours.client();
    assert_eq!(c.say("MULTI"), Value::ok());
    assert_eq!(c.say("INCR {n}x"), Value::Simple("QUEUED".into()));
    assert_eq!(other.say("GET {n}x"), Value::Null);
    assert_eq!(c.say("INCR {n}x"), Value::Simple("QUEUED".into()));
    assert_eq!(c.say("EXEC"), Value::Array(vec![Value::Int(1), Value::Int(2)]));
    c.say("MULTI");
    c.say("INCR {n}x");
    assert!(matches!(c.say("INCR elsewhere"), Value::Error(e) if e.starts_with("CROSSSLOT")));
    assert!(matches!(c.say("EXEC"), Value::Error(e) if e.starts_with("EXECABORT")));
    assert_eq!(c.say("GET {n}x"), Value::bulk("2"));
    // A watched key that another changes aborts.
    assert_eq!(c.say("WATCH {n}x"), Value::ok());
    assert_eq!(other.say("SET {n}x 9"), Value::ok());
    c.say("MULTI");
    c.say("INCR {n}x");
    assert_eq!(c.say("EXEC"), Value::NullArray);
    // Blocking pops block on their own connection.
    c.send(&crate::rig::encode(&["BLPOP", "list", "0"]));
    pause();
    assert_eq!(other.say("RPUSH list x"), Value::Int(1));
    assert_eq!(c.reply(), Value::Array(vec![Value::bulk("list"), Value::bulk("x")]));
    let told = c.say("INFO sharding").text();
    assert!(
        told.contains("2 of 3: an acknowledged write is on at least 2 copies") && told.matches("state=ok").count() == 3,
        "{told}"
    );
    assert_eq!(c.call(&with("DEL")), Value::Int(300));
    // Slots are those of a real server.
    let cluster = crate::site::cluster_server();
    let mut asked = cluster.client();
    for key in ["a", "{x}y", "{}z", "{{q}}", "foo{bar}{zap}", "", "\u{e9}"] {
        assert_eq!(
            asked.call(&["CLUSTER", "KEYSLOT", key]),
            Value::Int(i64::from(gse_core::store::slot(key.as_bytes())))
        );
    }
}

// contract: redis-proxy#15, redis-proxy#20
#[test]
fn no_acknowledged_write_is_lost_when_a_primary_is_killed() {
    lose_a_primary(false);
}

/// A primary that stands still is replaced; when it goes on it still thinks that it is one.
#[test]
fn nothing_of_a_frozen_primary_is_believed_when_it_goes_on() {
    lose_a_primary(true);
}

fn lose_a_primary(freeze: bool) {
    let mut site = Site::start(3, 2, true);
    let ours = Ours::start(sharded(&site));
    let mut c = ours.client();
    let mut ledger = Ledger::new();
    let mut n = 0;
    let mut round = |c: &mut Raw, ledger: &mut Ledger| {
        n += 1;
        for k in 0..40 {
            ledger.write(c, &format!("k{k}"), n);
        }
    };
    round(&mut c, &mut ledger);
    assert_eq!(ledger.errors, Vec::<String>::new());
    // Others write all the while, so that some are caught with a write under way.
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let others: Vec<_> = (0..6)
        .map(|t| {
            let (mut c, stop) = (ours.client(), stop.clone());
            std::thread::spawn(move || {
                let (mut ledger, mut n) = (Ledger::new(), 0);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    n += 1;
                    for k in 0..20 {
                        ledger.write(&mut c, &format!("other{t}:{k}"), n);
                    }
                }
                ledger
            })
        })
        .collect();
    std::thread::park_timeout(Duration::from_millis(300));
    let dead = site.groups[1].servers[0].addr.to_string();
    let gone = site.groups[1].servers.remove(0);
    let frozen = if freeze {
        gone.freeze();
        Some(gone)
    } else {
        gone.kill();
        None
    };
    let killed = Instant::now();
    let mut back = None;
    while killed.elapsed() < Duration::from_secs(15) {
        let errors = ledger.errors.len();
        round(&mut c, &mut ledger);
        let told = c.say("INFO sharding").text();
        if ledger.errors.len() == errors && !told.contains(&dead) && told.matches("state=ok").count() == 3 {
            back = Some(killed.elapsed());
            break;
        }
    }
    let back = back.expect("the group did not come back");
    if let Some(frozen) = &frozen {
        frozen.thaw();
        wait_for("the old primary to become a copy", || {
            round(&mut c, &mut ledger);
            ledger.check(&mut c);
            frozen.client().say("INFO replication").text().contains("role:slave")
        });
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let mut written = 0;
    for other in others {
        let mut other = other.join().unwrap();
        other.check(&mut c);
        written += other.acknowledged.values().sum::<u64>();
        ledger.errors.append(&mut other.errors);
    }
    assert!(written > 100, "they wrote next to nothing: {written}");
    println!(
        "writes go on {back:?} after the kill; {} errors: {:?}",
        ledger.errors.len(),
        ledger.errors.first()
    );
    assert!(
        ledger.errors.iter().all(|e| ["UNCERTAIN", "UNAVAILABLE", "NOREPLICAS"]
            .iter()
            .any(|p| e.starts_with(p))),
        "{:?}",
        ledger.errors
    );
    ledger.check(&mut c);
    // The two that are left of that group have it all, whichever is asked.
    round(&mut c, &mut ledger);
    ledger.check(&mut ours.client());
}

// contract: redis-proxy#20
#[test]
fn too_few_copies_refuse_writes_before_anything_is_executed() {
    let mut site = Site::start(1, 2, false);
    let mut config = sharded_list(&site);
    config.sharded.hold_ms = 500;
    config.sharded.wait_ms = 300;
    let ours = Ours::start(config);
    let mut c = ours.client();
    assert_eq!(c.say("SET a 1"), Value::ok());
    // Frozen copies are there and do not confirm: executed, and never said to be safe.
    site.groups[0].servers[1].freeze();
    site.groups[0].servers[2].freeze();
    let frozen = c.say("SET a 2");
    assert!(
        matches!(&frozen, Value::Error(e) if e.starts_with("UNCERTAIN")),
        "{frozen:?}"
    );
    site.groups[0].servers.remove(2).kill();
    site.groups[0].servers.remove(1).kill();
    wait_for(
        "the refusal",
        || matches!(c.say("SET b 1"), Value::Error(e) if e.starts_with("NOREPLICAS")),
    );
    let before = site.groups[0].servers[0].client().say("GET a").text();
    for line in ["SET a 3", "DEL a b", "MULTI"] {
        let reply = c.say(line);
        assert!(
            line == "MULTI" || matches!(&reply, Value::Error(e) if e.starts_with("NOREPLICAS")),
            "{reply:?}"
        );
    }
    // The Redis itself may say so when the command is queued.
    let queued = c.say("SET a 4");
    assert!(
        queued == Value::Simple("QUEUED".into()) || matches!(&queued, Value::Error(e) if e.starts_with("NOREPLICAS")),
        "{queued:?}"
    );
    assert!(matches!(c.say("EXEC"), Value::Error(e) if e.starts_with("NOREPLICAS") || e.starts_with("EXECABORT")));
    assert_eq!(site.groups[0].servers[0].client().say("GET a").text(), before);
    assert_eq!(c.say("GET a").text(), before, "reads go on");
}

#[test]
fn a_set_up_that_breaks_the_promise_refuses_to_start() {
    let site = Site::start(1, 1, false);
    let mut config = sharded_list(&site);
    config.sharded.copies = 2;
    let ours = Ours::start(config.clone());
    ours.stop();
    for (name, bad) in [
        ("appendonly", "no"),
        ("appendfsync", "everysec"),
        ("appendfsync", "no"),
        ("maxmemory-policy", "allkeys-lru"),
        ("replica-read-only", "no"),
        ("min-replicas-to-write", "0"),
        ("replica-priority", "7"),
    ] {
        let mut copy = site.groups[0].servers[1].client();
        copy.say("CONFIG SET maxmemory 1gb");
        let good = copy.say(&format!("CONFIG GET {name}")).items()[1].text();
        assert_eq!(copy.say(&format!("CONFIG SET {name} {bad}")), Value::ok());
        let error = Ours::try_start(config.clone())
            .err()
            .map(|e| format!("{e:#}"))
            .unwrap_or_default();
        assert!(error.contains(name), "{name}: {error:?}");
        // When that is put up with, it says so and serves.
        let mut warn = config.clone();
        warn.sharded.checks = gse_dba::config::sharded::Checks::Warn;
        let ours = Ours::start(warn);
        assert_eq!(ours.client().say("SET a 1"), Value::ok());
        let told = ours.client().say("DBA STATUS").text();
        assert!(told.contains(name), "{name}: {told}");
        ours.stop();
        assert_eq!(copy.say(&format!("CONFIG SET {name} {good}")), Value::ok());
    }
    config.sharded.one_host = false;
    let error = Ours::try_start(config)
        .err()
        .map(|e| format!("{e:#}"))
        .unwrap_or_default();
    assert!(error.contains("one host"), "{error:?}");
}

#[test]
fn answers_of_a_server_that_was_demoted_are_dropped() {
    let site = Site::start(1, 2, false);
    let mut config = sharded_list(&site);
    // No look helps: what a seal says must be enough.
    config.sharded.poll_ms = 60_000;
    config.sharded.hold_ms = 300;
    let ours = Ours::start(config);
    let mut c = ours.client();
    assert_eq!(c.say("SET a 1"), Value::ok());
    let (first, second) = (&site.groups[0].servers[0], &site.groups[0].servers[1]);
    second.client().say("REPLICAOF NO ONE");
    second.client().say("CONFIG SET min-replicas-to-write 0");
    assert_eq!(second.client().say("SET a 2"), Value::ok());
    let line = format!("REPLICAOF 127.0.0.1 {}", second.addr.port());
    first.client().say(&line);
    for _ in 0..20 {
        match c.say("GET a") {
            Value::Error(e) => assert!(e.starts_with("UNAVAILABLE"), "{e}"),
            other => assert_eq!(other, Value::bulk("2"), "an answer of a demoted server"),
        }
        match c.say("SET a 3") {
            Value::Error(e) => assert!(
                ["UNAVAILABLE", "UNCERTAIN", "NOREPLICAS"]
                    .iter()
                    .any(|p| e.starts_with(p)),
                "{e}"
            ),
            // The lost connection had the group looked at, and its new primary is followed already.
            other => {
                assert_eq!(other, Value::ok());
                assert_eq!(
                    second.client().say("GET a"),
                    Value::bulk("3"),
                    "a demoted server took a write"
                );
                return;
            }
        }
    }
}
