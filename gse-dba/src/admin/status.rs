//! `DBA STATUS`: what this server stands in front of and what it promises.

use bytes::Bytes;
use serde_json::{Value, json};

use super::{Answered, Refused};
use crate::server::{Shared, Store};

pub(super) async fn status(shared: &Shared, rest: &[Bytes]) -> Answered {
    if !rest.is_empty() {
        return Err(Refused::new("ERR DBA STATUS takes no arguments"));
    }
    let view = shared.office.views.now();
    let (mode, durability) = (view.backend.name(), view.durability.clone());
    let (epoch, groups) = match &*view.store {
        Store::Embedded(_) | Store::Single(_) => (Value::Null, Value::Null),
        Store::Sharded(s) => (s.table().epoch.into(), groups(s)),
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
