//! gse_btsvr: one of it, or several instances that share the store.

use std::process::Command;

use anyhow::Result;

use super::{APP, AgentOptions, SECRET, Site, StoreKind};
use crate::api::Api;
use crate::process::{Child, binary};

/// The listeners of gse_btsvr.
const LISTENERS: [&str; 3] = ["link", "http", "internal"];

impl Site {
    /// A site that moves files: a store, gse_task, gse_btsvr and gse_api.
    ///
    /// # Errors
    /// When something does not start.
    pub async fn with_files(kind: StoreKind) -> Result<Self> {
        let mut site = Self::with_store(kind).await?;
        site.start_task().await?;
        site.start_btsvr(1).await?;
        site.start_api().await?;
        Ok(site)
    }

    /// A site that moves files with so many agents, all of them running; settings for gse_btsvr and for the agents.
    ///
    /// # Errors
    /// When something does not start.
    pub async fn with_file_agents(
        count: usize,
        server_sets: &[&str],
        agent_sets: &[&str],
    ) -> Result<(Self, Vec<Child>, Vec<String>)> {
        let mut site = Self::with_store(StoreKind::Embedded).await?;
        site.btsvr_sets.extend(server_sets.iter().map(|set| (*set).to_owned()));
        site.start_task().await?;
        site.start_btsvr(1).await?;
        site.start_api().await?;
        let ids: Vec<String> = (0..count).map(|n| format!("02000000file{n:02}")).collect();
        let agents = (1..).zip(&ids);
        let agents: Result<Vec<Child>> = agents
            .map(|(n, id)| site.spawn_file_agent(id, &format!("10.2.0.{n}"), agent_sets))
            .collect();
        for id in &ids {
            site.wait_state(id, 2).await;
        }
        Ok((site, agents?, ids))
    }

    /// Starts instance `n` of gse_btsvr (again), where it was before.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start_btsvr(&mut self, n: u32) -> Result<()> {
        let name = format!("gse_btsvr-{n}");
        let certs = self.path().join("certs");
        let places = self.btsvr_places.get(&n).cloned().unwrap_or_default();
        let mut sets = vec![
            format!("node_id=files-{n}"),
            format!("audit.file={}", self.path().join(format!("{name}-audit.log")).display()),
        ];
        for listener in LISTENERS {
            let place = places.get(listener).map_or("127.0.0.1:0", String::as_str);
            sets.push(format!("{listener}.listen={place}"));
        }
        for section in ["link", "internal"] {
            sets.push(format!("{section}.tls.ca={}", certs.join("gseca.crt").display()));
            sets.push(format!("{section}.tls.cert={}", certs.join("gse_server.crt").display()));
            sets.push(format!("{section}.tls.key={}", certs.join("gse_server.key").display()));
        }
        sets.extend(self.common_sets());
        sets.extend(self.btsvr_sets.iter().cloned());
        self.btsvr.remove(&n);
        let child = self
            .run_server(Command::new(binary("gse_btsvr")?), &name, &sets)
            .await?;
        self.btsvr_places.insert(n, child.addresses.clone());
        self.btsvr.insert(n, child);
        Ok(())
    }

    /// Own port of instance `n` of gse_btsvr.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn btsvr_api(&self, n: u32) -> Api {
        let child = self
            .btsvr
            .get(&n)
            .unwrap_or_else(|| panic!("gse_btsvr {n} does not run"));
        Api::new(child.address("http"), APP, SECRET)
    }

    /// Starts an agent that moves files with others on this host, and waits until it is reported as running.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn file_agent(&self, id: &str, address: &str, sets: &[&str]) -> Result<Child> {
        let child = self.spawn_file_agent(id, address, sets)?;
        self.wait_state(id, 2).await;
        Ok(child)
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// When it does not start.
    pub fn spawn_file_agent(&self, id: &str, address: &str, sets: &[&str]) -> Result<Child> {
        let mut options = AgentOptions::new(id, address);
        options.sets = [
            "files.peer_address=127.0.0.1",
            "files.peer_port_first=0",
            "files.peer_port_last=0",
            "files.report_ms=100",
        ]
        .iter()
        .chain(sets)
        .map(|set| (*set).to_owned())
        .collect();
        self.spawn_agent(&options, "")
    }
}
