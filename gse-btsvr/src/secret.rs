//! The secret of each swarm, from which the keys of its members are made: 32 bytes of the system's randomness, drawn when content begins
//! to move and shared through the store by the manifest's id, so that instances that move the same content at the same time agree, and
//! one that was killed goes on with what the members have. When nobody moves it any more it is forgotten.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use gse_core::store::{Batch, Store, StoreError, as_bytes};
use gse_proto::ids::AgentId;
use gse_proto::keys;
use ring::rand::{SecureRandom, SystemRandom};

use crate::swarm::{ManifestId, Secret};
use crate::{Node, peer};

/// A secret in use is kept at least so long over a time in which no instance says that it is in use.
const KEPT_S: u64 = 24 * 3600;
/// A secret that an instance needs no more is forgotten after so long, unless another one says that it is in use.
const LEFT_S: u64 = 60;
/// Said so often.
const SAY: Duration = Duration::from_secs(15);
/// Pause after the store has not answered, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// So many at a time.
const MANY: usize = 500;

fn expire(batch: &mut Batch, id: &ManifestId, ttl_s: u64) {
    let key = keys::file_secret(id);
    let mut command = redis::cmd("EXPIRE");
    command.arg(&key).arg(ttl_s);
    batch.push(&key, command);
}

/// The secrets of these swarms: those that others have drawn, else new ones.
async fn settle(store: &Store, random: &SystemRandom, ids: &[ManifestId]) -> Result<Vec<Option<Secret>>, StoreError> {
    let mut batch = Batch::new();
    for id in ids {
        let mut proposal: Secret = [0; 32];
        if random.fill(&mut proposal).is_err() {
            // Tried again: nothing is made from anything less.
            tracing::error!("the system has no randomness; swarms wait for it");
            return Ok(vec![None; ids.len()]);
        }
        let key = keys::file_secret(id);
        let mut set = redis::cmd("SET");
        set.arg(&key).arg(&proposal[..]).arg("NX").arg("EX").arg(KEPT_S);
        batch.push(&key, set);
        let mut get = redis::cmd("GET");
        get.arg(&key);
        batch.push(&key, get);
        expire(&mut batch, id, KEPT_S);
    }
    let mut secrets = Vec::with_capacity(ids.len());
    for reply in store.run(batch).await?.into_iter().skip(1).step_by(3) {
        secrets.push(as_bytes(reply)?.and_then(|bytes| Secret::try_from(&bytes[..]).ok()));
    }
    Ok(secrets)
}

/// Draws or reads the secret of each swarm that is opened, and says which are in use.
pub async fn keep(node: Arc<Node>) {
    let random = SystemRandom::new();
    let mut pause = PAUSE.0;
    let mut said: HashSet<ManifestId> = HashSet::new();
    let mut say = tokio::time::interval(SAY);
    say.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = node.life.draining() => return,
            () = node.swarms.opened() => {}
            _ = say.tick() => {
                if let Err(error) = in_use(&node, &mut said).await {
                    tracing::debug!(%error, "secrets of swarms can't be kept in use; that is said again");
                }
            }
        }
        loop {
            let mut open = node.swarms.without_secret();
            open.truncate(MANY);
            if open.is_empty() {
                break;
            }
            let known = match settle(node.store.raw(), &random, &open).await {
                Ok(known) => known,
                Err(error) => {
                    tracing::warn!(%error, "swarms wait for their secrets: the store does not answer");
                    vec![None; open.len()]
                }
            };
            let failed = known.iter().any(Option::is_none);
            for (id, secret) in open.iter().zip(known) {
                if let Some(secret) = secret {
                    tell(&node, id, secret);
                }
            }
            if failed {
                tokio::select! {
                    () = node.life.draining() => return,
                    () = tokio::time::sleep(pause) => {}
                }
                pause = (pause * 2).min(PAUSE.1);
            } else {
                pause = PAUSE.0;
            }
        }
    }
}

fn tell(node: &Arc<Node>, id: &ManifestId, secret: Secret) {
    for name in node.swarms.set_secret(id, secret) {
        if let Ok(agent) = AgentId::parse(&name) {
            node.tell_peers(id, &agent);
        }
    }
    peer::tell(node, id);
}

/// Says which secrets are in use, and of which that is over.
async fn in_use(node: &Node, said: &mut HashSet<ManifestId>) -> Result<(), StoreError> {
    let now: HashSet<ManifestId> = node.swarms.ids().into_iter().collect();
    let mut batch = Batch::new();
    for id in said.difference(&now) {
        expire(&mut batch, id, LEFT_S);
    }
    for id in &now {
        expire(&mut batch, id, KEPT_S);
    }
    if !(said.is_empty() && now.is_empty()) {
        node.store.raw().run(batch).await?;
    }
    *said = now;
    Ok(())
}
