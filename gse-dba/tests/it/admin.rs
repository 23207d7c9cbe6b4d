//! The operator's side over real sockets: `DBA`, the slow log, hot keys, clients and their limits, metrics.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::rig::{Ours, PASSWORD, Raw, Redis, Value, embedded, encode, pause, single, wait_for};
use crate::site::{Site, sharded_list};

fn json(value: Value) -> serde_json::Value {
    match value {
        Value::Bulk(b) => serde_json::from_slice(&b).unwrap(),
        other => panic!("no JSON: {other:?}"),
    }
}

fn dba(c: &mut Raw, words: &str) -> serde_json::Value {
    json(c.say(&format!("DBA {words}")))
}

/// The figures of the operations listener.
fn metrics(ours: &Ours) -> String {
    let mut s = std::net::TcpStream::connect(&ours.listeners["ops"]).unwrap();
    s.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    s.read_to_string(&mut text).unwrap();
    text
}

fn figure(text: &str, name: &str) -> f64 {
    let line = text
        .lines()
        .find(|l| l.strip_prefix(name).is_some_and(|r| r.starts_with(' ')));
    line.and_then(|l| l.rsplit(' ').next())
        .and_then(|n| n.parse().ok())
        .unwrap_or_else(|| panic!("{name} is not in\n{text}"))
}

#[test]
fn status_and_slots_of_groups_are_told() {
    let site = Site::start(2, 1, false);
    let mut config = sharded_list(&site);
    config.ops.listen = "127.0.0.1:0".into();
    let ours = Ours::start(config);
    let mut c = ours.client();
    assert_eq!(c.say("SET foo 1"), Value::ok());
    let status = dba(&mut c, "STATUS");
    assert_eq!(status["mode"], "sharded");
    assert_eq!((&status["copies"], &status["acknowledged"]), (&2.into(), &2.into()));
    assert!(
        status["durability"]
            .as_str()
            .unwrap()
            .starts_with("2 of 2: an acknowledged write")
    );
    assert_eq!(status["health"]["ok"], true, "{status}");
    let groups = status["groups"].as_array().unwrap();
    for (i, range) in ["0-8191", "8192-16383"].into_iter().enumerate() {
        let g = &groups[i];
        assert_eq!(
            (&g["name"], &g["ranges"][0], &g["state"]),
            (&format!("g{i}").into(), &range.into(), &"ok".into())
        );
        assert_eq!(g["primary"], site.groups[i].servers[0].addr.to_string());
        let copy = &g["followers"][0];
        assert_eq!(copy["address"], site.groups[i].servers[1].addr.to_string());
        assert!(
            copy["lag_s"].as_u64() < Some(20) && copy["behind_bytes"].is_u64(),
            "{copy}"
        );
    }
    let slots = dba(&mut c, "SLOTS");
    assert_eq!(slots["groups"][1]["slots"], 8192);
    let key = dba(&mut c, "SLOTS KEY foo");
    assert_eq!((&key["slot"], &key["group"]), (&12182.into(), &"g1".into()));
    for wrong in ["STATUS x", "SLOTS KEY", "SLOWLOG GET x", "NOSUCH", "HOTKEYS -1"] {
        assert!(matches!(c.say(&format!("DBA {wrong}")), Value::Error(_)), "{wrong}");
    }
    assert_eq!(c.say("GET foo"), Value::bulk("1"), "the connection goes on");
    let info = c.say("INFO").text();
    for line in [
        "redis_version:",
        "redis_mode:",
        "role:master",
        "arch_bits:64",
        "# Keyspace",
    ] {
        assert!(info.contains(line), "{line} is not in {info}");
    }
    let text = metrics(&ours);
    assert!(figure(&text, "gse_dba_request_seconds_count{class=\"write\"}") >= 1.0);
    assert_eq!(figure(&text, "gse_dba_inflight"), 0.0);
    let of = |i: usize| format!("{{group=\"g{i}\",copy=\"{}\"}}", site.groups[i].servers[1].addr);
    assert!(figure(&text, &format!("gse_dba_copy_lag_seconds{}", of(0))) < 20.0);
    assert!(figure(&text, &format!("gse_dba_copy_behind_bytes{}", of(1))) >= 0.0);
    assert!(figure(&text, "gse_dba_backend_seconds_count{group=\"g1\"}") >= 1.0);
}

#[test]
fn dba_can_be_kept_to_the_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = embedded(&dir.path().join("data"));
    let path = dir.path().join("dba.sock");
    config.unix_socket = Some(path.clone());
    config.admin.tcp = false;
    let ours = Ours::start(config);
    let mut c = ours.client();
    assert!(matches!(c.say("DBA STATUS"), Value::Error(e) if e.starts_with("NOPERM")));
    assert_eq!(c.say("PING"), Value::Simple("PONG".into()));
    let mut s = UnixStream::connect(&path).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    s.write_all(
        &[
            encode(&["AUTH", PASSWORD]),
            encode(&["DBA", "STATUS"]),
            encode(&["QUIT"]),
        ]
        .concat(),
    )
    .unwrap();
    let mut text = String::new();
    s.read_to_string(&mut text).unwrap();
    assert!(text.contains("\"mode\":\"embedded\""), "{text}");
    // Nobody without a password.
    let mut stranger = Raw::connect(ours.addr);
    assert!(matches!(stranger.say("DBA STATUS"), Value::Error(e) if e.starts_with("NOAUTH")));
    assert!(matches!(c.say("DBA SLOTS"), Value::Error(_)));
}

#[test]
fn slow_batches_are_kept_and_shown_as_redis_shows_them() {
    let redis = Redis::start();
    let mut config = single(&redis);
    config.admin.slowlog_slower_than_us = 200_000;
    config.admin.slowlog_max_len = 2;
    let ours = Ours::start(config);
    let mut c = ours.client();
    c.say("CLIENT SETNAME slowpoke");
    let mut admin = ours.client();
    // On a busy machine anything may have been slow.
    assert_eq!(admin.say("SLOWLOG RESET"), Value::ok());
    for i in 0..3 {
        redis.freeze();
        c.send(
            &[
                encode(&["SET", &format!("k{i}"), &"x".repeat(1000)]),
                encode(&["GET", "a"]),
            ]
            .concat(),
        );
        std::thread::park_timeout(Duration::from_millis(300));
        redis.thaw();
        assert_eq!(c.reply(), Value::ok());
        assert_eq!(c.reply(), Value::Null);
    }
    // A pop that waits was told to, and passwords are nobody's business.
    assert_eq!(c.say("BLPOP nothing 0.4"), Value::NullArray);
    wait_for("the entries", || admin.say("SLOWLOG LEN") == Value::Int(2));
    let shown = admin.say("SLOWLOG GET");
    let newest = shown.items()[0].items();
    assert_eq!(newest.len(), 6, "{newest:?}");
    let took = newest[2].int();
    assert!((200_000..20_000_000).contains(&took), "{took}");
    let words: Vec<String> = newest[3].items().iter().map(Value::text).collect();
    assert_eq!((words[0].as_str(), words[1].as_str()), ("SET", "k2"));
    assert!(words[2].ends_with("... (872 more bytes)"), "{}", words[2]);
    assert_eq!(newest[5].text(), "slowpoke");
    let told = dba(&mut admin, "SLOWLOG GET 1");
    assert_eq!(told["entries"].as_array().unwrap().len(), 1);
    assert_eq!(told["entries"][0]["batch"], 2, "{told}");
    assert!(told["seen"].as_u64() >= Some(3) && told["kept"] == 2, "{told}");
    assert_eq!(admin.say("SLOWLOG RESET"), Value::ok());
    assert_eq!(dba(&mut admin, "SLOWLOG LEN")["kept"], 0);
}

#[test]
fn hot_keys_stand_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = embedded(dir.path());
    config.admin.hotkeys_sample = 2;
    let ours = Ours::start(config);
    let mut c = ours.client();
    for i in 0..2000 {
        let cold = format!("cold{i}");
        let key = if i % 4 == 0 { "hot" } else { &cold };
        c.call(&["INCR", key]);
    }
    let told = dba(&mut c, "HOTKEYS 2");
    // The window may have turned meanwhile.
    let keys: Vec<_> = ["now", "before"]
        .iter()
        .flat_map(|w| told[w]["keys"].as_array().unwrap())
        .collect();
    let hot = keys
        .iter()
        .find(|k| k["key"] == "hot")
        .unwrap_or_else(|| panic!("{told}"));
    let share = hot["share"].as_f64().unwrap();
    assert!((0.15..0.35).contains(&share), "{told}");
}

#[test]
fn clients_are_listed_and_killed_as_redis_does() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Ours::embedded(dir.path());
    let (mut a, mut b, mut c) = (ours.client(), ours.client(), ours.client());
    for (c, name) in [(&mut a, "a"), (&mut b, "b")] {
        assert_eq!(c.say(&format!("CLIENT SETNAME {name}")), Value::ok());
    }
    let list = c.say("CLIENT LIST").text();
    assert_eq!(list.lines().count(), 3, "{list}");
    for field in [
        "id=",
        "addr=127.0.0.1:",
        "age=",
        "idle=",
        "flags=N",
        "cmd=client",
        "user=default",
        "resp=2",
    ] {
        assert!(list.lines().all(|l| l.contains(field)), "{field} is not in {list}");
    }
    let id = a.say("CLIENT ID").int();
    assert_eq!(c.say(&format!("CLIENT LIST ID {id}")).text().lines().count(), 1);
    assert_eq!(c.say("CLIENT LIST TYPE pubsub").text(), "");
    assert_eq!(dba(&mut c, "CLIENTS")["connected"], 3);
    assert_eq!(c.say(&format!("CLIENT KILL ID {id}")), Value::Int(1));
    assert_eq!(a.try_reply(), None, "it was killed");
    let at = b.stream.local_addr().unwrap();
    assert_eq!(
        c.say("CLIENT KILL 1.2.3.4:5"),
        Value::Error("ERR No such client".into())
    );
    assert_eq!(c.say(&format!("CLIENT KILL {at}")), Value::ok());
    assert_eq!(b.try_reply(), None);
    assert!(matches!(c.say("CLIENT KILL ID 0"), Value::Error(_)));
    assert!(matches!(c.say("CLIENT KILL NOSUCH x"), Value::Error(e) if e == "ERR syntax error"));
    assert_eq!(c.say("CLIENT KILL TYPE normal"), Value::Int(0), "not itself");
    wait_for("the list to be of one", || {
        c.say("CLIENT LIST").text().lines().count() == 1
    });
    assert_eq!(c.say("CLIENT KILL TYPE normal SKIPME no"), Value::Int(1));
    assert_eq!(c.try_reply(), None);
}

/// One that waits for an element is killed too.
#[test]
fn a_client_that_blocks_is_killed() {
    let redis = Redis::start();
    let ours = Ours::start(single(&redis));
    let (mut a, mut c) = (ours.client(), ours.client());
    let id = a.say("CLIENT ID").int();
    a.send(&encode(&["BLPOP", "nothing", "0"]));
    wait_for("it to block", || {
        redis.client().say("INFO clients").text().contains("blocked_clients:1")
    });
    assert_eq!(c.say(&format!("CLIENT KILL ID {id}")), Value::Int(1));
    assert_eq!(a.try_reply(), None);
    wait_for("its connection to the store to end", || {
        redis.client().say("INFO clients").text().contains("blocked_clients:0")
    });
    assert_eq!(c.say("RPUSH nothing x"), Value::Int(1), "nobody took it");
    assert_eq!(c.say("LLEN nothing"), Value::Int(1));
}

#[test]
fn a_command_that_drips_in_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = embedded(dir.path());
    config.limits.handshake_timeout_ms = 500;
    config.ops.listen = "127.0.0.1:0".into();
    let ours = Ours::start(config);
    let mut c = ours.client();
    let begun = Instant::now();
    let bytes = encode(&["SET", "k", &"x".repeat(10_000)]);
    // A byte every 10 ms: each read is in time, the whole is not.
    for b in bytes {
        if c.stream.write_all(&[b]).is_err() || begun.elapsed() > Duration::from_secs(15) {
            break;
        }
        pause();
    }
    assert!(begun.elapsed() < Duration::from_secs(15), "it was let go on");
    wait_for("the figure", || {
        metrics(&ours).contains("gse_dba_client_evictions_total{reason=\"slow_sender\"} 1")
    });
    // One that sends commands without a pause, never ending a read at a command's end, is not such a one.
    let mut c = ours.client();
    let (begun, one) = (Instant::now(), encode(&["SET", "k", "v"]));
    c.send(&one[..10]);
    let mut n = 0;
    while begun.elapsed() < Duration::from_millis(1500) {
        c.send(&one[10..]);
        c.send(&one[..10]);
        assert_eq!(c.reply(), Value::ok());
        n += 1;
        pause();
    }
    assert!(n > 5);
}

#[test]
fn replies_that_nobody_takes_are_bounded_over_all_clients() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = embedded(dir.path());
    config.limits.output_buffer_bytes = 32 << 20;
    config.limits.all_output_bytes = 48 << 20;
    config.ops.listen = "127.0.0.1:0".into();
    let ours = Ours::start(config);
    let mut c = ours.client();
    for (key, mib) in [("large", 28), ("less", 24)] {
        assert_eq!(c.call(&["SET", key, &"x".repeat(mib << 20)]), Value::ok());
    }
    let mut greedy = ours.client();
    greedy.send(&encode(&["GET", "large"]));
    wait_for("its reply to wait", || {
        dba(&mut c, "CLIENTS")["clients"]
            .as_array()
            .unwrap()
            .iter()
            .any(|c| c["output_bytes"].as_u64() > Some(28 << 20))
    });
    // There is no room for both: who holds the most goes.
    assert!(matches!(c.say("GET less"), Value::Bulk(b) if b.len() == 24 << 20));
    assert!(metrics(&ours).contains("gse_dba_client_evictions_total{reason=\"all_output\"} 1"));
    wait_for("it to be gone", || dba(&mut c, "CLIENTS")["connected"] == 1);
}
