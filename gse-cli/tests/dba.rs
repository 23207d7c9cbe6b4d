//! `gse dba` beside a real `gse up`, and in front of real Redis servers.

#![allow(clippy::unwrap_used)]
// Shared with tests that use more of it.
#![allow(dead_code)]

mod common;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Done, Up, eventually, finish, gse};
use gse_core::lifecycle::Lifecycle;
use gse_dba::config::sharded::Group;
use gse_dba::config::{Backend, Config};
use serde_json::Value;

const PASSWORD: &str = "a test's password";

fn json(done: &Done) -> Value {
    serde_json::from_str(&done.out).unwrap_or_else(|e| panic!("{e}: {done:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_of_gse_up_is_found_and_shown() {
    let temp = tempfile::tempdir().unwrap();
    let up = Up::start(&temp.path().join("data")).await;
    let status = up.gse(&["dba", "status"]).await;
    assert_eq!(status.code, Some(0), "{status:?}");
    for part in [
        "mode         embedded",
        "durability   an acknowledged write is with",
        "health       ok",
        "gse_dba 0.",
    ] {
        assert!(status.out.contains(part), "{part} is not in {}", status.out);
    }
    let told = json(&up.gse(&["dba", "status", "--json"]).await);
    assert_eq!(
        (&told["mode"], &told["health"]["ok"]),
        (&"embedded".into(), &true.into())
    );
    let clients = up.gse(&["dba", "clients"]).await;
    assert!(
        clients.code == Some(0) && clients.out.contains("ADDRESS"),
        "{clients:?}"
    );
    for what in ["slowlog", "hotkeys"] {
        let shown = up.gse(&["dba", what]).await;
        assert!(shown.code == Some(0) && !shown.out.is_empty(), "{shown:?}");
    }
    // What is refused, what is no usage, and nobody there are told apart.
    let refused = up.gse(&["dba", "slots"]).await;
    assert_eq!((refused.code, refused.err.lines().count()), (Some(1), 1), "{refused:?}");
    let moved = up.gse(&["dba", "move", "0-5", "g1", "--yes"]).await;
    assert_eq!(moved.code, Some(1), "{moved:?}");
    for wrong in [
        &["dba", "move", "0-99999", "g1", "--yes"][..],
        &["dba", "add", "g1"],
        &["dba", "migrate"],
        &["dba"],
        &["dba", "status", "--url", "nonsense"],
    ] {
        let done = up.gse(wrong).await;
        assert_eq!(done.code, Some(2), "{wrong:?}: {done:?}");
    }
    let mut stranger = gse(&up.data);
    let url = std::fs::read_to_string(up.data.join("store/gse_dba.url")).unwrap();
    stranger
        .env("GSE_DBA_PASSWORD", "wrong")
        .args(["dba", "status", "--url", url.trim()]);
    let stranger = finish(&mut stranger).await;
    assert_eq!(stranger.code, Some(1), "{stranger:?}");
    assert!(stranger.err.contains("--password-file"), "{stranger:?}");
    up.stop().await;
    let gone = finish(gse(&temp.path().join("data")).args(["dba", "status"])).await;
    assert_eq!((gone.code, gone.err.lines().count()), (Some(3), 1), "{gone:?}");
    let never = finish(gse(&temp.path().join("none")).args(["dba", "status"])).await;
    assert_eq!(never.code, Some(3), "{never:?}");
    assert!(never.err.contains("gse up") && never.err.contains("--url"), "{never:?}");
}

struct Redis {
    addr: SocketAddr,
    child: Child,
    _dir: tempfile::TempDir,
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn redis() -> Redis {
    let dir = tempfile::tempdir().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let port_text = port.to_string();
    let child = Command::new("redis-server")
        .args([
            "--port",
            &port_text,
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "yes",
        ])
        .args([
            "--appendfsync",
            "always",
            "--repl-diskless-sync-delay",
            "0",
            "--min-replicas-to-write",
            "1",
        ])
        .arg("--dir")
        .arg(dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("redis-server is not installed: apt-get install redis-server");
    Redis {
        addr: SocketAddr::from(([127, 0, 0, 1], port)),
        child,
        _dir: dir,
    }
}

/// A gse_dba in front of groups of two servers each.
struct Front {
    addr: String,
    life: Lifecycle,
    servers: Vec<Redis>,
}

/// Groups of a primary and its copy.
async fn pairs(groups: usize) -> Vec<Redis> {
    let servers: Vec<Redis> = (0..groups * 2).map(|_| redis()).collect();
    for s in &servers {
        eventually("redis-server", || async { TcpStream::connect(s.addr).ok() }).await;
    }
    for pair in servers.chunks(2) {
        let mut copy = redis_connection(pair[1].addr).await;
        let (host, port) = (pair[0].addr.ip().to_string(), pair[0].addr.port());
        let _: () = redis::cmd("REPLICAOF")
            .arg(host)
            .arg(port)
            .query_async(&mut copy)
            .await
            .unwrap();
        eventually("the copy", || async {
            let mut c = redis_connection(pair[0].addr).await;
            let text: String = redis::cmd("INFO").arg("replication").query_async(&mut c).await.unwrap();
            text.contains("state=online").then_some(())
        })
        .await;
    }
    servers
}

impl Front {
    async fn start(groups: usize) -> Self {
        let servers = pairs(groups).await;
        let mut config = Config {
            listen: "127.0.0.1:0".into(),
            password: Some(PASSWORD.into()),
            backend: Backend::Sharded,
            ..Config::default()
        };
        config.sharded.one_host = true;
        config.sharded.copies = 2;
        config.sharded.acknowledged = 2;
        config.sharded.poll_ms = 100;
        config.sharded.groups = servers
            .chunks(2)
            .enumerate()
            .map(|(i, pair)| Group {
                name: format!("g{i}"),
                servers: pair.iter().map(|s| s.addr.to_string()).collect(),
                ..Group::default()
            })
            .collect();
        let life = Lifecycle::new("gse_dba");
        let mut running = tokio::spawn(gse_dba::run(config, life.clone()));
        let addresses = tokio::select! {
            addresses = life.wait_ready() => addresses,
            ended = &mut running => panic!("it did not start: {ended:?}"),
        };
        Self {
            addr: addresses["resp"].clone(),
            life,
            servers,
        }
    }

    async fn gse(&self, args: &[&str]) -> Done {
        let mut command = gse(Path::new("/nowhere"));
        command
            .env("GSE_DBA_URL", format!("redis://{}", self.addr))
            .env("GSE_DBA_PASSWORD", PASSWORD)
            .arg("dba")
            .args(args);
        finish(&mut command).await
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.life.abort();
    }
}

async fn redis_connection(addr: SocketAddr) -> redis::aio::MultiplexedConnection {
    let client = redis::Client::open(format!("redis://{addr}")).unwrap();
    client.get_multiplexed_async_connection().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_are_shown_and_a_primary_is_handed_over() {
    let mut front = Front::start(2).await;
    let status = front.gse(&["status"]).await;
    assert_eq!(status.code, Some(0), "{status:?}");
    for part in [
        "sharded, 2 groups, a write is on 2 of 2",
        "2 of 2: an acknowledged write",
        "1 of 1, needs 1",
    ] {
        assert!(status.out.contains(part), "{part} is not in {}", status.out);
    }
    let slots = front.gse(&["slots"]).await;
    assert!(slots.out.contains("8192-16383"), "{slots:?}");
    let key = front.gse(&["slots", "--key", "foo"]).await;
    assert!(key.out.starts_with("slot 12182 of group g1, primary "), "{key:?}");
    // Nothing is changed without a yes.
    let unsaid = front.gse(&["failover", "g1"]).await;
    assert_eq!(unsaid.code, Some(2), "{unsaid:?}");
    assert!(
        unsaid.err.contains("Hand group g1 over") && unsaid.err.contains("--yes"),
        "{unsaid:?}"
    );
    let nowhere = front.gse(&["failover", "g9", "--yes"]).await;
    assert_eq!(nowhere.code, Some(1), "{nowhere:?}");
    assert!(nowhere.err.contains("there are g0, g1"), "{nowhere:?}");
    // There is nothing to put up with.
    let whole = front.gse(&["accept", "g1", "--yes"]).await;
    assert_eq!(whole.code, Some(1), "{whole:?}");
    let (was, next) = (front.servers[2].addr.to_string(), front.servers[3].addr.to_string());
    let done = front.gse(&["failover", "g1", "--to", &next, "--yes"]).await;
    assert_eq!(done.code, Some(0), "{done:?}");
    let said = format!("group g1: {next} is the primary, in place of {was}");
    assert!(done.out.starts_with(&said), "{done:?}");
    let told = json(&front.gse(&["status", "--json"]).await);
    assert_eq!(told["groups"][1]["primary"], next, "{told}");
    eventually("the old primary to follow", || async {
        let told = json(&front.gse(&["status", "--json"]).await);
        (told["groups"][1]["followers"][0]["address"] == was.as_str()).then_some(())
    })
    .await;
    // A copy is lost: it is said, and shows in the exit status.
    drop(front.servers.remove(2));
    let bad = eventually("the loss to be told", || async {
        let status = front.gse(&["status"]).await;
        (status.code == Some(1)).then_some(status)
    })
    .await;
    assert!(
        bad.out.contains("NOT WELL") && bad.out.contains("g1: has 0 of the 1 other copies"),
        "{bad:?}"
    );
    let gone = {
        front.life.abort();
        tokio::time::sleep(Duration::from_millis(100)).await;
        finish(gse(Path::new("/nowhere")).args(["dba", "status", "--url", "redis://127.0.0.1:1"])).await
    };
    assert_eq!(gone.code, Some(3), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_move_to_groups_that_come_and_go() {
    let front = Front::start(2).await;
    let url = format!(
        "redis://:{}@{}/",
        PASSWORD.replace(' ', "%20").replace('\'', "%27"),
        front.addr
    );
    let client = redis::Client::open(url).unwrap();
    let mut c = client.get_multiplexed_async_connection().await.unwrap();
    for i in 0..300 {
        let _: () = redis::cmd("SET")
            .arg(format!("key{i}"))
            .arg(i)
            .query_async(&mut c)
            .await
            .unwrap();
    }
    let idle = front.gse(&["moves"]).await;
    assert_eq!(
        (idle.code, idle.out.as_str()),
        (Some(0), "nothing is being moved\n"),
        "{idle:?}"
    );
    let moved = front.gse(&["move", "0-4095", "g1", "--yes"]).await;
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert!(
        moved
            .err
            .contains("Move 4096 slots (0-4095) to group g1:\n  4096 from g0"),
        "{moved:?}"
    );
    let slots = json(&front.gse(&["slots", "-o", "json"]).await);
    assert_eq!(
        slots["groups"][0]["ranges"],
        serde_json::json!(["4096-8191"]),
        "{slots}"
    );
    // A group is added, gets its share, and is drained again.
    let more = pairs(1).await;
    let servers = format!("{},{}", more[0].addr, more[1].addr);
    let added = front
        .gse(&["add", "g2", "--servers", &servers, "--share", "--yes"])
        .await;
    assert_eq!(added.code, Some(0), "{added:?}");
    let status = json(&front.gse(&["status", "--json"]).await);
    let n = status["groups"][2]["slots"].as_u64().unwrap();
    assert!((5000..6000).contains(&n), "{status}");
    let mut there = redis_connection(more[0].addr).await;
    let size: usize = redis::cmd("DBSIZE").query_async(&mut there).await.unwrap();
    assert!(size > 50, "{size} keys have come to the new group");
    let twice = front.gse(&["add", "g2", "--servers", &servers, "--yes"]).await;
    assert_eq!(twice.code, Some(1), "{twice:?}");
    let drained = front.gse(&["drain", "g2", "--yes"]).await;
    assert_eq!(drained.code, Some(0), "{drained:?}");
    let status = json(&front.gse(&["status", "--json"]).await);
    let left = status["groups"].as_array().unwrap().iter().find(|g| g["name"] == "g2");
    assert!(left.is_none_or(|g| g["slots"] == 0), "{status}");
    for i in 0..300 {
        let got: Option<u32> = redis::cmd("GET")
            .arg(format!("key{i}"))
            .query_async(&mut c)
            .await
            .unwrap();
        assert_eq!(got, Some(i));
    }
    let nothing = front.gse(&["abort", "--yes"]).await;
    assert_eq!(nothing.code, Some(1), "{nothing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_of_gse_up_moves_to_a_redis_and_back() {
    let temp = tempfile::tempdir().unwrap();
    let up = Up::start(&temp.path().join("data")).await;
    let to = redis();
    eventually("redis-server", || async { TcpStream::connect(to.addr).ok() }).await;
    let mut c = redis_connection(to.addr).await;
    let _: () = redis::cmd("CONFIG")
        .arg(&["SET", "min-replicas-to-write", "0"])
        .query_async(&mut c)
        .await
        .unwrap();
    // Anybody else's connection to it would be in the way.
    drop(c);
    let url = format!("redis://{}", to.addr);
    let moved = up.gse(&["dba", "migrate", "--to", &url, "--yes"]).await;
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert!(moved.err.contains("Copy everything to redis://"), "{moved:?}");
    assert!(moved.out.contains("migration    switched"), "{moved:?}");
    let status = json(&up.gse(&["dba", "status", "--json"]).await);
    assert_eq!(status["mode"], "single", "{status}");
    let mut c = redis_connection(to.addr).await;
    let size: usize = redis::cmd("DBSIZE").query_async(&mut c).await.unwrap();
    assert!(size > 0);
    drop(c);
    // All services go on.
    assert_eq!(up.gse(&["agents"]).await.code, Some(0));
    let back = up.gse(&["dba", "migrate", "--back", "--yes"]).await;
    assert_eq!(back.code, Some(0), "{back:?}");
    let shown = up.gse(&["dba", "migrate", "--status"]).await;
    assert!(shown.code == Some(0) && shown.out.contains("embedded"), "{shown:?}");
    let nowhere = up
        .gse(&["dba", "migrate", "--to", "redis://127.0.0.1:1", "--yes"])
        .await;
    assert_eq!(nowhere.code, Some(1), "{nowhere:?}");
    assert!(up.stop().await.success());
}
