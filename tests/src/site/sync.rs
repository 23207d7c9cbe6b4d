//! gse_syncdata: any number of instances that share the store.

use std::process::Command;

use anyhow::Result;

use super::{AgentOptions, Site};
use crate::cmdb::Cmdb;
use crate::process::{Child, binary};

impl Site {
    /// Starts an instance of gse_syncdata called `name`, on free ports, with more settings.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn syncdata(&self, name: &str, sets: &[String]) -> Result<Child> {
        let certs = self.path().join("certs");
        let log = format!("gse_syncdata-{name}");
        let mut all = vec![
            format!("node_id={name}"),
            format!("audit.file={}", self.path().join(format!("{log}-audit.log")).display()),
            "http.listen=127.0.0.1:0".into(),
            "internal.listen=127.0.0.1:0".into(),
            format!("internal.tls.ca={}", certs.join("gseca.crt").display()),
            format!("internal.tls.cert={}", certs.join("gse_server.crt").display()),
            format!("internal.tls.key={}", certs.join("gse_server.key").display()),
            "fleet.heartbeat_interval_ms=1000".into(),
            // Short enough that tests need not wait for minutes.
            "agents.look_ms=300".into(),
            "agents.round_ms=900".into(),
            "push.retry_min_ms=200".into(),
            "push.retry_max_ms=1000".into(),
        ];
        all.extend(self.common_sets());
        all.extend(sets.iter().cloned());
        self.run_server(Command::new(binary("gse_syncdata")?), &log, &all).await
    }

    /// Settings for an instance that follows this CMDB.
    #[must_use]
    pub fn from_cmdb(cmdb: &Cmdb) -> Vec<String> {
        vec![
            "source=cmdb".into(),
            format!("cmdb.url={}", cmdb.url()),
            "cmdb.app=bk_gse".into(),
            "cmdb.secret=hush".into(),
            "cmdb.tenant=system".into(),
            "cmdb.retry_min_ms=50".into(),
            "cmdb.retry_max_ms=500".into(),
        ]
    }

    /// Starts an agent whose `/var/lib` is a directory of its own, [`Site::var_lib`], so that several hosts fit on one machine.
    ///
    /// # Errors
    /// When it does not start.
    pub fn spawn_host(&self, id: &str, address: &str) -> Result<Child> {
        let mut options = AgentOptions::new(id, address);
        let own = self.var_lib(id);
        std::fs::create_dir_all(&own)?;
        options.binds.push((own, "/var/lib".into()));
        self.spawn_agent(&options, "")
    }

    /// What is `/var/lib` for the agent with this id.
    #[must_use]
    pub fn var_lib(&self, id: &str) -> std::path::PathBuf {
        self.path().join(format!("var-lib-{}", hex::encode(id)))
    }

    /// Where the identity of its host is.
    #[must_use]
    pub fn hostid(&self, id: &str) -> std::path::PathBuf {
        self.var_lib(id).join("gse/host/hostid")
    }
}
