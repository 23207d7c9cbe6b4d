//! The listener for links: who is let in, with the certificate of an agent, or of a server for a relay.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use gse_core::links::{Incoming, LinkListener, LinkRules};
use gse_core::tls::Role;
use tokio::sync::Semaphore;

use super::conn;
use crate::Node;

/// Connections that wait in the kernel for their turn.
const BACKLOG: u32 = 1024;

/// A bound listener that lets nobody in yet.
#[derive(Debug)]
pub struct Listener(LinkListener);

/// Binds the listener.
///
/// # Errors
/// When the address can't be bound or the certificate files can't be used.
pub async fn bind(node: &Node) -> anyhow::Result<Listener> {
    let config = &node.config.link;
    let rules = LinkRules {
        name: "link listener",
        files: config.tls.clone().context("link.tls is not set")?,
        roles: &[Role::Agent, Role::Server],
        backlog: BACKLOG,
        hello_timeout: Duration::from_millis(config.hello_timeout_ms),
    };
    let listener = LinkListener::bind(&config.listen, rules)
        .await
        .with_context(|| format!("cannot listen for links of agents on {} (link.listen)", config.listen))?;
    Ok(Listener(listener))
}

impl Listener {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.0.address()
    }

    /// Lets agents in from now on.
    pub fn serve(self, node: &Arc<Node>) {
        let places = Arc::new(Semaphore::new(node.config.link.max_links));
        let (metrics, owner) = (node.metrics.clone(), Arc::clone(node));
        let refused = move |why| metrics.link_refused(why);
        let connection = move |incoming: Incoming| {
            let node = Arc::clone(&owner);
            async move {
                conn::run(
                    node,
                    incoming.stream,
                    incoming.peer,
                    incoming.identity,
                    incoming.deadline,
                )
                .await
            }
        };
        let serving = self.0.serve(node.life.clone(), places, refused, connection);
        node.life.spawn("link listener", serving);
    }
}
