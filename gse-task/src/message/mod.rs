//! Messages between platforms and their plugins on the hosts (contract v2-http-task, 3.12; data-plane, 1.9).
//!
//! A slot of the configuration binds a plugin's name to a token and a call-back. A message goes to the agents as a call, through this
//! node or the one that holds an agent's session, and is answered when the plugins' sockets have taken it; nothing is stored. What a plugin
//! says comes with its agent's session, to whichever node that is, and is posted from there.

mod callback;
mod config;
mod dispatch;
mod metrics;

use gse_core::fleet::{Fleet, FleetConfig};
use gse_core::http::{ClientConfig, HttpClient};
use gse_core::lifecycle::Lifecycle;
use gse_core::rpc::Dialler;
use gse_core::store::Store;
use gse_proto::session::PluginMessage;

use self::callback::Callbacks;
pub use self::config::{MessagesConfig, Slot};
pub(crate) use self::dispatch::call;
pub use self::metrics::Metrics;
use crate::config::Config;

/// Everything there is of messages on this node.
#[derive(Debug)]
pub struct Messages {
    config: MessagesConfig,
    /// The way to agents of other nodes, where there are other nodes.
    fleet: Option<Fleet>,
    callbacks: Callbacks,
    metrics: Metrics,
}

impl Messages {
    /// Starts what posts call-backs. Reads a certificate file (blocking, small).
    ///
    /// # Errors
    /// When that file can't be used.
    pub fn start(
        config: &Config,
        store: Store,
        dialler: Option<Dialler>,
        metrics: Metrics,
        life: &Lifecycle,
    ) -> anyhow::Result<Self> {
        let messages = &config.messages;
        let client = HttpClient::new(&ClientConfig {
            ca: messages.ca.clone(),
            // Nothing of the answer but its status is looked at.
            max_response_bytes: 1 << 20,
            ..ClientConfig::default()
        })?;
        let fleet = FleetConfig {
            heartbeat_interval_ms: config.session.heartbeat_interval_ms,
            reconnect_grace_ms: config.task.reconnect_grace_ms,
            max_per_request: config.calls.max_per_request.min(FleetConfig::default().max_per_request),
            ..FleetConfig::default()
        };
        Ok(Self {
            fleet: dialler.map(|dialler| Fleet::new(store, dialler, fleet)),
            callbacks: Callbacks::start(messages, &client, metrics.clone(), life),
            config: messages.clone(),
            metrics,
        })
    }

    /// A plugin of an agent that is connected here says something. Never waits.
    pub fn said(&self, agent: &str, message: &PluginMessage) {
        self.metrics.said();
        self.callbacks.said(agent, message);
    }
}
