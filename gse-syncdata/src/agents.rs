//! Looks for agents in the store: those that hosts wait for, often; all of them, slowly, because one that was installed anew has no file.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::fleet::find;
use gse_core::store::{Store, StoreError};
use gse_proto::ids::AgentId;

use crate::desk::Desk;

/// A host and the names of its agent.
pub type Named = (Arc<str>, Vec<AgentId>);

/// An agent that is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Present {
    /// Its id.
    pub agent: AgentId,
    /// Epoch of its journal.
    pub epoch: Bytes,
    /// Its kind of system, as it says it.
    pub os: String,
}

/// Which of some hosts have a connected agent: the first of their names that has one.
///
/// # Errors
/// When the store does not answer.
pub async fn present(store: &Store, hosts: &[&[AgentId]]) -> Result<Vec<Option<Present>>, StoreError> {
    let names: Vec<AgentId> = hosts.iter().flat_map(|names| names.iter().cloned()).collect();
    let agents = find::resolve(store, &names).await?;
    let records = find::records(store, &agents).await?;
    let mut found = agents.into_iter().zip(records);
    let of = |names: &&[AgentId]| {
        let mut first = None;
        // All of this host's are taken off, whichever it is.
        for (agent, record) in found.by_ref().take(names.len()) {
            let Some(record) = record.filter(|record| record.disconnected_at_ms == 0) else {
                continue;
            };
            first.get_or_insert(Present {
                agent,
                epoch: record.journal_epoch,
                os: record.os,
            });
        }
        first
    };
    Ok(hosts.iter().map(of).collect())
}

/// Watches for as long as this instance is the active one.
pub async fn watch(desk: &Desk) {
    let config = &desk.node.config.agents;
    let every = Duration::from_millis(config.look_ms);
    let looks = (config.round_ms / config.look_ms).max(1);
    let (mut waiting, mut all) = (String::new(), String::new());
    loop {
        tokio::time::sleep(every).await;
        let some = desk.waiting_after(&waiting, config.batch);
        waiting = last_of(&some, config.batch);
        look(desk, &some).await;
        let share = usize::try_from((desk.counts().hosts as u64).div_ceil(looks)).unwrap_or(usize::MAX);
        let share = share.clamp(1, config.batch);
        let some = desk.hosts_after(&all, share);
        all = last_of(&some, share);
        look(desk, &some).await;
    }
}

/// Where to go on: after the last one, or from the beginning.
fn last_of(some: &[Named], most: usize) -> String {
    match some.last() {
        Some((key, _)) if some.len() == most => key.to_string(),
        _ => String::new(),
    }
}

async fn look(desk: &Desk, hosts: &[Named]) {
    let names: Vec<&[AgentId]> = hosts.iter().map(|(_, names)| &names[..]).collect();
    match present(desk.node.store.raw(), &names).await {
        Ok(found) => {
            let mut due = 0;
            for ((key, _), present) in hosts.iter().zip(found) {
                if let Some(present) = present {
                    due += usize::from(desk.seen(key, present.agent.as_str(), &present.epoch));
                }
            }
            if due > 0 {
                tracing::debug!(hosts = due, "agents of hosts are there, or new");
                desk.wake.notify_one();
            }
        }
        Err(error) => tracing::debug!(%error, "agents can't be looked for"),
    }
}
