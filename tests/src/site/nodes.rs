//! gse_task: one of it, or several nodes that share the store.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{APP, Places, SECRET, Site, StoreKind};
use crate::api::{Api, script_body};
use crate::eventually;
use crate::metrics::Figures;
use crate::process::{Child, binary};

/// The listeners of gse_task.
const LISTENERS: [&str; 4] = ["agents", "http", "internal", "rpc"];
/// Those of its listeners that speak TLS.
const SECURE: [&str; 2] = ["agents", "internal"];

impl Site {
    /// A site with the nodes 1 to `count` of gse_task, and gse_api.
    ///
    /// # Errors
    /// When something does not start.
    pub async fn with_nodes(kind: StoreKind, count: u32) -> Result<Self> {
        let mut site = Self::with_store(kind).await?;
        for n in 1..=count {
            site.start_node(n).await?;
        }
        site.start_api().await?;
        site.settled().await;
        Ok(site)
    }

    /// Waits until the nodes know of each other, and gse_api of one of them at least.
    ///
    /// # Panics
    /// When they do not within twenty seconds.
    pub async fn settled(&self) {
        let limit = Duration::from_secs(20);
        let others = self.nodes.len() as f64 - 1.0;
        for node in self.nodes.values() {
            eventually(&format!("{} knows the others", node.name), limit, || async {
                let figures = Figures::of(node).await.ok()?;
                (figures.sum("gse_task_peers") == others).then_some(())
            })
            .await;
        }
        if self.api.is_some() {
            let api = self.api();
            let nobody = script_body(&["nobody"], "root", "#!/bin/sh\ntrue\n", 10);
            eventually("gse_api has found a node", limit, || async {
                api.try_submit(&nobody).await?.ok()
            })
            .await;
        }
    }

    /// Starts gse_task (again).
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start_task(&mut self) -> Result<()> {
        let command = Command::new(binary("gse_task")?);
        self.start_task_as(command).await
    }

    /// Starts gse_task (again), so that it kills itself as with SIGKILL when it gets to a place (`name` or `name:n`, the n-th time).
    /// `armed`: what happens before there is this file does not count.
    ///
    /// # Errors
    /// When it does not start; it may have died before that.
    pub async fn start_task_to_die_at(&mut self, place: &str, armed: Option<&Path>) -> Result<()> {
        let mut command = Command::new(crate::process::failpoints_binary()?);
        command.env("FAILPOINT_KILL", place);
        if let Some(file) = armed {
            command.env("FAILPOINT_ARMED", file);
        }
        self.start_task_as(command).await
    }

    async fn start_task_as(&mut self, command: Command) -> Result<()> {
        let places = self.places.get(&0).cloned().unwrap_or_default();
        let sets = self.task_settings("gse_task", &places);
        // The one before is gone, or is to go.
        self.task = None;
        let child = self.run_server(command, "gse_task", &sets).await?;
        self.places.insert(0, child.addresses.clone());
        self.task = Some(child);
        Ok(())
    }

    /// Starts node `n` (again), where it was before.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start_node(&mut self, n: u32) -> Result<()> {
        let name = format!("gse_task-{n}");
        let places = self.places.get(&n).cloned().unwrap_or_default();
        let mut sets = self.task_settings(&name, &places);
        sets.push(format!("node_id=node-{n}"));
        sets.extend(self.node_sets.get(&n).into_iter().flatten().cloned());
        self.nodes.remove(&n);
        let child = self.run_server(Command::new(binary("gse_task")?), &name, &sets).await?;
        self.places.insert(n, child.addresses.clone());
        self.nodes.insert(n, child);
        Ok(())
    }

    /// SIGKILL to a node.
    ///
    /// # Panics
    /// When there is no such node.
    pub fn kill_node(&mut self, n: u32) {
        self.nodes.remove(&n).expect("the node runs").kill_9();
    }

    fn task_settings(&self, name: &str, places: &Places) -> Vec<String> {
        let certs = self.path().join("certs");
        let mut sets = vec![format!(
            "audit.file={}",
            self.path().join(format!("{name}-audit.log")).display()
        )];
        for listener in LISTENERS {
            let place = places.get(listener).map_or("127.0.0.1:0", String::as_str);
            sets.push(format!("{listener}.listen={place}"));
        }
        for section in SECURE {
            sets.push(format!("{section}.tls.ca={}", certs.join("gseca.crt").display()));
            sets.push(format!("{section}.tls.cert={}", certs.join("gse_server.crt").display()));
            sets.push(format!("{section}.tls.key={}", certs.join("gse_server.key").display()));
        }
        sets.extend(self.common_sets());
        sets.extend(self.task_sets.iter().cloned());
        sets
    }

    /// A running node.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn node(&self, n: u32) -> &Child {
        self.nodes.get(&n).unwrap_or_else(|| panic!("node {n} does not run"))
    }

    /// A node's own port for platforms.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn node_api(&self, n: u32) -> Api {
        Api::new(self.node(n).address("http"), APP, SECRET)
    }

    /// Where agents connect to node `n`, or did when it last ran.
    ///
    /// # Panics
    /// When it never ran.
    #[must_use]
    pub fn agents_address(&self, n: u32) -> String {
        self.place(n, "agents")
    }

    /// Where a listener of node `n` is, or was when it last ran.
    ///
    /// # Panics
    /// When it never ran, or has no such listener.
    #[must_use]
    pub fn place(&self, n: u32, listener: &str) -> String {
        self.places
            .get(&n)
            .and_then(|places| places.get(listener))
            .unwrap_or_else(|| panic!("node {n} has never listened for {listener}"))
            .clone()
    }

    /// Where agents connect to any of gse_task.
    #[must_use]
    pub fn agents_addresses(&self) -> Vec<String> {
        self.places
            .values()
            .filter_map(|places| places.get("agents").cloned())
            .collect()
    }

    /// The one gse_task.
    ///
    /// # Errors
    /// When it does not run.
    pub fn the_task(&mut self) -> Result<&mut Child> {
        self.task.as_mut().context("gse_task is not running")
    }
}
