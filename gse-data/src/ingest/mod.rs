//! Links of agents and proxies: TCP, TLS 1.3 with a certificate of either, then one owned task per connection.
//!
//! A probe that connects and closes is no error (contract data-plane#44).

pub mod book;
mod conn;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use gse_core::links::{Incoming, LinkListener, LinkRules};
use gse_core::tls::Role;
use tokio::sync::Semaphore;

use crate::Node;
use crate::config::RunMode;

/// How long a stopping server waits for what it has taken in to be acknowledged.
pub(crate) const STOPPING: Duration = Duration::from_secs(3);
/// Between two looks at whether the routes are known.
const PAUSE: Duration = Duration::from_millis(100);

/// Binds the listeners and lets senders in.
///
/// # Errors
/// When an address can't be bound or the certificate files can't be used.
pub async fn serve(node: &Arc<Node>) -> anyhow::Result<()> {
    let config = &node.config.link;
    let files = config.tls.clone().context("link.tls is not set")?;
    let places = Arc::new(Semaphore::new(config.max_links));
    for (name, key, listen) in [
        ("link", "link.listen", &config.listen),
        ("link_v1", "link.listen_v1", &config.listen_v1),
    ] {
        if listen.is_empty() {
            continue;
        }
        let rules = LinkRules {
            name: "data listener",
            files: files.clone(),
            roles: &[Role::Agent, Role::Server],
            backlog: config.backlog,
            hello_timeout: Duration::from_millis(config.hello_timeout_ms),
        };
        let listener = LinkListener::bind(listen, rules)
            .await
            .with_context(|| format!("cannot listen for records on {listen} ({key})"))?;
        let address = listener.address();
        node.life
            .spawn("data listener", accept(Arc::clone(node), listener, Arc::clone(&places)));
        node.life.announce(name, address.to_string());
    }
    Ok(())
}

/// Waits until it is known what is routed. Whoever connects before that is not answered, and keeps its records: taken in now they would
/// count as records that nobody wants.
async fn routes(node: &Node) {
    let mut said = false;
    while node.config.run_mode == RunMode::Server && !node.router.has_routes() {
        if !said {
            tracing::warn!("the store has not told any routes yet; records wait at their hosts");
            said = true;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn accept(node: Arc<Node>, listener: LinkListener, places: Arc<Semaphore>) {
    tokio::select! {
        () = node.life.draining() => return,
        () = routes(&node) => {}
    }
    let (owner, counting) = (Arc::clone(&node), Arc::clone(&node));
    let refused = move |why| counting.metrics.link_refused(why);
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
    listener.serve(node.life.clone(), places, refused, connection).await;
}
