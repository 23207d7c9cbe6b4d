//! The three paths over a real socket, with everything that can be wrong with who asks.

use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

struct Running {
    life: Lifecycle,
    health: Health,
    address: String,
}

async fn start() -> Running {
    let life = Lifecycle::new("test");
    let health = Health::new();
    let counter: Counter = Counter::default();
    counter.inc_by(3);
    let mut registry = Registry::default();
    registry.register("things", "Things seen", counter);
    let cfg = OpsConfig {
        listen: "127.0.0.1:0".to_owned(),
    };
    serve(&cfg, Arc::new(registry), health.clone(), &life).await.unwrap();
    life.ready();
    let address = life.wait_ready().await["ops"].clone();
    Running { life, health, address }
}

impl Running {
    async fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        stream
            .write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let mut text = String::new();
        tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut text))
            .await
            .unwrap()
            .unwrap();
        let status = text.split(' ').nth(1).unwrap().parse().unwrap();
        (status, text)
    }
}

#[tokio::test]
async fn health_readiness_and_metrics() {
    let ops = start().await;
    assert_eq!(ops.get("/healthz").await.0, 200);
    assert_eq!(ops.get("/readyz").await.0, 200);
    let (status, text) = ops.get("/metrics").await;
    assert_eq!(status, 200);
    assert!(
        text.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"),
        "{text}"
    );
    assert!(text.contains("things_total 3\n"), "{text}");
    assert!(text.trim_end().ends_with("# EOF"), "{text}");
    assert_eq!(ops.get("/nothing").await.0, 404);

    ops.health.set("store", Err("no connection to redis://x".to_owned()));
    ops.health.set("sessions", Ok(()));
    let (status, text) = ops.get("/readyz").await;
    assert_eq!(status, 503);
    let body: serde_json::Value = serde_json::from_str(text.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(
        body,
        serde_json::json!({"ready": false, "reasons": {"store": "no connection to redis://x"}})
    );
    assert_eq!(ops.get("/healthz").await.0, 200);
    ops.health.set("store", Ok(()));
    assert_eq!(ops.get("/readyz").await.0, 200);
}

#[tokio::test]
async fn a_server_that_starts_or_drains_is_alive_but_not_ready() {
    let life = Lifecycle::new("test");
    let cfg = OpsConfig {
        listen: "127.0.0.1:0".to_owned(),
    };
    serve(&cfg, Arc::new(Registry::default()), Health::new(), &life)
        .await
        .unwrap();
    let announced = {
        let probe = life.clone();
        probe.ready();
        probe.wait_ready().await["ops"].clone()
    };
    let ops = Running {
        life: life.clone(),
        health: Health::new(),
        address: announced,
    };

    let (go_on, wait) = tokio::sync::oneshot::channel::<()>();
    life.spawn("work", async move { wait.await.unwrap() });
    life.drain();
    let (status, text) = ops.get("/readyz").await;
    assert_eq!(status, 503);
    assert!(text.contains("draining"), "{text}");
    assert_eq!(ops.get("/healthz").await.0, 200);

    go_on.send(()).unwrap();
    assert!(ops.life.finished(Duration::from_secs(10)).await);
    assert!(
        TcpStream::connect(&ops.address).await.is_err(),
        "still listening after the end"
    );
}

#[tokio::test]
async fn no_address_means_no_listener_and_a_taken_one_is_named() {
    let life = Lifecycle::new("test");
    serve(
        &OpsConfig::default(),
        Arc::new(Registry::default()),
        Health::new(),
        &life,
    )
    .await
    .unwrap();
    assert!(life.running().is_empty());

    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let cfg = OpsConfig {
        listen: taken.local_addr().unwrap().to_string(),
    };
    let error = serve(&cfg, Arc::new(Registry::default()), Health::new(), &life)
        .await
        .unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains(&cfg.listen) && text.contains("ops.listen"), "{text}");
}

#[tokio::test]
async fn those_who_say_nothing_are_closed_and_only_so_many_are_let_in() {
    let ops = start().await;
    let mut idle = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        idle.push(TcpStream::connect(&ops.address).await.unwrap());
    }
    // All places are taken: this one is answered only when the silent ones have been closed.
    let asked = std::time::Instant::now();
    assert_eq!(ops.get("/healthz").await.0, 200);
    let waited = asked.elapsed();
    assert!(waited > STEP_TIMEOUT / 2 && waited < STEP_TIMEOUT * 2, "{waited:?}");
    let mut byte = [0];
    assert_eq!(idle[0].read(&mut byte).await.unwrap_or(0), 0);
}
