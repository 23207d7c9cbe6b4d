//! Publish and subscribe over several groups: through any gse_dba, in both protocols, after a fail-over, and with a subscriber that takes nothing.

use std::time::{Duration, Instant};

use crate::rig::{Ours, PASSWORD, Raw, Value, encode, pause, wait_for};
use crate::site::{Site, sharded, sharded_list};

fn words(v: &Value) -> Vec<String> {
    v.items()
        .iter()
        .map(|v| match v {
            Value::Null => "nil".to_owned(),
            other => other.text(),
        })
        .collect()
}

/// What was pushed, as words.
fn next(c: &mut Raw) -> Vec<String> {
    words(&c.reply())
}

fn slow(c: &mut Raw) -> &mut Raw {
    c.stream.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
    c
}

// contract: redis-proxy#11
#[test]
fn messages_go_through_any_gse_dba_to_all_who_asked() {
    let site = Site::start(3, 1, false);
    let (one, two) = (Ours::start(sharded_list(&site)), Ours::start(sharded_list(&site)));
    let (mut a, mut b, mut p) = (one.client(), two.client(), two.client());
    let mut three = Raw::connect(one.addr);
    three.call(&["HELLO", "3", "AUTH", "default", PASSWORD]);
    for n in 0..10 {
        let channel = format!("c{n}");
        assert_eq!(
            words(&a.call(&["SUBSCRIBE", &channel])),
            ["subscribe", &channel, &(n + 1).to_string()]
        );
    }
    assert_eq!(words(&b.say("PSUBSCRIBE c*")), ["psubscribe", "c*", "1"]);
    three.send(&encode(&["SSUBSCRIBE", "c1"]));
    assert_eq!(three.line().unwrap(), ">3", "RESP3 has a form of its own for it");
    assert_eq!(three.line().unwrap(), "$10");
    for _ in 0..4 {
        three.line();
    }
    for n in 0..10 {
        let channel = format!("c{n}");
        // One receiver here by its pattern, and the other gse_dba as one.
        assert_eq!(p.call(&["PUBLISH", &channel, "hello"]), Value::Int(2), "{channel}");
        assert_eq!(next(&mut a), ["message", &channel, "hello"]);
        assert_eq!(next(&mut b), ["pmessage", "c*", &channel, "hello"]);
    }
    // Published at any of the groups by a script, or past gse_dba altogether.
    for g in &site.groups {
        g.servers[0].client().say("PUBLISH c5 direct");
        assert_eq!(next(&mut a), ["message", "c5", "direct"]);
        assert_eq!(next(&mut b), ["pmessage", "c*", "c5", "direct"]);
    }
    assert_eq!(p.say("SPUBLISH c1 sharded"), Value::Int(1));
    assert_eq!(next(&mut three), ["smessage", "c1", "sharded"]);
    // In RESP3 everything else goes on meanwhile, in RESP2 nothing does.
    assert_eq!(three.say("SET k v"), Value::ok());
    assert!(matches!(a.say("GET k"), Value::Error(e) if e.contains("allowed in this context")));
    assert_eq!(words(&a.say("PING")), ["pong", ""]);
    let mut counts: Vec<String> = words(&p.say("PUBSUB NUMSUB c1 none"));
    assert_eq!(counts.split_off(0), ["c1", "1", "none", "0"]);
    assert_eq!(p.say("PUBSUB NUMPAT"), Value::Int(1));
    assert_eq!(p.say("PUBSUB CHANNELS c*").items().len(), 10);
    for n in 0..9 {
        a.call(&["UNSUBSCRIBE", &format!("c{n}")]);
    }
    assert_eq!(words(&a.say("UNSUBSCRIBE")), ["unsubscribe", "c9", "0"]);
    assert_eq!(words(&a.say("UNSUBSCRIBE")), ["unsubscribe", "nil", "0"]);
    assert_eq!(a.say("GET k"), Value::bulk("v"), "an ordinary connection again");
    assert_eq!(p.say("PUBLISH c1 x"), Value::Int(1));
    assert_eq!(next(&mut b), ["pmessage", "c*", "c1", "x"]);
    b.say("PUNSUBSCRIBE c*");
    assert_eq!(p.say("PUBLISH c1 x"), Value::Int(0));
}

// contract: redis-proxy#11
#[test]
fn however_many_clients_a_group_sees_one_subscription() {
    let site = Site::start(2, 1, false);
    let ours = Ours::start(sharded_list(&site));
    let mut clients: Vec<Raw> = (0..40).map(|_| ours.client()).collect();
    for c in &mut clients {
        assert_eq!(words(&c.say("SUBSCRIBE news")), ["subscribe", "news", "1"]);
    }
    for g in &site.groups {
        assert_eq!(words(&g.servers[0].client().say("PUBSUB NUMSUB news")), ["news", "1"]);
    }
    let mut p = ours.client();
    assert_eq!(p.say("PUBLISH news x"), Value::Int(40));
    assert_eq!(words(&p.say("PUBSUB NUMSUB news")), ["news", "40"]);
    for c in &mut clients {
        assert_eq!(next(c), ["message", "news", "x"]);
    }
    drop(clients);
    wait_for("the groups to be told that nobody listens", || {
        site.groups
            .iter()
            .all(|g| words(&g.servers[0].client().say("PUBSUB NUMSUB news")) == ["news", "0"])
    });
}

#[test]
fn a_subscriber_that_takes_nothing_is_dropped_and_holds_up_nobody() {
    let site = Site::start(1, 1, false);
    let mut config = sharded_list(&site);
    config.limits.subscriber_bytes = 1 << 20;
    config.limits.write_timeout_ms = 60_000;
    let ours = Ours::start(config);
    let (mut lazy, mut keen, mut p) = (ours.client(), ours.client(), ours.client());
    lazy.say("SUBSCRIBE news");
    keen.say("SUBSCRIBE news");
    let body = "x".repeat(64 * 1024);
    for n in 0..400 {
        p.call(&["PUBLISH", "news", &body]);
        assert_eq!(next(&mut keen)[2].len(), body.len(), "{n}");
    }
    // What was written before may still be read; then the connection ends.
    let mut got = 0;
    while let Some(v) = slow(&mut lazy).try_reply() {
        assert_eq!(words(&v)[0], "message");
        got += 1;
    }
    assert!(got < 400, "it was not dropped");
    assert_eq!(p.say("PUBLISH news x"), Value::Int(1));
}

// contract: redis-proxy#11
#[test]
fn subscriptions_are_there_again_within_five_seconds_of_a_fail_over() {
    let mut site = Site::start(2, 2, true);
    let ours = Ours::start(sharded(&site));
    let (mut s, mut p) = (ours.client(), ours.client());
    let channels: Vec<String> = (0..8).map(|n| format!("c{n}")).collect();
    let all: Vec<String> = std::iter::once("SUBSCRIBE".to_owned())
        .chain(channels.clone())
        .collect();
    s.send(&encode(&all));
    for _ in &channels {
        assert_eq!(next(&mut s)[0], "subscribe");
    }
    s.say("PSUBSCRIBE p.*");
    let dead = site.groups[0].servers.remove(0);
    let address = dead.addr.to_string();
    dead.kill();
    wait_for("another primary", || {
        let told = p.say("INFO sharding").text();
        !told.contains(&address) && told.matches("state=ok").count() == 2
    });
    let switched = Instant::now();
    s.stream.set_read_timeout(Some(Duration::from_secs(6))).unwrap();
    for channel in channels.iter().map(String::as_str).chain(["p.x"]) {
        // Until it arrives; a message while nobody listens is lost, as Redis loses it.
        let mut sent = 0;
        loop {
            assert!(
                switched.elapsed() < Duration::from_secs(5),
                "{channel} after {sent} messages"
            );
            sent += 1;
            if p.call(&["PUBLISH", channel, "again"]) == Value::Int(1) {
                break;
            }
            pause();
        }
        loop {
            let got = next(&mut s);
            assert_eq!(got.last().map(String::as_str), Some("again"));
            if got.iter().any(|w| w == channel) {
                break;
            }
        }
    }
    println!("all subscriptions work {:?} after the switch", switched.elapsed());
}
