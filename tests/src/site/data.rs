//! gse_data: any number of instances that share the store.

use std::process::Command;

use anyhow::Result;

use super::{APP, SECRET, Site};
use crate::api::Api;
use crate::process::{Child, binary};

impl Site {
    /// Starts an instance of gse_data called `name`, on free ports, with more settings.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn data(&self, name: &str, sets: &[String]) -> Result<Child> {
        let certs = self.path().join("certs");
        let dir = self.path().join(format!("gse_data-{name}"));
        let mut all = vec![
            format!("node_id={name}"),
            format!("data_dir={}", dir.display()),
            format!(
                "audit.file={}",
                self.path().join(format!("gse_data-{name}-audit.log")).display()
            ),
        ];
        for listener in ["link", "http", "internal"] {
            all.push(format!("{listener}.listen=127.0.0.1:0"));
        }
        for section in ["link", "internal"] {
            all.push(format!("{section}.tls.ca={}", certs.join("gseca.crt").display()));
            all.push(format!("{section}.tls.cert={}", certs.join("gse_server.crt").display()));
            all.push(format!("{section}.tls.key={}", certs.join("gse_server.key").display()));
        }
        all.extend(self.common_sets());
        all.extend(sets.iter().cloned());
        self.run_server(Command::new(binary("gse_data")?), &format!("gse_data-{name}"), &all)
            .await
    }

    /// The own port of an instance of gse_data.
    #[must_use]
    pub fn data_api(&self, child: &Child) -> Api {
        Api::new(child.address("http"), APP, SECRET)
    }
}
