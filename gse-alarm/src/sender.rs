//! The way to gse_data: one instance at a time, the next when that does not answer.

use std::time::Duration;

use anyhow::{Context, bail};
use gse_core::rpc::{Dialler, RpcConfig};
use gse_core::tls::TlsFiles;
use gse_proto::intake::record_intake_client::RecordIntakeClient;
use gse_proto::intake::{IntakeRecord, PutRequest};
use tonic::transport::Channel;

use crate::config::DataConfig;

/// Hands records to gse_data.
#[derive(Debug)]
pub struct Sender {
    from: String,
    servers: Vec<(String, RecordIntakeClient<Channel>)>,
    /// The one that answered last.
    next: usize,
    limit: Duration,
}

impl Sender {
    /// Reads the certificate (blocking, small). Must be called within a runtime; nothing is connected yet.
    ///
    /// # Errors
    /// When the certificate, or an address, can't be used.
    pub fn new(from: &str, config: &DataConfig, files: &TlsFiles) -> anyhow::Result<Self> {
        let rpc = RpcConfig {
            connect_timeout_ms: config.connect_timeout_ms,
            call_timeout_ms: config.call_timeout_ms,
            ..RpcConfig::default()
        };
        let dialler = Dialler::new(&rpc, files).context("data.tls")?;
        let longest = dialler.max_message_bytes();
        let mut servers = Vec::new();
        for address in &config.servers {
            let client = RecordIntakeClient::new(dialler.channel(address)?)
                .max_encoding_message_size(longest)
                .max_decoding_message_size(longest);
            servers.push((address.clone(), client));
        }
        Ok(Self {
            from: from.to_owned(),
            servers,
            next: 0,
            limit: Duration::from_millis(config.call_timeout_ms),
        })
    }

    /// Resolves when an instance has the records in its sinks, or on its disk.
    ///
    /// # Errors
    /// When none takes them; why is said of the last.
    pub async fn put(&mut self, records: Vec<IntakeRecord>) -> anyhow::Result<()> {
        let request = PutRequest {
            from: self.from.clone(),
            records,
        };
        let mut last = None;
        for _ in 0..self.servers.len() {
            let at = self.next % self.servers.len();
            let (address, client) = &mut self.servers[at];
            match tokio::time::timeout(self.limit, client.put(request.clone())).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(status)) => last = Some(format!("gse_data at {address}: {}", status.message())),
                Err(_) => last = Some(format!("gse_data at {address} has not answered in time")),
            }
            self.next = at + 1;
        }
        bail!(last.unwrap_or_else(|| "no gse_data is configured".to_owned()))
    }
}
