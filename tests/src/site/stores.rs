//! What the state is kept in, and the faults that can be put before it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::groups::{self, Groups};
use super::{STORE_PASSWORD, Site, StoreKind};
use crate::process::Child;
use crate::proxy::Proxy;

/// What a redis-server logs when it listens on all of its ports.
const READY: &[u8] = b"Ready to accept connections";

impl Site {
    /// As [`Site::start`], with a proxy between the servers and the store ([`Site::store_proxy`]).
    ///
    /// # Errors
    /// When something does not start.
    pub async fn start_behind_a_proxy(kind: StoreKind) -> Result<Self> {
        let mut site = Self::with_store(kind).await?;
        site.proxy_the_store().await?;
        site.start_task().await?;
        site.start_api().await?;
        Ok(site)
    }

    /// Puts a proxy between the store and the servers that are started from now on. Not for a cluster, whose nodes name each other.
    ///
    /// # Errors
    /// When it can't listen.
    pub async fn proxy_the_store(&mut self) -> Result<()> {
        let (_, address) = self.store_url.rsplit_once('@').context("there is no store")?;
        self.store_proxy = Some(Proxy::start(address).await?);
        Ok(())
    }

    /// Where the servers look for the store.
    #[must_use]
    pub fn server_store_url(&self) -> String {
        match &self.store_proxy {
            Some(proxy) => format!("redis://:{STORE_PASSWORD}@{}", proxy.address()),
            None => self.store_url.clone(),
        }
    }

    /// A client of the store itself, past any proxy.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn store_client(&self) -> Result<redis::aio::MultiplexedConnection> {
        let client = redis::Client::open(self.store_url.as_str())?;
        Ok(client.get_multiplexed_async_connection().await?)
    }

    pub(super) async fn start_store(&mut self, kind: StoreKind) -> Result<()> {
        match kind {
            StoreKind::Embedded => {
                if groups::wanted() {
                    let dir = self.path().join("groups");
                    self.groups = Some(tokio::task::spawn_blocking(move || Groups::start(&dir)).await??);
                }
                self.start_dba(&["backend=embedded".into()]).await?;
            }
            StoreKind::Redis => {
                let port = self.start_redis("redis", &[]).await?;
                self.store_url = format!("redis://:{STORE_PASSWORD}@127.0.0.1:{port}");
            }
            StoreKind::Single => {
                let port = self.start_redis("redis", &[]).await?;
                let url = format!("single.url=redis://:{STORE_PASSWORD}@127.0.0.1:{port}");
                self.start_dba(&["backend=single".into(), url]).await?;
            }
            StoreKind::Cluster => {
                let mut nodes = Vec::new();
                for n in 0..3 {
                    let port = self
                        .start_redis(&format!("redis-{n}"), &["--cluster-enabled", "yes"])
                        .await?;
                    nodes.push(format!("127.0.0.1:{port}"));
                }
                let made = Command::new("redis-cli")
                    .env("REDISCLI_AUTH", STORE_PASSWORD)
                    .args(["--cluster", "create", "--cluster-yes"])
                    .args(&nodes)
                    .output()
                    .context("redis-cli (Debian package redis-tools)")?;
                let said = [made.stdout, made.stderr].concat();
                anyhow::ensure!(
                    made.status.success(),
                    "redis-cli --cluster create: {}",
                    String::from_utf8_lossy(&said)
                );
                self.store_url = format!("redis+cluster://:{STORE_PASSWORD}@{}", nodes.join(","));
            }
        }
        Ok(())
    }

    /// Starts gse_dba (again) on the site's data.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start_dba(&mut self, sets: &[String]) -> Result<()> {
        let mut all = vec![
            format!("password={STORE_PASSWORD}"),
            format!("embedded.dir={}", self.path().join("dba").display()),
        ];
        match &self.groups {
            // What it says of the built-in store it says of its stand-in.
            Some(groups) if sets.iter().any(|s| s == "backend=embedded") => {
                all.extend(sets.iter().filter(|s| *s != "backend=embedded").cloned());
                all.extend_from_slice(&groups.sets);
            }
            _ => all.extend_from_slice(sets),
        }
        // A restarted one comes back where the others look for it.
        let listen = self
            .store_url
            .rsplit_once('@')
            .map_or("127.0.0.1:0", |(_, address)| address);
        all.push(format!("listen={listen}"));
        let child = self.server("gse_dba", &all).await?;
        self.store_url = format!("redis://:{STORE_PASSWORD}@{}", child.address("resp"));
        self.store.push(child);
        Ok(())
    }

    async fn start_redis(&mut self, name: &str, args: &[&str]) -> Result<u16> {
        let dir = self.path().join(name);
        std::fs::create_dir_all(&dir)?;
        for _ in 0..20 {
            // The cluster bus takes the port 10,000 above; both stay below those that the system gives out by itself.
            let port = rand::random_range(11_000..22_000_u16);
            let log = self.path().join(format!("{name}.log"));
            let ready = |from: u64| {
                std::fs::read(&log).is_ok_and(|text| {
                    let text = text.get(from as usize..).unwrap_or_default();
                    text.windows(READY.len()).any(|part| part == READY)
                })
            };
            let from = std::fs::metadata(&log).map_or(0, |file| file.len());
            let mut command = Command::new("redis-server");
            command
                .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"])
                .args(["--requirepass", STORE_PASSWORD, "--masterauth", STORE_PASSWORD])
                .args(["--port", &port.to_string(), "--dir"])
                .arg(&dir)
                .args(args);
            let mut child = Child::spawn(name, command, &log)?;
            for _ in 0..500 {
                if !child.is_running() {
                    break;
                }
                // Somebody else's server may answer on a port that was taken; only its own log says that it has all of its ports.
                if ready(from) {
                    self.store.push(child);
                    return Ok(port);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        anyhow::bail!("redis-server does not start (Debian package redis-server)")
    }
}
