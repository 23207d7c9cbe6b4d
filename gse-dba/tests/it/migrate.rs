//! Data moves to another store while clients go on: every write of theirs is there afterwards, none of them sees an error or loses its connection.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gse_dba::config::Config;

use crate::rig::{Ours, Process, Raw, Redis, Value, embedded, encode, pause, single, wait_for};

/// What a key should be.
#[derive(Clone, Debug, PartialEq)]
enum Want {
    Text(String),
    List(Vec<String>),
    Hash(BTreeMap<String, String>),
    Set(BTreeMap<String, String>),
    Zset(BTreeMap<String, String>),
}

/// A client that writes keys of its own and knows what they must be.
struct Writer {
    name: String,
    c: Raw,
    want: BTreeMap<String, Want>,
    expires: BTreeMap<String, i64>,
    seed: u64,
    slowest: Duration,
    done: u64,
}

impl Writer {
    fn new(name: &str, c: Raw) -> Self {
        let seed = name
            .bytes()
            .fold(88_172_645_463_325_252u64, |a, b| a.rotate_left(5) ^ u64::from(b));
        Self {
            name: name.into(),
            c,
            want: BTreeMap::new(),
            expires: BTreeMap::new(),
            seed,
            slowest: Duration::ZERO,
            done: 0,
        }
    }

    fn random(&mut self, n: u64) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % n
    }

    fn say(&mut self, words: &[&str]) -> Value {
        let start = Instant::now();
        let got = self.c.call(words);
        self.slowest = self.slowest.max(start.elapsed());
        self.done += 1;
        assert!(!matches!(got, Value::Error(_)), "{words:?}: {got:?}");
        got
    }

    fn step(&mut self) {
        let (kind, n) = (self.random(8), self.random(40));
        let (field, value) = (format!("f{}", self.random(60)), format!("v{}", self.done));
        let key = format!("{}:{kind}:{n}", self.name);
        let old = self.want.remove(&key);
        let new = match (kind, old) {
            (0, old) => {
                let before: i64 = match &old {
                    Some(Want::Text(t)) => t.parse().unwrap(),
                    _ => 0,
                };
                assert_eq!(self.say(&["INCR", &key]), Value::Int(before + 1), "{key}");
                Want::Text((before + 1).to_string())
            }
            (1, old) => {
                let mut list = match old {
                    Some(Want::List(l)) => l,
                    _ => Vec::new(),
                };
                list.push(value.clone());
                assert_eq!(
                    self.say(&["RPUSH", &key, &value]),
                    Value::Int(list.len() as i64),
                    "{key}"
                );
                if list.len() > 50 {
                    self.say(&["LTRIM", &key, "25", "-1"]);
                    list.drain(..25);
                }
                Want::List(list)
            }
            (2, old) => {
                let mut map = match old {
                    Some(Want::Hash(m)) => m,
                    _ => BTreeMap::new(),
                };
                if map.len() > 1 && map.contains_key(&field) && self.random(2) == 0 {
                    assert_eq!(self.say(&["HDEL", &key, &field]), Value::Int(1), "{key} {field}");
                    map.remove(&field);
                } else {
                    self.say(&["HSET", &key, &field, &value]);
                    map.insert(field, value);
                }
                Want::Hash(map)
            }
            (3, old) => {
                let mut set = match old {
                    Some(Want::Set(m)) => m,
                    _ => BTreeMap::new(),
                };
                self.say(&["SADD", &key, &field]);
                set.insert(field, String::new());
                Want::Set(set)
            }
            (4, old) => {
                let mut set = match old {
                    Some(Want::Zset(m)) => m,
                    _ => BTreeMap::new(),
                };
                let score = self.random(1000).to_string();
                self.say(&["ZADD", &key, &score, &field]);
                set.insert(field, score);
                Want::Zset(set)
            }
            (5, _) => {
                let at = now_ms() + 600_000 + i64::try_from(n).unwrap();
                self.say(&["SET", &key, &value, "PXAT", &at.to_string()]);
                self.expires.insert(key.clone(), at);
                Want::Text(value)
            }
            (6, _) => {
                // A name of its own gets the value of another.
                let (from, to) = (format!("{{{key}}}from"), key.clone());
                self.say(&["SET", &from, &value]);
                self.say(&["RENAME", &from, &to.clone()]);
                Want::Text(value)
            }
            (_, old) => {
                // Two writes at once, in a transaction.
                let (a, b) = (key.clone(), value.clone());
                assert_eq!(self.say(&["MULTI"]), Value::ok());
                self.say(&["SET", &a, &b]);
                self.say(&["APPEND", &a, "!"]);
                let got = self.c.call(&["EXEC"]);
                match got {
                    Value::Array(_) => Want::Text(format!("{value}!")),
                    // The store was changed in the middle: nothing was executed, and that is said.
                    Value::Error(e) if e.starts_with("EXECABORT") => match old {
                        Some(old) => old,
                        None => return,
                    },
                    other => panic!("{other:?}"),
                }
            }
        };
        self.want.insert(key, new);
    }

    /// Reads everything back.
    fn check(&self, c: &mut Raw) {
        for (key, want) in &self.want {
            let got = match want {
                Want::Text(_) => Want::Text(c.call(&["GET", key]).text()),
                Want::List(_) => Want::List(
                    c.call(&["LRANGE", key, "0", "-1"])
                        .items()
                        .iter()
                        .map(Value::text)
                        .collect(),
                ),
                Want::Hash(_) => Want::Hash(pairs(&c.call(&["HGETALL", key]))),
                Want::Set(_) => Want::Set(
                    c.call(&["SMEMBERS", key])
                        .items()
                        .iter()
                        .map(|m| (m.text(), String::new()))
                        .collect(),
                ),
                Want::Zset(_) => Want::Zset(pairs(&c.call(&["ZRANGE", key, "0", "-1", "WITHSCORES"]))),
            };
            assert_eq!(&got, want, "{key}");
            let expires = self.expires.get(key).copied().unwrap_or(-1);
            assert_eq!(c.call(&["PEXPIRETIME", key]), Value::Int(expires), "{key}");
        }
    }
}

fn pairs(v: &Value) -> BTreeMap<String, String> {
    v.items().chunks(2).map(|p| (p[0].text(), p[1].text())).collect()
}

fn now_ms() -> i64 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    i64::try_from(since.as_millis()).unwrap()
}

/// Writers that go on until told otherwise.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Writer>>,
}

impl Load {
    fn start(n: usize, client: impl Fn() -> Raw) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..n)
            .map(|i| {
                let (mut w, stop) = (Writer::new(&format!("w{i}"), client()), Arc::clone(&stop));
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        w.step();
                    }
                    w
                })
            })
            .collect();
        Load { stop, threads }
    }

    fn end(self) -> Vec<Writer> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().map(|t| t.join().unwrap()).collect()
    }
}

fn dba(c: &mut Raw, line: &str) -> serde_json::Value {
    let got = c.say(line);
    match &got {
        Value::Bulk(b) => serde_json::from_slice(b).unwrap(),
        other => panic!("{line}: {other:?}"),
    }
}

fn phase(c: &mut Raw) -> String {
    dba(c, "DBA MIGRATE STATUS")["phase"].as_str().unwrap().to_owned()
}

/// Waits until a move is half way.
fn some_copied(c: &mut Raw) {
    wait_for("some copying", || {
        dba(c, "DBA MIGRATE STATUS")["progress"]["keys_copied"]
            .as_u64()
            .unwrap()
            > 300
    });
}

/// Waits for the end of a move.
fn moved(c: &mut Raw) -> serde_json::Value {
    let until = Instant::now() + Duration::from_secs(150);
    loop {
        let status = dba(c, "DBA MIGRATE STATUS");
        match status["phase"].as_str().unwrap() {
            "switched" => return status,
            "failed" | "aborted" | "idle" => panic!("{status:#}"),
            _ => assert!(Instant::now() < until, "{status:#}"),
        }
        pause();
    }
}

/// Values of all sizes that nobody writes to meanwhile, and one large one of each kind.
fn fill(c: &mut Raw, keys: usize, large: usize) {
    for i in 0..keys {
        c.call(&["SET", &format!("small:{i}"), &format!("value {i}")]);
    }
    for from in (0..large).step_by(500) {
        let items: Vec<String> = (from..from + 500).map(|i| format!("item{i}")).collect();
        let mut hash = vec!["HSET".to_owned(), "large:hash".into()];
        let mut zset = vec!["ZADD".to_owned(), "large:zset".into()];
        for (i, item) in items.iter().enumerate() {
            hash.extend([item.clone(), format!("{i}")]);
            zset.extend([format!("{i}"), item.clone()]);
        }
        c.call(&hash);
        c.call(&zset);
        c.call(&[vec!["RPUSH".to_owned(), "large:list".into()], items.clone()].concat());
        c.call(&[vec!["SADD".to_owned(), "large:set".into()], items].concat());
    }
    c.call(&["SET", "large:text", &"x".repeat(3 << 20)]);
    c.call(&["PEXPIREAT", "large:set", &(now_ms() + 900_000).to_string()]);
}

fn check_filled(c: &mut Raw, keys: usize, large: usize) {
    for i in 0..keys {
        assert_eq!(
            c.call(&["GET", &format!("small:{i}")]),
            Value::bulk(&format!("value {i}"))
        );
    }
    let n = Value::Int(large as i64);
    for (command, key) in [
        ("HLEN", "large:hash"),
        ("ZCARD", "large:zset"),
        ("LLEN", "large:list"),
        ("SCARD", "large:set"),
    ] {
        assert_eq!(c.call(&[command, key]), n, "{key}");
    }
    let list = c.call(&["LRANGE", "large:list", "0", "-1"]);
    assert!(
        list.items()
            .iter()
            .enumerate()
            .all(|(i, v)| v.text() == format!("item{i}"))
    );
    assert_eq!(c.call(&["STRLEN", "large:text"]), Value::Int(3 << 20));
    assert!(c.call(&["PEXPIRETIME", "large:set"]).int() > now_ms());
}

// contract: redis-proxy#29
#[test]
fn data_moves_from_the_embedded_store_to_redis_and_back_under_load() {
    let dir = tempfile::tempdir().unwrap();
    let redis = Redis::start();
    let config = embedded(dir.path());
    let ours = Ours::start(config.clone());
    let mut c = ours.client();
    fill(&mut c, 2000, 4000);
    let before = dba(&mut c, "DBA STATUS");
    assert_eq!(before["mode"], "embedded");
    let load = Load::start(3, || ours.client());
    // A large value whose elements change while it is copied.
    let mut elements = ours.client();
    let stop = Arc::new(AtomicBool::new(false));
    let changer = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            let mut n = 0u32;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                let field = format!("item{}", n % 4000);
                assert!(matches!(
                    elements.call(&["HSET", "large:hash", &field, &n.to_string()]),
                    Value::Int(0)
                ));
            }
            (elements, n)
        }
    });
    std::thread::park_timeout(Duration::from_millis(200));
    dba(&mut c, &format!("DBA MIGRATE TO redis://{}", redis.addr));
    let status = moved(&mut c);
    assert_eq!(status["progress"]["mismatches"], 0, "{status:#}");
    assert_eq!(status["mode"], "single");
    assert_ne!(
        status["durability"], before["durability"],
        "the promise changes with the store"
    );
    assert_eq!(dba(&mut c, "DBA STATUS")["durability"], status["durability"]);
    std::thread::park_timeout(Duration::from_millis(200));
    // What is written now is in Redis.
    assert_eq!(c.say("SET now here"), Value::ok());
    assert_eq!(redis.client().say("GET now"), Value::bulk("here"));
    check_filled(&mut redis.client(), 2000, 4000);
    // And back, with what has changed since.
    dba(&mut c, "DBA MIGRATE BACK");
    let status = moved(&mut c);
    assert_eq!(status["mode"], "embedded");
    assert_eq!(status["durability"], before["durability"]);
    std::thread::park_timeout(Duration::from_millis(200));
    stop.store(true, Ordering::Relaxed);
    let (_, n) = changer.join().unwrap();
    let writers = load.end();
    redis.kill();
    for w in &writers {
        assert!(w.done > 100, "{} commands", w.done);
        w.check(&mut c);
    }
    check_filled(&mut c, 2000, 4000);
    let last = c.call(&["HGET", "large:hash", &format!("item{}", n % 4000)]);
    assert_eq!(last, Value::bulk(&n.to_string()));
    assert_eq!(c.say("GET now"), Value::bulk("here"));
    // The next start finds it where it is.
    drop(c);
    ours.stop();
    let ours = Ours::start(config);
    assert_eq!(ours.client().say("GET now"), Value::bulk("here"));
    assert_eq!(dba(&mut ours.client(), "DBA STATUS")["mode"], "embedded");
}

#[test]
fn the_next_start_uses_the_store_that_data_was_moved_to() {
    let dir = tempfile::tempdir().unwrap();
    let redis = Redis::start();
    let config = embedded(dir.path());
    let ours = Ours::start(config.clone());
    let mut c = ours.client();
    c.say("SET a 1");
    dba(&mut c, &format!("DBA MIGRATE TO redis://{}", redis.addr));
    moved(&mut c);
    c.say("SET a 2");
    assert!(
        matches!(c.say(&format!("DBA MIGRATE TO redis://{}", redis.addr)), Value::Error(e) if e.contains("there already"))
    );
    drop(c);
    ours.stop();
    let ours = Ours::start(config.clone());
    let mut c = ours.client();
    assert_eq!(c.say("GET a"), Value::bulk("2"));
    let status = dba(&mut c, "DBA MIGRATE STATUS");
    assert_eq!(
        (&status["mode"], &status["back_to"]),
        (&"single".into(), &"the configured store".into())
    );
    c.say("SET b 3");
    c.say("DEL a");
    dba(&mut c, "DBA MIGRATE BACK");
    moved(&mut c);
    assert_eq!((c.say("GET a"), c.say("GET b")), (Value::Null, Value::bulk("3")));
    assert_eq!(c.say("DBSIZE"), Value::Int(1));
}

fn slow(mut config: Config) -> Config {
    config.migrate.keys_per_s = 1000;
    config.migrate.patience_ms = 2000;
    config
}

#[test]
fn an_aborted_move_changes_nothing_and_can_be_begun_again() {
    let dir = tempfile::tempdir().unwrap();
    let redis = Redis::start();
    let ours = Ours::start(slow(embedded(dir.path())));
    let mut c = ours.client();
    fill(&mut c, 3000, 500);
    let load = Load::start(1, || ours.client());
    let to = format!("DBA MIGRATE TO redis://{}", redis.addr);
    dba(&mut c, &to);
    some_copied(&mut c);
    assert!(matches!(c.say(&to), Value::Error(e) if e.contains("being moved already")));
    dba(&mut c, "DBA MIGRATE ABORT");
    wait_for("the end of it", || phase(&mut c) == "aborted");
    assert_eq!(dba(&mut c, "DBA STATUS")["mode"], "embedded");
    assert!(matches!(c.say("DBA MIGRATE ABORT"), Value::Error(_)));
    // What is left there is ours: no REPLACE is needed.
    dba(&mut c, &to);
    dba(&mut c, "DBA MIGRATE RATE 0 0");
    moved(&mut c);
    for w in load.end() {
        w.check(&mut redis.client());
    }
    check_filled(&mut redis.client(), 3000, 500);
}

#[test]
fn a_target_that_has_keys_or_other_clients_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let redis = Redis::start();
    let ours = Ours::start(embedded(dir.path()));
    let mut c = ours.client();
    c.say("SET a 1");
    redis.client().say("SET theirs 1");
    let to = format!("DBA MIGRATE TO redis://{}", redis.addr);
    let refused = |c: &mut Raw, to: &str| {
        dba(c, to);
        wait_for("the refusal", || phase(c) == "failed");
        dba(c, "DBA MIGRATE STATUS")["problem"].as_str().unwrap().to_owned()
    };
    let why = refused(&mut c, &to);
    assert!(why.contains("1 keys already") && why.contains("REPLACE"), "{why}");
    let mut stranger = redis.client();
    stranger.say("CLIENT SETNAME somebody");
    let why = refused(&mut c, &format!("{to} REPLACE"));
    assert!(why.contains("somebody"), "{why}");
    assert_eq!(stranger.say("GET theirs"), Value::bulk("1"), "nothing was touched");
    drop(stranger);
    dba(&mut c, &format!("{to} REPLACE"));
    moved(&mut c);
    assert_eq!((c.say("GET a"), c.say("GET theirs")), (Value::bulk("1"), Value::Null));
    let why = refused(&mut c, "DBA MIGRATE TO redis://127.0.0.1:1");
    assert!(why.contains("can't be used"), "{why}");
    assert_eq!(c.say("GET a"), Value::bulk("1"));
    for bad in ["DBA MIGRATE", "DBA MIGRATE TO nowhere", "DBA MIGRATE RATE 1"] {
        assert!(matches!(c.say(bad), Value::Error(e) if e.starts_with("ERR")), "{bad}");
    }
}

#[test]
fn a_target_lost_half_way_leaves_the_source_right() {
    let dir = tempfile::tempdir().unwrap();
    let redis = Redis::start();
    let ours = Ours::start(slow(embedded(dir.path())));
    let mut c = ours.client();
    fill(&mut c, 3000, 500);
    let load = Load::start(1, || ours.client());
    dba(&mut c, &format!("DBA MIGRATE TO redis://{}", redis.addr));
    some_copied(&mut c);
    redis.kill();
    wait_for("the end of it", || phase(&mut c) == "failed");
    let status = dba(&mut c, "DBA MIGRATE STATUS");
    assert!(
        status["problem"].as_str().unwrap().contains("out of reach"),
        "{status:#}"
    );
    assert_eq!(status["mode"], "embedded");
    for w in load.end() {
        w.check(&mut c);
    }
    check_filled(&mut c, 3000, 500);
}

#[test]
fn everything_deleted_in_the_middle_is_deleted_there_too() {
    let dir = tempfile::tempdir().unwrap();
    let redis = Redis::start();
    let ours = Ours::start(slow(embedded(dir.path())));
    let mut c = ours.client();
    fill(&mut c, 3000, 500);
    dba(&mut c, &format!("DBA MIGRATE TO redis://{}", redis.addr));
    some_copied(&mut c);
    assert_eq!(c.say("FLUSHALL"), Value::ok());
    c.say("SET after 1");
    moved(&mut c);
    assert_eq!(c.say("DBSIZE"), Value::Int(1));
    assert_eq!(redis.client().say("KEYS *"), Value::Array(vec![Value::bulk("after")]));
}

#[test]
fn a_process_killed_half_way_starts_with_the_source_and_can_begin_again() {
    let dir = tempfile::tempdir().unwrap();
    let redis = Redis::start();
    let p = Process::start(dir.path(), &["migrate.keys_per_s=1000"]);
    let mut c = Raw::login(p.addr);
    fill(&mut c, 3000, 500);
    let to = format!("DBA MIGRATE TO redis://{}", redis.addr);
    dba(&mut c, &to);
    some_copied(&mut c);
    c.say("SET during 1");
    p.kill();
    let p = Process::start(dir.path(), &[]);
    let mut c = Raw::login(p.addr);
    assert_eq!(dba(&mut c, "DBA STATUS")["mode"], "embedded");
    assert_eq!(c.say("GET during"), Value::bulk("1"));
    dba(&mut c, &to);
    moved(&mut c);
    check_filled(&mut redis.client(), 3000, 500);
    c.say("SET after 1");
    p.kill();
    let p = Process::start(dir.path(), &[]);
    let mut c = Raw::login(p.addr);
    assert_eq!(dba(&mut c, "DBA STATUS")["mode"], "single");
    assert_eq!(
        (c.say("GET during"), c.say("GET after")),
        (Value::bulk("1"), Value::bulk("1"))
    );
}

#[test]
fn streams_and_what_watches_move_between_two_redis() {
    let (a, b) = (Redis::start(), Redis::start());
    let dir = tempfile::tempdir().unwrap();
    let mut config = single(&a);
    config.embedded.dir = dir.path().to_path_buf();
    let ours = Ours::start(config);
    let mut c = ours.client();
    wait_for("the store", || c.say("SET x 1") == Value::ok());
    for i in 0..3000 {
        c.call(&["XADD", "large:stream", &format!("{}-1", i + 1), "n", &i.to_string()]);
    }
    for i in 0..50 {
        c.call(&["XADD", "stream", &format!("{}-1", i + 1), "n", &i.to_string()]);
    }
    for s in ["large:stream", "stream"] {
        c.call(&["XGROUP", "CREATE", s, "g", "0"]);
        c.call(&["XREADGROUP", "GROUP", "g", "me", "COUNT", "10", "STREAMS", s, ">"]);
        c.call(&["XACK", s, "g", "1-1"]);
        c.call(&["XDEL", s, "40-1"]);
    }
    c.call(&["SETBIT", "bits", "100", "1"]);
    c.call(&["PFADD", "log", "a", "b"]);
    let mut watcher = ours.client();
    watcher.say("WATCH x");
    // Clients that wait go on waiting, at the other store.
    let mut waiting: Vec<Raw> = (0..2).map(|_| ours.client()).collect();
    waiting[0].send(&encode(&["BLPOP", "queue", "0"]));
    waiting[1].send(&encode(&["BLPOP", "never", "30"]));
    wait_for("them to wait", || {
        a.client().say("CLIENT LIST").text().matches("cmd=blpop").count() == 2
    });
    // So do those who listen.
    let (mut two, mut three) = (ours.client(), ours.client());
    assert_eq!(two.say("SUBSCRIBE news").items()[0], Value::bulk("subscribe"));
    three.say("HELLO 3");
    assert_eq!(three.say("PSUBSCRIBE n*").items()[0], Value::bulk("psubscribe"));
    let load = Load::start(2, || ours.client());
    dba(&mut c, &format!("DBA MIGRATE TO redis://{}", b.addr));
    let status = moved(&mut c);
    assert_eq!(status["progress"]["mismatches"], 0);
    wait_for("the subscriptions", || c.say("PUBLISH news hello").int() == 2);
    assert_eq!(two.reply().items()[2], Value::bulk("hello"));
    assert_eq!(three.reply().items()[3], Value::bulk("hello"));
    assert_eq!(
        three.say("GET x"),
        Value::bulk("1"),
        "with RESP3 it can do anything still"
    );
    assert_eq!(c.say("RPUSH queue item"), Value::Int(1));
    assert_eq!(
        waiting[0].reply(),
        Value::Array(vec![Value::bulk("queue"), Value::bulk("item")])
    );
    assert_eq!(c.say("RPUSH never now"), Value::Int(1));
    assert_eq!(
        waiting[1].reply(),
        Value::Array(vec![Value::bulk("never"), Value::bulk("now")])
    );
    // What was watched in front of the other store counts as changed.
    assert_eq!(watcher.say("MULTI"), Value::ok());
    assert_eq!(watcher.say("SET x 2"), Value::Simple("QUEUED".into()));
    assert_eq!(watcher.say("EXEC"), Value::NullArray);
    assert_eq!(watcher.say("GET x"), Value::bulk("1"));
    watcher.say("MULTI");
    watcher.say("SET x 3");
    assert_eq!(watcher.say("EXEC"), Value::Array(vec![Value::ok()]));
    let (mut ca, mut cb) = (a.client(), b.client());
    for s in ["large:stream", "stream"] {
        for line in [
            format!("XLEN {s}"),
            format!("XRANGE {s} - + COUNT 50"),
            format!("XPENDING {s} g"),
            format!("XINFO GROUPS {s}"),
        ] {
            assert_eq!(ca.say(&line), cb.say(&line), "{line}");
        }
    }
    assert!(!c.call(&["XADD", "stream", "*", "n", "x"]).text().is_empty());
    assert_eq!(
        (c.say("GETBIT bits 100"), c.say("PFCOUNT log")),
        (Value::Int(1), Value::Int(2))
    );
    for w in load.end() {
        w.check(&mut cb);
    }
}

#[test]
fn data_moves_from_the_embedded_store_to_groups() {
    let dir = tempfile::tempdir().unwrap();
    let servers = [Redis::start(), Redis::start()];
    let mut file = "[sharded]\ncopies = 1\nacknowledged = 1\nchecks = \"warn\"\npoll_ms = 100\n".to_owned();
    for (i, s) in servers.iter().enumerate() {
        file.push_str(&format!(
            "[[sharded.groups]]\nname = \"g{i}\"\nservers = [\"{}\"]\n",
            s.addr
        ));
    }
    let path = dir.path().join("groups.toml");
    std::fs::write(&path, file).unwrap();
    let ours = Ours::start(embedded(&dir.path().join("store")));
    let mut c = ours.client();
    fill(&mut c, 1000, 3000);
    let load = Load::start(2, || ours.client());
    dba(&mut c, &format!("DBA MIGRATE TO sharded://{}", path.display()));
    let status = moved(&mut c);
    assert_eq!(status["mode"], "sharded");
    assert!(
        status["durability"].as_str().unwrap().starts_with("1 of 1"),
        "{status:#}"
    );
    std::thread::park_timeout(Duration::from_millis(100));
    for w in load.end() {
        w.check(&mut c);
    }
    check_filled(&mut c, 1000, 3000);
    assert!(servers.iter().all(|s| s.client().say("DBSIZE").int() > 100));
}

// contract: redis-proxy#29
#[test]
fn data_moves_from_the_embedded_store_to_a_cluster_and_back_under_load() {
    let dir = tempfile::tempdir().unwrap();
    let nodes: Vec<Redis> = (0..3)
        .map(|_| {
            let port = loop {
                // Its bus listens 10000 ports higher, where there has to be a port.
                let port = std::net::TcpListener::bind("127.0.0.1:0")
                    .unwrap()
                    .local_addr()
                    .unwrap()
                    .port();
                if port < 55_000 && std::net::TcpListener::bind(("127.0.0.1", port + 10_000)).is_ok() {
                    break port;
                }
            };
            Redis::start_as(
                port,
                &[
                    "--cluster-enabled",
                    "yes",
                    "--appendonly",
                    "yes",
                    "--appendfsync",
                    "always",
                ],
            )
        })
        .collect();
    let addresses: Vec<String> = nodes.iter().map(|n| n.addr.to_string()).collect();
    let made = std::process::Command::new("redis-cli")
        .args(["--cluster", "create"])
        .args(&addresses)
        .arg("--cluster-yes")
        .output()
        .expect("redis-cli is not installed: apt-get install redis-tools");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stdout));
    wait_for("the cluster", || {
        nodes
            .iter()
            .all(|n| n.client().say("CLUSTER INFO").text().contains("cluster_state:ok"))
    });
    let mut config = embedded(dir.path());
    (config.cluster.copies, config.cluster.acknowledged) = (1, 1);
    let ours = Ours::start(config);
    let mut c = ours.client();
    fill(&mut c, 1000, 3000);
    let before = dba(&mut c, "DBA STATUS");
    let load = Load::start(2, || ours.client());
    dba(&mut c, &format!("DBA MIGRATE TO cluster://{}", addresses.join(",")));
    let status = moved(&mut c);
    assert_eq!(
        (&status["mode"], &status["progress"]["mismatches"]),
        (&"cluster".into(), &0.into()),
        "{status:#}"
    );
    assert_ne!(status["durability"], before["durability"]);
    assert!(nodes.iter().all(|n| n.client().say("DBSIZE").int() > 100));
    check_filled(&mut c, 1000, 3000);
    std::thread::park_timeout(Duration::from_millis(200));
    dba(&mut c, "DBA MIGRATE BACK");
    let status = moved(&mut c);
    assert_eq!(
        (&status["mode"], &status["durability"]),
        (&before["mode"], &before["durability"])
    );
    let writers = load.end();
    drop(nodes);
    for w in writers {
        w.check(&mut c);
    }
    check_filled(&mut c, 1000, 3000);
}
