//! Any one server that speaks like Redis: what it can do is found out, and what it can't is refused in its own words.

use gse_dba::config::Backend;

use crate::rig::{Ours, PASSWORD, Raw, Redis, Value, single, wait_for};

#[test]
fn an_old_server_is_known_as_one_and_resp3_is_refused_in_the_standard_way() {
    // As Redis 5 is: no HELLO; and without WAIT, as some that only speak like Redis.
    let redis = Redis::start_with(&["--rename-command", "HELLO", "", "--rename-command", "WAIT", ""]);
    let ours = Ours::start(single(&redis));
    let mut c = ours.client();
    assert_eq!(c.say("SET a 1"), Value::ok());
    let refused = c.call(&["HELLO", "3", "AUTH", "default", PASSWORD]);
    assert!(
        matches!(&refused, Value::Error(e) if e.starts_with("NOPROTO")),
        "{refused:?}"
    );
    assert_eq!(c.say("GET a"), Value::bulk("1"), "the connection goes on");
    assert!(matches!(c.call(&["HELLO", "2"]), Value::Array(_)));
    let missing = c.say("WAIT 0 1");
    assert!(
        matches!(&missing, Value::Error(e) if e.starts_with("ERR unknown command")),
        "{missing:?}"
    );
    let told = c.say("INFO endpoint").text();
    assert!(
        told.contains("endpoint_engine:redis 7")
            && told.contains("endpoint_resp3:no")
            && told.contains("endpoint_wait:no"),
        "{told}"
    );
    let status = c.say("DBA STATUS").text();
    assert!(
        status.contains("\"resp3\":false") && status.contains("\"scripts\":true"),
        "{status}"
    );
}

#[test]
fn a_server_that_comes_later_or_changes_is_asked_again() {
    let redis = Redis::start();
    let config = single(&redis);
    let port = redis.kill();
    let ours = Ours::start(config);
    let mut c = ours.client();
    assert!(!c.say("INFO endpoint").text().contains("endpoint_engine"));
    let redis = Redis::start_on(port);
    wait_for("the capabilities", || {
        c.say("INFO endpoint").text().contains("endpoint_resp3:yes")
    });
    let mut three = Raw::connect(ours.addr);
    assert!(matches!(
        three.call(&["HELLO", "3", "AUTH", "default", PASSWORD]),
        Value::Map(_)
    ));
    drop(redis);
}

#[test]
fn a_node_of_a_cluster_is_not_taken_for_a_whole_store() {
    let redis = crate::site::cluster_server();
    let mut config = single(&redis);
    assert_eq!(config.backend, Backend::Single);
    let error = Ours::try_start(config.clone())
        .err()
        .map(|e| format!("{e:#}"))
        .unwrap_or_default();
    assert!(error.contains("backend = \"cluster\""), "{error:?}");
    // Found out later, it is said to every client.
    config.single.connect_timeout_ms = 300;
    let port = redis.kill();
    let ours = Ours::start(config);
    let node = Redis::start_cluster_on(port);
    let mut c = ours.client();
    wait_for("the refusal", || {
        let said = c.say("SET a 1");
        matches!(&said, Value::Error(e) if e.starts_with("UNAVAILABLE") && e.contains("cluster.seeds"))
    });
    drop(node);
}
