//! A real Redis Cluster: commands reach their shards, and neither slots that move nor primaries that die show to a client.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gse_dba::config::{Backend, Config, cluster::Reads};

use crate::rig::{Ours, PASSWORD, Raw, Value, encode, pause, wait_for};

/// A node that can be killed and started again with its data.
struct Node {
    addr: SocketAddr,
    dir: tempfile::TempDir,
    child: Child,
}

impl Node {
    fn start() -> Node {
        let port = loop {
            // Its bus listens 10000 ports higher, where there has to be a port.
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            if port < 55_000 && TcpListener::bind(("127.0.0.1", port + 10_000)).is_ok() {
                break port;
            }
        };
        let dir = tempfile::tempdir().unwrap();
        let node = Node {
            addr: ([127, 0, 0, 1], port).into(),
            child: Self::spawn(port, dir.path()),
            dir,
        };
        wait_for("redis-server", || TcpStream::connect(node.addr).is_ok());
        node
    }

    fn spawn(port: u16, dir: &std::path::Path) -> Child {
        Command::new("redis-server")
            .args([
                "--port",
                &port.to_string(),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--dir",
            ])
            .arg(dir)
            .args([
                "--logfile",
                "log",
                "--cluster-enabled",
                "yes",
                "--cluster-node-timeout",
                "2000",
            ])
            .args([
                "--cluster-allow-replica-migration",
                "no",
                "--cluster-replica-validity-factor",
                "0",
            ])
            .args([
                "--appendonly",
                "yes",
                "--appendfsync",
                "always",
                "--repl-diskless-sync-delay",
                "0",
            ])
            .args(["--min-replicas-to-write", "1", "--min-replicas-max-lag", "5"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("redis-server is not installed: apt-get install redis-server")
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.child = Self::spawn(self.addr.port(), self.dir.path());
        wait_for("redis-server", || TcpStream::connect(self.addr).is_ok());
    }

    fn client(&self) -> Raw {
        Raw::connect(self.addr)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn id(&self) -> String {
        self.client().say("CLUSTER MYID").text()
    }

    fn is_primary(&self) -> bool {
        self.client().say("INFO replication").text().contains("role:master")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Nodes(Vec<Node>);

fn redis_cli(args: &[&str]) -> String {
    let done = Command::new("redis-cli")
        .args(args)
        .output()
        .expect("redis-cli is not installed: apt-get install redis-tools");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "redis-cli {args:?}: {text}");
    text
}

impl Nodes {
    /// Three primaries with a copy each.
    fn six() -> Nodes {
        let nodes: Vec<Node> = (0..6).map(|_| Node::start()).collect();
        let addresses: Vec<String> = nodes.iter().map(|n| n.addr.to_string()).collect();
        let mut args = vec!["--cluster", "create"];
        args.extend(addresses.iter().map(String::as_str));
        args.extend(["--cluster-replicas", "1", "--cluster-yes"]);
        redis_cli(&args);
        let nodes = Nodes(nodes);
        nodes.settle();
        nodes
    }

    /// Waits until all agree and every copy follows.
    fn settle(&self) {
        for n in &self.0 {
            let mut c = n.client();
            wait_for("the cluster", || {
                c.say("CLUSTER INFO").text().contains("cluster_state:ok")
            });
            wait_for("the copies", || {
                let told = c.say("INFO replication").text();
                told.contains("master_link_status:up") || told.contains("state=online")
            });
        }
    }

    fn config(&self) -> Config {
        let mut config = Config {
            listen: "127.0.0.1:0".into(),
            password: Some(PASSWORD.into()),
            backend: Backend::Cluster,
            ..Config::default()
        };
        config.cluster.seeds = vec![self.0[0].addr.to_string(), self.0[4].addr.to_string()];
        config.cluster.one_host = true;
        config.cluster.poll_ms = 200;
        config.cluster.reconnect_max_ms = 100;
        config.cluster.wait_ms = 2000;
        config.cluster.hold_ms = 15_000;
        config.cluster.connect_timeout_ms = 5000;
        config
    }

    /// The index of the primary that serves a key.
    fn owner(&self, key: &str) -> usize {
        let slot = gse_core::store::slot(key.as_bytes());
        let shards = self.0.iter().find_map(|n| {
            TcpStream::connect(n.addr).ok()?;
            Some(n.client().say("CLUSTER SLOTS"))
        });
        let shards = shards.expect("a node that lives");
        let port = shards
            .items()
            .iter()
            .find(|s| (s.items()[0].int()..=s.items()[1].int()).contains(&i64::from(slot)))
            .map(|s| s.items()[2].items()[1].int())
            .expect("an owner");
        self.0.iter().position(|n| i64::from(n.addr.port()) == port).unwrap()
    }
}

const HIDDEN: [&str; 5] = ["MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "CROSSSLOT"];

/// Counters that go up by `INCR` and registers that go up by `SET`, written by several clients; what was acknowledged must be there at the end.
#[derive(Default)]
struct Ledger {
    /// For each key what was acknowledged at least, and what was attempted at most.
    keys: HashMap<String, (i64, i64)>,
    written: u64,
    errors: Vec<String>,
}

impl Ledger {
    fn heard(&mut self, key: &str, reply: &Value, value: i64) {
        let known = self.keys.entry(key.to_owned()).or_default();
        known.1 = known.1.max(value);
        match reply {
            Value::Simple(ok) if ok == "OK" => {
                known.0 = value;
                self.written += 1;
            }
            Value::Error(e) => {
                assert!(!HIDDEN.iter().any(|h| e.starts_with(h)), "a client saw {e}");
                assert!(
                    ["UNCERTAIN", "UNAVAILABLE", "NOREPLICAS"]
                        .iter()
                        .any(|p| e.starts_with(p)),
                    "{e}"
                );
                self.errors.push(e.clone());
            }
            other => panic!("{key}: {other:?}"),
        }
    }

    fn check(&self, c: &mut Raw) {
        for (key, (acknowledged, attempted)) in &self.keys {
            let got = match c.call(&["GET", key]) {
                Value::Null => 0,
                Value::Bulk(b) => String::from_utf8(b).unwrap().parse::<i64>().unwrap(),
                other => panic!("{key}: {other:?}"),
            };
            assert!(
                (*acknowledged..=*attempted).contains(&got),
                "{key}: acknowledged {acknowledged}, attempted {attempted}, read {got}"
            );
        }
    }
}

/// Clients that write pipelines, some commands of several keys among them, until told to stop.
struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<Ledger>>,
}

impl Writers {
    fn start(ours: &Ours, n: usize) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..n)
            .map(|t| {
                let (mut c, stop) = (ours.client(), stop.clone());
                std::thread::spawn(move || {
                    let (mut ledger, mut value) = (Ledger::default(), 0);
                    while !stop.load(Ordering::Relaxed) {
                        value += 1;
                        write(&mut c, &mut ledger, t, value);
                    }
                    ledger
                })
            })
            .collect();
        Writers { stop, threads }
    }

    fn stop(self) -> Vec<Ledger> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().map(|t| t.join().unwrap()).collect()
    }
}

/// One pipeline: registers, a pair in one slot by MSET, reads of both, a transaction.
fn write(c: &mut Raw, ledger: &mut Ledger, t: usize, value: i64) {
    let v = value.to_string();
    let mut out = Vec::new();
    let keys: Vec<String> = (0..8).map(|k| format!("w{t}:{k}")).collect();
    for k in &keys {
        out.extend(encode(&["SET", k, &v]));
    }
    let (a, b) = (format!("{{pair{t}}}a"), format!("{{pair{t}}}b"));
    out.extend(encode(&["MSET", &a, &v, &b, &v]));
    out.extend(encode(&["MGET", &a, &b]));
    out.extend(encode(&["SET", &a, &v]));
    out.extend(encode(&["MGET", &keys[0], &keys[1], &keys[2]]));
    let x = format!("{{tx{t}}}x");
    let y = format!("{{tx{t}}}y");
    for line in [vec!["MULTI"], vec!["SET", &x, &v], vec!["SET", &y, &v], vec!["EXEC"]] {
        out.extend(encode(&line));
    }
    c.send(&out);
    let mut acknowledged = Vec::new();
    for k in &keys {
        let reply = c.reply();
        acknowledged.push(reply == Value::ok());
        ledger.heard(k, &reply, value);
    }
    let reply = c.reply();
    ledger.heard(&a, &reply, value);
    ledger.heard(&b, &reply, value);
    // Never more than what this client has written, never half of a pair that was written.
    match (c.reply(), reply == Value::ok()) {
        (Value::Array(got), true) => assert_eq!(got, vec![Value::bulk(&v), Value::bulk(&v)]),
        (Value::Error(e), _) => assert!(!HIDDEN.iter().any(|h| e.starts_with(h)), "a client saw {e}"),
        _ => {}
    }
    let reply = c.reply();
    ledger.heard(&a, &reply, value);
    match c.reply() {
        Value::Array(got) => {
            for (i, got) in got.iter().enumerate() {
                assert!(
                    !acknowledged[i] || *got == Value::bulk(&v),
                    "{}: wrote {v}, read {got:?}",
                    keys[i]
                );
            }
        }
        Value::Error(e) => assert!(!HIDDEN.iter().any(|h| e.starts_with(h)), "a client saw {e}"),
        other => panic!("{other:?}"),
    }
    let replies: Vec<Value> = (0..4).map(|_| c.reply()).collect();
    // All of a transaction or nothing of it.
    if replies[1..3].iter().any(|r| matches!(r, Value::Error(_))) {
        assert!(matches!(&replies[3], Value::Error(_)), "{replies:?}");
    }
    let done = match &replies[3] {
        Value::Array(all) if all.len() == 2 => Value::ok(),
        Value::Error(e) => {
            assert!(!HIDDEN.iter().any(|h| e.contains(h)), "a client saw {e}");
            // Spoiled by a command before: that one said why.
            if e.starts_with("EXECABORT") {
                replies[1..3]
                    .iter()
                    .find(|r| matches!(r, Value::Error(_)))
                    .cloned()
                    .unwrap_or_else(|| panic!("{replies:?}"))
            } else {
                replies[3].clone()
            }
        }
        _ => panic!("{replies:?}"),
    };
    ledger.heard(&x, &done, value);
    ledger.heard(&y, &done, value);
}

fn settle_up(ledgers: Vec<Ledger>, ours: &Ours) -> u64 {
    let mut c = ours.client();
    let (mut written, mut errors) = (0, Vec::new());
    for l in ledgers {
        l.check(&mut c);
        written += l.written;
        errors.extend(l.errors);
    }
    println!(
        "{written} writes acknowledged, {} not: {:?}",
        errors.len(),
        errors.first()
    );
    written
}

// contract: redis-proxy#6, redis-proxy#7, redis-proxy#8, redis-proxy#12
#[test]
fn a_cluster_looks_like_one_redis() {
    let nodes = Nodes::six();
    let ours = Ours::start(nodes.config());
    let mut c = ours.client();
    let keys: Vec<String> = (0..300).map(|i| format!("key{i}")).collect();
    for (i, k) in keys.iter().enumerate() {
        assert_eq!(c.call(&["SET", k, &i.to_string()]), Value::ok(), "{k}");
    }
    let with = |name: &str| -> Vec<String> { std::iter::once(name.to_owned()).chain(keys.clone()).collect() };
    let want: Vec<Value> = (0..300).map(|i: usize| Value::bulk(&i.to_string())).collect();
    assert_eq!(c.call(&with("MGET")), Value::Array(want));
    assert_eq!(c.call(&with("EXISTS")), Value::Int(300));
    assert_eq!(c.say("DBSIZE"), Value::Int(300));
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
    for i in 0..20 {
        for line in [
            format!("RENAME a{i} b{i}"),
            format!("SINTER a{i} b{i}"),
            format!("MSET a{i} 1 b{i} 2"),
        ] {
            assert!(
                matches!(c.say(&line), Value::Error(e) if e.starts_with("CROSSSLOT")),
                "{line}"
            );
        }
        assert_eq!(c.say(&format!("SET {{t{i}}}a {i}")), Value::ok());
        assert_eq!(c.say(&format!("RENAME {{t{i}}}a {{t{i}}}b")), Value::ok());
    }
    let mut other = ours.client();
    assert_eq!(c.say("MULTI"), Value::ok());
    assert_eq!(c.say("INCR {n}x"), Value::Simple("QUEUED".into()));
    assert_eq!(other.say("GET {n}x"), Value::Null);
    assert_eq!(c.say("INCR {n}x"), Value::Simple("QUEUED".into()));
    assert_eq!(c.say("EXEC"), Value::Array(vec![Value::Int(1), Value::Int(2)]));
    assert_eq!(c.say("WATCH {n}x"), Value::ok());
    assert_eq!(other.say("SET {n}x 9"), Value::ok());
    c.say("MULTI");
    c.say("INCR {n}x");
    assert_eq!(c.say("EXEC"), Value::NullArray);
    c.send(&encode(&["BLPOP", "list", "0"]));
    pause();
    assert_eq!(other.say("RPUSH list x"), Value::Int(1));
    assert_eq!(c.reply(), Value::Array(vec![Value::bulk("list"), Value::bulk("x")]));
    assert_eq!(c.say("EVAL return{KEYS[1]} 1 k"), Value::Array(vec![Value::bulk("k")]));
    let told = c.say("INFO").text();
    assert!(told.contains("gse_dba_backend:cluster"), "{told}");
    assert!(
        told.contains("cluster, 2 of 2: an acknowledged write is on every copy")
            && told.matches("state=ok").count() == 3,
        "{told}"
    );
    let status = c.say("DBA STATUS").text();
    assert!(status.contains("\"mode\":\"cluster\""), "{status}");
    assert_eq!(c.call(&with("DEL")), Value::Int(300));
}

// contract: redis-proxy#5, redis-proxy#6
#[test]
fn a_cluster_replies_as_one_redis_does() {
    let nodes = Nodes::six();
    crate::same_as_redis::alike(&Ours::start(nodes.config()), 60);
}

// contract: redis-proxy#11
#[test]
fn messages_come_once_whichever_node_has_them() {
    let nodes = Nodes::six();
    let (one, two) = (Ours::start(nodes.config()), Ours::start(nodes.config()));
    let (mut a, mut p, mut s) = (one.client(), two.client(), one.client());
    let words = |v: Value| v.items().iter().map(Value::text).collect::<Vec<_>>();
    assert_eq!(words(a.say("SUBSCRIBE c1"))[..2], ["subscribe", "c1"]);
    assert_eq!(words(a.say("PSUBSCRIBE c*"))[..2], ["psubscribe", "c*"]);
    for n in 0..20 {
        let channel = format!("s{n}");
        assert_eq!(words(s.call(&["SSUBSCRIBE", &channel]))[..2], ["ssubscribe", &channel]);
    }
    assert!(matches!(p.say("PUBLISH c1 x"), Value::Int(_)));
    nodes.0[2].client().say("PUBLISH c1 direct");
    for text in ["x", "direct"] {
        let mut got = [words(a.reply()), words(a.reply())];
        got.sort();
        assert_eq!(got, [vec!["message", "c1", text], vec!["pmessage", "c*", "c1", text]]);
    }
    for n in 0..20 {
        let channel = format!("s{n}");
        assert!(matches!(p.call(&["SPUBLISH", &channel, "y"]), Value::Int(_)));
        assert_eq!(words(s.reply()), ["smessage", &channel, "y"]);
    }
    // The slot of a channel moves, and its messages come from there.
    let slot = gse_core::store::slot(b"s7");
    let from = nodes.owner("s7");
    let to = (0..6).find(|i| *i != from && nodes.0[*i].is_primary()).unwrap();
    for n in [to, from] {
        let line = format!("CLUSTER SETSLOT {slot} NODE {}", nodes.0[to].id());
        assert_eq!(nodes.0[n].client().say(&line), Value::ok());
    }
    s.stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut heard = false;
    wait_for("a message after the move", || {
        assert!(!matches!(p.say("SPUBLISH s7 z"), Value::Error(_)));
        std::thread::park_timeout(Duration::from_millis(100));
        let mut byte = [0];
        heard |= s.stream.peek(&mut byte).is_ok();
        heard
    });
    assert_eq!(words(s.reply()), ["smessage", "s7", "z"]);
}

// contract: redis-proxy#15, redis-proxy#28
#[test]
fn a_primary_that_is_killed_is_a_delay_and_loses_nothing() {
    let mut nodes = Nodes::six();
    let ours = Ours::start(nodes.config());
    let writers = Writers::start(&ours, 4);
    std::thread::park_timeout(Duration::from_millis(500));
    let victim = nodes.owner("w0:0");
    let dead = nodes.0[victim].addr.to_string();
    nodes.0[victim].kill();
    let killed = Instant::now();
    let mut c = ours.client();
    wait_for("another primary", || {
        let told = c.say("DBA STATUS").text();
        !told.contains(&dead)
    });
    println!("followed after {:?}", killed.elapsed());
    // Reads go on from the one copy there is; writes when the dead one is back as its copy.
    assert!(matches!(c.say("GET w0:0"), Value::Bulk(_)));
    nodes.0[victim].restart();
    wait_for("writes", || {
        c.say("SET w0:0:probe 1") == Value::ok() && c.say("INFO sharding").text().matches("state=ok").count() == 3
    });
    std::thread::park_timeout(Duration::from_millis(500));
    assert!(!nodes.0[victim].is_primary());
    let written = settle_up(writers.stop(), &ours);
    assert!(written > 100, "they wrote next to nothing: {written}");
}

// contract: redis-proxy#28
#[test]
fn a_planned_fail_over_of_a_node_shows_to_nobody() {
    let nodes = Nodes::six();
    let ours = Ours::start(nodes.config());
    let writers = Writers::start(&ours, 4);
    for round in 0..2 {
        std::thread::park_timeout(Duration::from_millis(300));
        let primary = nodes.owner("w0:0");
        let id = nodes.0[primary].id();
        let copy = nodes
            .0
            .iter()
            .find(|n| {
                n.client()
                    .say("CLUSTER NODES")
                    .text()
                    .lines()
                    .any(|l| l.contains("myself,slave") && l.contains(&id))
            })
            .expect("a copy");
        // The nodes give up an attempt after five seconds.
        let done = (0..6).any(|n| {
            if n > 0 {
                println!("again: {}\n {}", copy.log(), nodes.0[primary].log());
            }
            copy.client().say("CLUSTER FAILOVER");
            let until = Instant::now() + Duration::from_secs(6);
            while Instant::now() < until && !copy.is_primary() {
                pause();
            }
            copy.is_primary()
        });
        assert!(done, "the copy does not become primary: {}", copy.log());
        let mut c = ours.client();
        wait_for("writes", || c.say(&format!("SET w0:0:probe {round}")) == Value::ok());
    }
    assert!(settle_up(writers.stop(), &ours) > 100);
}

// contract: redis-proxy#28
#[test]
fn slots_that_move_show_to_nobody() {
    let nodes = Nodes::six();
    let ours = Ours::start(nodes.config());
    let writers = Writers::start(&ours, 4);
    let mut c = ours.client();
    // By hand and slowly: a slot on its way with one key of a pair on each side, then to its end.
    for t in 0..4 {
        let tag = format!("{{pair{t}}}a");
        let (from, to) = (
            nodes.owner(&tag),
            (0..6)
                .find(|i| *i != nodes.owner(&tag) && nodes.0[*i].is_primary())
                .unwrap(),
        );
        let slot = gse_core::store::slot(tag.as_bytes());
        let (from, to) = (&nodes.0[from], &nodes.0[to]);
        wait_for("the pair", || {
            from.client().say(&format!("CLUSTER COUNTKEYSINSLOT {slot}")).int() >= 2
        });
        assert_eq!(
            to.client()
                .say(&format!("CLUSTER SETSLOT {slot} IMPORTING {}", from.id())),
            Value::ok()
        );
        assert_eq!(
            from.client()
                .say(&format!("CLUSTER SETSLOT {slot} MIGRATING {}", to.id())),
            Value::ok()
        );
        let migrate = |key: &str| {
            from.client()
                .say(&format!("MIGRATE 127.0.0.1 {} {key} 0 5000", to.addr.port()))
        };
        assert_eq!(migrate(&format!("{{pair{t}}}b")), Value::ok());
        // A single key goes on on either side.
        assert!(matches!(c.say(&format!("GET {{pair{t}}}b")), Value::Bulk(_)));
        assert_eq!(c.say(&format!("SET {{pair{t}}}new 1")), Value::ok());
        std::thread::park_timeout(Duration::from_millis(200));
        assert_eq!(migrate(&format!("{{pair{t}}}a")), Value::ok());
        std::thread::park_timeout(Duration::from_millis(200));
        for n in [to, from] {
            assert_eq!(
                n.client().say(&format!("CLUSTER SETSLOT {slot} NODE {}", to.id())),
                Value::ok()
            );
        }
    }
    // Many at once, as an operator does it.
    let from = nodes.0[nodes.owner("w0:0")].id();
    let to = nodes.0[nodes.owner("w0:1")].id();
    assert_ne!(from, to);
    redis_cli(&[
        "--cluster",
        "reshard",
        &nodes.0[0].addr.to_string(),
        "--cluster-from",
        &from,
        "--cluster-to",
        &to,
        "--cluster-slots",
        "2000",
        "--cluster-yes",
    ]);
    let ledgers = writers.stop();
    assert!(
        ledgers.iter().all(|l| l.errors.is_empty()),
        "{:?}",
        ledgers.iter().map(|l| l.errors.first()).collect::<Vec<_>>()
    );
    assert!(settle_up(ledgers, &ours) > 100);
}

#[test]
fn copies_answer_reads_that_are_young_enough_and_only_those() {
    let nodes = Nodes::six();
    let mut config = nodes.config();
    config.cluster.reads = Reads::Replica;
    config.cluster.max_read_lag_ms = 1500;
    let ours = Ours::start(config);
    let mut c = ours.client();
    let keys: Vec<String> = (0..60).map(|i| format!("k{i}")).collect();
    for k in &keys {
        assert_eq!(c.call(&["SET", k, "1"]), Value::ok());
    }
    let by_copies = |nodes: &Nodes| -> u64 {
        let count = |n: &Node| {
            let told = n.client().say("INFO commandstats").text();
            let line = told.lines().find(|l| l.starts_with("cmdstat_get:"));
            line.map_or(0, |l| l.split(['=', ',']).nth(1).unwrap().parse::<u64>().unwrap())
        };
        nodes.0.iter().filter(|n| !n.is_primary()).map(count).sum()
    };
    wait_for("reads of copies", || {
        for k in &keys {
            assert_eq!(c.call(&["GET", k]), Value::bulk("1"), "{k}");
        }
        by_copies(&nodes) > 30
    });
    let many: Vec<String> = std::iter::once("MGET".to_owned()).chain(keys.clone()).collect();
    assert_eq!(
        c.call(&many),
        Value::Array(keys.iter().map(|_| Value::bulk("1")).collect())
    );
    // A copy that does not keep up: frozen it answers nothing, and cut off from its primary nothing that is believed for long.
    let primary = nodes.owner("k0");
    let copy = nodes.0.iter().find(|n| {
        let told = n.client().say("INFO replication").text();
        told.contains("role:slave") && told.contains(&format!("master_port:{}", nodes.0[primary].addr.port()))
    });
    let copy = copy.expect("a copy of k0's shard");
    // It goes on to answer, and takes nothing in: its link to the primary is given another password.
    assert_eq!(copy.client().say("CONFIG SET masterauth wrong"), Value::ok());
    assert_eq!(
        nodes.0[primary].client().say("CONFIG SET requirepass secret"),
        Value::ok()
    );
    let mut direct = nodes.0[primary].client();
    assert_eq!(direct.say("AUTH secret"), Value::ok());
    assert_eq!(direct.say("CONFIG SET min-replicas-to-write 0"), Value::ok());
    assert_eq!(direct.say("CLIENT KILL TYPE replica"), Value::Int(1));
    assert_eq!(direct.say("SET k0 2"), Value::ok());
    assert_eq!(direct.say("CONFIG SET requirepass "), Value::ok());
    let written = Instant::now();
    let mut last_old = Duration::ZERO;
    while written.elapsed() < Duration::from_secs(5) {
        match c.say("GET k0") {
            Value::Bulk(b) if b == b"1" => last_old = written.elapsed(),
            Value::Bulk(b) => assert_eq!(b, b"2"),
            Value::Error(e) => assert!(e.starts_with("UNAVAILABLE"), "{e}"),
            other => panic!("{other:?}"),
        }
        pause();
    }
    println!("the last old value was read {last_old:?} after the write");
    assert!(last_old < Duration::from_millis(2500), "{last_old:?}");
    assert_eq!(c.say("GET k0"), Value::bulk("2"));
}

#[test]
fn a_server_that_is_no_cluster_is_named() {
    let redis = crate::rig::Redis::start();
    let nodes = Config {
        listen: "127.0.0.1:0".into(),
        password: Some(PASSWORD.into()),
        backend: Backend::Cluster,
        ..Config::default()
    };
    let mut config = nodes;
    config.cluster.seeds = vec![redis.addr.to_string()];
    config.cluster.hold_ms = 100;
    config.cluster.connect_timeout_ms = 500;
    config.cluster.reads = Reads::Primary;
    let ours = Ours::start(config);
    let mut c = ours.client();
    let said = c.say("SET a 1");
    assert!(
        matches!(&said, Value::Error(e) if e.starts_with("UNAVAILABLE")),
        "{said:?}"
    );
}
