//! gse_alarm: any number of instances that share the store.

use std::process::Command;

use anyhow::Result;

use super::Site;
use crate::process::{Child, binary};

impl Site {
    /// Starts an instance of gse_alarm called `name` that hands alarms to these gse_data (their `rpc`), with more settings.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn alarm(&self, name: &str, data: &[&Child], sets: &[String]) -> Result<Child> {
        let certs = self.path().join("certs");
        let servers: Vec<String> = data
            .iter()
            .map(|child| format!("\"{}\"", child.address("rpc")))
            .collect();
        let mut all = vec![
            format!("node_id={name}"),
            format!("store.url={}", self.server_store_url()),
            format!("data.servers=[{}]", servers.join(",")),
            format!("data.tls.ca={}", certs.join("gseca.crt").display()),
            format!("data.tls.cert={}", certs.join("gse_server.crt").display()),
            format!("data.tls.key={}", certs.join("gse_server.key").display()),
        ];
        all.extend(sets.iter().cloned());
        self.run_server(Command::new(binary("gse_alarm")?), &format!("gse_alarm-{name}"), &all)
            .await
    }
}
