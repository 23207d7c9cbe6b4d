//! gse_procmgr: one of it, or several instances that share the store.

use std::process::Command;

use anyhow::Result;

use super::{APP, SECRET, Site, StoreKind};
use crate::api::Api;
use crate::process::binary;

impl Site {
    /// A site that operates processes: a store, gse_task, gse_procmgr and gse_api.
    ///
    /// # Errors
    /// When something does not start.
    pub async fn with_procs(kind: StoreKind) -> Result<Self> {
        let mut site = Self::with_store(kind).await?;
        site.start_task().await?;
        site.start_procmgr(1).await?;
        site.start_api().await?;
        Ok(site)
    }

    /// Starts instance `n` of gse_procmgr (again), where it was before.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start_procmgr(&mut self, n: u32) -> Result<()> {
        let name = format!("gse_procmgr-{n}");
        let certs = self.path().join("certs");
        let places = self.procmgr_places.get(&n).cloned().unwrap_or_default();
        let mut sets = vec![
            format!("node_id=procs-{n}"),
            format!("audit.file={}", self.path().join(format!("{name}-audit.log")).display()),
        ];
        for listener in ["http", "internal"] {
            let place = places.get(listener).map_or("127.0.0.1:0", String::as_str);
            sets.push(format!("{listener}.listen={place}"));
        }
        sets.push(format!("internal.tls.ca={}", certs.join("gseca.crt").display()));
        sets.push(format!("internal.tls.cert={}", certs.join("gse_server.crt").display()));
        sets.push(format!("internal.tls.key={}", certs.join("gse_server.key").display()));
        sets.extend(self.common_sets());
        sets.extend(self.procmgr_sets.iter().cloned());
        self.procmgr.remove(&n);
        let child = self
            .run_server(Command::new(binary("gse_procmgr")?), &name, &sets)
            .await?;
        self.procmgr_places.insert(n, child.addresses.clone());
        self.procmgr.insert(n, child);
        Ok(())
    }

    /// Own port of instance `n` of gse_procmgr.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn procmgr_api(&self, n: u32) -> Api {
        let child = self
            .procmgr
            .get(&n)
            .unwrap_or_else(|| panic!("gse_procmgr {n} does not run"));
        Api::new(child.address("http"), APP, SECRET)
    }
}
