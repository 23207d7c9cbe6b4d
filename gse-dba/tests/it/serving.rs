//! The server and its clients: protocols, passwords, odd requests, transactions, the `redis` crate as it is.

use std::collections::HashMap;
use std::io::Write as _;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;

use crate::rig::{Ours, PASSWORD, Raw, Redis, Value, embedded, encode, single};

fn store() -> (tempfile::TempDir, Ours) {
    let dir = tempfile::tempdir().unwrap();
    let ours = Ours::embedded(dir.path());
    (dir, ours)
}

// contract: redis-proxy#1
#[test]
fn hello_changes_one_connection_and_no_other() {
    let (_dir, ours) = store();
    let (mut plain, mut two, mut three) = (ours.client(), ours.client(), Raw::connect(ours.addr));
    assert!(matches!(two.say("HELLO 2"), Value::Array(v) if v.len() == 14));
    let hello = three.call(&["HELLO", "3", "AUTH", "default", PASSWORD, "SETNAME", "third"]);
    assert!(matches!(&hello, Value::Map(v) if v.len() == 14), "{hello:?}");
    plain.say("HSET h f v");
    assert!(matches!(three.say("HGETALL h"), Value::Map(_)));
    assert!(matches!(two.say("HGETALL h"), Value::Array(_)));
    assert!(matches!(plain.say("HGETALL h"), Value::Array(_)));
    assert_eq!(three.say("CLIENT GETNAME"), Value::bulk("third"));
    assert_eq!(plain.say("CLIENT GETNAME"), Value::Null);
    // In one write: what is before HELLO is in the old protocol, what is after it in the new.
    plain.send(
        &[
            encode(&["HGETALL", "h"]),
            encode(&["HELLO", "3"]),
            encode(&["HGETALL", "h"]),
        ]
        .concat(),
    );
    assert!(matches!(plain.reply(), Value::Array(_)));
    assert!(matches!(plain.reply(), Value::Map(_)));
    assert!(matches!(plain.reply(), Value::Map(_)));
    assert!(matches!(plain.say("HELLO 4"), Value::Error(e) if e.starts_with("NOPROTO")));
}

#[test]
fn nothing_is_served_without_the_password() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = embedded(dir.path());
    config.password = None;
    let error = Ours::try_start(config)
        .err()
        .expect("it started without a password")
        .to_string();
    assert!(error.contains("no password is configured"), "{error}");
    let (_dir, ours) = store();
    let mut c = Raw::connect(ours.addr);
    for line in [
        "GET a",
        "SET a b",
        "PING",
        "INFO",
        "CLIENT LIST",
        "MULTI",
        "CONFIG GET *",
        "NOSUCH",
    ] {
        assert_eq!(
            c.say(line),
            Value::Error("NOAUTH Authentication required.".into()),
            "{line}"
        );
    }
    assert!(matches!(c.say("AUTH wrong"), Value::Error(e) if e.starts_with("WRONGPASS")));
    assert!(matches!(c.say("HELLO 3"), Value::Error(e) if e.starts_with("NOAUTH")));
    assert!(matches!(c.call(&["AUTH", "other", PASSWORD]), Value::Error(_)));
    assert_eq!(c.call(&["AUTH", PASSWORD]), Value::ok());
    assert_eq!(c.say("GET a"), Value::Null);
    assert_eq!(c.say("RESET"), Value::Simple("RESET".into()));
    assert!(matches!(c.say("GET a"), Value::Error(_)));
    // Large things only after the password.
    let mut c = Raw::connect(ours.addr);
    c.send(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1000000\r\n");
    assert!(matches!(c.reply(), Value::Error(e) if e.contains("unauthenticated bulk length")));
    assert_eq!(c.try_reply(), None);
}

// contract: redis-proxy#3
#[test]
fn a_refused_command_is_one_error_and_the_connection_lives() {
    let redis = Redis::start();
    let (_dir, ours) = store();
    for server in [&ours, &Ours::start(single(&redis))] {
        let mut c = server.client();
        for line in [
            "NOSUCH a b",
            "GET",
            "SET a",
            "SHUTDOWN",
            "DEBUG SLEEP 10",
            "REPLICAOF no one",
            "MODULE LIST",
            "MONITOR",
            "CLUSTER RESET",
            "CONFIG SET save x",
            "CLIENT KILL x",
            "CLIENT FOO",
            "SELECT 3",
            "HELLO 9",
        ] {
            assert!(matches!(c.say(line), Value::Error(_)), "{line}");
            assert_eq!(c.say("ECHO still"), Value::bulk("still"), "after {line}");
        }
        // The same in one write: one reply each, in order.
        c.send(
            &[
                encode(&["NOSUCH"]),
                encode(&["ECHO", "1"]),
                encode(&["GET"]),
                encode(&["SHUTDOWN"]),
                encode(&["ECHO", "2"]),
            ]
            .concat(),
        );
        let replies: Vec<Value> = (0..5).map(|_| c.reply()).collect();
        assert!(
            matches!(&replies[..], [Value::Error(_), Value::Bulk(one), Value::Error(_), Value::Error(_), Value::Bulk(two)] if one == b"1" && two == b"2"),
            "{replies:?}"
        );
    }
    let mut c = ours.client();
    for line in [
        "BLPOP a 0",
        "SUBSCRIBE a",
        "XADD s * f v",
        "EVAL return 0",
        "PUBLISH a b",
    ] {
        assert!(matches!(c.say(line), Value::Error(_)), "{line}");
    }
    assert!(matches!(c.say("BLPOP a 0"), Value::Error(e) if e.contains("not supported by the embedded store")));
}

// contract: redis-proxy#4
#[test]
fn a_million_arguments_are_served() {
    let (_dir, ours) = store();
    let mut c = ours.client();
    let members: Vec<String> = (0..999_998).map(|i| i.to_string()).collect();
    let command: Vec<&str> = ["SADD", "s"]
        .into_iter()
        .chain(members.iter().map(String::as_str))
        .collect();
    assert_eq!(c.call(&command), Value::Int(999_998));
    c.send(b"*2000000\r\n");
    assert!(matches!(c.reply(), Value::Error(e) if e.contains("invalid multibulk length")));
    assert_eq!(c.try_reply(), None);
    assert_eq!(ours.client().say("SCARD s"), Value::Int(999_998));
}

// contract: redis-proxy#5
#[test]
fn pipelined_replies_come_in_order_and_equal_a_model() {
    let redis = Redis::start();
    let (_dir, ours) = store();
    for server in [&ours, &Ours::start(single(&redis))] {
        let mut clients: Vec<(Raw, HashMap<String, String>)> =
            (0..4).map(|_| (server.client(), HashMap::new())).collect();
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        for round in 0..300 {
            let (n, (c, model)) = (round % 4, &mut clients[round % 4]);
            let ops = prop::collection::vec((any::<bool>(), 0..40u8, any::<u32>()), 16)
                .new_tree(&mut runner)
                .unwrap()
                .current();
            let (mut bytes, mut want) = (Vec::new(), Vec::new());
            for (set, key, value) in ops {
                let key = format!("{n}:{key}");
                if set {
                    bytes.extend(encode(&["SET", &key, &value.to_string()]));
                    model.insert(key, value.to_string());
                    want.push(Value::ok());
                } else {
                    bytes.extend(encode(&["GET", &key]));
                    want.push(model.get(&key).map_or(Value::Null, |v| Value::bulk(v)));
                }
            }
            c.send(&bytes);
            for want in want {
                assert_eq!(c.reply(), want);
            }
        }
    }
}

// contract: redis-proxy#8
#[test]
fn transactions_are_atomic_and_watch_guards_them() {
    let redis = Redis::start();
    let (_dir, ours) = store();
    for server in [&ours, &Ours::start(single(&redis))] {
        let (mut a, mut b) = (server.client(), server.client());
        a.say("MULTI");
        assert_eq!(a.say("INCR n"), Value::Simple("QUEUED".into()));
        a.say("INCR n");
        assert_eq!(b.say("GET n"), Value::Null, "seen before EXEC");
        assert_eq!(a.say("EXEC"), Value::Array(vec![Value::Int(1), Value::Int(2)]));
        // A changed watched key aborts; an unchanged one does not; one that came and went was changed.
        for (meanwhile, aborted) in [
            ("SET w other", true),
            ("SET x other", false),
            ("DEL w", true),
            ("EXPIRE w 100", true),
            ("GET w", false),
        ] {
            b.say("SET w v");
            a.say("WATCH w never");
            b.say(meanwhile);
            a.say("MULTI");
            a.say("SET done yes");
            let reply = a.say("EXEC");
            assert_eq!(reply == Value::NullArray, aborted, "{meanwhile}: {reply:?}");
        }
        a.say("WATCH gone");
        b.say("SET gone v");
        b.say("DEL gone");
        a.say("MULTI");
        assert_eq!(a.say("EXEC"), Value::NullArray);
        a.say("WATCH w");
        a.say("UNWATCH");
        b.say("SET w again");
        a.say("MULTI");
        assert_eq!(a.say("EXEC"), Value::Array(vec![]));
        // A command that cannot be queued aborts the whole.
        a.say("MULTI");
        a.say("SET w fresh");
        assert!(matches!(a.say("GET"), Value::Error(_)));
        assert!(matches!(a.say("EXEC"), Value::Error(e) if e.starts_with("EXECABORT")));
        assert_eq!(b.say("GET w"), Value::bulk("again"));
        // One that fails when it runs does not.
        a.say("MULTI");
        a.say("LPUSH w x");
        a.say("SET w last");
        assert!(matches!(a.say("EXEC"), Value::Array(v) if matches!(v[0], Value::Error(_)) && v[1] == Value::ok()));
        // A client that leaves takes its transaction with it.
        a.say("MULTI");
        a.say("SET w lost");
        drop(a);
        assert_eq!(b.say("GET w"), Value::bulk("last"));
    }
}

#[test]
fn random_draws_and_cursors_keep_their_promises() {
    let (_dir, ours) = store();
    let mut c = ours.client();
    for i in 0..500 {
        c.say(&format!("SADD s {i}"));
        c.say(&format!("SET k{i} v"));
    }
    let mut seen = std::collections::HashSet::new();
    for _ in 0..25 {
        for m in c.say("SPOP s 20").items() {
            assert!(seen.insert(m.text()), "drawn twice: {m:?}");
        }
    }
    assert_eq!(seen.len(), 500);
    assert_eq!(c.say("EXISTS s"), Value::Int(0));
    assert_eq!(c.say("SPOP s"), Value::Null);
    c.say("SADD s a b c");
    assert_eq!(c.say("SRANDMEMBER s 2").items().len(), 2);
    assert_eq!(c.say("SRANDMEMBER s -10").items().len(), 10);
    assert!(c.say("RANDOMKEY").text().starts_with(['k', 's']));
    c.say("DEL s");
    // What is there throughout is seen, though others come and go at every step.
    let (mut cursor, mut found, mut steps) = ("0".to_owned(), std::collections::HashSet::new(), 0);
    loop {
        let page = c.say(&format!("SCAN {cursor} COUNT 7 MATCH k*"));
        found.extend(page.items()[1].items().iter().map(Value::text));
        cursor = page.items()[0].text();
        if cursor == "0" {
            break;
        }
        c.say(&format!("DEL k{}", 400 + steps));
        c.say(&format!("SET new{steps} v"));
        steps += 1;
        assert!(steps < 1000, "the scan never ends");
    }
    for i in 0..400 {
        assert!(found.contains(&format!("k{i}")), "k{i} was missed");
    }
}

#[test]
fn a_client_that_reads_nothing_is_cut_and_nobody_else_waits() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = embedded(dir.path());
    config.limits.write_timeout_ms = 300;
    let ours = Ours::start(config);
    let mut good = ours.client();
    good.call(&["SET", "big", &"x".repeat(1_000_000)]);
    let mut lazy = ours.client();
    lazy.stream
        .set_write_timeout(Some(std::time::Duration::from_secs(5)))
        .unwrap();
    let asks: Vec<u8> = (0..200).flat_map(|_| encode(&["GET", "big"])).collect();
    lazy.send(&asks);
    for _ in 0..200 {
        assert_eq!(good.say("ECHO hi"), Value::bulk("hi"));
    }
    crate::rig::wait_for("the cut", || good.say("CLIENT LIST").text().lines().count() == 1);
}

#[test]
fn too_many_clients_and_silent_ones_are_turned_away() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = embedded(dir.path());
    config.limits.max_clients = 2;
    config.limits.handshake_timeout_ms = 300;
    let ours = Ours::start(config);
    let mut a = ours.client();
    let mut silent = Raw::connect(ours.addr);
    crate::rig::wait_for("the second client", || a.say("CLIENT LIST").text().lines().count() == 2);
    let mut third = Raw::connect(ours.addr);
    assert_eq!(third.reply(), Value::Error("ERR max number of clients reached".into()));
    assert!(matches!(silent.reply(), Value::Error(e) if e.contains("no password was given in time")));
    assert_eq!(silent.try_reply(), None);
    // A command that is begun and not ended.
    a.stream.write_all(b"*2\r\n$3\r\nGET\r\n$5\r\nab").unwrap();
    assert_eq!(a.try_reply(), None);
    let mut again = ours.client();
    assert_eq!(again.say("ECHO in"), Value::bulk("in"));
}

#[test]
fn info_says_what_clients_look_for() {
    let (_dir, ours) = store();
    let mut c = ours.client();
    c.say("SET a b EX 100");
    let info = c.say("INFO").text();
    for part in [
        "redis_version:7.",
        "redis_mode:standalone",
        "arch_bits:64",
        "role:master",
        "# Keyspace\r\ndb0:keys=1,expires=1",
        "used_memory:",
        "tcp_port:",
    ] {
        assert!(info.contains(part), "{part} is missing in {info}");
    }
    assert!(c.say("COMMAND COUNT").int() > 150);
    assert_eq!(c.say("COMMAND INFO get").items()[0].items()[1], Value::Int(2));
    assert_eq!(
        c.say("CONFIG GET maxmemory-policy").items()[1],
        Value::bulk("noeviction")
    );
    assert!(c.say("CLIENT ID").int() > 0);
    assert_eq!(c.say("QUIT"), Value::ok());
    assert_eq!(c.try_reply(), None);
}

#[test]
fn a_unix_socket_serves_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = embedded(&dir.path().join("store"));
    let path = dir.path().join("s");
    config.unix_socket = Some(path.clone());
    let ours = Ours::start(config);
    assert_eq!(ours.listeners["unix"], path.display().to_string());
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    stream
        .write_all(&[encode(&["AUTH", PASSWORD]), encode(&["PING"]), encode(&["QUIT"])].concat())
        .unwrap();
    let mut all = String::new();
    std::io::Read::read_to_string(&mut stream, &mut all).unwrap();
    assert_eq!(all, "+OK\r\n+PONG\r\n+OK\r\n");
}

// contract: redis-proxy#2
#[test]
fn the_redis_crate_works_as_it_is() {
    let redis = Redis::start();
    let (_dir, ours) = store();
    for server in [&ours, &Ours::start(single(&redis))] {
        for protocol in ["resp2", "resp3"] {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let client = redis::Client::open(format!("{}?protocol={protocol}", server.url())).unwrap();
                let mut c = redis::aio::ConnectionManager::new(client).await.unwrap();
                let (a, b): (i64, HashMap<String, String>) = redis::pipe()
                    .atomic()
                    .cmd("INCRBY")
                    .arg("n")
                    .arg(5)
                    .cmd("HSET")
                    .arg("h")
                    .arg("f")
                    .arg("v")
                    .ignore()
                    .cmd("HGETALL")
                    .arg("h")
                    .query_async(&mut c)
                    .await
                    .unwrap();
                assert!(a % 5 == 0);
                assert_eq!(b["f"], "v");
                let z: Vec<(String, f64)> = redis::pipe()
                    .cmd("ZADD")
                    .arg("z")
                    .arg(1.5)
                    .arg("m")
                    .ignore()
                    .cmd("ZRANGE")
                    .arg("z")
                    .arg(0)
                    .arg(-1)
                    .arg("WITHSCORES")
                    .query_async::<(Vec<(String, f64)>,)>(&mut c)
                    .await
                    .unwrap()
                    .0;
                assert_eq!(z, [("m".to_owned(), 1.5)]);
            });
        }
    }
}

#[test]
fn the_store_client_of_our_services_works_over_tcp_and_over_tls() {
    use gse_core::certs::Authority;
    use gse_core::store::{Batch, Store, StoreConfig};
    use gse_dba::config::Tls;
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(dir.path()).unwrap();
    let (cert, key) = (dir.path().join("c.crt"), dir.path().join("c.key"));
    let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
    authority
        .issue(gse_core::tls::Role::Server, None, &names, &cert, &key, 10)
        .unwrap();
    for tls in [None, Some(Tls { cert, key, ca: None })] {
        let mut config = embedded(&dir.path().join(if tls.is_some() { "tls" } else { "tcp" }));
        let scheme = if tls.is_some() { "rediss" } else { "redis" };
        config.tls = tls;
        let ours = Ours::start(config);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let config = StoreConfig {
                url: ours.url().replace("redis://", &format!("{scheme}://")),
                tls_ca: (scheme == "rediss").then(|| authority.ca_path()),
                ..StoreConfig::default()
            };
            let store = Store::connect(&config).await.unwrap();
            store.ping().await.unwrap();
            let mut batch = Batch::new();
            let mut set = redis::cmd("SET");
            set.arg("{t}a").arg("v");
            batch.push("{t}a", set);
            let mut get = redis::cmd("GET");
            get.arg("{t}a");
            batch.push("{t}a", get);
            let replies = store.run(batch).await.unwrap();
            assert_eq!(replies[1], redis::Value::BulkString(b"v".to_vec()));
        });
    }
}
