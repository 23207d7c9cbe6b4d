//! Against real servers: one Redis that is killed, stopped and started again, and a cluster of three.

mod cluster;
mod server;

use std::time::{Duration, Instant};

use redis::Cmd;
use tokio::time::sleep;

use super::*;
use server::Server;

fn config(url: String) -> StoreConfig {
    StoreConfig {
        url,
        connect_timeout_ms: 500,
        command_timeout_ms: 600,
        ..StoreConfig::default()
    }
}

fn cmd(words: &[&str]) -> Cmd {
    let mut cmd = redis::cmd(words[0]);
    for word in &words[1..] {
        cmd.arg(*word);
    }
    cmd
}

fn batch(commands: &[&[&str]]) -> Batch {
    let mut batch = Batch::new();
    for words in commands {
        batch.push(words.get(1).copied().unwrap_or_default(), cmd(words));
    }
    batch
}

/// Tries until it works; the store client itself never tries again.
async fn eventually(store: &Store, within: Duration) {
    let end = Instant::now() + within;
    loop {
        match store.ping().await {
            Ok(()) => return,
            Err(error) => assert!(Instant::now() < end, "not there again within {within:?}: {error}"),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn replies_come_in_push_order_over_tcp_and_a_unix_socket() {
    let server = Server::start(&[]).await;
    for url in [server.url(), server.unix_url()] {
        let store = Store::connect(&config(url)).await.unwrap();
        store.ping().await.unwrap();
        let replies = store
            .run(batch(&[
                &["SET", "a", "1"],
                &["INCRBY", "a", "41"],
                &["GET", "a"],
                &["GET", "none"],
                &["HSET", "h", "f", "v"],
                &["HGETALL", "h"],
            ]))
            .await
            .unwrap();
        let mut replies = replies.into_iter();
        let mut next = || replies.next().unwrap();
        assert_eq!(as_string(next()).unwrap().unwrap(), "OK");
        assert_eq!(as_int(next()).unwrap(), 42);
        assert_eq!(as_int(next()).unwrap(), 42);
        assert_eq!(as_bytes(next()).unwrap(), None);
        next();
        assert_eq!(as_pairs(next()).unwrap(), [("f".into(), "v".into())]);
        assert!(store.run(Batch::new()).await.unwrap().is_empty());
        store.run(batch(&[&["FLUSHALL"]])).await.unwrap();
    }
}

#[tokio::test]
async fn a_large_batch_goes_out_in_pieces_and_stays_in_order() {
    let server = Server::start(&[]).await;
    let mut cfg = config(server.url());
    cfg.command_timeout_ms = 30_000;
    let store = Store::connect(&cfg).await.unwrap();
    let mut large = Batch::new();
    let filler = "x".repeat(2000);
    for index in 0..5000 {
        large.push(
            "list",
            redis::cmd("RPUSH").arg("list").arg(format!("{index}{filler}")).clone(),
        );
    }
    let replies = store.run(large).await.unwrap();
    let lengths: Vec<i64> = replies.into_iter().map(|reply| as_int(reply).unwrap()).collect();
    assert_eq!(lengths, (1..=5000).collect::<Vec<i64>>());
    let last = store.run(batch(&[&["LINDEX", "list", "-1"]])).await.unwrap().remove(0);
    assert_eq!(as_string(last).unwrap().unwrap(), format!("4999{filler}"));
}

#[tokio::test]
async fn a_refused_command_is_named_and_the_others_are_executed() {
    let server = Server::start(&[]).await;
    let store = Store::connect(&config(server.url())).await.unwrap();
    let error = store
        .run(batch(&[
            &["SET", "a", "text"],
            &["INCR", "a"],
            &["SET", "b", "1"],
            &["NONSENSE"],
        ]))
        .await
        .unwrap_err();
    match &error {
        StoreError::Reply { index: 1, message } => {
            assert!(message.starts_with("ERR value is not an integer"), "{message}")
        }
        other => panic!("{other:?}"),
    }
    assert!(!error.is_retryable());
    assert_eq!(
        as_int(store.run(batch(&[&["GET", "b"]])).await.unwrap().remove(0)).unwrap(),
        1
    );
}

#[tokio::test]
async fn a_killed_server_is_unavailable_and_heals_without_help() {
    let mut server = Server::start(&[]).await;
    let store = Store::connect(&config(server.url())).await.unwrap();
    store.ping().await.unwrap();
    server.kill();

    let mut kinds = Vec::new();
    for _ in 0..5 {
        let asked = Instant::now();
        let error = store.run(batch(&[&["GET", "a"]])).await.unwrap_err();
        assert!(asked.elapsed() < Duration::from_millis(900), "{:?}", asked.elapsed());
        assert!(error.is_retryable());
        kinds.push(error.kind());
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(kinds, ["unavailable"; 5]);
    // Known to be gone: refused at once.
    let asked = Instant::now();
    store.run(batch(&[&["GET", "a"]])).await.unwrap_err();
    assert!(asked.elapsed() < Duration::from_millis(50), "{:?}", asked.elapsed());

    server.restart().await;
    eventually(&store, Duration::from_secs(5)).await;
    store.run(batch(&[&["SET", "a", "1"]])).await.unwrap();
}

#[tokio::test]
async fn an_idle_connection_that_was_lost_is_made_again_before_it_is_needed() {
    let mut server = Server::start(&[]).await;
    let store = Store::connect(&config(server.url())).await.unwrap();
    store.ping().await.unwrap();
    server.kill();
    server.restart().await;
    sleep(Duration::from_millis(2500)).await;
    store.run(batch(&[&["SET", "a", "1"]])).await.unwrap();
}

#[tokio::test]
async fn a_store_that_is_not_there_at_the_start_is_waited_for() {
    let mut server = Server::start(&[]).await;
    server.kill();
    let store = Store::connect(&config(server.url())).await.unwrap();
    let error = store.run(batch(&[&["GET", "a"]])).await.unwrap_err();
    assert_eq!(error.kind(), "unavailable");
    assert!(error.to_string().contains("Connection refused"), "{error}");
    server.restart().await;
    eventually(&store, Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_server_that_hangs_is_a_timeout_then_unavailable_and_heals() {
    let server = Server::start(&[]).await;
    let store = Store::connect(&config(server.url())).await.unwrap();
    store.run(batch(&[&["SET", "a", "1"]])).await.unwrap();
    server.stop();
    let asked = Instant::now();
    let error = store.run(batch(&[&["GET", "a"]])).await.unwrap_err();
    assert_eq!(error.kind(), "timeout", "{error}");
    assert!(
        asked.elapsed() >= Duration::from_millis(590) && asked.elapsed() < Duration::from_millis(900),
        "{:?}",
        asked.elapsed()
    );
    // The probe that follows finds it gone, and so does every new connection.
    sleep(Duration::from_millis(1500)).await;
    let asked = Instant::now();
    let error = store.run(batch(&[&["GET", "a"]])).await.unwrap_err();
    assert_eq!(error.kind(), "unavailable", "{error}");
    assert!(asked.elapsed() < Duration::from_millis(100), "{:?}", asked.elapsed());
    server.go_on();
    eventually(&store, Duration::from_secs(5)).await;
    assert_eq!(
        as_int(store.run(batch(&[&["GET", "a"]])).await.unwrap().remove(0)).unwrap(),
        1
    );
}

#[tokio::test]
async fn no_more_batches_than_allowed_are_on_their_way_and_waiting_counts() {
    let server = Server::start(&[]).await;
    let mut cfg = config(server.url());
    cfg.max_inflight_batches = 1;
    let store = Store::connect(&cfg).await.unwrap();
    store.ping().await.unwrap();
    server.stop();
    let asked = Instant::now();
    let (first, second) = tokio::join!(store.run(batch(&[&["GET", "a"]])), store.run(batch(&[&["GET", "b"]])));
    assert_eq!(first.unwrap_err().kind(), "timeout");
    let error = second.unwrap_err();
    assert!(
        error.kind() == "timeout" && error.to_string().contains("max_inflight_batches"),
        "{error}"
    );
    assert!(asked.elapsed() < Duration::from_millis(900), "{:?}", asked.elapsed());
    server.go_on();
}

#[tokio::test]
async fn the_password_comes_from_the_url_or_a_file_and_a_wrong_one_is_said() {
    let server = Server::start(&["--requirepass", "hun ter2"]).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");

    let wrong = Store::connect(&config(server.url())).await.unwrap();
    sleep(Duration::from_millis(200)).await;
    let error = wrong.ping().await.unwrap_err();
    assert!(
        error.to_string().contains("NOAUTH") || error.to_string().contains("Authentication"),
        "{error}"
    );

    std::fs::write(&file, "wrong\n").unwrap();
    let mut cfg = config(server.url());
    cfg.password_file = Some(file.clone());
    let healing = Store::connect(&cfg).await.unwrap();
    let error = healing.ping().await.unwrap_err();
    assert!(
        error.is_retryable() && !error.to_string().contains("wrong\n"),
        "{error}"
    );
    // The file is read at every attempt.
    std::fs::write(&file, "hun ter2\n").unwrap();
    eventually(&healing, Duration::from_secs(5)).await;

    let store = Store::connect(&config(server.url().replace("redis://", "redis://:hun%20ter2@")))
        .await
        .unwrap();
    store.ping().await.unwrap();
    assert!(!format!("{store:?}").contains("ter2"));
}

#[tokio::test]
async fn tls_trusts_the_named_authority_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let key = rcgen::KeyPair::generate().unwrap();
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let cert = rcgen::CertificateParams::new(names.clone())
        .unwrap()
        .self_signed(&key)
        .unwrap();
    std::fs::write(path("cert"), cert.pem()).unwrap();
    std::fs::write(path("key"), key.serialize_pem()).unwrap();
    let other = rcgen::CertificateParams::new(names)
        .unwrap()
        .self_signed(&rcgen::KeyPair::generate().unwrap())
        .unwrap();
    std::fs::write(path("other"), other.pem()).unwrap();

    let port = server::free_port().to_string();
    let (cert, key) = (path("cert").display().to_string(), path("key").display().to_string());
    let tls = [
        "--tls-port",
        &port,
        "--tls-cert-file",
        &cert,
        "--tls-key-file",
        &key,
        "--tls-auth-clients",
        "no",
        "--tls-ca-cert-file",
        &cert,
    ];
    let _server = Server::start(&tls).await;
    let url = format!("rediss://127.0.0.1:{port}");

    let trusting = Store::connect(&StoreConfig {
        tls_ca: Some(path("cert")),
        ..config(url.clone())
    })
    .await
    .unwrap();
    trusting.run(batch(&[&["SET", "a", "1"]])).await.unwrap();
    for tls_ca in [Some(path("other")), None] {
        let store = Store::connect(&StoreConfig {
            tls_ca,
            ..config(url.clone())
        })
        .await
        .unwrap();
        let error = store.ping().await.unwrap_err();
        assert!(error.to_string().contains("certificate"), "{error}");
    }
}

#[tokio::test]
async fn a_malformed_configuration_is_refused_and_its_password_not_shown() {
    let dir = tempfile::tempdir().unwrap();
    let present = dir.path().join("present");
    std::fs::write(&present, "x").unwrap();
    let with = |url: &str| config(url.to_owned());
    let absent = Some(dir.path().join("absent"));
    for (cfg, wanted) in [
        (with("127.0.0.1:6379"), "no scheme"),
        (with("http://127.0.0.1"), "unknown scheme"),
        (with("redis://:hunter2@host:notaport"), "malformed"),
        (with("redis+cluster://"), "names no node"),
        (with("redis+cluster://:hunter2@a:1,b:2/1"), "names a database"),
        (
            StoreConfig {
                password_file: absent.clone(),
                ..with("redis://host")
            },
            "cannot read password_file",
        ),
        (
            StoreConfig {
                password_file: Some(present.clone()),
                ..with("redis://:hunter2@host")
            },
            "use one of them",
        ),
        (
            StoreConfig {
                tls_ca: absent,
                ..with("rediss://host")
            },
            "cannot read tls_ca",
        ),
        (
            StoreConfig {
                tls_ca: Some(present.clone()),
                ..with("redis://host")
            },
            "does not use TLS",
        ),
    ] {
        let error = Store::connect(&cfg).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), "config");
        let text = error.to_string();
        assert!(
            text.contains(wanted) && !text.contains("hunter2"),
            "{text} should contain {wanted}"
        );
    }
    let mut problems = crate::config::Problems::default();
    StoreConfig {
        command_timeout_ms: 0,
        ..with("nowhere")
    }
    .validate("store", &mut problems);
    let keys: Vec<String> = problems.into_inner().into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["store.command_timeout_ms", "store.url"]);
}

#[tokio::test]
async fn figures_and_readiness_follow_the_store() {
    let mut server = Server::start(&[]).await;
    let store = Store::connect(&config(server.url())).await.unwrap();
    let mut registry = prometheus_client::registry::Registry::default();
    store.metrics().register(&mut registry);
    let (health, life) = (Health::new(), Lifecycle::new("test"));
    store.report(&health, &life);
    store.run(batch(&[&["SET", "a", "1"], &["GET", "a"]])).await.unwrap();
    store.run(batch(&[&["NONSENSE"]])).await.unwrap_err();
    assert!(health.reasons().is_empty(), "{:?}", health.reasons());

    let text = || {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    };
    let figures = text();
    for line in [
        "store_batches_total 2",
        "store_commands_total 3",
        "store_errors_total{kind=\"reply\"} 1",
        "store_inflight_batches 0",
        "store_up 1",
    ] {
        assert!(figures.lines().any(|found| found == line), "no {line:?} in\n{figures}");
    }
    server.kill();
    store.run(batch(&[&["GET", "a"]])).await.unwrap_err();
    sleep(Duration::from_millis(300)).await;
    assert!(health.reasons()["store"].contains("refused"), "{:?}", health.reasons());
    assert!(text().lines().any(|line| line == "store_up 0"));
    server.restart().await;
    eventually(&store, Duration::from_secs(5)).await;
    sleep(Duration::from_millis(100)).await;
    assert!(health.reasons().is_empty());
    life.drain();
    assert!(life.finished(Duration::from_secs(5)).await);
}
