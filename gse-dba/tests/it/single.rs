//! One Redis behind: private connections where they are needed, deep replies, and what clients are told when it dies.

use std::time::{Duration, Instant};

use crate::rig::{Ours, Redis, Value, encode, pause, single, wait_for};

// contract: redis-proxy#4
#[test]
fn a_reply_nested_five_thousand_deep_passes_through() {
    let redis = Redis::start();
    let ours = Ours::start(single(&redis));
    let script = "local t = {} for i = 1, 5000 do t = {t} end return t";
    let mut c = ours.client();
    c.send(&encode(&["EVAL", script, "0"]));
    let mut lines = 0;
    loop {
        let line = c.line().unwrap();
        lines += 1;
        if line == "*0" {
            break;
        }
        assert_eq!(line, "*1");
    }
    assert_eq!(lines, 5001);
    assert_eq!(c.say("ECHO alive"), Value::bulk("alive"));
    assert_eq!(ours.client().say("ECHO alive"), Value::bulk("alive"));
}

// contract: redis-proxy#10
#[test]
fn a_blocked_client_holds_up_nobody() {
    let redis = Redis::start();
    let mut config = single(&redis);
    config.single.connections = 1;
    config.single.reply_timeout_ms = 500;
    let ours = Ours::start(config);
    let (mut blocked, mut other) = (ours.client(), ours.client());
    blocked.send(&encode(&["BLPOP", "queue", "0"]));
    let until = Instant::now() + Duration::from_millis(700);
    while Instant::now() < until {
        assert_eq!(other.say("ECHO free"), Value::bulk("free"));
        pause();
    }
    other.say("RPUSH queue item");
    assert_eq!(
        blocked.reply(),
        Value::Array(vec![Value::bulk("queue"), Value::bulk("item")])
    );
    assert_eq!(blocked.say("ECHO free"), Value::bulk("free"));
}

#[test]
fn subscribers_get_what_is_published() {
    let redis = Redis::start();
    let ours = Ours::start(single(&redis));
    for hello in ["HELLO 2", "HELLO 3"] {
        let (mut sub, mut publisher) = (ours.client(), ours.client());
        sub.say(hello);
        let subscribed = sub.say("SUBSCRIBE news");
        assert_eq!(subscribed.items()[0], Value::bulk("subscribe"));
        wait_for("the subscription", || publisher.say("PUBLISH news hello").int() == 1);
        assert_eq!(sub.reply().items()[2], Value::bulk("hello"));
        assert!(matches!(sub.say("SHUTDOWN"), Value::Error(_)));
    }
}

#[test]
fn a_lost_store_is_an_error_at_once_and_comes_back_by_itself() {
    let redis = Redis::start();
    let ours = Ours::start(single(&redis));
    let mut c = ours.client();
    wait_for("the store", || c.say("SET a 1") == Value::ok());
    // In flight when it dies: the outcome of a write is unknown and that is said.
    let mut frozen = ours.client();
    let mut direct = redis.client();
    direct.send(&encode(&["DEBUG", "SLEEP", "3"]));
    std::thread::park_timeout(Duration::from_millis(100));
    frozen.send(&[encode(&["INCR", "a"]), encode(&["GET", "a"])].concat());
    std::thread::park_timeout(Duration::from_millis(100));
    let mut transaction = ours.client();
    let port = redis.kill();
    assert!(
        matches!(frozen.reply(), Value::Error(e) if e.starts_with("UNAVAILABLE") && e.contains("whether this command took effect is unknown"))
    );
    assert!(
        matches!(frozen.reply(), Value::Error(e) if e.starts_with("UNAVAILABLE") && e.contains("nothing was changed"))
    );
    let start = Instant::now();
    for _ in 0..50 {
        assert!(
            matches!(c.say("SET a 2"), Value::Error(e) if e.starts_with("UNAVAILABLE") && e.contains("was not sent"))
        );
    }
    assert!(matches!(transaction.say("MULTI"), Value::Error(e) if e.starts_with("UNAVAILABLE")));
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "errors took {:?}",
        start.elapsed()
    );
    assert_eq!(c.say("SELECT 0"), Value::ok(), "what needs no store goes on");
    let redis = Redis::start_on(port);
    wait_for("the store to come back", || c.say("SET a 3") == Value::ok());
    assert_eq!(redis.client().say("GET a"), Value::bulk("3"));
}

#[test]
fn a_store_that_does_not_answer_is_given_up_in_time() {
    let redis = Redis::start();
    let mut config = single(&redis);
    config.single.reply_timeout_ms = 400;
    let ours = Ours::start(config);
    let mut c = ours.client();
    wait_for("the store", || c.say("SET a 1") == Value::ok());
    let mut direct = redis.client();
    direct.send(&encode(&["DEBUG", "SLEEP", "2"]));
    std::thread::park_timeout(Duration::from_millis(50));
    let start = Instant::now();
    assert!(matches!(c.say("GET a"), Value::Error(e) if e.starts_with("UNAVAILABLE")));
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    wait_for("the store to answer again", || c.say("GET a") == Value::bulk("1"));
}

#[test]
fn a_client_whose_transaction_was_lost_must_begin_anew() {
    let redis = Redis::start();
    let ours = Ours::start(single(&redis));
    let mut c = ours.client();
    wait_for("the store", || c.say("SET a 1") == Value::ok());
    c.say("WATCH a");
    c.say("MULTI");
    c.say("SET a 2");
    redis.kill();
    assert!(matches!(c.say("EXEC"), Value::Error(e) if e.starts_with("UNAVAILABLE")));
    assert_eq!(c.try_reply(), None, "a lost WATCH must not be forgotten silently");
}
