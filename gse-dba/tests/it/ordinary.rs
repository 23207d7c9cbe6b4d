//! What an ordinary client expects of a Redis, from three groups behind us: protocols, odd commands, transactions and blocking through two of us, scripts, iteration,
//! users.

use std::collections::{HashMap, HashSet};
use std::process::Command;
use std::time::{Duration, Instant};

use rand::RngExt as _;
use rand::SeedableRng as _;

use crate::rig::{Ours, PASSWORD, Raw, Value, encode, pause, wait_for};
use crate::site::{Site, cluster_server, sharded_list};

fn three() -> (Site, Ours) {
    let site = Site::start(3, 1, false);
    let ours = Ours::start(sharded_list(&site));
    (site, ours)
}

fn is_error(v: &Value, start: &str) -> bool {
    matches!(v, Value::Error(e) if e.starts_with(start))
}

// contract: redis-proxy#1
#[test]
fn each_client_speaks_its_own_protocol() {
    let (_site, ours) = three();
    let (mut plain, mut two, mut three) = (ours.client(), ours.client(), Raw::connect(ours.addr));
    assert!(matches!(two.say("HELLO 2"), Value::Array(v) if v.len() == 14));
    let hello = three.call(&["HELLO", "3", "AUTH", "default", PASSWORD]);
    assert!(matches!(&hello, Value::Map(v) if v.len() == 14), "{hello:?}");
    for n in 0..30 {
        let key = format!("h{n}");
        assert_eq!(plain.call(&["HSET", &key, "f", "v"]), Value::Int(1));
        assert!(matches!(three.call(&["HGETALL", &key]), Value::Map(_)));
        assert!(matches!(two.call(&["HGETALL", &key]), Value::Array(_)));
        assert!(matches!(plain.call(&["HGETALL", &key]), Value::Array(_)));
        assert!(matches!(three.call(&["GET", "none"]), Value::Null));
    }
    plain.send(
        &[
            encode(&["HGETALL", "h1"]),
            encode(&["HELLO", "3"]),
            encode(&["HGETALL", "h1"]),
        ]
        .concat(),
    );
    assert!(matches!(plain.reply(), Value::Array(_)));
    assert!(matches!(plain.reply(), Value::Map(_)));
    assert!(matches!(plain.reply(), Value::Map(_)));
    assert_eq!(three.say("RESET"), Value::Simple("RESET".into()));
    assert!(is_error(&three.say("GET a"), "NOAUTH"));
}

/// An interpreter that has redis-py: the machine's, or one set up for this.
fn python() -> String {
    let has = |python: &str| {
        Command::new(python)
            .args(["-c", "import redis"])
            .output()
            .is_ok_and(|o| o.status.success())
    };
    if has("python3") {
        return "python3".into();
    }
    let venv = std::env::temp_dir().join("gse-dba-redis-py");
    let python = venv.join("bin/python").display().to_string();
    if !has(&python) {
        let run = |program: &str, args: &[&str]| {
            let out = Command::new(program).args(args).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        };
        run("python3", &["-m", "venv", &venv.display().to_string()]);
        run(&python, &["-m", "pip", "install", "-q", "redis"]);
    }
    python
}

// contract: redis-proxy#2
#[test]
fn clients_of_others_work_with_their_default_settings() {
    let (_site, ours) = three();
    let port = ours.addr.port().to_string();
    let script = "
import redis, sys
r = redis.Redis(port=int(sys.argv[1]), password=sys.argv[2], decode_responses=True)
assert r.ping() and r.set('py', 'v') and r.get('py') == 'v'
assert r.mset({'{m}a': 1, '{m}b': 2}) and r.mget('{m}a', '{m}b', 'none') == ['1', '2', None]
p = r.pipeline()
p.incr('{p}n'); p.incr('{p}n')
assert p.execute() == [1, 2]
assert r.hset('h', mapping={'a': 1}) == 1 and r.hgetall('h') == {'a': '1'}
s = r.register_script('return redis.call(\"get\", KEYS[1])')
assert s(keys=['py']) == 'v'
ps = r.pubsub(); ps.subscribe('c'); assert ps.get_message(timeout=5)['type'] == 'subscribe'
assert r.publish('c', 'm') == 1 and ps.get_message(timeout=5)['data'] == 'm'
with r.lock('lock', timeout=5): pass
assert r.info()['redis_version'] and r.client_list() and r.config_get('save') is not None
assert sorted(r.scan_iter()) == sorted(['py', '{m}a', '{m}b', '{p}n', 'h'])
print('fine')
";
    let out = Command::new(python())
        .args(["-c", script, &port, PASSWORD])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&out.stdout).trim(),
        "fine",
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    for more in [vec![], vec!["-3"]] {
        let mut cli = Command::new("redis-cli");
        cli.args(["-p", &port, "--no-auth-warning", "-a", PASSWORD]).args(more);
        let out = cli.args(["SET", "cli", "v"]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "OK");
    }
    let client = redis::Client::open(ours.url()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut c = client.get_multiplexed_async_connection().await.unwrap();
        let pong: String = redis::cmd("PING").query_async(&mut c).await.unwrap();
        assert_eq!(pong, "PONG");
        let (n, got): (i64, String) = redis::pipe()
            .cmd("INCR")
            .arg("rs")
            .cmd("GET")
            .arg("cli")
            .query_async(&mut c)
            .await
            .unwrap();
        assert_eq!((n, got.as_str()), (1, "v"));
    });
}

// contract: redis-proxy#3
#[test]
fn what_is_not_to_be_had_is_one_error_and_the_connection_stays() {
    let (_site, ours) = three();
    let mut c = ours.client();
    for line in [
        "NOSUCH a b",
        "GET",
        "GET a b",
        "HSET h f",
        "XADD s",
        "GETBIT a",
        "ZUNIONSTORE d",
        "EVAL",
        "MULTI x",
        "SHUTDOWN",
        "REPLICAOF a 1",
        "MONITOR",
        "DEBUG SLEEP 0",
        "DEBUG SEGFAULT",
        "SELECT 1",
        "SWAPDB 0 1",
        "MOVE a 1",
        "CONFIG SET appendonly no",
        "CONFIG SET maxmemory-policy allkeys-lru",
        "CONFIG SET hz 10 dir /",
        "CONFIG REWRITE",
        "CLUSTER SLOTS",
        "CLIENT TRACKING ON",
        "CLIENT NOSUCH",
        "ACL SETUSER x",
        "FUNCTION NOSUCH",
        "RENAME a b",
        "SORT a BY w_*",
        "MIGRATE h 1 k 0 1",
        "HELLO 9",
        "SUBSCRIBE",
    ] {
        let reply = c.say(line);
        assert!(matches!(&reply, Value::Error(_)), "{line}: {reply:?}");
        assert_eq!(c.say("PING"), Value::Simple("PONG".into()), "after {line}");
    }
    assert!(is_error(&c.say("NOSUCH a b"), "ERR unknown command 'NOSUCH'"));
    assert!(is_error(
        &c.say("GET"),
        "ERR wrong number of arguments for 'get' command"
    ));
    assert_eq!(c.say("CONFIG SET hash-max-listpack-entries 99"), Value::ok());
    assert_eq!(c.say("CONFIG GET hash-max-listpack-entries").items()[1].text(), "99");
    let all: Vec<String> = c.say("CONFIG GET *").items().iter().map(Value::text).collect();
    assert!(all.contains(&"maxmemory".to_owned()) && !all.contains(&"requirepass".to_owned()));
    assert_eq!(c.say("SELECT 0"), Value::ok());
    assert!(c.say("COMMAND COUNT").int() > 200);
    assert_eq!(
        c.call(&["COMMAND", "GETKEYS", "MSET", "a", "1", "b", "2"])
            .items()
            .len(),
        2
    );
    assert_eq!(c.say("ROLE").items()[0].text(), "master");
    c.say("SET k v");
    assert!(c.say("INFO keyspace").text().contains("db0:keys=1,"));
    assert!(c.say("INFO").text().contains("redis_version:7"));
    // Silence on request.
    c.send(&encode(&["CLIENT", "REPLY", "OFF"]));
    c.send(&encode(&["SET", "quiet", "1"]));
    c.send(&encode(&["CLIENT", "REPLY", "ON"]));
    assert_eq!(c.reply(), Value::ok());
    c.send(
        &[
            encode(&["CLIENT", "REPLY", "SKIP"]),
            encode(&["SET", "quiet", "2"]),
            encode(&["GET", "quiet"]),
        ]
        .concat(),
    );
    assert_eq!(c.reply(), Value::bulk("2"));
}

// contract: redis-proxy#4
#[test]
fn deep_replies_and_a_million_arguments_are_survived() {
    let (_site, ours) = three();
    let mut c = ours.client();
    let nest = "local t = {} for i = 1, tonumber(ARGV[1]) do t = {t} end return t";
    c.send(&encode(&["EVAL", nest, "1", "k", "5000"]));
    let mut depth = 0;
    while c.line().unwrap() == "*1" {
        depth += 1;
    }
    assert_eq!(depth, 5000, "and one that is empty");
    assert_eq!(c.say("PING"), Value::Simple("PONG".into()));
    c.stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut many = b"*1000002\r\n$5\r\nRPUSH\r\n$1\r\nl\r\n".to_vec();
    (0..1_000_000).for_each(|_| many.extend_from_slice(b"$1\r\nx\r\n"));
    c.send(&many);
    assert_eq!(c.reply(), Value::Int(1_000_000));
    let mut split = b"*1000001\r\n$6\r\nEXISTS\r\n".to_vec();
    (0..1_000_000).for_each(|n| split.extend_from_slice(format!("$7\r\n{n:07}\r\n").as_bytes()));
    c.send(&split);
    assert_eq!(c.reply(), Value::Int(0));
    let mut other = ours.client();
    other.send(b"*99999999\r\n");
    assert!(matches!(other.reply(), Value::Error(_)), "refused in words");
    assert_eq!(c.say("LLEN l"), Value::Int(1_000_000));
}

// contract: redis-proxy#5
#[test]
fn pipelined_replies_come_in_order_and_equal_a_model() {
    let (_site, ours) = three();
    let mut c = ours.client();
    let mut random = rand::rngs::StdRng::seed_from_u64(5);
    let mut model: HashMap<String, String> = HashMap::new();
    for round in 0..300 {
        let (mut bytes, mut want) = (Vec::new(), Vec::new());
        for i in 0..16 {
            let key = format!("k{}", random.random_range(0..200));
            if random.random_bool(0.5) {
                let value = format!("{round}.{i}");
                bytes.extend(encode(&["SET", &key, &value]));
                model.insert(key, value);
                want.push(Value::ok());
            } else {
                want.push(model.get(&key).map_or(Value::Null, |v| Value::bulk(v)));
                bytes.extend(encode(&["GET", &key]));
            }
        }
        c.send(&bytes);
        for w in want {
            assert_eq!(c.reply(), w);
        }
    }
}

// contract: redis-proxy#6, redis-proxy#7
#[test]
fn many_keys_are_put_together_and_what_can_t_be_is_refused() {
    let (_site, ours) = three();
    let mut c = ours.client();
    for n in 0..30 {
        c.call(&["SET", &format!("k{n}"), &n.to_string()]);
    }
    for n in 0..20 {
        let keys = [format!("k{n}"), "none".into(), format!("k{}", n + 1), format!("k{n}")];
        let with = |name: &str| -> Vec<String> { std::iter::once(name.to_owned()).chain(keys.clone()).collect() };
        let want =
            [Some(n), None, Some(n + 1), Some(n)].map(|v| v.map_or(Value::Null, |v| Value::bulk(&v.to_string())));
        assert_eq!(c.call(&with("MGET")), Value::Array(want.to_vec()));
        assert_eq!(c.call(&with("EXISTS")), Value::Int(3));
        assert_eq!(c.call(&with("TOUCH")), Value::Int(3));
    }
    assert_eq!(c.say("DEL k0 k1 k2 none k0"), Value::Int(3));
    assert_eq!(c.say("UNLINK k3 k4 k5 none"), Value::Int(3));
    for (name, line) in [
        ("RENAME", "RENAME A B"),
        ("COPY", "COPY A B"),
        ("SINTER", "SINTER A B"),
        ("SUNIONSTORE", "SUNIONSTORE A B A"),
        ("ZUNION", "ZUNION 2 A B"),
    ] {
        for n in 0..20 {
            c.call(&["SET", &format!("a{n}"), "x"]);
            let apart = line.replace('A', &format!("a{n}")).replace('B', &format!("b{n}"));
            let words: Vec<String> = std::iter::once(name.to_owned())
                .chain(apart.split(' ').skip(1).map(str::to_owned))
                .collect();
            let refused = c.call(&words);
            assert!(is_error(&refused, "CROSSSLOT"), "{words:?}: {refused:?}");
            assert_eq!(
                c.call(&["GET", &format!("a{n}")]),
                Value::bulk("x"),
                "nothing has happened"
            );
        }
        let fill = match name {
            "RENAME" | "COPY" => "SET {t}A x",
            "ZUNION" => "ZADD {t}A 1 x",
            _ => "SADD {t}A x",
        };
        c.say("DEL {t}A {t}B");
        c.say(fill);
        let words: Vec<String> = line
            .split(' ')
            .map(|w| {
                if ["A", "B"].contains(&w) {
                    format!("{{t}}{w}")
                } else {
                    w.to_owned()
                }
            })
            .collect();
        let fine = c.call(&words);
        assert!(!matches!(fine, Value::Error(_)), "{words:?}: {fine:?}");
    }
}

// contract: redis-proxy#8, redis-proxy#9
#[test]
fn transactions_hold_through_two_of_us() {
    let site = Site::start(3, 1, false);
    let (one, two) = (Ours::start(sharded_list(&site)), Ours::start(sharded_list(&site)));
    let (mut a, mut b) = (one.client(), two.client());
    for n in 0..20 {
        let key = format!("{{n{n}}}x");
        assert_eq!(a.say("MULTI"), Value::ok());
        for _ in 0..2 {
            assert_eq!(a.call(&["INCR", &key]), Value::Simple("QUEUED".into()));
            assert_eq!(b.call(&["GET", &key]), Value::Null, "nothing shows before EXEC");
        }
        assert_eq!(a.say("EXEC"), Value::Array(vec![Value::Int(1), Value::Int(2)]));
        // What another changes through another gse_dba aborts.
        assert_eq!(a.call(&["WATCH", &key]), Value::ok());
        assert_eq!(b.call(&["SET", &key, "9"]), Value::ok());
        a.say("MULTI");
        a.call(&["INCR", &key]);
        assert_eq!(a.say("EXEC"), Value::NullArray);
        assert_eq!(b.call(&["GET", &key]), Value::bulk("9"));
        // Unchanged, it goes through; a second slot never does.
        a.call(&["WATCH", &key]);
        a.say("MULTI");
        a.call(&["INCR", &key]);
        assert_eq!(a.say("EXEC"), Value::Array(vec![Value::Int(10)]));
        a.say("MULTI");
        a.call(&["INCR", &key]);
        assert!(is_error(&a.say("INCR elsewhere"), "CROSSSLOT"));
        assert!(is_error(&a.say("EXEC"), "EXECABORT"));
        assert_eq!(b.call(&["GET", &key]), Value::bulk("10"));
    }
    // In one write.
    a.send(
        &[
            encode(&["MULTI"]),
            encode(&["INCR", "p"]),
            encode(&["INCR", "p"]),
            encode(&["EXEC"]),
            encode(&["GET", "p"]),
        ]
        .concat(),
    );
    assert_eq!(a.reply(), Value::ok());
    assert_eq!(a.reply(), Value::Simple("QUEUED".into()));
    assert_eq!(a.reply(), Value::Simple("QUEUED".into()));
    assert_eq!(a.reply(), Value::Array(vec![Value::Int(1), Value::Int(2)]));
    assert_eq!(a.reply(), Value::bulk("2"));
}

// contract: redis-proxy#10
#[test]
fn blocking_pops_wake_through_another_and_delay_nobody() {
    let site = Site::start(3, 1, false);
    let (one, two) = (Ours::start(sharded_list(&site)), Ours::start(sharded_list(&site)));
    let (mut a, mut b, mut c) = (one.client(), two.client(), one.client());
    for n in 0..10 {
        let list = format!("list{n}");
        // What stands before it in the pipeline is answered at once.
        a.send(&[encode(&["PING"]), encode(&["BLPOP", &list, "0"])].concat());
        assert_eq!(a.reply(), Value::Simple("PONG".into()));
        wait_for("it to block", || {
            c.say("INFO clients").text().contains("blocked_clients:1")
        });
        let began = Instant::now();
        for k in 0..100 {
            assert_eq!(c.call(&["SET", &format!("k{k}"), "v"]), Value::ok());
        }
        assert!(began.elapsed() < Duration::from_secs(10), "others are delayed");
        assert_eq!(b.call(&["RPUSH", &list, "x"]), Value::Int(1));
        assert_eq!(a.reply(), Value::Array(vec![Value::bulk(&list), Value::bulk("x")]));
    }
    // Woken by request.
    let id = a.say("CLIENT ID").int().to_string();
    for (how, error) in [("TIMEOUT", false), ("ERROR", true)] {
        a.send(&encode(&["BLPOP", "none", "0"]));
        wait_for("it to block", || {
            c.call(&["CLIENT", "UNBLOCK", &id, how]) == Value::Int(1)
        });
        let woken = a.reply();
        assert_eq!(is_error(&woken, "UNBLOCKED"), error, "{woken:?}");
    }
    assert_eq!(c.call(&["CLIENT", "UNBLOCK", &id]), Value::Int(0));
    // A client that has left takes nothing with it.
    a.send(&encode(&["BLPOP", "left", "0"]));
    wait_for("it to block", || {
        c.say("INFO clients").text().contains("blocked_clients:1")
    });
    drop(a);
    wait_for("it to be gone", || {
        c.say("INFO clients").text().contains("blocked_clients:0")
    });
    wait_for("the group to know", || {
        site.groups.iter().all(|g| {
            g.servers[0]
                .client()
                .say("INFO clients")
                .text()
                .contains("blocked_clients:0")
        })
    });
    b.say("RPUSH left precious");
    assert_eq!(c.say("LPOP left"), Value::bulk("precious"));
    // Ended by another.
    let mut victim = one.client();
    let id = victim.say("CLIENT ID").int().to_string();
    victim.send(&encode(&["BLPOP", "none", "0"]));
    pause();
    assert_eq!(c.call(&["CLIENT", "KILL", "ID", &id]), Value::Int(1));
    assert_eq!(victim.try_reply(), None);
}

#[test]
fn scripts_run_where_their_keys_are_and_are_known_everywhere() {
    let (site, ours) = three();
    let mut c = ours.client();
    let get = "return redis.call('GET', KEYS[1])";
    let sha = c.call(&["SCRIPT", "LOAD", get]).text();
    for n in 0..12 {
        let key = format!("k{n}");
        c.call(&["SET", &key, &n.to_string()]);
        assert_eq!(c.call(&["EVAL", get, "1", &key]), Value::bulk(&n.to_string()));
        assert_eq!(c.call(&["EVALSHA", &sha, "1", &key]), Value::bulk(&n.to_string()));
    }
    // Seen at one group by EVAL alone, it is a script for all of them.
    let other = "return {KEYS[1], ARGV[1]}";
    c.call(&["EVAL", other, "1", "k1", "x"]);
    let digest = "0fd7e1b93bd4a9f6bbcd7dbd2a5ab9d0c1ee1cfd";
    assert!(is_error(&c.call(&["EVALSHA", digest, "1", "k1", "x"]), "NOSCRIPT"));
    assert_eq!(
        c.call(&["SCRIPT", "EXISTS", &sha, digest]),
        Value::Array(vec![Value::Int(1), Value::Int(0)])
    );
    // A group has lost its scripts: nobody notices but the first, and that one is told in Redis's own words.
    for g in &site.groups {
        g.servers[0].client().say("SCRIPT FLUSH");
    }
    let mut told = 0;
    for n in 0..12 {
        let key = format!("k{n}");
        match c.call(&["EVALSHA", &sha, "1", &key]) {
            Value::Error(e) => {
                assert!(e.starts_with("NOSCRIPT"), "{e}");
                told += 1;
            }
            got => assert_eq!(got, Value::bulk(&n.to_string())),
        }
    }
    assert!(told <= 3, "{told}");
    assert!(is_error(&c.call(&["EVAL", get, "2", "k1", "k2"]), "CROSSSLOT"));
    let library = "#!lua name=l\nredis.register_function('f', function(k, a) return redis.call('GET', k[1]) end)";
    assert_eq!(c.call(&["FUNCTION", "LOAD", library]), Value::bulk("l"));
    for n in 0..12 {
        assert_eq!(
            c.call(&["FCALL", "f", "1", &format!("k{n}")]),
            Value::bulk(&n.to_string())
        );
    }
    assert_eq!(c.say("SCRIPT FLUSH"), Value::ok());
    assert_eq!(c.call(&["SCRIPT", "EXISTS", &sha]), Value::Array(vec![Value::Int(0)]));
    assert!(is_error(&c.call(&["EVALSHA", &sha, "1", "k1"]), "NOSCRIPT"));
}

// contract: redis-proxy#12
#[test]
fn an_iteration_gives_every_key_that_stays() {
    let (_site, ours) = three();
    let (mut c, mut w) = (ours.client(), ours.client());
    let stay: HashSet<String> = (0..3000).map(|n| format!("stay{n}")).collect();
    w.send(&stay.iter().flat_map(|k| encode(&["SET", k, "v"])).collect::<Vec<_>>());
    stay.iter().for_each(|_| assert_eq!(w.reply(), Value::ok()));
    let (mut cursor, mut seen, mut steps) = ("0".to_owned(), HashSet::new(), 0u32);
    loop {
        let page = c.call(&["SCAN", &cursor, "COUNT", "50"]);
        seen.extend(page.items()[1].items().iter().map(Value::text));
        cursor = page.items()[0].text();
        steps += 1;
        assert!(steps < 100_000, "it does not end");
        if cursor == "0" {
            break;
        }
        // Keys come and go, enough for tables to grow and shrink.
        for n in 0..20 {
            w.call(&["SET", &format!("come{steps}:{n}"), "v"]);
            w.call(&["DEL", &format!("come{}:{n}", steps.saturating_sub(3))]);
        }
    }
    let missed: Vec<&String> = stay.iter().filter(|k| !seen.contains(*k)).collect();
    assert!(
        missed.is_empty(),
        "{} of {} steps {steps}: {:?}",
        missed.len(),
        stay.len(),
        missed.first()
    );
}

// contract: redis-proxy#14
#[test]
fn slots_of_a_million_keys_are_those_of_redis() {
    let cluster = cluster_server();
    let (_site, ours) = three();
    let (mut redis, mut c) = (cluster.client(), ours.client());
    let mut random = rand::rngs::StdRng::seed_from_u64(14);
    let odd: Vec<Vec<u8>> = ["", "{}", "{}x", "{x", "x}", "{{x}}", "a{b}c{d}", "{x}", "a{}b{c}"]
        .iter()
        .map(|k| k.as_bytes().to_vec())
        .collect();
    let mut done = 0;
    while done < 1_000_000 {
        let mut keys: Vec<Vec<u8>> = (0..10_000)
            .map(|_| {
                let n = random.random_range(0..20);
                (0..n)
                    .map(|_| match random.random_range(0..8) {
                        0 => b'{',
                        1 => b'}',
                        _ => random.random::<u8>(),
                    })
                    .collect()
            })
            .collect();
        keys.extend(odd.clone());
        let asked: Vec<u8> = keys
            .iter()
            .flat_map(|k| encode(&[b"CLUSTER".as_slice(), b"KEYSLOT", k]))
            .collect();
        redis.send(&asked);
        // All are compared with the function; some through a connection, too.
        let through = done % 100_000 == 0;
        if through {
            c.send(&asked);
        }
        for k in &keys {
            let want = redis.reply();
            assert_eq!(want, Value::Int(i64::from(gse_core::store::slot(k))), "{k:?}");
            if through {
                assert_eq!(c.reply(), want, "{k:?}");
            }
        }
        done += keys.len();
    }
}

#[test]
fn users_may_do_what_their_lines_say() {
    let site = Site::start(3, 1, false);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("users");
    std::fs::write(
        &file,
        "user app on >pw ~app:* &app.* +@read +@write +@pubsub +@transaction +ping\nuser gone off >pw +@all ~*\n",
    )
    .unwrap();
    let mut config = sharded_list(&site);
    config.users_file = Some(file.clone());
    let ours = Ours::start(config.clone());
    let mut c = Raw::connect(ours.addr);
    assert!(is_error(&c.say("AUTH gone pw"), "WRONGPASS"));
    assert!(is_error(&c.say("AUTH app other"), "WRONGPASS"));
    assert_eq!(c.say("AUTH app pw"), Value::ok());
    assert_eq!(c.say("SET app:1 v"), Value::ok());
    assert_eq!(c.say("MGET app:1 app:2").items().len(), 2);
    for denied in [
        "SET other v",
        "MGET app:1 other",
        "CONFIG GET *",
        "DBA STATUS",
        "PUBLISH other x",
        "ACL LIST",
        "EVAL x 0",
    ] {
        assert!(is_error(&c.say(denied), "NOPERM"), "{denied}");
    }
    // What is denied inside a transaction spoils it.
    c.say("MULTI");
    assert_eq!(c.say("SET app:1 w"), Value::Simple("QUEUED".into()));
    assert!(is_error(&c.say("SET other w"), "NOPERM"));
    assert!(is_error(&c.say("EXEC"), "EXECABORT"));
    assert_eq!(c.say("GET app:1"), Value::bulk("v"));
    assert_eq!(c.say("SUBSCRIBE app.x").items().len(), 3);
    let mut d = ours.client();
    assert_eq!(d.say("ACL WHOAMI"), Value::bulk("default"));
    let lines: Vec<String> = d.say("ACL LIST").items().iter().map(Value::text).collect();
    assert!(lines.len() == 3 && lines.iter().all(|l| !l.contains("pw")), "{lines:?}");
    assert!(d.say("CLIENT LIST").text().contains("user=app"));
    // A line that is not understood is no permission, and a server for everybody is not started by accident.
    for (line, listen) in [
        ("user x on +@nosuch", "127.0.0.1:0"),
        ("user default on nopass ~* +@all", "0.0.0.0:0"),
    ] {
        std::fs::write(&file, line).unwrap();
        config.listen = listen.into();
        assert!(Ours::try_start(config.clone()).is_err(), "{line}");
    }
}

/// Also over one group, where nothing crosses anything.
#[test]
fn with_one_group_slots_need_not_matter() {
    let site = Site::start(1, 1, false);
    let mut config = sharded_list(&site);
    config.sharded.any_slots = true;
    let ours = Ours::start(config.clone());
    let mut c = ours.client();
    assert_eq!(c.say("MSET a 1 b 2"), Value::ok());
    assert_eq!(c.say("RENAME a c"), Value::ok());
    c.say("MULTI");
    c.say("INCR b");
    c.say("INCR c");
    c.say("DBSIZE");
    assert_eq!(
        c.say("EXEC"),
        Value::Array(vec![Value::Int(3), Value::Int(2), Value::Int(2)])
    );
    assert_eq!(c.say("WATCH b c"), Value::ok());
    c.say("MULTI");
    c.say("DEL b c");
    assert_eq!(c.say("EXEC"), Value::Array(vec![Value::Int(2)]));
    config.sharded.any_slots = false;
    let strict = Ours::start(config);
    assert!(is_error(&strict.client().say("MSET a 1 b 2"), "CROSSSLOT"));
}

// contract: redis-proxy#13
#[test]
#[ignore = "full tier: fetches Redis's own suite and redis-py's and runs both, for a quarter of an hour"]
fn the_suites_of_others_pass() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/redis-suites");
    assert!(Command::new(script).status().unwrap().success());
}
