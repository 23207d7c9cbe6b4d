//! `DBA PROMOTE` and `DBA FAILOVER`: another primary for a group. How that is done without losing anything is `sharded::change`'s and `sharded::promote`'s.

use std::future::Future;

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::oneshot;

use super::{Answered, Refused};
use crate::server::{Shared, Store};
use crate::sharded::seat::Seat;
use crate::sharded::{change, promote};

fn text(word: &Bytes) -> Result<&str, Refused> {
    std::str::from_utf8(word).map_err(|_| Refused::new("ERR a name is not UTF-8"))
}

fn seat(shared: &Shared, name: &str) -> Result<std::sync::Arc<Seat>, Refused> {
    let store = shared.store();
    let Store::Sharded(sharded) = &*store else {
        return Err(Refused::new(
            "ERR there are no groups: this gse_dba is not in sharded mode",
        ));
    };
    let table = sharded.table();
    let found = table.groups.iter().find(|g| g.seat.name == name);
    found.map(|g| std::sync::Arc::clone(&g.seat)).ok_or_else(|| {
        let names: Vec<&str> = table.groups.iter().map(|g| g.seat.name.as_str()).collect();
        Refused::new(format!("ERR no group '{name}': there are {}", names.join(", ")))
    })
}

/// Lets it run to its end even when the one who asked for it has gone: half of it is worse than all or nothing.
async fn to_its_end(shared: &Shared, what: impl Future<Output = anyhow::Result<Value>> + Send + 'static) -> Answered {
    let (done, answer) = oneshot::channel();
    shared.life.spawn_contained("dba-change", async move {
        // Nobody may be there any more to hear it; it is in the log as well.
        let _ = done.send(what.await);
    });
    match answer.await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(Refused::new(format!("ERR {e:#}"))),
        Err(_) => Err(Refused::new("ERR this server is stopping")),
    }
}

/// `DBA PROMOTE <group> [address] [FORCE]`.
pub(super) async fn promote(shared: &Shared, rest: &[Bytes]) -> Answered {
    let usage = || Refused::new("ERR usage: DBA PROMOTE <group> [address] [FORCE]");
    let (group, mut rest) = rest.split_first().ok_or_else(usage)?;
    let force = rest.last().is_some_and(|w| w.eq_ignore_ascii_case(b"FORCE"));
    if force {
        rest = rest.split_last().map_or(rest, |(_, r)| r);
    }
    let to = match rest {
        [] => None,
        [one] => Some(text(one)?.to_owned()),
        _ => return Err(usage()),
    };
    let seat = seat(shared, text(group)?)?;
    to_its_end(
        shared,
        async move { promote::promote(&seat, to.as_deref(), force).await },
    )
    .await
}

/// `DBA FAILOVER <group> [TO address]`.
pub(super) async fn failover(shared: &Shared, rest: &[Bytes]) -> Answered {
    let to = match rest {
        [_] => None,
        [_, word, one] if word.eq_ignore_ascii_case(b"TO") => Some(text(one)?.to_owned()),
        _ => return Err(Refused::new("ERR usage: DBA FAILOVER <group> [TO address]")),
    };
    let group = rest.first().map(text).transpose()?.unwrap_or_default();
    let seat = seat(shared, group)?;
    to_its_end(shared, async move { change::failover(&seat, to.as_deref()).await }).await
}
