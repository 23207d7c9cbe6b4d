//! A front door over a real Redis, and what its tests call it with.
#![allow(dead_code, unreachable_pub)]

pub mod upstream;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use gse_api::Config;
use gse_core::authz::AppEntry;
use gse_core::http::{ClientConfig, HttpClient};
use gse_core::lifecycle::Lifecycle;
use gse_core::store::{Batch, Store, StoreConfig};
use gse_proto::keys::{agent_alias, agent_info, agent_load, agent_seen, agent_shard, node_lease};
use gse_proto::state::{AgentLoad, AgentRecord};
use http::{HeaderMap, HeaderValue};
use prost::Message;
use serde_json::Value;

pub const SECRET: &str = "open sesame";
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A Redis of its own on a Unix socket; ends with the test.
pub struct Redis {
    child: Child,
    dir: tempfile::TempDir,
}

impl Redis {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
            .arg(dir.path().join("redis.sock"))
            .arg("--dir")
            .arg(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        let redis = Self { child, dir };
        let store = redis.store().await;
        let started = std::time::Instant::now();
        while let Err(error) = store.ping().await {
            assert!(started.elapsed() < PATIENCE, "redis-server does not start: {error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        redis
    }

    pub fn config(&self) -> StoreConfig {
        StoreConfig {
            url: format!("redis+unix://{}", self.dir.path().join("redis.sock").display()),
            ..StoreConfig::default()
        }
    }

    pub async fn store(&self) -> Store {
        Store::connect(&self.config()).await.unwrap()
    }

    /// Sends it a signal, by the name that `kill` knows.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    now.as_millis() as u64
}

/// The life of the node that holds the agents of these tests.
pub const NODE_LIFE: u64 = 4711;

/// A record of a connected agent.
pub fn record(id: &str) -> AgentRecord {
    AgentRecord {
        agent_id: id.into(),
        addresses: vec!["10.0.0.1".into(), "10.1.0.1".into()],
        hostname: format!("host-of-{id}"),
        version: "0.1.0".into(),
        os: "linux".into(),
        arch: "x86_64".into(),
        run_mode: 1,
        node_id: "node-1".into(),
        node_life: NODE_LIFE,
        connected_at_ms: now_ms() - 60_000,
        started_at_ms: now_ms() - 90_000,
        cpu_num: 8,
        mem_size_mb: 16_000,
        peer: "192.0.2.7:40000".into(),
        server: "192.0.2.1:28668".into(),
        ..AgentRecord::default()
    }
}

/// Writes what gse_task writes for an agent.
pub fn write(batch: &mut Batch, record: &AgentRecord, seen_ms: u64, aliases: &[&str]) {
    let id = &record.agent_id;
    let shard = agent_shard(id);
    let key = agent_info(shard);
    batch.push(
        &key,
        redis::cmd("HSET").arg(&key).arg(id).arg(record.encode_to_vec()).clone(),
    );
    let key = node_lease(&record.node_id);
    batch.push(&key, redis::cmd("SET").arg(&key).arg(NODE_LIFE).clone());
    let key = agent_seen(shard);
    batch.push(&key, redis::cmd("ZADD").arg(&key).arg(seen_ms).arg(id).clone());
    let key = agent_load(shard);
    let load = AgentLoad {
        at_ms: seen_ms,
        cpu_permille: 125,
        mem_permille: 500,
        running: 3,
        queued: 4,
    };
    batch.push(
        &key,
        redis::cmd("HSET").arg(&key).arg(id).arg(load.encode_to_vec()).clone(),
    );
    for alias in aliases {
        let key = agent_alias(agent_shard(alias));
        batch.push(&key, redis::cmd("HSET").arg(&key).arg(*alias).arg(id).clone());
    }
}

/// A running front door.
pub struct Api {
    pub life: Lifecycle,
    pub address: String,
    client: HttpClient,
    _data: tempfile::TempDir,
}

impl Api {
    pub async fn start(store: StoreConfig, change: impl FnOnce(&mut Config)) -> Self {
        let data = tempfile::tempdir().unwrap();
        let mut config = Config {
            store,
            ..Config::default()
        };
        config.http.listen = "127.0.0.1:0".into();
        config.audit.file = Some(data.path().join("audit.log"));
        config.authz.apps = vec![AppEntry {
            code: "bk_job".into(),
            secret_sha256: Some(hex::encode(<sha2::Sha256 as sha2::Digest>::digest(SECRET))),
            operations: vec!["*".into()],
            accounts: vec!["*".into()],
            targets: vec!["*".into()],
            ..AppEntry::default()
        }];
        change(&mut config);
        let life = Lifecycle::new("gse_api");
        let owner = life.clone();
        life.spawn_critical("gse_api", async move { gse_api::run(config, owner).await });
        let addresses = tokio::time::timeout(PATIENCE, life.wait_ready()).await.unwrap();
        assert_eq!(life.failure(), None);
        Self {
            address: addresses["http"].clone(),
            life,
            client: HttpClient::new(&ClientConfig::default()).unwrap(),
            _data: data,
        }
    }

    /// Posts a body as bk_job does.
    pub async fn post(&self, path: &str, body: &str) -> Value {
        self.post_with(path, body, HeaderMap::new()).await
    }

    pub async fn post_with(&self, path: &str, body: &str, mut headers: HeaderMap) -> Value {
        if !headers.contains_key("x-bkapi-authorization") {
            let shown = format!(r#"{{"bk_app_code":"bk_job","bk_app_secret":"{SECRET}"}}"#);
            headers.insert("x-bkapi-authorization", HeaderValue::from_str(&shown).unwrap());
        }
        let url = format!("http://{}{path}", self.address);
        let reply = self
            .client
            .post_json(&url, headers, Bytes::copy_from_slice(body.as_bytes()), PATIENCE)
            .await
            .unwrap();
        assert_eq!(reply.status, 200);
        let envelope: Value = serde_json::from_slice(&reply.body).unwrap();
        // contract: v2-http-task#3, v2-http-task#53
        assert!(envelope["code"].is_i64() && envelope["message"].is_string());
        assert!(!envelope["data"].is_null());
        assert_eq!(envelope["result"].as_bool().unwrap(), envelope["code"] == 0);
        envelope
    }

    /// Posts a body; the answer has to be a success; its `data`.
    pub async fn data(&self, path: &str, body: &str) -> Value {
        let envelope = self.post(path, body).await;
        assert_eq!(envelope["code"], 0, "{envelope}");
        envelope["data"].clone()
    }

    pub async fn stop(&self) {
        self.life.drain();
        assert!(self.life.finished(PATIENCE).await);
        assert_eq!(self.life.failure(), None);
    }
}
