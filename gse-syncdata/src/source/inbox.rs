//! What was handed over by calls, to whichever instance: taken from the store by the active one, in the order in which it came.

use std::time::Duration;

use gse_proto::ids::AgentId;

use crate::desk::{Backoff, Desk};
use crate::identity::Identity;

/// Items taken at once.
const SOME: usize = 100;

/// Empties the inbox for as long as this instance is the active one.
pub async fn follow(desk: &Desk) {
    let every = Duration::from_millis(desk.node.config.inbox.look_ms);
    let mut backoff = Backoff::of_ms(200, 2_000);
    loop {
        let (items, count) = match desk.node.store.oldest(SOME).await {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(%error, "the inbox can't be read");
                backoff.wait(&desk.node).await;
                continue;
            }
        };
        backoff.reset();
        if count == 0 {
            tokio::time::sleep(every).await;
            continue;
        }
        let mut identities = Vec::new();
        for item in items {
            let Some(agent) = item.agents.first().and_then(|name| AgentId::parse(name).ok()) else {
                desk.node.metrics.skipped("malformed");
                continue;
            };
            match item.content {
                Some(content) => identities.push(Identity::of_bytes(agent, content)),
                None => {
                    desk.put(&std::mem::take(&mut identities), None).await;
                    if !desk.again(agent.as_str()).await {
                        tracing::info!(host = agent.as_str(), "a host that was to be pushed again is not known");
                    }
                }
            }
        }
        desk.put(&identities, None).await;
        while let Err(error) = desk.node.store.taken(count).await {
            tracing::warn!(%error, "the inbox can't be emptied yet");
            backoff.wait(&desk.node).await;
        }
        backoff.reset();
    }
}
