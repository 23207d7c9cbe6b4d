//! `DBA STATUS`: what this server stands in front of and what it promises.

use bytes::Bytes;
use serde_json::{Value, json};

use super::{Answered, Refused};
use crate::server::{Shared, Store};

pub(super) async fn status(shared: &Shared, rest: &[Bytes]) -> Answered {
    if !rest.is_empty() {
        return Err(Refused::new("ERR DBA STATUS takes no arguments"));
    }
    let (mode, durability, epoch, groups) = match &shared.store {
        Store::Embedded(_) => ("embedded", embedded(shared), Value::Null, Value::Null),
        Store::Single(_) => (
            "single",
            "as the Redis behind keeps it: nothing is added here".to_owned(),
            Value::Null,
            Value::Null,
        ),
        Store::Sharded(s) if s.cluster().is_some() => {
            ("cluster", s.durability().to_owned(), s.table().epoch.into(), groups(s))
        }
        Store::Sharded(s) => ("sharded", s.durability().to_owned(), s.table().epoch.into(), groups(s)),
    };
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "mode": mode,
        "durability": durability,
        "uptime_s": shared.started.elapsed().as_secs(),
        "clients": shared.clients.lock().len(),
        "epoch": epoch,
        "groups": groups,
    }))
}

fn embedded(shared: &Shared) -> String {
    match shared.config.embedded.durability {
        crate::config::Durability::Always => {
            "an acknowledged write is on this machine's disk; there is no copy on another".to_owned()
        }
        _ => "an acknowledged write is with the operating system of this machine: it survives this process, not the machine".to_owned(),
    }
}

fn groups(sharded: &crate::sharded::Sharded) -> Value {
    let table = sharded.table();
    let counts = table.map.counts();
    let all = table.groups.iter().zip(counts).map(|(g, slots)| {
        json!({
            "name": g.seat.name,
            "slots": slots,
            "primary": g.seat.head().place.map(|p| p.to_string()),
            "copies": g.seat.copies(),
            "short": g.seat.short(),
            "problems": g.seat.problems(),
        })
    });
    all.collect()
}
